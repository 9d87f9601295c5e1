package proxy

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"tako/internal/proxy/balance"
	"tako/internal/proxy/upstream"
	"tako/internal/tako"
	"tako/internal/wire"
)

func TestWaitsHaveTheirDefaults(t *testing.T) {
	a := newApp("blog", newOutbox(nil))
	a.change(&wire.App{App: "blog"}, false, nil)
	if c := a.conf.Load(); c.MaxInFlight != 256 || c.Queue != (wire.Queue{Waiters: 100, WaitMS: 30_000}) || MaxQueued != 6000 || QueueTime != 10*time.Second {
		t.Errorf("got %+v", c)
	}
}

// testApp is an app with instances of these numbers, with room for most requests
// each.
func testApp(most int, numbers ...uint32) (*app, *wire.App) {
	a := newApp("blog", newOutbox(nil))
	m := &wire.App{App: "blog", MaxInFlight: most}
	change(a, m, numbers...)
	return a, m
}

func change(a *app, m *wire.App, numbers ...uint32) []*instance {
	m.Revision++
	m.Instances = nil
	for _, n := range numbers {
		m.Instances = append(m.Instances, wire.Upstream{Instance: tako.InstanceID{App: "blog", N: n}})
	}
	return a.change(m, false, nil)
}

// acquire is try, and wait if there is nothing to get at once.
func (a *app) acquire(ctx context.Context, not *instance) (*instance, error) {
	return a.acquireOf(ctx, not, ordinary)
}

// acquireOf is acquire for a request of that kind.
func (a *app) acquireOf(ctx context.Context, not *instance, k kind) (*instance, error) {
	if i, err := a.try(not, k); i != nil || err != nil {
		return i, err
	}
	var fl flight
	stop := context.AfterFunc(ctx, func() { fl.Do(context.Cause(ctx)) })
	defer stop()
	return a.wait(&fl, not, k)
}

func (a *app) numbered(n uint32) *instance { return a.instances[tako.InstanceID{App: "blog", N: n}] }

func TestRequestsBeyondTheCapWaitInTurn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, _ := testApp(2, 1, 2)
		var busy []*instance
		for range 4 {
			i, err := a.acquire(t.Context(), nil)
			check0(t, err)
			busy = append(busy, i)
		}
		if one, two := a.numbered(1).requests.Load(), a.numbered(2).requests.Load(); one != 2 || two != 2 {
			t.Fatalf("%d and %d requests", one, two)
		}
		began := time.Now()
		if i, err := a.acquire(t.Context(), nil); !errors.Is(err, errInstanceQueueFull) || i != nil || time.Since(began) != QueueTime {
			t.Errorf("got %v, %v after %s", i, err, time.Since(began))
		}
		type served struct {
			n    int
			inst *instance
		}
		var order []served
		var mu sync.Mutex
		for n := range 4 {
			go func() {
				i, err := a.acquire(t.Context(), nil)
				check0(t, err)
				mu.Lock()
				defer mu.Unlock()
				order = append(order, served{n, i})
			}()
			synctest.Wait()
		}
		ctx, cancel := context.WithCancel(t.Context())
		left := make(chan error, 1)
		go func() {
			_, err := a.acquire(ctx, nil)
			left <- err
		}()
		synctest.Wait()
		cancel()
		if err := <-left; !errors.Is(err, context.Canceled) {
			t.Errorf("one that left got %v", err)
		}
		if got := a.queued.Load(); got != 4 {
			t.Fatalf("%d are waiting", got)
		}
		for n, i := range busy {
			a.release(i, ordinary)
			synctest.Wait()
			mu.Lock()
			if len(order) != n+1 || order[n].n != n || order[n].inst != i {
				t.Fatalf("after %d ended: %v", n+1, order)
			}
			mu.Unlock()
		}
		for _, s := range order {
			a.release(s.inst, ordinary)
		}
		if a.numbered(1).InFlight()+a.numbered(2).InFlight() != 0 || a.queued.Load() != 0 {
			t.Error("something is counted in the end")
		}
	})
}

func TestQueueForInstancesIsBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, m := testApp(1, 1)
		first, err := a.acquire(t.Context(), nil)
		check0(t, err)
		var granted, refused atomic.Int32
		for range MaxQueued {
			go func() {
				switch i, err := a.acquire(t.Context(), nil); {
				case err == nil:
					granted.Add(1)
					a.release(i, ordinary)
				case err.Error() == "No healthy backend":
					refused.Add(1)
				default:
					t.Errorf("got %v", err)
				}
			}()
		}
		synctest.Wait()
		if _, err := a.acquire(t.Context(), nil); !errors.Is(err, errInstanceQueueFull) || errInstanceQueueFull.status != 503 || errInstanceQueueFull.retryAfterS != 1 {
			t.Errorf("one too many got %v", err)
		}
		// One that ends lets one after the other through.
		a.release(first, ordinary)
		synctest.Wait()
		if granted.Load() != MaxQueued || first.requests.Load() != 0 {
			t.Errorf("%d of %d got through", granted.Load(), MaxQueued)
		}

		// Without an instance nobody waits in vain.
		first, err = a.acquire(t.Context(), nil)
		check0(t, err)
		for range 10 {
			go func() {
				if i, err := a.acquire(t.Context(), nil); err == nil || err.Error() != "No healthy backend" {
					t.Errorf("got %v, %v", i, err)
				}
				refused.Add(1)
			}()
		}
		synctest.Wait()
		change(a, m)
		synctest.Wait()
		if refused.Load() != 10 {
			t.Errorf("%d were told", refused.Load())
		}
		a.release(first, ordinary)
	})
}

// A waiter that must not go to one instance does not hold up those behind it.
func TestWaiterWithAnExceptionIsPassedBy(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, m := testApp(1, 1, 2)
		one, two := a.numbered(1), a.numbered(2)
		for range 2 {
			_, err := a.acquire(t.Context(), nil)
			check0(t, err)
		}
		got := make(chan string, 2)
		wait := func(name string, not *instance) {
			go func() {
				i, err := a.acquire(t.Context(), not)
				if err != nil {
					got <- fmt.Sprint(name, " ", err)
					return
				}
				got <- fmt.Sprint(name, " ", i.id.N)
			}()
			synctest.Wait()
		}
		wait("picky", one)
		wait("other", nil)
		a.release(one, ordinary)
		if g := <-got; g != "other 1" {
			t.Errorf("got %s", g)
		}
		a.release(two, ordinary)
		if g := <-got; g != "picky 2" {
			t.Errorf("got %s", g)
		}
		wait("picky", one)
		change(a, m, 1)
		if g := <-got; g != "picky no other instance" {
			t.Errorf("got %s", g)
		}
	})
}

// Many at once on few places: the cap holds, and nobody is forgotten.
func TestCapHoldsUnderLoad(t *testing.T) {
	a, _ := testApp(3, 1, 2)
	var at [3]atomic.Int32
	var wg sync.WaitGroup
	for range 64 {
		wg.Go(func() {
			for range 200 {
				i, err := a.acquire(t.Context(), nil)
				if err != nil {
					t.Error(err)
					return
				}
				if n := at[i.id.N].Add(1); n > 3 {
					t.Errorf("%d at once", n)
				}
				at[i.id.N].Add(-1)
				a.release(i, ordinary)
			}
		})
	}
	wg.Wait()
	if a.queued.Load() != 0 || a.numbered(1).requests.Load() != 0 || a.numbered(2).requests.Load() != 0 {
		t.Error("something is counted in the end")
	}
}

func TestInstanceThatFailsIsOutForAGrowingPause(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, _ := testApp(10, 1, 2)
		bad := a.numbered(1)
		served := func() (n int) {
			for range 200 {
				i, err := a.acquire(t.Context(), nil)
				check0(t, err)
				if i == bad {
					n++
				}
				a.release(i, ordinary)
			}
			return n
		}
		for range EjectAfter - 1 {
			bad.failed(false, time.Now())
		}
		if served() == 0 {
			t.Error("out too early")
		}
		bad.answered()
		for range EjectAfter - 1 {
			bad.failed(false, time.Now())
		}
		if bad.out() {
			t.Error("an answer did not count")
		}
		for n, pause := range []time.Duration{1, 2, 4, 8, 10, 10, 10, 10, 10, 10} {
			bad.failed(false, time.Now())
			bad.failed(false, time.Now()) // another one of the same moment
			if got := served(); got != 0 {
				t.Fatalf("ejection %d: %d requests", n, got)
			}
			time.Sleep(pause*time.Second - 1)
			if !bad.out() {
				t.Fatalf("ejection %d: back too early", n)
			}
			time.Sleep(time.Nanosecond)
			if served() == 0 {
				t.Fatalf("ejection %d: not back after %d s", n, pause)
			}
		}
		bad.answered()
		bad.failed(true, time.Now())
		if !bad.out() {
			t.Error("in after a refused connection")
		}
		time.Sleep(EjectFirst)
		if bad.out() {
			t.Error("an answer did not make the pause short again")
		}
	})
}

