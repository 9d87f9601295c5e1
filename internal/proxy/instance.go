package proxy

import (
	"context"
	"errors"
	"net"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"tako/internal/proxy/balance"
	"tako/internal/proxy/upstream"
	"tako/internal/tako"
	"tako/internal/wire"
)

// The limits that keep requests away from an instance that does not answer.
const (
	// EjectAfter is how many transport errors in a row take an instance out, for
	// EjectFirst at first and twice as long each time, up to EjectMost. A refused
	// connection does so at once. An answer of any kind forgets it all.
	EjectAfter = 3
	EjectFirst = time.Second
	EjectMost  = 10 * time.Second
	// SlowStart is how long an instance that joins others takes less than its part
	// of the requests, LeastShare of balance.Whole at first.
	SlowStart  = 10 * time.Second
	LeastShare = balance.Whole / 10
	// UnreachableEvery is how often at most the master is told of one instance that
	// cannot be connected to.
	UnreachableEvery = time.Second
	// redialFirst and redialMost are the pauses between looks at a Unix socket
	// whose queue of connections is full.
	redialFirst = time.Millisecond
	redialMost  = 20 * time.Millisecond
)

// instance is an upstream over all revisions of its app.
//
// A request is counted before it looks whether the instance drains, and the
// instance is marked as draining before its count is looked at; so one of the
// two always sees the other.
type instance struct {
	id     tako.InstanceID
	h2c    bool // it speaks HTTP/2
	pool   pool
	socket atomic.Pointer[string]
	joined atomic.Int64 // when it joined others, in Unix nanoseconds; 0: it is not new

	draining atomic.Bool
	cut      atomic.Bool // its streams are to end
	requests atomic.Int64
	uploads  atomic.Int64 // those of requests whose bodies are still being read
	streams  atomic.Int64
	finished atomic.Uint64
	told     atomic.Int64 // when Unreachable was sent last

	failures atomic.Int32 // transport errors in a row
	ejected  atomic.Int32 // how often since the last answer
	outUntil atomic.Int64 // in Unix nanoseconds, 0 for not at all

	mu    sync.Mutex // under app.mu, over outbox.mu
	quiet uint64     // guarded by mu: the revision to send Quiet for; 0 for none
	said  int        // guarded by mu: the streams in the last Quiet for it; -1 for none yet
}

// pool is the way to an instance: an upstream.Pool or upstream.H2CPool.
type pool interface {
	RoundTrip(c *upstream.Cancel, r *upstream.Outgoing) (*upstream.Incoming, error)
	Sweep(now time.Time)
	Retire()
	Revive()
}

func newInstance(id tako.InstanceID, protocol wire.Protocol, dial dialTCP) *instance {
	i := &instance{id: id, h2c: protocol == wire.ProtocolH2C}
	connect := func(ctx context.Context) (net.Conn, error) {
		if socket := *i.socket.Load(); socket != "" {
			return dialUnix(ctx, socket)
		}
		return dial(ctx, id)
	}
	if i.h2c {
		i.pool = upstream.NewH2CPool(connect)
	} else {
		i.pool = upstream.NewPool(connect)
	}
	return i
}

// dialUnix connects to a Unix socket. A full queue there is an error at once, as
// it never is on TCP: it asks again until ctx ends.
func dialUnix(ctx context.Context, socket string) (net.Conn, error) {
	for pause := redialFirst; ; pause = min(2*pause, redialMost) {
		c, err := new(net.Dialer).DialContext(ctx, "unix", socket)
		if !errors.Is(err, syscall.EAGAIN) {
			return c, err
		}
		timer := time.NewTimer(pause)
		select {
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			return nil, err
		}
	}
}

// InFlight is for package balance.
func (i *instance) InFlight() int64 { return i.requests.Load() + i.streams.Load() }

// Share is for package balance.
func (i *instance) Share() int {
	joined := i.joined.Load()
	if joined == 0 {
		return balance.Whole
	}
	age := time.Now().UnixNano() - joined
	if age < 0 || age >= int64(SlowStart) {
		i.joined.Store(0)
		return balance.Whole
	}
	return max(LeastShare, int(age*balance.Whole/int64(SlowStart)))
}

// full: it has as many requests as most, or as many uploads as it may, if one is
// to be counted.
func (i *instance) full(k kind, most int) bool {
	return i.requests.Load() >= int64(most) || k == upload && i.uploads.Load() >= int64(uploadPlaces(most))
}

