package master

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"tako/internal/cert"
	"tako/internal/fdstore"
	"tako/internal/ipc"
	"tako/internal/logging"
	"tako/internal/management"
	"tako/internal/release"
	"tako/internal/rollout"
	"tako/internal/store"
	"tako/internal/supervise"
	"tako/internal/tako"
	"tako/internal/wire"
)

// The tako-master before us died, and the service manager kept what it had: we go
// on with its children. It wrote no last word, so what is true is put together
// from the database, from what was kept, and from what the children say.
//
//	ports, lock, management socket    what was kept
//	what is deployed                  the database
//	instances                         tako-agent; if that died too, what was kept
//	what requests see                 tako-proxy is told everything anew
//
// An instance of the committed rollout goes on; every other is drained and ended,
// whatever the dead one had in mind for it. Nothing that came from the service
// manager is believed before it was looked at.

const (
	// ResumeTime bounds how long a child may take to say what it knows. One that
	// takes longer is replaced.
	ResumeTime = 10 * time.Second
	// EndTime bounds the wait for the end of a process that was killed.
	EndTime = 2 * time.Second
)

// A survivor is a child of the tako-master that died.
type survivor struct {
	aboutChild
	names   []string // what is kept of it
	pidfd   ipc.FD
	output  ipc.FD
	channel ipc.FD
}

// close gives up the descriptors. The child sees the end of its channel.
func (v *survivor) close(store *fdstore.Store) {
	for _, fd := range []*ipc.FD{&v.pidfd, &v.output, &v.channel} {
		fd.Close()
		*fd = 0
	}
	store.Drop(v.names...)
}

// survived is what we go on with.
type survived struct {
	any     bool
	agent   *link
	serving *proxyLink   // the proxy that goes on as the newest
	old     []*proxyLink // those that drain, or are to once a newer one serves
	foreign []*survivor  // proxies of another protocol
	renew   bool         // the agent is of another version, or has other settings
	rest    []store.App  // apps of which nothing is left
}

// A remainder is an instance of the tako-master that died.
type remainder struct {
	about    aboutInstance
	via      wire.Transport
	good     bool
	stopping bool
	files    []ipc.FD // pidfd, stdout, stderr; nil while it is being started
}

func (r *remainder) close() {
	for _, fd := range r.files {
		fd.Close()
	}
	r.files = nil
}

// receive takes what the service manager passed to this process, and returns the
// names of what it keeps.
func (s *server) receive() (names []string, err error) {
	s.kept.passed, s.unitPorts, s.unitMgmt, err = activated()
	return s.kept.passed.Names(), err
}

// recallState takes what only the dead one knew.
func (s *server) recallState() {
	for _, name := range s.kept.passed.Names() {
		text, ok := strings.CutPrefix(name, keptStates)
		if !ok {
			continue
		}
		about, err := aboutOf[aboutState](s.kept.passed.Take(name))
		n, numErr := strconv.ParseUint(text, 10, 64)
		if err = errors.Join(err, numErr); err != nil || n < s.kept.n {
			s.kept.store.Drop(name)
			continue
		}
		s.kept.store.Drop(s.kept.state)
		s.kept.state, s.kept.n = name, n
		s.tickets.set(about.Tickets)
		s.groupsPID, s.mgmtPID = about.GroupsPID, about.PID
		s.agentGeneration.Store(about.Agents)
		s.proxyGeneration.Store(about.Proxies)
	}
}

// survivors takes the children of a role, the oldest first.
func (s *server) survivors(role wire.Role) []*survivor {
	var all []*survivor
	for _, name := range s.kept.passed.Names() {
		text, ok := strings.CutPrefix(name, string(role)+"-")
		gen, last := strings.CutSuffix(text, "-about")
		n, err := strconv.ParseUint(gen, 10, 64)
		if !ok || !last || err != nil {
			continue
		}
		v := &survivor{names: partsOf(string(role)+"-"+gen, childParts)}
		v.aboutChild, err = aboutOf[aboutChild](s.kept.passed.Take(name))
		v.pidfd, v.output, v.channel = s.kept.passed.Take(v.names[1]), s.kept.passed.Take(v.names[2]), s.kept.passed.Take(v.names[3])
		log := s.log.With(logging.Role, string(role), logging.Generation, n, logging.PID, v.PID)
		switch {
		case err != nil || v.Role != role || v.Generation != n || v.PID <= 1:
			log.Error("what was kept of a child is not what it should be", logging.Err, err)
			v.close(s.kept.store)
		case supervise.PIDOf(int(v.pidfd)) != v.PID:
			log.Info("a child died before we came")
			v.close(s.kept.store)
		case v.channel == 0 || !isPipe(v.output):
			log.Warn("a child cannot be gone on with: it is replaced")
			s.endSurvivor(v)
		default:
			all = append(all, v)
		}
	}
	slices.SortFunc(all, func(a, b *survivor) int { return cmp.Compare(a.Generation, b.Generation) })
	return all
}

