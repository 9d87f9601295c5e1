package master

import (
	"bufio"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"tako/internal/fdstore"
	"tako/internal/ipc"
	"tako/internal/wire"
)

// Backlog is how many connections may wait unaccepted on each port; the kernel
// lowers it to net.core.somaxconn.
const Backlog = 4096

// A listener is a listening socket that the master opened or inherited. It is
// never accepted on here, and closed only when the process ends: it is a raw
// descriptor, so that nothing ever changes its mode under a proxy.
type listener struct {
	name string // wire.ListenerHTTP or wire.ListenerHTTPS
	fd   ipc.FD
	addr netip.AddrPort
}

// A wantedPort is a port that the settings name.
type wantedPort struct {
	name, flag string
	at         netip.AddrPort
}

// wantedPorts lists the ports that the settings name, on every address.
func wantedPorts(s settled) []wantedPort {
	addrs := s.listen
	if len(addrs) == 0 {
		addrs = []netip.Addr{netip.IPv4Unspecified(), netip.IPv6Unspecified()}
	}
	var all []wantedPort
	for _, addr := range addrs {
		all = append(all,
			wantedPort{wire.ListenerHTTP, "--port", netip.AddrPortFrom(addr, s.Port)},
			wantedPort{wire.ListenerHTTPS, "--tls-port", netip.AddrPortFrom(addr, s.TLSPort)})
	}
	return all
}

// openListeners opens the ports on every address that the settings name.
func openListeners(s settled) ([]listener, error) {
	var all []listener
	for _, w := range wantedPorts(s) {
		if n := portOf(all, w.name); w.at.Port() == 0 && n != 0 {
			w.at = netip.AddrPortFrom(w.at.Addr(), n) // port 0: the same number on all addresses
		}
		l, err := openPort(s, w)
		if err != nil {
			for _, l := range all {
				l.fd.Close()
			}
			return nil, err
		}
		if l.fd != 0 {
			all = append(all, l)
		}
	}
	return all, nil
}

// openPort opens one port. On a host without IPv6, and no address asked for, that
// half is left out: the listener is then zero.
func openPort(s settled, w wantedPort) (listener, error) {
	fd, err := listenTCP(w.at)
	if len(s.listen) == 0 && w.at.Addr().Is6() && (errors.Is(err, unix.EAFNOSUPPORT) || errors.Is(err, unix.EADDRNOTAVAIL)) {
		return listener{}, nil
	}
	if err != nil {
		return listener{}, listenError(w.at, w.flag, err)
	}
	l := listener{name: w.name, fd: fd}
	if l.addr, err = boundTo(fd); err != nil {
		fd.Close()
		return listener{}, err
	}
	return l, nil
}

// inherited sorts the descriptors that systemd's socket units passed, by name:
// "http" and "https" are ports, "mgmt" is the management socket. Their order is
// never to be relied on.
func inherited(units map[ipc.FD]string) (ports []listener, mgmt ipc.FD, err error) {
	for _, fd := range slices.Sorted(maps.Keys(units)) {
		name := units[fd]
		listening, err := unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_ACCEPTCONN)
		if err != nil || listening != 1 {
			return nil, 0, fmt.Errorf("inherited descriptor %q is not a listening socket: mend the socket unit", name)
		}
		if err := unix.SetNonblock(int(fd), true); err != nil {
			return nil, 0, fmt.Errorf("inherited descriptor %q: %w", name, err)
		}
		switch name {
		case wire.ListenerHTTP, wire.ListenerHTTPS:
			addr, err := boundTo(fd)
			if err != nil {
				return nil, 0, fmt.Errorf("inherited descriptor %q: %w", name, err)
			}
			ports = append(ports, listener{name: name, fd: fd, addr: addr})
		case "mgmt":
			if mgmt != 0 {
				return nil, 0, fmt.Errorf("inherited descriptor %q comes twice", name)
			}
			mgmt = fd
		default:
			return nil, 0, fmt.Errorf("inherited descriptor %q: the name is none of http, https, mgmt: set FileDescriptorName= in the socket unit", name)
		}
	}
	return ports, mgmt, nil
}

// checkInherited says whether what systemd passed is enough to serve.
func checkInherited(ports []listener) error {
	if len(ports) == 0 {
		return nil
	}
	if len(ports) > MaxListeners {
		return fmt.Errorf("%d sockets were passed, the limit is %d: leave some ListenStream= out of the socket units", len(ports), MaxListeners)
	}
	for _, name := range []string{wire.ListenerHTTP, wire.ListenerHTTPS} {
		if portOf(ports, name) == 0 {
			return fmt.Errorf("no socket named %s was passed: enable the socket units of both http and https", name)
		}
	}
	return nil
}

// MaxListeners bounds the listening sockets: they travel in one message.
const MaxListeners = ipc.MaxFiles

// portOf returns the number of the first listener with this name.
func portOf(ls []listener, name string) uint16 {
	for _, l := range ls {
		if l.name == name {
			return l.addr.Port()
		}
	}
	return 0
}

