package eventloop

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// listen returns a listener of package net.
func listen(t *testing.T, network string) net.Listener {
	t.Helper()
	addr := "127.0.0.1:0"
	if network == "unix" {
		dir, err := os.MkdirTemp("", "loop") //nolint:usetesting // a name of the test's would be too long for a socket
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { os.RemoveAll(dir) })
		addr = filepath.Join(dir, "s")
	}
	ln, err := net.Listen(network, addr)
	if err != nil {
		t.Fatal(err)
	}
	if u, ok := ln.(*net.UnixListener); ok {
		u.SetUnlinkOnClose(false)
	}
	t.Cleanup(func() { ln.Close() })
	return ln
}

// listening is a Listener that serves until the end of the test.
type listening struct {
	*Listener
	served chan struct{}
}

// onLoops has the loops accept from ln.
func onLoops(t *testing.T, g *Group, ln net.Listener, take func(*Conn), trouble func(error) time.Duration) *listening {
	t.Helper()
	on, err := g.Listen(ln)
	if err != nil {
		t.Fatal(err)
	}
	if trouble == nil {
		trouble = func(err error) time.Duration { t.Error(err); return time.Millisecond }
	}
	l := &listening{on, make(chan struct{})}
	go func() { defer close(l.served); on.Serve(take, trouble) }()
	t.Cleanup(func() { l.Close(); await(t, l.served) })
	return l
}

