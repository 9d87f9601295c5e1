package upstream

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"time"

	"tako/internal/proxy/h1"
	"tako/internal/proxy/message"
)

// addedFields is the room for what the reader of an answer adds to its fields.
const addedFields = 4

// MaxInterim bounds the 1xx answers before the answer.
const MaxInterim = 16

var (
	errInterims = fmt.Errorf("the instance sent more than %d interim answers", MaxInterim)
	errSwitched = errors.New("the instance switched protocols unasked")
)

// RoundTrip sends the request and returns its answer once the head has come. The
// errors: a DialError, a BodyError, a LostError, ErrTimeout, what c was ended
// with, and others for an answer that is broken. What a connection that was used
// before has lost is sent once more on a fresh one, if it may be repeated and was
// not before: of all pools that r is sent by, the first to lose it has that chance.
//
// The answer is to be closed, and r left alone till then. When c is ended
// meanwhile the connection is closed and reading fails with c's cause.
func (p *Pool) RoundTrip(c *Cancel, r *Outgoing) (*Incoming, error) {
	in := &r.in
	in.open(c, r)
	for fresh := false; ; {
		now := r.Task.Now()
		l, reused, err := p.get(c, r.Task, now, fresh)
		if err != nil {
			return nil, err
		}
		err = in.exchange(l, now, reused)
		if err == nil {
			return in, nil
		}
		if err == errStale { //nolint:errorlint // it is ours
			continue // nothing was sent
		}
		if lost, is := errors.AsType[*LostError](err); !is || !reused || !lost.Repeatable || r.Elsewhere || c.Cause() != nil {
			return nil, err
		}
		fresh = true
	}
}

// exchange sends the request on l and reads the head of the answer. On an error
// the connection is gone, and so is all that the exchange held. A link that was
// used before is looked at first, however short it was idle: what has come since
// would be taken for the answer.
func (in *Incoming) exchange(l *link, now time.Time, reused bool) error {
	if !in.c.attach(l.Conn) {
		l.pool.drop(l)
		return in.c.Cause()
	}
	in.l = l
	buf := requests.Get().(*[]byte)
	err := in.send((*buf)[:0], buf, now, reused)
	if err == nil {
		err = in.readHead()
	}
	if err == nil {
		err = in.begin()
	}
	if err == nil {
		return nil
	}
	return in.fail(err)
}

// send writes the request, or has its body written, and reads what comes first.
func (in *Incoming) send(b []byte, buf *[]byte, now time.Time, reused bool) error {
	r, l := in.out, in.l
	defer func() { putRequest(buf, b) }()
	b, err := r.appendHead(b)
	if err != nil {
		return err
	}
	var rest []byte
	whole := r.Body == nil
	if !whole {
		if rest, whole = r.buffered(); whole && len(rest) <= smallBody {
			b, err = r.appendBody(b, rest)
			rest = nil
		} else if whole && r.Length != int64(len(rest)) {
			rest, err = r.appendBody(nil, rest)
		}
		if err != nil {
			return err
		}
	}
	in.buf = h1.Get(h1.OutBuffer)
	l.arm(now)
	if whole && rest == nil {
		_, n, err := l.swap(b, in.buf.B, reused)
		in.end = n
		return reading(err)
	}
	if reused && !l.silent() {
		return errStale
	}
	if _, err := l.Write(b); err != nil {
		return fmt.Errorf("send the request: %w", err)
	}
	if whole {
		if _, err := l.Write(rest); err != nil {
			return fmt.Errorf("send the request: %w", err)
		}
		return nil
	}
	in.s = newSender(l, r)
	go in.s.run()
	return nil
}

func reading(err error) error {
	if err == nil || err == errStale { //nolint:errorlint // it is ours
		return err
	}
	if err == io.EOF { //nolint:errorlint // connections return it bare
		err = io.ErrUnexpectedEOF
	}
	return fmt.Errorf("read the answer: %w", err)
}

// fail ends an exchange without an answer, and says why.
func (in *Incoming) fail(err error) error {
	// Looked at before the sender is joined, which may itself make it fail.
	ended, bodyErr := in.c.Cause(), in.s.failure()
	began := in.had || in.end > 0
	s := in.s
	in.Close()
	if is, ok := errors.AsType[*BodyError](err); ok {
		bodyErr = is
	}
	switch {
	case bodyErr != nil:
		return bodyErr
	case ended != nil:
		return ended
	case err == errStale: //nolint:errorlint // it is ours
		return err
	case isTimeout(err):
		return ErrTimeout
	case errors.Is(err, errUnwritable), began:
		return err
	}
	return in.out.lose(err, s.touched())
}

