package h1

import (
	"bufio"
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"flag"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"
	"go.uber.org/goleak"

	"tako/internal/proxy/eventloop"
	"tako/internal/proxy/message"
)

// loops serve all connections in the second run of the tests.
var loops *eventloop.Group

func TestMain(m *testing.M) { goleak.VerifyTestMain(twice{m}) }

// twice runs the tests once with a goroutine for each connection and once on event
// loops.
type twice struct{ *testing.M }

func (m twice) Run() int {
	code := m.M.Run()
	for _, name := range []string{"test.bench", "test.fuzz", "test.list"} {
		if flag.Lookup(name).Value.String() != "" {
			return code
		}
	}
	if code != 0 {
		return code
	}
	var err error
	if loops, err = eventloop.NewGroup(2); err != nil {
		fmt.Println(err)
		return 1
	}
	fmt.Println("again, on event loops")
	code = m.M.Run()
	if err := loops.Close(10 * time.Second); err != nil || loops.Conns() > 0 {
		fmt.Println(loops.Conns(), "connections are left on the loops:", err)
		return 1
	}
	return code
}

type handlerFunc func(x message.Exchange)

// Handle leaves the loop: handlers of tests wait for other things than connections.
func (f handlerFunc) Handle(x message.Exchange) {
	x.(*conn).Task().Detach()
	f(x)
}

// attached is a handler that waits for nothing but connections.
type attached func(x message.Exchange)

func (f attached) Handle(x message.Exchange) { f(x) }

// beneath is a connection beneath TLS.
type beneath struct {
	net.Conn
	held bool
}

func (b *beneath) Hold(held bool) { b.held = held }

// Ahead does not know.
func (b *beneath) Ahead() bool { return true }

func (b *beneath) Read(p []byte) (int, error) {
	if b.held {
		return 0, ErrHeld
	}
	return b.Conn.Read(p)
}

func (b *beneath) NetConn() net.Conn { return b.Conn }

// say answers with a body of known length.
func say(x message.Exchange, status int, body string) error {
	if err := x.Begin(&message.Response{Status: status, Length: int64(len(body)), HasLength: true}); err != nil {
		return err
	}
	if _, err := io.WriteString(writer{x}, body); err != nil {
		return err
	}
	return x.End(nil)
}

type writer struct{ x message.Exchange }

func (w writer) Write(p []byte) (int, error) { return w.x.Write(p) }

type reader struct{ x message.Exchange }

func (r reader) Read(p []byte) (int, error) { return r.x.ReadBody(p) }

// field makes one with its ID.
func field(name, value string) message.Field {
	return message.Field{Name: []byte(name), Value: []byte(value), ID: message.Lookup([]byte(name))}
}

// echo answers with what was asked.
func echo(x message.Exchange) {
	r := x.Request()
	body, err := io.ReadAll(reader{x})
	if err != nil {
		status := http.StatusBadRequest
		if e, ok := errors.AsType[*message.Error](err); ok {
			status = e.Status
		} else if errors.Is(err, os.ErrDeadlineExceeded) {
			status = http.StatusRequestTimeout
		}
		_ = say(x, status, "no body")
		return
	}
	_ = say(x, http.StatusOK, fmt.Sprintf("%s %s %s", r.Method, r.Target, body))
}

// server is one under test and what it listens on.
type server struct {
	*Server
	t    testing.TB
	l    net.Listener
	tls  *tls.Config
	refs sync.WaitGroup
}

// limits are short enough for a test that waits for one to pass, and long enough
// for all others.
func limits() message.Limits {
	l := message.DefaultLimits()
	l.Head, l.Keep, l.Body, l.Write, l.HalfOpen, l.Linger = time.Minute, time.Minute, time.Minute, time.Minute, time.Minute, 10*time.Second
	return l
}

func serveOn(t testing.TB, network string, l message.Limits, secure *tls.Config, h message.Handler) *server {
	t.Helper()
	return start(t, network, &Server{Handler: h, Limits: l, Log: hclog.NewNullLogger(), goneTime: 10 * time.Millisecond}, secure)
}

// start has s serve what connects to a new address.
func start(t testing.TB, network string, of *Server, secure *tls.Config) *server {
	t.Helper()
	return startOn(t, loops, network, of, secure)
}

// startOn is start on loops, or with a goroutine for each connection if g is nil.
func startOn(t testing.TB, g *eventloop.Group, network string, of *Server, secure *tls.Config) *server {
	t.Helper()
	addr := "127.0.0.1:0"
	if network == "unix" {
		dir, err := os.MkdirTemp("", "h1") //nolint:usetesting // a name of the test's would be too long for a socket
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { os.RemoveAll(dir) })
		addr = filepath.Join(dir, "s")
	}
	ln, err := net.Listen(network, addr)
	if err != nil {
		t.Fatal(err)
	}
	s := &server{Server: of, t: t, l: ln, tls: secure}
	var closing io.Closer = ln
	if g == nil {
		s.refs.Go(s.accept)
	} else {
		if l, ok := ln.(*net.UnixListener); ok {
			l.SetUnlinkOnClose(false) // the path is needed
		}
		on, err := g.Listen(ln)
		if err != nil {
			t.Fatal(err)
		}
		closing = on
		s.refs.Go(func() { on.Serve(s.arrive, func(err error) time.Duration { t.Error(err); return time.Millisecond }) })
	}
	t.Cleanup(func() {
		_ = closing.Close()
		s.Close()
		s.refs.Wait()
	})
	return s
}

// accept accepts without loops.
func (s *server) accept() {
	for {
		nc, err := s.l.Accept()
		if err != nil {
			return
		}
		s.refs.Go(func() {
			if s.tls != nil {
				tc := tls.Server(&beneath{Conn: nc}, s.tls)
				if tc.Handshake() != nil {
					_ = nc.Close()
					return
				}
				nc = tc
			}
			s.Serve(nc, &message.Client{Secure: s.tls != nil})
		})
	}
}

// arrive takes what a loop has accepted.
func (s *server) arrive(c *eventloop.Conn) {
	s.refs.Add(1)
	if s.tls == nil {
		s.ServeOn(nil, c, &message.Client{}, s.refs.Done)
		return
	}
	c.Idle(handshake{s, c})
}

// handshake is that of a connection on a loop.
type handshake struct {
	s *server
	c *eventloop.Conn
}

