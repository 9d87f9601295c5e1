package proxy

import (
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"os"
	"reflect"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/go-hclog"

	"tako/internal/ipc"
	"tako/internal/proxy/eventloop"
	"tako/internal/proxy/message"
	"tako/internal/route"
	"tako/internal/tako"
	"tako/internal/wire"
)

// The limits of the process as a whole.
const (
	// TrafficEvery is how often the master is told of traffic.
	TrafficEvery = time.Second
	// QuickRequests is what requests in flight get when the master has gone, or the
	// process is asked to leave by a signal. Streams get nothing.
	QuickRequests = 5 * time.Second
	// IdleGrace is how long connections that wait for their next request are left
	// open by a drain, so that a request already under way to us is answered.
	IdleGrace = 2 * time.Second
	// unwindTime bounds the wait for requests and streams that were cut to end.
	unwindTime = CloseTime + 500*time.Millisecond
	drainPoll  = 10 * time.Millisecond
)

// ErrMaster means that the master has gone, or broke the rules.
var ErrMaster = errors.New("the master has gone or broke the rules")

// Config is what Run needs.
type Config struct {
	// Channel is the end of the channel to the master; Run owns it.
	Channel *ipc.Channel
	// Version is of the build, for the greeting.
	Version string
	// Limits are those of connections with clients; DefaultLimits if they are zero.
	Limits message.Limits
	// Loops is the number of event loops; 0 is one for each processor.
	Loops int
	// Busy, if set, is told true before the event loops begin to hold their places with
	// the scheduler, since they turn more than eventloop.BusyTurns times a second, and
	// false when they do so no more, less than half as often.
	Busy func(bool)
}

// state is what a request sees. It never changes.
type state struct {
	routes     *route.Table[*app]
	httpsPort  uint16
	trusted    []netip.Prefix
	announced  bool // by the PROXY protocol, who clients are
	challenges map[string]string
}

func (st *state) isTrusted(a netip.Addr) bool {
	for _, p := range st.trusted {
		if p.Contains(a) {
			return true
		}
	}
	return false
}

// process is a running proxy. Its fields are of the receiving goroutine, but for
// those that say otherwise in their own types.
type process struct {
	cfg     Config
	log     hclog.Logger
	conn    *wire.Conn
	out     *outbox
	signer  *link
	dialer  *link
	certs   *certs
	tls     *tls.Config
	flights *flights
	handler *handler
	door    *doorman
	state   atomic.Pointer[state]

	serving sync.WaitGroup // the accepting goroutines
	beside  sync.WaitGroup // the others beside the receiver

	mu        sync.Mutex
	apps      map[tako.AppID]*app // guarded by mu
	listening []*listener         // guarded by mu
	front     front               // guarded by mu; fixed once it serves or leaves
	leaving   bool                // guarded by mu: nothing is to be accepted any more

	settled bool // settings came
	served  bool // guarded by mu: Serve came

	// When requests and streams are cut, in Unix nanoseconds, while leaving.
	requestsBy, streamsBy atomic.Int64
	finished              atomic.Bool      // Drained is in the outbox
	retell                atomic.Bool      // all traffic is news to the master
	drained               chan struct{}    // closed at the end of leaving
	loops                 *eventloop.Group // nil without
}

// listener is what clients connect to.
type listener struct {
	net.Listener
	secure bool
	on     *eventloop.Listener // instead, where loops accept
}

// useLoops has loops accept, if they can.
func (l *listener) useLoops(g *eventloop.Group) error {
	on, err := g.Listen(l.Listener)
	if err == nil {
		l.on = on
	}
	return err
}

// Close ends our copy alone.
func (l *listener) Close() error {
	if l.on != nil {
		return l.on.Close()
	}
	return l.Listener.Close()
}

