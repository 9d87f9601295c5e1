package upstream

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptrace"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	"tako/internal/proxy/message"
)

// way is what both pools are.
type way interface {
	RoundTrip(c *Cancel, r *Outgoing) (*Incoming, error)
	Sweep(now time.Time)
	Retire()
	Revive()
	Conns() (open, idle int)
}

var _, _ way = (*Pool)(nil), (*H2CPool)(nil)

// serving returns a pool for an instance that speaks HTTP/2 in the clear.
func serving(t testing.TB, h http.HandlerFunc) (*H2CPool, *atomic.Int32) {
	t.Helper()
	var h2c http.Protocols
	h2c.SetUnencryptedHTTP2(true)
	path := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	var conns atomic.Int32
	server := &http.Server{Handler: h, Protocols: &h2c, DisableGeneralOptionsHandler: true, ConnState: func(_ net.Conn, s http.ConnState) {
		if s == http.StateNew {
			conns.Add(1)
		}
	}}
	done := make(chan struct{})
	go func() { defer close(done); _ = server.Serve(l) }()
	p := NewH2CPool(func(ctx context.Context) (net.Conn, error) { return new(net.Dialer).DialContext(ctx, "unix", path) })
	t.Cleanup(func() { p.Retire(); _ = server.Close(); <-done })
	return p, &conns
}

func askH2C(t testing.TB, p way, r *Outgoing) (int, string, error) {
	t.Helper()
	in, err := p.RoundTrip(new(Cancel), r)
	if err != nil {
		return 0, "", err
	}
	defer in.Close()
	b, err := io.ReadAll(in)
	return in.Status, string(b), err
}

func TestH2CRequestsArriveAsTheyAre(t *testing.T) {
	p, conns := serving(t, func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		r.Header.Del("Content-Length")
		fmt.Fprintf(w, "%s %s %s %d %q %q %v", r.Method, r.RequestURI, r.Host, r.ContentLength, body, r.Trailer.Get("X-Sum"), r.Header)
	})
	large := strings.Repeat("x", 100<<10)
	for _, test := range []struct {
		set  func(*Outgoing)
		want string
	}{
		{func(*Outgoing) {}, `POST / a.test 0 "" "" map[]`},
		{func(r *Outgoing) { r.Target, r.Host = []byte(`//a/%7e|"?b?&=%zz`), []byte("B_c.test:81") }, `POST //a/%7e|"?b?&=%zz B_c.test:81 0 "" "" map[]`},
		{func(r *Outgoing) { r.Method, r.Target = []byte("OPTIONS"), []byte("*") }, `OPTIONS * a.test 0 "" "" map[]`},
		{func(r *Outgoing) { r.HasLength = true }, `POST / a.test 0 "" "" map[]`},
		{func(r *Outgoing) { with(r, streamed("abc"), 3) }, `POST / a.test 3 "abc" "" map[]`},
		{func(r *Outgoing) { with(r, buffered("abc"), 3) }, `POST / a.test 3 "abc" "" map[]`},
		{func(r *Outgoing) { with(r, streamed("abc"), message.Unknown) }, `POST / a.test -1 "abc" "" map[]`},
		{func(r *Outgoing) { with(r, buffered(""), message.Unknown) }, `POST / a.test -1 "" "" map[]`},
		{func(r *Outgoing) { with(r, streamed(large), 100<<10) }, `POST / a.test 102400 "` + large + `" "" map[]`},
		{func(r *Outgoing) {
			b := streamed("abc")
			b.trailer = fields("X-Sum", "7", "Content-Length", "9")
			with(r, b, message.Unknown)
			r.Fields = fields("trailer", "x-sum, content-length, a b")
		}, `POST / a.test -1 "abc" "7" map[]`},
		{func(r *Outgoing) {
			b := buffered("abc")
			b.trailer = fields("X-Sum", "7", "Content-Length", "9")
			with(r, b, message.Unknown)
		}, `POST / a.test -1 "abc" "7" map[]`},
		{func(r *Outgoing) {
			r.TETrailers = true
			r.Fields = fields("x-a", "1", "Connection", "close", "X-A", "2", "User-Agent", "me", "Upgrade", "x")
		}, `POST / a.test 0 "" "" map[Te:[trailers] User-Agent:[me] X-A:[1 2]]`},
		{func(r *Outgoing) { r.Upgrade = []byte("websocket") }, `POST / a.test 0 "" "" map[]`},
	} {
		r := outgoing("POST")
		test.set(r)
		if status, got, err := askH2C(t, p, r); status != 200 || got != test.want || err != nil {
			t.Errorf("got %d %.200s, %v, want %.200s", status, got, err, test.want)
		}
	}
	for _, n := range []int64{2, 4} {
		for _, body := range []*content{buffered("abc"), streamed("abc")} {
			if _, _, err := askH2C(t, p, with(outgoing("POST"), body, n)); !errors.As(err, new(*BodyError)) {
				t.Errorf("a body of 3 bytes announced as %d: %v", n, err)
			}
		}
	}
	bad := outgoing("GET")
	bad.Target = []byte("/ HTTP/1.1\r\nA: b")
	if _, _, err := askH2C(t, p, bad); !errors.Is(err, errUnwritable) {
		t.Errorf("a target of two lines: %v", err)
	}
	if open, idle := p.Conns(); open != 1 || idle != 1 || conns.Load() != 1 {
		t.Errorf("%d open, %d idle, %d made", open, idle, conns.Load())
	}
}

