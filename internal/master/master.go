// Package master is tako-master: it owns the settings, the state, the listeners,
// the certificates' keys and the management socket, and keeps tako-proxy and
// tako-agent running. It accepts no connection from the network and parses no
// byte of one.
//
// What happens to an app is decided by package rollout and carried out here; what
// an operator asks arrives through package management as calls of server's
// methods. Run holds it all together.
package master

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
	"github.com/hashicorp/go-hclog"

	"tako/internal/atomicfile"
	"tako/internal/cert"
	"tako/internal/fdstore"
	"tako/internal/handoff"
	"tako/internal/ipc"
	"tako/internal/logging"
	"tako/internal/management"
	"tako/internal/paths"
	"tako/internal/release"
	"tako/internal/rollout"
	"tako/internal/route"
	"tako/internal/sandbox"
	"tako/internal/store"
	"tako/internal/supervise"
	"tako/internal/tako"
	"tako/internal/wire"
)

// Times of a stop. An idle server is gone well within 10 s.
const (
	StopRequests = 30 * time.Second // for requests in flight
	StopStreams  = 3 * time.Second  // for streams
	StopCommands = 10 * time.Second // for commands, which are told to give up
)

// restoreParallel is how many apps are looked at on disk at one time when a
// server starts. How they come up is bounded per app, not over all.
const restoreParallel = 8

// RestoreTries is the longest pause between two tries to make an app's folders in
// a restore, while the agent does not answer.
const RestoreTries = 30 * time.Second

type server struct {
	s         settled
	log       hclog.Logger
	layout    paths.Layout
	version   string
	startedAt time.Time
	db        *store.DB
	certs     *cert.Keeper
	tickets   ticketKeys
	listeners []listener
	socketGID uint32

	// Users of the children; nil without powers.
	privileged bool
	netGroup   uint32
	proxyID    *sandbox.Identity
	agentID    *sandbox.Identity

	groups       *groups // of control, for the agent
	agentProgram program
	proxyProgram program

	// What the service manager keeps, and what it passed to us: see kept.go.
	kept         keeping
	unitPorts    []listener
	unitMgmt     ipc.FD
	survived     survived
	portsChanged bool // those of the settings are not those that were kept
	groupsPID    int  // in the name of our control groups; 0: our own
	mgmtPID      int  // in the name of the management socket that was kept
	mgmt         *net.UnixListener

	// The newest generations.
	agentGeneration atomic.Uint64
	proxyGeneration atomic.Uint64

	signals   Signals
	selfPath  string   // of the installed tako-master
	lock      *os.File // of the data root
	mgmtOwn   bool     // the management socket's path is ours to take away
	activated bool     // the listeners are systemd's
	givenUp   []ipc.FD // ports that the settings no longer name
	undo      []func() // what the end of Run does, last first

	builds       atomic.Uint64
	upgrading    atomic.Bool
	stopping     chan struct{} // closed when the server begins to stop
	restored     chan struct{} // closed when every app has been looked at
	renewed      chan struct{} // closed when no child of another version is left to replace
	reload       reloading
	reloadWanted chan struct{}      // has room for one
	waiting      chan *net.UnixConn // management connections between two sessions
	adopted      adopted

	// Of two servers with one data root: see overlap.go.
	ownerPID      atomic.Int64              // of the server whose data root this is; 0 if it is ours
	owned         chan struct{}             // closed once it is ours
	second        second                    // beside us, while it is ours
	owner         atomic.Pointer[ownerLink] // while it is not
	looking       chan struct{}             // has room for one
	firstInstance uint32
	heeding       heeding
	apart         *os.File                   // holds the folder of a second server's sockets
	movedPorts    atomic.Pointer[[]listener] // the owner's, if it has others now

	agentMu    sync.Mutex
	agent      *link         // nil while there is none
	spare      *link         // the next agent, while the one before leaves
	noSpare    bool          // the server stops: there is to be none any more
	agentCame  chan struct{} // closed, and made anew, when there is one
	agentReady sync.Once
	agentUp    chan struct{}
	proxies    proxySet
	servesOn   chan struct{} // ends with the proxy that goes on with us after an exec back; or nil
	proxyReady sync.Once
	proxyUp    chan struct{}

	mu     sync.Mutex
	apps   map[tako.AppID]*app
	claims map[tako.AppID][]route.Pattern // of deploys under way
}

