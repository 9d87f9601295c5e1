// Package ipc moves whole records, and the file descriptors that belong to
// them, over one end of a SOCK_SEQPACKET socketpair. A record arrives entire or
// not at all, and its descriptors are closed if nobody takes them. What a record
// means is for package wire to say.
//
// A record is a header of 16 bytes, big endian, and a body:
//
//	u16 version | u16 kind | u16 flags | u16 number of descriptors | u64 id | body
//
// A body over MaxInline travels as a sealed memfd, which is then the last
// descriptor of the record and flagged Large; Receive reads it back, so callers
// see only bodies. ErrProtocol means the peer broke these rules and the channel
// is of no more use; io.EOF that the peer has closed its end; any other error is
// the system's.
package ipc

import (
	"encoding/binary"
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

// The limits of a record.
const (
	HeaderSize = 16
	MaxInline  = 60 << 10 // bytes of a body inside the record itself
	MaxBody    = 16 << 20 // bytes of a body that travels as a memfd
	MaxFiles   = 16       // descriptors of a record, the memfd not counted
)

// SendTimeout bounds how long Send waits for a peer that does not read. A peer
// that is stuck for so long is to be replaced.
const SendTimeout = 5 * time.Second

// Version is the version of the header. It changes when the header does, or when
// a kind changes its meaning; never for a kind or field that is added.
const Version = 1

// ErrProtocol is wrapped by the errors that mean the peer broke the rules.
var ErrProtocol = errors.New("protocol violation")

// Flags of a record.
type Flags uint16

// The flags. A Reply carries the id of what it answers; Failed is a Reply whose
// body is an error; Large is set and cleared by this package.
const (
	Reply  Flags = 1 << 0
	Failed Flags = 1 << 1
	Large  Flags = 1 << 15
)

const knownFlags = Reply | Failed | Large

// An FD is a descriptor that somebody owns. The zero value is not a descriptor
// in use here: standard input never travels. FDs are raw numbers, since an
// os.File may change the mode of a description that other processes share.
type FD int

// Close closes the descriptor. Closing a value that is not positive does nothing.
func (fd FD) Close() {
	if fd > 0 {
		_ = unix.Close(int(fd)) // nothing is to be done about an error
	}
}

// File hands the descriptor to an os.File, which owns it from here on. A
// descriptor that is already non-blocking stays so.
func (fd FD) File(name string) *os.File { return os.NewFile(uintptr(fd), name) }

// A Record is one message in transit.
type Record struct {
	Kind  uint16
	Flags Flags
	ID    uint64
	Body  []byte
	// Files belong to the receiver after Receive, who closes each or calls
	// Discard. Send duplicates them: the sender still closes its own.
	Files []FD
}

// Discard closes every descriptor that the record still holds.
func (r *Record) Discard() {
	for _, f := range r.Files {
		f.Close()
	}
	r.Files = nil
}

// A Socket is one end of the socketpair, as a Channel uses it: by system calls that
// do not wait, so that the scheduler need not be told of them.
type Socket interface {
	syscall.RawConn
	SetReadDeadline(t time.Time) error
	SetWriteDeadline(t time.Time) error
	Close() error
}

// connSocket is a Socket of package net's.
type connSocket struct {
	syscall.RawConn
	conn *net.UnixConn
}

func (s connSocket) SetReadDeadline(t time.Time) error  { return s.conn.SetReadDeadline(t) }
func (s connSocket) SetWriteDeadline(t time.Time) error { return s.conn.SetWriteDeadline(t) }
func (s connSocket) Close() error                       { return s.conn.Close() }

// ErrFull is TrySend's: the peer has yet to read what was sent before, or somebody
// else is sending.
var ErrFull = errors.New("there is no room in the channel for now")

// A Channel is one end of the socketpair. Send may be called from any goroutine;
// Receive from one at a time. Close may come twice and unblocks both.
type Channel struct {
	conn Socket

	sendMu  sync.Mutex
	timeout time.Duration // guarded by sendMu: SendTimeout, or another patience
	sendBuf []byte        // guarded by sendMu

	// Of the one receiver.
	recvBuf []byte
	recvOOB []byte
	recvFn  func(fd uintptr) bool // receive
	got     received
}

// received is what the last recvmsg(2) has brought.
type received struct {
	n, oobn, flags int
	errno          syscall.Errno
}

// Pair makes a connected pair: our Channel, and the other end for a child. The
// caller closes the FD after it was handed on. Both ends are close-on-exec.
func Pair() (*Channel, FD, error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return nil, 0, fmt.Errorf("make a channel: %w", err)
	}
	c, err := Open(FD(fds[0]))
	if err != nil {
		FD(fds[1]).Close()
		return nil, 0, err
	}
	return c, FD(fds[1]), nil
}

