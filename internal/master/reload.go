package master

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
	"github.com/hashicorp/go-hclog"
	"golang.org/x/sys/unix"

	"tako/internal/handoff"
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

// Times of a reload.
const (
	// ReloadWait is how long a reload waits for running commands before it is
	// refused, naming them.
	ReloadWait = 120 * time.Second
	// PreflightTime bounds the new program's check of what it will find.
	PreflightTime = 30 * time.Second
	// PreflightFresh is how long a check holds: if commands had to be waited for
	// longer, it is made once more.
	PreflightFresh = time.Second
	// DrainRequests and DrainStreams are an old proxy's limits.
	DrainRequests = 30 * time.Second
	DrainStreams  = 60 * time.Second
)

// preflightPrefix begins the name of the folder that a pre-flight looks into.
const preflightPrefix = ".preflight-"

// stateSchema is the version of state. An image reads its own and the one before.
const stateSchema = 1

// state is what one image of tako-master hands to the next, which has the same
// PID and goes on with the same sockets, children and apps. It lives in a sealed
// memfd only: it holds secrets.
type state struct {
	Schema    int       `json:"schema"`
	Version   string    `json:"version"` // of the image that wrote it
	StartedAt time.Time `json:"started_at"`
	Reloads   uint64    `json:"reloads"` // done so far, this one included
	Failed    uint64    `json:"failed"`
	// Program is the executable of the image that wrote it. An image that cannot
	// go on executes it again, once, with Back saying why.
	Program ipc.FD `json:"program"`
	Back    string `json:"back"`
	// AgentProgram and ProxyProgram belong to Program.
	AgentProgram ipc.FD `json:"agent_program"`
	ProxyProgram ipc.FD `json:"proxy_program"`

	Lock      ipc.FD           `json:"lock"`
	Mgmt      ipc.FD           `json:"mgmt"`
	MgmtOwn   bool             `json:"mgmt_own"` // we made its path and take it away
	MgmtConns []ipc.FD         `json:"mgmt_conns"`
	Listeners []handedListener `json:"listeners"`
	Activated bool             `json:"activated"` // the listeners are systemd's
	Tickets   [][]byte         `json:"tickets"`
	Builds    uint64           `json:"builds"`
	GroupsPID int              `json:"groups_pid"` // in the name of our control groups

	// The newest generations, and what the service manager keeps.
	AgentGeneration uint64   `json:"agent_generation"`
	ProxyGeneration uint64   `json:"proxy_generation"`
	Kept            []string `json:"kept"`
	KeptState       string   `json:"kept_state"` // the name of the newest state
	KeptStates      uint64   `json:"kept_states"`

	// Of a second server of the data root: see overlap.go.
	Following     int    `json:"following"` // the owner's pid; 0 once it is ours
	Second        bool   `json:"second"`    // it was started as one
	FirstInstance uint32 `json:"first_instance"`
	Apart         ipc.FD `json:"apart"` // holds the folder of its sockets

	Agent   *handedLink  `json:"agent"`
	Proxies []handedLink `json:"proxies"` // the serving one last
	Apps    []handedApp  `json:"apps"`
}

type handedListener struct {
	Name string `json:"name"`
	FD   ipc.FD `json:"fd"`
}

type handedLink struct {
	Generation uint64           `json:"generation"`
	Child      supervise.Handed `json:"child"`
	Channel    ipc.FD           `json:"channel"`
	Position   wire.Position    `json:"position"`
	State      string           `json:"state"`
	Settings   string           `json:"settings"` // see settingsOf
	// Of a proxy: its signing socket, and what it said.
	Signer         ipc.FD                         `json:"signer"`
	SignerPosition wire.Position                  `json:"signer_position"`
	Traffic        map[tako.AppID]wire.AppTraffic `json:"traffic"`
	Quiet          map[tako.InstanceID]int        `json:"quiet"`
}

type handedApp struct {
	ID        tako.AppID        `json:"id"`
	Core      rollout.Snapshot  `json:"core"`
	BasePort  uint16            `json:"base_port"`
	UID       uint32            `json:"uid"`
	Broken    string            `json:"broken"`
	Revision  uint64            `json:"revision"`
	LastError string            `json:"last_error"`
	Deaths    map[string]uint64 `json:"deaths"`
	Builds    []handedBuild     `json:"builds"`
	Procs     []handedProcess   `json:"procs"`
}

