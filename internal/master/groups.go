package master

import (
	"cmp"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/hashicorp/go-hclog"
	"golang.org/x/sys/unix"

	"tako/internal/logging"
	"tako/internal/supervise"
	"tako/internal/wire"
)

// groupPrefix begins the name of our folder in each hierarchy of control groups;
// our pid ends it.
const groupPrefix = "tako-"

// agentGroup is the group below our folder of version 2 that the agent runs in:
// who puts a process into a group must himself be below the folder that he owns.
const agentGroup = "main"

// groupsWait bounds the removal of our folders: the kernel may still be at the
// last processes in them.
const groupsWait = time.Second

// A groups is our folders of control groups.
type groups struct {
	wire.Groups
	pid   int    // in the name of our folders: of the first of us, if that died
	above string // the folder that V2 is in
	moved bool   // we have left it, for agentGroup
	log   hclog.Logger
}

// A mount is where a hierarchy is mounted, and which part of it.
type mount struct{ root, point string }

// groupMounts finds the hierarchies in the text of mountinfo: of version 1 by
// controller, that of version 2 by "".
func groupMounts(mountinfo string) map[string]mount {
	found := make(map[string]mount)
	for line := range strings.Lines(mountinfo) {
		before, after, _ := strings.Cut(strings.TrimSpace(line), " - ")
		b, a := strings.Fields(before), strings.Fields(after)
		if len(b) < 5 || len(a) < 3 {
			continue
		}
		m := mount{root: b[3], point: b[4]}
		switch a[0] {
		case "cgroup2":
			found[""] = m
		case "cgroup":
			for option := range strings.SplitSeq(a[2], ",") {
				if option == "memory" || option == "cpu" || option == "pids" {
					found[option] = m
				}
			}
		}
	}
	return found
}

// ownGroups finds our own folder in each hierarchy, by the text of
// /proc/self/cgroup.
func ownGroups(cgroup string, mounts map[string]mount) map[string]string {
	own := make(map[string]string)
	for line := range strings.Lines(cgroup) {
		f := strings.SplitN(strings.TrimSpace(line), ":", 3) // number, controllers, path
		if len(f) != 3 {
			continue
		}
		for c := range strings.SplitSeq(f[1], ",") {
			m, ok := mounts[c]
			path, inside := strings.CutPrefix(f[2], strings.TrimSuffix(m.root, "/"))
			if ok && inside && (path == "" || path[0] == '/') {
				own[c] = filepath.Join(m.point, path)
			}
		}
	}
	return own
}

// makeGroups makes our folders as far as we may, for the agent's user, and
// removes what dead servers left there.
func (s *server) makeGroups() *groups {
	log := s.log
	g := &groups{log: log, pid: cmp.Or(s.groupsPID, os.Getpid())}
	mountinfo, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return g
	}
	cgroup, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return g
	}
	own := ownGroups(string(cgroup), groupMounts(string(mountinfo)))
	name := groupPrefix + strconv.Itoa(g.pid)
	if above, ok := strings.CutSuffix(own[""], "/"+name+"/"+agentGroup); ok {
		own[""], g.moved = above, true // an image of this process before us went there
	}
	for _, above := range own {
		sweepGroups(above, name)
	}
	folder := func(controller string) string {
		above, ok := own[controller]
		if !ok {
			return ""
		}
		path := filepath.Join(above, name)
		if err := os.Mkdir(path, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
			log.Debug("no control groups here", logging.Path, above, logging.Err, err)
			return ""
		}
		return path
	}
	g.Memory, g.CPU, g.PIDs = folder("memory"), folder("cpu"), folder("pids")
	if g.V2 = folder(""); g.V2 != "" {
		g.above = own[""]
		if err := g.delegate(); err != nil {
			log.Debug("control groups of version 2 cannot be used", logging.Err, err)
			g.dropV2()
		}
	}
	for _, dir := range g.folders() {
		if s.agentID == nil {
			break
		}
		for _, file := range []string{"", "cgroup.procs", "cgroup.threads", "cgroup.subtree_control"} {
			if err := os.Chown(filepath.Join(dir, file), int(s.agentID.UID), -1); err != nil && !errors.Is(err, fs.ErrNotExist) {
				log.Warn("control groups are not the agent's", logging.Err, err)
			}
		}
	}
	log.Debug("control groups", "v2", g.V2, "v2_controllers", g.V2Controllers, "memory", g.Memory, "cpu", g.CPU, "pids", g.PIDs)
	return g
}

