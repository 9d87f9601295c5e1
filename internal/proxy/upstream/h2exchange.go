package upstream

import (
	"bytes"
	"context"
	"errors"
	"io"
	"maps"
	"net/http"
	"net/http/httptrace"
	"net/textproto"
	"net/url"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/net/http2"

	"tako/internal/proxy/message"
)

// authority stands for the instance where net/http wants an address.
const authority = "instance"

// h2exchange is one request and its answer on an H2CPool's connection.
type h2exchange struct {
	pool *H2CPool
	conn *h2conn
	in   *Incoming
	ctx  context.Context
	end  context.CancelCauseFunc
	body *h2body // nil without one
	resp *http.Response
	// interims has what is to be passed on; the trace of a request is called by the
	// goroutine that reads for all, and must not wait for a client.
	interims chan interim
	tooMany  bool // set by the trace before the exchange fails for it
	mu       sync.Mutex
}

type interim struct {
	status int
	fields []message.Field
}

func newH2Exchange(p *H2CPool, h *h2conn, in *Incoming) *h2exchange {
	x := &h2exchange{pool: p, conn: h, in: in}
	x.ctx, x.end = context.WithCancelCause(in.c.Context())
	if in.out.Body != nil {
		x.body = newH2Body(x, in.out)
	}
	return x
}

// run sends the request and waits for the head of the answer.
func (x *h2exchange) run() error {
	if _, err := x.in.out.appendHead(nil); err != nil {
		x.conn.Release()
		return err
	}
	x.interims = make(chan interim, MaxInterim)
	req := x.request()
	type result struct {
		resp *http.Response
		err  error
	}
	var got result
	if inform := x.in.out.Inform; inform == nil {
		got.resp, got.err = x.conn.RoundTrip(req) //nolint:bodyclose // release does
	} else {
		done := make(chan result, 1)
		go func() {
			resp, err := x.conn.RoundTrip(req) //nolint:bodyclose // release does
			done <- result{resp, err}
		}()
		for waiting := true; waiting; {
			select {
			case i := <-x.interims:
				inform(i.status, i.fields)
			case got = <-done:
				waiting = false
			}
		}
		for len(x.interims) > 0 {
			i := <-x.interims
			inform(i.status, i.fields)
		}
	}
	if got.err != nil {
		return got.err
	}
	x.resp = got.resp
	x.begin()
	return nil
}

// request makes net/http's request.
func (x *h2exchange) request() *http.Request {
	r := x.in.out
	host := string(r.Host)
	req := &http.Request{
		Method: string(r.Method), Host: host, Header: make(http.Header, len(r.Fields)+2),
		// In this form the target goes out byte by byte as it is.
		URL: &url.URL{Scheme: "http", Host: authority, Opaque: "//" + host + string(r.Target)},
	}
	for i := range r.Fields {
		if f := &r.Fields[i]; !f.ID.Hop() {
			req.Header.Add(string(f.Name), string(f.Value))
		}
	}
	if req.Header["User-Agent"] == nil {
		req.Header["User-Agent"] = nil // or net/http would name itself
	}
	if r.TETrailers {
		req.Header["Te"] = []string{"trailers"}
	}
	if r.expects() {
		req.Header["Expect"] = []string{"100-continue"}
	}
	if x.body != nil {
		req.Body, req.ContentLength = x.body, r.Length
		if r.Length < 0 {
			x.body.announce()
			req.Trailer = x.body.trailer
		}
	}
	// The trace may be called once more after the exchange, when r is another's.
	n, informs := 0, r.Inform != nil
	trace := &httptrace.ClientTrace{Got1xxResponse: func(status int, h textproto.MIMEHeader) error {
		if n++; n > MaxInterim {
			x.mu.Lock()
			defer x.mu.Unlock()
			x.tooMany = true
			return errInterims
		}
		if status == http.StatusEarlyHints && informs {
			x.interims <- interim{status, fieldsOf(http.Header(h))}
		}
		return nil
	}}
	return req.WithContext(httptrace.WithClientTrace(x.ctx, trace))
}

