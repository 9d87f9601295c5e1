package wire

import (
	"context"
	"errors"
	"os"
	"testing"
	"time"

	"tako/internal/ipc"
	"tako/internal/tako"
)

// abandoned is a proxy that serves, and the end of its channel that its dead
// master had, which waits in what keeps it.
func abandoned(t testing.TB) (proxy *Conn, kept ipc.FD) {
	t.Helper()
	master, proxy := conns(t, LinkProxy, Master, Proxy)
	must(t, master.Send(0, &Hello{Protocol: 1}))
	receive[Hello](t, proxy)
	must(t, proxy.Send(0, &Hello{Protocol: 1}))
	must(t, master.Send(0, &Serve{}))
	receive[Serve](t, proxy)
	must(t, proxy.Send(0, &Ready{}))
	must(t, proxy.Send(0, &Wake{App: "blog"})) // nobody will have read that
	kept, _, err := master.HandOver()
	must(t, err)
	must(t, master.Close())
	return proxy, kept
}

func TestNextMasterGoesOnWithAChild(t *testing.T) {
	proxy, kept := abandoned(t)
	ch, err := ipc.Open(kept)
	must(t, err)
	answered := make(chan error, 1)
	go func() {
		m, err := proxy.Receive()
		if _, ok := m.Body.(*Resume); !ok {
			answered <- errors.Join(err, errors.New("no Resume"))
			return
		}
		answered <- errors.Join(
			proxy.Send(0, &Wake{App: "late"}),
			proxy.Resumed(&m, 1),
			proxy.Send(0, &Holds{Certificates: []string{"c"}}),
			proxy.Send(0, &Wake{App: "new"}))
	}()
	next, pieces, err := ResumeChild(ch, LinkProxy, 10*time.Second)
	must(t, err)
	defer next.Close()
	must(t, <-answered)
	if pieces != 1 {
		t.Errorf("%d pieces, want 1", pieces)
	}
	if h, _ := receive[Holds](t, next); len(h.Certificates) != 1 {
		t.Errorf("it holds %+v", h)
	}
	if w, _ := receive[Wake](t, next); w.App != "new" {
		t.Errorf("what was said to the dead master came: %+v", w)
	}
	if err := next.Send(0, &Serve{}); err == nil {
		t.Error("a second Serve was permitted")
	}
	must(t, next.Send(0, &Drain{}))
	receive[Drain](t, proxy)
}

// TestSecondDeathIsSurvivedToo: the one who asked dies before the answer, which
// the next one must not take for its own.
func TestSecondDeathIsSurvivedToo(t *testing.T) {
	proxy, kept := abandoned(t)
	first, err := ipc.Open(kept)
	must(t, err)
	again, err := first.Dup()
	must(t, err)
	must(t, first.Send(ipc.Record{Kind: uint16(KindResume), ID: 7, Body: []byte("{}")}))
	_, m := receive[Resume](t, proxy)
	must(t, proxy.Resumed(&m, 5))
	must(t, first.Close())

	ch, err := ipc.Open(again)
	must(t, err)
	go func() {
		if m, err := proxy.Receive(); err == nil {
			_ = proxy.Resumed(&m, 0) // an error is ResumeChild's to see
		}
	}()
	next, pieces, err := ResumeChild(ch, LinkProxy, 10*time.Second)
	must(t, err)
	defer next.Close()
	if pieces != 0 {
		t.Errorf("%d pieces: the answer to the dead master", pieces)
	}
}

func TestChildThatHasGoneOrIsStuckIsSaidToBe(t *testing.T) {
	proxy, kept := abandoned(t)
	again, err := ipc.Open(kept)
	must(t, err)
	dup, err := again.Dup()
	must(t, err)
	if _, _, err := ResumeChild(again, LinkProxy, 20*time.Millisecond); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("stuck: %v", err)
	}
	must(t, proxy.Close())
	ch, err := ipc.Open(dup)
	must(t, err)
	if _, _, err := ResumeChild(ch, LinkProxy, time.Minute); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("gone: %v", err) // EOF, or a reset of what it had not read
	}
}

// TestPatientChildWaitsForTheNextMaster: its socket is full, and nobody reads.
func TestPatientChildWaitsForTheNextMaster(t *testing.T) {
	proxy, kept := abandoned(t)
	proxy.Patient()
	const many = 5000 // more than a socket holds
	sent := make(chan error, 1)
	go func() {
		for range many {
			if err := proxy.Send(0, &Unreachable{Instance: tako.InstanceID{App: "blog", N: 1}}); err != nil {
				sent <- err
				return
			}
		}
		m, err := proxy.Receive()
		if err == nil {
			err = proxy.Resumed(&m, 0)
		}
		sent <- err
	}()
	ch, err := ipc.Open(kept)
	must(t, err)
	next, _, err := ResumeChild(ch, LinkProxy, time.Minute)
	must(t, err)
	defer next.Close()
	must(t, <-sent)
}

func TestAnswersToADeadMastersCallsAreNobodys(t *testing.T) {
	master, agent := conns(t, LinkSigning, Proxy, Master) // any link with calls
	calls := NewCalls(master)
	other := NewCalls(master)
	go func() {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		_, _ = calls.Do(ctx, &Sign{})
	}()
	m, err := agent.Receive()
	must(t, err)
	if other.Answer(Message{ID: m.ID, Body: &Signed{}}) {
		t.Error("it was taken for another's")
	}
	calls.Answer(Message{ID: m.ID, Body: &Signed{}})
}
