package h1

import (
	"bytes"
	"cmp"
	"errors"
	"io"
	"net"
	"net/http"
	"os"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"tako/internal/proxy/eventloop"
	"tako/internal/proxy/message"
)

// conn is one connection with a client, served by one goroutine or, on a loop, by
// one task at a time. It is itself the exchange of each of its requests in turn; what only an exchange needs is
// in x, what only a message needs in in, and a connection that waits has neither.
type conn struct {
	srv    *Server
	client *message.Client
	ended  func()          // called at the end, if not nil
	nc     net.Conn        // what is read and written
	tcp    *net.TCPConn    // nc, if it is one
	raw    syscall.RawConn // of nc, if that is no TLS and not on a loop
	under  ReadAhead       // what is beneath TLS on a loop
	sock   socket          // nc, or what is beneath TLS

	// On an event loop: it has no goroutine between its requests.
	loop *eventloop.Conn // the socket; nil elsewhere
	task *eventloop.Task // that answers a request

	phase phaseSince

	// What has come and is not used yet is in.B[r:w]. Of the goroutine that reads:
	// the own one, or that of ReadBody during an exchange.
	in     *Buffer
	r, w   int
	filled bool // the last read had no room left
	x      *exchange

	waitFn  func(uintptr) bool // reads into a new in
	waitErr error
	sendFn  func(uintptr) bool // writes unsent
	unsent  []byte
	sendErr error

	// What the sweeps look at.
	writing     atomic.Int64 // the clock at the beginning of the write under way, 0 for none
	splicing    atomic.Bool  // that write waits for its source, too
	reading     atomic.Int64 // the same of a read of a body
	bodyWaited  atomic.Int64 // nanoseconds that such reads have taken, up to the last
	bodyBytes   atomic.Int64 // what they brought
	late        atomic.Bool  // the body's time is over
	stopped     atomic.Bool  // nobody wants the rest of it
	interrupted atomic.Bool
	lasts       atomic.Bool

	mu      sync.Mutex      // held while a watcher is told, and while a wait is ended
	watcher message.Watcher // guarded by mu
	watch   uint32          // guarded by mu: counts watchers and their ends
	gone    bool            // guarded by mu: during an exchange
	finAt   int64           // of the sweeps: the clock when the client's half was seen to be over, 0 if it is not
	sending sync.Mutex      // held while a 100 is sent, or made impossible
}

// socket is a connection without TLS, with a way to its descriptor, or nil.
type socket struct {
	net.Conn
	control func(func(fd uintptr)) error
}

// A ReadAhead is a connection beneath TLS that is on a loop, where nobody waits for
// what was read from it already.
type ReadAhead interface {
	net.Conn
	// Hold has Read fail at once with ErrHeld, whatever there is to be read, or takes
	// that back. It is called by the one who reads.
	Hold(held bool)
	// Ahead reports whether what was read last may have held more than what was asked
	// for: more than one record.
	Ahead() bool
}

// ErrHeld is ReadAhead.Hold's. It is temporary, so TLS reads on after it.
var ErrHeld net.Error = heldError{}

type heldError struct{}

func (heldError) Error() string   { return "nothing is read now" }
func (heldError) Timeout() bool   { return false }
func (heldError) Temporary() bool { return true }

func newConn(s *Server, nc net.Conn, client *message.Client, ended func()) *conn {
	c := &conn{srv: s, client: client, nc: nc, ended: ended, sock: socket{Conn: nc}}
	for {
		over, ok := c.sock.Conn.(interface{ NetConn() net.Conn })
		if !ok {
			break
		}
		c.sock.Conn = over.NetConn()
		if c.under == nil {
			c.under, _ = c.sock.Conn.(ReadAhead)
		}
	}
	switch in := c.sock.Conn.(type) {
	case *eventloop.Conn:
		c.loop = in
		c.sock.control = in.Control
	case syscall.Conn:
		if raw, err := in.SyscallConn(); err == nil {
			c.sock.control = raw.Control
			if c.sock.Conn == nc {
				c.raw = raw
			}
		}
	}
	c.tcp, _ = nc.(*net.TCPConn)
	if c.raw != nil {
		c.waitFn, c.sendFn = c.tryRead, c.trySend
	}
	return c
}

// secure: nc is TLS.
func (c *conn) secure() bool { return c.nc != c.sock.Conn }

