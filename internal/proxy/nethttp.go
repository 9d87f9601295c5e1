package proxy

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"maps"
	"net"
	"net/http"
	"runtime/debug"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/go-hclog"
	"golang.org/x/net/http/httpguts"

	"tako/internal/proxy/message"
)

// netHTTP is the front by net/http: slower, and of another making, for the day
// the own one is in doubt.
type netHTTP struct {
	handler message.Handler
	server  *http.Server
	tls     *tls.Config
	door    *doorman
	limits  message.Limits
	log     hclog.Logger

	draining atomic.Bool
	last     atomic.Uint64

	mu    sync.Mutex
	conns map[net.Conn]*clientConn
}

// clientConn is what is known of one connection with a client.
type clientConn struct {
	message.Client
	streams atomic.Int64 // requests on it that last
	state   http.ConnState
}

type connKey struct{}

// maxHeadSlack is what net/http adds to its limit of a head.
const maxHeadSlack = 4 << 10

func newNetHTTP(h message.Handler, conf *tls.Config, door *doorman, limits message.Limits, log hclog.Logger) *netHTTP {
	f := &netHTTP{handler: h, tls: conf, door: door, limits: limits, log: log, conns: make(map[net.Conn]*clientConn)}
	f.server = &http.Server{
		Handler: f, TLSConfig: conf,
		ReadHeaderTimeout: limits.Head, IdleTimeout: limits.Keep, MaxHeaderBytes: message.MaxHead - maxHeadSlack,
		DisableGeneralOptionsHandler: true, // OPTIONS * is the app's
		HTTP2: &http.HTTP2Config{
			MaxConcurrentStreams: int(limits.Streams), WriteByteTimeout: limits.Write,
			SendPingTimeout: limits.Keep, PingTimeout: limits.Head,
		},
		ErrorLog:    log.StandardLogger(&hclog.StandardLoggerOptions{ForceLevel: hclog.Debug}),
		ConnContext: f.began,
		ConnState:   f.changed,
	}
	return f
}

func (f *netHTTP) began(ctx context.Context, nc net.Conn) context.Context {
	_, secure := nc.(*tls.Conn)
	c := &clientConn{Client: message.Client{Addr: addrOf(nc.RemoteAddr()), Secure: secure, Connection: f.last.Add(1)}}
	inner := nc
	if t, ok := nc.(*tls.Conn); ok {
		inner = t.NetConn()
	}
	if g, ok := inner.(*guest); ok {
		g.client = &c.Client
	}
	f.mu.Lock()
	f.conns[nc] = c
	f.mu.Unlock()
	return context.WithValue(ctx, connKey{}, c)
}

func (f *netHTTP) changed(nc net.Conn, s http.ConnState) {
	f.mu.Lock()
	defer f.mu.Unlock()
	switch c := f.conns[nc]; {
	case c == nil:
	case s == http.StateClosed || s == http.StateHijacked:
		delete(f.conns, nc)
	default:
		c.state = s
	}
}

// Serve accepts.
func (f *netHTTP) Serve(l *listener) {
	var guarded net.Listener = guarded{Listener: l.Listener, door: f.door, head: f.limits.Head}
	if l.secure {
		guarded = tls.NewListener(guarded, f.tls)
	}
	_ = f.server.Serve(guarded) // it returns no other error than that l was closed
}

// Drain begins.
func (f *netHTTP) Drain() { f.draining.Store(true) }

// Count counts.
func (f *netHTTP) Count() (busy, idle int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, c := range f.conns {
		switch {
		case c.state == http.StateIdle:
			idle++
		case c.streams.Load() == 0:
			busy++
		}
	}
	return busy, idle
}

// Shutdown ends what is idle and waits for the rest.
func (f *netHTTP) Shutdown(ctx context.Context) { _ = f.server.Shutdown(ctx) }

// Close ends them all.
func (f *netHTTP) Close() { _ = f.server.Close() }

