package upstream

import (
	"errors"
	"fmt"
	"io"
	"net"

	"tako/internal/proxy/h1"
	"tako/internal/proxy/message"
)

// SpliceOver is how much of a counted body must be outstanding for SpliceTo to
// be worth it, in bytes.
const SpliceOver = 64 << 10

// Incoming is an answer. It is part of its Outgoing: nothing of it may be used
// after Close. As soon as all of it has come and nothing else, the connection
// goes back to the pool, though the answer can still be read.
//
// It is one goroutine's; only its Cancel may be used by others.
type Incoming struct {
	message.Response
	// Unsent: the request's body was not read to its end when the answer came.
	Unsent bool
	// Tunnel is the connection after a 101, the caller's to close.
	Tunnel *Tunnel

	out  *Outgoing
	c    *Cancel
	l    *link       // nil once it was given back
	s    *sender     // nil without one
	x    *h2exchange // instead of l and s, over HTTP/2
	body *h2body     // of what was x
	head h1.ResponseHead
	buf  *h1.Buffer // head, and buf.B[at:end] of the body
	at   int
	end  int
	had  bool // something came, though at and end do not show it

	how     bodyKind
	left    int64 // of a counted body, not yet read from the connection
	chunks  h1.ChunkReader
	over    bool            // the body came whole
	surplus bool            // and more, or perhaps more
	unsure  bool            // whether more came was not seen
	trailer []message.Field // over HTTP/2
	err     error
}

type bodyKind uint8

const (
	bodyNone bodyKind = iota
	bodyCounted
	bodyChunked
	bodyUntilClose
)

// maxKeptFields bounds the room for fields that an Incoming keeps.
const maxKeptFields = 128

var (
	errClosed = errors.New("the answer is closed")
	errCutOff = fmt.Errorf("the answer ends before its end: %w", io.ErrUnexpectedEOF)
)

// open makes in ready for an exchange.
func (in *Incoming) open(c *Cancel, r *Outgoing) {
	if in.buf != nil {
		panic("upstream: a request is sent again whose answer was not closed")
	}
	in.out, in.c = r, c
	in.forget()
}

// forget forgets all that an exchange has found.
func (in *Incoming) forget() {
	in.Response, in.Unsent, in.Tunnel = message.Response{}, false, nil
	in.l, in.s, in.x, in.body, in.buf, in.trailer = nil, nil, nil, nil, nil, nil
	in.at, in.end, in.had = 0, 0, false
	in.how, in.left, in.over, in.surplus, in.unsure, in.err = bodyNone, 0, false, false, false, nil
}

// Whole reports whether all of the body has come. Then only Buffered has
// something yet, if anything.
func (in *Incoming) Whole() bool { return in.over && in.err == nil }

// Buffered returns, and takes, what has come of the body and was not read yet:
// a view, valid until Close.
func (in *Incoming) Buffered() []byte {
	if in.buf == nil {
		return nil
	}
	b := in.buf.B[in.at:in.end]
	in.at = in.end
	return b
}

// Rest returns how many bytes of the body are outstanding on the connection, what
// is Buffered apart, or message.Unknown, as ever where a connection is shared.
func (in *Incoming) Rest() int64 {
	switch {
	case in.over:
		return 0
	case in.how == bodyCounted:
		return in.left
	}
	return message.Unknown
}

// Read reads what comes next of the body, however long that takes: Cancel ends
// the wait. It returns io.EOF only at the end of a whole body.
func (in *Incoming) Read(p []byte) (int, error) {
	if n := in.end - in.at; n > 0 {
		n = copy(p, in.buf.B[in.at:in.end])
		in.at += n
		return n, nil
	}
	switch {
	case in.err != nil:
		return 0, in.err
	case in.over:
		return 0, io.EOF
	case len(p) == 0:
		return 0, nil
	case in.x != nil:
		return in.x.read(p)
	case in.l == nil:
		return 0, errClosed
	}
	n, err := in.read(p)
	if err != nil {
		return 0, in.broken(err)
	}
	if in.over {
		in.release(true)
		if n == 0 {
			return 0, io.EOF
		}
	}
	return n, nil
}