func (h handshake) Start(t *eventloop.Task) {
	h.c.Own(t)
	tc := tls.Server(&beneath{Conn: h.c}, h.s.tls)
	if tc.Handshake() != nil {
		_ = h.c.Close()
		h.s.refs.Done()
		return
	}
	h.s.ServeOn(t, tc, &message.Client{Secure: true}, h.s.refs.Done)
}

func serve(t testing.TB, l message.Limits, h handlerFunc) *server {
	t.Helper()
	return serveOn(t, "tcp", l, nil, h)
}

// client is a connection to a server under test.
type client struct {
	net.Conn
	t  testing.TB
	br *bufio.Reader
}

func (s *server) dial() *client {
	s.t.Helper()
	nc, err := net.Dial(s.l.Addr().Network(), s.l.Addr().String())
	if err != nil {
		s.t.Fatal(err)
	}
	if s.tls != nil {
		nc = tls.Client(nc, &tls.Config{InsecureSkipVerify: true})
	}
	_ = nc.SetDeadline(time.Now().Add(time.Minute))
	s.t.Cleanup(func() { nc.Close() })
	return &client{Conn: nc, t: s.t, br: bufio.NewReader(nc)}
}

func (c *client) send(raw string) *client {
	c.t.Helper()
	if _, err := io.WriteString(c, raw); err != nil {
		c.t.Fatal(err)
	}
	return c
}

// answer reads one answer with its body.
func (c *client) answer(method string) (*http.Response, string) {
	c.t.Helper()
	resp, err := http.ReadResponse(c.br, &http.Request{Method: method})
	if err != nil {
		c.t.Fatalf("read the answer: %v", err)
	}
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		c.t.Fatalf("read the body of %d: %v", resp.StatusCode, err)
	}
	return resp, string(body)
}

// want reads an answer that must be this one.
func (c *client) want(status int, body string) *http.Response {
	c.t.Helper()
	resp, got := c.answer("GET")
	if resp.StatusCode != status || got != body {
		c.t.Fatalf("%d %q, want %d %q", resp.StatusCode, got, status, body)
	}
	return resp
}

// ends reads the end of the connection, and nothing before it.
func (c *client) ends() {
	c.t.Helper()
	if rest, err := io.ReadAll(c.br); err != nil || len(rest) > 0 {
		c.t.Fatalf("after the last answer: %q, %v", rest, err)
	}
}

// everywhere runs the test on TCP, a Unix socket, and TLS.
func everywhere(t *testing.T, l message.Limits, h handlerFunc, test func(t *testing.T, s *server)) {
	t.Helper()
	everywhereBy(t, l, h, test)
}

func everywhereBy(t *testing.T, l message.Limits, h message.Handler, test func(t *testing.T, s *server)) {
	t.Helper()
	for _, kind := range []string{"tcp", "unix", "tls"} {
		t.Run(kind, func(t *testing.T) {
			network, secure := kind, (*tls.Config)(nil)
			if kind == "tls" {
				network, secure = "tcp", serverTLS(t)
			}
			test(t, serveOn(t, network, l, secure, h))
		})
	}
}

var serverTLS = func() func(testing.TB) *tls.Config {
	made := sync.OnceValues(func() (*tls.Config, error) {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			return nil, err
		}
		cert := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour), DNSNames: []string{"h"}}
		der, err := x509.CreateCertificate(rand.Reader, cert, cert, key.Public(), key)
		return &tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}}, err
	})
	return func(t testing.TB) *tls.Config {
		conf, err := made()
		if err != nil {
			t.Fatal(err)
		}
		return conf
	}
}()

// until waits for something to become true.
func until(t testing.TB, what string, is func() bool) {
	t.Helper()
	for end := time.Now().Add(time.Minute); !is(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("still not: %s", what)
		}
	}
}

func TestRequestsAreAnsweredInTurn(t *testing.T) {
	everywhere(t, limits(), echo, func(t *testing.T, s *server) {
		c := s.dial()
		for range 3 {
			c.send("GET /a HTTP/1.1\r\nHost: h\r\n\r\n").want(200, "GET /a ")
			c.send("POST /b HTTP/1.1\r\nHost: h\r\nContent-Length: 5\r\n\r\nhello\r\n").want(200, "POST /b hello")
			c.send("PUT /c HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n1\r\n!\r\n0\r\n\r\n").want(200, "PUT /c hello!")
		}
		// What old clients send after a body is not the beginning of a request.
		c.send("POST /b HTTP/1.1\r\nHost: h\r\nContent-Length: 5\r\n\r\nhello\r\n").want(200, "POST /b hello")
		until(t, "the connection waits for its next request", func() bool { _, idle := s.Count(); return idle == 1 })
		if resp := c.send("GET /d HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n").want(200, "GET /d "); !resp.Close || resp.Header.Get("Date") == "" {
			t.Errorf("%+v", resp)
		}
		c.ends()
	})
}

func TestPipelinedRequestsAreAnsweredInTheirOrder(t *testing.T) {
	everywhere(t, limits(), echo, func(t *testing.T, s *server) {
		var all, want strings.Builder
		for i := range 40 {
			fmt.Fprintf(&all, "GET /%d HTTP/1.1\r\nHost: h\r\nX: %s\r\n\r\n", i, strings.Repeat("x", i*50))
			fmt.Fprintf(&want, "GET /%d \n", i)
			fmt.Fprintf(&all, "POST /p HTTP/1.1\r\nHost: h\r\nContent-Length: %d\r\n\r\n%s", i*100, strings.Repeat("y", i*100))
			fmt.Fprintf(&want, "POST /p %s\n", strings.Repeat("y", i*100))
			fmt.Fprintf(&all, "POST /c HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n1\r\nz\r\n0\r\n\r\n", 1+i*300, strings.Repeat("y", 1+i*300))
			fmt.Fprintf(&want, "POST /c %sz\n", strings.Repeat("y", 1+i*300))
		}
		c := s.dial()
		go io.WriteString(c, all.String())
		var got strings.Builder
		for range 120 {
			_, body := c.answer("GET")
			got.WriteString(body + "\n")
		}
		if got.String() != want.String() {
			t.Errorf("got %d bytes, want %d", got.Len(), want.Len())
		}
	})
}

func TestARequestInPiecesIsTheSame(t *testing.T) {
	s := serve(t, limits(), echo)
	for _, raw := range []string{
		"\r\nPOST /a HTTP/1.1\r\nHost: h\r\nContent-Length: 5\r\n\r\nhello",
		"POST /a HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n3;x\r\nhel\r\n2\r\nlo\r\n0\r\nX: 1\r\n\r\n",
	} {
		c := s.dial()
		for i := range raw {
			c.send(raw[i : i+1])
		}
		c.want(200, "POST /a hello")
	}
}