func TestH2CAnswers(t *testing.T) {
	p, _ := serving(t, func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/hints":
			w.Header().Set("Link", "x")
			w.WriteHeader(http.StatusEarlyHints)
			w.Header().Del("Link")
			_, _ = io.WriteString(w, "ok")
		case "/many":
			for range MaxInterim + 1 {
				w.WriteHeader(http.StatusEarlyHints)
			}
		case "/none":
			w.WriteHeader(http.StatusNoContent)
		case "/length":
			w.Header().Set("Content-Length", "2")
			_, _ = io.WriteString(w, "ok")
		case "/grpc":
			w.Header().Set("Trailer", "Grpc-Status")
			_, _ = io.WriteString(w, "ok")
			_ = http.NewResponseController(w).Flush()
			w.Header().Set("Grpc-Status", "0")
			w.Header().Set(http.TrailerPrefix+"Grpc-Message", "fine")
		case "/short":
			w.Header().Set("Content-Length", "3")
			_, _ = io.WriteString(w, "ok")
		case "/reset":
			_, _ = io.WriteString(w, "ok")
			_ = http.NewResponseController(w).Flush()
			panic(http.ErrAbortHandler)
		}
	})
	for _, test := range []struct {
		method, path, want string
		whole              bool
	}{
		{"GET", "/hints", "[103x] 200 2 true ok trailer [] <nil>", false},
		{"GET", "/many", "error [103 103 103 103 103 103 103 103 103 103 103 103 103 103 103 103]", false},
		{"GET", "/none", "[] 204 0 false  trailer [] <nil>", true},
		{"GET", "/", "[] 200 0 true  trailer [] <nil>", true},
		{"GET", "/length", "[] 200 2 true ok trailer [] <nil>", false},
		{"HEAD", "/length", "[] 200 2 true  trailer [] <nil>", true},
		{"GET", "/grpc", "[] 200 -1 false ok trailer [Grpc-Message=fine Grpc-Status=0] <nil>", false},
		{"GET", "/short", "[] 200 3 true ok", false},
		{"GET", "/reset", "[] 200 -1 false ok", false},
	} {
		r := outgoing(test.method)
		r.Target = []byte(test.path)
		hints := []string{}
		r.Inform = func(status int, f []message.Field) {
			s := fmt.Sprint(status)
			for _, f := range f {
				s += string(f.Value)
			}
			hints = append(hints, s)
		}
		in, err := p.RoundTrip(new(Cancel), r)
		if err != nil {
			if got := fmt.Sprint("error ", hints); got != test.want || !errors.Is(err, errInterims) {
				t.Errorf("%s %s: %s %v, want %s", test.method, test.path, got, err, test.want)
			}
			continue
		}
		if in.Whole() != test.whole {
			t.Errorf("%s %s: whole: %v", test.method, test.path, in.Whole())
		}
		body, err := io.ReadAll(in)
		got := fmt.Sprintf("%v %d %d %v %s", hints, in.Status, in.Length, in.HasLength, body)
		if err == nil {
			tr := []string{}
			for _, f := range in.Trailer() {
				tr = append(tr, fmt.Sprintf("%s=%s", f.Name, f.Value))
			}
			got += fmt.Sprintf(" trailer %v %v", tr, err)
		}
		if got != test.want {
			t.Errorf("%s %s: got %s, %v, want %s", test.method, test.path, got, err, test.want)
		}
		in.Close()
		in.Close()
	}
}

