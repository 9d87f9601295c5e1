package h1

import (
	"errors"
	"io"
	"net"
	"net/http"
	"os"
	"sync"
	"sync/atomic"

	"tako/internal/proxy/eventloop"
	"tako/internal/proxy/message"
)

// SplicePiece is what is spliced to a client at once: it has message.Limits.Write
// to read as much.
const SplicePiece = 256 << 10

// What a handler may see beside the errors of message.Exchange.
var (
	errStopped     = errors.New("nobody wants the rest of the body")
	errInterrupted = errors.New("the exchange was interrupted")
	errOrder       = errors.New("the answer is not at this")
	errAnswerOver  = errors.New("the answer is longer than its head said")
	errAnswerShort = errors.New("the answer is shorter than its head said")
)

// framing of the body of an answer.
type mode uint8

const (
	noBody mode = iota // what is written is thrown away
	counted
	inChunks
	untilClose
)

// exchange is what a conn needs only from a request's first byte to its answer's
// last.
type exchange struct {
	head    RequestHead
	out     *Buffer // what is kept back; its B has the length of that
	limited io.LimitedReader

	// Of the handler's goroutine.
	state

	// Of ReadBody's.
	chunks       ChunkReader
	body         *Buffer // what was read of chunks, bodyR to bodyW unused
	bodyR, bodyW int
	data         []byte // of a chunk, unused
	left         int64  // of a counted body
	bodyErr      error
	touched      bool

	bodyDone atomic.Bool // all of it was taken
}

type state struct {
	mode    mode
	more    int64 // bytes that a counted answer is to have yet
	begun   bool
	ended   bool // whole, and sent
	aborted bool
	closing bool  // the answer says, or means, that the connection ends
	tunnel  bool  // it is a stream
	waiting bool  // guarded by conn.sending: the client waits for a 100
	leak    bool  // somebody may have views for ever
	err     error // of the first write that failed
}

var exchanges = sync.Pool{New: func() any {
	return &exchange{head: RequestHead{Request: message.Request{Fields: make([]message.Field, 0, 32)}}}
}}

// free gives everything back.
func (x *exchange) free() {
	clear(x.head.Fields)
	x.head.Reset()
	x.limited = io.LimitedReader{}
	x.data, x.bodyErr = nil, nil
	if x.body != nil {
		Put(x.body)
		x.body = nil
	}
	x.leaveOut()
	x.chunks.Reset()
	exchanges.Put(x)
}

// takeOut returns the empty out, with room for n bytes.
func (x *exchange) takeOut(n int) []byte {
	if x.out != nil && cap(x.out.B) < n {
		x.leaveOut()
	}
	if x.out == nil {
		x.out = Get(max(n, OutBuffer))
		x.out.B = x.out.B[:0]
	}
	return x.out.B[:0]
}

// leaveOut gives out back, which is empty.
func (x *exchange) leaveOut() {
	if x.out != nil {
		Put(x.out)
		x.out = nil
	}
}

// begin makes everything ready for the exchange of the head that was read.
func (c *conn) begin() {
	x := c.x
	x.state = state{waiting: x.head.Expect}
	x.left = 0
	if !x.head.Chunked {
		x.left = x.head.Length
	}
	x.data, x.bodyErr, x.touched = nil, nil, false
	x.bodyR, x.bodyW = 0, 0
	x.bodyDone.Store(x.head.Length == 0)
	if x.head.Length != 0 {
		if x.head.Chunked {
			x.chunks.Reset()
		}
		c.bodyWaited.Store(0)
		c.bodyBytes.Store(0)
		c.late.Store(false)
		c.stopped.Store(false)
	}
	if x.out != nil {
		x.out.B = x.out.B[:0]
	}
}

// Request returns the head.
func (c *conn) Request() *message.Request { return &c.x.head.Request }

// Task returns the task of an event loop that answers the request, nil elsewhere.
func (c *conn) Task() *eventloop.Task { return c.task }

// Client returns what Serve was told.
func (c *conn) Client() *message.Client { return c.client }

