package h1

import (
	"context"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/go-hclog"

	"tako/internal/proxy/eventloop"
	"tako/internal/proxy/message"
)

const (
	// GoneTime is the age of an exchange from which it is looked at whether its
	// client is still there.
	GoneTime = time.Second
	// shutdownTime is how often Shutdown looks for connections that have come to wait.
	shutdownTime = 10 * time.Millisecond
	// sweepTime is how often all connections are looked at, at most.
	sweepTime = time.Second
)

// A Server answers the requests of connections that others have accepted. Its
// exported fields are set before the first Serve and not changed after.
//
// Limits are kept by a sweep over all connections, a second apart or a quarter of
// the shortest limit, and are passed by up to two sweeps, never cut short.
type Server struct {
	Handler  message.Handler
	Limits   message.Limits
	Log      hclog.Logger
	goneTime time.Duration // of tests; 0 is GoneTime

	draining atomic.Bool
	// clock counts nanoseconds, as far as the sweeps have seen them pass; 0 is no
	// time. A stop of the whole process is not counted: it is nobody's fault.
	clock atomic.Int64
	date  atomic.Pointer[[]byte] // the Date field of answers that have none

	mu     sync.Mutex
	conns  map[*conn]struct{} // guarded by mu
	closed bool               // guarded by mu
	stop   chan struct{}      // guarded by mu: ends the sweeps; nil while there are none
	none   chan struct{}      // guarded by mu: closed when conns is empty, if somebody waits
}

// Serve answers the requests of c until it ends, and closes it. C is a TCP or
// Unix connection, or TLS over one, after its handshake. Client is what all its
// exchanges say of the other end.
func (s *Server) Serve(c net.Conn, client *message.Client) {
	conn := newConn(s, c, client, nil)
	if !s.add(conn) {
		_ = c.Close()
		return
	}
	conn.serve()
}

// ServeOn is Serve for a connection that is on an event loop, or for TLS over one
// that is, by a ReadAhead: its requests are answered there. It does not wait for
// that, but calls ended, if not nil, at the connection's end. T is the task that has
// done the handshake and owns it, whose last act ServeOn is; it is nil if nobody
// has read anything.
//
// The handler finds the task of a request by a method Task of the exchange, and may
// wait only as tasks may.
func (s *Server) ServeOn(t *eventloop.Task, c net.Conn, client *message.Client, ended func()) {
	conn := newConn(s, c, client, ended)
	switch {
	case !s.add(conn):
		_ = c.Close()
		if ended != nil {
			ended()
		}
	case t != nil && conn.has():
		conn.answer(t)
	default:
		conn.loop.Idle(conn)
	}
}

// Drain has every answer from now on be the last of its connection.
func (s *Server) Drain() { s.draining.Store(true) }

// CloseIdle closes the connections that wait for their next request.
func (s *Server) CloseIdle() {
	for _, c := range s.all(nil) {
		c.expireIf(idle)
	}
}

// Shutdown drains, closes the connections that wait for their next request, and
// waits for the end of the others, or ctx's.
func (s *Server) Shutdown(ctx context.Context) {
	s.Drain()
	s.CloseIdle()
	s.mu.Lock()
	if len(s.conns) == 0 {
		s.mu.Unlock()
		return
	}
	if s.none == nil {
		s.none = make(chan struct{})
	}
	none := s.none
	s.mu.Unlock()
	tick := time.NewTicker(shutdownTime)
	defer tick.Stop()
	for {
		select {
		case <-none:
			return
		case <-ctx.Done():
			return
		case <-tick.C:
			s.CloseIdle() // whose answer began before the drain
		}
	}
}

// Close ends every connection at once, and those that are still to come.
func (s *Server) Close() {
	s.mu.Lock()
	s.closed = true
	s.mu.Unlock()
	s.Drain()
	for _, c := range s.all(nil) {
		c.Interrupt()
		_ = c.sock.Close()
	}
}

// Count returns the connections that may be bringing a request, or have one that
// does not last, and those that wait for their next one.
func (s *Server) Count() (busy, waiting int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for c := range s.conns {
		switch ph, _ := c.phase.load(); ph {
		case idle:
			waiting++
		case fresh, head, closing:
			busy++
		case exchanging, tunneling:
			if !c.lasts.Load() {
				busy++
			}
		case expired:
		}
	}
	return busy, waiting
}

// Lasting returns the connections whose exchange is a stream.
func (s *Server) Lasting() (n int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for c := range s.conns {
		if c.lasts.Load() {
			n++
		}
	}
	return n
}

// all appends all connections to to.
func (s *Server) all(to []*conn) []*conn {
	s.mu.Lock()
	defer s.mu.Unlock()
	for c := range s.conns {
		to = append(to, c)
	}
	return to
}

// add registers c, unless the server is closed.
func (s *Server) add(c *conn) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return false
	}
	if s.conns == nil {
		s.conns = make(map[*conn]struct{})
		s.clock.Store(1)
	}
	if s.stop == nil {
		s.renewDate(time.Now())
		s.stop = make(chan struct{})
		go s.sweep(s.stop)
	}
	c.phase.store(fresh, s.clock.Load())
	s.conns[c] = struct{}{}
	return true
}

func (s *Server) remove(c *conn) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.conns, c)
	if len(s.conns) > 0 {
		return
	}
	close(s.stop)
	s.stop = nil
	if s.none != nil {
		close(s.none)
		s.none = nil
	}
}

// sweep looks at all connections again and again.
func (s *Server) sweep(stop <-chan struct{}) {
	every := s.every()
	ticker := time.NewTicker(every)
	defer ticker.Stop()
	last := time.Now()
	var conns []*conn
	for {
		select {
		case <-stop:
			return
		case <-ticker.C:
		}
		now := time.Now()
		clock := s.clock.Add(int64(min(now.Sub(last), 2*every)))
		last = now
		s.renewDate(now)
		conns = s.all(conns[:0])
		for _, c := range conns {
			c.look(clock, every)
		}
		clear(conns)
	}
}

// every is the time between two sweeps.
func (s *Server) every() time.Duration {
	l := &s.Limits
	return max(min(sweepTime, min(l.Head, l.Keep, l.Body, l.Write, l.HalfOpen)/4), 10*time.Millisecond)
}

func (s *Server) renewDate(now time.Time) {
	const format = "Mon, 02 Jan 2006 15:04:05 GMT"
	date := now.UTC().AppendFormat([]byte("Date: "), format)
	date = append(date, "\r\n"...)
	s.date.Store(&date)
}

// A phase is what a connection is at.
type phase int64

const (
	fresh      phase = iota // nothing has come yet
	head                    // a part of a head has
	exchanging              // a request is being answered
	tunneling               // its bytes are no longer HTTP
	idle                    // it waits for its next request
	closing                 // its last answer has been sent
	expired                 // its time for what it was at is over
	phaseBits  = 3
)

// phaseSince is a phase and the clock when it began.
type phaseSince struct{ v atomic.Int64 }

func (p *phaseSince) load() (ph phase, since int64) {
	v := p.v.Load()
	return phase(v & (1<<phaseBits - 1)), v >> phaseBits
}

func (p *phaseSince) store(ph phase, since int64) { p.v.Store(since<<phaseBits | int64(ph)) }

// move goes from one phase on to the next and reports false if it was left in
// the meantime.
func (p *phaseSince) move(from, to phase, fromSince, toSince int64) bool {
	return p.v.CompareAndSwap(fromSince<<phaseBits|int64(from), toSince<<phaseBits|int64(to))
}
