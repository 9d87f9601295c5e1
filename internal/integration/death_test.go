package integration

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"tako/internal/ipc"
	"tako/internal/management"
	"tako/internal/takotest"
	"tako/internal/wire"
)

// tree is who runs in a server: the pids of each of tako's roles and of an app.
type tree struct {
	proxies, agents, instances []int
}

func treeOf(t *testing.T, s *takotest.Server, app string) tree {
	t.Helper()
	info, ok := reloadInfo(s)
	if !ok {
		t.Fatal("the server does not answer")
	}
	return tree{pidsOf(info, "tako-proxy"), pidsOf(info, "tako-agent"), instancePIDs(t, s, app)}
}

func pidsOf(info management.ServerInfo, role string) (pids []int) {
	for _, p := range info.Processes {
		if p.Role == role {
			pids = append(pids, p.PID)
		}
	}
	return pids
}

// descriptors counts what a process has open.
func descriptors(t *testing.T, pid int) int {
	t.Helper()
	list, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
	if err != nil {
		t.Fatal(err)
	}
	return len(list)
}

// dieAndComeBack kills tako-master and starts the next one, which gets what was
// kept.
func dieAndComeBack(t *testing.T, s *takotest.Server) {
	t.Helper()
	if err := s.Die(); err != nil {
		t.Fatal(err)
	}
	if err := s.Start(); err != nil {
		t.Fatal(err)
	}
}

// TestKillingTheMasterWithAStoreFailsNothing kills tako-master under a steady load,
// of new connections and kept ones, with TLS and without. The next one goes on with
// the same proxy, agent and instances; one of these prints all the time.
func TestKillingTheMasterWithAStoreFailsNothing(t *testing.T) {
	t.Parallel()
	deaths, load := 3, takotest.LoadOptions{Clients: 16, Pause: 5 * time.Millisecond, Once: true}
	if soaking() {
		deaths, load = 10, takotest.LoadOptions{Clients: 64, Pause: 10 * time.Millisecond, Once: true}
	}
	s := start(t, takotest.Options{Manager: true})
	lay(t, s, "blog", "1", quick(nil), "-chatter", "1ms")
	if _, err := ask(s, "blog", "1", map[string]any{"instances": 2}); err != nil {
		t.Fatal(err)
	}
	before := treeOf(t, s, "blog")
	l := s.Load(t.Context(), "blog.localhost/", load)
	defer l.Stop()
	open, some := 0, long(2000, 100)
	for i := range deaths {
		dieAndComeBack(t, s)
		asked := l.Report().Requests
		until(t, takotest.StartWait, "some requests", func() bool { return l.Report().Requests > asked+some })
		if i == 0 {
			open = descriptors(t, s.PID())
		}
	}
	r := l.Stop()
	row(t, fmt.Sprintf("%d × kill -9 tako-master, descriptors kept by a service manager", deaths), r.Requests, r.Failures,
		fmt.Sprintf("the same proxy, agent and instances; an answer took at most %s", r.Worst.Round(time.Millisecond)))
	if r.Failures > 0 {
		t.Errorf("%d deaths of tako-master: %v", deaths, r)
	}
	if after := treeOf(t, s, "blog"); fmt.Sprint(after) != fmt.Sprint(before) {
		t.Errorf("running %+v, before %+v", after, before)
	}
	if n := len(s.Processes()); n != 1+2+2+1 { // master, proxy, agent, blog, blog, good
		t.Errorf("%d processes: %v", n, s.Processes())
	}
	until(t, takotest.StartWait, "as many descriptors as after the first death", func() bool { return descriptors(t, s.PID()) <= open })
	chatters(t, s, "blog")
	// The next deploy, crash and stop find a server like any other.
	lay(t, s, "blog", "2", quick(nil))
	if _, err := ask(s, "blog", "2", nil); err != nil {
		t.Errorf("deploy after the deaths: %v", err)
	}
	_, _ = s.Get(t.Context(), takotest.TLS1, "blog.localhost/crash")
	until(t, takotest.StartWait, "a replacement", func() bool {
		got, err := tryAbout(s, "blog.localhost")
		return err == nil && got.Version == "2" && got.PID != 0
	})
	if err := s.Stop(); err != nil {
		t.Error(err)
	}
	if kept := s.Manager().Kept(); len(kept) > 0 {
		t.Errorf("kept after the stop: %q", kept)
	}
	if err := s.Start(); err != nil { // for what looks at the end
		t.Fatal(err)
	}
}

