package main

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"strconv"

	"golang.org/x/sys/unix"
)

// The bodies that the app answers with.
const (
	smallBody = 1 << 10 // at /
	largeBody = 1 << 20 // at /big
	// acceptQueue is how many connections may wait to be accepted; the kernel
	// takes less if it is set so.
	acceptQueue = 16_384
	maxHead     = 8 << 10
)

// body is what both answers are cut from: the alphabet, over and over.
var body = bytes.Repeat([]byte("abcdefghijklmnopqrstuvwxyz"), largeBody/26+1)

// place is where an app says that it listens, at /where.
type place struct {
	PID    int    `json:"pid"`
	Port   int    `json:"port"`
	Socket string `json:"socket"`
}

// response is a whole answer.
func response(kind string, body []byte) []byte {
	head := fmt.Sprintf("HTTP/1.1 200 OK\r\nServer: app\r\nDate: Mon, 23 Nov 2026 07:47:01 GMT\r\nContent-Type: %s\r\nContent-Length: %d\r\n\r\n", kind, len(body))
	return append([]byte(head), body...)
}

// runApp is the app that tako runs and every proxy speaks to: one thread, one
// epoll set, ready answers, so that it costs little beside any proxy. It listens
// on the socket or the port that tako gave it, and ends by signal.
//
// A further name makes one process of many apps: what "tcp take NAME" listens on
// is what each "tcp give NAME" was given, too, so that many apps cost no more
// processes that wake up than one does.
func runApp(args []string) error {
	where := place{PID: os.Getpid()}
	var listener int
	var err error
	switch on := args[0]; on {
	case "tcp":
		where.Port, err = strconv.Atoi(cmp.Or(os.Getenv("PORT"), "3000"))
		if err == nil {
			listener, err = listenOn(unix.AF_INET, &unix.SockaddrInet4{Port: where.Port, Addr: netip.MustParseAddr("127.0.0.1").As4()})
		}
	case "unix":
		where.Socket = os.Getenv("TAKO_APP_SOCKET")
		listener, err = listenOn(unix.AF_UNIX, &unix.SockaddrUnix{Name: where.Socket})
	default:
		err = fmt.Errorf("listen on tcp or unix, not %q", on)
	}
	if err != nil {
		return err
	}
	a := &appLoop{
		taker: -1, listeners: make(map[int][]byte), conns: make(map[int]*appConn),
		small: response("text/plain", body[:smallBody]), large: response("text/plain", body[:largeBody]),
	}
	if a.epoll, err = unix.EpollCreate1(unix.EPOLL_CLOEXEC); err != nil {
		return err
	}
	if len(args) == 3 {
		at := &unix.SockaddrUnix{Name: "@" + args[2]} // of no folder: every user may
		if args[1] == "give" {
			return give(listener, at)
		}
		if a.taker, err = listenOn(unix.AF_UNIX, at); err != nil {
			return err
		}
		if err := a.watch(unix.EPOLL_CTL_ADD, a.taker, unix.EPOLLIN); err != nil {
			return err
		}
	}
	if err := a.listen(listener, where); err != nil {
		return err
	}
	return a.run()
}

// give hands a listener to the process that takes them, and stays, as an app does.
func give(listener int, at unix.Sockaddr) error {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	if err := errors.Join(unix.Connect(fd, at), unix.Sendmsg(fd, []byte{0}, unix.UnixRights(listener), nil, 0)); err != nil {
		return fmt.Errorf("give the listener away: %w", err)
	}
	for {
		_ = unix.Pause() // a signal ends us
	}
}

// take takes a listener that is given.
func (a *appLoop) take() error {
	fd, _, err := unix.Accept4(a.taker, unix.SOCK_CLOEXEC)
	if err != nil {
		return nil // it has gone
	}
	defer unix.Close(fd)
	room := make([]byte, unix.CmsgSpace(4))
	_, n, _, _, err := unix.Recvmsg(fd, make([]byte, 1), room, unix.MSG_CMSG_CLOEXEC)
	if err != nil {
		return err
	}
	messages, err := unix.ParseSocketControlMessage(room[:n])
	if err != nil || len(messages) != 1 {
		return fmt.Errorf("a message without a listener: %w", err)
	}
	fds, err := unix.ParseUnixRights(&messages[0])
	if err != nil || len(fds) != 1 {
		return fmt.Errorf("not one listener: %w", err)
	}
	at, err := unix.Getsockname(fds[0])
	if err != nil {
		return err
	}
	tcp, ok := at.(*unix.SockaddrInet4)
	if !ok {
		return errors.New("a listener that is none of TCP")
	}
	return a.listen(fds[0], place{PID: os.Getpid(), Port: tcp.Port})
}

