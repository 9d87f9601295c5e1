package upstream

import (
	"errors"
	"io"
	"net"
	"syscall"
	"time"
	"unsafe"

	"tako/internal/proxy/eventloop"
)

// deadlineSlack is how late the deadlines of a connection may be: they are set
// anew only for those that would come too early.
const deadlineSlack = 5 * time.Second

// link is a connection to the instance, in use by one exchange or idle. While it
// is idle it holds no buffer.
type link struct {
	net.Conn
	pool  *Pool
	on    *eventloop.Conn       // Conn, if it is on a loop
	raw   syscall.RawConn       // nil if it is no socket
	step  func(fd uintptr) bool // l.steps, made once
	since time.Time             // idle since
	due   time.Time             // both deadlines, zero for none
	state                       // of swap
}

// state is what the steps of a swap have come to.
type state struct {
	next  byte
	out   []byte // to be written
	in    []byte // room for what is read
	wrote int
	got   int
	err   error
	wait  bool // after the writing, before the first look for what has come
}

const (
	stepPeek byte = iota
	stepWrite
	stepRead
)

var (
	// errStale: the instance has closed the connection while it was idle, or has
	// sent something. Nothing was written.
	errStale = eventloop.ErrStale
	errShort = errors.New("the request was written in part")
)

func newLink(c net.Conn, p *Pool) *link {
	l := &link{pool: p}
	l.use(c)
	return l
}

// use makes c the connection.
func (l *link) use(c net.Conn) {
	l.Conn, l.on, l.raw, l.step, l.due = c, nil, nil, nil, time.Time{}
	if sc, ok := c.(syscall.Conn); ok {
		if raw, err := sc.SyscallConn(); err == nil {
			l.raw = raw
			l.step = l.steps
		}
	}
}

// settle brings the connection, which is idle or new, to where t runs: to its loop,
// or off any if t is nil. A task whose loop cannot take it goes to a goroutine. On
// an error the connection is of no use.
func (l *link) settle(t *eventloop.Task) error {
	switch {
	case t == nil && l.on == nil:
		return nil
	case t == nil:
		c, err := l.on.Surrender()
		if err != nil {
			return err
		}
		l.use(c)
		return nil
	case l.on == nil:
		on, err := t.Loop().Adopt(l.Conn)
		if err != nil {
			t.Detach()
			return nil //nolint:nilerr // it is used as it is
		}
		l.Conn, l.on, l.raw, l.step, l.due = on, on, nil, nil, time.Time{}
	default:
		if err := l.on.Move(t.Loop()); err != nil {
			return err
		}
	}
	l.on.Own(t)
	return nil
}

// swap writes out, waits, and reads what has come into in. Look has it see first
// whether the connection is still open and silent. The request is written where
// a reader would look for bytes first: after a look nothing can have come yet, so
// that look is saved, and the goroutine parks once.
//
// Nothing is slept through. The poller notes what comes from before the first step
// on, and forgets there what it had noted: that is what the look is for, or, without
// it, a reading right after the writing.
func (l *link) swap(out, in []byte, look bool) (wrote, got int, err error) {
	if l.on != nil {
		return l.on.Swap(out, in, look)
	}
	if l.raw == nil {
		if n, err := l.Write(out); err != nil {
			return n, 0, err
		}
		got, err = l.Read(in)
		return len(out), got, err
	}
	l.state = state{next: stepWrite, out: out, in: in, wait: look}
	if look {
		l.next = stepPeek
	}
	err = l.raw.Read(l.step)
	s := l.state
	l.state = state{}
	if err == nil {
		err = s.err
	}
	if err == errShort { //nolint:errorlint // it is ours
		n, err := l.Write(out[s.wrote:])
		if s.wrote += n; err != nil {
			return s.wrote, 0, err
		}
		got, err := l.Read(in)
		return s.wrote, got, err
	}
	return s.wrote, s.got, err
}

// steps does what it can without waiting, and reports whether the swap is over.
func (l *link) steps(fd uintptr) bool {
	switch l.next {
	case stepPeek:
		if !quiet(fd) {
			l.err = errStale
			return true
		}
		fallthrough
	case stepWrite:
		l.next = stepRead
		n, err := retried(syscall.SYS_WRITE, fd, l.out)
		if err == syscall.EAGAIN { //nolint:errorlint // an Errno
			n, err = 0, nil
		}
		if l.wrote = n; err == nil && n < len(l.out) {
			err = errShort
		}
		if l.err = err; err != nil || l.wait {
			return err != nil
		}
	}
	n, err := retried(syscall.SYS_READ, fd, l.in)
	if err == syscall.EAGAIN { //nolint:errorlint // an Errno
		return false
	}
	if err == nil && n == 0 {
		err = io.EOF
	}
	l.got, l.err = n, err
	return true
}

// retried reads into b, or writes it, until no signal comes between. The socket
// never blocks, so the scheduler need not be told of the call.
func retried(call, fd uintptr, b []byte) (int, error) {
	if len(b) == 0 {
		return 0, nil
	}
	for {
		n, _, errno := syscall.RawSyscall(call, fd, uintptr(unsafe.Pointer(unsafe.SliceData(b))), uintptr(len(b)))
		if errno == 0 {
			return int(n), nil
		}
		if errno != syscall.EINTR {
			return 0, errno
		}
	}
}

// quiet reports whether a connection is open and has nothing to be read. It does
// not block either.
func quiet(fd uintptr) bool {
	var b [1]byte
	for {
		_, _, errno := syscall.RawSyscall6(syscall.SYS_RECVFROM, fd, uintptr(unsafe.Pointer(&b[0])), 1, syscall.MSG_PEEK|syscall.MSG_DONTWAIT, 0, 0)
		if errno != syscall.EINTR {
			return errno == syscall.EAGAIN
		}
	}
}

// silent is quiet for a connection that may be no socket, which counts as silent.
func (l *link) silent() bool {
	control := func(func(uintptr)) error { return nil }
	is := true
	switch {
	case l.on != nil:
		control = l.on.Control
	case l.raw != nil:
		control = l.raw.Control
	}
	err := control(func(fd uintptr) { is = quiet(fd) })
	return err == nil && is
}

// arm sees to it that reads and writes end, FirstByteTime from now or a bit later.
func (l *link) arm(now time.Time) {
	if l.due.Sub(now) < FirstByteTime {
		l.due = now.Add(FirstByteTime + deadlineSlack)
		_ = l.SetDeadline(l.due) // a closed connection shows at the write
	}
}

// unlimited takes the limit off reads.
func (l *link) unlimited() {
	_ = l.SetReadDeadline(time.Time{})
	l.due = time.Time{}
}
