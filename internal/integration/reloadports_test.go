package integration

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"tako/internal/takotest"
)

// setFile writes the settings file.
func setFile(t *testing.T, s *takotest.Server, text string) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(s.Data, "server-config.toml"), []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

// TestReloadWithOtherInstancePortsKeepsTheInstances: those go on where they listen,
// and what is started later, by a deploy or in the place of one that died, listens
// where the settings say.
func TestReloadWithOtherInstancePortsKeepsTheInstances(t *testing.T) {
	t.Parallel()
	for what, ports := range map[string]struct {
		text   string
		lo, hi int
	}{
		"overlapping": {"20050-21049", 20050, 21049},
		"disjoint":    {"31000-31999", 31000, 31999},
	} {
		t.Run(what, func(t *testing.T) {
			t.Parallel()
			s := start(t, takotest.Options{})
			deploy(t, s, "blog", "1", quick(nil))
			deploy(t, s, "shop", "1", quick(nil))
			blog, shop := treeOf(t, s, "blog"), treeOf(t, s, "shop")
			l := s.Load(t.Context(), "blog.localhost/", takotest.LoadOptions{Clients: 8, Pause: 10 * time.Millisecond, Once: true})
			defer l.Stop()
			setFile(t, s, "instance-ports = \""+ports.text+"\"\n")
			good(t, s, "reload with other instance ports")
			asked := l.Report().Requests
			until(t, takotest.StartWait, "some requests", func() bool { return l.Report().Requests > asked+50 })
			after := treeOf(t, s, "blog")
			if !slices.Equal(after.instances, blog.instances) || !slices.Equal(instancePIDs(t, s, "shop"), shop.instances) {
				t.Errorf("running %+v, before %+v", after, blog)
			}
			if len(after.agents) != 1 || after.agents[0] == blog.agents[0] {
				t.Errorf("agents %v, before %v", after.agents, blog.agents)
			}
			within := func(app string) bool {
				in := status(t, s, app).Instances
				return len(in) == 1 && in[0].State == "healthy" && in[0].Port >= ports.lo && in[0].Port <= ports.hi
			}
			deploy(t, s, "blog", "2", quick(nil))
			until(t, takotest.StartWait, "the deployed one on one of the new ports", func() bool { return within("blog") })
			_, _ = s.Get(t.Context(), takotest.TLS1, "shop.localhost/crash")
			until(t, takotest.StartWait, "a replacement on one of the new ports", func() bool { return within("shop") })
			noFailures(t, "a reload with other instance ports, "+what, l, "the same instances")
			if pid := agentPID(t, s); pid != after.agents[0] {
				t.Errorf("agent %d, right after the reload it was %d", pid, after.agents[0])
			}
		})
	}
}

// TestAgentThatDiesRightBeforeAReloadIsReplacedFirst: the reload has waited for a
// deploy, which ends as its agent dies. The next image is handed the next agent, and
// knows every child there is.
func TestAgentThatDiesRightBeforeAReloadIsReplacedFirst(t *testing.T) {
	t.Parallel()
	s := prepare(t, takotest.Options{Manager: true})
	real := s.Program("tako-agent") + "-itself"
	if err := os.Link(s.Program("tako-agent"), real); err != nil {
		t.Fatal(err)
	}
	// Slow to greet, so that the moment is met in which nobody knows it yet.
	install(t, s, "tako-agent", impostor(t, fmt.Sprintf("time.Sleep(300*time.Millisecond)\n\t_ = syscall.Exec(%q, os.Args, os.Environ())", real)))
	if err := s.Start(); err != nil {
		t.Fatal(err)
	}
	deploy(t, s, "good", "1", nil)
	deploy(t, s, "blog", "1", quick(nil))
	before := treeOf(t, s, "blog")
	lay(t, s, "blog", "2", quick(map[string]any{"install": "sleep 300"}))
	for range long(12, 3) {
		settled(t, s)
		done := make(chan error, 1)
		go func() {
			_, err := ask(s, "blog", "2", nil)
			done <- err
		}()
		until(t, takotest.StartWait, "the install step", func() bool {
			return slices.ContainsFunc(s.Processes(), func(p takotest.Process) bool { return strings.Contains(p.Command, "sleep 300") })
		})
		agent := agentPID(t, s)
		reloads := logged(s, "reloading")
		if err := s.Signal(s.PID(), syscall.SIGHUP); err != nil {
			t.Fatal(err)
		}
		preflights := func() int {
			all, _ := filepath.Glob(filepath.Join(s.Data, ".preflight-*"))
			return len(all)
		}
		until(t, takotest.StartWait, "the pre-flight", func() bool { return logged(s, "reloading") > reloads && preflights() > 0 })
		until(t, takotest.StartWait, "its end", func() bool { return preflights() == 0 })
		gone := logged(s, "reloaded")
		if err := s.KillProcess(agent); err != nil {
			t.Fatal(err)
		}
		if err := <-done; err == nil {
			t.Error("the deploy came through")
		}
		until(t, 60*time.Second, "the end of the reload", func() bool { return logged(s, "reloaded") > gone })
		text := s.Log()
		text = text[strings.LastIndex(text, "tako-master: reloading"):]
		if ready, next := strings.Index(text, "tako-agent is ready"), strings.Index(text, "going on after a reload"); ready < 0 || ready > next {
			t.Errorf("the next image did not wait for the next agent:\n%s", text)
		}
		settled(t, s)
		until(t, takotest.StartWait, "no child but those", func() bool { return len(s.Processes()) == 1+2+2 }) // master, proxy, agent, good, blog
		kept := 0
		for _, name := range s.Manager().Kept() {
			if strings.HasSuffix(name, "-channel") {
				kept++
			}
		}
		if kept != 2 {
			t.Errorf("kept: %q", s.Manager().Kept())
		}
	}
	if r := known(t, s).Reload; r.Failed > 0 {
		t.Errorf("%+v", r)
	}
	if now := instancePIDs(t, s, "blog"); !slices.Equal(now, before.instances) {
		t.Errorf("instances %v, before %v", now, before.instances)
	}
}

// TestChildrenLeaveASIGHUPToTheMaster: one to the whole group of processes, say.
func TestChildrenLeaveASIGHUPToTheMaster(t *testing.T) {
	t.Parallel()
	s := start(t, takotest.Options{})
	deploy(t, s, "blog", "1", quick(nil))
	before := treeOf(t, s, "blog")
	for _, pid := range append(before.proxies, before.agents...) {
		if err := s.Signal(pid, syscall.SIGHUP); err != nil {
			t.Fatal(err)
		}
	}
	deploy(t, s, "blog", "2", quick(nil)) // each has come to it by then
	if after := treeOf(t, s, "blog"); !slices.Equal(after.proxies, before.proxies) || !slices.Equal(after.agents, before.agents) {
		t.Errorf("running %+v, before %+v", after, before)
	}
	// What the agent starts has it as before: it is not ignored there.
	if err := s.Signal(about(t, s, "blog.localhost").PID, syscall.SIGHUP); err != nil {
		t.Fatal(err)
	}
	until(t, takotest.StartWait, "the end of an instance by it", func() bool { return logged(s, "terminated by signal") > 0 })
}
