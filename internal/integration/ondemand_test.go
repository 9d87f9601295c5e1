package integration

import (
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"tako/internal/takotest"
)

// onDemand deploys the test app without a standing instance; it sleeps after a
// second without a request.
func onDemand(t *testing.T, s *takotest.Server, app string, manifest map[string]any, flags ...string) {
	t.Helper()
	lay(t, s, app, "1", quick(manifest), flags...)
	data, err := ask(s, app, "1", map[string]any{"instances": 0, "idle_timeout": 1})
	if err != nil {
		t.Fatalf("deploy %s: %v", app, err)
	}
	if want := fmt.Sprintf(`{"status":"deployed","app":%q,"version":"1","new_app":true,"on_demand":true,"startup_validated":true,"warm_instance":true}`, app); string(data) != want {
		t.Errorf("the reply to a deploy on demand:\n got %s\nwant %s", data, want)
	}
}

// asleep waits until an app has no process.
func asleep(t *testing.T, s *takotest.Server, app string) {
	t.Helper()
	until(t, 20*time.Second, app+" sleeps", func() bool {
		st := status(t, s, app)
		return st.State == "idle" && len(st.Instances) == 0
	})
}

// TestABurstOnASleepingAppStartsOneInstance sends many requests at once to an app
// that sleeps: one process starts, and every request within the queue's limit is
// answered by it.
func TestABurstOnASleepingAppStartsOneInstance(t *testing.T) {
	t.Parallel()
	burst := 200
	if soaking() {
		burst = 1000
	}
	s := start(t, takotest.Options{})
	onDemand(t, s, "blog", map[string]any{"queue": map[string]any{"waiters": burst, "wait": 30}}, "-slow", "300ms")
	asleep(t, s, "blog")

	client := s.Client(takotest.HTTP1)
	client.Transport.(*http.Transport).DisableKeepAlives = true
	var answers sync.Map
	var all sync.WaitGroup
	began := time.Now()
	for i := range burst {
		all.Go(func() {
			req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, s.URL(takotest.HTTP1, "blog.localhost/"), nil)
			if err != nil {
				answers.Store(i, err.Error())
				return
			}
			answer, err := takotest.Do(client, req)
			switch {
			case err != nil:
				answers.Store(i, err.Error())
			case answer.StatusCode != http.StatusOK:
				answers.Store(i, fmt.Sprintf("%s %.50s", answer.Status, answer.Text))
			}
		})
	}
	all.Wait()
	failed := 0
	answers.Range(func(_, what any) bool {
		if failed++; failed <= 5 {
			t.Errorf("a request of the burst: %v", what)
		}
		return true
	})
	started := logged(s, "starting instance: app=blog") - 1 // without the deploy's
	t.Logf("%d requests at once: %d failed, %d instance started, all answered in %s", burst, failed, started, time.Since(began).Round(time.Millisecond))
	if failed > 0 || started != 1 {
		t.Errorf("%d failed, %d instances were started; want 0 and 1", failed, started)
	}
}

// TestTheQueueOfASleepingAppIsBounded: one more waiter than it holds gets 503 at
// once, the others wait.
func TestTheQueueOfASleepingAppIsBounded(t *testing.T) {
	t.Parallel()
	s := start(t, takotest.Options{})
	onDemand(t, s, "blog", map[string]any{"queue": map[string]any{"waiters": 2, "wait": 60}}, "-slow", "2s")
	asleep(t, s, "blog")
	codes := make(chan int, 3)
	for range 3 {
		go func() {
			answer, err := s.Get(t.Context(), takotest.HTTP1, "blog.localhost/")
			if err != nil {
				t.Error(err)
				codes <- 0
				return
			}
			if answer.StatusCode == http.StatusServiceUnavailable && (answer.Text != "App startup queue is full" || answer.Header.Get("Retry-After") != "1") {
				t.Errorf("the refusal: %q, Retry-After %q", answer.Text, answer.Header.Get("Retry-After"))
			}
			codes <- answer.StatusCode
		}()
	}
	got := []int{<-codes, <-codes, <-codes}
	slices.Sort(got)
	if !slices.Equal(got, []int{200, 200, 503}) {
		t.Errorf("three requests to a queue of two: %v", got)
	}
}