// endSurvivor kills a child and waits for its end. An agent's instances run on.
func (s *server) endSurvivor(v *survivor) {
	_ = supervise.Signal(int(v.pidfd), unix.SIGKILL) // else it has ended
	supervise.AwaitEnd(int(v.pidfd), EndTime)
	v.close(s.kept.store)
}

// resumeLink goes on with a child, and hands take every message that says what the
// child knows. On an error the child is ended.
func (s *server) resumeLink(v *survivor, kind wire.Link, take func(m *wire.Message) bool) (_ *link, err error) {
	defer func() {
		if err != nil {
			s.log.Warn("a child cannot be gone on with: it is replaced", logging.Role, string(v.Role), logging.Generation, v.Generation, logging.PID, v.PID, logging.Err, err)
			s.endSurvivor(v)
		}
	}()
	ch, err := ipc.Open(v.channel)
	v.channel = 0
	if err != nil {
		return nil, err
	}
	conn, pieces, err := wire.ResumeChild(ch, kind, ResumeTime)
	if err != nil {
		return nil, err
	}
	out, in := conn.States()
	if in != wire.Serving || out != wire.Serving && (out != wire.Draining || v.Role == wire.Agent) {
		return nil, errors.Join(fmt.Errorf("it is %s, and was told to be %s", in, out), conn.Close())
	}
	if err := hear(conn, pieces, take); err != nil {
		return nil, errors.Join(err, conn.Close())
	}
	child, err := supervise.Adopt(supervise.Handed{Role: string(v.Role), PID: v.PID, PIDFD: v.pidfd, Output: v.output, Started: v.Started}, ch, s.log)
	if err != nil {
		return nil, errors.Join(err, conn.Close())
	}
	v.pidfd, v.output = 0, 0
	l := &link{
		role: v.Role, generation: v.Generation, child: child, conn: conn,
		log:       s.log.With(logging.Role, string(v.Role), logging.Generation, v.Generation),
		startedAt: v.Started, pongs: make(chan uint64, 4), ended: make(chan struct{}),
		outWake: make(chan struct{}, 1), pauser: newPauser(),
		version: v.Version, settings: v.Settings, kept: s.kept.store, names: v.names,
	}
	l.calls = wire.NewCalls(conn)
	l.ready.Store(true)
	l.setState("ready")
	if out == wire.Draining {
		l.setState("draining")
	}
	go l.deliver()
	return l, nil
}

// hear hears what a child knows, passing over what else it says.
func hear(conn *wire.Conn, pieces int, take func(m *wire.Message) bool) error {
	if err := conn.SetReadDeadline(time.Now().Add(ResumeTime)); err != nil {
		return err
	}
	for pieces > 0 {
		m, err := conn.Receive()
		if err != nil {
			return fmt.Errorf("hear what it knows: %w", err)
		}
		if take(&m) {
			pieces--
		}
		m.Discard()
	}
	return conn.SetReadDeadline(time.Time{})
}

// resumeAgent goes on with the agent that is in charge, and returns its instances.
func (s *server) resumeAgent() map[tako.InstanceID]*remainder {
	present := make(map[tako.InstanceID]*remainder)
	for _, v := range s.survivors(wire.Agent) {
		s.survived.any = true
		s.agentGeneration.Store(max(s.agentGeneration.Load(), v.Generation))
		if s.survived.agent != nil || v.Protocol != wire.ProtocolVersion {
			// One that was to be the next, or speaks otherwise. Killed it leaves its
			// instances alone; at the end of its channel it would not.
			s.endSurvivor(v)
			continue
		}
		l, err := s.resumeLink(v, wire.LinkAgent, func(m *wire.Message) bool {
			p, ok := m.Body.(*wire.Present)
			if ok {
				present[p.Adopt.Start.Instance] = remainderOf(p, m)
			}
			return ok
		})
		if err != nil {
			for _, r := range present {
				r.close()
			}
			clear(present)
			continue
		}
		l.knows = make(map[tako.InstanceID]bool, len(present))
		for id := range present {
			l.knows[id] = true
		}
		s.survived.agent, s.survived.renew = l, v.Version != s.version || v.Settings != s.settingsOf(wire.Agent)
	}
	return present
}

