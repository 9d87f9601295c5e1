package upstream

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/net/http2"

	"tako/internal/proxy/h1"
	"tako/internal/proxy/message"
)

// content is the body of a request.
type content struct {
	io.Reader
	whole   []byte // Buffered, if not nil
	given   bool   // it was asked for, and there is nothing any more
	trailer []message.Field
	stop    func()
	read    atomic.Int64
}

func (b *content) ReadBody(p []byte) (int, error) {
	if b.Reader == nil {
		return 0, io.EOF
	}
	n, err := b.Read(p)
	b.read.Add(int64(n))
	return n, err
}

func (b *content) Buffered() ([]byte, bool) {
	if b.given {
		return nil, b.whole != nil
	}
	b.given = true
	return b.whole, b.whole != nil
}

func (b *content) Trailer() []message.Field { return b.trailer }

func (b *content) StopBody() {
	if b.stop != nil {
		b.stop()
	}
}

func streamed(s string) *content { return &content{Reader: strings.NewReader(s)} }
func buffered(s string) *content { return &content{whole: []byte(s)} }

// fields makes fields of names and values in turn.
func fields(nv ...string) (f []message.Field) {
	for i := 0; i < len(nv); i += 2 {
		f = append(f, message.Field{Name: []byte(nv[i]), Value: []byte(nv[i+1]), ID: message.Lookup([]byte(nv[i]))})
	}
	return f
}

func outgoing(method string) *Outgoing {
	return &Outgoing{Method: []byte(method), Target: []byte("/"), Host: []byte("a.test")}
}

func with(r *Outgoing, b *content, n int64) *Outgoing {
	r.Body, r.Length = b, n
	return r
}

// ask returns the status and the body of the answer.
func ask(t testing.TB, p *Pool, r *Outgoing) (int, string, error) {
	t.Helper()
	in, err := p.RoundTrip(new(Cancel), r)
	if err != nil {
		return 0, "", err
	}
	defer in.Close()
	b, err := io.ReadAll(in)
	return in.Status, string(b), err
}

