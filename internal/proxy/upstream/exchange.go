package upstream

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/net/http/httpguts"
)

const copyBuffer = 32 << 10

// MaxHead bounds the head of an answer, in bytes, and all heads before it.
const MaxHead = 256 << 10

// A Request is what is to be sent. Header has end-to-end fields only: Do adds
// the framing, Host, and Connection and Upgrade for an upgrade.
type Request struct {
	Method string
	Target string // path and query, or "*"
	Host   string
	Header http.Header
	// Body is nil for none; ContentLength is its length, or -1 for one that is
	// sent in chunks. Without a body, ContentLength 0 is written only if
	// WriteZero.
	Body          io.Reader
	ContentLength int64
	WriteZero     bool
	// Trailer has the announced names; their values are read at the end of Body.
	Trailer http.Header
	// StopBody makes a blocked Read of Body return soon. It is called when the
	// answer is over before the body.
	StopBody func()
	// Upgrade is the protocol asked for, "" for none.
	Upgrade string
	// Expect holds the body back until the instance asks for it.
	Expect bool
	// Informational, if set, is told of 103 answers, before Do returns.
	Informational func(status int, h http.Header)
}

// A Response is an answer. Its Body must be closed; Close returns after the last
// Read of the request's body.
type Response struct {
	Status int
	Header http.Header
	// ContentLength is the length of Body, -1 if it is not known before its end.
	ContentLength int64
	// Body ends with io.EOF only if it is whole.
	Body io.ReadCloser
	// Trailer has the announced names; their values are there at the end of Body.
	Trailer http.Header
	// Unsent: the request's body was not read to its end when the answer came.
	Unsent bool
	// Tunnel is the connection after a 101, the caller's to close; Body is empty.
	Tunnel *Tunnel
}

// Do sends the request and returns the answer once its head has come. The
// errors: a DialError, a BodyError, a LostError, ErrTimeout, ctx's, and others
// for an answer that is broken. What a connection that was used before has lost
// is sent once more on a fresh one, if it may be repeated. When ctx ends later the connection is
// closed and Body fails.
func (p *Pool) Do(ctx context.Context, r *Request) (*Response, error) {
	buf := heads.Get().(*[]byte)
	defer heads.Put(buf)
	head, err := appendHead((*buf)[:0], r)
	if err != nil {
		return nil, err
	}
	if cap(head) <= maxKeptHead {
		*buf = head
	}
	c, reused, err := p.get(ctx, false, !repeatable(r.Method))
	if err != nil {
		return nil, err
	}
	x := &exchange{c: c, req: r}
	resp, err := x.run(ctx, head)
	if lost, is := errors.AsType[*LostError](err); is && reused && lost.Repeatable && ctx.Err() == nil {
		if c, _, err = p.get(ctx, true, false); err != nil {
			return nil, err
		}
		x = &exchange{c: c, req: r}
		resp, err = x.run(ctx, head)
	}
	return resp, err
}

// heads are buffers for heads of requests, of maxKeptHead at most.
var heads = sync.Pool{New: func() any { b := make([]byte, 0, 1<<10); return &b }}

const maxKeptHead = 16 << 10

// repeatable: sending it twice is as good as once.
func repeatable(method string) bool {
	switch method {
	case http.MethodGet, http.MethodHead, http.MethodOptions, http.MethodPut, http.MethodDelete:
		return true
	}
	return false
}

// appendHead serialises the request line and the fields. What could change the
// framing is refused, wherever it comes from.
func appendHead(b []byte, r *Request) ([]byte, error) {
	if !httpguts.ValidHeaderFieldName(r.Method) || !validTarget(r.Target) || !validTarget(r.Host) {
		return nil, fmt.Errorf("request %q %q for %q cannot be written", r.Method, r.Target, r.Host)
	}
	b = append(b, r.Method...)
	b = append(b, ' ')
	b = append(b, r.Target...)
	b = append(b, " HTTP/1.1\r\nHost: "...)
	b = append(b, r.Host...)
	b = append(b, "\r\n"...)
	for name, values := range r.Header {
		if !httpguts.ValidHeaderFieldName(name) {
			return nil, fmt.Errorf("field name %q cannot be written", name)
		}
		switch name {
		case "Host", "Content-Length", "Transfer-Encoding", "Connection", "Upgrade", "Trailer", "Expect":
			continue // ours to say
		}
		for _, v := range values {
			if !httpguts.ValidHeaderFieldValue(v) {
				return nil, fmt.Errorf("the value of field %s cannot be written", name)
			}
			b = appendField(b, name, v)
		}
	}
	switch {
	case r.Body == nil && r.WriteZero:
		b = appendField(b, "Content-Length", "0")
	case r.Body == nil:
	case r.ContentLength >= 0:
		b = appendField(b, "Content-Length", strconv.FormatInt(r.ContentLength, 10))
	default:
		b = appendField(b, "Transfer-Encoding", "chunked")
		if len(r.Trailer) > 0 {
			names := make([]string, 0, len(r.Trailer))
			for name := range r.Trailer {
				names = append(names, name)
			}
			b = appendField(b, "Trailer", strings.Join(names, ", "))
		}
	}
	if r.Body != nil && r.Expect {
		b = appendField(b, "Expect", "100-continue")
	}
	if r.Upgrade != "" {
		if !httpguts.ValidHeaderFieldValue(r.Upgrade) {
			return nil, fmt.Errorf("upgrade to %q cannot be written", r.Upgrade)
		}
		b = appendField(b, "Connection", "Upgrade")
		b = appendField(b, "Upgrade", r.Upgrade)
	}
	return append(b, "\r\n"...), nil
}