// Open makes a Channel of a descriptor that it owns from here on, whatever it
// returns. It refuses what is not a SOCK_SEQPACKET socket.
func Open(fd FD) (*Channel, error) {
	unix.CloseOnExec(int(fd))
	if err := Check(fd); err != nil {
		fd.Close()
		return nil, err
	}
	if err := unix.SetNonblock(int(fd), true); err != nil {
		fd.Close()
		return nil, fmt.Errorf("channel: %w", err)
	}
	f := fd.File("channel")
	conn, err := net.FileConn(f)
	_ = f.Close()
	if err != nil {
		return nil, fmt.Errorf("channel: %w", err)
	}
	u, ok := conn.(*net.UnixConn)
	if !ok {
		_ = conn.Close()
		return nil, fmt.Errorf("channel: descriptor is a %T, not a Unix socket", conn)
	}
	raw, err := u.SyscallConn()
	if err != nil {
		return nil, errors.Join(fmt.Errorf("channel: %w", err), u.Close())
	}
	return On(connSocket{raw, u}), nil
}

// Check says what is wrong with a descriptor that is to be a Channel, if anything is.
func Check(fd FD) error {
	typ, err := unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_TYPE)
	if err != nil {
		return fmt.Errorf("descriptor %d is not a channel: %w", fd, err)
	}
	if typ != unix.SOCK_SEQPACKET {
		return fmt.Errorf("descriptor %d is a socket of type %d, not SOCK_SEQPACKET", fd, typ)
	}
	return nil
}

// On makes a Channel of a connected socket that Check has passed, which it owns from
// here on.
func On(s Socket) *Channel {
	c := &Channel{
		conn:    s,
		timeout: SendTimeout,
		sendBuf: make([]byte, 0, HeaderSize+MaxInline),
		recvBuf: make([]byte, HeaderSize+MaxInline), // more is cut, and flagged
		recvOOB: make([]byte, unix.CmsgSpace((MaxFiles+1)*4)),
	}
	c.recvFn = c.receive
	return c
}

// Close ends the channel. The peer reads io.EOF after what was sent before.
func (c *Channel) Close() error { return c.conn.Close() }

// SetReadDeadline makes Receive fail with os.ErrDeadlineExceeded from t on; the
// zero time takes that back. No record is lost by it.
func (c *Channel) SetReadDeadline(t time.Time) error { return c.conn.SetReadDeadline(t) }

// SetSendTimeout replaces SendTimeout by d, for the next Send; 0 makes Send wait
// for as long as the peer lives and the channel is open.
func (c *Channel) SetSendTimeout(d time.Duration) {
	c.sendMu.Lock()
	defer c.sendMu.Unlock()
	c.timeout = d
}

// Dup returns a duplicate of the channel's descriptor, close-on-exec, for the
// caller to close: for the next image of this process to Open.
func (c *Channel) Dup() (FD, error) {
	var fd int
	var err error
	ctl := c.conn.Control(func(own uintptr) { fd, err = unix.FcntlInt(own, unix.F_DUPFD_CLOEXEC, 3) })
	if err := errors.Join(ctl, err); err != nil {
		return 0, fmt.Errorf("duplicate a channel: %w", err)
	}
	return FD(fd), nil
}

// Send writes one record, its descriptors duplicated on the way. It waits for a
// full peer, SendTimeout at most; the error is then os.ErrDeadlineExceeded. After
// Close it is net.ErrClosed, after the peer's Close unix.EPIPE.
func (c *Channel) Send(r Record) error {
	if len(r.Files) > MaxFiles {
		return fmt.Errorf("send kind %d: %d descriptors, the limit is %d", r.Kind, len(r.Files), MaxFiles)
	}
	if len(r.Body) > MaxBody {
		return fmt.Errorf("send kind %d: a body of %d bytes, the limit is %d", r.Kind, len(r.Body), MaxBody)
	}
	files := make([]int, 0, len(r.Files)+1)
	for _, f := range r.Files {
		files = append(files, int(f))
	}
	body, flags := r.Body, r.Flags&^Large
	if len(body) > MaxInline {
		mem, err := sealed(body)
		if err != nil {
			return fmt.Errorf("send kind %d: %w", r.Kind, err)
		}
		defer mem.Close()
		files = append(files, int(mem))
		body, flags = nil, flags|Large
	}
	var oob []byte
	if len(files) > 0 {
		oob = unix.UnixRights(files...)
	}

	c.sendMu.Lock()
	defer c.sendMu.Unlock()
	b := c.sendBuf[:HeaderSize]
	putHeader(b, r.Kind, flags, len(files), r.ID)
	b = append(b, body...)
	c.sendBuf = b[:0]
	errno, err := c.sendNow(b, oob) // as nearly always, there is room
	if err == nil && errno == unix.EAGAIN {
		var late time.Time
		if c.timeout > 0 {
			late = time.Now().Add(c.timeout)
		}
		if err = c.conn.SetWriteDeadline(late); err == nil {
			err = c.conn.Write(func(fd uintptr) bool {
				errno = send(fd, b, oob)
				return errno != unix.EAGAIN
			})
		}
	}
	return sent(r.Kind, errno, err)
}