// TestWaitingForASleepingAppHasATimeLimit: 504 with the text of old.
func TestWaitingForASleepingAppHasATimeLimit(t *testing.T) {
	t.Parallel()
	s := start(t, takotest.Options{})
	onDemand(t, s, "blog", map[string]any{"queue": map[string]any{"waiters": 9, "wait": 1}}, "-slow", "2500ms")
	asleep(t, s, "blog")
	answer, err := s.Get(t.Context(), takotest.HTTP1, "blog.localhost/")
	if err != nil || answer.StatusCode != http.StatusGatewayTimeout || answer.Text != "App startup timed out" {
		t.Errorf("got %v %q, %v", answer.Response, answer.Text, err)
	}
}

// TestALongRequestIsNotCutByIdling: the idle time runs from the end of the last
// request, however long that takes.
func TestALongRequestIsNotCutByIdling(t *testing.T) {
	t.Parallel()
	s := start(t, takotest.Options{})
	onDemand(t, s, "blog", nil)
	answer, err := s.Get(t.Context(), takotest.HTTP1, "blog.localhost/slow?ms=4000")
	if err != nil || answer.Text != "done\n" {
		t.Errorf("a request of 4 s with an idle time of 1 s: %v %q, %v", answer.Response, answer.Text, err)
	}
	// Neither is a stream, which sends now and then.
	answer, err = s.Get(t.Context(), takotest.HTTP1, "blog.localhost/stream?n=3&ms=1500")
	if err != nil || answer.Text != "data: 0\n\ndata: 1\n\ndata: 2\n\n" {
		t.Errorf("a stream of 3 s: %v %q, %v", answer.Response, answer.Text, err)
	}
	if n := logged(s, "starting instance: app=blog"); n != 1 {
		t.Errorf("%d instances were started, want the deploy's alone", n)
	}
	asleep(t, s, "blog")
}

// TestAFailedStartIsToldToAllWaitersAtOnceAndRemembered: nobody waits for a time
// limit, and no further process is tried before its time.
func TestAFailedStartIsToldToAllWaitersAtOnceAndRemembered(t *testing.T) {
	t.Parallel()
	s := start(t, takotest.Options{})
	onDemand(t, s, "blog", map[string]any{
		"start": []string{"sh", "-c", `[ ! -e "$TAKO_DATA_DIR/broken" ] || { sleep 0.3; echo "it is broken" >&2; exit 5; }; exec ./app`},
	})
	asleep(t, s, "blog")
	toggle(t, s, "blog", true)
	began := time.Now()
	var all sync.WaitGroup
	for range 20 {
		all.Go(func() {
			answer, err := s.Get(t.Context(), takotest.HTTP1, "blog.localhost/")
			if err != nil || answer.StatusCode != http.StatusBadGateway || answer.Text != "App failed to start" {
				t.Errorf("a waiter got %v %q, %v", answer.Response, answer.Text, err)
			}
		})
	}
	all.Wait()
	if took := time.Since(began); took > inTime(5*time.Second) {
		t.Errorf("the waiters were told after %s", took)
	}
	started := logged(s, "starting instance: app=blog")
	answer, err := s.Get(t.Context(), takotest.HTTP1, "blog.localhost/")
	if err != nil || answer.StatusCode != http.StatusBadGateway || answer.Took > inTime(time.Second) {
		t.Errorf("during the back-off: %v after %s, %v", answer.Response, answer.Took, err)
	}
	if n := logged(s, "starting instance: app=blog"); n > started+1 {
		t.Errorf("%d more instances were started", n-started)
	}
	toggle(t, s, "blog", false)
	until(t, 20*time.Second, "it starts again", func() bool { _, err := tryAbout(s, "blog.localhost"); return err == nil })
}

