package integration

import (
	"encoding/json"
	"io"
	"net/http"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"tako/internal/takotest"
)

// TestAKilledInstanceCostsNoRequestThatMayBeRepeated kills one of two instances
// again and again under clients that ask as fast as they can on connections that
// they keep.
func TestAKilledInstanceCostsNoRequestThatMayBeRepeated(t *testing.T) {
	const clients, kills = 32, 3
	s := launch(t)
	if err := s.Start(); err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(s.Data, "apps", "blog", "releases", "1")
	if err := takotest.WriteApp(dir, map[string]any{"https_redirect": false}); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Ask("deploy", map[string]any{
		"app": "blog", "version": "1", "path": dir, "routes": []string{"blog.localhost"}, "instances": 2, "idle_timeout": 300,
	}); err != nil {
		t.Fatal(err)
	}

	var mu sync.Mutex
	requests, failures, pids := 0, []string(nil), make(map[int]time.Time)
	client := s.Client(takotest.HTTP1)
	defer client.CloseIdleConnections()
	ask := func() {
		var about struct {
			PID int `json:"pid"`
		}
		failure := ""
		began := time.Now()
		resp, err := client.Get(s.URL(takotest.HTTP1, "blog.localhost/"))
		if err == nil {
			var b []byte
			b, err = io.ReadAll(resp.Body)
			_ = resp.Body.Close()
			if resp.StatusCode != http.StatusOK || json.Unmarshal(b, &about) != nil {
				failure = resp.Status + " " + string(b)
			}
		}
		if err != nil {
			failure = err.Error()
		}
		mu.Lock()
		defer mu.Unlock()
		if requests++; failure != "" {
			failures = append(failures, began.Format("05.000 ")+failure)
		} else {
			pids[about.PID] = time.Now()
		}
	}
	stop := make(chan struct{})
	var asking sync.WaitGroup
	finish := sync.OnceFunc(func() {
		close(stop)
		asking.Wait()
	})
	defer finish()
	for range clients {
		asking.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
					ask()
				}
			}
		})
	}
	// two waits until two instances answer, and returns one of them.
	two := func() int {
		for deadline := time.Now().Add(takotest.StartWait); ; {
			mu.Lock()
			var now []int
			for pid, at := range pids {
				if time.Since(at) < 100*time.Millisecond {
					now = append(now, pid)
				}
			}
			mu.Unlock()
			if len(now) == 2 {
				return now[0]
			}
			if time.Now().After(deadline) {
				t.Fatalf("%d instances answer", len(now))
			}
			time.Sleep(time.Millisecond)
		}
	}
	for range kills {
		if err := s.KillProcess(two()); err != nil {
			t.Fatal(err)
		}
		time.Sleep(200 * time.Millisecond) // until nothing of it counts as now
	}
	two()
	finish()
	t.Logf("%d requests, %d kills, %d failures", requests, kills, len(failures))
	for _, f := range failures[:min(len(failures), 10)] {
		t.Error(f)
	}
}
