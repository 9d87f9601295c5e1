package wire

import (
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"time"

	"tako/internal/ipc"
	"tako/internal/tako"
)

// The death of a tako-master whose ends of the channels somebody keeps, as
// systemd does in its store of descriptors. The children hear nothing then, and
// go on: what they have to say waits in the socket, and when that is full they
// wait too. The next tako-master gets the same ends:
//
//	next master                                        child
//	  | <--- whatever was said to the dead one --------   |  thrown away
//	  | ---- Resume (id) ----------------------------->   |  gives up the dead one's calls
//	  | <--- ... --------------------------------------   |  thrown away
//	  | <--- Resumed (the same id) --------------------   |  where both directions stand
//	  | <--- Holds (proxy), Present* (agent) ----------   |  all that it knows
//	  |                                                   |
//	  |      from here on as ever, in the states that Resumed names
//	  |                                                   |
//	  | ---- Signer, settings, keys, certificates, apps ->|  a proxy: everything anew
//	  | ---- Adopt*, Begin ---------------------------->  |  an agent: what it does not know
//
// What the dead one said last has been done by then: it came before Resume. What
// the child said last is in what it knows. Answers to the dead one's calls bear
// ids that the next one never gives.

// Resume is what a tako-master says first to a child of one that has died. Its id
// is not 0, and Resumed has it too.
type Resume struct{}

// Resumed answers Resume. Pieces messages follow that say what the child knows:
// one Holds from a proxy, a Present for each instance from an agent.
type Resumed struct {
	// Position is the child's: its In is what it heard.
	Position Position `json:"position"`
	Pieces   int      `json:"pieces"`
}

// Holds is what a proxy knows.
type Holds struct {
	Apps         []HeldApp `json:"apps"`
	Certificates []string  `json:"certificates"` // ids
}

// HeldApp is what a proxy knows of an app.
type HeldApp struct {
	App      tako.AppID `json:"app"`
	Revision uint64     `json:"revision"` // the newest; the next is higher
	Gone     bool       `json:"gone"`
	// Newest is the highest number of an instance that it has met and not forgotten.
	Newest    uint32     `json:"newest"`
	Instances []Upstream `json:"instances"`
}

// Present is an instance that an agent has, with the descriptors of Started if
// Held.
type Present struct {
	// Adopt has PID 0 for one that is just being started: Started or StartFailed
	// is still to come.
	Adopt  Adopt  `json:"adopt"`
	Limits string `json:"limits"`
	Good   bool   `json:"good"` // a probe was good
	// Stopping: it was asked to stop.
	Stopping bool `json:"stopping"`
	// Held is false for one that has just ended: Exited is to come.
	Held bool `json:"held"`
}

// Begin has the agent begin with the instances of Adopt that it was to hold: the
// agent before it has gone. It may come again.
type Begin struct{}

// Resumed answers a Resume, m, for a child, with where this channel stands.
func (c *Conn) Resumed(m *Message, pieces int) error {
	c.sendMu.Lock()
	defer c.sendMu.Unlock()
	body := &Resumed{Position: m.at, Pieces: pieces}
	body.Position.Out, body.Position.OutSeen = c.out.state, c.out.kinds()
	return c.sendLocked(m.ID, ipc.Reply, body, nil, c.ch.Send)
}

// Patient makes Send wait for as long as the peer does not read and has not gone:
// a child whose master has died waits for the next one.
func (c *Conn) Patient() { c.ch.SetSendTimeout(0) }

// ResumeChild takes over, as tako-master, a channel that a dead one left, and
// returns it in the states that the child names, with the number of messages
// that say what the child knows. It owns ch, and takes no longer than limit. An
// error means that the child has gone or is of no use; it wraps
// os.ErrDeadlineExceeded if it does not answer.
func ResumeChild(ch *ipc.Channel, link Link, limit time.Duration) (c *Conn, pieces int, err error) {
	defer func() {
		if err != nil {
			_ = ch.Close()
			err = fmt.Errorf("resume %s: %w", link, err)
		}
	}()
	late := time.Now().Add(limit)
	if err := ch.SetReadDeadline(late); err != nil {
		return nil, 0, err
	}
	id := bigID()
	asked := make(chan error, 1)
	go func() { // the child may be waiting for us to read
		var err error
		for {
			err = ch.Send(ipc.Record{Kind: uint16(KindResume), ID: id, Body: []byte("{}")})
			if !errors.Is(err, os.ErrDeadlineExceeded) || time.Now().After(late) {
				break
			}
		}
		asked <- err
	}()
	rec, err := answerTo(ch, id)
	if e := <-asked; err != nil {
		return nil, 0, errors.Join(e, err)
	}
	var r Resumed
	if err := decode(rec.Body, &r); err != nil {
		return nil, 0, fmt.Errorf("%w: %w", ipc.ErrProtocol, err)
	}
	if r.Pieces < 0 {
		return nil, 0, fmt.Errorf("%w: %d pieces", ipc.ErrProtocol, r.Pieces)
	}
	if err := ch.SetReadDeadline(time.Time{}); err != nil {
		return nil, 0, err
	}
	p := r.Position
	c, err = ResumeConn(ch, link, Master, Position{Out: p.In, OutSeen: p.InSeen, In: p.Out, InSeen: p.OutSeen})
	return c, r.Pieces, err
}

// answerTo throws away what comes before the answer with this id.
func answerTo(ch *ipc.Channel, id uint64) (ipc.Record, error) {
	for {
		rec, err := ch.Receive()
		if err != nil {
			return rec, err
		}
		rec.Discard()
		if rec.Kind == uint16(KindResumed) && rec.ID == id && rec.Flags == ipc.Reply {
			return rec, nil
		}
	}
}

// bigID is an id that nobody else has given, with room for more above it.
func bigID() uint64 {
	var b [8]byte
	_, _ = rand.Read(b[:]) // never fails: crypto/rand ends the program instead
	return binary.BigEndian.Uint64(b[:])>>1 | 1<<62
}

// kinds are those that came, in order.
func (s *side) kinds() []Kind { return slices.Sorted(maps.Keys(s.seen)) }

// position is where the receiving side stands.
func (s *side) position() Position { return Position{In: s.state, InSeen: s.kinds()} }
