package wire

import (
	"fmt"
	"time"

	"tako/internal/ipc"
)

// A Position is how far both directions of a Conn have come, for the next image
// of a process to go on from.
type Position struct {
	Out     State  `json:"out"`
	In      State  `json:"in"`
	OutSeen []Kind `json:"out_seen"`
	InSeen  []Kind `json:"in_seen"`
}

// SetReadDeadline makes Receive fail with os.ErrDeadlineExceeded from t on; the
// zero time takes that back. No message is lost by it.
func (c *Conn) SetReadDeadline(t time.Time) error { return c.ch.SetReadDeadline(t) }

// HandOver returns a duplicate of the channel's descriptor, for the caller to
// close, and the position. Nobody may be in Receive, and nothing may be sent or
// received any more by this Conn if another goes on from there.
func (c *Conn) HandOver() (ipc.FD, Position, error) {
	fd, err := c.ch.Dup()
	if err != nil {
		return 0, Position{}, err
	}
	c.sendMu.Lock()
	defer c.sendMu.Unlock()
	return fd, Position{
		Out: c.out.state, OutSeen: c.out.kinds(),
		In: c.in.state, InSeen: c.in.kinds(),
	}, nil
}

// ResumeConn goes on from a position as self over ch, which it owns from here on.
func ResumeConn(ch *ipc.Channel, link Link, self Role, p Position) (*Conn, error) {
	c := NewConn(ch, link, self)
	for _, d := range []struct {
		side  *side
		state State
		seen  []Kind
	}{{&c.out, p.Out, p.OutSeen}, {&c.in, p.In, p.InSeen}} {
		if d.state > Finished {
			_ = c.Close()
			return nil, fmt.Errorf("resume %s: state %d is unknown", link, d.state)
		}
		d.side.state = d.state
		for _, k := range d.seen {
			d.side.seen[k] = true
		}
	}
	return c, nil
}