// ReadBody implements message.Exchange.
func (c *conn) ReadBody(p []byte) (int, error) {
	x := c.x
	if x.bodyErr != nil || len(p) == 0 {
		return 0, x.bodyErr
	}
	x.touched = true
	var n int
	var err error
	switch {
	case x.bodyDone.Load():
		err = io.EOF
	case c.stopped.Load():
		err = errStopped
	case x.head.Chunked:
		n, err = c.readChunks(p)
	default:
		n, err = c.readCounted(p)
	}
	if err != nil {
		x.bodyErr = err
	}
	return n, err
}

func (c *conn) readCounted(p []byte) (int, error) {
	x := c.x
	p = p[:min(int64(len(p)), x.left)]
	var err error
	n := copy(p, c.in.B[c.r:c.w])
	if c.r += n; n == 0 {
		n, err = c.readMore(p)
	}
	if x.left -= int64(n); x.left == 0 {
		x.bodyDone.Store(true)
	}
	return n, err
}

// readChunks returns what has come, and waits only if that is nothing.
func (c *conn) readChunks(p []byte) (int, error) {
	x := c.x
	total := 0
	for {
		n := copy(p[total:], x.data)
		x.data = x.data[n:]
		if total += n; total == len(p) && len(x.data) > 0 {
			return total, nil
		}
		var used int
		var done bool
		var err error
		switch {
		case c.r < c.w:
			x.data, used, done, err = x.chunks.Next(c.in.B[c.r:c.w])
			c.r += used
		case x.bodyR < x.bodyW:
			x.data, used, done, err = x.chunks.Next(x.body.B[x.bodyR:x.bodyW])
			x.bodyR += used
		case total > 0:
			return total, nil
		default:
			if total, err = c.readChunk(p); total > 0 {
				return total, nil
			}
		}
		if err != nil {
			if total > 0 {
				x.bodyErr = err
				return total, nil
			}
			return 0, err
		}
		if done {
			x.bodyDone.Store(true)
			if total == 0 {
				return 0, io.EOF
			}
			return total, nil
		}
	}
}

// readChunk reads from the connection: within a large chunk straight into p, else
// into body.
func (c *conn) readChunk(p []byte) (int, error) {
	x := c.x
	if direct := min(x.chunks.Left(), int64(len(p))); direct >= SmallBuffer {
		n, err := c.readMore(p[:direct])
		_, _, _, _ = x.chunks.Next(p[:n]) // all of it is data
		return n, err
	}
	if x.body == nil {
		x.body = Get(OutBuffer)
	}
	n, err := c.readMore(x.body.B)
	x.bodyR, x.bodyW = 0, n
	return 0, err
}

// readMore reads from the connection within a body.
func (c *conn) readMore(p []byte) (int, error) {
	if err := c.sayContinue(); err != nil {
		return 0, err
	}
	for {
		began := c.srv.clock.Load()
		c.reading.Store(began)
		if c.stopped.Load() {
			c.reading.Store(0)
			return 0, errStopped
		}
		n, err := c.read(p)
		c.reading.Store(0)
		c.bodyWaited.Add(c.srv.clock.Load() - began)
		c.bodyBytes.Add(int64(n))
		switch {
		case n > 0:
			return n, nil
		case err == nil:
		case errors.Is(err, io.EOF):
			return 0, io.ErrUnexpectedEOF
		case !isTimeout(err):
			return 0, err
		case c.interrupted.Load():
			return 0, errInterrupted
		case c.stopped.Load():
			return 0, errStopped
		case c.late.Load():
			return 0, os.ErrDeadlineExceeded
		default:
			c.rearm()
		}
	}
}

var continueLine = []byte("HTTP/1.1 100 Continue\r\n\r\n")

// sayContinue sends the 100 that the client waits for, unless an answer has begun.
func (c *conn) sayContinue() error {
	x := c.x
	if !x.head.Expect {
		return nil
	}
	c.sending.Lock()
	defer c.sending.Unlock()
	if !x.waiting {
		return nil
	}
	x.waiting = false
	return c.write(continueLine)
}