func TestWhatIsNoRequestIsAnsweredOnceAndTheConnectionEnds(t *testing.T) {
	everywhere(t, limits(), echo, func(t *testing.T, s *server) {
		for raw, status := range map[string]int{
			"GET /\r\n":                                     400,
			"\x16\x03\x01\x02\x00\x01\x00\n":                400,
			"GET / HTTP/2.0\r\n":                            505,
			"CONNECT h:1 HTTP/1.1\r\nHost: h:1\r\n\r\nrest": 405,
			"GET /" + strings.Repeat("a", message.MaxTarget) + " HTTP/1.1\r\nHost: h\r\n\r\n":                414,
			"GET / HTTP/1.1\r\nHost: h\r\nX: " + strings.Repeat("a", message.MaxHead) + "\r\n\r\n":           431,
			"GET / HTTP/1.1\r\nHost: h\r\n" + strings.Repeat("X: 1\r\n", message.MaxFields) + "\r\n":         431,
			"POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: gzip, chunked\r\n\r\n":                         501,
			"PUT / HTTP/1.1\r\nHost: h\r\nExpect: x\r\nContent-Length: 1\r\n\r\n":                            417,
			"GET / HTTP/1.1\r\nHost: h\r\n\r\nGARBAGE\r\n\r\nGET / HTTP/1.1\r\nHost: h\r\n\r\n":              -400,
			"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n": 400,
		} {
			c := s.dial()
			go io.WriteString(c, raw) // it may not be read to its end
			if status < 0 {
				c.want(200, "GET / ")
				status = -status
			}
			if resp := c.want(status, http.StatusText(status)); !resp.Close {
				t.Errorf("%.60q: %+v", raw, resp)
			}
			c.ends()
		}
	})
}

func TestAHeadOfTheGreatestSizeIsRead(t *testing.T) {
	everywhere(t, limits(), echo, func(t *testing.T, s *server) {
		const start = "GET / HTTP/1.1\r\nHost: h\r\nX: "
		c := s.dial()
		for range 2 {
			c.send(start+strings.Repeat("a", message.MaxHead-len(start)-4)+"\r\n\r\n").want(200, "GET / ")
		}
	})
}

func TestAHalfClosedClientGetsItsAnswers(t *testing.T) {
	everywhere(t, limits(), echo, func(t *testing.T, s *server) {
		c := s.dial()
		c.send("POST /a HTTP/1.1\r\nHost: h\r\nContent-Length: 5\r\n\r\nhelloGET /b HTTP/1.1\r\nHost: h\r\n\r\n")
		_ = closeWrite(c.Conn)
		c.want(200, "POST /a hello")
		c.want(200, "GET /b ")
		c.ends()

		c = s.dial().send("GET /b HTTP/1.1\r\nHost: h\r\n")
		_ = closeWrite(c.Conn)
		c.want(400, "Bad Request")
		c.ends()
	})
}

func TestALongUploadArrives(t *testing.T) {
	size := 2 << 20
	everywhere(t, limits(), func(x message.Exchange) {
		n, err := io.Copy(io.Discard, reader{x})
		_ = say(x, 200, fmt.Sprint(n, err))
	}, func(t *testing.T, s *server) {
		c := s.dial()
		for _, chunk := range []int{0, 10, 100, 3000, 5000, 100_000} {
			if chunk == 0 {
				c.send(fmt.Sprintf("POST / HTTP/1.1\r\nHost: h\r\nContent-Length: %d\r\n\r\n", size))
				c.send(strings.Repeat("x", size))
				c.want(200, fmt.Sprint(size, nil))
				continue
			}
			var b bytes.Buffer
			b.WriteString("POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n")
			n := min(size, chunk*1000) / chunk
			for range n {
				fmt.Fprintf(&b, "%x\r\n%s\r\n", chunk, strings.Repeat("x", chunk))
			}
			c.send(b.String()+"0\r\n\r\n").want(200, fmt.Sprint(n*chunk, nil))
		}
	})
}

func TestABodyThatIsNoneIsAnError(t *testing.T) {
	s := serve(t, limits(), echo)
	for raw, status := range map[string]int{
		"POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhelloX":                                         400,
		"POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nX: " + strings.Repeat("a", MaxTrailer) + "\r\n": 431,
	} {
		c := s.dial().send(raw)
		if resp := c.want(status, "no body"); !resp.Close {
			t.Errorf("%.60q: %+v", raw, resp)
		}
		c.ends()
	}
	c := s.dial().send("POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 5\r\n\r\nhel")
	_ = closeWrite(c.Conn)
	c.want(400, "no body")
	c.ends()
}

func TestBuffered(t *testing.T) {
	s := serve(t, limits(), func(x message.Exchange) {
		b, ok := x.Buffered()
		rest, err := io.ReadAll(reader{x})
		text := fmt.Sprintf("%q %v %q %v", b, ok, rest, err)
		for _, f := range x.Trailer() {
			text += fmt.Sprintf(" %s=%s", f.Name, f.Value)
		}
		_ = say(x, 200, text)
	})
	c := s.dial()
	for raw, want := range map[string]string{
		"GET / HTTP/1.1\r\nHost: h\r\n\r\n":                                                                        `"" true "" <nil>`,
		"GET / HTTP/1.1\r\nHost: h\r\nContent-Length: 5\r\n\r\nhello":                                              `"hello" true "" <nil>`,
		"GET / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n":                                 `"" true "" <nil>`,
		"GET / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\nX-T: 1\r\n\r\n":         `"hello" true "" <nil> X-T=1`,
		"GET / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nh\r\n3\r\nell\r\n1\r\no\r\n0\r\n\r\n": `"hello" true "" <nil>`,
	} {
		c.send(raw).want(200, want)
	}
	big := strings.Repeat("x", SmallBuffer)
	c.send("GET / HTTP/1.1\r\nHost: h\r\nContent-Length: 4096\r\n\r\n"+big).want(200, fmt.Sprintf(`"" false %q <nil>`, big))
	c.send("GET / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n1000\r\n"+big+"\r\n0\r\n\r\n").want(200, fmt.Sprintf(`"" false %q <nil>`, big))
}