type handedBuild struct {
	Number   rollout.Build     `json:"number"`
	Rollout  int64             `json:"rollout"`
	Release  tako.ReleaseID    `json:"release"`
	Dir      string            `json:"dir"`
	Manifest *release.Manifest `json:"manifest"`
	Argv     []string          `json:"argv"`
	Secrets  map[string]string `json:"secrets"`
	Routes   []string          `json:"routes"`
}

type handedProcess struct {
	N         uint32        `json:"n"`
	Build     rollout.Build `json:"build"`
	Name      string        `json:"name"`
	Port      uint16        `json:"port"`
	Socket    string        `json:"socket"`
	PID       int           `json:"pid"`
	StartedAt time.Time     `json:"started_at"`
	Held      []ipc.FD      `json:"held"`
	Requests  uint64        `json:"requests"`
	Restarts  uint64        `json:"restarts"`
	Limits    string        `json:"limits"`
	Start     *wire.Start   `json:"start"`
	Sent      bool          `json:"sent"`
	StopBy    time.Time     `json:"stop_by"`
}

// fds are the descriptors that must stay open over the exec.
func (st *state) fds() []ipc.FD {
	all := append([]ipc.FD{st.Program, st.AgentProgram, st.ProxyProgram, st.Lock, st.Mgmt}, st.MgmtConns...)
	if st.Apart != 0 {
		all = append(all, st.Apart)
	}
	for _, l := range st.Listeners {
		all = append(all, l.FD)
	}
	links := slices.Clone(st.Proxies)
	if st.Agent != nil {
		links = append(links, *st.Agent)
	}
	for _, l := range links {
		all = append(all, l.Child.PIDFD, l.Child.Output, l.Channel)
		if l.Signer != 0 {
			all = append(all, l.Signer)
		}
	}
	for _, a := range st.Apps {
		for _, p := range a.Procs {
			all = append(all, p.Held...)
		}
	}
	return all
}

// reloading is what is known of reloads, for people.
type reloading struct {
	mu       sync.Mutex
	done     uint64 // reloads that reached a new image
	failed   uint64
	running  bool
	lastErr  string
	finished time.Time
}

func (r *reloading) begin() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.running = true
}

func (r *reloading) end(err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.running, r.finished, r.lastErr = false, time.Now(), ""
	if err != nil {
		r.lastErr = err.Error()
		r.failed++
	}
}

func (r *reloading) info() *management.ReloadInfo {
	r.mu.Lock()
	defer r.mu.Unlock()
	info := &management.ReloadInfo{Count: r.done, Failed: r.failed, Running: r.running, LastError: r.lastErr}
	if !r.finished.IsZero() {
		info.FinishedAt = r.finished.Unix()
	}
	return info
}

// Reload implements management.Backend: it asks for a reload, which begins once
// the running commands have ended, this one too.
func (s *server) Reload(context.Context) (management.ReloadInfo, error) {
	info := *s.reload.info()
	s.wantReload()
	return info, nil
}

// wantReload asks for a reload. Several wishes are one.
func (s *server) wantReload() {
	select {
	case s.reloadWanted <- struct{}{}:
	default:
	}
}

// preflight has the installed program check what it would find: flags and
// settings, the programs beside it, and the database, by a copy. It returns the
// program, open.
func (s *server) preflight(ctx context.Context) (program ipc.FD, err error) {
	fd, err := unix.Open(s.selfPath, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return 0, fmt.Errorf("open %s: %w: install tako-master there", s.selfPath, err)
	}
	defer func() {
		if err != nil {
			ipc.FD(fd).Close()
		}
	}()
	ctx, cancel := context.WithTimeout(ctx, PreflightTime)
	defer cancel()
	dir, held, err := s.makePreflight()
	if err != nil {
		return 0, err
	}
	defer held.Close()
	defer os.RemoveAll(dir)
	db := filepath.Join(dir, filepath.Base(s.layout.Database()))
	if err := s.db.CopyTo(ctx, db); err != nil {
		return 0, fmt.Errorf("copy the database: %w", err)
	}
	cmd := exec.CommandContext(ctx, fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), fd), append(slices.Clone(os.Args[1:]), "--preflight="+db)...)
	cmd.Args[0] = "tako-master"
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := runOwn(cmd); err != nil {
		why := strings.TrimSpace(errs.String())
		if why == "" {
			why = strings.TrimSpace(out.String())
		}
		return 0, fmt.Errorf("the installed %s would not work: %w: %s", s.selfPath, err, firstLines(why, 5))
	}
	var said preflightReply
	if err := json.Unmarshal(out.Bytes(), &said); err != nil {
		return 0, fmt.Errorf("the installed %s is no tako-master that can be reloaded into", s.selfPath)
	}
	if said.Socket != s.layout.Socket || said.Data != s.layout.Data {
		return 0, fmt.Errorf("the settings now name the socket %s and the data root %s: these change only with a restart", said.Socket, said.Data)
	}
	if said.Protocol != wire.ProtocolVersion || said.Schema < stateSchema || said.Schema > stateSchema+1 {
		return 0, fmt.Errorf("the installed version %s speaks another protocol (%d, state %d): restart the server to change to it", said.Version, said.Protocol, said.Schema)
	}
	if ours, err := store.Schema(); err != nil {
		return 0, err
	} else if s.follows() && said.Database != 0 && said.Database != ours {
		return 0, fmt.Errorf("the installed version %s has schema %d of the database and its owner, pid %d, has %d: reload that server first", said.Version, said.Database, s.Owner(), ours)
	}
	return ipc.FD(fd), nil
}

