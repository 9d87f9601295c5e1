package h2

import (
	"errors"
	"io"
	"net/http"
	"os"
	"runtime/debug"
	"sync"
	"time"

	"golang.org/x/net/http2"

	"tako/internal/proxy/message"
)

// stream is one request and its answer: a message.Exchange. But for id and what
// is of the head, all is guarded by the connection's mu. It is of use until its
// handler returns, or never begins; then it goes back to its pool.
type stream struct {
	c  *conn
	id uint32

	head    head
	request message.Request
	trailer *head // of the request, complete with clientEnded

	held        bool // its handler begins later
	working     bool // its handler has begun
	clientEnded bool // END_STREAM came
	stopped     error
	silent      bool // it was reset: no frame may be sent
	how         ending
	interrupted bool
	lasts       bool
	counted     bool // it counts no more against the limit of streams

	readable    sync.Cond
	body        queue
	view        *block // what Buffered gave out
	received    int64
	consumed    int64
	recvWindow  int64 // what the client may still send
	unacked     int64 // what was read of it
	grown       bool  // the window is StreamWindow
	continued   bool  // 100 was sent
	bodyStopped bool
	waitFrom    time.Duration // when the wait for the body that goes on began
	waited      time.Duration // in all before
	bodyLate    bool
	tunnelled   bool

	writable   sync.Cond
	begun      bool  // the head of the answer was appended
	hasBody    bool  // a body follows it
	left       int64 // what may come of it, Unknown for any
	ended      bool  // END_STREAM was appended
	finished   bool  // the answer is whole, or never will be
	kept       bool  // there are bytes in out that nobody was asked to write
	sendWindow int64
	waiting    bool // it is among waiters
	want       int
	granted    int
	stalled    time.Duration // when the wait for a window that goes on began
	writeLate  bool
	lastGen    uint64 // where the last frame stands in out
	lastAt     int

	watcher message.Watcher
	telling int // calls of watchers that are under way
}

var streams = sync.Pool{New: func() any { return new(stream) }}

func newStream(c *conn, id uint32) *stream {
	s := streams.Get().(*stream)
	s.c, s.id, s.lastAt, s.left, s.recvWindow = c, id, -1, message.Unknown, FirstWindow
	s.head.reset(false)
	s.readable.L, s.writable.L = &c.mu, &c.mu
	return s
}

// release gives a stream back that nobody knows any more.
func (s *stream) release() {
	s.body.free()
	if s.view != nil {
		s.view.free()
	}
	s.head.reset(false)
	s.request.Reset()
	h := s.head
	*s = stream{head: h}
	streams.Put(s)
}

// stop makes everything that waits for the client fail. The caller holds mu.
func (s *stream) stop(why error) {
	if s.stopped != nil {
		return
	}
	s.stopped = why
	s.wake()
}

func (s *stream) wake() {
	s.readable.Broadcast()
	s.writable.Broadcast()
	s.c.roomy.Broadcast()
}

// err is why nothing can be sent, nil if it can. The caller holds mu.
func (s *stream) err() error {
	switch {
	case s.stopped != nil:
		return s.stopped
	case s.c.dead:
		return s.c.why
	case s.interrupted:
		return errInterrupted
	}
	return nil
}

// answer has the handler answer, and ends the stream.
func (s *stream) answer() {
	c := s.c
	s.handle()
	c.mu.Lock()
	s.abort()
	for s.telling > 0 {
		c.written.Wait()
	}
	how := s.how
	switch {
	case how != unknown:
	case s.ended && s.clientEnded:
		how = byBoth
	default:
		how = byUs
	}
	c.remove(s, how)
	c.kick()
	c.written.Broadcast()
	c.mu.Unlock()
}

// handle calls the handler. A bug in it costs its own request alone.
func (s *stream) handle() {
	defer func() {
		if v := recover(); v != nil && s.c.srv.Log != nil {
			s.c.srv.Log.Error("a handler panicked", "err", v, "stack", string(debug.Stack()))
		}
	}()
	s.c.srv.Handler.Handle(s)
}