// chatters waits for new lines in an app's log.
func chatters(t *testing.T, s *takotest.Server, app string) {
	t.Helper()
	log := filepath.Join(s.Data, "apps", app, "shared", "logs", "current.log")
	mark := fmt.Sprintf("mark %d", time.Now().UnixNano())
	if _, err := s.Get(t.Context(), takotest.TLS1, app+".localhost/print?line="+strings.ReplaceAll(mark, " ", "+")); err != nil {
		t.Fatal(err)
	}
	until(t, takotest.StartWait, "what "+app+" prints in its log", func() bool {
		b, _ := os.ReadFile(log)
		return strings.Contains(string(b), mark)
	})
}

// TestMasterThatDiesWithItsAgentLeavesTheInstances: those are in what was kept, and
// nobody else knows of them.
func TestMasterThatDiesWithItsAgentLeavesTheInstances(t *testing.T) {
	t.Parallel()
	s := start(t, takotest.Options{Manager: true})
	deploy(t, s, "blog", "1", quick(nil), "-chatter", "1ms")
	deploy(t, s, "shop", "1", quick(nil), "-listen", "tcp")
	blog, shop := treeOf(t, s, "blog"), treeOf(t, s, "shop")
	for range 2 {
		agent := agentPID(t, s)
		if err := s.Die(); err != nil {
			t.Fatal(err)
		}
		if err := s.KillProcess(agent); err != nil {
			t.Fatal(err)
		}
		if err := s.Start(); err != nil {
			t.Fatal(err)
		}
		until(t, takotest.StartWait, "another agent", func() bool { pid := agentPID(t, s); return pid != 0 && pid != agent })
		for name, before := range map[string]tree{"blog": blog, "shop": shop} {
			if after := treeOf(t, s, name); !slices.Equal(after.instances, before.instances) || !slices.Equal(after.proxies, before.proxies) {
				t.Errorf("%s: running %+v, before %+v", name, after, before)
			}
			if a := about(t, s, name+".localhost"); a.PID != before.instances[0] {
				t.Errorf("%s: pid %d answers, want %d", name, a.PID, before.instances[0])
			}
			chatters(t, s, name)
		}
	}
}

// TestMasterKilledAgainAndAgainComesBack: the second death comes in the middle of
// going on after the first.
func TestMasterKilledAgainAndAgainComesBack(t *testing.T) {
	t.Parallel()
	s := start(t, takotest.Options{Manager: true})
	deploy(t, s, "blog", "1", quick(nil))
	before := treeOf(t, s, "blog")
	l := s.Load(t.Context(), "blog.localhost/", takotest.LoadOptions{Clients: 8, Pause: 10 * time.Millisecond})
	defer l.Stop()
	for i := range 12 {
		if err := s.Die(); err != nil {
			t.Fatal(err)
		}
		if err := s.Launch(); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Duration(i*8) * time.Millisecond) // a moment, not a result
	}
	dieAndComeBack(t, s)
	if r := l.Stop(); r.Failures > 0 {
		t.Errorf("%d of %d requests failed: %v", r.Failures, r.Requests, r)
	}
	if after := treeOf(t, s, "blog"); fmt.Sprint(after) != fmt.Sprint(before) {
		t.Errorf("running %+v, before %+v", after, before)
	}
}