// Signals are the channels that main has registered: Reload for SIGHUP; Stop, from
// which it takes what ends ctx, for SIGTERM and SIGINT.
type Signals struct{ Reload, Stop chan os.Signal }

// Run runs a server until ctx ends, and stops it in order. c has been validated.
// Each signal from signals.Reload is a wish to reload: this image then becomes the
// installed one, and Run of that goes on. An error means that it could not start, or that
// something is left running.
func Run(ctx context.Context, c Config, version string, signals Signals, log hclog.Logger) (err error) {
	var st *state
	handed := &state{}
	resumed, err := handoff.Load(handed)
	if err != nil {
		return err
	}
	if resumed {
		// It was executed by a descriptor, whose number is its name now.
		if err := os.WriteFile("/proc/self/comm", []byte(filepath.Base(os.Args[0])), 0); err != nil {
			log.Debug("the process has no name", logging.Err, err)
		}
		st = handed
		for _, fd := range st.fds() {
			if err := handoff.Take(fd); err != nil {
				return err
			}
		}
	}
	s := &server{
		signals: signals, log: log, version: version, startedAt: time.Now(),
		stopping: make(chan struct{}), restored: make(chan struct{}), renewed: make(chan struct{}), reloadWanted: make(chan struct{}, 1),
		waiting: make(chan *net.UnixConn, 2*management.MaxConnections),
		owned:   make(chan struct{}), looking: make(chan struct{}, 1),
		agentUp: make(chan struct{}), agentCame: make(chan struct{}), proxyUp: make(chan struct{}),
		apps: make(map[tako.AppID]*app), claims: make(map[tako.AppID][]route.Pattern),
	}
	defer func() {
		for _, f := range slices.Backward(s.undo) {
			f()
		}
	}()
	var names []string
	if st != nil {
		names, s.groupsPID = st.Kept, st.GroupsPID
	} else if names, err = s.receive(); err != nil {
		return err
	}
	if s.kept.store, err = fdstore.Open(names, log); err != nil {
		return err
	}
	defer s.kept.store.Close()
	opening := ctx
	if st != nil { // a wish to stop is no reason to go back: it is heard once we can
		opening = context.WithoutCancel(ctx)
	}
	mgmt, err := s.open(opening, c, st)
	if err != nil {
		if st == nil {
			return err
		}
		return s.goBack(ctx, st, err)
	}
	go func() {
		for range signals.Reload {
			s.wantReload()
		}
	}()
	return s.serve(ctx, mgmt, st)
}

// goBack executes the program that handed over to us again, once: its children
// and apps wait for somebody. Asked to stop it ends instead, and they with it.
func (s *server) goBack(ctx context.Context, st *state, why error) error {
	if st.Back != "" {
		return fmt.Errorf("neither the new program nor the old one can go on: %s; %w", st.Back, why)
	}
	s.log.Error("the new program cannot go on: back to the old one", logging.Err, why)
	st.Back = why.Error()
	if s.db != nil {
		_ = s.db.Close()
	}
	fd, err := handoff.Save(st)
	if err == nil {
		err = handoff.Exec(st.Program, os.Args, fd, st.fds(), ctx.Err)
	}
	return errors.Join(why, err)
}

