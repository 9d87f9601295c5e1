package wire

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"reflect"
	"slices"
	"sync"

	"tako/internal/ipc"
	"tako/internal/tako"
)

// A Message is a received message. Body is a pointer to one of this package's
// structs; Files are the receiver's to close.
type Message struct {
	Kind  Kind
	ID    uint64
	Body  any
	Files []ipc.FD

	at Position // of a Resume: where the receiver stood
}

// Discard closes what descriptors the message still holds.
func (m *Message) Discard() {
	for _, f := range m.Files {
		f.Close()
	}
	m.Files = nil
}

// A Conn is one side of a link. Send and Reply may be called from any goroutine,
// Receive from one at a time. Both sides are held to the table: our own faults
// are errors of Send, the peer's are ErrProtocol from Receive.
type Conn struct {
	ch   *ipc.Channel
	link Link

	sendMu sync.Mutex // held over the check and the send, so that order is kept
	out    side       // guarded by sendMu
	in     side       // of the one receiver
}

// side is one direction of a link.
type side struct {
	role  Role
	rules []Rule
	state State
	seen  map[Kind]bool
}

// NewConn speaks as self over ch, which it owns from here on.
func NewConn(ch *ipc.Channel, link Link, self Role) *Conn {
	c := &Conn{ch: ch, link: link}
	for role, rules := range permits[link] {
		s := side{role: role, rules: rules, seen: make(map[Kind]bool)}
		if role == self {
			c.out = s
		} else {
			c.in = s
		}
	}
	if c.out.rules == nil || c.in.rules == nil {
		panic(fmt.Sprintf("wire: %s is not a side of %s", self, link))
	}
	return c
}

// Close ends the channel. It may come twice.
func (c *Conn) Close() error { return c.ch.Close() }

// Send sends a message that nobody waits for an answer to, or a call when id is
// not 0. The descriptors are duplicated; the caller still closes its own.
func (c *Conn) Send(id uint64, body any, files ...ipc.FD) error {
	return c.send(id, 0, body, files)
}

// lockTries is how often TrySend tries to send, which takes a microsecond or so.
const lockTries = 50

// TrySend is Send of a message without descriptors that never waits: it returns
// ipc.ErrFull instead.
func (c *Conn) TrySend(id uint64, body any) error {
	for range lockTries {
		if c.sendMu.TryLock() {
			defer c.sendMu.Unlock()
			return c.sendLocked(id, 0, body, nil, c.ch.TrySend)
		}
	}
	return ipc.ErrFull // somebody waits for room
}

// Reply answers the call with this id.
func (c *Conn) Reply(id uint64, body any, files ...ipc.FD) error {
	return c.send(id, ipc.Reply, body, files)
}

// ReplyError answers the call with this id by a Fault.
func (c *Conn) ReplyError(id uint64, err error) error {
	e := tako.AsError(err)
	return c.send(id, ipc.Reply|ipc.Failed, &Fault{Code: string(e.Code), Message: e.Message}, nil)
}

func (c *Conn) send(id uint64, flags ipc.Flags, body any, files []ipc.FD) error {
	c.sendMu.Lock()
	defer c.sendMu.Unlock()
	return c.sendLocked(id, flags, body, files, c.ch.Send)
}

// sendLocked is send with sendMu held, and by a method of the channel.
func (c *Conn) sendLocked(id uint64, flags ipc.Flags, body any, files []ipc.FD, by func(ipc.Record) error) error {
	rule := c.out.byType(body)
	if rule == nil {
		return fmt.Errorf("%s may not send %T on %s", c.out.role, body, c.link)
	}
	err := c.out.permit(rule, flags)
	if err == nil {
		err = rule.count(body, len(files))
	}
	if err != nil {
		return fmt.Errorf("send %T on %s: %w", body, c.link, err)
	}
	b, err := encode(body)
	if err != nil {
		return fmt.Errorf("send %T on %s: %w", body, c.link, err)
	}
	if err := by(ipc.Record{Kind: uint16(rule.Kind), Flags: flags, ID: id, Body: b, Files: files}); err != nil {
		return err
	}
	c.out.moved(rule)
	return nil
}