func TestAnswersAreFramedByTheirLengthTheMethodAndTheVersion(t *testing.T) {
	var resp atomic.Pointer[message.Response]
	s := serve(t, limits(), func(x message.Exchange) {
		_ = x.Begin(resp.Load())
		_, _ = io.WriteString(writer{x}, "hello ")
		_, _ = io.WriteString(writer{x}, "world")
		_ = x.End([]message.Field{field("X-T", "1"), field("Content-Length", "7")})
	})
	date := field("Date", "today")
	for _, c := range []struct {
		request string
		resp    message.Response
		want    string
	}{
		{"GET / HTTP/1.1", message.Response{Status: 200, Length: 11}, "HTTP/1.1 200 OK\r\nDate: today\r\nContent-Length: 11\r\n\r\nhello world"},
		{"GET / HTTP/1.1", message.Response{Status: 200, Length: -1}, "HTTP/1.1 200 OK\r\nDate: today\r\nTransfer-Encoding: chunked\r\n\r\n6\r\nhello \r\n5\r\nworld\r\n0\r\nX-T: 1\r\n\r\n"},
		{"GET / HTTP/1.0", message.Response{Status: 200, Length: -1}, "HTTP/1.1 200 OK\r\nDate: today\r\nConnection: close\r\n\r\nhello world"},
		{"GET / HTTP/1.0\r\nConnection: keep-alive", message.Response{Status: 200, Length: -1}, "HTTP/1.1 200 OK\r\nDate: today\r\nConnection: close\r\n\r\nhello world"},
		{"GET / HTTP/1.0\r\nConnection: keep-alive", message.Response{Status: 200, Length: 11}, "HTTP/1.1 200 OK\r\nDate: today\r\nContent-Length: 11\r\nConnection: keep-alive\r\n\r\nhello world"},
		{"HEAD / HTTP/1.1", message.Response{Status: 200, Length: 11, HasLength: true}, "HTTP/1.1 200 OK\r\nDate: today\r\nContent-Length: 11\r\n\r\n"},
		{"HEAD / HTTP/1.1", message.Response{Status: 200, Length: -1}, "HTTP/1.1 200 OK\r\nDate: today\r\n\r\n"},
		{"GET / HTTP/1.1", message.Response{Status: 204}, "HTTP/1.1 204 No Content\r\nDate: today\r\n\r\n"},
		{"GET / HTTP/1.1", message.Response{Status: 304, Length: 11, HasLength: true}, "HTTP/1.1 304 Not Modified\r\nDate: today\r\nContent-Length: 11\r\n\r\n"},
		{"GET / HTTP/1.1", message.Response{Status: 304, Length: -1}, "HTTP/1.1 304 Not Modified\r\nDate: today\r\n\r\n"},
		{"GET / HTTP/1.1", message.Response{Status: 599, Length: 11, Fields: []message.Field{
			field("A", "1"), field("Connection", "B, A, Cookie"), field("Content-Length", "3"), field("Transfer-Encoding", "chunked"), field("b", "2"), field("Keep-Alive", "1"), field("cookie", "3"), field("C", "4"),
		}, Nominates: true}, "HTTP/1.1 599 \r\ncookie: 3\r\nC: 4\r\nDate: today\r\nContent-Length: 11\r\n\r\nhello world"},
	} {
		c.resp.Fields = append(c.resp.Fields, date)
		resp.Store(&c.resp)
		client := s.dial().send(c.request + "\r\nHost: h\r\n\r\n")
		_ = closeWrite(client.Conn)
		got, err := io.ReadAll(client)
		if err != nil || string(got) != c.want {
			t.Errorf("%s, %d: %v\n%q, want\n%q", c.request, c.resp.Status, err, got, c.want)
		}
	}
}

func TestALargeAnswerArrives(t *testing.T) {
	everywhere(t, limits(), func(x message.Exchange) {
		size, _ := strconv.Atoi(string(x.Request().Target[2:]))
		length := int64(size)
		if x.Request().Target[1] == 'c' {
			length = -1
		}
		_ = x.Begin(&message.Response{Status: 200, Length: length})
		for left, n := size, 1; left > 0; n = n*3 + 1 {
			p := bytes.Repeat([]byte{byte('a' + n%26)}, min(n, left))
			if _, err := x.Write(p); err != nil {
				return
			}
			if left -= len(p); n%2 == 0 && x.Flush() != nil {
				return
			}
		}
		_ = x.End(nil)
	}, func(t *testing.T, s *server) {
		c := s.dial()
		for _, kind := range []string{"l", "c"} {
			for _, size := range []int{0, 1, 4000, 16300, 16384, 16400, 40000, 1 << 20} {
				var want strings.Builder
				for left, n := size, 1; left > 0; n = n*3 + 1 {
					want.WriteString(strings.Repeat(string(rune('a'+n%26)), min(n, left)))
					left -= min(n, left)
				}
				c.send(fmt.Sprintf("GET /%s%d HTTP/1.1\r\nHost: h\r\n\r\n", kind, size)).want(200, want.String())
			}
		}
	})
}

func TestAWrongNumberOfBytesNeverLooksWhole(t *testing.T) {
	s := serve(t, limits(), func(x message.Exchange) {
		switch string(x.Request().Target) {
		case "/short":
			_ = x.Begin(&message.Response{Status: 200, Length: 10})
			_, _ = x.Write([]byte("hello"))
			_ = x.Flush()
			if x.End(nil) == nil {
				t.Error("a short answer ended")
			}
		case "/long":
			_ = x.Begin(&message.Response{Status: 200, Length: 3})
			if _, err := x.Write([]byte("hello")); err == nil {
				t.Error("a long answer was written")
			}
			_ = x.End(nil)
		case "/chunked", "/old":
			_ = x.Begin(&message.Response{Status: 200, Length: -1})
			_, _ = x.Write([]byte("hello"))
			_ = x.Flush()
			x.Abort()
		case "/panic":
			_ = x.Begin(&message.Response{Status: 200, Length: -1})
			_, _ = x.Write([]byte("hello"))
			_ = x.Flush()
			panic("test")
		case "/nothing":
		}
	})
	for target, version := range map[string]string{"/short": "1.1", "/long": "1.1", "/chunked": "1.1", "/old": "1.0", "/panic": "1.1", "/nothing": "1.1"} {
		c := s.dial().send("GET " + target + " HTTP/" + version + "\r\nHost: h\r\n\r\n")
		resp, err := http.ReadResponse(c.br, nil)
		if err == nil {
			_, err = io.ReadAll(resp.Body)
		}
		if err == nil {
			t.Errorf("%s looks whole", target)
		}
	}
}

