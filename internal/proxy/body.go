package proxy

import (
	"context"
	"errors"
	"io"
	"math"

	"tako/internal/proxy/h1"
	"tako/internal/proxy/message"
	"tako/internal/proxy/upstream"
)

// errBodyTooLarge: the request has more of a body than the app takes.
var errBodyTooLarge = errors.New("the request's body is larger than the app takes")

// FirstPiece bounds what is read of a body before an instance is picked for its
// request, in bytes.
const FirstPiece = h1.SmallBuffer

// requestBody is the body of a request on its way to an instance: what came of it
// before one was picked, and then the rest. It says when all has come.
type requestBody struct {
	fl    *flight
	room  int64      // what the app takes yet, in bytes
	left  int64      // what is to come of its length, or message.Unknown
	first []byte     // what came before
	whole bool       // that is all
	buf   *h1.Buffer // of first, nil if that is the exchange's
}

// takeBody makes the request's body that of fl.out. If it has not come yet it
// waits for the beginning, so that nobody holds an instance who sends nothing. It
// does not wait for a client that wants to be told to go on, nor for a call that
// may stream, where the app may be the one who begins. The error is
// errBodyTooLarge, an *upstream.BodyError or fl's cause.
func (fl *flight) takeBody(conf *appConf) error {
	r, b := fl.x.Request(), &fl.body
	*b = requestBody{fl: fl, room: math.MaxInt64, left: r.Length}
	if conf.MaxBody > 0 {
		b.room = conf.MaxBody
	}
	if r.Length > b.room {
		return errBodyTooLarge
	}
	fl.out.Body = b
	if b.first, b.whole = fl.x.Buffered(); b.whole {
		if int64(len(b.first)) > b.room {
			return errBodyTooLarge
		}
		return nil
	}
	fl.out.Task.Detach() // its client may take its time
	if r.Expect || mayStream(r, conf) {
		return nil
	}
	b.buf = h1.Get(FirstPiece)
	stopped := make(chan struct{})
	stop := context.AfterFunc(fl.Context(), func() {
		defer close(stopped)
		fl.x.StopBody()
	})
	n, err := b.read(b.buf.B)
	if !stop() {
		<-stopped
	}
	if cause := fl.Cause(); cause != nil {
		return cause
	}
	last := err == io.EOF //nolint:errorlint // the body returns it bare
	if err != nil && !last {
		return &upstream.BodyError{Err: err}
	}
	b.first, b.whole = b.buf.B[:n], last || b.left == 0
	return nil
}

// read reads what comes next, and fails beyond the limit.
func (b *requestBody) read(p []byte) (int, error) {
	n, err := b.fl.x.ReadBody(p)
	if b.room -= int64(n); b.room < 0 {
		return 0, errBodyTooLarge
	}
	if b.left > 0 {
		b.left = max(0, b.left-int64(n))
	}
	if err == io.EOF || b.left == 0 { //nolint:errorlint // the body returns it bare
		b.fl.uploaded()
	}
	return n, err
}

// ReadBody implements upstream.Body.
func (b *requestBody) ReadBody(p []byte) (int, error) {
	switch {
	case len(b.first) > 0:
		n := copy(p, b.first)
		b.first = b.first[n:]
		return n, nil
	case b.whole:
		return 0, io.EOF
	}
	return b.read(p)
}

// Buffered implements upstream.Body.
func (b *requestBody) Buffered() ([]byte, bool) {
	if !b.whole {
		return nil, false
	}
	body := b.first
	b.first = nil
	return body, true
}

// StopBody implements upstream.Body.
func (b *requestBody) StopBody() { b.fl.x.StopBody() }

// Trailer implements upstream.Body.
func (b *requestBody) Trailer() []message.Field { return b.fl.x.Trailer() }

// close gives back what holds the beginning.
func (b *requestBody) close() {
	if b.buf != nil {
		h1.Put(b.buf)
	}
	*b = requestBody{}
}
