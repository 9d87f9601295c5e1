package proxy

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"tako/internal/proxy/message"
	"tako/internal/tako"
	"tako/internal/wire"
)

// raw sends bytes to the plain listener and returns the answer.
func (m *master) raw(request string) *http.Response {
	m.t.Helper()
	c, err := net.Dial("tcp", m.plain)
	check0(m.t, err)
	defer c.Close()
	check0(m.t, c.SetDeadline(time.Now().Add(patience)))
	_, err = io.WriteString(c, request)
	check0(m.t, err)
	method, _, _ := strings.Cut(request, " ")
	resp, err := http.ReadResponse(bufio.NewReader(c), &http.Request{Method: method})
	check0(m.t, err)
	b, err := io.ReadAll(resp.Body)
	check0(m.t, err)
	resp.Body = io.NopCloser(bytes.NewReader(b))
	return resp
}

func text(t testing.TB, resp *http.Response, err error) string {
	t.Helper()
	check0(t, err)
	b, err := io.ReadAll(resp.Body)
	check0(t, err)
	check0(t, resp.Body.Close())
	return string(b)
}

func TestPlainRequestsAreSentToHTTPS(t *testing.T) {
	m := serving(t)
	m.app(wire.App{})
	m.send(&wire.Challenge{Token: "tok", KeyAuth: "tok.key"})
	m.app(wire.App{App: "open", PlainHTTP: true, Routes: []string{"open.test"}}) // Applied also means that the challenge is known
	for _, test := range []struct {
		request, status, location, body string
	}{
		{"GET /a%2fb?c=d HTTP/1.1\r\nHost: blog.test", "307", "https://blog.test:8443/a%2fb?c=d", "Redirecting to HTTPS"},
		{"POST / HTTP/1.1\r\nHost: blog.test:8080", "307", "https://blog.test:8443/", "Redirecting to HTTPS"},
		{"GET / HTTP/1.1\r\nHost: unknown.test", "307", "https://unknown.test:8443/", "Redirecting to HTTPS"},
		{"GET //x/y HTTP/1.1\r\nHost: [::1]:80", "307", "https://[::1]:8443//x/y", "Redirecting to HTTPS"},
		{"HEAD / HTTP/1.1\r\nHost: blog.test", "307", "https://blog.test:8443/", ""},
		{"GET / HTTP/1.0\r\nHost: blog.test", "307", "https://blog.test:8443/", "Redirecting to HTTPS"},
		{"OPTIONS * HTTP/1.1\r\nHost: blog.test", "307", "https://blog.test:8443/", "Redirecting to HTTPS"},
		{"GET http://blog.test/q?r HTTP/1.1\r\nHost: blog.test", "307", "https://blog.test:8443/q?r", "Redirecting to HTTPS"},
		{"GET / HTTP/1.1\r\nHost: blog.test\r\nX-Forwarded-Proto: https", "307", "https://blog.test:8443/", "Redirecting to HTTPS"},
		{"GET /.well-known/acme-challenge/tok HTTP/1.1\r\nHost: any.test", "200", "", "tok.key"},
		{"GET /.well-known/acme-challenge/other HTTP/1.1\r\nHost: any.test", "404", "", "Token not found"},
		{"GET / HTTP/1.1\r\nHost: open.test", "503", "", "No healthy backend"},
		{"HEAD / HTTP/1.1\r\nHost: open.test", "503", "", ""},
		{"GET / HTTP/1.1\r\nHost: a@b", "400", "", "-"},
		{"GET / HTTP/1.1\r\nHost: a_b:99999", "400", "", "Bad Request"},
		{"GET / HTTP/1.1\r\nHost: [::1", "400", "", "-"},
		{"GET / HTTP/1.1\r\nHost: blog.test:x", "400", "", "Bad Request"},
		{"GET / HTTP/1.1\r\nHost: ", "400", "", "Bad Request"},
		{"GET / HTTP/1.0", "400", "", "Bad Request"},
		{"GET / HTTP/1.1", "400", "", "-"},
		{"GET / HTTP/1.1\r\nHost: a.test\r\nHost: b.test", "400", "", "-"},
		{"CONNECT blog.test:443 HTTP/1.1\r\nHost: blog.test:443", "405", "", "Method Not Allowed"},
	} {
		resp := m.raw(test.request + "\r\n\r\n")
		body := text(t, resp, nil)
		if fmt.Sprint(resp.StatusCode) != test.status || resp.Header.Get("Location") != test.location || test.body != "-" && body != test.body {
			t.Errorf("%q: got %d %q %q, want %s %q %q", test.request, resp.StatusCode, resp.Header.Get("Location"), body, test.status, test.location, test.body)
		}
		if test.body != "-" && resp.Header.Get("Content-Type") != "text/plain" {
			t.Errorf("%q: Content-Type %q", test.request, resp.Header.Get("Content-Type"))
		}
		if cc := resp.Header.Get("Cache-Control"); (test.status == "307" || test.status == "503") && cc != "no-store" {
			t.Errorf("%q: Cache-Control %q", test.request, cc)
		}
	}
}

