package eventloop

import (
	"errors"
	"fmt"
	"io"
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

const (
	// pipeSize is what a pipe between two sockets is asked to hold.
	pipeSize = 256 << 10
	// maxPipes is how many empty pipes are kept.
	maxPipes = 16
)

// pipe is between two sockets.
type pipe struct{ r, w int }

var pipes = make(chan pipe, maxPipes)

// ErrNoPipe says that there is no pipe to move bytes through: nothing was moved.
var ErrNoPipe = errors.New("no pipe")

func getPipe() (pipe, error) {
	select {
	case p := <-pipes:
		return p, nil
	default:
	}
	var fds [2]int
	if err := unix.Pipe2(fds[:], unix.O_NONBLOCK|unix.O_CLOEXEC); err != nil {
		return pipe{}, fmt.Errorf("%w: %w", ErrNoPipe, err)
	}
	_, _ = unix.FcntlInt(uintptr(fds[0]), unix.F_SETPIPE_SZ, pipeSize) // a smaller one does as well
	return pipe{fds[0], fds[1]}, nil
}

// put gives the pipe back, which is empty or of no more use.
func (p pipe) put(empty bool) {
	if empty {
		select {
		case pipes <- p:
			return
		default:
		}
	}
	_ = syscall.Close(p.r)
	_ = syscall.Close(p.w)
}

// Splice moves n bytes from src to c within the kernel. It returns how many were
// moved, and io.ErrUnexpectedEOF if src has ended before, or ErrNoPipe. The goroutine is the one
// that reads src and writes c.
func (c *Conn) Splice(src *Conn, n int64) (moved int64, err error) {
	p, err := getPipe()
	if err != nil {
		return 0, err
	}
	held := 0 // in the pipe
	defer func() { p.put(held == 0) }()
	for moved < n {
		if held, err = src.fill(p, n-moved); err != nil {
			return moved, err
		}
		for held > 0 {
			m, err := c.empty(p, held)
			held -= m
			moved += int64(m)
			if err != nil {
				return moved, err
			}
		}
	}
	return moved, nil
}

const spliceFlags = unix.SPLICE_F_NONBLOCK | unix.SPLICE_F_MOVE

// fill moves up to n bytes to an empty pipe.
func (c *Conn) fill(p pipe, n int64) (int, error) {
	s := &c.rd
	s.mu.Lock()
	for {
		if err := s.failedLocked(); err != nil {
			s.mu.Unlock()
			return 0, err
		}
		m, err := unix.Splice(c.fd, nil, p.w, nil, int(min(n, pipeSize)), spliceFlags)
		switch {
		case err == syscall.EINTR: //nolint:errorlint // an Errno
		case err == syscall.EAGAIN: //nolint:errorlint // an Errno
			c.waitLocked(s)
		case err != nil:
			s.mu.Unlock()
			return 0, os.NewSyscallError("splice", err)
		case m == 0:
			s.mu.Unlock()
			return 0, io.ErrUnexpectedEOF
		default:
			s.dry = false // it was not emptied, for all we know
			s.mu.Unlock()
			c.step()
			return int(m), nil
		}
	}
}

// empty moves what is held in a pipe to c, and returns how much it took at once. It
// does not announce more: TCP would keep the last of it back for 200 ms.
func (c *Conn) empty(p pipe, held int) (int, error) {
	s := &c.wr
	s.mu.Lock()
	for {
		if err := s.failedLocked(); err != nil {
			s.mu.Unlock()
			return 0, err
		}
		m, err := unix.Splice(p.r, nil, c.fd, nil, held, spliceFlags)
		switch {
		case err == syscall.EINTR: //nolint:errorlint // an Errno
		case err == syscall.EAGAIN: //nolint:errorlint // an Errno
			c.roomLocked()
		case err != nil:
			s.mu.Unlock()
			return 0, os.NewSyscallError("splice", err)
		default:
			s.want = false
			s.mu.Unlock()
			c.step()
			return int(m), nil
		}
	}
}