// open gets everything that a server needs before its children: from the image
// before ours if there was one, else from scratch.
func (s *server) open(ctx context.Context, c Config, st *state) (mgmt *net.UnixListener, err error) {
	if s.s, err = c.settle(); err != nil {
		return nil, err
	}
	s.layout = s.s.layout
	if s.selfPath, err = os.Executable(); err != nil {
		return nil, fmt.Errorf("find the own program: %w", err)
	}
	if err := s.identities(); err != nil {
		return nil, err
	}
	if err := supervise.Subreaper(); err != nil {
		return nil, err
	}
	if err := makeTree(s.layout); err != nil {
		return nil, err
	}
	s.recallState()
	s.groups = s.makeGroups()
	if st == nil && s.groups.pid == os.Getpid() { // else others may have to go on with them
		s.undo = append(s.undo, s.groups.remove)
	}
	if gid, ok := groupID(s.s.SocketGroup); ok {
		s.socketGID = gid
	}
	if err := s.openPrograms(st); err != nil {
		return nil, err
	}
	if st != nil {
		mgmt, err = s.inherit(st)
	} else {
		mgmt, err = s.openSockets(ctx)
	}
	if err != nil {
		return nil, err
	}
	s.mgmt = mgmt
	if s.layout.Second != 0 { // it begins anew when it dies: the owner serves
		s.kept.store.Close()
		s.kept.store = nil
	}
	if err := removeProfiles(s.layout.Profiles()); err != nil { // each proxy gets one of its own
		return nil, err
	}
	s.undo = append(s.undo, func() {
		if err := removeProfiles(s.layout.Profiles()); err != nil {
			s.log.Warn("profiling socket not taken away", logging.Err, err)
		}
	})
	if !s.follows() {
		close(s.owned)
	}
	if err := s.openStore(ctx); err != nil {
		return nil, err
	}
	s.undo = append(s.undo, func() {
		if err := s.db.Close(); err != nil {
			s.log.Error("close the database", logging.Err, err)
		}
	})
	openCerts := cert.OpenBeside
	if !s.follows() {
		s.sweep()
		openCerts = cert.Open
	}
	if s.certs, err = openCerts(s.layout.Certs(), time.Now, s.log.Named("cert")); err != nil {
		return nil, err
	}
	regs, err := s.recall(ctx)
	if err != nil {
		return nil, err
	}
	if st != nil {
		if err := s.takeOver(st); err != nil {
			return nil, err
		}
		s.log.Info("going on after a reload", logging.Version, s.version, "from", st.Version, "reloads", st.Reloads, "apps", len(regs))
		s.keepAll()
		return mgmt, nil
	}
	s.recover(ctx, regs)
	s.keepAll()
	what := "starting"
	if s.survived.any {
		what = "going on after the death of another tako-master"
	}
	s.log.Info(what, logging.Version, s.version, "data", s.layout.Data, "socket", s.layout.Socket,
		"http", s.httpPort(), "https", s.httpsPort(), "apps", len(regs), "isolation", isolation(s.privileged))
	if s.follows() {
		s.log.Info("serving beside the owner of the data root", logging.PID, s.ownerPID.Load())
	}
	if !s.s.NoACME {
		s.log.Warn("certificates of a public authority are not obtained by this version: put your own into " + s.layout.Certs() + "/<name>/, or start with --no-acme to silence this")
	}
	return mgmt, nil
}

// openPrograms opens the children's programs: the installed ones, or those that
// belong to us if we are the old program that a newer one went back to.
func (s *server) openPrograms(st *state) (err error) {
	if st != nil && st.Back != "" {
		s.agentProgram = program{role: wire.Agent, fd: st.AgentProgram}
		s.proxyProgram = program{role: wire.Proxy, fd: st.ProxyProgram}
		return nil
	}
	if s.agentProgram, err = openProgram(wire.Agent, s.s.LibexecDir); err != nil {
		return err
	}
	s.undo = append(s.undo, s.agentProgram.fd.Close)
	if s.proxyProgram, err = openProgram(wire.Proxy, s.s.LibexecDir); err != nil {
		return err
	}
	s.undo = append(s.undo, s.proxyProgram.fd.Close)
	return nil
}

func (s *server) openStore(ctx context.Context) (err error) {
	open := store.Open
	if s.follows() {
		open = store.Follow
	}
	db, err := open(ctx, store.Options{
		Path: s.layout.Database(), BackupDir: s.layout.Backups(), ReservePath: s.layout.Reserve(),
		Log: s.log.Named("store"), Version: s.version,
	})
	if err == nil {
		s.db = db // a closed one answers with errors, none at all would not
	}
	return err
}

// openSockets takes the lock of the data root, and inherits from systemd or opens
// the ports and the management socket. With an offset of the instances' ports it
// may be the second server of the data root.
func (s *server) openSockets(ctx context.Context) (*net.UnixListener, error) {
	var err error
	s.lock, err = s.takeLock()
	if err != nil && tako.AsError(err).Code == tako.CodeConflict && s.s.InstancePortOffset != 0 {
		return s.openBeside(ctx, err)
	}
	if err != nil {
		return nil, err
	}
	s.undo = append(s.undo, func() { _ = s.lock.Close() })
	ports, inheritedMgmt := s.unitPorts, s.unitMgmt
	s.undo = append(s.undo, s.closePorts)
	s.listeners, s.activated = ports, len(ports) > 0
	if err := checkInherited(ports); err != nil {
		return nil, err
	}
	if !s.activated {
		if s.listeners, err = s.keptPorts(); err == nil && s.listeners == nil {
			if s.listeners, err = openListeners(s.s); err != nil && s.endHolders() {
				s.listeners, err = openListeners(s.s)
			}
		}
		if err != nil {
			return nil, err
		}
	}
	if inheritedMgmt != 0 {
		return unixListener(inheritedMgmt)
	}
	if mgmt := s.keptManagement(); mgmt != nil {
		return mgmt, nil
	}
	mgmt, err := management.Listen(s.layout.PIDSocket(os.Getpid()), s.layout.Socket, 0o660, s.socketGID)
	if err != nil {
		return nil, err
	}
	s.ownMgmt(mgmt)
	return mgmt, nil
}

