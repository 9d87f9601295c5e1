package master

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"tako/internal/cert"
	"tako/internal/ipc"
	"tako/internal/logging"
	"tako/internal/rollout"
	"tako/internal/tako"
	"tako/internal/wire"
)

// A proxyLink is one generation of tako-proxy.
type proxyLink struct {
	*link
	signer  *wire.Conn // the master's end of its signing socket
	signing pauser     // of that socket's receiver
	// draining: it was told to drain, which it may be only once.
	draining atomic.Bool
	// guarded by proxySet.mu
	traffic map[tako.AppID]wire.AppTraffic
	quiet   map[tako.InstanceID]int // draining upstreams without a request, and their streams
	applied map[tako.AppID]uint64   // the newest revision that every later request sees
	// holds is what it knew when we came, if a tako-master that died had started it.
	holds *wire.Holds
}

// proxySet is every living proxy: the serving one, and old ones that drain.
type proxySet struct {
	mu      sync.Mutex
	links   []*proxyLink
	changed chan struct{} // closed when a revision was applied or a proxy left; nil: nobody waits
}

// AppliedWait bounds how long a reply waits for the proxies to do as it says.
const AppliedWait = 2 * time.Second

func (p *proxySet) changedLocked() {
	if p.changed != nil {
		close(p.changed)
		p.changed = nil
	}
}

// awaitApplied waits until each proxy that serves has applied a revision of an
// app, so that a request after the reply finds what the reply says.
func (p *proxySet) awaitApplied(ctx context.Context, id tako.AppID, revision uint64) {
	late := time.NewTimer(AppliedWait)
	defer late.Stop()
	for {
		p.mu.Lock()
		behind := slices.ContainsFunc(p.links, func(l *proxyLink) bool { return l.ready.Load() && l.applied[id] < revision })
		if p.changed == nil {
			p.changed = make(chan struct{})
		}
		changed := p.changed
		p.mu.Unlock()
		if !behind {
			return
		}
		select {
		case <-changed:
		case <-late.C:
			return
		case <-ctx.Done():
			return
		}
	}
}

// send tells every proxy something, without waiting.
func (p *proxySet) send(body any) {
	for _, l := range p.all() {
		l.post(body)
	}
}

func (p *proxySet) all() []*proxyLink {
	p.mu.Lock()
	defer p.mu.Unlock()
	return append([]*proxyLink(nil), p.links...)
}

func (p *proxySet) add(l *proxyLink) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !slices.Contains(p.links, l) {
		p.links = append(p.links, l)
	}
}

func (p *proxySet) remove(l *proxyLink) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for i, x := range p.links {
		if x == l {
			p.links = append(p.links[:i], p.links[i+1:]...)
			p.changedLocked()
			return
		}
	}
}

// redial gives every proxy a dialling socket to the agent that serves now.
func (p *proxySet) redial(s *server) {
	for _, l := range p.all() {
		s.giveDialer(l)
	}
}

// giveDialer connects a proxy with the agent, if there is one.
func (s *server) giveDialer(l *proxyLink) {
	ours, theirs, err := pairFDs()
	if err != nil {
		s.log.Error("no dialling socket", logging.Err, err)
		return
	}
	defer ours.Close()
	defer theirs.Close()
	s.agentMu.Lock()
	agent := s.agent
	s.agentMu.Unlock()
	if agent == nil {
		return // the next agent gets one
	}
	if err := agent.conn.Send(0, &wire.DialerSocket{}, ours); err != nil {
		agent.kill(err)
		return
	}
	if err := l.conn.Send(0, &wire.Dialer{}, theirs); err != nil {
		l.kill(err)
	}
}

func newProxyLink(l *link) *proxyLink {
	return &proxyLink{link: l, signing: newPauser(), traffic: make(map[tako.AppID]wire.AppTraffic), quiet: make(map[tako.InstanceID]int), applied: make(map[tako.AppID]uint64)}
}

