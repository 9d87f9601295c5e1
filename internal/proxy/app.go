package proxy

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/http"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"tako/internal/proxy/balance"
	"tako/internal/proxy/upstream"
	"tako/internal/tako"
	"tako/internal/wire"
)

// What is used where an App message has no limit of its own.
const (
	DefaultWaiters  = 100
	DefaultWaitTime = 30 * time.Second
)

// UnreachableEvery is how often at most the master is told of one instance that
// cannot be connected to.
const UnreachableEvery = time.Second

// app is one app over all its revisions: its queue, counters and pools outlive
// an App message.
type app struct {
	id  tako.AppID
	out *outbox

	conf atomic.Pointer[appConf] // stored under mu, by the receiver only

	mu        sync.Mutex
	instances map[tako.InstanceID]*instance // those in the newest revision
	leaving   []*instance                   // those no more in it, until nothing is left in flight
	waiting   []chan struct{}               // requests in the queue, the first one first
	woken     uint64                        // the revision that Wake was sent for

	active atomic.Int64 // requests now, waiting ones and streams included
	ended  atomic.Int64 // when the last one ended, in Unix nanoseconds
}

// appConf is one revision of an app. It never changes.
type appConf struct {
	wire.App
	gone           bool
	first, reserve []*instance // the second only if the first is empty
}

// instance is an upstream over all revisions of its app.
//
// A request is counted before it looks whether the instance drains, and the
// instance is marked as draining before its count is looked at; so one of the
// two always sees the other.
type instance struct {
	id     tako.InstanceID
	pool   *upstream.Pool
	socket atomic.Pointer[string]

	draining atomic.Bool
	requests atomic.Int64
	streams  atomic.Int64
	finished atomic.Uint64
	quiet    atomic.Uint64 // the revision to send Quiet for; 0 for none
	told     atomic.Int64  // when Unreachable was sent last
}

// InFlight is for package balance.
func (i *instance) InFlight() int64 { return i.requests.Load() + i.streams.Load() }

// acquire counts a request, or returns false if the instance takes no more.
func (i *instance) acquire(out *outbox) bool {
	i.requests.Add(1)
	if !i.draining.Load() {
		return true
	}
	i.release(out)
	return false
}

// release takes a request off the count.
func (i *instance) release(out *outbox) {
	if i.requests.Add(-1) == 0 {
		i.settle(out)
	}
}

// settle sends Quiet if it is due. Something of the instance was just ended, or
// it was just set to drain.
func (i *instance) settle(out *outbox) {
	if i.requests.Load() != 0 || !i.draining.Load() {
		return
	}
	if revision := i.quiet.Swap(0); revision != 0 {
		out.push(&wire.Quiet{Instance: i.id, Revision: revision, Streams: int(i.streams.Load())})
	}
}

// unreachable tells the master that a connection was refused.
func (i *instance) unreachable(out *outbox, now time.Time) {
	last := i.told.Load()
	if now.UnixNano()-last >= int64(UnreachableEvery) && i.told.CompareAndSwap(last, now.UnixNano()) {
		out.push(&wire.Unreachable{Instance: i.id})
	}
}

func newApp(id tako.AppID, out *outbox) *app {
	a := &app{id: id, out: out, instances: make(map[tako.InstanceID]*instance)}
	a.ended.Store(time.Now().UnixNano())
	return a
}

// dialTCP connects to an instance that listens on TCP.
type dialTCP func(ctx context.Context, id tako.InstanceID) (net.Conn, error)

// check says what is wrong with a message about an app, if anything is.
func check(m *wire.App) error {
	if _, err := tako.ParseAppID(string(m.App)); err != nil {
		return err
	}
	seen := make(map[tako.InstanceID]bool)
	for _, u := range m.Instances {
		if u.Instance.App != m.App || seen[u.Instance] {
			return fmt.Errorf("instance %s is not one of app %s, or there twice", u.Instance, m.App)
		}
		seen[u.Instance] = true
	}
	switch m.Trouble.Kind {
	case wire.TroubleNone, wire.TroubleStartFailed, wire.TroubleStopped, wire.TroubleCrashLoop:
	default:
		return fmt.Errorf("app %s has an unknown trouble %q", m.App, m.Trouble.Kind)
	}
	return nil
}