func TestLinksAreUsedAgainOnlyWhenClean(t *testing.T) {
	large := strings.Repeat("x", 20<<10)
	for _, test := range []struct {
		name, method, answer string
		reused               bool
	}{
		{"length", "GET", "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok", true},
		{"length said twice", "GET", "HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 2\r\n\r\nok", true},
		{"large", "GET", "HTTP/1.1 200 OK\r\nContent-Length: 20480\r\n\r\n" + large, true},
		{"chunked", "GET", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n", true},
		{"large chunk", "GET", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5000\r\n" + large + "\r\n0\r\nA: b\r\n\r\n", true},
		{"no content", "GET", "HTTP/1.1 204 No Content\r\n\r\n", true},
		{"not modified", "GET", "HTTP/1.1 304 Not Modified\r\nContent-Length: 9\r\n\r\n", true},
		{"head", "HEAD", "HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n", true},
		{"after hints", "GET", "HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok", true},
		{"asked to close", "GET", "HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nok", false},
		{"HTTP/1.0", "GET", "HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nok", false},
		{"surplus", "GET", "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nokHTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil", false},
		{"surplus after a large one", "GET", "HTTP/1.1 200 OK\r\nContent-Length: 20480\r\n\r\n" + large + "evil", false},
		{"surplus after chunks", "GET", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\nevil", false},
		{"body to HEAD", "HEAD", "HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil", false},
		{"no content with content", "GET", "HTTP/1.1 204 No Content\r\nContent-Length: 4\r\n\r\nevil", false},
		{"not modified with content", "GET", "HTTP/1.1 304 Not Modified\r\nContent-Length: 4\r\n\r\nevil", false},
	} {
		for _, network := range []string{"unix", "tcp"} {
			p, conns := listeningOn(t, network, func(_ int, c net.Conn, br *bufio.Reader) {
				for {
					if _, _, ok := next(br); !ok {
						return
					}
					_, _ = io.WriteString(c, test.answer)
				}
			})
			for range 3 {
				if _, body, err := ask(t, p, outgoing(test.method)); err != nil || strings.Contains(body, "evil") {
					t.Errorf("%s, %s: %q, %v", test.name, network, body, err)
				}
			}
			want := int32(3)
			if test.reused {
				want = 1
			}
			if got := conns.Load(); got != want {
				t.Errorf("%s, %s: %d connections, want %d", test.name, network, got, want)
			}
			if open, idle := p.Conns(); open != idle {
				t.Errorf("%s, %s: %d open, %d of them idle", test.name, network, open, idle)
			}
		}
	}
}

func TestSurplusIsSeenAfterABodyReadToTheByte(t *testing.T) {
	for _, surplus := range []string{"", "evil"} {
		p, _ := listening(t, func(_ int, c net.Conn, br *bufio.Reader) {
			_, _, _ = next(br)
			_, _ = io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 40960\r\n\r\n")
			_, _ = io.WriteString(c, strings.Repeat("x", 40960)+surplus)
			_, _ = br.ReadByte()
		})
		in, err := p.RoundTrip(new(Cancel), outgoing("GET"))
		if err != nil {
			t.Fatal(err)
		}
		n := len(in.Buffered())
		body := make([]byte, int(in.Rest()))
		if _, err := io.ReadFull(in, body); err != nil || n+len(body) != 40960 || !in.Whole() {
			t.Errorf("%d and %d bytes, %v", n, len(body), err)
		}
		in.Close()
		if _, idle := p.Conns(); (idle == 1) != (surplus == "") {
			t.Errorf("after %q: %d idle", surplus, idle)
		}
	}
}

func TestSurplusIsSeenAfterAnAnswerThatFillsTheBuffer(t *testing.T) {
	// Whole is an answer of h1.OutBuffer bytes, whatever its framing.
	whole := func(head, tail string, chunked bool) string {
		for n := h1.OutBuffer; ; n-- {
			begin := fmt.Sprintf(head, n)
			if chunked {
				begin = head + fmt.Sprintf("%x\r\n", n)
			}
			if s := begin + strings.Repeat("x", n) + tail; len(s) == h1.OutBuffer {
				return s
			}
		}
	}
	for name, answer := range map[string]string{
		"length": whole("HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n", "", false),
		"chunks": whole("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", "\r\n0\r\n\r\n", true),
	} {
		for _, surplus := range []string{"", "evil"} {
			p, _ := listening(t, func(_ int, c net.Conn, br *bufio.Reader) {
				_, _, _ = next(br)
				_, _ = io.WriteString(c, answer+surplus) // in one piece, on a Unix socket
				_, _ = br.ReadByte()
			})
			in, err := p.RoundTrip(new(Cancel), outgoing("GET"))
			if err != nil {
				t.Fatal(err)
			}
			if _, idle := p.Conns(); !in.Whole() || (idle == 1) != (surplus == "") {
				t.Errorf("%s, surplus %q: whole %t, %d idle", name, surplus, in.Whole(), idle)
			}
			in.Close()
		}
	}
}

func TestConnectionGoesBackAsSoonAsAllHasCome(t *testing.T) {
	p, _ := listening(t, func(_ int, c net.Conn, br *bufio.Reader) {
		for {
			if _, _, ok := next(br); !ok {
				return
			}
			_, _ = io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nfirst")
		}
	})
	first, second := outgoing("GET"), outgoing("GET")
	a, err := p.RoundTrip(new(Cancel), first)
	if err != nil {
		t.Fatal(err)
	}
	if _, idle := p.Conns(); idle != 1 || !a.Whole() || a.Rest() != 0 {
		t.Errorf("%d idle, whole: %v, rest %d", idle, a.Whole(), a.Rest())
	}
	b, err := p.RoundTrip(new(Cancel), second)
	if err != nil {
		t.Fatal(err)
	}
	if open, _ := p.Conns(); open != 1 {
		t.Errorf("%d open", open)
	}
	if got := string(a.Buffered()) + string(a.Get(message.ContentLength)); got != "first5" || len(a.Buffered()) > 0 {
		t.Errorf("read %q after the connection was used again", got)
	}
	for range 2 {
		a.Close()
		b.Close()
	}
	if open, idle := p.Conns(); open != 1 || idle != 1 {
		t.Errorf("%d open, %d idle", open, idle)
	}
}

func TestAnswerThatIsLeftIsNotPooled(t *testing.T) {
	p, _ := listening(t, func(_ int, c net.Conn, br *bufio.Reader) {
		_, _, _ = next(br)
		_, _ = io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nab")
		_, _ = br.ReadByte()
	})
	in, err := p.RoundTrip(new(Cancel), outgoing("GET"))
	if err != nil {
		t.Fatal(err)
	}
	in.Close()
	if open, idle := p.Conns(); open != 0 || idle != 0 {
		t.Errorf("%d open, %d idle", open, idle)
	}
	if n, err := in.Read(make([]byte, 1)); n != 0 || err != errClosed { //nolint:errorlint // the value itself
		t.Errorf("read after Close: %d, %v", n, err)
	}
}

func TestRepeatOnlyWhatMayBe(t *testing.T) {
	for _, test := range []struct {
		name  string
		req   *Outgoing
		retry bool
	}{
		{"GET", outgoing("GET"), true},
		{"HEAD", outgoing("HEAD"), true},
		{"DELETE", outgoing("DELETE"), true},
		{"POST", outgoing("POST"), false},
		{"PATCH", outgoing("PATCH"), false},
		{"lower case", outgoing("get"), false},
		{"PUT with a body that streams", with(outgoing("PUT"), streamed("abc"), 3), false},
		{"PUT with a body that has come", with(outgoing("PUT"), buffered("abc"), 3), true},
		{"PUT with a large body that has come", with(outgoing("PUT"), buffered(strings.Repeat("x", 20<<10)), 20<<10), true},
		{"POST with a body that has come", with(outgoing("POST"), buffered("abc"), 3), false},
	} {
		var seen atomic.Int32
		p, _ := listening(t, func(n int, c net.Conn, br *bufio.Reader) {
			for i := 0; ; i++ {
				if _, _, ok := next(br); !ok {
					return
				}
				seen.Add(1)
				if n == 0 && i == 1 {
					return // the second on the first connection dies
				}
				_, _ = io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
			}
		})
		if _, _, err := ask(t, p, outgoing("GET")); err != nil {
			t.Fatal(err)
		}
		_, _, err := ask(t, p, test.req)
		want := int32(2)
		if test.retry {
			want = 3
		}
		if got := seen.Load(); (err == nil) != test.retry || got != want {
			t.Errorf("%s: error %v, the instance saw %d requests, want %d", test.name, err, got, want)
		}
		if lost, is := errors.AsType[*LostError](err); err != nil && (!is || lost.Repeatable) {
			t.Errorf("%s: %v", test.name, err)
		}
	}
}

func TestBodyThatHasComeGoesToAnotherInstanceToo(t *testing.T) {
	dead, _ := listening(t, func(_ int, _ net.Conn, br *bufio.Reader) { _, _, _ = next(br) })
	deadH2C, _ := frames(t, func(int, *http2.Framer, uint32) bool { return false })
	p, _ := listening(t, func(_ int, c net.Conn, br *bufio.Reader) {
		_, body, _ := next(br)
		_, _ = fmt.Fprintf(c, "HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s", len(body), body)
	})
	r := with(outgoing("PUT"), buffered("abc"), 3)
	for _, p := range []way{dead, deadH2C} {
		if _, err := p.RoundTrip(new(Cancel), r); !errors.As(err, new(*LostError)) {
			t.Errorf("got %v", err)
		}
	}
	if _, body, err := ask(t, p, r); body != "abc" || err != nil {
		t.Errorf("the other instance got %q, %v", body, err)
	}
}

func TestNothingIsRepeatedAfterAByteOfAnswer(t *testing.T) {
	for _, said := range []string{"H", "HTTP/1.1 103 Early Hints\r\n\r\n"} {
		p, conns := listening(t, func(_ int, c net.Conn, br *bufio.Reader) {
			for i := 0; ; i++ {
				if _, _, ok := next(br); !ok {
					return
				}
				if i == 1 {
					_, _ = io.WriteString(c, said)
					return
				}
				_, _ = io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
			}
		})
		if _, _, err := ask(t, p, outgoing("GET")); err != nil {
			t.Fatal(err)
		}
		if _, _, err := ask(t, p, outgoing("GET")); err == nil || errors.As(err, new(*LostError)) || conns.Load() != 1 {
			t.Errorf("after %q: %v, %d connections", said, err, conns.Load())
		}
	}
}

func TestFreshLinkThatDiesIsNoReasonToRepeat(t *testing.T) {
	p, conns := listening(t, func(_ int, _ net.Conn, br *bufio.Reader) { _, _, _ = next(br) })
	for method, repeatable := range map[string]bool{"GET": true, "POST": false} {
		before := conns.Load()
		_, _, err := ask(t, p, outgoing(method))
		if lost, is := errors.AsType[*LostError](err); !is || lost.Repeatable != repeatable || conns.Load() != before+1 {
			t.Errorf("%s: error %v after %d connections", method, err, conns.Load()-before)
		}
	}
}

// dying plays an instance that answers the first request, so that its pool has a
// connection that was used, and dies at each other one.
func dying(t testing.TB, h2c bool, seen *atomic.Int32) (p way) {
	t.Helper()
	var asked atomic.Int32
	dies := func() bool {
		if asked.Add(1) == 1 {
			return false
		}
		seen.Add(1)
		return true
	}
	if h2c {
		p, _ = frames(t, func(_ int, fr *http2.Framer, stream uint32) bool { return !dies() && good(fr, stream) })
	} else {
		p, _ = listening(t, func(_ int, c net.Conn, br *bufio.Reader) {
			for {
				if _, _, ok := next(br); !ok || dies() {
					return
				}
				_, _ = io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
			}
		})
	}
	if _, _, err := askH2C(t, p, outgoing("GET")); err != nil {
		t.Fatal(err)
	}
	return p
}

func TestLostRequestIsSentTwiceInAll(t *testing.T) {
	for method, want := range map[string]int32{"GET": 2, "DELETE": 2, "POST": 1} {
		for i := range 8 {
			fresh, first, second := i&1 > 0, i&2 > 0, i&4 > 0
			name := fmt.Sprintf("%s, on a fresh connection first: %t, over HTTP/2: %t, then %t", method, fresh, first, second)
			var seen atomic.Int32
			pools := []way{dying(t, first, &seen), dying(t, second, &seen)}
			if fresh { // so that it is for the second instance to repeat it
				pools[0].Retire()
				pools[0].Revive()
			}
			r := outgoing(method)
			for range 2 { // the second time it is another request
				seen.Store(0)
				for _, p := range pools {
					_, err := p.RoundTrip(new(Cancel), r)
					lost, is := errors.AsType[*LostError](err)
					if !is || lost.Repeatable != (seen.Load() < want) {
						t.Errorf("%s: %v after %d sendings", name, err, seen.Load())
					}
					if !is || !lost.Repeatable {
						break
					}
				}
				if got := seen.Load(); got != want {
					t.Errorf("%s: sent %d times, want %d", name, got, want)
				}
				r.Clear()
				r.Method, r.Target, r.Host = []byte(method), []byte("/"), []byte("a.test")
			}
		}
	}
}

func TestStaleLinksAreSeenBeforeTheyAreUsed(t *testing.T) {
	for _, test := range []struct {
		name string
		req  func() *Outgoing
	}{
		{"POST", func() *Outgoing { return outgoing("POST") }},
		{"POST with a body that streams", func() *Outgoing { return with(outgoing("POST"), streamed("abc"), 3) }},
		{"GET", func() *Outgoing { return outgoing("GET") }},
		{"DELETE", func() *Outgoing { return outgoing("DELETE") }},
		{"PUT with a large body that has come", func() *Outgoing { return with(outgoing("PUT"), buffered(strings.Repeat("x", 20<<10)), 20<<10) }},
	} {
		for _, last := range []string{"", "HTTP/1.1 408 Request Timeout\r\n\r\n"} {
			end := make(chan struct{})
			var seen atomic.Int32
			p, conns := listeningOn(t, "tcp", func(n int, c net.Conn, br *bufio.Reader) {
				for {
					if _, _, ok := next(br); !ok {
						return
					}
					seen.Add(1)
					_, _ = io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
					if n < 2 {
						<-end
						_, _ = io.WriteString(c, last)
						_ = c.(*net.TCPConn).CloseWrite() // it would still read
					}
				}
			})
			var links []*link
			for range 2 {
				if _, _, err := ask(t, p, outgoing("GET")); err != nil {
					t.Fatal(err)
				}
				l := p.take(0, time.Now())
				links = append(links, l)
			}
			for _, l := range links {
				p.put(l, time.Now())
			}
			close(end)
			waitReadable(p)
			if _, _, err := askSoon(t, p, test.req()); err != nil || conns.Load() != 3 || seen.Load() != 3 {
				t.Errorf("%s, %q: error %v, %d connections, %d requests", test.name, last, err, conns.Load(), seen.Load())
			}
		}
	}
}

// waitReadable waits until all idle connections have something to be read; they
// have been idle for no time then.
func waitReadable(p *Pool) {
	for _, l := range p.shards[0].links {
		for l.silent() {
			time.Sleep(time.Millisecond)
		}
	}
	for _, l := range p.shards[0].links {
		l.since = time.Now()
	}
}

// patience is how long askSoon waits for what comes at once if all is well.
const patience = 20 * time.Second

// askSoon is ask that does not wait for as long as FirstByteTime.
func askSoon(t testing.TB, p *Pool, r *Outgoing) (int, string, error) {
	t.Helper()
	var c Cancel
	defer time.AfterFunc(patience, func() { c.Do(errors.New("it still waits")) }).Stop()
	in, err := p.RoundTrip(&c, r)
	if err != nil {
		return 0, "", err
	}
	defer in.Close()
	b, err := io.ReadAll(in)
	return in.Status, string(b), err
}

func TestWhatComesAfterAnAnswerIsNobodysAnswer(t *testing.T) {
	const evil = "HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil"
	for _, test := range []struct{ name, method, answer, late string }{
		{"a body to HEAD", "HEAD", "HTTP/1.1 200 OK\r\nContent-Length: 44\r\n\r\n", evil},
		{"a body after 304", "GET", "HTTP/1.1 304 Not Modified\r\n\r\n", evil},
		{"a body after 204", "DELETE", "HTTP/1.1 204 No Content\r\n\r\n", evil},
		{"a second answer", "POST", "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok", evil},
		{"more than the length", "PUT", "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok", "k" + evil},
	} {
		for _, network := range []string{"unix", "tcp"} {
			pooled := make(chan struct{})
			p, conns := listeningOn(t, network, func(n int, c net.Conn, br *bufio.Reader) {
				if _, _, ok := next(br); !ok {
					return
				}
				if n > 0 {
					_, _ = io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\ngood")
				} else {
					_, _ = io.WriteString(c, test.answer)
					<-pooled
					_, _ = io.WriteString(c, test.late)
				}
				_, _ = br.ReadByte()
			})
			if _, _, err := ask(t, p, outgoing(test.method)); err != nil {
				t.Errorf("%s, %s: %v", test.name, network, err)
			}
			if _, idle := p.Conns(); idle != 1 {
				t.Errorf("%s, %s: %d idle after an answer that came whole", test.name, network, idle)
			}
			close(pooled)
			waitReadable(p)
			if _, body, err := askSoon(t, p, outgoing("GET")); body != "good" || err != nil || conns.Load() != 2 {
				t.Errorf("%s, %s: the next request got %q, %v, over %d connections", test.name, network, body, err, conns.Load())
			}
		}
	}
}

// An instance that has ended its side before the request came does not say so again.
func TestEndThatCameBeforeTheFirstRequestIsSeen(t *testing.T) {
	p, _ := listeningOn(t, "tcp", func(_ int, c net.Conn, br *bufio.Reader) {
		_ = c.(*net.TCPConn).CloseWrite()
		_, _ = io.Copy(io.Discard, br) // it goes on reading
	})
	dial := p.dial
	p.dial = func(ctx context.Context) (net.Conn, error) {
		c, err := dial(ctx)
		for l := newLink(c, nil); err == nil && l.silent(); {
			time.Sleep(time.Millisecond)
		}
		return c, err
	}
	if _, _, err := askSoon(t, p, outgoing("GET")); !errors.As(err, new(*LostError)) {
		t.Errorf("got %v", err)
	}
}

func TestRequestsAreWrittenByUs(t *testing.T) {
	p, _ := listening(t, func(_ int, c net.Conn, br *bufio.Reader) {
		for {
			r, body, ok := next(br)
			if !ok {
				return
			}
			s := fmt.Sprintf("%d %v %q %q %q", r.ContentLength, r.TransferEncoding, body, r.Trailer.Get("X-Sum"), r.Header)
			_, _ = fmt.Fprintf(c, "HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s", len(s), s)
		}
	})
	large := strings.Repeat("x", 100<<10)
	sum := func(b *content) *content {
		b.trailer = fields("X-Sum", "7", "Content-Length", "9")
		return b
	}
	for _, test := range []struct {
		set  func(*Outgoing)
		want string
	}{
		{func(*Outgoing) {}, `0 [] "" "" map[]`},
		{func(r *Outgoing) { r.HasLength = true }, `0 [] "" "" map["Content-Length":["0"]]`},
		{func(r *Outgoing) { with(r, streamed("abc"), 3) }, `3 [] "abc" "" map["Content-Length":["3"]]`},
		{func(r *Outgoing) { with(r, buffered("abc"), 3) }, `3 [] "abc" "" map["Content-Length":["3"]]`},
		{func(r *Outgoing) { with(r, streamed("abc"), message.Unknown) }, `-1 [chunked] "abc" "" map[]`},
		{func(r *Outgoing) { with(r, buffered("abc"), message.Unknown) }, `-1 [chunked] "abc" "" map[]`},
		{func(r *Outgoing) { with(r, buffered(""), message.Unknown) }, `-1 [chunked] "" "" map[]`},
		{func(r *Outgoing) {
			with(r, sum(streamed("abc")), message.Unknown)
			r.Fields = fields("trailer", "x-sum, content-length, ,a b")
		}, `-1 [chunked] "abc" "7" map[]`},
		{func(r *Outgoing) { with(r, sum(buffered("abc")), message.Unknown) }, `-1 [chunked] "abc" "7" map[]`},
		{func(r *Outgoing) { with(r, streamed(large), 100<<10) }, `102400 [] "` + large + `" "" map["Content-Length":["102400"]]`},
		{func(r *Outgoing) { with(r, buffered(large), 100<<10) }, `102400 [] "` + large + `" "" map["Content-Length":["102400"]]`},
		{func(r *Outgoing) { with(r, streamed(large), message.Unknown) }, `-1 [chunked] "` + large + `" "" map[]`},
		{func(r *Outgoing) { with(r, buffered(large), message.Unknown) }, `-1 [chunked] "` + large + `" "" map[]`},
		{func(r *Outgoing) {
			with(r, streamed("abc"), 3)
			r.Expect = true
		}, `3 [] "abc" "" map["Content-Length":["3"] "Expect":["100-continue"]]`},
		{func(r *Outgoing) {
			with(r, buffered("abc"), 3)
			r.Expect = true
		}, `3 [] "abc" "" map["Content-Length":["3"]]`},
		{func(r *Outgoing) {
			r.Fields = fields("Content-Length", "9", "X-a", "1", "Transfer-Encoding", "chunked", "x-A", "2", "Host", "evil", "Connection", "close", "TE", "gzip")
		}, `0 [] "" "" map["X-A":["1" "2"]]`},
		{func(r *Outgoing) { r.TETrailers = true }, `0 [] "" "" map["Connection":["TE"] "Te":["trailers"]]`},
		{func(r *Outgoing) { r.Upgrade = []byte("websocket") }, `0 [] "" "" map["Connection":["Upgrade"] "Upgrade":["websocket"]]`},
	} {
		r := outgoing("POST")
		test.set(r)
		if _, got, err := ask(t, p, r); got != test.want || err != nil {
			t.Errorf("got %.200s, %v, want %.200s", got, err, test.want)
		}
	}
	for _, n := range []int64{2, 4} {
		for _, body := range []*content{buffered("abc"), streamed("abc")} {
			if _, _, err := ask(t, p, with(outgoing("POST"), body, n)); !errors.As(err, new(*BodyError)) {
				t.Errorf("a body of 3 bytes announced as %d: %v", n, err)
			}
		}
	}
	for _, body := range []*content{buffered("abc"), streamed("abc")} {
		body.trailer = fields("A", "b\r\nC: d")
		if _, _, err := ask(t, p, with(outgoing("POST"), body, message.Unknown)); !errors.As(err, new(*BodyError)) {
			t.Errorf("a trailer of two lines: %v", err)
		}
	}
	if open, idle := p.Conns(); open != idle {
		t.Errorf("%d open, %d idle", open, idle)
	}
}

func TestWhatIsNoRequestIsNotWritten(t *testing.T) {
	p, conns := listening(t, func(_ int, _ net.Conn, br *bufio.Reader) { _, _, _ = next(br) })
	for _, r := range []*Outgoing{
		{Method: []byte("GET /x"), Target: []byte("/"), Host: []byte("a")},
		{Method: []byte("GET"), Target: []byte("/ HTTP/1.1\r\nX: y"), Host: []byte("a")},
		{Method: []byte("GET"), Target: []byte("/"), Host: []byte("a\r\nb")},
		{Method: []byte("GET"), Target: []byte("/"), Host: []byte("a"), Fields: fields("A", "c\r\nd: e")},
		{Method: []byte("GET"), Target: []byte("/"), Host: []byte("a"), Fields: fields("A", "c\nd: e")},
		{Method: []byte("GET"), Target: []byte("/"), Host: []byte("a"), Fields: fields("A", "c\rd: e")},
		{Method: []byte("GET"), Target: []byte("/"), Host: []byte("a"), Fields: fields("A", "c\x00")},
		{Method: []byte("GET"), Target: []byte("/"), Host: []byte("a"), Upgrade: []byte("a\nb")},
		{Method: []byte("GET"), Host: []byte("a")},
	} {
		if _, err := p.RoundTrip(new(Cancel), r); !errors.Is(err, errUnwritable) {
			t.Errorf("%q %q: %v", r.Method, r.Target, err)
		}
	}
	if open, _ := p.Conns(); open != 0 {
		t.Errorf("%d open of %d", open, conns.Load())
	}
}

func FuzzRequestsHaveTheLinesGivenAndNoOther(f *testing.F) {
	f.Add("GET", "/a?b", "h.test", "X-A", "v")
	f.Add("GET", "/\r\nA: b", "h", "X:", "v\nB: c")
	f.Fuzz(func(t *testing.T, method, target, host, name, value string) {
		r := &Outgoing{Method: []byte(method), Target: []byte(target), Host: []byte(host), Fields: fields(name, value)}
		b, err := r.appendHead(nil)
		if err != nil {
			return
		}
		if n := bytes.Count(b, []byte("\n")); n > 4 || n < 3 || bytes.Count(b, []byte("\r\n")) != n {
			t.Errorf("%q", b)
		}
	})
}

func TestInterimAnswersArePassedOnOrSwallowed(t *testing.T) {
	interim := "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 102 Processing\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n"
	hints := func(n int) string { return strings.Repeat("HTTP/1.1 103 Early Hints\r\n\r\n", n) }
	for _, test := range []struct {
		first, want string
		bad         bool
	}{
		{interim, "[103x]", false},
		{hints(MaxInterim), fmt.Sprint(make([]int, MaxInterim)), false},
		{hints(MaxInterim + 1), "", true},
	} {
		p, _ := listening(t, func(_ int, c net.Conn, br *bufio.Reader) {
			_, _, _ = next(br)
			for _, b := range []byte(test.first) {
				_, _ = c.Write([]byte{b})
			}
			_, _ = io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
		})
		r := outgoing("GET")
		var got []string
		r.Inform = func(status int, f []message.Field) {
			if len(f) == 0 {
				got = append(got, "0")
				return
			}
			got = append(got, fmt.Sprint(status, string(f[0].Value)))
		}
		status, _, err := ask(t, p, r)
		if test.bad {
			if !errors.Is(err, errInterims) {
				t.Errorf("%d interim answers: %v", len(got), err)
			}
		} else if status != 200 || err != nil || fmt.Sprint(got) != test.want {
			t.Errorf("%d, %v, passed on: %v", status, err, got)
		}
	}
}

func TestLongHeads(t *testing.T) {
	for size, good := range map[int]bool{20 << 10: true, 200 << 10: true, 257 << 10: false} {
		p, _ := listening(t, func(_ int, c net.Conn, br *bufio.Reader) {
			_, _, _ = next(br)
			_, _ = io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\nX: "+strings.Repeat("x", size)+"\r\n\r\nok")
		})
		_, body, err := ask(t, p, outgoing("GET"))
		if good != (err == nil) || good && body != "ok" {
			t.Errorf("a head of %d bytes: %q, %v", size, body, err)
		}
	}
}

func TestCutAnswersAreErrors(t *testing.T) {
	for _, answer := range []string{
		"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nab",
		"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nab",
		"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nab\r\n",
		"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nab\r\n0\r\n",
		"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nabc\r\n0\r\n\r\n",
		"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nx\r\n",
		"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
		"HTTP/1.1 200 OK\r\nContent-Le",
		"HTTP/1.1 200 OK\nContent-Length: 0\n\n",
		"evil",
	} {
		for _, apart := range []bool{false, true} {
			p, _ := listening(t, func(_ int, c net.Conn, br *bufio.Reader) {
				_, _, _ = next(br)
				if i := strings.Index(answer, "\r\n\r\n") + 4; apart && i > 4 {
					_, _ = io.WriteString(c, answer[:i])
					answer := answer[i:]
					for i := range len(answer) {
						_, _ = io.WriteString(c, answer[i:i+1])
					}
					return
				}
				_, _ = io.WriteString(c, answer)
			})
			if status, body, err := ask(t, p, outgoing("GET")); err == nil || errors.Is(err, io.EOF) {
				t.Errorf("%q: %d, %q, %v", answer, status, body, err)
			}
			if open, _ := p.Conns(); open != 0 {
				t.Errorf("%q: %d open", answer, open)
			}
		}
	}
}

func TestResetIsNoEndOfABody(t *testing.T) {
	for _, reset := range []bool{false, true} {
		p, _ := listeningOn(t, "tcp", func(_ int, c net.Conn, br *bufio.Reader) {
			_, _, _ = next(br)
			_, _ = io.WriteString(c, "HTTP/1.1 200 OK\r\n\r\nab")
			_, _ = br.ReadByte() // the other end has read that
			if reset {
				_ = c.(*net.TCPConn).SetLinger(0)
			}
		})
		in, err := p.RoundTrip(new(Cancel), outgoing("GET"))
		if err != nil {
			t.Fatal(err)
		}
		b := make([]byte, 10)
		n, err := in.Read(b)
		if string(b[:n]) != "ab" || err != nil || in.Rest() != message.Unknown || in.Whole() {
			t.Errorf("read %q, %v", b[:n], err)
		}
		_, _ = in.l.Write([]byte("x"))
		if n, err := in.Read(b); n != 0 || (err == io.EOF) == reset || in.Whole() == reset { //nolint:errorlint // the value itself
			t.Errorf("the end: %d, %v, whole: %v", n, err, in.Whole())
		}
		in.Close()
	}
}

func TestAnswersReadTheSameHoweverTheyAreCut(t *testing.T) {
	for _, test := range []struct{ answer, want string }{
		{"HTTP/1.1 200 OK\r\nContent-Length: 11\r\n\r\nhello world", "hello world"},
		{"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n6\r\nhello \r\n5;x=\"y\"\r\nworld\r\n0\r\nA: b\r\n\r\n", "hello world"},
		{"HTTP/1.1 103 Early Hints\r\nA: b\r\n\r\nHTTP/1.1 200 OK\r\n\r\nhello world", "hello world"},
	} {
		for cut := range test.answer {
			for _, size := range []int{1, 3, 4096} {
				p := piped(func(c net.Conn) {
					defer c.Close()
					if _, _, ok := next(bufio.NewReader(c)); ok {
						_, _ = io.WriteString(c, test.answer[:cut])
						_, _ = io.WriteString(c, test.answer[cut:])
					}
				})
				in, err := p.RoundTrip(new(Cancel), outgoing("GET"))
				if err != nil {
					t.Fatal(err)
				}
				var got []byte
				if size == 4096 {
					got = append(got, in.Buffered()...)
				}
				for b := make([]byte, size); err == nil; {
					var n int
					n, err = in.Read(b)
					got = append(got, b[:n]...)
				}
				if string(got) != test.want || err != io.EOF || strings.Contains(test.answer, "chunked") && len(in.Trailer()) != 1 { //nolint:errorlint // the value itself
					t.Errorf("%q, cut at %d, read by %d: %q, %v", test.answer, cut, size, got, err)
				}
				in.Close()
				p.Retire()
			}
		}
	}
}

func TestUploadThatIsAnsweredBeforeItIsRead(t *testing.T) {
	p, _ := listening(t, func(_ int, c net.Conn, br *bufio.Reader) {
		_, _ = http.ReadRequest(br)
		_, _ = br.ReadByte()
		_, _ = io.WriteString(c, "HTTP/1.1 413 Too Large\r\nContent-Length: 2\r\n\r\nno")
		_, _ = io.Copy(io.Discard, br)
	})
	for _, n := range []int64{1 << 40, message.Unknown} {
		pr, pw := io.Pipe()
		go func() { _, _ = io.WriteString(pw, "x") }()
		stopped := make(chan struct{})
		body := &content{Reader: pr, stop: sync.OnceFunc(func() { close(stopped); _ = pw.CloseWithError(errors.New("stopped")) })}
		in, err := p.RoundTrip(new(Cancel), with(outgoing("POST"), body, n))
		if err != nil {
			t.Fatal(err)
		}
		b, err := io.ReadAll(in)
		if in.Status != 413 || string(b) != "no" || err != nil || !in.Unsent {
			t.Errorf("%d, %q, %v, unsent: %v", in.Status, b, err, in.Unsent)
		}
		in.Close()
		<-stopped
		if open, _ := p.Conns(); open != 0 {
			t.Errorf("%d open", open)
		}
	}
}

func TestBodyIsHeldBackUntilItIsAskedFor(t *testing.T) {
	for _, test := range []struct {
		first  string
		status int
		read   int64
	}{
		{"HTTP/1.1 100 Continue\r\n\r\n", 200, 3},
		{"HTTP/1.1 417 No\r\nContent-Length: 0\r\n\r\n", 417, 0},
	} {
		p, _ := listening(t, func(_ int, c net.Conn, br *bufio.Reader) {
			r, err := http.ReadRequest(br)
			if err != nil || r.Header.Get("Expect") == "" || br.Buffered() > 0 {
				t.Errorf("%v, %d bytes of a body that nobody asked for", err, br.Buffered())
			}
			_, _ = io.WriteString(c, test.first)
			if test.status == 200 {
				_, _ = io.ReadAll(r.Body)
				_, _ = io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
			}
		})
		body := streamed("abc")
		r := with(outgoing("POST"), body, 3)
		r.Expect = true
		status, _, err := ask(t, p, r)
		if status != test.status || err != nil || body.read.Load() != test.read {
			t.Errorf("%d, %v, read %d bytes", status, err, body.read.Load())
		}
	}
}

func TestBodyThatHasComeIsSentWithoutAsking(t *testing.T) {
	p, _ := listening(t, func(_ int, c net.Conn, br *bufio.Reader) {
		r, err := http.ReadRequest(br)
		if err != nil {
			t.Error(err)
			return
		}
		body, err := io.ReadAll(r.Body)
		if r.Header.Get("Expect") != "" || string(body) != "abc" {
			t.Errorf("the instance got %q, %v, with Expect %q", body, err, r.Header.Get("Expect"))
		}
		_, _ = io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
	})
	r := with(outgoing("POST"), buffered("abc"), 3)
	r.Expect = true
	if status, _, err := ask(t, p, r); status != 200 || err != nil {
		t.Errorf("%d, %v", status, err)
	}
}

func TestBodyThatWasAskedForInVainIsSentAfterAWhile(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := piped(answering)
		r := with(outgoing("POST"), streamed("abc"), 3)
		r.Expect = true
		began := time.Now()
		if status, _, err := ask(t, p, r); status != 200 || err != nil || time.Since(began) != ContinueTime {
			t.Errorf("%d, %v, after %s", status, err, time.Since(began))
		}
		p.Retire()
	})
}

func TestBodyThatFailsIsTheClientsFault(t *testing.T) {
	gone := make(chan error, 1)
	p, _ := listening(t, func(_ int, _ net.Conn, br *bufio.Reader) {
		r, err := http.ReadRequest(br)
		if err == nil {
			_, err = io.ReadAll(r.Body)
		}
		gone <- err
	})
	mine := errors.New("reset by the client")
	body := &content{Reader: io.MultiReader(strings.NewReader("abc"), readerFunc(func([]byte) (int, error) { return 0, mine }))}
	if _, _, err := ask(t, p, with(outgoing("POST"), body, message.Unknown)); !errors.As(err, new(*BodyError)) || !errors.Is(err, mine) {
		t.Errorf("got %v", err)
	}
	if err := <-gone; err == nil {
		t.Error("the instance took it for the whole")
	}
}

type readerFunc func([]byte) (int, error)

func (f readerFunc) Read(b []byte) (int, error) { return f(b) }

func TestStreamsAreNotBufferedInEitherDirection(t *testing.T) {
	p, _ := listening(t, func(_ int, c net.Conn, br *bufio.Reader) {
		r, err := http.ReadRequest(br)
		if err != nil {
			return
		}
		_, _ = io.WriteString(c, "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
		b := make([]byte, 100)
		for {
			n, err := r.Body.Read(b)
			if n > 0 {
				_, _ = fmt.Fprintf(c, "%x\r\n%s\r\n", n, b[:n])
			}
			if err != nil {
				_, _ = fmt.Fprintf(c, "0\r\nX-Sum: %s\r\n\r\n", r.Trailer.Get("X-Sum"))
				return
			}
		}
	})
	pr, pw := io.Pipe()
	body := &content{Reader: pr, trailer: fields("X-Sum", "7")}
	r := with(outgoing("POST"), body, message.Unknown)
	r.Fields = fields("Trailer", "X-Sum")
	in, err := p.RoundTrip(new(Cancel), r)
	if err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 100)
	for _, word := range []string{"one", "two", "three"} {
		if _, err := io.WriteString(pw, word); err != nil {
			t.Fatal(err)
		}
		if n, err := in.Read(b); string(b[:n]) != word || err != nil {
			t.Fatalf("got %q, %v, want %q", b[:n], err, word)
		}
	}
	_ = pw.Close()
	if n, err := in.Read(b); n != 0 || err != io.EOF { //nolint:errorlint // the value itself
		t.Errorf("the end: %d, %v", n, err)
	}
	if tr := in.Trailer(); len(tr) != 1 || string(tr[0].Value) != "7" {
		t.Errorf("trailer %q", tr)
	}
	in.Close()
}

func TestCancelEndsWhateverIsUnderWay(t *testing.T) {
	cause := errors.New("enough")
	waiting := make(chan struct{}, 1)
	p, _ := listening(t, func(_ int, c net.Conn, br *bufio.Reader) {
		r, err := http.ReadRequest(br)
		if err != nil {
			return
		}
		if r.Method == "GET" {
			_, _ = io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nab")
		}
		waiting <- struct{}{}
		_, _ = br.ReadByte()
	})
	var c Cancel
	go func() { <-waiting; c.Do(cause); c.Do(errors.New("another")) }()
	if _, err := p.RoundTrip(&c, outgoing("POST")); err != cause { //nolint:errorlint // the value itself
		t.Errorf("waiting for the head: %v", err)
	}
	if _, err := p.RoundTrip(&c, outgoing("GET")); err != cause || context.Cause(c.Context()) != cause { //nolint:errorlint // the value itself
		t.Errorf("ended before: %v, context %v", err, context.Cause(c.Context()))
	}
	c.Reset()
	if c.Cause() != nil || c.Context().Err() != nil {
		t.Errorf("after Reset: %v, context %v", c.Cause(), c.Context().Err())
	}
	in, err := p.RoundTrip(&c, outgoing("GET"))
	if err != nil {
		t.Fatal(err)
	}
	<-waiting
	go c.Do(nil)
	if b, err := io.ReadAll(in); string(b) != "ab" || !errors.Is(err, context.Canceled) || in.Whole() {
		t.Errorf("within the body: %q, %v", b, err)
	}
	in.Close()
	c.Reset()

	pr, pw := io.Pipe()
	body := &content{Reader: pr, stop: func() { _ = pw.CloseWithError(errors.New("stopped")) }}
	go func() { <-waiting; c.Do(cause) }()
	if _, err := p.RoundTrip(&c, with(outgoing("POST"), body, message.Unknown)); err != cause { //nolint:errorlint // the value itself
		t.Errorf("while a body is sent: %v", err)
	}
	c.Reset()

	p = NewPool(func(ctx context.Context) (net.Conn, error) { c.Do(cause); <-ctx.Done(); return nil, ctx.Err() })
	if _, err := p.RoundTrip(&c, outgoing("GET")); err != cause { //nolint:errorlint // the value itself
		t.Errorf("dialling: %v", err)
	}
	if open, _ := p.Conns(); open != 0 {
		t.Errorf("%d open", open)
	}
}

func TestCancelTouchesNoConnectionThatWasGivenBack(t *testing.T) {
	p, conns := listening(t, func(_ int, c net.Conn, _ *bufio.Reader) { answering(c) })
	var c Cancel
	in, err := p.RoundTrip(&c, outgoing("GET"))
	if err != nil {
		t.Fatal(err)
	}
	c.Do(nil)
	in.Close()
	if _, _, err := ask(t, p, outgoing("GET")); err != nil || conns.Load() != 1 {
		t.Errorf("%v, %d connections", err, conns.Load())
	}
}

func TestProtocolIsSwitchedOnlyWhenAsked(t *testing.T) {
	for _, test := range []struct {
		asked, got string
		good       bool
	}{{"websocket", "WebSocket", true}, {"websocket", "other", false}, {"", "websocket", false}} {
		p, _ := listening(t, func(_ int, c net.Conn, br *bufio.Reader) {
			_, _, _ = next(br)
			_, _ = io.WriteString(c, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: "+test.got+"\r\n\r\nhello")
			b, _ := io.ReadAll(br)
			_, _ = c.Write(b)
		})
		r := outgoing("GET")
		if test.asked != "" {
			r.Upgrade = []byte(test.asked)
		}
		in, err := p.RoundTrip(new(Cancel), r)
		if (err == nil) != test.good {
			t.Errorf("%v: %v", test, err)
		}
		if err != nil {
			continue
		}
		tun := in.Tunnel
		if string(in.Upgrade) != test.got || !in.Whole() {
			t.Errorf("upgrade to %q", in.Upgrade)
		}
		in.Close()
		_, _ = io.WriteString(tun, " echo")
		_ = tun.CloseWrite()
		if b, err := io.ReadAll(tun); string(b) != "hello echo" || err != nil {
			t.Errorf("%q, %v", b, err)
		}
		if open, _ := p.Conns(); open != 1 {
			t.Errorf("%d open", open)
		}
		_, _ = tun.Close(), tun.Close()
		if open, idle := p.Conns(); open != 0 || idle != 0 {
			t.Errorf("%d open, %d idle", open, idle)
		}
	}
}

func TestSplicedBodies(t *testing.T) {
	const size = 1 << 20
	p, conns := listeningOn(t, "tcp", func(_ int, c net.Conn, br *bufio.Reader) {
		for {
			r, _, ok := next(br)
			if !ok {
				return
			}
			n := size
			if r.URL.Path == "/short" {
				n--
			}
			_, _ = fmt.Fprintf(c, "HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n", size)
			_, _ = c.Write(bytes.Repeat([]byte{'x'}, n))
			if n < size {
				return
			}
		}
	})
	to, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer to.Close()
	for i, target := range []string{"/", "/", "/short"} {
		out, err := net.Dial("tcp", to.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		client, err := to.Accept()
		if err != nil {
			t.Fatal(err)
		}
		got := make(chan int64, 1)
		go func() { n, _ := io.Copy(io.Discard, client); got <- n }()
		r := outgoing("GET")
		r.Target = []byte(target)
		in, err := p.RoundTrip(new(Cancel), r)
		if err != nil {
			t.Fatal(err)
		}
		first := int64(len(in.Buffered()))
		rest := in.Rest()
		if rest < SpliceOver || rest+first != size {
			t.Errorf("%d buffered, %d to come", first, rest)
		}
		n, err := in.SpliceTo(func(src net.Conn, n int64) (int64, error) {
			return out.(*net.TCPConn).ReadFrom(&io.LimitedReader{R: src, N: n})
		})
		_ = out.Close()
		if target == "/" {
			if n != rest || err != nil || !in.Whole() || <-got != rest || conns.Load() != 1 {
				t.Errorf("%d: moved %d of %d, %v, %d connections", i, n, rest, err, conns.Load())
			}
		} else if n != rest-1 || !errors.Is(err, io.ErrUnexpectedEOF) || in.Whole() || <-got != n {
			t.Errorf("%d: moved %d of %d, %v", i, n, rest, err)
		}
		in.Close()
		_ = client.Close()
	}
	if open, _ := p.Conns(); open != 0 {
		t.Errorf("%d open", open)
	}
}

func TestShortWriteGoesOn(t *testing.T) {
	p, conns := listening(t, func(_ int, c net.Conn, br *bufio.Reader) {
		for {
			_, body, ok := next(br)
			if !ok {
				return
			}
			_, _ = fmt.Fprintf(c, "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n%05d", len(body))
		}
	})
	dial := p.dial
	p.dial = func(ctx context.Context) (net.Conn, error) {
		c, err := dial(ctx)
		if err == nil {
			err = c.(*net.UnixConn).SetWriteBuffer(1)
		}
		return c, err
	}
	const size = smallBody
	for range 50 {
		r := with(outgoing("POST"), buffered(strings.Repeat("x", size)), size)
		if _, body, err := ask(t, p, r); body != fmt.Sprintf("%05d", size) || err != nil {
			t.Fatalf("%q, %v", body, err)
		}
	}
	if conns.Load() != 1 {
		t.Errorf("%d connections", conns.Load())
	}
}

// What comes while the request is still being written must wake its reader.
func TestAnswerThatIsThereBeforeTheRequestIsRead(t *testing.T) {
	for _, network := range []string{"unix", "tcp"} {
		p, conns := listeningOn(t, network, func(_ int, c net.Conn, _ *bufio.Reader) {
			b := make([]byte, 4096)
			for {
				if _, err := c.Read(b[:1]); err != nil {
					return
				}
				_, _ = io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
				for n := 1; !bytes.HasSuffix(b[:n], []byte("\r\n\r\n")); n++ {
					if n == len(b) {
						n = copy(b, b[n-3:])
					}
					if _, err := c.Read(b[n : n+1]); err != nil {
						return
					}
				}
			}
		})
		r := browser()
		for range 300 {
			if _, body, err := ask(t, p, r); body != "ok" || err != nil {
				t.Fatalf("%s: %q, %v", network, body, err)
			}
		}
		if conns.Load() != 1 {
			t.Errorf("%s: %d connections", network, conns.Load())
		}
	}
}

func TestNoAnswerIsAnothersUnderLoad(t *testing.T) {
	for _, network := range []string{"unix", "tcp"} {
		p, _ := listeningOn(t, network, func(_ int, c net.Conn, br *bufio.Reader) {
			for {
				r, body, ok := next(br)
				if !ok {
					return
				}
				s := r.URL.Path + body
				if len(s)%3 == 0 {
					_, _ = fmt.Fprintf(c, "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\n\r\n", len(s), s)
					continue
				}
				_, _ = fmt.Fprintf(c, "HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n", len(s))
				_, _ = io.WriteString(c, s)
			}
		})
		var wg sync.WaitGroup
		for worker := range 8 {
			wg.Go(func() {
				var c Cancel
				r := outgoing("PUT")
				for i := range 200 {
					r.Clear()
					r.Method, r.Host = []byte("PUT"), []byte("a.test")
					r.Target = fmt.Appendf(nil, "/%d/%d/%s", worker, i, strings.Repeat("x", i))
					want := string(r.Target)
					if i%4 == 0 {
						with(r, streamed("body"), 4)
						want += "body"
					}
					cancelled := i%7 == 0
					if cancelled {
						go c.Do(nil)
					}
					in, err := p.RoundTrip(&c, r)
					var b []byte
					if err == nil {
						b, err = io.ReadAll(in)
						in.Close()
					}
					if cancelled {
						for c.Cause() == nil {
							time.Sleep(time.Microsecond)
						}
						c.Reset()
					}
					if err == nil && string(b) != want || err != nil && !cancelled {
						t.Errorf("%s: got %.50q, %v, want %.50q", network, b, err, want)
					}
				}
			})
		}
		wg.Wait()
		if open, idle := p.Conns(); open != idle {
			t.Errorf("%d open, %d idle", open, idle)
		}
	}
}

func TestInstanceThatSaysNothingTimesOut(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for _, r := range []*Outgoing{outgoing("GET"), with(outgoing("POST"), streamed("abc"), 3), with(outgoing("POST"), buffered("abc"), 3)} {
			p := piped(func(c net.Conn) { _, _ = io.Copy(io.Discard, c) })
			began := time.Now()
			_, _, err := ask(t, p, r)
			if took := time.Since(began); !errors.Is(err, ErrTimeout) || took < FirstByteTime || took > FirstByteTime+deadlineSlack {
				t.Errorf("got %v after %s", err, took)
			}
		}
	})
}

// On sockets the deadline ends a swap, which pipes know nothing of.
func TestSilentSocketTimesOut(t *testing.T) {
	for _, network := range []string{"unix", "tcp"} {
		p, _ := listeningOn(t, network, func(_ int, c net.Conn, br *bufio.Reader) {
			_, _, _ = next(br)
			_, _ = io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
			_, _ = io.Copy(io.Discard, br)
		})
		if _, _, err := ask(t, p, outgoing("GET")); err != nil {
			t.Fatal(err)
		}
		l := p.shards[0].links[0]
		l.due = time.Now().Add(time.Hour) // so that it is not set anew
		if err := l.SetDeadline(time.Now().Add(50 * time.Millisecond)); err != nil {
			t.Fatal(err)
		}
		if _, _, err := ask(t, p, outgoing("GET")); !errors.Is(err, ErrTimeout) {
			t.Errorf("%s: %v", network, err)
		}
		if open, _ := p.Conns(); open != 0 {
			t.Errorf("%s: %d open", network, open)
		}
	}
}

func TestInstanceThatDoesNotReadTimesOut(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for _, r := range []*Outgoing{outgoing("GET"), with(outgoing("POST"), streamed("abc"), 3)} {
			p := piped(func(c net.Conn) {
				if r.Body != nil {
					_, _ = http.ReadRequest(bufio.NewReaderSize(c, 16))
				}
			})
			began := time.Now()
			_, _, err := ask(t, p, r)
			if took := time.Since(began); !errors.Is(err, ErrTimeout) || took < WriteTime || took > WriteTime+deadlineSlack+lastTime {
				t.Errorf("got %v after %s", err, took)
			}
		}
	})
}