func remainderOf(p *wire.Present, m *wire.Message) *remainder {
	r := &remainder{
		about: aboutInstance{
			Start: p.Adopt.Start, PID: p.Adopt.PID, Limits: p.Limits,
			Started: time.Now().Add(-time.Duration(max(p.Adopt.AfterMS, 0)) * time.Millisecond),
		},
		via: p.Adopt.Via, good: p.Good, stopping: p.Stopping, files: m.Files,
	}
	m.Files = nil
	return r
}

// resumeProxies goes on with the proxies, and returns what they know of each app,
// put together.
func (s *server) resumeProxies() map[tako.AppID]wire.HeldApp {
	held := make(map[tako.AppID]wire.HeldApp)
	for _, v := range s.survivors(wire.Proxy) {
		s.survived.any = true
		s.proxyGeneration.Store(max(s.proxyGeneration.Load(), v.Generation))
		if v.Protocol != wire.ProtocolVersion {
			s.survived.foreign = append(s.survived.foreign, v)
			continue
		}
		holds := &wire.Holds{}
		raw, err := s.resumeLink(v, wire.LinkProxy, func(m *wire.Message) bool {
			h, ok := m.Body.(*wire.Holds)
			if ok {
				holds = h
			}
			return ok
		})
		if err != nil {
			continue
		}
		l := newProxyLink(raw)
		l.holds = holds
		for _, h := range holds.Apps {
			l.applied[h.App] = h.Revision
			before := held[h.App]
			h.Newest, h.Revision = max(h.Newest, before.Newest), max(h.Revision, before.Revision)
			h.Instances = slices.Concat(before.Instances, h.Instances)
			held[h.App] = h
		}
		l.draining.Store(*l.state.Load() == "draining")
		if s.survived.serving != nil {
			s.survived.old = append(s.survived.old, s.survived.serving)
			s.survived.serving = nil
		}
		if l.draining.Load() || v.Version != s.version || s.portsChanged {
			s.survived.old = append(s.survived.old, l) // it drains once another serves
			continue
		}
		s.survived.serving = l
	}
	return held
}

// keptInstances takes the instances that were kept.
func (s *server) keptInstances() map[tako.InstanceID]*remainder {
	all := make(map[tako.InstanceID]*remainder)
	for _, name := range s.kept.passed.Names() {
		text, ok := strings.CutPrefix(name, keptInstance)
		text, last := strings.CutSuffix(text, "-about")
		if !ok || !last {
			continue
		}
		names := partsOf(keptInstance+text, instanceParts)
		about, err := aboutOf[aboutInstance](s.kept.passed.Take(name))
		r := &remainder{about: about}
		for _, part := range names[1:] {
			r.files = append(r.files, s.kept.passed.Take(part))
		}
		id := about.Start.Instance
		switch {
		case err != nil || id.String() != text || about.PID <= 1:
			s.log.Error("what was kept of an instance is not what it should be", logging.Instance, text, logging.Err, err)
		case supervise.PIDOf(int(r.files[0])) != about.PID: // it has ended
		case s.mendOutputs(r.files[1:]):
			all[id] = r
			continue
		}
		r.close()
		s.kept.store.Drop(names...)
	}
	return all
}

// mendOutputs puts a pipe that has ended in the place of an output that the
// instance had closed: the service manager does not keep those.
func (s *server) mendOutputs(outputs []ipc.FD) bool {
	for i, fd := range outputs {
		if isPipe(fd) {
			continue
		}
		fd.Close()
		var err error
		if outputs[i], err = endedPipe(); err != nil {
			s.log.Error("instance cannot be gone on with", logging.Err, err)
			return false
		}
	}
	return true
}

