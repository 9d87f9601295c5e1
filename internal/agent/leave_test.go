package agent

import (
	"testing"
	"time"

	"tako/internal/ipc"
	"tako/internal/wire"
)

// TestInstancesOutlastTheMasterForTheProxies: a proxy that is left alone answers
// what it has accepted, and dials for it.
func TestInstancesOutlastTheMasterForTheProxies(t *testing.T) {
	r := newRig(t, unprivileged)
	ours, theirs, err := ipc.Pair()
	must(t, err)
	must(t, r.conn.Send(0, &wire.DialerSocket{}, theirs))
	theirs.Close()
	proxy := wire.NewConn(ours, wire.LinkDialing, wire.Proxy)
	defer proxy.Close()
	m := r.app(1, "tcp")
	pid := r.start(m).PID
	want[*wire.Probed](r)
	r.conn.Close()
	for id := range uint64(30) {
		must(t, proxy.Send(id+1, &wire.Dial{Instance: m.Instance}))
		answer, err := proxy.Receive()
		must(t, err)
		if _, ok := answer.Body.(*wire.Dialed); !ok {
			t.Fatalf("dial %d: %+v", id, answer.Body)
		}
		answer.Discard()
		time.Sleep(5 * time.Millisecond)
	}
	must(t, proxy.Close())
	select {
	case err := <-r.ended:
		r.ended <- err
	case <-time.After(patience):
		t.Fatal("Run did not return after the proxy had left")
	}
	waitGone(t, pid)
}