func TestStreamMayBeSilentForHours(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := piped(func(c net.Conn) {
			defer c.Close()
			_, _, _ = next(bufio.NewReader(c))
			_, _ = io.WriteString(c, "HTTP/1.1 200 OK\r\n\r\n")
			time.Sleep(5 * time.Hour)
			_, _ = io.WriteString(c, "late")
		})
		if _, body, err := ask(t, p, outgoing("GET")); body != "late" || err != nil {
			t.Errorf("%q, %v", body, err)
		}
	})
}

func TestDeadlinesAreSetAnewOnLinksThatLive(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := piped(answering)
		for range 100 {
			time.Sleep(3 * time.Second)
			if _, _, err := ask(t, p, outgoing("GET")); err != nil {
				t.Fatal(err)
			}
		}
		if open, idle := p.Conns(); open != 1 || idle != 1 {
			t.Errorf("%d open, %d idle", open, idle)
		}
		p.Retire()
		synctest.Wait()
	})
}

func TestIdleLinksAreClosedInTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := piped(answering)
		for range 2 {
			if _, _, err := ask(t, p, outgoing("GET")); err != nil {
				t.Fatal(err)
			}
		}
		time.Sleep(IdleTime - time.Millisecond)
		p.Sweep(time.Now())
		if open, idle := p.Conns(); open != 1 || idle != 1 {
			t.Errorf("before IdleTime: %d open, %d idle", open, idle)
		}
		time.Sleep(time.Millisecond)
		p.Sweep(time.Now())
		if open, idle := p.Conns(); open != 0 || idle != 0 {
			t.Errorf("after IdleTime: %d open, %d idle", open, idle)
		}
		synctest.Wait()
	})
}