// runProxy runs one proxy to its end.
func (s *server) runProxy(ctx context.Context, generation uint64) (ready time.Time, err error) {
	if s.servesOn != nil {
		select {
		case <-s.servesOn:
			s.servesOn = nil
		case <-ctx.Done():
			return ready, errNoServer
		}
	}
	if l := s.adopted.takeProxy(); l != nil {
		return s.serveOn(ctx, l)
	}
	raw, err := s.startLink(s.proxyProgram, wire.LinkProxy, generation, s.proxyIdentity())
	if err != nil {
		s.waitForOld(ctx, generation, err)
		return ready, err
	}
	l := newProxyLink(raw)
	late := time.AfterFunc(ReadyTimeout, func() {
		if !l.ready.Load() {
			l.kill(errors.New("not ready in time"))
		}
	})
	defer late.Stop()
	go func() {
		if err := s.configureProxy(l); err != nil {
			l.kill(err)
		}
	}()
	go l.beat(ctx)
	go s.drainAtEnd(ctx, l)
	l.receive(func() {
		ready = time.Now()
		s.log.Info("tako-proxy is ready", "pid", l.child.PID, "generation", generation)
		s.retireBefore(l)
		s.proxyReady.Do(func() { close(s.proxyUp) })
	}, func(m wire.Message) { s.fromProxy(l, m) })
	s.proxies.remove(l)
	select {
	case <-ctx.Done():
	default:
		l.lastWord()
	}
	<-l.child.Done()
	s.proxyGone(l)
	if ready.IsZero() {
		s.waitForOld(ctx, generation, l.why)
	}
	return ready, l.why
}

// drain asks a proxy to leave. It reports whether it had not been asked before.
func (l *proxyLink) drain(requests, streams time.Duration) bool {
	if !l.draining.CompareAndSwap(false, true) {
		return false
	}
	l.setState("draining")
	l.post(&wire.Drain{RequestsMS: int(requests.Milliseconds()), StreamsMS: int(streams.Milliseconds())})
	return true
}

// drainAtEnd has the proxy leave when the server stops.
func (s *server) drainAtEnd(ctx context.Context, l *proxyLink) {
	select {
	case <-ctx.Done():
	case <-l.ended:
		return
	}
	switch {
	case !l.ready.Load() && !l.draining.Load():
		l.kill(errNoServer)
	case !l.drain(StopRequests, StopStreams):
		time.AfterFunc(StopRequests, func() { l.end(errNoServer) }) // its own limits may be longer
	}
}

// retireBefore has every proxy that is older than a ready one drain.
func (s *server) retireBefore(l *proxyLink) {
	for _, old := range s.proxies.all() {
		if old.generation < l.generation && old.drain(DrainRequests, DrainStreams) {
			old.log.Info("drains", "for", l.generation)
		}
	}
}

// waitForOld is for a new proxy that never became ready: while an older one
// serves, there is no hurry to try again. It waits for that one's end.
func (s *server) waitForOld(ctx context.Context, generation uint64, why error) {
	for _, old := range s.proxies.all() {
		if old.generation < generation && !old.draining.Load() {
			s.reloadEnded(fmt.Errorf("the new proxy did not become ready (%w): the old one serves on", why))
			s.proxyReady.Do(func() { close(s.proxyUp) })
			select {
			case <-old.ended:
			case <-ctx.Done():
			}
			return
		}
	}
}

// configureProxy brings a new proxy to the point where it serves.
func (s *server) configureProxy(l *proxyLink) error {
	names, fds := make([]string, 0, len(s.listeners)), make([]ipc.FD, 0, len(s.listeners))
	for _, x := range s.listeners {
		names, fds = append(names, x.name), append(fds, x.fd)
	}
	if err := l.conn.Send(0, &wire.Listeners{Names: names}, fds...); err != nil {
		return err
	}
	if s.s.PProf {
		if err := s.giveProfiling(l); err != nil {
			return err
		}
	}
	if err := s.tell(l); err != nil {
		return err
	}
	l.post(&wire.Serve{})
	return nil
}

// tell tells a proxy all that there is, and gives it its sockets.
func (s *server) tell(l *proxyLink) error {
	signer, theirs, err := ipc.Pair()
	if err != nil {
		return err
	}
	err = l.conn.Send(0, &wire.Signer{}, theirs)
	theirs.Close()
	if err != nil {
		return errors.Join(err, signer.Close())
	}
	l.signer = wire.NewConn(signer, wire.LinkSigning, wire.Master)
	go s.serveSigner(l)
	// From here on it is told every change, and given every new agent; what it is
	// told twice is the same.
	s.proxies.add(l)
	s.giveDialer(l)
	if err := l.conn.Send(0, &wire.ProxySettings{HTTPSPort: s.httpsPort(), TrustedProxies: s.s.trusted, ProxyProtocol: s.s.ProxyProtocol, Engine: wire.HTTPEngine(s.s.HTTPEngine)}); err != nil {
		return err
	}
	if err := l.conn.Send(0, &wire.TicketKeys{Keys: s.tickets.current()}); err != nil {
		return err
	}
	for _, c := range s.certs.All() {
		l.post(certMessage(c))
	}
	for _, a := range s.allApps() {
		a.mu.Lock()
		a.revision++ // a proxy takes each but once, and may have been told the last since add
		if msg := a.message(); msg != nil {
			l.post(msg)
		}
		a.mu.Unlock()
	}
	return nil
}

