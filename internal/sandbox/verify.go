package sandbox

import (
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Verify tries to get back what an identity had to give up and returns an error
// if that works, or if the kernel says that this process is anything but id. It
// runs inside Enter; calling it again changes nothing.
func Verify(id Identity) error { return verify(id, false) }

// verify with openBounds accepts any bounding set.
func verify(id Identity, openBounds bool) error {
	if err := checkStatus(id, openBounds); err != nil {
		return fmt.Errorf("give up powers: %w", err)
	}
	keep := id.keepSet()
	tries := []struct {
		what string
		with uintptr // what would allow it
		try  func() error
	}{
		{"become root", unix.CAP_SETUID, func() error { return setRes(unix.SYS_SETRESUID, 0) }},
		{"take root's group", unix.CAP_SETGID, func() error { return setRes(unix.SYS_SETRESGID, 0) }},
		{"change groups", unix.CAP_SETGID, func() error { return setGroups([]uint32{0}) }},
		{"unset no new privileges", maxCap, func() error { _, err := prctl(unix.PR_SET_NO_NEW_PRIVS, 0, 0); return err }},
	}
	for _, t := range tries {
		if keep&(1<<t.with) == 0 && t.try() == nil {
			return fmt.Errorf("give up powers: could still %s", t.what)
		}
	}
	return nil
}

// checkStatus compares /proc/self/status with id.
func checkStatus(id Identity, openBounds bool) error {
	b, err := os.ReadFile("/proc/self/status")
	if err != nil {
		return fmt.Errorf("verify: %w", err)
	}
	got := make(map[string]string)
	for line := range strings.Lines(string(b)) {
		if k, v, ok := strings.Cut(line, ":"); ok {
			got[k] = strings.Join(strings.Fields(v), " ")
		}
	}
	four := func(n uint32) string {
		return strings.TrimSpace(strings.Repeat(strconv.FormatUint(uint64(n), 10)+" ", 4))
	}
	groups := slices.Clone(id.Groups)
	slices.Sort(groups)
	set := fmt.Sprintf("%016x", id.keepSet())
	want := map[string]string{
		"Uid": four(id.UID), "Gid": four(id.GID), "Groups": strings.Trim(fmt.Sprint(groups), "[]"),
		"CapInh": set, "CapPrm": set, "CapEff": set, "CapAmb": set, "CapBnd": set, "NoNewPrivs": "1",
	}
	if openBounds {
		delete(want, "CapBnd")
	}
	for _, k := range []string{"Uid", "Gid", "Groups", "CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb", "NoNewPrivs"} {
		if w, ok := want[k]; ok && got[k] != w {
			return fmt.Errorf("%s is %q, want %q", k, got[k], w)
		}
	}
	return nil
}
