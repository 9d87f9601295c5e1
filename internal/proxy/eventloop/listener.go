package eventloop

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"sync"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

const (
	// moreConns is how many connections more than another a loop may have, beside an
	// eighth, and still keep what it accepts.
	moreConns = 8
	// MaxLast bounds what a loop still accepts from a listener that closes: more than a
	// queue has, so that clients who come ever faster do not hold it up.
	MaxLast = 1 << 16
	// The kernel asks whether an idle client is still there after keepIdle, and again
	// each keepEvery, keepTries times, as package net has it.
	keepIdle, keepEvery = 15 * time.Second, 15 * time.Second
	keepTries           = 9
)

// A Listener is a listening socket that the loops of a group accept from: whichever
// has nothing else to do, so that a connection begins where it is accepted.
type Listener struct {
	addr net.Addr
	ends []*Conn // the socket, once for each loop
	most int     // MaxLast

	mu     sync.Mutex
	serves bool // guarded by mu
	closed bool // guarded by mu
	next   int  // guarded by mu: of ends, to Look
}

// Listen makes ln, a listener of package net, one of the group's loops. Without an
// error ln is closed; with one it is as it was, but for options of its socket. Nobody
// who shares the socket may have it block, as os.File.Fd does: a loop would.
func (g *Group) Listen(ln net.Listener) (*Listener, error) {
	if g.Len() == 0 || g.over.Load() {
		return nil, errors.New("there are no loops")
	}
	sc, ok := ln.(syscall.Conn)
	if !ok {
		return nil, errNoSocket
	}
	raw, err := sc.SyscallConn()
	if err != nil {
		return nil, err
	}
	n := &Listener{addr: ln.Addr(), most: MaxLast}
	e := raw.Control(func(fd uintptr) {
		keepAlive(int(fd))
		for _, l := range g.loops {
			var c *Conn
			if c, err = l.listen(int(fd)); err != nil {
				return
			}
			n.ends = append(n.ends, c)
		}
	})
	if err = errors.Join(e, err); err != nil {
		return nil, errors.Join(err, n.Close())
	}
	return n, ln.Close()
}

// keepAlive sets what accepted sockets inherit. A Unix socket has none of it.
func keepAlive(fd int) {
	for _, o := range [...]struct{ level, name, value int }{
		{unix.IPPROTO_TCP, unix.TCP_NODELAY, 1},
		{unix.SOL_SOCKET, unix.SO_KEEPALIVE, 1},
		{unix.IPPROTO_TCP, unix.TCP_KEEPIDLE, int(keepIdle / time.Second)},
		{unix.IPPROTO_TCP, unix.TCP_KEEPINTVL, int(keepEvery / time.Second)},
		{unix.IPPROTO_TCP, unix.TCP_KEEPCNT, keepTries},
	} {
		_ = unix.SetsockoptInt(fd, o.level, o.name, o.value)
	}
}

// listen registers the listening socket fd, by a descriptor of its own.
func (l *Loop) listen(fd int) (*Conn, error) {
	own, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 3)
	if err != nil {
		return nil, fmt.Errorf("a descriptor for a loop: %w", err)
	}
	c := &Conn{fd: own, listens: true}
	// Of the loops that sleep one is woken.
	if err := c.join(l, unix.EPOLLIN|unix.EPOLLET|unix.EPOLLEXCLUSIVE); err != nil {
		return nil, errors.Join(err, syscall.Close(own))
	}
	return c, nil
}

// Addr returns the address that is listened on.
func (n *Listener) Addr() net.Addr { return n.addr }

// Close ends Serve. What the kernel has told this listener of by then, and nobody else
// who has the socket, is still accepted; what comes later stays in its queue for them.
// It may come twice.
func (n *Listener) Close() error {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.closed = true
	var err error
	for _, c := range n.ends {
		if n.serves {
			c.acceptLast(n.most)
		} else if e := c.Close(); !errors.Is(e, net.ErrClosed) {
			err = errors.Join(err, e)
		}
	}
	return err
}

// Serve accepts until Close, and calls take for each connection, which take owns:
// on a loop, so that it must not wait. Whatever else does not let it accept is told to
// trouble, and accepting goes on after the pause that it returns. Serve returns once
// no take runs any more, nor will. It is called once.
func (n *Listener) Serve(take func(*Conn), trouble func(error) (pause time.Duration)) {
	n.mu.Lock()
	if n.serves = !n.closed; !n.serves {
		n.mu.Unlock()
		return
	}
	var wg sync.WaitGroup
	for _, c := range n.ends {
		wg.Add(1)
		c.Loop().Begin(&acceptor{c: c, take: take, trouble: trouble, done: wg.Done})
	}
	n.mu.Unlock()
	wg.Wait()
}

