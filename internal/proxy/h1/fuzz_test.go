package h1

import (
	"bufio"
	"bytes"
	"errors"
	"io"
	"net/http"
	"net/http/httputil"
	"net/textproto"
	"net/url"
	"strings"
	"sync"
	"testing"

	"tako/internal/proxy/message"
)

// sameFields compares fields with what net/http made of them. It takes some away
// and adds one.
func sameFields(t *testing.T, raw []byte, fields []message.Field, h http.Header) {
	t.Helper()
	own := make(http.Header)
	for _, f := range fields {
		name := textproto.CanonicalMIMEHeaderKey(string(f.Name))
		own[name] = append(own[name], string(f.Value))
	}
	for _, name := range []string{"Host", "Transfer-Encoding", "Trailer"} {
		delete(own, name)
		h = h.Clone()
		delete(h, name)
	}
	if own["Cache-Control"] == nil && own["Pragma"] != nil {
		delete(h, "Cache-Control")
	}
	if len(h["Content-Length"]) == 1 && len(own["Content-Length"]) > 1 { // equal ones of an answer
		own["Content-Length"] = own["Content-Length"][:1]
	}
	if len(own) != len(h) {
		t.Fatalf("%q: %d names, net/http has %d: %v, %v", raw, len(own), len(h), own, h)
	}
	for name, values := range own {
		if strings.Join(values, "\n") != strings.Join(h[name], "\n") {
			t.Fatalf("%q: %s is %q, net/http has %q", raw, name, values, h[name])
		}
	}
}

// ownBody takes a body off in. It returns false if it is not whole.
func ownBody(in []byte, length int64, chunked bool) (data []byte, used int, whole bool) {
	if !chunked {
		if length > int64(len(in)) {
			return nil, 0, false
		}
		return in[:length], int(length), true
	}
	var c ChunkReader
	for used < len(in) {
		d, n, done, err := c.Next(in[used:])
		data = append(data, d...)
		used += n
		if err != nil || done {
			return data, used, err == nil
		}
	}
	return data, used, false
}

func FuzzRequestHead(f *testing.F) {
	for _, s := range []string{
		"GET / HTTP/1.1\r\nHost: h\r\n\r\n",
		"\r\nGET /?a=b HTTP/1.1\r\nHost:h:80\r\nX:\r\nAccept-Encoding: gzip\r\n\r\n",
		"GET / HTTP/1.0\r\nConnection: Keep-Alive\r\n\r\n",
		"POST /a HTTP/1.1\r\nHost: h\r\nContent-Length: 005 \r\n\r\nhelloGET",
		"POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\nTrailer: X\r\n\r\n5;a=\"b\"\r\nhello\r\n0\r\nX: 1\r\n\r\nGET",
		"POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n",
		"OPTIONS * HTTP/1.1\r\nHost: [::1]:80\r\nPragma: no-cache\r\n\r\n",
		"GET http://H:80/p?q HTTP/1.1\r\nHost: h\r\nConnection: x, close\r\n\r\n",
		"GET http://h?q HTTP/1.1\r\nHost: h\r\nUpgrade: websocket\r\nConnection: upgrade\r\n\r\n",
		"CONNECT h:1 HTTP/1.1\r\nHost: h:1\r\n\r\n", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
		"GET / HTTP/1.1\nHost: h\n\n", "GET / HTTP/1.1\r\nHost : h\r\n\r\n", "GET / HTTP/1.1\r\nHost: h\r\n x: y\r\n\r\n",
		"PUT / HTTP/1.1\r\nHost: h\r\nExpect: 100-continue\r\nContent-Length: 1\r\n\r\nx",
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, raw []byte) {
		if len(raw) > 8<<10 {
			return
		}
		var r RequestHead
		n, err := ParseRequest(raw, &r)
		everyPrefix(t, raw, n, err, func(b []byte) (int, error) {
			var r RequestHead
			return ParseRequest(b, &r)
		})
		if err != nil || n == 0 {
			return
		}
		in := bytes.TrimPrefix(raw, []byte("\r\n"))
		br := bufio.NewReader(bytes.NewReader(in))
		req, err := http.ReadRequest(br)
		if err != nil {
			if _, is := errors.AsType[*url.Error](err); is && bytes.IndexByte(r.Target, '%') >= 0 {
				return // what is escaped in a path is the app's matter
			}
			if strings.Contains(err.Error(), "bad trailer key") {
				return // which are announced does not matter: none of those is passed on
			}
			t.Fatalf("%q: net/http refuses it: %v", raw, err)
		}
		host := req.Host
		if r.Host != nil && !strings.EqualFold(host, string(r.Host)) {
			name, _, _ := message.ParseHost([]byte(host))
			if own, _, _ := message.ParseHost(r.Host); !bytes.EqualFold(name, own) {
				t.Fatalf("%q: host %q, net/http has %q", raw, r.Host, host)
			}
		}
		target := req.RequestURI
		if target[0] != '/' && target != "*" {
			if target = req.URL.RequestURI(); req.URL.Path == "" && req.Method == http.MethodOptions && req.URL.RawQuery == "" && !req.URL.ForceQuery {
				target = "*"
			}
			if u, err := url.Parse(string(r.Target)); err == nil && target != "*" {
				r.Target = []byte(u.RequestURI())
			}
		}
		if req.Method != string(r.Method) || target != string(r.Target) || req.Close != r.Close || req.ContentLength != r.Length ||
			(len(req.TransferEncoding) > 0) != r.Chunked || req.ProtoMajor != 1 || min(req.ProtoMinor, 1) != int(r.Minor) {
			t.Fatalf("%q: %+v, net/http has %+v", raw, r, req)
		}
		sameFields(t, raw, r.Fields, req.Header)
		data, used, whole := ownBody(raw[n:], r.Length, r.Chunked)
		if !whole {
			return
		}
		theirs, err := io.ReadAll(req.Body)
		if err != nil || !bytes.Equal(data, theirs) {
			t.Fatalf("%q: body %q, net/http has %q, %v", raw, data, theirs, err)
		}
		left, _ := io.ReadAll(br)
		if !bytes.Equal(left, raw[n+used:]) {
			t.Fatalf("%q: the next request is %q, for net/http %q", raw, raw[n+used:], left)
		}
	})
}