// ServeHTTP makes an exchange of a request.
func (f *netHTTP) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	defer func() {
		if p := recover(); p != nil {
			if p != http.ErrAbortHandler { //nolint:errorlint // the value itself
				f.log.Error("panic while answering a request; please report it", "panic", p, "stack", string(debug.Stack()))
			}
			panic(http.ErrAbortHandler)
		}
	}()
	conn, ok := r.Context().Value(connKey{}).(*clientConn)
	if !ok {
		conn = &clientConn{}
	}
	x := &httpExchange{f: f, w: w, r: r, rc: http.NewResponseController(w), conn: conn}
	// A request with both Content-Length and Transfer-Encoding cannot be told from
	// one with the latter alone here: after either, nothing more is read as a
	// request of this connection.
	if f.draining.Load() || r.ProtoMajor == 1 && len(r.TransferEncoding) > 0 {
		w.Header().Set("Connection", "close")
	}
	if !x.read() {
		answer(x, http.StatusBadRequest, "Bad Request")
	} else {
		defer x.Watch(nil)
		f.handler.Handle(x)
		if x.lasts {
			conn.streams.Add(-1)
		}
		x.linger()
	}
	if x.aborted {
		panic(http.ErrAbortHandler)
	}
}

// httpExchange is an exchange by net/http.
type httpExchange struct {
	f    *netHTTP
	w    http.ResponseWriter
	r    *http.Request
	rc   *http.ResponseController
	conn *clientConn

	req     message.Request
	lasts   bool
	began   bool
	bodyOff bool // no body follows
	aborted bool
	renewed time.Time

	mu      sync.Mutex // orders the setting of deadlines
	stopped bool       // guarded by mu
	ended   bool       // guarded by mu: the body was read to its end

	stream   *hijacked // after a 101
	watching func() bool
	watcher  sync.Mutex // held while a watcher is told
}

// read makes the head, and reports whether it keeps the rules.
func (x *httpExchange) read() bool {
	r, q := x.r, &x.req
	q.Major, q.Minor = uint8(r.ProtoMajor), uint8(r.ProtoMinor) //nolint:gosec // 1 or 2, 0 or 1
	q.Method, q.Host, q.Target = []byte(r.Method), []byte(r.Host), []byte(requestTarget(r))
	if hosts := r.Header["Host"]; len(hosts) > 0 && (len(hosts) > 1 || !strings.EqualFold(hosts[0], r.Host)) {
		return false
	}
	// Over HTTP/2 Go lets a method be anything.
	if _, _, ok := message.ParseHost(q.Host); !ok || !message.ValidToken(q.Method) || !message.ValidTarget(q.Target) && r.Method != http.MethodConnect {
		return false
	}
	for name, values := range r.Header {
		id := message.Lookup([]byte(name))
		for _, v := range values {
			q.Fields = append(q.Fields, message.Field{Name: []byte(name), Value: []byte(v), ID: id})
		}
	}
	q.Nominates = len(r.Header["Connection"]) > 0
	q.TETrailers = httpguts.HeaderValuesContainsToken(r.Header["Te"], "trailers")
	q.Length, q.HasLength = r.ContentLength, r.Header["Content-Length"] != nil
	q.Expect = r.ProtoAtLeast(1, 1) && httpguts.HeaderValuesContainsToken(r.Header["Expect"], "100-continue")
	if p := r.Header["Upgrade"]; r.ProtoMajor == 1 && r.ProtoMinor > 0 && r.ContentLength == 0 && len(p) == 1 &&
		httpguts.HeaderValuesContainsToken(r.Header["Connection"], "upgrade") &&
		message.ValidToken([]byte(strings.ReplaceAll(p[0], "/", "-"))) && !strings.HasPrefix(strings.ToLower(p[0]), "h2") {
		q.Upgrade = []byte(p[0])
	}
	return true
}

// requestTarget is the path and query of a request as the client wrote them, or
// "*".
func requestTarget(r *http.Request) string {
	if strings.HasPrefix(r.RequestURI, "/") || r.RequestURI == "*" {
		if i := strings.IndexByte(r.RequestURI, '#'); i >= 0 {
			return r.RequestURI[:i]
		}
		return r.RequestURI
	}
	return r.URL.RequestURI() // of the absolute form
}