func certMessage(c cert.Certificate) *wire.Certificate {
	return &wire.Certificate{ID: c.ID, Names: c.Names, Chain: c.Chain, Fallback: c.Fallback}
}

// fromProxy takes a proxy's message.
func (s *server) fromProxy(l *proxyLink, m wire.Message) {
	defer m.Discard()
	switch b := m.Body.(type) {
	case *wire.Applied:
		s.proxies.mu.Lock()
		l.applied[b.App] = b.Revision
		s.proxies.changedLocked()
		s.proxies.mu.Unlock()
	case *wire.Wake:
		if a := s.lookup(b.App); a != nil {
			a.step(rollout.Wake{})
		}
	case *wire.Unreachable:
		if a := s.lookup(b.Instance.App); a != nil {
			a.step(rollout.Unreachable{N: b.Instance.N})
		}
	case *wire.Quiet:
		s.proxies.mu.Lock()
		l.quiet[b.Instance] = b.Streams
		s.proxies.mu.Unlock()
		s.checkQuiet(b.Instance)
	case *wire.Traffic:
		for _, t := range b.Apps {
			s.traffic(l, t)
		}
	case *wire.Drained:
		if b.Cut > 0 {
			l.log.Warn("proxy left with requests or streams unfinished", "cut", b.Cut)
		}
		l.setState("drained")
	}
}

// checkQuiet tells an app when no proxy has a request in flight to one of its
// draining instances.
func (s *server) checkQuiet(id tako.InstanceID) {
	s.proxies.mu.Lock()
	streams := 0
	for _, l := range s.proxies.links {
		n, ok := l.quiet[id]
		if !ok {
			s.proxies.mu.Unlock()
			return
		}
		streams += n
	}
	s.proxies.mu.Unlock()
	if a := s.lookup(id.App); a != nil {
		a.step(rollout.Quiet{N: id.N, Streams: streams})
	}
}

// traffic takes one app's counters from one proxy.
func (s *server) traffic(l *proxyLink, t wire.AppTraffic) {
	a := s.lookup(t.App)
	if a == nil {
		return
	}
	s.proxies.mu.Lock()
	l.traffic[t.App] = t
	var quiet []tako.InstanceID
	for _, in := range t.Instances {
		if _, ok := l.quiet[in.Instance]; ok && l.quiet[in.Instance] != in.Streams {
			l.quiet[in.Instance] = in.Streams
			quiet = append(quiet, in.Instance)
		}
	}
	fact := rollout.Traffic{IdleFor: -1}
	for _, x := range s.proxies.links {
		xt, ok := x.traffic[t.App]
		if !ok {
			continue
		}
		if xt.Waiting > 0 {
			fact.Busy = true
		}
		for _, in := range xt.Instances {
			if in.InFlight > 0 || in.Streams > 0 {
				fact.Busy = true
			}
		}
		if idle := time.Duration(xt.IdleMS) * time.Millisecond; fact.IdleFor < 0 || idle < fact.IdleFor {
			fact.IdleFor = idle
		}
	}
	s.proxies.mu.Unlock()
	fact.IdleFor = max(fact.IdleFor, 0)
	a.step(fact)
	for _, id := range quiet {
		s.checkQuiet(id)
	}
}

// proxyGone settles what a proxy left: nothing is in flight in it any more.
func (s *server) proxyGone(l *proxyLink) {
	for _, a := range s.allApps() {
		var requests map[uint32]uint64
		s.proxies.mu.Lock()
		if t, ok := l.traffic[a.id]; ok {
			requests = make(map[uint32]uint64, len(t.Instances))
			for _, in := range t.Instances {
				requests[in.Instance.N] = in.Requests
			}
		}
		s.proxies.mu.Unlock()
		a.mu.Lock()
		for n, count := range requests {
			if p := a.procs[n]; p != nil {
				p.requests += count
			}
		}
		var draining []uint32
		for _, in := range a.core.View(time.Now()).All {
			if in.Draining {
				draining = append(draining, in.N)
			}
		}
		a.mu.Unlock()
		if requests != nil {
			a.step(rollout.Traffic{}) // not busy, as far as this proxy goes
		}
		for _, n := range draining {
			s.checkQuiet(a.instance(n))
		}
	}
}

// forget drops what the proxies said of an instance that is gone.
func (p *proxySet) forget(id tako.InstanceID) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, l := range p.links {
		delete(l.quiet, id)
	}
}

// requestsOf returns what the living proxies count for an instance.
func (p *proxySet) requestsOf(id tako.InstanceID) (requests uint64, inFlight int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, l := range p.links {
		for _, in := range l.traffic[id.App].Instances {
			if in.Instance == id {
				requests += in.Requests
				inFlight += in.InFlight + in.Streams
			}
		}
	}
	return requests, inFlight
}
