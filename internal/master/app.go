package master

import (
	"fmt"
	"maps"
	"math"
	"math/rand/v2"
	"net"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/hashicorp/go-hclog"

	"tako/internal/ipc"
	"tako/internal/logging"
	"tako/internal/paths"
	"tako/internal/release"
	"tako/internal/rollout"
	"tako/internal/store"
	"tako/internal/tako"
	"tako/internal/wire"
)

// PortsPerApp is how many TCP ports each app's range has.
const PortsPerApp = 40

// A build is a release as its instances are started: with the manifest,
// environment and secrets of one moment.
type build struct {
	number   rollout.Build
	rollout  int64 // rolloutOf what it was, or is to be, committed as
	release  tako.ReleaseID
	dir      string
	manifest *release.Manifest
	argv     []string
	secrets  map[string]string
	routes   []string
}

// A process is what the master knows of one instance, its descriptors included.
type process struct {
	build     *build
	name      string // of the process in the manifest; rollout.Web is the one with routes
	port      uint16
	socket    string
	pid       int
	startedAt time.Time
	// pidfd, stdout and stderr are duplicates of the agent's: with them an
	// instance outlives its agent, and its pipes always have a reader.
	held []ipc.FD
	// start is what the agent was asked, or is to be once there is one: then sent
	// is false. The next agent needs it to adopt the instance.
	start    *wire.Start
	sent     bool
	stopBy   time.Time // when it is to be gone; zero if nobody asked
	limits   string    // by what its limits are kept
	requests uint64    // counted by proxies that are gone
	restarts uint64    // how many of its process died before it
}

// An app is one app of the server: the deciding core, and what carries its
// actions out.
//
// Lock order: op, then server.mu, then app.mu, then the links' own.
type app struct {
	srv    *server
	id     tako.AppID
	layout paths.AppLayout
	log    hclog.Logger

	// op is held over a whole command; it has room for one.
	op chan struct{}

	mu        sync.Mutex
	core      *rollout.App
	reg       store.App     // as committed; reg.ID is "" before the first commit
	broken    string        // why it could not even be restored
	restoring chan struct{} // from a start until it is restored, then closed and nil
	plainHTTP bool          // while restoring
	builds    map[rollout.Build]*build
	procs     map[uint32]*process
	revision  uint64
	published uint64 // the last revision that every proxy was told
	timer     *time.Timer
	done      chan rollout.Done // of the command under way
	committer func() error      // what Commit does, for the rollout under way
	lastError string
	deaths    map[string]uint64 // by process, since the last commit: of those nobody asked to end
}

func newApp(s *server, id tako.AppID) *app {
	a := &app{
		srv: s, id: id, layout: s.layout.App(id),
		log:    s.log.With(logging.App, string(id)),
		op:     make(chan struct{}, 1),
		core:   rollout.NewFrom(s.firstInstance, jitter),
		builds: make(map[rollout.Build]*build),
		procs:  make(map[uint32]*process),
		deaths: make(map[string]uint64),
		done:   make(chan rollout.Done, 2),
	}
	a.timer = time.AfterFunc(time.Hour, func() { a.step(rollout.Tick{}) })
	a.timer.Stop()
	return a
}

// jitter is the randomness of back-offs, in [-1, 1].
func jitter() float64 { return 2*rand.Float64() - 1 }

// tryOp takes the app's command lock, or reports that a command is under way. It
// waits for an app that is just being restored: no command comes before that.
func (a *app) tryOp() bool {
	a.mu.Lock()
	restored := a.restoring
	a.mu.Unlock()
	if restored != nil {
		select {
		case <-restored:
		case <-a.srv.stopping:
		}
	}
	select {
	case a.op <- struct{}{}:
		return true
	default:
		return false
	}
}

func (a *app) endOp() { <-a.op }

// step tells the core a fact and carries out what it decides.
func (a *app) step(f rollout.Fact) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.stepLocked(f)
}

func (a *app) stepLocked(f rollout.Fact) {
	for _, act := range a.core.Step(time.Now(), f) {
		switch act := act.(type) {
		case rollout.StartInstance:
			a.startInstance(act)
		case rollout.StopInstance:
			a.log.Info("stopping instance", logging.Instance, act.N)
			a.stopInstance(act)
		case rollout.Publish:
			a.publish()
		case rollout.Commit:
			a.commit(act.Build)
		case rollout.Done:
			if act.Failure != nil {
				a.log.Warn("rollout given up", "reason", act.Failure.Reason)
			}
			a.done <- act
		}
	}
	a.forgetBuilds()
	a.rearm()
}

func (a *app) rearm() {
	if at, ok := a.core.Next(); ok {
		a.timer.Reset(max(time.Until(at), 0))
	} else {
		a.timer.Stop()
	}
}