func TestAnswersWithoutAnInstance(t *testing.T) {
	m := serving(t)
	dead := wire.Upstream{Instance: nextID()} // its dialler refuses
	for _, test := range []struct {
		name   string
		app    wire.App
		status int
		body   string
		retry  string
	}{
		{"no instance", wire.App{}, 503, "No healthy backend", ""},
		{"start failed", wire.App{OnDemand: true, Trouble: wire.Trouble{Kind: wire.TroubleStartFailed}}, 502, "App failed to start", ""},
		{"stopped", wire.App{OnDemand: true, Trouble: wire.Trouble{Kind: wire.TroubleStopped}}, 503, "No healthy backend", ""},
		{"crash loop", wire.App{Trouble: wire.Trouble{Kind: wire.TroubleCrashLoop, RetryAfterS: 16}}, 503, "No healthy backend", "16"},
		{"no late start", wire.App{OnDemand: true, Queue: wire.Queue{Waiters: 1, WaitMS: 20}}, 504, "App startup timed out", ""},
		{"refuses connections", wire.App{Instances: []wire.Upstream{dead}}, 502, "Bad Gateway", ""},
	} {
		test.app.PlainHTTP = true
		m.app(test.app)
		resp := m.raw("GET / HTTP/1.1\r\nHost: blog.test\r\n\r\n")
		body := text(t, resp, nil)
		if resp.StatusCode != test.status || body != test.body || resp.Header.Get("Retry-After") != test.retry || resp.Header.Get("Cache-Control") != "no-store" {
			t.Errorf("%s: got %d %q %v, want %d %q", test.name, resp.StatusCode, body, resp.Header, test.status, test.body)
		}
		switch test.name {
		case "no late start":
			expect[*wire.Wake](m)
		case "refuses connections":
			expect[*wire.Unreachable](m)
		}
	}
	m.revision++
	m.send(&wire.AppGone{App: "blog", Revision: m.revision})
	expect[*wire.Applied](m)
	expect[*wire.Quiet](m)
}

func TestQueueOfSleepingApp(t *testing.T) {
	m := serving(t)
	sleeping := wire.App{PlainHTTP: true, OnDemand: true, Queue: wire.Queue{Waiters: 2, WaitMS: 60000}}
	m.app(sleeping)
	client := m.client(false, nil)
	answers := make(chan string, 10)
	get := func() {
		resp, err := client.Get("http://blog.test/")
		if err != nil {
			answers <- err.Error()
			return
		}
		answers <- fmt.Sprintf("%d %s", resp.StatusCode, text(t, resp, nil))
	}
	waiting := func(n int) {
		t.Helper()
		for {
			select {
			case tr := <-m.traffic:
				if tr.Apps[0].Waiting == n {
					return
				}
			case <-time.After(patience):
				t.Fatalf("never %d waiting", n)
			}
		}
	}
	go get()
	expect[*wire.Wake](m) // one for both
	ctx, leave := context.WithCancel(context.Background())
	left := make(chan struct{})
	go func() {
		defer close(left)
		req, _ := http.NewRequestWithContext(ctx, http.MethodGet, "http://blog.test/", nil)
		if resp, err := client.Do(req); err == nil {
			_ = resp.Body.Close()
		}
	}()
	waiting(2)
	resp, err := client.Get("http://blog.test/")
	if body := text(t, resp, err); resp.StatusCode != 503 || body != "App startup queue is full" || resp.Header.Get("Retry-After") != "1" {
		t.Errorf("third request: %d %q %v", resp.StatusCode, body, resp.Header)
	}
	leave()
	<-left
	waiting(1)

	m.app(sleeping) // still none: asked for again, and nobody is sent away
	expect[*wire.Wake](m)
	awake := sleeping
	awake.Instances = []wire.Upstream{served(t, func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "woken") })}
	m.app(awake)
	if got := <-answers; got != "200 woken" {
		t.Errorf("waiter got %q", got)
	}

	m.app(sleeping)
	expect[*wire.Quiet](m)
	go get()
	go get()
	expect[*wire.Wake](m)
	waiting(2)
	sleeping.Trouble.Kind = wire.TroubleStartFailed
	m.app(sleeping)
	for range 2 {
		if got := <-answers; got != "502 App failed to start" {
			t.Errorf("waiter got %q", got)
		}
	}
}

