package h2

import (
	"time"

	"golang.org/x/net/http2"
)

// arm has tick look at the connection at that time at the latest. The caller
// holds mu.
func (c *conn) arm(at time.Duration) {
	if c.dead || c.armed != noDeadline && c.armed <= at {
		return
	}
	c.armed = at
	c.timer.Reset(at - c.now())
}

// tick ends what has taken too long, and arms itself for what is next.
func (c *conn) tick() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.dead {
		return
	}
	now := c.now()
	c.armed = noDeadline
	next := now + c.limits.Keep
	due := func(from, limit time.Duration) bool {
		if from == noDeadline {
			return false
		}
		if from+limit <= now {
			return true
		}
		next = min(next, from+limit)
		return false
	}
	switch {
	case due(c.writeFrom, c.limits.Write), due(c.faultAt, c.limits.Linger), due(c.headSince, c.limits.Head):
		c.die(errGone)
		return
	case due(c.pinged, c.limits.Head) && len(c.open) > 0:
		c.die(errGone)
		return
	case due(c.partedAt, c.limits.Linger):
		if now-c.partedAt > c.limits.Write || !unsent(c.nc) {
			c.die(errGone)
			return
		}
		next = min(next, now+c.limits.Linger)
	case due(c.drainedAt, drainWait), len(c.open) == 0 && due(c.idleSince, c.limits.Keep):
		c.leave()
	case len(c.open) > 0 && c.pinged == noDeadline && due(c.heard, c.limits.Keep):
		c.pinged = now
		next = min(next, now+c.limits.Head)
		c.frame(8, http2.FramePing, 0, 0)
		c.out.b = append(c.out.b, alivePing...)
		c.kick()
	}
	for i := 0; i < len(c.open); i++ {
		s := c.open[i]
		if s.stopped != nil {
			continue
		}
		if !s.working {
			if due(s.waitFrom, c.limits.Head) { // its body of no bytes has no end
				c.appendReset(s.id, http2.ErrCodeCancel)
				s.how = byUs
				c.gone(s, errGone)
				c.kick()
				i-- // another has its place now
			}
			continue
		}
		if s.waitFrom != noDeadline && due(s.bodyLimit(), 0) {
			s.bodyLate = true
			s.readable.Signal()
		}
		switch {
		case !s.waiting:
		case c.sendWindow > 0:
			s.stalled = noDeadline // not the client holds it up, but the others
		case s.stalled == noDeadline:
			s.stalled = now
		}
		if due(s.stalled, c.limits.Write) {
			s.writeLate = true
			s.writable.Signal()
		}
	}
	c.arm(next)
}
