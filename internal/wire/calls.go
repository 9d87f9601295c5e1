package wire

import (
	"context"
	"errors"
	"fmt"
	"sync"

	"tako/internal/ipc"
	"tako/internal/tako"
)

// ErrGone is returned by calls whose channel ended before the answer came.
var ErrGone = errors.New("the peer has gone")

// Calls matches answers to the calls that wait for them. The goroutine that
// receives passes it every message that is an answer. The zero value is not
// usable: NewCalls.
type Calls struct {
	conn *Conn

	mu      sync.Mutex
	next    uint64
	waiting map[uint64]func(Message, error) // called with mu held, once
	gone    bool
}

// NewCalls makes calls over conn.
func NewCalls(conn *Conn) *Calls {
	// Answers to the calls of a dead tako-master may still come, over a channel
	// that it left: their ids are not ours.
	return &Calls{conn: conn, next: bigID(), waiting: make(map[uint64]func(Message, error))}
}

// await gives a call its id, and done the answer, or ErrGone.
func (c *Calls) await(done func(Message, error)) (id uint64, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.gone {
		return 0, ErrGone
	}
	c.next++
	c.waiting[c.next] = done
	return c.next, nil
}

// Do sends a call and waits for its answer, until ctx ends. A Fault comes back
// as a *tako.Error. The descriptors sent stay the caller's; those of the answer
// are the caller's to close.
func (c *Calls) Do(ctx context.Context, body any, files ...ipc.FD) (Message, error) {
	type answer struct {
		m   Message
		err error
	}
	came := make(chan answer, 1)
	id, err := c.await(func(m Message, err error) { came <- answer{m, err} })
	if err != nil {
		return Message{}, err
	}
	if err := c.conn.Send(id, body, files...); err != nil {
		c.Forget(id)
		return Message{}, err
	}
	select {
	case a := <-came:
		return a.m, a.err
	case <-ctx.Done():
		if !c.Forget(id) { // it came after all
			a := <-came
			a.m.Discard()
		}
		return Message{}, fmt.Errorf("wait for the answer to %T: %w", body, context.Cause(ctx))
	}
}

// Begin sends a call without waiting for anything: if that is not possible it fails
// with ipc.ErrFull, and done is not called. Else done is called once, as with what Do
// returns, and must not wait either, nor use c; unless Forget comes before.
func (c *Calls) Begin(body any, done func(Message, error)) (id uint64, err error) {
	if id, err = c.await(done); err != nil {
		return 0, err
	}
	if err := c.conn.TrySend(id, body); err != nil {
		if !c.Forget(id) {
			return id, nil // the channel has ended, which done was told
		}
		return 0, err
	}
	return id, nil
}

// Forget stops waiting for the answer to a call, and reports whether it was waited
// for until then: else it has come.
func (c *Calls) Forget(id uint64) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	_, waited := c.waiting[id]
	delete(c.waiting, id)
	return waited
}

// Answer hands over a received answer. It reports whether somebody waited for
// it; if nobody did the message is discarded: the call was given up.
func (c *Calls) Answer(m Message) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	done, ok := c.waiting[m.ID]
	if !ok {
		m.Discard()
		return false
	}
	delete(c.waiting, m.ID)
	if f, isFault := m.Body.(*Fault); isFault {
		m.Discard()
		done(Message{}, tako.Errorf(tako.Code(f.Code), "%s", f.Message))
	} else {
		done(m, nil)
	}
	return true
}

// End fails every waiting call, and every later one, with ErrGone.
func (c *Calls) End() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.gone = true
	for id, done := range c.waiting {
		delete(c.waiting, id)
		done(Message{}, ErrGone)
	}
}