// makePreflight makes the folder of a pre-flight, which another server of the data
// root leaves alone as long as it is held.
func (s *server) makePreflight() (dir string, held *os.File, err error) {
	return holdMade(func() (string, error) { return os.MkdirTemp(s.layout.Data, preflightPrefix) })
}

// runOwn is cmd.Run with a child that the reaper of orphans leaves to us.
func runOwn(cmd *exec.Cmd) error {
	err := supervise.Fork(func() (int, error) {
		if err := cmd.Start(); err != nil {
			return 0, err
		}
		return cmd.Process.Pid, nil
	})
	if err != nil {
		return err
	}
	defer supervise.Waited(cmd.Process.Pid)
	return cmd.Wait()
}

func firstLines(s string, n int) string {
	lines := strings.SplitN(s, "\n", n+1)
	return strings.Join(lines[:min(len(lines), n)], "\n")
}

// preflightReply is what --preflight prints.
type preflightReply struct {
	Version  string `json:"version"`
	Protocol int    `json:"protocol"`
	Schema   int    `json:"schema"`
	Socket   string `json:"socket"`
	Data     string `json:"data"`
	Database int    `json:"database"` // the schema that it has
}

// Preflight is the new program's side of the check before a reload: db is a copy
// of the database, in a folder of its own.
func Preflight(ctx context.Context, c Config, version, db string) (reply string, err error) {
	set, err := c.settle()
	if err != nil {
		return "", err
	}
	for _, role := range []wire.Role{wire.Agent, wire.Proxy} {
		p, err := openProgram(role, set.LibexecDir)
		if err != nil {
			return "", err
		}
		err = checkProgram(ctx, p)
		p.fd.Close()
		if err != nil {
			return "", err
		}
	}
	d, err := store.Open(ctx, store.Options{
		Path: db, BackupDir: filepath.Join(filepath.Dir(db), "backups"), ReservePath: filepath.Join(filepath.Dir(db), "reserve"),
		Log: hclog.NewNullLogger(), Version: version,
	})
	if err != nil {
		return "", err
	}
	if err := d.Close(); err != nil {
		return "", err
	}
	schema, err := store.Schema()
	if err != nil {
		return "", err
	}
	b, err := json.Marshal(preflightReply{Database: schema, Version: version, Protocol: wire.ProtocolVersion, Schema: stateSchema, Socket: set.layout.Socket, Data: set.layout.Data})
	return string(b), err
}

// checkProgram has a program say its version: a torn file does not.
func checkProgram(ctx context.Context, p program) error {
	cmd := exec.CommandContext(ctx, fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), p.fd), "--version")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%s does not run: %w: %s", p.path, err, firstLines(strings.TrimSpace(string(out)), 3))
	}
	return nil
}

