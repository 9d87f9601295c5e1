package sandbox

import (
	"fmt"
	"math"
	"slices"
	"strconv"
	"strings"
)

// MaxGroups bounds the supplementary groups of an identity.
const MaxGroups = 32

// maxCap is the highest number that a capability can have: the sets are 64 bits.
const maxCap = 63

// An Identity is whom a process is after it gave up the rest. No number in it is
// 0 (root) or the highest one, which the system takes for "as before".
type Identity struct {
	UID, GID uint32
	Groups   []uint32  // the supplementary groups, all of them; at most MaxGroups
	Keep     []uintptr // capabilities kept, such as unix.CAP_SETUID
}

const (
	argAs = "--as=" // become this identity
	argIs = "--is=" // this identity was taken on: verify
	// openBounds follows argIs's identity when the bounding set could not be
	// emptied for want of CAP_SETPCAP.
	openBounds = ":open"
)

// Arg is the hidden first argument that makes Enter take on the identity:
// --as=uid:gid:g1,g2:cap1,cap2.
func (id Identity) Arg() string { return argAs + id.text() }

func (id Identity) text() string {
	groups := make([]string, 0, len(id.Groups))
	for _, g := range id.Groups {
		groups = append(groups, strconv.FormatUint(uint64(g), 10))
	}
	caps := make([]string, 0, len(id.Keep))
	for _, c := range id.Keep {
		caps = append(caps, strconv.FormatUint(uint64(c), 10))
	}
	return fmt.Sprintf("%d:%d:%s:%s", id.UID, id.GID, strings.Join(groups, ","), strings.Join(caps, ","))
}

// ParseArg reads what Arg writes.
func ParseArg(arg string) (Identity, error) {
	s, ok := strings.CutPrefix(arg, argAs)
	if !ok {
		return Identity{}, fmt.Errorf("identity %q: does not begin with %s", arg, argAs)
	}
	return parse(s)
}

func parse(s string) (Identity, error) {
	parts := strings.Split(s, ":")
	if len(parts) != 4 {
		return Identity{}, fmt.Errorf("identity %q: want uid:gid:groups:capabilities", s)
	}
	var id Identity
	uid, err := numbers(parts[0], 1)
	if err != nil || len(uid) != 1 {
		return Identity{}, fmt.Errorf("identity %q: bad user", s)
	}
	gid, err := numbers(parts[1], 1)
	if err != nil || len(gid) != 1 {
		return Identity{}, fmt.Errorf("identity %q: bad group", s)
	}
	if id.Groups, err = numbers(parts[2], MaxGroups); err != nil {
		return Identity{}, fmt.Errorf("identity %q: groups: %w", s, err)
	}
	caps, err := numbers(parts[3], maxCap+1)
	if err != nil {
		return Identity{}, fmt.Errorf("identity %q: capabilities: %w", s, err)
	}
	id.UID, id.GID = uid[0], gid[0]
	for _, c := range caps {
		id.Keep = append(id.Keep, uintptr(c))
	}
	return id, id.validate()
}

func numbers(s string, limit int) ([]uint32, error) {
	if s == "" {
		return nil, nil
	}
	parts := strings.SplitN(s, ",", limit+1)
	if len(parts) > limit {
		return nil, fmt.Errorf("more than %d", limit)
	}
	ns := make([]uint32, 0, len(parts))
	for _, p := range parts {
		n, err := strconv.ParseUint(p, 10, 32)
		if err != nil {
			return nil, fmt.Errorf("%q is not a number", p)
		}
		ns = append(ns, uint32(n))
	}
	return ns, nil
}

func (id Identity) validate() error {
	for _, n := range slices.Concat([]uint32{id.UID, id.GID}, id.Groups) {
		if n == 0 || n == math.MaxUint32 {
			return fmt.Errorf("identity %q: %d is not a user or group to become", id.text(), n)
		}
	}
	if len(id.Groups) > MaxGroups {
		return fmt.Errorf("identity %q: %d groups, the limit is %d", id.text(), len(id.Groups), MaxGroups)
	}
	for _, c := range id.Keep {
		if c > maxCap {
			return fmt.Errorf("identity %q: %d is not a capability", id.text(), c)
		}
	}
	return nil
}

// keepSet is Keep as bits.
func (id Identity) keepSet() uint64 {
	var set uint64
	for _, c := range id.Keep {
		set |= 1 << c
	}
	return set
}