// Run serves until the master asks it to leave, and then returns nil; until ctx
// ends, with nil too; or until the master has gone or breaks the rules, with an
// error that wraps ErrMaster. In the last two cases requests in flight get
// QuickRequests to finish. A master that dies while somebody keeps its end of the
// channel is waited for: the next one asks for what is known here (wire.Resume).
// It returns after every goroutine it started.
func Run(ctx context.Context, cfg Config, log hclog.Logger) error {
	if cfg.Limits == (message.Limits{}) {
		cfg.Limits = message.DefaultLimits()
	}
	p := newProcess(cfg, log)
	background, stop := context.WithCancel(context.Background())
	received, sent := make(chan error, 1), make(chan error, 1)
	go func() { received <- p.receive() }()
	go func() { sent <- p.out.run() }()
	p.beside.Go(func() { p.report(background) })

	var err error
	select {
	case <-ctx.Done():
	case <-p.drained:
	case err = <-received:
		received <- nil
	case err = <-sent:
		sent <- nil
		if err != nil {
			err = fmt.Errorf("%w: %w", ErrMaster, err)
		}
	}
	if p.finished.Load() {
		err = nil // whatever came after the last word is no matter
		<-p.drained
	} else {
		_ = p.conn.Close() // the master sees at once that no more will come
		p.drain(QuickRequests, 0, false)
		<-p.drained
	}
	stop()
	p.beside.Wait()
	p.out.close()
	sending := <-sent
	_ = p.conn.Close()
	p.log.Debug("the channel to the master has ended", "sending", sending, "receiving", <-received)
	p.signer.close()
	p.dialer.close()
	for _, a := range p.apps {
		a.close()
	}
	if p.loops != nil {
		if err := p.loops.Close(unwindTime); err != nil {
			log.Debug("close the event loops", "error", err)
		}
	}
	return err
}

func newProcess(cfg Config, log hclog.Logger) *process {
	p := &process{
		cfg: cfg, log: log, conn: wire.NewConn(cfg.Channel, wire.LinkProxy, wire.Proxy),
		signer: &link{kind: wire.LinkSigning, log: log}, dialer: &link{kind: wire.LinkDialing, log: log},
		flights: newFlights(maxConnections(openFiles())), apps: make(map[tako.AppID]*app), drained: make(chan struct{}),
	}
	var err error
	if p.loops, err = eventloop.NewGroup(cmp.Or(cfg.Loops, runtime.GOMAXPROCS(0))); err != nil {
		log.Warn("no event loops; every connection has a goroutine", "error", err)
		p.loops = nil
	}
	p.signer.loops, p.dialer.loops = p.loops, p.loops
	p.conn.Patient()
	p.out = newOutbox(func(body any) error { return p.conn.Send(0, body) })
	p.certs = newCerts(p.signer)
	p.tls = p.certs.tlsConfig()
	p.state.Store(&state{httpsPort: 443})
	p.handler = &handler{state: &p.state, flights: p.flights, log: log}
	p.door = newDoorman(p.flights.most, p.isTrusted, log)
	p.door.announces = func() bool { return p.state.Load().announced }
	p.front = newOwn(p.handler, p.tls, p.door, p.cfg.Limits, log)
	return p
}

// isTrusted: the address is of a proxy whose word is believed.
func (p *process) isTrusted(a netip.Addr) bool { return p.state.Load().isTrusted(a) }

// receive handles messages until the channel ends or one is wrong. Nothing in it
// waits for a request or a client.
func (p *process) receive() error {
	for {
		m, err := p.conn.Receive()
		if err != nil {
			return fmt.Errorf("%w: %w", ErrMaster, err)
		}
		err = p.handle(&m)
		m.Discard()
		if err != nil {
			return fmt.Errorf("%w: %w: %w", ErrMaster, ipc.ErrProtocol, err)
		}
	}
}

