package h2

import (
	"errors"
	"fmt"
	"io"
	"strings"
	"testing"

	"golang.org/x/net/http2"

	"tako/internal/proxy/message"
)

func TestMalformedHeadsReachNoHandler(t *testing.T) {
	p := serve(t, func(x message.Exchange) {
		if string(x.Request().Target) != "/" {
			t.Errorf("the handler got %q", x.Request().Target)
		}
		ok(x)
	})
	id := uint32(1)
	for name, fields := range map[string][]string{
		"no method":                       {":scheme", "https", ":authority", "a", ":path", "/bad"},
		"empty method":                    {":method", "", ":scheme", "https", ":authority", "a", ":path", "/bad"},
		"method with a space":             {":method", "GET /x", ":scheme", "https", ":authority", "a", ":path", "/bad"},
		"no scheme":                       {":method", "GET", ":authority", "a", ":path", "/bad"},
		"another scheme":                  {":method", "GET", ":scheme", "ftp", ":authority", "a", ":path", "/bad"},
		"no path":                         {":method", "GET", ":scheme", "https", ":authority", "a"},
		"empty path":                      {":method", "GET", ":scheme", "https", ":authority", "a", ":path", ""},
		"path without slash":              {":method", "GET", ":scheme", "https", ":authority", "a", ":path", "bad"},
		"path with a space":               {":method", "GET", ":scheme", "https", ":authority", "a", ":path", "/bad HTTP/1.1"},
		"path with CRLF":                  {":method", "GET", ":scheme", "https", ":authority", "a", ":path", "/bad\r\nx: y"},
		"path with a fragment":            {":method", "GET", ":scheme", "https", ":authority", "a", ":path", "/bad#x"},
		"absolute path":                   {":method", "GET", ":scheme", "https", ":authority", "a", ":path", "https://a/bad"},
		"star with GET":                   {":method", "GET", ":scheme", "https", ":authority", "a", ":path", "*"},
		"no authority and no host":        {":method", "GET", ":scheme", "https", ":path", "/bad"},
		"empty authority":                 {":method", "GET", ":scheme", "https", ":authority", "", ":path", "/bad"},
		"authority with a user":           {":method", "GET", ":scheme", "https", ":authority", "u@a", ":path", "/bad"},
		"authority with a slash":          {":method", "GET", ":scheme", "https", ":authority", "a/b", ":path", "/bad"},
		"empty authority beside a host":   {":method", "GET", ":scheme", "https", ":authority", "", ":path", "/bad", "host", "a"},
		"host that is not the authority":  base("GET", "/bad", "host", "evil.test"),
		"two hosts":                       base("GET", "/bad", "host", "h2.test", "host", "h2.test"),
		"two paths":                       base("GET", "/bad", ":path", "/bad"),
		"two authorities":                 base("GET", "/bad", ":authority", "h2.test"),
		"unknown pseudo-field":            base("GET", "/bad", ":x", "y"),
		"pseudo-field of answers":         base("GET", "/bad", ":status", "200"),
		"pseudo-field after others":       {":method", "GET", ":scheme", "https", ":authority", "a", "x", "y", ":path", "/bad"},
		"protocol without CONNECT":        base("GET", "/bad", ":protocol", "websocket"),
		"CONNECT with a path":             base("CONNECT", "/bad"),
		"extended CONNECT without a path": {":method", "CONNECT", ":scheme", "https", ":authority", "a", ":protocol", "websocket"},
		"extended CONNECT with an end":    base("CONNECT", "/bad", ":protocol", "websocket"),
		"name in upper case":              base("GET", "/bad", "X-A", "b"),
		"empty name":                      base("GET", "/bad", "", "b"),
		"name with a colon":               base("GET", "/bad", "x:a", "b"),
		"name with CRLF":                  base("GET", "/bad", "x\r\ny", "b"),
		"name with a space":               base("GET", "/bad", "x ", "b"),
		"value with CR":                   base("GET", "/bad", "x", "a\rb"),
		"value with LF":                   base("GET", "/bad", "x", "a\nb"),
		"value with NUL":                  base("GET", "/bad", "x", "a\x00b"),
		"value with a space before":       base("GET", "/bad", "x", " a"),
		"value with a tab after":          base("GET", "/bad", "x", "a\t"),
		"connection":                      base("GET", "/bad", "connection", "close"),
		"keep-alive":                      base("GET", "/bad", "keep-alive", "timeout=5"),
		"proxy-connection":                base("GET", "/bad", "proxy-connection", "close"),
		"transfer-encoding":               base("GET", "/bad", "transfer-encoding", "chunked"),
		"upgrade":                         base("GET", "/bad", "upgrade", "h2c"),
		"te beside trailers":              base("GET", "/bad", "te", "trailers, gzip"),
		"content-length without a body":   base("GET", "/bad", "content-length", "5"),
		"content-length with a sign":      base("GET", "/bad", "content-length", "+0"),
		"content-length that is none":     base("GET", "/bad", "content-length", ""),
		"content-length too large":        base("GET", "/bad", "content-length", "1000000000000000000000"),
		"two content-lengths":             base("GET", "/bad", "content-length", "0", "content-length", "0"),
	} {
		p.ask(id, true, fields...)
		if a := p.hear(id); !a.reset || a.code != http2.ErrCodeProtocol {
			t.Errorf("%s: got %+v, want a reset with PROTOCOL_ERROR", name, a)
		}
		id += 2
	}
	p.wantOK(id)
}