// commit runs the committer away from the lock: it writes to the disk.
func (a *app) commit(number rollout.Build) {
	do := a.committer
	go func() {
		fact := rollout.Committed{Build: number}
		if do != nil {
			if err := do(); err != nil {
				fact.Err = err.Error()
			}
		}
		a.step(fact)
	}()
}

func (a *app) instance(n uint32) tako.InstanceID { return tako.InstanceID{App: a.id, N: n} }

// startInstance asks the agent for a process.
func (a *app) startInstance(act rollout.StartInstance) {
	b := a.builds[act.Build]
	m := b.manifest
	p := &process{build: b, name: act.Process, startedAt: time.Now(), restarts: a.deaths[act.Process]}
	a.procs[act.N] = p
	argv, probe := b.argv, wire.Probe{Kind: wire.ProbeAlive}
	if act.Process == rollout.Web {
		probe = a.listens(p, act.N)
	} else {
		argv = m.Processes[act.Process].Start
	}
	a.log.Info("starting instance", logging.Instance, act.N, logging.Release, string(b.release), "port", p.port)
	p.start = &wire.Start{
		Instance: a.instance(act.N),
		Release:  b.release,
		Rollout:  b.rollout,
		Command:  wire.Command{Dir: b.dir, Argv: argv, Env: a.environment(b, act.N, p), User: a.user()},
		Port:     p.port,
		Socket:   p.socket,
		Probe:    probe,
		LogDir:   a.layout.Logs(),
		LogBytes: LogBytes,
		LogFiles: LogFiles,
		// A little before we give it up, so that it can still say what is wrong.
		ReadyMS: int((m.Timeouts.Ready * 19 / 20).Milliseconds()),
		Limits: wire.Limits{
			Memory: m.Limits.Memory, CPUMilli: int(math.Round(m.Limits.CPU * 1000)), PIDs: m.Limits.PIDs,
		},
	}
	p.sent = a.srv.agentSend(p.start) == nil // else the next agent is asked
}

// stopInstance asks the agent to stop a process. Without one the next is asked.
func (a *app) stopInstance(act rollout.StopInstance) {
	p := a.procs[act.N]
	if p == nil {
		return // its end is on the way to the core
	}
	p.stopBy = time.Now().Add(act.Grace)
	if p.start != nil && !p.sent {
		p.sent = true // nobody is asked to start it any more
		go a.ended(act.N, rollout.StartFailed{N: act.N, Reason: errNoAgent.Error()})
		return
	}
	_ = a.srv.agentSend(&wire.Stop{Instance: a.instance(act.N), GraceMS: int(act.Grace.Milliseconds())})
}

// listens gives an instance of the web process a port and a socket path, and
// returns how it is probed.
func (a *app) listens(p *process, n uint32) wire.Probe {
	p.port = a.pickPort(n)
	if path, ok := a.layout.InstanceSocket(n); ok {
		p.socket = path
	} else {
		a.log.Warn("the path of the instance's socket is too long: it is offered its port only", "path", path)
	}
	h := p.build.manifest.Health
	probe := wire.Probe{
		Kind: wire.ProbeHTTP, Path: h.Path, Host: h.Host, Codes: h.Codes,
		IntervalMS: int(h.Interval.Milliseconds()), TimeoutMS: int(h.Timeout.Milliseconds()),
	}
	if h.Connect {
		probe.Kind = wire.ProbeConnect
	}
	return probe
}

// ended takes an instance's end: its descriptors are closed, then the core is
// told.
func (a *app) ended(n uint32, f rollout.Fact) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if p := a.procs[n]; p != nil {
		for _, in := range a.core.View(time.Now()).All {
			if in.N == n && !in.Draining && in.State != tako.InstanceDraining {
				a.deaths[p.name]++
			}
		}
		for _, fd := range p.held {
			fd.Close()
		}
		a.srv.dropInstance(a.instance(n))
		delete(a.procs, n)
		a.srv.proxies.forget(a.instance(n))
	}
	a.stepLocked(f)
}

// user is whom the app runs as.
func (a *app) user() wire.User { return wire.User{UID: a.reg.UID, GID: a.reg.UID} }

// pickPort chooses a TCP port for an instance: the next of the app's range that
// nobody listens on, else any of the server's range.
func (a *app) pickPort(n uint32) uint16 {
	used := make(map[uint16]bool, len(a.procs))
	for _, p := range a.procs {
		used[p.port] = true
	}
	lo, hi := int(a.srv.s.portMin), int(a.srv.s.portMax)
	width := hi - lo + 1
	base := int(a.reg.BasePort) - lo + int(a.srv.s.InstancePortOffset)
	if base %= width; base < 0 { // of a range before a reload: the next deploy allocates another one
		base += width
	}
	for i := range PortsPerApp {
		port := uint16(lo + (base+(int(n)-1+i)%PortsPerApp)%width) // within the range
		if !used[port] && portFree(port) {
			return port
		}
	}
	for range 128 {
		port := uint16(lo + rand.IntN(width)) // within the range
		if !used[port] && portFree(port) {
			a.log.Warn("every port of the app's range is taken", "port", port)
			return port
		}
	}
	return 0 // the app may still use its socket
}

