package integration

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"tako/internal/takotest"
)

// TestRefusalsOfCommands sends every command that is refused before anything is
// started, and holds each to its text. The texts of single rules are tested where
// the rules are; here they are what a caller of the socket reads.
func TestRefusalsOfCommands(t *testing.T) {
	t.Parallel()
	s := start(t, takotest.Options{})
	lay(t, s, "blog", "1", nil)
	lay(t, s, "blog", "2", nil)
	outside := releaseDir(s, "good", "1")
	if err := os.Symlink(outside, filepath.Join(releaseDir(s, "blog", "1"), "out")); err != nil {
		t.Fatal(err)
	}
	many := make([]string, 201)
	for i := range many {
		many[i] = fmt.Sprintf("h%d.localhost", i)
	}
	manifest := func(version, text string) map[string]any {
		lay(t, s, "blog", version, nil)
		if err := os.WriteFile(filepath.Join(releaseDir(s, "blog", version), "app.json"), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		return map[string]any{"version": version, "path": releaseDir(s, "blog", version)}
	}
	missing := manifest("no-manifest", "")
	if err := os.Remove(filepath.Join(releaseDir(s, "blog", "no-manifest"), "app.json")); err != nil {
		t.Fatal(err)
	}

	type fields = map[string]any
	for _, c := range []struct {
		command string
		more    fields
		want    string // a pattern; S is the server's folder
	}{
		// App ids.
		{"deploy", fields{"app": ""}, `Invalid app name: must not be empty`},
		{"deploy", fields{"app": strings.Repeat("a", 64)}, `Invalid app name: must be 63 characters or fewer`},
		{"deploy", fields{"app": "1blog"}, `Invalid app name: must start with a lowercase letter`},
		{"deploy", fields{"app": "blog-"}, `Invalid app name: must not end with '-'`},
		{"deploy", fields{"app": "bl_og"}, `Invalid app name: only lowercase letters, digits, and '-' are allowed`},
		{"stop", fields{"app": "../etc"}, `Invalid app name: must start with a lowercase letter`},
		{"delete", fields{"app": "a/b"}, `Invalid app name: only lowercase letters, digits, and '-' are allowed`},
		// Release ids.
		{"deploy", fields{"version": ""}, `Invalid release version: must not be empty`},
		{"deploy", fields{"version": strings.Repeat("1", 129)}, `Invalid release version: must be 128 characters or fewer`},
		{"deploy", fields{"version": ".."}, `Invalid release version: '.' and '..' are not allowed`},
		{"deploy", fields{"version": "../2"}, `Invalid release version: path separators are not allowed`},
		{"deploy", fields{"version": "a b"}, `Invalid release version: only letters, digits, '.', '_' and '-' are allowed`},
		{"rollback", fields{"version": `a\b`}, `Invalid release version: path separators are not allowed`},
		// Paths.
		{"deploy", fields{"path": releaseDir(s, "blog", "none")}, `Invalid release path: S/data/apps/blog/releases/none \(no such file or directory\)`},
		{"deploy", fields{"path": filepath.Join(releaseDir(s, "blog", "1"), "app.json")}, `Invalid release path: 'S/data/apps/blog/releases/1/app.json' must be an existing directory`},
		{"deploy", fields{"path": "/"}, `Invalid release path: '/' must stay under 'S/data/apps/blog/releases'`},
		{"deploy", fields{"path": outside}, `Invalid release path: 'S/data/apps/good/releases/1' must stay under 'S/data/apps/blog/releases'`},
		{"deploy", fields{"path": filepath.Join(releaseDir(s, "blog", "1"), "out")}, `Invalid release path: 'S/data/apps/good/releases/1' must stay under 'S/data/apps/blog/releases'`},
		{"deploy", fields{"path": releaseDir(s, "blog", "2")}, `Invalid release path: 'S/data/apps/blog/releases/2' belongs to release '2', not to '1'; .*`},
		{"deploy", fields{"path": filepath.Dir(releaseDir(s, "blog", "1"))}, `Invalid release path: 'S/data/apps/blog/releases' holds all releases; .*`},
		{"deploy", fields{"path": "releases/1"}, `Invalid release path: releases/1 \(not an absolute path\)`},
		// Routes.
		{"deploy", fields{"routes": []string{}}, `Deploy rejected: app must define at least one route`},
		{"deploy", fields{"routes": []string{"blog.localhost", " "}}, `Deploy rejected: routes must be non-empty values`},
		{"deploy", fields{"routes": many}, `Deploy rejected: 201 routes are more than the 200 an app may have\. .*`},
		{"deploy", fields{"routes": []string{"*"}}, `Invalid route "\*": .*`},
		{"deploy", fields{"routes": []string{"blog.localhost\r\nX: y"}}, `Invalid route "blog.localhost\\r\\nX: y": .*`},
		{"deploy", fields{"routes": []string{"blog.localhost/a\x00b"}}, `Invalid route "blog.localhost/a\\x00b": .*`},
		{"deploy", fields{"routes": []string{"blog.localhost:80"}}, `Invalid route "blog.localhost:80": .*`},
		{"deploy", fields{"routes": []string{"/only/a/path"}}, `Invalid route "/only/a/path": .*`},
		{"deploy", fields{"routes": []string{"GOOD.localhost."}}, `.*'?good\.localhost'?.*'good'.*|.*'good'.*good\.localhost.*|.*good.*`},
		// Numbers and secrets.
		{"deploy", fields{"instances": 65}, `Deploy rejected: 65 instances are more than the 64 an app may have`},
		{"deploy", fields{"instances": 300}, "Invalid command: invalid value: integer `300`, expected u8.*"},
		{"deploy", fields{"secrets": nil}, `Invalid command: invalid type: null, expected a map.*`},
		{"deploy", fields{"secrets": fields{"A B": "x"}}, `.*A B.*`},
		{"deploy", fields{"secrets": fields{"A": "x\x00"}}, `.*A.*`},
		// Manifests.
		{"deploy", missing, `Invalid app release: missing deploy manifest S/data/apps/blog/releases/no-manifest/app\.json`},
		{"deploy", manifest("not-json", "{"), `Invalid app release: failed to parse deploy manifest S/data/apps/blog/releases/not-json/app\.json: .*`},
		{"deploy", manifest("no-runtime", `{"runtime": " ", "main": "app"}`), `Invalid app release: deploy manifest \S+/app\.json has empty runtime field`},
		{"deploy", manifest("no-main", `{"runtime": "node", "main": ""}`), `Invalid app release: deploy manifest \S+/app\.json has empty main field`},
		{"deploy", manifest("unknown", `{"runtime": "cobol", "main": "app"}`), `Invalid app release: unsupported runtime 'cobol' in deploy manifest \S+/app\.json`},
		{"deploy", manifest("wrong-type", `{"runtime": "go", "main": "app", "start": "./app"}`), `Invalid app release: failed to parse deploy manifest \S+: field "start": got a string, want a list of strings`},
		{"deploy", manifest("wrong-deep", `{"runtime": "go", "main": "app", "start": ["./app"], "health": {"codes": [true]}}`), `Invalid app release: failed to parse deploy manifest \S+: field "health.codes\[0\]": got a boolean, .*`},
		{"deploy", manifest("wrong-env", `{"runtime": "go", "main": "app", "env_vars": {"A": 1}}`), `Invalid app release: failed to parse deploy manifest \S+: field "env_vars.A": got a number, want a string`},
		// Apps that are not there, or have nothing to go back to.
		{"status", nil, `App not found: blog`},
		{"stop", nil, `Stop failed: App not found: blog`},
		{"list_releases", nil, `App not found: blog`},
		{"rollback", nil, `App not found: blog`},
		{"rollback", fields{"app": "good", "version": "9"}, `Release '9' not found for app 'good'`},
		// The protocol itself.
		{"hello", fields{"protocol_version": 7}, `Protocol version mismatch: client=7 server=1`},
		{"start", nil, "Invalid command: unknown variant `start`, expected one of `hello`, `deploy`, .*"},
		{"exit_upgrading", fields{"owner": "me"}, `Failed to exit upgrading mode: owner does not hold the upgrade lock\.`},
	} {
		all := fields{
			"app": "blog", "version": "1", "path": releaseDir(s, "blog", "1"), "routes": []string{"blog.localhost"},
			"instances": 1, "idle_timeout": 300,
		}
		maps.Copy(all, c.more)
		_, err := s.Ask(c.command, all)
		wantError(t, s, fmt.Sprintf("%s %.120v", c.command, c.more), err, c.want)
	}

	// None of them left anything.
	data, err := s.Ask("list", nil)
	if err != nil || !strings.Contains(string(data), `"good"`) || strings.Contains(string(data), `"blog"`) {
		t.Errorf("list after all refusals: %s, %v", data, err)
	}

	// What is not refused though it could be: to delete what is not there.
	if data, err := s.Ask("delete", fields{"app": "blog"}); err != nil || !strings.Contains(string(data), `"existed":false`) {
		t.Errorf("delete of an unknown app: %s, %v", data, err)
	}
}

// TestWhileUpgradingMutatingCommandsAreRefused: reads and traffic go on.
func TestWhileUpgradingMutatingCommandsAreRefused(t *testing.T) {
	t.Parallel()
	s := start(t, takotest.Options{})
	type fields = map[string]any
	if _, err := s.Ask("enter_upgrading", fields{"owner": "one"}); err != nil {
		t.Fatal(err)
	}
	_, err := s.Ask("enter_upgrading", fields{"owner": "two"})
	wantError(t, s, "another owner", err, `Server is already upgrading \(owner: one\)\.`)
	if _, err := s.Ask("enter_upgrading", fields{"owner": "one"}); err != nil {
		t.Errorf("the same owner again: %v", err)
	}
	for command, label := range map[string]string{
		"deploy": "deploy", "stop": "stop", "delete": "delete", "rollback": "rollback", "update_secrets": "update-secrets",
	} {
		_, err := s.Ask(command, fields{
			"app": "good", "version": "1", "path": "/", "routes": []string{}, "instances": 1, "idle_timeout": 1, "secrets": fields{},
		})
		wantError(t, s, command, err, `Server is upgrading; '`+label+`' is temporarily blocked\. Please retry shortly\.`)
	}
	_, err = s.Ask("stop", fields{"app": "Good"})
	wantError(t, s, "the name comes first", err, `Invalid app name: .*`)
	if status(t, s, "good").State != "running" {
		t.Error("status is not answered while upgrading")
	}

	// The lock is as durable as anything else.
	if err := s.Stop(); err != nil {
		t.Fatal(err)
	}
	if err := s.Start(); err != nil {
		t.Fatal(err)
	}
	_, err = s.Ask("stop", fields{"app": "good"})
	wantError(t, s, "after a restart", err, `Server is upgrading; .*`)
	_, err = s.Ask("exit_upgrading", fields{"owner": "two"})
	wantError(t, s, "not the holder", err, `Failed to exit upgrading mode: owner does not hold the upgrade lock\.`)
	if _, err := s.Ask("exit_upgrading", fields{"owner": "one"}); err != nil {
		t.Error(err)
	}
	until(t, takotest.StartWait, "good comes back", func() bool { _, err := tryAbout(s, "good.localhost"); return err == nil })
}

// slowDeploy lays a release whose instance listens only after a while, begins to
// deploy it, and returns once its instance is starting.
func slowDeploy(t *testing.T, s *takotest.Server, app, version string, takes time.Duration) (end chan error) {
	t.Helper()
	lay(t, s, app, version, quick(nil), "-slow", takes.String())
	end = make(chan error, 1)
	go func() {
		_, err := ask(s, app, version, nil)
		end <- err
	}()
	until(t, takotest.AskWait, "a starting instance", func() bool {
		data, err := s.Ask("status", map[string]any{"app": app})
		var st appStatus
		return err == nil && json.Unmarshal(data, &st) == nil && hasBuild(st, version)
	})
	return end
}

func hasBuild(st appStatus, version string) bool {
	for _, b := range st.Builds {
		if b.Version == version {
			return true
		}
	}
	return false
}

func TestOneCommandOfAnAppAtATime(t *testing.T) {
	t.Parallel()
	s := start(t, takotest.Options{})
	type fields = map[string]any
	deploy(t, s, "blog", "1", quick(nil))
	lay(t, s, "blog", "3", quick(nil))
	end := slowDeploy(t, s, "blog", "2", 1500*time.Millisecond)

	const busy = `Deploy already in progress for app 'blog'\. Please wait and try again\.`
	for command, more := range map[string]fields{
		"deploy":         {"version": "3", "path": releaseDir(s, "blog", "3"), "routes": []string{"blog.localhost"}, "instances": 1, "idle_timeout": 1},
		"delete":         nil,
		"stop":           nil,
		"update_secrets": {"secrets": fields{"A": "1"}},
		"rollback":       {"version": "1"},
		"restart":        nil,
		"scale":          {"instances": 2},
	} {
		all := fields{"app": "blog"}
		maps.Copy(all, more)
		_, err := s.Ask(command, all)
		wantError(t, s, command+" during a deploy", err, busy)
	}
	// Another app is not held up.
	deploy(t, s, "shop", "1", quick(nil))

	if st := status(t, s, "blog"); st.Version != "1" {
		t.Errorf("before the commit the version is %s, want 1", st.Version)
	}
	if err := <-end; err != nil {
		t.Fatal(err)
	}
	if a := about(t, s, "blog.localhost"); a.Version != "2" {
		t.Errorf("version %s serves, want 2", a.Version)
	}
}

func TestUpdateSecretsThatFailsGoesBackToTheOldOnes(t *testing.T) {
	t.Parallel()
	s := start(t, takotest.Options{})
	type fields = map[string]any
	// It starts only with the right password.
	lay(t, s, "blog", "1", quick(fields{"start": []string{"sh", "-c", `[ "$PASSWORD" != wrong ] || { echo "wrong password" >&2; exit 4; }; exec ./app`}}))
	if _, err := ask(s, "blog", "1", fields{"secrets": fields{"PASSWORD": "right"}}); err != nil {
		t.Fatal(err)
	}
	before := about(t, s, "blog.localhost")
	_, err := s.Ask("update_secrets", fields{"app": "blog", "secrets": fields{"PASSWORD": "wrong"}})
	wantError(t, s, "update_secrets", err, `Rolling restart failed: .*exit code 4.*wrong password.*`)
	if after := about(t, s, "blog.localhost"); after.PID != before.PID {
		t.Errorf("pid %d became %d", before.PID, after.PID)
	}
	secrets, err := os.ReadFile(filepath.Join(s.Data, "apps", "blog", "secrets.json"))
	if err != nil || !strings.Contains(string(secrets), `"right"`) {
		t.Errorf("secrets.json: %s, %v", secrets, err)
	}
	// Whatever starts from now on has the old ones too.
	if _, err := s.Ask("restart", fields{"app": "blog"}); err != nil {
		t.Errorf("restart: %v", err)
	}
	if data, err := s.Ask("update_secrets", fields{"app": "blog", "secrets": fields{"PASSWORD": "new"}}); err != nil || !strings.Contains(string(data), `"restarted":true`) {
		t.Errorf("update_secrets: %s, %v", data, err)
	}
}

func TestDeleteTakesRoutesStateAndSecrets(t *testing.T) {
	t.Parallel()
	s := start(t, takotest.Options{})
	type fields = map[string]any
	lay(t, s, "blog", "1", quick(nil))
	if _, err := ask(s, "blog", "1", fields{"secrets": fields{"A": "b"}}); err != nil {
		t.Fatal(err)
	}
	pid := about(t, s, "blog.localhost").PID
	if _, err := s.Ask("delete", fields{"app": "blog"}); err != nil {
		t.Fatal(err)
	}
	for _, p := range s.Processes() {
		if p.PID == pid {
			t.Errorf("its instance still runs: %v", p)
		}
	}
	if answer, err := s.Get(t.Context(), takotest.TLS1, "blog.localhost/"); err != nil || answer.StatusCode != 404 {
		t.Errorf("its route is answered %v, %v; want 404", answer.Status, err)
	}
	for _, name := range []string{"secrets.json", "secrets.json.next", "current"} {
		if _, err := os.Lstat(filepath.Join(s.Data, "apps", "blog", name)); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s is left: %v", name, err)
		}
	}
	_, err := s.Ask("status", fields{"app": "blog"})
	wantError(t, s, "status", err, `App not found: blog`)

	// Neither does a restart bring it back, and its route is anybody's.
	if err := s.Stop(); err != nil {
		t.Fatal(err)
	}
	if err := s.Start(); err != nil {
		t.Fatal(err)
	}
	_, err = s.Ask("status", fields{"app": "blog"})
	wantError(t, s, "status", err, `App not found: blog`)
	lay(t, s, "other", "1", quick(nil))
	if _, err := ask(s, "other", "1", fields{"routes": []string{"blog.localhost"}}); err != nil {
		t.Error(err)
	}
	// A new app of the name begins without the old one's secrets.
	if _, err := ask(s, "blog", "1", nil); err == nil {
		t.Error("the route that the other app took was given twice")
	}
	if _, err := ask(s, "blog", "1", fields{"routes": []string{"new.localhost"}}); err != nil {
		t.Error(err)
	}
	answer, err := s.Get(t.Context(), takotest.HTTP1, "new.localhost/env")
	if err != nil || strings.Contains(answer.Text, `"A=b"`) {
		t.Errorf("the new app has the old one's secrets: %s, %v", answer.Text, err)
	}
}

