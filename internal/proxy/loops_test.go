package proxy

import (
	"bufio"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	cryptorand "crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"math/big"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"

	"tako/internal/proxy/eventloop"
	"tako/internal/proxy/message"
	"tako/internal/proxy/upstream"
	"tako/internal/route"
	"tako/internal/tako"
	"tako/internal/wire"
)

// stressTime is how long clients begin new exchanges.
const stressTime = time.Second

type exchangeFunc func(x message.Exchange)

func (f exchangeFunc) Handle(x message.Exchange) { f(x) }

// looped is a front on loops.
type looped struct {
	*own
	t             testing.TB
	loops         *eventloop.Group
	plain, secure net.Listener
	listening     []*listener
}

func onLoops(t testing.TB, h message.Handler) *looped {
	t.Helper()
	return onLoopsWithin(t, message.DefaultLimits(), h)
}

func onLoopsWithin(t testing.TB, limits message.Limits, h message.Handler) *looped {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), cryptorand.Reader)
	check0(t, err)
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour), DNSNames: []string{"blog.test"}}
	der, err := x509.CreateCertificate(cryptorand.Reader, template, template, key.Public(), key)
	check0(t, err)
	log := hclog.NewNullLogger()
	g := group(t, 2)
	f := newOwn(h, &tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}},
		newDoorman(10_000, func(netip.Addr) bool { return false }, log), limits, log)
	f.door.announces = func() bool { return false }
	lf := &looped{own: f, t: t, loops: g}
	var serving sync.WaitGroup
	for _, l := range []*net.Listener{&lf.plain, &lf.secure} {
		*l, err = net.Listen("tcp", "127.0.0.1:0")
		check0(t, err)
		on := &listener{Listener: *l, secure: l == &lf.secure}
		check0(t, on.useLoops(g))
		serving.Go(func() { f.Serve(on) })
		lf.listening = append(lf.listening, on)
	}
	t.Cleanup(func() {
		for _, l := range lf.listening {
			_ = l.Close()
		}
		serving.Wait()
		f.Close()
		lf.until("no connection is open", func() bool { return f.open.Load() == 0 })
	})
	return lf
}

func (f *looped) until(what string, is func() bool) {
	f.t.Helper()
	for end := time.Now().Add(patience); !is(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			f.t.Errorf("still not: %s", what)
			return
		}
	}
}

func (f *looped) dial(secure bool) (net.Conn, *bufio.Reader) {
	l := f.plain
	if secure {
		l = f.secure
	}
	c, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		f.t.Error(err)
		return nil, nil
	}
	if secure {
		c = tls.Client(c, &tls.Config{InsecureSkipVerify: true}) //nolint:gosec // it is our own
	}
	_ = c.SetDeadline(time.Now().Add(6 * patience))
	return c, bufio.NewReader(c)
}

// clients runs n clients that bring exchanges till stressTime is over. Each has
// numbers of its own, the same each time.
func clients(n int, f func(w int, rnd *rand.Rand, more func() bool)) {
	end := time.Now().Add(stressTime)
	var all sync.WaitGroup
	for w := range n {
		all.Go(func() {
			rnd := rand.New(rand.NewPCG(uint64(w), 1)) //nolint:gosec // the same each time
			for began := false; !began || time.Now().Before(end); began = true {
				f(w, rnd, func() bool { return time.Now().Before(end) })
			}
		})
	}
	all.Wait()
}

// repeated repeats a line up to n bytes.
func repeated(line string, n int) string { return strings.Repeat(line, n/len(line)+1)[:n] }

