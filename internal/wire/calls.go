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
	waiting map[uint64]chan Message
	gone    bool
}

// NewCalls makes calls over conn.
func NewCalls(conn *Conn) *Calls {
	// Answers to the calls of a dead tako-master may still come, over a channel
	// that it left: their ids are not ours.
	return &Calls{conn: conn, next: bigID(), waiting: make(map[uint64]chan Message)}
}

// Do sends a call and waits for its answer, until ctx ends. A Fault comes back
// as a *tako.Error. The descriptors sent stay the caller's; those of the answer
// are the caller's to close.
func (c *Calls) Do(ctx context.Context, body any, files ...ipc.FD) (Message, error) {
	answer := make(chan Message, 1)
	c.mu.Lock()
	if c.gone {
		c.mu.Unlock()
		return Message{}, ErrGone
	}
	c.next++
	id := c.next
	c.waiting[id] = answer
	c.mu.Unlock()

	if err := c.conn.Send(id, body, files...); err != nil {
		c.forget(id)
		return Message{}, err
	}
	select {
	case m, ok := <-answer:
		if !ok {
			return Message{}, ErrGone
		}
		if f, isFault := m.Body.(*Fault); isFault {
			return Message{}, tako.Errorf(tako.Code(f.Code), "%s", f.Message)
		}
		return m, nil
	case <-ctx.Done():
		c.forget(id)
		select {
		case m, ok := <-answer: // it came after all
			if ok {
				m.Discard()
			}
		default:
		}
		return Message{}, fmt.Errorf("wait for the answer to %T: %w", body, context.Cause(ctx))
	}
}

// forget stops waiting for id. After it no answer to id can arrive any more.
func (c *Calls) forget(id uint64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.waiting, id)
}

// Answer hands over a received answer. It reports whether somebody waited for
// it; if nobody did the message is discarded: the call was given up.
func (c *Calls) Answer(m Message) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	answer, ok := c.waiting[m.ID]
	if !ok {
		m.Discard()
		return false
	}
	delete(c.waiting, m.ID)
	answer <- m // has room for one
	return true
}

// End fails every waiting call, and every later one, with ErrGone.
func (c *Calls) End() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.gone = true
	for id, answer := range c.waiting {
		close(answer)
		delete(c.waiting, id)
	}
}