// handOver becomes the program: this image's last act. It returns only if that
// fails, with everything going on as before.
func (s *server) handOver(ctx context.Context, program ipc.FD, mgmt *net.UnixListener) error {
	st := &state{
		Schema: stateSchema, Version: s.version, StartedAt: s.startedAt, Reloads: s.reload.info().Count + 1, Failed: s.reload.info().Failed,
		MgmtOwn: s.mgmtOwn, Activated: s.activated, Builds: s.builds.Load(), Tickets: s.tickets.current(), GroupsPID: s.groups.pid,
		AgentGeneration: s.agentGeneration.Load(), ProxyGeneration: s.proxyGeneration.Load(),
	}
	var undo []func()
	defer func() {
		for _, f := range slices.Backward(undo) {
			f()
		}
	}()
	dup := func(get func() (ipc.FD, error)) (ipc.FD, error) {
		fd, err := get()
		if err == nil {
			undo = append(undo, fd.Close)
		}
		return fd, err
	}
	var err error
	if st.Program, err = dup(openSelf); err != nil {
		return err
	}
	if st.Lock, err = dup(func() (ipc.FD, error) { return dupOf(s.lock) }); err != nil {
		return err
	}
	if st.Mgmt, err = dup(func() (ipc.FD, error) { return dupOf(mgmt) }); err != nil {
		return err
	}
	if s.apart != nil {
		if st.Apart, err = dup(func() (ipc.FD, error) { return dupOf(s.apart) }); err != nil {
			return err
		}
	}
	// Every session has ended: no other connection comes to wait.
	for n := len(s.waiting); n > 0; n-- {
		c := <-s.waiting
		undo = append(undo, func() { s.leave(c) })
		fd, err := dup(func() (ipc.FD, error) { return dupOf(c) })
		if err != nil {
			return err
		}
		st.MgmtConns = append(st.MgmtConns, fd)
	}
	st.AgentProgram, st.ProxyProgram = s.agentProgram.fd, s.proxyProgram.fd
	st.Following, st.Second, st.FirstInstance = s.Owner(), s.layout.Second != 0, s.firstInstance
	for _, l := range s.portsToHand() {
		st.Listeners = append(st.Listeners, handedListener{Name: l.name, FD: l.fd})
	}

	// Children: nothing is heard any more, everything said has been sent.
	agent, links := s.agentNow(), s.proxies.all()
	if !s.settledChildren() {
		return errUnsettled
	}
	if agent != nil && agent.pause(agent.conn, agent.ended) {
		undo = append(undo, func() { agent.resume(agent.conn, agent.ended) })
	}
	for _, l := range links {
		if l.pause(l.conn, l.ended) {
			undo = append(undo, func() { l.resume(l.conn, l.ended) })
		}
	}
	for _, l := range links {
		if l.signer != nil && l.signing.pause(l.signer, l.ended) {
			undo = append(undo, func() { l.signing.resume(l.signer, l.ended) })
		}
	}
	// Apps: nothing is decided any more.
	for _, a := range s.allApps() {
		a.mu.Lock()
		undo = append(undo, a.mu.Unlock)
		h, err := a.handed()
		if err != nil {
			return fmt.Errorf("app %s: %w", a.id, err)
		}
		st.Apps = append(st.Apps, h)
	}
	hand := func(l *link) (handedLink, error) {
		if !l.flush(ipc.SendTimeout) {
			return handedLink{}, fmt.Errorf("%s does not take its messages", l.role)
		}
		h := handedLink{Generation: l.generation, State: *l.state.Load(), Settings: l.settings}
		if h.Child, err = l.child.HandOver(); err != nil {
			return h, err
		}
		undo = append(undo, h.Child.PIDFD.Close, h.Child.Output.Close)
		h.Channel, h.Position, err = l.conn.HandOver()
		if err == nil {
			undo = append(undo, h.Channel.Close)
		}
		return h, err
	}
	if agent != nil {
		h, err := hand(agent)
		if err != nil {
			return agent.unsettled(err)
		}
		st.Agent = &h
	}
	for _, l := range links {
		h, err := hand(l.link)
		if err != nil {
			return l.unsettled(err)
		}
		if l.signer != nil {
			if h.Signer, h.SignerPosition, err = l.signer.HandOver(); err != nil {
				return err
			}
			undo = append(undo, h.Signer.Close)
		}
		h.Traffic, h.Quiet = l.traffic, l.quiet
		st.Proxies = append(st.Proxies, h)
	}
	if err := s.db.Close(); err != nil {
		return err
	}
	s.kept.store.Flush()
	st.Kept = s.kept.store.Names()
	s.kept.mu.Lock()
	st.KeptState, st.KeptStates = s.kept.state, s.kept.n
	s.kept.mu.Unlock()
	fd, err := handoff.Save(st)
	if err == nil {
		err = ctx.Err() // the last look: a wish to stop is not to be lost in the next image
	}
	if err == nil {
		err = handoff.Exec(program, os.Args, fd, st.fds(), func() error {
			// From here on a wish to stop ends us where we stand, and everything with us in
			// order: what came before it is known in a moment.
			signal.Stop(s.signals.Stop)
			time.Sleep(time.Millisecond)
			// No other child can be made any more; but Own could wait for one that is.
			if s.agentNow() != agent || !slices.Equal(s.proxies.all(), links) {
				return errUnsettled
			}
			return ctx.Err()
		})
		signal.Notify(s.signals.Reload, syscall.SIGHUP)
		signal.Notify(s.signals.Stop, syscall.SIGTERM, syscall.SIGINT)
	}
	fd.Close()
	return errors.Join(err, s.openStore(context.Background()))
}