// The goroutine that reads for all may be about to tell of a 103 when a request ends.
func TestH2CInterimAnswerThatIsLateTouchesNoRequest(t *testing.T) {
	for _, informs := range []bool{true, false} {
		r := outgoing("GET")
		if informs {
			r.Inform = func(int, []message.Field) {}
		}
		r.in.open(new(Cancel), r)
		x := newH2Exchange(nil, nil, &r.in)
		x.interims = make(chan interim, MaxInterim)
		trace := httptrace.ContextClientTrace(x.request().Context())
		ended := make(chan struct{})
		go func() {
			defer close(ended)
			r.Clear()
			r.Inform = func(int, []message.Field) { t.Error("another request was told") }
		}()
		want := 0
		if informs {
			want = 2
		}
		for range 2 {
			if err := trace.Got1xxResponse(http.StatusEarlyHints, nil); err != nil {
				t.Error(err)
			}
			<-ended
		}
		if got := len(x.interims); got != want {
			t.Errorf("informs %t: %d are passed on, want %d", informs, got, want)
		}
		x.end(errClosed)
	}
}

func TestH2CStreamsAreNotBufferedInEitherDirection(t *testing.T) {
	p, _ := serving(t, func(w http.ResponseWriter, r *http.Request) {
		rc := http.NewResponseController(w)
		_ = rc.Flush()
		b := make([]byte, 100)
		for {
			n, err := r.Body.Read(b)
			_, _ = w.Write(b[:n])
			_ = rc.Flush()
			if err != nil {
				w.Header().Set(http.TrailerPrefix+"Grpc-Status", "0")
				return
			}
		}
	})
	pr, pw := io.Pipe()
	r := with(outgoing("POST"), &content{Reader: pr}, message.Unknown)
	r.TETrailers = true
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
	if !in.Unsent || in.Rest() != message.Unknown {
		t.Errorf("unsent: %v, rest %d", in.Unsent, in.Rest())
	}
	_ = pw.Close()
	if n, err := in.Read(b); n != 0 || err != io.EOF { //nolint:errorlint // the value itself
		t.Errorf("the end: %d, %v", n, err)
	}
	if tr := in.Trailer(); len(tr) != 1 || string(tr[0].Name) != "Grpc-Status" || string(tr[0].Value) != "0" {
		t.Errorf("trailer %q", tr)
	}
	in.Close()
}