func TestRetiredPoolKeepsNoLinks(t *testing.T) {
	p, conns := listening(t, func(_ int, c net.Conn, _ *bufio.Reader) { answering(c) })
	for i, step := range []struct {
		do         func()
		idle, made int
	}{{func() {}, 1, 1}, {p.Retire, 0, 2}, {p.Revive, 1, 3}} {
		step.do()
		if _, _, err := ask(t, p, outgoing("GET")); err != nil {
			t.Fatal(err)
		}
		if open, idle := p.Conns(); open != step.idle || idle != step.idle || int(conns.Load()) != step.made {
			t.Errorf("step %d: %d open, %d idle, %d made", i, open, idle, conns.Load())
		}
	}
}

func TestLinkThatCannotBeMadeIsADialError(t *testing.T) {
	p := NewPool(func(ctx context.Context) (net.Conn, error) {
		if d, ok := ctx.Deadline(); !ok || time.Until(d) > ConnectTime {
			t.Error("no deadline")
		}
		return nil, errors.New("refused")
	})
	if _, _, err := ask(t, p, outgoing("GET")); !errors.As(err, new(*DialError)) {
		t.Fatalf("got %v", err)
	}
	if open, _ := p.Conns(); open != 0 {
		t.Errorf("%d connections are counted", open)
	}
}