// handed is one app for the next image. Called with mu held.
func (a *app) handed() (handedApp, error) {
	core, err := a.core.Snapshot()
	if err != nil {
		return handedApp{}, err
	}
	h := handedApp{
		ID: a.id, Core: core, BasePort: a.reg.BasePort, UID: a.reg.UID, Broken: a.broken,
		Revision: a.revision, LastError: a.lastError, Deaths: a.deaths,
	}
	for _, b := range a.builds {
		h.Builds = append(h.Builds, handedBuild{
			Number: b.number, Rollout: b.rollout, Release: b.release, Dir: b.dir, Manifest: b.manifest, Argv: b.argv, Secrets: b.secrets, Routes: b.routes,
		})
	}
	for n, p := range a.procs {
		h.Procs = append(h.Procs, handedProcess{
			N: n, Build: p.build.number, Name: p.name, Port: p.port, Socket: p.socket, PID: p.pid,
			StartedAt: p.startedAt, Held: p.held, Requests: p.requests, Restarts: p.restarts,
			Limits: p.limits, Start: p.start, Sent: p.sent, StopBy: p.stopBy,
		})
	}
	return h, nil
}

// takeOver makes the apps of the image before ours. Their registrations have been
// read from the database.
func (s *server) takeOver(st *state) error {
	s.builds.Store(st.Builds)
	s.kept.state, s.kept.n = st.KeptState, st.KeptStates
	s.agentGeneration.Store(st.AgentGeneration)
	s.proxyGeneration.Store(st.ProxyGeneration)
	s.tickets.keys = st.Tickets
	s.reload.done, s.reload.failed = st.Reloads, st.Failed
	if st.Back != "" { // we are the old program again; its proxy serves on
		s.reload.done--
		s.reload.end(errors.New("the new program could not go on: " + st.Back))
		s.proxyReady.Do(func() { close(s.proxyUp) })
	} else {
		s.reload.begin()
	}
	for _, h := range st.Apps {
		a := s.app(h.ID)
		core, err := rollout.Resume(h.Core, jitter)
		if err != nil {
			return fmt.Errorf("app %s: %w", h.ID, err)
		}
		a.mu.Lock()
		a.core, a.broken, a.revision, a.lastError = core, h.Broken, h.Revision, h.LastError
		if h.Deaths != nil {
			a.deaths = h.Deaths
		}
		a.reg.BasePort, a.reg.UID = h.BasePort, h.UID
		for _, b := range h.Builds {
			a.builds[b.Number] = &build{
				number: b.Number, rollout: b.Rollout, release: b.Release, dir: b.Dir, manifest: b.Manifest, argv: b.Argv, secrets: b.Secrets, routes: b.Routes,
			}
		}
		for _, p := range h.Procs {
			b := a.builds[p.Build]
			if b == nil {
				a.mu.Unlock()
				return fmt.Errorf("app %s: instance %d is of no build", h.ID, p.N)
			}
			a.procs[p.N] = &process{
				build: b, name: p.Name, port: p.Port, socket: p.Socket, pid: p.PID, startedAt: p.StartedAt,
				held: p.Held, requests: p.Requests, restarts: p.Restarts,
				limits: p.Limits, start: p.Start, sent: p.Sent, stopBy: p.StopBy,
			}
		}
		a.mu.Unlock()
	}
	return nil
}

// adopt goes on with a child of the image before ours.
func (s *server) adopt(h *handedLink, role wire.Role, kind wire.Link, version string) (*link, error) {
	ch, err := ipc.Open(h.Channel)
	if err != nil {
		return nil, fmt.Errorf("adopt %s: %w", role, err)
	}
	conn, err := wire.ResumeConn(ch, kind, wire.Master, h.Position)
	if err != nil {
		return nil, fmt.Errorf("adopt %s: %w", role, err)
	}
	child, err := supervise.Adopt(h.Child, ch, s.log)
	if err != nil {
		return nil, errors.Join(err, conn.Close())
	}
	l := &link{
		role: role, generation: h.Generation, child: child, conn: conn,
		log:       s.log.With(logging.Role, string(role), logging.Generation, h.Generation),
		startedAt: h.Child.Started, pongs: make(chan uint64, 4), ended: make(chan struct{}),
		outWake: make(chan struct{}, 1), pauser: newPauser(), version: version,
		settings: h.Settings,
	}
	l.calls = wire.NewCalls(conn)
	l.setState(h.State)
	l.ready.Store(h.State == "ready")
	s.keepChild(l)
	go l.deliver()
	return l, nil
}

