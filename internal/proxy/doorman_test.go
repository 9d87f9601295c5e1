package proxy

import (
	"bufio"
	"context"
	"crypto/tls"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"

	"tako/internal/ipc"
	"tako/internal/proxy/message"
	"tako/internal/wire"
)

// servingOn starts a proxy that serves plain HTTP on l.
func servingOn(t testing.TB, l net.Listener) *master {
	t.Helper()
	t.Cleanup(func() { _ = l.Close() })
	f, err := l.(interface{ File() (*os.File, error) }).File()
	check0(t, err)
	defer f.Close()
	m := greeted(t)
	m.send(&wire.Listeners{Names: []string{wire.ListenerHTTP}}, ipc.FD(f.Fd()))
	m.send(&wire.ProxySettings{HTTPSPort: 443})
	m.send(&wire.Serve{})
	expect[*wire.Ready](m)
	return m
}

// seen is an instance that says who it takes its client for.
func seen(t testing.TB) wire.Upstream {
	return served(t, func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.WriteString(w, "for "+strings.Join(r.Header["X-Forwarded-For"], ","))
	})
}

func getFrom(t testing.TB, network, addr string) string {
	t.Helper()
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, network, addr)
	}}}
	resp, err := client.Get("http://blog.test/")
	return text(t, resp, err)
}

func TestListenerOnIPv6(t *testing.T) {
	l, err := new(net.ListenConfig).Listen(t.Context(), "tcp", "[::1]:0")
	if err != nil {
		t.Skipf("this host has no IPv6: %v", err)
	}
	m := servingOn(t, l)
	m.plainApp(seen(t))
	if got := getFrom(t, "tcp", l.Addr().String()); got != "for ::1" {
		t.Errorf("got %q", got)
	}
}

// Whoever can reach a Unix socket has no address: the app is told none, and
// nothing such a client says of itself is believed.
func TestListenerOnAUnixSocket(t *testing.T) {
	l, err := new(net.ListenConfig).Listen(t.Context(), "unix", filepath.Join(t.TempDir(), "s"))
	check0(t, err)
	m := servingOn(t, l)
	m.plainApp(seen(t))
	if got := getFrom(t, "unix", l.Addr().String()); got != "for " {
		t.Errorf("got %q", got)
	}
}

func TestConnectionsFitIntoTheLimitOfOpenFiles(t *testing.T) {
	for files, want := range map[uint64]int{
		0: 64, 256: 64, 383: 64, 384: 64, 1024: 384, 20_000: 9872, 131_328: 65_536, 1 << 20: 65_536, 1<<64 - 1: 65_536,
	} {
		if got := maxConnections(files); got != want {
			t.Errorf("%d open files: %d connections, want %d", files, got, want)
		}
	}
	if n := openFiles(); n < ReservedFiles {
		t.Errorf("%d open files here", n)
	}
}

func TestDoormanCountsClients(t *testing.T) {
	d := newDoorman(5, nil, hclog.NewNullLogger())
	d.perClient = 2
	key := func(ip string) netip.Addr { return clientKey(&net.TCPAddr{IP: net.ParseIP(ip)}) }
	a, b := key("2001:db8::1"), key("2001:db8:0:1::1")
	if a != key("2001:db8::ffff:2") || a == b || key("::ffff:10.0.0.1") != key("10.0.0.1") || key("10.0.0.1") == key("10.0.0.2") {
		t.Errorf("keys %s, %s", a, b)
	}
	for i, step := range []struct {
		key    netip.Addr
		exempt bool
		want   bool
	}{
		{a, false, true}, {a, false, true}, {a, false, false}, // one too many of a
		{b, false, true}, {a, true, true}, {a, true, true}, // exempt
		{b, false, false}, {a, true, false}, // too many in all
	} {
		if got := d.enter(step.key, step.exempt); got != step.want {
			t.Errorf("step %d: %t", i, got)
		}
	}
	d.leave(a, true)
	d.leave(a, false)
	if !d.enter(a, false) || d.enter(a, true) != true || d.enter(b, false) {
		t.Error("those who left are still counted")
	}
	for range 2 {
		d.leave(a, false)
		d.leave(a, true)
	}
	d.leave(b, false)
	if d.open != 0 || len(d.byClient) != 0 {
		t.Errorf("in the end %d open, %v", d.open, d.byClient)
	}
}