// TestStopDuringAColdStartStops: the waiters are told, and nothing is left.
func TestStopDuringAColdStartStops(t *testing.T) {
	t.Parallel()
	s := start(t, takotest.Options{})
	onDemand(t, s, "blog", nil, "-slow", "2s")
	asleep(t, s, "blog")
	answered := make(chan takotest.Answer, 1)
	go func() {
		answer, err := s.Get(t.Context(), takotest.HTTP1, "blog.localhost/")
		if err != nil {
			t.Error(err)
		}
		answered <- answer
	}()
	until(t, 5*time.Second, "the cold start begins", func() bool { return len(status(t, s, "blog").Instances) == 1 })
	began := time.Now()
	if _, err := s.Ask("stop", map[string]any{"app": "blog"}); err != nil {
		t.Fatal(err)
	}
	if took := time.Since(began); took > inTime(5*time.Second) {
		t.Errorf("stop took %s", took)
	}
	if answer := <-answered; answer.Response == nil || answer.StatusCode != http.StatusServiceUnavailable {
		t.Errorf("the waiter got %v %q, want 503", answer.Response, answer.Text)
	}
	if st := status(t, s, "blog"); st.State != "stopped" || len(st.Instances) != 0 {
		t.Errorf("after the stop: %+v", st)
	}
}

// TestColdStartAddsLittle measures what the server adds to an app's own way to
// listening: from the start of a request on a connection that is there to its
// answer's end, less the time from the app's main to its listening.
func TestColdStartAddsLittle(t *testing.T) {
	t.Parallel()
	times, limit := 3, inTime(10*time.Millisecond)
	if soaking() {
		times = 20
	}
	s := start(t, takotest.Options{})
	onDemand(t, s, "blog", nil, "-slow", "50ms")
	client := s.Client(takotest.HTTP1)
	defer client.CloseIdleConnections()
	var added []time.Duration
	for range times {
		asleep(t, s, "blog")
		var a aboutApp
		answer, err := getWith(t.Context(), client, s.URL(takotest.HTTP1, "blog.localhost/"))
		if err == nil {
			err = json.Unmarshal([]byte(answer.Text), &a)
		}
		if err != nil {
			t.Fatal(err)
		}
		added = append(added, answer.Took-time.Duration(a.OwnTimeUS)*time.Microsecond)
	}
	slices.Sort(added)
	t.Logf("beyond the app's own time, over %d cold starts: least %s, median %s, most %s", times, added[0], added[times/2], added[times-1])
	if added[times/2] > limit {
		t.Errorf("the median is more than %s", limit)
	}
}

// TestStopIsRememberedOverRestarts, also on demand: a request wakes nothing.
func TestStopIsRememberedOverRestarts(t *testing.T) {
	t.Parallel()
	s := start(t, takotest.Options{})
	onDemand(t, s, "blog", nil)
	if _, err := s.Ask("stop", map[string]any{"app": "blog"}); err != nil {
		t.Fatal(err)
	}
	for _, end := range []func() error{s.Stop, s.Kill} {
		if err := end(); err != nil {
			t.Fatal(err)
		}
		if err := s.Start(); err != nil {
			t.Fatal(err)
		}
		until(t, takotest.StartWait, "good is back", func() bool { _, err := tryAbout(s, "good.localhost"); return err == nil })
		if answer, err := s.Get(t.Context(), takotest.TLS1, "blog.localhost/"); err != nil || answer.StatusCode != http.StatusServiceUnavailable {
			t.Errorf("a stopped app answers %v, %v", answer.Response, err)
		}
		if st := status(t, s, "blog"); st.State != "stopped" || len(st.Instances) != 0 {
			t.Errorf("after a restart: %+v", st)
		}
	}
	if _, err := os.Stat(filepath.Join(s.Data, "apps", "blog", "releases", "1")); err != nil {
		t.Errorf("a stopped app lost its release: %v", err)
	}
}