// TrySend is Send for a record without descriptors, of MaxInline bytes at most, that
// never waits: it returns ErrFull instead.
func (c *Channel) TrySend(r Record) error {
	if len(r.Files) > 0 || len(r.Body) > MaxInline {
		return fmt.Errorf("send kind %d: too much to be sent without waiting", r.Kind)
	}
	if !c.sendMu.TryLock() {
		return ErrFull
	}
	defer c.sendMu.Unlock()
	b := c.sendBuf[:HeaderSize]
	putHeader(b, r.Kind, r.Flags&^Large, 0, r.ID)
	b = append(b, r.Body...)
	c.sendBuf = b[:0]
	errno, err := c.sendNow(b, nil)
	if err == nil && errno == unix.EAGAIN {
		return ErrFull
	}
	return sent(r.Kind, errno, err)
}

// sent is the outcome of a sending.
func sent(kind uint16, errno syscall.Errno, err error) error {
	if err == nil && errno != 0 {
		err = errno
	}
	if err != nil {
		return fmt.Errorf("send kind %d: %w", kind, err)
	}
	return nil
}

// sendNow sends a datagram if there is room. Err is that of a closed channel.
func (c *Channel) sendNow(b, oob []byte) (errno syscall.Errno, err error) {
	err = c.conn.Control(func(fd uintptr) { errno = send(fd, b, oob) })
	return errno, err
}

// send sends a datagram, or fails at once.
func send(fd uintptr, b, oob []byte) syscall.Errno {
	vec := unix.Iovec{Base: &b[0]}
	vec.SetLen(len(b))
	msg := unix.Msghdr{Iov: &vec, Iovlen: 1}
	if len(oob) > 0 {
		msg.Control = &oob[0]
		msg.SetControllen(len(oob))
	}
	for {
		_, _, errno := syscall.RawSyscall(unix.SYS_SENDMSG, fd, uintptr(unsafe.Pointer(&msg)), unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL)
		if errno != unix.EINTR {
			return errno
		}
	}
}

// Waiting reports whether there is a record to be received at once, or the end.
func (c *Channel) Waiting() bool {
	is := false
	_ = c.conn.Control(func(fd uintptr) { // nothing comes by a closed one
		var one [1]byte
		_, _, errno := syscall.RawSyscall6(unix.SYS_RECVFROM, fd, uintptr(unsafe.Pointer(&one[0])), 1, unix.MSG_PEEK|unix.MSG_DONTWAIT, 0, 0)
		is = errno != unix.EAGAIN
	})
	return is
}

func putHeader(b []byte, kind uint16, flags Flags, nfiles int, id uint64) {
	binary.BigEndian.PutUint16(b[0:], Version)
	binary.BigEndian.PutUint16(b[2:], kind)
	binary.BigEndian.PutUint16(b[4:], uint16(flags))
	binary.BigEndian.PutUint16(b[6:], uint16(nfiles)) //nolint:gosec // at most MaxFiles+1
	binary.BigEndian.PutUint64(b[8:], id)
}

// Receive waits for one record. Its Body is the caller's to keep, its Files are
// the caller's to close. It returns io.EOF when the peer has closed its end.
func (c *Channel) Receive() (Record, error) {
	if err := c.conn.Read(c.recvFn); err != nil {
		return Record{}, fmt.Errorf("receive: %w", err)
	}
	got := c.got
	files := rights(c.recvOOB[:got.oobn])
	var r Record
	var err error
	switch {
	case got.errno != 0:
		err = fmt.Errorf("receive: %w", got.errno)
	case got.n == 0: // with descriptors it is no record either
		err = fmt.Errorf("receive: %w", io.EOF)
	default:
		r, err = parse(c.recvBuf[:got.n], files, got.flags)
	}
	if err != nil {
		for _, f := range files {
			f.Close()
		}
		return Record{}, err
	}
	return r, nil
}

// receive receives a datagram, and reports false if there is none.
func (c *Channel) receive(fd uintptr) bool {
	vec := unix.Iovec{Base: &c.recvBuf[0]}
	vec.SetLen(len(c.recvBuf))
	msg := unix.Msghdr{Iov: &vec, Iovlen: 1, Control: &c.recvOOB[0]}
	msg.SetControllen(len(c.recvOOB))
	for {
		n, _, errno := syscall.RawSyscall(unix.SYS_RECVMSG, fd, uintptr(unsafe.Pointer(&msg)), unix.MSG_CMSG_CLOEXEC|unix.MSG_DONTWAIT)
		switch {
		case errno == unix.EINTR:
		case errno == unix.EAGAIN:
			return false
		case errno != 0:
			c.got = received{errno: errno}
			return true
		default:
			c.got = received{n: int(n), oobn: int(msg.Controllen), flags: int(msg.Flags)} //nolint:gosec // bounded by the buffer
			return true
		}
	}
}

