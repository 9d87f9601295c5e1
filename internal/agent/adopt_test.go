package agent

import (
	"errors"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"tako/internal/ipc"
	"tako/internal/supervise"
	"tako/internal/wire"
)

// newMortalRig is a rig whose agent is a process of its own, which kill kills.
func newMortalRig(tb testing.TB) (r *rig, kill func()) {
	tb.Helper()
	r, theirs := prepare(tb)
	channel := theirs.File("channel")
	p, err := os.StartProcess(r.prog, []string{"tako-agent", "test-agent"}, &os.ProcAttr{
		Dir: "/", Env: []string{}, Files: []*os.File{nil, os.Stderr, os.Stderr, channel},
	})
	must(tb, err)
	must(tb, channel.Close())
	gone := make(chan struct{})
	go func() {
		_, err := p.Wait()
		r.ended <- err
		close(gone)
	}()
	r.greet(unprivileged)
	return r, func() {
		must(tb, p.Kill())
		<-gone
	}
}

func TestInstanceOfAnAgentThatDiedIsAdopted(t *testing.T) {
	must(t, supervise.Subreaper()) // as tako-master is
	for _, kind := range []wire.Transport{wire.TransportUnix, wire.TransportTCP} {
		t.Run(string(kind), func(t *testing.T) {
			first, kill := newMortalRig(t)
			m := first.app(1, string(kind))
			must(t, first.conn.Send(0, m))
			started, files := wantFiles[*wire.Started](first)
			defer func() {
				for _, f := range files {
					f.Close()
				}
			}()
			for p := want[*wire.Probed](first); !p.Good; p = want[*wire.Probed](first) {
			}
			kill()

			r := newRig(t, unprivileged)
			must(t, r.conn.Send(0, &wire.Adopt{Start: *m, PID: started.PID, Via: kind, AfterMS: 1000}, files...))
			if p := want[*wire.Probed](r); !p.Good || p.Via != kind || p.Streak != 2 || p.AfterMS < 1000 {
				t.Errorf("%+v", p)
			}
			if kind == wire.TransportTCP {
				dialOnce(t, r, m)
			}
			must(t, r.conn.Send(0, &wire.Stop{Instance: m.Instance, GraceMS: 5000}))
			e := want[*wire.Exited](r)
			if e.Exit != (wire.Exit{Code: -1, Forgotten: true}) || !slices.Contains(e.LastLines, "asked to stop") {
				t.Errorf("%+v", e)
			}
			waitGone(t, started.PID)
		})
	}
}

// dialOnce dials an instance as a proxy does.
func dialOnce(t *testing.T, r *rig, m *wire.Start) {
	t.Helper()
	ours, theirs, err := ipc.Pair()
	must(t, err)
	must(t, r.conn.Send(0, &wire.DialerSocket{}, theirs))
	theirs.Close()
	proxy := wire.NewConn(ours, wire.LinkDialing, wire.Proxy)
	defer proxy.Close()
	must(t, proxy.Send(1, &wire.Dial{Instance: m.Instance}))
	answer, err := proxy.Receive()
	must(t, err)
	answer.Discard()
	if _, ok := answer.Body.(*wire.Dialed); !ok {
		t.Errorf("%+v", answer.Body)
	}
}

func TestInstanceThatDiedBeforeItWasAdoptedIsReportedAtOnce(t *testing.T) {
	must(t, supervise.Subreaper())
	first, kill := newMortalRig(t)
	m := first.app(1, "stubborn")
	must(t, first.conn.Send(0, m))
	started, files := wantFiles[*wire.Started](first)
	for p := want[*wire.Probed](first); !p.Good; p = want[*wire.Probed](first) {
	}
	kill()
	must(t, supervise.Signal(int(files[0]), unix.SIGKILL))
	r := newRig(t, unprivileged)
	must(t, r.conn.Send(0, &wire.Adopt{Start: *m, PID: started.PID, Via: wire.TransportTCP}, files...))
	for _, f := range files {
		f.Close()
	}
	e := want[*wire.Exited](r)
	if !e.Exit.Forgotten {
		t.Errorf("%+v", e)
	}
	waitGone(t, started.PID) // and its child, which ignores SIGTERM:
	b, err := os.ReadFile(m.LogDir + "/current.log")
	must(t, err)
	_, after, _ := strings.Cut(string(b), `"text":"grandchild `)
	pid := 0
	for _, c := range after {
		if c < '0' || c > '9' {
			break
		}
		pid = 10*pid + int(c-'0')
	}
	waitGone(t, pid)
}

