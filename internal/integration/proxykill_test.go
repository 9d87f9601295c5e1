package integration

import (
	"os"
	"testing"
	"time"

	"tako/internal/takotest"
)

// TestAKilledProxyCostsOnlyWhatItHeld kills tako-proxy under load: connections
// wait in the listening sockets, which the master keeps, for the next one.
func TestAKilledProxyCostsOnlyWhatItHeld(t *testing.T) {
	t.Parallel()
	kills, clients := 3, 16
	if soaking() {
		kills, clients = 10, 64
	}
	s := start(t, takotest.Options{})
	deploy(t, s, "blog", "1", quick(nil))
	before := instancePIDs(t, s, "blog")
	l := s.Load(t.Context(), "blog.localhost/", takotest.LoadOptions{Clients: clients, Pause: 5 * time.Millisecond})
	defer l.Stop()
	for range kills {
		killed := 0
		until(t, 10*time.Second, "a ready proxy", func() bool {
			info, ok := reloadInfo(s)
			if !ok {
				return false
			}
			for _, p := range info.Processes {
				if p.Role == "tako-proxy" && p.State == "ready" {
					killed = p.PID
				}
			}
			return killed != 0
		})
		if err := s.Signal(killed, os.Kill); err != nil {
			t.Fatal(err)
		}
		until(t, 10*time.Second, "another proxy", func() bool {
			info, ok := reloadInfo(s)
			if !ok {
				return false
			}
			for _, p := range info.Processes {
				if p.Role == "tako-proxy" && p.State == "ready" && p.PID != killed {
					return true
				}
			}
			return false
		})
		time.Sleep(200 * time.Millisecond) // some load on it
	}
	r := l.Stop()
	t.Logf("%d kills of tako-proxy under %d clients: %v", kills, clients, r)
	if r.Failures > kills*clients {
		t.Errorf("%d requests failed, at most %d were in flight in the killed proxies", r.Failures, kills*clients)
	}
	if now := instancePIDs(t, s, "blog"); len(now) != 1 || now[0] != before[0] {
		t.Errorf("instances %v, before %v", now, before)
	}
}