func TestH2CUploadThatIsAnsweredBeforeItIsRead(t *testing.T) {
	p, conns := serving(t, func(w http.ResponseWriter, r *http.Request) {
		_, _ = r.Body.Read(make([]byte, 1))
		w.WriteHeader(http.StatusRequestEntityTooLarge)
		_, _ = io.WriteString(w, "no")
	})
	for range 2 {
		pr, pw := io.Pipe()
		go func() { _, _ = io.WriteString(pw, "x") }()
		stopped := make(chan struct{})
		body := &content{Reader: pr, stop: sync.OnceFunc(func() { close(stopped); _ = pw.CloseWithError(errors.New("stopped")) })}
		in, err := p.RoundTrip(new(Cancel), with(outgoing("POST"), body, message.Unknown))
		if err != nil {
			t.Fatal(err)
		}
		b, err := io.ReadAll(in)
		if in.Status != 413 || string(b) != "no" || err != nil || !in.Unsent {
			t.Errorf("%d, %q, %v, unsent: %v", in.Status, b, err, in.Unsent)
		}
		in.Close()
		<-stopped
	}
	if open, idle := p.Conns(); open != 1 || idle != 1 || conns.Load() != 1 {
		t.Errorf("%d open, %d idle, %d made", open, idle, conns.Load())
	}
}

func TestH2CBodyThatFailsIsTheClientsFault(t *testing.T) {
	gone := make(chan error, 1)
	p, _ := serving(t, func(_ http.ResponseWriter, r *http.Request) {
		_, err := io.ReadAll(r.Body)
		gone <- err
	})
	mine := errors.New("reset by the client")
	body := &content{Reader: io.MultiReader(strings.NewReader("abc"), readerFunc(func([]byte) (int, error) { return 0, mine }))}
	if _, _, err := askH2C(t, p, with(outgoing("POST"), body, message.Unknown)); !errors.As(err, new(*BodyError)) || !errors.Is(err, mine) {
		t.Errorf("got %v", err)
	}
	if err := <-gone; err == nil {
		t.Error("the instance took it for the whole")
	}
}

func TestH2CBodyIsHeldBackUntilItIsAskedFor(t *testing.T) {
	p, _ := serving(t, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/no" {
			w.WriteHeader(http.StatusExpectationFailed)
			return
		}
		_, _ = io.Copy(w, r.Body)
	})
	for target, want := range map[string]string{"/no": "417 0", "/": "200 3"} {
		body := streamed("abc")
		r := with(outgoing("POST"), body, 3)
		r.Target, r.Expect = []byte(target), true
		status, _, err := askH2C(t, p, r)
		if got := fmt.Sprint(status, body.read.Load()); got != want || err != nil {
			t.Errorf("%s: %s, %v, want %s", target, got, err, want)
		}
	}
}

func TestH2CCancelEndsWhateverIsUnderWay(t *testing.T) {
	cause := errors.New("enough")
	waiting, ended := make(chan struct{}, 1), make(chan struct{}, 1)
	p, conns := serving(t, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/body" {
			_, _ = io.WriteString(w, "ab")
			_ = http.NewResponseController(w).Flush()
		}
		waiting <- struct{}{}
		<-r.Context().Done()
		ended <- struct{}{}
	})
	var c Cancel
	go func() { <-waiting; c.Do(cause) }()
	if _, err := p.RoundTrip(&c, outgoing("GET")); err != cause { //nolint:errorlint // the value itself
		t.Errorf("waiting for the head: %v", err)
	}
	<-ended
	if _, err := p.RoundTrip(&c, outgoing("GET")); err != cause { //nolint:errorlint // the value itself
		t.Errorf("ended before: %v", err)
	}
	c.Reset()
	r := outgoing("GET")
	r.Target = []byte("/body")
	in, err := p.RoundTrip(&c, r)
	if err != nil {
		t.Fatal(err)
	}
	<-waiting
	b := make([]byte, 2)
	if _, err := io.ReadFull(in, b); string(b) != "ab" || err != nil {
		t.Errorf("read %q, %v", b, err)
	}
	go c.Do(cause)
	if b, err := io.ReadAll(in); len(b) > 0 || err != cause || in.Whole() { //nolint:errorlint // the value itself
		t.Errorf("within the body: %q, %v", b, err)
	}
	in.Close()
	<-ended
	c.Reset()

	pr, pw := io.Pipe()
	body := &content{Reader: pr, stop: func() { _ = pw.CloseWithError(errors.New("stopped")) }}
	go func() { <-waiting; c.Do(cause) }()
	if _, err := p.RoundTrip(&c, with(outgoing("POST"), body, message.Unknown)); err != cause { //nolint:errorlint // the value itself
		t.Errorf("while a body is sent: %v", err)
	}
	<-ended
	if open, idle := p.Conns(); open != 1 || idle != 1 || conns.Load() != 1 {
		t.Errorf("%d open, %d idle, %d made", open, idle, conns.Load())
	}
}