// everyPrefix checks that a head is read, or refused, the same however much of
// what follows has come, and that no part of a good head is refused.
func everyPrefix(t *testing.T, raw []byte, n int, err error, parse func([]byte) (int, error)) {
	t.Helper()
	refused := false
	step := 1 + len(raw)/256
	for k := 0; k <= len(raw); k += step {
		m, perr := parse(raw[:k])
		switch {
		case perr != nil && (err == nil || m != 0), perr == nil && refused, perr == nil && m != 0 && m != n, n > 0 && k >= n && m != n, n > 0 && k < n && m != 0:
			t.Fatalf("%q: %d, %v; of it %q: %d, %v (refused before: %v)", raw, n, err, raw[:k], m, perr, refused)
		case perr != nil:
			refused = true
		}
	}
}

func FuzzResponseHead(f *testing.F) {
	for _, s := range []string{
		"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello", "HTTP/1.0 200\r\n\r\nhello",
		"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
		"HTTP/1.1 204 No Content\r\nContent-Length: 5\r\n\r\n", "HTTP/1.1 304 x\r\nContent-Length: 5\r\nContent-Length: 5\r\n\r\n",
		"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n", "HTTP/1.1 101 x\r\nConnection: Upgrade\r\nUpgrade: a\r\n\r\n",
		"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n", "HTTP/1.1 200 OK\nX: y\n\n",
	} {
		f.Add([]byte(s), false)
		f.Add([]byte(s), true)
	}
	f.Fuzz(func(t *testing.T, raw []byte, head bool) {
		if len(raw) > 8<<10 {
			return
		}
		method := http.MethodGet
		if head {
			method = http.MethodHead
		}
		var r ResponseHead
		n, err := ParseResponse(raw, []byte(method), &r)
		everyPrefix(t, raw, n, err, func(b []byte) (int, error) {
			var r ResponseHead
			return ParseResponse(b, []byte(method), &r)
		})
		if err != nil || n == 0 {
			return
		}
		br := bufio.NewReader(bytes.NewReader(raw))
		resp, err := http.ReadResponse(br, &http.Request{Method: method})
		if err != nil {
			if strings.Contains(err.Error(), "bad trailer key") {
				return
			}
			t.Fatalf("%q: net/http refuses it: %v", raw, err)
		}
		if resp.StatusCode != r.Status || resp.ProtoMinor != int(r.Minor) || resp.Close && !r.Close {
			t.Fatalf("%q: %+v, net/http has %+v", raw, r, resp)
		}
		if r.Body && (resp.ContentLength != r.Length || (len(resp.TransferEncoding) > 0) != r.Chunked) {
			t.Fatalf("%q: length %d, chunked %v, net/http has %d, %v", raw, r.Length, r.Chunked, resp.ContentLength, resp.TransferEncoding)
		}
		if !r.Close { // else net/http may have looked at what does not matter
			sameFields(t, raw, r.Fields, resp.Header)
		}
		length := r.Length
		switch {
		case !r.Body:
			length = 0
		case length == message.Unknown:
			length = int64(len(raw) - n)
		}
		data, used, whole := ownBody(raw[n:], length, r.Chunked)
		if !whole {
			return
		}
		theirs, err := io.ReadAll(resp.Body)
		if err != nil || !bytes.Equal(data, theirs) {
			t.Fatalf("%q: body %q, net/http has %q, %v", raw, data, theirs, err)
		}
		left, _ := io.ReadAll(br)
		if !bytes.Equal(left, raw[n+used:]) {
			t.Fatalf("%q: left over is %q, for net/http %q", raw, raw[n+used:], left)
		}
	})
}