// ownMgmt notes that the management socket's path is ours to take away.
func (s *server) ownMgmt(mgmt *net.UnixListener) {
	s.mgmtOwn = true
	s.undo = append(s.undo, func() {
		if err := errors.Join(mgmt.Close(), management.Unlisten(s.layout.PIDSocket(os.Getpid()), s.layout.Socket)); err != nil {
			s.log.Warn("management socket not taken away", logging.Err, err)
		}
	})
}

func (s *server) closePorts() {
	for _, l := range s.listeners {
		l.fd.Close()
	}
}

// unixListener makes a listener of a descriptor, which it owns.
func unixListener(fd ipc.FD) (*net.UnixListener, error) {
	f := fd.File("mgmt")
	defer f.Close()
	l, err := net.FileListener(f)
	if err != nil {
		return nil, fmt.Errorf("inherited management socket: %w", err)
	}
	ul, ok := l.(*net.UnixListener)
	if !ok {
		return nil, errors.Join(fmt.Errorf("inherited management socket: it is a %T, not a Unix socket: mend the socket unit", l), l.Close())
	}
	ul.SetUnlinkOnClose(false)
	return ul, nil
}

// serve runs the children, the apps and the management socket until ctx ends.
func (s *server) serve(ctx context.Context, mgmt *net.UnixListener, st *state) error {
	// The children's own contexts: the proxies leave first, then the agent.
	proxying, endProxies := context.WithCancel(context.WithoutCancel(ctx))
	defer endProxies()
	running, endAgent := context.WithCancel(context.WithoutCancel(ctx))
	defer endAgent()
	var agents, proxies, rest, commands sync.WaitGroup
	if err := s.adoptChildren(proxying, &proxies, st); err != nil {
		return s.goBack(ctx, st, err)
	}
	if st != nil {
		s.endUnknown(st)
	}
	s.goOnWithSurvivors(proxying, &proxies)
	defer s.hangUp()
	if err := s.noWayBack(st); err != nil {
		s.log.Warn("a management connection is lost", logging.Err, err)
	}
	reaping, endReaping := context.WithCancel(context.WithoutCancel(ctx))
	defer endReaping()
	go supervise.Reap(reaping) // after the children that we know are known to it
	agents.Go(func() {
		s.keep(running, wire.Agent, &s.agentGeneration, s.adopted.agent != nil, s.runAgent)
		s.endSpare()
	})
	proxies.Go(func() {
		if st == nil {
			s.warm(proxying)
		}
		s.keep(proxying, wire.Proxy, &s.proxyGeneration, s.adopted.proxy != nil, s.runProxy)
	})
	rest.Go(func() {
		defer close(s.restored)
		select {
		case <-s.agentUp:
		case <-time.After(ReadyTimeout): // they go on trying, each for itself
		case <-ctx.Done():
			return
		}
		if st != nil {
			s.goOn()
			s.finishReload(ctx)
			return
		}
		if !s.follows() { // else what is left is the owner's to end
			s.endLeftovers(LeftoverWait, s.instances, nil)
		}
		s.goOn()
		s.restore(ctx, s.survived.rest)
	})
	rest.Go(func() {
		defer close(s.renewed)
		s.renewSurvivors(ctx)
	})
	rest.Go(func() {
		select {
		case <-s.proxyUp:
			s.notify(daemon.SdNotifyReady + "\nSTATUS=serving")
			s.log.Info("ready")
		case <-ctx.Done():
		}
	})
	if st != nil || s.survived.any {
		// Who asks meanwhile waits in the queue of the socket: a deploy would meet an
		// agent that is about to leave.
		select {
		case <-s.restored:
		case <-time.After(ReloadWait):
		case <-ctx.Done():
		}
	}
	var err error
	for again := true; again; {
		again, err = s.session(ctx, mgmt, &commands)
	}
	if !within(StopCommands, &commands) {
		s.log.Warn("commands are cut off", "after", StopCommands.String())
	}
	s.passLink()
	// In order: the proxies finish what they accepted, then the instances end.
	endProxies()
	if !within(StopRequests+5*time.Second, &proxies) {
		for _, l := range s.proxies.all() {
			s.log.Error("proxy does not leave: killed", logging.PID, l.child.PID)
			l.kill(errors.New("it did not leave"))
		}
		proxies.Wait()
	}
	endAgent()
	agents.Wait() // bounded by ChildLeave
	rest.Wait()
	s.heeding.wait()                            // its calls have ended with the agent
	s.endOrphans(nil)                           // an agent may have died over it
	if s.survived.any || s.layout.Second != 0 { // a second that took over too soon before
		s.endLeftovers(OrphanGrace, noInstances, nil)
	}
	s.kept.store.Drop(s.kept.store.Names()...)
	s.groups.remove()
	s.removeApart()
	for _, a := range s.allApps() {
		a.timer.Stop()
	}
	s.log.Info("stopped")
	return err
}