func TestAHandlerThatPanicsIsLogged(t *testing.T) {
	var out bytes.Buffer
	h := handlerFunc(func(message.Exchange) { panic("out of order") })
	s := start(t, "tcp", &Server{Handler: h, Limits: limits(), Log: hclog.New(&hclog.LoggerOptions{Output: &out})}, nil)
	s.dial().send("GET / HTTP/1.1\r\nHost: h\r\n\r\n").ends()
	s.Shutdown(t.Context())
	if got := out.String(); !strings.Contains(got, "out of order") || !strings.Contains(got, "h1.TestAHandlerThatPanicsIsLogged") {
		t.Errorf("log: %s", got)
	}
}

func TestExpect(t *testing.T) {
	reads := serve(t, limits(), echo)
	refuses := serve(t, limits(), func(x message.Exchange) { _ = say(x, http.StatusRequestEntityTooLarge, "no") })
	const head = "PUT / HTTP/1.1\r\nHost: h\r\nExpect: 100-continue\r\n"
	for _, body := range [][2]string{{"Content-Length: 5\r\n\r\n", "hello"}, {"Transfer-Encoding: chunked\r\n\r\n", "5\r\nhello\r\n0\r\n\r\n"}} {
		c := reads.dial().send(head + body[0])
		c.want(100, "")
		c.send(body[1]).want(200, "PUT / hello")
		c.send(head+body[0]+body[1]).want(200, "PUT / hello") // it did not wait
		c.send("GET /next HTTP/1.1\r\nHost: h\r\n\r\n").want(200, "GET /next ")

		c = refuses.dial().send(head + body[0])
		if resp := c.want(413, "no"); !resp.Close {
			t.Errorf("%+v", resp)
		}
		c.ends()
	}
}

func TestThe100IsSentOnce(t *testing.T) {
	read := make(chan bool)
	s := serve(t, limits(), func(x message.Exchange) {
		for p := make([]byte, 10); ; {
			if _, err := x.ReadBody(p); err != nil {
				break
			}
			read <- true
		}
		_ = say(x, 200, "done")
	})
	c := s.dial().send("PUT / HTTP/1.1\r\nHost: h\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\n")
	c.want(100, "")
	c.send("a")
	<-read
	c.send("b")
	<-read
	c.want(200, "done")
}

func TestAnAnswerBeforeTheBody(t *testing.T) {
	l := limits()
	s := serve(t, l, func(x message.Exchange) { _ = say(x, 200, "early") })
	// What is short is read, so that another request may follow.
	c := s.dial().send("POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 10000\r\n\r\nhello")
	if resp := c.want(200, "early"); resp.Close {
		t.Errorf("%+v", resp)
	}
	c.send(strings.Repeat("x", 10000-5)).send("GET / HTTP/1.1\r\nHost: h\r\n\r\n").want(200, "early")

	// What is not, is not; but the client gets to read its answer.
	for _, framing := range []string{"Content-Length: 100000000", "Transfer-Encoding: chunked"} {
		c = s.dial().send("POST / HTTP/1.1\r\nHost: h\r\n" + framing + "\r\n\r\n10000\r\n" + strings.Repeat("x", 60000))
		if resp := c.want(200, "early"); !resp.Close {
			t.Errorf("%+v", resp)
		}
		c.ends()
	}
}

func TestWhatLingersEnds(t *testing.T) {
	l := limits()
	l.Linger = 10 * time.Millisecond
	s := serve(t, l, func(x message.Exchange) { _ = say(x, 200, "early") })
	c := s.dial().send("POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 1000\r\n\r\nhello") // and never the rest
	c.want(200, "early")
	c.ends()

	// Bytes that go on and on do not hold it for longer than LingerBody.
	l = limits()
	l.Linger, l.LingerBody = time.Hour, 50*time.Millisecond
	s = serve(t, l, func(x message.Exchange) { _ = say(x, 200, "early") })
	c = s.dial().send("POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n")
	c.want(200, "early")
	for err := error(nil); err == nil; {
		_, err = io.WriteString(c, "1\r\nx\r\n")
	}
	until(t, "the connection has ended", func() bool { busy, idle := s.Count(); return busy+idle == 0 })
}

func TestClientThatReadsAfterItsBodyGetsItsAnswer(t *testing.T) {
	everywhere(t, limits(), func(x message.Exchange) { _ = say(x, 413, "too large") }, func(t *testing.T, s *server) {
		const size = 30_000_000 // more than the kernel holds between the two
		c := s.dial().send(fmt.Sprintf("POST / HTTP/1.1\r\nHost: h\r\nContent-Length: %d\r\n\r\n", size))
		piece := make([]byte, 100_000)
		for range size / len(piece) {
			if _, err := c.Write(piece); err != nil {
				t.Fatal(err)
			}
		}
		if resp := c.want(413, "too large"); !resp.Close {
			t.Errorf("%+v", resp)
		}
		c.ends()
	})
}

func TestInterimAnswers(t *testing.T) {
	s := serve(t, limits(), func(x message.Exchange) {
		if err := x.Inform(http.StatusEarlyHints, []message.Field{field("Link", "</a>"), field("Connection", "close")}); err != nil {
			t.Error(err)
		}
		if x.Inform(http.StatusSwitchingProtocols, nil) == nil || x.Inform(http.StatusOK, nil) == nil {
			t.Error("an answer that is not an interim one was taken for one")
		}
		_ = say(x, 200, "done")
		if x.Inform(http.StatusEarlyHints, nil) == nil {
			t.Error("an interim answer after the answer")
		}
	})
	c := s.dial().send("GET / HTTP/1.1\r\nHost: h\r\n\r\n")
	if resp := c.want(103, ""); resp.Header.Get("Link") != "</a>" || resp.Header.Get("Connection") != "" {
		t.Errorf("%+v", resp)
	}
	c.want(200, "done")
	c = s.dial().send("GET / HTTP/1.0\r\nHost: h\r\n\r\n")
	c.want(200, "done")
	c.ends()
}