// Buffered implements message.Exchange.
func (c *conn) Buffered() ([]byte, bool) {
	x := c.x
	have := c.in.B[c.r:c.w]
	switch {
	case x.touched:
		return nil, false
	case x.bodyDone.Load():
		return nil, true
	case !x.head.Chunked:
		if int64(len(have)) < x.left {
			return nil, false
		}
		n := int(x.left)
		c.r, x.left = c.r+n, 0
		x.bodyDone.Store(true)
		return have[:n:n], true
	}
	var dry ChunkReader
	for in := have; ; {
		_, used, done, err := dry.Next(in)
		if err != nil || !done && used == len(in) {
			return nil, false
		}
		if in = in[used:]; done {
			break
		}
	}
	var whole []byte
	for n := 0; ; { // n bytes of data are at the beginning of have
		data, used, done, _ := x.chunks.Next(c.in.B[c.r:c.w])
		c.r += used
		switch n {
		case 0:
			whole = data // a single one stays where it is
		default:
			whole = append(whole, data...) // there is more room before the next than it needs
		}
		n += len(data)
		if done {
			x.bodyDone.Store(true)
			return whole[:n:n], true
		}
	}
}

// Trailer implements message.Exchange.
func (c *conn) Trailer() []message.Field {
	if !c.x.head.Chunked || !c.x.bodyDone.Load() {
		return nil
	}
	return c.x.chunks.Trailer()
}

// StopBody implements message.Exchange.
func (c *conn) StopBody() {
	c.stopped.Store(true)
	if c.reading.Load() != 0 {
		_ = c.sock.SetReadDeadline(past)
	}
}

// Inform implements message.Exchange. A client of HTTP/1.0 is told nothing.
func (c *conn) Inform(status int, fields []message.Field) error {
	x := c.x
	switch {
	case x.begun || status <= http.StatusSwitchingProtocols || status > 199:
		return errOrder
	case x.head.Minor == 0 || x.err != nil:
		return x.err
	}
	b := AppendStatusLine(x.takeOut(sizeOf(fields)), status)
	b = AppendFields(b, fields, true)
	b = append(b, "\r\n"...)
	if x.head.Expect {
		c.sending.Lock()
		defer c.sending.Unlock()
	}
	x.err = c.write(b)
	return x.err
}

// sizeOf bounds what a head of those fields takes.
func sizeOf(fields []message.Field) int {
	n := 512 // for the status line and what is added
	for i := range fields {
		n += len(fields[i].Name) + len(fields[i].Value) + len(": \r\n")
	}
	return n
}

// Begin implements message.Exchange.
func (c *conn) Begin(r *message.Response) error {
	x := c.x
	if x.begun || x.aborted || r.Status < http.StatusOK && (r.Status != http.StatusSwitchingProtocols || r.Upgrade == nil) {
		return errOrder
	}
	if x.head.Expect {
		c.sending.Lock()
		defer c.sending.Unlock()
	}
	x.begun = true
	// A client that waits for a 100 may send its body or not, and one that has much
	// to send would send it all before its next request.
	unread := !x.bodyDone.Load()
	x.closing = x.head.Close || c.srv.draining.Load() || unread && (x.waiting || x.head.Chunked || x.head.Length > c.srv.Limits.DrainBytes)
	x.waiting = false

	b := AppendStatusLine(x.takeOut(sizeOf(r.Fields)+len(r.Upgrade)), r.Status)
	b = AppendFields(b, r.Fields, r.Nominates)
	if r.Get(message.Date) == nil {
		b = append(b, *c.srv.date.Load()...)
	}
	switch {
	case r.Status == http.StatusSwitchingProtocols:
		x.closing = true
		b = AppendField(b, "Connection", "Upgrade")
		b = AppendField(b, "Upgrade", r.Upgrade)
		x.out.B = append(b, "\r\n"...)
		return nil
	case !message.HasBody(x.head.Method, r.Status):
		if r.HasLength && r.Length >= 0 && r.Status != http.StatusNoContent {
			b = AppendLength(b, r.Length)
		}
	case r.Length >= 0:
		x.mode, x.more = counted, r.Length
		b = AppendLength(b, r.Length)
	case x.head.Minor > 0:
		x.mode = inChunks
		b = append(b, "Transfer-Encoding: chunked\r\n"...)
		for i := range r.Fields {
			if r.Fields[i].ID == message.Trailer {
				b = AppendField(b, "Trailer", r.Fields[i].Value)
			}
		}
	default:
		x.mode, x.closing = untilClose, true
	}
	switch {
	case x.closing:
		b = append(b, "Connection: close\r\n"...)
	case x.head.Minor == 0:
		b = append(b, "Connection: keep-alive\r\n"...)
	}
	x.out.B = append(b, "\r\n"...)
	return nil
}

