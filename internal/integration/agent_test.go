package integration

import (
	"encoding/json"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"tako/internal/takotest"
)

// agentPID is the pid of the agent that serves, 0 while there is none.
func agentPID(t *testing.T, s *takotest.Server) int {
	t.Helper()
	data, err := s.Ask("server_info", nil)
	if err != nil {
		t.Fatal(err)
	}
	var info struct {
		Processes []struct {
			Role string `json:"role"`
			PID  int    `json:"pid"`
		} `json:"processes"`
	}
	if err := json.Unmarshal(data, &info); err != nil {
		t.Fatal(err)
	}
	for _, p := range info.Processes {
		if p.Role == "tako-agent" {
			return p.PID
		}
	}
	return 0
}

// killAgent kills the agent and waits for the next one.
func killAgent(t *testing.T, s *takotest.Server) {
	t.Helper()
	old := 0
	until(t, takotest.StartWait, "an agent", func() bool { old = agentPID(t, s); return old != 0 })
	if err := s.KillProcess(old); err != nil {
		t.Fatal(err)
	}
	until(t, takotest.StartWait, "the next agent", func() bool {
		pid := agentPID(t, s)
		return pid != 0 && pid != old
	})
}

// apps are the server's processes that are no programs of tako.
func apps(s *takotest.Server) (list []takotest.Process) {
	for _, p := range s.Processes() {
		if !strings.Contains(p.Command, "tako-") {
			list = append(list, p)
		}
	}
	return list
}

// TestAgentKilledUnderLoadCostsNothing kills tako-agent again and again: the
// instances run on, are served, watched and logged.
func TestAgentKilledUnderLoadCostsNothing(t *testing.T) {
	s := start(t, takotest.Options{})
	for name, listen := range map[string]string{"unixed": "socket", "tcped": "tcp"} {
		deploy(t, s, name, "1", quick(nil), "-listen", listen)
	}
	names := []string{"unixed", "tcped"}
	before := make(map[string]aboutApp)
	var loads []*takotest.Load
	for _, name := range names {
		before[name] = about(t, s, name+".localhost")
		l := s.Load(t.Context(), name+".localhost/", takotest.LoadOptions{Clients: 8, Pause: 5 * time.Millisecond})
		defer l.Stop()
		loads = append(loads, l)
	}
	for range 10 {
		killAgent(t, s)
		asked := loads[1].Report().Requests
		until(t, takotest.StartWait, "some requests", func() bool { return loads[1].Report().Requests > asked+100 })
	}
	for i, l := range loads {
		r := l.Stop()
		t.Logf("%s: %v", names[i], r)
		if r.Failures > 0 {
			t.Errorf("%s: requests failed", names[i])
		}
	}
	for _, name := range names {
		if after := about(t, s, name+".localhost"); after.PID != before[name].PID {
			t.Errorf("%s: pid %d became %d", name, before[name].PID, after.PID)
		}
		line := "said to the agent after " + name
		if _, err := s.Get(t.Context(), takotest.TLS1, name+".localhost/print?line="+strings.ReplaceAll(line, " ", "+")); err != nil {
			t.Error(err)
		}
		log := filepath.Join(s.Data, "apps", name, "shared", "logs", "current.log")
		until(t, takotest.StartWait, "the line in the log", func() bool {
			b, _ := os.ReadFile(log)
			return strings.Contains(string(b), line)
		})
		_, _ = s.Get(t.Context(), takotest.TLS1, name+".localhost/crash")
		until(t, takotest.StartWait, "a replacement of "+name, func() bool {
			got, err := tryAbout(s, name+".localhost")
			return err == nil && got.PID != before[name].PID
		})
	}
	until(t, takotest.StartWait, "three apps and no more: "+strconv.Itoa(len(apps(s))), func() bool { return len(apps(s)) == 3 })
}

// TestAgentKilledDuringADeployLeavesTheOldOrTheNew kills tako-agent in each step
// of a rolling update.
func TestAgentKilledDuringADeployLeavesTheOldOrTheNew(t *testing.T) {
	s := start(t, takotest.Options{})
	manifest := quick(map[string]any{"timeouts": map[string]any{"stability": 0.5, "ready": 10, "grace": 1, "drain": 3, "streams": 1}})
	deploy(t, s, "blog", "v0", manifest)
	state := func(version, want string) func() bool {
		return func() bool {
			for _, b := range status(t, s, "blog").Builds {
				for _, in := range b.Instances {
					if b.Version == version && in.State == want {
						return true
					}
				}
			}
			return false
		}
	}
	old := "v0"
	deploys := 0
	try := func(what string, flags []string, wait func(old, next string)) {
		t.Helper()
		deploys++
		next := "v" + strconv.Itoa(deploys)
		lay(t, s, "blog", next, manifest, flags...)
		slow := make(chan error, 1)
		go func() {
			_, err := s.Get(t.Context(), takotest.TLS1, "blog.localhost/slow?ms=1500")
			slow <- err
		}()
		done := make(chan error, 1)
		go func() {
			_, err := ask(s, "blog", next, nil)
			done <- err
		}()
		wait(old, next)
		killAgent(t, s)
		err := <-done
		if e := <-slow; e != nil {
			t.Errorf("killed while %s: a request on the old instance: %v", what, e)
		}
		want := next
		if err != nil {
			want = old
		}
		t.Logf("killed while %s: %v", what, err)
		until(t, takotest.StartWait, "one instance of "+want+" after a kill while "+what, func() bool {
			st := status(t, s, "blog")
			return st.Version == want && len(st.Instances) == 1 && st.Instances[0].State == "healthy" && len(apps(s)) == 2
		})
		if got := about(t, s, "blog.localhost"); got.Version != want {
			t.Errorf("killed while %s: %s answers, want %s", what, got.Version, want)
		}
		old = want
	}
	seen := func(of func(old, next string) func() bool) func(old, next string) {
		return func(old, next string) { until(t, takotest.StartWait, "the step", of(old, next)) }
	}
	try("starting", []string{"-slow", "1s"}, seen(func(_, next string) func() bool { return state(next, "starting") }))
	try("proving", nil, seen(func(_, next string) func() bool { return state(next, "ready") }))
	try("draining", nil, seen(func(old, _ string) func() bool { return state(old, "draining") }))
	for range 4 {
		try("something", nil, func(_, _ string) { time.Sleep(rand.N(900 * time.Millisecond)) })
	}
}