// teller takes the watcher off, and returns what tells it that its client has
// gone, nil if there is none. The handler does not end before it was called,
// which must be without mu. The caller holds mu.
func (s *stream) teller() func() {
	w := s.watcher
	if w == nil || !s.working {
		return nil
	}
	s.watcher = nil
	s.telling++
	return func() {
		w.ClientGone()
		s.c.mu.Lock()
		s.telling--
		s.c.written.Broadcast()
		s.c.mu.Unlock()
	}
}

func (s *stream) Request() *message.Request { return &s.request }
func (s *stream) Client() *message.Client   { return s.c.client }

var errStopped = errors.New("the body is not wanted any more")

func (s *stream) ReadBody(p []byte) (int, error) {
	c := s.c
	c.mu.Lock()
	defer c.mu.Unlock()
	if s.request.Expect && !s.continued && !s.begun && !s.clientEnded && s.received == 0 && s.err() == nil {
		s.continued = true
		s.inform(http.StatusContinue, nil)
	}
	return s.read(p, true)
}

// read reads from the body, or the tunnel. The caller holds mu.
func (s *stream) read(p []byte, limited bool) (int, error) {
	c := s.c
	if len(p) == 0 {
		return 0, nil
	}
	for {
		if s.bodyStopped || s.silent && s.stopped == nil {
			return 0, errStopped
		}
		if err := s.err(); err != nil {
			return 0, err
		}
		n := s.body.n
		if !s.clientEnded && s.request.HasLength && limited && s.received == s.request.Length && n > 0 {
			n-- // whether this is all, its last byte says only with END_STREAM
		}
		if n > 0 {
			n = s.body.pop(p[:min(n, len(p))])
			s.consume(n)
			return n, nil
		}
		if s.clientEnded {
			return 0, io.EOF
		}
		if s.bodyLate {
			return 0, os.ErrDeadlineExceeded
		}
		if limited && !s.lasts {
			s.waitFrom = c.now()
			c.arm(s.bodyLimit())
		}
		s.readable.Wait()
		if s.waitFrom != noDeadline {
			s.waited += c.now() - s.waitFrom
			s.waitFrom = noDeadline
		}
	}
}

// bodyLimit is until when the wait for the body that goes on may last.
func (s *stream) bodyLimit() time.Duration {
	l := &s.c.limits
	most := l.Body
	if l.BodyRate > 0 { // in all, not only this time
		enough := time.Duration(float64(s.received) / float64(l.BodyRate) * float64(time.Second))
		most = min(most, max(l.Body, enough)-s.waited)
	}
	return s.waitFrom + max(0, most)
}

// consume gives the client back the windows of n bytes. The caller holds mu.
func (s *stream) consume(n int) {
	c := s.c
	s.consumed += int64(n)
	c.credit(n)
	if s.clientEnded {
		c.kick()
		return
	}
	s.unacked += int64(n)
	window := int64(FirstWindow)
	if s.grown {
		window = StreamWindow
	} else if s.consumed >= FirstWindow/2 {
		s.grown = true
		s.unacked += StreamWindow - FirstWindow
	}
	if s.unacked >= window/4 {
		c.appendWindow(s.id, s.unacked)
		s.recvWindow += s.unacked
		s.unacked = 0
	}
	c.kick()
}

func (s *stream) Buffered() ([]byte, bool) {
	c := s.c
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case !s.clientEnded || s.consumed > 0 || s.body.first != s.body.last || s.stopped != nil:
		return nil, false
	case s.body.first == nil:
		return nil, true
	}
	s.view, s.body = s.body.first, queue{}
	s.consume(len(s.view.b))
	return s.view.b, true
}

func (s *stream) Trailer() []message.Field {
	s.c.mu.Lock()
	defer s.c.mu.Unlock()
	if s.trailer == nil || !s.clientEnded {
		return nil
	}
	return s.trailer.fields
}

func (s *stream) StopBody() {
	s.c.mu.Lock()
	s.bodyStopped = true
	s.readable.Broadcast()
	s.c.mu.Unlock()
}

var (
	errTwice  = errors.New("a second head of an answer")
	errStatus = errors.New("a status that no such answer has")
	errEarly  = errors.New("a body before its head")
	errLong   = errors.New("more than the length of the answer")
	errShort  = errors.New("less than the length of the answer")
	errTunnel = errors.New("no tunnel was opened")
)

