// Package rollout decides which instances of one app start, serve, drain and
// stop. It is told facts (a wish, a probe, an exit, the time) and returns
// actions for its caller to carry out. There is no clock, file, process or
// goroutine inside: the same facts always lead to the same actions, which is
// what the stories in testdata show.
//
// What it promises:
//
//   - An instance that serves is not touched by a rollout before every new one is
//     proven and the commit has succeeded. A rollout that fails leaves the old
//     build as it was.
//   - The last instance that still accepts connections keeps its traffic, however
//     its probes go, until another can take it.
//   - A build that dies is started again for ever, with growing pauses.
//   - Of an on-demand app at most one start is under way, and a failed one is
//     remembered for a pause, so that no burst of requests is a burst of starts.
//
// It leaves to others what an instance is, how it is reached, and what a commit
// does.
package rollout

import (
	"cmp"
	"fmt"
	"maps"
	"math"
	"slices"
	"time"

	"tako/internal/tako"
)

// The numbers of the policy.
const (
	// Parallel bounds how many instances of a build come up at one time. A build
	// that does not come up at all must not keep the next one from doing so.
	Parallel = 4
	// ProvenAfter is how many good probes in a row a new build's instance needs.
	ProvenAfter = 2
	// OutAfter and DeadAfter are the bad probes in a row after which an instance
	// gets no more traffic, and is replaced.
	OutAfter  = 2
	DeadAfter = 5
	// BackoffFirst doubles with each crash up to BackoffMost, give or take
	// BackoffJitter of it. After HealthyAfter of health all is forgiven.
	BackoffFirst  = 500 * time.Millisecond
	BackoffMost   = 60 * time.Second
	BackoffJitter = 0.2
	HealthyAfter  = 60 * time.Second
	// LoopAfter is how many crashes in a row are called a crash loop.
	LoopAfter = 3
	// CutTime is how long streams may take to be ended properly, before their
	// instance is stopped.
	CutTime = 1500 * time.Millisecond
	// IdleDrain bounds a request that reached an on-demand instance in the moment
	// it was found idle.
	IdleDrain = 24 * time.Hour
)

// Timing is what an app may choose for itself.
type Timing struct {
	Ready     time.Duration // until the first good probe
	Stability time.Duration // how long a new build's instance must stay good
	Drain     time.Duration // for requests in flight
	Streams   time.Duration // for streams, counted from the start of the drain
	Grace     time.Duration // between SIGTERM and SIGKILL
}

// DefaultTiming is the timing of an app that chooses nothing.
var DefaultTiming = Timing{
	Ready:     30 * time.Second,
	Stability: 3 * time.Second,
	Drain:     30 * time.Second,
	Streams:   60 * time.Second,
	Grace:     10 * time.Second,
}

// A Build is a release with the environment and secrets it was started with.
// Builds are numbered by the caller, rising; 0 is none.
type Build uint64

// A Plan is what an app should be.
type Plan struct {
	Build     Build
	Instances int // 0 is on demand
	Idle      time.Duration
	Timing    Timing
	// Workers are the processes that have no routes, by name, and how many of
	// each. They run also while an on-demand app sleeps.
	Workers map[string]int
}

// Web is the name of the process that has the routes.
const Web = ""

// onDemand reports whether instances exist only while they are needed.
func (p Plan) onDemand() bool { return p.Instances == 0 }

// warm is how many instances of a process a rollout has to prove.
func (p Plan) warm(process string) int {
	if process == Web {
		return max(1, p.Instances)
	}
	return p.Workers[process]
}

// processes are the names of all processes, the web one first.
func (p Plan) processes() []string {
	return append([]string{Web}, slices.Sorted(maps.Keys(p.Workers))...)
}

type phase uint8

const (
	proving phase = iota
	committing
	draining
)

// roll is a rollout under way.
type roll struct {
	plan   Plan
	phase  phase
	failed *Failure
	old    int // instances that served when it began
}

type stage uint8

const (
	starting stage = iota // no good probe yet
	proved                // of a new build: good, not yet committed
	serving
	drained // gets no new request; waits for the last ones
	ending  // told to stop; Exited is to come
)

