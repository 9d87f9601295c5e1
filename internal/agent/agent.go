// Package agent is tako-agent: it makes the folders of apps, unpacks releases,
// runs their steps, starts their instances, probes them, connects to those on
// TCP, and stops them, all as the master says and as far as its table of
// messages goes. It decides nothing: each outcome is reported, and what follows
// is the master's to say.
//
// It promises that one app delays no other, that an instance's end is reported
// once and last, and that nothing it started outlives it unless it is killed
// itself: when the channel closes, all instances are stopped.
//
// One goroutine owns the instances. What takes time runs in others, bounded in
// number, and comes back to it as an event.
package agent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"time"

	"github.com/hashicorp/go-hclog"

	"tako/internal/agent/launch"
	"tako/internal/ipc"
	"tako/internal/supervise"
	"tako/internal/tako"
	"tako/internal/wire"
)

// The limits of an agent.
const (
	MaxInstances = 2000 // at once; a further Start fails
	MaxCalls     = 64   // Tree, Unpack and Run at once; a further one is answered busy
	MaxDialers   = 16   // dialling sockets at once, one per proxy generation
	MaxDials     = 256  // dials at once on each of them

	// HelloTimeout bounds the set-up of the channel.
	HelloTimeout = 10 * time.Second
	// LeaveTimeout bounds the end: LeaveGrace after SIGTERM comes SIGKILL.
	LeaveTimeout = 8 * time.Second
	LeaveGrace   = 5 * time.Second
	// ProxiesLeave bounds how long instances outlast a master that went away, for
	// what the proxies still serve: those give it 5 s.
	ProxiesLeave = 6 * time.Second

	maxCommand = 4096 // words of a command, and variables of its environment
)

// Config is what tako-agent begins with. Everything else comes over the channel.
type Config struct {
	// Channel is the agent's end; Run owns it.
	Channel *ipc.Channel
	// Version is of the build, for the greeting.
	Version string
}

// Run serves the channel until it ends or ctx does, stops every instance, and
// returns after every goroutine it started. The error is nil if ctx ended, and
// wraps io.EOF if the master went away and ipc.ErrProtocol if it broke the rules.
// A process can run one agent at a time.
//
// A master that dies while somebody keeps its end of the channel is waited for:
// the next one asks for everything that is known here (wire.Resume).
//
// Asked to by Release it returns ErrReleased with its instances running and its
// goroutines too: the caller exits at once.
func Run(ctx context.Context, cfg Config, log hclog.Logger) error {
	a := &agent{
		conn:      wire.NewConn(cfg.Channel, wire.LinkAgent, wire.Agent),
		log:       log,
		instances: make(map[tako.InstanceID]*instance),
		held:      make(map[tako.InstanceID]*wire.Message),
		logs:      make(map[string]*sharedLog),
		events:    make(chan any), // without a buffer: what is taken is acted on
		calls:     make(chan struct{}, MaxCalls),
		dialers:   make(chan struct{}, MaxDialers),
	}
	defer a.conn.Close() // the master has gone or will see it
	a.conn.Patient()
	defer context.AfterFunc(ctx, func() { _ = a.conn.Close() })() // whoever waits for the master waits no more
	if err := supervise.Subreaper(); err != nil {
		return err
	}
	if err := a.greet(ctx, cfg.Version); err != nil {
		if ctx.Err() != nil {
			return nil
		}
		return err
	}

	var all sync.WaitGroup
	var work context.Context
	work, a.leave = context.WithCancel(context.WithoutCancel(ctx))
	a.work, a.all = work, &all
	a.steps, a.endSteps = context.WithCancel(work)
	all.Go(func() { supervise.Reap(work) })
	received := make(chan wire.Message)
	var lost error // of the receiver; read after received is closed
	all.Go(func() {
		defer close(received)
		for {
			m, err := a.conn.Receive()
			if err != nil {
				lost = err
				return
			}
			select {
			case received <- m:
			case <-work.Done():
				m.Discard()
				return
			}
		}
	})

	err := a.serve(ctx, received, &lost)
	if errors.Is(err, ErrReleased) {
		return err // the process ends now, and nothing else does
	}
	if ctx.Err() != nil {
		err = nil // whatever failed, it failed for that
	}
	if errors.Is(err, ipc.ErrProtocol) { // the master lives: what is held is still another agent's
		for _, m := range a.held {
			m.Discard()
		}
	} else {
		err = errors.Join(err, a.begin()) // what was held is to be stopped too
	}
	a.leave() // every instance is asked to stop, every call given up
	_ = a.conn.Close()
	for m := range received {
		m.Discard()
	}
	left := make(chan struct{})
	go func() { all.Wait(); close(left) }()
	select {
	case <-left:
	case <-time.After(LeaveTimeout): // killed, yet in the kernel's hands
		return errors.Join(err, fmt.Errorf("instances did not end within %s", LeaveTimeout))
	}
	for _, l := range a.logs {
		l.Close()
	}
	return err
}