// Answers and uploads of all sizes and framings, over TLS and without, in pieces,
// broken off, by tasks and off the loops, over the same connections with the app.
func TestEveryAnswerOnLoopsIsItsOwnClients(t *testing.T) {
	back := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		q := r.URL.Query()
		n, _ := strconv.Atoi(q.Get("n"))
		body, _ := io.ReadAll(r.Body)
		w.Header().Set("X-Id", q.Get("id"))
		w.Header().Set("X-Body", strconv.Itoa(len(body)))
		if q.Get("chunked") == "" {
			w.Header().Set("Content-Length", strconv.Itoa(n))
		}
		if n%50 == 7 {
			w.Header().Set("Connection", "close")
		}
		for b := repeated(q.Get("id")+";", n); len(b) > 0; {
			k := min(len(b), 1+rand.IntN(64<<10)) //nolint:gosec // no secret
			if _, err := io.WriteString(w, b[:k]); err != nil {
				return
			}
			if b = b[k:]; k%4 == 0 {
				_ = http.NewResponseController(w).Flush()
			}
		}
	}))
	t.Cleanup(back.Close)
	pool := upstream.NewPool(func(ctx context.Context) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "tcp", back.Listener.Addr().String())
	})
	var turn atomic.Uint64
	f := onLoops(t, exchangeFunc(func(x message.Exchange) {
		fl := &flight{x: x}
		r, o := x.Request(), &fl.out
		if on, ok := x.(interface{ Task() *eventloop.Task }); ok {
			o.Task = on.Task()
		}
		switch turn.Add(1) % 8 {
		case 0: // the connection with the app goes off the loops
			o.Task.Detach()
			o.Task = nil
		case 1:
			o.Task.Detach()
		}
		x.Watch(fl)
		defer x.Watch(nil)
		o.Method, o.Target, o.Host, o.Length, o.HasLength, o.Expect = r.Method, r.Target, r.Host, r.Length, r.HasLength, r.Expect
		if o.Length != 0 {
			fl.body = requestBody{fl: fl, room: 1 << 40, left: r.Length}
			o.Body = &fl.body
			if fl.body.first, fl.body.whole = x.Buffered(); !fl.body.whole {
				o.Task.Detach()
			}
		}
		in, err := pool.RoundTrip(&fl.Cancel, o)
		if err != nil {
			answer(x, http.StatusBadGateway, err.Error())
			return
		}
		defer in.Close()
		if reply(fl, in) != nil {
			x.Abort()
		}
	}))
	once := func(w, k int, rnd *rand.Rand, c net.Conn, br *bufio.Reader) bool {
		id := fmt.Sprintf("w%dk%dr%d", w, k, rnd.IntN(1e6))
		n, body, chunked := rnd.IntN(200), 0, ""
		if rnd.IntN(10) == 0 {
			n = rnd.IntN(400 << 10)
		}
		if rnd.IntN(2) == 0 {
			chunked = "&chunked=1"
		}
		head := "GET"
		if rnd.IntN(5) == 0 {
			body = 1 + rnd.IntN(40_000)
			head = "POST"
		}
		head += fmt.Sprintf(" /?n=%d&id=%s%s HTTP/1.1\r\nHost: blog.test\r\n", n, id, chunked)
		if body > 0 {
			head += fmt.Sprintf("Content-Length: %d\r\n", body)
			if rnd.IntN(3) == 0 {
				head += "Expect: 100-continue\r\n"
			}
		}
		all := head + "\r\n" + strings.Repeat("x", body)
		cut := len(all)
		if rnd.IntN(3) == 0 {
			cut = rnd.IntN(len(all))
		}
		_, _ = io.WriteString(c, all[:cut])
		if rnd.IntN(100) == 0 {
			return false
		}
		if cut < len(all) {
			time.Sleep(time.Duration(rnd.IntN(300)) * time.Microsecond)
			_, _ = io.WriteString(c, all[cut:])
		}
		resp, err := http.ReadResponse(br, nil)
		for err == nil && resp.StatusCode == http.StatusContinue {
			resp, err = http.ReadResponse(br, nil)
		}
		if err != nil {
			t.Errorf("%s, %d bytes of body: %v", id, body, err)
			return false
		}
		b, err := io.ReadAll(resp.Body)
		if h := resp.Header; resp.StatusCode != http.StatusOK || err != nil || h.Get("X-Id") != id || h.Get("X-Body") != strconv.Itoa(body) || string(b) != repeated(id+";", n) {
			t.Errorf("%s, %d bytes of body, %d of answer: got %d %v, %d bytes %.50q, %v", id, body, n, resp.StatusCode, h, len(b), b, err)
			return false
		}
		return !resp.Close
	}
	clients(16, func(w int, rnd *rand.Rand, more func() bool) {
		c, br := f.dial(w%2 == 0)
		if c == nil {
			return
		}
		defer c.Close()
		for k := range 1 + rnd.IntN(100) {
			if k > 0 && !more() || !once(w, k, rnd, c, br) {
				return
			}
		}
	})
	f.until("nobody is connected", func() bool { return f.open.Load() == 0 })
	pool.Retire()
	f.until("nothing is left on the loops", func() bool { open, _ := pool.Conns(); return open == 0 && f.loops.Conns() == 0 })
}