type instance struct {
	n          uint32
	process    string
	build      Build
	stage      stage
	timing     Timing
	startedAt  time.Time
	goodAt     time.Time // since when every probe was good
	servedAt   time.Time // since when it serves
	good, bad  int       // streaks
	accepts    bool      // a connection was accepted at the last bad probe
	via        string
	detail     string
	condemned  bool // to be replaced
	quiet      bool // no request in flight any more
	streams    int
	drainUntil time.Time
	cutting    bool // its streams are being ended
	cutUntil   time.Time
	cutAt      time.Time // end of its streams
}

// pace is how a process is started again after it died.
type pace struct {
	crashes   int // in a row
	crashedAt time.Time
	nextStart time.Time // no start before
	trouble   string    // why the last start or instance failed
}

// App is the state machine of one app. It is not safe for concurrent use.
type App struct {
	jitter func() float64 // in [-1, 1]

	plan      Plan // what is committed
	have      bool // plan is set
	stopped   bool
	awake     bool // an on-demand app that should run
	roll      *roll
	instances []*instance // by number
	nextN     uint32

	paces    map[string]*pace // by process
	quietAt  time.Time        // on demand: since when nothing happened
	stopping bool             // a Stop waits for its Done

	busy  bool // on demand: a request is in flight or waits
	shown face // what was published last

	// of one Step
	now     time.Time
	actions []Action
}

// face is what the proxies see of an app: when it changes it is published.
type face struct {
	build   Build
	trouble Trouble
	mayWait bool
	ups     string
}

// New makes an app without a build. jitter returns a number in [-1, 1] for each
// back-off; nil means no jitter.
func New(jitter func() float64) *App {
	if jitter == nil {
		jitter = func() float64 { return 0 }
	}
	return &App{jitter: jitter, nextN: 1, paces: make(map[string]*pace)}
}

// NewFrom is New with the number of the first instance, from 1.
func NewFrom(first uint32, jitter func() float64) *App {
	a := New(jitter)
	a.nextN = max(first, 1)
	return a
}

// pace returns the pace of a process.
func (a *App) pace(process string) *pace {
	p := a.paces[process]
	if p == nil {
		p = &pace{}
		a.paces[process] = p
	}
	return p
}

// Step takes one fact at a time that never goes back, and returns what is to be
// done, in order. The caller also steps with Tick at the time that Next names.
func (a *App) Step(now time.Time, f Fact) []Action {
	a.now, a.actions = now, nil
	a.take(f)
	a.settle()
	if f := a.face(); f != a.shown {
		a.shown = f
		// The proxies learn of it before anything stops and before a Done is told.
		at := slices.IndexFunc(a.actions, func(act Action) bool {
			switch act.(type) {
			case StopInstance, Done:
				return true
			}
			return false
		})
		if at < 0 {
			at = len(a.actions)
		}
		a.actions = slices.Insert(a.actions, at, Action(Publish{}))
	}
	return a.actions
}

func (a *App) face() face {
	v := a.View(a.now)
	var ups []byte
	for _, in := range v.All {
		if in.Serves || in.Draining {
			ups = fmt.Appendf(ups, "%d %t %t %t;", in.N, in.Draining, in.Out, in.Cut)
		}
	}
	return face{build: v.Build, trouble: v.Trouble, mayWait: v.MayWait, ups: string(ups)}
}

func (a *App) do(act Action) { a.actions = append(a.actions, act) }

func (a *App) find(n uint32) *instance {
	i, ok := slices.BinarySearchFunc(a.instances, n, func(in *instance, n uint32) int { return cmp.Compare(in.n, n) })
	if !ok {
		return nil
	}
	return a.instances[i]
}

func (a *App) take(f Fact) {
	switch f := f.(type) {
	case Restore:
		a.plan, a.have, a.stopped = f.Plan, true, f.Stopped
	case Roll:
		a.begin(f.Plan)
	case Committed:
		a.committed(f)
	case StartFailed:
		if in := a.find(f.N); in != nil {
			a.remove(in)
			a.failed(in, Failure{N: f.N, Reason: f.Reason})
		}
	case Exited:
		if in := a.find(f.N); in != nil {
			a.remove(in)
			if in.stage != ending && in.stage != drained {
				a.failed(in, Failure(f))
			}
		}
	case Probed:
		if in := a.find(f.N); in != nil {
			a.probed(in, f)
		}
	case Unreachable:
		// The first refused connect: out at once, not to wait for the probe.
		if in := a.find(f.N); in != nil && in.stage == serving && in.bad < OutAfter {
			in.bad, in.good, in.accepts, in.detail = OutAfter, 0, false, "connection refused"
		}
	case Quiet:
		if in := a.find(f.N); in != nil && in.stage == drained {
			in.quiet, in.streams = true, f.Streams
		}
	case Traffic:
		a.busy = f.Busy
		if f.Busy {
			a.quietAt = a.now
		} else if last := a.now.Add(-f.IdleFor); last.After(a.quietAt) {
			a.quietAt = last
		}
	case Wake:
		if a.have && !a.stopped && a.plan.onDemand() && !a.pace(Web).nextStart.After(a.now) && !a.awake {
			a.awake, a.quietAt = true, a.now
		}
	case Scale:
		a.plan.Instances = f.Instances
		a.awake = false
		if a.plan.onDemand() {
			a.awake, a.quietAt = a.anyServing(), a.now
		}
	case Stop:
		a.halt()
	case Tick:
	}
}