func TestOneConnectionTooManyIsClosedAtOnce(t *testing.T) {
	l, err := new(net.ListenConfig).Listen(t.Context(), "tcp", "127.0.0.1:0")
	check0(t, err)
	door := newDoorman(2, func(netip.Addr) bool { return false }, hclog.NewNullLogger())
	f := newNetHTTP(handlerFunc(func(x message.Exchange) { answer(x, 200, "") }), nil, door, message.DefaultLimits(), hclog.NewNullLogger())
	done := make(chan struct{})
	go func() {
		f.Serve(&listener{Listener: l})
		close(done)
	}()
	ask := func(c net.Conn) error {
		_, _ = io.WriteString(c, "GET / HTTP/1.1\r\nHost: a.test\r\n\r\n")
		check0(t, c.SetReadDeadline(time.Now().Add(patience)))
		_, err := http.ReadResponse(bufio.NewReader(c), nil)
		return err
	}
	dial := func() net.Conn {
		c, err := net.Dial("tcp", l.Addr().String())
		check0(t, err)
		t.Cleanup(func() { _ = c.Close() })
		return c
	}
	first, second := dial(), dial()
	check0(t, ask(first))
	check0(t, ask(second))
	if ask(dial()) == nil {
		t.Error("the third was answered")
	}
	check0(t, ask(first))
	_ = second.Close()
	for ask(dial()) != nil { // until its end was noticed
	}
	f.Close()
	_ = l.Close()
	<-done
	door.mu.Lock()
	defer door.mu.Unlock()
	if door.open != 0 {
		t.Errorf("%d connections are counted in the end", door.open)
	}
}

func TestRequestsAtOnceAreBounded(t *testing.T) {
	f := newFlights(1)
	a := newApp("blog", nil)
	fl := f.begin(a, &recorded{})
	if fl == nil {
		t.Fatal("the first is refused")
	}
	if other := f.begin(a, &recorded{}); other != nil {
		t.Error("a second one was let in")
	}
	fl.end()
	fl = f.begin(a, &recorded{})
	if fl == nil {
		t.Fatal("the next is refused")
	}
	fl.end()
}

func TestSessionsAreResumedForADay(t *testing.T) {
	for _, version := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
		m := serving(t)
		cert, _ := m.certificate("c", false, "blog.test")
		m.send(cert)
		m.plainApp(seen(t)) // behind it, the certificate is there
		conf := &tls.Config{ServerName: "blog.test", InsecureSkipVerify: true, MinVersion: version, MaxVersion: version, ClientSessionCache: tls.NewLRUClientSessionCache(1)}
		resumed := func() bool {
			c, err := tls.Dial("tcp", m.tls, conf)
			check0(t, err)
			defer c.Close()
			_, err = io.WriteString(c, "GET / HTTP/1.1\r\nHost: blog.test\r\n\r\n")
			check0(t, err)
			_, err = http.ReadResponse(bufio.NewReader(c), nil) // and the tickets before it
			check0(t, err)
			return c.ConnectionState().DidResume
		}
		if a, b, c := resumed(), resumed(), resumed(); a || !b || !c {
			t.Errorf("version %x: resumed %t, %t, %t", version, a, b, c)
		}
		session, _ := conf.ClientSessionCache.Get("blog.test")
		_, s, err := session.ResumptionState()
		check0(t, err)
		now := time.Now()
		for age, want := range map[time.Duration]bool{0: true, TicketLife - time.Minute: true, TicketLife + time.Minute: false, -time.Hour: false} {
			if got := fresh(s, now.Add(age)); got != want {
				t.Errorf("version %x, %s later: %t", version, age, got)
			}
		}
	}
}
