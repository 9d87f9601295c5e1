package wire

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"tako/internal/ipc"
	"tako/internal/tako"
)

func isViolation(err error) bool { return errors.Is(err, ipc.ErrProtocol) }

// conns are both ends of a link over a real pair.
func conns(t testing.TB, link Link, a, b Role) (*Conn, *Conn) {
	t.Helper()
	ours, fd, err := ipc.Pair()
	if err != nil {
		t.Fatal(err)
	}
	theirs, err := ipc.Open(fd)
	if err != nil {
		t.Fatal(err)
	}
	x, y := NewConn(ours, link, a), NewConn(theirs, link, b)
	t.Cleanup(func() { _ = x.Close(); _ = y.Close() })
	return x, y
}

func pipeEnd(t testing.TB) ipc.FD {
	t.Helper()
	fds := make([]int, 2)
	if err := unix.Pipe2(fds, unix.O_CLOEXEC); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ipc.FD(fds[0]).Close(); ipc.FD(fds[1]).Close() })
	return ipc.FD(fds[0])
}

func countFDs(t testing.TB) int {
	t.Helper()
	d, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(d)
}

func receive[T any](t testing.TB, c *Conn) (*T, Message) {
	t.Helper()
	m, err := c.Receive()
	if err != nil {
		t.Fatal(err)
	}
	body, ok := m.Body.(*T)
	if !ok {
		t.Fatalf("got %T, want %T", m.Body, new(T))
	}
	return body, m
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func TestLifeOfAProxyOnTheWire(t *testing.T) {
	master, proxy := conns(t, LinkProxy, Master, Proxy)
	end := pipeEnd(t)

	must(t, master.Send(0, &Hello{Protocol: ProtocolVersion, Generation: 3}))
	if h, _ := receive[Hello](t, proxy); h.Generation != 3 {
		t.Errorf("got %+v", h)
	}
	must(t, proxy.Send(0, &Hello{Protocol: ProtocolVersion}))
	receive[Hello](t, master)
	must(t, master.Send(0, &Listeners{Names: []string{ListenerHTTP, ListenerHTTPS}}, end, end))
	if l, m := receive[Listeners](t, proxy); len(l.Names) != 2 || len(m.Files) != 2 {
		t.Errorf("got %v and %d files", l.Names, len(m.Files))
	} else {
		m.Discard()
	}
	must(t, master.Send(0, &Serve{}))
	receive[Serve](t, proxy)
	must(t, proxy.Send(0, &Ready{}))
	receive[Ready](t, master)
	big := &App{App: "blog", Revision: 1}
	for i := range 20_000 {
		big.Routes = append(big.Routes, fmt.Sprintf("host-%d.example/*", i))
	}
	sent := make(chan error, 1)
	go func() { sent <- master.Send(0, big) }()
	if a, _ := receive[App](t, proxy); !reflect.DeepEqual(a, big) {
		t.Errorf("got %d routes, want %d", len(a.Routes), len(big.Routes))
	}
	must(t, <-sent)
	must(t, master.Send(9, &Ping{}))
	_, ping := receive[Ping](t, proxy)
	must(t, proxy.Reply(ping.ID, &Pong{}))
	if _, m := receive[Pong](t, master); m.ID != 9 {
		t.Errorf("pong %d, want 9", m.ID)
	}
	must(t, master.Send(0, &Drain{RequestsMS: 1}))
	receive[Drain](t, proxy)
	must(t, master.Send(0, &App{App: "blog", Revision: 2}))
	receive[App](t, proxy)
	must(t, proxy.Send(0, &Drained{Cut: 2}))
	receive[Drained](t, master)
	if err := proxy.Send(0, &Wake{App: "blog"}); err == nil {
		t.Error("a proxy spoke after its last word")
	}
	must(t, proxy.Close())
	if _, err := master.Receive(); !errors.Is(err, io.EOF) {
		t.Errorf("after the end: %v, want EOF", err)
	}
}

func TestOwnFaultsAreErrorsOfSend(t *testing.T) {
	master, _ := conns(t, LinkProxy, Master, Proxy)
	for want, err := range map[string]error{
		"tako-master may not send *wire.Wake on master-proxy":            master.Send(0, &Wake{}),
		"tako-master may not send wire.Hello on master-proxy":            master.Send(0, Hello{}),
		"tako-master may not send <nil> on master-proxy":                 master.Send(0, nil),
		"send *wire.Serve on master-proxy: not permitted while starting": master.Send(0, &Serve{}),
		"send *wire.Hello on master-proxy: 1 descriptors, want 0":        master.Send(0, &Hello{}, pipeEnd(t)),
		"send *wire.Hello on master-proxy: flags 0x1 do not fit":         master.Reply(1, &Hello{}),
		"tako-master may not send *wire.Fault on master-proxy":           master.ReplyError(1, io.EOF),
	} {
		if err == nil || err.Error() != want {
			t.Errorf("got %v, want %s", err, want)
		}
	}
	must(t, master.Send(0, &Hello{})) // none of it moved the state
	must(t, master.Send(0, &Listeners{}))
	if err := master.Send(0, &Listeners{}); err == nil || !strings.Contains(err.Error(), "once only") {
		t.Errorf("a second time: %v", err)
	}
}

func TestPeersFaultsEndTheChannelAndLeakNothing(t *testing.T) {
	before := countFDs(t)
	func() {
		ours, fd, err := ipc.Pair()
		must(t, err)
		peer, err := ipc.Open(fd)
		must(t, err)
		defer peer.Close()
		c := NewConn(ours, LinkProxy, Master)
		defer c.Close()
		null, err := unix.Open(os.DevNull, unix.O_RDONLY|unix.O_CLOEXEC, 0)
		must(t, err)
		defer ipc.FD(null).Close()
		during := countFDs(t)
		for _, rec := range []ipc.Record{
			{Kind: 9999, Files: []ipc.FD{ipc.FD(null)}},
			{Kind: uint16(KindHello), Body: []byte("{}"), Files: []ipc.FD{ipc.FD(null), ipc.FD(null)}},
			{Kind: uint16(KindWake), Body: []byte("{}"), Files: []ipc.FD{ipc.FD(null)}},
			{Kind: uint16(KindHello), Body: slices.Repeat([]byte("x"), ipc.MaxInline+1), Files: []ipc.FD{ipc.FD(null)}},
		} {
			must(t, peer.Send(rec))
			if m, err := c.Receive(); !isViolation(err) || !strings.HasPrefix(err.Error(), "from tako-proxy: ") || m.Files != nil {
				t.Errorf("kind %d: %v", rec.Kind, err)
			}
		}
		if n := countFDs(t); n != during {
			t.Errorf("%d descriptors, %d before", n, during)
		}
	}()
	if n := countFDs(t); n != before {
		t.Errorf("%d descriptors in the end, %d before", n, before)
	}
}

func TestOnlyASideOfTheLinkMaySpeak(t *testing.T) {
	defer func() {
		if recover() == nil {
			t.Error("the agent may speak on the proxy's channel")
		}
	}()
	NewConn(nil, LinkProxy, Agent)
}

// served are calls of a proxy to a dialler that answers by f, and the goroutine
// that receives.
func served(t testing.TB, answer func(c *Conn, calls []Message)) (calls *Calls, waitFor func(n int)) {
	t.Helper()
	proxy, agent := conns(t, LinkDialing, Proxy, Agent)
	calls = NewCalls(proxy)
	var wg sync.WaitGroup
	wg.Go(func() {
		defer calls.End()
		for {
			m, err := proxy.Receive()
			if err != nil {
				return
			}
			calls.Answer(m)
		}
	})
	t.Cleanup(func() { _ = proxy.Close(); _ = agent.Close(); wg.Wait() })
	return calls, func(n int) {
		var got []Message
		for range n {
			m, err := agent.Receive()
			if err != nil {
				t.Errorf("the dialler receives: %v", err)
				return
			}
			got = append(got, m)
		}
		answer(agent, got)
	}
}

func dial(n uint32) *Dial { return &Dial{Instance: tako.InstanceID{App: "blog", N: n}} }

func TestAnswersMayOvertakeEachOther(t *testing.T) {
	end := pipeEnd(t)
	calls, answer := served(t, func(c *Conn, got []Message) {
		slices.Reverse(got)
		for _, m := range got {
			n := m.Body.(*Dial).Instance.N // the only kind
			if n%2 == 0 {
				must(t, c.ReplyError(m.ID, tako.Errorf(tako.CodeNotFound, "no instance %d", n)))
				continue
			}
			must(t, c.Reply(m.ID, &Dialed{}, end))
		}
	})
	var wg sync.WaitGroup
	for n := uint32(1); n <= 8; n++ {
		wg.Go(func() {
			m, err := calls.Do(t.Context(), dial(n))
			if n%2 == 1 {
				if err != nil || len(m.Files) != 1 {
					t.Errorf("call %d: %d files, %v", n, len(m.Files), err)
				}
				m.Discard()
				return
			}
			e, ok := errors.AsType[*tako.Error](err)
			if !ok || e.Code != tako.CodeNotFound || e.Message != fmt.Sprintf("no instance %d", n) {
				t.Errorf("call %d: %v", n, err)
			}
		})
	}
	answer(8)
	wg.Wait()
}

func TestAnswerToACallGivenUpIsDiscarded(t *testing.T) {
	proxy, agent := conns(t, LinkDialing, Proxy, Agent)
	calls := NewCalls(proxy)
	end := pipeEnd(t)
	before := countFDs(t)
	ctx, cancel := context.WithCancelCause(t.Context())
	enough := errors.New("enough")
	done := make(chan error, 1)
	go func() {
		_, err := calls.Do(ctx, dial(1))
		done <- err
	}()
	_, asked := receive[Dial](t, agent)
	cancel(enough)
	if err := <-done; !errors.Is(err, enough) || !strings.Contains(err.Error(), "wait for the answer to *wire.Dial") {
		t.Errorf("given up: %v", err)
	}
	must(t, agent.Reply(asked.ID, &Dialed{}, end))
	m, err := proxy.Receive()
	must(t, err)
	if calls.Answer(m) {
		t.Error("somebody waited for it")
	}
	// A stranger's id, and one that was answered already, likewise.
	for _, id := range []uint64{0, 999, asked.ID} {
		must(t, agent.Reply(id, &Dialed{}, end))
		m, err := proxy.Receive()
		must(t, err)
		if calls.Answer(m) {
			t.Errorf("somebody waited for %d", id)
		}
	}
	if n := countFDs(t); n != before {
		t.Errorf("%d descriptors, %d before", n, before)
	}
	if len(calls.waiting) != 0 {
		t.Errorf("%d calls still wait", len(calls.waiting))
	}
}

// The answer and the end of the context come at the same time: whichever wins,
// the descriptor has an owner.
func TestAnswerThatCrossesTheEndOfItsCallLeaksNothing(t *testing.T) {
	proxy, agent := conns(t, LinkDialing, Proxy, Agent)
	calls := NewCalls(proxy)
	end := pipeEnd(t)
	before := countFDs(t)
	for range 200 {
		ctx, cancel := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		wg.Go(func() {
			if m, err := calls.Do(ctx, dial(1)); err == nil {
				m.Discard()
			}
		})
		_, asked := receive[Dial](t, agent)
		must(t, agent.Reply(asked.ID, &Dialed{}, end))
		m, err := proxy.Receive()
		must(t, err)
		wg.Go(cancel)
		calls.Answer(m)
		wg.Wait()
	}
	if n := countFDs(t); n != before {
		t.Errorf("%d descriptors, %d before", n, before)
	}
}

func TestABegunCallIsAnsweredOnce(t *testing.T) {
	proxy, agent := conns(t, LinkDialing, Proxy, Agent)
	calls := NewCalls(proxy)
	told := make(chan error, 10)
	begin := func(n uint32) uint64 {
		t.Helper()
		id, err := calls.Begin(dial(n), func(m Message, err error) { m.Discard(); told <- err })
		must(t, err)
		if _, asked := receive[Dial](t, agent); asked.ID != id {
			t.Errorf("call %d has the id %d, not %d", n, asked.ID, id)
		}
		return id
	}
	pass := func() {
		t.Helper()
		m, err := proxy.Receive()
		must(t, err)
		calls.Answer(m)
	}
	first, second := begin(1), begin(2)
	must(t, agent.Reply(second, &Dialed{}, pipeEnd(t)))
	pass()
	must(t, agent.ReplyError(first, tako.Errorf(tako.CodeFailed, "refused")))
	pass()
	if err := <-told; err != nil {
		t.Errorf("the second: %v", err)
	}
	if err := <-told; err == nil || err.Error() != "refused" {
		t.Errorf("the first: %v", err)
	}
	if calls.Forget(first) {
		t.Error("a call that was answered is still waited for")
	}
	third := begin(3)
	if !calls.Forget(third) {
		t.Error("a call that was not answered is not waited for")
	}
	must(t, agent.Reply(third, &Dialed{}, pipeEnd(t)))
	pass()
	begin(4)
	calls.End()
	if err := <-told; !errors.Is(err, ErrGone) {
		t.Errorf("at the end: %v", err)
	}
	if _, err := calls.Begin(dial(5), func(Message, error) { t.Error("told of a call that was not begun") }); !errors.Is(err, ErrGone) {
		t.Errorf("after the end: %v", err)
	}
	if len(told) != 0 || len(calls.waiting) != 0 {
		t.Errorf("%d told too much, %d still wait", len(told), len(calls.waiting))
	}
}

func TestACallThatCannotBeSentNowIsNotBegun(t *testing.T) {
	proxy, agent := conns(t, LinkDialing, Proxy, Agent)
	calls := NewCalls(proxy)
	n := 0
	var err error
	for ; err == nil && n < 10_000; n++ {
		_, err = calls.Begin(dial(1), func(Message, error) {})
	}
	if !errors.Is(err, ipc.ErrFull) || len(calls.waiting) != n-1 {
		t.Fatalf("after %d calls, of which %d wait: %v, want ErrFull", n, len(calls.waiting), err)
	}
	for range n - 1 {
		receive[Dial](t, agent)
	}
	if _, err := calls.Begin(dial(1), func(Message, error) {}); err != nil {
		t.Errorf("with room again: %v", err)
	}
}

func TestEndFailsAllCalls(t *testing.T) {
	calls, answer := served(t, func(c *Conn, _ []Message) { _ = c.Close() })
	got := make(chan error, 3)
	for n := range uint32(3) {
		go func() {
			_, err := calls.Do(t.Context(), dial(n+1))
			got <- err
		}()
	}
	answer(3)
	for range 3 {
		if err := <-got; !errors.Is(err, ErrGone) {
			t.Errorf("got %v, want ErrGone", err)
		}
	}
	calls.End()
	if _, err := calls.Do(t.Context(), dial(9)); !errors.Is(err, ErrGone) {
		t.Errorf("afterwards: %v, want ErrGone", err)
	}
}

func TestCallThatCannotBeSentIsForgotten(t *testing.T) {
	proxy, _ := conns(t, LinkDialing, Proxy, Agent)
	calls := NewCalls(proxy)
	if _, err := calls.Do(t.Context(), &Dialed{}); err == nil {
		t.Error("a proxy may not answer on the dialling socket")
	}
	if len(calls.waiting) != 0 {
		t.Errorf("%d calls wait", len(calls.waiting))
	}
}
