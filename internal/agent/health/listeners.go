package health

import (
	"bufio"
	"context"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// StrangerError says that a port of an instance is held by another user: the
// loopback ports are anybody's to bind.
type StrangerError struct {
	Port uint16
	UID  uint32
}

func (e *StrangerError) Error() string {
	return fmt.Sprintf("port %d is held by another user (uid %d), not by the app: end that program, or choose other ports with --instance-ports", e.Port, e.UID)
}

// Dial connects to an instance's port on 127.0.0.1. With a uid that is not 0 the
// listener must be that user's, before the connection and after it, or the error
// is a *StrangerError. The connection is the caller's to close.
func Dial(ctx context.Context, port uint16, uid uint32) (*net.TCPConn, error) {
	var d net.Dialer
	addr := netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), port)
	if uid == 0 {
		return dial(ctx, &d, addr)
	}
	if err := ownedBy(port, uid); err != nil {
		return nil, err
	}
	conn, err := dial(ctx, &d, addr)
	if err != nil {
		return nil, err
	}
	if err := ownedBy(port, uid); err != nil {
		_ = conn.Close()
		return nil, err
	}
	return conn, nil
}

func dial(ctx context.Context, d *net.Dialer, addr netip.AddrPort) (*net.TCPConn, error) {
	conn, err := d.DialContext(ctx, "tcp4", addr.String())
	if err != nil {
		return nil, err
	}
	tcp := conn.(*net.TCPConn)
	// A port in the ephemeral range can be given to this very connection, which
	// then talks to itself.
	if tcp.LocalAddr().String() == tcp.RemoteAddr().String() {
		_ = tcp.Close()
		return nil, unix.ECONNREFUSED
	}
	return tcp, nil
}

// ownedBy checks that every listener which a connection to 127.0.0.1 at port may
// reach belongs to uid, and that there is one.
func ownedBy(port uint16, uid uint32) error {
	ls, err := listeners(port)
	if err != nil {
		return fmt.Errorf("find the owner of port %d: %w", port, err)
	}
	found := false
	for _, l := range ls {
		if a := l.addr.Addr().Unmap(); !a.IsUnspecified() && a != netip.AddrFrom4([4]byte{127, 0, 0, 1}) {
			continue
		}
		if l.uid != uid {
			return &StrangerError{Port: port, UID: l.uid}
		}
		found = true
	}
	if !found {
		return unix.ECONNREFUSED
	}
	return nil
}

// elsewhere says on which other address the instance listens, "" if on none that
// can be found.
func (t *Target) elsewhere() string {
	ls, err := listeners(0)
	if err != nil {
		return ""
	}
	var inodes map[uint32]bool
	if t.UID == 0 {
		inodes = socketsOfGroup(t.PID)
	}
	for _, l := range ls {
		if t.UID != 0 && l.uid != t.UID || t.UID == 0 && !inodes[l.inode] {
			continue
		}
		if t.Port == 0 {
			return fmt.Sprintf("it listens on %s instead of %s: use TAKO_APP_SOCKET", l.addr, t.Socket)
		}
		return fmt.Sprintf("it listens on %s instead of 127.0.0.1:%d: use PORT and HOST", l.addr, t.Port)
	}
	return ""
}

// maxProcesses bounds the search for an instance's processes.
const maxProcesses = 100_000

// socketsOfGroup returns the inodes of the sockets that the processes of a group
// hold, as far as this process may look.
func socketsOfGroup(pgid int) map[uint32]bool {
	inodes := make(map[uint32]bool)
	dir, err := os.Open("/proc")
	if err != nil {
		return nil
	}
	defer dir.Close() // only read
	names, _ := dir.Readdirnames(maxProcesses)
	for _, name := range names {
		if pid, err := strconv.Atoi(name); err != nil || groupOf(pid) != pgid {
			continue
		}
		fds := filepath.Join("/proc", name, "fd")
		entries, _ := os.ReadDir(fds)
		for _, e := range entries {
			link, err := os.Readlink(filepath.Join(fds, e.Name()))
			num, ok := strings.CutPrefix(link, "socket:[")
			if err != nil || !ok {
				continue
			}
			if n, err := strconv.ParseUint(strings.TrimSuffix(num, "]"), 10, 32); err == nil {
				inodes[uint32(n)] = true
			}
		}
	}
	return inodes
}

// groupOf returns a process's group, 0 if it is gone.
func groupOf(pid int) int {
	g, err := unix.Getpgid(pid)
	if err != nil {
		return 0
	}
	return g
}

// listener is a TCP socket that listens.
type listener struct {
	addr  netip.AddrPort
	uid   uint32
	inode uint32
}

// listeners returns the TCP listeners at port, or at every port for 0. It asks
// the kernel by sock_diag and, where that is not to be had, reads /proc.
func listeners(port uint16) ([]listener, error) {
	ls, err := diagListeners(port)
	if err == nil {
		return ls, nil
	}
	return procListeners("/proc/net", port)
}

// The layout of sock_diag(7) for inet sockets, and the state of a listener.
const (
	tcpListen    = 10
	diagReqSize  = 16 + 56
	diagMsgSize  = 72
	maxListeners = 65536
	diagTimeout  = 500 * time.Millisecond
)

