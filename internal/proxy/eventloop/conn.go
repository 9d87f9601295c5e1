package eventloop

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// A Conn is a stream socket of a loop: a net.Conn, and more. Reading is one
// goroutine's at a time, and so is writing; all else is anybody's.
type Conn struct {
	fd            int
	loop          *Loop    // guarded by both mu
	gen           int32    // guarded by both mu: of its being in loop, unlike any other's for long
	stream        bool     // of TCP: a short read has emptied it
	listens       bool     // others have the same socket
	last          bool     // guarded by the mu of rd, of one that listens: what is queued is accepted, no more
	more          int      // guarded by the mu of rd: how many then
	apart         bool     // it is a Raw, whose owner does not write
	local, remote net.Addr // local is nil until it is asked for
	owner         *Task    // whose reads and writes park it while it is attached

	rd, wr side // the mu of rd is locked first
}

// side is one direction. Its mu is held during system calls, which never block, so
// that a descriptor is not closed under them.
type side struct {
	mu      sync.Mutex
	closed  bool
	expired bool // the deadline is over
	note    bool // it became ready, and nobody waited
	dry     bool // of rd: it was empty when last looked at, and nothing has come since
	ended   bool // of rd: the other end has sent its last
	want    bool // of wr: somebody waits for room, or will
	armed   int  // counts deadlines
	timer   *time.Timer

	// Who waits: one of them, or nobody.
	task  *Task
	begin Starter
	sleep chan struct{} // has room for one
}

// errNoSocket: a connection is none that a loop can take.
var errNoSocket = errors.New("not a socket")

// Adopt makes c, a connection of package net, one of the loop. Without an error c
// is closed, and what was the same socket goes on in the Conn; with one it is as it
// was. Nobody uses c meanwhile.
func (l *Loop) Adopt(c net.Conn) (*Conn, error) {
	sc, ok := c.(syscall.Conn)
	if !ok {
		return nil, errNoSocket
	}
	raw, err := sc.SyscallConn()
	if err != nil {
		return nil, err
	}
	fd := -1
	if e := raw.Control(func(old uintptr) { fd, err = unix.FcntlInt(old, unix.F_DUPFD_CLOEXEC, 3) }); e != nil {
		err = e
	}
	if err != nil {
		return nil, fmt.Errorf("a descriptor for a loop: %w", err)
	}
	_, stream := c.(*net.TCPConn)
	n := &Conn{fd: fd, stream: stream, local: c.LocalAddr(), remote: c.RemoteAddr()}
	if err := n.join(l, connEvents); err != nil {
		return nil, errors.Join(err, syscall.Close(fd))
	}
	_ = c.Close() // its descriptor alone
	return n, nil
}

// connEvents are what a connection is told of: what changes, once.
const connEvents = unix.EPOLLIN | unix.EPOLLOUT | unix.EPOLLRDHUP | unix.EPOLLET

// join registers c, which is in no loop. The kernel tells at once what is there to
// be read.
func (c *Conn) join(l *Loop, events uint32) error {
	if c.fd >= len(l.group.table) {
		return fmt.Errorf("descriptor %d is larger than a loop takes", c.fd)
	}
	c.loop, c.gen, c.rd.dry = l, l.group.gen.Add(1), c.stream
	l.group.table[c.fd].Store(c)
	ev := unix.EpollEvent{Events: events, Fd: int32(c.fd), Pad: c.gen} //nolint:gosec // a descriptor
	if err := unix.EpollCtl(l.ep, unix.EPOLL_CTL_ADD, c.fd, &ev); err != nil {
		l.group.table[c.fd].Store(nil)
		return fmt.Errorf("a connection in epoll: %w", err)
	}
	if !c.listens {
		l.conns.Add(1)
	}
	return nil
}

// Move makes c, which nobody waits for, one of another loop. With an error it is of
// no use but to be closed.
func (c *Conn) Move(to *Loop) error {
	c.rd.mu.Lock()
	defer c.rd.mu.Unlock()
	c.wr.mu.Lock()
	defer c.wr.mu.Unlock()
	if c.rd.closed {
		return net.ErrClosed
	}
	if c.loop == to {
		return nil
	}
	if err := unix.EpollCtl(c.loop.ep, unix.EPOLL_CTL_DEL, c.fd, nil); err != nil {
		return fmt.Errorf("a connection out of epoll: %w", err)
	}
	c.loop.conns.Add(-1)
	if err := c.join(to, connEvents); err != nil {
		to.conns.Add(1) // Close takes one off
		return err
	}
	return nil
}

