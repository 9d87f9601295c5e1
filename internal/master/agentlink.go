package master

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"tako/internal/ipc"
	"tako/internal/logging"
	"tako/internal/rollout"
	"tako/internal/supervise"
	"tako/internal/tako"
	"tako/internal/wire"
)

// errNoAgent is the error of what needs the agent while there is none.
var errNoAgent = tako.Errorf(tako.CodeBusy, "tako-agent is not running at the moment: try again shortly, or look into the server's log")

// runAgent runs one agent to its end.
func (s *server) runAgent(ctx context.Context, generation uint64) (ready time.Time, err error) {
	if l := s.adopted.takeAgent(); l != nil {
		if l.knows != nil {
			return s.employAndServe(ctx, l)
		}
		// It knows its instances already, and every proxy's dialling socket.
		s.agentMu.Lock()
		s.agent = l
		s.agentMu.Unlock()
		s.agentReady.Do(func() { close(s.agentUp) })
		return s.serveAgent(ctx, l)
	}
	l := s.takeSpare()
	if l == nil {
		if l, err = s.startAgent(ctx, generation); err != nil {
			return ready, err
		}
	}
	return s.employAndServe(ctx, l)
}

func (s *server) employAndServe(ctx context.Context, l *link) (time.Time, error) {
	var employing sync.WaitGroup
	defer employing.Wait() // it sends, which ends with the link
	employing.Go(func() { s.employ(l) })
	return s.serveAgent(ctx, l)
}

// startAgent starts an agent and returns when it is ready. Nobody receives from it
// then.
func (s *server) startAgent(ctx context.Context, generation uint64) (*link, error) {
	l, err := s.startLink(s.agentProgram, wire.LinkAgent, generation, s.agentIdentity())
	if err != nil {
		return nil, err
	}
	defer context.AfterFunc(ctx, func() { l.end(errNoServer) })()
	late := time.AfterFunc(ReadyTimeout, func() { l.kill(errors.New("not ready in time")) })
	defer late.Stop()
	s.groups.place(l.child.PID)
	err = l.conn.Send(0, s.agentSettings())
	for err == nil && !l.ready.Load() {
		var m wire.Message
		m, err = l.conn.Receive()
		m.Discard()
		if _, ok := m.Body.(*wire.Ready); ok && err == nil {
			l.setState("ready")
			l.ready.Store(true)
		}
	}
	if err != nil {
		l.lastWord()
		l.end(err)
		<-l.child.Done()
		return nil, fmt.Errorf("start %s: %w", wire.Agent, l.why)
	}
	s.log.Info("tako-agent is ready", "pid", l.child.PID, "generation", generation)
	return l, nil
}

// agentSettings are what an agent that starts now is told once.
func (s *server) agentSettings() *wire.AgentSettings {
	settings := &wire.AgentSettings{PortMin: s.s.portMin, PortMax: s.s.portMax, Groups: s.groups.Groups}
	if s.privileged {
		settings.InstanceGroup = s.netGroup
		settings.MinAppUID, settings.MaxAppUID = s.s.uidMin, s.s.uidMax
		settings.Owner, settings.OwnerGroup = uint32(os.Geteuid()), uint32(os.Getegid()) // ids are 32 bits
	}
	return settings
}

// settingsOf names the settings that a child of a role cannot be told anew; "" for
// a role that has none.
func (s *server) settingsOf(role wire.Role) string {
	if role != wire.Agent {
		return ""
	}
	b, err := json.Marshal(s.agentSettings())
	if err != nil {
		panic("master: " + err.Error()) // numbers and strings
	}
	return fmt.Sprintf("%x", sha256.Sum256(b))
}

// serveAgent hears an agent to its end, and settles what it leaves.
func (s *server) serveAgent(ctx context.Context, l *link) (ready time.Time, err error) {
	ready = time.Now()
	go l.beat(ctx)
	go func() {
		select {
		case <-ctx.Done():
			l.end(errNoServer) // at the end of its channel it stops its instances and leaves
		case <-l.ended:
		}
	}()
	l.receive(func() {}, s.fromAgent)
	s.agentMu.Lock()
	if s.agent == l {
		s.agent = nil
	}
	s.agentMu.Unlock()
	select {
	case <-ctx.Done(): // asked to stop: it stops its instances first
		<-l.child.Done()
	default:
		l.lastWord()
		<-l.child.Done()
		s.orphaned()
		if l.released.Load() {
			return ready, errReleased
		}
	}
	return ready, l.why
}