func TestHeadsAreRefusedByStatus(t *testing.T) {
	p := serve(t, func(x message.Exchange) {
		if string(x.Request().Target) != "/" {
			t.Errorf("the handler got %.20q", x.Request().Target)
		}
		ok(x)
	})
	many := make([]string, 0, 2*message.MaxFields+2)
	for range message.MaxFields + 1 {
		many = append(many, "x", "y")
	}
	id := uint32(1)
	for _, c := range []struct {
		status string
		fields []string
	}{
		{"414", base("GET", "/"+strings.Repeat("a", message.MaxTarget))},
		{"431", base("GET", "/bad", many...)},
		{"431", base("GET", "/bad", "x", strings.Repeat("&", message.MaxHead-16<<10), "y", strings.Repeat("&", 16<<10))},
		{"405", []string{":method", "CONNECT", ":authority", "a:443"}},
		{"501", base(strings.Repeat("A", maxMethod+1), "/bad")},
		{"417", base("POST", "/bad", "expect", "something")},
	} {
		block := p.encode(c.fields...)
		flags := http2.FlagHeadersEndStream
		for kind := http2.FrameHeaders; len(block) > 0; kind = http2.FrameContinuation {
			n := min(len(block), frameSize)
			if n == len(block) {
				flags |= http2.FlagHeadersEndHeaders
			}
			p.frame(kind, flags, id, block[:n]...)
			block, flags = block[n:], 0
		}
		if a := p.hear(id); a.status != c.status || !a.ended {
			t.Errorf("%.60q: got %+v, want %s", c.fields, a, c.status)
		}
		id += 2
	}
	p.wantOK(id) // the decoder still follows the encoder
}

func TestRequestsAreSeenAsTheyWereSent(t *testing.T) {
	var got string
	p := serve(t, func(x message.Exchange) {
		r := x.Request()
		got = fmt.Sprintf("%s %s %s %d %v expect=%v trailers=%v", r.Method, r.Target, r.Host, r.Length, r.HasLength, r.Expect, r.TETrailers)
		for _, f := range r.Fields {
			got += fmt.Sprintf("|%s=%s", f.Name, f.Value)
			if f.ID != message.Lookup(f.Name) {
				t.Errorf("%s has ID %d", f.Name, f.ID)
			}
		}
		ok(x)
	})
	id := uint32(1)
	for _, c := range []struct {
		end    bool
		fields []string
		want   string
	}{
		{true, base("GET", "/a?b"), "GET /a?b h2.test 0 false expect=false trailers=false"},
		{true, []string{":method", "GET", ":scheme", "http", ":path", "/", "host", "h2.test:8080"}, "GET / h2.test:8080 0 false expect=false trailers=false"},
		{true, base("GET", "/", "host", "H2.test", "te", "trailers"), "GET / h2.test 0 false expect=false trailers=true|te=trailers"},
		{true, base("GET", "/", "cookie", "a=1", "x", "y", "cookie", "b=2", "cookie", "c=3"), "GET / h2.test 0 false expect=false trailers=false|cookie=a=1; b=2; c=3|x=y"},
		{true, base("OPTIONS", "*"), "OPTIONS * h2.test 0 false expect=false trailers=false"},
		{true, base("POST", "/", "content-length", "0"), "POST / h2.test 0 true expect=false trailers=false|content-length=0"},
		{false, base("POST", "/"), "POST / h2.test -1 false expect=false trailers=false"},
		{false, base("POST", "/", "content-length", "3", "expect", "100-continue"), "POST / h2.test 3 true expect=true trailers=false|content-length=3|expect=100-continue"},
		{true, base("GET", "/", "x", "caf\xe9"), "GET / h2.test 0 false expect=false trailers=false|x=caf\xe9"},
	} {
		p.ask(id, c.end, c.fields...)
		if !c.end {
			p.data(id, true, "abc")
		}
		if a := p.hear(id); a.status != "200" || got != c.want {
			t.Errorf("got %q and %s, want %q", got, a.status, c.want)
		}
		id += 2
	}
}

