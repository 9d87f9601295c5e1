package h2

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/tls"
	"errors"
	"fmt"
	"hash"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	"tako/internal/proxy/message"
)

// world serves h to a client of net/http over TLS.
func world(t testing.TB, h func(x message.Exchange)) (client *http.Client, url string) {
	t.Helper()
	donor := httptest.NewTLSServer(http.NotFoundHandler())
	certs := donor.TLS.Certificates
	donor.Close()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	srv := &Server{Handler: handlerFunc(h)}
	var all sync.WaitGroup
	all.Go(func() {
		for {
			nc, err := l.Accept()
			if err != nil {
				return
			}
			all.Go(func() {
				c := tls.Server(nc, &tls.Config{Certificates: certs, NextProtos: []string{"h2"}})
				if err := c.HandshakeContext(t.Context()); err != nil {
					_ = nc.Close()
					return
				}
				srv.Serve(c, &message.Client{Secure: true})
			})
		}
	})
	tr := &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}, ForceAttemptHTTP2: true} //nolint:gosec // its own server
	t.Cleanup(func() {
		tr.CloseIdleConnections()
		_ = l.Close()
		srv.Close()
		all.Wait()
	})
	return &http.Client{Transport: tr}, "https://" + l.Addr().String()
}

func fetch(t testing.TB, client *http.Client, req *http.Request) (*http.Response, []byte) {
	t.Helper()
	resp, err := client.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp, b
}

// pump sends back the body, as it comes.
func pump(x message.Exchange) {
	if x.Begin(&message.Response{Status: 200, Length: message.Unknown, Fields: x.Request().Fields}) != nil {
		return
	}
	b := make([]byte, 64<<10)
	for {
		n, err := x.ReadBody(b)
		if n > 0 {
			if _, err := x.Write(b[:n]); err != nil {
				return
			}
			if x.Flush() != nil {
				return
			}
		}
		if err != nil {
			if errors.Is(err, io.EOF) {
				_ = x.End(x.Trailer())
			}
			return
		}
	}
}

// noise is a body of n bytes of which nothing is kept, and their sum.
type noise struct {
	n    int64
	next byte
	sum  hash.Hash
}

func (r *noise) Read(p []byte) (int, error) {
	if r.n == 0 {
		return 0, io.EOF
	}
	p = p[:min(int64(len(p)), r.n)]
	for i := range p {
		p[i] = r.next
		r.next = r.next*7 + 13
	}
	r.n -= int64(len(p))
	r.sum.Write(p)
	return len(p), nil
}

func TestClientsGetTheirBodiesBack(t *testing.T) {
	client, url := world(t, pump)
	var all sync.WaitGroup
	for i := range 40 {
		all.Go(func() {
			sent := &noise{n: int64(i) * 12007, sum: sha256.New()}
			req, _ := http.NewRequestWithContext(t.Context(), http.MethodPost, url+"/", sent)
			if i%2 == 0 {
				req.ContentLength = sent.n
			}
			req.Header.Set("X-Number", fmt.Sprint(i))
			req.Trailer = http.Header{"X-End": {"there"}}
			resp, err := client.Do(req)
			if err != nil {
				t.Error(err)
				return
			}
			defer resp.Body.Close()
			got := sha256.New()
			if _, err := io.Copy(got, resp.Body); err != nil {
				t.Error(err)
			}
			if !bytes.Equal(got.Sum(nil), sent.sum.Sum(nil)) || resp.Header.Get("X-Number") != fmt.Sprint(i) {
				t.Errorf("%d: another body came back", i)
			}
			if resp.Trailer.Get("X-End") != "there" {
				t.Errorf("%d: the trailer was %v", i, resp.Trailer)
			}
		})
	}
	all.Wait()
}

func TestClientMayTakeItsRequestBack(t *testing.T) {
	began, gone := make(chan struct{}, 1), make(chan struct{}, 1)
	client, url := world(t, func(x message.Exchange) {
		if string(x.Request().Target) == "/" {
			ok(x)
			return
		}
		w := make(watcher)
		x.Watch(w)
		began <- struct{}{}
		<-w
		gone <- struct{}{}
	})
	ctx, cancel := context.WithCancel(t.Context())
	go func() {
		<-began
		cancel()
	}()
	req, _ := http.NewRequestWithContext(ctx, http.MethodGet, url+"/wait", http.NoBody)
	if resp, err := client.Do(req); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v, %v", resp, err)
	}
	<-gone
	req, _ = http.NewRequestWithContext(t.Context(), http.MethodGet, url+"/", http.NoBody)
	fetch(t, client, req)
}