// TestAdoptWithAnotherProcessesDescriptorCostsThatInstance: the agent and its
// others go on.
func TestAdoptWithAnotherProcessesDescriptorCostsThatInstance(t *testing.T) {
	r := newRig(t, unprivileged)
	other := r.app(2, "unix")
	r.start(other)
	self, err := unix.PidfdOpen(os.Getpid(), 0)
	must(t, err)
	defer ipc.FD(self).Close()
	var pipe [2]int
	must(t, unix.Pipe2(pipe[:], unix.O_CLOEXEC))
	defer ipc.FD(pipe[0]).Close()
	defer ipc.FD(pipe[1]).Close()
	m := r.app(1, "tcp")
	must(t, r.conn.Send(0, &wire.Adopt{Start: *m, PID: os.Getppid()}, ipc.FD(self), ipc.FD(pipe[0]), ipc.FD(pipe[0])))
	if e := want[*wire.Exited](r); e.Instance != m.Instance || !e.Exit.Forgotten {
		t.Errorf("%+v", e)
	}
	must(t, r.conn.Send(0, &wire.Stop{Instance: other.Instance, GraceMS: 5000}))
	if e := want[*wire.Exited](r); e.Instance != other.Instance || e.Exit.Forgotten {
		t.Errorf("%+v", e)
	}
}

// TestAdoptedInstanceNeedNotFitTheSettings: its port was chosen by others; what is
// started has to.
func TestAdoptedInstanceNeedNotFitTheSettings(t *testing.T) {
	must(t, supervise.Subreaper()) // as tako-master is
	for _, hold := range []bool{false, true} {
		first, kill := newMortalRig(t)
		m := first.app(1, "tcp")
		must(t, first.conn.Send(0, m))
		started, files := wantFiles[*wire.Started](first)
		for p := want[*wire.Probed](first); !p.Good; p = want[*wire.Probed](first) {
		}
		if !hold {
			kill()
		}
		r := newRig(t, wire.AgentSettings{PortMin: 1, PortMax: 1})
		must(t, r.conn.Send(0, &wire.Adopt{Start: *m, PID: started.PID, Via: wire.TransportTCP, Hold: hold}, files...))
		for _, f := range files {
			f.Close()
		}
		if hold {
			kill()
			must(t, r.conn.Send(0, &wire.Begin{}))
		}
		if p := want[*wire.Probed](r); !p.Good || p.Instance != m.Instance {
			t.Errorf("%+v", p)
		}
		next := r.app(2, "tcp")
		must(t, r.conn.Send(0, next))
		if f := want[*wire.StartFailed](r); f.Instance != next.Instance || !strings.Contains(f.Reason, "is not from 1 to 1") {
			t.Errorf("%+v", f)
		}
		must(t, r.conn.Send(0, &wire.Stop{Instance: m.Instance, GraceMS: 5000}))
		want[*wire.Exited](r)
		waitGone(t, started.PID)
	}
}

// TestInstanceThatCannotBeWatchedIsTheOldAgents: the next agent says so before it
// has it, and leaves what it held alone. Without another agent it is ended.
func TestInstanceThatCannotBeWatchedIsTheOldAgents(t *testing.T) {
	must(t, supervise.Subreaper()) // as tako-master is
	first, kill := newMortalRig(t)
	m, fine := first.app(1, "unix"), first.app(2, "unix")
	must(t, first.conn.Send(0, m))
	started, files := wantFiles[*wire.Started](first)
	must(t, first.conn.Send(0, fine))
	startedFine, filesFine := wantFiles[*wire.Started](first)
	for good := map[uint32]bool{}; len(good) < 2; {
		if p := want[*wire.Probed](first); p.Good {
			good[p.Instance.N] = true
		}
	}
	bad := *m
	bad.Probe.Path = "no path"

	r := newRig(t, unprivileged)
	must(t, r.conn.Send(0, &wire.Adopt{Start: *fine, PID: startedFine.PID, Via: wire.TransportUnix, Hold: true}, filesFine...))
	must(t, r.conn.Send(0, &wire.Adopt{Start: bad, PID: started.PID, Via: wire.TransportUnix, Hold: true}, files...))
	err := <-r.ended
	r.ended <- err
	if !errors.Is(err, ipc.ErrProtocol) {
		t.Errorf("Run: %v", err)
	}
	for seen := map[uint32]bool{}; len(seen) < 2; { // both go on
		p := want[*wire.Probed](first)
		if !p.Good {
			t.Errorf("%+v", p)
		}
		seen[p.Instance.N] = true
	}
	kill()

	r = newRig(t, unprivileged)
	must(t, r.conn.Send(0, &wire.Adopt{Start: bad, PID: started.PID, Via: wire.TransportUnix}, files...))
	must(t, r.conn.Send(0, &wire.Adopt{Start: *fine, PID: startedFine.PID, Via: wire.TransportUnix}, filesFine...))
	for _, f := range append(files, filesFine...) {
		f.Close()
	}
	if e := want[*wire.Exited](r); e.Instance != m.Instance {
		t.Errorf("%+v", e)
	}
	waitGone(t, started.PID)
	if p := want[*wire.Probed](r); !p.Good || p.Instance != fine.Instance {
		t.Errorf("%+v", p)
	}
}

