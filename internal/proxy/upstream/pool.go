package upstream

import (
	"context"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"tako/internal/proxy/eventloop"
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

// loopShards is in how many stacks the idle connections of event loops are. What
// is in that of another loop is taken before a connection is made.
const loopShards = 16

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

	shards  [1 + loopShards]shard // the first is of no loop
	idle    atomic.Int64          // connections in shards
	open    atomic.Int64          // those, those in use and those being made
	retired atomic.Bool
}

// shard is a stack of idle connections.
type shard struct {
	mu    sync.Mutex
	links []*link // the one used last at the end
	_     [32]byte
}

// NewPool makes a pool that dials by dial, whose context ends after ConnectTime.
func NewPool(dial func(context.Context) (net.Conn, error)) *Pool { return &Pool{dial: dial} }

// shardOf is the shard of a task's loop, or of those who have none.
func (p *Pool) shardOf(l *eventloop.Loop) int {
	if l == nil {
		return 0
	}
	return 1 + l.Index()%loopShards
}

// get returns a connection for one exchange of t's, and whether it was used before.
// Fresh asks for one that was not.
func (p *Pool) get(c *Cancel, t *eventloop.Task, now time.Time, fresh bool) (l *link, reused bool, err error) {
	own := p.shardOf(t.Loop())
	for i := 0; !fresh && i < len(p.shards) && p.idle.Load() > 0; i++ {
		l := p.take((own+i)%len(p.shards), now)
		if l == nil {
			continue
		}
		if err := l.settle(t); err != nil {
			p.drop(l)
			continue
		}
		return l, true, nil
	}
	p.open.Add(1)
	var conn net.Conn
	t.Block(func() {
		ctx, cancel := context.WithTimeout(c.Context(), ConnectTime)
		defer cancel()
		conn, err = p.dial(ctx)
	})
	if err == nil {
		l := newLink(conn, p)
		if err = l.settle(t); err == nil {
			return l, false, nil
		}
		_ = l.Close()
	}
	p.open.Add(-1)
	if cause := c.Cause(); cause != nil {
		return nil, false, cause
	}
	return nil, false, &DialError{Err: err}
}

// take takes the connection used last from a shard, and closes those that were idle
// for too long.
func (p *Pool) take(from int, now time.Time) *link {
	s := &p.shards[from]
	s.mu.Lock()
	defer s.mu.Unlock()
	n := len(s.links) - 1
	if n < 0 {
		return nil
	}
	l := s.links[n]
	if now.Sub(l.since) >= IdleTime {
		p.expireLocked(s, now)
		return nil
	}
	s.links[n] = nil
	s.links = s.links[:n]
	p.idle.Add(-1)
	return l
}

// put takes back a connection that is fit for another exchange.
func (p *Pool) put(l *link, now time.Time) {
	l.since = now
	var of *eventloop.Loop
	if l.on != nil {
		l.on.Own(nil)
		of = l.on.Loop()
	}
	s := &p.shards[p.shardOf(of)]
	s.mu.Lock()
	if !p.retired.Load() {
		s.links = append(s.links, l)
		p.idle.Add(1)
		s.mu.Unlock()
		return
	}
	s.mu.Unlock()
	p.drop(l)
}

// drop closes a connection that is not to be used again.
func (p *Pool) drop(l *link) {
	_ = l.Close()
	p.open.Add(-1)
}

// Sweep closes the connections that were idle for IdleTime.
func (p *Pool) Sweep(now time.Time) {
	for i := range p.shards {
		s := &p.shards[i]
		s.mu.Lock()
		p.expireLocked(s, now)
		s.mu.Unlock()
	}
}

// expireLocked closes those idle for too long, which stand first.
func (p *Pool) expireLocked(s *shard, now time.Time) {
	n := 0
	for n < len(s.links) && now.Sub(s.links[n].since) >= IdleTime {
		n++
	}
	p.closeLocked(s, n)
}

// closeLocked closes the first n.
func (p *Pool) closeLocked(s *shard, n int) {
	for _, l := range s.links[:n] {
		_ = l.Close()
	}
	s.links = slices.Delete(s.links, 0, n)
	p.idle.Add(-int64(n))
	p.open.Add(-int64(n))
}

// Retire closes the idle connections and keeps no others from here on, until
// Revive. Requests that come nevertheless are served.
func (p *Pool) Retire() {
	p.retired.Store(true)
	for i := range p.shards {
		s := &p.shards[i]
		s.mu.Lock()
		p.closeLocked(s, len(s.links))
		s.mu.Unlock()
	}
}

// Revive takes Retire back.
func (p *Pool) Revive() { p.retired.Store(false) }

// Conns returns how many connections there are, and how many of them are idle.
func (p *Pool) Conns() (open, idle int) { return int(p.open.Load()), int(p.idle.Load()) }