func FuzzChunked(f *testing.F) {
	for _, s := range []string{
		"5\r\nhello\r\n0\r\n\r\n", "1;a=\"b;c\\\"\"\r\nx\r\n0;y\r\nX: 1\r\n\r\nGET", "0\r\n\r\n", "ffffffffffffffff\r\n", "1\nx\n0\n\n",
		"00000000000000001\r\nx\r\n0\r\n\r\n", "1 \r\nx\r\n0\r\n\r\n", "0\r\nContent-Length: 1\r\n\r\n",
	} {
		f.Add([]byte(s), uint8(3))
	}
	f.Fuzz(func(t *testing.T, raw []byte, size uint8) {
		if len(raw) > 8<<10 {
			return
		}
		data, used, whole := ownBody(raw, 0, true)
		split, rest, _, done, err := dechunk(string(raw), 1+int(size))
		if split != string(data) || done != whole || whole && rest != string(raw[used:]) {
			t.Fatalf("%q: %q, %v in one, %q, %v, %v in pieces of %d", raw, data, whole, split, done, err, 1+int(size))
		}
		if err != nil || !whole {
			return
		}
		theirs, err := io.ReadAll(httputil.NewChunkedReader(bytes.NewReader(raw)))
		if err != nil || !bytes.Equal(theirs, data) {
			t.Fatalf("%q: %q, httputil has %q, %v", raw, data, theirs, err)
		}
	})
}

// browserHead is what a browser sends.
const browserHead = "GET /assets/app.js?v=3 HTTP/1.1\r\nHost: www.example.com\r\nUser-Agent: Mozilla/5.0 (X11; Linux x86_64; rv:128.0) Gecko/20100101 Firefox/128.0\r\n" +
	"Accept: */*\r\nAccept-Language: en-US,en;q=0.5\r\nAccept-Encoding: gzip, deflate, br, zstd\r\nConnection: keep-alive\r\n" +
	"Referer: https://www.example.com/\r\nCookie: session=0123456789abcdef\r\nPriority: u=2\r\n\r\n"

func BenchmarkParseRequest(b *testing.B) {
	raw := []byte(browserHead)
	var r RequestHead
	b.ReportAllocs()
	b.SetBytes(int64(len(raw)))
	for b.Loop() {
		if n, err := ParseRequest(raw, &r); n != len(raw) || err != nil {
			b.Fatal(n, err)
		}
	}
}

func BenchmarkParseResponse(b *testing.B) {
	raw := []byte("HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 1024\r\nDate: Mon, 23 Nov 2026 15:00:00 GMT\r\nConnection: keep-alive\r\n\r\n")
	var r ResponseHead
	b.ReportAllocs()
	for b.Loop() {
		if n, err := ParseResponse(raw, []byte("GET"), &r); n != len(raw) || err != nil {
			b.Fatal(n, err)
		}
	}
}