// begin starts a rollout. The caller has made sure that none is under way.
func (a *App) begin(p Plan) {
	if a.roll != nil {
		panic("rollout: a second rollout of one app")
	}
	a.roll = &roll{plan: p}
	for _, in := range a.instances {
		if in.stage == serving && in.process == Web {
			a.roll.old++
		}
	}
}

// committed goes over to the new build, or gives it up.
func (a *App) committed(f Committed) {
	r := a.roll
	if r == nil || r.phase != committing || r.plan.Build != f.Build {
		return
	}
	if f.Err != "" {
		r.failed, r.phase = &Failure{Reason: f.Err}, proving // given up in settle
		return
	}
	r.phase = draining
	if a.stopping { // a stop came meanwhile: durable, and stopped
		a.plan, a.have = r.plan, true
		for _, in := range a.instances {
			a.drain(in)
		}
		return
	}
	a.plan, a.have, a.stopped = r.plan, true, false
	clear(a.paces)
	a.awake, a.quietAt = a.plan.onDemand(), a.now
	for _, in := range a.instances {
		if in.build == r.plan.Build && in.stage == proved {
			in.stage, in.servedAt = serving, a.now
		}
	}
}

// relieve has the instances of other builds drain once one of the committed build
// serves: should all of those have died during the commit, the old ones go on.
func (a *App) relieve() {
	if a.roll != nil && a.roll.phase != draining {
		return // the others are the new ones
	}
	fresh := slices.ContainsFunc(a.instances, func(in *instance) bool {
		return in.build == a.plan.Build && in.process == Web && in.stage == serving && in.bad < OutAfter
	})
	if !fresh {
		return
	}
	for _, in := range a.instances {
		if in.build != a.plan.Build {
			a.drain(in)
		}
	}
}

// halt begins a stop by command.
func (a *App) halt() {
	a.stopped, a.stopping, a.awake = true, true, false
	clear(a.paces)
	if a.roll != nil && a.roll.failed == nil {
		a.roll.failed = &Failure{Reason: "the app was stopped"}
	}
	for _, in := range a.instances {
		a.drain(in)
	}
}

// drain takes an instance out of service, politely.
func (a *App) drain(in *instance) {
	if in.process != Web {
		a.stop(in) // it has no traffic
		return
	}
	switch in.stage {
	case serving:
		in.stage, in.quiet = drained, false
		in.drainUntil = a.now.Add(in.timing.Drain)
		in.cutAt = a.now.Add(in.timing.Streams)
	case starting, proved:
		a.stop(in) // it has no traffic
	case drained: // perhaps with more patience
		if limit := a.now.Add(in.timing.Drain); limit.Before(in.drainUntil) {
			in.drainUntil = limit
		}
		if limit := a.now.Add(in.timing.Streams); limit.Before(in.cutAt) {
			in.cutAt = limit
		}
	case ending:
	}
}

func (a *App) stop(in *instance) {
	if in.stage == ending {
		return
	}
	in.stage = ending
	a.do(StopInstance{N: in.n, Grace: in.timing.Grace})
}

func (a *App) remove(in *instance) {
	a.instances = slices.DeleteFunc(a.instances, func(x *instance) bool { return x == in })
}

func (a *App) start(p Plan, process string) {
	in := &instance{n: a.nextN, process: process, build: p.Build, timing: p.Timing, startedAt: a.now}
	a.nextN++
	a.instances = append(a.instances, in)
	a.do(StartInstance{N: in.n, Build: p.Build, Process: process})
}

