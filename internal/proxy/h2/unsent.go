package h2

import (
	"net"
	"syscall"

	"golang.org/x/sys/unix"
)

// inner returns the connection that TLS runs on, or nc itself.
func inner(nc net.Conn) net.Conn {
	if t, ok := nc.(interface{ NetConn() net.Conn }); ok {
		return t.NetConn()
	}
	return nc
}

// unsent reports whether the peer has not got yet, as far as TCP knows, what was
// written to nc. To close it then may take that away: what still comes from the
// peer, a WINDOW_UPDATE say, would be answered by a reset.
func unsent(nc net.Conn) bool {
	s, ok := inner(nc).(syscall.Conn)
	if !ok {
		return false
	}
	raw, err := s.SyscallConn()
	if err != nil {
		return false
	}
	left := false
	_ = raw.Control(func(fd uintptr) {
		info, err := unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO) //nolint:gosec // a descriptor
		left = err == nil && info.State != unix.BPF_TCP_CLOSE && (info.Unacked > 0 || info.Notsent_bytes > 0)
	})
	return left
}
