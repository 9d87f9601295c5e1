package integration

import (
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	_ "modernc.org/sqlite" // to change the schema under a server

	"tako/internal/management"
	"tako/internal/supervise"
	"tako/internal/takotest"
)

// offset makes a server the second of a data root that has one.
const offset = "--instance-port-offset=1000"

// serverInfo asks a server what it is; ok is false while it does not answer.
func serverInfo(s *takotest.Server) (info management.ServerInfo, ok bool) {
	b, err := s.Ask("server_info", nil)
	return info, err == nil && json.Unmarshal(b, &info) == nil
}

// begin starts a server with nothing in it.
func begin(t *testing.T, o takotest.Options) *takotest.Server {
	t.Helper()
	s := prepare(t, o)
	if err := s.Start(); err != nil {
		t.Fatal(err)
	}
	return s
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
// fails; but when the first is killed, TLS handshakes that had begun may: its
// proxies have nobody left who signs for them.
func TestASecondServerTakesThePlaceOfTheFirst(t *testing.T) {
	t.Parallel()
	var ordinarily, capably takotest.Options // or as who the test runs
	if os.Geteuid() == 0 {
		ordinarily = takotest.Options{User: ordinary}
		capably = takotest.Options{User: ordinary, Caps: []uintptr{unix.CAP_SETUID, unix.CAP_SETGID, unix.CAP_KILL}}
	}
	for name, row := range map[string]struct {
		end func(*takotest.Server) error
		as  takotest.Options
	}{
		"stopped": {(*takotest.Server).Stop, ordinarily}, "killed": {(*takotest.Server).Kill, takotest.Options{}},
		"stopped, with capabilities": {(*takotest.Server).Stop, capably},
	} {
		if row.as.Caps != nil && !soaking() {
			continue
		}
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			first := begin(t, row.as)
			lay(t, first, "blog", "1", quick(nil))
			if _, err := ask(first, "blog", "1", map[string]any{"instances": 2}); err != nil {
				t.Fatal(err)
			}
			deploy(t, first, "gone", "1", quick(nil))
			load := takotest.LoadOptions{Clients: 16, Pause: 5 * time.Millisecond}
			if soaking() {
				load = takotest.LoadOptions{Clients: 64, Pause: 5 * time.Millisecond, Once: true}
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
			if err := row.end(first); err != nil {
				t.Fatal(err)
			}
			owns(t, second)
			time.Sleep(300 * time.Millisecond) // some load on it alone
			r := l.Stop()
			failed, remark := r.Failures, ""
			if name == "killed" {
				r = withoutHandshakes(r, load.Clients/2)
				remark = fmt.Sprintf("; %d were TLS handshakes that had begun in the killed server", failed-r.Failures)
			}
			t.Logf("row: a second server: start, changes by the first, and the first is %s | %d | %d | an answer took at most %s%s",
				name, r.Requests, failed, r.Worst.Round(time.Millisecond), remark)
			if r.Failures > 0 {
				t.Errorf("end of the first: %v", r)
			}
			l = first.Load(t.Context(), "blog.localhost/", load)
			defer l.Stop()
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

// withoutHandshakes leaves out of a report what a killed server's proxy could not
// finish: at most so many TLS connections. Half of the clients have such.
func withoutHandshakes(r takotest.Report, most int) takotest.Report {
	var left []takotest.Miss
	for _, m := range r.Misses {
		if most > 0 && strings.Contains(m.What, "https://") {
			most--
			r.Failures--
			continue
		}
		left = append(left, m)
	}
	r.Misses = left
	return r
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
	// On ports that are shifted by the offset, below 20000 + 40 for the first's first app.
	for _, in := range status(t, second, "blog").Instances {
		if in.Port < 21000 || in.Port >= 21040 {
			t.Errorf("instance %d of the second has port %d, want one from 21000 on", in.ID, in.Port)
		}
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

// TestASecondServerIsRefusedWhereItCannotFollow: no offset, other ports, a third;
// and a port that a stranger holds is nobody's to share.
func TestASecondServerIsRefusedWhereItCannotFollow(t *testing.T) {
	t.Parallel()
	first := start(t, takotest.Options{Flags: []string{"--pprof"}})
	owner := fmt.Sprintf("is in use by tako-master with pid %d", first.PID())
	alone := prepare(t, takotest.Options{Beside: first})
	refused(t, alone, exitFailed, owner, "serve beside it with --instance-port-offset")
	moved := prepare(t, takotest.Options{Beside: first, Flags: []string{offset, "--port", "0", "--tls-port", strconv.Itoa(first.HTTPS + 1)}})
	refused(t, moved, exitFailed, owner, fmt.Sprintf("http on 127.0.0.1:%d", first.HTTP), "give it the same --port, --tls-port and --listen-address")

	second := startBeside(t, first)
	third := prepare(t, takotest.Options{Beside: first, Flags: []string{offset}})
	refused(t, third, exitFailed, owner, fmt.Sprintf("pid %d serves beside it already: stop that one first", second.PID()))
	stranger := prepare(t, takotest.Options{Flags: []string{offset, "--port", strconv.Itoa(first.HTTP)}})
	refused(t, stranger, exitFailed, fmt.Sprintf("port %d is in use by tako-", first.HTTP), "choose another port with --port")

	if _, err := profileOf(first, "heap"); err != nil {
		t.Errorf("what is the first's was taken from it: %v", err)
	}
	for _, s := range []*takotest.Server{first, second} {
		if _, ok := serverInfo(s); !ok {
			t.Error("a server that was there is gone")
		}
	}
	answers(t, first, "good", "1")
	if err := second.Stop(); err != nil {
		t.Fatal(err)
	}
	answers(t, first, "good", "1")
	if left, err := filepath.Glob(filepath.Join(filepath.Dir(first.Socket), "*")); err != nil || len(left) != 4 { // tako.sock, tako-PID.sock, instances, pprof.sock
		t.Errorf("in the run directory: %v, %v", left, err)
	}
}

// TestTwoServersReload: each of them, in turn, under load. The second follows the
// first afterwards as before.
func TestTwoServersReload(t *testing.T) {
	t.Parallel()
	rounds, load := 2, takotest.LoadOptions{Clients: 16, Pause: 5 * time.Millisecond}
	if soaking() {
		rounds, load = 10, takotest.LoadOptions{Clients: 64, Pause: 5 * time.Millisecond, Once: true}
	}
	first := begin(t, takotest.Options{})
	deploy(t, first, "blog", "0", quick(nil))
	second := startBeside(t, first)
	l := first.Load(t.Context(), "blog.localhost/", load)
	defer l.Stop()
	for i := range rounds {
		for _, s := range []*takotest.Server{first, second} {
			before := pids(t, s, "blog")
			if r := reload(t, s); r.LastError != "" {
				t.Fatalf("round %d: %s", i, r.LastError)
			}
			for pid := range pids(t, s, "blog") {
				if !before[pid] {
					t.Errorf("round %d: instance %d is not one of %v", i, pid, before)
				}
			}
		}
		until(t, takotest.StartWait, "the second is there again", func() bool {
			info, ok := serverInfo(first)
			return ok && info.FollowerPID != nil && *info.FollowerPID == second.PID()
		})
		if info, ok := serverInfo(second); !ok || info.Role != management.RoleFollower {
			t.Errorf("round %d: the second is %s", i, info.Role)
		}
		version := strconv.Itoa(i + 1)
		deploy(t, first, "blog", version, quick(nil))
		answers(t, first, "blog", version)
	}
	r := l.Stop()
	row(t, fmt.Sprintf("%d reloads of each of two servers", rounds), r.Requests, r.Failures, "")
	if r.Failures > 0 {
		t.Errorf("%d of %d requests failed", r.Failures, r.Requests)
	}
	// What the reloads were of: the second takes over as if there had been none.
	if err := first.Stop(); err != nil {
		t.Fatal(err)
	}
	owns(t, second)
	answers(t, first, "blog", strconv.Itoa(rounds))
}

// TestTheSecondServesThePortsThatTheFirstChangesTo: the settings name others, the
// first is reloaded, and the second reloads itself.
func TestTheSecondServesThePortsThatTheFirstChangesTo(t *testing.T) {
	t.Parallel()
	first := prepare(t, takotest.Options{PortsInFile: true})
	ports := func() {
		t.Helper()
		text := fmt.Sprintf("port = %d\ntls-port = %d\n", first.HTTP, first.HTTPS)
		if err := errors.Join(os.MkdirAll(first.Data, 0o711), os.WriteFile(filepath.Join(first.Data, "server-config.toml"), []byte(text), 0o600)); err != nil {
			t.Fatal(err)
		}
	}
	ports()
	if err := first.Start(); err != nil {
		t.Fatal(err)
	}
	deploy(t, first, "blog", "1", quick(nil))
	second := prepare(t, takotest.Options{Beside: first, PortsInFile: true, Flags: []string{offset}})
	if err := second.Start(); err != nil {
		t.Fatal(err)
	}
	until(t, takotest.StartWait, "the second server serves", func() bool { return proxyServes(second) })

	next, err := takotest.FreePorts(2)
	if err != nil {
		t.Fatal(err)
	}
	first.HTTP, first.HTTPS = next[0], next[1]
	ports()
	if r := reload(t, first); r.LastError != "" {
		t.Fatal(r.LastError)
	}
	until(t, takotest.StartWait, "the second has reloaded", func() bool {
		info, ok := serverInfo(second)
		return ok && info.HTTPPort == uint16(first.HTTP) && info.Reload.Count == 1 && !info.Reload.Running && info.Role == management.RoleFollower
	})
	theirs := pids(t, second, "blog")
	until(t, takotest.StartWait, "both answer at the new ports", func() bool {
		by := answers(t, first, "blog", "1")
		for pid := range theirs {
			if by[pid] > 0 {
				return len(by) == 2
			}
		}
		return false
	})
}

// TestTheEndOfTheSecondCostsNothing: the first serves on, and another second may
// come.
func TestTheEndOfTheSecondCostsNothing(t *testing.T) {
	t.Parallel()
	load := takotest.LoadOptions{Clients: 16, Pause: 5 * time.Millisecond}
	if soaking() {
		load = takotest.LoadOptions{Clients: 64, Pause: 5 * time.Millisecond, Once: true}
	}
	first := begin(t, takotest.Options{})
	deploy(t, first, "blog", "1", quick(nil))
	for name, end := range map[string]func(*takotest.Server) error{"stopped": (*takotest.Server).Stop, "killed": (*takotest.Server).Kill} {
		second := startBeside(t, first)
		l := first.Load(t.Context(), "blog.localhost/", load)
		defer l.Stop()
		until(t, takotest.StartWait, "some load", func() bool { return l.Report().Requests > 10*load.Clients })
		if err := end(second); err != nil {
			t.Fatal(err)
		}
		until(t, takotest.StartWait, "the first is alone", func() bool {
			info, ok := serverInfo(first)
			return ok && info.FollowerPID == nil && info.Role == management.RoleOwner
		})
		r := l.Stop()
		t.Logf("%s: %v", name, r)
		if name == "killed" {
			r = withoutHandshakes(r, load.Clients/2)
		}
		if r.Failures > 0 {
			t.Errorf("%s: %v", name, r)
		}
		deploy(t, first, "blog", name, quick(nil))
		answers(t, first, "blog", name)
	}
}

// TestWhatTheSecondCannotFollowCostsNothing: a release that comes up with the
// first alone leaves the second with the old one, which serves; it goes on trying.
func TestWhatTheSecondCannotFollowCostsNothing(t *testing.T) {
	t.Parallel()
	first := begin(t, takotest.Options{})
	deploy(t, first, "blog", "1", quick(nil))
	second := startBeside(t, first)
	l := first.Load(t.Context(), "blog.localhost/", takotest.LoadOptions{Clients: 8, Pause: 10 * time.Millisecond})
	defer l.Stop()
	old := pids(t, second, "blog")
	lay(t, first, "blog", "2", quick(map[string]any{
		"start": []string{"/bin/sh", "-c", `[ "$TAKO_INSTANCE" -lt 1000 ] || [ -e "$TAKO_DATA_DIR/sign" ] || exit 7; exec ./app`},
	}))
	if _, err := ask(first, "blog", "2", nil); err != nil {
		t.Fatal(err)
	}
	if st := status(t, first, "blog"); st.Version != "2" || st.State != "running" {
		t.Errorf("the first has version %s, %s", st.Version, st.State)
	}
	now := pids(t, second, "blog")
	for pid := range old {
		if !now[pid] {
			t.Errorf("the old instance %d of the second is gone, there is %v", pid, now)
		}
	}
	until(t, takotest.StartWait, "the second says so", func() bool { return logged(second, "the owner's change was not followed") > 0 })
	// The first goes: the second goes on with what it has, and on trying.
	if err := first.Stop(); err != nil {
		t.Fatal(err)
	}
	owns(t, second)
	if err := os.WriteFile(filepath.Join(first.Data, "apps", "blog", "data", "sign"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	until(t, takotest.StartWait, "version 2 answers", func() bool {
		a, err := tryAbout(first, "blog.localhost")
		return err == nil && a.Version == "2"
	})
	if r := l.Stop(); r.Failures > 0 {
		t.Errorf("%v", r)
	}
}

// TestADeployThatTheFirstDiesOverIsUndoneByTheSecond: it had committed nothing, so
// the second takes over what was there, and clears away what was begun.
func TestADeployThatTheFirstDiesOverIsUndoneByTheSecond(t *testing.T) {
	t.Parallel()
	first := begin(t, takotest.Options{})
	deploy(t, first, "blog", "1", quick(nil))
	second := startBeside(t, first)
	lay(t, first, "blog", "2", quick(map[string]any{"timeouts": map[string]any{"ready": 60}}), "-slow", "50s")
	began := make(chan struct{})
	go func() {
		defer close(began)
		_, _ = ask(first, "blog", "2", map[string]any{"secrets": map[string]string{"KEY": "of the second release"}}) // cut off
	}()
	until(t, takotest.StartWait, "the deploy has begun", func() bool { return len(pids(t, first, "blog")) == 2 })
	next := filepath.Join(first.Data, "apps", "blog", "secrets.json.next")
	if _, err := os.Stat(next); err != nil {
		t.Error(err)
	}
	if err := first.Kill(); err != nil {
		t.Fatal(err)
	}
	<-began
	owns(t, second)
	answers(t, first, "blog", "1")
	if _, err := os.Stat(next); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("secrets of the deploy that was cut off: %v", err)
	}
	deploy(t, first, "blog", "3", quick(nil))
	answers(t, first, "blog", "3")
	if st := status(t, second, "blog"); st.Version != "3" || st.State != "running" {
		t.Errorf("version %s is %s", st.Version, st.State)
	}
}

// TestASecondServerOfAnotherSchema is refused; one that is there when the owner
// changes the schema serves on, and takes over as soon as it knows it.
func TestASecondServerOfAnotherSchema(t *testing.T) {
	t.Parallel()
	first := begin(t, takotest.Options{})
	deploy(t, first, "blog", "1", quick(nil))
	db, err := sql.Open("sqlite", filepath.Join(first.Data, "runtime-state.sqlite3"))
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	var ours int
	if err := db.QueryRow(`PRAGMA user_version`).Scan(&ours); err != nil {
		t.Fatal(err)
	}
	schema := func(n int) {
		t.Helper()
		if _, err := db.Exec(fmt.Sprintf(`PRAGMA user_version = %d`, n)); err != nil {
			t.Fatal(err)
		}
	}
	schema(ours + 1)
	refused(t, prepare(t, takotest.Options{Beside: first, Flags: []string{offset}}), exitFailed,
		fmt.Sprintf("it has schema %d", ours+1), "start the version that its owner runs")
	schema(ours - 1)
	refused(t, prepare(t, takotest.Options{Beside: first, Flags: []string{offset}}), exitFailed,
		fmt.Sprintf("it has schema %d", ours-1), "reload its owner into this version first")
	schema(ours)

	second := startBeside(t, first)
	schema(ours + 1) // the first was reloaded into a later version; what is installed here knows it no better
	until(t, takotest.StartWait, "the second tries to reload", func() bool {
		info, ok := serverInfo(second)
		return ok && info.Reload.Failed == 1 && !info.Reload.Running
	})
	if err := first.Kill(); err != nil {
		t.Fatal(err)
	}
	until(t, takotest.StartWait, "the second says why it cannot take over", func() bool {
		return logged(second, "its place cannot be taken yet") == 1
	})
	answers(t, first, "blog", "1")
	_, err = second.Ask("stop", map[string]any{"app": "blog"})
	wantError(t, second, "a change", err, ".* owns the data root; 'stop' is refused .*")
	schema(ours)
	owns(t, second)
	deploy(t, first, "blog", "2", quick(nil))
	answers(t, first, "blog", "2")
}

// TestAnOwnerWhomAServiceManagerBringsBackKeepsItsPlace: its lock was kept, so
// that the second waits, and finds it again.
func TestAnOwnerWhomAServiceManagerBringsBackKeepsItsPlace(t *testing.T) {
	t.Parallel()
	first := begin(t, takotest.Options{Manager: true})
	deploy(t, first, "blog", "1", quick(nil))
	second := startBeside(t, first)
	l := first.Load(t.Context(), "blog.localhost/", takotest.LoadOptions{Clients: 16, Pause: 5 * time.Millisecond})
	defer l.Stop()
	for range 2 {
		if err := first.Die(); err != nil {
			t.Fatal(err)
		}
		if err := first.Start(); err != nil {
			t.Fatal(err)
		}
		until(t, takotest.StartWait, "they have found each other", func() bool {
			a, ok1 := serverInfo(first)
			b, ok2 := serverInfo(second)
			return ok1 && ok2 && a.Role == management.RoleOwner && a.FollowerPID != nil && *a.FollowerPID == second.PID() &&
				b.Role == management.RoleFollower && b.OwnerPID == first.PID()
		})
	}
	deploy(t, first, "blog", "2", quick(nil))
	answers(t, first, "blog", "2")
	if r := l.Stop(); r.Failures > 0 {
		t.Errorf("%v", r)
	}
}

// TestWhatADeadOwnerLeavesIsEndedByTheSecond: its agent dies too, so that nobody
// else ends its instances.
func TestWhatADeadOwnerLeavesIsEndedByTheSecond(t *testing.T) {
	t.Parallel()
	first := begin(t, takotest.Options{})
	deploy(t, first, "blog", "1", quick(nil))
	second := startBeside(t, first)
	left, ours := treeOf(t, first, "blog"), pids(t, second, "blog")
	// It must not see its master's death before it dies itself.
	if err := first.Signal(left.agents[0], unix.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(first.Die(), first.Signal(left.agents[0], unix.SIGKILL)); err != nil {
		t.Fatal(err)
	}
	owns(t, second)
	for _, pid := range left.instances {
		until(t, takotest.StartWait, "the dead owner's instance ends", func() bool {
			r, lives := supervise.Look(pid)
			return !lives || r.Zombie
		})
	}
	for pid := range pids(t, second, "blog") {
		if !ours[pid] {
			t.Errorf("instance %d of the second is not one of %v", pid, ours)
		}
	}
	answers(t, first, "blog", "1")
}

// TestTheSecondStopsWhileItFollows: a rollout of a minute does not hold it, nor
// does a reload that waits for that rollout.
func TestTheSecondStopsWhileItFollows(t *testing.T) {
	t.Parallel()
	for name, reloads := range map[string]bool{"at rest": false, "in a reload": true} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			first := begin(t, takotest.Options{})
			deploy(t, first, "blog", "1", quick(nil))
			second := startBeside(t, first)
			lay(t, first, "blog", "2", quick(map[string]any{
				"timeouts": map[string]any{"ready": 120, "stability": 0.2, "grace": 1},
				"start":    []string{"/bin/sh", "-c", `[ "$TAKO_INSTANCE" -lt 1000 ] || exec sleep 120; exec ./app`},
			}))
			deployed := make(chan error, 1)
			go func() {
				_, err := ask(first, "blog", "2", nil)
				deployed <- err
			}()
			until(t, takotest.StartWait, "the second rolls", func() bool { return len(pids(t, second, "blog")) == 2 })
			if reloads {
				if err := second.Signal(second.PID(), unix.SIGHUP); err != nil {
					t.Fatal(err)
				}
				until(t, takotest.StartWait, "it begins to reload", func() bool { return logged(second, "reloading") == 1 })
				time.Sleep(500 * time.Millisecond) // to be in the wait; before that it must stop as well
			}
			if err := second.Stop(); err != nil {
				t.Error(err)
			}
			if err := <-deployed; err != nil {
				t.Errorf("deploy by the first: %v", err)
			}
			answers(t, first, "blog", "2")
		})
	}
}
