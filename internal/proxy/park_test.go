package proxy

import (
	"errors"
	"testing"
	"time"

	"tako/internal/proxy/eventloop"
	"tako/internal/wire"
)

// starter begins a task.
type starter func(*eventloop.Task)

func (f starter) Start(t *eventloop.Task) { f(t) }

// group starts loops that end with the test.
func group(t testing.TB, n int) *eventloop.Group {
	t.Helper()
	g, err := eventloop.NewGroup(n)
	check0(t, err)
	t.Cleanup(func() {
		if err := g.Close(patience); err != nil || g.Conns() != 0 {
			t.Errorf("%d connections are left on the loops: %v", g.Conns(), err)
		}
	})
	return g
}

// parked is what a task that waited has got.
type parked struct {
	inst *instance
	err  error
}

// park has a task of g wait for an instance, and returns when it is in the queue.
func park(t *testing.T, g *eventloop.Group, a *app, fl *flight, k kind) chan parked {
	t.Helper()
	near, far := tcpPair(t)
	on, err := g.Pick().Adopt(near)
	check0(t, err)
	got := make(chan parked, 2) // one more than there should be
	on.Idle(starter(func(task *eventloop.Task) {
		fl.out.Task = task
		i, err := a.wait(fl, nil, k)
		_ = on.Close()
		got <- parked{i, err}
	}))
	before := a.queued.Load()
	_, err = far.Write([]byte{0})
	check0(t, err)
	for end := time.Now().Add(patience); a.queued.Load() == before; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("the task is not in the queue")
		}
	}
	return got
}

func (p parked) isErr(t *testing.T, want error) {
	t.Helper()
	if p.inst != nil || !errors.Is(p.err, want) {
		t.Errorf("got %v, %v, want %v", p.inst, p.err, want)
	}
}

func one(t *testing.T, c chan parked) parked {
	t.Helper()
	select {
	case p := <-c:
		return p
	case <-time.After(patience):
		t.Fatal("a parked request was not woken")
		return parked{}
	}
}

func TestParkedRequestsOfBothKindsGoInTheirTurn(t *testing.T) {
	g := group(t, 2)
	a, _ := testApp(4, 1) // of which 2 places are for uploads
	var busy *instance
	for range 4 {
		i, err := a.acquire(t.Context(), nil)
		check0(t, err)
		busy = i
	}
	kinds := []kind{upload, ordinary, ordinary, upload, ordinary}
	var waits []chan parked
	for _, k := range kinds {
		waits = append(waits, park(t, g, a, new(flight), k))
	}
	for n, w := range waits {
		a.release(busy, ordinary)
		if p := one(t, w); p.inst != busy || p.err != nil {
			t.Fatalf("request %d got %v, %v", n, p.inst, p.err)
		}
		if left := int(a.queued.Load()); left != len(waits)-n-1 {
			t.Fatalf("%d wait after %d were served", left, n+1)
		}
		for _, later := range waits[n+1:] {
			if len(later) > 0 {
				t.Fatal("one was overtaken")
			}
		}
		if kinds[n] == upload {
			a.uploaded(busy) // or there is no place for the next one
		}
	}
	for range 4 {
		a.release(busy, ordinary)
	}
	if busy.requests.Load() != 0 || busy.uploads.Load() != 0 {
		t.Errorf("%d requests, %d uploads are counted", busy.requests.Load(), busy.uploads.Load())
	}
}

func TestParkedRequestThatIsCancelledGivesItsPlaceUp(t *testing.T) {
	g := group(t, 1)
	a, _ := testApp(1, 1)
	i, err := a.acquire(t.Context(), nil)
	check0(t, err)
	var first flight
	one1, two := park(t, g, a, &first, ordinary), park(t, g, a, new(flight), ordinary)
	first.Do(errClientGone)
	one(t, one1).isErr(t, errClientGone)
	if n := a.queued.Load(); n != 1 {
		t.Errorf("%d are waiting", n)
	}
	a.release(i, ordinary)
	if p := one(t, two); p.inst != i || p.err != nil {
		t.Errorf("the next one got %v, %v", p.inst, p.err)
	}
	a.release(i, ordinary)
	if i.requests.Load() != 0 {
		t.Error("something is counted")
	}
}