// Write implements message.Exchange.
func (c *conn) Write(p []byte) (int, error) {
	x := c.x
	switch {
	case x.err != nil:
		return 0, x.err
	case !x.begun || x.ended || x.aborted || x.tunnel:
		return 0, errOrder
	case len(p) == 0:
		return 0, nil
	case x.out == nil:
		x.takeOut(0)
	}
	switch x.mode {
	case noBody:
		return len(p), nil
	case counted:
		if int64(len(p)) > x.more {
			x.aborted, x.err = true, errAnswerOver
			return 0, x.err
		}
		x.more -= int64(len(p))
	case inChunks:
		if x.err = c.room(len("ffffffffffffffff\r\n")); x.err != nil {
			return 0, x.err
		}
		x.out.B = AppendChunkHeader(x.out.B, len(p))
	case untilClose:
	}
	if x.err = c.put(p); x.err != nil {
		return 0, x.err
	}
	if x.mode == inChunks {
		if x.err = c.room(len("\r\n")); x.err != nil {
			return 0, x.err
		}
		x.out.B = append(x.out.B, "\r\n"...)
	}
	return len(p), nil
}

// room sees to it that n bytes, of which there are few, can be appended to out.
func (c *conn) room(n int) error {
	if out := c.x.out.B; cap(out)-len(out) >= n {
		return nil
	}
	return c.flush()
}

// put appends p to out, and sends what does not fit.
func (c *conn) put(p []byte) error {
	x := c.x
	free := cap(x.out.B) - len(x.out.B)
	if len(p) > free && len(x.out.B) > 0 {
		x.out.B = append(x.out.B, p[:free]...)
		p = p[free:]
		if err := c.flush(); err != nil {
			return err
		}
		free = cap(x.out.B)
	}
	if len(p) > free {
		return c.write(p)
	}
	x.out.B = append(x.out.B, p...)
	return nil
}

// flush sends what was kept back.
func (c *conn) flush() error {
	x := c.x
	if x.out == nil || len(x.out.B) == 0 {
		return nil
	}
	err := c.write(x.out.B)
	x.out.B = x.out.B[:0]
	return err
}

// Flush implements message.Exchange. A stream keeps no memory for what it sends.
func (c *conn) Flush() error {
	x := c.x
	switch {
	case x.err != nil:
		return x.err
	case !x.begun || x.aborted:
		return errOrder
	}
	if x.err = c.flush(); c.lasts.Load() { // it may be long till the next Write
		x.leaveOut()
	}
	return x.err
}

// CanSplice implements message.Splicer.
func (c *conn) CanSplice() bool {
	return (c.tcp != nil || c.loop != nil && !c.secure()) && c.x.mode == counted
}

// SpliceFrom implements message.Splicer.
func (c *conn) SpliceFrom(src net.Conn, n int64) (int64, error) {
	x := c.x
	switch {
	case !c.CanSplice():
		return 0, errors.ErrUnsupported
	case x.err != nil:
		return 0, x.err
	case !x.begun || x.ended || x.aborted:
		return 0, errOrder
	case n > x.more:
		x.aborted, x.err = true, errAnswerOver
		return 0, x.err
	}
	if x.err = c.flush(); x.err != nil {
		return 0, x.err
	}
	moved := int64(0)
	for moved < n && x.err == nil {
		piece := min(n-moved, SplicePiece)
		c.splicing.Store(true)
		c.writing.Store(c.srv.clock.Load())
		m, err := c.splice(src, piece)
		c.writing.Store(0)
		c.splicing.Store(false)
		moved += m
		if x.err = err; err == nil && m < piece {
			x.err = io.ErrUnexpectedEOF
		}
	}
	x.more -= moved
	return moved, x.err
}