// acceptor is what a loop runs for a Listener.
type acceptor struct {
	c       *Conn
	take    func(*Conn)
	trouble func(error) time.Duration
	done    func()
}

// Start accepts.
func (a *acceptor) Start(t *Task) {
	defer a.done()
	a.c.Own(t)
	for {
		c, err := a.c.accept(t.loop)
		switch {
		case err == nil:
			a.take(c)
			t.step()
		case errors.Is(err, net.ErrClosed):
			return
		default:
			pause := a.trouble(err)
			t.Block(func() { time.Sleep(pause) })
		}
	}
}

// accept waits for a connection and brings it to l, or to a loop that has far fewer.
func (c *Conn) accept(l *Loop) (*Conn, error) {
	s := &c.rd
	s.mu.Lock()
	for {
		if err := s.failedLocked(); err != nil {
			s.mu.Unlock()
			return nil, err
		}
		switch {
		case c.last && (s.dry || c.more == 0):
			return nil, c.acceptedLastLocked()
		case s.dry:
			c.waitLocked(s)
			continue
		}
		var from syscall.RawSockaddrAny
		size := uint32(unsafe.Sizeof(from))
		fd, _, errno := syscall.RawSyscall6(unix.SYS_ACCEPT4, uintptr(c.fd), uintptr(unsafe.Pointer(&from)), uintptr(unsafe.Pointer(&size)), unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0, 0)
		switch {
		case again(errno), errno == syscall.ECONNABORTED, errno == syscall.EPROTO: // of a connection that has gone
		case errno == syscall.EAGAIN, errno != 0 && c.last:
			s.dry = true
		case errno != 0:
			s.mu.Unlock()
			return nil, os.NewSyscallError("accept", errno)
		default:
			c.more-- // which counts if it is the last
			s.mu.Unlock()
			n := &Conn{fd: int(fd), remote: addrOf(&from, size)}
			_, n.stream = n.remote.(*net.TCPAddr)
			if err := n.join(l.lighter(), connEvents); err != nil {
				return nil, errors.Join(err, syscall.Close(n.fd))
			}
			return n, nil
		}
	}
}

// Look has a loop look for a connection of which nobody was told: the one who was, of
// those who have the socket, may have been killed. It is to be called now and then.
func (n *Listener) Look() {
	n.mu.Lock()
	c := n.ends[n.next%len(n.ends)]
	n.next++
	n.mu.Unlock()
	c.rd.mu.Lock()
	defer c.rd.mu.Unlock()
	if !c.rd.closed {
		c.rd.dry = false
		c.rouse(&c.rd)
	}
}

// acceptLast has a task that accepts end, once it has accepted what is queued: the
// kernel tells one of those who wait for a connection, and if that is this one it
// would tell no other when this one leaves. It accepts no more than most.
func (c *Conn) acceptLast(most int) {
	c.rd.mu.Lock()
	defer c.rd.mu.Unlock()
	if c.rd.closed || c.last {
		return
	}
	c.last, c.more, c.rd.dry = true, most, false
	c.forgetLocked()
	c.rouse(&c.rd)
}

// acceptedLastLocked closes c, and unlocks it.
func (c *Conn) acceptedLastLocked() error {
	c.wr.mu.Lock()
	_ = c.closeLocked()
	c.wr.mu.Unlock()
	c.rd.mu.Unlock()
	return net.ErrClosed
}

// lighter returns l, unless another loop has far fewer connections.
func (l *Loop) lighter() *Loop {
	best := l
	for _, other := range l.group.loops {
		if n := other.conns.Load(); n+n/8+moreConns < l.conns.Load() && n < best.conns.Load() {
			best = other
		}
	}
	return best
}

// addrOf is the address of size bytes that the kernel has filled in.
func addrOf(raw *syscall.RawSockaddrAny, size uint32) net.Addr {
	switch {
	case raw.Addr.Family == syscall.AF_INET && size >= syscall.SizeofSockaddrInet4:
		a := (*syscall.RawSockaddrInet4)(unsafe.Pointer(raw))
		return net.TCPAddrFromAddrPort(netip.AddrPortFrom(netip.AddrFrom4(a.Addr), portOf(a.Port)))
	case raw.Addr.Family == syscall.AF_INET6 && size >= syscall.SizeofSockaddrInet6:
		a := (*syscall.RawSockaddrInet6)(unsafe.Pointer(raw))
		return net.TCPAddrFromAddrPort(netip.AddrPortFrom(netip.AddrFrom16(a.Addr).Unmap(), portOf(a.Port)))
	}
	return &net.UnixAddr{Net: "unix"}
}

// portOf is a port in network order.
func portOf(p uint16) uint16 {
	b := (*[2]byte)(unsafe.Pointer(&p))
	return uint16(b[0])<<8 | uint16(b[1])
}
