package h2

import (
	"net"
	"testing"
	"time"

	"tako/internal/proxy/message"
)

// told is a watcher that counts.
type told chan struct{}

func (t told) ClientGone() { t <- struct{}{} }

func TestAWatcherTakenOffIsNeverTold(t *testing.T) {
	near, far := net.Pipe()
	defer far.Close()
	c := newConn(&Server{}, near, &message.Client{})
	c.mu.Lock()
	s := newStream(c, 1)
	s.working = true
	c.mu.Unlock()
	w := make(told, 2)
	s.Watch(w)
	s.Watch(nil)
	c.mu.Lock()
	c.die(errClosed)
	c.mu.Unlock()
	s.Watch(nil) // of a client that has gone
	s.Watch(w)
	select {
	case <-w:
	case <-time.After(10 * time.Second):
		t.Fatal("a client that had gone before is not told of")
	}
	s.Watch(nil)
	if len(w) != 0 {
		t.Error("told twice")
	}
}