// session answers commands until ctx ends or the socket fails, or until a reload
// was tried and failed: then again is true.
func (s *server) session(ctx context.Context, mgmt *net.UnixListener, commands *sync.WaitGroup) (again bool, err error) {
	answering, quiet := context.WithCancel(ctx)
	defer quiet()
	served := make(chan error, 1)
	commands.Go(func() {
		served <- management.Serve(answering, management.Config{
			Waiting: s.waiting, Left: func(c *net.UnixConn) {
				if ctx.Err() != nil {
					_ = c.Close()
					return
				}
				s.leave(c)
			},
			Listener: mgmt, Backend: announcer{s}, Log: s.log.Named("management"),
			OwnUID: uint32(os.Geteuid()), SocketGID: s.socketGID, Version: s.version, // an id
			// What outlasts ReloadWait refuses the reload, and is not cut by it.
			Limits: management.Limits{DrainTimeout: UploadTime},
		})
	})
	working, idle := context.WithCancel(ctx)
	defer idle()
	var background sync.WaitGroup
	defer background.Wait()
	defer idle()
	defer func() {
		if !again { // before anything is waited for
			s.log.Info("stopping")
			s.notify(daemon.SdNotifyStopping)
			close(s.stopping)
		}
	}()
	background.Go(func() { s.backups(working) })
	background.Go(func() { s.overlap(working) })
	background.Go(func() { s.renewals(working) })
	for {
		select {
		case <-ctx.Done():
			return false, nil
		case err := <-served:
			if ctx.Err() != nil {
				return false, nil // it ended because we do
			}
			return false, fmt.Errorf("management socket: %w", err)
		case <-s.reloadWanted:
		}
		program, err := s.prepareReload(ctx)
		if ctx.Err() != nil {
			return false, nil
		}
		if err != nil {
			s.reloadEnded(err)
			continue
		}
		quiet()
		checked := time.Now()
		ended := make(chan struct{}) // every command, also of a session before, and what the owner's have set off
		go func() {
			defer close(ended)
			commands.Wait()
			idle()
			background.Wait()
			s.heeding.wait()
		}()
		select {
		case <-ctx.Done():
			program.Close()
			return false, nil
		case <-ended:
			if time.Since(checked) > PreflightFresh {
				program.Close()
				program, err = s.preflight(ctx)
			}
			late := time.After(ReloadWait)
			for again := true; err == nil && again; {
				if err = s.awaitChildren(ctx, late); err == nil {
					err = s.handOver(ctx, program, mgmt) // comes back only if it failed
					if again = errors.Is(err, errUnsettled); again {
						select {
						case <-time.After(settlePause): // in which the end of a child is heard
							err = nil
						case <-late:
							again = false
						}
					}
				}
			}
			program.Close()
		case <-time.After(ReloadWait):
			program.Close()
			err = fmt.Errorf("commands still run after %s: %s", ReloadWait, s.busyApps())
		}
		if ctx.Err() != nil {
			return false, nil
		}
		s.reloadEnded(err)
		return true, nil
	}
}