func TestWhatACutOffUnpackLeftIsRemoved(t *testing.T) {
	r := newRig(t, unprivileged)
	releases := r.dir + "/releases"
	for _, name := range []string{"/.incoming-OLD/sub", "/v0", "/.incoming-"} {
		must(t, os.MkdirAll(releases+name, 0o755))
	}
	left := func() (names []string) {
		entries, err := os.ReadDir(releases)
		must(t, err)
		for _, e := range entries {
			names = append(names, e.Name())
		}
		return names
	}
	f := packed(t, map[string]string{"app.json": "{}"})
	_, err := r.do(&wire.Unpack{App: "blog", Dir: releases, Name: "v1", MaxBytes: 1000, MaxFiles: 10, TimeoutMS: 20_000}, ipc.FD(f.Fd()))
	must(t, err)
	if got := left(); !slices.Equal(got, []string{"v0", "v1"}) {
		t.Errorf("after an Unpack: %q", got)
	}

	// One that is under way is left alone, by a Tree too.
	must(t, os.Mkdir(releases+"/.incoming-OLDER", 0o755))
	var pipe [2]int
	must(t, unix.Pipe2(pipe[:], unix.O_CLOEXEC))
	done := make(chan error, 1)
	go func() {
		_, err := r.do(&wire.Unpack{App: "blog", Dir: releases, Name: "v2", MaxBytes: 1000, MaxFiles: 10, TimeoutMS: int(patience.Milliseconds())}, ipc.FD(pipe[0]))
		done <- err
	}()
	under := func() bool {
		return slices.ContainsFunc(left(), func(s string) bool { return strings.HasPrefix(s, ".incoming-") && s != ".incoming-OLDER" })
	}
	for end := time.Now().Add(patience); !under(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("the unpack did not begin")
		}
	}
	must(t, os.Mkdir(releases+"/.incoming-OLDEST", 0o755))
	time.Sleep(20 * time.Millisecond) // the clock of files is coarse
	_, err = r.do(&wire.Tree{App: "blog", AppDir: r.dir, RunDir: r.dir + "/run2", Beside: true})
	must(t, err)
	if fi, err := os.Stat(r.dir + "/run2"); err != nil || fi.Mode().Perm() != 0o700 || !slices.Contains(left(), ".incoming-OLDEST") {
		t.Errorf("after a Tree beside another server: %q, %v", left(), err)
	}
	_, err = r.do(&wire.Tree{App: "blog", AppDir: r.dir, RunDir: r.dir + "/run"})
	must(t, err)
	if !under() || slices.Contains(left(), ".incoming-OLDEST") {
		t.Errorf("after a Tree: %q", left())
	}
	ipc.FD(pipe[1]).Close()
	<-done
	ipc.FD(pipe[0]).Close()
}

func TestStepThatSaysMuchAnswersWithItsFirstAndLastWords(t *testing.T) {
	r := newRig(t, unprivileged)
	m, err := r.do(r.run("chatter", patience))
	must(t, err)
	out := m.Body.(*wire.Ran).Stdout
	if len(out) > wire.MaxRanOutput || !strings.HasPrefix(out, "line 0\n") || !strings.Contains(out, wire.RanCut) || !strings.HasSuffix(out, "line 2999\nthe reason is on this line\n") {
		t.Errorf("%d bytes: %q", len(out), out)
	}
}