// A handshake has Limits.Head from the connection's beginning on, however little of it
// comes.
func TestHandshakesOnLoopsEndInTime(t *testing.T) {
	const head = time.Second
	limits := message.DefaultLimits()
	limits.Head = head
	f := onLoopsWithin(t, limits, exchangeFunc(func(x message.Exchange) { answer(x, http.StatusOK, "") }))
	hello := "\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" // the beginning of one
	for name, send := range map[string]func(c net.Conn){
		"silent":   func(net.Conn) {},
		"one byte": func(c net.Conn) { _, _ = io.WriteString(c, hello[:1]) },
		"late":     func(c net.Conn) { time.Sleep(head * 3 / 4); _, _ = io.WriteString(c, hello) },
		"drops": func(c net.Conn) {
			for i := range hello {
				_, _ = io.WriteString(c, hello[i:i+1])
				time.Sleep(head / 8)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c, err := net.Dial("tcp", f.secure.Addr().String())
			check0(t, err)
			defer c.Close()
			began := time.Now()
			go send(c)
			_ = c.SetReadDeadline(began.Add(patience))
			if n, err := c.Read(make([]byte, 1)); n > 0 || err == nil {
				t.Errorf("%d bytes, %v", n, err)
			}
			// Not the time of a machine that is busy, but less than twice as much.
			if took := time.Since(began); took < head || took > head*19/10 {
				t.Errorf("it ended after %s, want %s", took, head)
			}
		})
	}
	t.Run("a request right after the handshake", func(t *testing.T) {
		c, br := f.dial(true)
		defer c.Close()
		_, _ = io.WriteString(c, "GET / HTTP/1.1\r\nHost: blog.test\r\n\r\n")
		if resp, err := http.ReadResponse(br, nil); err != nil || resp.StatusCode != http.StatusOK {
			t.Errorf("%+v, %v", resp, err)
		}
	})
}