// canned answers each read of a request by the same bytes, and allocates nothing.
func canned(answer string) func(int, net.Conn, *bufio.Reader) {
	return func(_ int, c net.Conn, _ *bufio.Reader) {
		b, out := make([]byte, 4096), []byte(answer)
		for {
			if _, err := c.Read(b); err != nil {
				return
			}
			if _, err := c.Write(out); err != nil {
				return
			}
		}
	}
}

// browser is a request as a browser's.
func browser() *Outgoing {
	r := outgoing("GET")
	r.Target = []byte("/some/path?with=query")
	r.Fields = fields("User-Agent", "Mozilla/5.0 (X11; Linux x86_64; rv:140.0)", "Accept", "text/html,application/xhtml+xml", "Accept-Language", "en-US,en;q=0.5",
		"Accept-Encoding", "gzip, deflate, br, zstd", "Connection", "keep-alive", "Cookie", "session=0123456789abcdef", "X-Forwarded-For", "192.0.2.1", "X-Forwarded-Proto", "https")
	return r
}

var kilobyte = "HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nDate: Mon, 23 Nov 2026 12:00:00 GMT\r\nContent-Length: 1024\r\n\r\n" + strings.Repeat("x", 1024)

func exchangeOnce(t testing.TB, p *Pool, c *Cancel, r *Outgoing) {
	in, err := p.RoundTrip(c, r)
	if err != nil {
		t.Fatal(err)
	}
	if !in.Whole() || len(in.Buffered()) != 1024 {
		t.Fatal("the answer is not whole")
	}
	in.Close()
}