// past is a deadline that wakes what waits.
var past = time.Unix(1, 0)

func isTimeout(err error) bool { return errors.Is(err, os.ErrDeadlineExceeded) }

// serve answers requests until the connection ends.
func (c *conn) serve() {
	for c.turn() {
	}
	c.end()
}

// Start is called by the loop when the connection has something to read, or is to
// end.
func (c *conn) Start(t *eventloop.Task) {
	c.loop.Own(t)
	c.answer(t)
}

// answer takes a turn on t, and leaves the connection idle, or ends it.
func (c *conn) answer(t *eventloop.Task) {
	c.task = t
	if !c.turn() {
		c.end()
		return
	}
	c.task = nil
	c.loop.Idle(c)
}

// has reports whether TLS has something of the next request already, which is in in
// then, or the connection's end: what a socket that is waited for on a loop will not
// tell.
func (c *conn) has() bool {
	if c.loop == nil || c.under == nil || !c.filled && !c.under.Ahead() {
		return false
	}
	c.under.Hold(true)
	defer c.under.Hold(false)
	c.in = Get(SmallBuffer)
	n, err := c.read(c.in.B)
	c.r, c.w = 0, n
	if n == 0 {
		Put(c.in)
		c.in = nil
	}
	return n > 0 || err != ErrHeld //nolint:errorlint // TLS returns it bare
}

// turn waits for a request and answers it, and what has come with it. It reports
// whether another one may follow.
func (c *conn) turn() bool {
	if !c.await() {
		return false
	}
	c.x = exchanges.Get().(*exchange)
	for {
		if !c.readHead() || !c.exchange() {
			return false
		}
		if b := c.in.B[c.r:c.w]; len(b) == 0 || string(b) == "\r\n" { // which old clients send after a body
			if c.release(); !c.has() {
				break
			}
			if c.in == nil {
				return false
			}
			c.x = exchanges.Get().(*exchange)
		}
		c.phase.store(head, c.srv.clock.Load())
	}
	// Even if the server drains since: its answer has promised to read on.
	c.phase.store(idle, c.srv.clock.Load())
	return true
}

// release gives back what a waiting connection does not need.
func (c *conn) release() {
	if c.in != nil {
		Put(c.in)
		c.in = nil
	}
	c.r, c.w = 0, 0
	if c.x != nil {
		c.x.free()
		c.x = nil
	}
}

// end closes the connection. Whoever left an exchange unfinished has closed it
// already, so that TLS does not say it came to its end.
func (c *conn) end() {
	if c.x != nil && c.x.leak {
		c.in, c.x = nil, nil // somebody may still read into them
	}
	c.release()
	_ = c.nc.Close()
	c.srv.remove(c)
	if c.ended != nil {
		c.ended()
	}
}

// await waits for the first bytes of a request, and reports whether they have come:
// the turn goes on with them.
func (c *conn) await() bool {
	for {
		err := c.wait()
		ph, since := c.phase.load()
		if err == nil {
			next := c.srv.clock.Load()
			if ph == fresh {
				next = since
			}
			if ph != expired && c.phase.move(ph, head, since, next) {
				return true
			}
			// Its time is over, but what has come is answered.
			c.phase.store(head, next)
			c.rearm()
			return true
		}
		if !isTimeout(err) || c.interrupted.Load() {
			return false
		}
		if c.rearm() != expired {
			continue
		}
		if !c.pending() {
			return false
		}
		// A request came just before the end.
		c.phase.store(head, c.srv.clock.Load())
		c.rearm()
	}
}

// rearm takes off a deadline that was meant for something else, and returns the
// phase: an expired one's was meant.
func (c *conn) rearm() phase {
	c.mu.Lock()
	defer c.mu.Unlock()
	ph, _ := c.phase.load()
	sock := &c.sock
	if ph != expired {
		_ = sock.SetReadDeadline(time.Time{})
	}
	if c.interrupted.Load() {
		_ = sock.SetReadDeadline(past)
	}
	return ph
}

// wait reads something into in.
func (c *conn) wait() error {
	if c.raw != nil {
		if err := c.raw.Read(c.waitFn); err != nil {
			return err
		}
		return c.waitErr
	}
	if c.r < c.w { // by has
		return nil
	}
	c.r, c.w = 0, 0
	if c.in == nil {
		c.in = Get(SmallBuffer)
	}
	n, err := c.read(c.in.B)
	c.w = n
	if n > 0 {
		return nil
	}
	return err
}