func TestH2CConnectionsAreSharedAndEndAtRetire(t *testing.T) {
	go1 := make(chan struct{})
	p, conns := serving(t, func(http.ResponseWriter, *http.Request) { <-go1 })
	var wg sync.WaitGroup
	for range 50 {
		wg.Go(func() {
			if status, _, err := askH2C(t, p, outgoing("GET")); status != 200 || err != nil {
				t.Errorf("%d, %v", status, err)
			}
		})
	}
	for {
		p.mu.Lock()
		busy := len(p.conns) == 1 && p.conns[0].uses == 50
		p.mu.Unlock()
		if busy {
			break
		}
		time.Sleep(time.Millisecond)
	}
	p.Retire()
	if open, idle := p.Conns(); open != 1 || idle != 0 || conns.Load() != 1 {
		t.Errorf("%d open, %d idle, %d made", open, idle, conns.Load())
	}
	close(go1)
	wg.Wait()
	if open, _ := p.Conns(); open != 0 {
		t.Errorf("%d open", open)
	}
	p.Revive()
	if _, _, err := askH2C(t, p, outgoing("GET")); err != nil {
		t.Error(err)
	}
	p.Sweep(time.Now())
	if open, idle := p.Conns(); open != 1 || idle != 1 {
		t.Errorf("%d open, %d idle", open, idle)
	}
	p.Sweep(time.Now().Add(IdleTime))
	if open, _ := p.Conns(); open != 0 {
		t.Errorf("after IdleTime: %d open", open)
	}
}

func TestH2CDialError(t *testing.T) {
	mine := errors.New("refused")
	go1 := make(chan struct{})
	var dials atomic.Int32
	p := NewH2CPool(func(ctx context.Context) (net.Conn, error) {
		if d, ok := ctx.Deadline(); !ok || time.Until(d) > ConnectTime {
			t.Error("no deadline")
		}
		dials.Add(1)
		<-go1
		return nil, mine
	})
	var wg sync.WaitGroup
	for range 10 {
		wg.Go(func() {
			if _, _, err := askH2C(t, p, outgoing("GET")); !errors.As(err, new(*DialError)) || !errors.Is(err, mine) {
				t.Errorf("got %v", err)
			}
		})
	}
	for dials.Load() == 0 {
		time.Sleep(time.Millisecond)
	}
	close(go1)
	wg.Wait()
	if open, _ := p.Conns(); open != 0 {
		t.Errorf("%d open", open)
	}
}

// frames plays an instance that speaks HTTP/2 frame by frame. F is told of each
// request on a connection, numbered from 0, once it is whole, and reports whether to go on.
func frames(t testing.TB, f func(n int, fr *http2.Framer, stream uint32) bool) (*H2CPool, *atomic.Int32) {
	t.Helper()
	var conns atomic.Int32
	var wg sync.WaitGroup
	p := NewH2CPool(func(context.Context) (net.Conn, error) {
		a, b := net.Pipe()
		n := int(conns.Add(1)) - 1
		wg.Go(func() {
			defer b.Close()
			serveFrames(b, func(fr *http2.Framer, stream uint32) bool { return f(n, fr, stream) })
		})
		return a, nil
	})
	t.Cleanup(func() { p.Retire(); wg.Wait() })
	return p, &conns
}

