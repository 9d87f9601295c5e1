package integration

import (
	"context"
	"encoding/json"
	"math/rand/v2"
	"net/http"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"tako/internal/takotest"
)

// kills is how often the master is killed under a deploy.
const kills = 20

// release is one of two versions of an app that differ in everything a deploy
// changes.
type release struct {
	version, route, secret string
}

func (r release) deploy(s *takotest.Server) error {
	_, err := s.Ask("deploy", map[string]any{
		"app": "blog", "version": r.version, "path": r.dir(s), "routes": []string{r.route},
		"secrets": map[string]string{"SECRET": r.secret}, "instances": 1, "idle_timeout": 300,
	})
	return err
}

func (r release) dir(s *takotest.Server) string {
	return filepath.Join(s.Data, "apps", "blog", "releases", r.version)
}

// TestMasterKilledUnderADeployLeavesTheOldStateOrTheNew kills tako-master at
// random moments of a deploy. After the next start version, route and secret
// belong together: all of the old release or all of the new.
func TestMasterKilledUnderADeployLeavesTheOldStateOrTheNew(t *testing.T) {
	t.Parallel()
	s := launch(t)
	if err := s.Start(); err != nil {
		t.Fatal(err)
	}
	old := release{"one", "one.localhost", "secret-one"}
	next := release{"two", "two.localhost", "secret-two"}
	for _, r := range []release{old, next} {
		if err := takotest.WriteApp(r.dir(s), nil); err != nil {
			t.Fatal(err)
		}
	}
	// How long an undisturbed deploy takes bounds the moments.
	if err := old.deploy(s); err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	if err := next.deploy(s); err != nil {
		t.Fatal(err)
	}
	whole := time.Since(began)
	old, next = next, old

	survived := 0
	for range kills {
		moment := rand.N(whole + whole/4)
		done := make(chan error, 1)
		go func() { done <- next.deploy(s) }()
		select {
		case <-time.After(moment):
		case <-t.Context().Done():
		}
		if err := s.Kill(); err != nil {
			t.Fatalf("killed after %s of a deploy: %v", moment, err)
		}
		acknowledged := <-done == nil
		if err := s.Start(); err != nil {
			t.Fatalf("killed after %s of a deploy: %v", moment, err)
		}
		got := state(t, s)
		switch {
		case got == next:
			survived++
			old, next = next, old
		case got != old:
			t.Fatalf("killed after %s of a deploy from %v to %v: got %v", moment, old, next, got)
		case acknowledged:
			t.Fatalf("killed after %s: the deploy of %v was acknowledged, and is lost", moment, next)
		}
	}
	t.Logf("%d deploys of about %s were killed; %d of them had been committed", kills, whole.Round(time.Millisecond), survived)
}

// state is what the server and the app itself say, waiting until the app
// answers.
func state(t *testing.T, s *takotest.Server) release {
	t.Helper()
	var status struct {
		Version string   `json:"version"`
		Routes  []string `json:"routes"`
	}
	data, err := s.Ask("status", map[string]any{"app": "blog"})
	if err == nil {
		err = json.Unmarshal(data, &status)
	}
	if err != nil {
		t.Fatal(err)
	}
	r := release{version: status.Version, route: strings.Join(status.Routes, ",")}

	ctx, cancel := context.WithTimeout(t.Context(), takotest.StartWait)
	defer cancel()
	for {
		answer, err := s.Get(ctx, takotest.TLS1, r.route+"/env")
		if err == nil && answer.StatusCode == http.StatusOK {
			var env []string
			if err := json.Unmarshal([]byte(answer.Text), &env); err != nil {
				t.Fatal(err)
			}
			version := ""
			for _, e := range env {
				if v, ok := strings.CutPrefix(e, "SECRET="); ok {
					r.secret = v
				}
				if v, ok := strings.CutPrefix(e, "TAKO_VERSION="); ok {
					version = v
				}
			}
			if version != r.version {
				t.Fatalf("status names version %s, and the instance that answers is of %s", r.version, version)
			}
			return r
		}
		if ctx.Err() != nil {
			t.Fatalf("%s does not answer after a restart: %v %s\n%s", r.route, err, answer.Text, s.Log())
		}
		time.Sleep(10 * time.Millisecond)
	}
}