func (s *stream) Inform(status int, fields []message.Field) error {
	c := s.c
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case s.begun:
		return errTwice
	case status < 100 || status > 199 || status == http.StatusSwitchingProtocols:
		return errStatus
	case status == http.StatusContinue && (s.continued || s.clientEnded):
		return nil
	}
	if err := s.waitRoom(); err != nil {
		return err
	}
	s.continued = s.continued || status == http.StatusContinue
	s.inform(status, fields)
	return nil
}

// inform sends an interim answer. The caller holds mu.
func (s *stream) inform(status int, fields []message.Field) {
	c := s.c
	from := c.beginHead(s)
	c.out.b = c.enc.status(c.out.b, status)
	c.appendFields(fields, false)
	c.endHead(s.id, from)
	s.lastAt = -1 // no end may be put into it
	c.kick()
}

func (s *stream) Begin(r *message.Response) error {
	c := s.c
	c.mu.Lock()
	defer c.mu.Unlock()
	status := r.Status
	if status == http.StatusSwitchingProtocols && s.request.Extended {
		status = http.StatusOK // RFC 8441, 5
	}
	switch {
	case s.begun:
		return errTwice
	case status < 200 || status > 999:
		return errStatus
	}
	if err := s.waitRoom(); err != nil {
		return err
	}
	s.begun = true
	opens := s.request.Extended && status < 300
	s.hasBody = opens || message.HasBody(s.request.Method, status) && r.Length != 0
	s.left = message.Unknown
	if s.hasBody && !opens {
		s.left = r.Length
	}
	from := c.beginHead(s)
	c.out.b = c.enc.status(c.out.b, status)
	dated := c.appendFields(r.Fields, r.Nominates)
	if r.HasLength && r.Length >= 0 && !opens && status != http.StatusNoContent {
		c.appendLength(r.Length)
	}
	if !dated {
		c.out.b = c.enc.field(c.out.b, message.Date, nameDate, c.srv.now())
	}
	c.endHead(s.id, from)
	if !s.hasBody {
		c.appendEnd(s)
	}
	return nil
}

func (s *stream) Write(p []byte) (int, error) {
	s.c.mu.Lock()
	defer s.c.mu.Unlock()
	switch {
	case !s.begun:
		return 0, errEarly
	case !s.hasBody:
		return len(p), s.err()
	case s.ended || s.finished:
		return 0, errLong
	case s.left >= 0 && int64(len(p)) > s.left:
		return 0, errLong
	}
	return s.write(p)
}

// write appends p as DATA. The caller holds mu.
func (s *stream) write(p []byte) (n int, err error) {
	c := s.c
	again := s.kept
	taken := 0
	for n < len(p) {
		k, err := s.acquire(len(p) - n)
		if err != nil {
			s.stalled = noDeadline
			return n, err
		}
		c.appendData(s, p[n:n+k])
		n += k
		if k >= EarnSize || n == len(p) { // not a window of next to nothing
			c.purse.earn(windows, WindowPerData)
			c.purse.earn(pings, PingPerData)
		}
		if s.left >= 0 {
			s.left -= int64(k)
		}
		if taken += k; taken >= piece {
			taken, s.stalled = 0, noDeadline
		}
	}
	s.stalled = noDeadline
	if s.kept = !again && c.pending() < flushAt; !s.kept {
		c.kick()
	}
	return n, nil
}

func (s *stream) Flush() error {
	s.c.mu.Lock()
	defer s.c.mu.Unlock()
	s.kept = false
	s.c.kick()
	return s.err()
}

func (s *stream) End(trailer []message.Field) error {
	c := s.c
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case s.finished:
		return s.err()
	case !s.begun:
		return errEarly
	case s.left > 0:
		return errShort // Abort, or the end of the handler, resets it
	}
	if err := s.err(); err != nil {
		return err
	}
	if !s.ended && len(trailer) > 0 {
		if err := s.waitRoom(); err != nil {
			return err
		}
		from := c.beginHead(s)
		empty := len(c.out.b)
		for i := range trailer {
			if trailer[i].ID.InTrailer() {
				c.scratch = message.AppendLower(c.scratch[:0], trailer[i].Name)
				c.out.b = c.enc.field(c.out.b, trailer[i].ID, c.scratch, trailer[i].Value)
			}
		}
		if len(c.out.b) > empty {
			c.endHead(s.id, from)
		} else {
			c.out.b = c.out.b[:from]
			c.enc.resized = c.enc.resized || empty > from+headerSize
			s.lastAt = -1
		}
	}
	c.appendEnd(s)
	s.finish()
	c.purse.earn(resets, ResetPerAnswer)
	c.purse.earn(closed, ClosedPerAnswer)
	c.purse.earn(pings, PingPerAnswer)
	c.purse.earn(priorities, PriorityPerAnswer)
	c.kick()
	return nil
}