// portFree reports whether nobody listens on a loopback port now.
func portFree(port uint16) bool {
	l, err := net.Listen("tcp4", "127.0.0.1:"+strconv.Itoa(int(port))) //nolint:noctx // binding does not wait
	if err != nil {
		return false
	}
	_ = l.Close()
	return true
}

// environment is all that an instance finds in its environment. What is ours
// wins over secrets, secrets over env_vars, env_vars over defaults.
func (a *app) environment(b *build, n uint32, p *process) []string {
	env := a.stepEnvironment(b)
	if p.name == rollout.Web {
		env["PORT"] = strconv.Itoa(int(p.port))
		env["HOST"], env["HOSTNAME"] = "127.0.0.1", "127.0.0.1"
	} else {
		env[strings.TrimSuffix(envProcess, "=")] = p.name
	}
	env["TAKO_INSTANCE"] = strconv.FormatUint(uint64(n), 10)
	if p.socket != "" {
		env["TAKO_APP_SOCKET"] = p.socket
	}
	return environ(env)
}

// envProcess tells a process without routes its name in the manifest.
const envProcess = "TAKO_PROCESS="

// stepEnvironment is the environment of an install step, without what only an
// instance has.
func (a *app) stepEnvironment(b *build) map[string]string {
	env := map[string]string{
		"PATH": os.Getenv("PATH"), "LANG": os.Getenv("LANG"),
		"NODE_ENV": "production", "BUN_ENV": "production",
		"TAKO_BUILD": string(b.release),
	}
	if env["PATH"] == "" {
		env["PATH"] = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
	}
	if env["LANG"] == "" {
		env["LANG"] = "C.UTF-8"
	}
	if tz := os.Getenv("TZ"); tz != "" {
		env["TZ"] = tz
	}
	maps.Copy(env, b.manifest.Env)
	maps.Copy(env, b.secrets)
	env["HOME"] = a.layout.Data()
	env["TMPDIR"] = a.layout.Temp()
	env["TAKO_DATA_DIR"] = a.layout.Data()
	env["TAKO_APP"] = string(a.id)
	env["TAKO_VERSION"] = string(b.release)
	return env
}

func environ(env map[string]string) []string {
	out := make([]string, 0, len(env))
	for _, name := range slices.Sorted(maps.Keys(env)) {
		out = append(out, name+"="+env[name])
	}
	return out
}

// publish tells every proxy what the app looks like now. Called with mu held, so
// that revisions arrive in order.
func (a *app) publish() {
	a.revision++
	if msg := a.message(); msg != nil {
		a.published = a.revision
		a.srv.proxies.send(msg)
	}
	v := a.core.View(time.Now())
	if v.Why != "" {
		a.lastError = v.Why
	} else if v.State == tako.AppRunning {
		a.lastError = ""
	}
}

// message is the app as a proxy has to know it, nil before its first commit.
func (a *app) message() *wire.App {
	if a.reg.ID == "" {
		return nil
	}
	now := time.Now()
	v := a.core.View(now)
	msg := &wire.App{
		App: a.id, Revision: a.revision, Routes: a.reg.Routes, Release: a.reg.Release,
		OnDemand: v.MayWait,
		Queue:    wire.Queue{Waiters: DefaultWaiters, WaitMS: int(DefaultWait.Milliseconds())},
		Trouble:  wire.Trouble{RetryAfterS: int(v.RetryAfter / time.Second)},
	}
	switch v.Trouble {
	case rollout.TroubleNone:
	case rollout.TroubleStopped:
		msg.Trouble.Kind = wire.TroubleStopped
	case rollout.TroubleDown:
		msg.Trouble.Kind = wire.TroubleCrashLoop
	case rollout.TroubleStartFailed:
		msg.Trouble.Kind = wire.TroubleStartFailed
	}
	if a.broken != "" {
		msg.Trouble = wire.Trouble{Kind: wire.TroubleStopped}
	}
	if a.restoring != nil {
		msg.PlainHTTP = a.plainHTTP
		if !a.reg.Stopped {
			msg.OnDemand, msg.Trouble = true, wire.Trouble{} // requests wait for it
		}
	}
	if b := a.builds[v.Build]; b != nil {
		msg.PlainHTTP = !b.manifest.HTTPSRedirect
		msg.MaxInFlight, msg.MaxBody = b.manifest.Limits.InFlight, b.manifest.Limits.RequestBody
		msg.Queue = wire.Queue{Waiters: b.manifest.Queue.Waiters, WaitMS: int(b.manifest.Queue.Wait.Milliseconds())}
	}
	for _, in := range v.All {
		p := a.procs[in.N]
		if p == nil || !in.Serves && !in.Draining {
			continue
		}
		up := wire.Upstream{Instance: a.instance(in.N), Protocol: wire.Protocol(p.build.manifest.Protocol), Draining: in.Draining, Fallback: in.Out, CutStreams: in.Cut}
		if wire.Transport(in.Via) == wire.TransportUnix {
			up.Socket = p.socket
		}
		msg.Instances = append(msg.Instances, up)
	}
	return msg
}