// ErrReleased is returned by Run when the next agent is to take the instances.
var ErrReleased = errors.New("released by tako-master")

// agent is the state of Run. Only the goroutine of Run touches it, except for
// the parts that say otherwise.
type agent struct {
	conn     *wire.Conn // any goroutine sends
	log      hclog.Logger
	settings wire.AgentSettings // written once, before the others start
	groups   *launch.Groups     // of the settings

	instances map[tako.InstanceID]*instance
	held      map[tako.InstanceID]*wire.Message // each an Adopt, until Begin
	logs      map[string]*sharedLog             // by folder
	dialable  dialable                          // any goroutine reads
	trees     sync.Mutex                        // held over one Tree: two would open the same folders
	unpacks   unpacks                           // any goroutine uses

	events  chan any // see send
	calls   chan struct{}
	dialers chan struct{}
	work    context.Context // ends when Run does
	leave   context.CancelFunc

	// The steps of deploys end with the master that asked for them.
	steps    context.Context
	endSteps context.CancelFunc
	resuming *wire.Message // a Resume that waits for the last step to end

	releasing bool // we leave once nothing is being started
	all       *sync.WaitGroup
}

// greet exchanges Hello and takes the settings.
func (a *agent) greet(ctx context.Context, version string) error {
	ctx, cancel := context.WithTimeoutCause(ctx, HelloTimeout, fmt.Errorf("no greeting within %s", HelloTimeout))
	defer cancel()
	defer context.AfterFunc(ctx, func() { _ = a.conn.Close() })()
	next := func() (wire.Message, error) {
		m, err := a.conn.Receive()
		if cause := context.Cause(ctx); err != nil && cause != nil {
			err = cause
		}
		return m, err
	}
	m, err := next()
	if err != nil {
		return fmt.Errorf("greet tako-master: %w", err)
	}
	hello, ok := m.Body.(*wire.Hello)
	switch {
	case !ok:
		return fmt.Errorf("%w: %T before the greeting", ipc.ErrProtocol, m.Body)
	case hello.Protocol != wire.ProtocolVersion:
		return fmt.Errorf("%w: tako-master %s speaks protocol %d, tako-agent %s speaks %d: install programs of one release", ipc.ErrProtocol, hello.Version, hello.Protocol, version, wire.ProtocolVersion)
	}
	if err := a.conn.Send(0, &wire.Hello{Protocol: wire.ProtocolVersion, Version: version, Generation: hello.Generation, PID: os.Getpid()}); err != nil {
		return fmt.Errorf("greet tako-master: %w", err)
	}
	for {
		if m, err = next(); err != nil {
			return fmt.Errorf("wait for the settings: %w", err)
		}
		switch body := m.Body.(type) {
		case *wire.Ping:
			err = a.conn.Reply(m.ID, &wire.Pong{})
		case *wire.Resume:
			err = a.conn.Resumed(&m, 0)
		case *wire.AgentSettings:
			a.settings = *body
			a.groups = launch.NewGroups(body.Groups)
			a.groups.Clear()
			if err := a.conn.Send(0, &wire.Ready{}); err != nil {
				return fmt.Errorf("say that we are ready: %w", err)
			}
			return nil
		}
		if err != nil {
			return fmt.Errorf("answer a heartbeat: %w", err)
		}
	}
}