// errReleased is the end of an agent that was asked to leave to the next one.
var errReleased = errors.New("it has left to the next agent")

// replaceAgent has the agent leave its instances to a new one, and waits for that.
// At no moment is there an instance that no agent would end should we die: the new
// one holds them all before the old one leaves.
func (s *server) replaceAgent(ctx context.Context) error {
	next, err := s.startAgent(ctx, s.agentGeneration.Add(1))
	if err != nil {
		if ctx.Err() != nil {
			return errNoServer
		}
		return fmt.Errorf("the new tako-agent did not come up (%w): the old one goes on", err)
	}
	s.kept.store.Flush() // or it would end what it holds, should we die with a service manager
	next.knows = make(map[tako.InstanceID]bool)
	for _, a := range s.allApps() {
		if err := next.hand(a.handovers(next.knows), true); err != nil {
			next.kill(err)
			return fmt.Errorf("the new tako-agent does not take its messages (%w): the old one goes on", err)
		}
	}
	if err := next.echo(); err != nil {
		next.kill(err)
		return fmt.Errorf("the new tako-agent cannot take the instances (%w): the old one goes on", err)
	}
	s.agentMu.Lock()
	l, came := s.agent, s.agentCame
	if l == nil || s.noSpare { // it has just died, and another one is on its way
		s.agentMu.Unlock()
		next.kill(errReleased)
	} else {
		s.agent = nil // what is to be started meanwhile waits for the next
		s.spare = next
		l.released.Store(true)
		l.post(&wire.Release{})
		s.agentMu.Unlock()
		// Killed, and not only cut off: at the end of its channel an agent stops its
		// instances, and when it dies it does not.
		time.AfterFunc(ReleaseTime, func() {
			select {
			case <-l.ended:
			default:
				l.kill(errReleased)
			}
		})
	}
	select {
	case <-came:
		return nil
	case <-time.After(ReleaseTime + ReadyTimeout):
		return errors.New("the new tako-agent did not come up: instances run on, unwatched, until one does")
	case <-ctx.Done():
		return errNoServer
	}
}

// echo waits until an agent that nobody receives from has taken all it was sent.
func (l *link) echo() error {
	late := time.AfterFunc(ReadyTimeout, func() { l.kill(fmt.Errorf("no answer within %s", ReadyTimeout)) })
	defer late.Stop()
	if err := l.conn.Send(1, &wire.Ping{}); err != nil {
		return err
	}
	for {
		m, err := l.conn.Receive()
		if err != nil {
			return err
		}
		m.Discard()
		if _, ok := m.Body.(*wire.Pong); ok {
			return nil
		}
	}
}

// takeSpare returns the agent that is to be the next, once; nil if there is none.
func (s *server) takeSpare() *link {
	s.agentMu.Lock()
	defer s.agentMu.Unlock()
	l := s.spare
	s.spare = nil
	return l
}

// endSpare ends the agent that was to be the next: it stops what it holds.
func (s *server) endSpare() {
	s.agentMu.Lock()
	s.noSpare = true
	s.agentMu.Unlock()
	if l := s.takeSpare(); l != nil {
		l.end(errNoServer)
		<-l.child.Done()
	}
}

// ReleaseTime bounds how long an agent may take to leave to the next one.
const ReleaseTime = 5 * time.Second

// fromAgent takes the agent's word on an instance to its app.
func (s *server) fromAgent(m wire.Message) {
	var id tako.InstanceID
	switch b := m.Body.(type) {
	case *wire.Started:
		id = b.Instance
	case *wire.StartFailed:
		id = b.Instance
	case *wire.Probed:
		id = b.Instance
	case *wire.Exited:
		id = b.Instance
	}
	s.mu.Lock()
	a := s.apps[id.App]
	s.mu.Unlock()
	if a == nil {
		m.Discard()
		return
	}
	a.from(m)
}

// agentSend sends to the agent, without waiting; without one it is errNoAgent.
func (s *server) agentSend(body any) error {
	s.agentMu.Lock()
	l := s.agent
	s.agentMu.Unlock()
	if l == nil || !l.post(body) {
		return errNoAgent
	}
	return nil
}