func TestRollbackMovesCurrent(t *testing.T) {
	t.Parallel()
	s := start(t, takotest.Options{})
	current := func() string {
		to, err := os.Readlink(filepath.Join(s.Data, "apps", "blog", "current"))
		if err != nil {
			t.Fatal(err)
		}
		return filepath.Base(to)
	}
	// The install step leaves a trace, to see that a rollback does without.
	lay(t, s, "blog", "1", quick(map[string]any{"install": "echo installed >> trace"}))
	if _, err := ask(s, "blog", "1", nil); err != nil {
		t.Fatal(err)
	}
	deploy(t, s, "blog", "2", quick(nil))
	if got := current(); got != "2" {
		t.Errorf("current is %s, want 2", got)
	}
	if _, err := s.Ask("rollback", map[string]any{"app": "blog", "version": "1"}); err != nil {
		t.Fatal(err)
	}
	if got := current(); got != "1" {
		t.Errorf("current is %s, want 1", got)
	}
	if a := about(t, s, "blog.localhost"); a.Version != "1" {
		t.Errorf("version %s serves, want 1", a.Version)
	}
	trace, err := os.ReadFile(filepath.Join(releaseDir(s, "blog", "1"), "trace"))
	if err != nil || string(trace) != "installed\n" {
		t.Errorf("the install step ran other than once: %q, %v", trace, err)
	}
}
