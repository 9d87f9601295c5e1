package proxy

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"

	"tako/internal/ipc"
	"tako/internal/proxy/message"
	"tako/internal/wire"
)

func socketPair() (a, b ipc.FD, err error) {
	fds, err := syscall.Socketpair(syscall.AF_UNIX, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	return ipc.FD(fds[0]), ipc.FD(fds[1]), err
}

func TestLimitsOfTheFront(t *testing.T) {
	s := newNetHTTP(nil, nil, nil, message.DefaultLimits(), hclog.NewNullLogger()).server
	if s.ReadHeaderTimeout != 10*time.Second || s.IdleTimeout != 120*time.Second || s.MaxHeaderBytes != 28<<10 {
		t.Errorf("head %s, idle %s, %d bytes", s.ReadHeaderTimeout, s.IdleTimeout, s.MaxHeaderBytes)
	}
}

func TestHeadsBeyondTheLimitAreRefused(t *testing.T) {
	m := serving(t)
	for size, want := range map[int]int{message.MaxHead - 1000: http.StatusTemporaryRedirect, message.MaxHead + 8<<10: http.StatusRequestHeaderFieldsTooLarge} {
		c, err := net.Dial("tcp", m.plain)
		check0(t, err)
		_, err = io.WriteString(c, "GET / HTTP/1.1\r\nHost: a.test\r\nX: "+strings.Repeat("y", size)+"\r\n\r\n")
		check0(t, err)
		resp, err := http.ReadResponse(bufio.NewReader(c), nil)
		check0(t, err)
		if resp.StatusCode != want {
			t.Errorf("a head of %d bytes: %d, want %d", size, resp.StatusCode, want)
		}
		_ = c.Close()
	}
}

func TestBodiesOverTheLimitNeverReachTheAppAsShorterOnes(t *testing.T) {
	m := serving(t)
	var whole atomic.Int32 // requests that the app took for whole
	m.app(wire.App{PlainHTTP: true, MaxBody: 1024, Instances: []wire.Upstream{served(t, func(w http.ResponseWriter, r *http.Request) {
		b, err := io.ReadAll(r.Body)
		if err == nil {
			whole.Add(1)
		}
		fmt.Fprintf(w, "%d", len(b))
	})}})
	for size, want := range map[int]int{1024: http.StatusOK, 1025: http.StatusRequestEntityTooLarge, 3000: http.StatusRequestEntityTooLarge, 100_000: http.StatusRequestEntityTooLarge} {
		for framing, body := range map[string]string{
			fmt.Sprintf("Content-Length: %d", size): strings.Repeat("x", size),
			"Transfer-Encoding: chunked":            fmt.Sprintf("%x\r\n%s\r\n0\r\n\r\n", size, strings.Repeat("x", size)),
		} {
			whole.Store(0)
			resp := m.raw("POST / HTTP/1.1\r\nHost: blog.test\r\n" + framing + "\r\n\r\n" + body)
			if resp.StatusCode != want || (whole.Load() == 1) != (want == http.StatusOK) {
				t.Errorf("%d bytes by %s: %d, want %d; the app took %d for whole", size, framing, resp.StatusCode, want, whole.Load())
			}
		}
	}
}
