package upstream

import (
	"context"
	"errors"
	"net"
	"net/http"
	"slices"
	"sync"
	"time"

	"tako/internal/proxy/h1"
)

// streamWindow is how much of an answer may come that nobody has read yet.
const streamWindow = 256 << 10

// An H2CPool holds the connections to one instance that speaks HTTP/2 without
// TLS, and without being asked for it first (RFC 9113, 3.3). It keeps the contract
// of Pool, with these differences: an upgrade is not passed on, since there is
// none in HTTP/2; an answer's Rest is never known, since its connection is shared;
// and what the instance says it has not looked at, by REFUSED_STREAM or GOAWAY, is
// repeated whatever the method, if its body can be.
type H2CPool struct {
	transport *http.Transport // makes connections, and holds none

	mu      sync.Mutex
	conns   []*h2conn
	dialing *dialing // the one under way that others wait for
	making  int
	retired bool
}

// h2conn is a connection to the instance.
type h2conn struct {
	*http.ClientConn
	used  bool
	uses  int       // exchanges under way; guarded by the pool's mu
	since time.Time // without any
}

// dialing is the making of a connection. Err is set when done is closed.
type dialing struct {
	done chan struct{}
	err  error
}

// NewH2CPool makes a pool that dials by dial, whose context ends after
// ConnectTime.
func NewH2CPool(dial func(context.Context) (net.Conn, error)) *H2CPool {
	var h2c http.Protocols
	h2c.SetUnencryptedHTTP2(true)
	return &H2CPool{transport: &http.Transport{
		DialContext:            func(ctx context.Context, _, _ string) (net.Conn, error) { return dial(ctx) },
		Protocols:              &h2c,
		DisableCompression:     true,
		ResponseHeaderTimeout:  FirstByteTime,
		ExpectContinueTimeout:  ContinueTime,
		MaxResponseHeaderBytes: h1.MaxResponseHead,
		HTTP2:                  &http.HTTP2Config{MaxReceiveBufferPerStream: streamWindow, WriteByteTimeout: WriteTime},
	}}
}

// get returns a connection with a place for one exchange, and whether it was used
// before. Fresh asks for one that was not.
func (p *H2CPool) get(c *Cancel, fresh bool) (h *h2conn, reused bool, err error) {
	for {
		p.mu.Lock()
		if h := p.freeLocked(fresh); h != nil {
			reused = h.used
			h.used = true
			p.mu.Unlock()
			return h, reused, nil
		}
		wait := p.dialing
		if wait == nil || fresh {
			return p.makeLocked(c, !fresh)
		}
		p.mu.Unlock()
		select {
		case <-wait.done:
		case <-c.Context().Done():
			return nil, false, c.Cause()
		}
		if wait.err != nil {
			return nil, false, wait.err
		}
	}
}

// freeLocked returns a connection that takes one more exchange, which it counts,
// or nil.
func (p *H2CPool) freeLocked(fresh bool) *h2conn {
	p.cleanLocked(time.Now())
	if fresh {
		return nil
	}
	for _, h := range p.conns {
		if h.Reserve() == nil {
			h.uses++
			return h
		}
	}
	return nil
}

// cleanLocked forgets the connections that ended, and ends those that were idle
// for too long or take nothing more.
func (p *H2CPool) cleanLocked(now time.Time) {
	p.conns = slices.DeleteFunc(p.conns, func(h *h2conn) bool {
		if h.Err() != nil {
			return true
		}
		if h.uses == 0 && (now.Sub(h.since) >= IdleTime || h.Available() == 0) {
			_ = h.Close()
			return true
		}
		return false
	})
}

// makeLocked makes a connection, with mu released. Those who come meanwhile wait
// for it if it is shared.
func (p *H2CPool) makeLocked(c *Cancel, shared bool) (*h2conn, bool, error) {
	d := &dialing{done: make(chan struct{})}
	if shared {
		p.dialing = d
	}
	p.making++
	p.mu.Unlock()

	ctx, cancel := context.WithTimeout(c.Context(), ConnectTime)
	defer cancel()
	conn, err := p.transport.NewClientConn(ctx, "http", authority+":80")
	var h *h2conn
	if err == nil {
		h, err = reserved(conn)
	}
	cause := c.Cause()
	if err != nil && cause == nil {
		d.err = &DialError{Err: err} // for all; but that c has ended is c's matter alone
	}

	p.mu.Lock()
	p.making--
	if err == nil {
		p.conns = append(p.conns, h)
	}
	if shared {
		p.dialing = nil
	}
	p.mu.Unlock()
	close(d.done)
	switch {
	case err == nil:
		return h, false, nil
	case cause != nil:
		return nil, false, cause
	}
	return nil, false, d.err
}

// reserved takes the first place on a new connection. One that has none, though it
// could be made, is closed.
func reserved(conn *http.ClientConn) (*h2conn, error) {
	if err := conn.Reserve(); err != nil {
		_ = conn.Close()
		return nil, err
	}
	return &h2conn{ClientConn: conn, used: true, uses: 1}, nil
}

// put takes an exchange off a connection.
func (p *H2CPool) put(h *h2conn) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if h.uses--; h.uses > 0 {
		return
	}
	h.since = time.Now()
	if p.retired {
		p.conns = slices.DeleteFunc(p.conns, func(o *h2conn) bool { return o == h })
		_ = h.Close()
	}
}

// Sweep closes the connections that were idle for IdleTime.
func (p *H2CPool) Sweep(now time.Time) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.cleanLocked(now)
}

// Retire closes the idle connections and keeps no others from here on, until
// Revive. Requests that come nevertheless are served.
func (p *H2CPool) Retire() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.retired = true
	p.conns = slices.DeleteFunc(p.conns, func(h *h2conn) bool {
		if h.uses == 0 {
			_ = h.Close()
		}
		return h.uses == 0
	})
}

// Revive takes Retire back.
func (p *H2CPool) Revive() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.retired = false
}

// Conns returns how many connections there are, and how many of them are idle.
func (p *H2CPool) Conns() (open, idle int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, h := range p.conns {
		if h.uses == 0 {
			idle++
		}
	}
	return len(p.conns) + p.making, idle
}

// RoundTrip is that of Pool.
func (p *H2CPool) RoundTrip(c *Cancel, r *Outgoing) (*Incoming, error) {
	in := &r.in
	in.open(c, r)
	for fresh := false; ; fresh = true {
		if cause := c.Cause(); cause != nil {
			return nil, cause
		}
		h, reused, err := p.get(c, fresh)
		if err != nil {
			return nil, err
		}
		x := newH2Exchange(p, h, in)
		err = x.run()
		if err == nil {
			return in, nil
		}
		err, unseen := x.fail(err)
		lost, is := errors.AsType[*LostError](err)
		if !is || fresh || !lost.Repeatable || !reused && !unseen || r.Elsewhere && !unseen || c.Cause() != nil {
			return nil, err
		}
	}
}