func serveFrames(c net.Conn, f func(fr *http2.Framer, stream uint32) bool) {
	preface := make([]byte, len(http2.ClientPreface))
	if _, err := io.ReadFull(c, preface); err != nil {
		return
	}
	// What is written must not wait for what the other end writes.
	out := &queue{to: c, more: make(chan struct{}, 1)}
	done := make(chan struct{})
	go func() { defer close(done); out.run() }()
	defer func() { out.close(); <-done }()
	fr := http2.NewFramer(out, c)
	_ = fr.WriteSettings()
	for {
		frame, err := fr.ReadFrame()
		if err != nil {
			return
		}
		switch frame := frame.(type) {
		case *http2.SettingsFrame:
			if !frame.IsAck() {
				_ = fr.WriteSettingsAck()
			}
		case *http2.HeadersFrame:
			if frame.StreamEnded() && !f(fr, frame.StreamID) {
				return
			}
		case *http2.DataFrame:
			if frame.StreamEnded() && !f(fr, frame.StreamID) {
				return
			}
		}
	}
}

// queue writes without having its user wait.
type queue struct {
	to    net.Conn
	more  chan struct{}
	mu    sync.Mutex
	buf   []byte
	ended bool
}

func (q *queue) Write(b []byte) (int, error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.buf = append(q.buf, b...)
	select {
	case q.more <- struct{}{}:
	default:
	}
	return len(b), nil
}

func (q *queue) close() {
	q.mu.Lock()
	q.ended = true
	q.mu.Unlock()
	_ = q.to.Close()
	select {
	case q.more <- struct{}{}:
	default:
	}
}

func (q *queue) run() {
	for range q.more {
		q.mu.Lock()
		b, ended := q.buf, q.ended
		q.buf = nil
		q.mu.Unlock()
		if ended {
			return
		}
		if _, err := q.to.Write(b); err != nil {
			return
		}
	}
}

// good answers a request by 204.
func good(fr *http2.Framer, stream uint32) bool {
	var b bytes.Buffer
	_ = hpack.NewEncoder(&b).WriteField(hpack.HeaderField{Name: ":status", Value: "204"})
	return fr.WriteHeaders(http2.HeadersFrameParam{StreamID: stream, BlockFragment: b.Bytes(), EndStream: true, EndHeaders: true}) == nil
}

func TestH2CConnectionWithoutAPlaceIsClosed(t *testing.T) {
	p, _ := frames(t, func(_ int, fr *http2.Framer, stream uint32) bool {
		return fr.WriteSettings(http2.Setting{ID: http2.SettingMaxConcurrentStreams, Val: 0}) == nil && good(fr, stream)
	})
	if _, _, err := askH2C(t, p, outgoing("GET")); err != nil {
		t.Fatal(err)
	}
	conn := p.conns[0].ClientConn
	for conn.Available() > 0 {
		time.Sleep(time.Millisecond)
	}
	if conn.Err() != nil {
		t.Fatal(conn.Err())
	}
	if _, err := reserved(conn); err == nil || conn.Err() == nil {
		t.Errorf("reserved: %v; the connection: %v", err, conn.Err())
	}
}