// read reads from the connection, and notes whether it had more than there was room
// for.
func (c *conn) read(p []byte) (int, error) {
	n, err := c.nc.Read(p)
	c.filled = n == len(p)
	return n, err
}

// tryRead reads into a buffer that it takes only if there is something, and
// reports false if there is nothing.
func (c *conn) tryRead(fd uintptr) bool {
	b := Get(SmallBuffer)
	for {
		n, _, errno := syscall.RawSyscall(syscall.SYS_READ, fd, uintptr(unsafe.Pointer(&b.B[0])), uintptr(len(b.B)))
		if errno == syscall.EINTR {
			continue
		}
		if errno == 0 && n > 0 {
			c.in, c.r, c.w, c.waitErr = b, 0, int(n), nil
			return true
		}
		Put(b)
		c.waitErr = io.EOF
		if errno != 0 {
			c.waitErr = errno
		}
		return errno != syscall.EAGAIN
	}
}

// expireIf ends the time of a connection that is in that phase.
func (c *conn) expireIf(is phase) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if ph, since := c.phase.load(); ph == is && c.phase.move(ph, expired, since, since) {
		_ = c.sock.SetReadDeadline(past)
	}
}

// errCut is that of a head whose client has ended its half within it.
var (
	errCut      = &message.Error{Status: http.StatusBadRequest, Reason: "the head is not whole"}
	errSlowHead = &message.Error{Status: http.StatusRequestTimeout, Reason: "the head took too long"}
)

// readHead reads up to the end of a head. If there is to be no exchange it has
// said so to the client and reports false.
func (c *conn) readHead() bool {
	tried := 0
	for {
		b := c.in.B[c.r:c.w]
		// Parsing from the beginning at each byte would be the client's way to keep
		// us busy: it waits for the end of a line.
		if tried == 0 || len(b) >= tried+SmallBuffer || len(b) >= message.MaxHead || bytes.IndexByte(b[tried:], '\n') >= 0 {
			n, err := ParseRequest(b, &c.x.head)
			if err != nil {
				c.refuse(err)
				return false
			}
			if n > 0 {
				c.r += n
				if ph, since := c.phase.load(); ph != head || !c.phase.move(ph, exchanging, since, c.srv.clock.Load()) {
					c.refuse(errSlowHead)
					return false
				}
				return true
			}
			tried = len(b)
		}
		c.makeRoom()
		n, err := c.read(c.in.B[c.w:])
		if c.w += n; n > 0 {
			continue
		}
		switch {
		case isTimeout(err) && !c.interrupted.Load():
			if c.rearm() == expired {
				c.refuse(errSlowHead)
				return false
			}
		case errors.Is(err, io.EOF):
			c.refuse(errCut)
			return false
		case err != nil:
			c.drop(false)
			return false
		}
	}
}

// makeRoom sees to it that in has room after w.
func (c *conn) makeRoom() {
	if c.w < len(c.in.B) {
		return
	}
	to := c.in
	if c.r == 0 {
		to = Get(2 * len(c.in.B))
	}
	n := copy(to.B, c.in.B[c.r:c.w])
	if to != c.in {
		Put(c.in)
		c.in = to
	}
	c.r, c.w = 0, n
}

// refuse answers what is not a request, and ends the connection.
func (c *conn) refuse(err error) {
	e, ok := errors.AsType[*message.Error](err)
	if !ok {
		e = errLine
	}
	if c.srv.Log != nil {
		c.srv.Log.Debug("request refused", "status", e.Status, "reason", e.Reason)
	}
	text := http.StatusText(e.Status)
	b := AppendStatusLine(c.x.takeOut(0), e.Status)
	b = append(b, *c.srv.date.Load()...)
	b = AppendField(b, "Content-Type", "text/plain")
	b = AppendLength(b, int64(len(text)))
	b = append(b, "Connection: close\r\n\r\n"...)
	if !bytes.HasPrefix(c.in.B[c.r:c.w], []byte("HEAD ")) {
		b = append(b, text...)
	}
	c.mu.Lock() // until a deadline that is being set is
	c.phase.store(closing, c.srv.clock.Load())
	c.mu.Unlock()
	if c.write(b) == nil {
		c.linger(c.srv.Limits.Linger)
	}
	c.drop(false)
}