func dial(t *testing.T, to net.Addr) net.Conn {
	t.Helper()
	c, err := net.Dial(to.Network(), to.String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

func TestListenerAcceptsOnItsLoops(t *testing.T) {
	each(t, func(t *testing.T, network string) {
		g := newGroup(t, 2)
		ln := listen(t, network)
		var remote sync.Map
		l := onLoops(t, g, ln, func(c *Conn) {
			remote.Store(c.RemoteAddr().String(), c.LocalAddr().String())
			if network == "tcp" {
				for name, o := range map[string][3]int{"nodelay": {unix.IPPROTO_TCP, unix.TCP_NODELAY, 1}, "keepalive": {unix.SOL_SOCKET, unix.SO_KEEPALIVE, 1}, "idle": {unix.IPPROTO_TCP, unix.TCP_KEEPIDLE, 15}} {
					if n, err := unix.GetsockoptInt(c.fd, o[0], o[1]); err != nil || n != o[2] {
						t.Errorf("%s: %d, %v", name, n, err)
					}
				}
			}
			c.Idle(&echo{c: c, closed: make(chan struct{})})
		}, nil)
		if l.Addr().String() != ln.Addr().String() {
			t.Errorf("it listens on %s, want %s", l.Addr(), ln.Addr())
		}
		for i := range 100 {
			c := dial(t, l.Addr())
			sent := noise(i, 3000)
			go func() { _, _ = c.Write(sent) }()
			same(t, readFull(t, c, len(sent)), sent)
			if network == "tcp" {
				if local, ok := remote.Load(c.LocalAddr().String()); !ok || local != c.RemoteAddr().String() {
					t.Errorf("the connection of %s is at %v, want %s", c.LocalAddr(), local, c.RemoteAddr())
				}
			}
			defer c.Close()
		}
		until(t, func() bool { return g.Conns() == 100 })
		// Neither has far more than the other.
		for i, l := range g.loops {
			other := g.loops[1-i].conns.Load()
			if n := l.conns.Load(); n > other+other/8+moreConns+1 {
				t.Errorf("a loop has %d connections, the other %d", n, other)
			}
		}
	})
}

func TestClosedListenerLeavesItsQueueToOthers(t *testing.T) {
	each(t, func(t *testing.T, network string) {
		g := newGroup(t, 2)
		ln := listen(t, network)
		f, err := ln.(interface{ File() (*os.File, error) }).File()
		if err != nil {
			t.Fatal(err)
		}
		other, err := net.FileListener(f)
		f.Close()
		if err != nil {
			t.Fatal(err)
		}
		defer other.Close()
		// Whoever connects is taken by the loops, or by the other.
		var taken atomic.Int64
		l := onLoops(t, g, ln, func(c *Conn) { taken.Add(1); _ = c.Close() }, nil)
		const storm = 300
		half := make(chan struct{})
		var clients sync.WaitGroup
		clients.Go(func() {
			for i := range storm {
				if i == storm/2 {
					close(half)
				}
				dial(t, other.Addr()).Close()
			}
		})
		await(t, half)
		until(t, func() bool { return taken.Load() > 0 })
		if err := l.Close(); err != nil {
			t.Error(err)
		}
		await(t, l.served)
		before := taken.Load()
		clients.Wait()
		for n := before; n < storm; n++ {
			if d, ok := other.(interface{ SetDeadline(time.Time) error }); ok {
				_ = d.SetDeadline(time.Now().Add(patience))
			}
			c, err := other.Accept()
			if err != nil {
				t.Fatalf("%d of %d connections have been accepted: %v", n, storm, err)
			}
			c.Close()
		}
		if n := taken.Load(); n != before {
			t.Errorf("%d were taken after Serve had returned", n-before)
		}
		for _, end := range l.ends {
			info, err := os.ReadFile(fmt.Sprintf("/proc/self/fdinfo/%d", end.loop.ep))
			if err != nil || regexp.MustCompile(fmt.Sprintf(`tfd: +%d `, end.fd)).Match(info) {
				t.Errorf("a loop hears of it still: %v\n%s", err, info)
			}
		}
		if err := l.Close(); err != nil {
			t.Errorf("closed again: %v", err)
		}
	})
}

// Of two that wait for the same socket the kernel tells one of a connection. If that
// one is just being closed it takes the connection all the same, since nobody tells
// the other.
func TestConnectionsAreNotLeftBetweenTwoListeners(t *testing.T) {
	const rounds = 100
	each(t, func(t *testing.T, network string) {
		first := listen(t, network)
		files, ok := first.(interface{ File() (*os.File, error) })
		if !ok {
			t.Fatalf("it is a %T", first)
		}
		again := func() net.Listener { // the socket once more
			f, err := files.File()
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			ln, err := net.FileListener(f)
			if err != nil {
				t.Fatal(err)
			}
			return ln
		}
		old, next := newGroup(t, 1), newGroup(t, 1)
		closes := func(c *Conn) { _ = c.Close() }
		stays := again()
		for range rounds {
			before := onLoops(t, old, again(), closes, nil)
			settle(t, old.loops[0]) // it sleeps by now, or soon
			after := onLoops(t, next, again(), closes, nil)
			settle(t, next.loops[0])
			c := dial(t, stays.Addr())
			if err := before.Close(); err != nil {
				t.Error(err)
			}
			_ = c.SetReadDeadline(time.Now().Add(5 * time.Second))
			if _, err := c.Read(make([]byte, 1)); err != io.EOF { //nolint:errorlint // connections return it bare
				t.Fatalf("nobody has taken the connection: %v", err)
			}
			await(t, before.served)
			_ = after.Close()
			await(t, after.served)
			_ = c.Close()
		}
		_ = stays.Close()
	})
}

func TestAListenerThatClosesAcceptsSoManyAtMost(t *testing.T) {
	const most, queued = 3, 10
	g := newGroup(t, 1)
	taken := 0
	l := onLoops(t, g, listen(t, "tcp"), func(c *Conn) { taken++; _ = c.Close() }, nil)
	if l.most != MaxLast || MaxLast != 65536 {
		t.Errorf("%d at most, want 65536", l.most)
	}
	l.most = most
	settle(t, g.loops[0])
	held, hold := make(chan struct{}), make(chan struct{})
	begin(g.loops[0], func(*Task) { close(held); <-hold }) // which stops the loop
	await(t, held)
	for range queued {
		dial(t, l.Addr())
	}
	if err := l.Close(); err != nil {
		t.Error(err)
	}
	close(hold)
	await(t, l.served)
	if taken != most {
		t.Errorf("%d of %d were taken, want %d", taken, queued, most)
	}
}

func TestConnectionThatSomebodyElseWasToldOfIsFound(t *testing.T) {
	g := newGroup(t, 2)
	ln := listen(t, "tcp")
	raw, err := ln.(*net.TCPListener).SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	var fd int
	e := raw.Control(func(own uintptr) { fd, err = unix.FcntlInt(own, unix.F_DUPFD_CLOEXEC, 3) })
	if err := errors.Join(e, err); err != nil {
		t.Fatal(err)
	}
	defer syscall.Close(fd)
	// Who is told and does not accept.
	ep, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.EpollCtl(ep, unix.EPOLL_CTL_ADD, fd, &unix.EpollEvent{Events: unix.EPOLLIN | unix.EPOLLET | unix.EPOLLEXCLUSIVE, Fd: int32(fd)}); err != nil {
		t.Fatal(err)
	}
	taken := make(chan struct{}, 1)
	l := onLoops(t, g, ln, func(c *Conn) { _ = c.Close(); taken <- struct{}{} }, nil)
	for _, l := range g.loops {
		settle(t, l)
	}
	told := make(chan struct{})
	go func() {
		defer close(told)
		var events [1]unix.EpollEvent
		for {
			if n, err := unix.EpollWait(ep, events[:], int(patience/time.Millisecond)); err != syscall.EINTR { //nolint:errorlint // an Errno
				if n != 1 {
					t.Errorf("%d events, %v", n, err)
				}
				return
			}
		}
	}()
	time.Sleep(20 * time.Millisecond) // it sleeps by then, or is told when it would
	dial(t, l.Addr())
	await(t, told)
	_ = syscall.Close(ep)
	select {
	case <-taken: // the kernel told more than one
		return
	case <-time.After(50 * time.Millisecond):
	}
	l.Look()
	await(t, taken)
}

func TestListenerWaitsOutTrouble(t *testing.T) {
	g := newGroup(t, 1)
	var limit syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}
	taken, told := make(chan struct{}), make(chan error, 1)
	l := onLoops(t, g, listen(t, "tcp"), func(c *Conn) { _ = c.Close(); close(taken) }, func(err error) time.Duration {
		if e := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &limit); e != nil {
			t.Error(e)
		}
		select {
		case told <- err:
		default:
		}
		return time.Millisecond
	})
	settle(t, g.loops[0])
	held, hold := make(chan struct{}), make(chan struct{})
	begin(g.loops[0], func(*Task) { close(held); <-hold }) // which stops the loop
	await(t, held)
	c := dial(t, l.Addr())
	free, err := unix.FcntlInt(0, unix.F_DUPFD_CLOEXEC, 3) // the least number that is free
	if err != nil {
		t.Fatal(err)
	}
	_ = syscall.Close(free)
	few := limit
	few.Cur = uint64(free)
	if err := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &few); err != nil {
		t.Fatal(err)
	}
	close(hold)
	if err := await(t, told); !errors.Is(err, syscall.EMFILE) {
		t.Errorf("told %v", err)
	}
	await(t, taken)
	if _, err := c.Read(make([]byte, 1)); err != io.EOF { //nolint:errorlint // connections return it bare
		t.Errorf("the connection: %v", err)
	}
}

func TestListenerThatNoLoopCanTakeStaysUsable(t *testing.T) {
	ln := listen(t, "tcp")
	for name, g := range map[string]*Group{
		"without loops": nil,
		"epoll fails":   {table: make([]atomic.Pointer[Conn], 1<<16), loops: []*Loop{{ep: -1}}},
	} {
		for _, l := range g.all() {
			l.group = g
		}
		before := descriptors(t, "socket")
		if on, err := g.Listen(ln); err == nil {
			t.Errorf("%s: it listens", name)
			_ = on.Close()
		}
		if n := descriptors(t, "socket"); n != before {
			t.Errorf("%s: %d sockets, %d before", name, n, before)
		}
	}
	dial(t, ln.Addr())
	c, err := ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	c.Close()
}

// all are the loops of a group that may be nil.
func (g *Group) all() []*Loop {
	if g == nil {
		return nil
	}
	return g.loops
}
