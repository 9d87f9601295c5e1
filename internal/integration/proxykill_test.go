package integration

import (
	"fmt"
	"os"
	"testing"
	"time"

	"tako/internal/takotest"
)

// TestAKilledProxyCostsOnlyWhatItHeld kills tako-proxy under load: connections
// wait in the listening sockets, which the master keeps, for the next one.
func TestAKilledProxyCostsOnlyWhatItHeld(t *testing.T) {
	t.Parallel()
	kills := long(10, 3)
	load := tortured()
	load.Once = false // a connection that was kept ends, and that is no loss
	s, l := blogUnder(t, load)
	before := instancePIDs(t, s, "blog")
	var worst time.Duration
	inFlight, proxy := 0, serving(t, s, "tako-proxy", 0)
	// How long answers take without a death is a matter of the machine.
	time.Sleep(time.Duration(long(3000, 100)) * time.Millisecond)
	usual := l.Report().Worst + programStart(t, s)
	for i := range kills {
		inFlight += l.Mark()
		if err := s.Signal(proxy, os.Kill); err != nil {
			t.Fatal(err)
		}
		gone(t, proxy)
		dead := time.Now()
		proxy = serving(t, s, "tako-proxy", proxy)
		until(t, 10*time.Second, "an answer", func() bool { return l.Report().Back > 0 })
		r := l.Report()
		worst = max(worst, r.Back)
		for _, m := range r.Misses {
			if m.Began.After(dead) {
				t.Errorf("kill %d: a request that began %s after the death failed: %v", i+1, m.Began.Sub(dead), m)
			}
		}
		time.Sleep(200 * time.Millisecond) // some load on it
	}
	r := l.Stop()
	row(t, fmt.Sprintf("%d × kill -9 tako-proxy", kills), r.Requests, r.Failures,
		fmt.Sprintf("%d were in flight; the first answer at most %s after a kill; without one at most, and to start a program, %s", inFlight, worst.Round(time.Millisecond), usual.Round(time.Millisecond)))
	if r.Failures > kills*load.Clients {
		t.Errorf("%d requests failed, at most %d were in flight in the killed proxies", r.Failures, kills*load.Clients)
	}
	if soaking() && worst > 100*time.Millisecond+usual {
		t.Errorf("the first answer came %s after a kill; answers and the start of a program take %s without one, and 100 ms are granted", worst, usual)
	}
	if now := instancePIDs(t, s, "blog"); len(now) != 2 || now[0] != before[0] {
		t.Errorf("instances %v, before %v", now, before)
	}
}

// TestAKilledAgentCostsNoRequest: instances and traffic go on without it, and the
// next one adopts them.
func TestAKilledAgentCostsNoRequest(t *testing.T) {
	t.Parallel()
	kills := long(10, 3)
	s, l := blogUnder(t, tortured())
	before := instancePIDs(t, s, "blog")
	var worst time.Duration
	agent := serving(t, s, "tako-agent", 0)
	for range kills {
		began := time.Now()
		if err := s.Signal(agent, os.Kill); err != nil {
			t.Fatal(err)
		}
		agent = serving(t, s, "tako-agent", agent)
		worst = max(worst, time.Since(began))
		time.Sleep(200 * time.Millisecond) // some load
	}
	noFailures(t, fmt.Sprintf("%d × kill -9 tako-agent", kills), l, fmt.Sprintf("the next one was ready at most %s after a kill", worst.Round(time.Millisecond)))
	if now := instancePIDs(t, s, "blog"); len(now) != 2 || now[0] != before[0] || now[1] != before[1] {
		t.Errorf("instances %v, before %v", now, before)
	}
	// It watches what it adopted, and starts others.
	if err := s.KillProcess(before[0]); err != nil {
		t.Fatal(err)
	}
	until(t, 15*time.Second, "a replacement", func() bool {
		now := instancePIDs(t, s, "blog")
		return len(now) == 2 && now[0] != before[0] && now[1] != before[0]
	})
}

// TestAReloadRightAfterAProxyDied finds one that is not configured yet.
func TestAReloadRightAfterAProxyDied(t *testing.T) {
	t.Parallel()
	s := start(t, takotest.Options{})
	deploy(t, s, "blog", "1", quick(nil))
	proxy := serving(t, s, "tako-proxy", 0)
	reloads := long(15, 4)
	for i := range reloads {
		if err := s.Signal(proxy, os.Kill); err != nil {
			t.Fatal(err)
		}
		// At another moment of its successor's birth each time.
		time.Sleep(time.Duration(i) * 4 * time.Millisecond)
		good(t, s, fmt.Sprintf("reload %d, right after a kill", i+1))
		if a := about(t, s, "blog.localhost"); a.PID == 0 {
			t.Errorf("reload %d: no answer", i+1)
		}
		proxy = children(settled(t, s), "tako-proxy", "")[0].PID
	}
	row(t, fmt.Sprintf("%d reloads right after a kill -9 of tako-proxy", reloads), reloads, 0, "each waited for the next proxy to be ready")
}
