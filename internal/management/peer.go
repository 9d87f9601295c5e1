package management

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"os/user"
	"slices"
	"strconv"
	"unsafe"

	"golang.org/x/sys/unix"

	"tako/internal/tako"
)

// A peer is who is at the other end, as the kernel knew it when it connected.
type peer struct {
	PID    int32
	UID    uint32
	Groups []uint32 // the primary one first
}

// peerOf asks the kernel who is at the other end.
func peerOf(c *net.UnixConn) (peer, error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return peer{}, fmt.Errorf("peer: %w", err)
	}
	var (
		p    peer
		fail error
	)
	err = raw.Control(func(fd uintptr) {
		cred, err := unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
		if err != nil {
			fail = err
			return
		}
		p = peer{PID: cred.Pid, UID: cred.Uid, Groups: []uint32{cred.Gid}}
		groups, err := peerGroups(int(fd))
		p.Groups, fail = append(p.Groups, groups...), err
	})
	if err := errors.Join(err, fail); err != nil {
		return peer{}, fmt.Errorf("peer: %w", err)
	}
	return p, nil
}

// peerGroups returns the supplementary groups of the other end.
func peerGroups(fd int) ([]uint32, error) {
	buf := make([]byte, 64*4)
	for {
		size := uint32(len(buf)) // 65536 groups at most
		// The unix package reads this option as text, and cuts it at the first zero.
		_, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(fd), unix.SOL_SOCKET, unix.SO_PEERGROUPS,
			uintptr(unsafe.Pointer(&buf[0])), uintptr(unsafe.Pointer(&size)), 0)
		switch {
		case errno == unix.ERANGE && int(size) > len(buf):
			buf = make([]byte, size)
			continue
		case errno != 0:
			return nil, fmt.Errorf("groups: %w", errno)
		}
		groups := make([]uint32, 0, size/4)
		for b := buf[:size]; len(b) >= 4; b = b[4:] {
			groups = append(groups, binary.NativeEndian.Uint32(b))
		}
		return groups, nil
	}
}

// owns says whether the peer is root or the server's own user.
func (p peer) owns(ownUID uint32) bool { return p.UID == 0 || p.UID == ownUID }

// admit says why the peer may not use the socket, or nil. A group of 0 is none.
func (p peer) admit(ownUID, gid uint32) error {
	if p.owns(ownUID) || gid != 0 && slices.Contains(p.Groups, gid) {
		return nil
	}
	who := "NAME"
	if u, err := user.LookupId(strconv.FormatUint(uint64(p.UID), 10)); err == nil {
		who = u.Username
	}
	if gid == 0 {
		return tako.Errorf(tako.CodeForbidden,
			"Permission denied: uid %d may not use the management socket; only root and uid %d may. Please try again with sudo.", p.UID, ownUID)
	}
	g, err := user.LookupGroupId(strconv.FormatUint(uint64(gid), 10))
	if err != nil {
		return tako.Errorf(tako.CodeForbidden,
			"Permission denied: uid %d may not use the management socket; only root, uid %d and members of group %d may. Please try again with sudo.", p.UID, ownUID, gid)
	}
	return tako.Errorf(tako.CodeForbidden,
		"Permission denied: uid %d may not use the management socket; only root, uid %d and members of group %s may. To become one: `sudo usermod -aG %s %s`, then log in again.",
		p.UID, ownUID, g.Name, g.Name, who)
}
