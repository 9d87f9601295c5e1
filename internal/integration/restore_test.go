package integration

import (
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"tako/internal/takotest"
)

// TestManyAppsComeBackSideBySide starts a server with many apps: those that are
// ready are served at once, and one that never starts delays no other.
func TestManyAppsComeBackSideBySide(t *testing.T) {
	t.Parallel()
	apps, limit := 10, inTime(time.Second)
	if soaking() {
		apps = 200
	}
	s := prepare(t, takotest.Options{})
	if err := s.Start(); err != nil {
		t.Fatal(err)
	}
	programs, err := takotest.Build()
	if err != nil {
		t.Fatal(err)
	}
	name := func(i int) string { return fmt.Sprintf("app%d", i) }
	// One program for all of them: the disk is not what is measured.
	manifest := quick(map[string]any{"start": []string{filepath.Join(programs, "testapp")}, "timeouts": map[string]any{"stability": 0, "ready": 30}})
	lay(t, s, "a-never", "1", quick(nil))
	if _, err := ask(s, "a-never", "1", nil); err != nil {
		t.Fatal(err)
	}
	var all sync.WaitGroup
	room := make(chan struct{}, 8)
	for i := range apps {
		all.Go(func() {
			room <- struct{}{}
			defer func() { <-room }()
			lay(t, s, name(i), "1", manifest)
			if err := os.Remove(filepath.Join(releaseDir(s, name(i), "1"), "app")); err != nil {
				t.Error(err)
			}
			if _, err := ask(s, name(i), "1", nil); err != nil {
				t.Errorf("deploy %s: %v", name(i), err)
			}
		})
	}
	all.Wait()
	if t.Failed() {
		return
	}
	if err := s.Stop(); err != nil {
		t.Fatal(err)
	}
	// From now on the first of them by name never listens.
	if err := os.RemoveAll(releaseDir(s, "a-never", "1")); err != nil {
		t.Fatal(err)
	}
	// It is given up soon: another test's server may listen on its port meanwhile.
	soon := map[string]any{"stability": 0.2, "ready": 2, "grace": 1}
	lay(t, s, "a-never", "1", quick(map[string]any{"timeouts": soon}), "-listen", "never")

	began := time.Now()
	if err := s.Start(); err != nil {
		t.Fatal(err)
	}
	var mu sync.Mutex
	var worst, last time.Duration
	waited := 0
	for i := range apps {
		all.Go(func() {
			for {
				a, err := tryAbout(s, name(i)+".localhost")
				if err == nil {
					late := time.Since(a.ListenedAt)
					mu.Lock()
					worst, last = max(worst, late), max(last, time.Since(began))
					mu.Unlock()
					return
				}
				mu.Lock()
				waited++
				mu.Unlock()
				if time.Since(began) > takotest.AskWait {
					t.Errorf("%s does not come back: %v", name(i), err)
					return
				}
				time.Sleep(50 * time.Millisecond)
			}
		})
	}
	all.Wait()
	t.Logf("%d apps: all served %s after the start, each at most %s after it listened; %d requests were answered otherwise before",
		apps, last.Round(time.Millisecond), worst.Round(time.Millisecond), waited)
	if worst > limit {
		t.Errorf("an app that listened was served only %s later, more than %s", worst, limit)
	}
	if st := status(t, s, "a-never"); st.State == "running" {
		t.Errorf("the app that never listens: %+v", st)
	}
	if answer, err := s.Get(t.Context(), takotest.TLS1, "a-never.localhost/"); err == nil && answer.StatusCode < 500 {
		t.Errorf("the app that never listens answers %s", answer.Status)
	}
}

// TestCommandsAndRequestsWaitForARestoredApp: what comes in the first moments of
// a server is neither lost nor refused.
func TestCommandsAndRequestsWaitForARestoredApp(t *testing.T) {
	t.Parallel()
	s := prepare(t, takotest.Options{})
	if err := s.Start(); err != nil {
		t.Fatal(err)
	}
	for _, app := range []string{"asked", "plain", "stopped", "deployed"} {
		deploy(t, s, app, "1", quick(nil))
	}
	lay(t, s, "deployed", "2", quick(nil))
	for _, end := range []func() error{s.Stop, s.Kill} {
		if err := end(); err != nil {
			t.Fatal(err)
		}
		if err := s.Launch(); err != nil {
			t.Fatal(err)
		}
		answer, err := s.Get(t.Context(), takotest.HTTP1, "plain.localhost/")
		for begun := time.Now(); err != nil && time.Since(begun) < takotest.StartWait; { // the ports are not open yet
			answer, err = s.Get(t.Context(), takotest.HTTP1, "plain.localhost/")
		}
		if err != nil || answer.StatusCode != 200 {
			t.Errorf("the first request without TLS: %v %q, %v", answer.Response, answer.Text, err)
		}
		if err := s.Stop(); err != nil {
			t.Fatal(err)
		}
		if err := s.Start(); err != nil {
			t.Fatal(err)
		}
		if _, err := s.Ask("stop", map[string]any{"app": "stopped"}); err != nil {
			t.Errorf("stop at once after the start: %v", err)
		}
		if _, err := ask(s, "deployed", "2", nil); err != nil {
			t.Errorf("deploy at once after the start: %v", err)
		}
		about(t, s, "asked.localhost")
		if v := about(t, s, "deployed.localhost").Version; v != "2" {
			t.Errorf("version %s serves, want 2", v)
		}
		if st := status(t, s, "stopped"); st.State != "stopped" || len(st.Instances) != 0 {
			t.Errorf("the stopped app: %+v", st)
		}
	}
}