// handle does what one message asks. Descriptors that it takes it removes from m.
func (p *process) handle(m *wire.Message) error {
	switch b := m.Body.(type) {
	case *wire.Ping:
		return p.conn.Reply(m.ID, &wire.Pong{})
	case *wire.Hello:
		if b.Protocol != wire.ProtocolVersion {
			return fmt.Errorf("the master speaks version %d, this is version %d; install programs of one release", b.Protocol, wire.ProtocolVersion)
		}
		return p.conn.Send(0, &wire.Hello{Protocol: wire.ProtocolVersion, Version: p.cfg.Version, Generation: b.Generation, PID: os.Getpid()})
	case *wire.Listeners:
		return p.listeners(b, m)
	case *wire.Signer:
		return p.signer.open(take(m))
	case *wire.Dialer:
		return p.dialer.open(take(m))
	case *wire.Profiling:
		l, err := listenerOf("profiles", take(m))
		if err == nil {
			p.beside.Go(func() { serveProfiles(l, p.drained, p.log) })
		}
		return err
	case *wire.ProxySettings:
		return p.settings(b)
	case *wire.TicketKeys:
		keys, err := ticketKeys(b)
		if err == nil {
			p.tls.SetSessionTicketKeys(keys)
		}
		return err
	case *wire.Certificate:
		return p.certs.set(b)
	case *wire.CertificateGone:
		p.certs.remove(b.ID)
		return nil
	case *wire.Challenge:
		st := *p.state.Load()
		st.challenges = maps.Clone(st.challenges)
		if st.challenges == nil {
			st.challenges = make(map[string]string)
		}
		if st.challenges[b.Token] = b.KeyAuth; b.KeyAuth == "" {
			delete(st.challenges, b.Token)
		}
		p.state.Store(&st)
		return nil
	case *wire.App:
		return p.change(b, false)
	case *wire.AppGone:
		return p.change(&wire.App{App: b.App, Revision: b.Revision}, true)
	case *wire.Serve:
		return p.serve()
	case *wire.Resume:
		return p.resume(m)
	case *wire.Drain:
		if b.RequestsMS < 0 || b.StreamsMS < 0 {
			return fmt.Errorf("drain within %d ms and %d ms", b.RequestsMS, b.StreamsMS)
		}
		p.drain(time.Duration(b.RequestsMS)*time.Millisecond, time.Duration(b.StreamsMS)*time.Millisecond, true)
		return nil
	}
	return fmt.Errorf("message %T is not understood", m.Body)
}

// take takes the one descriptor of a message.
func take(m *wire.Message) ipc.FD {
	fd := m.Files[0]
	m.Files = nil
	return fd
}

func (p *process) listeners(b *wire.Listeners, m *wire.Message) error {
	files := m.Files
	m.Files = nil
	var firstErr error
	for i, name := range b.Names {
		if name != wire.ListenerHTTP && name != wire.ListenerHTTPS || firstErr != nil {
			files[i].Close()
			if firstErr == nil {
				firstErr = fmt.Errorf("unknown listener %q", name)
			}
			continue
		}
		l, err := listenerOf(name, files[i])
		if err != nil {
			firstErr = err
			continue
		}
		p.mu.Lock()
		p.listening = append(p.listening, &listener{Listener: l, secure: name == wire.ListenerHTTPS})
		p.mu.Unlock()
	}
	return firstErr
}

func (p *process) settings(b *wire.ProxySettings) error {
	if b.HTTPSPort == 0 {
		return errors.New("settings without an HTTPS port")
	}
	st := *p.state.Load()
	st.httpsPort, st.trusted, st.announced = b.HTTPSPort, nil, b.ProxyProtocol
	for _, s := range b.TrustedProxies {
		prefix, err := netip.ParsePrefix(s)
		if err != nil {
			return fmt.Errorf("trusted proxies: %w", err)
		}
		st.trusted = append(st.trusted, prefix.Masked())
	}
	switch b.Engine {
	case "", wire.EngineTako, wire.EngineNetHTTP:
	default:
		return fmt.Errorf("unknown HTTP engine %q", b.Engine)
	}
	p.settled = true
	p.state.Store(&st)
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.served && !p.leaving && b.Engine == wire.EngineNetHTTP {
		p.front = newNetHTTP(p.handler, p.tls, p.door, p.cfg.Limits, p.log)
	}
	return nil
}