// fieldsOf makes fields of a header, those about the hop left out.
func fieldsOf(h http.Header) []message.Field {
	fields := make([]message.Field, 0, len(h))
	for _, name := range slices.Sorted(maps.Keys(h)) {
		id := message.Lookup([]byte(name))
		if id.Hop() {
			continue
		}
		for _, v := range h[name] {
			fields = append(fields, message.Field{Name: []byte(name), Value: []byte(v), ID: id})
		}
	}
	return fields
}

// begin makes the answer ready for its reader.
func (x *h2exchange) begin() {
	in, resp := x.in, x.resp
	in.x = x
	in.Status = resp.StatusCode
	in.Fields = fieldsOf(resp.Header)
	if len(resp.Trailer) > 0 {
		names := strings.Join(slices.Sorted(maps.Keys(resp.Trailer)), ", ")
		in.Fields = append(in.Fields, message.Field{Name: []byte("Trailer"), Value: []byte(names), ID: message.Trailer})
	}
	in.Length, in.HasLength = resp.ContentLength, resp.Header["Content-Length"] != nil
	in.Unsent = x.body != nil && !x.body.isComplete()
	in.over = !message.HasBody(in.out.Method, in.Status) || resp.ContentLength == 0
	if in.over {
		in.release(true)
	}
}

// read is Incoming.Read.
func (x *h2exchange) read(p []byte) (int, error) {
	n, err := x.resp.Body.Read(p)
	if n > 0 || err == nil {
		return n, nil // an error will come again
	}
	if err != io.EOF {
		return 0, x.in.broken(x.because(err))
	}
	for _, f := range fieldsOf(x.resp.Trailer) {
		if f.ID.InTrailer() {
			x.in.trailer = append(x.in.trailer, f)
		}
	}
	x.in.over = true
	x.in.release(true)
	return 0, io.EOF
}

// because returns what the exchange was ended for, or err.
func (x *h2exchange) because(err error) error {
	if cause := context.Cause(x.ctx); cause != nil {
		return cause
	}
	return err
}

// release ends the exchange; the connection goes on.
func (x *h2exchange) release() {
	if x.resp != nil {
		_ = x.resp.Body.Close()
	}
	x.body.stop()
	x.end(errClosed)
	x.pool.put(x.conn)
}

// fail ends an exchange without an answer, and says why, and whether the instance
// said that it did not look at the request.
func (x *h2exchange) fail(err error) (why error, unseen bool) {
	ended, bodyErr := x.in.c.Cause(), x.body.failure()
	err = x.because(err)
	x.release()
	x.body.join()
	x.in.Close()
	x.mu.Lock()
	defer x.mu.Unlock()
	again := !x.body.touched()
	_, reset := errors.AsType[http2.StreamError](err)
	switch {
	case bodyErr != nil:
		return bodyErr, false
	case ended != nil:
		return ended, false
	case x.tooMany:
		return errInterims, false
	case isTimeout(err), errors.Is(err, ErrTimeout):
		return ErrTimeout, false
	case isUnseen(err):
		return &LostError{Err: err, Repeatable: again}, true
	case reset, errors.Is(err, errUnwritable):
		return err, false
	}
	return x.in.out.lose(err, !again), false
}

// isUnseen: the instance has promised that it did not act upon the request
// (RFC 9113, 8.7), or never got it. Where net/http has no type, its words tell; a
// test shows that they still do.
func isUnseen(err error) bool {
	if reset, is := errors.AsType[http2.StreamError](err); is {
		return reset.Code == http2.ErrCodeRefusedStream
	}
	switch s := err.Error(); s {
	case "http2: Transport received Server's graceful shutdown GOAWAY", "http2: client conn not usable", "http2: client conn could not be established":
		return true
	}
	return false
}

