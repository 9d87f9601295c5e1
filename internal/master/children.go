package master

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/go-hclog"
	"golang.org/x/sys/unix"

	"tako/internal/fdstore"
	"tako/internal/ipc"
	"tako/internal/logging"
	"tako/internal/sandbox"
	"tako/internal/supervise"
	"tako/internal/tako"
	"tako/internal/wire"
)

// ReadyTimeout bounds how long a child may take to greet and to be ready.
const ReadyTimeout = 10 * time.Second

// A program is a child's executable, opened when the master starts: what runs
// together belongs together, whatever lies on disk meanwhile.
type program struct {
	role wire.Role
	fd   ipc.FD
	path string
}

// openProgram opens a child's executable beside our own, or in dir.
func openProgram(role wire.Role, dir string) (program, error) {
	if dir == "" {
		self, err := os.Executable()
		if err != nil {
			return program{}, fmt.Errorf("find %s: %w: name its folder with --libexec-dir", role, err)
		}
		dir = filepath.Dir(self)
	}
	path := filepath.Join(dir, string(role))
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return program{}, fmt.Errorf("find %s: open %s: %w: install it there, or name its folder with --libexec-dir", role, path, err)
	}
	return program{role: role, fd: ipc.FD(fd), path: path}, nil
}

// A link is a running child and the channel to it.
type link struct {
	role       wire.Role
	generation uint64
	child      *supervise.Child
	conn       *wire.Conn
	calls      *wire.Calls
	log        hclog.Logger
	startedAt  time.Time
	pongs      chan uint64

	ready atomic.Bool
	state atomic.Pointer[string] // for people

	// out is what waits to be sent. Who receives from a child must never wait for
	// it to receive: both could wait for each other.
	outMu   sync.Mutex
	out     []any         // guarded by outMu
	sending bool          // guarded by outMu: a batch is on its way
	outWake chan struct{} // has room for one

	pauser

	// released: an agent that was asked to leave its instances to the next.
	released atomic.Bool
	// knows: an agent's instances, before it is employed; nil for none.
	knows map[tako.InstanceID]bool

	// version of its build, the settings that it began with (settingsOf), and what
	// the service manager keeps of it.
	version  string
	settings string
	kept     *fdstore.Store
	names    []string

	endOnce sync.Once
	ended   chan struct{} // closed when the link is of no more use
	why     error         // set before ended is closed
}

// startLink starts a child and exchanges greetings with it.
func (s *server) startLink(prog program, kind wire.Link, generation uint64, id *sandbox.Identity) (*link, error) {
	log := s.log.With(logging.Role, string(prog.role), logging.Generation, generation)
	s.keepState()
	child, err := supervise.Start(supervise.Spec{
		Role: string(prog.role), Program: int(prog.fd), Identity: id,
		Args: []string{"--log-level=" + s.s.LogLevel},
	}, s.log)
	if err != nil {
		return nil, fmt.Errorf("start %s: %w", prog.role, err)
	}
	l := &link{
		role: prog.role, generation: generation, child: child,
		conn: wire.NewConn(child.Channel, kind, wire.Master), log: log,
		startedAt: time.Now(), pongs: make(chan uint64, 4), ended: make(chan struct{}),
		outWake: make(chan struct{}, 1), pauser: newPauser(), version: s.version,
		settings: s.settingsOf(prog.role),
	}
	l.calls = wire.NewCalls(l.conn)
	l.setState("starting")
	if err := l.greet(s.version); err != nil {
		l.end(err)
		return nil, fmt.Errorf("start %s: %w", prog.role, err)
	}
	s.keepChild(l)
	go l.deliver()
	return l, nil
}

// greet exchanges Hello within ReadyTimeout.
func (l *link) greet(version string) error {
	late := time.AfterFunc(ReadyTimeout, func() { l.end(fmt.Errorf("no greeting within %s", ReadyTimeout)) })
	defer late.Stop()
	if err := l.conn.Send(0, &wire.Hello{Protocol: wire.ProtocolVersion, Version: version, Generation: l.generation, PID: os.Getpid()}); err != nil {
		return err
	}
	m, err := l.conn.Receive()
	if err != nil {
		select {
		case <-l.ended:
			return l.why
		default:
			return err
		}
	}
	h, ok := m.Body.(*wire.Hello)
	if !ok {
		m.Discard()
		return fmt.Errorf("it greets with %T", m.Body)
	}
	if h.Protocol != wire.ProtocolVersion {
		return fmt.Errorf("it speaks protocol %d, we speak %d: install programs of one version", h.Protocol, wire.ProtocolVersion)
	}
	return nil
}

// MaxQueued bounds how many messages wait for a child; one that lets more pile up
// is stuck, and replaced.
const MaxQueued = 1 << 16

// post sends a message in its turn, without waiting. It reports whether the link
// still lives.
func (l *link) post(body any) bool {
	l.outMu.Lock()
	l.out = append(l.out, body)
	n := len(l.out)
	l.outMu.Unlock()
	if n > MaxQueued {
		l.log.Error("child takes no messages: replaced", "waiting", n)
		l.kill(errors.New("it takes no messages"))
	}
	select {
	case l.outWake <- struct{}{}:
	default:
	}
	select {
	case <-l.ended:
		return false
	default:
		return true
	}
}

