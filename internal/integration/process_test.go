package integration

import (
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"tako/internal/takotest"
)

// byProcess counts the healthy instances of each process of an app.
func byProcess(t *testing.T, s *takotest.Server, app string) map[string][]int {
	t.Helper()
	pids := make(map[string][]int)
	for _, in := range status(t, s, app).Instances {
		if in.State == "healthy" {
			pids[in.Process] = append(pids[in.Process], in.PID)
		}
	}
	return pids
}

// TestProcessesWithoutRoutes: workers start beside the web process, are restarted
// when they die, rolled with it, and fail the deploy when they do not stay up.
func TestProcessesWithoutRoutes(t *testing.T) {
	t.Parallel()
	s := start(t, takotest.Options{})
	workers := func(flags ...any) map[string]any {
		return quick(map[string]any{"processes": map[string]any{
			"worker": map[string]any{"start": append([]any{"./app"}, flags...), "instances": 2},
		}})
	}
	deploy(t, s, "blog", "1", workers("-listen", "never"))
	first := byProcess(t, s, "blog")
	if len(first[""]) != 1 || len(first["worker"]) != 2 {
		t.Fatalf("instances by process: %v", first)
	}
	env, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(first["worker"][0]), "environ"))
	if err == nil && (!strings.Contains(string(env), "TAKO_PROCESS=worker") || strings.Contains(string(env), "\x00PORT=")) {
		t.Errorf("the environment of a worker: %q", env)
	}
	if err := s.Signal(first["worker"][0], syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	until(t, 10*time.Second, "the worker is replaced", func() bool {
		now := byProcess(t, s, "blog")["worker"]
		return len(now) == 2 && now[0] != first["worker"][0] && now[1] != first["worker"][0]
	})
	if now := byProcess(t, s, "blog")[""]; len(now) != 1 || now[0] != first[""][0] {
		t.Errorf("the death of a worker reached the web process: %v, before %v", now, first[""])
	}
	deploy(t, s, "blog", "2", workers("-listen", "never"))
	until(t, 10*time.Second, "the old processes are gone", func() bool { return len(status(t, s, "blog").Instances) == 3 })
	for _, in := range status(t, s, "blog").Builds {
		if in.Version != "2" {
			t.Errorf("build %s still runs", in.Version)
		}
	}
	lay(t, s, "blog", "3", workers("-exit", "7"))
	_, err = ask(s, "blog", "3", nil)
	if err == nil || !strings.Contains(err.Error(), "rolled_back") || !strings.Contains(err.Error(), "exit code 7") {
		t.Errorf("a worker that leaves at once: error %v", err)
	}
	if v := about(t, s, "blog.localhost").Version; v != "2" {
		t.Errorf("version %s serves, want 2", v)
	}
}

// TestReleaseCommandRunsOncePerDeploy: before any new instance, as the app, and
// its failure is the deploy's.
func TestReleaseCommandRunsOncePerDeploy(t *testing.T) {
	t.Parallel()
	s := start(t, takotest.Options{})
	migrate := func(command string) map[string]any { return quick(map[string]any{"release": command}) }
	three := map[string]any{"instances": 3}
	lay(t, s, "blog", "1", migrate(`echo "$TAKO_VERSION" >> "$TAKO_DATA_DIR/migrations"`))
	if _, err := ask(s, "blog", "1", three); err != nil {
		t.Fatal(err)
	}
	done := func() string {
		b, err := os.ReadFile(filepath.Join(s.Data, "apps", "blog", "data", "migrations"))
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
	if got := done(); got != "1\n" {
		t.Errorf("migrations after a deploy of three instances: %q, want one", got)
	}
	lay(t, s, "blog", "2", migrate(`echo "no such table" >&2; exit 4`))
	_, err := ask(s, "blog", "2", three)
	wantError(t, s, "a failing release command", err, `Release command .* failed \(exit code 4\): no such table`)
	if st := status(t, s, "blog"); st.Version != "1" || len(st.Instances) != 3 {
		t.Errorf("after it: version %s with %d instances", st.Version, len(st.Instances))
	}
	if _, err := s.Ask("rollback", map[string]any{"app": "blog", "version": "1"}); err != nil {
		t.Fatal(err)
	}
	if got := done(); got != "1\n" {
		t.Errorf("a rollback ran the release command: %q", got)
	}
}