func TestAnswerInPiecesComesInPieces(t *testing.T) {
	more := make(chan struct{})
	client, url := world(t, func(x message.Exchange) {
		_ = x.Begin(&message.Response{Status: 200, Length: message.Unknown})
		for i := range 5 {
			_, _ = x.Write([]byte{'0' + byte(i)})
			_ = x.Flush()
			<-more
		}
		_ = x.End(nil)
	})
	req, _ := http.NewRequestWithContext(t.Context(), http.MethodGet, url, http.NoBody)
	resp, err := client.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	for i := range 5 {
		b := make([]byte, 10)
		n, err := resp.Body.Read(b)
		if n != 1 || b[0] != '0'+byte(i) || err != nil {
			t.Fatalf("got %q, %v", b[:n], err)
		}
		more <- struct{}{}
	}
	if b, err := io.ReadAll(resp.Body); len(b) != 0 || err != nil {
		t.Errorf("got %q, %v", b, err)
	}
}

func TestSlowClientGetsItAll(t *testing.T) {
	const n = 3 << 20
	client, url := world(t, func(x message.Exchange) { respond(x, strings.Repeat("a", n)) })
	req, _ := http.NewRequestWithContext(t.Context(), http.MethodGet, url, http.NoBody)
	resp, err := client.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	got := 0
	for b := make([]byte, 777); ; {
		k, err := resp.Body.Read(b)
		got += k
		if err != nil {
			if !errors.Is(err, io.EOF) {
				t.Error(err)
			}
			break
		}
	}
	if got != n || resp.ContentLength != n {
		t.Errorf("got %d of %d bytes", got, n)
	}
}

func TestAnswerThatIsCutIsAnErrorToClients(t *testing.T) {
	client, url := world(t, func(x message.Exchange) {
		_ = x.Begin(&message.Response{Status: 200, Length: message.Unknown})
		_, _ = x.Write([]byte("some"))
		_ = x.Flush()
		x.Abort()
	})
	req, _ := http.NewRequestWithContext(t.Context(), http.MethodGet, url, http.NoBody)
	resp, err := client.Do(req)
	if err != nil {
		return // it came with the reset
	}
	defer resp.Body.Close()
	if b, err := io.ReadAll(resp.Body); err == nil {
		t.Errorf("got %q as a whole", b)
	}
}

func TestLastAnswerReachesASlowClient(t *testing.T) {
	const n = 1 << 20
	srv := &Server{Limits: message.DefaultLimits(), Handler: handlerFunc(func(x message.Exchange) { respond(x, strings.Repeat("a", n)) })}
	srv.Limits.Linger = 10 * time.Millisecond
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	nc, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer nc.Close()
	_ = nc.(*net.TCPConn).SetReadBuffer(16 << 10) // all else stays with the server
	far, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	_ = far.(*net.TCPConn).SetWriteBuffer(2 * n)
	served := make(chan struct{})
	go func() {
		defer close(served)
		srv.Serve(far, &message.Client{})
	}()
	fr := http2.NewFramer(nc, nc)
	var block bytes.Buffer
	enc := hpack.NewEncoder(&block)
	for i, fields := 0, base("GET", "/"); i < len(fields); i += 2 {
		_ = enc.WriteField(hpack.HeaderField{Name: fields[i], Value: fields[i+1]})
	}
	_, _ = nc.Write([]byte(http2.ClientPreface))
	_ = fr.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: 1 << 30})
	_ = fr.WriteWindowUpdate(0, 1<<30)
	_ = fr.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: block.Bytes(), EndHeaders: true, EndStream: true})
	srv.Drain()
	parted := func() bool {
		for _, c := range srv.all() {
			c.mu.Lock()
			defer c.mu.Unlock()
			return c.parted
		}
		return true
	}
	for got, frames := 0, 0; ; frames++ {
		f, err := fr.ReadFrame()
		if err != nil {
			t.Fatalf("after %d of %d bytes: %v", got, n, err)
		}
		if f, ok := f.(*http2.PingFrame); ok && !f.IsAck() {
			_ = fr.WritePing(true, f.Data)
		}
		if f, ok := f.(*http2.DataFrame); ok {
			got += len(f.Data())
			if frames < 10 {
				for range 500 { // all is written, and more than the time to linger passes
					if time.Sleep(time.Millisecond); parted() {
						break
					}
				}
				time.Sleep(2 * srv.Limits.Linger)
			}
			_ = fr.WriteWindowUpdate(0, 1<<10)
			if f.StreamEnded() {
				if got != n {
					t.Errorf("got %d of %d bytes", got, n)
				}
				break
			}
		}
	}
	_ = nc.Close()
	<-served
	srv.Close()
}
