package upstream

import (
	"context"
	"net"
	"sync"
)

// Cancel ends an exchange from another goroutine. It stands for a context where
// one for each request would cost too much: it is part of what its owner has
// already, and Reset makes it fit for the next request. Its zero value is ready.
// All but Reset may come from any goroutine.
type Cancel struct {
	mu    sync.Mutex
	cause error
	conn  net.Conn // of the exchange under way, to be closed
	queue Waiting  // what is waited for instead, to be told
	ctx   context.Context
	end   context.CancelCauseFunc
}

// Waiting is a place in a queue that an exchange may wait for.
type Waiting interface {
	// Cancel gives the place up. It comes from a goroutine of its own, maybe when
	// nobody waits any more.
	Cancel(cause error)
}

// Wait has Do cancel w as well, until Waited. It reports false if Do was called
// before.
func (c *Cancel) Wait(w Waiting) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.queue = w
	return c.cause == nil
}

// Waited takes Wait back.
func (c *Cancel) Waited() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.queue = nil
}

// Do ends the exchange under way, and all after it, for that cause; nil stands
// for context.Canceled. Only the first call has an effect.
func (c *Cancel) Do(cause error) {
	if cause == nil {
		cause = context.Canceled
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.cause != nil {
		return
	}
	c.cause = cause
	if c.conn != nil {
		_ = c.conn.Close() // under mu, so that it is nobody else's by now
		c.conn = nil
	}
	if c.queue != nil {
		go c.queue.Cancel(cause)
		c.queue = nil
	}
	if c.end != nil {
		c.end(cause)
	}
}

// Cause returns what Do was called with, nil before.
func (c *Cancel) Cause() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.cause
}

// Context returns a context that Do ends, with the cause, and Reset. It is made
// by the first call.
func (c *Cancel) Context() context.Context {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.ctx == nil {
		c.ctx, c.end = context.WithCancelCause(context.Background())
		if c.cause != nil {
			c.end(c.cause)
		}
	}
	return c.ctx
}

// Reset forgets all. Nobody may use c meanwhile, or call Do for what was before.
func (c *Cancel) Reset() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.end != nil {
		c.end(nil)
	}
	c.cause, c.conn, c.queue, c.ctx, c.end = nil, nil, nil, nil, nil
}

// attach has Do close the connection, and reports false if Do was called before.
func (c *Cancel) attach(conn net.Conn) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.cause != nil {
		return false
	}
	c.conn = conn
	return true
}

// detach takes attach back. It reports false if Do has closed the connection, or
// may have.
func (c *Cancel) detach() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.conn = nil
	return c.cause == nil
}