// Were a task woken twice, its next wait would end for nothing: here the loop would
// resume what is over.
func TestParkedRequestIsWokenOnceHoweverManyEndItsWait(t *testing.T) {
	g := group(t, 2)
	a, _ := testApp(1, 1)
	for range 100 {
		i, err := a.acquire(t.Context(), nil)
		check0(t, err)
		var fl flight
		got := park(t, g, a, &fl, ordinary)
		a.mu.Lock()
		a.waiting[ordinary][0].until = time.Now()
		a.mu.Unlock()
		begin, done := make(chan struct{}), make(chan struct{}, 3)
		for _, f := range []func(){func() { fl.Do(errCut) }, a.expire, func() { a.release(i, ordinary) }} {
			go func() {
				<-begin
				f()
				done <- struct{}{}
			}()
		}
		close(begin)
		p := one(t, got)
		for range 3 {
			<-done
		}
		switch {
		case p.inst == i && p.err == nil:
			a.release(i, ordinary)
		case p.inst != nil || !errors.Is(p.err, errCut) && !errors.Is(p.err, errInstanceQueueFull):
			t.Fatalf("got %v, %v", p.inst, p.err)
		}
		if len(got) > 0 || a.queued.Load() != 0 || i.requests.Load() != 0 {
			t.Fatalf("woken again: %t; %d wait, %d are counted", len(got) > 0, a.queued.Load(), i.requests.Load())
		}
	}
}

func TestParkedRequestWaitsQueueTimeForABusyInstance(t *testing.T) {
	g := group(t, 1)
	a, _ := testApp(1, 1)
	i, err := a.acquire(t.Context(), nil)
	check0(t, err)
	began := time.Now()
	got := park(t, g, a, new(flight), ordinary)
	a.mu.Lock()
	w := a.waiting[ordinary][0]
	if w.until.Before(began.Add(QueueTime)) || w.until.After(time.Now().Add(QueueTime)) || !a.expires.Equal(w.until) {
		t.Errorf("it waits for %s, and that is looked at after %s", w.until.Sub(began), a.expires.Sub(began))
	}
	a.mu.Unlock()
	a.expire() // too early
	if len(got) > 0 || a.queued.Load() != 1 {
		t.Error("it did not wait on")
	}
	a.mu.Lock()
	w.until = time.Now()
	a.expireLocked(w.until)
	a.mu.Unlock()
	one(t, got).isErr(t, errInstanceQueueFull)
	a.release(i, ordinary)
}

// The later one has the shorter time: a revision came between.
func TestParkedRequestsOfASleepingAppWaitTheirOwnTime(t *testing.T) {
	g := group(t, 1)
	a := newApp("blog", newOutbox(nil))
	wait := func(ms int) (chan parked, time.Time) {
		a.change(&wire.App{App: "blog", OnDemand: true, Queue: wire.Queue{Waiters: 10, WaitMS: ms}}, false, nil)
		began := time.Now()
		return park(t, g, a, new(flight), ordinary), began
	}
	long, longBegan := wait(400)
	endless, _ := wait(600_000)
	short, shortBegan := wait(40)
	one(t, short).isErr(t, errStartTimeout)
	if d := time.Since(shortBegan); d < 40*time.Millisecond {
		t.Errorf("after %s", d)
	}
	one(t, long).isErr(t, errStartTimeout)
	if d := time.Since(longBegan); d < 400*time.Millisecond {
		t.Errorf("after %s", d)
	}
	if n := a.queued.Load(); n != 1 || len(endless) > 0 {
		t.Errorf("%d are waiting", n)
	}
	a.change(&wire.App{App: "blog"}, true, nil)
	one(t, endless).isErr(t, errNoRoute)
}
