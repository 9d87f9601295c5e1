package upstream

import (
	"bytes"
	"errors"
	"fmt"
	"sync"

	"tako/internal/proxy/eventloop"
	"tako/internal/proxy/h1"
	"tako/internal/proxy/message"
)

// A Body is the body of a request: the part of message.Exchange that it is.
// While an exchange is under way ReadBody is called from one goroutine, which
// may be another than the caller of RoundTrip, and Trailer after it.
type Body interface {
	ReadBody(p []byte) (int, error)
	Buffered() ([]byte, bool)
	StopBody()
	Trailer() []message.Field
}

// Outgoing is a request to be sent. When its answer, which is part of it, is
// closed, or there was none, it may be sent again, or be used for another one
// after Clear; till then nobody changes it. It knows how often it was lost, whatever
// pool it was sent by, and so whether it may be repeated.
type Outgoing struct {
	// Method, Target and Host are valid by package message.
	Method, Target, Host []byte
	// Fields are written in their order as they stand; those about the hop are left
	// out, whatever they say.
	Fields []message.Field
	// Length is the length of Body, or message.Unknown for one that is sent in
	// chunks, with its trailer. Without a body it is 0, and said if HasLength.
	Length    int64
	HasLength bool
	// Body is nil for none. One that is Buffered goes out with the head; all others
	// are read, and sent as they come, while the answer is waited for.
	Body Body
	// Upgrade is the protocol asked for, nil for none; then there is no Body.
	Upgrade []byte
	// Expect holds the body back until the instance asks for it.
	Expect bool
	// TETrailers: the trailer of the answer will be read.
	TETrailers bool
	// Elsewhere: what is lost here, and may be repeated, is better sent to another
	// instance. Without it RoundTrip itself repeats it on a fresh connection.
	Elsewhere bool
	// Inform, if set, is told of 103 answers before RoundTrip returns. The fields
	// are valid until it returns.
	Inform func(status int, fields []message.Field)
	// Task, if not nil, sends the request, by connections of its loop. It is detached
	// if the request has a Body that is not Buffered, or asks for an Upgrade, or goes
	// to an H2CPool.
	Task *eventloop.Task

	asked bool   // Body, whether it is Buffered
	whole bool   // it is
	body  []byte // then
	lost  int    // sendings of which nobody knows what became
	in    Incoming
}

// lose counts a sending that was lost for err. Touched: something was read of a body
// that cannot be read again.
func (r *Outgoing) lose(err error, touched bool) *LostError {
	r.lost++
	return &LostError{Err: err, Repeatable: idempotent(r.Method) && !touched && r.lost < MaxSendings}
}

// buffered is Body.Buffered, which gives a body away and is asked only once,
// however often the request is sent.
func (r *Outgoing) buffered() ([]byte, bool) {
	if !r.asked {
		r.asked = true
		r.body, r.whole = r.Body.Buffered()
	}
	return r.body, r.whole
}

// Clear makes r empty, keeping the room of Fields and of its answer, which is
// closed.
func (r *Outgoing) Clear() {
	r.Method, r.Target, r.Host, r.Fields, r.Length, r.HasLength = nil, nil, nil, r.Fields[:0], 0, false
	r.Body, r.Upgrade, r.Expect, r.TETrailers, r.Inform, r.Task = nil, nil, false, false, nil, nil
	r.asked, r.whole, r.body, r.lost, r.Elsewhere = false, false, nil, 0, false
}

// smallBody bounds what is written together with its head.
const smallBody = 16 << 10

var errUnwritable = errors.New("a part of the request has a byte that would end it early")