// TestMasterKilledUnderADeployLeavesTheOldOrTheNewServing: nothing of the other is
// left, and no request fails.
func TestMasterKilledUnderADeployLeavesTheOldOrTheNewServing(t *testing.T) {
	t.Parallel()
	s := start(t, takotest.Options{Manager: true})
	deploy(t, s, "blog", "v0", quick(nil))
	l := s.Load(t.Context(), "blog.localhost/", takotest.LoadOptions{Clients: 8, Pause: 10 * time.Millisecond})
	defer l.Stop()
	moments := []time.Duration{5, 60, 150, 250, 350, 450}
	if soaking() {
		for ms := range 40 {
			moments = append(moments, time.Duration(20*ms))
		}
	}
	old, news := "v0", 0
	for i, ms := range moments {
		next := fmt.Sprintf("v%d", i+1)
		lay(t, s, "blog", next, quick(nil))
		done := make(chan error, 1)
		go func() {
			_, err := ask(s, "blog", next, nil)
			done <- err
		}()
		time.Sleep(ms * time.Millisecond) // a moment, not a result
		dieAndComeBack(t, s)
		if err := <-done; err == nil || status(t, s, "blog").Version == next {
			old = next
			news++
		}
		until(t, takotest.StartWait, "one instance of "+old+" and no more", func() bool {
			st := status(t, s, "blog")
			return st.Version == old && len(st.Builds) == 1 && len(st.Instances) == 1 && st.Instances[0].State == "healthy" && len(apps(s)) == 2
		})
		if a := about(t, s, "blog.localhost"); a.Version != old {
			t.Errorf("killed after %d ms of a deploy: %s answers, want %s", ms, a.Version, old)
		}
	}
	r := l.Stop()
	t.Logf("%d deploys, %d of them came through: %v", len(moments), news, r)
	if r.Failures > 0 {
		t.Errorf("%d of %d requests failed", r.Failures, r.Requests)
	}
}

// TestEmptiedStoreEndsWhatAMasterLeft: its unit has stopped, and nobody comes.
func TestEmptiedStoreEndsWhatAMasterLeft(t *testing.T) {
	t.Parallel()
	s := prepare(t, takotest.Options{Manager: true})
	if err := s.Start(); err != nil {
		t.Fatal(err)
	}
	deploy(t, s, "blog", "1", quick(nil))
	if err := s.Die(); err != nil {
		t.Fatal(err)
	}
	if a, err := s.Get(t.Context(), takotest.HTTP1, "blog.localhost/"); err != nil || a.StatusCode != http.StatusOK {
		t.Errorf("after the death: %v, %v", a, err)
	}
	s.Manager().Empty()
	if err := s.Gone(); err != nil {
		t.Error(err)
	}
}

// TestChildrenOfAnotherVersionAreReplacedInOrder: of another build, and of another
// protocol, which cannot be spoken with.
func TestChildrenOfAnotherVersionAreReplacedInOrder(t *testing.T) {
	t.Parallel()
	for what, change := range map[string]func(about map[string]any){
		"version":  func(about map[string]any) { about["version"] = "0.0.1" },
		"protocol": func(about map[string]any) { about["protocol"] = 999 },
	} {
		t.Run(what, func(t *testing.T) {
			t.Parallel()
			load := takotest.LoadOptions{Clients: 8, Pause: 10 * time.Millisecond, Once: true}
			if what == "protocol" { // nobody signs for that proxy any more
				load.Ways = []takotest.Way{{Protocol: takotest.HTTP1}, {Protocol: takotest.HTTP1, Kept: true}, {Protocol: takotest.TLS1, Kept: true}, {Protocol: takotest.TLS1, Resume: true}}
			}
			s := start(t, takotest.Options{Manager: true})
			deploy(t, s, "blog", "1", quick(nil))
			before := treeOf(t, s, "blog")
			l := s.Load(t.Context(), "blog.localhost/", load)
			defer l.Stop()
			until(t, takotest.StartWait, "some requests", func() bool { return l.Report().Requests > 50 })
			if err := s.Die(); err != nil {
				t.Fatal(err)
			}
			for _, name := range []string{"tako-proxy-1-about", "tako-agent-1-about"} {
				if err := s.Manager().Change(name, func(fd int) (int, error) { return rewritten(fd, change) }); err != nil {
					t.Fatal(err)
				}
			}
			if err := s.Start(); err != nil {
				t.Fatal(err)
			}
			until(t, takotest.StartWait, "another proxy and agent, and no other", func() bool {
				after := treeOf(t, s, "blog")
				return len(after.proxies) == 1 && after.proxies[0] != before.proxies[0] && len(after.agents) == 1 && after.agents[0] != before.agents[0]
			})
			if r := l.Stop(); r.Failures > 0 {
				t.Errorf("%d of %d requests failed: %v", r.Failures, r.Requests, r)
			}
			if after := treeOf(t, s, "blog"); !slices.Equal(after.instances, before.instances) {
				t.Errorf("instances %v, before %v", after.instances, before.instances)
			}
			chatters(t, s, "blog")
			until(t, takotest.StartWait, "nobody of before", func() bool { return len(s.Processes()) == 5 })
		})
	}
}