func TestHeadOfAnyLengthUpToTheLimitIsTaken(t *testing.T) {
	p := serve(t, ok)
	value := strings.Repeat("a", message.MaxHead-200)
	block := p.encode(base("GET", "/", "x", value)...)
	p.frame(http2.FrameHeaders, http2.FlagHeadersEndStream, 1, block[:10]...)
	for block = block[10:]; len(block) > 1000; block = block[1000:] {
		p.frame(http2.FrameContinuation, 0, 1, block[:1000]...)
	}
	p.frame(http2.FrameContinuation, http2.FlagContinuationEndHeaders, 1, block...)
	if a := p.hear(1); a.status != "200" {
		t.Fatalf("got %+v, want 200", a)
	}
}

// bodies is a handler that reads the body and tells what it was.
func bodies(to chan<- string) func(x message.Exchange) {
	return func(x message.Exchange) {
		b, err := io.ReadAll(reader{x})
		s := string(b)
		if err != nil {
			s += " " + err.Error()
		}
		for _, f := range x.Trailer() {
			s += fmt.Sprintf(" %s=%s", f.Name, f.Value)
		}
		to <- s
		if err != nil {
			x.Abort()
			return
		}
		ok(x)
	}
}

type reader struct{ x message.Exchange }

func (r reader) Read(p []byte) (int, error) { return r.x.ReadBody(p) }

func TestBodiesEndAsAnnounced(t *testing.T) {
	got := make(chan string, 1)
	p := serve(t, bodies(got))
	id := uint32(1)
	for _, c := range []struct {
		length string
		body   []string
		want   string
	}{
		{"", []string{"he", "llo"}, "hello"},
		{"5", []string{"hello"}, "hello"},
		{"5", []string{"h", "", "ello", ""}, "hello"},
		{"", []string{""}, ""},
		{"4", []string{"hello"}, "!"},
		{"4", []string{"hell", "o"}, "!"},
		{"6", []string{"hello"}, "!"},
		{"0", []string{"GET /poison HTTP/1.1\r\n\r\n"}, "!"},
		{"0", []string{"", "x"}, "!"},
	} {
		fields := base("POST", "/")
		if c.length != "" {
			fields = append(fields, "content-length", c.length)
		}
		p.ask(id, false, fields...)
		for i, b := range c.body {
			p.data(id, i == len(c.body)-1, b)
		}
		a := p.hear(id)
		if c.want == "!" {
			if !a.reset || a.code != http2.ErrCodeProtocol {
				t.Errorf("%v: got %+v, want a reset", c, a)
			}
			if c.length != "0" {
				if s := <-got; !strings.Contains(s, errMalformed.Error()) && s != "" {
					t.Errorf("%v: the handler got %q as a whole body", c, s)
				}
			}
		} else if s := <-got; s != c.want || a.status != "200" {
			t.Errorf("%v: got %q and %+v, want %q", c, s, a, c.want)
		}
		id += 2
	}
	p.wantSettled()
}

func TestLastByteWaitsForTheEnd(t *testing.T) {
	read := make(chan string)
	p := serve(t, func(x message.Exchange) {
		var b [16]byte
		for {
			n, err := x.ReadBody(b[:])
			if err != nil {
				read <- err.Error()
				return
			}
			read <- string(b[:n])
		}
	})
	p.ask(1, false, base("POST", "/", "content-length", "5")...)
	p.data(1, false, "hello")
	if s := <-read; s != "hell" {
		t.Fatalf("the handler got %q before the end, want all but the last byte", s)
	}
	p.data(1, false, "more")
	if s := <-read; s != errMalformed.Error() {
		t.Fatalf("got %q", s)
	}
	p.wantReset(1, http2.ErrCodeProtocol)
}

func TestTrailersOfRequests(t *testing.T) {
	got := make(chan string, 1)
	p := serve(t, bodies(got))
	p.ask(1, false, base("POST", "/")...)
	p.data(1, false, "hello")
	p.ask(1, true, "x-sum", "1", "content-length", "50", "host", "evil.test", "x-forwarded-for", "::1", "y", "2")
	if s := <-got; s != "hello x-sum=1 y=2" {
		t.Errorf("got %q", s)
	}
	p.hear(1)
	id := uint32(3)
	for name, fields := range map[string][]string{
		"pseudo-field": {":path", "/x"}, "CRLF": {"x", "a\r\n\r\nGET / HTTP/1.1"}, "connection": {"connection", "close"}, "upper case": {"X", "y"},
	} {
		p.ask(id, false, base("POST", "/")...)
		p.data(id, false, "hello")
		p.ask(id, true, fields...)
		if s := <-got; !strings.Contains(s, errMalformed.Error()) {
			t.Errorf("%s: the handler got %q as a whole body", name, s)
		}
		p.wantReset(id, http2.ErrCodeProtocol)
		id += 2
	}
	p.ask(id, false, base("POST", "/")...)
	p.ask(id, false, "x", "y") // without END_STREAM
	<-got
	p.wantReset(id, http2.ErrCodeProtocol)
	p.wantSettled()
}

