package agent

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"tako/internal/supervise"
	"tako/internal/wire"
)

// ownGroup is this process's folder in a hierarchy, "" if there is none. The
// controller is "" for version 2.
func ownGroup(tb testing.TB, controller string) string {
	tb.Helper()
	b, err := os.ReadFile("/proc/self/cgroup")
	must(tb, err)
	for line := range strings.Lines(string(b)) {
		f := strings.SplitN(strings.TrimSpace(line), ":", 3)
		if len(f) != 3 || !slices.Contains(strings.Split(f[1], ","), controller) {
			continue
		}
		for _, mounted := range []string{"/sys/fs/cgroup/" + f[1], "/sys/fs/cgroup/unified", "/sys/fs/cgroup"} {
			dir := filepath.Join(mounted, f[2])
			_, v2 := os.Stat(dir + "/cgroup.controllers")
			if _, err := os.Stat(dir + "/cgroup.procs"); err == nil && (v2 == nil) == (controller == "") {
				return dir
			}
		}
	}
	return ""
}

// groupsFor makes folders for control groups as tako-master does, those of
// version 1 and 2 as wanted, and gives them to uid.
func groupsFor(tb testing.TB, v1, v2 bool, uid int) wire.Groups {
	tb.Helper()
	needRoot(tb)
	var g wire.Groups
	folder := func(controller string) string {
		above := ownGroup(tb, controller)
		if above == "" {
			return ""
		}
		dir, err := os.MkdirTemp(above, "tako-test-") //nolint:usetesting // it has to be in that hierarchy
		if err != nil {
			tb.Logf("no control group in %s: %v", above, err)
			return ""
		}
		must(tb, os.Chmod(dir, 0o755))
		must(tb, os.Chown(dir, uid, uid))
		must(tb, os.Chown(dir+"/cgroup.procs", uid, uid))
		tb.Cleanup(func() {
			_ = unix.Rmdir(dir + "/main")
			for end := time.Now().Add(patience); unix.Rmdir(dir) != nil; time.Sleep(5 * time.Millisecond) {
				if left, _ := filepath.Glob(dir + "/*/cgroup.procs"); time.Now().After(end) {
					tb.Errorf("%s cannot be removed: %q are left", dir, left)
					return
				}
			}
		})
		return dir
	}
	if v1 {
		g.Memory, g.CPU, g.PIDs = folder("memory"), folder("cpu"), folder("pids")
		if g.Memory == "" || g.CPU == "" || g.PIDs == "" {
			tb.Skip("no control groups of version 1 here")
		}
	}
	if v2 {
		if g.V2 = folder(""); g.V2 == "" {
			tb.Skip("no control groups of version 2 here")
		}
		must(tb, os.Mkdir(g.V2+"/main", 0o755))
	}
	return g
}

func TestWhatAnInstanceStartedEndsWithIt(t *testing.T) {
	for _, c := range []struct {
		name        string
		v1, v2, own bool // own: a user per app, and an agent with three capabilities
		kinds       []string
	}{
		{name: "by groups of version 1", v1: true, kinds: []string{"daemon", "daemon-clean"}},
		{name: "by groups of version 2", v2: true, kinds: []string{"daemon", "daemon-clean"}},
		{name: "by groups, user per app", v1: true, v2: true, own: true, kinds: []string{"daemon", "daemon-clean"}},
		{name: "by traces", kinds: []string{"daemon"}},
		{name: "by traces, user per app", own: true, kinds: []string{"daemon"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			settings, uid := unprivileged, 0
			if c.own {
				needRoot(t)
				settings, uid = privileged, agentUID
			}
			if c.v1 || c.v2 {
				settings.Groups = groupsFor(t, c.v1, c.v2, uid)
			}
			var r *rig
			if c.own {
				r = newCapableRigWith(t, settings)
			} else {
				r = newRig(t, settings)
			}
			for i, kind := range c.kinds {
				m := r.app(uint32(i+1), kind)
				m.Command.Env = append(m.Command.Env, "TAKO_APP=blog", fmt.Sprintf("TAKO_INSTANCE=%d", i+1))
				if c.own {
					tree := r.tree(appUID)
					_, err := r.do(tree)
					must(t, err)
					m.Command.User, m.LogDir = tree.User, tree.AppDir+"/shared/logs"
				}
				r.start(m)
				for p := want[*wire.Probed](r); !p.Good; p = want[*wire.Probed](r) {
				}
				must(t, r.conn.Send(0, &wire.Stop{Instance: m.Instance, GraceMS: 5000}))
				e := want[*wire.Exited](r)
				pid := 0
				for _, l := range e.LastLines {
					_, _ = fmt.Sscanf(l, "grandchild %d", &pid)
				}
				if pid <= 1 || e.Exit != (wire.Exit{}) {
					t.Fatalf("%s: %+v", kind, e)
				}
				if rel, ok := supervise.Look(pid); ok && !rel.Zombie {
					t.Errorf("%s: its grandchild %d runs on after Exited", kind, pid)
				}
				waitGone(t, pid)
			}
		})
	}
}