// recover makes the apps of the tako-master before us, and notes those of which
// nothing is left. Their registrations have been read from the database.
func (s *server) recover(ctx context.Context, regs []store.App) {
	present := s.resumeAgent()
	found := s.keptInstances()
	for id, p := range present {
		if k := found[id]; k != nil { // the same process, and what only that knew
			p.close()
			p.files, p.about.Restarts = k.files, k.about.Restarts
		}
		found[id] = p
	}
	held := s.resumeProxies()
	byApp := make(map[tako.AppID][]*remainder)
	for id, r := range found {
		if present[id] == nil { // its agent died too: who knows is the proxy
			for _, up := range held[id.App].Instances {
				if up.Instance == id {
					r.good, r.via = true, wire.TransportTCP
					if up.Socket != "" {
						r.via = wire.TransportUnix
					}
				}
			}
		}
		byApp[id.App] = append(byApp[id.App], r)
	}
	s.survived.any = s.survived.any || len(found) > 0
	regOf := make(map[tako.AppID]store.App)
	for _, reg := range regs {
		regOf[reg.ID] = reg
		if len(byApp[reg.ID]) == 0 {
			s.survived.rest = append(s.survived.rest, reg)
		}
	}
	for id, rs := range byApp {
		s.app(id).recover(ctx, regOf[id], rs, held[id].Newest)
	}
	for id, h := range held {
		a := s.app(id)
		a.mu.Lock()
		a.revision = max(a.revision, h.Revision)
		a.mu.Unlock()
	}
	s.expect(s.survived.rest)
	for _, name := range s.kept.passed.Names() { // parts of nothing, or of another version
		s.log.Debug("kept for nothing", "name", name)
		s.kept.store.Drop(name)
	}
	s.kept.passed.Close()
}

