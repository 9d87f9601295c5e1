package eventloop

import (
	"bytes"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// patience bounds what must not last: it only turns a hang into a failure.
const patience = time.Minute

// past and future are deadlines that are over, and that no test lives to see.
var (
	past   = time.Unix(1, 0)
	future = time.Now().Add(time.Hour)
)

// networks are the kinds of sockets that a loop takes.
var networks = []string{"tcp", "unix"}

// starter is work as a function, which must not end the test: it is on a loop.
type starter func(t *Task)

func (f starter) Start(t *Task) { f(t) }

// newGroup starts loops that end with the test, by when they must have no
// connections.
func newGroup(tb testing.TB, loops int) *Group {
	tb.Helper()
	g, err := NewGroup(loops)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() {
		if err := g.Close(patience); err != nil || g.Conns() != 0 {
			tb.Errorf("the loops ended with %d connections: %v", g.Conns(), err)
		}
	})
	return g
}

// pair returns the two ends of a connection, which end with the test.
func pair(tb testing.TB, network string) (a, b net.Conn) {
	tb.Helper()
	if network == "unix" {
		fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
		if err != nil {
			tb.Fatal(err)
		}
		ends := [2]net.Conn{}
		for i, fd := range fds {
			f := os.NewFile(uintptr(fd), "socket")
			if ends[i], err = net.FileConn(f); err != nil {
				tb.Fatal(err)
			}
			f.Close()
		}
		a, b = ends[0], ends[1]
	} else {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			tb.Fatal(err)
		}
		defer l.Close()
		if a, err = net.Dial("tcp", l.Addr().String()); err != nil {
			tb.Fatal(err)
		}
		if b, err = l.Accept(); err != nil {
			tb.Fatal(err)
		}
	}
	tb.Cleanup(func() { a.Close(); b.Close() })
	for _, c := range []net.Conn{a, b} { // so that it is known what is too much for them
		sized := c.(interface {
			SetReadBuffer(bytes int) error
			SetWriteBuffer(bytes int) error
		})
		if err := errors.Join(sized.SetReadBuffer(128<<10), sized.SetWriteBuffer(128<<10)); err != nil {
			tb.Fatal(err)
		}
	}
	return a, b
}

// adopt makes c one of l's, until the end of the test at most.
func adopt(tb testing.TB, l *Loop, c net.Conn) *Conn {
	tb.Helper()
	on, err := l.Adopt(c)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { on.Close() })
	return on
}

// onLoop returns a connection of l and its other end.
func onLoop(tb testing.TB, l *Loop, network string) (*Conn, net.Conn) {
	tb.Helper()
	a, b := pair(tb, network)
	return adopt(tb, l, a), b
}

// begin starts work on l. What it returns is closed at its end.
func begin(l *Loop, work func(t *Task)) <-chan struct{} {
	done := make(chan struct{})
	l.post(job{begin: starter(func(t *Task) {
		defer close(done)
		work(t)
	})})
	return done
}

// await waits for c to be closed, or for what comes by it.
func await[T any](tb testing.TB, c <-chan T) T {
	tb.Helper()
	select {
	case v := <-c:
		return v
	case <-time.After(patience):
		buf := make([]byte, 1<<20)
		tb.Fatalf("nothing comes\n%s", buf[:runtime.Stack(buf, true)])
		panic("unreachable")
	}
}

// settle returns when l has done all that was to be done when it was called: what
// was posted, and what the kernel had told until then.
func settle(tb testing.TB, l *Loop) {
	tb.Helper()
	for range 3 {
		await(tb, begin(l, func(*Task) {}))
	}
}

// until waits for a state that no event tells of.
func until(tb testing.TB, is func() bool) {
	tb.Helper()
	for end := time.Now().Add(patience); !is(); time.Sleep(100 * time.Microsecond) {
		if time.Now().After(end) {
			tb.Fatal("what was waited for does not come about")
		}
	}
}

// waits reports whether somebody is parked on a side, on or off its loop.
func (s *side) waits() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.task != nil || s.sleep != nil
}

// noise returns n bytes, always the same for a seed.
func noise(seed, n int) []byte {
	b := make([]byte, n)
	r := rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8), 1})
	_, _ = r.Read(b)
	return b
}

// readFull reads n bytes from the other end of a connection.
func readFull(tb testing.TB, c net.Conn, n int) []byte {
	tb.Helper()
	b := make([]byte, n)
	_ = c.SetReadDeadline(time.Now().Add(patience))
	if got, err := io.ReadFull(c, b); err != nil {
		tb.Fatalf("read %d of %d bytes: %v", got, n, err)
	}
	return b
}

func write(tb testing.TB, c net.Conn, b []byte) {
	tb.Helper()
	if _, err := c.Write(b); err != nil {
		tb.Fatal(err)
	}
}

func same(tb testing.TB, got, want []byte) {
	tb.Helper()
	if bytes.Equal(got, want) {
		return
	}
	at := 0
	for at < min(len(got), len(want)) && got[at] == want[at] {
		at++
	}
	tb.Errorf("got %d bytes, want %d; they differ from byte %d on", len(got), len(want), at)
}

// descriptors returns how many there are of a kind: "socket" or "pipe".
func descriptors(tb testing.TB, kind string) (n int) {
	tb.Helper()
	fds, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		tb.Fatal(err)
	}
	for _, fd := range fds {
		if s, err := os.Readlink(filepath.Join("/proc/self/fd", fd.Name())); err == nil && strings.HasPrefix(s, kind+":") {
			n++
		}
	}
	return n
}

// sendBack has what comes go back, until the end, without a pipe.
func sendBack(c net.Conn) {
	for b := make([]byte, 16<<10); ; {
		n, err := c.Read(b)
		if err == nil {
			_, err = c.Write(b[:n])
		}
		if err != nil {
			return
		}
	}
}

// number returns a connection's descriptor.
func number(tb testing.TB, c *Conn) int {
	tb.Helper()
	n := -1
	if err := c.Control(func(fd uintptr) { n = int(fd) }); err != nil {
		tb.Fatal(err)
	}
	return n
}

// inode returns what a descriptor is of.
func inode(tb testing.TB, fd int) string {
	tb.Helper()
	s, err := os.Readlink(filepath.Join("/proc/self/fd", strconv.Itoa(fd)))
	if err != nil {
		tb.Fatal(err)
	}
	return s
}