// linger ends our half of the connection and reads, that long at most, what still
// comes, so that it does not turn the answer into a reset connection.
func (c *conn) linger(within time.Duration) {
	c.phase.store(closing, c.srv.clock.Load())
	sock := &c.sock
	if closeWrite(c.nc) != nil || c.secure() && closeWrite(sock.Conn) != nil {
		return
	}
	b := Get(OutBuffer)
	defer Put(b)
	wait := c.srv.Limits.Linger
	for now := time.Now(); within > 0; now = time.Now() {
		_ = sock.SetReadDeadline(now.Add(min(wait, within)))
		if c.interrupted.Load() {
			return
		}
		// What comes without a wait needs no new deadline for each piece.
		for until := now.Add(wait / 4); ; {
			if _, err := sock.Read(b.B); err != nil {
				return
			}
			if time.Now().After(until) {
				break
			}
		}
		if within -= time.Since(now); c.srv.draining.Load() {
			within = min(within, wait)
		}
	}
}

func closeWrite(c net.Conn) error {
	if h, ok := c.(interface{ CloseWrite() error }); ok {
		return h.CloseWrite()
	}
	return errors.ErrUnsupported
}

// drop closes the connection without the good-bye of TLS. With reset, the client
// cannot take what it got for the whole even if nothing but the end would tell.
func (c *conn) drop(reset bool) {
	sock := &c.sock
	if tcp, ok := sock.Conn.(interface{ SetLinger(sec int) error }); ok && reset {
		_ = tcp.SetLinger(0)
	}
	_ = sock.Close()
}

// write sends b.
func (c *conn) write(b []byte) error {
	c.writing.Store(c.srv.clock.Load())
	var err error
	if c.raw != nil {
		c.unsent, c.sendErr = b, nil
		if err = c.raw.Write(c.sendFn); err == nil {
			err = c.sendErr
		}
		c.unsent = nil
	} else {
		_, err = c.nc.Write(b)
	}
	c.writing.Store(0)
	return err
}

// trySend writes as much of unsent as there is room for, and reports false if
// that is not all. The socket never blocks, so the scheduler need not be told.
func (c *conn) trySend(fd uintptr) bool {
	for len(c.unsent) > 0 {
		n, _, errno := syscall.RawSyscall(syscall.SYS_WRITE, fd, uintptr(unsafe.Pointer(&c.unsent[0])), uintptr(len(c.unsent)))
		switch errno { //nolint:exhaustive // all others are errors
		case 0:
			c.unsent = c.unsent[n:]
		case syscall.EINTR:
		case syscall.EAGAIN:
			return false
		default:
			c.sendErr = errno
			return true
		}
	}
	return true
}

// handle has the request answered.
func (c *conn) handle() {
	defer func() {
		p := recover()
		if p == nil {
			return
		}
		c.x.aborted, c.x.leak = true, true
		c.Interrupt()
		if c.srv.Log != nil {
			c.srv.Log.Error("panic while answering a request; please report it", "panic", p, "stack", string(debug.Stack()))
		}
	}()
	c.srv.Handler.Handle(c)
}

// exchange has the request answered, and reports whether another may follow.
func (c *conn) exchange() bool {
	c.begin()
	c.handle()
	c.leave()
	x := c.x
	switch {
	case x.tunnel:
		x.leak = true
		return false
	case !x.ended || x.aborted || c.interrupted.Load():
		c.drop(x.mode == untilClose)
		return false
	case !x.bodyDone.Load() && (x.closing || !c.drain()), x.closing && (c.r < c.w || x.bodyR < x.bodyW || c.pending()):
		_ = c.sock.SetReadDeadline(time.Time{})
		c.linger(c.lingerTime())
		c.drop(false)
		return false
	case x.closing:
		c.phase.store(closing, c.srv.clock.Load())
		return false
	}
	c.keepRest()
	return true
}

// lingerTime is how long what comes after the last answer is read.
func (c *conn) lingerTime() time.Duration {
	if c.x.bodyDone.Load() {
		return c.srv.Limits.Linger
	}
	return c.srv.Limits.LingerBody
}

// keepRest moves what came after a body to in.
func (c *conn) keepRest() {
	x := c.x
	if x.body == nil {
		return
	}
	if x.bodyR < x.bodyW { // which was filled when in was used up
		c.in, x.body = x.body, c.in
		c.r, c.w = x.bodyR, x.bodyW
	}
	Put(x.body)
	x.body = nil
}