// recover makes an app of what is left of it: what was committed goes on, what
// was not ends.
func (a *app) recover(ctx context.Context, reg store.App, rs []*remainder, newest uint32) {
	var committed *build
	var plan rollout.Plan
	if reg.ID != "" {
		var err error
		if committed, err = a.committedBuild(ctx, reg); err != nil {
			a.log.Error("app not restored: its routes answer 503", logging.Err, err)
			a.mu.Lock()
			a.broken = "Restore startup failed: " + err.Error()
			a.mu.Unlock()
		} else {
			plan = committed.plan(reg.Instances, reg.IdleTimeout)
			a.srv.ensureCertificates(reg.Routes)
		}
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	now := time.Now()
	snap := rollout.Snapshot{Plan: plan, Have: committed != nil, Stopped: reg.Stopped, NextN: max(newest+1, a.srv.firstInstance), QuietAt: now}
	if committed != nil {
		a.builds[committed.number] = committed
	}
	others := make(map[int64]*build)
	slices.SortFunc(rs, func(x, y *remainder) int {
		return cmp.Compare(x.about.Start.Instance.N, y.about.Start.Instance.N)
	})
	for _, r := range rs {
		start := r.about.Start
		n := start.Instance.N
		snap.NextN = max(snap.NextN, n+1)
		b := committed
		mine := b != nil && b.rollout == start.Rollout && b.release == start.Release
		if !mine {
			if b = others[start.Rollout]; b == nil {
				b = a.otherBuild(&start)
				others[start.Rollout] = b
				a.builds[b.number] = b
			}
		}
		p := &process{
			build: b, name: processName(&start), port: start.Port, socket: start.Socket, pid: r.about.PID, startedAt: r.about.Started,
			held: r.files, start: &start, sent: true, limits: r.about.Limits, restarts: r.about.Restarts,
		}
		a.procs[n] = p
		a.deaths[p.name] = max(a.deaths[p.name], p.restarts)
		in := rollout.InstanceSnapshot{
			N: n, Process: p.name, Build: b.number, Timing: b.plan(0, 0).Timing, StartedAt: p.startedAt, Via: string(r.via),
		}
		served := p.name == rollout.Web && r.good
		switch {
		case r.stopping || !mine && (!served || reg.ID == "") || reg.Stopped && !served:
			in.Stage = "ending"
			p.stopBy = now.Add(in.Timing.Grace)
		case !mine || reg.Stopped:
			in.Stage, in.DrainUntil, in.CutAt = "drained", now.Add(in.Timing.Drain), now.Add(in.Timing.Streams)
		case r.good:
			in.Stage, in.Good, in.GoodAt, in.ServedAt = "serving", 1, now, now
			snap.Awake = snap.Awake || p.name == rollout.Web
		default:
			in.Stage = "starting"
			snap.Awake = snap.Awake || p.name == rollout.Web
		}
		snap.Instances = append(snap.Instances, in)
		a.log.Debug("instance goes on", logging.Instance, n, logging.PID, p.pid, "as", in.Stage)
	}
	snap.Awake = snap.Awake && plan.Instances == 0
	core, err := rollout.Resume(snap, jitter)
	if err != nil {
		panic("master: " + err.Error()) // it was made here
	}
	a.core = core
}

// committedBuild is the build that restore would start.
func (a *app) committedBuild(ctx context.Context, reg store.App) (*build, error) {
	if err := a.srv.prepareApp(ctx, a); err != nil {
		return nil, err
	}
	secrets, err := a.committedSecrets(ctx, reg)
	if err != nil {
		return nil, err
	}
	b, err := a.loadBuild(reg.Release, reg.Path, secrets, reg.Routes)
	if err != nil {
		return nil, err
	}
	b.rollout = rolloutOf(reg)
	return b, nil
}

// rolloutOf numbers the rollout that was committed last.
func rolloutOf(reg store.App) int64 { return reg.DeployedAt.UnixMilli() }

// otherBuild is the build of an instance that is to end: what is still needed of
// it are the times of that.
func (a *app) otherBuild(start *wire.Start) *build {
	m, err := release.Load(start.Command.Dir)
	if err != nil {
		t := rollout.DefaultTiming
		m = &release.Manifest{}
		m.Timeouts.Ready, m.Timeouts.Stability, m.Timeouts.Drain, m.Timeouts.Streams, m.Timeouts.Grace = t.Ready, t.Stability, t.Drain, t.Streams, t.Grace
	}
	return &build{
		number: a.srv.nextBuild(), rollout: start.Rollout, release: start.Release, dir: start.Command.Dir,
		manifest: m, argv: start.Command.Argv,
	}
}

// processName is the name in the manifest of what was started.
func processName(start *wire.Start) string {
	for _, v := range start.Command.Env {
		if name, ok := strings.CutPrefix(v, envProcess); ok && start.Probe.Kind == wire.ProbeAlive {
			return name
		}
	}
	return rollout.Web
}

// keptPorts takes the ports that were kept; without any it is nil. Those that the
// settings name and nobody holds are opened.
func (s *server) keptPorts() ([]listener, error) {
	var all []listener
	for _, name := range s.kept.passed.Names() {
		text, ok := strings.CutPrefix(name, keptPort)
		if !ok {
			continue
		}
		kind, _, _ := strings.Cut(text, "-")
		l := listener{name: kind, fd: s.kept.passed.Take(name)}
		var err error
		if l.addr, err = listeningOn(l.fd); err != nil || portName(l) != name || kind != wire.ListenerHTTP && kind != wire.ListenerHTTPS {
			s.log.Error("what was kept as a port is none", "name", name, logging.Err, err)
			s.kept.store.Drop(name)
			l.fd.Close()
			continue
		}
		all = append(all, l)
	}
	if len(all) == 0 {
		return nil, nil
	}
	s.listeners = slices.Clone(all)
	err := s.changePorts()
	if err != nil && s.endHolders() {
		s.givenUp = nil
		err = s.changePorts()
	}
	s.portsChanged = len(s.givenUp) > 0 || len(s.listeners) != len(all)
	for _, l := range all {
		if slices.Contains(s.givenUp, l.fd) {
			s.kept.store.Drop(portName(l))
		}
	}
	return s.listeners, err
}

// endHolders ends the proxies of the tako-master that died: they hold the ports,
// which did not come back as they should. It reports whether there were any.
func (s *server) endHolders() bool {
	all := s.survivors(wire.Proxy)
	for _, v := range all {
		s.log.Error("a proxy is replaced: its ports were not kept", logging.PID, v.PID)
		s.endSurvivor(v)
	}
	return len(all) > 0
}

// listeningOn is the address of a listening TCP socket.
func listeningOn(fd ipc.FD) (netip.AddrPort, error) {
	if is, err := unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_ACCEPTCONN); err != nil || is != 1 {
		return netip.AddrPort{}, errors.New("it is not a listening socket")
	}
	if err := unix.SetNonblock(int(fd), true); err != nil {
		return netip.AddrPort{}, err
	}
	return boundTo(fd)
}