func TestATunnelCarriesBytesBothWays(t *testing.T) {
	everywhere(t, limits(), func(x message.Exchange) {
		r := x.Request()
		if r.Upgrade == nil {
			if _, err := x.Tunnel(); err == nil {
				t.Error("a tunnel out of nothing")
			}
			_ = say(x, 200, "no")
			return
		}
		_ = x.Begin(&message.Response{Status: http.StatusSwitchingProtocols, Upgrade: r.Upgrade, Fields: []message.Field{field("Sec-WebSocket-Accept", "k")}})
		stream, err := x.Tunnel()
		if err != nil {
			t.Error(err)
			return
		}
		defer stream.Close()
		_, _ = io.Copy(struct{ io.Writer }{stream}, struct{ io.Reader }{stream})
		_ = stream.CloseWrite()
	}, func(t *testing.T, s *server) {
		c := s.dial().send("GET / HTTP/1.1\r\nHost: h\r\n\r\n")
		c.want(200, "no")
		c.send("GET / HTTP/1.1\r\nHost: h\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\r\nearly ")
		resp, err := http.ReadResponse(c.br, nil)
		if err != nil || resp.StatusCode != 101 || resp.Header.Get("Upgrade") != "echo" || resp.Header.Get("Connection") != "Upgrade" || resp.Header.Get("Sec-Websocket-Accept") != "k" {
			t.Fatalf("%+v, %v", resp, err)
		}
		c.send("late")
		_ = closeWrite(c.Conn)
		if got, err := io.ReadAll(c.br); string(got) != "early late" || err != nil {
			t.Errorf("%q, %v", got, err)
		}
	})
}

func TestABodyIsSpliced(t *testing.T) {
	content := bytes.Repeat([]byte("0123456789"), 100_000)
	origin, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer origin.Close()
	go func() {
		for {
			nc, err := origin.Accept()
			if err != nil {
				return
			}
			_, _ = nc.Write(content)
			nc.Close()
		}
	}()
	everywhere(t, limits(), func(x message.Exchange) {
		src, err := net.Dial("tcp", origin.Addr().String())
		if err != nil {
			t.Error(err)
			return
		}
		defer src.Close()
		length := int64(len(content))
		if string(x.Request().Target) == "/short" {
			length *= 2
		}
		_ = x.Begin(&message.Response{Status: 200, Length: length})
		can := x.(message.Splicer).CanSplice()
		n, err := x.(message.Splicer).SpliceFrom(src, length)
		if can == errors.Is(err, errors.ErrUnsupported) {
			t.Errorf("it can: %t, but %v", can, err)
		}
		switch {
		case errors.Is(err, errors.ErrUnsupported):
			if _, plain := x.(*conn).nc.(*net.TCPConn); n != 0 || plain {
				t.Errorf("%d bytes, %v", n, err)
			}
			_, _ = io.Copy(writer{x}, src)
		case err != nil && length == int64(len(content)) || err == nil && n != length:
			t.Errorf("%d bytes, %v", n, err)
		}
		_ = x.End(nil)
	}, func(t *testing.T, s *server) {
		c := s.dial()
		for range 2 {
			c.send("GET / HTTP/1.1\r\nHost: h\r\n\r\n").want(200, string(content))
		}
		c.send("GET /short HTTP/1.1\r\nHost: h\r\n\r\n")
		resp, err := http.ReadResponse(c.br, nil)
		if err != nil {
			t.Fatal(err)
		}
		if n, err := io.Copy(io.Discard, resp.Body); err == nil || n > int64(len(content)) {
			t.Errorf("a short answer looks whole: %d bytes, %v", n, err)
		}
	})
}

func TestASpliceWaitsForASlowAppButNotForAClientThatDoesNotRead(t *testing.T) {
	l := limits()
	l.Write = 50 * time.Millisecond
	app, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer app.Close()
	spliced := make(chan error, 1)
	s := serve(t, l, func(x message.Exchange) {
		src, err := net.Dial("tcp", app.Addr().String())
		if err != nil {
			t.Error(err)
			return
		}
		defer src.Close()
		length := int64(10)
		if string(x.Request().Target) == "/endless" {
			length = 1 << 40
		}
		_ = x.Begin(&message.Response{Status: 200, Length: length})
		_, err = x.(message.Splicer).SpliceFrom(src, length)
		spliced <- err
		_ = x.End(nil)
	})
	c := s.dial().send("GET /slow HTTP/1.1\r\nHost: h\r\n\r\n")
	src, err := app.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer src.Close()
	_, _ = io.WriteString(src, "hello")
	time.Sleep(10 * l.Write) // the app's slowness is what is tested
	_, _ = io.WriteString(src, "hello")
	c.want(200, "hellohello")
	if err := <-spliced; err != nil {
		t.Error(err)
	}

	s.dial().send("GET /endless HTTP/1.1\r\nHost: h\r\n\r\n")
	if src, err = app.Accept(); err != nil {
		t.Fatal(err)
	}
	go func() {
		for p := make([]byte, 64<<10); err == nil; {
			_, err = src.Write(p)
		}
	}()
	if err := <-spliced; !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Error(err)
	}
}

func TestASlowHeadIsAnsweredAndASilentConnectionJustCloses(t *testing.T) {
	l := limits()
	l.Head = 400 * time.Millisecond // the second one's request is to come in this time
	everywhere(t, l, echo, func(t *testing.T, s *server) {
		slow := s.dial().send("GET / HTTP/1.1\r\n")
		silent := s.dial()
		if tc, ok := silent.Conn.(*tls.Conn); ok {
			_ = tc.Handshake()
		}
		second := s.dial().send("GET / HTTP/1.1\r\nHost: h\r\n\r\n")
		second.want(200, "GET / ")
		second.send("G")
		if resp := slow.want(408, "Request Timeout"); !resp.Close {
			t.Errorf("%+v", resp)
		}
		slow.ends()
		second.want(408, "Request Timeout")
		second.ends()
		silent.ends()
	})
}

func TestBytesNowAndThenDoNotProlongAHead(t *testing.T) {
	l := limits()
	l.Head = 100 * time.Millisecond
	s := serve(t, l, echo)
	c := s.dial().send("GET / HTTP/1.1\r\nHost: h\r\nX: ")
	got := make(chan error, 1)
	go func() {
		resp, err := http.ReadResponse(c.br, nil)
		if err == nil && resp.StatusCode != 408 {
			err = fmt.Errorf("%d", resp.StatusCode)
		}
		got <- err
	}()
	for {
		select {
		case err := <-got:
			if err != nil {
				t.Error(err)
			}
			return
		default:
			_, _ = io.WriteString(c, "x") // the end may have come
			time.Sleep(time.Millisecond)
		}
	}
}

func TestAnIdleConnectionClosesSilently(t *testing.T) {
	l := limits()
	l.Keep = 50 * time.Millisecond
	everywhere(t, l, echo, func(t *testing.T, s *server) {
		c := s.dial().send("GET / HTTP/1.1\r\nHost: h\r\n\r\n")
		c.want(200, "GET / ")
		c.ends()
	})
}

