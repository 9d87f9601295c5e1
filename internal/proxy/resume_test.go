package proxy

import (
	"testing"
	"time"

	"tako/internal/ipc"
	"tako/internal/tako"
	"tako/internal/wire"
)

func TestNextMasterIsToldWhatAProxyHolds(t *testing.T) {
	m := serving(t)
	one := tako.InstanceID{App: "blog", N: 7}
	m.app(wire.App{Instances: []wire.Upstream{{Instance: one, Socket: "/nowhere"}}})
	revision := m.app(wire.App{Instances: []wire.Upstream{{Instance: one, Socket: "/nowhere", Draining: true}}})
	expect[*wire.Quiet](m)

	kept, _, err := m.conn.HandOver()
	check0(t, err)
	check0(t, m.conn.Close())
	ch, err := ipc.Open(kept)
	check0(t, err)
	conn, pieces, err := wire.ResumeChild(ch, wire.LinkProxy, patience)
	check0(t, err)
	defer conn.Close()
	check0(t, conn.SetReadDeadline(time.Now().Add(patience)))
	receive := func() any {
		t.Helper()
		for {
			msg, err := conn.Receive()
			check0(t, err)
			if _, traffic := msg.Body.(*wire.Traffic); !traffic {
				return msg.Body
			}
		}
	}
	h, ok := receive().(*wire.Holds)
	if pieces != 1 || !ok || len(h.Apps) != 1 {
		t.Fatalf("it holds %+v, %d pieces", h, pieces)
	}
	if a := h.Apps[0]; a.App != "blog" || a.Revision != revision || a.Newest != 7 || a.Gone || len(a.Instances) != 1 || !a.Instances[0].Draining {
		t.Errorf("it holds %+v", a)
	}
	if q, ok := receive().(*wire.Quiet); !ok || q.Instance != one {
		t.Error("that nothing is in flight there is not said again")
	}
	check0(t, conn.Send(0, &wire.App{App: "blog", Revision: revision + 1, Routes: []string{"blog.test"}}))
	if a, ok := receive().(*wire.Applied); !ok || a.Revision != revision+1 {
		t.Errorf("applied %+v", a)
	}
}

func TestTrafficDoesNotPileUpForAMasterThatDoesNotCome(t *testing.T) {
	stuck := make(chan struct{})
	sent := 0
	o := newOutbox(func(any) error { <-stuck; sent++; return nil })
	o.open()
	done := make(chan error, 1)
	go func() { done <- o.run() }()
	for range 3 * MaxOutbox {
		o.push(&wire.Traffic{})
	}
	o.push(&wire.Quiet{})
	o.close()
	close(stuck)
	check0(t, <-done)
	if sent > 2*MaxOutbox+2 || sent < MaxOutbox {
		t.Errorf("%d messages were kept, the limit is %d", sent, MaxOutbox)
	}
}