func TestHeadersToTheApp(t *testing.T) {
	for _, test := range []struct {
		name    string
		trusted []string
		request string
		want    map[string]string // "" for absent
	}{
		{"made by us", nil, "Host: blog.test", map[string]string{
			"X-Forwarded-For": "127.0.0.1", "X-Forwarded-Proto": "http", "X-Forwarded-Host": "blog.test", "X-Forwarded-Port": "80",
		}},
		{"a stranger's are dropped", nil, "Host: blog.test:8080\r\nX-Forwarded-For: 6.6.6.6\r\nx-forwarded-proto: https\r\nX-Forwarded-Host: evil\r\n" +
			"Forwarded: for=6.6.6.6\r\nX-Real-IP: 6.6.6.6\r\nX-Forwarded-Prefix: /x\r\nX_Forwarded_For: 6.6.6.6\r\nX-Forwarded_For: 6\r\nX-Request-ID: mine", map[string]string{
			"X-Forwarded-For": "127.0.0.1", "X-Forwarded-Proto": "http", "X-Forwarded-Host": "blog.test:8080", "X-Forwarded-Port": "8080",
			"Forwarded": "", "X-Real-Ip": "", "X-Forwarded-Prefix": "", "X_forwarded_for": "", "X-Forwarded_for": "",
		}},
		{"a trusted proxy's are kept", []string{"127.0.0.0/8"}, "Host: blog.test\r\nX-Forwarded-For: 6.6.6.6\r\nX-Forwarded-For: 7.7.7.7\r\nX-Forwarded-Proto: HTTPS\r\n" +
			"X-Forwarded-Host: public\r\nX-Forwarded-Port: 444\r\nX-Request-ID: mine\r\nX_Forwarded_Proto: a\r\nForwarded: for=6.6.6.6", map[string]string{
			"X-Forwarded-For": "6.6.6.6, 7.7.7.7, 127.0.0.1", "X-Forwarded-Proto": "HTTPS", "X-Forwarded-Host": "public", "X-Forwarded-Port": "444",
			"X-Request-Id": "mine", "X_forwarded_proto": "", "Forwarded": "for=6.6.6.6",
		}},
		{"hop by hop", nil, "Host: blog.test\r\nConnection: close, X-Mine, Authorization, Cookie, X-Forwarded-For\r\nX-Mine: 1\r\nKeep-Alive: 1\r\nProxy-Connection: x\r\nProxy: http://evil.example\r\n" +
			"TE: trailers, gzip\r\nAuthorization: a\r\nCookie: b\r\nUpgrade: h2c\r\nHTTP2-Settings: x\r\nX-End: 2", map[string]string{
			"X-Mine": "", "Keep-Alive": "", "Proxy-Connection": "", "Proxy": "", "Te": "trailers", "Authorization": "a", "Cookie": "b", "X-Forwarded-For": "127.0.0.1",
			"Upgrade": "", "Http2-Settings": "", "Connection": "TE", "X-End": "2", "User-Agent": "", "Accept-Encoding": "",
		}},
	} {
		m := serving(t, test.trusted...)
		var got http.Header
		var host, uri string
		m.plainApp(served(t, func(w http.ResponseWriter, r *http.Request) {
			got, host, uri = r.Header, r.Host, r.RequestURI
			w.Header().Set("Connection", "X-Hop")
			w.Header().Set("X-Hop", "1")
		}))
		resp := m.raw("GET /a//b%2F?x=%zz HTTP/1.1\r\n" + test.request + "\r\n\r\n")
		if resp.StatusCode != 200 || resp.Header.Get("X-Hop") != "" || resp.Header.Get("Server") != "" || resp.Header.Get("Date") == "" {
			t.Errorf("%s: answer %d %v", test.name, resp.StatusCode, resp.Header)
		}
		if uri != "/a//b%2F?x=%zz" || !strings.HasPrefix(host, "blog.test") {
			t.Errorf("%s: the app saw %q %q", test.name, host, uri)
		}
		for name, want := range test.want {
			if v := strings.Join(got[name], "; "); v != want {
				t.Errorf("%s: %s is %q, want %q", test.name, name, v, want)
			}
		}
		id := got.Get("X-Request-Id")
		if id != resp.Header.Get("X-Request-Id") || test.trusted == nil && len(id) != 32 {
			t.Errorf("%s: request id %q, answered %q", test.name, id, resp.Header.Get("X-Request-Id"))
		}
	}
}