// read reads a piece of the body from the connection, or its end.
func (in *Incoming) read(p []byte) (int, error) {
	for {
		n, err := in.l.Read(p)
		if n == 0 && err != nil {
			if err == io.EOF && in.how == bodyUntilClose { //nolint:errorlint // connections return it bare
				in.over = true
				return 0, nil
			}
			if err == io.EOF { //nolint:errorlint // as above
				err = errCutOff
			}
			return 0, err
		}
		switch in.how {
		case bodyCounted:
			// What is one byte too much shows if there is room for it.
			in.unsure = int64(len(p)) == in.left
			if in.surplus = int64(n) > in.left; in.surplus {
				n = int(in.left)
			}
			in.left -= int64(n)
			in.over = in.left == 0
		case bodyChunked:
			in.unsure = n == len(p)
			if n, err = in.unchunk(p[:n]); err != nil {
				return 0, err
			}
		case bodyNone, bodyUntilClose:
		}
		if n > 0 || in.over {
			return n, nil
		}
	}
}

// unchunk takes the chunks off b where it stands, and returns how much is left.
func (in *Incoming) unchunk(b []byte) (n int, err error) {
	for rest := b; len(rest) > 0; {
		data, used, done, err := in.chunks.Next(rest)
		if err != nil {
			return 0, fmt.Errorf("read the answer: %w", err)
		}
		n += copy(b[n:], data)
		if rest = rest[used:]; done {
			in.over = true
			in.surplus = in.surplus || len(rest) > 0
			break
		}
	}
	return n, nil
}

// SpliceTo hands f the connection for the n bytes of a counted body that are
// outstanding, to be read there and then, and returns what f moved. Before, all
// that is Buffered must be taken. If f returns an error, or fewer bytes, the body
// has failed, and the connection is never used again.
func (in *Incoming) SpliceTo(f func(src net.Conn, n int64) (int64, error)) (int64, error) {
	switch {
	case in.err != nil:
		return 0, in.err
	case in.over:
		return 0, nil
	case in.l == nil:
		return 0, errClosed
	case in.how != bodyCounted || in.at < in.end:
		panic("upstream: splice of a body that has no length, or begins in a buffer")
	}
	n, err := f(in.l.Conn, in.left)
	if err == nil && n != in.left {
		err = errCutOff
	}
	if err != nil {
		return n, in.broken(err)
	}
	in.left, in.over, in.unsure = 0, true, true
	in.release(true)
	return n, nil
}

// broken ends a body that cannot be read to its end.
func (in *Incoming) broken(err error) error {
	if cause := in.c.Cause(); cause != nil {
		err = cause
	}
	in.err = err
	in.release(false)
	return err
}

// Trailer returns the fields after the body, once all of it has come. Fields
// about the hop are not among them.
func (in *Incoming) Trailer() []message.Field {
	if in.how == bodyChunked && in.over {
		return in.chunks.Trailer()
	}
	return in.trailer
}

// release gives the connection back if the answer came whole and all else is in
// order, and closes it if not.
func (in *Incoming) release(whole bool) {
	if x := in.x; x != nil {
		in.x, in.body = nil, x.body
		x.release()
		return
	}
	l := in.l
	if l == nil {
		return
	}
	in.l = nil
	fit := whole && in.s.settled() && !in.head.Close && !in.surplus && (!in.unsure || l.silent())
	if in.c.detach() && fit {
		l.pool.put(l, in.out.Task.Now())
		return
	}
	l.pool.drop(l)
}

// Close gives the connection back if that was not done, or closes it, and
// returns after the last ReadBody of the request's body. It may come twice. A
// Tunnel stays open.
func (in *Incoming) Close() {
	in.release(in.over)
	in.s.join()
	in.body.join()
	if cap(in.head.Fields) > maxKeptFields {
		in.head.Fields = nil
	}
	buf := in.buf
	in.forget()
	if buf != nil {
		h1.Put(buf)
	}
}