// openSelf opens the running program.
func openSelf() (ipc.FD, error) {
	fd, err := unix.Open("/proc/self/exe", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return 0, fmt.Errorf("open the running program: %w", err)
	}
	return ipc.FD(fd), nil
}

// dupOf duplicates the descriptor of a file or socket, without a change to its
// mode.
func dupOf(f syscall.Conn) (ipc.FD, error) {
	raw, err := f.SyscallConn()
	if err != nil {
		return 0, err
	}
	var fd int
	ctl := raw.Control(func(own uintptr) { fd, err = unix.FcntlInt(own, unix.F_DUPFD_CLOEXEC, 3) })
	return ipc.FD(fd), errors.Join(ctl, err)
}

// adopted are the children of the image before ours, until somebody goes on with
// them.
type adopted struct {
	mu    sync.Mutex
	agent *link
	proxy *proxyLink
}

// takeAgent returns the adopted agent, once.
func (a *adopted) takeAgent() *link {
	a.mu.Lock()
	defer a.mu.Unlock()
	l := a.agent
	a.agent = nil
	return l
}

// takeProxy returns the proxy that goes on as the newest, once.
func (a *adopted) takeProxy() *proxyLink {
	a.mu.Lock()
	defer a.mu.Unlock()
	l := a.proxy
	a.proxy = nil
	return l
}

// adoptChildren goes on with the children in st, if any.
func (s *server) adoptChildren(ctx context.Context, proxies *sync.WaitGroup, st *state) (err error) {
	if st == nil {
		return nil
	}
	if st.Agent != nil {
		if s.adopted.agent, err = s.adopt(st.Agent, wire.Agent, wire.LinkAgent, st.Version); err != nil {
			return err
		}
		s.agentGeneration.Store(max(s.agentGeneration.Load(), st.Agent.Generation))
	}
	for i := range st.Proxies {
		h := &st.Proxies[i]
		raw, err := s.adopt(h, wire.Proxy, wire.LinkProxy, st.Version)
		if err != nil {
			return err
		}
		l := newProxyLink(raw)
		if h.Traffic != nil {
			l.traffic = h.Traffic
		}
		if h.Quiet != nil {
			l.quiet = h.Quiet
		}
		l.draining.Store(h.State == "draining")
		if h.Signer != 0 {
			ch, err := ipc.Open(h.Signer)
			if err != nil {
				return err
			}
			if l.signer, err = wire.ResumeConn(ch, wire.LinkSigning, wire.Master, h.SignerPosition); err != nil {
				return err
			}
			go s.serveSigner(l)
		}
		s.proxies.add(l)
		proxies.Go(func() { s.goOnWithProxy(ctx, l) })
		if st.Back != "" && !l.draining.Load() {
			s.servesOn = l.ended
		}
		s.proxyGeneration.Store(max(s.proxyGeneration.Load(), h.Generation))
	}
	return nil
}

// goOnWithProxy serves a proxy of the image before ours to its end.
func (s *server) goOnWithProxy(ctx context.Context, l *proxyLink) {
	go l.beat(ctx)
	go s.drainAtEnd(ctx, l)
	l.receive(func() {}, func(m wire.Message) { s.fromProxy(l, m) })
	s.proxies.remove(l)
	l.lastWord()
	<-l.child.Done()
	s.proxyGone(l)
	l.log.Info("old proxy has left")
}

// goOn wakes the apps of the image before ours.
func (s *server) goOn() {
	for _, a := range s.allApps() {
		a.step(rollout.Tick{})
	}
}

// finishReload replaces the agent once the new proxy serves, and says how the
// reload came out, if that has not been said.
func (s *server) finishReload(ctx context.Context) {
	select {
	case <-s.proxyUp:
	case <-ctx.Done():
		return
	}
	if s.reload.info().Running {
		for _, fd := range s.givenUp { // there is no way back any more
			fd.Close()
		}
		s.givenUp = nil
		if err := s.replaceAgent(ctx); ctx.Err() == nil {
			s.reloadEnded(err)
		}
	}
}

