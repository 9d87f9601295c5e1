package master

import (
	"context"
	"errors"
	"os"
	"syscall"
	"time"

	"tako/internal/ipc"
	"tako/internal/rollout"
	"tako/internal/supervise"
	"tako/internal/tako"
	"tako/internal/wire"
)

// errNoAgent is the error of what needs the agent while there is none.
var errNoAgent = tako.Errorf(tako.CodeBusy, "tako-agent is not running at the moment: try again shortly, or look into the server's log")

// runAgent runs one agent to its end.
func (s *server) runAgent(ctx context.Context, generation uint64) (ready time.Time, err error) {
	l, err := s.startLink(s.agentProgram, wire.LinkAgent, generation, s.agentIdentity())
	if err != nil {
		return ready, err
	}
	settings := &wire.AgentSettings{PortMin: s.s.portMin, PortMax: s.s.portMax}
	if s.privileged {
		settings.InstanceGroup = s.netGroup
		settings.MinAppUID, settings.MaxAppUID = s.s.uidMin, s.s.uidMax
		settings.Owner, settings.OwnerGroup = uint32(os.Geteuid()), uint32(os.Getegid()) // ids are 32 bits
	}
	if err := l.conn.Send(0, settings); err != nil {
		l.end(err)
	}
	late := time.AfterFunc(ReadyTimeout, func() {
		if !l.ready.Load() {
			l.kill(errors.New("not ready in time"))
		}
	})
	defer late.Stop()
	go l.beat(ctx)
	go func() {
		select {
		case <-ctx.Done():
			l.end(errNoServer) // at the end of its channel it stops its instances and leaves
		case <-l.ended:
		}
	}()
	l.receive(func() {
		ready = time.Now()
		s.log.Info("tako-agent is ready", "pid", l.child.PID, "generation", generation)
		s.agentMu.Lock()
		s.agent = l
		close(s.agentCame)
		s.agentCame = make(chan struct{})
		s.agentMu.Unlock()
		s.proxies.redial(s)
		s.agentReady.Do(func() { close(s.agentUp) })
	}, s.fromAgent)
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
	}
	return ready, l.why
}

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

// orphaned ends the instances that an agent left behind when it died: nobody
// probes them or reads what they say. Their apps start them again.
func (s *server) orphaned() {
	for _, a := range s.allApps() {
		a.mu.Lock()
		var lost []uint32
		for n, p := range a.procs {
			// The leader is not waited for by anybody while its pidfd says it runs,
			// so its number is still its group's.
			if p.pid > 1 && len(p.held) > 0 && supervise.Signal(int(p.held[0]), 0) == nil {
				_ = supervise.SignalGroup(p.pid, syscall.SIGKILL)
			}
			lost = append(lost, n)
		}
		a.mu.Unlock()
		for _, n := range lost {
			a.ended(n, rollout.Exited{N: n, Reason: "tako-agent died"})
		}
	}
}