// splice moves up to n bytes, and fewer only if it fails or src has ended.
func (c *conn) splice(src net.Conn, n int64) (int64, error) {
	to := io.Writer(c.loop)
	if c.loop == nil {
		to = c.tcp
	} else if on, ok := src.(*eventloop.Conn); ok {
		if moved, err := c.loop.Splice(on, n); !errors.Is(err, eventloop.ErrNoPipe) {
			return moved, err
		}
	}
	x := c.x
	x.limited = io.LimitedReader{R: src, N: n}
	defer func() { x.limited.R = nil }()
	return io.Copy(to, &x.limited)
}

// End implements message.Exchange.
func (c *conn) End(trailer []message.Field) error {
	x := c.x
	switch {
	case x.err != nil:
		return x.err
	case !x.begun || x.ended || x.aborted || x.tunnel:
		return errOrder
	case x.mode == counted && x.more > 0:
		x.aborted, x.err = true, errAnswerShort
		return x.err
	case x.mode == inChunks:
		if size := sizeOf(trailer); x.out == nil || cap(x.out.B)-len(x.out.B) < size {
			if x.err = c.flush(); x.err != nil {
				return x.err
			}
			x.takeOut(size)
		}
		x.out.B = AppendLastChunk(x.out.B, trailer)
	}
	x.err = c.flush()
	x.ended = x.err == nil
	return x.err
}

// Abort implements message.Exchange.
func (c *conn) Abort() { c.x.aborted = true }

// Lasts implements message.Exchange.
func (c *conn) Lasts() { c.lasts.Store(true) }

// Watch implements message.Exchange.
func (c *conn) Watch(w message.Watcher) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.watcher = w
	c.watch++
	if w == nil || !c.gone {
		return
	}
	watch := c.watch
	go func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		if c.watch == watch { // else w was taken off
			w.ClientGone()
			c.watcher = nil
		}
	}()
}

// leave is after the handler.
func (c *conn) leave() {
	c.mu.Lock()
	c.watcher, c.gone = nil, false
	c.watch++
	c.mu.Unlock()
	if c.lasts.Load() {
		c.lasts.Store(false)
	}
}

// Interrupt implements message.Exchange.
func (c *conn) Interrupt() {
	c.interrupted.Store(true)
	_ = c.sock.SetDeadline(past)
}

// Tunnel implements message.Exchange.
func (c *conn) Tunnel() (message.Stream, error) {
	x := c.x
	if !x.begun || x.head.Upgrade == nil || !x.closing || x.mode != noBody || x.ended || x.aborted || x.tunnel {
		return nil, errOrder
	}
	if err := c.Flush(); err != nil {
		return nil, err
	}
	x.leaveOut()
	x.tunnel = true
	c.phase.store(tunneling, c.srv.clock.Load())
	c.rearm() // a deadline may have been meant for one that waits
	return (*stream)(c), nil
}

// stream is a conn whose bytes are no longer HTTP.
type stream conn

// Read returns first what came with the request.
func (s *stream) Read(p []byte) (int, error) {
	if s.r < s.w {
		n := copy(p, s.in.B[s.r:s.w])
		s.r += n
		return n, nil
	}
	return s.nc.Read(p)
}

func (s *stream) Write(p []byte) (int, error) {
	s.writing.Store(s.srv.clock.Load())
	n, err := s.nc.Write(p)
	s.writing.Store(0)
	return n, err
}

func (s *stream) CloseWrite() error {
	if err := closeWrite(s.nc); err != nil || !(*conn)(s).secure() {
		return err
	}
	return closeWrite(s.sock.Conn)
}

// Close may come twice.
func (s *stream) Close() error { return s.nc.Close() }
