package proxy

import (
	"fmt"
	"net"
	"slices"
	"syscall"

	"tako/internal/ipc"
)

// socket checks that fd is a stream socket of a family in use here, listening or
// not as asked.
func socket(fd ipc.FD, listening bool) error {
	domain, err := syscall.GetsockoptInt(int(fd), syscall.SOL_SOCKET, syscall.SO_DOMAIN)
	if err != nil {
		return fmt.Errorf("not a socket: %w", err)
	}
	if !slices.Contains([]int{syscall.AF_INET, syscall.AF_INET6, syscall.AF_UNIX}, domain) {
		return fmt.Errorf("a socket of family %d", domain)
	}
	if kind, err := syscall.GetsockoptInt(int(fd), syscall.SOL_SOCKET, syscall.SO_TYPE); err != nil || kind != syscall.SOCK_STREAM {
		return fmt.Errorf("a socket of type %d, not a stream", kind)
	}
	accepts, err := syscall.GetsockoptInt(int(fd), syscall.SOL_SOCKET, syscall.SO_ACCEPTCONN)
	if err != nil || (accepts == 1) != listening {
		return fmt.Errorf("a socket that listens: %t, wanted: %t", accepts == 1, listening)
	}
	return nil
}

// listenerOf makes a listener of fd, which it closes.
func listenerOf(name string, fd ipc.FD) (net.Listener, error) {
	if err := socket(fd, true); err != nil {
		fd.Close()
		return nil, fmt.Errorf("listener %s: %w", name, err)
	}
	f := fd.File(name)
	defer f.Close() // the listener has its own
	l, err := net.FileListener(f)
	if err != nil {
		return nil, fmt.Errorf("listener %s: %w", name, err)
	}
	return l, nil
}

// connOfFD makes a connection of fd, which it closes.
func connOfFD(fd ipc.FD) (net.Conn, error) {
	if err := socket(fd, false); err != nil {
		fd.Close()
		return nil, fmt.Errorf("connection to an instance: %w", err)
	}
	f := fd.File("instance")
	defer f.Close() // the connection has its own
	c, err := net.FileConn(f)
	if err != nil {
		return nil, fmt.Errorf("connection to an instance: %w", err)
	}
	return c, nil
}