// drain reads the rest of a body that is short enough, and reports whether
// another request can follow.
func (c *conn) drain() bool {
	x := c.x
	c.stopped.Store(false)
	if errors.Is(x.bodyErr, errStopped) {
		x.bodyErr = nil
	}
	_ = c.sock.SetReadDeadline(time.Now().Add(c.srv.Limits.Linger))
	c.late.Store(true) // that deadline is meant
	b := Get(OutBuffer)
	defer Put(b)
	for left := c.srv.Limits.DrainBytes; left > 0; {
		n, err := c.ReadBody(b.B[:min(int64(len(b.B)), left)])
		left -= int64(n)
		if err == io.EOF { //nolint:errorlint // ReadBody returns it bare
			c.rearm()
			return true
		}
		if err != nil {
			return false
		}
	}
	return false
}

// pollResult is what is known of a socket.
type pollResult struct{ readable, fin, reset bool }

// poll looks at the socket without reading it.
func (c *conn) poll() (p pollResult) {
	sock := &c.sock
	if sock.control == nil {
		return p
	}
	_ = sock.control(func(fd uintptr) { // a closed one shows elsewhere
		fds := [1]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN | unix.POLLRDHUP}} //nolint:gosec // a descriptor
		if n, err := unix.Poll(fds[:], 0); n > 0 && err == nil {
			ev := fds[0].Revents
			p = pollResult{ev&unix.POLLIN != 0, ev&unix.POLLRDHUP != 0, ev&(unix.POLLERR|unix.POLLHUP) != 0}
		}
	})
	return p
}

// pending reports whether there is something to read, other than the end.
func (c *conn) pending() bool {
	p := c.poll()
	return p.readable && !p.fin && !p.reset
}

// untaken reports whether the client has yet to take something that was sent.
func (c *conn) untaken() bool {
	unsent := true
	_ = c.sock.control(func(fd uintptr) {
		if n, err := unix.IoctlGetInt(int(fd), unix.SIOCOUTQ); err == nil {
			unsent = n > 0
		}
	})
	return unsent
}

// look keeps the limits. It is the sweeps' only.
func (c *conn) look(clock int64, every time.Duration) {
	l := &c.srv.Limits
	tooOld := func(since int64, limit time.Duration) bool { return clock-since > int64(limit+every) }
	ph, since := c.phase.load()
	switch ph {
	case fresh, head:
		if tooOld(since, l.Head) {
			c.expireIf(ph)
		}
	case idle:
		if tooOld(since, l.Keep) {
			c.expireIf(ph)
		}
	case exchanging:
		c.lookAtBody(clock, every)
		if tooOld(since, cmp.Or(c.srv.goneTime, GoneTime)) {
			c.lookForClient(clock, every)
		} else {
			c.finAt = 0
		}
	case tunneling, closing, expired:
	}
	if began := c.writing.Load(); began != 0 && tooOld(began, l.Write) {
		if c.splicing.Load() && !c.untaken() {
			c.writing.CompareAndSwap(began, clock) // the app is slow, not the client
			return
		}
		_ = c.sock.SetWriteDeadline(past)
	}
}

// lookAtBody ends a wait for a body that takes too long.
func (c *conn) lookAtBody(clock int64, every time.Duration) {
	began := c.reading.Load()
	if began == 0 || c.lasts.Load() {
		return
	}
	l := &c.srv.Limits
	waited := time.Duration(clock - began)
	all := waited + time.Duration(c.bodyWaited.Load())
	if waited > l.Body+every || all > l.Body+every && float64(c.bodyBytes.Load()) < float64(l.BodyRate)*all.Seconds() {
		c.late.Store(true)
		_ = c.sock.SetReadDeadline(past)
	}
}

// lookForClient tells the watcher if the client has gone.
func (c *conn) lookForClient(clock int64, every time.Duration) {
	p := c.poll()
	switch {
	case p.reset:
	case p.fin && c.finAt == 0:
		c.finAt = clock
		return
	case p.fin && clock-c.finAt > int64(c.srv.Limits.HalfOpen+every):
	default:
		if !p.fin {
			c.finAt = 0
		}
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.gone = true
	if c.watcher != nil {
		c.watcher.ClientGone()
		c.watcher = nil
	}
}
