package integration

import (
	"fmt"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"tako/internal/takotest"
)

// moments is a row of moments of a reload, over all of its steps.
func moments() []time.Duration {
	n := 8
	if soaking() {
		n = 60
	}
	var all []time.Duration
	for i := range n {
		all = append(all, time.Duration(i)*(400*time.Millisecond)/time.Duration(n))
	}
	return all
}

// TestServerAskedToStopInAReloadStopsInOrder: at any moment, the exec and the change
// of agents among them. Instances are asked to end, and nothing is left.
func TestServerAskedToStopInAReloadStopsInOrder(t *testing.T) {
	t.Parallel()
	s := prepare(t, takotest.Options{})
	if err := s.Start(); err != nil {
		t.Fatal(err)
	}
	deploy(t, s, "blog", "1", quick(nil))
	for _, moment := range moments() {
		endInReload(t, s, moment, syscall.SIGTERM)
	}
}

// TestMasterKilledInAReloadLeavesNothing: its children see it, and end what they
// have. No instance is without an agent that would.
func TestMasterKilledInAReloadLeavesNothing(t *testing.T) {
	t.Parallel()
	s := prepare(t, takotest.Options{})
	if err := s.Start(); err != nil {
		t.Fatal(err)
	}
	deploy(t, s, "blog", "1", quick(nil))
	for _, moment := range moments() {
		endInReload(t, s, moment, syscall.SIGKILL)
	}
}

// endInReload begins a reload, sends a signal after a moment, and holds the end to
// what it has to be. Then it starts the server again.
func endInReload(t *testing.T, s *takotest.Server, moment time.Duration, sig syscall.Signal) {
	t.Helper()
	master, err := os.FindProcess(s.PID()) // a handle: in an exec it cannot be told that it is ours
	if err != nil {
		t.Fatal(err)
	}
	defer master.Release()
	asked := strings.Count(logOf(t, s, "blog"), "asked to stop")
	if err := master.Signal(syscall.SIGHUP); err != nil {
		t.Fatal(err)
	}
	time.Sleep(moment) // a moment, not a result
	if err := master.Signal(sig); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Exit(); err != nil {
		t.Fatalf("%v after %s: %v", sig, moment, err)
	}
	if err := s.Gone(); err != nil {
		t.Fatalf("%v after %s: %v", sig, moment, err)
	}
	if now := strings.Count(logOf(t, s, "blog"), "asked to stop"); now != asked+1 {
		t.Errorf("%v after %s: the instance was asked to stop %d times", sig, moment, now-asked)
	}
	if err := s.Start(); err != nil {
		t.Fatalf("%v after %s: %v", sig, moment, err)
	}
	until(t, takotest.StartWait, "the app", func() bool { _, err := tryAbout(s, "blog.localhost"); return err == nil })
}

// logOf is what an app has printed.
func logOf(t *testing.T, s *takotest.Server, app string) string {
	t.Helper()
	b, err := os.ReadFile(s.Data + "/apps/" + app + "/shared/logs/current.log")
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func TestServerKeepsItsNameInAReload(t *testing.T) {
	t.Parallel()
	s := start(t, takotest.Options{})
	if r := reload(t, s); r.LastError != "" {
		t.Fatal(r.LastError)
	}
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/comm", s.PID()))
	if err != nil || strings.TrimSpace(string(b)) != "tako-master" {
		t.Errorf("its name is %q, %v", b, err)
	}
}

// TestWhatADeadServerLeftDoesNotRunTwice: an instance whose agent and master were
// killed has nobody. The next server ends it before it starts its own.
func TestWhatADeadServerLeftDoesNotRunTwice(t *testing.T) {
	t.Parallel()
	s := prepare(t, takotest.Options{})
	if err := s.Start(); err != nil {
		t.Fatal(err)
	}
	deploy(t, s, "blog", "1", quick(nil), "-listen", "tcp")
	left := instancePIDs(t, s, "blog")[0]
	// In this order the master has no time to hand it to another agent.
	agent := agentPID(t, s)
	if err := s.Signal(s.PID(), syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	if err := s.KillProcess(agent); err != nil {
		t.Fatal(err)
	}
	if err := s.Die(); err != nil {
		t.Fatal(err)
	}
	if err := s.Start(); err != nil {
		t.Fatal(err)
	}
	until(t, takotest.StartWait, "one instance, another one", func() bool {
		a, err := tryAbout(s, "blog.localhost")
		return err == nil && a.PID != left && len(apps(s)) == 1
	})
}
