package upstream

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"sync"
	"syscall"
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
	// PeekAfter is how long a connection may have been idle and still be used
	// without a look whether the instance has closed it.
	PeekAfter = time.Second
)

// A DialError says that no connection could be made: nothing of the request was
// sent.
type DialError struct{ Err error }

func (e *DialError) Error() string { return "connect to the instance: " + e.Err.Error() }
func (e *DialError) Unwrap() error { return e.Err }

// A Pool holds the connections to one instance. Make one by NewPool. Idle
// connections cost neither goroutine nor timer: somebody has to call Sweep now
// and then.
type Pool struct {
	dial func(context.Context) (net.Conn, error)

	mu      sync.Mutex
	idle    []*conn // the one used last at the end
	links   []*link // the same
	open    int     // idle ones, those in use and those being made
	retired bool
}

// NewPool makes a pool that dials by dial, whose context ends after ConnectTime.
func NewPool(dial func(context.Context) (net.Conn, error)) *Pool { return &Pool{dial: dial} }

// conn is a connection in use or idle. It is used by one exchange at a time.
type conn struct {
	net.Conn
	pool  *Pool
	br    *bufio.Reader
	bw    *bufio.Writer
	since time.Time // idle since
	read  int64     // bytes of the exchange under way
	head  int64     // bytes that a head may still have; only while inHead
	// inHead: reading counts against head.
	inHead bool
}

const connBuffer = 4 << 10

var errHeadTooLarge = fmt.Errorf("the answer's head is larger than %d bytes", MaxHead)

// Read is for br: it counts and bounds what arrives.
func (c *conn) Read(b []byte) (int, error) {
	if c.inHead && c.head <= 0 {
		return 0, errHeadTooLarge
	}
	n, err := c.Conn.Read(b)
	c.read += int64(n)
	c.head -= int64(n)
	return n, err
}

// get returns a connection for one exchange and whether it was used before.
// Fresh asks for one that was not. Careful: look at it, however short it was idle.
func (p *Pool) get(ctx context.Context, fresh, careful bool) (c *conn, reused bool, err error) {
	p.mu.Lock()
	for !fresh && len(p.idle) > 0 {
		c := p.idle[len(p.idle)-1]
		idle := time.Since(c.since)
		if idle >= IdleTime {
			p.expireLocked(time.Now())
			break
		}
		p.idle = p.idle[:len(p.idle)-1]
		p.mu.Unlock()
		if !careful && idle < PeekAfter || alive(c.Conn) {
			return c, true, nil
		}
		_ = c.Close()
		p.mu.Lock()
		p.open--
	}
	p.open++
	p.mu.Unlock()
	return p.make(ctx)
}

// make makes a connection, whose place was counted before.
func (p *Pool) make(ctx context.Context) (*conn, bool, error) {
	dialCtx, cancel := context.WithTimeout(ctx, ConnectTime)
	defer cancel()
	nc, err := p.dial(dialCtx)
	if err != nil {
		p.mu.Lock()
		p.open--
		p.mu.Unlock()
		if ctx.Err() != nil {
			return nil, false, context.Cause(ctx)
		}
		return nil, false, &DialError{Err: err}
	}
	c := &conn{Conn: nc, pool: p}
	c.br = bufio.NewReaderSize(c, connBuffer)
	c.bw = bufio.NewWriterSize(nc, connBuffer)
	return c, false, nil
}

// put takes back a connection that is fit for another exchange.
func (p *Pool) put(c *conn) {
	if c.SetDeadline(time.Time{}) != nil {
		p.drop(c)
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.retired {
		_ = c.Close()
		p.open--
		return
	}
	c.since = time.Now()
	p.idle = append(p.idle, c)
}

// drop closes a connection that is not to be used again.
func (p *Pool) drop(c *conn) {
	_ = c.Close()
	p.mu.Lock()
	defer p.mu.Unlock()
	p.open--
}

// Sweep closes the connections that were idle for IdleTime.
func (p *Pool) Sweep(now time.Time) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.expireLocked(now)
	p.expireLinksLocked(now)
}

// expireLocked closes those idle for too long, which stand first.
func (p *Pool) expireLocked(now time.Time) {
	n := 0
	for n < len(p.idle) && now.Sub(p.idle[n].since) >= IdleTime {
		_ = p.idle[n].Close()
		n++
	}
	if n == 0 {
		return
	}
	p.idle = slices.Delete(p.idle, 0, n)
	p.open -= n
}

// Retire closes the idle connections and keeps no others from here on, until
// Revive. Requests that come nevertheless are served.
func (p *Pool) Retire() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.retired = true
	for _, c := range p.idle {
		_ = c.Close()
	}
	for _, l := range p.links {
		_ = l.Close()
	}
	p.open -= len(p.idle) + len(p.links)
	p.idle, p.links = nil, nil
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
	return p.open, len(p.idle) + len(p.links)
}

// alive reports whether an idle connection is still open and silent. A
// connection that cannot be looked at counts as alive.
func alive(c net.Conn) bool {
	sc, ok := c.(syscall.Conn)
	if !ok {
		return true
	}
	raw, err := sc.SyscallConn()
	if err != nil {
		return true
	}
	quiet := false
	err = raw.Read(func(fd uintptr) bool {
		var b [1]byte
		for {
			_, _, err := syscall.Recvfrom(int(fd), b[:], syscall.MSG_PEEK|syscall.MSG_DONTWAIT)
			if errors.Is(err, syscall.EINTR) {
				continue
			}
			// Both a byte and the end mean that it is of no use any more.
			quiet = errors.Is(err, syscall.EAGAIN)
			return true
		}
	})
	return err == nil && quiet
}