// forgetBuilds drops what no instance, plan or rollout needs any more.
func (a *app) forgetBuilds() {
	inUse := make(map[rollout.Build]bool)
	v := a.core.View(time.Now())
	inUse[v.Build] = true
	for _, in := range v.All {
		inUse[in.Build] = true
	}
	if v.Rolling {
		return
	}
	for n := range a.builds {
		if !inUse[n] {
			delete(a.builds, n)
		}
	}
}

// plan is what the core has to know of a build.
func (b *build) plan(instances uint8, idle time.Duration) rollout.Plan {
	t := b.manifest.Timeouts
	workers := make(map[string]int)
	for name, p := range b.manifest.Processes {
		workers[name] = p.Instances
	}
	return rollout.Plan{
		Build: b.number, Instances: int(instances), Idle: idle, Workers: workers,
		Timing: rollout.Timing{Ready: t.Ready, Stability: t.Stability, Drain: t.Drain, Streams: t.Streams, Grace: t.Grace},
	}
}

// loadBuild reads a release from disk as it would be started now.
func (a *app) loadBuild(v tako.ReleaseID, dir string, secrets map[string]string, routes []string) (*build, error) {
	m, err := release.Load(dir)
	if err != nil {
		return nil, err
	}
	argv, err := m.Argv(dir)
	if err != nil {
		return nil, err
	}
	return &build{
		number: a.srv.nextBuild(), release: v, dir: dir,
		manifest: m, argv: argv, secrets: secrets, routes: routes,
	}, nil
}

// from takes an agent's word on one of our instances.
func (a *app) from(m wire.Message) {
	switch b := m.Body.(type) {
	case *wire.Started:
		a.mu.Lock()
		if p := a.procs[b.Instance.N]; p != nil && p.held == nil {
			p.pid, p.held, p.limits = b.PID, m.Files, b.Limits
			if b.Limits != "" {
				a.log.Debug("limits of the instance", logging.Instance, b.Instance.N, "kept_by", b.Limits)
			}
			m.Files = nil
			a.srv.keepInstance(b.Instance, p)
		}
		a.mu.Unlock()
		m.Discard()
	case *wire.StartFailed:
		a.log.Warn("instance did not start", logging.Instance, b.Instance.N, "reason", b.Reason)
		a.ended(b.Instance.N, rollout.StartFailed{N: b.Instance.N, Reason: "Failed to spawn instance: " + b.Reason})
	case *wire.Probed:
		if !b.Good {
			a.log.Debug("bad probe", logging.Instance, b.Instance.N, "streak", b.Streak, "detail", b.Detail)
		}
		a.step(rollout.Probed{N: b.Instance.N, Good: b.Good, Streak: b.Streak, Accepts: b.Accepts, Via: string(b.Via), Detail: b.Detail})
	case *wire.Exited:
		a.mu.Lock()
		known := a.procs[b.Instance.N] != nil
		a.mu.Unlock()
		if !known {
			return // two agents have seen it
		}
		a.log.Info("instance exited", logging.Instance, b.Instance.N, "how", exitText(b.Exit))
		a.ended(b.Instance.N, rollout.Exited{N: b.Instance.N, Reason: a.exitReason(b), Lines: b.LastLines})
	}
}

// exitReason is the text of an end that nobody asked for.
func (a *app) exitReason(e *wire.Exited) string {
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, in := range a.core.View(time.Now()).All {
		if in.N == e.Instance.N && in.State == tako.InstanceStarting {
			return fmt.Sprintf("Health check failed: Process exited during startup (%s)", exitText(e.Exit))
		}
	}
	return fmt.Sprintf("Process exited (%s)", exitText(e.Exit))
}

func exitText(e wire.Exit) string {
	switch {
	case e.OutOfMem:
		return "killed for lack of memory"
	case e.Forgotten:
		return "exit status unknown"
	case e.Signal != "":
		return "terminated by signal " + e.Signal
	}
	return fmt.Sprintf("exit code %d", e.Code)
}
