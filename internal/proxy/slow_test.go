package proxy

import (
	"bufio"
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"net/netip"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/go-hclog"

	"tako/internal/ipc"
	"tako/internal/proxy/message"
	"tako/internal/proxy/upstream"
	"tako/internal/route"
	"tako/internal/tako"
	"tako/internal/wire"
)

// pipes is a listener of connections that are in this process alone, for tests
// in a time of their own.
type pipes struct {
	conns chan net.Conn
	done  chan struct{}
}

func newPipes() *pipes { return &pipes{make(chan net.Conn), make(chan struct{})} }

func (p *pipes) dial() net.Conn {
	ours, theirs := net.Pipe()
	p.conns <- theirs
	return ours
}

func (p *pipes) Accept() (net.Conn, error) {
	select {
	case c := <-p.conns:
		return c, nil
	case <-p.done:
		return nil, net.ErrClosed
	}
}

var limits = message.DefaultLimits()

func (p *pipes) Close() error   { close(p.done); return nil }
func (p *pipes) Addr() net.Addr { return &net.UnixAddr{} }

// piped has an app of one instance, which does h, served by the front, and
// returns a connection of a client with it. It is for a bubble of synctest.
func piped(t testing.TB, h http.HandlerFunc) net.Conn {
	t.Helper()
	instances := newPipes()
	instance := &http.Server{Handler: h}
	go instance.Serve(instances)
	out := newOutbox(nil)
	a := newApp("blog", out)
	a.change(&wire.App{
		App: "blog", PlainHTTP: true, Instances: []wire.Upstream{{Instance: tako.InstanceID{App: "blog", N: 1}}},
	}, false, func(context.Context, tako.InstanceID) (net.Conn, error) { return instances.dial(), nil })
	pattern, err := route.Parse("blog.test")
	check0(t, err)
	routes, err := (*route.Table[*app])(nil).With(nil, []route.Entry[*app]{{Pattern: pattern, Value: a}})
	check0(t, err)
	log := hclog.NewNullLogger()
	hd := &handler{state: &atomic.Pointer[state]{}, flights: newFlights(10), log: log}
	hd.state.Store(&state{routes: routes, httpsPort: 443})
	f := newOwn(hd, nil, newDoorman(10, func(netip.Addr) bool { return false }, log), message.DefaultLimits(), log)
	clients := newPipes()
	go f.Serve(&listener{Listener: clients})
	c := clients.dial()
	t.Cleanup(func() {
		_ = c.Close()
		_ = clients.Close()
		f.Close()
		_ = instance.Close()
		a.close()
		synctest.Wait()
	})
	return c
}

func TestUploadThatStopsIsEnded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := piped(t, func(_ http.ResponseWriter, r *http.Request) { _, _ = io.Copy(io.Discard, r.Body) })
		began := time.Now()
		_, err := io.WriteString(c, "POST / HTTP/1.1\r\nHost: blog.test\r\nContent-Length: 9\r\n\r\nabc")
		check0(t, err)
		time.Sleep(limits.Body - time.Second) // then it is below the least rate too
		_, err = io.WriteString(c, "def")     // as late as may be
		check0(t, err)
		resp, err := http.ReadResponse(bufio.NewReader(c), nil)
		check0(t, err)
		if took := time.Since(began); resp.StatusCode != http.StatusRequestTimeout || took < limits.Body || took > 2*limits.Body {
			t.Errorf("got %d after %s", resp.StatusCode, took)
		}
	})
}

func TestClientThatStopsReadingIsLeft(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		left := make(chan time.Duration, 1)
		began := time.Now()
		c := piped(t, func(w http.ResponseWriter, _ *http.Request) {
			for {
				if _, err := w.Write(make([]byte, 64<<10)); err != nil {
					left <- time.Since(began)
					return
				}
			}
		})
		_, err := io.WriteString(c, "GET / HTTP/1.1\r\nHost: blog.test\r\n\r\n")
		check0(t, err)
		if _, err := http.ReadResponse(bufio.NewReader(c), nil); err != nil {
			t.Fatal(err)
		}
		if took := <-left; took < limits.Write || took > limits.Write+deadlineSlack {
			t.Errorf("left after %s", took)
		}
	})
}

func TestClientThatReadsSlowlyIsServed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const size = 256 << 10
		c := piped(t, func(w http.ResponseWriter, _ *http.Request) {
			_, _ = w.Write(make([]byte, size))
		})
		_, err := io.WriteString(c, "GET / HTTP/1.1\r\nHost: blog.test\r\n\r\n")
		check0(t, err)
		resp, err := http.ReadResponse(bufio.NewReaderSize(c, 4<<10), nil)
		check0(t, err)
		read := int64(0)
		for {
			n, err := io.CopyN(io.Discard, resp.Body, 16<<10)
			read += n
			if errors.Is(err, io.EOF) {
				break
			}
			check0(t, err)
			time.Sleep(limits.Write / 8)
		}
		if read != size {
			t.Errorf("%d bytes came", read)
		}
	})
}