// inherit takes the lock, the ports and the management socket of the image before
// ours, and opens and closes ports where the settings changed.
func (s *server) inherit(st *state) (_ *net.UnixListener, err error) {
	if st.Schema > stateSchema || st.Schema < stateSchema-1 {
		return nil, fmt.Errorf("the state of version %s has schema %d, this version reads %d", st.Version, st.Schema, stateSchema)
	}
	s.startedAt = st.StartedAt
	s.activated = st.Activated
	s.lock = st.Lock.File("lock")
	for _, h := range st.Listeners {
		addr, err := boundTo(h.FD)
		if err != nil {
			return nil, err
		}
		s.listeners = append(s.listeners, listener{name: h.Name, fd: h.FD, addr: addr})
	}
	if st.Second {
		s.layout.Second, s.firstInstance = os.Getpid(), st.FirstInstance
		if err := makeOwn(s.layout.Instances(), 0o711); err != nil {
			return nil, err
		}
		if st.Apart != 0 {
			s.apart = st.Apart.File("apart")
		} else if s.apart, err = hold(s.layout.Instances()); err != nil { // the image before ours was of a version that held nothing
			return nil, err
		}
	}
	s.ownerPID.Store(int64(st.Following))
	if !s.activated && !s.follows() {
		if err := s.changePorts(); err != nil {
			return nil, err
		}
	}
	// A duplicate, so that the state stays whole should we have to go back.
	fd, err := unix.FcntlInt(uintptr(st.Mgmt), unix.F_DUPFD_CLOEXEC, 3)
	if err != nil {
		return nil, fmt.Errorf("inherited management socket: %w", err)
	}
	mgmt, err := unixListener(ipc.FD(fd))
	if err != nil {
		return nil, err
	}
	if st.MgmtOwn {
		s.ownMgmt(mgmt)
	}
	return mgmt, nil
}

// noWayBack goes on with the management connections of the image before ours, and
// gives up what that one would have needed to go on itself.
func (s *server) noWayBack(st *state) (err error) {
	if st == nil {
		return nil
	}
	for _, fd := range st.MgmtConns {
		f := fd.File("management")
		c, e := net.FileConn(f)
		if uc, ok := c.(*net.UnixConn); ok {
			s.leave(uc)
		}
		err = errors.Join(err, e, f.Close())
	}
	st.Program.Close()
	st.Mgmt.Close() // we have a duplicate
	if st.Back == "" {
		st.AgentProgram.Close()
		st.ProxyProgram.Close()
	}
	return err
}

// changePorts opens the ports that the settings name and we do not hold. Those
// that they no longer name are left to the old proxies, which close them as they
// leave.
func (s *server) changePorts() error {
	var kept []listener
	missing := wantedPorts(s.s)
	for _, l := range s.listeners {
		i := slices.IndexFunc(missing, func(w wantedPort) bool {
			return w.name == l.name && w.at.Addr() == l.addr.Addr() && (w.at.Port() == 0 || w.at.Port() == l.addr.Port())
		})
		if i < 0 {
			s.log.Info("port given up", logging.Addr, l.addr.String())
			s.givenUp = append(s.givenUp, l.fd)
			continue
		}
		missing = slices.Delete(missing, i, i+1)
		kept = append(kept, l)
	}
	for _, w := range missing {
		l, err := openPort(s.s, w)
		if err != nil {
			return err
		}
		if l.fd != 0 {
			s.log.Info("port opened", logging.Addr, l.addr.String())
			kept = append(kept, l)
		}
	}
	s.listeners = kept
	return nil
}

// prepareReload waits for what must come first, and checks that the installed
// program would work.
func (s *server) prepareReload(ctx context.Context) (ipc.FD, error) {
	s.reload.begin()
	s.log.Info("reloading")
	s.notify(reloadingState())
	late := time.After(ReloadWait)
	for _, wait := range []<-chan struct{}{s.restored, s.proxyUp, s.renewed} {
		select {
		case <-wait:
		case <-late:
			return 0, errors.New("the last start or reload has not come to its end")
		case <-ctx.Done():
			return 0, errNoServer
		}
	}
	if err := s.awaitChildren(ctx, late); err != nil {
		return 0, err
	}
	for s.proxies.oldOnes() >= MaxOldProxies { // they leave at their limits
		select {
		case <-time.After(100 * time.Millisecond):
		case <-late:
			return 0, fmt.Errorf("%d old proxies still drain", MaxOldProxies)
		case <-ctx.Done():
			return 0, errNoServer
		}
	}
	return s.preflight(ctx)
}