// AgentWait is how long a command waits for an agent while there is none: at a
// server's start, or after the last one died.
const AgentWait = 10 * time.Second

// anAgent returns the agent, waiting for one.
func (s *server) anAgent(ctx context.Context) (*link, error) {
	late := time.NewTimer(AgentWait)
	defer late.Stop()
	for {
		s.agentMu.Lock()
		l, came := s.agent, s.agentCame
		s.agentMu.Unlock()
		if l != nil {
			return l, nil
		}
		select {
		case <-came:
		case <-late.C:
			return nil, errNoAgent
		case <-s.stopping:
			return nil, errNoServer
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
}

// agentCall calls the agent and waits for its answer.
func (s *server) agentCall(ctx context.Context, body any, files ...ipc.FD) (wire.Message, error) {
	l, err := s.anAgent(ctx)
	if err != nil {
		return wire.Message{}, err
	}
	m, err := l.calls.Do(ctx, body, files...)
	if errors.Is(err, wire.ErrGone) {
		return m, errNoAgent
	}
	return m, err
}

// employ hands the instances that outlived the last agent to this one, makes it
// the agent that is asked, and asks it what could not be asked meanwhile. It runs
// beside the receiver of the link: who receives from a child must not wait for it
// to receive.
func (s *server) employ(l *link) {
	if l.knows == nil {
		l.knows = make(map[tako.InstanceID]bool)
	}
	var err error
	for _, a := range s.allApps() {
		if err == nil {
			err = l.hand(a.handovers(l.knows), false)
		}
	}
	if err == nil {
		err = l.conn.Send(0, &wire.Begin{})
	}
	if err != nil {
		l.kill(err) // the next one adopts them
	}
	s.agentMu.Lock()
	s.agent = l
	close(s.agentCame)
	s.agentCame = make(chan struct{})
	s.agentMu.Unlock()
	// From here on it is told everything; before, it was told nothing else.
	s.proxies.redial(s)
	for _, a := range s.allApps() {
		a.mu.Lock()
		for n, p := range a.procs {
			switch {
			case p.start != nil && !p.sent:
				p.sent = s.agentSend(p.start) == nil
			case !p.stopBy.IsZero(): // also one that is just being started
				_ = s.agentSend(&wire.Stop{Instance: a.instance(n), GraceMS: int(max(time.Until(p.stopBy), 0).Milliseconds())})
			}
		}
		a.mu.Unlock()
	}
	s.agentReady.Do(func() { close(s.agentUp) })
}

// hand hands instances to an agent, which holds them until Begin if hold is set.
func (l *link) hand(all []handover, hold bool) (err error) {
	for _, h := range all {
		if err == nil {
			h.adopt.Hold = hold
			err = l.conn.Send(0, h.adopt, h.files...)
			l.knows[h.adopt.Start.Instance] = true
		}
		for _, fd := range h.files {
			fd.Close()
		}
	}
	return err
}

// A handover is an instance with duplicates of its descriptors.
type handover struct {
	adopt *wire.Adopt
	files []ipc.FD
}

// handovers returns the instances of an app that were started, but for those that
// the agent knows.
func (a *app) handovers(knows map[tako.InstanceID]bool) []handover {
	a.mu.Lock()
	defer a.mu.Unlock()
	via := make(map[uint32]string)
	for _, in := range a.core.View(time.Now()).All {
		via[in.N] = in.Via
	}
	var all []handover
	for n, p := range a.procs {
		if len(p.held) == 0 || knows[a.instance(n)] {
			continue
		}
		h := handover{adopt: &wire.Adopt{
			Start: *p.start, PID: p.pid, Via: wire.Transport(via[n]), AfterMS: time.Since(p.startedAt).Milliseconds(),
		}}
		for _, fd := range p.held {
			dup, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 3)
			if err != nil {
				a.log.Error("instance cannot be handed over", logging.Instance, n, logging.Err, err)
				break
			}
			h.files = append(h.files, ipc.FD(dup))
		}
		if len(h.files) < len(p.held) {
			for _, fd := range h.files {
				fd.Close()
			}
			continue
		}
		all = append(all, h)
	}
	return all
}

// orphaned settles what an agent left when it died. The instances that we have
// descriptors of run on. Of one that was just being started nobody can know
// whether it runs: it failed, and should it have come up it is ended.
func (s *server) orphaned() {
	keep := make(map[int]tako.InstanceID) // by the pid of the leader
	for _, a := range s.allApps() {
		var lost []uint32
		a.mu.Lock()
		for n, p := range a.procs {
			switch {
			case len(p.held) > 0:
				keep[p.pid] = a.instance(n)
			case p.sent:
				lost = append(lost, n)
			}
		}
		a.mu.Unlock()
		for _, n := range lost {
			a.ended(n, rollout.StartFailed{N: n, Reason: "tako-agent died while it was starting"})
		}
	}
	s.endOrphans(keep)
	if s.survived.any { // an agent that was not our child leaves its orphans to others
		s.endLeftovers(0, s.instances, nil)
	}
}

// OrphanGrace is how long what a dead agent left may take to end by itself when
// the server stops.
const OrphanGrace = 5 * time.Second

// askOrphans asks what a dead agent left to end, and waits for it.
func (s *server) askOrphans() {
	told := make(map[int]bool)
	for end := time.Now().Add(OrphanGrace); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
		left := supervise.Orphans()
		if len(left) == 0 {
			return
		}
		for _, r := range left {
			if !told[r.PID] {
				told[r.PID] = true
				s.log.Warn("asking a process that a dead tako-agent left to end", logging.PID, r.PID)
				supervise.TermIf(r)
			}
		}
	}
}