// change brings in a revision. The caller sends Applied and then calls applied
// with what it returns: the instances that take no more requests since now.
func (a *app) change(m *wire.App, gone bool, dial dialTCP) (draining []*instance) {
	conf := &appConf{App: *m, gone: gone}
	if conf.Queue.Waiters <= 0 {
		conf.Queue.Waiters = DefaultWaiters
	}
	if conf.Queue.WaitMS <= 0 {
		conf.Queue.WaitMS = int(DefaultWaitTime / time.Millisecond)
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	before := a.instances
	a.instances = make(map[tako.InstanceID]*instance, len(m.Instances))
	for _, u := range m.Instances {
		i := before[u.Instance]
		if i == nil {
			i = newInstance(u.Instance, dial)
		}
		delete(before, u.Instance)
		a.instances[u.Instance] = i
		i.socket.Store(&u.Socket)
		switch {
		case u.Draining && !i.draining.Load():
			i.draining.Store(true)
			i.pool.Retire()
			draining = append(draining, i)
		case !u.Draining && i.draining.Load():
			i.quiet.Store(0)
			i.draining.Store(false)
			i.pool.Revive()
		}
		switch {
		case u.Draining:
		case u.Fallback:
			conf.reserve = append(conf.reserve, i)
		default:
			conf.first = append(conf.first, i)
		}
	}
	for _, i := range before {
		a.leaving = append(a.leaving, i)
		if !i.draining.Load() {
			i.draining.Store(true)
			i.pool.Retire()
			draining = append(draining, i)
		}
	}
	a.conf.Store(conf)
	if len(a.waiting) == 0 {
		return draining
	}
	if conf.OnDemand && conf.refuse() == nil && len(conf.first)+len(conf.reserve) == 0 {
		return draining // they wait on
	}
	for _, w := range a.waiting {
		close(w)
	}
	a.waiting = nil
	return draining
}

// applied asks for a Quiet of each, once nothing is in flight there, and wakes
// the app if requests wait on.
func (a *app) applied(draining []*instance, revision uint64) {
	a.mu.Lock()
	if len(a.waiting) > 0 {
		a.wakeLocked(a.conf.Load())
	}
	a.mu.Unlock()
	for _, i := range draining {
		i.quiet.Store(revision)
		i.settle(a.out)
	}
}

func newInstance(id tako.InstanceID, dial dialTCP) *instance {
	i := &instance{id: id}
	i.pool = upstream.NewPool(func(ctx context.Context) (net.Conn, error) {
		if socket := *i.socket.Load(); socket != "" {
			return new(net.Dialer).DialContext(ctx, "unix", socket)
		}
		return dial(ctx, id)
	})
	return i
}

// refusal is an answer without an instance.
type refusal struct {
	status      int
	body        string
	retryAfterS int
}

func (r *refusal) Error() string { return r.body }

// The answers that need no instance. Their texts are part of what users know.
var (
	errNoRoute           = &refusal{status: http.StatusNotFound, body: "Not Found"}
	errStartQueueFull    = &refusal{status: http.StatusServiceUnavailable, body: "App startup queue is full", retryAfterS: 1}
	errStartTimeout      = &refusal{status: http.StatusGatewayTimeout, body: "App startup timed out"}
	errInstanceQueueFull = &refusal{status: http.StatusServiceUnavailable, body: "Instance queue is full", retryAfterS: 1}
)

// refuse is the answer when conf has no instance to give, nil if the request may
// wait for one.
func (conf *appConf) refuse() *refusal {
	switch {
	case conf.gone:
		return errNoRoute
	case conf.Trouble.Kind == wire.TroubleStartFailed:
		return &refusal{http.StatusBadGateway, "App failed to start", conf.Trouble.RetryAfterS}
	case conf.Trouble.Kind != wire.TroubleNone:
		return &refusal{http.StatusServiceUnavailable, "No healthy backend", conf.Trouble.RetryAfterS}
	}
	return nil
}

// errNoOther: the only instances there are were tried before.
var errNoOther = errors.New("no other instance")

// acquire picks an instance other than not, and counts the request on it. With
// none it waits in the queue, if the app is one that starts on demand. The error
// is a *refusal, errNoOther or ctx's.
func (a *app) acquire(ctx context.Context, not *instance) (*instance, error) {
	var late <-chan time.Time
	for {
		conf := a.conf.Load()
		if r := conf.refuse(); r != nil {
			return nil, r
		}
		if i, ok := balance.Pick(conf.first, conf.reserve, not, rand.IntN); ok {
			if i.acquire(a.out) {
				return i, nil
			}
			a.waitForChange(conf)
			continue
		}
		switch {
		case not != nil:
			return nil, errNoOther
		case !conf.OnDemand:
			return nil, &refusal{status: http.StatusServiceUnavailable, body: "No healthy backend"}
		}
		turn, err := a.enqueue(conf)
		if err != nil {
			return nil, err
		}
		if turn == nil {
			continue // another revision came meanwhile
		}
		if late == nil {
			timer := time.NewTimer(time.Duration(conf.Queue.WaitMS) * time.Millisecond)
			defer timer.Stop()
			late = timer.C
		}
		select {
		case <-turn:
		case <-late:
			a.leave(turn)
			return nil, errStartTimeout
		case <-ctx.Done():
			a.leave(turn)
			return nil, context.Cause(ctx)
		}
	}
}

// waitForChange returns once the revision that is being brought in, which has
// marked an instance of conf, is there.
func (a *app) waitForChange(conf *appConf) {
	if a.conf.Load() == conf {
		a.mu.Lock() // change holds it
		defer a.mu.Unlock()
	}
}

// enqueue puts a request at the end of the queue and wakes the app. It returns
// nil if conf is not the newest revision any more.
func (a *app) enqueue(conf *appConf) (chan struct{}, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.conf.Load() != conf {
		return nil, nil
	}
	if len(a.waiting) >= conf.Queue.Waiters {
		return nil, errStartQueueFull
	}
	turn := make(chan struct{})
	a.waiting = append(a.waiting, turn)
	a.wakeLocked(conf)
	return turn, nil
}

// wakeLocked asks for an instance, once for each revision.
func (a *app) wakeLocked(conf *appConf) {
	if a.woken != conf.Revision {
		a.woken = conf.Revision
		a.out.push(&wire.Wake{App: a.id})
	}
}

// leave takes a request out of the queue.
func (a *app) leave(turn chan struct{}) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if i := slices.Index(a.waiting, turn); i >= 0 {
		a.waiting = slices.Delete(a.waiting, i, i+1)
	}
}