// probed takes the outcome of a probe.
func (a *App) probed(in *instance, f Probed) {
	if !f.Good {
		// A refused connect may have counted more than the probes have yet.
		in.good, in.bad, in.accepts, in.detail = 0, max(in.bad, f.Streak), f.Accepts, f.Detail
		if in.stage == proved && in.bad >= OutAfter {
			a.rollFailed(in, Failure{N: in.n, Reason: "Instance became unhealthy during startup: " + f.Detail})
		}
		if in.stage == serving && in.bad >= DeadAfter && !in.condemned {
			in.condemned = true // replaced also on demand: whoever asks would wait for it for ever
			a.crashed(in, fmt.Sprintf("failed %d probes in a row: %s", in.bad, f.Detail))
		}
		return
	}
	if in.good == 0 {
		in.goodAt = a.now
	}
	in.good, in.bad, in.detail = f.Streak, 0, ""
	if f.Via != "" {
		in.via = f.Via
	}
	switch in.stage {
	case starting:
		if a.roll != nil && in.build == a.roll.plan.Build && a.roll.phase != draining {
			if in.good >= ProvenAfter {
				in.stage = proved
			}
			return
		}
		in.stage, in.servedAt = serving, a.now
		a.quietAt = a.now
	case serving, proved, drained, ending:
	}
}

// failed takes the end of an instance that nobody asked to end.
func (a *App) failed(in *instance, f Failure) {
	if r := a.roll; r != nil && in.build == r.plan.Build && r.phase != draining {
		a.rollFailed(in, f)
		return
	}
	if in.build != a.plan.Build {
		return
	}
	if !in.condemned { // that was counted when it was condemned
		a.crashed(in, f.Reason)
	}
}

func (a *App) rollFailed(in *instance, f Failure) {
	if a.roll != nil && a.roll.failed == nil && in.build == a.roll.plan.Build {
		a.roll.failed = &f
	}
}

// crashed counts a crash and sets the time of the next start.
func (a *App) crashed(in *instance, why string) {
	p := a.pace(in.process)
	p.crashedAt = a.now
	p.trouble = fmt.Sprintf("instance %d: %s", in.n, why)
	if in.process != Web {
		p.trouble = fmt.Sprintf("process %s, %s", in.process, p.trouble)
	}
	if in.stage == serving && a.now.Sub(in.servedAt) >= HealthyAfter {
		p.crashes, p.nextStart = 0, a.now // it was well for long: at once
		return
	}
	p.crashes++
	pause := BackoffFirst
	if doublings := p.crashes - 1; doublings < 10 {
		pause <<= doublings
	} else {
		pause = BackoffMost
	}
	pause = min(pause, BackoffMost)
	pause += time.Duration(float64(pause) * BackoffJitter * a.jitter())
	p.nextStart = a.now.Add(pause)
	if in.process == Web && a.plan.onDemand() && !in.condemned {
		a.awake = false // requests fail until the pause is over; the next one wakes it
	}
}

// settle brings what is closer to what should be. It is idempotent.
func (a *App) settle() {
	a.settleRoll()
	a.relieve()
	a.settleSteady()
	a.settleDraining()
	a.settleDone()
}

func (a *App) settleRoll() {
	r := a.roll
	if r == nil || r.phase == committing || r.phase == draining {
		return
	}
	mine, ready, coming := make(map[string]int), 0, 0
	for _, in := range a.instances {
		if in.build != r.plan.Build {
			continue
		}
		mine[in.process]++
		switch in.stage {
		case starting:
			coming++
			if !a.now.Before(in.startedAt.Add(in.timing.Ready)) && r.failed == nil {
				r.failed = &Failure{N: in.n, Reason: in.late()}
			}
		case proved:
			if in.bad == 0 && !a.now.Before(in.goodAt.Add(in.timing.Stability)) {
				ready++
			}
		case serving, drained, ending:
		}
	}
	if r.failed != nil {
		for _, in := range a.instances {
			if in.build == r.plan.Build {
				a.stop(in)
			}
		}
		a.roll = nil
		a.do(Done{What: "roll", Failure: r.failed, Old: r.old})
		return
	}
	want := 0
	for _, process := range r.plan.processes() {
		warm := r.plan.warm(process)
		want += warm
		for ; mine[process] < warm && coming < Parallel; coming++ {
			a.start(r.plan, process)
			mine[process]++
		}
	}
	if ready == want {
		r.phase = committing
		a.do(Commit{Build: r.plan.Build})
	}
}

