package proxy

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"
	"go.uber.org/goleak"

	"tako/internal/ipc"
	"tako/internal/proxy/message"
	"tako/internal/tako"
	"tako/internal/wire"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const patience = 10 * time.Second

// master plays tako-master, and the dialling end of tako-agent, for a proxy that
// runs in this process.
type master struct {
	t          testing.TB
	conn       *wire.Conn
	messages   chan wire.Message // what the proxy sends, Pong and Traffic apart
	traffic    chan *wire.Traffic
	pong       chan struct{}
	done       chan error // of Run
	stop       context.CancelFunc
	plain, tls string // addresses
	files      []ipc.FD
	shared     *master // whose listeners to use, or nil
	revision   uint64
	ports      sync.Map // instance → address on TCP
	keys       sync.Map // SHA-256 of the public key → *ecdsa.PrivateKey
	signs      chan wire.SignAlgorithm
}

func check0(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// quick are the limits of proxies here: a client that has gone is missed soon.
var quick = func() message.Limits {
	l := message.DefaultLimits()
	l.HalfOpen = 50 * time.Millisecond
	return l
}()

// greeted starts a proxy and exchanges greetings.
func greeted(t testing.TB) *master {
	t.Helper()
	ours, theirs, err := ipc.Pair()
	check0(t, err)
	ch, err := ipc.Open(theirs)
	check0(t, err)
	ctx, cancel := context.WithCancel(context.Background())
	m := &master{
		t: t, conn: wire.NewConn(ours, wire.LinkProxy, wire.Master), messages: make(chan wire.Message, 1000),
		traffic: make(chan *wire.Traffic, 1000), pong: make(chan struct{}, 10), done: make(chan error, 1), stop: cancel,
		signs: make(chan wire.SignAlgorithm, 100),
	}
	log := hclog.NewNullLogger()
	go func() { m.done <- Run(ctx, Config{Channel: ch, Version: "test", Limits: quick}, log) }()
	go func() {
		defer close(m.messages)
		for {
			msg, err := m.conn.Receive()
			if err != nil {
				return
			}
			switch b := msg.Body.(type) {
			case *wire.Traffic:
				m.traffic <- b
			case *wire.Pong:
				m.pong <- struct{}{}
			default:
				m.messages <- msg
			}
		}
	}()
	t.Cleanup(func() {
		cancel()
		select {
		case err := <-m.done:
			m.done <- err
		case <-time.After(patience):
			t.Error("Run does not return")
		}
		_ = m.conn.Close()
	})
	m.send(&wire.Hello{Protocol: wire.ProtocolVersion, Generation: 7})
	if h := expect[*wire.Hello](m); h.Generation != 7 || h.Version != "test" || h.PID == 0 {
		t.Fatalf("greeting %+v", h)
	}
	return m
}

// serving starts a proxy that serves, with these settings.
func serving(t testing.TB, trusted ...string) *master {
	t.Helper()
	m := greeted(t)
	m.configure(trusted...)
	m.send(&wire.Serve{})
	expect[*wire.Ready](m)
	return m
}

func (m *master) configure(trusted ...string) {
	m.t.Helper()
	var files []ipc.FD
	addr := func() string {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		check0(m.t, err)
		f, err := l.(*net.TCPListener).File()
		check0(m.t, err)
		m.t.Cleanup(func() { _ = l.Close(); _ = f.Close() })
		files = append(files, ipc.FD(f.Fd()))
		return l.Addr().String()
	}
	if m.shared != nil {
		m.plain, m.tls, files = m.shared.plain, m.shared.tls, m.shared.files
	} else {
		m.plain, m.tls = addr(), addr()
	}
	m.files = files
	m.send(&wire.Listeners{Names: []string{wire.ListenerHTTP, wire.ListenerHTTPS}}, files...)
	m.side(&wire.Signer{}, wire.LinkSigning, m.sign)
	m.side(&wire.Dialer{}, wire.LinkDialing, m.dial)
	m.send(&wire.ProxySettings{HTTPSPort: 8443, TrustedProxies: trusted})
	m.send(&wire.TicketKeys{Keys: [][]byte{make([]byte, 32)}})
}

// side hands over a socket and answers what is asked on it.
func (m *master) side(body any, link wire.Link, answer func(*wire.Conn, wire.Message)) {
	m.t.Helper()
	ours, theirs, err := ipc.Pair()
	check0(m.t, err)
	role := wire.Master
	if link == wire.LinkDialing {
		role = wire.Agent
	}
	conn := wire.NewConn(ours, link, role)
	m.t.Cleanup(func() { _ = conn.Close() })
	m.send(body, theirs)
	theirs.Close()
	go func() {
		for {
			msg, err := conn.Receive()
			if err != nil {
				return
			}
			answer(conn, msg)
		}
	}()
}

func (m *master) sign(conn *wire.Conn, msg wire.Message) {
	s := msg.Body.(*wire.Sign)
	key, ok := m.keys.Load(string(s.Key))
	if !ok {
		_ = conn.ReplyError(msg.ID, tako.Errorf(tako.CodeNotFound, "no such key"))
		return
	}
	sig, err := key.(*ecdsa.PrivateKey).Sign(rand.Reader, s.Digest, crypto.SHA256)
	if err != nil {
		_ = conn.ReplyError(msg.ID, err)
		return
	}
	m.signs <- s.Algorithm
	_ = conn.Reply(msg.ID, &wire.Signed{Signature: sig})
}

func (m *master) dial(conn *wire.Conn, msg wire.Message) {
	addr, ok := m.ports.Load(msg.Body.(*wire.Dial).Instance)
	if !ok {
		_ = conn.ReplyError(msg.ID, tako.Errorf(tako.CodeFailed, "refused"))
		return
	}
	c, err := net.Dial("tcp", addr.(string))
	if err != nil {
		_ = conn.ReplyError(msg.ID, err)
		return
	}
	f, err := c.(*net.TCPConn).File()
	if err == nil {
		_ = conn.Reply(msg.ID, &wire.Dialed{}, ipc.FD(f.Fd()))
		_ = f.Close()
	}
	_ = c.Close()
}

func (m *master) send(body any, files ...ipc.FD) {
	m.t.Helper()
	check0(m.t, m.conn.Send(0, body, files...))
}

// expect waits for the next message, which must be a T.
func expect[T any](m *master) T {
	m.t.Helper()
	select {
	case msg, ok := <-m.messages:
		if b, is := msg.Body.(T); is {
			return b
		}
		m.t.Fatalf("got %T %+v (channel open: %t), want %T", msg.Body, msg.Body, ok, *new(T))
	case <-time.After(patience):
		m.t.Fatalf("no %T came", *new(T))
	}
	panic("not reached")
}

// app sends a revision and waits for Applied.
func (m *master) app(a wire.App) uint64 {
	m.t.Helper()
	m.revision++
	a.Revision = m.revision
	if a.App == "" {
		a.App = "blog"
	}
	if a.Routes == nil {
		a.Routes = []string{"blog.test"}
	}
	m.send(&a)
	if got := expect[*wire.Applied](m); got.App != a.App || got.Revision != a.Revision {
		m.t.Fatalf("applied %+v, want %s revision %d", got, a.App, a.Revision)
	}
	return a.Revision
}

// plainApp is an app on plain HTTP with these instances.
func (m *master) plainApp(instances ...wire.Upstream) uint64 {
	m.t.Helper()
	return m.app(wire.App{PlainHTTP: true, Instances: instances})
}

var lastInstance uint32

func nextID() tako.InstanceID {
	lastInstance++
	return tako.InstanceID{App: "blog", N: lastInstance}
}

// served serves h on a Unix socket.
func served(t testing.TB, h http.HandlerFunc) wire.Upstream {
	t.Helper()
	path := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", path)
	check0(t, err)
	s := &httptest.Server{Listener: l, Config: &http.Server{Handler: h}}
	s.Start()
	t.Cleanup(s.Close)
	return wire.Upstream{Instance: nextID(), Socket: path}
}

// rawInstance has f answer each connection on a Unix socket.
func rawInstance(t testing.TB, f func(n int, c net.Conn)) wire.Upstream {
	t.Helper()
	path := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", path)
	check0(t, err)
	var wg sync.WaitGroup
	wg.Go(func() {
		for n := 0; ; n++ {
			c, err := l.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				defer c.Close()
				f(n, c)
			})
		}
	})
	t.Cleanup(func() { _ = l.Close(); wg.Wait() })
	return wire.Upstream{Instance: nextID(), Socket: path}
}