func appendField(b []byte, name, value string) []byte {
	b = append(b, name...)
	b = append(b, ": "...)
	b = append(b, value...)
	return append(b, "\r\n"...)
}

// validTarget: no byte that ends a word or a line.
func validTarget(s string) bool {
	if s == "" {
		return false
	}
	for i := range len(s) {
		if s[i] <= ' ' || s[i] == 0x7f {
			return false
		}
	}
	return true
}

// exchange is one request and its answer on one connection.
type exchange struct {
	c    *conn
	req  *Request
	stop func() bool // takes the watch of ctx off

	// Of the sender of the body; done is nil without a body.
	done     chan struct{}
	goOn     chan bool    // with Expect: send the body or not
	claim    atomic.Int32 // who came first: claimedToSend or claimedToStop
	complete atomic.Bool  // the body was read to its end
	sent     bool         // and written; after done
	bodyErr  atomic.Pointer[BodyError]

	mu      sync.Mutex // orders the setting of the read deadline
	hasHead bool       // guarded by mu

	closing bool // the instance closes after its answer
	once    sync.Once
}

func (x *exchange) bodyTouched() bool { return x.claim.Load() == claimedToSend }

// run sends the request and reads the head of the answer. On an error the
// connection is gone.
func (x *exchange) run(ctx context.Context, head []byte) (*Response, error) {
	c := x.c
	c.read = 0
	x.stop = context.AfterFunc(ctx, func() { _ = c.Close() })
	fail := func(err error) (*Response, error) {
		// Looked at before join, which may itself make the reading fail.
		ended, bodyErr := ctx.Err() != nil, x.bodyErr.Load()
		x.end(false)
		x.join()
		if ended && bodyErr == nil && errors.Is(context.Cause(ctx), context.Canceled) {
			bodyErr = x.bodyErr.Load() // a server may end ctx when reading fails
		}
		switch {
		case bodyErr != nil:
			return nil, bodyErr
		case ended:
			return nil, context.Cause(ctx)
		case isTimeout(err):
			return nil, ErrTimeout
		case c.read == 0:
			return nil, &LostError{Err: err, Repeatable: repeatable(x.req.Method) && !x.bodyTouched()}
		}
		return nil, err
	}
	_ = c.SetWriteDeadline(time.Now().Add(WriteTime)) // a closed connection shows at the write
	_, err := c.bw.Write(head)
	if err == nil {
		err = c.bw.Flush()
	}
	if err != nil {
		return fail(fmt.Errorf("send the request: %w", err))
	}
	if x.req.Body == nil {
		_ = c.SetReadDeadline(time.Now().Add(FirstByteTime))
	} else {
		_ = c.SetReadDeadline(time.Time{})
		x.done = make(chan struct{})
		if x.req.Expect {
			x.goOn = make(chan bool, 2)
		}
		go x.send()
	}

	c.head, c.inHead = MaxHead, true
	var resp *http.Response
	for {
		if resp, err = http.ReadResponse(c.br, &http.Request{Method: x.req.Method}); err != nil { //nolint:bodyclose // the caller closes it, or fail the connection
			return fail(fmt.Errorf("read the answer: %w", err))
		}
		if resp.StatusCode >= 200 || resp.StatusCode == http.StatusSwitchingProtocols {
			break
		}
		switch {
		case resp.StatusCode == http.StatusContinue:
			x.letGo(true)
		case resp.StatusCode == http.StatusEarlyHints && x.req.Informational != nil:
			x.req.Informational(resp.StatusCode, resp.Header)
		}
	}
	c.inHead = false
	x.letGo(false)
	x.mu.Lock()
	x.hasHead = true
	_ = c.SetReadDeadline(time.Time{})
	x.mu.Unlock()

	out := &Response{
		Status: resp.StatusCode, Header: resp.Header, ContentLength: resp.ContentLength,
		Trailer: resp.Trailer, Unsent: x.done != nil && !x.complete.Load(),
	}
	if resp.StatusCode == http.StatusSwitchingProtocols {
		if x.req.Upgrade == "" || !strings.EqualFold(resp.Header.Get("Upgrade"), x.req.Upgrade) || out.Unsent {
			return fail(errors.New("the instance switched protocols unasked"))
		}
		x.join()
		x.stop()
		_ = c.SetDeadline(time.Time{})
		out.Body, out.Tunnel = http.NoBody, &Tunnel{conn: c.Conn, r: c.br, drop: func() { c.pool.drop(c) }}
		return out, nil
	}
	x.closing = resp.Close
	out.Body = &body{x: x, rc: resp.Body}
	return out, nil
}