// late is the reason for giving up an instance that did not become ready.
func (in *instance) late() string {
	if in.detail == "" {
		return "Instance startup timeout"
	}
	return "Instance startup timeout: " + in.detail
}

// settleSteady keeps the committed plan.
func (a *App) settleSteady() {
	if !a.have || a.stopped {
		return
	}
	coming := 0
	for _, in := range a.instances {
		if in.build != a.plan.Build || in.stage != starting {
			continue
		}
		if !a.now.Before(in.startedAt.Add(in.timing.Ready)) {
			a.crashed(in, in.late())
			a.stop(in)
			continue
		}
		coming++
	}
	if a.plan.onDemand() && a.awake && !a.busy && coming == 0 && a.roll == nil && !a.now.Before(a.quietAt.Add(a.plan.Idle)) {
		a.awake = false
	}
	for _, process := range a.plan.processes() {
		want := a.plan.warm(process)
		if process == Web && a.plan.onDemand() && !a.awake {
			want = 0
		}
		coming = a.settleProcess(process, want, coming)
	}
}

// settleProcess keeps want instances of one process; coming counts those of the
// build that come up.
func (a *App) settleProcess(process string, want, coming int) int {
	p := a.pace(process)
	if p.trouble != "" && !a.now.Before(p.crashedAt.Add(HealthyAfter)) && a.servingSince(process, HealthyAfter) {
		p.crashes, p.trouble = 0, ""
	}
	var live []*instance
	healthy := 0
	for _, in := range a.instances {
		if in.build != a.plan.Build || in.process != process {
			continue
		}
		switch in.stage {
		case starting:
			live = append(live, in)
		case serving:
			if in.condemned {
				continue
			}
			if in.bad < OutAfter {
				healthy++
			}
			live = append(live, in)
		case proved, drained, ending:
		}
	}
	// What is condemned goes once another serves, at once if it accepts nothing.
	for _, in := range a.instances {
		if in.process != process || in.stage != serving || !in.condemned {
			continue
		}
		if healthy > 0 {
			a.drain(in)
		} else if !in.accepts {
			a.stop(in)
		}
	}
	if !p.nextStart.After(a.now) {
		for ; len(live) < want && coming < Parallel; coming++ {
			a.start(a.plan, process)
			live = append(live, a.instances[len(a.instances)-1])
		}
	}
	for len(live) > want { // the youngest go first
		in := live[len(live)-1]
		a.drain(in)
		if a.plan.onDemand() {
			// It is idle, and nothing else takes its place: a request that came in
			// the same moment ends in its own time.
			in.drainUntil, in.cutAt = a.now.Add(IdleDrain), a.now.Add(IdleDrain)
		}
		live = live[:len(live)-1]
	}
	return coming
}

func (a *App) settleDraining() {
	for _, in := range a.instances {
		if in.stage != drained {
			continue
		}
		switch {
		case in.quiet && in.streams == 0:
			a.stop(in)
		case !in.cutting && !a.now.Before(a.cutFrom(in)):
			in.cutting, in.cutUntil = true, a.now.Add(CutTime)
		case in.cutting && !a.now.Before(in.cutUntil):
			a.stop(in)
		}
	}
}

// cutFrom is when what is left on a draining instance is ended.
func (a *App) cutFrom(in *instance) time.Time {
	if in.quiet && in.cutAt.After(in.drainUntil) {
		return in.cutAt // only streams are left
	}
	return in.drainUntil
}

func (a *App) settleDone() {
	if r := a.roll; r != nil && r.phase == draining {
		left := slices.ContainsFunc(a.instances, func(in *instance) bool {
			return in.build != r.plan.Build && in.stage == drained && !in.quiet
		})
		if !left {
			a.roll = nil
			a.do(Done{What: "roll", New: r.plan.warm(Web), Old: r.old})
		}
	}
	if a.stopping && len(a.instances) == 0 {
		a.stopping = false
		a.do(Done{What: "stop"})
	}
}

func (a *App) anyServing() bool {
	return slices.ContainsFunc(a.instances, func(in *instance) bool { return in.stage == serving && in.process == Web })
}

func (a *App) servingSince(process string, d time.Duration) bool {
	return slices.ContainsFunc(a.instances, func(in *instance) bool {
		return in.process == process && in.stage == serving && in.build == a.plan.Build && in.bad == 0 && !a.now.Before(in.servedAt.Add(d))
	})
}

