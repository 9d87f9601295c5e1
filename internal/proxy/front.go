package proxy

import (
	"context"
	"crypto/tls"
	"net"
	"net/http"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/go-hclog"
)

// The limits of connections with clients.
const (
	// HeadTime bounds the TLS handshake, and the time from a request's first byte,
	// or from the connection's beginning, to the end of its head.
	HeadTime = 10 * time.Second
	// KeepTime is how long a connection may wait for its next request.
	KeepTime = 120 * time.Second
	// MaxHead bounds a request's head, in bytes, within 4 KiB that net/http adds.
	MaxHead = 32 << 10
	// MaxStreams bounds the requests at once on one HTTP/2 connection.
	MaxStreams = 250
)

// front is what speaks HTTP with clients and calls the handler. It is all that
// the rest of the package knows of the codec.
type front interface {
	// Serve answers what comes in on l until l is closed. When it returns, each
	// accepted connection is in the counts.
	Serve(l net.Listener, secure bool)
	// Count returns the connections that may be bringing a request and have none
	// that lasts, and those that wait for their next one.
	Count() (busy, idle int)
	// Shutdown closes idle connections, asks the others to finish, and waits for
	// their end, or ctx's.
	Shutdown(ctx context.Context)
	// Close ends every connection.
	Close()
}

// clientConn is what is known of one connection with a client.
type clientConn struct {
	streams atomic.Int64 // requests on it that last
	state   http.ConnState
}

type connKey struct{}

// connOf returns the connection that a request came on.
func connOf(r *http.Request) *clientConn {
	if c, ok := r.Context().Value(connKey{}).(*clientConn); ok {
		return c
	}
	return &clientConn{}
}

// netHTTP is the front by net/http.
type netHTTP struct {
	server *http.Server
	tls    *tls.Config
	door   *doorman

	mu    sync.Mutex
	conns map[net.Conn]*clientConn
}

func newNetHTTP(h http.Handler, conf *tls.Config, door *doorman, log hclog.Logger) *netHTTP {
	f := &netHTTP{tls: conf, door: door, conns: make(map[net.Conn]*clientConn)}
	f.server = &http.Server{
		Handler: h, TLSConfig: conf,
		ReadHeaderTimeout: HeadTime, IdleTimeout: KeepTime, MaxHeaderBytes: MaxHead,
		DisableGeneralOptionsHandler: true, // OPTIONS * is the app's
		HTTP2: &http.HTTP2Config{
			MaxConcurrentStreams: MaxStreams, WriteByteTimeout: ReplyTime,
			SendPingTimeout: KeepTime, PingTimeout: HeadTime,
		},
		ErrorLog:    log.StandardLogger(&hclog.StandardLoggerOptions{ForceLevel: hclog.Debug}),
		ConnContext: f.began,
		ConnState:   f.changed,
	}
	return f
}

func (f *netHTTP) began(ctx context.Context, nc net.Conn) context.Context {
	c := &clientConn{}
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

func (f *netHTTP) Serve(l net.Listener, secure bool) {
	l = guarded{Listener: l, door: f.door}
	if secure {
		l = tls.NewListener(l, f.tls)
	}
	_ = f.server.Serve(l) // it returns no other error than that l was closed
}

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

func (f *netHTTP) Shutdown(ctx context.Context) { _ = f.server.Shutdown(ctx) }
func (f *netHTTP) Close()                       { _ = f.server.Close() }