// deliver sends what was posted, until the link ends.
func (l *link) deliver() {
	for {
		select {
		case <-l.outWake:
		case <-l.ended:
			return
		}
		l.outMu.Lock()
		batch := l.out
		l.out, l.sending = nil, true
		l.outMu.Unlock()
		for _, body := range batch {
			if err := l.conn.Send(0, body); err != nil {
				l.kill(err)
				return
			}
		}
		l.outMu.Lock()
		l.sending = false
		l.outMu.Unlock()
	}
}

func (l *link) setState(s string) { l.state.Store(&s) }

// end gives the child up: its channel is closed, it is killed if it does not go.
// Only the first reason counts.
func (l *link) end(why error) {
	l.endOnce.Do(func() {
		l.why = why
		l.ready.Store(false)
		l.setState("ended")
		close(l.ended)
		l.calls.End()
		_ = l.conn.Close()
		l.kept.Drop(l.names...) // or the child would not see the end of its channel
		go func() {
			select {
			case <-l.child.Done():
			case <-time.After(ChildLeave):
				l.log.Warn("child does not leave: killed")
				_ = l.child.Kill()
			}
			_ = l.child.Close()
		}()
	})
}

// kill ends the child at once.
func (l *link) kill(why error) {
	_ = l.child.Kill()
	l.end(why)
}

// LastWord is how long a child whose channel ended may take to say why, and
// leave, before it is killed.
const LastWord = 200 * time.Millisecond

// lastWord waits for a child to leave by itself, not for long.
func (l *link) lastWord() {
	select {
	case <-l.child.Done():
	case <-time.After(LastWord):
		_ = l.child.Kill()
	}
}

// ChildLeave is how long a child whose channel was closed may take to leave: the
// agent has to stop its instances first.
const ChildLeave = 12 * time.Second

// receive hands every message to take until the channel ends. Answers, pongs and
// Ready are dealt with here.
func (l *link) receive(onReady func(), take func(m wire.Message)) {
	for {
		m, err := l.conn.Receive()
		if err != nil {
			if errors.Is(err, ipc.ErrProtocol) {
				l.log.Error("child broke the rules: replaced", logging.Err, err)
				l.kill(err)
				return
			}
			if l.held(err, l.ended) {
				continue
			}
			l.end(err)
			return
		}
		switch m.Body.(type) {
		case *wire.Ready:
			l.ready.Store(true)
			l.setState("ready")
			onReady()
		case *wire.Pong:
			select {
			case l.pongs <- m.ID:
			default:
			}
		case *wire.Fault, *wire.TreeMade, *wire.Unpacked, *wire.Ran:
			l.calls.Answer(m)
		default:
			take(m)
		}
	}
}

// flush waits until everything that was posted has been sent, and reports whether
// it was.
func (l *link) flush(limit time.Duration) bool {
	for end := time.Now().Add(limit); time.Now().Before(end); time.Sleep(time.Millisecond) {
		l.outMu.Lock()
		idle := len(l.out) == 0 && !l.sending
		l.outMu.Unlock()
		if idle {
			return true
		}
		select {
		case <-l.ended:
			return false
		default:
		}
	}
	return false
}

// beat keeps the heartbeat until the link ends.
func (l *link) beat(ctx context.Context) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	go func() {
		select {
		case <-l.ended:
			cancel()
		case <-ctx.Done():
		}
	}()
	supervise.Heartbeat(ctx, supervise.HeartbeatInterval, supervise.HeartbeatMissed,
		func(id uint64) error { return l.conn.Send(id, &wire.Ping{}) }, l.pongs,
		func() {
			l.log.Error("child does not answer its heartbeat: replaced")
			l.kill(errors.New("no heartbeat"))
		})
}

// ServedPause is the longest pause before the next child if the last one served,
// in a loop of crashes: meanwhile connections wait in the listening sockets for a
// proxy, and requests to instances on TCP for an agent.
const ServedPause = 500 * time.Millisecond

// keep runs a child for ever: start it, serve it, and after its end start the
// next, with the pauses of the policy. newest is the newest generation; goesOn
// says that it lives, and run goes on with it. run returns once the child has
// ended, with the time it was ready, zero for never.
func (s *server) keep(ctx context.Context, role wire.Role, newest *atomic.Uint64, goesOn bool, run func(ctx context.Context, generation uint64) (ready time.Time, err error)) {
	var policy supervise.Policy
	for ; ctx.Err() == nil; goesOn = false {
		generation := newest.Load()
		if !goesOn {
			generation = newest.Add(1)
		}
		ready, err := run(ctx, generation)
		if ctx.Err() != nil {
			return
		}
		if errors.Is(err, errReleased) {
			continue
		}
		how, served := supervise.NeverReady, time.Duration(0)
		if !ready.IsZero() {
			how, served = supervise.Crashed, time.Since(ready)
		}
		pause := policy.Next(how, served)
		if how == supervise.Crashed {
			pause = min(pause, ServedPause)
		}
		s.log.Error("child ended; starting it again", logging.Role, string(role), logging.Generation, generation, "in", pause.String(), logging.Err, err)
		select {
		case <-time.After(pause):
		case <-ctx.Done():
		}
	}
}
