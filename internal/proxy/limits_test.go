package proxy

import (
	"bufio"
	"io"
	"net"
	"net/http"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"

	"tako/internal/ipc"
	"tako/internal/proxy/message"
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