// rights returns every descriptor in the control messages, also those of a
// truncated one, so that they can be closed.
func rights(oob []byte) []FD {
	msgs, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return nil
	}
	var files []FD
	for _, m := range msgs {
		fds, err := unix.ParseUnixRights(&m)
		if err != nil {
			continue
		}
		for _, fd := range fds {
			files = append(files, FD(fd))
		}
	}
	return files
}

// parse checks one datagram. It closes the memfd of a large body; the other
// files are the caller's to close if it returns an error.
func parse(b []byte, files []FD, rflags int) (Record, error) {
	violation := func(format string, args ...any) (Record, error) {
		return Record{}, fmt.Errorf("%w: %s", ErrProtocol, fmt.Sprintf(format, args...))
	}
	switch {
	case rflags&(unix.MSG_TRUNC|unix.MSG_CTRUNC) != 0:
		return violation("a truncated record (flags %#x)", rflags)
	case len(b) == 0 && len(files) == 0:
		return Record{}, io.EOF
	case len(b) < HeaderSize:
		return violation("a record of %d bytes is shorter than its header", len(b))
	}
	version := binary.BigEndian.Uint16(b[0:])
	r := Record{
		Kind:  binary.BigEndian.Uint16(b[2:]),
		Flags: Flags(binary.BigEndian.Uint16(b[4:])),
		ID:    binary.BigEndian.Uint64(b[8:]),
	}
	nfiles := int(binary.BigEndian.Uint16(b[6:]))
	switch {
	case version != Version:
		return violation("version %d, this is version %d", version, Version)
	case r.Flags&^knownFlags != 0:
		return violation("unknown flags %#x", r.Flags)
	case nfiles != len(files):
		return violation("kind %d names %d descriptors and brings %d", r.Kind, nfiles, len(files))
	}
	body := b[HeaderSize:]
	if r.Flags&Large != 0 {
		if len(files) == 0 || len(body) > 0 {
			return violation("kind %d is flagged large without being so", r.Kind)
		}
		last := len(files) - 1
		large, err := readSealed(files[last])
		if err != nil {
			return Record{}, err
		}
		files[last].Close()
		files[last] = 0
		files, body = files[:last], large
		r.Flags &^= Large
	} else {
		body = append([]byte(nil), body...)
	}
	if len(files) > MaxFiles {
		return violation("kind %d brings %d descriptors, the limit is %d", r.Kind, len(files), MaxFiles)
	}
	r.Body, r.Files = body, files
	return r, nil
}

const seals = unix.F_SEAL_SEAL | unix.F_SEAL_SHRINK | unix.F_SEAL_GROW | unix.F_SEAL_WRITE

// sealed returns a memfd that holds body and can never change again.
func sealed(body []byte) (FD, error) {
	fd, err := unix.MemfdCreate("tako-body", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		return 0, fmt.Errorf("memfd: %w", err)
	}
	for off := 0; off < len(body); {
		n, err := unix.Write(fd, body[off:])
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			FD(fd).Close()
			return 0, fmt.Errorf("memfd: %w", err)
		}
		off += n
	}
	if _, err := unix.FcntlInt(uintptr(fd), unix.F_ADD_SEALS, seals); err != nil {
		FD(fd).Close()
		return 0, fmt.Errorf("seal memfd: %w", err)
	}
	return FD(fd), nil
}

// readSealed reads the whole of a memfd after making sure that nobody can change
// it. It leaves the descriptor open.
func readSealed(fd FD) ([]byte, error) {
	got, err := unix.FcntlInt(uintptr(fd), unix.F_GET_SEALS, 0)
	if err != nil || got&seals != seals {
		return nil, fmt.Errorf("%w: a large body that is not a sealed memfd", ErrProtocol)
	}
	var st unix.Stat_t
	if err := unix.Fstat(int(fd), &st); err != nil {
		return nil, fmt.Errorf("large body: %w", err)
	}
	if st.Size <= 0 || st.Size > MaxBody {
		return nil, fmt.Errorf("%w: a large body of %d bytes, the limit is %d", ErrProtocol, st.Size, MaxBody)
	}
	body := make([]byte, st.Size)
	for off := 0; off < len(body); {
		n, err := unix.Pread(int(fd), body[off:], int64(off))
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("large body: %w", err)
		}
		if n == 0 {
			return nil, fmt.Errorf("%w: a large body that ends early", ErrProtocol)
		}
		off += n
	}
	return body, nil
}