func TestAnExchangeAllocatesNothing(t *testing.T) {
	p, _ := listening(t, canned(kilobyte))
	r, c := browser(), new(Cancel)
	n := testing.AllocsPerRun(500, func() { exchangeOnce(t, p, c, r) })
	if n > 0 && !underRace { // the detector has pools forget what they hold
		t.Errorf("%v allocations", n)
	}
}

func BenchmarkExchange(b *testing.B) {
	for _, network := range []string{"unix", "tcp"} {
		b.Run(network, func(b *testing.B) {
			p, _ := listeningOn(b, network, canned(kilobyte))
			r, c := browser(), new(Cancel)
			b.ReportAllocs()
			for b.Loop() {
				exchangeOnce(b, p, c, r)
			}
		})
	}
}

// What is taken for a whole answer net/http reads the same, and what follows it
// is never left for the next request.
func FuzzAnswers(f *testing.F) {
	for _, s := range []string{
		"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\nA: b\r\n\r\n",
		"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\nHTTP/1.1 204 No Content\r\n\r\n", "HTTP/1.0 200 OK\r\n\r\nuntil the end",
		"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nokHTTP/1.1 200 OK\r\n\r\n", "HTTP/1.1 101 S\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\n",
		"HTTP/1.1 304 Not Modified\r\nContent-Length: 2\r\n\r\n", "HTTP/1.1 200 OK\nContent-Length: 2\n\nok",
	} {
		f.Add([]byte(s), 3, false)
	}
	f.Fuzz(func(t *testing.T, said []byte, cut int, head bool) {
		if len(said) > 64<<10 {
			return
		}
		cut = max(0, min(cut, len(said)))
		ended := make(chan struct{})
		p := piped(func(c net.Conn) {
			defer close(ended)
			defer c.Close()
			if _, _, ok := next(bufio.NewReader(c)); ok {
				_, _ = c.Write(said[:cut])
				_, _ = c.Write(said[cut:])
			}
		})
		method := "GET"
		if head {
			method = "HEAD"
		}
		in, err := p.RoundTrip(new(Cancel), outgoing(method))
		if err != nil {
			<-ended
			return
		}
		body, err := io.ReadAll(in)
		status := in.Status
		reused := false
		if _, idle := p.Conns(); idle > 0 {
			reused = true
		}
		in.Close()
		p.Retire()
		<-ended
		if open, _ := p.Conns(); open != 0 {
			t.Errorf("%d open", open)
		}
		if err != nil {
			return
		}
		br := bufio.NewReader(bytes.NewReader(said))
		for {
			resp, err := http.ReadResponse(br, &http.Request{Method: method})
			if err != nil {
				t.Fatalf("%q was taken; net/http says %v", said, err)
			}
			want, err := io.ReadAll(resp.Body)
			if resp.StatusCode < 200 && status >= 200 {
				continue
			}
			if err != nil || resp.StatusCode != status || !bytes.Equal(want, body) {
				t.Errorf("%q: %d %q; net/http says %d %q, %v", said, status, body, resp.StatusCode, want, err)
			}
			if reused && cut == len(said) && br.Buffered() > 0 {
				t.Errorf("%q: the connection was given back with %d bytes left", said, br.Buffered())
			}
			return
		}
	})
}