func (g *groups) folders() []string {
	return slices.DeleteFunc([]string{g.V2, g.Memory, g.CPU, g.PIDs}, func(s string) bool { return s == "" })
}

// delegate lets groups below V2 have the controllers that we have, and makes the
// group of the agent.
func (g *groups) delegate() error {
	if err := os.Mkdir(filepath.Join(g.V2, agentGroup), 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	has, err := os.ReadFile(filepath.Join(g.above, "cgroup.controllers"))
	if err != nil {
		return err
	}
	for _, c := range []string{"memory", "cpu", "pids"} {
		if !slices.Contains(strings.Fields(string(has)), c) {
			continue
		}
		err := control(g.above, "cgroup.subtree_control", "+"+c)
		if errors.Is(err, unix.EBUSY) && !g.moved && alone(g.above) {
			// A folder with controllers below it must have no process of its own.
			if err = control(filepath.Join(g.V2, agentGroup), "cgroup.procs", "0"); err == nil {
				g.moved = true
				err = control(g.above, "cgroup.subtree_control", "+"+c)
			}
		}
		if err == nil {
			err = control(g.V2, "cgroup.subtree_control", "+"+c)
		}
		if err != nil {
			g.log.Debug("a controller is not ours to give", "controller", c, logging.Err, err)
			continue
		}
		g.V2Controllers = append(g.V2Controllers, c)
	}
	return nil
}

// alone reports whether we are the only process of a group.
func alone(dir string) bool {
	b, err := os.ReadFile(filepath.Join(dir, "cgroup.procs"))
	return err == nil && strings.TrimSpace(string(b)) == strconv.Itoa(os.Getpid())
}

func control(dir, file, value string) error {
	return os.WriteFile(filepath.Join(dir, file), []byte(value), 0)
}

func (g *groups) dropV2() {
	removeGroup(g.V2)
	g.V2, g.V2Controllers = "", nil
}

// place puts the agent into its group. It has started nothing yet, and its number
// is its own until we wait for it.
func (g *groups) place(pid int) {
	if g.V2 == "" {
		return
	}
	if err := control(filepath.Join(g.V2, agentGroup), "cgroup.procs", strconv.Itoa(pid)); err != nil {
		g.log.Warn("tako-agent is not in its control group: limits may not be kept", logging.Err, err)
	}
}

// remove removes our folders, once the last process in them has ended.
func (g *groups) remove() {
	if g.moved {
		for _, c := range g.V2Controllers {
			_ = control(g.V2, "cgroup.subtree_control", "-"+c)
			_ = control(g.above, "cgroup.subtree_control", "-"+c)
		}
		_ = control(g.above, "cgroup.procs", "0") // else the folder stays for the next server
	}
	for _, dir := range g.folders() {
		for end := time.Now().Add(groupsWait); !removeGroup(dir); time.Sleep(5 * time.Millisecond) {
			if time.Now().After(end) {
				g.log.Warn("a control group stays", logging.Path, dir)
				break
			}
		}
	}
}

// removeGroup removes a folder of ours in which nothing runs, and reports whether
// it is gone.
func removeGroup(dir string) bool {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return errors.Is(err, fs.ErrNotExist)
	}
	for _, e := range entries {
		if e.IsDir() {
			_ = unix.Rmdir(filepath.Join(dir, e.Name()))
		}
	}
	return unix.Rmdir(dir) == nil
}

// sweepGroups removes the folders of servers that are gone. The kernel refuses to
// remove one in which something runs.
func sweepGroups(above, but string) {
	entries, err := os.ReadDir(above)
	if err != nil {
		return
	}
	for _, e := range entries {
		num, ok := strings.CutPrefix(e.Name(), groupPrefix)
		pid, err := strconv.Atoi(num)
		if !ok || err != nil || strconv.Itoa(pid) != num || e.Name() == but {
			continue
		}
		if _, lives := supervise.Look(pid); !lives {
			removeGroup(filepath.Join(above, e.Name()))
		}
	}
}