func TestRequestIDOfTrustedProxyIsChecked(t *testing.T) {
	for id, ok := range map[string]bool{
		"": false, "abc": true, "a b": false, "a\x7f": false, "é": false,
		strings.Repeat("x", MaxRequestID): true, strings.Repeat("x", MaxRequestID+1): false,
	} {
		if validID([]byte(id)) != ok {
			t.Errorf("%q: valid is %t", id, !ok)
		}
	}
}

func TestTrustedProxySaysHTTPS(t *testing.T) {
	r := &message.Request{Fields: []message.Field{field("X-Forwarded-Proto", "https, http")}}
	from := &message.Client{Addr: addrOf(&net.TCPAddr{IP: net.ParseIP("::ffff:10.1.2.3"), Port: 99})}
	if c := clientOf(r, from, &state{trusted: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")}}); !c.https || !c.trusted || c.addr.String() != "10.1.2.3" {
		t.Errorf("got %+v", c)
	}
	if c := clientOf(r, from, &state{}); c.https || c.trusted {
		t.Errorf("a stranger's word was believed: %+v", c)
	}
}

func TestRequestsAndAnswersStream(t *testing.T) {
	m := serving(t)
	m.plainApp(served(t, func(w http.ResponseWriter, r *http.Request) {
		rc := http.NewResponseController(w)
		_ = rc.EnableFullDuplex()
		w.WriteHeader(200)
		_ = rc.Flush()
		buf := make([]byte, 100)
		for {
			n, err := r.Body.Read(buf)
			_, _ = w.Write(bytes.ToUpper(buf[:n]))
			_ = rc.Flush()
			if err != nil {
				return
			}
		}
	}))
	pr, pw := io.Pipe()
	go func() { _, _ = io.WriteString(pw, "one") }() // an instance is picked when something has come
	resp, err := m.client(false, nil).Post("http://blog.test/", "text/plain", pr)
	check0(t, err)
	buf := make([]byte, 10)
	for i, s := range []string{"one", "two", "three"} {
		if i > 0 {
			_, err = io.WriteString(pw, s)
			check0(t, err)
		}
		if _, err := io.ReadFull(resp.Body, buf[:len(s)]); err != nil || string(buf[:len(s)]) != strings.ToUpper(s) {
			t.Fatalf("sent %q, got %q, %v", s, buf[:len(s)], err)
		}
	}
	check0(t, pw.Close())
	if rest := text(t, resp, nil); rest != "" {
		t.Errorf("more came: %q", rest)
	}
}

func TestLargeBodiesArriveWhole(t *testing.T) {
	m := serving(t)
	m.plainApp(served(t, func(w http.ResponseWriter, r *http.Request) {
		b, _ := io.ReadAll(r.Body)
		w.Header().Set("X-Trailer-Seen", r.Trailer.Get("X-Sum"))
		w.Header().Set("Trailer", "X-Out")
		_, _ = w.Write(b)
		w.Header().Set("X-Out", "last")
	}))
	client := m.client(false, nil)
	for _, size := range []int{0, 1, 5000, 1 << 20} {
		for _, chunked := range []bool{false, true} {
			want := bytes.Repeat([]byte("x"), size)
			var body io.Reader = bytes.NewReader(want)
			if chunked {
				body = io.MultiReader(body) // hides its length
			}
			req, _ := http.NewRequest(http.MethodPut, "http://blog.test/", body)
			if chunked {
				req.Trailer = http.Header{"X-Sum": {"42"}}
			}
			resp, err := client.Do(req)
			got := text(t, resp, err)
			if got != string(want) || resp.Trailer.Get("X-Out") != "last" || chunked != (resp.Header.Get("X-Trailer-Seen") == "42") {
				t.Errorf("%d bytes, chunked %t: got %d bytes, trailer %v, header %v", size, chunked, len(got), resp.Trailer, resp.Header)
			}
		}
	}
}

func TestEventsArriveAtOnceAndCountAsStream(t *testing.T) {
	m := serving(t)
	next := make(chan string)
	up := served(t, func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "text/event-stream; charset=utf-8")
		for s := range next {
			_, _ = io.WriteString(w, s)
			_ = http.NewResponseController(w).Flush()
		}
	})
	m.plainApp(up)
	go func() { next <- "data: 1\n\n" }()
	resp, err := m.client(false, nil).Get("http://blog.test/")
	check0(t, err)
	buf := make([]byte, 9)
	_, err = io.ReadFull(resp.Body, buf)
	check0(t, err)
	up.Draining = true
	revision := m.plainApp(up)
	if q := expect[*wire.Quiet](m); q.Streams != 1 || q.Instance != up.Instance || q.Revision != revision {
		t.Errorf("got %+v", q)
	}
	next <- "data: 2\n\n"
	_, err = io.ReadFull(resp.Body, buf)
	check0(t, err)
	close(next)
	if rest := text(t, resp, nil); rest != "" || string(buf) != "data: 2\n\n" {
		t.Errorf("got %q and %q", buf, rest)
	}
}

