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
	"tako/internal/proxy/eventloop"
	"tako/internal/tako"
	"tako/internal/wire"
)

// What is used where an App message has no limit of its own.
const (
	DefaultWaiters  = 100
	DefaultWaitTime = 30 * time.Second
	DefaultInFlight = 256
)

// The limits of the queue of an app whose instances all have as many requests as
// they may.
const (
	MaxQueued = 6000 // so that 5,000 busy connections to one app of one instance are no trouble
	QueueTime = 10 * time.Second
	// expiryPause is the least time between two looks for those whose time is over.
	expiryPause = 10 * time.Millisecond
	// UploadPart bounds the requests whose bodies are still being read: they have
	// at most one in so many of an instance's places, and of the queue's, though
	// never none. So those who send slowly leave room for all others, who go past
	// them in the queue.
	UploadPart = 2
)

// uploadPlaces is how many of most places uploads may have.
func uploadPlaces(most int) int { return max(1, most/UploadPart) }

// kind is what a request is to the queue.
type kind int

const (
	ordinary kind = iota // it has no body, or all of it has come
	upload               // its body has still to be read
	kinds
)

// app is one app over all its revisions: its queue, counters and pools outlive
// an App message.
type app struct {
	id  tako.AppID
	out *outbox

	conf atomic.Pointer[appConf] // stored under mu, by the receiver only

	mu        sync.Mutex
	instances map[tako.InstanceID]*instance // those in the newest revision
	leaving   []*instance                   // those no more in it, until nothing is left in flight
	waiting   [kinds][]*waiter              // requests in the queue, the first one first
	turn      uint64                        // of the last one
	expiry    *time.Timer                   // calls expire; nil if none is due
	expires   time.Time                     // when that is
	woken     uint64                        // the revision that Wake was sent for

	queued atomic.Int32 // how many are waiting, stored under mu

	active atomic.Int64 // requests now, waiting ones and streams included
	ended  atomic.Int64 // when the last one ended, in Unix nanoseconds
}

// waiter is a request in the queue. It is not to go to the instance not.
//
// One that parks a task leaves the queue when it is given a grant, is cancelled or
// its time is over, which wakes the task once. The others take themselves out.
type waiter struct {
	app  *app
	not  *instance
	kind kind
	turn uint64     // larger than of those before it, of both kinds
	got  chan grant // has room for one; nil if a task is parked

	task  *eventloop.Task
	until time.Time
	given grant // to the task
}

// give ends the wait of one that has just left the queue.
func (w *waiter) give(g grant) {
	if w.task == nil {
		w.got <- g
		return
	}
	w.given = g
	w.task.Wake()
}

// grant is what a waiter gets: an instance that it is counted on, or an error.
type grant struct {
	inst *instance
	err  error
}