func TestHeadsAreParsedWithoutMemory(t *testing.T) {
	raw := []byte(browserHead)
	answer := []byte("HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 1024\r\n\r\n")
	chunks := []byte("5;a=b\r\nhello\r\n0\r\n\r\n")
	var r RequestHead
	var a ResponseHead
	var c ChunkReader
	get := []byte("GET")
	out := make([]byte, 0, 4096)
	if n := testing.AllocsPerRun(100, func() {
		_, _ = ParseRequest(raw, &r)
		_, _ = ParseResponse(answer, get, &a)
		c.Reset()
		for in := chunks; len(in) > 0; {
			_, used, _, _ := c.Next(in)
			in = in[used:]
		}
		out = AppendRequestLine(out[:0], r.Method, r.Target)
		out = AppendFields(out, r.Fields, r.Nominates)
		out = AppendStatusLine(out, a.Status)
		out = AppendLength(AppendChunkHeader(out, 5), 5)
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
	if len(r.Fields) == 0 || a.Length != 1024 {
		t.Error("nothing was parsed")
	}
}

// What a server takes for requests in a row of bytes, net/http does, too.
func FuzzServer(f *testing.F) {
	const get, post = "GET /a HTTP/1.1\r\nHost: h\r\n\r\n", "POST /b HTTP/1.1\r\nHost: h\r\n"
	for _, s := range []string{
		get + get, get + "\r\n" + get, post + "Content-Length: 5\r\n\r\nhello" + get,
		post + "Transfer-Encoding: chunked\r\n\r\n5;x\r\nhello\r\n0\r\nX: 1\r\n\r\n" + get,
		post + "Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + get,
		post + "Content-Length: 5\r\nContent-Length: 0\r\n\r\n" + get, "GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n" + get,
		post + "Expect: 100-continue\r\nContent-Length: 2\r\n\r\nab" + get,
	} {
		f.Add([]byte(s), uint16(7))
	}
	var mu sync.Mutex
	var seen []string // guarded by mu
	s := serveOn(f, "unix", limits(), nil, handlerFunc(func(x message.Exchange) {
		r := x.Request()
		body, err := io.ReadAll(reader{x})
		if err != nil {
			_ = say(x, http.StatusBadRequest, "")
			return
		}
		mu.Lock()
		seen = append(seen, string(r.Method)+" "+string(r.Target)+" "+string(body))
		mu.Unlock()
		_ = say(x, http.StatusOK, "")
	}))
	f.Fuzz(func(t *testing.T, raw []byte, cut uint16) {
		if len(raw) > 8<<10 {
			return
		}
		mu.Lock()
		seen = nil
		mu.Unlock()
		c := (&server{Server: s.Server, t: t, l: s.l}).dial()
		defer c.Close()
		for left, n := raw, 1+max(int(cut), len(raw)/8); len(left) > 0; left = left[min(n, len(left)):] {
			if _, err := c.Write(left[:min(n, len(left))]); err != nil {
				break // it has been refused
			}
		}
		_ = closeWrite(c.Conn)
		_, _ = io.Copy(io.Discard, c) // a reset, too, is an end
		until(t, "the connection has ended", func() bool { return int64(len(s.all(nil))) == 0 })

		mu.Lock()
		defer mu.Unlock()
		br := bufio.NewReader(bytes.NewReader(raw))
		for i, own := range seen {
			if b, _ := br.Peek(2); string(b) == "\r\n" {
				_, _ = br.Discard(2)
			}
			req, err := http.ReadRequest(br)
			if err != nil {
				if _, is := errors.AsType[*url.Error](err); is || strings.Contains(err.Error(), "bad trailer key") {
					return // as in FuzzRequestHead
				}
				t.Fatalf("%q: %q is no request for net/http: %v", raw, own, err)
			}
			body, err := io.ReadAll(req.Body)
			if want := req.Method + " " + req.RequestURI + " " + string(body); err != nil || own != want && req.URL.Host == "" {
				t.Fatalf("%q: request %d is %q, for net/http %q, %v", raw, i, own, want, err)
			}
		}
	})
}