// change brings in a revision of an app and says so.
func (p *process) change(m *wire.App, gone bool) error {
	if err := check(m); err != nil {
		return err
	}
	patterns := make([]route.Pattern, 0, len(m.Routes))
	for _, s := range m.Routes {
		pattern, err := route.Parse(s)
		if err != nil {
			return fmt.Errorf("app %s: %w", m.App, err)
		}
		patterns = append(patterns, pattern)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	a := p.apps[m.App]
	if a == nil {
		a = newApp(m.App, p.out)
		a.conf.Store(&appConf{gone: true})
		p.apps[m.App] = a
	}
	if before := a.conf.Load().Revision; m.Revision <= before {
		return fmt.Errorf("app %s: revision %d after %d", m.App, m.Revision, before)
	}
	entries := make([]route.Entry[*app], len(patterns))
	for i, pattern := range patterns {
		entries[i] = route.Entry[*app]{Pattern: pattern, Value: a}
	}
	st := *p.state.Load()
	routes, err := st.routes.With(func(other *app) bool { return other == a }, entries)
	if err != nil {
		return fmt.Errorf("app %s: %w", m.App, err)
	}
	st.routes = routes
	draining := a.change(m, gone, p.dialer.dial)
	p.state.Store(&st)
	p.out.push(&wire.Applied{App: m.App, Revision: m.Revision})
	a.applied(draining, m.Revision)
	if cut := a.toCut(); cut != nil {
		p.flights.cutOf(cut)
	}
	return nil
}

// serve ends the configuration.
func (p *process) serve() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.listening) == 0 || !p.settled {
		return errors.New("asked to serve without listeners or settings")
	}
	for _, l := range p.listening {
		if l.secure && p.signer.conn == nil {
			return errors.New("asked to serve HTTPS without a signer")
		}
	}
	if !p.leaving {
		p.served = true
		front := p.front
		for _, l := range p.listening {
			if _, ours := front.(*own); ours && p.loops != nil {
				if err := l.useLoops(p.loops); err != nil {
					p.log.Warn("connections are not accepted on event loops", "error", err)
				}
			}
			p.serving.Go(func() { front.Serve(l) })
		}
	}
	if err := p.conn.Send(0, &wire.Ready{}); err != nil {
		return err
	}
	p.out.open()
	return nil
}

// drain begins to leave; when leaving already, it may only make it quicker.
// Report says whether to send Drained at the end.
func (p *process) drain(requests, streams time.Duration, report bool) {
	now := time.Now()
	sooner(&p.requestsBy, now.Add(requests))
	sooner(&p.streamsBy, now.Add(streams))
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.leaving {
		return
	}
	p.leaving = true
	listening, front := p.listening, p.front
	p.beside.Go(func() {
		cut := p.leave(listening, front)
		if report {
			p.finished.Store(true)
			if last := p.allTraffic(); len(last) > 0 { // what came since the last report
				p.out.push(&wire.Traffic{Apps: last})
			}
			p.out.push(&wire.Drained{Cut: cut})
			p.out.close() // nothing may follow
		}
		p.log.Info("drained", "cut", cut)
		close(p.drained)
	})
}

// sooner sets at to t, if that is sooner or at was not set.
func sooner(at *atomic.Int64, t time.Time) {
	for {
		before := at.Load()
		if before != 0 && before <= t.UnixNano() || at.CompareAndSwap(before, t.UnixNano()) {
			return
		}
	}
}