// client speaks with the proxy at addr, whatever the host of a URL is.
func (m *master) client(h2 bool, roots *x509.CertPool) *http.Client {
	tr := &http.Transport{
		DialContext: func(ctx context.Context, _, addr string) (net.Conn, error) {
			to := m.plain
			if _, port, _ := net.SplitHostPort(addr); port == "443" {
				to = m.tls
			}
			return new(net.Dialer).DialContext(ctx, "tcp", to)
		},
		TLSClientConfig: &tls.Config{RootCAs: roots}, ForceAttemptHTTP2: h2, DisableCompression: true,
	}
	m.t.Cleanup(tr.CloseIdleConnections)
	return &http.Client{Transport: tr, Timeout: 2 * patience, CheckRedirect: func(*http.Request, []*http.Request) error {
		return http.ErrUseLastResponse
	}}
}

// certificate makes a self-signed certificate, and the message about it.
func (m *master) certificate(id string, fallback bool, names ...string) (*wire.Certificate, *x509.Certificate) {
	m.t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	check0(m.t, err)
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: id}, DNSNames: names, IsCA: true, BasicConstraintsValid: true,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	check0(m.t, err)
	leaf, err := x509.ParseCertificate(der)
	check0(m.t, err)
	spki := sha256.Sum256(leaf.RawSubjectPublicKeyInfo)
	m.keys.Store(string(spki[:]), key)
	return &wire.Certificate{ID: id, Names: names, Chain: [][]byte{der}, Fallback: fallback}, leaf
}

// ended waits for Run.
func (m *master) ended() error {
	m.t.Helper()
	select {
	case err := <-m.done:
		m.done <- err
		return err
	case <-time.After(patience):
		m.t.Fatal("Run does not return")
		return errors.New("not reached")
	}
}