// Loop returns the loop that c is in.
func (c *Conn) Loop() *Loop {
	c.rd.mu.Lock()
	defer c.rd.mu.Unlock()
	return c.loop
}

// Own says whose reads and writes park a task: t's, nobody's if it is nil. It is
// called by the one who reads and writes.
func (c *Conn) Own(t *Task) { c.owner = t }

// Idle leaves c, which nobody reads or writes, until there is something to read:
// then s begins. The caller no more uses c, or anything that s may use.
func (c *Conn) Idle(s Starter) {
	c.owner = nil
	c.rd.mu.Lock()
	if !c.rd.readyLocked() {
		c.rd.begin = s
		c.rd.mu.Unlock()
		return
	}
	c.rd.note = false
	l := c.loop
	c.rd.mu.Unlock()
	l.post(job{begin: s})
}

// readyLocked reports whether a reader need not wait.
func (s *side) readyLocked() bool {
	return !s.dry || s.ended || s.closed || s.expired // a note is of what has been seen since
}

// happened is what the epoll instance of l says, on its goroutine. An event may be
// of the connection that had the descriptor before, or of c in another loop: the
// kernel had told it when that ended.
func (c *Conn) happened(l *Loop, events uint32, gen int32) {
	if events&(unix.EPOLLIN|unix.EPOLLRDHUP|unix.EPOLLHUP|unix.EPOLLERR) != 0 {
		c.rd.mu.Lock()
		if c.gen != gen {
			c.rd.mu.Unlock()
			return
		}
		c.rd.dry = false
		c.rd.ended = c.rd.ended || events&(unix.EPOLLRDHUP|unix.EPOLLHUP|unix.EPOLLERR) != 0
		j, sleep := c.rd.awakeLocked()
		c.rd.mu.Unlock()
		l.now(j, sleep)
	}
	if events&(unix.EPOLLOUT|unix.EPOLLHUP|unix.EPOLLERR) != 0 {
		c.wr.mu.Lock()
		var j job
		var sleep chan struct{}
		if c.wr.want && c.gen == gen {
			c.wr.want = false
			j, sleep = c.wr.awakeLocked()
		}
		c.wr.mu.Unlock()
		l.now(j, sleep)
	}
}

// awakeLocked takes who waits, or makes a note for who will.
func (s *side) awakeLocked() (job, chan struct{}) {
	j, sleep := job{s.task, s.begin}, s.sleep
	s.note = j == job{} && sleep == nil
	s.task, s.begin, s.sleep = nil, nil, nil
	return j, sleep
}

// now goes on with who has waited, on the loop's goroutine.
func (l *Loop) now(j job, sleep chan struct{}) {
	switch {
	case j.task != nil && j.task.loop == l:
		l.resume(j.task)
	case j.task != nil:
		j.task.Wake()
	case j.begin != nil:
		l.begin(j.begin)
	case sleep != nil:
		sleep <- struct{}{}
	}
}

// rouse is awakeLocked and what follows from anywhere.
func (c *Conn) rouse(s *side) {
	j, sleep := s.awakeLocked()
	switch {
	case j.task != nil:
		j.task.Wake()
	case j.begin != nil:
		c.loop.post(j)
	case sleep != nil:
		sleep <- struct{}{}
	}
}

// failedLocked is why nothing goes in this direction any more.
func (s *side) failedLocked() error {
	switch {
	case s.closed:
		return net.ErrClosed
	case s.expired:
		return os.ErrDeadlineExceeded
	}
	return nil
}

// waitLocked returns when something has happened since the last look, or the side
// has failed. It unlocks meanwhile.
func (c *Conn) waitLocked(s *side) {
	if s.note || s.closed || s.expired {
		s.note = false
		return
	}
	var t *Task
	if !c.apart || s == &c.rd {
		t = c.owner
	}
	if t.Attached() {
		s.task = t
		s.mu.Unlock()
		t.Park()
		s.mu.Lock()
		return
	}
	sleep := make(chan struct{}, 1)
	s.sleep = sleep
	s.mu.Unlock()
	<-sleep
	s.mu.Lock()
}

// again reports whether a system call is to be repeated at once.
func again(errno syscall.Errno) bool { return errno == syscall.EINTR }