// An app of few places, whose instances come and go, fail to be reached and die
// amid answers, while requests are cut: whoever gets an answer gets the own one, and
// in the end nothing is counted.
func TestQueueOfParkedRequestsForgetsNobody(t *testing.T) {
	var turn, served atomic.Uint64
	back := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(io.Discard, r.Body)
		switch n := turn.Add(1); {
		case n%300 == 0:
			panic(http.ErrAbortHandler)
		case n%20 == 0:
			time.Sleep(5 * time.Millisecond)
		}
		_, _ = io.WriteString(w, r.URL.Query().Get("id"))
	}))
	t.Cleanup(back.Close)
	a := newApp("blog", newOutbox(nil))
	var dials atomic.Uint64
	set := func(rev uint64, ns ...uint32) {
		m := &wire.App{App: "blog", PlainHTTP: true, MaxInFlight: 3, Revision: rev}
		for _, n := range ns {
			m.Instances = append(m.Instances, wire.Upstream{Instance: tako.InstanceID{App: "blog", N: n}})
		}
		a.applied(a.change(m, false, func(ctx context.Context, _ tako.InstanceID) (net.Conn, error) {
			if dials.Add(1)%30 == 0 {
				return nil, io.ErrUnexpectedEOF
			}
			return new(net.Dialer).DialContext(ctx, "tcp", back.Listener.Addr().String())
		}), rev)
	}
	set(1, 1, 2)
	pattern, err := route.Parse("blog.test")
	check0(t, err)
	routes, err := (*route.Table[*app])(nil).With(nil, []route.Entry[*app]{{Pattern: pattern, Value: a}})
	check0(t, err)
	h := &handler{state: new(atomic.Pointer[state]), flights: newFlights(10_000), log: hclog.NewNullLogger()}
	h.state.Store(&state{routes: routes, httpsPort: 443})
	f := onLoops(t, h)
	t.Cleanup(a.close) // what is idle on the loops
	stop := make(chan struct{})
	var changes sync.WaitGroup
	changes.Go(func() {
		tick := time.NewTicker(20 * time.Millisecond)
		defer tick.Stop()
		for rev := uint64(2); ; rev++ {
			select {
			case <-stop:
				return
			case <-tick.C:
			}
			switch rev % 4 {
			case 0:
				h.flights.cut(false)
			case 1:
				set(rev, uint32(rev+10), 1) //nolint:gosec // a few
			default:
				set(rev, 1, 2)
			}
			a.traffic(time.Now())
		}
	})
	clients(32, func(w int, rnd *rand.Rand, more func() bool) {
		c, br := f.dial(w%3 == 0)
		if c == nil {
			return
		}
		defer c.Close()
		for k := range 1 + rnd.IntN(100) {
			if k > 0 && !more() {
				return
			}
			var all strings.Builder
			n := 1 + rnd.IntN(3) // at once
			for j := range n {
				if rnd.IntN(3) == 0 {
					fmt.Fprintf(&all, "POST /?id=w%dk%dj%d HTTP/1.1\r\nHost: blog.test\r\nContent-Length: 5\r\n\r\nhello", w, k, j)
				} else {
					fmt.Fprintf(&all, "GET /?id=w%dk%dj%d HTTP/1.1\r\nHost: blog.test\r\n\r\n", w, k, j)
				}
			}
			_, _ = io.WriteString(c, all.String())
			if rnd.IntN(100) == 0 {
				return
			}
			for j := range n {
				resp, err := http.ReadResponse(br, nil)
				if err != nil { // it was cut
					if ne, ok := errors.AsType[net.Error](err); ok && ne.Timeout() {
						t.Errorf("w%dk%dj%d: no answer", w, k, j)
					}
					return
				}
				b, err := io.ReadAll(resp.Body)
				if want := fmt.Sprintf("w%dk%dj%d", w, k, j); resp.StatusCode == http.StatusOK && err == nil {
					if served.Add(1); string(b) != want {
						t.Errorf("got %q, want %s", b, want)
					}
				}
				if resp.Close || err != nil {
					return
				}
			}
		}
	})
	close(stop)
	changes.Wait()
	f.until("nobody is connected", func() bool { return f.open.Load() == 0 })
	requests, streams := h.flights.count()
	if q, n := a.queued.Load(), a.active.Load(); q != 0 || n != 0 || requests != 0 || streams != 0 {
		t.Errorf("%d wait, %d active, %d requests, %d streams", q, n, requests, streams)
	}
	for id, i := range a.instances {
		if i.requests.Load() != 0 || i.uploads.Load() != 0 {
			t.Errorf("%s has %d requests, %d uploads", id, i.requests.Load(), i.uploads.Load())
		}
	}
	if served.Load() == 0 {
		t.Error("nobody was served")
	}
}