// errUnsettled is the error of a reload that met children which it could not hand
// over, as one of them had just died: it is tried again.
var errUnsettled = errors.New("tako-proxy or tako-agent is not ready")

// settlePause is the time between two looks at children that are not ready.
const settlePause = 10 * time.Millisecond

// unsettled is the error of a hand-over that failed, as one that is tried again if the
// child has ended in that moment, or does in the next: its descriptors go first.
func (l *link) unsettled(err error) error {
	select {
	case <-l.child.Done():
		return fmt.Errorf("%w: %w", errUnsettled, err)
	case <-time.After(LastWord):
		return err
	}
}

// awaitChildren waits until the children are those that can be handed over.
func (s *server) awaitChildren(ctx context.Context, late <-chan time.Time) error {
	for !s.settledChildren() { // one of them was just replaced
		select {
		case <-time.After(settlePause):
		case <-late:
			return errUnsettled
		case <-ctx.Done():
			return errNoServer
		}
	}
	return nil
}

// settledChildren reports whether there is an agent and a proxy that serves, and
// no child beside them and the old proxies: the next image would not know it.
func (s *server) settledChildren() bool {
	agent := s.agentNow()
	if agent == nil || !s.proxies.oneServes() {
		return false
	}
	known := map[int]bool{agent.child.PID: true}
	for _, l := range s.proxies.all() {
		known[l.child.PID] = true
	}
	return !slices.ContainsFunc(supervise.Own(), func(pid int) bool { return !known[pid] })
}

// endUnknown ends the children that the image before ours had kept and did not hand
// over: nobody would ever speak with them. Killed an agent leaves its instances
// alone; at the end of its channel it would not. The children that we know are known
// to supervise by now.
func (s *server) endUnknown(st *state) {
	known := make(map[string]bool)
	for i := range st.Proxies {
		known[childName(wire.Proxy, st.Proxies[i].Generation)] = true
	}
	if st.Agent != nil {
		known[childName(wire.Agent, st.Agent.Generation)] = true
	}
	for _, role := range []wire.Role{wire.Agent, wire.Proxy} {
		for _, name := range st.Kept {
			base, last := strings.CutSuffix(name, "-about")
			if !last || !strings.HasPrefix(base, string(role)+"-") || known[base] {
				continue
			}
			s.log.Warn("ending a child that was not handed over", "name", base)
			for _, r := range supervise.Orphans() {
				if argv0Of(r.PID) == string(role) {
					supervise.KillIf(r, nil)
				}
			}
			s.kept.store.Drop(partsOf(base, childParts)...)
		}
	}
}

// MaxOldProxies is how many proxies may drain at one time; a further reload waits.
const MaxOldProxies = 2

// agentNow returns the agent that is asked now, or nil.
func (s *server) agentNow() *link {
	s.agentMu.Lock()
	defer s.agentMu.Unlock()
	return s.agent
}

// oneServes reports whether the newest proxy is ready.
func (p *proxySet) oneServes() bool {
	all := p.all()
	return len(all) > 0 && all[len(all)-1].ready.Load() && !all[len(all)-1].draining.Load()
}

// oldOnes counts the proxies that drain.
func (p *proxySet) oldOnes() int {
	n := 0
	for _, l := range p.all() {
		if l.draining.Load() {
			n++
		}
	}
	return n
}

// reloadEnded says how a reload came out.
func (s *server) reloadEnded(err error) {
	s.reload.end(err)
	status := "serving"
	if err != nil {
		s.log.Error("reload failed; everything goes on as before", logging.Err, err)
		status = "reload failed: " + firstLines(err.Error(), 1)
	} else {
		s.log.Info("reloaded", logging.Version, s.version)
	}
	s.notify(daemon.SdNotifyReady + "\nSTATUS=" + status)
}

// reloadingState is what systemd is told at the beginning of a reload.
func reloadingState() string {
	var now unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &now); err != nil {
		return daemon.SdNotifyReloading
	}
	return fmt.Sprintf("%s\nMONOTONIC_USEC=%d", daemon.SdNotifyReloading, now.Nano()/1000)
}

// busyApps names the apps whose command is still running.
func (s *server) busyApps() string {
	var names []string
	for _, a := range s.allApps() {
		if a.tryOp() {
			a.endOp()
		} else {
			names = append(names, string(a.id))
		}
	}
	if len(names) == 0 {
		return "none of an app"
	}
	return "of " + strings.Join(names, ", ")
}