func (x *httpExchange) Request() *message.Request { return &x.req }
func (x *httpExchange) Client() *message.Client   { return &x.conn.Client }
func (x *httpExchange) Buffered() ([]byte, bool)  { return nil, false }

// ReadBody reads.
func (x *httpExchange) ReadBody(p []byte) (int, error) {
	x.mu.Lock()
	if !x.stopped {
		_ = x.rc.SetReadDeadline(time.Now().Add(x.f.limits.Body))
	}
	x.mu.Unlock()
	n, err := x.r.Body.Read(p)
	if err != nil {
		x.mu.Lock()
		x.ended = err == io.EOF
		if !x.stopped {
			_ = x.rc.SetReadDeadline(time.Time{})
		}
		x.mu.Unlock()
	}
	return n, err
}

// Trailer returns what may be passed on.
func (x *httpExchange) Trailer() (fields []message.Field) {
	for name, values := range x.r.Trailer {
		id := message.Lookup([]byte(name))
		if ours(id) || id.Hop() || !httpguts.ValidTrailerHeader(name) {
			continue
		}
		for _, v := range values {
			fields = append(fields, message.Field{Name: []byte(name), Value: []byte(v), ID: id})
		}
	}
	return fields
}

// StopBody lets reading end soon.
func (x *httpExchange) StopBody() {
	x.mu.Lock()
	defer x.mu.Unlock()
	if !x.stopped && !x.ended {
		x.stopped = true
		_ = x.rc.SetReadDeadline(time.Now().Add(x.f.limits.Linger))
	}
}

// linger reads a bit more of a body that nobody wanted, so that what is still
// under way does not turn the answer into a reset connection.
func (x *httpExchange) linger() {
	x.mu.Lock()
	ended := x.ended || x.r.ContentLength == 0
	x.mu.Unlock()
	if !ended && x.began && !x.aborted && x.r.ProtoMajor == 1 {
		x.StopBody()
		_ = x.rc.Flush()
		_, _ = io.CopyN(io.Discard, x.r.Body, x.f.limits.DrainBytes)
	}
}

// renew gives the next writes to the client their time. HTTP/2 has a limit for
// each connection instead, since a stream's would run while nothing is written.
func (x *httpExchange) renew() {
	if now := time.Now(); x.r.ProtoMajor == 1 && now.Sub(x.renewed) > deadlineSlack {
		x.renewed = now
		_ = x.rc.SetWriteDeadline(now.Add(x.f.limits.Write))
	}
}

// deadlineSlack is how late a write deadline may be renewed.
const deadlineSlack = 5 * time.Second

// set makes the fields of a head.
func (x *httpExchange) set(fields []message.Field) {
	h := x.w.Header()
	for _, f := range fields {
		if !f.ID.Hop() {
			h.Add(string(f.Name), string(f.Value))
		}
	}
	if _, ok := h["Content-Type"]; !ok {
		h["Content-Type"] = nil // or net/http guesses one
	}
}

// Inform sends an interim answer.
func (x *httpExchange) Inform(status int, fields []message.Field) error {
	x.renew()
	h := x.w.Header()
	before := h.Clone()
	x.set(fields)
	delete(h, "Content-Type")
	x.w.WriteHeader(status)
	clear(h)
	maps.Copy(h, before)
	return nil
}

// Begin takes the head.
func (x *httpExchange) Begin(r *message.Response) error {
	x.began = true
	if r.Status == http.StatusSwitchingProtocols {
		return x.hijackHead(r)
	}
	if x.r.ContentLength != 0 && x.r.ProtoMajor == 1 {
		_ = x.rc.EnableFullDuplex() // or net/http reads the body itself before an early answer
	}
	x.set(r.Fields)
	if r.HasLength {
		x.w.Header().Set("Content-Length", strconv.FormatInt(r.Length, 10))
	}
	x.mu.Lock()
	unread := x.r.ContentLength != 0 && !x.ended
	x.mu.Unlock()
	if x.f.draining.Load() || unread && x.r.ProtoMajor == 1 {
		x.w.Header().Set("Connection", "close")
	}
	x.bodyOff = !message.HasBody(x.req.Method, r.Status)
	x.renew()
	x.w.WriteHeader(r.Status)
	if !r.HasLength && !x.bodyOff && x.r.ProtoMajor == 1 {
		return x.rc.Flush() // or net/http finds a length, and has no room for a trailer
	}
	return nil
}

