package integration

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"tako/internal/management"
	"tako/internal/takotest"
)

// reloadInfo asks the server for what it knows of reloads; nil between two images.
func reloadInfo(s *takotest.Server) (info management.ServerInfo, ok bool) {
	b, err := s.Ask("server_info", nil)
	if err != nil {
		return info, false
	}
	return info, json.Unmarshal(b, &info) == nil && info.Reload != nil
}

// reload has the server reload by SIGHUP and waits for the outcome.
func reload(t *testing.T, s *takotest.Server) management.ReloadInfo {
	t.Helper()
	before, ok := reloadInfo(s)
	for end := time.Now().Add(10 * time.Second); !ok; before, ok = reloadInfo(s) { // between two images
		if time.Now().After(end) {
			t.Fatal("the server does not answer")
		}
		time.Sleep(5 * time.Millisecond)
	}
	for s.Signal(s.PID(), syscall.SIGHUP) != nil { // in the middle of an exec
		time.Sleep(time.Millisecond)
	}
	for end := time.Now().Add(30 * time.Second); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
		now, ok := reloadInfo(s)
		if ok && !now.Reload.Running && now.Reload.Count+now.Reload.Failed > before.Reload.Count+before.Reload.Failed {
			return *now.Reload
		}
	}
	t.Fatalf("the reload does not end:\n%s", s.Log())
	return management.ReloadInfo{}
}

// TestNoRequestFailsInAReload reloads under a steady load, of new connections and
// kept ones, with TLS and without. Instances are not touched.
func TestNoRequestFailsInAReload(t *testing.T) {
	t.Parallel()
	reloads, load := 5, takotest.LoadOptions{Clients: 16, Pause: 5 * time.Millisecond}
	if soaking() {
		reloads, load = 50, takotest.LoadOptions{Clients: 64, Pause: 10 * time.Millisecond}
	}
	s := start(t, takotest.Options{})
	lay(t, s, "blog", "1", quick(nil))
	if _, err := ask(s, "blog", "1", map[string]any{"instances": 2}); err != nil {
		t.Fatal(err)
	}
	before, _ := reloadInfo(s)
	pids := instancePIDs(t, s, "blog")
	l := s.Load(t.Context(), "blog.localhost/", load)
	defer l.Stop()
	for i := range reloads {
		if r := reload(t, s); r.LastError != "" {
			t.Fatalf("reload %d: %s", i+1, r.LastError)
		}
		time.Sleep(100 * time.Millisecond) // some load between two
	}
	r := l.Stop()
	t.Logf("%d reloads under %d clients: %v", reloads, load.Clients, r)
	if r.Failures > 0 {
		t.Errorf("%d of %d requests failed", r.Failures, r.Requests)
	}
	after, ok := reloadInfo(s)
	if !ok || after.PID != before.PID || after.Reload.Count != uint64(reloads) {
		t.Errorf("pid %d and %d reloads, want %d and %d", after.PID, after.Reload.Count, before.PID, reloads)
	}
	for i, p := range after.Processes {
		if p.Role != "tako-master" && (p.PID == before.Processes[i].PID || p.Generation < uint64(reloads)) {
			t.Errorf("%s is of the old image: pid %d, generation %d", p.Role, p.PID, p.Generation)
		}
	}
	if now := instancePIDs(t, s, "blog"); len(now) != 2 || now[0] != pids[0] || now[1] != pids[1] {
		t.Errorf("instances %v, before %v", now, pids)
	}
	// The next deploy, crash and stop find a server like any other.
	lay(t, s, "blog", "2", quick(nil))
	if _, err := ask(s, "blog", "2", nil); err != nil {
		t.Errorf("deploy after the reloads: %v", err)
	}
}

// TestSignalStormIsSurvived: SIGHUP at any moment, also within an exec.
func TestSignalStormIsSurvived(t *testing.T) {
	t.Parallel()
	signals := 60
	if soaking() {
		signals = 720
	}
	s := start(t, takotest.Options{})
	deploy(t, s, "blog", "1", quick(nil))
	l := s.Load(t.Context(), "blog.localhost/", takotest.LoadOptions{Clients: 8, Pause: 10 * time.Millisecond})
	defer l.Stop()
	for sent := 0; sent < signals; {
		// In the middle of an exec it cannot be told for sure that it is ours.
		if err := s.Signal(s.PID(), syscall.SIGHUP); err == nil {
			sent++
		}
		time.Sleep(7 * time.Millisecond)
	}
	last := reload(t, s)
	if last.LastError != "" {
		t.Error(last.LastError)
	}
	if r := l.Stop(); r.Failures > 0 {
		t.Errorf("%d of %d requests failed: %v", r.Failures, r.Requests, r)
	}
	for end := time.Now().Add(20 * time.Second); ; time.Sleep(50 * time.Millisecond) {
		proxies := 0
		if info, ok := reloadInfo(s); ok {
			for _, p := range info.Processes {
				if p.Role == "tako-proxy" {
					proxies++
				}
			}
		}
		if proxies == 1 {
			break
		}
		if time.Now().After(end) {
			t.Fatalf("%d proxies are left", proxies)
		}
	}
}

func instancePIDs(t *testing.T, s *takotest.Server, app string) []int {
	t.Helper()
	var pids []int
	for _, in := range status(t, s, app).Instances {
		pids = append(pids, in.PID)
	}
	return pids
}