// listenTCP opens one listening socket. It is TCP and not MPTCP, which Go's own
// net.Listen would make and port rules of sandboxes do not see.
func listenTCP(at netip.AddrPort) (ipc.FD, error) {
	var (
		family = unix.AF_INET6
		sa     unix.Sockaddr
	)
	if addr := at.Addr().Unmap(); addr.Is4() {
		family, sa = unix.AF_INET, &unix.SockaddrInet4{Port: int(at.Port()), Addr: addr.As4()}
	} else {
		sa = &unix.SockaddrInet6{Port: int(at.Port()), Addr: addr.As16()}
	}
	fd, err := unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, unix.IPPROTO_TCP)
	if err != nil {
		return 0, err
	}
	if err = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1); err == nil && family == unix.AF_INET6 {
		err = unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_V6ONLY, 1)
	}
	if err == nil {
		err = unix.Bind(fd, sa)
	}
	if err == nil {
		err = unix.Listen(fd, Backlog)
	}
	if err != nil {
		ipc.FD(fd).Close()
		return 0, err
	}
	return ipc.FD(fd), nil
}

func boundTo(fd ipc.FD) (netip.AddrPort, error) {
	sa, err := unix.Getsockname(int(fd))
	if err != nil {
		return netip.AddrPort{}, fmt.Errorf("listener: %w", err)
	}
	switch sa := sa.(type) {
	case *unix.SockaddrInet4:
		return netip.AddrPortFrom(netip.AddrFrom4(sa.Addr), uint16(sa.Port)), nil // a port
	case *unix.SockaddrInet6:
		return netip.AddrPortFrom(netip.AddrFrom16(sa.Addr), uint16(sa.Port)), nil // a port
	}
	return netip.AddrPort{}, fmt.Errorf("listener: descriptor %d is not a TCP socket", fd)
}

// listenError says what is in the way and what to do.
func listenError(at netip.AddrPort, flag string, err error) error {
	switch {
	case errors.Is(err, unix.EADDRINUSE):
		who := "another program"
		if holder := holderOf(at.Port()); holder != "" {
			who = holder
		}
		return fmt.Errorf("port %d is in use by %s: stop it, or choose another port with %s", at.Port(), who, flag)
	case errors.Is(err, unix.EACCES):
		return fmt.Errorf("uid %d may not open port %d: start tako-master as root or by systemd, or choose a port above 1023 with %s", os.Geteuid(), at.Port(), flag)
	case errors.Is(err, unix.EADDRNOTAVAIL):
		return fmt.Errorf("%s is not an address of this host: mend --listen-address", at.Addr())
	}
	return fmt.Errorf("listen on %s: %w", at, err)
}

// holderOf names the process that listens on a port, as far as we may see it.
func holderOf(port uint16) string {
	inodes := make(map[string]bool)
	for _, file := range []string{"/proc/net/tcp", "/proc/net/tcp6"} {
		listeningInodes(file, port, inodes)
	}
	if len(inodes) == 0 {
		return ""
	}
	procs, err := filepath.Glob("/proc/[0-9]*/fd/*")
	if err != nil {
		return ""
	}
	for _, fd := range procs {
		target, err := os.Readlink(fd)
		if err != nil || !inodes[target] {
			continue
		}
		pid := strings.Split(fd, "/")[2]
		name, err := os.ReadFile("/proc/" + pid + "/comm")
		if err != nil {
			continue
		}
		return fmt.Sprintf("%s (pid %s)", strings.TrimSpace(string(name)), pid)
	}
	return ""
}

func listeningInodes(file string, port uint16, into map[string]bool) {
	f, err := os.Open(file)
	if err != nil {
		return
	}
	defer f.Close()
	for lines := bufio.NewScanner(f); lines.Scan(); {
		w := strings.Fields(lines.Text())
		if len(w) < 10 || w[3] != "0A" { // TCP_LISTEN
			continue
		}
		_, hex, _ := strings.Cut(w[1], ":")
		if p, err := strconv.ParseUint(hex, 16, 16); err == nil && uint16(p) == port {
			into["socket:["+w[9]+"]"] = true
		}
	}
}

// activated returns what systemd kept for us and what its socket units passed, and
// forgets the environment variables that say so: children must not see them.
func activated() (kept fdstore.Passed, ports []listener, mgmt ipc.FD, err error) {
	pid, err := strconv.Atoi(os.Getenv("LISTEN_PID"))
	if err != nil || pid != os.Getpid() {
		return nil, nil, 0, nil //nolint:nilerr // not for us
	}
	n, err := strconv.Atoi(os.Getenv("LISTEN_FDS"))
	names := strings.Split(os.Getenv("LISTEN_FDNAMES"), ":")
	for _, name := range []string{"LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"} {
		_ = os.Unsetenv(name)
	}
	if err != nil || n < 0 || n != len(names) {
		return nil, nil, 0, fmt.Errorf("LISTEN_FDS and LISTEN_FDNAMES do not agree: start tako-master by its units")
	}
	const firstFD = 3 // SD_LISTEN_FDS_START
	kept, units := fdstore.Sort(names, firstFD)
	ports, mgmt, err = inherited(units)
	return kept, ports, mgmt, err
}

func socketpair() ([2]int, error) {
	return unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
}
