package eventloop

import (
	"bytes"
	"errors"
	"net"
	"os"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// rawPair returns a Raw of l, and the other end.
func rawPair(t *testing.T, l *Loop) (*Raw, int) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	r, err := l.Raw(fds[0])
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close(); _ = syscall.Close(fds[1]) })
	return r, fds[1]
}

// receive reads a datagram.
func (r *Raw) receive() (got []byte, err error) {
	b := make([]byte, 100)
	n := 0
	e := r.Read(func(fd uintptr) bool {
		n, err = unix.Read(int(fd), b)
		return err != syscall.EAGAIN //nolint:errorlint // an Errno
	})
	return b[:max(n, 0)], errors.Join(e, err)
}

func TestRawIsReadByATaskAndWrittenByOthers(t *testing.T) {
	const size, most = 60_000, 100
	g := newGroup(t, 1)
	r, other := rawPair(t, g.loops[0])
	var got [][]byte
	reader := begin(g.loops[0], func(task *Task) {
		r.Own(task)
		for {
			b, err := r.receive()
			if err != nil || len(b) == 0 {
				return
			}
			got = append(got, b)
		}
	})
	until(t, r.c.rd.waits)
	// More than there is room for, until it is read.
	wrote := make(chan int, 1)
	go func() {
		n := 0
		for ; n < most; n++ {
			if err := r.Write(func(fd uintptr) bool {
				_, err := unix.Write(int(fd), bytes.Repeat([]byte{byte(n)}, size))
				return err != syscall.EAGAIN //nolint:errorlint // an Errno
			}); err != nil {
				break
			}
		}
		wrote <- n
	}()
	until(t, r.c.wr.waits)
	for _, s := range []string{"one", "two", "three"} {
		if _, err := unix.Write(other, []byte(s)); err != nil {
			t.Fatal(err)
		}
	}
	b := make([]byte, size+1)
	for i := range most {
		if n, err := unix.Read(other, b); err != nil || n != size || b[0] != byte(i) || b[size-1] != byte(i) {
			t.Fatalf("datagram %d: %d bytes of %d, %v", i, n, b[0], err)
		}
	}
	if n := await(t, wrote); n != most {
		t.Errorf("%d of %d datagrams were written", n, most)
	}
	_ = syscall.Shutdown(other, syscall.SHUT_WR)
	await(t, reader)
	if s := bytes.Join(got, []byte(" ")); string(s) != "one two three" {
		t.Errorf("got %q", s)
	}
}

func TestRawEndsItsWaitsByDeadlineAndClose(t *testing.T) {
	g := newGroup(t, 1)
	for name, is := range map[string]struct {
		end func(r *Raw)
		err error
	}{
		"deadline": {func(r *Raw) { _, _ = r.SetReadDeadline(past), r.SetWriteDeadline(past) }, os.ErrDeadlineExceeded},
		"close":    {func(r *Raw) { _ = r.Close() }, net.ErrClosed},
	} {
		r, _ := rawPair(t, g.loops[0])
		var rerr, werr error
		reader := begin(g.loops[0], func(task *Task) { r.Own(task); _, rerr = r.receive() })
		writer := make(chan struct{})
		go func() {
			defer close(writer)
			for werr == nil {
				werr = r.Write(func(fd uintptr) bool {
					_, err := unix.Write(int(fd), make([]byte, 10_000))
					return err != syscall.EAGAIN //nolint:errorlint // an Errno
				})
			}
		}()
		until(t, func() bool { return r.c.rd.waits() && r.c.wr.waits() })
		is.end(r)
		await(t, reader)
		await(t, writer)
		if !errors.Is(rerr, is.err) || !errors.Is(werr, is.err) {
			t.Errorf("%s: read %v, written %v", name, rerr, werr)
		}
		_ = r.SetReadDeadline(time.Time{})
		if name == "deadline" && r.Control(func(uintptr) {}) != nil {
			t.Errorf("%s: it is closed", name)
		}
	}
}

func TestSocketThatNoLoopTakesStaysItsOwners(t *testing.T) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer syscall.Close(fds[1])
	g := newGroup(t, 1)
	if _, err := (&Loop{group: g, ep: -1}).Raw(fds[0]); !errors.Is(err, syscall.EBADF) {
		t.Errorf("without epoll: %v", err)
	}
	if err := syscall.Close(fds[0]); err != nil {
		t.Errorf("it is not the owner's any more: %v", err)
	}
}
