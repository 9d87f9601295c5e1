package master

import (
	"errors"
	"os"
	"sync/atomic"
	"time"

	"tako/internal/wire"
)

// A pauser stops the one goroutine that receives from a Conn between two
// messages, so that another image can go on from there. What comes meanwhile
// waits in the socket.
type pauser struct {
	pausing atomic.Bool
	paused  chan struct{} // has room for one
	unpause chan struct{}
}

func newPauser() pauser {
	return pauser{paused: make(chan struct{}, 1), unpause: make(chan struct{})}
}

// pause returns once the last message has been dealt with. It reports whether the
// receiver still lives.
func (p *pauser) pause(conn *wire.Conn, ended <-chan struct{}) bool {
	p.pausing.Store(true)
	if err := conn.SetReadDeadline(time.Unix(1, 0)); err != nil {
		return false
	}
	select {
	case <-p.paused:
		return true
	case <-ended:
		return false
	}
}

// resume takes pause back.
func (p *pauser) resume(conn *wire.Conn, ended <-chan struct{}) {
	p.pausing.Store(false)
	_ = conn.SetReadDeadline(time.Time{})
	select {
	case p.unpause <- struct{}{}:
	case <-ended:
	}
}

// held is for the receiver, with the error of Receive: it reports whether that
// was a pause, which is over, and receiving goes on.
func (p *pauser) held(err error, ended <-chan struct{}) bool {
	if !errors.Is(err, os.ErrDeadlineExceeded) || !p.pausing.Load() {
		return false
	}
	p.paused <- struct{}{}
	select {
	case <-p.unpause:
		return true
	case <-ended:
		return false
	}
}
