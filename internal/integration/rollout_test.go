package integration

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"tako/internal/takotest"
)

// TestNoRequestFailsWhileReleasesRoll rolls releases of an app with two instances
// under a steady load, of new connections and kept ones, with TLS and without.
func TestNoRequestFailsWhileReleasesRoll(t *testing.T) {
	t.Parallel()
	deploys, rollbacks, load := 3, 1, takotest.LoadOptions{Clients: 16, Pause: 20 * time.Millisecond}
	manifest := quick(nil)
	if soaking() {
		deploys, rollbacks = 20, 5
		load = takotest.LoadOptions{Clients: 64, Pause: 50 * time.Millisecond}
		manifest = map[string]any{"https_redirect": false, "timeouts": map[string]any{}} // the defaults
	}
	s := start(t, takotest.Options{})
	two := map[string]any{"instances": 2}
	lay(t, s, "blog", "0", manifest)
	if _, err := ask(s, "blog", "0", two); err != nil {
		t.Fatal(err)
	}
	l := s.Load(t.Context(), "blog.localhost/", load)
	defer l.Stop()
	began := time.Now()
	for i := 1; i <= deploys; i++ {
		version := fmt.Sprint(i)
		lay(t, s, "blog", version, manifest)
		if _, err := ask(s, "blog", version, two); err != nil {
			t.Fatalf("deploy %s: %v", version, err)
		}
		if v := about(t, s, "blog.localhost").Version; v != version {
			t.Errorf("after the deploy of %s version %s serves", version, v)
		}
	}
	for i := range rollbacks {
		version := fmt.Sprint(deploys - 1 - i%2)
		if _, err := s.Ask("rollback", map[string]any{"app": "blog", "version": version}); err != nil {
			t.Fatalf("rollback to %s: %v", version, err)
		}
		if v := about(t, s, "blog.localhost").Version; v != version {
			t.Errorf("after the rollback to %s version %s serves", version, v)
		}
	}
	took := time.Since(began)
	r := l.Stop()
	t.Logf("%d deploys and %d rollbacks in %s under %d clients: %v", deploys, rollbacks, took.Round(time.Second), load.Clients, r)
	if r.Failures > 0 {
		t.Errorf("%d of %d requests failed", r.Failures, r.Requests)
	}
	if r.Requests < deploys*50 {
		t.Errorf("only %d requests were sent", r.Requests)
	}
}

// TestRollingUpdateShowsBothBuilds: the old instances serve until the new ones
// are proven, and status shows them all.
func TestRollingUpdateShowsBothBuilds(t *testing.T) {
	t.Parallel()
	s := start(t, takotest.Options{})
	deploy(t, s, "blog", "1", quick(nil))
	end := slowDeploy(t, s, "blog", "2", time.Second)
	st := status(t, s, "blog")
	if len(st.Builds) != 2 || st.Builds[0].Version != "1" || st.Builds[0].State != "running" || st.Builds[1].Version != "2" || st.Builds[1].State != "deploying" {
		t.Errorf("status during a rollout: %+v", st)
	}
	if v := about(t, s, "blog.localhost").Version; v != "1" {
		t.Errorf("version %s serves, want 1", v)
	}
	if err := <-end; err != nil {
		t.Fatal(err)
	}
	until(t, 5*time.Second, "the old instance is gone", func() bool { return len(status(t, s, "blog").Builds) == 1 })
}

// TestThreeInstancesOfTheGoExampleAreDeployedInTime measures what an operator
// waits for with every default; the example comes built, so that the compiler is
// not measured.
func TestThreeInstancesOfTheGoExampleAreDeployedInTime(t *testing.T) {
	t.Parallel()
	s := start(t, takotest.Options{})
	root, err := takotest.Root()
	if err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(t.TempDir(), "hello")
	if err := os.CopyFS(dir, os.DirFS(filepath.Join(root, "examples", "counter-go"))); err != nil {
		t.Fatal(err)
	}
	build := exec.CommandContext(t.Context(), "go", "build", "-o", "app", ".")
	build.Dir = dir
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build the example: %v\n%s", err, out)
	}
	began := time.Now()
	_, stderr, code, err := s.Ctl(t.Context(), "deploy", dir, "--app", "hello", "--route", "hello.localhost", "--instances", "3")
	took := time.Since(began)
	if err != nil || code != 0 {
		t.Fatalf("deploy: %v, exit status %d, %s", err, code, stderr)
	}
	t.Logf("3 instances in %s, the upload included", took.Round(10*time.Millisecond))
	if limit := inTime(10 * time.Second); took > limit {
		t.Errorf("it took %s, more than %s", took, limit)
	}
	if n := len(status(t, s, "hello").Instances); n != 3 {
		t.Errorf("%d instances, want 3", n)
	}
	if answer, err := s.Get(t.Context(), takotest.TLS1, "hello.localhost/"); err != nil || !strings.Contains(answer.Text, "visit 1;") {
		t.Errorf("it answers %s, %v", answer.Text, err)
	}
}
