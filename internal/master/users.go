package master

import (
	"bufio"
	"fmt"
	"os"
	"os/user"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"tako/internal/sandbox"
)

// Users and groups by number, for a host where the package did not make them.
// They lie between the ranges of adduser, systemd and subuid, and below the apps'.
const (
	fallbackProxy = 69991
	fallbackAgent = 69992
	fallbackNet   = 69993
)

// netGroup is the group that instance sockets belong to.
const netGroup = "tako-net"

// capabilities returns our effective capabilities, as bits.
func capabilities() uint64 {
	f, err := os.Open("/proc/self/status")
	if err != nil {
		return 0
	}
	defer f.Close()
	for lines := bufio.NewScanner(f); lines.Scan(); {
		if hex, ok := strings.CutPrefix(lines.Text(), "CapEff:"); ok {
			caps, err := strconv.ParseUint(strings.TrimSpace(hex), 16, 64)
			if err != nil {
				return 0
			}
			return caps
		}
	}
	return 0
}

// agentPowers are what the agent needs to start programs as other users. Without
// the last one it cannot empty its instances' bounding sets.
var agentPowers = []uintptr{unix.CAP_SETUID, unix.CAP_SETGID, unix.CAP_KILL, unix.CAP_SETPCAP}

// powers returns those of agentPowers that we can hand on, and whether they are
// enough to start programs as other users.
func powers() (have []uintptr, enough bool) {
	caps := capabilities()
	for _, c := range agentPowers {
		if caps&(1<<c) != 0 {
			have = append(have, c)
		}
	}
	return have, len(have) >= 3 && slices.Equal(have[:3], agentPowers[:3])
}

// account finds a user by name or UID:GID.
func account(flag, s string, fallback uint32) (uid, gid uint32, err error) {
	if a, b, ok := strings.Cut(s, ":"); ok {
		u, err1 := strconv.ParseUint(a, 10, 31)
		g, err2 := strconv.ParseUint(b, 10, 31)
		if err1 != nil || err2 != nil || u == 0 || g == 0 {
			return 0, 0, fmt.Errorf("%s: %q is not UID:GID, both above 0", flag, s)
		}
		return uint32(u), uint32(g), nil
	}
	found, err := user.Lookup(s)
	if err != nil {
		return fallback, fallback, nil //nolint:nilerr // a host without our package's users
	}
	u, err1 := strconv.ParseUint(found.Uid, 10, 31)
	g, err2 := strconv.ParseUint(found.Gid, 10, 31)
	if err1 != nil || err2 != nil || u == 0 {
		return 0, 0, fmt.Errorf("%s: user %s has uid %s: choose one that is not root", flag, s, found.Uid)
	}
	return uint32(u), uint32(g), nil
}

// groupID finds a group by name; ok is false if there is none.
func groupID(name string) (gid uint32, ok bool) {
	g, err := user.LookupGroup(name)
	if err != nil {
		return 0, false
	}
	n, err := strconv.ParseUint(g.Gid, 10, 31)
	return uint32(n), err == nil
}

// identities settles whom the children run as. Without powers they run as we do.
func (s *server) identities() error {
	keep, enough := powers()
	if s.privileged = enough; !enough {
		return nil
	}
	pu, pg, err := account("--proxy-user", s.s.ProxyUser, fallbackProxy)
	if err != nil {
		return err
	}
	au, ag, err := account("--agent-user", s.s.AgentUser, fallbackAgent)
	if err != nil {
		return err
	}
	net, ok := groupID(netGroup)
	if !ok {
		net = fallbackNet
	}
	s.netGroup = net
	s.proxyID = &sandbox.Identity{UID: pu, GID: pg, Groups: []uint32{net}}
	s.agentID = &sandbox.Identity{
		UID: au, GID: ag, Groups: []uint32{net},
		Keep: keep,
	}
	return nil
}

func (s *server) proxyIdentity() *sandbox.Identity { return s.proxyID }
func (s *server) agentIdentity() *sandbox.Identity { return s.agentID }