func upgraded(t testing.TB, m *master) (net.Conn, *bufio.Reader) {
	t.Helper()
	c, err := net.Dial("tcp", m.plain)
	check0(t, err)
	t.Cleanup(func() { _ = c.Close() })
	check0(t, c.SetDeadline(time.Now().Add(patience)))
	_, err = io.WriteString(c, "GET /ws HTTP/1.1\r\nHost: blog.test\r\nConnection: keep-alive, Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: k\r\n\r\nearly ")
	check0(t, err)
	br := bufio.NewReader(c)
	resp, err := http.ReadResponse(br, nil)
	check0(t, err)
	if resp.StatusCode != 101 || resp.Header.Get("Upgrade") != "websocket" || resp.Header.Get("Sec-Websocket-Accept") != "a" || resp.Header.Get("X-Request-Id") == "" {
		t.Fatalf("got %d %v", resp.StatusCode, resp.Header)
	}
	return c, br
}

func echoInstance(t testing.TB) wire.Upstream {
	return rawInstance(t, func(_ int, c net.Conn) {
		br := bufio.NewReader(c)
		r, err := http.ReadRequest(br)
		if err != nil || r.Header.Get("Upgrade") != "websocket" || r.Header.Get("Connection") != "Upgrade" {
			return
		}
		_, _ = io.WriteString(c, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Accept: a\r\n\r\nhello ")
		_, _ = io.Copy(c, br)
		_, _ = io.WriteString(c, "bye")
	})
}

func TestUpgradedConnectionsAreTunnels(t *testing.T) {
	m := serving(t)
	m.plainApp(echoInstance(t))
	c, br := upgraded(t, m)
	_, err := io.WriteString(c, "late ")
	check0(t, err)
	check0(t, c.(*net.TCPConn).CloseWrite()) // the other half goes on
	all, err := io.ReadAll(br)
	if string(all) != "hello early late bye" || err != nil {
		t.Errorf("got %q, %v", all, err)
	}
}

func TestUnaskedSwitchOfProtocolsIsRefused(t *testing.T) {
	m := serving(t)
	m.plainApp(rawInstance(t, func(_ int, c net.Conn) {
		_, _ = http.ReadRequest(bufio.NewReader(c))
		_, _ = io.WriteString(c, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
	}))
	if resp := m.raw("GET / HTTP/1.1\r\nHost: blog.test\r\n\r\n"); resp.StatusCode != 502 {
		t.Errorf("got %d", resp.StatusCode)
	}
}

func TestAnswerBeforeTheEndOfAnUpload(t *testing.T) {
	m := serving(t)
	m.plainApp(rawInstance(t, func(_ int, c net.Conn) {
		_, _ = http.ReadRequest(bufio.NewReader(c))
		_, _ = io.WriteString(c, "HTTP/1.1 413 Too Large\r\nContent-Length: 3\r\nConnection: close\r\n\r\nbig")
	}))
	resp := m.raw("POST / HTTP/1.1\r\nHost: blog.test\r\nContent-Length: 100000\r\n\r\nonly the beginning")
	if body := text(t, resp, nil); resp.StatusCode != 413 || body != "big" {
		t.Errorf("got %d %q", resp.StatusCode, body)
	}
}

func TestShortAnswersAreCutAndNeverLookWhole(t *testing.T) {
	for name, answer := range map[string]string{
		"length":  "HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nabc",
		"chunked": "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n",
	} {
		m := serving(t)
		m.plainApp(rawInstance(t, func(_ int, c net.Conn) {
			_, _ = http.ReadRequest(bufio.NewReader(c))
			_, _ = io.WriteString(c, answer)
		}))
		resp, err := m.client(false, nil).Get("http://blog.test/")
		if err != nil {
			continue // cut before the head went out
		}
		if b, err := io.ReadAll(resp.Body); err == nil {
			t.Errorf("%s: %q looks whole", name, b)
		}
		_ = resp.Body.Close()
	}
}

func TestBrokenAnswersAreBadGateway(t *testing.T) {
	for _, answer := range []string{"", "garbage\r\n\r\n", "HTTP/1.1 200 OK\r\nX: " + strings.Repeat("y", 300<<10) + "\r\n\r\n"} {
		m := serving(t)
		m.plainApp(rawInstance(t, func(_ int, c net.Conn) {
			_, _ = http.ReadRequest(bufio.NewReader(c))
			_, _ = io.WriteString(c, answer)
		}))
		resp := m.raw("GET / HTTP/1.1\r\nHost: blog.test\r\n\r\n")
		if body := text(t, resp, nil); resp.StatusCode != 502 || body != "Bad Gateway" || resp.Header.Get("Cache-Control") != "no-store" {
			t.Errorf("%.20q: got %d %q", answer, resp.StatusCode, body)
		}
	}
}

func TestDeadInstanceIsPassedBy(t *testing.T) {
	m := serving(t)
	live := served(t, func(w http.ResponseWriter, r *http.Request) { _, _ = io.Copy(w, r.Body) })
	dead := wire.Upstream{Instance: nextID(), Socket: t.TempDir() + "/none"}
	m.plainApp(live, dead)
	client := m.client(false, nil)
	for range 40 {
		resp, err := client.Post("http://blog.test/", "text/plain", strings.NewReader("body"))
		if got := text(t, resp, err); got != "body" || resp.StatusCode != 200 {
			t.Fatalf("got %d %q", resp.StatusCode, got)
		}
	}
	if u := expect[*wire.Unreachable](m); u.Instance != dead.Instance {
		t.Errorf("told of %s", u.Instance)
	}
	live.Fallback = true
	m.plainApp(live, dead)
	resp, err := client.Get("http://blog.test/")
	if text(t, resp, err); resp.StatusCode != 200 {
		t.Errorf("the fallback was not used: %d", resp.StatusCode)
	}
}

func TestInstancesOnTCPAreReachedThroughTheDialler(t *testing.T) {
	m := serving(t)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	check0(t, err)
	s := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "tcp") })}
	go func() { _ = s.Serve(l) }()
	t.Cleanup(func() { _ = s.Close() })
	id := nextID()
	m.ports.Store(id, l.Addr().String())
	m.plainApp(wire.Upstream{Instance: id})
	for range 3 {
		resp := m.raw("GET / HTTP/1.1\r\nHost: blog.test\r\n\r\n")
		if got := text(t, resp, nil); got != "tcp" {
			t.Errorf("got %d %q", resp.StatusCode, got)
		}
	}
}