// keptManagement takes the management socket that was kept, under our own name:
// who has connected meanwhile is answered. It returns nil if there is none.
func (s *server) keptManagement() *net.UnixListener {
	fd := s.kept.passed.Take(keptMgmt)
	if fd == 0 {
		return nil
	}
	dup, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 3)
	defer fd.Close()
	var l *net.UnixListener
	if err == nil {
		l, err = unixListener(ipc.FD(dup))
	}
	if err == nil {
		err = errors.New("whose it was is not known")
		if s.mgmtPID > 1 {
			err = management.Relisten(s.layout.PIDSocket(s.mgmtPID), s.layout.PIDSocket(os.Getpid()), s.layout.Socket)
		}
	}
	if err == nil {
		s.ownMgmt(l)
		return l
	}
	s.log.Warn("the management socket of the tako-master before us cannot be gone on with: those who wait there have to ask again", logging.Err, err)
	_ = unix.Shutdown(int(fd), unix.SHUT_RDWR) // what is kept of it is to refuse at once
	if l != nil {
		_ = l.Close()
	}
	s.kept.store.Drop(keptMgmt)
	return nil
}

// goOnWithSurvivors goes on with the children of the tako-master that died; the
// agent and the newest proxy are for runAgent and runProxy to adopt.
func (s *server) goOnWithSurvivors(ctx context.Context, proxies *sync.WaitGroup) {
	if l := s.survived.agent; l != nil {
		s.adopted.agent = l
	}
	for _, l := range s.survived.old {
		s.proxies.add(l)
		proxies.Go(func() {
			go s.tellOn(l)
			s.goOnWithProxy(ctx, l)
		})
	}
	if l := s.survived.serving; l != nil {
		s.proxies.add(l)
		s.adopted.proxy = l
		s.retireBefore(l)
		s.proxyReady.Do(func() { close(s.proxyUp) })
	}
	for _, v := range s.survived.foreign {
		proxies.Go(func() { s.replaceForeign(ctx, v) })
	}
}

// replaceForeign ends a proxy that speaks another protocol once another one
// serves: at the end of its channel it finishes what it has, and leaves.
func (s *server) replaceForeign(ctx context.Context, v *survivor) {
	s.log.Warn("a proxy of another version is replaced", logging.Version, v.Version, logging.PID, v.PID)
	select {
	case <-s.proxyUp:
	case <-ctx.Done():
	}
	v.channel.Close()
	v.channel = 0
	s.kept.store.Drop(v.names...)
	if !supervise.AwaitEnd(int(v.pidfd), ChildLeave) {
		_ = supervise.Signal(int(v.pidfd), unix.SIGKILL) // else it has ended
	}
	v.close(s.kept.store)
}

// serveOn goes on with the newest proxy of the tako-master that died, to its end.
func (s *server) serveOn(ctx context.Context, l *proxyLink) (ready time.Time, err error) {
	ready = time.Now()
	go s.tellOn(l)
	go l.beat(ctx)
	go s.drainAtEnd(ctx, l)
	l.receive(func() {}, func(m wire.Message) { s.fromProxy(l, m) })
	s.proxies.remove(l)
	select {
	case <-ctx.Done():
	default:
		l.lastWord()
	}
	<-l.child.Done()
	s.proxyGone(l)
	return ready, l.why
}

// tellOn tells an adopted proxy everything anew, beside its receiver, and what is
// no longer.
func (s *server) tellOn(l *proxyLink) {
	if err := s.tell(l); err != nil {
		l.kill(err)
		return
	}
	all := s.certs.All()
	for _, id := range l.holds.Certificates {
		if !slices.ContainsFunc(all, func(c cert.Certificate) bool { return c.ID == id }) {
			l.post(&wire.CertificateGone{ID: id})
		}
	}
	for _, h := range l.holds.Apps {
		if a := s.lookup(h.App); !h.Gone && (a == nil || a.registration().ID == "") {
			l.post(&wire.AppGone{App: h.App, Revision: h.Revision + 1})
		}
	}
}

// renewSurvivors replaces an agent of another version or with other settings, as a
// reload does, and gives up ports that the settings no longer name.
func (s *server) renewSurvivors(ctx context.Context) {
	if !s.survived.any {
		return
	}
	for _, wait := range []<-chan struct{}{s.restored, s.proxyUp} {
		select {
		case <-wait:
		case <-ctx.Done():
			return
		}
	}
	for _, fd := range s.givenUp {
		fd.Close()
	}
	s.givenUp = nil
	if s.survived.renew {
		if err := s.replaceAgent(ctx); err != nil && ctx.Err() == nil {
			s.log.Error("tako-agent is of another version, or has other settings: reload to replace it", logging.Err, err)
		}
	}
}
