package proxy

import (
	"crypto/tls"
	"io"
	"net"
	"syscall"
	"unsafe"

	"tako/internal/proxy/eventloop"
	"tako/internal/proxy/h1"
)

// tlsSocket is the connection beneath TLS. Its reads and writes do not announce
// themselves to the scheduler, as those of package net do: the descriptor never
// blocks, and a small record would pay a tenth more for it. There is one reader
// and one writer at a time, which crypto/tls sees to.
//
// On an event loop the loop's own connection takes its place.
type tlsSocket struct {
	net.Conn
	tcp *net.TCPConn    // Conn, or nil on a loop
	raw syscall.RawConn // of tcp

	task *eventloop.Task // whose handshake it is; nil after that, and off the loops
	key  taskKey         // of that

	held    bool // nothing is read
	records records

	readFn, writeFn   func(fd uintptr) bool
	in, out           []byte
	got               int
	readErr, writeErr error
}

// tlsSocketOf returns c as a tlsSocket, or c itself if it is no TCP connection.
func tlsSocketOf(c net.Conn) net.Conn {
	s := new(tlsSocket)
	if !s.use(c) {
		return c
	}
	return s
}

// use makes c the connection, if it is one of TCP.
func (s *tlsSocket) use(c net.Conn) bool {
	tcp, ok := c.(*net.TCPConn)
	if !ok {
		return false
	}
	raw, err := tcp.SyscallConn()
	if err != nil {
		return false
	}
	s.Conn, s.tcp, s.raw = tcp, tcp, raw
	s.readFn, s.writeFn = s.read, s.write
	return true
}

// surrender takes the connection off its loop. On an error it is closed.
func (s *tlsSocket) surrender(on *eventloop.Conn) error {
	c, err := on.Surrender()
	if err != nil {
		return err
	}
	if !s.use(c) {
		s.Conn = c // of a Unix socket
	}
	return nil
}

// certificate is cert with a key for the handshake under way.
func (s *tlsSocket) certificate(cert *tls.Certificate) *tls.Certificate {
	key, ok := cert.PrivateKey.(*remoteKey)
	if !ok {
		return cert
	}
	s.key = taskKey{remoteKey: key, task: s.task}
	own := *cert
	own.PrivateKey = &s.key
	return &own
}

// NetConn returns the connection itself.
func (s *tlsSocket) NetConn() net.Conn { return s.Conn }

// Hold implements h1.ReadAhead.
func (s *tlsSocket) Hold(held bool) { s.held = held }

// CloseWrite ends our half of the connection.
func (s *tlsSocket) CloseWrite() error {
	return s.Conn.(interface{ CloseWrite() error }).CloseWrite() // both have it
}

// Read reads what has come, or waits for it.
func (s *tlsSocket) Read(b []byte) (int, error) {
	n, err := s.readSome(b)
	s.records.see(b[:n])
	return n, err
}

// records follows the records of what is read.
type records struct {
	head  [5]byte // of the one under way
	got   int     // bytes of head
	left  int     // bytes of the record after its head
	whole int     // how many ended in what was read last
}

func (r *records) see(b []byte) {
	r.whole = 0
	for len(b) > 0 {
		if r.left == 0 {
			n := copy(r.head[r.got:], b)
			r.got, b = r.got+n, b[n:]
			if r.got < len(r.head) {
				return
			}
			r.got, r.left = 0, int(r.head[3])<<8|int(r.head[4])
		}
		n := min(r.left, len(b))
		if r.left, b = r.left-n, b[n:]; r.left == 0 {
			r.whole++
		}
	}
}

// Ahead implements h1.ReadAhead: TLS reads when it has no whole record, and uses one.
func (s *tlsSocket) Ahead() bool { return s.records.whole > 1 }

func (s *tlsSocket) readSome(b []byte) (int, error) {
	if len(b) == 0 {
		return 0, nil
	}
	if s.held {
		return 0, h1.ErrHeld
	}
	if s.tcp == nil {
		return s.Conn.Read(b)
	}
	s.in, s.got, s.readErr = b, 0, nil
	err := s.raw.Read(s.readFn)
	s.in = nil
	if err == nil {
		err = s.readErr
	}
	return s.got, err
}

func (s *tlsSocket) read(fd uintptr) bool {
	for {
		n, _, errno := syscall.RawSyscall(syscall.SYS_READ, fd, uintptr(unsafe.Pointer(&s.in[0])), uintptr(len(s.in)))
		switch {
		case errno == syscall.EINTR:
		case errno == syscall.EAGAIN:
			return false
		case errno != 0:
			s.readErr = errno
			return true
		default:
			if s.got = int(n); n == 0 {
				s.readErr = io.EOF
			}
			return true
		}
	}
}

// Write writes all of b.
func (s *tlsSocket) Write(b []byte) (int, error) {
	if s.tcp == nil {
		return s.Conn.Write(b)
	}
	s.out, s.writeErr = b, nil
	err := s.raw.Write(s.writeFn)
	n := len(b) - len(s.out)
	s.out = nil
	if err == nil {
		err = s.writeErr
	}
	return n, err
}

func (s *tlsSocket) write(fd uintptr) bool {
	for len(s.out) > 0 {
		n, _, errno := syscall.RawSyscall(syscall.SYS_WRITE, fd, uintptr(unsafe.Pointer(&s.out[0])), uintptr(len(s.out)))
		switch errno { //nolint:exhaustive // all others are errors
		case 0:
			s.out = s.out[n:]
		case syscall.EINTR:
		case syscall.EAGAIN:
			return false
		default:
			s.writeErr = errno
			return true
		}
	}
	return true
}
