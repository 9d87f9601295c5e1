package upstream

import (
	"context"
	"net"
	"slices"
	"sync"
	"time"
)

// The limits of a pool. How many connections it has at once is its user's to
// bound: there is one for each request and tunnel, and those that were.
const (
	// ConnectTime bounds the making of a connection.
	ConnectTime = time.Second
	// IdleTime is how long an unused connection is kept. Common servers close
	// theirs after 5 s: ours goes first.
	IdleTime = 4 * time.Second
)

// A DialError says that no connection could be made: nothing of the request was
// sent.
type DialError struct{ Err error }

func (e *DialError) Error() string { return "connect to the instance: " + e.Err.Error() }
func (e *DialError) Unwrap() error { return e.Err }

// A Pool holds the connections to one instance that speaks HTTP/1.1. Make one by
// NewPool. Idle connections cost neither goroutine, timer nor buffer: somebody
// has to call Sweep now and then.
type Pool struct {
	dial func(context.Context) (net.Conn, error)

	mu      sync.Mutex
	links   []*link // the idle ones, the one used last at the end
	open    int     // idle ones, those in use and those being made
	retired bool
}

// NewPool makes a pool that dials by dial, whose context ends after ConnectTime.
func NewPool(dial func(context.Context) (net.Conn, error)) *Pool { return &Pool{dial: dial} }

// get returns a connection for one exchange, and whether it was used before. Fresh
// asks for one that was not.
func (p *Pool) get(c *Cancel, now time.Time, fresh bool) (l *link, reused bool, err error) {
	p.mu.Lock()
	if n := len(p.links) - 1; n >= 0 && !fresh {
		l := p.links[n]
		if now.Sub(l.since) < IdleTime {
			p.links[n] = nil
			p.links = p.links[:n]
			p.mu.Unlock()
			return l, true, nil
		}
		p.expireLocked(now)
	}
	p.open++
	p.mu.Unlock()
	ctx, cancel := context.WithTimeout(c.Context(), ConnectTime)
	defer cancel()
	conn, err := p.dial(ctx)
	if err == nil {
		return newLink(conn, p), false, nil
	}
	p.mu.Lock()
	p.open--
	p.mu.Unlock()
	if cause := c.Cause(); cause != nil {
		return nil, false, cause
	}
	return nil, false, &DialError{Err: err}
}

// put takes back a connection that is fit for another exchange.
func (p *Pool) put(l *link) {
	l.since = time.Now()
	p.mu.Lock()
	if !p.retired {
		p.links = append(p.links, l)
		p.mu.Unlock()
		return
	}
	p.mu.Unlock()
	p.drop(l)
}

// drop closes a connection that is not to be used again.
func (p *Pool) drop(l *link) {
	_ = l.Close()
	p.mu.Lock()
	p.open--
	p.mu.Unlock()
}

// Sweep closes the connections that were idle for IdleTime.
func (p *Pool) Sweep(now time.Time) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.expireLocked(now)
}

// expireLocked closes those idle for too long, which stand first.
func (p *Pool) expireLocked(now time.Time) {
	n := 0
	for n < len(p.links) && now.Sub(p.links[n].since) >= IdleTime {
		_ = p.links[n].Close()
		n++
	}
	p.links = slices.Delete(p.links, 0, n)
	p.open -= n
}

// Retire closes the idle connections and keeps no others from here on, until
// Revive. Requests that come nevertheless are served.
func (p *Pool) Retire() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.retired = true
	for _, l := range p.links {
		_ = l.Close()
	}
	p.open -= len(p.links)
	p.links = nil
}

// Revive takes Retire back.
func (p *Pool) Revive() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.retired = false
}

// Conns returns how many connections there are, and how many of them are idle.
func (p *Pool) Conns() (open, idle int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.open, len(p.links)
}