func TestHTTP2OverRemoteSignatures(t *testing.T) {
	m := greeted(t)
	m.configure()
	exact, leaf := m.certificate("exact", false, "blog.test")
	m.send(exact)
	m.send(&wire.Serve{})
	expect[*wire.Ready](m)
	var host, proto string
	m.app(wire.App{Instances: []wire.Upstream{served(t, func(w http.ResponseWriter, r *http.Request) {
		host, proto = r.Host, r.Header.Get("X-Forwarded-Proto")+" "+r.Header.Get("X-Forwarded-Port")
		_, _ = io.Copy(w, r.Body)
	})}})
	roots := x509.NewCertPool()
	roots.AddCert(leaf)
	for _, h2 := range []bool{true, false} {
		resp, err := m.client(h2, roots).Post("https://blog.test/", "text/plain", strings.NewReader("body"))
		got := text(t, resp, err)
		if got != "body" || (resp.ProtoMajor == 2) != h2 || host != "blog.test" || proto != "https 443" {
			t.Errorf("h2 %t: got %s %q, host %q, proto %q", h2, resp.Proto, got, host, proto)
		}
	}
	if a := <-m.signs; a != wire.SignECDSA {
		t.Errorf("signed by %s", a)
	}
	c, err := tls.Dial("tcp", m.tls, &tls.Config{InsecureSkipVerify: true, ServerName: "blog.test", MaxVersion: tls.VersionTLS12, // a test
		CipherSuites: []uint16{tls.TLS_ECDHE_ECDSA_WITH_AES_128_CBC_SHA}})
	if err == nil {
		_ = c.Close()
		t.Error("a CBC suite was accepted")
	}
}