// OrphanWait bounds the ending of what a dead agent left behind.
const OrphanWait = 3 * time.Second

// endOrphans ends every process that a dead agent left to us but those of the
// instances in keep. We are their parent now.
func (s *server) endOrphans(keep map[int]tako.InstanceID) {
	if keep == nil {
		s.askOrphans()
	}
	told := make(map[int]bool)
	for end, pause := time.Now().Add(OrphanWait), time.Millisecond; time.Now().Before(end); pause = min(2*pause, 20*time.Millisecond) {
		left := 0
		for _, r := range supervise.Orphans() {
			if s.spares(r, keep) {
				continue
			}
			left++
			if !told[r.PID] {
				told[r.PID] = true
				s.log.Warn("ending a process that a dead tako-agent left", logging.PID, r.PID)
			}
			supervise.KillIf(r, nil)
		}
		if left == 0 {
			return
		}
		time.Sleep(pause) // its own children come to us as it ends
	}
	s.log.Error("a process that a dead tako-agent left does not end")
}

// spares reports whether an orphan belongs to one of these instances. With none to
// keep nothing is kept.
func (s *server) spares(r supervise.Relation, keep map[int]tako.InstanceID) bool {
	for _, leader := range []int{r.PID, r.Session, r.Group} {
		if _, ok := keep[leader]; ok {
			return true
		}
	}
	if len(keep) == 0 {
		return false
	}
	is := func(name string) bool {
		for _, id := range keep {
			if id.String() == name {
				return true
			}
		}
		return false
	}
	proc := "/proc/" + strconv.Itoa(r.PID) + "/"
	read := func(file string) string {
		b, _ := os.ReadFile(proc + file) // it may have gone: then it is not killed either
		return string(b)
	}
	ours := "/" + groupPrefix + strconv.Itoa(s.groups.pid) + "/"
	for line := range strings.Lines(read("cgroup")) {
		if _, name, ok := strings.Cut(strings.TrimSpace(line), ours); ok && name != agentGroup {
			return is(name)
		}
	}
	switch argv0Of(r.PID) {
	case string(wire.Agent), "tako-exec", "tako-tree", "tako-unpack", "tako-sweep":
		return false // a stage that is not yet, or never, an app's
	}
	app, n := "", ""
	for v := range strings.SplitSeq(read("environ"), "\x00") {
		if value, ok := strings.CutPrefix(v, "TAKO_APP="); ok {
			app = value
		} else if value, ok := strings.CutPrefix(v, "TAKO_INSTANCE="); ok {
			n = value
		}
	}
	// Whose it is may not be known: then it does less harm to let it be.
	return app == "" || is(app+"."+n)
}

// argv0Of is the name that a process was started by, "" if it has gone.
func argv0Of(pid int) string {
	b, _ := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/cmdline") // as said
	argv0, _, _ := strings.Cut(string(b), "\x00")
	return argv0
}
