package integration

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"tako/internal/management"
	"tako/internal/takotest"
)

// offset makes a server the second of a data root that has one.
const offset = "--instance-port-offset=1000"

// serverInfo asks a server what it is; ok is false while it does not answer.
func serverInfo(s *takotest.Server) (info management.ServerInfo, ok bool) {
	b, err := s.Ask("server_info", nil)
	return info, err == nil && json.Unmarshal(b, &info) == nil
}

// proxyServes reports whether a server's tako-proxy accepts.
func proxyServes(s *takotest.Server) bool {
	info, ok := serverInfo(s)
	for _, p := range info.Processes {
		if ok && p.Role == "tako-proxy" && p.State == "ready" {
			return true
		}
	}
	return false
}

// startBeside starts a second server beside the first and waits until it serves.
func startBeside(t *testing.T, first *takotest.Server, flags ...string) *takotest.Server {
	t.Helper()
	second := prepare(t, takotest.Options{Beside: first, Flags: append([]string{offset}, flags...)})
	if err := second.Start(); err != nil {
		t.Fatal(err)
	}
	until(t, takotest.StartWait, "the second server serves", func() bool { return proxyServes(second) })
	return second
}

// owns waits until a server is the owner of its data root.
func owns(t *testing.T, s *takotest.Server) {
	t.Helper()
	until(t, takotest.StartWait, "the second server owns the data root", func() bool {
		info, ok := serverInfo(s)
		return ok && info.Role == management.RoleOwner && info.OwnerPID == s.PID()
	})
}

// answers asks an app over new connections, which either server accepts, and
// returns how many answers each of its processes gave. All must be of a version.
func answers(t *testing.T, s *takotest.Server, app, version string) map[int]int {
	t.Helper()
	by := make(map[int]int)
	for range 60 {
		a := about(t, s, app+".localhost")
		if a.Version != version {
			t.Fatalf("%s: an answer of version %q, want %q", app, a.Version, version)
		}
		by[a.PID]++
	}
	return by
}

// pids are the instances of an app in a server.
func pids(t *testing.T, s *takotest.Server, app string) map[int]bool {
	t.Helper()
	all := make(map[int]bool)
	for _, in := range status(t, s, app).Instances {
		all[in.PID] = true
	}
	return all
}

// TestASecondServerTakesThePlaceOfTheFirst: the second starts, follows every
// change, and goes on when the first has gone. Under a steady load no request
// fails, also when the first is killed.
func TestASecondServerTakesThePlaceOfTheFirst(t *testing.T) {
	t.Parallel()
	for name, end := range map[string]func(*takotest.Server) error{
		"stopped": (*takotest.Server).Stop, "killed": (*takotest.Server).Kill,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			first := prepare(t, takotest.Options{})
			if err := first.Start(); err != nil {
				t.Fatal(err)
			}
			lay(t, first, "blog", "1", quick(nil))
			if _, err := ask(first, "blog", "1", map[string]any{"instances": 2}); err != nil {
				t.Fatal(err)
			}
			deploy(t, first, "gone", "1", quick(nil))
			load := takotest.LoadOptions{Clients: 16, Pause: 5 * time.Millisecond}
			if soaking() {
				load = takotest.LoadOptions{Clients: 64, Pause: 5 * time.Millisecond}
			}
			l := first.Load(t.Context(), "blog.localhost/", load)
			defer l.Stop()
			step := func(what string) {
				if r := l.Report(); r.Failures > 0 {
					t.Fatalf("%s: %v", what, r)
				}
			}

			second := startBeside(t, first)
			step("start of the second")
			follows(t, first, second)
			step("changes by the first")

			before := pids(t, second, "blog")
			if err := end(first); err != nil {
				t.Fatal(err)
			}
			owns(t, second)
			time.Sleep(300 * time.Millisecond) // some load on it alone
			r := l.Report()
			t.Logf("%s: %v", name, r)
			if r.Failures > 0 {
				t.Errorf("end of the first: %v", r)
			}
			if after := pids(t, second, "blog"); len(after) != len(before) {
				t.Errorf("instances %v, before %v", after, before)
			}
			for pid := range pids(t, second, "blog") {
				if !before[pid] {
					t.Errorf("instance %d is not one of %v", pid, before)
				}
			}

			// It is a server like any other now, at the socket that everybody knows.
			lay(t, first, "blog", "4", quick(nil))
			if _, err := ask(first, "blog", "4", map[string]any{"instances": 2}); err != nil {
				t.Errorf("deploy after the takeover: %v", err)
			}
			answers(t, first, "blog", "4")
			if r := reload(t, second); r.LastError != "" {
				t.Errorf("reload after the takeover: %s", r.LastError)
			}
			third := startBeside(t, second)
			if info, ok := serverInfo(third); !ok || info.OwnerPID != second.PID() {
				t.Errorf("the third follows %d, want %d", info.OwnerPID, second.PID())
			}
			if r := l.Stop(); r.Failures > 0 {
				t.Errorf("after the takeover: %v", r)
			}
			if err := third.Stop(); err != nil {
				t.Error(err)
			}
		})
	}
}