func diagListeners(port uint16) ([]listener, error) {
	s, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, unix.NETLINK_INET_DIAG)
	if err != nil {
		return nil, err
	}
	defer unix.Close(s) // nothing is to be done about it
	tv := unix.NsecToTimeval(int64(diagTimeout))
	if err := unix.SetsockoptTimeval(s, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv); err != nil {
		return nil, err
	}
	var all []listener
	for _, family := range []byte{unix.AF_INET, unix.AF_INET6} {
		req := make([]byte, diagReqSize)
		ne := binary.NativeEndian
		ne.PutUint32(req[0:], diagReqSize)
		ne.PutUint16(req[4:], unix.SOCK_DIAG_BY_FAMILY)
		ne.PutUint16(req[6:], unix.NLM_F_REQUEST|unix.NLM_F_DUMP)
		req[16], req[17] = family, unix.IPPROTO_TCP
		ne.PutUint32(req[20:], 1<<tcpListen)
		binary.BigEndian.PutUint16(req[24:], port)
		if err := unix.Sendto(s, req, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
			return nil, err
		}
		if all, err = readDump(s, all); err != nil {
			return nil, err
		}
	}
	return slices.DeleteFunc(all, func(l listener) bool { return port != 0 && l.addr.Port() != port }), nil
}

// readDump reads the messages of one dump to its end.
func readDump(s int, all []listener) ([]listener, error) {
	buf := make([]byte, 64<<10)
	for {
		n, _, err := unix.Recvfrom(s, buf, 0)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return nil, err
		}
		for b := buf[:n]; len(b) >= 16; {
			size := int(binary.NativeEndian.Uint32(b))
			if size < 16 || size > len(b) {
				return nil, fmt.Errorf("sock_diag: a message of %d bytes in %d", size, len(b))
			}
			switch typ, body := binary.NativeEndian.Uint16(b[4:]), b[16:size]; typ {
			case unix.NLMSG_DONE:
				return all, nil
			case unix.NLMSG_ERROR:
				return nil, fmt.Errorf("sock_diag: refused")
			case unix.SOCK_DIAG_BY_FAMILY:
				if l, ok := parseDiag(body); ok && len(all) < maxListeners {
					all = append(all, l)
				}
			}
			b = b[min((size+3)&^3, len(b)):]
		}
	}
}

func parseDiag(b []byte) (listener, bool) {
	if len(b) < diagMsgSize || b[1] != tcpListen {
		return listener{}, false
	}
	var addr netip.Addr
	if b[0] == unix.AF_INET {
		addr = netip.AddrFrom4([4]byte(b[8:12]))
	} else {
		addr = netip.AddrFrom16([16]byte(b[8:24]))
	}
	return listener{
		addr:  netip.AddrPortFrom(addr, binary.BigEndian.Uint16(b[4:])),
		uid:   binary.NativeEndian.Uint32(b[64:]),
		inode: binary.NativeEndian.Uint32(b[68:]),
	}, true
}

// procListeners reads tcp and tcp6 in dir, which is /proc/net.
func procListeners(dir string, port uint16) ([]listener, error) {
	var all []listener
	for _, name := range []string{"tcp", "tcp6"} {
		f, err := os.Open(filepath.Join(dir, name))
		if name == "tcp6" && errors.Is(err, os.ErrNotExist) {
			continue // a kernel without IPv6
		}
		if err != nil {
			return nil, err
		}
		all, err = parseProc(f, all, port)
		_ = f.Close()
		if err != nil {
			return nil, err
		}
	}
	return all, nil
}

// parseProc reads the kernel's table of TCP sockets:
//
//	sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
//	 0: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000  1000        0 12345 …
func parseProc(r io.Reader, all []listener, port uint16) ([]listener, error) {
	sc := bufio.NewScanner(r)
	for sc.Scan() && len(all) < maxListeners {
		f := strings.Fields(sc.Text())
		if len(f) < 10 || f[3] != "0A" {
			continue
		}
		addr, ok := parseProcAddr(f[1])
		uid, err1 := strconv.ParseUint(f[7], 10, 32)
		inode, err2 := strconv.ParseUint(f[9], 10, 32)
		if !ok || err1 != nil || err2 != nil || port != 0 && addr.Port() != port {
			continue
		}
		all = append(all, listener{addr: addr, uid: uint32(uid), inode: uint32(inode)})
	}
	return all, sc.Err()
}

// parseProcAddr reads "0100007F:1F90": words in the machine's order, then the
// port.
func parseProcAddr(s string) (netip.AddrPort, bool) {
	host, num, ok := strings.Cut(s, ":")
	b, err := hex.DecodeString(host)
	port, err2 := strconv.ParseUint(num, 16, 16)
	if !ok || err != nil || err2 != nil || len(b) != 4 && len(b) != 16 {
		return netip.AddrPort{}, false
	}
	for i := 0; i < len(b); i += 4 {
		binary.NativeEndian.PutUint32(b[i:], binary.BigEndian.Uint32(b[i:]))
	}
	addr, _ := netip.AddrFromSlice(b)
	return netip.AddrPortFrom(addr, uint16(port)), true
}