// States returns the states of both directions: what we may send and what we may
// be sent. Nobody may be in Receive.
func (c *Conn) States() (out, in State) {
	c.sendMu.Lock()
	defer c.sendMu.Unlock()
	return c.out.state, c.in.state
}

// Waiting reports whether there is a message to be received at once.
func (c *Conn) Waiting() bool { return c.ch.Waiting() }

// Receive waits for the next message. io.EOF means the peer has gone;
// ipc.ErrProtocol that it broke the rules and the channel must be closed.
func (c *Conn) Receive() (Message, error) {
	rec, err := c.ch.Receive()
	if err != nil {
		return Message{}, err
	}
	m, err := c.in.accept(rec)
	if err != nil {
		rec.Discard()
		return Message{}, fmt.Errorf("from %s: %w", c.in.role, err)
	}
	return m, nil
}

// accept turns a record into a message, or says which rule it breaks.
func (s *side) accept(rec ipc.Record) (Message, error) {
	kind := Kind(rec.Kind)
	i := slices.IndexFunc(s.rules, func(r Rule) bool { return r.Kind == kind })
	if i < 0 {
		return Message{}, fmt.Errorf("%w: kind %d is not permitted", ipc.ErrProtocol, kind)
	}
	rule := &s.rules[i]
	body := rule.New()
	err := s.permit(rule, rec.Flags)
	if err == nil { // only what is permitted is worth reading
		err = decode(rec.Body, body)
	}
	if err == nil {
		err = rule.count(body, len(rec.Files))
	}
	if err != nil {
		return Message{}, fmt.Errorf("%w: kind %d: %w", ipc.ErrProtocol, kind, err)
	}
	s.moved(rule)
	m := Message{Kind: kind, ID: rec.ID, Body: body, Files: rec.Files}
	if kind == KindResume {
		m.at = s.position()
	}
	return m, nil
}

func (s *side) byType(body any) *Rule {
	t := reflect.TypeOf(body)
	for i := range s.rules {
		if s.rules[i].body == t {
			return &s.rules[i]
		}
	}
	return nil
}

// permit says whether the rule holds now, for what can be told without the body.
func (s *side) permit(rule *Rule, flags ipc.Flags) error {
	if !slices.Contains(rule.In, s.state) {
		return fmt.Errorf("not permitted while %s", s.state)
	}
	if rule.Once && s.seen[rule.Kind] {
		return fmt.Errorf("permitted once only")
	}
	if rule.Reply != (flags&ipc.Reply != 0) || (rule.Kind == KindFault) != (flags&ipc.Failed != 0) {
		return fmt.Errorf("flags %#x do not fit", flags)
	}
	return nil
}

// count says whether so many descriptors belong to the message.
func (r *Rule) count(body any, files int) error {
	want := r.Files
	if r.FilesOf != nil {
		want = r.FilesOf(body)
	}
	if files != want {
		return fmt.Errorf("%d descriptors, want %d", files, want)
	}
	return nil
}

func (s *side) moved(rule *Rule) {
	s.seen[rule.Kind] = true
	if rule.Next != Starting {
		s.state = rule.Next
	}
}

// A plain body is asked for so often that it has ways of its own to and from JSON.
type plain interface {
	// appendPlain appends what json.Marshal returns, or returns nil for what is not as
	// usual.
	appendPlain(b []byte) []byte
	// decodePlain takes what appendPlain writes, and reports false for all else.
	decodePlain(b []byte) bool
}

func encode(body any) ([]byte, error) {
	if p, ok := body.(plain); ok {
		if b := p.appendPlain(make([]byte, 0, 256)); b != nil {
			return b, nil
		}
	}
	return json.Marshal(body)
}

// decode is strict: one JSON value, no unknown field, nothing behind it.
func decode(b []byte, into any) error {
	if p, ok := into.(plain); ok && p.decodePlain(b) {
		return nil
	}
	dec := json.NewDecoder(bytes.NewReader(b))
	dec.DisallowUnknownFields()
	if err := dec.Decode(into); err != nil {
		return fmt.Errorf("body: %w", err)
	}
	if _, err := dec.Token(); err != io.EOF {
		return fmt.Errorf("body: bytes left over")
	}
	return nil
}
