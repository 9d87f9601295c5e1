package launch

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"tako/internal/ipc"
	"tako/internal/supervise"
	"tako/internal/wire"
)

// The numbers of control groups.
const (
	// EmptyTimeout bounds the killing of what is in a group.
	EmptyTimeout = 2 * time.Second
	// RemoveTimeout bounds the removal of a group that is empty: the kernel may
	// still be at its last process.
	RemoveTimeout = 500 * time.Millisecond

	cpuPeriod   = 100_000 // µs, of CPU quotas
	minCPUQuota = 1_000   // µs, the kernel's least
)

// Groups makes control groups. The zero value makes none.
type Groups struct {
	in wire.Groups
	// noClone: processes cannot be born in a group of version 2 here.
	noClone atomic.Bool
}

// NewGroups makes control groups in these folders.
func NewGroups(in wire.Groups) *Groups { return &Groups{in: in} }

// parents are the folders of g, version 2 first.
func (g *Groups) parents() []string {
	return slices.DeleteFunc([]string{g.in.V2, g.in.Memory, g.in.CPU, g.in.PIDs}, func(s string) bool { return s == "" })
}

// Clear removes the groups in which nothing runs any more: those of an agent that
// has died.
func (g *Groups) Clear() {
	for _, parent := range g.parents() {
		entries, err := os.ReadDir(parent)
		if err != nil {
			continue
		}
		for _, e := range entries {
			if e.IsDir() {
				_ = unix.Rmdir(filepath.Join(parent, e.Name())) // the kernel refuses one that is in use
			}
		}
	}
}

// A group is the control groups of one process and all that comes from it, by
// one name in every hierarchy. A nil one is none.
type group struct {
	v2 string // "" if not in version 2
	v1 []string
	// The folders in which memory is bounded, and in which pids are.
	memory, pids string
}

// make makes the group of one process with its limits, and says by what they are
// kept and which are not. The group is nil if there is none to have.
func (g *Groups) make(name string, l wire.Limits) (*group, string) {
	made := &group{}
	dir := func(parent string) string {
		if parent == "" {
			return ""
		}
		path := filepath.Join(parent, name)
		if err := os.Mkdir(path, 0o755); err != nil && !errors.Is(err, os.ErrExist) {
			return ""
		}
		return path
	}
	if !g.noClone.Load() {
		made.v2 = dir(g.in.V2)
	}
	var missing []string
	by := make(map[string]bool)
	for _, c := range []struct {
		name, v1 string
		asked    bool
		set      func(l wire.Limits, dir string, v2 bool) error
		in       *string
	}{
		{"memory", g.in.Memory, l.Memory > 0, boundMemory, &made.memory},
		{"cpu", g.in.CPU, l.CPUMilli > 0, boundCPU, new(string)},
		{"pids", g.in.PIDs, l.PIDs > 0, boundPIDs, &made.pids},
	} {
		if made.v2 != "" && slices.Contains(g.in.V2Controllers, c.name) {
			*c.in = made.v2
			if c.asked && c.set(l, made.v2, true) == nil {
				by["cgroup v2"] = true
				continue
			}
		} else if path := groupV1(c.asked || c.name == "pids" && made.v2 == "", c.v1, dir); path != "" {
			made.v1 = append(made.v1, path)
			*c.in = path
			if c.asked && c.set(l, path, false) == nil {
				by["cgroup v1"] = true
				continue
			}
		}
		if c.asked {
			missing = append(missing, c.name)
		}
	}
	var text string
	switch {
	case by["cgroup v1"] && by["cgroup v2"]:
		text = "cgroup v1 and v2"
	case by["cgroup v1"]:
		text = "cgroup v1"
	case by["cgroup v2"]:
		text = "cgroup v2"
	}
	if len(missing) > 0 {
		text = strings.TrimPrefix(text+", not kept: "+strings.Join(missing, ", "), ", ")
	}
	if made.v2 == "" && len(made.v1) == 0 {
		return nil, text
	}
	return made, text
}

// groupV1 makes a group of version 1 if it is needed: for a limit, or, where there
// is no version 2, to find a process's descendants by. To enter one costs tens of
// milliseconds (the kernel waits for a grace period), which a cold start would
// feel.
func groupV1(needed bool, parent string, dir func(string) string) string {
	if !needed {
		return ""
	}
	return dir(parent)
}

// find returns the group that another agent made under this name, nil if there is
// none.
func (g *Groups) find(name string) *group {
	found := &group{}
	dir := func(parent string) string {
		path := filepath.Join(parent, name)
		if fi, err := os.Stat(path); parent == "" || err != nil || !fi.IsDir() {
			return ""
		}
		return path
	}
	found.v2 = dir(g.in.V2)
	for parent, in := range map[string]*string{g.in.Memory: &found.memory, g.in.CPU: new(string), g.in.PIDs: &found.pids} {
		if *in = dir(parent); *in != "" {
			found.v1 = append(found.v1, *in)
		}
	}
	if found.v2 != "" && found.memory == "" && slices.Contains(g.in.V2Controllers, "memory") {
		found.memory = found.v2
	}
	if found.v2 == "" && len(found.v1) == 0 {
		return nil
	}
	return found
}