func TestASlowBodyEnds(t *testing.T) {
	for name, change := range map[string]func(*message.Limits){
		"none":     func(l *message.Limits) { l.Body, l.BodyRate = 50*time.Millisecond, 0 },
		"too slow": func(l *message.Limits) { l.Body, l.BodyRate = 500*time.Millisecond, 1<<30 },
	} {
		t.Run(name, func(t *testing.T) {
			l := limits()
			change(&l)
			everywhere(t, l, echo, func(t *testing.T, s *server) {
				c := s.dial().send("POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 1000000\r\n\r\n")
				if name != "none" {
					go func() {
						for {
							if _, err := io.WriteString(c, "x"); err != nil {
								return
							}
							time.Sleep(5 * time.Millisecond)
						}
					}()
				}
				if resp := c.want(408, "no body"); !resp.Close {
					t.Errorf("%+v", resp)
				}
			})
		})
	}
}

func TestAClientThatDoesNotReadIsCutOff(t *testing.T) {
	l := limits()
	l.Write = 50 * time.Millisecond
	failed := make(chan error, 1)
	everywhere(t, l, func(x message.Exchange) {
		_ = x.Begin(&message.Response{Status: 200, Length: 1 << 40})
		p := make([]byte, 64<<10)
		for {
			if _, err := x.Write(p); err != nil {
				failed <- err
				return
			}
		}
	}, func(t *testing.T, s *server) {
		c := s.dial().send("GET / HTTP/1.1\r\nHost: h\r\n\r\n")
		if err := <-failed; !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Error(err)
		}
		if _, err := io.Copy(io.Discard, c); err == nil && s.l.Addr().Network() == "tls" {
			t.Error("it looks whole")
		}
	})
}

func TestAStreamKeepsNoMemoryForWhatItSends(t *testing.T) {
	s := serve(t, limits(), func(x message.Exchange) {
		x.Lasts()
		_ = x.Begin(&message.Response{Status: 200, Length: message.Unknown})
		for range 3 {
			_, _ = x.Write([]byte("event\n"))
			_ = x.Flush()
			if x.(*conn).x.out != nil {
				t.Error("it has a buffer")
			}
		}
		_ = x.End([]message.Field{field("X-T", "1")})
	})
	c := s.dial()
	for range 2 {
		if resp := c.send("GET / HTTP/1.1\r\nHost: h\r\n\r\n").want(200, "event\nevent\nevent\n"); resp.Trailer.Get("X-T") != "1" {
			t.Errorf("%+v", resp)
		}
	}
}

type goneFunc func()

func (f goneFunc) ClientGone() { f() }

func TestTheWatcherHearsOfAClientThatHasGone(t *testing.T) {
	l := limits()
	l.HalfOpen = time.Hour
	l.Keep = 100 * time.Millisecond // for frequent sweeps
	began, told, over := make(chan bool), make(chan bool), make(chan bool)
	h := func(x message.Exchange) {
		gone := make(chan bool)
		x.Watch(goneFunc(func() { close(gone) }))
		began <- true
		<-gone
		again := make(chan bool)
		x.Watch(goneFunc(func() { close(again) })) // at once
		<-again
		told <- true
		<-over
	}
	s := serve(t, l, h)
	for range 2 {
		c := s.dial().send("POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 10\r\n\r\n")
		<-began
		_ = c.Conn.(*net.TCPConn).SetLinger(0)
		c.Close()
		<-told
		over <- true
	}

	// The end of the client's half is not the end of the client, for a while.
	l.HalfOpen = 50 * time.Millisecond
	everywhere(t, l, h, func(t *testing.T, s *server) {
		c := s.dial().send("GET / HTTP/1.1\r\nHost: h\r\n\r\n")
		<-began
		_ = closeWrite(c.Conn)
		if c.Conn != nil && s.tls != nil {
			_ = closeWrite(c.Conn.(*tls.Conn).NetConn())
		}
		<-told
		over <- true
	})
}

func TestStopBodyWakesAReader(t *testing.T) {
	everywhere(t, limits(), func(x message.Exchange) {
		read := make(chan error)
		go func() {
			_, err := io.ReadAll(reader{x})
			read <- err
		}()
		until(t, "the body is waited for", func() bool { return x.(*conn).reading.Load() != 0 })
		x.StopBody()
		if err := <-read; err == nil {
			t.Error("a body that has not come is whole")
		}
		_ = say(x, 200, "enough")
	}, func(t *testing.T, s *server) {
		c := s.dial().send("POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 1000\r\n\r\nhello")
		c.want(200, "enough")
		c.send(strings.Repeat("x", 995) + "POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 10\r\n\r\nhello")
		c.want(200, "enough")
	})
}

func TestNothingOfAStoppedBodyIsRead(t *testing.T) {
	s := serve(t, limits(), func(x message.Exchange) {
		x.StopBody()
		if n, err := x.ReadBody(make([]byte, 10)); n > 0 || err == nil {
			t.Errorf("%d bytes, %v", n, err)
		}
		_ = say(x, 200, "enough")
	})
	c := s.dial()
	for range 2 {
		c.send("POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 5\r\n\r\nhello").want(200, "enough")
	}
}

func TestInterruptEndsWhatWaitsForTheClient(t *testing.T) {
	everywhere(t, limits(), func(x message.Exchange) {
		go func() {
			until(t, "the body is waited for", func() bool { return x.(*conn).reading.Load() != 0 })
			x.Interrupt()
		}()
		if _, err := io.ReadAll(reader{x}); err == nil {
			t.Error("a body that has not come is whole")
		}
		if say(x, 200, "too late") == nil {
			t.Error("an answer was sent after all")
		}
	}, func(t *testing.T, s *server) {
		c := s.dial().send("POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 10\r\n\r\n")
		if rest, _ := io.ReadAll(c); len(rest) > 0 {
			t.Errorf("%q", rest)
		}
	})
}

