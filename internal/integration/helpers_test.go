package integration

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"tako/internal/takotest"
)

// ordinary is a user without any power, who exists nowhere else.
const ordinary = 61234

// asRoot skips a test that has to become somebody else, or to mount.
func asRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: it starts servers as other users, or mounts a file system")
	}
}

// soaking reports whether tests may take minutes.
func soaking() bool { return os.Getenv("TAKO_SOAK") != "" }

// start makes and starts a server with an app "good" in it, which must still be
// served at the end, by the same process of the same server: whatever a test does, it harms
// nothing else.
func start(t *testing.T, o takotest.Options) *takotest.Server {
	t.Helper()
	s := prepare(t, o)
	if err := s.Start(); err != nil {
		t.Fatal(err)
	}
	deploy(t, s, "good", "1", nil)
	before, server := about(t, s, "good.localhost"), s.PID()
	t.Cleanup(func() {
		if after := about(t, s, "good.localhost"); s.PID() == server && after.PID != before.PID {
			t.Errorf("the app that ran before was harmed: pid %d became %d", before.PID, after.PID)
		}
	})
	return s
}

// prepare makes a server and starts nothing.
func prepare(t *testing.T, o takotest.Options) *takotest.Server {
	t.Helper()
	if testing.Short() {
		t.Skip("-short: it builds and runs the programs")
	}
	s, err := takotest.New(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
		if t.Failed() {
			t.Logf("the server's log:\n%s", withoutPolls(s.Log()))
		}
	})
	return s
}

// withoutPolls is a log without the commands by which tests look.
func withoutPolls(log string) string {
	var b strings.Builder
	for line := range strings.Lines(log) {
		if !strings.Contains(line, "command=status") {
			b.WriteString(line)
		}
	}
	return b.String()
}

// releaseDir is where a release of an app lies in a server.
func releaseDir(s *takotest.Server, app, version string) string {
	return filepath.Join(s.Data, "apps", app, "releases", version)
}