func write(dir, file, value string) error {
	return os.WriteFile(filepath.Join(dir, file), []byte(value), 0)
}

func boundMemory(l wire.Limits, dir string, v2 bool) error {
	bytes := strconv.FormatInt(l.Memory, 10)
	if v2 {
		_ = write(dir, "memory.swap.max", "0")  // a kernel may lack it: there is no swap then
		_ = write(dir, "memory.oom.group", "1") // as above: else one process of it goes, not all
		return write(dir, "memory.max", bytes)
	}
	if err := write(dir, "memory.limit_in_bytes", bytes); err != nil {
		return err
	}
	_ = write(dir, "memory.memsw.limit_in_bytes", bytes) // only there where swap is counted
	return nil
}

func boundCPU(l wire.Limits, dir string, v2 bool) error {
	quota := strconv.Itoa(max(l.CPUMilli*(cpuPeriod/1000), minCPUQuota))
	if v2 {
		return write(dir, "cpu.max", quota+" "+strconv.Itoa(cpuPeriod))
	}
	if err := write(dir, "cpu.cfs_period_us", strconv.Itoa(cpuPeriod)); err != nil {
		return err
	}
	return write(dir, "cpu.cfs_quota_us", quota)
}

func boundPIDs(l wire.Limits, dir string, _ bool) error {
	return write(dir, "pids.max", strconv.Itoa(l.PIDs))
}

// kills returns how many processes of the group the kernel has killed for want
// of memory; ok is false if that is not known.
func (g *group) kills() (n int64, ok bool) {
	if g == nil || g.memory == "" {
		return 0, false
	}
	if n, ok := oomKills(filepath.Join(g.memory, "memory.events")); ok {
		return n, true
	}
	return oomKills(filepath.Join(g.memory, "memory.oom_control"))
}

// procs returns the processes of a group's folder, none if it cannot be read.
func procs(dir string) (pids []int) {
	b, err := os.ReadFile(filepath.Join(dir, "cgroup.procs"))
	if err != nil {
		return nil
	}
	for f := range strings.FieldsSeq(string(b)) {
		if pid, err := strconv.Atoi(f); err == nil && pid > 1 {
			pids = append(pids, pid)
		}
	}
	return pids
}

// empty kills all that is in the group, and reports whether nothing is left.
func (g *group) empty() bool {
	dirs := g.v1
	if g.v2 != "" {
		dirs = []string{g.v2}
		if write(g.v2, "cgroup.kill", "1") != nil { // Linux 5.14
			dirs = append(dirs, g.v1...)
		}
	}
	if g.pids != "" {
		_ = write(g.pids, "pids.max", "0") // it only makes the rest quicker
	}
	for end, pause := time.Now().Add(EmptyTimeout), time.Millisecond; ; pause = min(2*pause, 20*time.Millisecond) {
		left := 0
		for _, dir := range dirs {
			for _, pid := range procs(dir) {
				r, ok := supervise.Look(pid)
				if !ok || r.Zombie {
					continue
				}
				left++
				supervise.KillIf(r, func() bool {
					now := procs(dir)
					return slices.Contains(now, pid)
				})
			}
		}
		if left == 0 {
			return true
		}
		if time.Now().After(end) {
			return false
		}
		time.Sleep(pause) // groups of version 1 tell nobody when they are empty
	}
}

// remove removes the group, which is empty or becomes so.
func (g *group) remove() {
	if g == nil {
		return
	}
	for _, dir := range append(g.v1, g.v2) {
		for end := time.Now().Add(RemoveTimeout); dir != ""; time.Sleep(2 * time.Millisecond) {
			if err := unix.Rmdir(dir); !errors.Is(err, unix.EBUSY) || time.Now().After(end) {
				break // what stays is removed by Clear
			}
		}
	}
}

// enter puts this thread, which is to execute the program and so to be all that is
// left of the process, into groups of version 1. To move a whole process the
// kernel waits until every processor has been idle or in user code, some
// milliseconds for each group.
func enter(dirs []string) error {
	for _, dir := range dirs {
		if err := write(dir, "tasks", "0"); err != nil {
			return fmt.Errorf("enter its control group: %w", err)
		}
	}
	return nil
}

// NoClone is how a process's limits are kept where the kernel lets none be born
// in a control group.
const NoClone = "none: this kernel lets no process be born in a control group"

// spawn is the function of that name, with a process that is born in grp. If the
// kernel does not let us, grp has no folder of version 2 from then on.
func (g *Groups) spawn(grp *group, argv []string, files []uintptr) (*child, error) {
	if grp == nil || grp.v2 == "" {
		return spawn(argv, files, 0)
	}
	dir, err := unix.Open(grp.v2, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err == nil {
		defer ipc.FD(dir).Close()
		c, err := spawn(argv, files, dir)
		if err == nil {
			return c, nil
		}
	}
	c, err := spawn(argv, files, 0)
	if err == nil {
		g.noClone.Store(true)
		_ = unix.Rmdir(grp.v2) // Clear does it
		if grp.memory == grp.v2 {
			grp.memory = ""
		}
		if grp.pids == grp.v2 {
			grp.pids = ""
		}
		grp.v2 = ""
	}
	return c, err
}