func TestH2CRepeatsOnlyWhatMayBe(t *testing.T) {
	refuse := func(fr *http2.Framer, stream uint32) bool {
		_ = fr.WriteRSTStream(stream, http2.ErrCodeRefusedStream)
		return true
	}
	goAway := func(fr *http2.Framer, stream uint32) bool {
		_ = fr.WriteGoAway(stream-2, http2.ErrCodeNo, nil)
		return true
	}
	reset := func(fr *http2.Framer, stream uint32) bool {
		_ = fr.WriteRSTStream(stream, http2.ErrCodeInternal)
		return true
	}
	die := func(*http2.Framer, uint32) bool { return false }
	post := func() *Outgoing { return outgoing("POST") }
	get := func() *Outgoing { return outgoing("GET") }
	whole := func() *Outgoing { return with(outgoing("POST"), buffered("abc"), 3) }
	stream := func() *Outgoing { return with(outgoing("PUT"), streamed("abc"), 3) }
	for _, test := range []struct {
		name  string
		req   func() *Outgoing
		then  func(*http2.Framer, uint32) bool
		retry bool
		lost  bool
	}{
		{"refused GET", get, refuse, true, true},
		{"refused POST", post, refuse, true, true},
		{"refused body that has come", whole, refuse, true, true},
		{"GET after GOAWAY", get, goAway, true, true},
		{"POST after GOAWAY", post, goAway, true, true},
		{"GET when the connection dies", get, die, true, true},
		{"POST when the connection dies", post, die, false, true},
		{"body that streams when the connection dies", stream, die, false, true},
		{"GET that is reset", get, reset, false, false},
	} {
		p, conns := frames(t, func(n int, fr *http2.Framer, stream uint32) bool {
			if n == 0 && stream > 1 {
				return test.then(fr, stream)
			}
			return good(fr, stream)
		})
		if _, _, err := askH2C(t, p, get()); err != nil {
			t.Fatalf("%s: %v", test.name, err)
		}
		_, _, err := askH2C(t, p, test.req())
		want := int32(1)
		if test.retry {
			want = 2
		}
		if (err == nil) != test.retry || conns.Load() != want {
			t.Errorf("%s: %v, %d connections", test.name, err, conns.Load())
		}
		if lost, is := errors.AsType[*LostError](err); err != nil && (is != test.lost || is && lost.Repeatable) {
			t.Errorf("%s: %v", test.name, err)
		}
	}
}

func TestH2CFreshConnectionThatDiesIsNoReasonToRepeat(t *testing.T) {
	p, conns := frames(t, func(int, *http2.Framer, uint32) bool { return false })
	_, _, err := askH2C(t, p, outgoing("GET"))
	if lost, is := errors.AsType[*LostError](err); !is || !lost.Repeatable || conns.Load() != 1 {
		t.Errorf("%v after %d connections", err, conns.Load())
	}
}

func TestH2CInstanceThatRefusesForeverIsAskedTwice(t *testing.T) {
	p, conns := frames(t, func(_ int, fr *http2.Framer, stream uint32) bool {
		return fr.WriteRSTStream(stream, http2.ErrCodeRefusedStream) == nil
	})
	_, _, err := askH2C(t, p, outgoing("GET"))
	if lost, is := errors.AsType[*LostError](err); !is || !lost.Repeatable || conns.Load() != 2 {
		t.Errorf("%v after %d connections", err, conns.Load())
	}
}

func TestH2CInstanceThatSpeaksHTTP1(t *testing.T) {
	p := NewH2CPool(func(context.Context) (net.Conn, error) {
		a, b := net.Pipe()
		go func() {
			defer b.Close()
			_, _ = b.Read(make([]byte, 4096))
			_, _ = io.WriteString(b, "HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n")
		}()
		return a, nil
	})
	if _, _, err := askH2C(t, p, outgoing("GET")); err == nil {
		t.Error("no error")
	}
}

func TestH2CInstanceThatSaysNothingTimesOut(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for _, r := range []*Outgoing{outgoing("GET"), with(outgoing("POST"), streamed("abc"), 3)} {
			p, _ := frames(t, func(int, *http2.Framer, uint32) bool { return true })
			began := time.Now()
			_, _, err := askH2C(t, p, r)
			if took := time.Since(began); !errors.Is(err, ErrTimeout) || took != FirstByteTime {
				t.Errorf("got %v after %s", err, took)
			}
			p.Retire()
		}
		synctest.Wait()
	})
}

func TestH2CInstanceThatTakesNoBodyTimesOut(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p, _ := frames(t, func(int, *http2.Framer, uint32) bool { return true })
		began := time.Now()
		r := with(outgoing("POST"), streamed(strings.Repeat("x", 1<<20)), message.Unknown)
		_, _, err := askH2C(t, p, r)
		if took := time.Since(began); !errors.Is(err, ErrTimeout) || took != WriteTime {
			t.Errorf("got %v after %s", err, took)
		}
		p.Retire()
		synctest.Wait()
	})
}