// leave keeps a management connection that waits for its next request for the next
// session, or the next image.
func (s *server) leave(c *net.UnixConn) {
	select {
	case s.waiting <- c:
	default:
		_ = c.Close() // there is room for twice as many as are served
	}
}

// hangUp closes the connections that wait for a session.
func (s *server) hangUp() {
	for {
		select {
		case c := <-s.waiting:
			_ = c.Close()
		default:
			return
		}
	}
}

// within waits for a group at most so long.
func within(d time.Duration, wg *sync.WaitGroup) bool {
	done := make(chan struct{})
	go func() {
		wg.Wait()
		close(done)
	}()
	select {
	case <-done:
		return true
	case <-time.After(d):
		return false
	}
}

// sweep removes what writes that were cut off left behind.
func (s *server) sweep() {
	if copies, err := filepath.Glob(filepath.Join(s.layout.Data, preflightPrefix+"*")); err == nil {
		for _, dir := range copies {
			removeUnheld(dir) // a copy of the database, of a reload that was cut off
		}
	}
	dirs := []string{s.layout.Data, s.layout.Certs()}
	for _, parent := range []string{s.layout.Apps(), s.layout.Certs()} {
		entries, err := os.ReadDir(parent)
		if err != nil {
			continue
		}
		for _, e := range entries {
			if e.IsDir() {
				dirs = append(dirs, parent+"/"+e.Name())
			}
		}
	}
	for _, dir := range dirs {
		if err := atomicfile.RemoveStale(dir, 0); err != nil {
			s.log.Warn("unfinished files stay", logging.Path, dir, logging.Err, err)
		}
	}
}

// recall reads the committed state and settles what a crash left half done: of a
// rollout the database says whether it happened.
func (s *server) recall(ctx context.Context) ([]store.App, error) {
	regs, err := s.db.Apps(ctx)
	if err == nil && !s.follows() {
		err = s.settleCrashed(ctx, regs)
	}
	if err != nil {
		return nil, err
	}
	// Routes first: from here on a proxy that starts knows them all.
	for _, reg := range regs {
		a := s.app(reg.ID)
		a.mu.Lock()
		a.reg = reg
		a.mu.Unlock()
	}
	return regs, nil
}

// settleCrashed settles what the last owner of the data root left half done.
func (s *server) settleCrashed(ctx context.Context, regs []store.App) error {
	pending, err := s.db.Pending(ctx)
	if err != nil {
		return err
	}
	for _, p := range pending {
		s.log.Warn("a deploy was cut off by the end of the server: undone", logging.App, string(p.App), logging.Release, string(p.Release))
		if err := s.db.AbandonRollout(ctx, p.App); err != nil {
			s.log.Error("undo a deploy", logging.App, string(p.App), logging.Err, err)
		}
		if err := os.Remove(s.layout.App(p.App).SecretsNext()); err != nil && !errors.Is(err, os.ErrNotExist) {
			s.log.Error("undo a deploy", logging.App, string(p.App), logging.Err, err)
		}
	}
	for _, reg := range regs {
		if err := finishCommit(s.layout.App(reg.ID), reg); err != nil {
			s.log.Error("finish a deploy", logging.App, string(reg.ID), logging.Err, err)
		}
	}
	s.forgetDeleted(regs)
	mode, lock, err := s.db.Mode(ctx)
	if err != nil {
		return err
	}
	if mode == tako.ModeUpgrading && lock != nil {
		s.upgrading.Store(true)
		s.log.Warn("the server is upgrading: mutating commands are refused", "owner", lock.Owner, "since", lock.AcquiredAt)
	}
	return nil
}

// forgetDeleted removes the secrets of apps that were deleted while the server
// died.
func (s *server) forgetDeleted(regs []store.App) {
	entries, err := os.ReadDir(s.layout.Apps())
	if err != nil {
		return
	}
	for _, e := range entries {
		id, err := tako.ParseAppID(e.Name())
		if err != nil || slices.ContainsFunc(regs, func(r store.App) bool { return r.ID == id }) {
			continue
		}
		l := s.layout.App(id)
		if _, err := os.Lstat(l.Current()); err != nil {
			continue // never deployed: secrets may have been set before the first deploy
		}
		s.app(id).removeSecrets()
	}
}