// follows changes what the first server has and holds the second to it.
func follows(t *testing.T, first, second *takotest.Server) {
	t.Helper()
	a, ok1 := serverInfo(first)
	b, ok2 := serverInfo(second)
	if !ok1 || !ok2 || a.Role != management.RoleOwner || a.FollowerPID == nil || *a.FollowerPID != second.PID() ||
		b.Role != management.RoleFollower || b.OwnerPID != first.PID() {
		t.Errorf("the first is %s of %d beside %v, the second %s of %d", a.Role, a.OwnerPID, a.FollowerPID, b.Role, b.OwnerPID)
	}
	out, _, _, err := second.Ctl(t.Context(), "server", "info")
	if want := fmt.Sprintf("follower of pid %d", first.PID()); err != nil || !strings.Contains(out, want) {
		t.Errorf("takoctl server info: %v, without %q:\n%s", err, want, out)
	}
	// Both answer, each with its own instances.
	ours, theirs, by := pids(t, second, "blog"), pids(t, first, "blog"), answers(t, first, "blog", "1")
	mine, others := 0, 0
	for pid, n := range by {
		switch {
		case ours[pid] && !theirs[pid]:
			mine += n
		case theirs[pid] && !ours[pid]:
			others += n
		default:
			t.Errorf("pid %d answers: the first has %v, the second %v", pid, theirs, ours)
		}
	}
	if mine == 0 || others == 0 {
		t.Errorf("%d answers by the second and %d by the first, want both", mine, others)
	}
	// It refuses changes and says whose they are.
	for _, command := range []string{"stop", "delete", "restart"} {
		_, err := second.Ask(command, map[string]any{"app": "blog"})
		wantError(t, second, command, err, fmt.Sprintf("The server with pid %d owns the data root; '%s' is refused .*", first.PID(), command))
	}
	_, err = second.Ask("enter_upgrading", map[string]any{"owner": "x"})
	wantError(t, second, "enter_upgrading", err, fmt.Sprintf(".*pid %d owns.*", first.PID()))

	// What the reply to the first says, either finds.
	lay(t, first, "blog", "2", quick(nil))
	if _, err := ask(first, "blog", "2", map[string]any{"instances": 2}); err != nil {
		t.Fatal(err)
	}
	answers(t, first, "blog", "2")
	deploy(t, first, "later", "1", quick(nil))
	answers(t, first, "later", "1")
	if _, err := first.Ask("scale", map[string]any{"app": "blog", "instances": 3}); err != nil {
		t.Fatal(err)
	}
	until(t, takotest.StartWait, "the second has scaled", func() bool { return len(pids(t, second, "blog")) == 3 })
	if _, err := first.Ask("scale", map[string]any{"app": "blog", "instances": 2}); err != nil {
		t.Fatal(err)
	}
	until(t, takotest.StartWait, "the second has scaled back", func() bool { return len(pids(t, second, "blog")) == 2 })
	old := pids(t, second, "later")
	if _, err := first.Ask("update_secrets", map[string]any{"app": "later", "secrets": map[string]string{"KEY": "new"}}); err != nil {
		t.Fatal(err)
	}
	until(t, takotest.StartWait, "no instance of the second has the old secrets", func() bool {
		now := pids(t, second, "later")
		for pid := range old {
			if now[pid] {
				return false
			}
		}
		return len(now) == 1
	})
	if _, err := first.Ask("stop", map[string]any{"app": "later"}); err != nil {
		t.Fatal(err)
	}
	if st := status(t, second, "later"); st.State != "stopped" || len(st.Instances) > 0 {
		t.Errorf("later is %s with %d instances in the second, want stopped", st.State, len(st.Instances))
	}
	if _, err := first.Ask("delete", map[string]any{"app": "gone"}); err != nil {
		t.Fatal(err)
	}
	for range 20 {
		if answer, err := first.Get(t.Context(), takotest.TLS1, "gone.localhost/"); err != nil || answer.StatusCode != http.StatusNotFound {
			t.Fatalf("a deleted app is answered with %v, %v", answer.Status, err)
		}
	}
	if _, err := second.Ask("status", map[string]any{"app": "gone"}); err == nil {
		t.Error("the second still has a deleted app")
	}
	if _, err := first.Ask("enter_upgrading", map[string]any{"owner": "x"}); err != nil {
		t.Fatal(err)
	}
	if info, ok := serverInfo(second); !ok || info.Mode != "upgrading" {
		t.Errorf("the second says mode %q", info.Mode)
	}
	if _, err := first.Ask("exit_upgrading", map[string]any{"owner": "x"}); err != nil {
		t.Fatal(err)
	}
}

var (
	_ = context.Background
	_ = os.Getpid
	_ = filepath.Join
	_ = syscall.SIGHUP
)