// readHead reads until the head of the answer is whole, and sees to those that
// come before it.
func (in *Incoming) readHead() error {
	fresh := in.end > 0 // there are bytes that no look was taken at
	for interims := 0; ; {
		if fresh {
			n, err := h1.ParseResponse(in.buf.B[in.at:in.end], in.out.Method, &in.head)
			if err != nil {
				return err
			}
			if n > 0 {
				in.at += n
				if in.head.Status >= http.StatusOK || in.head.Status == http.StatusSwitchingProtocols {
					return nil
				}
				if interims++; interims > MaxInterim {
					return errInterims
				}
				in.interim()
				continue
			}
		}
		n, err := in.more()
		if err != nil {
			return err
		}
		// A head that comes byte by byte is not parsed anew for each.
		had := in.end
		in.end += n
		fresh = had == in.at || bytes.IndexByte(in.buf.B[had:in.end], '\n') >= 0
	}
}

// more reads more of a head, into a larger buffer if this one is full.
func (in *Incoming) more() (int, error) {
	if in.at > 0 { // views of what came before are over
		in.end = copy(in.buf.B, in.buf.B[in.at:in.end])
		in.at = 0
		in.had = true
	}
	if in.end == len(in.buf.B) {
		larger := h1.Get(min(4*len(in.buf.B), h1.MaxResponseHead))
		if len(larger.B) == in.end {
			h1.Put(larger)
			return 0, errLargeHead
		}
		copy(larger.B, in.buf.B)
		h1.Put(in.buf)
		in.buf = larger
	}
	n, err := in.l.Read(in.buf.B[in.end:])
	if n > 0 {
		return n, nil // an error will come again
	}
	return 0, reading(err)
}

var errLargeHead = fmt.Errorf("the answer's head is larger than %d bytes", h1.MaxResponseHead)

// interim sees to an answer before the answer.
func (in *Incoming) interim() {
	switch in.head.Status {
	case http.StatusContinue:
		in.s.letGo(true)
	case http.StatusEarlyHints:
		if in.out.Inform != nil {
			in.out.Inform(in.head.Status, in.head.Fields)
		}
	}
}

// begin makes the answer ready for its reader.
func (in *Incoming) begin() error {
	in.head.Fields = slices.Grow(in.head.Fields, addedFields) // which is kept from one answer to the next
	in.Response = in.head.Response
	in.Unsent = in.s.headCame()
	if in.Status == http.StatusSwitchingProtocols {
		return in.switchProtocols()
	}
	full := in.end == len(in.buf.B) // which is not to be seen once the chunks are off
	var err error
	switch {
	case !in.head.Body:
		in.how, in.over = bodyNone, true
		in.surplus = in.at < in.end
		in.end = in.at
	case in.head.Chunked:
		in.how = bodyChunked
		in.chunks.Reset()
		in.end, err = in.unchunk(in.buf.B[in.at:in.end])
		in.end += in.at
	case in.Length >= 0:
		in.how = bodyCounted
		have := int64(in.end - in.at)
		if in.surplus = have > in.Length; in.surplus {
			have = in.Length
			in.end = in.at + int(have)
		}
		in.left = in.Length - have
		in.over = in.left == 0
	default:
		in.how = bodyUntilClose
	}
	if err != nil {
		return err
	}
	if !in.over {
		in.l.unlimited()
		return nil
	}
	in.unsure = full
	in.release(true)
	return nil
}

// switchProtocols turns the exchange into a tunnel.
func (in *Incoming) switchProtocols() error {
	if in.out.Upgrade == nil || in.s != nil || in.Upgrade == nil || !bytes.EqualFold(in.Upgrade, in.out.Upgrade) {
		return errSwitched
	}
	l := in.l
	_ = l.SetDeadline(time.Time{})
	in.over, in.l = true, nil
	if !in.c.detach() {
		l.pool.drop(l)
		return in.c.Cause()
	}
	first := bytes.Clone(in.buf.B[in.at:in.end])
	in.end = in.at
	t := &Tunnel{conn: l.Conn, r: l.Conn, drop: func() { l.pool.drop(l) }}
	if len(first) > 0 {
		t.r = io.MultiReader(bytes.NewReader(first), l.Conn)
	}
	in.Tunnel = t
	return nil
}

var _ Body = message.Exchange(nil)