// Next returns when to Step with Tick at the latest; ok is false if only facts
// can change anything.
func (a *App) Next() (at time.Time, ok bool) {
	consider := func(t time.Time) {
		if t.After(a.now) && (!ok || t.Before(at)) {
			at, ok = t, true
		}
	}
	for _, in := range a.instances {
		switch in.stage {
		case starting:
			consider(in.startedAt.Add(in.timing.Ready))
		case proved:
			consider(in.goodAt.Add(in.timing.Stability))
		case drained:
			if in.cutting {
				consider(in.cutUntil)
			} else {
				consider(a.cutFrom(in))
			}
		case serving:
			if p := a.pace(in.process); p.trouble != "" {
				consider(in.servedAt.Add(HealthyAfter))
				consider(p.crashedAt.Add(HealthyAfter))
			}
		case ending:
		}
	}
	if a.have && !a.stopped {
		for _, p := range a.paces {
			consider(p.nextStart)
		}
		if a.awake && !a.busy {
			consider(a.quietAt.Add(a.plan.Idle))
		}
	}
	return at, ok
}

// retryIn is the time to the next start of an app that died, rounded up to whole
// seconds, at least one.
func (a *App) retryIn() time.Duration {
	left := a.pace(Web).nextStart.Sub(a.now)
	if left <= 0 {
		return time.Second
	}
	return time.Duration(math.Ceil(left.Seconds())) * time.Second
}

// View is the app as others see it now.
func (a *App) View(now time.Time) View {
	a.now = now
	web := a.pace(Web)
	v := View{Build: a.plan.Build, Rolling: a.roll != nil, Crashes: web.crashes}
	for _, process := range a.plan.processes() {
		if why := a.pace(process).trouble; why != "" && v.Why == "" {
			v.Why = why
		}
	}
	if a.have {
		v.Instances = a.plan.Instances
	}
	serves, coming, accepts, present := 0, 0, 0, 0
	for _, in := range a.instances {
		i := Instance{
			N: in.n, Process: in.process, Build: in.build, Via: in.via, StartedAt: in.startedAt, Detail: in.detail,
			Serves:   in.stage == serving && in.process == Web,
			Draining: in.stage == drained,
			Out:      in.stage == serving && in.bad >= OutAfter,
			Accepts:  in.accepts,
			Cut:      in.stage == drained && in.cutting,
		}
		if in.build == a.plan.Build && in.process == Web && (in.stage == starting || in.stage == serving) {
			present++
		}
		switch in.stage {
		case starting:
			i.State = tako.InstanceStarting
			if in.build == a.plan.Build && in.process == Web {
				coming++
			}
		case proved:
			i.State = tako.InstanceReady
		case serving:
			i.State = tako.InstanceHealthy
			switch {
			case i.Out:
				i.State = tako.InstanceUnhealthy
				if in.accepts && in.process == Web {
					accepts++
				}
			case in.process == Web:
				serves++
			}
		case drained:
			i.State = tako.InstanceDraining
		case ending:
			i.State = tako.InstanceDraining
		}
		v.All = append(v.All, i)
	}
	retry := web.nextStart.After(now)
	if retry {
		v.RetryIn = web.nextStart.Sub(now)
	}
	switch {
	case a.stopped || !a.have && a.roll == nil:
		v.State, v.Trouble = tako.AppStopped, TroubleStopped
	case a.roll != nil && a.roll.phase != draining:
		v.State = tako.AppDeploying
	case serves > 0:
		v.State = tako.AppRunning
	case a.plan.onDemand() && present == 0 && !retry:
		v.State = tako.AppIdle
	case web.crashes >= LoopAfter:
		v.State = tako.AppCrashLoop
	case web.crashes > 0:
		v.State = tako.AppError
	case coming > 0:
		v.State = tako.AppDeploying
	default:
		v.State = tako.AppError
	}
	if a.have && !a.stopped && serves == 0 && accepts == 0 {
		switch {
		case a.plan.onDemand() && retry:
			v.Trouble, v.RetryAfter = TroubleStartFailed, a.retryIn()
		case !a.plan.onDemand() && web.crashes > 0:
			v.Trouble, v.RetryAfter = TroubleDown, a.retryIn()
		}
	}
	v.MayWait = a.have && !a.stopped && (a.plan.onDemand() || web.crashes == 0 && coming > 0)
	return v
}