func TestTrailerOfAStreamThatHasEndedMeanwhile(t *testing.T) {
	end := make(chan struct{})
	p := serve(t, func(x message.Exchange) {
		<-end
		respond(x, "enough")
	})
	for id := uint32(1); id < 20; id += 2 {
		p.ask(id, false, base("POST", "/")...)
		block := p.encode("x", "y", "z", "w")
		p.frame(http2.FrameHeaders, http2.FlagHeadersEndStream, id, block[:1]...)
		end <- struct{}{}
		p.hear(id)
		p.await(http2.FrameRSTStream, id)
		p.wantSettled()
		p.frame(http2.FrameContinuation, http2.FlagContinuationEndHeaders, id, block[1:]...)
	}
	go func() { end <- struct{}{} }()
	p.wantOK(21)
}

func TestBodyThatCameWithTheHeadIsOneView(t *testing.T) {
	got := make(chan string, 1)
	srv := &Server{Handler: handlerFunc(func(x message.Exchange) {
		b, whole := x.Buffered()
		s := fmt.Sprint(string(b), whole)
		if whole {
			if _, err := x.ReadBody(make([]byte, 1)); !errors.Is(err, io.EOF) {
				t.Errorf("after it all, ReadBody says %v", err)
			}
		}
		got <- s
		ok(x)
	})}
	p := meet(t, srv)
	// One write: what comes with the head.
	var block []byte
	block = append(block, p.encode(base("POST", "/", "content-length", "5")...)...)
	b := append([]byte{0, 0, byte(len(block)), 1, 4, 0, 0, 0, 1}, block...)
	b = append(b, 0, 0, 5, 0, 1, 0, 0, 0, 1)
	p.raw(append(b, "hello"...))
	if s := <-got; s != "hellotrue" {
		t.Errorf("got %q", s)
	}
	p.hear(1)
	p.get(3)
	if s := <-got; s != "true" {
		t.Errorf("no body: got %q", s)
	}
	p.hear(3)
	p.ask(5, false, base("POST", "/")...)
	if s := <-got; s != "false" {
		t.Errorf("a body that is to come: got %q", s)
	}
	p.data(5, true, "x")
	p.hear(5)
}

func TestContinueIsSentWhenTheBodyIsWanted(t *testing.T) {
	want := make(chan bool, 1)
	p := serve(t, func(x message.Exchange) {
		if <-want {
			ok(x)
		} else {
			respond(x, "no")
		}
	})
	want <- true
	p.ask(1, false, base("POST", "/", "expect", "100-continue")...)
	if e := p.await(http2.FrameHeaders, 1); e.get(":status") != "100" || e.ends() {
		t.Fatalf("got %v, want 100", e)
	}
	p.data(1, true, "hello")
	if a := p.hear(1); a.status != "200" {
		t.Fatalf("got %+v", a)
	}
	want <- false
	p.ask(3, false, base("POST", "/", "expect", "100-continue")...)
	if a := p.hear(3); a.status != "200" || len(a.interim) != 0 {
		t.Fatalf("got %+v, want no 100", a)
	}
}

func TestStopBodyEndsAWaitingRead(t *testing.T) {
	read := make(chan error, 1)
	p := serve(t, func(x message.Exchange) {
		done := make(chan struct{})
		go func() {
			defer close(done)
			_, err := x.ReadBody(make([]byte, 1))
			read <- err
		}()
		x.StopBody()
		<-done
		respond(x, "enough")
	})
	p.ask(1, false, base("POST", "/")...)
	if err := <-read; !errors.Is(err, errStopped) {
		t.Errorf("got %v", err)
	}
	if a := p.hear(1); a.body != "enough" || !a.ended {
		t.Errorf("got %+v", a)
	}
	if e := p.await(http2.FrameRSTStream, 1); e.code() != http2.ErrCodeNo {
		t.Errorf("got %v, want NO_ERROR", e.code())
	}
	p.data(1, true, "what was on its way")
	p.wantOK(3)
}