// lay puts a release of the test app into the data root.
func lay(t *testing.T, s *takotest.Server, app, version string, manifest map[string]any, flags ...string) {
	t.Helper()
	if err := takotest.WriteApp(releaseDir(s, app, version), manifest, flags...); err != nil {
		t.Fatal(err)
	}
	if id := int(s.User()); id != 0 {
		err := filepath.WalkDir(filepath.Join(s.Data, "apps", app), func(path string, e os.DirEntry, err error) error {
			if err != nil {
				return err
			}
			fi, err := e.Info()
			if err == nil && fi.Sys().(*syscall.Stat_t).Uid == 0 { // ours: what was just laid
				err = os.Lchown(path, id, id)
			}
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
	}
}

// ask deploys what lies in the data root, with one instance on the route
// app.localhost unless more says otherwise, and returns the reply.
func ask(s *takotest.Server, app, version string, more map[string]any) (json.RawMessage, error) {
	fields := map[string]any{
		"app": app, "version": version, "path": releaseDir(s, app, version),
		"routes": []string{app + ".localhost"}, "instances": 1, "idle_timeout": 300,
	}
	maps.Copy(fields, more)
	return s.Ask("deploy", fields)
}

// deploy lays and deploys the test app.
func deploy(t *testing.T, s *takotest.Server, app, version string, manifest map[string]any, flags ...string) {
	t.Helper()
	lay(t, s, app, version, manifest, flags...)
	if _, err := ask(s, app, version, nil); err != nil {
		t.Fatalf("deploy %s %s: %v", app, version, err)
	}
}

// quick are timeouts that make failures quick, beside which more fields stand.
func quick(more map[string]any) map[string]any {
	m := map[string]any{
		"https_redirect": false,
		"timeouts":       map[string]any{"stability": 0.2, "ready": 20, "grace": 1, "drain": 5, "streams": 1, "install": 20},
	}
	maps.Copy(m, more)
	return m
}

// aboutApp is what the test app says of itself.
type aboutApp struct {
	Instance   string    `json:"instance"`
	Version    string    `json:"version"`
	Protocol   string    `json:"protocol"` // by which it was asked
	PID        int       `json:"pid"`
	UID        int       `json:"uid"`
	OwnTimeUS  int64     `json:"own_time_us"`
	ListenedAt time.Time `json:"listened_at"`
}

// about asks an app what it is, by its host.
func about(t *testing.T, s *takotest.Server, host string) aboutApp {
	t.Helper()
	a, err := tryAbout(s, host)
	if err != nil {
		t.Errorf("%s: %v", host, err)
	}
	return a
}

func tryAbout(s *takotest.Server, host string) (a aboutApp, err error) {
	answer, err := s.Get(context.Background(), takotest.TLS1, host+"/")
	if err != nil {
		return a, err
	}
	if answer.StatusCode != http.StatusOK {
		return a, fmt.Errorf("answered %s: %.100s", answer.Status, answer.Text)
	}
	return a, json.Unmarshal([]byte(answer.Text), &a)
}

// appStatus is what status says of an app, as far as tests look.
type appStatus struct {
	Version   string           `json:"version"`
	State     string           `json:"state"`
	LastError string           `json:"last_error"`
	RetryInMS *int64           `json:"retry_in_ms"`
	Instances []instanceStatus `json:"instances"`
	Builds    []struct {
		Version   string           `json:"version"`
		State     string           `json:"state"`
		Instances []instanceStatus `json:"instances"`
	} `json:"builds"`
}

type instanceStatus struct {
	ID      uint32 `json:"id"`
	Process string `json:"process"`
	State   string `json:"state"`
	PID     int    `json:"pid"`
	Port    int    `json:"port"`
}

func status(t *testing.T, s *takotest.Server, app string) appStatus {
	t.Helper()
	data, err := s.Ask("status", map[string]any{"app": app})
	if err != nil {
		t.Fatalf("status of %s: %v", app, err)
	}
	var st appStatus
	if err := json.Unmarshal(data, &st); err != nil {
		t.Fatal(err)
	}
	return st
}

// inTime is a bound on what a test waits for or measures: the one that is promised
// in the long form, on a quiet machine. In the short one others run beside, and a
// machine may stand still for seconds, so that it is only against hanging.
func inTime(promised time.Duration) time.Duration {
	if soaking() {
		return promised
	}
	return max(promised, takotest.AskWait)
}

// until asks again until ok, and returns how long that took. within is a bound as
// inTime has it.
func until(t *testing.T, within time.Duration, what string, ok func() bool) time.Duration {
	t.Helper()
	within = inTime(within)
	began := time.Now()
	for !ok() {
		if time.Since(began) > within {
			t.Fatalf("not within %s: %s", within, what)
		}
		time.Sleep(5 * time.Millisecond) // a stranger's state sends no event
	}
	return time.Since(began)
}

// wantError holds an error to a pattern, after its paths are made short: S is
// the server's folder.
func wantError(t *testing.T, s *takotest.Server, what string, err error, pattern string) {
	t.Helper()
	if err == nil {
		t.Errorf("%s: it worked, want the error %s", what, pattern)
		return
	}
	text := strings.ReplaceAll(err.Error(), s.Dir, "S")
	if !regexp.MustCompile(`(?s)^` + pattern + `$`).MatchString(text) {
		t.Errorf("%s:\n got %s\nwant %s", what, text, pattern)
	}
}

// logged counts what the server logged.
func logged(s *takotest.Server, text string) int { return strings.Count(s.Log(), text) }

// toggle puts the file "broken" into an app's data folder, or takes it away.
func toggle(t *testing.T, s *takotest.Server, app string, broken bool) {
	t.Helper()
	name := filepath.Join(s.Data, "apps", app, "data", "broken")
	if broken {
		if err := os.WriteFile(name, nil, 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	if err := os.Remove(name); err != nil {
		t.Fatal(err)
	}
}

// getWith asks for url once.
func getWith(ctx context.Context, client *http.Client, url string) (takotest.Answer, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return takotest.Answer{}, err
	}
	return takotest.Do(client, req)
}

// size is how many bytes a file has.
func size(t *testing.T, name string) int64 {
	t.Helper()
	fi, err := os.Stat(name)
	if err != nil {
		t.Fatal(err)
	}
	return fi.Size()
}

// inFlight is how many requests a status counts on the app's instances.
func inFlight(t *testing.T, data json.RawMessage) (n int) {
	t.Helper()
	var st struct {
		Instances []struct {
			InFlight int `json:"in_flight"`
		} `json:"instances"`
	}
	if err := json.Unmarshal(data, &st); err != nil {
		t.Fatal(err)
	}
	for _, in := range st.Instances {
		n += in.InFlight
	}
	return n
}
