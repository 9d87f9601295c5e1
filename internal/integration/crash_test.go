package integration

import (
	"net/http"
	"strconv"
	"syscall"
	"testing"
	"time"

	"tako/internal/takotest"
)

// loadOn begins a load on an app for crash tests: an answer later than 50 ms
// counts as a miss where the machine is quiet, as a soak wants it.
func loadOn(t *testing.T, s *takotest.Server, hostPath string) *takotest.Load {
	t.Helper()
	o := takotest.LoadOptions{Clients: 8, Pause: 5 * time.Millisecond}
	if soaking() {
		o.Slow = 50 * time.Millisecond
	}
	l := s.Load(t.Context(), hostPath, o)
	t.Cleanup(func() { l.Stop() })
	until(t, takotest.StartWait, "100 requests", func() bool { return l.Report().Requests > 100 })
	return l
}

// lastMiss is how long after a moment the last request that failed, or took
// long, began or ended; 0 without one.
func lastMiss(r takotest.Report, since time.Time) time.Duration {
	last := time.Duration(0)
	for _, m := range r.Misses {
		if m.Ended.After(since) {
			last = max(last, m.Ended.Sub(since))
		}
	}
	return last
}

// TestADeadInstanceIsOutAtOnceAndReplaced kills one of two instances under load.
func TestADeadInstanceIsOutAtOnceAndReplaced(t *testing.T) {
	t.Parallel()
	times, limit := 1, inTime(100*time.Millisecond)
	if soaking() {
		times = 20
	}
	s := start(t, takotest.Options{})
	lay(t, s, "blog", "1", quick(nil))
	if _, err := ask(s, "blog", "1", map[string]any{"instances": 2}); err != nil {
		t.Fatal(err)
	}
	l := loadOn(t, s, "blog.localhost/")
	worst, replaced := time.Duration(0), time.Duration(0)
	before := l.Report()
	for i := range times {
		st := status(t, s, "blog")
		if len(st.Instances) != 2 {
			t.Fatalf("instances: %+v", st.Instances)
		}
		victim := st.Instances[i%2]
		killed := time.Now()
		if err := s.KillProcess(victim.PID); err != nil {
			t.Fatal(err)
		}
		back := until(t, 15*time.Second, "a replacement", func() bool {
			healthy := 0
			for _, in := range status(t, s, "blog").Instances {
				if in.State == "healthy" && in.ID != victim.ID {
					healthy++
				}
			}
			return healthy == 2
		})
		replaced = max(replaced, back)
		worst = max(worst, lastMiss(l.Report(), killed))
		// A new set, whose next crash is a first one and waits for no back-off.
		if _, err := s.Ask("restart", map[string]any{"app": "blog"}); err != nil {
			t.Fatal(err)
		}
		until(t, 15*time.Second, "two instances again", func() bool { return len(status(t, s, "blog").Instances) == 2 })
	}
	r := l.Stop()
	t.Logf("%d kills: the last miss at most %s after one, a replacement at most %s after; %v", times, worst, replaced, r)
	if worst > limit {
		t.Errorf("a request failed or was late %s after the kill, more than %s", worst, limit)
	}
	// Only what was in flight in it may be lost: one request per connection.
	if failed := r.Failures - before.Failures; failed > 8*times {
		t.Errorf("%d requests failed in %d crashes under 8 clients", failed, times)
	}
}

// TestAHungInstanceIsOutInTimeAndReplaced stops one of two instances with
// SIGSTOP: it is there, and answers nothing.
func TestAHungInstanceIsOutInTimeAndReplaced(t *testing.T) {
	t.Parallel()
	s := start(t, takotest.Options{})
	lay(t, s, "blog", "1", quick(nil))
	if _, err := ask(s, "blog", "1", map[string]any{"instances": 2}); err != nil {
		t.Fatal(err)
	}
	victim := status(t, s, "blog").Instances[0]
	hung := time.Now()
	if err := s.Signal(victim.PID, syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	out := until(t, 3*time.Second, "the hung instance is unhealthy", func() bool {
		for _, in := range status(t, s, "blog").Instances {
			if in.ID == victim.ID {
				return in.State == "unhealthy"
			}
		}
		return true // replaced already
	})
	// From now on nothing is sent to it.
	for range 20 {
		began := time.Now()
		if a := about(t, s, "blog.localhost"); a.PID == victim.PID || time.Since(began) > inTime(5*time.Second) {
			t.Errorf("pid %d answered in %s", a.PID, time.Since(began))
		}
	}
	until(t, 20*time.Second, "it is replaced", func() bool {
		healthy := 0
		for _, in := range status(t, s, "blog").Instances {
			if in.ID == victim.ID {
				return false
			}
			if in.State == "healthy" {
				healthy++
			}
		}
		return healthy == 2
	})
	t.Logf("out %s after the stop, replaced and gone after %s", out.Round(10*time.Millisecond), time.Since(hung).Round(100*time.Millisecond))
}

// TestACrashLoopIsShownAnsweredAndLeft: an app that dies again and again is shown
// with the time of the next start, requests get 503 with Retry-After, and it
// comes back by itself once its trouble is over.
func TestACrashLoopIsShownAnsweredAndLeft(t *testing.T) {
	t.Parallel()
	s := start(t, takotest.Options{})
	// It starts unless its data folder has a file "broken".
	deploy(t, s, "blog", "1", quick(map[string]any{
		"start": []string{"sh", "-c", `[ ! -e "$TAKO_DATA_DIR/broken" ] || { echo "it is broken" >&2; exit 5; }; exec ./app`},
	}))
	toggle(t, s, "blog", true)
	if err := s.KillProcess(about(t, s, "blog.localhost").PID); err != nil {
		t.Fatal(err)
	}
	until(t, 20*time.Second, "crash_loop with the time of the next start", func() bool {
		st := status(t, s, "blog")
		return st.State == "crash_loop" && st.RetryInMS != nil && *st.RetryInMS > 0 && st.LastError != ""
	})
	answer, err := s.Get(t.Context(), takotest.TLS1, "blog.localhost/")
	if err != nil || answer.StatusCode != http.StatusServiceUnavailable || answer.Text != "No healthy backend" {
		t.Errorf("meanwhile it answers %s %q, %v", answer.Status, answer.Text, err)
	}
	if after, err := strconv.Atoi(answer.Header.Get("Retry-After")); err != nil || after < 1 || after > 73 {
		t.Errorf("Retry-After: %q", answer.Header.Get("Retry-After"))
	}
	toggle(t, s, "blog", false)
	until(t, 30*time.Second, "it recovers by itself", func() bool { _, err := tryAbout(s, "blog.localhost"); return err == nil })
	if st := status(t, s, "blog"); st.State != "running" {
		t.Errorf("after the recovery: %+v", st)
	}
}