// acquire counts a request, or returns false if the instance takes no more: it is
// full, or drains.
func (i *instance) acquire(k kind, most int, out *outbox) bool {
	if k == upload && !countUpTo(&i.uploads, uploadPlaces(most)) {
		return false
	}
	if !countUpTo(&i.requests, most) {
		if k == upload {
			i.uploads.Add(-1)
		}
		return false
	}
	if !i.draining.Load() {
		return true
	}
	i.release(k, out)
	return false
}

// countUpTo adds one, if that is no more than most.
func countUpTo(count *atomic.Int64, most int) bool {
	for {
		n := count.Load()
		if n >= int64(most) {
			return false
		}
		if count.CompareAndSwap(n, n+1) {
			return true
		}
	}
}

// release takes a request off the count.
func (i *instance) release(k kind, out *outbox) {
	if k == upload {
		i.uploads.Add(-1)
	}
	if i.requests.Add(-1) == 0 {
		i.settle(out)
	}
}

// streamEnded takes a stream off the count.
func (i *instance) streamEnded(out *outbox) {
	if i.streams.Add(-1) == 0 {
		i.settle(out)
	}
}

// settle sends Quiet if it is due, and once more when the last stream has ended.
// Something of the instance was just ended, or it was just set to drain.
func (i *instance) settle(out *outbox) {
	if i.requests.Load() != 0 || !i.draining.Load() {
		return
	}
	i.mu.Lock()
	defer i.mu.Unlock()
	streams := int(i.streams.Load())
	if i.quiet == 0 || i.said >= 0 && (streams > 0 || i.said == 0) {
		return
	}
	i.said = streams
	out.push(&wire.Quiet{Instance: i.id, Revision: i.quiet, Streams: streams})
}

// expect asks for a Quiet; revision 0 for none.
func (i *instance) expect(revision uint64) {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.quiet, i.said = revision, -1
}

// over: nothing is in flight, and nothing more to be said of it.
func (i *instance) over() bool {
	i.mu.Lock()
	defer i.mu.Unlock()
	return i.InFlight() == 0 && (i.quiet == 0 || i.said == 0)
}

// unreachable tells the master that a connection was refused.
func (i *instance) unreachable(out *outbox, now time.Time) {
	last := i.told.Load()
	if now.UnixNano()-last >= int64(UnreachableEvery) && i.told.CompareAndSwap(last, now.UnixNano()) {
		out.push(&wire.Unreachable{Instance: i.id})
	}
}

// out: requests are to go elsewhere, if they can.
func (i *instance) out() bool {
	until := i.outUntil.Load()
	return until != 0 && time.Now().UnixNano() < until
}

// answered: the instance gave an answer.
func (i *instance) answered() {
	if i.failures.Load() != 0 {
		i.failures.Store(0)
		i.ejected.Store(0)
		i.outUntil.Store(0)
	}
}

// failed counts a transport error. Refused: nobody listens there.
func (i *instance) failed(refused bool, now time.Time) {
	if n := i.failures.Add(1); n < EjectAfter && !refused {
		return
	}
	until := i.outUntil.Load()
	if now.UnixNano() < until {
		return // those that were in flight meanwhile make it no worse
	}
	pause := EjectMost
	if n := i.ejected.Load(); n < 8 {
		pause = min(EjectMost, EjectFirst<<n)
	}
	if i.outUntil.CompareAndSwap(until, now.Add(pause).UnixNano()) {
		i.ejected.Add(1)
	}
}

// trouble judges the error of an exchange: whether it is of the transport, and
// whether the instance refused a connection.
func trouble(err error) (transport, refused bool) {
	if dialling, is := errors.AsType[*upstream.DialError](err); is {
		if e, is := errors.AsType[*tako.Error](dialling.Err); is { // the dialler's word
			return e.Code != tako.CodeBusy, e.Code != tako.CodeBusy
		}
		refused = errors.Is(err, syscall.ECONNREFUSED) || errors.Is(err, syscall.ENOENT)
		return refused || errors.Is(err, context.DeadlineExceeded) || errors.Is(err, syscall.EAGAIN), refused
	}
	_, lost := errors.AsType[*upstream.LostError](err)
	return lost || errors.Is(err, upstream.ErrTimeout), false
}