// appendHead serialises the head. What would change the framing is refused,
// wherever it comes from: the caller's word that all is valid is not enough here.
func (r *Outgoing) appendHead(b []byte) ([]byte, error) {
	start := len(b)
	for _, part := range [...][]byte{r.Method, r.Target, r.Host} {
		if len(part) == 0 || bytes.IndexByte(part, ' ') >= 0 {
			return b, errUnwritable
		}
	}
	b = h1.AppendRequestLine(b, r.Method, r.Target)
	b = h1.AppendField(b, "Host", r.Host)
	lines := 2
	var announced []byte
	for i := range r.Fields {
		f := &r.Fields[i]
		if f.ID.Hop() {
			if f.ID == message.Trailer && announced == nil {
				announced = f.Value
			}
			continue
		}
		b = h1.AppendField(b, f.Name, f.Value)
		lines++
	}
	switch {
	case r.Body == nil && !r.HasLength:
	case r.Body == nil || r.Length >= 0:
		b = h1.AppendLength(b, r.Length)
		lines++
	default:
		b = h1.AppendField(b, "Transfer-Encoding", "chunked")
		lines++
		if names := len(b); announced != nil {
			if b = appendAnnounced(b, announced); len(b) > names {
				lines++
			}
		}
	}
	if r.expects() {
		b = h1.AppendField(b, "Expect", "100-continue")
		lines++
	}
	switch {
	case r.Upgrade != nil:
		b = h1.AppendField(b, "Connection", "Upgrade")
		b = h1.AppendField(b, "Upgrade", r.Upgrade)
		lines += 2
	case r.TETrailers:
		b = h1.AppendField(b, "Connection", "TE")
		b = h1.AppendField(b, "TE", "trailers")
		lines += 2
	}
	b = append(b, "\r\n"...)
	if !hasLines(b[start:], lines+1) {
		return b, errUnwritable
	}
	return b, nil
}

// expects: the instance is asked whether it wants the body.
func (r *Outgoing) expects() bool {
	if !r.Expect || r.Body == nil {
		return false
	}
	_, whole := r.buffered()
	return !whole
}

// hasLines: b is that many lines, each with its proper end, and nothing in them
// may end a line for anybody.
func hasLines(b []byte, n int) bool {
	return bytes.Count(b, []byte{'\n'}) == n && bytes.Count(b, []byte{'\r'}) == n && bytes.IndexByte(b, 0) < 0
}

// appendAnnounced writes the names of trailer fields that may be some.
func appendAnnounced(b, names []byte) []byte {
	sep := "Trailer: "
	for item := range bytes.SplitSeq(names, []byte{','}) {
		if name := message.Trim(item); message.ValidToken(name) && message.Lookup(name).InTrailer() {
			b = append(b, sep...)
			b = append(b, name...)
			sep = ", "
		}
	}
	if sep == ", " {
		b = append(b, "\r\n"...)
	}
	return b
}

// appendBody appends a whole body in its framing.
func (r *Outgoing) appendBody(b, body []byte) ([]byte, error) {
	if r.Length >= 0 {
		if int64(len(body)) != r.Length {
			return b, r.errLength()
		}
		return append(b, body...), nil
	}
	if len(body) > 0 {
		b = h1.AppendChunkHeader(b, len(body))
		b = append(b, body...)
		b = append(b, "\r\n"...)
	}
	b, err := appendEnd(b, r.Body.Trailer())
	if err != nil {
		return b, &BodyError{Err: err}
	}
	return b, nil
}

func (r *Outgoing) errLength() *BodyError {
	return &BodyError{Err: fmt.Errorf("its length is not the %d bytes announced", r.Length)}
}

// appendEnd appends the last chunk and the trailer.
func appendEnd(b []byte, trailer []message.Field) ([]byte, error) {
	start, lines := len(b), 2
	for i := range trailer {
		if trailer[i].ID.InTrailer() {
			lines++
		}
	}
	if b = h1.AppendLastChunk(b, trailer); !hasLines(b[start:], lines) {
		return b, errUnwritable
	}
	return b, nil
}

// idempotent: sending it twice is as good as once.
func idempotent(method []byte) bool {
	switch string(method) {
	case "GET", "HEAD", "OPTIONS", "PUT", "DELETE":
		return true
	}
	return false
}

// requests are buffers for what is written at once; one that grew over maxKept is
// not kept.
var requests = sync.Pool{New: func() any { b := make([]byte, 0, 2<<10); return &b }}

const maxKept = 64 << 10

func putRequest(buf *[]byte, b []byte) {
	if cap(b) <= maxKept {
		*buf = b[:0]
		requests.Put(buf)
	}
}
