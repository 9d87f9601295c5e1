package integration

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"tako/internal/management"
	"tako/internal/takotest"
)

// The rows of the table in docs/RELOAD.md. Each test runs in a short form, whose
// bounds a busy machine does not break, and, where soaking, in the form that the
// table names. What row logs make torture prints.

// row logs a line of the table: what was done, requests asked under it, those that
// failed, and what else was counted.
func row(t *testing.T, what string, requests, failed int, more string) {
	t.Helper()
	t.Logf("row: %s | %d | %d | %s", what, requests, failed, more)
}

// tortured are the clients of a row: the long form may send nothing twice.
func tortured(ways ...takotest.Way) takotest.LoadOptions {
	if soaking() {
		return takotest.LoadOptions{Clients: 64, Pause: 10 * time.Millisecond, Ways: ways, Once: true}
	}
	return takotest.LoadOptions{Clients: 12, Pause: 10 * time.Millisecond, Ways: ways}
}

// long is n in the long form, else short.
func long(n, short int) int {
	if soaking() {
		return n
	}
	return short
}

// noFailures holds a load to having lost nothing, and logs its row.
func noFailures(t *testing.T, what string, l *takotest.Load, more string) {
	t.Helper()
	r := l.Stop()
	row(t, what, r.Requests, r.Failures, more)
	if r.Failures > 0 || r.Requests == 0 {
		t.Errorf("%s: %v", what, r)
	}
}

// blogUnder starts a server with the app blog in two instances and a load on it.
func blogUnder(t *testing.T, load takotest.LoadOptions) (*takotest.Server, *takotest.Load) {
	t.Helper()
	s := start(t, takotest.Options{})
	lay(t, s, "blog", "1", quick(nil))
	if _, err := ask(s, "blog", "1", map[string]any{"instances": 2}); err != nil {
		t.Fatal(err)
	}
	return s, loadBlog(t, s, load)
}

func loadBlog(t *testing.T, s *takotest.Server, load takotest.LoadOptions) *takotest.Load {
	t.Helper()
	l := s.Load(t.Context(), "blog.localhost/", load)
	t.Cleanup(func() { l.Stop() })
	until(t, takotest.StartWait, "some requests", func() bool { return l.Report().Requests > 4*load.Clients })
	return l
}

// known asks for server_info until it is answered: in a reload it is not at once.
func known(t *testing.T, s *takotest.Server) (info management.ServerInfo) {
	t.Helper()
	until(t, 30*time.Second, "server_info", func() (ok bool) {
		info, ok = reloadInfo(s)
		return ok
	})
	return info
}

// children are the processes of a role that the server names, in a state if one is
// given.
func children(info management.ServerInfo, role, state string) (found []management.Process) {
	for _, p := range info.Processes {
		if p.Role == role && cmp.Or(state, p.State) == p.State {
			found = append(found, p)
		}
	}
	return found
}

// serving is the process of a role that is ready, once there is one that is not
// before.
func serving(t *testing.T, s *takotest.Server, role string, before int) (pid int) {
	t.Helper()
	until(t, 30*time.Second, "a ready "+role, func() bool {
		info, ok := reloadInfo(s)
		for _, p := range children(info, role, "ready") {
			if ok && p.PID != before {
				pid = p.PID
				return true
			}
		}
		return false
	})
	return pid
}

// settled waits until one proxy and one agent are left.
func settled(t *testing.T, s *takotest.Server) management.ServerInfo {
	t.Helper()
	var info management.ServerInfo
	until(t, 90*time.Second, "one proxy and one agent", func() bool {
		info = known(t, s)
		return len(children(info, "tako-proxy", "")) == 1 && len(children(info, "tako-agent", "ready")) == 1 && len(children(info, "tako-proxy", "ready")) == 1
	})
	return info
}

// good reloads and wants it to work.
func good(t *testing.T, s *takotest.Server, what string) {
	t.Helper()
	if r := reload(t, s); r.LastError != "" {
		t.Fatalf("%s: %s", what, r.LastError)
	}
}

// programStart is how long it takes to start one of the programs. Where that is long
// by itself the machine is busy, and what starts programs may take long too.
func programStart(t *testing.T, s *takotest.Server) time.Duration {
	t.Helper()
	var took []time.Duration
	for range 9 {
		began := time.Now()
		if out, err := exec.CommandContext(t.Context(), s.Program("tako-master"), "--version").CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		took = append(took, time.Since(began))
	}
	slices.Sort(took)
	return took[len(took)/2]
}

// gone waits until a process has ended; a zombie has.
func gone(t *testing.T, pid int) {
	t.Helper()
	until(t, 10*time.Second, fmt.Sprintf("the end of %d", pid), func() bool {
		line, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "cmdline"))
		return err != nil || len(line) == 0
	})
}

// A footprint is what a server occupies: its processes, their descriptors by kind,
// and its files.
type footprint []string

// numbers are what differs between two of a kind.
var numbers = regexp.MustCompile(`[0-9]+`)

// footprintOf looks at a server. Descriptors that it may not see are left out.
func footprintOf(t *testing.T, s *takotest.Server) footprint {
	t.Helper()
	var all footprint
	for _, p := range s.Processes() {
		program, _, _ := strings.Cut(p.Command, " ")
		program = filepath.Base(program)
		all = append(all, "process "+program)
		fds := filepath.Join("/proc", strconv.Itoa(p.PID), "fd")
		entries, err := os.ReadDir(fds)
		if err != nil {
			if !errors.Is(err, fs.ErrPermission) && !errors.Is(err, fs.ErrNotExist) {
				t.Fatal(err)
			}
			continue
		}
		for _, e := range entries {
			to, err := os.Readlink(filepath.Join(fds, e.Name()))
			if err != nil {
				continue // closed meanwhile
			}
			all = append(all, program+" holds "+numbers.ReplaceAllString(strings.Replace(to, s.Dir, "S", 1), "N"))
		}
	}
	err := filepath.WalkDir(s.Dir, func(path string, _ fs.DirEntry, err error) error {
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		// The database's own files come and go with its connections.
		if name := strings.TrimPrefix(path, s.Dir); !strings.HasSuffix(name, "-wal") && !strings.HasSuffix(name, "-shm") {
			all = append(all, "file "+name)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	slices.Sort(all)
	return all
}

// differs says what another footprint has beyond this one, and lacks.
func (f footprint) differs(other footprint) (difference []string) {
	count := make(map[string]int)
	for _, line := range other {
		count[line]++
	}
	for _, line := range f {
		count[line]--
	}
	for line, n := range count {
		if n != 0 {
			difference = append(difference, fmt.Sprintf("%+d %s", n, line))
		}
	}
	slices.Sort(difference)
	return difference
}