// serve is the loop: messages of the master and events of our own, one at a time.
func (a *agent) serve(ctx context.Context, received <-chan wire.Message, lost *error) error {
	for {
		if a.releasing && !a.starting() {
			return ErrReleased
		}
		select {
		case <-ctx.Done():
			return nil
		case m, ok := <-received:
			if !ok {
				if errors.Is(*lost, io.EOF) {
					a.letFinish(ctx)
				}
				return fmt.Errorf("channel to tako-master: %w", *lost)
			}
			err := a.message(&m)
			m.Discard()
			if err != nil {
				return err
			}
		case e := <-a.events:
			if err := a.event(e); err != nil {
				return err
			}
		}
	}
}

// letFinish waits for the proxies to leave, after the master went away: they
// answer what they have accepted, and need the instances for it.
func (a *agent) letFinish(ctx context.Context) {
	late := time.After(ProxiesLeave)
	for len(a.dialers) > 0 {
		select {
		case e := <-a.events:
			_ = a.event(e) // there is nobody to be told
		case <-time.After(5 * time.Millisecond): // each has its own goroutine
		case <-late:
			return
		case <-ctx.Done():
			return
		}
	}
}

// starting reports whether an instance has not come to its Started yet.
func (a *agent) starting() bool {
	for _, i := range a.instances {
		if i.process == nil {
			return true
		}
	}
	return false
}

// message acts on one message. Descriptors that it keeps it takes out of m.
func (a *agent) message(m *wire.Message) error {
	switch body := m.Body.(type) {
	case *wire.Ping:
		return a.conn.Reply(m.ID, &wire.Pong{})
	case *wire.Start:
		return a.start(body)
	case *wire.Adopt:
		return a.adopt(m, body)
	case *wire.Begin:
		return a.begin()
	case *wire.Resume:
		a.endSteps()
		a.steps, a.endSteps = context.WithCancel(a.work)
		asked := *m
		a.resuming = &asked
		return a.resume()
	case *wire.Stop:
		a.stop(body)
		return nil
	case *wire.Release:
		a.releasing = true
		return nil
	case *wire.DialerSocket:
		return a.addDialer(m)
	case *wire.Tree, *wire.Run, *wire.Unpack:
		if m.ID == 0 {
			return fmt.Errorf("%w: %T without an id", ipc.ErrProtocol, body)
		}
		select {
		case a.calls <- struct{}{}:
			return a.call(m)
		default:
			return a.conn.ReplyError(m.ID, tako.Errorf(tako.CodeBusy, "%d steps of deploys are under way: try again in a moment", MaxCalls))
		}
	}
	return fmt.Errorf("%w: %T", ipc.ErrProtocol, m.Body)
}

// call carries out a call in a goroutine and answers it. It has a place in
// a.calls, which it gives back.
func (a *agent) call(m *wire.Message) error {
	var do func() (any, error)
	steps := a.steps
	switch body := m.Body.(type) {
	case *wire.Tree:
		if err := a.checkTree(body); err != nil {
			return err
		}
		do = func() (any, error) { return &wire.TreeMade{}, a.makeTree(body) }
	case *wire.Unpack:
		if err := a.checkUnpack(body); err != nil {
			return err
		}
		archive := m.Files[0]
		m.Files = nil
		do = func() (any, error) {
			defer archive.Close()
			return a.unpack(steps, body, archive)
		}
	case *wire.Run:
		if err := a.checkRun(body); err != nil {
			return err
		}
		log := a.takeLog(body.LogDir, body.LogBytes, body.LogFiles, body.Command.User.GID)
		do = func() (any, error) {
			defer a.send(logGone{log})
			return a.runCommand(steps, body, log.Log)
		}
	}
	id := m.ID
	a.all.Go(func() {
		body, err := do()
		<-a.calls
		if err != nil {
			err = a.conn.ReplyError(id, err)
		} else {
			err = a.conn.Reply(id, body)
		}
		if err != nil {
			a.send(sendFailed{err})
		}
		a.send(stepEnded{})
	})
	return nil
}

// send hands an event to the loop. It reports whether the loop takes it: not
// once Run is leaving.
func (a *agent) send(e any) bool {
	select {
	case a.events <- e:
		return true
	case <-a.work.Done():
		return false
	}
}