func TestStepEndsWithAllThatItStarted(t *testing.T) {
	r := newRig(t, unprivileged)
	run := r.run("daemon-parent", patience)
	run.Command.Env = append(run.Command.Env, "TAKO_APP=blog")
	m, err := r.do(run)
	must(t, err)
	pid := 0
	if _, err := fmt.Sscanf(m.Body.(*wire.Ran).Stdout, "grandchild %d", &pid); err != nil {
		t.Fatalf("%+v", m.Body)
	}
	waitGone(t, pid)
}

func TestLimitsAreKept(t *testing.T) {
	for _, own := range []bool{false, true} {
		t.Run(fmt.Sprint("user per app ", own), func(t *testing.T) {
			needRoot(t)
			settings, uid := unprivileged, 0
			if own {
				settings, uid = privileged, agentUID
			}
			settings.Groups = groupsFor(t, true, true, uid)
			var r *rig
			if own {
				r = newCapableRigWith(t, settings)
			} else {
				r = newRig(t, settings)
			}
			n := uint32(0)
			app := func(l wire.Limits, kind string, argv ...string) *wire.Start {
				n++
				m := r.app(n, kind)
				m.Limits, m.ReadyMS = l, 600_000
				if argv != nil {
					m.Command.Argv = argv
				}
				if own {
					tree := r.tree(appUID)
					_, err := r.do(tree)
					must(t, err)
					m.Command.User, m.LogDir = tree.User, tree.AppDir+"/shared/logs"
				}
				if s := r.start(m); s.Limits != "cgroup v1" {
					t.Errorf("%+v are kept by %q", l, s.Limits)
				}
				return m
			}
			app(wire.Limits{Memory: 128 << 20}, "eat")
			if e := want[*wire.Exited](r); e.Exit != (wire.Exit{Code: -1, Signal: "SIGKILL", OutOfMem: true}) {
				t.Errorf("memory: %+v", e)
			}
			app(wire.Limits{PIDs: 20}, "", "sh", "-c", "for i in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22; do sleep 60 & done; echo all; exit 9")
			if e := want[*wire.Exited](r); e.Exit.Code == 0 || !strings.Contains(strings.ToLower(strings.Join(e.LastLines, "\n")), "fork") {
				t.Errorf("pids: %+v", e)
			}
			m := app(wire.Limits{CPUMilli: 100}, "", "sh", "-c", "while :; do :; done")
			stat := filepath.Join(settings.Groups.CPU, m.Instance.String(), "cpu.stat")
			for end := time.Now().Add(patience); ; time.Sleep(10 * time.Millisecond) {
				b, err := os.ReadFile(stat)
				must(t, err)
				if !strings.Contains(string(b), "nr_throttled 0\n") {
					break
				}
				if time.Now().After(end) {
					t.Fatalf("cpu: it is not held back: %s", b)
				}
			}
			must(t, r.conn.Send(0, &wire.Stop{Instance: m.Instance, GraceMS: 0}))
			// By our own hand is not for want of memory.
			if e := want[*wire.Exited](r); e.Exit != (wire.Exit{Code: -1, Signal: "SIGKILL"}) && e.Exit != (wire.Exit{Code: -1, Signal: "SIGTERM"}) {
				t.Errorf("cpu: %+v", e)
			}
			for _, dir := range []string{settings.Groups.V2, settings.Groups.Memory, settings.Groups.CPU, settings.Groups.PIDs} {
				if left, _ := filepath.Glob(dir + "/blog.*"); len(left) > 0 {
					t.Errorf("groups are left: %q", left)
				}
			}
		})
	}
}

func TestLimitsThatCannotBeKeptAreNamed(t *testing.T) {
	l := wire.Limits{Memory: 64 << 20, CPUMilli: 500, PIDs: 200}
	r := newRig(t, unprivileged)
	m := r.app(1, "silent")
	m.Limits = l
	if s := r.start(m); s.Limits != "not kept: memory, cpu, pids" {
		t.Errorf("one user: %q", s.Limits)
	}
	m = r.app(2, "silent")
	if s := r.start(m); s.Limits != "" {
		t.Errorf("none asked: %q", s.Limits)
	}
	t.Run("user per app", func(t *testing.T) {
		needRoot(t)
		r := newRig(t, privileged)
		m := r.app(1, "", "")
		m.Limits, m.Command.Argv = l, []string{"sh", "-c", "ulimit -p 2>/dev/null || ulimit -u"}
		m.Command.User = wire.User{UID: appUID, GID: appUID}
		if s := r.start(m); s.Limits != "rlimits: pids only" {
			t.Errorf("%q", s.Limits)
		}
		if e := want[*wire.Exited](r); !slices.Contains(e.LastLines, "200") {
			t.Errorf("%+v", e)
		}
	})
}