// Read reads what has come, or waits for it.
func (c *Conn) Read(b []byte) (int, error) {
	if len(b) == 0 {
		return 0, nil
	}
	s := &c.rd
	s.mu.Lock()
	for {
		if err := s.failedLocked(); err != nil {
			s.mu.Unlock()
			return 0, err
		}
		if s.dry && !s.ended {
			c.waitLocked(s)
			continue
		}
		n, _, errno := syscall.RawSyscall6(syscall.SYS_RECVFROM, uintptr(c.fd), uintptr(unsafe.Pointer(&b[0])), uintptr(len(b)), 0, 0, 0)
		switch {
		case again(errno):
		case errno == syscall.EAGAIN:
			s.dry = true
			c.waitLocked(s)
		case errno != 0:
			s.mu.Unlock()
			return 0, os.NewSyscallError("read", errno)
		case n == 0:
			s.mu.Unlock()
			return 0, io.EOF
		default:
			s.dry = c.stream && int(n) < len(b)
			s.mu.Unlock()
			c.step()
			return int(n), nil
		}
	}
}

// step is after a read or a write of the owner.
func (c *Conn) step() {
	if t := c.owner; t.Attached() {
		t.step()
	}
}

// Write writes all of b.
func (c *Conn) Write(b []byte) (int, error) {
	s := &c.wr
	s.mu.Lock()
	for done := 0; ; {
		if err := s.failedLocked(); err != nil {
			s.mu.Unlock()
			return done, err
		}
		if done == len(b) {
			s.want = false
			s.mu.Unlock()
			c.step()
			return done, nil
		}
		n, _, errno := syscall.RawSyscall6(syscall.SYS_SENDTO, uintptr(c.fd), uintptr(unsafe.Pointer(&b[done])), uintptr(len(b)-done), unix.MSG_NOSIGNAL, 0, 0)
		switch {
		case again(errno):
		case errno == 0:
			done += int(n)
		case errno != syscall.EAGAIN:
			s.mu.Unlock()
			return done, os.NewSyscallError("write", errno)
		default:
			c.roomLocked()
		}
	}
}

// roomLocked waits for room to write: at the first call for a look after which what
// happens is noted.
func (c *Conn) roomLocked() {
	if s := &c.wr; s.want {
		c.waitLocked(s)
	} else {
		s.want, s.note = true, false
	}
}

// Swap writes out, waits, and reads what has come into in: a request and the first
// of its answer. It fails with ErrStale before anything is written if look is set
// and there is something to be read already, or the other end has ended.
func (c *Conn) Swap(out, in []byte, look bool) (wrote, got int, err error) {
	if look {
		s := &c.rd
		s.mu.Lock()
		err := s.failedLocked()
		if err == nil {
			s.note = false // of what was read before, or is seen now
			if s.dry = quiet(c.fd); !s.dry || s.ended {
				err = ErrStale
			}
		}
		s.mu.Unlock()
		if err != nil {
			return 0, 0, err
		}
	}
	if wrote, err = c.Write(out); err != nil {
		return wrote, 0, err
	}
	got, err = c.Read(in)
	return wrote, got, err
}

// ErrStale is Swap's: nothing was written.
var ErrStale = errors.New("the idle connection has ended, or is not silent")

// quiet reports whether a socket is open and has nothing to be read.
func quiet(fd int) bool {
	var b [1]byte
	for {
		_, _, errno := syscall.RawSyscall6(syscall.SYS_RECVFROM, uintptr(fd), uintptr(unsafe.Pointer(&b[0])), 1, syscall.MSG_PEEK|syscall.MSG_DONTWAIT, 0, 0)
		if !again(errno) {
			return errno == syscall.EAGAIN
		}
	}
}

// Close ends the connection, and what waits for it.
func (c *Conn) Close() error {
	c.rd.mu.Lock()
	defer c.rd.mu.Unlock()
	c.wr.mu.Lock()
	defer c.wr.mu.Unlock()
	if c.rd.closed {
		return net.ErrClosed
	}
	return c.closeLocked()
}

func (c *Conn) closeLocked() error {
	for _, s := range []*side{&c.rd, &c.wr} {
		s.closed = true
		s.setTimerLocked(nil)
		c.rouse(s)
	}
	c.loop.group.table[c.fd].Store(nil)
	if c.listens {
		c.forgetLocked()
	} else {
		c.loop.conns.Add(-1)
	}
	return os.NewSyscallError("close", syscall.Close(c.fd))
}