// Write writes.
func (x *httpExchange) Write(p []byte) (int, error) {
	if x.bodyOff {
		return len(p), nil
	}
	x.renew()
	return x.w.Write(p)
}

// Flush sends.
func (x *httpExchange) Flush() error { return x.rc.Flush() }

// End ends.
func (x *httpExchange) End(trailer []message.Field) error {
	for _, f := range trailer {
		x.w.Header().Add(http.TrailerPrefix+string(f.Name), string(f.Value))
	}
	return nil
}

// Abort has ServeHTTP end the connection, or the stream.
func (x *httpExchange) Abort() { x.aborted = true }

// Lasts counts a stream.
func (x *httpExchange) Lasts() {
	if !x.lasts {
		x.lasts = true
		x.conn.streams.Add(1)
	}
}

// Watch has w told. Net/http takes the end of the client's half for the client's,
// so that is told too.
func (x *httpExchange) Watch(w message.Watcher) {
	if x.watching != nil {
		x.watching()
		x.watching = nil
		x.watcher.Lock()   // one that has begun ends
		x.watcher.Unlock() //nolint:staticcheck // see above
	}
	if w == nil {
		return
	}
	ctx, off := x.r.Context(), new(atomic.Bool)
	stop := context.AfterFunc(ctx, func() {
		x.watcher.Lock()
		defer x.watcher.Unlock()
		if !off.Load() {
			w.ClientGone()
		}
	})
	x.watching = func() bool { off.Store(true); return stop() }
}

// Interrupt ends what waits.
func (x *httpExchange) Interrupt() {
	past := time.Unix(1, 0)
	_ = x.rc.SetReadDeadline(past)
	_ = x.rc.SetWriteDeadline(past)
}

// hijackHead takes the connection and writes the head of a 101.
func (x *httpExchange) hijackHead(r *message.Response) error {
	x.Watch(nil)
	if x.r.Context().Err() != nil {
		return errClientGone
	}
	conn, brw, err := x.rc.Hijack()
	if err != nil {
		return err
	}
	s := &hijacked{Conn: conn, limit: x.f.limits.Write}
	if n := brw.Reader.Buffered(); n > 0 {
		s.before, _ = brw.Peek(n)
	}
	_ = conn.SetDeadline(time.Time{})
	b := []byte("HTTP/1.1 101 Switching Protocols\r\n")
	for _, f := range r.Fields {
		if !f.ID.Hop() {
			b = append(append(append(append(b, f.Name...), ": "...), f.Value...), "\r\n"...)
		}
	}
	b = append(append(append(b, "Connection: Upgrade\r\nUpgrade: "...), r.Upgrade...), "\r\n\r\n"...)
	x.stream = s
	if _, err := s.Write(b); err != nil {
		_ = conn.Close()
		return err
	}
	return nil
}

// Tunnel returns the connection that Begin took.
func (x *httpExchange) Tunnel() (message.Stream, error) {
	if x.stream == nil {
		return nil, errors.New("no protocol was switched to")
	}
	return x.stream, nil
}

// hijacked is a connection that is no longer HTTP.
type hijacked struct {
	net.Conn
	before []byte // came already
	limit  time.Duration
}

// Read reads.
func (h *hijacked) Read(p []byte) (int, error) {
	if len(h.before) > 0 {
		n := copy(p, h.before)
		h.before = h.before[n:]
		return n, nil
	}
	return h.Conn.Read(p)
}

// Write writes, in time.
func (h *hijacked) Write(p []byte) (int, error) {
	_ = h.SetWriteDeadline(time.Now().Add(h.limit))
	return h.Conn.Write(p)
}

// CloseWrite ends our half.
func (h *hijacked) CloseWrite() error {
	if c, ok := h.Conn.(interface{ CloseWrite() error }); ok && c.CloseWrite() == nil {
		return nil
	}
	return h.Close()
}
