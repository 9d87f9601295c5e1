package integration

import (
	"encoding/json"
	"fmt"
	"maps"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"tako/internal/takotest"
)

// TestDeploysOfBadAppsFailAndSayWhy deploys every kind of bad app twice: as a new
// app, and as the second release of one that serves, which goes on serving.
func TestDeploysOfBadAppsFailAndSayWhy(t *testing.T) {
	t.Parallel()
	s := start(t, takotest.Options{})
	type fields = map[string]any
	printed := 20 << 20 // more than may be printed at once; the rest is slowed
	if soaking() {
		printed = 100 << 20
	}
	patient := fields{"ready": 20, "stability": 0.3, "grace": 0.5, "install": 20}
	short := fields{"timeouts": fields{"ready": 1, "stability": 0.3, "grace": 0.5, "install": 1}}
	answers := fields{"timeouts": fields{"ready": 4, "stability": 0.3, "grace": 0.5}} // enough to say what is wrong
	sh := func(script string) fields { return fields{"start": []string{"sh", "-c", script}} }
	for _, c := range []struct {
		name   string
		fields fields
		flags  []string
		want   string // a pattern of the reason
	}{
		{"exits at start", nil, []string{"-exit", "3"}, `.*Process exited during startup \(exit code 3\).*the reason is on this line.*`},
		{"is killed at start", sh("kill -9 $$"), nil, `.*Process exited during startup \(terminated by signal (SIGKILL|killed)\).*`},
		{"cannot be executed", fields{"start": []string{"./no-such-program"}}, nil, `.*Failed to spawn instance: .*no-such-program.*`},
		{"exits within its window", fields{"timeouts": fields{"stability": 5}}, []string{"-lifetime", "500ms"}, `.*Process exited.*\(exit code 9\).*`},
		{"never listens", short, []string{"-listen", "never"}, `.*Instance startup timeout: .*`},
		{"listens on another port", answers, []string{"-listen", "wrong"}, `.*Instance startup timeout: .*(PORT|TAKO_APP_SOCKET).*`},
		{"listens, then hangs", short, []string{"-silent"}, `.*Instance startup timeout.*`},
		{"answers 500", answers, []string{"-status", "500"}, `.*Instance startup timeout: .*500.*`},
		{"has no page to probe", answers, []string{"-status", "404"}, `.*Instance startup timeout: .*404.*health.*`},
		{"answers too slowly", fields{"timeouts": fields{"ready": 3, "stability": 3, "grace": 0.5}}, []string{"-think", "1500ms"}, `.*(Instance startup timeout|unhealthy during startup): .*`},
		{"its install step fails", fields{"install": "echo no such package >&2; exit 7"}, nil, `Invalid app release: Release dependency install failed \(exit code 7\): no such package`},
		{"its install step hangs", fields{"timeouts": short["timeouts"], "install": "echo waiting; sleep 60"}, nil, `Invalid app release: Release dependency install did not end within 1s: waiting`},
		{"its install step prints much and fails", fields{"timeouts": fields{"install": 60}, "install": fmt.Sprintf("head -c %d /dev/zero | tr '\\0' x; exit 1", printed)}, nil, `Invalid app release: Release dependency install failed \(exit code 1\): x{600}\n\[\.\.\.\]\nx{600}`},
		{"its release command fails", fields{"release": "echo no database >&2; exit 2"}, nil, `Release command 'sh -lc echo no database >&2; exit 2' failed \(exit code 2\): no database`},
	} {
		manifest := quick(fields{"timeouts": patient})
		maps.Copy(manifest, c.fields)
		lay(t, s, "new", "1", manifest, c.flags...)
		lay(t, s, "good", "2", manifest, c.flags...)
		second := make(chan error, 1)
		go func() {
			_, err := ask(s, "good", "2", fields{"routes": []string{"other.localhost"}, "secrets": fields{"NEW": "1"}})
			second <- err
		}()
		_, err := ask(s, "new", "1", nil)
		want := c.want
		if strings.HasPrefix(want, ".*") {
			want = "Deploy failed: " + want
		}
		wantError(t, s, c.name, err, want)
		if _, err := s.Ask("status", fields{"app": "new"}); err == nil {
			t.Errorf("%s: the app that failed is registered", c.name)
		}
		if answer, err := s.Get(t.Context(), takotest.TLS1, "new.localhost/"); err != nil || answer.StatusCode != http.StatusNotFound {
			t.Errorf("%s: its route is answered %v, %v; want 404", c.name, answer.Response, err)
		}
		if err := os.RemoveAll(releaseDir(s, "new", "1")); err != nil {
			t.Fatal(err)
		}

		err = <-second
		switch {
		case err == nil:
			t.Errorf("%s: it worked", c.name)
		case strings.HasPrefix(c.want, ".*"):
			var told struct {
				App, Error, Status string
				RolledBack         bool `json:"rolled_back"`
			}
			if json.Unmarshal([]byte(err.Error()), &told) != nil || told.App != "good" || !told.RolledBack || told.Status != "rollback" {
				t.Errorf("%s: a rolling update failed with %v, want the JSON of a rollback", c.name, err)
			}
		default:
			wantError(t, s, c.name, err, c.want)
		}
		until(t, 5*time.Second, c.name+": the failed instance is gone", func() bool { return len(status(t, s, "good").Instances) == 1 })
		st := status(t, s, "good")
		if st.Version != "1" || st.State != "running" || len(st.Instances) != 1 {
			t.Errorf("%s: after the failure the app is %+v", c.name, st)
		}
		about(t, s, "good.localhost")
		if answer, err := s.Get(t.Context(), takotest.TLS1, "other.localhost/"); err != nil || answer.StatusCode != http.StatusNotFound {
			t.Errorf("%s: the route of the failed release is answered %v, %v", c.name, answer.Response, err)
		}
		for _, name := range []string{"secrets.json.next"} {
			if _, err := os.Lstat(filepath.Join(s.Data, "apps", "good", name)); err == nil {
				t.Errorf("%s: %s is left", c.name, name)
			}
		}
		if err := os.RemoveAll(releaseDir(s, "good", "2")); err != nil {
			t.Fatal(err)
		}
		if t.Failed() {
			return
		}
	}
	if secrets, err := os.ReadFile(filepath.Join(s.Data, "apps", "good", "secrets.json")); err == nil && strings.Contains(string(secrets), "NEW") {
		t.Errorf("secrets of failed releases are kept: %s", secrets)
	}
}