func TestCertificateIsChosenByName(t *testing.T) {
	m := serving(t)
	for _, c := range []struct {
		id       string
		fallback bool
		names    []string
	}{
		{"default", true, nil},
		{"old", false, []string{"a.test", "b.test"}},
		{"new", false, []string{"a.test"}},
		{"wild", false, []string{"*.w.test"}},
		{"inner", false, []string{"x.w.test"}},
	} {
		cert, _ := m.certificate(c.id, c.fallback, c.names...)
		m.send(cert)
	}
	m.app(wire.App{})
	get := func(name string) string {
		c, err := tls.Dial("tcp", m.tls, &tls.Config{InsecureSkipVerify: true, ServerName: name}) // a test
		if err != nil {
			return "error"
		}
		defer c.Close()
		return c.ConnectionState().PeerCertificates[0].Subject.CommonName
	}
	for name, want := range map[string]string{
		"": "default", "other.test": "default", "a.test": "new", "A.Test": "new", "b.test": "old",
		"q.w.test": "wild", "x.w.test": "inner", "y.x.w.test": "default", "w.test": "default",
	} {
		if got := get(name); got != want {
			t.Errorf("%q: got %s, want %s", name, got, want)
		}
	}
	m.send(&wire.CertificateGone{ID: "new"})
	m.send(&wire.CertificateGone{ID: "default"})
	m.app(wire.App{})
	if got := get("a.test"); got != "old" {
		t.Errorf("after its newest certificate went: %s", got)
	}
	if got := get("other.test"); got != "error" {
		t.Errorf("without any fallback: %s", got)
	}
}

func TestQuietMeansThatNothingIsInFlight(t *testing.T) {
	m := serving(t)
	var busy [2]atomic.Int64
	var ups [2]wire.Upstream
	for i := range ups {
		ups[i] = served(t, func(w http.ResponseWriter, _ *http.Request) {
			busy[i].Add(1)
			time.Sleep(time.Millisecond)
			busy[i].Add(-1)
		})
	}
	m.plainApp(ups[0])
	client := m.client(false, nil)
	client.Transport.(*http.Transport).MaxIdleConnsPerHost = 8
	stop := make(chan struct{})
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				resp, err := client.Get("http://blog.test/")
				if err != nil || resp.StatusCode != 200 {
					t.Errorf("got %v, %v", resp, err)
					return
				}
				_ = resp.Body.Close()
			}
		})
	}
	for i := range 50 {
		from, to := i%2, 1-i%2
		old := ups[from]
		old.Draining = true
		revision := m.plainApp(old, ups[to])
		if q := expect[*wire.Quiet](m); q.Instance != old.Instance || q.Revision != revision || q.Streams != 0 {
			t.Fatalf("got %+v", q)
		}
		if n := busy[from].Load(); n != 0 {
			t.Fatalf("%d requests in flight after Quiet", n)
		}
	}
	close(stop)
	wg.Wait()
}

func TestDrainLosesNothing(t *testing.T) {
	m := serving(t)
	begun, goOn := make(chan struct{}), make(chan struct{})
	m.plainApp(served(t, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/slow" {
			close(begun)
			<-goOn
		}
		_, _ = io.WriteString(w, "whole")
	}))
	idle := &http.Client{Transport: m.client(false, nil).Transport}
	resp, err := idle.Get("http://blog.test/")
	text(t, resp, err)
	slow := make(chan string, 1)
	go func() {
		resp, err := m.client(false, nil).Get("http://blog.test/slow")
		if err != nil {
			slow <- err.Error()
			return
		}
		slow <- fmt.Sprintf("%s %t", text(t, resp, nil), resp.Close)
	}()
	<-begun
	m.send(&wire.Drain{RequestsMS: 10000, StreamsMS: 20000})
	check0(t, m.conn.Send(1, &wire.Ping{}))
	<-m.pong
	// A connection that was idle still gets its answer, and is told to go.
	resp, err = idle.Get("http://blog.test/")
	if got := text(t, resp, err); got != "whole" {
		t.Errorf("the idle connection got %q", got)
	}
	close(goOn)
	if got := <-slow; got != "whole true" {
		t.Errorf("the slow request got %q", got)
	}
	if d := expect[*wire.Drained](m); d.Cut != 0 {
		t.Errorf("%d were cut", d.Cut)
	}
	// The last word but one counts every request, however late it came.
	counted := uint64(0)
	for len(m.traffic) > 0 {
		counted = (<-m.traffic).Apps[0].Instances[0].Requests
	}
	if counted != 3 {
		t.Errorf("the last report counts %d requests, want 3", counted)
	}
	if err := m.ended(); err != nil {
		t.Errorf("Run returned %v", err)
	}
}