func TestLastInstanceStaysIn(t *testing.T) {
	a, m := testApp(10, 1, 2)
	for _, n := range []uint32{1, 2} {
		a.numbered(n).failed(true, time.Now())
	}
	for range 10 {
		if _, err := a.acquire(t.Context(), nil); err != nil {
			t.Errorf("with all of them out: %v", err)
		}
	}
	m.Instances[1].Fallback = true // by the master's word worse, but not refusing
	m.Revision++
	a.change(m, false, nil)
	a.numbered(2).answered()
	if i, err := a.acquire(t.Context(), nil); err != nil || i.id.N != 2 {
		t.Errorf("got %v, %v, want the one in reserve", i, err)
	}
	change(a, m, 1)
	if i, err := a.acquire(t.Context(), nil); err != nil || i.id.N != 1 {
		t.Errorf("got %v, %v, want the only one", i, err)
	}
}

func TestErrorsThatCountAgainstAnInstance(t *testing.T) {
	for _, test := range []struct {
		err                error
		transport, refused bool
	}{
		{&upstream.DialError{Err: &net.OpError{Err: syscall.ECONNREFUSED}}, true, true},
		{&upstream.DialError{Err: &net.OpError{Err: syscall.ENOENT}}, true, true},
		{&upstream.DialError{Err: tako.Errorf(tako.CodeFailed, "x")}, true, true},
		{&upstream.DialError{Err: tako.Errorf(tako.CodeBusy, "x")}, false, false},
		{&upstream.DialError{Err: context.DeadlineExceeded}, true, false},
		{&upstream.DialError{Err: syscall.EAGAIN}, true, false},
		{&upstream.DialError{Err: syscall.EMFILE}, false, false}, // our own trouble
		{&upstream.DialError{Err: wire.ErrGone}, false, false},
		{&upstream.LostError{Err: io.EOF}, true, false},
		{upstream.ErrTimeout, true, false},
		{&upstream.BodyError{Err: io.EOF}, false, false},
		{context.Canceled, false, false},
		{errors.New("malformed"), false, false},
	} {
		if transport, refused := trouble(test.err); transport != test.transport || refused != test.refused {
			t.Errorf("%v: got %t, %t", test.err, transport, refused)
		}
	}
}

func TestNewInstanceStartsSlowly(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, m := testApp(10, 1, 2)
		share := func(n uint32) float64 {
			hits := 0
			for range 2000 {
				i, err := a.acquire(t.Context(), nil)
				check0(t, err)
				if i.id.N == n {
					hits++
				}
				a.release(i, ordinary)
			}
			return float64(hits) / 2000
		}
		if a.numbered(1).Share() != balance.Whole {
			t.Error("the first ones start slowly")
		}
		change(a, m, 1, 2, 3)
		var shares []float64
		for range 5 {
			shares = append(shares, share(3))
			time.Sleep(SlowStart / 4)
		}
		if !slices.IsSorted(shares[:4]) || shares[0] > 0.1 || shares[4] < 0.25 {
			t.Errorf("of each quarter of %s: %v", SlowStart, shares)
		}
		change(a, m, 4, 5) // others leave as they come
		if a.numbered(4).Share() != balance.Whole {
			t.Error("those that come together start slowly")
		}
		change(a, m, 4, 5, 6)
		change(a, m, 6)
		if share(6) != 1 {
			t.Error("the only one has no requests")
		}
	})
}

// sleeper is an app that sleeps, with room for waiters requests.
func (m *master) sleeper(waiters int) wire.App {
	a := wire.App{PlainHTTP: true, OnDemand: true, Queue: wire.Queue{Waiters: waiters, WaitMS: 60_000}}
	m.app(a)
	return a
}

