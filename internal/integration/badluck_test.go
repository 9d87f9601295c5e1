package integration

import (
	"net/http"
	"testing"
	"time"

	"tako/internal/takotest"
)

// TestAnAppThatExitsAfterAWhileIsStartedAgain, each time later, and serves in
// between.
func TestAnAppThatExitsAfterAWhileIsStartedAgain(t *testing.T) {
	t.Parallel()
	s := start(t, takotest.Options{})
	deploy(t, s, "blog", "1", quick(nil), "-lifetime", "2s")
	pids := make(map[int]bool)
	until(t, 30*time.Second, "three processes of it served", func() bool {
		if a, err := tryAbout(s, "blog.localhost"); err == nil {
			pids[a.PID] = true
		}
		return len(pids) == 3
	})
	if st := status(t, s, "blog"); st.LastError == "" {
		t.Errorf("status does not say why it was started again: %+v", st)
	}
	// A better release ends it.
	deploy(t, s, "blog", "2", quick(nil))
	if st := status(t, s, "blog"); st.State != "running" || st.LastError != "" || st.RetryInMS != nil {
		t.Errorf("after a better release: %+v", st)
	}
}

// TestTheOnlyInstanceThatHangsIsReplaced, though it accepts connections.
func TestTheOnlyInstanceThatHangsIsReplaced(t *testing.T) {
	t.Parallel()
	s := start(t, takotest.Options{})
	deploy(t, s, "blog", "1", quick(nil))
	before := about(t, s, "blog.localhost")
	client := s.Client(takotest.HTTP1)
	client.Timeout = 500 * time.Millisecond
	defer client.CloseIdleConnections()
	if answer, err := getWith(t.Context(), client, s.URL(takotest.HTTP1, "blog.localhost/hang")); err == nil {
		t.Fatalf("it answers %s", answer.Status)
	}
	until(t, 30*time.Second, "another process serves", func() bool {
		answer, err := getWith(t.Context(), client, s.URL(takotest.HTTP1, "blog.localhost/"))
		return err == nil && answer.StatusCode == http.StatusOK
	})
	if after := about(t, s, "blog.localhost"); after.PID == before.PID {
		t.Error("the process that hangs answers")
	}
}

// TestASlowAnswerIsNoIllness: an app may take its time for its visitors as long as
// it answers its probe.
func TestASlowAnswerIsNoIllness(t *testing.T) {
	t.Parallel()
	s := start(t, takotest.Options{})
	deploy(t, s, "blog", "1", quick(nil))
	before := about(t, s, "blog.localhost")
	answer, err := s.Get(t.Context(), takotest.TLS1, "blog.localhost/slow?ms=6000")
	if err != nil || answer.Text != "done\n" {
		t.Errorf("a request of 6 s: %v %q, %v", answer.Response, answer.Text, err)
	}
	if after := about(t, s, "blog.localhost"); after.PID != before.PID {
		t.Error("it was replaced meanwhile")
	}
}

// TestARolloutWaitsForRequestsInFlight: the old instance finishes what it began,
// and the reply comes after that.
func TestARolloutWaitsForRequestsInFlight(t *testing.T) {
	t.Parallel()
	s := start(t, takotest.Options{})
	deploy(t, s, "blog", "1", quick(nil))
	lay(t, s, "blog", "2", quick(nil))
	slow := make(chan error, 1)
	began := time.Now()
	go func() {
		answer, err := s.Get(t.Context(), takotest.TLS1, "blog.localhost/slow?ms=2500")
		if err == nil && answer.Text != "done\n" {
			t.Errorf("the request in flight: %s %q", answer.Status, answer.Text)
		}
		slow <- err
	}()
	until(t, 2*time.Second, "the request is in flight", func() bool {
		data, err := s.Ask("status", map[string]any{"app": "blog"})
		return err == nil && inFlight(t, data) == 1
	})
	if _, err := ask(s, "blog", "2", nil); err != nil {
		t.Fatal(err)
	}
	if took := time.Since(began); took < 2400*time.Millisecond {
		t.Errorf("the reply came after %s, before the drain of a request of 2.5 s", took)
	}
	if err := <-slow; err != nil {
		t.Errorf("the request in flight: %v", err)
	}
}

// TestADrainHasATimeLimit: a request that goes on for ever holds a rollout for so
// long and no longer.
func TestADrainHasATimeLimit(t *testing.T) {
	t.Parallel()
	s := start(t, takotest.Options{})
	manifest := quick(map[string]any{"timeouts": map[string]any{"stability": 0.1, "drain": 1, "streams": 1, "grace": 0.5}})
	deploy(t, s, "blog", "1", manifest)
	lay(t, s, "blog", "2", manifest)
	cut := make(chan bool, 1)
	go func() {
		client := s.Client(takotest.TLS1)
		defer client.CloseIdleConnections()
		// A POST: what is cut of it may not be asked again of the new instance.
		req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, s.URL(takotest.TLS1, "blog.localhost/slow?ms=10000"), nil)
		if err != nil {
			t.Error(err)
		}
		answer, err := takotest.Do(client, req)
		cut <- err != nil || answer.StatusCode >= 500
	}()
	until(t, 5*time.Second, "the request is in flight", func() bool {
		data, err := s.Ask("status", map[string]any{"app": "blog"})
		return err == nil && inFlight(t, data) == 1
	})
	began := time.Now()
	if _, err := ask(s, "blog", "2", nil); err != nil {
		t.Fatal(err)
	}
	if took := time.Since(began); took < time.Second || took > inTime(10*time.Second) {
		t.Errorf("the deploy took %s with a drain of 1 s", took)
	}
	if !<-cut {
		t.Error("a request of 10 s was answered in full")
	}
	if v := about(t, s, "blog.localhost").Version; v != "2" {
		t.Errorf("version %s serves, want 2", v)
	}
}
