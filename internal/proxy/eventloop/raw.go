package eventloop

import (
	"fmt"
	"syscall"
	"time"
)

// A Raw is a socket of a loop that is read and written by system calls of its
// user's, as by a syscall.RawConn. One task of the loop reads it; who writes it is
// not on a task.
type Raw struct{ c *Conn }

// Raw makes fd, a socket, one of the loop, which owns it from here on; with an error
// it does not, and nothing has changed but that fd does not block.
func (l *Loop) Raw(fd int) (*Raw, error) {
	if err := syscall.SetNonblock(fd, true); err != nil {
		return nil, fmt.Errorf("a socket for a loop: %w", err)
	}
	c := &Conn{fd: fd, apart: true}
	if err := c.join(l, connEvents); err != nil {
		return nil, err
	}
	return &Raw{c}, nil
}

// Own says which task reads: it parks where nothing has come.
func (r *Raw) Own(t *Task) { r.c.Own(t) }

// Control calls f with the descriptor, which is not closed meanwhile.
func (r *Raw) Control(f func(fd uintptr)) error { return r.c.Control(f) }

// Read calls f, which does not wait, until it returns true: again whenever something
// has come since.
func (r *Raw) Read(f func(fd uintptr) bool) error {
	s := &r.c.rd
	s.mu.Lock()
	for {
		if err := s.failedLocked(); err != nil {
			s.mu.Unlock()
			return err
		}
		if s.dry && !s.ended {
			r.c.waitLocked(s)
			continue
		}
		s.dry = !f(uintptr(r.c.fd))
		if !s.dry {
			s.mu.Unlock()
			r.c.step()
			return nil
		}
	}
}

// Write calls f, which does not wait, until it returns true: again whenever there may
// be room.
func (r *Raw) Write(f func(fd uintptr) bool) error {
	s := &r.c.wr
	s.mu.Lock()
	for {
		if err := s.failedLocked(); err != nil {
			s.mu.Unlock()
			return err
		}
		if f(uintptr(r.c.fd)) {
			s.want = false
			s.mu.Unlock()
			return nil
		}
		r.c.roomLocked()
	}
}

// SetReadDeadline is that of Conn.
func (r *Raw) SetReadDeadline(t time.Time) error { return r.c.SetReadDeadline(t) }

// SetWriteDeadline is that of Conn.
func (r *Raw) SetWriteDeadline(t time.Time) error { return r.c.SetWriteDeadline(t) }

// Close ends the socket, and what waits for it.
func (r *Raw) Close() error { return r.c.Close() }