// impostor makes a program that says a version and then does something else than
// a proxy would: the body of its main.
func impostor(t *testing.T, body string) string {
	t.Helper()
	dir := t.TempDir()
	src := "package main\n\nimport (\n\t\"fmt\"\n\t\"os\"\n\t\"time\"\n)\n\nfunc main() {\n" +
		"\tif len(os.Args) > 1 && os.Args[1] == \"--version\" {\n\t\tfmt.Println(\"impostor\")\n\t\treturn\n\t}\n\t_ = time.Second\n\t" + body + "\n}\n"
	if err := os.WriteFile(filepath.Join(dir, "main.go"), []byte(src), 0o644); err != nil {
		t.Fatal(err)
	}
	out := filepath.Join(dir, "impostor")
	cmd := exec.CommandContext(t.Context(), "go", "build", "-o", out, filepath.Join(dir, "main.go"))
	if b, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, b)
	}
	return out
}

// install puts a file in the place of one of the server's programs, as a package
// manager does: the old file lives on as long as it is open.
func install(t *testing.T, s *takotest.Server, name, from string) {
	t.Helper()
	b, err := os.ReadFile(from)
	if err != nil {
		t.Fatal(err)
	}
	temp := s.Program(name) + ".new"
	if err := os.WriteFile(temp, b, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(temp, s.Program(name)); err != nil {
		t.Fatal(err)
	}
}

// TestReloadThatWouldNotWorkIsRefused: the installed program is a torn file, or
// another one, or its neighbours are; the settings are bad. Everything goes on.
func TestReloadThatWouldNotWorkIsRefused(t *testing.T) {
	t.Parallel()
	s := start(t, takotest.Options{})
	deploy(t, s, "blog", "1", quick(nil))
	l := s.Load(t.Context(), "blog.localhost/", takotest.LoadOptions{Clients: 8, Pause: 10 * time.Millisecond})
	defer l.Stop()
	torn := filepath.Join(t.TempDir(), "torn")
	if err := os.WriteFile(torn, []byte("\x7fELF and no more"), 0o755); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"tako-master", "tako-proxy", "tako-agent"} {
		good := filepath.Join(t.TempDir(), "good")
		if err := os.Link(s.Program(name), good); err != nil {
			t.Fatal(err)
		}
		install(t, s, name, torn)
		if r := reload(t, s); r.LastError == "" || r.Count != 0 {
			t.Errorf("reload with a torn %s: %+v", name, r)
		}
		install(t, s, name, good)
	}
	settings := filepath.Join(s.Data, "server-config.toml")
	if err := os.WriteFile(settings, []byte("keep-releases = 0\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if r := reload(t, s); !strings.Contains(r.LastError, "keep-releases") {
		t.Errorf("reload with bad settings: %+v", r)
	}
	if err := os.Remove(settings); err != nil {
		t.Fatal(err)
	}
	if r := reload(t, s); r.LastError != "" || r.Count != 1 {
		t.Errorf("reload with everything mended: %+v", r)
	}
	if r := l.Stop(); r.Failures > 0 {
		t.Errorf("%d of %d requests failed: %v", r.Failures, r.Requests, r)
	}
}

// TestNewProxyThatFailsLeavesTheOldOneServing: it crashes before it is ready.
func TestNewProxyThatFailsLeavesTheOldOneServing(t *testing.T) {
	t.Parallel()
	s := start(t, takotest.Options{})
	deploy(t, s, "blog", "1", quick(nil))
	l := s.Load(t.Context(), "blog.localhost/", takotest.LoadOptions{Clients: 8, Pause: 10 * time.Millisecond})
	defer l.Stop()
	good := filepath.Join(t.TempDir(), "good")
	if err := os.Link(s.Program("tako-proxy"), good); err != nil {
		t.Fatal(err)
	}
	bodies := []string{"os.Exit(1)"}
	if soaking() {
		bodies = append(bodies, "time.Sleep(time.Hour)")
	}
	for _, body := range bodies {
		install(t, s, "tako-proxy", impostor(t, body))
		if r := reload(t, s); !strings.Contains(r.LastError, "the old one serves on") {
			t.Errorf("reload with a proxy that does %s: %+v", body, r)
		}
	}
	install(t, s, "tako-proxy", good)
	if r := reload(t, s); r.LastError != "" {
		t.Errorf("reload with the good proxy: %+v", r)
	}
	if r := l.Stop(); r.Failures > 0 {
		t.Errorf("%d of %d requests failed: %v", r.Failures, r.Requests, r)
	}
}

// TestReloadReadsTheSettingsAnew: ports too.
func TestReloadReadsTheSettingsAnew(t *testing.T) {
	t.Parallel()
	s := start(t, takotest.Options{})
	if err := os.WriteFile(filepath.Join(s.Data, "server-config.toml"), []byte("trusted-proxies = [\"10.0.0.0/8\"]\ninstance-port-offset = 7\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if r := reload(t, s); r.LastError != "" {
		t.Fatal(r.LastError)
	}
	info, _ := reloadInfo(s)
	if info.InstancePortOffset != 7 {
		t.Errorf("instance-port-offset is %d after a reload, want 7", info.InstancePortOffset)
	}
}
