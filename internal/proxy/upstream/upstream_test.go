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
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

func get(method string) *Request { return &Request{Method: method, Target: "/", Host: "a.test"} }

func do(t testing.TB, p *Pool, r *Request) (int, string, error) {
	t.Helper()
	resp, err := p.Do(t.Context(), r)
	if err != nil {
		return 0, "", err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	return resp.Status, string(b), err
}

func TestConnectionsAreUsedAgainOnlyWhenClean(t *testing.T) {
	for _, test := range []struct {
		name, answer string
		reused       bool
	}{
		{"length", "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok", true},
		{"chunked", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n", true},
		{"no content", "HTTP/1.1 204 No Content\r\n\r\n", true},
		{"after hints", "HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok", true},
		{"asked to close", "HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nok", false},
		{"HTTP/1.0", "HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nok", false},
		{"surplus", "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nokHTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil", false},
	} {
		p, conns := listening(t, func(_ int, c net.Conn, br *bufio.Reader) {
			for {
				if _, _, ok := next(br); !ok {
					return
				}
				_, _ = io.WriteString(c, test.answer)
			}
		})
		for range 3 {
			if _, body, err := do(t, p, get("GET")); err != nil || strings.Contains(body, "evil") {
				t.Errorf("%s: %q, %v", test.name, body, err)
			}
		}
		want := int32(3)
		if test.reused {
			want = 1
		}
		if got := conns.Load(); got != want {
			t.Errorf("%s: %d connections, want %d", test.name, got, want)
		}
	}
}

func TestAbandonedAnswerIsNotPooled(t *testing.T) {
	p, _ := listening(t, func(_ int, c net.Conn, br *bufio.Reader) {
		_, _, _ = next(br)
		_, _ = io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nab")
		_, _ = br.ReadByte()
	})
	resp, err := p.Do(t.Context(), get("GET"))
	if err != nil {
		t.Fatal(err)
	}
	_ = resp.Body.Close()
	if open, idle := p.Conns(); open != 0 || idle != 0 {
		t.Errorf("%d open, %d idle", open, idle)
	}
}

func TestRetryOnlyWhatMayBeRepeated(t *testing.T) {
	for _, test := range []struct {
		name  string
		req   func() *Request
		retry bool
	}{
		{"GET", func() *Request { return get("GET") }, true},
		{"HEAD", func() *Request { return get("HEAD") }, true},
		{"DELETE", func() *Request { return get("DELETE") }, true},
		{"POST", func() *Request { return get("POST") }, false},
		{"PATCH", func() *Request { return get("PATCH") }, false},
		{"PUT with a body", func() *Request {
			r := get("PUT")
			r.Body, r.ContentLength = strings.NewReader("abc"), 3
			return r
		}, false},
	} {
		var seen atomic.Int32
		p, _ := listening(t, func(n int, c net.Conn, br *bufio.Reader) {
			for i := 0; ; i++ {
				if _, _, ok := next(br); !ok {
					return
				}
				if n == 0 && i == 1 { // the second on the first connection dies
					seen.Add(1)
					return
				}
				seen.Add(1)
				_, _ = io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
			}
		})
		if _, _, err := do(t, p, get("GET")); err != nil {
			t.Fatal(err)
		}
		_, _, err := do(t, p, test.req())
		want := int32(2)
		if test.retry {
			want = 3
		}
		if got := seen.Load(); (err == nil) != test.retry || got != want {
			t.Errorf("%s: error %v, the instance saw %d requests, want %d", test.name, err, got, want)
		}
	}
}

func TestFreshConnectionThatDiesIsNoReasonToRepeat(t *testing.T) {
	p, conns := listening(t, func(_ int, _ net.Conn, br *bufio.Reader) { _, _, _ = next(br) })
	for method, repeatable := range map[string]bool{"GET": true, "POST": false} {
		before := conns.Load()
		_, _, err := do(t, p, get(method))
		if lost, is := errors.AsType[*LostError](err); !is || lost.Repeatable != repeatable || conns.Load() != before+1 {
			t.Errorf("%s: error %v after %d connections", method, err, conns.Load()-before)
		}
	}
}

func TestClosedIdleConnectionIsSeenBeforePOST(t *testing.T) {
	closed := make(chan struct{})
	p, conns := listening(t, func(n int, c net.Conn, br *bufio.Reader) {
		_, _, _ = next(br)
		_, _ = io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
		if n == 0 {
			_ = c.Close()
			close(closed)
		}
	})
	if _, _, err := do(t, p, get("GET")); err != nil {
		t.Fatal(err)
	}
	<-closed
	if _, _, err := do(t, p, get("POST")); err != nil || conns.Load() != 2 {
		t.Errorf("error %v, %d connections", err, conns.Load())
	}
}

func TestBodiesAreFramedByUs(t *testing.T) {
	p, _ := listening(t, func(_ int, c net.Conn, br *bufio.Reader) {
		for {
			r, body, ok := next(br)
			if !ok {
				return
			}
			s := fmt.Sprintf("%d %v %q %q", r.ContentLength, r.TransferEncoding, body, r.Trailer.Get("X-Sum"))
			_, _ = fmt.Fprintf(c, "HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s", len(s), s)
		}
	})
	for _, test := range []struct {
		set  func(*Request)
		want string
	}{
		{func(*Request) {}, `0 [] "" ""`},
		{func(r *Request) { r.WriteZero = true }, `0 [] "" ""`},
		{func(r *Request) { r.Body, r.ContentLength = strings.NewReader("abc"), 3 }, `3 [] "abc" ""`},
		{func(r *Request) { r.Body, r.ContentLength = strings.NewReader("abc"), -1 }, `-1 [chunked] "abc" ""`},
		{func(r *Request) {
			r.Body, r.ContentLength, r.Trailer = strings.NewReader("abc"), -1, http.Header{"X-Sum": {"7"}}
		}, `-1 [chunked] "abc" "7"`},
		{func(r *Request) {
			r.Body, r.ContentLength, r.Expect = strings.NewReader("abc"), 3, true
		}, `3 [] "abc" ""`},
		{func(r *Request) { r.Header = http.Header{"Content-Length": {"9"}, "Transfer-Encoding": {"chunked"}} }, `0 [] "" ""`},
	} {
		r := get("POST")
		test.set(r)
		if _, got, err := do(t, p, r); got != test.want || err != nil {
			t.Errorf("got %s, %v, want %s", got, err, test.want)
		}
	}
	for _, n := range []int64{2, 4} {
		r := get("POST")
		r.Body, r.ContentLength = strings.NewReader("abc"), n
		if _, _, err := do(t, p, r); errors.As(err, new(*BodyError)) == false {
			t.Errorf("a body of 3 bytes announced as %d: %v", n, err)
		}
	}
}

func TestWhatCannotBeWrittenIsRefused(t *testing.T) {
	for _, r := range []*Request{
		{Method: "GET /x", Target: "/", Host: "a"},
		{Method: "GET", Target: "/ HTTP/1.1\r\nX: y", Host: "a"},
		{Method: "GET", Target: "/", Host: "a\r\nb"},
		{Method: "GET", Target: "/", Host: "a", Header: http.Header{"A b": {"c"}}},
		{Method: "GET", Target: "/", Host: "a", Header: http.Header{"A": {"c\r\nd: e"}}},
		{Method: "GET", Target: "/", Host: "a", Upgrade: "a\nb"},
		{Method: "GET", Target: "", Host: "a"},
	} {
		if b, err := appendHead(nil, r); err == nil {
			t.Errorf("%+v was written as %q", r, b)
		}
	}
}

func FuzzHeadsHaveTheFieldsGivenAndNoOther(f *testing.F) {
	f.Add("GET", "/a?b", "h.test", "X-A", "v")
	f.Add("GET", "/\r\nA: b", "h", "X:", "v\nB: c")
	f.Fuzz(func(t *testing.T, method, target, host, name, value string) {
		b, err := appendHead(nil, &Request{Method: method, Target: target, Host: host, Header: http.Header{name: {value}}})
		if err != nil {
			return
		}
		if n := bytes.Count(b, []byte("\n")); n > 4 || n < 3 || bytes.Count(b, []byte("\r")) != n {
			t.Errorf("%q", b)
		}
	})
}

func TestInformationalAnswers(t *testing.T) {
	p, _ := listening(t, func(_ int, c net.Conn, br *bufio.Reader) {
		_, _, _ = next(br)
		_, _ = io.WriteString(c, "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 102 Processing\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
	})
	r := get("GET")
	var got []string
	r.Informational = func(status int, h http.Header) { got = append(got, fmt.Sprint(status, h.Get("Link"))) }
	if status, _, err := do(t, p, r); status != 200 || err != nil || fmt.Sprint(got) != "[103x]" {
		t.Errorf("%d, %v, passed on: %v", status, err, got)
	}
}

func TestEndedContextClosesTheConnection(t *testing.T) {
	gone := make(chan struct{})
	p, _ := listening(t, func(_ int, c net.Conn, br *bufio.Reader) {
		_, _, _ = next(br)
		_, _ = br.ReadByte()
		close(gone)
	})
	ctx, cancel := context.WithCancelCause(t.Context())
	cause := errors.New("enough")
	time.AfterFunc(10*time.Millisecond, func() { cancel(cause) })
	if _, err := p.Do(ctx, get("GET")); !errors.Is(err, cause) {
		t.Errorf("got %v", err)
	}
	<-gone
}

func TestSilentInstanceTimesOut(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := piped(func(c net.Conn) { _, _ = io.Copy(io.Discard, c) })
		began := time.Now()
		if _, _, err := do(t, p, get("GET")); !errors.Is(err, ErrTimeout) || time.Since(began) != FirstByteTime {
			t.Errorf("got %v after %s", err, time.Since(began))
		}
	})
}

func TestIdleConnectionsAreClosedInTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := piped(answering)
		for range 2 {
			if _, _, err := do(t, p, get("GET")); err != nil {
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

func TestRefusedConnectionIsADialError(t *testing.T) {
	p := NewPool(func(ctx context.Context) (net.Conn, error) {
		if d, ok := ctx.Deadline(); !ok || time.Until(d) > ConnectTime {
			t.Error("no deadline")
		}
		return nil, errors.New("refused")
	})
	if _, _, err := do(t, p, get("GET")); !errors.As(err, new(*DialError)) {
		t.Fatalf("got %v", err)
	}
	if open, _ := p.Conns(); open != 0 {
		t.Errorf("%d connections are counted", open)
	}
}
