package proxy

import (
	"bufio"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"

	"tako/internal/wire"
)

// announcing starts a proxy whose clients are announced.
func announcing(t *testing.T, engine wire.HTTPEngine, trusted ...string) *master {
	t.Helper()
	m := greeted(t)
	m.configure(trusted...)
	m.send(&wire.ProxySettings{HTTPSPort: 8443, TrustedProxies: trusted, ProxyProtocol: true, Engine: engine})
	m.send(&wire.Serve{})
	expect[*wire.Ready](m)
	m.plainApp(served(t, func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprintf(w, "%s for %s at %s", r.Header.Get("X-Forwarded-Proto"), r.Header.Get("X-Forwarded-For"), r.Header.Get("X-Forwarded-Host"))
	}))
	return m
}

// said sends these pieces to a listener, the last ones by TLS if roots are given,
// and returns the body of the answer.
func said(t *testing.T, addr string, roots *x509.CertPool, pieces ...string) (string, error) {
	t.Helper()
	c, err := net.Dial("tcp", addr)
	check0(t, err)
	defer c.Close()
	check0(t, c.SetDeadline(time.Now().Add(patience)))
	for _, p := range pieces {
		if _, err := io.WriteString(c, p); err != nil {
			return "", err
		}
	}
	if roots != nil {
		c = tls.Client(c, &tls.Config{RootCAs: roots, ServerName: "blog.test"})
	}
	if _, err := io.WriteString(c, "GET / HTTP/1.1\r\nHost: blog.test\r\nX-Forwarded-For: 192.0.2.99\r\nX-Forwarded-Host: theirs\r\nConnection: close\r\n\r\n"); err != nil {
		return "", err
	}
	resp, err := http.ReadResponse(bufio.NewReader(c), nil)
	if err != nil {
		return "", err
	}
	b, err := io.ReadAll(resp.Body)
	return string(b), err
}

func TestClientsAreThoseThatTheBalancerAnnounces(t *testing.T) {
	for _, engine := range []wire.HTTPEngine{wire.EngineTako, wire.EngineNetHTTP} {
		m := announcing(t, engine, "127.0.0.1/32")
		cert, leaf := m.certificate("blog", true, "blog.test")
		m.send(cert)
		roots := x509.NewCertPool()
		roots.AddCert(leaf)
		for _, test := range []struct {
			pieces []string
			want   string
		}{
			{[]string{"PROXY TCP4 198.51.100.7 192.0.2.1 4000 80\r\n"}, "198.51.100.7"},
			{[]string{"PROXY TCP6 2001:db8::1 2001:db8::2 4000 80\r\n"}, "2001:db8::1"},
			{[]string{"PROXY TC", "P4 198.51.100.7 192.0.2.1 4000 80\r", "\n"}, "198.51.100.7"},
			{[]string{"\r\n\r\n\x00\r\nQUIT\n\x21\x11\x00\x0c\xc6\x33\x64\x07\xc0\x00\x02\x01\x0f\xa0\x00\x50"}, "198.51.100.7"},
			{[]string{"\r\n\r\n\x00\r\nQUIT\n\x20\x00\x00\x00"}, "192.0.2.99, 127.0.0.1"}, // itself, which is trusted
			// Somebody else, of whom nothing is known: no word of theirs is believed.
			{[]string{"PROXY UNKNOWN\r\n"}, ""},
			{[]string{"\r\n\r\n\x00\r\nQUIT\n\x21\x00\x00\x00"}, ""},
			{[]string{"\r\n\r\n\x00\r\nQUIT\n\x21\x31\x00\xd8" + strings.Repeat("/", 216)}, ""},
		} {
			at := " at blog.test"
			if strings.Contains(test.want, "192.0.2.99") { // one who is believed
				at = " at theirs"
			}
			if got, err := said(t, m.plain, nil, test.pieces...); got != "http for "+test.want+at || err != nil {
				t.Errorf("%s: %q: %q, %v", engine, test.pieces, got, err)
			}
			if got, err := said(t, m.tls, roots, test.pieces...); got != "https for "+test.want+at || err != nil {
				t.Errorf("%s with TLS: %q: %q, %v", engine, test.pieces, got, err)
			}
		}
		for _, pieces := range [][]string{nil, {"PROXY TCP4 198.51.100.7\r\n"}, {"PROXY"}} {
			if got, err := said(t, m.plain, nil, pieces...); err == nil {
				t.Errorf("%s: %q: %q", engine, pieces, got)
			}
			if got, err := said(t, m.tls, roots, pieces...); err == nil {
				t.Errorf("%s with TLS: %q: %q", engine, pieces, got)
			}
		}
	}
}

func TestNobodyElseMayAnnounceClients(t *testing.T) {
	for _, engine := range []wire.HTTPEngine{wire.EngineTako, wire.EngineNetHTTP} {
		m := announcing(t, engine, "192.0.2.0/24")
		if got, err := said(t, m.plain, nil, "PROXY TCP4 198.51.100.7 192.0.2.1 4000 80\r\n"); err == nil {
			t.Errorf("%s: %q", engine, got)
		}
	}
}

func TestAnnouncementsAreNoneOfTheClientsOwn(t *testing.T) {
	m := serving(t, "127.0.0.1/32")
	m.plainApp(served(t, func(http.ResponseWriter, *http.Request) {}))
	resp := m.raw("PROXY TCP4 198.51.100.7 192.0.2.1 4000 80\r\n\r\n")
	if resp.StatusCode < 400 {
		t.Errorf("got %d", resp.StatusCode)
	}
}

func TestAnnouncedClientsAreCounted(t *testing.T) {
	balancer := netip.MustParseAddr("10.0.0.1")
	d := newDoorman(5, func(a netip.Addr) bool { return a == balancer }, hclog.NewNullLogger())
	d.perClient = 2
	client := netip.MustParseAddrPort("198.51.100.7:1")
	var seats []seat
	for i := range 3 {
		s, ok := d.admit(net.TCPAddrFromAddrPort(netip.AddrPortFrom(balancer, uint16(i))))
		if !ok {
			t.Fatal("the balancer is refused")
		}
		s, err := s.pass(client)
		if (err == nil) != (i < 2) || err != nil && !strings.Contains(err.Error(), "announced client") {
			t.Errorf("connection %d: %v", i, err)
		}
		seats = append(seats, s)
	}
	if d.open != 3 {
		t.Errorf("%d open", d.open)
	}
	for _, s := range seats {
		s.leave()
	}
	if d.open != 0 || len(d.byClient) != 0 {
		t.Errorf("%d open, by client %v", d.open, d.byClient)
	}
}