// finish says that the answer is over, and stops a body that still comes. The
// caller holds mu.
func (s *stream) finish() {
	c := s.c
	s.finished = true
	if !s.clientEnded && s.stopped == nil && !c.dead {
		c.appendReset(s.id, http2.ErrCodeNo)
		s.silent, s.how = true, byUs
		s.readable.Broadcast()
		if !s.counted {
			s.counted = true
			c.answered++
		}
	}
}

func (s *stream) Abort() {
	s.c.mu.Lock()
	s.abort()
	s.c.mu.Unlock()
}

// abort ends an answer that is not over. The caller holds mu.
func (s *stream) abort() {
	c := s.c
	if s.finished {
		return
	}
	if s.ended && (!s.hasBody || s.tunnelled && s.clientEnded) { // it is whole
		s.finish()
		c.kick()
		return
	}
	s.finished = true
	if s.silent || c.dead || s.stopped != nil {
		return
	}
	code := http2.ErrCodeInternal
	if s.request.Extended && s.begun {
		code = http2.ErrCodeCancel // RFC 8441, 5: as a reset of TCP
	}
	c.appendReset(s.id, code)
	s.silent, s.how = true, byUs
	s.stop(errInterrupted)
	c.kick()
}

func (s *stream) Lasts() {
	s.c.mu.Lock()
	if !s.lasts {
		s.lasts = true
		s.waitFrom = noDeadline // the wait for a body, if there is one, is no longer limited
		s.c.lasting++
	}
	s.c.mu.Unlock()
}

func (s *stream) Watch(w message.Watcher) {
	s.c.mu.Lock()
	defer s.c.mu.Unlock()
	for s.telling > 0 { // the one before
		s.c.written.Wait()
	}
	s.watcher = w
	if s.err() != nil && !s.interrupted {
		if tell := s.teller(); tell != nil {
			go tell()
		}
	}
}

func (s *stream) Interrupt() {
	s.c.mu.Lock()
	s.interrupted = true
	s.wake()
	s.c.mu.Unlock()
}

// Tunnel returns the stream's bytes in both directions.
func (s *stream) Tunnel() (message.Stream, error) {
	s.c.mu.Lock()
	defer s.c.mu.Unlock()
	if !s.request.Extended || !s.begun || !s.hasBody {
		return nil, errTunnel
	}
	s.tunnelled = true
	s.c.kick()
	return tunnel{s}, s.err()
}

// tunnel is a stream after an extended CONNECT (RFC 8441).
type tunnel struct{ s *stream }

func (t tunnel) Read(p []byte) (int, error) {
	t.s.c.mu.Lock()
	defer t.s.c.mu.Unlock()
	return t.s.read(p, false)
}

func (t tunnel) Write(p []byte) (int, error) {
	t.s.c.mu.Lock()
	defer t.s.c.mu.Unlock()
	if t.s.ended || t.s.finished {
		return 0, errGone
	}
	n, err := t.s.write(p)
	t.s.kept = false
	t.s.c.kick()
	return n, err
}

func (t tunnel) CloseWrite() error {
	t.s.c.mu.Lock()
	defer t.s.c.mu.Unlock()
	if err := t.s.err(); err != nil {
		return err
	}
	t.s.c.appendEnd(t.s)
	t.s.c.kick()
	return nil
}

// Close ends both directions: as a whole if both have come to their end, else
// with a reset.
func (t tunnel) Close() error {
	t.s.c.mu.Lock()
	defer t.s.c.mu.Unlock()
	s := t.s
	if s.ended && !s.clientEnded && !s.finished && s.stopped == nil {
		s.finish()
		s.stop(errInterrupted)
		s.c.kick()
		return nil
	}
	s.abort()
	return nil
}
