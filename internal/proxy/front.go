package proxy

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/hashicorp/go-hclog"

	"tako/internal/proxy/eventloop"
	"tako/internal/proxy/h1"
	"tako/internal/proxy/h2"
	"tako/internal/proxy/message"
)

// front is what speaks HTTP with clients and calls the handler. It is all that
// the rest of the package knows of the codecs.
type front interface {
	// Serve answers what comes in on l until l is closed. When it returns, each
	// accepted connection is in the counts.
	Serve(l *listener)
	// Drain has answers say that their connection ends, and tells those who speak
	// HTTP/2 that it will. Nothing is closed yet.
	Drain()
	// Count returns the connections that may be bringing a request and have none
	// that lasts, and those that wait for their next one.
	Count() (busy, idle int)
	// Shutdown closes idle connections, asks the others to finish, and waits for
	// their end, or ctx's.
	Shutdown(ctx context.Context)
	// Close ends every connection.
	Close()
}

const (
	// shutdownPoll is how often Shutdown looks whether all have gone.
	shutdownPoll = 10 * time.Millisecond
	// acceptPause is what a shortage of descriptors or memory gets to pass.
	acceptPause = 20 * time.Millisecond
)

// own is the front by packages h1 and h2.
type own struct {
	h1     *h1.Server
	h2     *h2.Server
	tls    *tls.Config
	door   *doorman
	limits message.Limits
	log    hclog.Logger

	last atomic.Uint64 // the number of the connection accepted last
	open atomic.Int64  // connections, those in a handshake included

	mu       sync.Mutex
	greeting map[net.Conn]bool // guarded by mu: in an announcement or handshake; nil once closed
}

func newOwn(h message.Handler, conf *tls.Config, door *doorman, limits message.Limits, log hclog.Logger) *own {
	return &own{
		h1:  &h1.Server{Handler: h, Limits: limits, Log: log},
		h2:  &h2.Server{Handler: h, Limits: limits, Log: log},
		tls: conf, door: door, limits: limits, log: log, greeting: make(map[net.Conn]bool),
	}
}

// Serve accepts, on the loops if there are some.
func (f *own) Serve(l *listener) {
	if l.on != nil {
		l.on.Serve(func(c *eventloop.Conn) { f.arrive(c, l.secure) }, func(err error) time.Duration {
			f.log.Debug("a connection is not accepted", "error", err)
			return acceptPause
		})
		return
	}
	for {
		c, err := l.Accept()
		if err != nil {
			if isPassing(err) {
				time.Sleep(acceptPause)
				continue
			}
			return // l was closed
		}
		client, s, ok := f.admit(c, l.secure)
		switch {
		case !ok:
		case l.secure || f.door.announces():
			go f.greet(c, client, s)
		default:
			go f.serve(c, client, s)
		}
	}
}

// admit counts a connection, or closes it.
func (f *own) admit(c net.Conn, secure bool) (*message.Client, seat, bool) {
	s, ok := f.door.admit(c.RemoteAddr())
	if !ok {
		_ = c.Close()
		return nil, s, false
	}
	f.open.Add(1)
	return &message.Client{Addr: addrOf(c.RemoteAddr()), Secure: secure, Connection: f.last.Add(1)}, s, true
}

// isPassing reports errors of Accept that are not the listener's end: of one
// connection, or of the host, whose shortage may end.
func isPassing(err error) bool {
	for _, e := range [...]error{syscall.ECONNABORTED, syscall.EMFILE, syscall.ENFILE, syscall.ENOBUFS, syscall.ENOMEM, syscall.EPROTO, syscall.EPERM} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}

// serve has the codec of c's protocol serve it, to its end. It has a goroutine of its
// own, whose stack no handshake has stretched.
func (f *own) serve(c net.Conn, client *message.Client, s seat) {
	defer f.left(s)
	if isH2(c) {
		f.h2.Serve(c, client)
	} else {
		f.h1.Serve(c, client)
	}
}

func isH2(c net.Conn) bool {
	t, ok := c.(*tls.Conn)
	return ok && t.ConnectionState().NegotiatedProtocol == "h2"
}

// left is the end of a connection.
func (f *own) left(s seat) {
	f.open.Add(-1)
	s.leave()
}

// greet learns who the client is and does the handshake, as far as there are such,
// and has the connection served.
func (f *own) greet(c net.Conn, client *message.Client, s seat) {
	if !f.begin(c) {
		_ = c.Close()
		f.left(s)
		return
	}
	served, s, ok := f.introduce(c, nil, client, s, time.Now().Add(f.limits.Head))
	if !f.done(c) || !ok {
		_ = c.Close()
		f.left(s)
		return
	}
	go f.serve(served, client, s)
}

// begin notes a connection that has yet to be served, or reports false if none is any
// more.
func (f *own) begin(c net.Conn) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.greeting == nil {
		return false
	}
	f.greeting[c] = true
	return true
}

// done takes begin back. It reports false if the connection was closed meanwhile.
func (f *own) done(c net.Conn) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(f.greeting, c)
	return f.greeting != nil
}