// leave stops accepting, waits for what is under way, cuts what takes too long,
// and returns how much that was. The order is what loses nothing: a connection
// that was accepted is in the front's counts before they are looked at, and one
// that was not is in the queue of a socket that others share.
func (p *process) leave(listening []*listener, front front) (cut int) {
	front.Drain() // answers say that the connection closes
	for _, l := range listening {
		_ = l.Close()
	}
	p.serving.Wait()

	began := time.Now()
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	var shut chan struct{}
	tick := time.NewTicker(drainPoll)
	defer tick.Stop()
	for requestsOver, streamsOver := false, false; ; <-tick.C {
		now := time.Now()
		if !requestsOver && now.UnixNano() >= p.requestsBy.Load() {
			requestsOver = true
			cut += p.flights.cut(false)
		}
		if !streamsOver && now.UnixNano() >= p.streamsBy.Load() {
			streamsOver = true
			cut += p.flights.cut(true)
		}
		busy, idle := front.Count()
		requests, streams := p.flights.count()
		if shut == nil && (requestsOver || requests == 0 && busy == 0 && (idle == 0 || now.Sub(began) >= IdleGrace)) {
			shut = make(chan struct{})
			go func() {
				front.Shutdown(ctx)
				close(shut)
			}()
		}
		if requestsOver && streamsOver || shut != nil && requests+streams == 0 && isClosed(shut) {
			break
		}
	}
	// Streams are ended properly, if their clients take it.
	unwound := time.NewTimer(unwindTime)
	defer unwound.Stop()
	for _, done := range []<-chan struct{}{p.flights.gone(), shut} { // shut by now: requests are over
		select {
		case <-done:
		case <-unwound.C:
			unwound.Reset(0)
		}
	}
	front.Close()
	cancel()
	<-shut
	unwound.Reset(unwindTime)
	select {
	case <-p.flights.gone():
	case <-unwound.C:
		p.log.Warn("requests that were cut have not ended in time")
	}
	return cut
}

func isClosed(c chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}

// allTraffic is the traffic of every app up to now.
func (p *process) allTraffic() []wire.AppTraffic {
	p.mu.Lock()
	defer p.mu.Unlock()
	all := make([]wire.AppTraffic, 0, len(p.apps))
	for _, a := range p.apps {
		all = append(all, a.traffic(time.Now()))
	}
	return all
}

// busyness is whether the event loops are busy: from when they say so on, until they
// turn less than half as often.
type busyness struct {
	loops  *eventloop.Group
	tell   func(bool) // Config.Busy
	busy   bool
	turns  int64 // of the loops, at the last look
	recent bool  // it is busy since the last look
}

// rushes is at a rush of the loops.
func (b *busyness) rushes() {
	if !b.busy {
		b.busy, b.recent = true, true
		b.tell(true)
		b.loops.Hold(true)
	}
}

// look is each TrafficEvery.
func (b *busyness) look() {
	const least = eventloop.BusyTurns * int64(TrafficEvery) / int64(time.Second) / 2
	turns := b.loops.Turns()
	if b.busy && !b.recent && turns-b.turns < least {
		b.busy = false
		b.loops.Hold(false)
		b.tell(false)
	}
	b.turns, b.recent = turns, false
}

// report tells the master of traffic, and has every pool close what is idle for
// too long, until ctx ends.
func (p *process) report(ctx context.Context) {
	type seen struct {
		traffic wire.AppTraffic
		ended   int64
	}
	last := make(map[tako.AppID]seen)
	busy := busyness{loops: p.loops, tell: p.cfg.Busy}
	var rush <-chan struct{}
	if p.cfg.Busy != nil {
		rush = p.loops.Rush()
	}
	tick := time.NewTicker(TrafficEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-rush:
			busy.rushes()
			continue
		case <-tick.C:
		}
		busy.look()
		if p.retell.Swap(false) {
			clear(last)
		}
		var news []wire.AppTraffic
		p.mu.Lock()
		for _, l := range p.listening {
			if l.on != nil {
				l.on.Look()
			}
		}
		for id, a := range p.apps {
			t := a.traffic(time.Now())
			now := seen{traffic: t, ended: a.ended.Load()}
			now.traffic.IdleMS = 0
			if before, ok := last[id]; !ok || before.ended != now.ended || !reflect.DeepEqual(before.traffic, now.traffic) {
				last[id] = now
				news = append(news, t)
			}
			if a.over() {
				delete(p.apps, id)
				delete(last, id)
			}
		}
		p.mu.Unlock()
		if len(news) > 0 {
			p.out.push(&wire.Traffic{Apps: news})
		}
	}
}