// An instance that accepts and then says nothing is passed by after EjectAfter
// errors; what may be repeated goes to the other one meanwhile.
func TestInstanceThatDropsRequestsIsPassedBy(t *testing.T) {
	m := serving(t)
	var drops atomic.Int32
	dropping := rawInstance(t, func(_ int, c net.Conn) {
		if _, err := http.ReadRequest(bufio.NewReader(c)); err == nil {
			drops.Add(1)
		}
	})
	m.plainApp(served(t, func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "good") }), dropping)
	client := m.client(false, nil)
	for range 40 {
		resp, err := client.Get("http://blog.test/")
		if got := text(t, resp, err); got != "good" {
			t.Fatalf("got %d %q", resp.StatusCode, got)
		}
	}
	if got := drops.Load(); got != EjectAfter {
		t.Errorf("%d requests were dropped, want %d", got, EjectAfter)
	}
}

// What may not be sent twice fails, and no more than EjectAfter of it.
func TestLostRequestsThatMayNotBeRepeatedFail(t *testing.T) {
	m := serving(t)
	m.plainApp(served(t, func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "good") }),
		rawInstance(t, func(_ int, c net.Conn) { _, _ = http.ReadRequest(bufio.NewReader(c)) }))
	client := m.client(false, nil)
	failed := 0
	for range 40 {
		resp, err := client.Post("http://blog.test/", "text/plain", strings.NewReader("x"))
		if got := text(t, resp, err); resp.StatusCode != 200 {
			failed++
			if resp.StatusCode != 502 || got != "Bad Gateway" {
				t.Errorf("got %d %q", resp.StatusCode, got)
			}
		}
	}
	if failed != EjectAfter {
		t.Errorf("%d failed, want %d", failed, EjectAfter)
	}
}

// A request that every instance dies of goes to two of them and no more.
func TestRequestThatKillsDoesNotGoAround(t *testing.T) {
	m := serving(t)
	var deaths atomic.Int32
	var ups []wire.Upstream
	for range 5 {
		ups = append(ups, rawInstance(t, func(_ int, c net.Conn) {
			if _, err := http.ReadRequest(bufio.NewReader(c)); err == nil {
				deaths.Add(1)
			}
		}))
	}
	m.plainApp(ups...)
	if resp := m.raw("GET / HTTP/1.1\r\nHost: blog.test\r\n\r\n"); resp.StatusCode != 502 || deaths.Load() != 2 {
		t.Errorf("got %d after %d instances", resp.StatusCode, deaths.Load())
	}
}

func TestFullQueueOfAUnixSocketIsWaitedFor(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	fd, err := syscall.Socket(syscall.AF_UNIX, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	check0(t, err)
	defer ipc.FD(fd).Close()
	check0(t, syscall.Bind(fd, &syscall.SockaddrUnix{Name: path}))
	check0(t, syscall.Listen(fd, 0))
	for { // until it is full
		c, err := new(net.Dialer).DialContext(t.Context(), "unix", path)
		if errors.Is(err, syscall.EAGAIN) {
			break
		}
		check0(t, err)
		defer c.Close()
	}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := dialUnix(ctx, path); !errors.Is(err, syscall.EAGAIN) && !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("while nobody accepts: %v", err)
	}
	done := make(chan error, 1)
	go func() {
		c, err := dialUnix(t.Context(), path)
		if err == nil {
			_ = c.Close()
		}
		done <- err
	}()
	accepted, _, err := syscall.Accept(fd)
	check0(t, err)
	defer ipc.FD(accepted).Close()
	check0(t, <-done)
}

// A call that streams in both directions may be silent for as long as it likes;
// what only says that it is one may not.
func TestOnlyCallsThatStreamMayPause(t *testing.T) {
	const grpc = "application/grpc+proto"
	for _, test := range []struct {
		name             string
		major            uint8
		asked, answered  string
		h2c, unsent, may bool
	}{
		{"a call", 2, grpc, grpc, true, true, true},
		{"in capitals", 2, "Application/GRPC", grpc, true, true, true},
		{"over HTTP/1", 1, grpc, grpc, true, true, false},
		{"to an instance of HTTP/1", 2, grpc, grpc, false, true, false},
		{"of another kind", 2, "text/plain", grpc, true, true, false},
		{"of no kind", 2, "", grpc, true, true, false},
		{"answered by a page", 2, grpc, "text/html", true, true, false},
		{"that was sent whole", 2, grpc, grpc, true, false, false},
	} {
		r := &message.Request{Major: test.major, Fields: []message.Field{field("Content-Type", test.asked)}}
		in := &upstream.Incoming{Unsent: test.unsent, Response: message.Response{Fields: []message.Field{field("Content-Type", test.answered)}}}
		if got := streams(r, in, &instance{h2c: test.h2c}); got != test.may {
			t.Errorf("%s: %t", test.name, got)
		}
	}
}
