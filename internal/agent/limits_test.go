package agent

import (
	"context"
	"errors"
	"strings"
	"sync"
	"testing"

	"github.com/hashicorp/go-hclog"

	"tako/internal/ipc"
	"tako/internal/tako"
	"tako/internal/wire"
)

// bare is an agent past its greeting whose loop does not run, and the master's
// end of its channel.
func bare(t *testing.T) (*agent, *wire.Conn) {
	t.Helper()
	ours, theirs, err := ipc.Pair()
	must(t, err)
	ch, err := ipc.Open(theirs)
	must(t, err)
	work, cancel := context.WithCancel(context.Background())
	a := &agent{
		conn: wire.NewConn(ch, wire.LinkAgent, wire.Agent), log: hclog.NewNullLogger(), settings: unprivileged,
		instances: make(map[tako.InstanceID]*instance), logs: make(map[string]*sharedLog), events: make(chan any),
		calls: make(chan struct{}, MaxCalls), dialers: make(chan struct{}, MaxDialers), work: work, all: new(sync.WaitGroup),
	}
	master := wire.NewConn(ours, wire.LinkAgent, wire.Master)
	must(t, master.Send(0, &wire.Hello{Protocol: wire.ProtocolVersion}))
	must(t, master.Send(0, &unprivileged))
	must(t, a.greet(work, "test"))
	for range 2 { // Hello and Ready
		_, err := master.Receive()
		must(t, err)
	}
	t.Cleanup(func() {
		cancel()
		a.conn.Close()
		master.Close()
		a.all.Wait()
	})
	return a, master
}

func TestOneInstanceTooManyFailsToStart(t *testing.T) {
	a, master := bare(t)
	for i := range MaxInstances {
		a.instances[tako.InstanceID{App: "full", N: uint32(i + 1)}] = &instance{}
	}
	m := &wire.Start{
		Instance: tako.InstanceID{App: "blog", N: 1}, Port: 4000, Probe: wire.Probe{Kind: wire.ProbeConnect},
		Command: wire.Command{Dir: "/", Argv: []string{"true"}}, LogDir: "/nowhere",
	}
	must(t, a.message(&wire.Message{Kind: wire.KindStart, Body: m}))
	got, err := master.Receive()
	must(t, err)
	if f, ok := got.Body.(*wire.StartFailed); !ok || !strings.Contains(f.Reason, "2000 instances are running, the limit") {
		t.Errorf("got %+v", got.Body)
	}
}

func TestOneCallTooManyIsAnsweredBusy(t *testing.T) {
	a, master := bare(t)
	for range MaxCalls {
		a.calls <- struct{}{}
	}
	must(t, a.message(&wire.Message{Kind: wire.KindTree, ID: 7, Body: &wire.Tree{App: "blog", AppDir: "/x", RunDir: "/y"}}))
	got, err := master.Receive()
	must(t, err)
	if f, ok := got.Body.(*wire.Fault); !ok || got.ID != 7 || f.Code != string(tako.CodeBusy) {
		t.Errorf("got %+v", got)
	}
}

func TestOneDiallingSocketTooManyEndsTheChannel(t *testing.T) {
	a, _ := bare(t)
	for range MaxDialers {
		a.dialers <- struct{}{}
	}
	ours, theirs, err := ipc.Pair()
	must(t, err)
	defer ours.Close()
	if err := a.message(&wire.Message{Kind: wire.KindDialerSocket, Body: &wire.DialerSocket{}, Files: []ipc.FD{theirs}}); !errors.Is(err, ipc.ErrProtocol) {
		t.Errorf("got %v", err)
	}
}

func TestCallsThatNoMasterMakesAreRefused(t *testing.T) {
	for name, body := range map[string]any{
		"tree: relative":       &wire.Tree{App: "blog", AppDir: "apps/blog", RunDir: "/y"},
		"tree: unclean":        &wire.Tree{App: "blog", AppDir: "/x/../y", RunDir: "/y"},
		"tree: release with /": &wire.Tree{App: "blog", AppDir: "/x", RunDir: "/y", Release: "../v1"},
		"tree: a user":         &wire.Tree{App: "blog", AppDir: "/x", RunDir: "/y", User: wire.User{UID: 1, GID: 1}},
		"run: no time":         &wire.Run{App: "blog", LogDir: "/x", Command: wire.Command{Dir: "/", Argv: []string{"x"}}},
		"run: NUL":             &wire.Run{App: "blog", LogDir: "/x", TimeoutMS: 1, Command: wire.Command{Dir: "/", Argv: []string{"x\x00"}}},
		"run: words":           &wire.Run{App: "blog", LogDir: "/x", TimeoutMS: 1, Command: wire.Command{Dir: "/", Argv: make([]string, maxCommand+1)}},
		"unpack: name":         &wire.Unpack{App: "blog", Dir: "/x", Name: "..", MaxBytes: 1, MaxFiles: 1, TimeoutMS: 1},
		"unpack: no limit":     &wire.Unpack{App: "blog", Dir: "/x", Name: "v1", TimeoutMS: 1},
	} {
		a, _ := bare(t)
		for _, id := range []uint64{0, 1} {
			if err := a.message(&wire.Message{ID: id, Body: body}); !errors.Is(err, ipc.ErrProtocol) {
				t.Errorf("%s, id %d: got %v", name, id, err)
			}
		}
	}
}

func TestSendToAMasterThatHasGoneEndsRun(t *testing.T) {
	a, master := bare(t)
	master.Close()
	if err := a.event(startFailedOf(a)); err == nil {
		t.Error("no error")
	}
}

func startFailedOf(a *agent) startFailed {
	id := tako.InstanceID{App: "blog", N: 1}
	a.instances[id] = &instance{log: a.takeLog("/nowhere", 0, 0, 0)}
	return startFailed{id, errors.New("x")}
}

func TestGreetingOfAnotherProtocolIsRefused(t *testing.T) {
	ours, theirs, err := ipc.Pair()
	must(t, err)
	ch, err := ipc.Open(theirs)
	must(t, err)
	master := wire.NewConn(ours, wire.LinkAgent, wire.Master)
	defer master.Close()
	must(t, master.Send(0, &wire.Hello{Protocol: wire.ProtocolVersion + 1, Version: "9"}))
	err = Run(context.Background(), Config{Channel: ch, Version: "1"}, hclog.NewNullLogger())
	if !errors.Is(err, ipc.ErrProtocol) || !strings.Contains(err.Error(), "install programs of one release") {
		t.Errorf("got %v", err)
	}
}

func TestOutputIsNotAwaitedOfAGrandchildThatKeepsItOpen(t *testing.T) {
	r := newRig(t, unprivileged)
	m := r.app(1, "leave-behind")
	r.start(m)
	e := want[*wire.Exited](r) // while the grandchild lives on
	if e.Exit.Code != 0 {
		t.Errorf("%+v", e)
	}
	var pid int
	for _, l := range e.LastLines {
		if num, ok := strings.CutPrefix(l, "grandchild "); ok {
			for _, c := range num {
				pid = 10*pid + int(c-'0')
			}
		}
	}
	waitGone(t, pid)
}