// burst sends n requests at once and returns a channel of their answers.
func (m *master) burst(n int) chan string {
	client := m.client(false, nil)
	answers := make(chan string, n)
	for range n {
		go func() {
			resp, err := client.Get("http://blog.test/")
			if err != nil {
				answers <- err.Error()
				return
			}
			b, err := io.ReadAll(resp.Body)
			_ = resp.Body.Close()
			answers <- fmt.Sprintf("%d %s %s %v", resp.StatusCode, b, resp.Header.Get("Retry-After"), err)
		}()
	}
	return answers
}

// settled waits until n requests wait.
func (m *master) settled(n int) {
	m.t.Helper()
	for {
		select {
		case tr := <-m.traffic:
			if tr.Apps[0].Waiting == n {
				return
			}
		case <-time.After(patience):
			m.t.Fatalf("never %d waiting", n)
		}
	}
}

func TestBurstOnASleepingApp(t *testing.T) {
	const requests, cap = 1000, 20
	for _, waiters := range []int{100, requests} {
		m := serving(t)
		app := m.sleeper(waiters)
		answers := m.burst(requests)
		expect[*wire.Wake](m)
		counts := make(map[string]int)
		for range requests - waiters {
			counts[<-answers]++
		}
		m.settled(waiters)
		var now, most atomic.Int64
		app.MaxInFlight = cap
		app.Instances = []wire.Upstream{served(t, func(w http.ResponseWriter, _ *http.Request) {
			n := now.Add(1)
			for before := most.Load(); n > before && !most.CompareAndSwap(before, n); before = most.Load() {
			}
			time.Sleep(time.Millisecond)
			now.Add(-1)
			_, _ = io.WriteString(w, "woken")
		})}
		m.app(app) // no message but Applied came: one Wake for them all
		for range waiters {
			counts[<-answers]++
		}
		if counts["200 woken  <nil>"] != waiters || counts["503 App startup queue is full 1 <nil>"] != requests-waiters {
			t.Errorf("with room for %d: %v", waiters, counts)
		}
		if got := most.Load(); got > cap || got < 2 {
			t.Errorf("with room for %d: %d at once", waiters, got)
		}
		t.Logf("%d requests, room for %d: %v, at most %d at once", requests, waiters, counts, most.Load())
	}
}

// What the proxy adds to a cold start: from a request to Wake, and from the
// message with the instance to the request at the app.
func TestColdStartCostsLittle(t *testing.T) {
	const rounds = 30
	most := patience // others run beside
	if os.Getenv("TAKO_SOAK") != "" {
		most = 10 * time.Millisecond
	}
	m := serving(t)
	var own []time.Duration
	var app wire.App
	arrived := make(chan time.Time, 1)
	up := served(t, func(http.ResponseWriter, *http.Request) { arrived <- time.Now() })
	client := m.client(false, nil)
	for range rounds {
		app = m.sleeper(100)
		began := make(chan time.Time, 1)
		done := make(chan error, 1)
		go func() {
			began <- time.Now()
			resp, err := client.Get("http://blog.test/")
			if err == nil {
				_ = resp.Body.Close()
			}
			done <- err
		}()
		expect[*wire.Wake](m)
		asked := time.Since(<-began)
		up.Instance = nextID() // a new process each time, so nothing is connected yet
		app.Instances = []wire.Upstream{up}
		sent := time.Now()
		m.app(app)
		own = append(own, asked+(<-arrived).Sub(sent))
		check0(t, <-done)
		m.app(wire.App{PlainHTTP: true, OnDemand: true})
		expect[*wire.Quiet](m)
	}
	slices.Sort(own)
	t.Logf("the proxy's own part of %d cold starts: median %s, most %s", rounds, own[rounds/2], own[rounds-1])
	if own[rounds/2] > most {
		t.Errorf("the median is %s, want at most %s", own[rounds/2], most)
	}
}

func BenchmarkAcquire(b *testing.B) {
	a, _ := testApp(256, 1, 2, 3)
	b.ReportAllocs()
	for b.Loop() {
		i, err := a.acquire(b.Context(), nil)
		if err != nil {
			b.Fatal(err)
		}
		a.release(i, ordinary)
	}
}
