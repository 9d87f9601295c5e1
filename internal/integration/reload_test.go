package integration

import (
	"encoding/json"
	"fmt"
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
	return reloadWithin(t, s, 30*time.Second)
}

func reloadWithin(t *testing.T, s *takotest.Server, limit time.Duration) management.ReloadInfo {
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
	for end := time.Now().Add(limit); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
		now, ok := reloadInfo(s)
		if ok && !now.Reload.Running && now.Reload.Count+now.Reload.Failed > before.Reload.Count+before.Reload.Failed {
			return *now.Reload
		}
	}
	t.Fatalf("the reload does not end:\n%s", s.Log())
	return management.ReloadInfo{}
}

// TestSignalStormIsSurvived: SIGHUP at any moment, also within an exec.
func TestSignalStormIsSurvived(t *testing.T) {
	t.Parallel()
	signals := long(720, 60)
	s, l := blogUnder(t, tortured())
	before := known(t, s)
	for sent := 0; sent < signals; {
		// In the middle of an exec it cannot be told for sure that it is ours.
		if err := s.Signal(s.PID(), syscall.SIGHUP); err == nil {
			sent++
		}
		time.Sleep(7 * time.Millisecond)
	}
	good(t, s, "one more")
	after := settled(t, s)
	noFailures(t, fmt.Sprintf("%d SIGHUPs in a storm", signals), l, fmt.Sprintf("%d reloads, one tree afterwards", after.Reload.Count))
	if after.PID != before.PID || after.Reload.Failed > 0 {
		t.Errorf("pid %d, before %d; %d reloads failed: %s", after.PID, before.PID, after.Reload.Failed, after.Reload.LastError)
	}
	// One of each, and the three instances.
	if left := s.Processes(); len(left) != 6 {
		t.Errorf("processes: %v", left)
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
	src := "package main\n\nimport (\n\t\"fmt\"\n\t\"os\"\n\t\"syscall\"\n\t\"time\"\n)\n\nfunc main() {\n" +
		"\tif len(os.Args) > 1 && os.Args[1] == \"--version\" {\n\t\tfmt.Println(\"impostor\")\n\t\treturn\n\t}\n\t_, _ = time.Second, syscall.Exec\n\t" + body + "\n}\n"
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
	noFailures(t, "reloads into torn programs and with broken settings", l, "each refused, with its reason; the one after them worked")
}

// TestNewProxyThatFailsLeavesTheOldOneServing: it crashes, hangs, or speaks another
// protocol.
func TestNewProxyThatFailsLeavesTheOldOneServing(t *testing.T) {
	t.Parallel()
	s, l := blogUnder(t, tortured())
	keep := filepath.Join(t.TempDir(), "good")
	if err := os.Link(s.Program("tako-proxy"), keep); err != nil {
		t.Fatal(err)
	}
	stranger := filepath.Join(t.TempDir(), "stranger")
	if err := takotest.BuildTestdata("stranger", stranger); err != nil {
		t.Fatal(err)
	}
	old := serving(t, s, "tako-proxy", 0)
	for _, c := range []struct{ does, program, says string }{
		{"crashes", impostor(t, "os.Exit(1)"), "the old one serves on"},
		{"refuses to speak with us", stranger, "it speaks protocol"},
		{"hangs", impostor(t, "time.Sleep(time.Hour)"), "no greeting within 10s"},
	} {
		if c.does == "hangs" && !soaking() {
			continue // it takes ReadyTimeout
		}
		install(t, s, "tako-proxy", c.program)
		if r := reload(t, s); !strings.Contains(r.LastError, "the old one serves on") || !strings.Contains(r.LastError, c.says) {
			t.Errorf("reload with a proxy that %s: %+v", c.does, r)
		}
		if now := serving(t, s, "tako-proxy", 0); now != old {
			t.Errorf("after a proxy that %s another one serves", c.does)
		}
		r := l.Report()
		row(t, "reload with a new proxy that "+c.does, r.Requests, r.Failures, "reported failed, the old one serves on")
	}
	install(t, s, "tako-proxy", keep)
	good(t, s, "reload with the good proxy")
	if now := serving(t, s, "tako-proxy", old); now == old {
		t.Error("the old proxy was not replaced in the end")
	}
	noFailures(t, "… and then with a good one", l, "")
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