// TestAFailedDeployLeavesNoProcess counts what runs: an app that ignores SIGTERM
// and never answers is gone too.
func TestAFailedDeployLeavesNoProcess(t *testing.T) {
	t.Parallel()
	s := start(t, takotest.Options{})
	before := len(s.Processes())
	lay(t, s, "bad", "1", quick(map[string]any{"timeouts": map[string]any{"ready": 1, "grace": 0.3}}), "-ignore-term", "-silent")
	if _, err := ask(s, "bad", "1", map[string]any{"instances": 3}); err == nil {
		t.Error("it worked")
	}
	until(t, 5*time.Second, "the instances are gone", func() bool { return len(s.Processes()) == before })
}

// TestAnAppThatIgnoresSIGTERMIsKilledAfterItsGrace: by stop, by the next release
// and by the end of the server.
func TestAnAppThatIgnoresSIGTERMIsKilledAfterItsGrace(t *testing.T) {
	t.Parallel()
	s := start(t, takotest.Options{})
	stubborn := quick(map[string]any{"timeouts": map[string]any{"stability": 0.1, "grace": 0.5}})
	deploy(t, s, "blog", "1", stubborn, "-ignore-term")
	first := about(t, s, "blog.localhost").PID
	deploy(t, s, "blog", "2", stubborn, "-ignore-term")
	second := about(t, s, "blog.localhost").PID
	gone := func(pid int) func() bool {
		return func() bool {
			for _, p := range s.Processes() {
				if p.PID == pid {
					return false
				}
			}
			return true
		}
	}
	until(t, 5*time.Second, "the old release's process ends", gone(first))
	began := time.Now()
	if _, err := s.Ask("stop", map[string]any{"app": "blog"}); err != nil {
		t.Fatal(err)
	}
	if took := time.Since(began); took < 400*time.Millisecond || took > inTime(5*time.Second) {
		t.Errorf("stop took %s, with a grace of 0.5 s", took)
	}
	if !gone(second)() {
		t.Error("after stop its process still runs")
	}
}

// TestAnAppThatDeletesItsReleaseGoesOnAndItsSuccessorComes: as one user an app
// may remove its own release; its process serves on, and the next release comes.
func TestAnAppThatDeletesItsReleaseGoesOnAndItsSuccessorComes(t *testing.T) {
	t.Parallel()
	o := takotest.Options{}
	if os.Geteuid() == 0 {
		o.User = ordinary // as root an app could not
	}
	s := prepare(t, o)
	if err := s.Start(); err != nil {
		t.Fatal(err)
	}
	upload(t, s, "blog", "1", quick(nil))
	if answer, err := s.Get(t.Context(), takotest.HTTP1, "blog.localhost/remove"); err != nil || answer.Text != "<nil>\n" {
		t.Fatalf("remove: %s, %v", answer.Text, err)
	}
	before := about(t, s, "blog.localhost")
	if before.Version != "1" {
		t.Errorf("version %s serves", before.Version)
	}
	_, err := s.Ask("restart", map[string]any{"app": "blog"})
	wantError(t, s, "restart", err, `Invalid app release: missing deploy manifest .*`)
	if about(t, s, "blog.localhost").PID != before.PID {
		t.Error("the failed restart touched the process that serves")
	}
	upload(t, s, "blog", "2", quick(nil))
	if v := about(t, s, "blog.localhost").Version; v != "2" {
		t.Errorf("version %s serves, want 2", v)
	}
	_, err = s.Ask("rollback", map[string]any{"app": "blog", "version": "1"})
	wantError(t, s, "rollback to what is gone", err, `Invalid app release: .*|Release '1' not found for app 'blog'`)
}

// upload deploys the test app as an operator does, by takoctl.
func upload(t *testing.T, s *takotest.Server, app, version string, manifest map[string]any, flags ...string) {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "app")
	if err := takotest.WriteApp(dir, manifest, flags...); err != nil {
		t.Fatal(err)
	}
	_, stderr, code, err := s.Ctl(t.Context(), "deploy", dir, "--app", app, "--route", app+".localhost", "--version", version)
	if err != nil || code != 0 {
		t.Fatalf("takoctl deploy: %v, exit status %d, %s", err, code, stderr)
	}
}

// TestAnAppThatPrintsMuchBeforeItListensIsDeployed: nothing waits for a reader.
func TestAnAppThatPrintsMuchBeforeItListensIsDeployed(t *testing.T) {
	t.Parallel()
	s := start(t, takotest.Options{})
	deploy(t, s, "loud", "1", quick(map[string]any{"timeouts": map[string]any{"ready": 20, "stability": 0.1}}), "-flood", fmt.Sprint(10<<20))
	about(t, s, "loud.localhost")
}