// begin and end count a request of the app, whatever becomes of it.
func (a *app) begin() { a.active.Add(1) }

func (a *app) end() {
	a.ended.Store(time.Now().UnixNano())
	a.active.Add(-1)
}

// traffic is what is to be told of the app now. It forgets instances that have
// left and closes connections that are idle for too long.
func (a *app) traffic(now time.Time) wire.AppTraffic {
	a.mu.Lock()
	defer a.mu.Unlock()
	t := wire.AppTraffic{App: a.id, Waiting: len(a.waiting)}
	if a.active.Load() == 0 {
		t.IdleMS = max(0, now.UnixNano()-a.ended.Load()) / int64(time.Millisecond)
	}
	add := func(i *instance) {
		i.pool.Sweep(now)
		t.Instances = append(t.Instances, wire.InstanceTraffic{
			Instance: i.id, Requests: i.finished.Load(),
			InFlight: int(i.requests.Load()), Streams: int(i.streams.Load()),
		})
	}
	for _, i := range a.instances {
		add(i)
	}
	a.leaving = slices.DeleteFunc(a.leaving, func(i *instance) bool {
		add(i)
		return i.InFlight() == 0 && i.quiet.Load() == 0
	})
	slices.SortFunc(t.Instances, func(x, y wire.InstanceTraffic) int { return int(x.Instance.N) - int(y.Instance.N) })
	return t
}

// over: the app is gone and nothing of it is left.
func (a *app) over() bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.conf.Load().gone && len(a.leaving) == 0 && a.active.Load() == 0
}

// close closes what idle connections there are, and keeps no more.
func (a *app) close() {
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, i := range a.instances {
		i.pool.Retire()
	}
}