func TestCountDrainAndShutdown(t *testing.T) {
	release, began := make(chan bool), make(chan bool, 9)
	everywhere(t, limits(), func(x message.Exchange) {
		switch string(x.Request().Target) {
		case "/lasts":
			x.Lasts()
			fallthrough
		case "/waits":
			began <- true
			<-release
		}
		_ = say(x, 200, "done")
	}, func(t *testing.T, s *server) {
		counts := func(busy, idle int) {
			t.Helper()
			until(t, fmt.Sprintf("%d busy, %d idle", busy, idle), func() bool {
				b, i := s.Count()
				return b == busy && i == idle
			})
		}
		counts(0, 0)
		newcomer := s.dial()
		if tc, ok := newcomer.Conn.(*tls.Conn); ok {
			_ = tc.Handshake()
		}
		counts(1, 0)
		idle := s.dial().send("GET / HTTP/1.1\r\nHost: h\r\n\r\n")
		idle.want(200, "done")
		counts(1, 1)
		waits := s.dial().send("GET /waits HTTP/1.1\r\nHost: h\r\n\r\n")
		lasts := s.dial().send("GET /lasts HTTP/1.1\r\nHost: h\r\n\r\n")
		<-began
		<-began
		counts(2, 1)
		lasted := s.dial().send("GET /lasts HTTP/1.1\r\nHost: h\r\n\r\n")
		<-began
		counts(2, 1)
		release <- true // any of the three
		release <- true
		release <- true
		for _, c := range []*client{waits, lasts, lasted} {
			c.want(200, "done")
		}
		counts(1, 4)
		if n := s.Lasting(); n != 0 {
			t.Errorf("%d still last", n)
		}
		lasted.send("GET /waits HTTP/1.1\r\nHost: h\r\n\r\n") // it lasts no more
		<-began
		counts(2, 3)
		release <- true
		lasted.want(200, "done")
		_ = lasted.Close()
		counts(1, 3)
		waits.send("GET /waits HTTP/1.1\r\nHost: h\r\n\r\n")
		lasts.send("GET /lasts HTTP/1.1\r\nHost: h\r\n\r\n")
		<-began
		<-began
		counts(2, 1)

		s.Drain()
		counts(2, 1)
		s.CloseIdle()
		idle.ends()
		counts(2, 0)
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		s.Shutdown(ctx) // does not wait
		newcomer.send("GET / HTTP/1.1\r\nHost: h\r\n\r\n")
		if resp := newcomer.want(200, "done"); !resp.Close {
			t.Errorf("%+v", resp)
		}
		newcomer.ends()
		counts(1, 0)
		over := make(chan bool)
		go func() {
			s.Shutdown(t.Context())
			close(over)
		}()
		release <- true
		release <- true
		waits.want(200, "done")
		waits.ends()
		lasts.want(200, "done")
		lasts.ends()
		<-over
		counts(0, 0)
	})
}

func TestCloseEndsEveryConnection(t *testing.T) {
	began := make(chan bool, 1)
	everywhere(t, limits(), func(x message.Exchange) {
		if x.Request().Target[1] == 'w' {
			began <- true
			_, _ = io.ReadAll(reader{x})
			return
		}
		_ = say(x, 200, "done")
	}, func(t *testing.T, s *server) {
		idle := s.dial().send("GET /a HTTP/1.1\r\nHost: h\r\n\r\n")
		idle.want(200, "done")
		waits := s.dial().send("PUT /w HTTP/1.1\r\nHost: h\r\nContent-Length: 1\r\n\r\n")
		<-began
		s.Close()
		s.Shutdown(t.Context())
		for _, c := range []*client{idle, waits} {
			if rest, _ := io.ReadAll(c.br); len(rest) > 0 {
				t.Errorf("%q", rest)
			}
		}
		late := s.dial()
		if rest, _ := io.ReadAll(late.br); len(rest) > 0 {
			t.Errorf("%q", rest)
		}
	})
}

// It has promised that the connection stays, so a request may be on its way.
func TestAnAnswerBegunBeforeADrainIsNotTheLast(t *testing.T) {
	drain := make(chan func(), 1)
	h := func(x message.Exchange) {
		_ = x.Begin(&message.Response{Status: 200, Length: 0})
		select {
		case f := <-drain:
			f()
		default:
		}
		_ = x.End(nil)
	}
	s := serve(t, limits(), h)
	drain <- s.Drain
	c := s.dial().send("GET / HTTP/1.1\r\nHost: h\r\n\r\n")
	if resp := c.want(200, ""); resp.Close {
		t.Errorf("%+v", resp)
	}
	if resp := c.send("GET / HTTP/1.1\r\nHost: h\r\n\r\n").want(200, ""); !resp.Close {
		t.Errorf("%+v", resp)
	}
	c.ends()

	s = serve(t, limits(), h)
	drain <- s.Drain
	c = s.dial().send("GET / HTTP/1.1\r\nHost: h\r\n\r\n")
	if resp := c.want(200, ""); resp.Close {
		t.Errorf("%+v", resp)
	}
	s.Shutdown(t.Context())
	c.ends()
}

// A request that meets the end of its connection is answered or not, but never
// in part, and nothing that was to wake a connection that waits disturbs it.
func TestRequestsAgainstCloseIdle(t *testing.T) {
	everywhere(t, limits(), func(x message.Exchange) {
		if r := x.Request(); r.Upgrade != nil {
			_ = x.Begin(&message.Response{Status: http.StatusSwitchingProtocols, Upgrade: r.Upgrade})
			stream, err := x.Tunnel()
			if err != nil {
				return
			}
			defer stream.Close()
			p := make([]byte, 5)
			if _, err := io.ReadFull(stream, p); err == nil {
				_, _ = stream.Write(p)
			}
			return
		}
		echo(x)
	}, func(t *testing.T, s *server) {
		stop, stopped := make(chan bool), make(chan bool)
		go func() {
			defer close(stopped)
			for {
				select {
				case <-stop:
					return
				default:
					s.CloseIdle()
				}
			}
		}()
		var clients sync.WaitGroup
		for range 4 {
			clients.Go(func() {
				for range 10 {
					c := s.dial()
					for i := range 10 {
						upgrade := i == 9
						asked := "POST /a HTTP/1.1\r\nHost: h\r\nContent-Length: 5\r\n\r\n"
						if upgrade {
							asked = "GET / HTTP/1.1\r\nHost: h\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\n"
						}
						_, _ = io.WriteString(c, asked) // an error shows in the answer
						_, _ = io.WriteString(c, "hello")
						b, rerr := c.br.Peek(1)
						if len(b) == 0 { // it was not answered
							if isTimeout(rerr) {
								t.Error("a request was neither answered nor refused")
							}
							break
						}
						resp, err := http.ReadResponse(c.br, nil)
						if err != nil {
							t.Error(err)
							break
						}
						body := io.Reader(resp.Body)
						want := "POST /a hello"
						if upgrade {
							body, want = c.br, "hello"
						}
						if got, err := io.ReadAll(body); string(got) != want || err != nil {
							t.Errorf("%d %q, %v", resp.StatusCode, got, err)
							break
						}
					}
					c.Close()
				}
			})
		}
		clients.Wait()
		close(stop)
		<-stopped
	})
}
