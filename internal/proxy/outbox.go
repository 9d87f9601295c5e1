package proxy

import (
	"sync"

	"tako/internal/wire"
)

// outbox sends messages in the order they were pushed, from a goroutine of its
// own: no request waits for the master.
type outbox struct {
	send func(body any) error

	mu     sync.Mutex
	queue  []any
	held   []any // until open
	isOpen bool
	closed bool
	wake   chan struct{} // has room for one
}

func newOutbox(send func(any) error) *outbox {
	return &outbox{send: send, wake: make(chan struct{}, 1)}
}

// MaxOutbox is how many messages may wait for a master that does not read before
// traffic is left out: the next master is told all of it.
const MaxOutbox = 1000

// push adds a message. It does not block; after close it does nothing. Before
// open, all but Applied is held back: the master does not take it yet.
func (o *outbox) push(body any) {
	_, early := body.(*wire.Applied)
	_, traffic := body.(*wire.Traffic)
	o.mu.Lock()
	switch {
	case o.closed:
	case traffic && len(o.queue) >= MaxOutbox:
	case o.isOpen || early:
		o.queue = append(o.queue, body)
	default:
		o.held = append(o.held, body)
	}
	o.mu.Unlock()
	o.ring()
}

// open lets out what was held back. Ready was sent.
func (o *outbox) open() {
	o.mu.Lock()
	o.isOpen = true
	o.queue, o.held = append(o.queue, o.held...), nil
	o.mu.Unlock()
	o.ring()
}

// close lets run return once everything was sent.
func (o *outbox) close() {
	o.mu.Lock()
	o.closed = true
	o.mu.Unlock()
	o.ring()
}

func (o *outbox) ring() {
	select {
	case o.wake <- struct{}{}:
	default:
	}
}

// run sends until close or an error.
func (o *outbox) run() error {
	for range o.wake {
		o.mu.Lock()
		queue, closed := o.queue, o.closed
		o.queue = nil
		o.mu.Unlock()
		for _, body := range queue {
			if err := o.send(body); err != nil {
				return err
			}
		}
		if closed {
			return nil
		}
	}
	return nil
}