// TestSettingsThatChangedWithAMasterReachTheAgent: it is replaced then, and its
// instances go on.
func TestSettingsThatChangedWithAMasterReachTheAgent(t *testing.T) {
	t.Parallel()
	s := start(t, takotest.Options{Manager: true})
	deploy(t, s, "blog", "1", quick(nil))
	before := treeOf(t, s, "blog")
	l := s.Load(t.Context(), "blog.localhost/", takotest.LoadOptions{Clients: 8, Pause: 10 * time.Millisecond})
	defer l.Stop()
	if err := s.Die(); err != nil {
		t.Fatal(err)
	}
	setFile(t, s, "instance-ports = \"31000-31999\"\n")
	if err := s.Start(); err != nil {
		t.Fatal(err)
	}
	until(t, takotest.StartWait, "another agent", func() bool { pid := agentPID(t, s); return pid != 0 && pid != before.agents[0] })
	if after := treeOf(t, s, "blog"); !slices.Equal(after.instances, before.instances) || !slices.Equal(after.proxies, before.proxies) {
		t.Errorf("running %+v, before %+v", after, before)
	}
	deploy(t, s, "blog", "2", quick(nil))
	noFailures(t, "kill -9 tako-master, and a start with other settings", l, "")
	after := agentPID(t, s)
	dieAndComeBack(t, s)
	if pid := agentPID(t, s); pid != after {
		t.Errorf("agent %d with the same settings, before the death %d", pid, after)
	}
}

// rewritten is a sealed memfd like fd with other JSON.
func rewritten(fd int, change func(map[string]any)) (int, error) {
	f := os.NewFile(uintptr(fd), "about")
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return -1, err
	}
	b := make([]byte, st.Size())
	if _, err := f.ReadAt(b, 0); err != nil {
		return -1, err
	}
	about := make(map[string]any)
	if err := json.Unmarshal(b, &about); err != nil {
		return -1, err
	}
	change(about)
	if b, err = json.Marshal(about); err != nil {
		return -1, err
	}
	return takotest.Sealed(b)
}

// TestWhatIsKeptIsNotBelieved: descriptors of other things under the names of ours.
func TestWhatIsKeptIsNotBelieved(t *testing.T) {
	t.Parallel()
	s := prepare(t, takotest.Options{Manager: true})
	if err := s.Start(); err != nil {
		t.Fatal(err)
	}
	deploy(t, s, "blog", "1", quick(nil))
	for _, of := range []string{
		"tako-lock", "tako-management", "tako-port-http*", "tako-state-*",
		"tako-agent-*-about", "tako-agent-*-pidfd", "tako-agent-*-output", "tako-agent-*-channel",
		"tako-proxy-*-about", "tako-proxy-*-pidfd", "tako-proxy-*-output", "tako-proxy-*-channel",
		"tako-instance-*-about", "tako-instance-*-pidfd", "tako-instance-*-stdout", "tako-instance-*-stderr",
	} {
		began := time.Now()
		if err := s.Die(); err != nil {
			t.Fatal(err)
		}
		kept := s.Manager().Kept()
		i := slices.IndexFunc(kept, func(name string) bool { ok, _ := path.Match(of, name); return ok })
		if i < 0 {
			t.Fatalf("nothing like %s in %q", of, kept)
		}
		if err := s.Manager().Change(kept[i], func(fd int) (int, error) {
			_ = os.NewFile(uintptr(fd), of).Close()
			null, err := os.Open(os.DevNull)
			if err != nil {
				return -1, err
			}
			defer null.Close()
			return takotest.Dup(int(null.Fd()))
		}); err != nil {
			t.Fatal(err)
		}
		if err := s.Start(); err != nil {
			t.Fatalf("with /dev/null for %s: %v", of, err)
		}
		until(t, takotest.StartWait, "the app, after /dev/null for "+of, func() bool {
			a, err := tryAbout(s, "blog.localhost")
			return err == nil && a.Version == "1" && len(apps(s)) == 1
		})
		t.Logf("%s: %s", of, time.Since(began).Round(time.Millisecond))
	}
}