// h2body is the body of a request as net/http reads it. The nil one is none.
type h2body struct {
	x       *h2exchange
	r       *Outgoing
	whole   *bytes.Reader // of a body that has come already, or nil
	left    int64
	trailer http.Header // filled at the end
	stuck   *time.Timer // since the instance took something of it

	mu       sync.Mutex
	idle     sync.Cond // not reading
	reading  bool
	stopped  bool
	began    bool
	complete bool
	err      *BodyError
}

func newH2Body(x *h2exchange, r *Outgoing) *h2body {
	b := &h2body{x: x, r: r, left: r.Length, trailer: make(http.Header)}
	b.idle.L = &b.mu
	if whole, is := r.buffered(); is {
		b.whole = bytes.NewReader(whole)
	}
	b.stuck = time.AfterFunc(time.Hour, func() { x.end(ErrTimeout) })
	b.stuck.Stop()
	return b
}

// Read reads for net/http, which calls it when it has sent what it got before.
func (b *h2body) Read(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.stopped || b.err != nil {
		return 0, errClosed
	}
	b.stuck.Stop()
	b.reading, b.began = true, true
	b.mu.Unlock()
	n, err := b.from(p)
	b.mu.Lock()
	b.reading = false
	b.idle.Broadcast()
	if err != nil && b.stopped {
		return 0, errClosed // which is why it failed, maybe
	}
	if err != nil && err != io.EOF { //nolint:errorlint // the body returns it bare
		b.err = &BodyError{Err: err}
		return 0, b.err
	}
	if b.r.Length >= 0 {
		if b.left -= int64(n); b.left < 0 || err != nil && b.left > 0 {
			b.err = b.r.errLength()
			return 0, b.err
		}
		if b.left == 0 {
			err = io.EOF
		}
	}
	if err != nil {
		b.complete = true
		if b.r.Length < 0 {
			for _, f := range b.r.Body.Trailer() {
				if f.ID.InTrailer() {
					b.trailer.Add(string(f.Name), string(f.Value))
				}
			}
		}
	}
	if !b.stopped {
		b.stuck.Reset(WriteTime)
	}
	return n, err
}

// announce names the fields of the trailer that are known before it comes.
func (b *h2body) announce() {
	names := [][]byte{}
	if b.whole != nil {
		for _, f := range b.r.Body.Trailer() {
			names = append(names, f.Name)
		}
	}
	for i := range b.r.Fields {
		if f := &b.r.Fields[i]; f.ID == message.Trailer {
			names = append(names, bytes.Split(f.Value, []byte{','})...)
		}
	}
	for _, name := range names {
		if name = message.Trim(name); message.ValidToken(name) && message.Lookup(name).InTrailer() {
			b.trailer[http.CanonicalHeaderKey(string(name))] = nil
		}
	}
}

func (b *h2body) from(p []byte) (int, error) {
	if b.whole != nil {
		return b.whole.Read(p)
	}
	return b.r.Body.ReadBody(p)
}

// Close is called by net/http when it is done with the body.
func (b *h2body) Close() error {
	b.stop()
	return nil
}

// stop lets reading end soon, and not begin again.
func (b *h2body) stop() {
	if b == nil {
		return
	}
	b.mu.Lock()
	b.stuck.Stop()
	first := !b.stopped
	b.stopped = true
	unread := b.began && !b.complete && b.whole == nil
	b.mu.Unlock()
	if first && unread {
		b.r.Body.StopBody()
	}
}

// join waits for the end of the last Read.
func (b *h2body) join() {
	if b == nil {
		return
	}
	b.stop()
	b.mu.Lock()
	defer b.mu.Unlock()
	for b.reading {
		b.idle.Wait()
	}
}

func (b *h2body) isComplete() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.complete
}

// failure returns what was wrong with the body, nil if nothing was.
func (b *h2body) failure() *BodyError {
	if b == nil {
		return nil
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.err
}

// touched: something was read of a body that cannot be read again.
func (b *h2body) touched() bool {
	if b == nil || b.whole != nil {
		return false
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.began
}