// appConf is one revision of an app. It never changes.
type appConf struct {
	wire.App
	gone           bool
	http1          bool        // an instance speaks HTTP/1
	first, reserve []*instance // the second only if the first is empty
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
		switch u.Protocol {
		case "", wire.ProtocolHTTP1, wire.ProtocolH2C:
		default:
			return fmt.Errorf("instance %s speaks the unknown protocol %q", u.Instance, u.Protocol)
		}
	}
	if m.MaxInFlight < 0 {
		return fmt.Errorf("app %s with %d requests in flight", m.App, m.MaxInFlight)
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
	if conf.MaxInFlight == 0 {
		conf.MaxInFlight = DefaultInFlight
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	before := a.instances
	a.instances = make(map[tako.InstanceID]*instance, len(m.Instances))
	var joining []*instance
	served := false // an instance goes on taking requests
	for _, u := range m.Instances {
		i, known := before[u.Instance]
		if !known {
			i = newInstance(u.Instance, u.Protocol, dial)
		}
		delete(before, u.Instance)
		a.instances[u.Instance] = i
		conf.http1 = conf.http1 || !i.h2c
		i.socket.Store(&u.Socket)
		if !u.Draining && !u.Fallback {
			if !known {
				joining = append(joining, i)
			}
			served = served || known && !i.draining.Load()
		}
		switch {
		case u.Draining && !i.draining.Load():
			i.draining.Store(true)
			i.pool.Retire()
			draining = append(draining, i)
		case !u.Draining && i.draining.Load():
			i.expect(0)
			i.draining.Store(false)
			i.pool.Revive()
		}
		i.cut.Store(u.Draining && u.CutStreams)
		switch {
		case u.Draining:
		case u.Fallback:
			conf.reserve = append(conf.reserve, i)
		default:
			conf.first = append(conf.first, i)
		}
	}
	if served {
		for _, i := range joining {
			i.joined.Store(time.Now().UnixNano())
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
	a.grantLocked()
	return draining
}

// toCut returns the instances whose streams are to end.
func (a *app) toCut() (cut []*instance) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, i := range a.instances {
		if i.cut.Load() {
			cut = append(cut, i)
		}
	}
	return cut
}

// applied asks for a Quiet of each, once nothing is in flight there, and wakes
// the app if requests wait on.
func (a *app) applied(draining []*instance, revision uint64) {
	a.mu.Lock()
	if conf := a.conf.Load(); a.queued.Load() > 0 && conf.asleep() {
		a.wakeLocked(conf)
	}
	a.mu.Unlock()
	for _, i := range draining {
		i.expect(revision)
		i.settle(a.out)
	}
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

// asleep: there is no instance, and one may be asked for.
func (conf *appConf) asleep() bool {
	return conf.OnDemand && conf.refuse() == nil && len(conf.first)+len(conf.reserve) == 0
}

// several: there is more than one instance for requests.
func (conf *appConf) several() bool { return len(conf.first)+len(conf.reserve) > 1 }

// pick chooses an instance other than not. Those that were taken out for their
// errors are used only if there is no other. It returns nil if there is none at
// all, or, with full, if those there are have as many requests, of kind k, as
// they may.
func (conf *appConf) pick(not *instance, k kind) (i *instance, full bool) {
	for _, even := range [...]bool{false, true} {
		for _, from := range [...][]*instance{conf.first, conf.reserve} {
			i, ok := balance.Pick(from, func(i *instance) bool {
				if i == not || !even && i.out() {
					return false
				}
				if i.full(k, conf.MaxInFlight) {
					full = true
					return false
				}
				return true
			}, rand.IntN)
			if ok {
				return i, false
			}
			if full {
				return nil, true
			}
		}
	}
	return nil, false
}

// errNoOther: the only instances there are were tried before.
var errNoOther = errors.New("no other instance")

// none is the error when pick found no instance, nil if the request may wait for
// one to be started.
func (conf *appConf) none(not *instance) error {
	if r := conf.refuse(); r != nil {
		return r
	}
	switch {
	case not != nil:
		return errNoOther
	case !conf.OnDemand:
		return &refusal{status: http.StatusServiceUnavailable, body: "No healthy backend"}
	}
	return nil
}

// try picks an instance other than not, and counts the request on it. It returns
// neither instance nor error if the request has to wait. The error is a *refusal.
func (a *app) try(not *instance, k kind) (*instance, error) {
	for a.queued.Load() == 0 { // those who wait are not to be overtaken
		conf := a.conf.Load()
		if r := conf.refuse(); r != nil {
			return nil, r
		}
		i, _ := conf.pick(not, k)
		if i == nil {
			break
		}
		if i.acquire(k, conf.MaxInFlight, a.out) {
			return i, nil
		}
		if i.draining.Load() {
			a.waitForChange(conf)
		}
	}
	return nil, nil
}

// wait is try for a request that has to wait in the queue: while every instance
// has as many requests as it may, and with no instance if the app is one that
// starts on demand. The error is a *refusal, errNoOther or fl's cause.
func (a *app) wait(fl *flight, not *instance, k kind) (*instance, error) {
	if t := fl.out.Task; t.Attached() {
		return a.park(fl, &waiter{app: a, not: not, kind: k, task: t})
	}
	ctx := fl.Context()
	w := &waiter{app: a, not: not, kind: k, got: make(chan grant, 1)}
	wait, err := a.enqueue(w)
	if err != nil {
		return nil, err
	}
	select {
	case g := <-w.got:
		return g.inst, g.err
	default:
	}
	timer := time.NewTimer(wait)
	defer timer.Stop()
	select {
	case g := <-w.got:
		return g.inst, g.err
	case <-timer.C:
		if g, granted := a.leave(w); granted {
			return g.inst, g.err
		}
		return nil, a.tooLate()
	case <-ctx.Done():
		if g, granted := a.leave(w); granted && g.inst != nil {
			a.release(g.inst, k)
		}
		return nil, context.Cause(ctx)
	}
}

// tooLate is the error for one whose time in the queue is over.
func (a *app) tooLate() error {
	if a.conf.Load().asleep() {
		return errStartTimeout
	}
	return errInstanceQueueFull
}

// park is wait for a task.
func (a *app) park(fl *flight, w *waiter) (*instance, error) {
	if _, err := a.enqueue(w); err != nil {
		return nil, err
	}
	if !fl.Wait(w) {
		w.Cancel(fl.Cause())
	}
	w.task.Park()
	fl.Waited()
	return w.given.inst, w.given.err
}

// Cancel implements upstream.Waiting.
func (w *waiter) Cancel(cause error) {
	w.app.mu.Lock()
	defer w.app.mu.Unlock()
	if w.app.removeLocked(w) {
		w.give(grant{err: cause})
	}
}

// expireLocked sees to it that expire is called then, or before.
func (a *app) expireLocked(then time.Time) {
	if a.expiry != nil && !then.Before(a.expires) {
		return
	}
	if a.expiry != nil {
		a.expiry.Stop() // or it comes once more than is needed
	}
	a.expires = then
	a.expiry = time.AfterFunc(time.Until(then), a.expire)
}

// expire ends the wait of tasks whose time is over.
func (a *app) expire() {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.expiry = nil
	now := time.Now()
	var next time.Time
	for k := range a.waiting {
		a.waiting[k] = slices.DeleteFunc(a.waiting[k], func(w *waiter) bool {
			switch {
			case w.task == nil: // it has a timer
			case !w.until.After(now):
				a.queued.Add(-1)
				w.give(grant{err: a.tooLate()})
				return true
			case next.IsZero() || w.until.Before(next):
				next = w.until
			}
			return false
		})
	}
	if !next.IsZero() {
		a.expireLocked(later(next, now.Add(expiryPause)))
	}
}

func later(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}

// removeLocked takes w out of the queue, and reports false if it was not in it.
func (a *app) removeLocked(w *waiter) bool {
	i := slices.Index(a.waiting[w.kind], w)
	if i < 0 {
		return false
	}
	a.waiting[w.kind] = slices.Delete(a.waiting[w.kind], i, i+1)
	a.queued.Add(-1)
	return true
}

// waitForChange returns once the revision that is being brought in, which has
// marked an instance of conf, is there.
func (a *app) waitForChange(conf *appConf) {
	if a.conf.Load() == conf {
		a.mu.Lock() // change holds it
		defer a.mu.Unlock()
	}
}

// enqueue puts a request at the end of the queue, says how long it may wait, and
// wakes the app if it sleeps. The request may have been granted when it returns.
func (a *app) enqueue(w *waiter) (time.Duration, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	conf := a.conf.Load()
	if i, full := conf.pick(w.not, w.kind); i == nil && !full {
		if err := conf.none(w.not); err != nil {
			return 0, err
		}
	}
	wait, most, refused := QueueTime, MaxQueued, errInstanceQueueFull
	asleep := conf.asleep()
	if asleep {
		wait, most, refused = time.Duration(conf.Queue.WaitMS)*time.Millisecond, conf.Queue.Waiters, errStartQueueFull
	}
	if int(a.queued.Load()) >= most || w.kind == upload && len(a.waiting[upload]) >= uploadPlaces(most) {
		return 0, refused
	}
	a.turn++
	w.turn = a.turn
	a.waiting[w.kind] = append(a.waiting[w.kind], w)
	a.queued.Add(1)
	if w.task != nil {
		w.until = time.Now().Add(wait)
		a.expireLocked(w.until)
	}
	if asleep {
		a.wakeLocked(conf)
	} else {
		a.grantLocked() // one that ended just now did not see w yet
	}
	return wait, nil
}

// grantLocked gives instances to those in the queue, in their order, as long as
// there is room, and answers those that wait in vain.
func (a *app) grantLocked() {
	if a.queued.Load() == 0 {
		return
	}
	conf := a.conf.Load()
	if !a.grantFirstLocked(conf) {
		return
	}
	rest := a.waiting // not yet looked at
	var kept [kinds]int
	keep := func(k kind, ws ...*waiter) { kept[k] += copy(a.waiting[k][kept[k]:], ws) }
	for len(rest[ordinary])+len(rest[upload]) > 0 {
		k := ordinary
		if len(rest[k]) == 0 || len(rest[upload]) > 0 && rest[upload][0].turn < rest[k][0].turn {
			k = upload
		}
		w := rest[k][0]
		rest[k] = rest[k][1:]
		if g, done := conf.grant(w.not, k, a.out); done {
			w.give(g)
			continue
		}
		keep(k, w)
		if w.not != nil {
			continue // those behind it may have one
		}
		keep(upload, rest[upload]...)
		rest[upload] = nil
		if k == ordinary {
			keep(ordinary, rest[ordinary]...)
			rest[ordinary] = nil
		}
	}
	for k, n := range kept {
		clear(a.waiting[k][n:])
		a.waiting[k] = a.waiting[k][:n]
	}
	a.queued.Store(int32(kept[ordinary] + kept[upload]))
}

// grantFirstLocked is grantLocked as far as it has only to do with those in
// front, which costs the same however long the queue is. It reports whether one
// of them, with an exception, has to be passed by.
func (a *app) grantFirstLocked(conf *appConf) (more bool) {
	uploads := true // may have a place
	for {
		k := ordinary
		if o, u := a.waiting[ordinary], a.waiting[upload]; uploads && len(u) > 0 && (len(o) == 0 || u[0].turn < o[0].turn) {
			k = upload
		} else if len(o) == 0 {
			return false
		}
		w := a.waiting[k][0]
		g, done := conf.grant(w.not, k, a.out)
		switch {
		case done:
			a.waiting[k][0] = nil
			a.waiting[k] = a.waiting[k][1:]
			a.queued.Add(-1)
			w.give(g)
		case w.not != nil:
			return true
		case k == ordinary:
			return false // then there is none for uploads either
		default:
			uploads = false
		}
	}
}

// grant is what a waiter gets now, or false if it has to wait on. The caller
// holds mu of the app, so no instance of conf begins to drain.
func (conf *appConf) grant(not *instance, k kind, out *outbox) (grant, bool) {
	if r := conf.refuse(); r != nil {
		return grant{err: r}, true
	}
	for {
		i, full := conf.pick(not, k)
		switch {
		case i != nil && i.acquire(k, conf.MaxInFlight, out):
			return grant{inst: i}, true
		case i != nil: // filled up meanwhile
		case full:
			return grant{}, false
		default:
			err := conf.none(not)
			return grant{err: err}, err != nil
		}
	}
}

// wakeLocked asks for an instance, once for each revision.
func (a *app) wakeLocked(conf *appConf) {
	if a.woken != conf.Revision {
		a.woken = conf.Revision
		a.out.push(&wire.Wake{App: a.id})
	}
}

// leave takes a request out of the queue, or returns what it was granted.
func (a *app) leave(w *waiter) (grant, bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if !a.removeLocked(w) {
		return <-w.got, true
	}
	return grant{}, false
}

// release takes a request off the count of an instance, which makes room for one
// that waits.
func (a *app) release(i *instance, k kind) {
	i.release(k, a.out)
	a.grant()
}

// uploaded makes an upload on an instance an ordinary request.
func (a *app) uploaded(i *instance) {
	i.uploads.Add(-1)
	a.grant()
}

// grant looks whether those that wait can have an instance now.
func (a *app) grant() {
	if a.queued.Load() > 0 {
		a.mu.Lock()
		defer a.mu.Unlock()
		a.grantLocked()
	}
}

// begin and end count a request of the app, whatever becomes of it.
func (a *app) begin() { a.active.Add(1) }

func (a *app) end(now time.Time) {
	a.ended.Store(now.UnixNano())
	a.active.Add(-1)
}

// traffic is what is to be told of the app now. It forgets instances that have
// left and closes connections that are idle for too long.
func (a *app) traffic(now time.Time) wire.AppTraffic {
	a.mu.Lock()
	defer a.mu.Unlock()
	t := wire.AppTraffic{App: a.id, Waiting: int(a.queued.Load())}
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
		return i.over()
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