// listen accepts on a listener from now on.
func (a *appLoop) listen(fd int, where place) error {
	text, err := json.Marshal(where)
	if err != nil {
		return err
	}
	a.listeners[fd] = response("application/json", text)
	return a.watch(unix.EPOLL_CTL_ADD, fd, unix.EPOLLIN)
}

func listenOn(family int, at unix.Sockaddr) (int, error) {
	fd, err := unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, err
	}
	if err := errors.Join(unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1), unix.Bind(fd, at)); err != nil {
		return -1, fmt.Errorf("bind: %w", err)
	}
	return fd, unix.Listen(fd, acceptQueue)
}

// appConn is one connection to the app.
type appConn struct {
	in    []byte
	out   []byte // what is left to be written
	wait  bool   // for room to write
	where []byte // the answer of its listener
}

type appLoop struct {
	epoll, taker int
	listeners    map[int][]byte // by descriptor, what each says of itself
	conns        map[int]*appConn
	small, large []byte
}

func (a *appLoop) run() error {
	events := make([]unix.EpollEvent, 512)
	for {
		n, err := unix.EpollWait(a.epoll, events, -1)
		if err != nil && !errors.Is(err, unix.EINTR) {
			return err
		}
		for _, e := range events[:max(n, 0)] {
			fd := int(e.Fd)
			if where, is := a.listeners[fd]; is {
				a.accept(fd, where)
				continue
			}
			if fd == a.taker {
				if err := a.take(); err != nil {
					return err
				}
				continue
			}
			if c := a.conns[fd]; c != nil && !a.serve(fd, c) {
				delete(a.conns, fd)
				unix.Close(fd)
			}
		}
	}
}

func (a *appLoop) watch(op, fd int, events uint32) error {
	return unix.EpollCtl(a.epoll, op, fd, &unix.EpollEvent{Events: events, Fd: int32(fd)}) //nolint:gosec // a descriptor
}

func (a *appLoop) accept(listener int, where []byte) {
	for {
		fd, _, err := unix.Accept4(listener, unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC)
		if err != nil {
			return // nobody is left, or no descriptor: the next event tries again
		}
		_ = unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1) // not of a Unix socket
		a.conns[fd] = &appConn{in: make([]byte, 0, maxHead), where: where}
		if err := a.watch(unix.EPOLL_CTL_ADD, fd, unix.EPOLLIN); err != nil {
			delete(a.conns, fd)
			unix.Close(fd)
		}
	}
}

// serve does what a connection is ready for; false: it is over.
func (a *appLoop) serve(fd int, c *appConn) bool {
	if len(c.out) == 0 {
		n, err := unix.Read(fd, c.in[len(c.in):cap(c.in)])
		if err != nil || n <= 0 {
			return errors.Is(err, unix.EAGAIN)
		}
		c.in = c.in[:len(c.in)+n]
		if !bytes.HasSuffix(c.in, []byte("\r\n\r\n")) {
			return len(c.in) < cap(c.in)
		}
		switch {
		case bytes.HasPrefix(c.in, []byte("GET /big")):
			c.out = a.large
		case bytes.HasPrefix(c.in, []byte("GET /where")):
			c.out = c.where
		default:
			c.out = a.small
		}
		c.in = c.in[:0]
	}
	n, err := unix.Write(fd, c.out)
	if err != nil && !errors.Is(err, unix.EAGAIN) {
		return false
	}
	c.out = c.out[max(n, 0):]
	if wait := len(c.out) > 0; wait != c.wait {
		c.wait = wait
		events := uint32(unix.EPOLLIN)
		if wait {
			events = unix.EPOLLOUT
		}
		return a.watch(unix.EPOLL_CTL_MOD, fd, events) == nil
	}
	return true
}