func (x *exchange) letGo(send bool) {
	if x.goOn != nil {
		select {
		case x.goOn <- send:
		default:
		}
	}
}

// join waits for the sender, which must not read the body any more.
func (x *exchange) join() {
	if x.done == nil {
		return
	}
	select {
	case <-x.done:
		return
	default:
	}
	stopped := x.claim.CompareAndSwap(0, claimedToStop)
	x.letGo(false)
	if !stopped && !x.complete.Load() && x.req.StopBody != nil {
		x.req.StopBody()
	}
	<-x.done
}

// end gives the connection back if whole says that the answer came whole and all
// else is in order, and closes it if not.
func (x *exchange) end(whole bool) {
	x.once.Do(func() {
		if whole && x.done != nil && x.complete.Load() {
			settled := time.NewTimer(settleTime)
			select {
			case <-x.done:
			case <-settled.C:
			}
			settled.Stop()
		}
		untouched := x.stop()
		if whole && untouched && !x.closing && x.settled() && x.c.br.Buffered() == 0 {
			x.c.pool.put(x.c)
			return
		}
		x.c.pool.drop(x.c)
	})
}

// settled: the request went out whole.
func (x *exchange) settled() bool {
	if x.done == nil {
		return true
	}
	select {
	case <-x.done:
		return x.sent
	default:
		return false
	}
}

var buffers = sync.Pool{New: func() any { b := make([]byte, copyBuffer); return &b }}

// send writes the body as it arrives.
func (x *exchange) send() {
	defer close(x.done)
	if x.goOn != nil {
		timer := time.NewTimer(ContinueTime)
		defer timer.Stop()
		select {
		case send := <-x.goOn:
			if !send {
				return
			}
		case <-timer.C:
		}
	}
	if !x.claim.CompareAndSwap(0, claimedToSend) {
		return
	}
	buf := buffers.Get().(*[]byte)
	defer buffers.Put(buf)
	left, chunked := x.req.ContentLength, x.req.ContentLength < 0
	for {
		n, err := x.req.Body.Read(*buf)
		if err != nil && err != io.EOF { // readers return it bare
			x.bodyErr.Store(&BodyError{Err: err})
			_ = x.c.Close() // the instance must not take what it got for the whole
			return
		}
		last := err != nil
		if !chunked {
			if left -= int64(n); left < 0 || last && left > 0 {
				x.bodyErr.Store(&BodyError{Err: fmt.Errorf("its length is not the %d bytes announced", x.req.ContentLength)})
				_ = x.c.Close()
				return
			}
			last = left == 0
		}
		if last {
			x.complete.Store(true)
		}
		if x.write((*buf)[:n], chunked, last) != nil {
			return // the answer, or its lack, will tell
		}
		if last {
			x.sent = true
			x.mu.Lock()
			if !x.hasHead {
				_ = x.c.SetReadDeadline(time.Now().Add(FirstByteTime))
			}
			x.mu.Unlock()
			return
		}
	}
}

// write writes one piece of the body and, after the last, what ends it.
func (x *exchange) write(b []byte, chunked, last bool) error {
	w := x.c.bw
	_ = x.c.SetWriteDeadline(time.Now().Add(WriteTime))
	if chunked && len(b) > 0 {
		_, _ = w.WriteString(strconv.FormatInt(int64(len(b)), 16)) // errors stick to w
		_, _ = w.WriteString("\r\n")
	}
	_, _ = w.Write(b)
	if chunked && len(b) > 0 {
		_, _ = w.WriteString("\r\n")
	}
	if chunked && last {
		_, _ = w.WriteString("0\r\n")
		writeTrailer(w, x.req.Trailer)
		_, _ = w.WriteString("\r\n")
	}
	return w.Flush()
}

func writeTrailer(w *bufio.Writer, trailer http.Header) {
	for name, values := range trailer {
		for _, v := range values {
			if httpguts.ValidTrailerHeader(name) && httpguts.ValidHeaderFieldName(name) && httpguts.ValidHeaderFieldValue(v) {
				_, _ = w.WriteString(name + ": " + v + "\r\n")
			}
		}
	}
}

// body is the body of an answer.
type body struct {
	x  *exchange
	rc io.ReadCloser
}

func (b *body) Read(p []byte) (int, error) {
	n, err := b.rc.Read(p)
	if err != nil {
		b.x.end(err == io.EOF) // readers return it bare
	}
	return n, err
}

func (b *body) Close() error {
	b.x.end(false)
	b.x.join()
	return nil
}
