package agent

import (
	"testing"
	"time"

	"tako/internal/ipc"
	"tako/internal/supervise"
	"tako/internal/wire"
)

// nextMaster takes over the channel as a tako-master does after the death of the
// one before, and returns what the agent knows.
func nextMaster(t *testing.T, r *rig) (*wire.Conn, []wire.Message) {
	t.Helper()
	kept, _, err := r.conn.HandOver()
	must(t, err)
	must(t, r.conn.Close())
	ch, err := ipc.Open(kept)
	must(t, err)
	conn, pieces, err := wire.ResumeChild(ch, wire.LinkAgent, patience)
	must(t, err)
	t.Cleanup(func() { _ = conn.Close() })
	var known []wire.Message
	for len(known) < pieces {
		m, err := conn.Receive()
		must(t, err)
		if _, ok := m.Body.(*wire.Present); ok {
			known = append(known, m)
			t.Cleanup(m.Discard)
		}
	}
	return conn, known
}

// next returns the next message of a type.
func next[T any](t *testing.T, conn *wire.Conn) T {
	t.Helper()
	must(t, conn.SetReadDeadline(time.Now().Add(patience)))
	for {
		m, err := conn.Receive()
		must(t, err)
		m.Discard()
		if body, ok := m.Body.(T); ok {
			return body
		}
	}
}

func TestNextMasterIsToldOfEveryInstance(t *testing.T) {
	r := newRig(t, unprivileged)
	m := r.app(1, "unix")
	must(t, r.conn.Send(0, m))
	started := want[*wire.Started](r)
	for p := want[*wire.Probed](r); !p.Good; p = want[*wire.Probed](r) {
	}
	// A step of a deploy, which nobody waits for any more, and would not end.
	must(t, r.conn.Send(9, r.run("silent", time.Hour)))

	conn, known := nextMaster(t, r)
	if len(known) != 1 {
		t.Fatalf("it knows %d instances, want 1", len(known))
	}
	p, _ := known[0].Body.(*wire.Present)
	if p.Adopt.PID != started.PID || p.Adopt.Via != wire.TransportUnix || !p.Good || !p.Held || p.Stopping || p.Adopt.Start.Instance != m.Instance || p.Adopt.Start.Socket != m.Socket {
		t.Errorf("%+v", p)
	}
	if len(known[0].Files) != 3 || supervise.PIDOf(int(known[0].Files[0])) != started.PID {
		t.Errorf("its descriptors are %v", known[0].Files)
	}
	if probed := next[*wire.Probed](t, conn); !probed.Good || probed.Instance != m.Instance {
		t.Errorf("%+v", probed)
	}
	must(t, conn.Send(0, &wire.Stop{Instance: m.Instance, GraceMS: 5000}))
	if e := next[*wire.Exited](t, conn); e.Instance != m.Instance {
		t.Errorf("%+v", e)
	}
}

// TestHeldInstanceIsTheNextAgents: it is left alone until the agent before has
// gone, and ended if the master goes first.
func TestHeldInstanceIsTheNextAgents(t *testing.T) {
	must(t, supervise.Subreaper()) // as tako-master is
	for _, begin := range []bool{true, false} {
		first, kill := newMortalRig(t)
		m := first.app(1, "unix")
		must(t, first.conn.Send(0, m))
		started, files := wantFiles[*wire.Started](first)
		for p := want[*wire.Probed](first); !p.Good; p = want[*wire.Probed](first) {
		}
		r := newRig(t, unprivileged)
		must(t, r.conn.Send(0, &wire.Adopt{Start: *m, PID: started.PID, Via: wire.TransportUnix, Hold: true}, files...))
		for _, f := range files {
			f.Close()
		}
		if !begin {
			kill()
			must(t, r.conn.Close())
			waitGone(t, started.PID)
			continue
		}
		// It answers, and still says nothing of the instance.
		must(t, r.conn.Send(1, &wire.Ping{}))
		if p := want[*wire.Probed](first); !p.Good { // the first one's
			t.Errorf("%+v", p)
		}
		if n := len(r.msgs); n > 0 {
			t.Errorf("%d messages before Begin", n)
		}
		kill()
		must(t, r.conn.Send(0, &wire.Begin{}))
		if p := want[*wire.Probed](r); !p.Good {
			t.Errorf("%+v", p)
		}
		must(t, r.conn.Send(0, &wire.Stop{Instance: m.Instance, GraceMS: 5000}))
		want[*wire.Exited](r)
		waitGone(t, started.PID)
	}
}