// introduce learns who the client is and does the handshake, on a goroutine or on t,
// and returns what is to be served, without deadlines. It reports false if nothing
// is, or the time is over: the handshake has as much as Limits.Head after an
// announcement.
func (f *own) introduce(c net.Conn, t *eventloop.Task, client *message.Client, s seat, by time.Time) (net.Conn, seat, bool) {
	announced, err := f.door.announced(c, by)
	if err == nil {
		s, err = s.announce(announced, client)
	}
	if !announced.Local {
		by = time.Now().Add(f.limits.Head)
	}
	if err != nil {
		f.log.Debug("connection refused", "peer", c.RemoteAddr(), "error", err)
		return nil, s, false
	}
	if !client.Secure {
		_ = c.SetReadDeadline(time.Time{}) // a closed connection shows when it is read
		return c, s, true
	}
	_ = c.SetDeadline(by) // or in the handshake
	beneath := tlsSocketOf(c)
	if t != nil {
		beneath = &tlsSocket{Conn: c, task: t}
	}
	secure := tls.Server(beneath, f.tls)
	err = secure.HandshakeContext(context.Background()) // the deadline ends it
	_ = c.SetDeadline(time.Time{})
	if on, ok := beneath.(*tlsSocket); ok {
		on.task, on.key = nil, taskKey{}
	}
	if err != nil {
		f.log.Debug("no handshake", "client", client.Addr, "error", err)
		notTLS(c, err)
		return nil, s, false
	}
	return secure, s, true
}

// arrive takes a connection that was accepted on a loop. It waits there, without a
// task, for the first that the client sends.
func (f *own) arrive(c *eventloop.Conn, secure bool) {
	client, s, ok := f.admit(c, secure)
	switch {
	case !ok:
	case !secure && !f.door.announces():
		f.h1.ServeOn(nil, c, client, func() { f.left(s) })
	case !f.begin(c):
		_ = c.Close()
		f.left(s)
	default:
		by := time.Now().Add(f.limits.Head)
		_ = c.SetReadDeadline(by)
		c.Idle(&arrival{f: f, c: c, client: client, seat: s, by: by})
	}
}

// arrival is a connection on a loop that has yet to be served.
type arrival struct {
	f      *own
	c      *eventloop.Conn
	client *message.Client
	seat   seat
	by     time.Time // when its time for that is over
}

// Start greets the client, and has the connection served.
func (a *arrival) Start(t *eventloop.Task) {
	f, c := a.f, a.c
	c.Own(t)
	served, s, ok := f.introduce(c, t, a.client, a.seat, a.by)
	if !f.done(c) || !ok {
		_ = c.Close()
		f.left(s)
		return
	}
	if !isH2(served) {
		f.h1.ServeOn(t, served, a.client, func() { f.left(s) })
		return
	}
	beneath := served.(*tls.Conn).NetConn().(*tlsSocket) // by introduce
	if err := beneath.surrender(c); err != nil {
		f.log.Debug("a connection does not come off its loop", "error", err)
		_ = c.Close()
		f.left(s)
		return
	}
	go f.serve(served, a.client, s)
}

// notTLS answers a client that speaks plain HTTP where TLS is wanted, in plain
// HTTP.
func notTLS(c net.Conn, err error) {
	if e, ok := errors.AsType[tls.RecordHeaderError](err); ok && e.Conn != nil && looksLikeHTTP(e.RecordHeader) {
		_ = c.SetWriteDeadline(time.Now().Add(time.Second)) // a courtesy
		_, _ = io.WriteString(c, "HTTP/1.0 400 Bad Request\r\nContent-Type: text/plain\r\nConnection: close\r\n\r\nThis port speaks HTTPS: use https://\n")
	}
}

func looksLikeHTTP(head [5]byte) bool {
	switch string(head[:]) {
	case "GET /", "HEAD ", "POST ", "PUT /", "OPTIO", "DELET", "PATCH":
		return true
	}
	return false
}

// Drain begins.
func (f *own) Drain() {
	f.h1.Drain()
	f.h2.Drain()
}

// Count counts; a handshake is busy.
func (f *own) Count() (busy, idle int) {
	open := int(f.open.Load()) // before the others, which are among them
	_, idle1 := f.h1.Count()
	_, idle2 := f.h2.Count()
	idle = idle1 + idle2
	return max(0, open-idle-f.h1.Lasting()-f.h2.Lasting()), idle
}

// Shutdown ends what is idle and waits for the rest.
func (f *own) Shutdown(ctx context.Context) {
	f.Drain()
	tick := time.NewTicker(shutdownPoll)
	defer tick.Stop()
	for f.open.Load() > 0 {
		f.h1.CloseIdle() // again and again: an answer that began before the drain has promised more
		f.h2.CloseIdle()
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
	}
}

// Close ends them all.
func (f *own) Close() {
	f.mu.Lock()
	for c := range f.greeting {
		_ = c.Close()
	}
	f.greeting = nil
	f.mu.Unlock()
	f.h1.Close()
	f.h2.Close()
}