// restore brings up what was deployed, side by side. A broken app is its own
// trouble.
func (s *server) restore(ctx context.Context, regs []store.App) {
	room := make(chan struct{}, restoreParallel)
	var wg sync.WaitGroup
	for _, reg := range regs {
		room <- struct{}{}
		wg.Go(func() {
			defer func() { <-room }()
			a := s.app(reg.ID)
			defer a.restored()
			if ctx.Err() != nil {
				return
			}
			err := a.restore(ctx, reg)
			for pause := 100 * time.Millisecond; errors.Is(err, errTree) && pause < RestoreTries; pause *= 2 {
				// The agent was starting, or busy: not the app's fault.
				a.log.Warn("app not restored yet", logging.Err, err)
				select {
				case <-time.After(pause):
				case <-ctx.Done():
					return
				}
				err = a.restore(ctx, reg)
			}
			if err != nil {
				a.log.Error("app not restored: its routes answer 503", logging.Err, err)
				a.mu.Lock()
				a.broken = "Restore startup failed: " + err.Error()
				a.publish()
				a.mu.Unlock()
			}
		})
	}
	wg.Wait()
}

// expect has requests and commands wait for apps until they are restored.
func (s *server) expect(regs []store.App) {
	for _, reg := range regs {
		a := s.app(reg.ID)
		m, err := release.Load(reg.Path)
		a.mu.Lock()
		a.restoring = make(chan struct{})
		a.plainHTTP = err == nil && !m.HTTPSRedirect // an error is said by restore
		a.mu.Unlock()
	}
}

// restored ends the wait that expect began.
func (a *app) restored() {
	a.mu.Lock()
	defer a.mu.Unlock()
	close(a.restoring)
	a.restoring = nil
}

// restore starts one app as it was committed.
func (a *app) restore(ctx context.Context, reg store.App) error {
	if err := a.srv.prepareApp(ctx, a); err != nil {
		return err
	}
	if err := a.tree(ctx, nil, false); err != nil {
		return err
	}
	secrets, err := a.committedSecrets(ctx, reg)
	if err != nil {
		return err
	}
	b, err := a.loadBuild(reg.Release, reg.Path, secrets, reg.Routes)
	if err != nil {
		return err
	}
	b.rollout = rolloutOf(reg)
	a.srv.ensureCertificates(reg.Routes)
	a.mu.Lock()
	defer a.mu.Unlock()
	a.builds[b.number] = b
	a.stepLocked(rollout.Restore{Plan: b.plan(reg.Instances, reg.IdleTimeout), Stopped: reg.Stopped})
	return nil
}

// renewals looks after certificates and ticket keys.
func (s *server) renewals(ctx context.Context) {
	certs := time.NewTicker(time.Duration(s.s.RenewalHours) * time.Hour) // bounded by Validate
	defer certs.Stop()
	tickets := time.NewTicker(TicketsRotate)
	defer tickets.Stop()
	for {
		for _, c := range s.certs.Renew() {
			s.log.Info("certificate renewed", "certificate", c.ID)
			s.proxies.send(certMessage(c))
		}
		if s.follows() {
			s.showCertificates(s.certs.Reread())
		}
		select {
		case <-certs.C:
		case <-tickets.C:
			if s.follows() {
				continue // the owner's come when it changes them
			}
			keys := s.tickets.rotate()
			s.proxies.send(&wire.TicketKeys{Keys: keys})
			s.keepState()
			s.shareTickets(keys)
		case <-ctx.Done():
			return
		}
	}
}

func (s *server) nextBuild() rollout.Build { return rollout.Build(s.builds.Add(1)) }

func (s *server) httpPort() uint16  { return portOf(s.listeners, wire.ListenerHTTP) }
func (s *server) httpsPort() uint16 { return portOf(s.listeners, wire.ListenerHTTPS) }

// notify tells systemd, if it started us.
func (s *server) notify(state string) {
	if _, err := daemon.SdNotify(false, state); err != nil {
		s.log.Warn("systemd not told", logging.Err, err)
	}
}

// pairFDs makes a connected pair of sockets for two other processes.
func pairFDs() (a, b ipc.FD, err error) {
	fds, err := socketpair()
	if err != nil {
		return 0, 0, fmt.Errorf("make a socket pair: %w", err)
	}
	return ipc.FD(fds[0]), ipc.FD(fds[1]), nil
}
