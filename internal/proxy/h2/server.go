package h2

import (
	"context"
	"net"
	"net/http"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/go-hclog"

	"tako/internal/proxy/message"
)

// Server answers the requests of connections that speak HTTP/2. Its fields are
// set before the first Serve and never change after.
//
// An exchange of it, and everything of its request, ends when its handler
// returns: no method may be called after.
type Server struct {
	Handler message.Handler
	// Limits are DefaultLimits if they are zero.
	Limits message.Limits
	// Log may be nil.
	Log hclog.Logger

	mu       sync.Mutex
	conns    map[*conn]struct{}
	draining bool
	closed   bool
	empty    []chan struct{} // closed when there is no connection any more

	workers workers
	date    atomic.Pointer[date]
}

// date is the value of Date for one second.
type date struct {
	second int64
	text   []byte
}

// now returns the value of Date.
func (s *Server) now() []byte {
	t := time.Now()
	d := s.date.Load()
	if second := t.Unix(); d == nil || d.second != second {
		d = &date{second: second, text: t.UTC().AppendFormat(nil, http.TimeFormat)}
		s.date.Store(d)
	}
	return d.text
}

func (s *Server) limits() message.Limits {
	if s.Limits == (message.Limits{}) {
		return message.DefaultLimits()
	}
	return s.Limits
}

// Serve answers the requests that come on nc, whose TLS handshake is done, until
// the connection ends. It closes nc, and returns after the last handler of it.
func (s *Server) Serve(nc net.Conn, client *message.Client) {
	c := newConn(s, nc, client)
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		c.mu.Lock()
		c.die(errClosed)
		c.mu.Unlock()
		c.timer.Stop()
		return
	}
	if s.conns == nil {
		s.conns = make(map[*conn]struct{})
	}
	s.conns[c] = struct{}{}
	draining := s.draining
	s.mu.Unlock()
	if draining {
		c.drain()
	}
	c.serve()
	s.mu.Lock()
	delete(s.conns, c)
	if len(s.conns) == 0 {
		s.tellEmpty()
	}
	s.mu.Unlock()
}

func (s *Server) tellEmpty() {
	for _, ch := range s.empty {
		close(ch)
	}
	s.empty = nil
	if s.closed {
		s.workers.close()
	}
}

func (s *Server) all() []*conn {
	s.mu.Lock()
	defer s.mu.Unlock()
	all := make([]*conn, 0, len(s.conns))
	for c := range s.conns {
		all = append(all, c)
	}
	return all
}

// Drain asks the clients of all connections, and of those that are still to
// come, to send their next requests elsewhere (RFC 9113, 6.8). What they have
// sent before they read this is answered; then the connections end. It does not
// block.
func (s *Server) Drain() {
	s.mu.Lock()
	s.draining = true
	s.mu.Unlock()
	for _, c := range s.all() {
		c.drain()
	}
}

// CloseIdle ends the connections on which there is no request, telling their
// clients that nothing they may just have sent was acted on. Those that are being
// drained end by themselves. It does not block.
func (s *Server) CloseIdle() {
	for _, c := range s.all() {
		c.mu.Lock()
		if len(c.open) == 0 && c.ready && c.drainedAt == noDeadline { // a drain ends it by itself
			c.leave()
		}
		c.mu.Unlock()
	}
}

// Shutdown drains all connections and returns when the last one has ended, or
// when ctx has.
func (s *Server) Shutdown(ctx context.Context) {
	s.Drain()
	s.mu.Lock()
	if len(s.conns) == 0 {
		s.mu.Unlock()
		return
	}
	ch := make(chan struct{})
	s.empty = append(s.empty, ch)
	s.mu.Unlock()
	select {
	case <-ch:
	case <-ctx.Done():
	}
}

// Close ends every connection, and each that is still to come. The handlers see
// that their clients have gone; Serve returns after them.
func (s *Server) Close() {
	s.mu.Lock()
	s.closed = true
	if len(s.conns) == 0 {
		s.workers.close()
	}
	s.mu.Unlock()
	for _, c := range s.all() {
		c.mu.Lock()
		c.die(errClosed)
		c.mu.Unlock()
	}
}

// Count returns the connections that have a request which does not last, may be
// bringing one, or still have the last answer on its way, and those that have
// none at all. A connection whose requests
// all last is neither.
func (s *Server) Count() (busy, idle int) {
	for _, c := range s.all() {
		c.mu.Lock()
		switch {
		case !c.ready || c.bringing, c.parting && (!c.parted || unsent(c.nc)):
			busy++
		case len(c.open) == 0:
			idle++
		case c.lasting < len(c.open):
			busy++
		}
		c.mu.Unlock()
	}
	return busy, idle
}

// Lasting returns the connections whose requests all are streams.
func (s *Server) Lasting() (n int) {
	for _, c := range s.all() {
		c.mu.Lock()
		if c.ready && !c.bringing && c.lasting > 0 && c.lasting == len(c.open) {
			n++
		}
		c.mu.Unlock()
	}
	return n
}
