package proxy

import (
	"crypto/x509"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"testing"

	"tako/internal/tako"
	"tako/internal/wire"
)

// servedH2C is served for an instance that speaks HTTP/2 without TLS.
func servedH2C(t testing.TB, h http.HandlerFunc) wire.Upstream {
	t.Helper()
	path := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", path)
	check0(t, err)
	var h2c http.Protocols
	h2c.SetUnencryptedHTTP2(true)
	s := &httptest.Server{Listener: l, Config: &http.Server{Handler: h, Protocols: &h2c}}
	s.Start()
	t.Cleanup(s.Close)
	return wire.Upstream{Instance: nextID(), Socket: path, Protocol: wire.ProtocolH2C}
}

// A call streams in both directions at once, and ends with a status in the
// trailer, through both protocols of HTTP/2.
func TestGRPCPassesThrough(t *testing.T) {
	m := serving(t)
	cert, leaf := m.certificate("blog", true, "blog.test")
	m.send(cert)
	m.app(wire.App{Instances: []wire.Upstream{servedH2C(t, func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", r.Header.Get("Content-Type"))
		w.Header().Set("Trailer", "Grpc-Status")
		rc := http.NewResponseController(w)
		_ = rc.Flush()
		b := make([]byte, 100)
		for {
			n, err := r.Body.Read(b)
			_, _ = w.Write(b[:n])
			_ = rc.Flush()
			if err != nil {
				w.Header().Set("Grpc-Status", fmt.Sprintf("%s %s %v %s", r.Proto, r.Header.Get("Te"), err == io.EOF, r.Trailer.Get("X-Sum")))
				return
			}
		}
	})}})
	roots := x509.NewCertPool()
	roots.AddCert(leaf)
	pr, pw := io.Pipe()
	req, _ := http.NewRequestWithContext(t.Context(), http.MethodPost, "https://blog.test/pkg.Service/Method", pr)
	req.Header.Set("Content-Type", "application/grpc")
	req.Header.Set("Te", "trailers")
	req.Trailer = http.Header{"X-Sum": {"42"}} // net/http passes on only those that were announced
	go func() { _, _ = io.WriteString(pw, "one") }()
	resp, err := m.client(true, roots).Do(req)
	check0(t, err)
	defer resp.Body.Close()
	b := make([]byte, 100)
	for _, next := range []string{"two", "three", ""} {
		n, err := resp.Body.Read(b)
		check0(t, err)
		if n == 0 {
			t.Fatal("nothing came")
		}
		if next == "" {
			break
		}
		_, err = io.WriteString(pw, next)
		check0(t, err)
	}
	check0(t, pw.Close())
	_, err = io.ReadAll(resp.Body)
	check0(t, err)
	if got := resp.Trailer.Get("Grpc-Status"); resp.ProtoMajor != 2 || resp.Header.Get("Content-Type") != "application/grpc" || got != "HTTP/2.0 trailers true 42" {
		t.Errorf("%s, %v, trailer %q", resp.Proto, resp.Header, got)
	}
}

func TestH2CInstancesAnswerHTTP1(t *testing.T) {
	m := serving(t)
	m.plainApp(servedH2C(t, func(w http.ResponseWriter, r *http.Request) {
		b, _ := io.ReadAll(r.Body)
		fmt.Fprintf(w, "%s %s %s %s", r.Proto, r.Method, r.RequestURI, b)
	}))
	large := strings.Repeat("x", 300<<10)
	for _, body := range []string{"", "abc", large} {
		resp, err := m.client(false, nil).Post("http://blog.test//a%2f?b", "text/plain", strings.NewReader(body))
		if got := text(t, resp, err); got != "HTTP/2.0 POST //a%2f?b "+body {
			t.Errorf("got %.100s", got)
		}
	}
}

func TestInstanceOfAnUnknownProtocolIsRefused(t *testing.T) {
	m := &wire.App{App: "blog", Instances: []wire.Upstream{{Instance: tako.InstanceID{App: "blog", N: 1}, Protocol: "spdy"}}}
	if err := check(m); err == nil || !strings.Contains(err.Error(), "spdy") {
		t.Errorf("got %v", err)
	}
}
