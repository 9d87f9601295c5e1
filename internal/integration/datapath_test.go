package integration

import (
	"crypto/tls"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"tako/internal/takotest"
)

// The tests of the data path run apps inside the test, so that both ends of each
// request are seen: what is deployed passes every connection on to them.

// protocols are all that clients speak.
var protocols = []takotest.Protocol{takotest.HTTP1, takotest.TLS1, takotest.H2}

// seeded makes what is random about a test, which TAKO_SEED repeats.
func seeded(t *testing.T) *rand.Rand {
	t.Helper()
	seed := uint64(time.Now().UnixNano())
	if text := os.Getenv("TAKO_SEED"); text != "" {
		var err error
		if seed, err = strconv.ParseUint(text, 10, 64); err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("TAKO_SEED=%d", seed)
	return rand.New(rand.NewPCG(seed, 0))
}

// relayed deploys an app that passes its connections on to address.
func relayed(t *testing.T, s *takotest.Server, app, address string, manifest map[string]any) {
	t.Helper()
	all := quick(map[string]any{"health": map[string]any{"kind": "connect"}})
	maps.Copy(all, manifest)
	// By TCP, so that a reset is one all the way.
	deploy(t, s, app, "1", all, "-listen", "tcp", "-relay", address)
}

// listening opens a port for an app of the test's own.
func listening(t *testing.T) net.Listener {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

// serveApp deploys an app that is h.
func serveApp(t *testing.T, s *takotest.Server, app string, h http.Handler, manifest map[string]any) {
	t.Helper()
	l := listening(t)
	server := &http.Server{Handler: h, Protocols: new(http.Protocols), ErrorLog: nil, HTTP2: &http.HTTP2Config{MaxConcurrentStreams: 500}}
	server.Protocols.SetHTTP1(manifest["protocol"] != "h2c")
	server.Protocols.SetUnencryptedHTTP2(manifest["protocol"] == "h2c")
	go server.Serve(l)
	t.Cleanup(func() { server.Close() })
	relayed(t, s, app, l.Addr().String(), manifest)
}

// serveRaw runs an app that has each connection to itself.
func serveRaw(t *testing.T, s *takotest.Server, app string, serve func(*net.TCPConn)) {
	t.Helper()
	l := listening(t)
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				serve(c.(*net.TCPConn))
			}()
		}
	}()
	relayed(t, s, app, l.Addr().String(), nil)
}

// connect opens a connection by HTTP/1.1, which ends with the test.
func connect(t testing.TB, s *takotest.Server, p takotest.Protocol, host string) net.Conn {
	t.Helper()
	c, err := dialer(s, p == takotest.TLS1)(host)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	if err := c.SetDeadline(time.Now().Add(takotest.AskWait)); err != nil {
		t.Fatal(err)
	}
	return c
}

// closeWrite ends the client's half of a connection.
func closeWrite(t testing.TB, c net.Conn) {
	t.Helper()
	if err := c.(interface{ CloseWrite() error }).CloseWrite(); err != nil {
		t.Fatal(err)
	}
}

// writeIn writes b in pieces of up to size bytes.
func writeIn(w io.Writer, b []byte, size func() int) error {
	for len(b) > 0 {
		n := min(max(size(), 1), len(b))
		if _, err := w.Write(b[:n]); err != nil {
			return err
		}
		b = b[n:]
	}
	return nil
}

// filler is n bytes that belong to seed.
func filler(seed uint64, n int) []byte {
	b := make([]byte, n)
	r := rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8), byte(seed >> 16), byte(seed >> 24)})
	r.Read(b)
	return b
}

// overTLS opens a connection that speaks HTTP/2.
func overTLS(t testing.TB, s *takotest.Server, host string) *tls.Conn {
	t.Helper()
	c, err := tls.DialWithDialer(&net.Dialer{Timeout: answerWait}, "tcp", net.JoinHostPort("127.0.0.1", strconv.Itoa(s.HTTPS)),
		&tls.Config{InsecureSkipVerify: true, ServerName: host, NextProtos: []string{"h2"}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	if err := c.SetDeadline(time.Now().Add(2 * takotest.AskWait)); err != nil {
		t.Fatal(err)
	}
	return c
}

// proxyPID is the process of a server's proxy.
func proxyPID(t testing.TB, s *takotest.Server) int {
	t.Helper()
	for _, p := range s.Processes() {
		if strings.HasPrefix(p.Command, "tako-proxy ") {
			return p.PID
		}
	}
	t.Fatal("there is no proxy")
	return 0
}

// each runs f for every one of all, at the same time.
func each[T any](all []T, f func(T)) {
	var wg sync.WaitGroup
	for _, one := range all {
		wg.Go(func() { f(one) })
	}
	wg.Wait()
}

// hostOf is the host of an app.
func hostOf(app string) string { return fmt.Sprintf("%s.localhost", app) }