// TestMasterKilledInAReloadWithAStoreFailsNothing: two proxies may be there then,
// and two agents of which one holds what the other has.
func TestMasterKilledInAReloadWithAStoreFailsNothing(t *testing.T) {
	t.Parallel()
	s := start(t, takotest.Options{Manager: true})
	deploy(t, s, "blog", "1", quick(nil), "-chatter", "1ms")
	before := instancePIDs(t, s, "blog")
	l := s.Load(t.Context(), "blog.localhost/", takotest.LoadOptions{Clients: 8, Pause: 10 * time.Millisecond, Once: true})
	defer l.Stop()
	for _, moment := range moments() {
		until(t, 90*time.Second, "one proxy and one agent", func() bool {
			info, ok := reloadInfo(s)
			return ok && len(children(info, "tako-proxy", "ready")) == 1 && len(children(info, "tako-agent", "ready")) == 1
		})
		if err := s.Signal(s.PID(), syscall.SIGHUP); err != nil {
			t.Fatal(err)
		}
		time.Sleep(moment) // a moment, not a result
		dieAndComeBack(t, s)
		if now := instancePIDs(t, s, "blog"); !slices.Equal(now, before) {
			t.Fatalf("killed after %s: instances %v, before %v", moment, now, before)
		}
	}
	noFailures(t, fmt.Sprintf("kill -9 tako-master in %d reloads, its descriptors kept", len(moments())), l, "the same instances")
	settled(t, s)
	if n := len(s.Processes()); n != 5 {
		t.Errorf("%d processes: %v", n, s.Processes())
	}
	chatters(t, s, "blog")
}

// TestInstanceThatADeadMasterWasJustStartingIsStopped: it asked for one that is of
// no committed rollout, and the agent had not come to it when the next one came.
func TestInstanceThatADeadMasterWasJustStartingIsStopped(t *testing.T) {
	t.Parallel()
	s := start(t, takotest.Options{Manager: true})
	deploy(t, s, "blog", "1", quick(nil))
	before := treeOf(t, s, "blog")
	if err := s.Die(); err != nil {
		t.Fatal(err)
	}
	if err := s.Signal(before.agents[0], syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	var about struct {
		Start wire.Start `json:"start"`
	}
	if err := s.Manager().Change("tako-instance-blog.1-about", func(fd int) (int, error) {
		var st unix.Stat_t
		if err := unix.Fstat(fd, &st); err != nil {
			return fd, err
		}
		b := make([]byte, st.Size)
		if _, err := unix.Pread(fd, b, 0); err != nil {
			return fd, err
		}
		return fd, json.Unmarshal(b, &about)
	}); err != nil {
		t.Fatal(err)
	}
	next := about.Start
	next.Instance.N, next.Rollout = 2, 1
	for i, v := range next.Command.Env {
		switch name, _, _ := strings.Cut(v, "="); name {
		case "TAKO_INSTANCE":
			next.Command.Env[i] = "TAKO_INSTANCE=2"
		case "TAKO_APP_SOCKET":
			next.Socket = filepath.Join(filepath.Dir(next.Socket), "2.sock")
			next.Command.Env[i] = "TAKO_APP_SOCKET=" + next.Socket
		}
	}
	if err := s.Manager().Change("tako-agent-1-channel", func(fd int) (int, error) {
		dup, err := takotest.Dup(fd)
		if err != nil {
			return fd, err
		}
		ch, err := ipc.Open(ipc.FD(dup))
		if err != nil {
			return fd, err
		}
		dead, err := wire.ResumeConn(ch, wire.LinkAgent, wire.Master, wire.Position{Out: wire.Serving, In: wire.Serving})
		if err != nil {
			return fd, err
		}
		return fd, errors.Join(dead.Send(0, &next), dead.Close())
	}); err != nil {
		t.Fatal(err)
	}
	if err := s.Launch(); err != nil {
		t.Fatal(err)
	}
	time.Sleep(700 * time.Millisecond) // until it asks the agent what that knows, most likely
	if err := s.Signal(before.agents[0], syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
	until(t, takotest.StartWait, "the end of the instance that nobody wants", func() bool { return logged(s, "app=blog instance=2 how=") > 0 })
	until(t, takotest.StartWait, "the instance of before and no other", func() bool {
		st := status(t, s, "blog")
		return len(st.Instances) == 1 && st.Instances[0].PID == before.instances[0] && len(apps(s)) == 2
	})
	if now := agentPID(t, s); now != before.agents[0] {
		t.Errorf("agent %d, before %d", now, before.agents[0])
	}
}
