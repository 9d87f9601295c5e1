package upstream

import (
	"bufio"
	"context"
	"io"
	"net"
	"net/http"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// listening returns a pool for a Unix socket on which f handles each connection,
// numbered from 0, and closes it.
func listening(t testing.TB, f func(n int, c net.Conn, br *bufio.Reader)) (*Pool, *atomic.Int32) {
	t.Helper()
	return listeningOn(t, "unix", f)
}

// listeningOn is listening for "unix" or "tcp".
func listeningOn(t testing.TB, network string, f func(n int, c net.Conn, br *bufio.Reader)) (*Pool, *atomic.Int32) {
	t.Helper()
	address := "127.0.0.1:0"
	if network == "unix" {
		address = filepath.Join(t.TempDir(), "s")
	}
	l, err := net.Listen(network, address)
	if err != nil {
		t.Fatal(err)
	}
	var conns atomic.Int32
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			n := int(conns.Add(1)) - 1
			wg.Go(func() {
				defer c.Close()
				f(n, c, bufio.NewReader(c))
			})
		}
	})
	p := NewPool(func(ctx context.Context) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, network, l.Addr().String())
	})
	t.Cleanup(func() { p.Retire(); _ = l.Close(); wg.Wait() })
	return p, &conns
}

// next reads one request whole.
func next(br *bufio.Reader) (*http.Request, string, bool) {
	r, err := http.ReadRequest(br)
	if err != nil {
		return nil, "", false
	}
	b, err := io.ReadAll(r.Body)
	return r, string(b), err == nil
}

// piped is a pool whose connections are pipes, for time that is not real.
func piped(f func(c net.Conn)) *Pool {
	return NewPool(func(context.Context) (net.Conn, error) {
		a, b := net.Pipe()
		go f(b)
		return a, nil
	})
}

func answering(c net.Conn) {
	defer c.Close()
	for br := bufio.NewReader(c); ; {
		if _, _, ok := next(br); !ok {
			return
		}
		_, _ = io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
	}
}
