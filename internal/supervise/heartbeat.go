package supervise

import (
	"context"
	"time"
)

// The master's heartbeat.
const (
	HeartbeatInterval = 2 * time.Second
	HeartbeatMissed   = 3
)

// Heartbeat calls send with a rising id, from 1, at once and after every
// interval, and takes the ids that come back from pongs. When missed of them in
// a row are unanswered, or send fails, it calls late once and returns; it returns
// too when ctx ends. Nobody closes pongs. What went by while this process itself did not run on time
// (stopped, or starved) is not held against the peer.
func Heartbeat(ctx context.Context, interval time.Duration, missed int, send func(id uint64) error, pongs <-chan uint64, late func()) {
	var sent, answered uint64
	for {
		sent++
		if err := send(sent); err != nil {
			if ctx.Err() == nil {
				late()
			}
			return
		}
		due := time.Now().Add(interval)
		timer := time.NewTimer(interval)
		fired := false
		for !fired || len(pongs) > 0 { // those that came in time count
			select {
			case <-ctx.Done():
				timer.Stop()
				return
			case id := <-pongs:
				if id <= sent {
					answered = max(answered, id)
				}
			case <-timer.C:
				fired = true
			}
		}
		if time.Since(due) > interval/2 {
			answered = sent // we were late ourselves
		}
		if sent-answered >= uint64(missed) { // a small positive number
			late()
			return
		}
	}
}