func TestDrainCutsWhatTakesTooLong(t *testing.T) {
	m := serving(t)
	echo := echoInstance(t)
	m.plainApp(echo)
	_, br := upgraded(t, m)
	begun := make(chan struct{})
	m.app(wire.App{App: "slow", Routes: []string{"slow.test"}, PlainHTTP: true, Instances: []wire.Upstream{func() wire.Upstream {
		u := served(t, func(_ http.ResponseWriter, r *http.Request) {
			close(begun)
			<-r.Context().Done()
		})
		u.Instance.App = "slow"
		return u
	}()}})
	slow := make(chan int, 1)
	go func() {
		resp, err := m.client(false, nil).Get("http://slow.test/")
		if err != nil {
			slow <- 0
			return
		}
		_ = resp.Body.Close()
		slow <- resp.StatusCode
	}()
	<-begun
	m.send(&wire.Drain{RequestsMS: 50, StreamsMS: 200})
	if got := <-slow; got != http.StatusServiceUnavailable {
		t.Errorf("the request that took too long got %d", got)
	}
	if d := expect[*wire.Drained](m); d.Cut != 2 {
		t.Errorf("%d were cut, want 2", d.Cut)
	}
	_, _ = io.ReadAll(br) // it ended
	if err := m.ended(); err != nil {
		t.Errorf("Run returned %v", err)
	}
}

func TestTrafficIsTold(t *testing.T) {
	m := serving(t)
	up := served(t, func(http.ResponseWriter, *http.Request) {})
	m.plainApp(up)
	m.raw("GET / HTTP/1.1\r\nHost: blog.test\r\n\r\n")
	for {
		select {
		case tr := <-m.traffic:
			a := tr.Apps[0]
			if len(a.Instances) == 1 && a.Instances[0].Requests == 1 && a.App == "blog" && a.Instances[0].InFlight == 0 {
				return
			}
		case <-time.After(patience):
			t.Fatal("never told of the request")
		}
	}
}

func TestWrongMessagesEndRun(t *testing.T) {
	for name, f := range map[string]func(m *master){
		"greeting of another version": func(m *master) {},
		"serve without anything":      func(m *master) { m.send(&wire.Serve{}) },
		"settings without a port":     func(m *master) { m.send(&wire.ProxySettings{}) },
		"a proxy that is none":        func(m *master) { m.send(&wire.ProxySettings{HTTPSPort: 1, TrustedProxies: []string{"x"}}) },
		"short ticket key":            func(m *master) { m.send(&wire.TicketKeys{Keys: [][]byte{{1}}}) },
		"garbage for a certificate":   func(m *master) { m.send(&wire.Certificate{ID: "a", Chain: [][]byte{{1}}}) },
		"a route that is none":        func(m *master) { m.send(&wire.App{App: "blog", Revision: 1, Routes: []string{"a b"}}) },
		"no app id":                   func(m *master) { m.send(&wire.App{App: "B", Revision: 1}) },
		"revision zero":               func(m *master) { m.send(&wire.App{App: "blog"}) },
		"another app's instance": func(m *master) {
			m.send(&wire.App{App: "blog", Revision: 1, Instances: []wire.Upstream{{Instance: tako.InstanceID{App: "x", N: 1}}}})
		},
		"a connected socket for a listener": func(m *master) {
			a, b, err := socketPair()
			check0(m.t, err)
			m.send(&wire.Listeners{Names: []string{wire.ListenerHTTP}}, a)
			a.Close()
			b.Close()
		},
		"unknown listener": func(m *master) {
			a, b, err := socketPair()
			check0(m.t, err)
			m.send(&wire.Listeners{Names: []string{"gopher"}}, a)
			a.Close()
			b.Close()
		},
		"master gone": func(m *master) { check0(m.t, m.conn.Close()) },
	} {
		t.Run(name, func(t *testing.T) {
			m := greeted(t)
			f(m)
			if name == "greeting of another version" {
				m.stop()
				if err := m.ended(); err != nil {
					t.Errorf("asked to stop, Run returned %v", err)
				}
				return
			}
			if err := m.ended(); !errors.Is(err, ErrMaster) {
				t.Errorf("Run returned %v, want ErrMaster", err)
			}
		})
	}
}