// CloseWrite ends the half that we send.
func (c *Conn) CloseWrite() error {
	c.wr.mu.Lock()
	defer c.wr.mu.Unlock()
	if c.wr.closed {
		return net.ErrClosed
	}
	return os.NewSyscallError("shutdown", syscall.Shutdown(c.fd, syscall.SHUT_WR))
}

// SetLinger is that of net.TCPConn.
func (c *Conn) SetLinger(sec int) error {
	return c.Control(func(fd uintptr) {
		l := syscall.Linger{Onoff: 1, Linger: int32(max(sec, 0))} //nolint:gosec // seconds
		if sec < 0 {
			l.Onoff = 0
		}
		_ = syscall.SetsockoptLinger(int(fd), syscall.SOL_SOCKET, syscall.SO_LINGER, &l) // it is a socket
	})
}

// Control calls f with the descriptor, which is not closed meanwhile. F does not
// wait, and calls no method of c.
func (c *Conn) Control(f func(fd uintptr)) error {
	c.rd.mu.Lock()
	defer c.rd.mu.Unlock()
	if c.rd.closed {
		return net.ErrClosed
	}
	f(uintptr(c.fd))
	return nil
}

// LocalAddr returns this end's address.
func (c *Conn) LocalAddr() net.Addr {
	if c.local != nil {
		return c.local
	}
	var raw syscall.RawSockaddrAny // nothing is known of a connection that is closed
	size := uint32(unsafe.Sizeof(raw))
	_ = c.Control(func(fd uintptr) {
		_, _, _ = syscall.RawSyscall(unix.SYS_GETSOCKNAME, fd, uintptr(unsafe.Pointer(&raw)), uintptr(unsafe.Pointer(&size)))
	})
	return addrOf(&raw, size)
}

// RemoteAddr returns the other end's address.
func (c *Conn) RemoteAddr() net.Addr { return c.remote }

// SetDeadline is both of the next two.
func (c *Conn) SetDeadline(t time.Time) error {
	return errors.Join(c.SetReadDeadline(t), c.SetWriteDeadline(t))
}

// SetReadDeadline has reads fail from t on; the zero time is never.
func (c *Conn) SetReadDeadline(t time.Time) error { return c.setDeadline(&c.rd, t) }

// SetWriteDeadline has writes fail from t on; the zero time is never.
func (c *Conn) SetWriteDeadline(t time.Time) error { return c.setDeadline(&c.wr, t) }

func (c *Conn) setDeadline(s *side, t time.Time) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return net.ErrClosed
	}
	s.expired = false
	if t.IsZero() {
		s.setTimerLocked(nil)
		return nil
	}
	left := time.Until(t)
	if left <= 0 {
		s.setTimerLocked(nil)
		s.expired = true
		c.rouse(s)
		return nil
	}
	armed := s.armed + 1
	s.setTimerLocked(time.AfterFunc(left, func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		if s.armed == armed {
			s.expired = true
			c.rouse(s)
		}
	}))
	return nil
}

func (s *side) setTimerLocked(t *time.Timer) {
	if s.timer != nil {
		s.timer.Stop()
	}
	s.armed++
	s.timer = t
}

// Surrender makes c, which nobody waits for, a connection of package net again. C
// is closed, whatever comes of it.
func (c *Conn) Surrender() (net.Conn, error) {
	fd, err := c.leave()
	if err != nil {
		return nil, fmt.Errorf("a descriptor off a loop: %w", err)
	}
	f := os.NewFile(uintptr(fd), "socket")
	defer f.Close() // the connection has its own
	return net.FileConn(f)
}

// leave closes c but for a descriptor that it returns, of the same socket.
func (c *Conn) leave() (fd int, err error) {
	c.rd.mu.Lock()
	defer c.rd.mu.Unlock()
	c.wr.mu.Lock()
	defer c.wr.mu.Unlock()
	if c.rd.closed {
		return -1, net.ErrClosed
	}
	if fd, err = unix.FcntlInt(uintptr(c.fd), unix.F_DUPFD_CLOEXEC, 3); err == nil {
		c.forgetLocked()
	}
	_ = c.closeLocked()
	return fd, err
}

// forgetLocked takes the descriptor out of epoll, where a socket stays else until its
// last one is closed, which c's is not.
func (c *Conn) forgetLocked() {
	_ = unix.EpollCtl(c.loop.ep, unix.EPOLL_CTL_DEL, c.fd, nil) // it is there
}
