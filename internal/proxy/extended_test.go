package proxy

import (
	"bufio"
	"io"
	"net"
	"net/http"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	"tako/internal/ipc"
	"tako/internal/wire"
)

// asked asks for a WebSocket over HTTP/2 and returns the status of the answer.
func asked(c *h2Client, stream uint32, fields ...hpack.HeaderField) (status string) {
	c.t.Helper()
	c.webSocket(stream, fields...)
	c.until(func(f http2.Frame) bool {
		h, ok := f.(*http2.MetaHeadersFrame)
		if ok {
			status = h.PseudoValue("status")
		}
		return ok
	})
	return status
}

// To an extended CONNECT any 2xx says that the stream is open.
func TestPageIsNoOpenWebSocket(t *testing.T) {
	m := serving(t)
	cert, leaf := m.certificate("c", true, "blog.test")
	m.send(cert)
	m.plainApp(served(t, func(w http.ResponseWriter, r *http.Request) {
		status, _ := strconv.Atoi(r.Header.Get("X-Want"))
		w.WriteHeader(status)
	}))
	c := m.h2Dial(leaf)
	stream := uint32(1)
	for status, want := range map[string]string{"200": "502", "204": "502", "302": "302", "404": "404"} {
		if got := asked(c, stream, hpack.HeaderField{Name: "x-want", Value: status}); got != want {
			t.Errorf("the app says %s, the client gets %s, want %s", status, got, want)
		}
		stream += 2
	}
}

func TestInstancesOfHTTP2TakeNoWebSockets(t *testing.T) {
	m := serving(t)
	cert, leaf := m.certificate("c", true, "blog.test")
	m.send(cert)
	m.plainApp(servedH2C(t, func(http.ResponseWriter, *http.Request) { t.Error("it reached the app") }))
	if got := asked(m.h2Dial(leaf), 1); got != "501" {
		t.Errorf("got %s", got)
	}
}

func TestWebSocketOfHTTP2HasOneKeyOfOurs(t *testing.T) {
	m := serving(t)
	cert, leaf := m.certificate("c", true, "blog.test")
	m.send(cert)
	keys := make(chan []string, 1)
	m.plainApp(served(t, func(w http.ResponseWriter, r *http.Request) {
		keys <- r.Header["Sec-Websocket-Key"]
		w.WriteHeader(http.StatusNotFound)
	}))
	asked(m.h2Dial(leaf), 1, hpack.HeaderField{Name: "sec-websocket-key", Value: "theirs"})
	if got := <-keys; len(got) != 1 || len(got[0]) != 24 {
		t.Errorf("the app sees %q", got)
	}
}

// What is too large for one write reaches a client that the kernel cannot splice
// to.
func TestLargeAnswersGoOutOnAUnixSocket(t *testing.T) {
	const size = 1 << 20
	m := greeted(t)
	path := filepath.Join(t.TempDir(), "l")
	l, err := net.Listen("unix", path)
	check0(t, err)
	defer l.Close()
	f, err := l.(*net.UnixListener).File()
	check0(t, err)
	defer f.Close()
	m.send(&wire.Listeners{Names: []string{wire.ListenerHTTP}}, ipc.FD(f.Fd()))
	m.side(&wire.Dialer{}, wire.LinkDialing, m.dial)
	m.send(&wire.ProxySettings{HTTPSPort: 8443})
	m.send(&wire.Serve{})
	expect[*wire.Ready](m)
	m.plainApp(served(t, func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Length", "1048576")
		_, _ = io.WriteString(w, strings.Repeat("x", size))
	}))
	c, err := net.Dial("unix", path)
	check0(t, err)
	defer c.Close()
	check0(t, c.SetDeadline(time.Now().Add(patience)))
	br := bufio.NewReader(c)
	for range 2 {
		_, err = io.WriteString(c, "GET / HTTP/1.1\r\nHost: blog.test\r\n\r\n")
		check0(t, err)
		resp, err := http.ReadResponse(br, nil)
		check0(t, err)
		if n, err := io.Copy(io.Discard, resp.Body); n != size || err != nil {
			t.Errorf("%d bytes, %v", n, err)
		}
	}
}
