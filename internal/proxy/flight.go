package proxy

import (
	"errors"
	"slices"
	"sync"
	"sync/atomic"

	"tako/internal/proxy/eventloop"
	"tako/internal/proxy/message"
	"tako/internal/proxy/upstream"
)

// The causes for which a request is ended before its time.
var (
	// errCut: the proxy, or the instance, is leaving.
	errCut = errors.New("the time for requests or streams is over")
	// errClientGone: nobody is there to read an answer.
	errClientGone = errors.New("the client has gone")
)

// flightShards is in how many lists requests are kept, so that processors seldom
// meet at one lock.
const flightShards = 16

// flights are the requests that are on their way, streams apart, so that a drain
// can wait for them and end them.
type flights struct {
	most int // at once

	requests, streams atomic.Int64
	shards            [flightShards]flightShard

	mu   sync.Mutex
	none chan struct{} // guarded by mu: closed when there is none, if somebody waits
	wait atomic.Bool   // none is set
}

// flightShard is a list in a ring.
type flightShard struct {
	mu   sync.Mutex
	root flight
	_    [64]byte // its own cache line
}

func newFlights(most int) *flights {
	f := &flights{most: most}
	for i := range f.shards {
		root := &f.shards[i].root
		root.prev, root.next = root, root
	}
	return f
}

// flight is one request, from its route to its last byte. Its Cancel is
// anybody's.
type flight struct {
	upstream.Cancel
	all        *flights
	shard      *flightShard
	prev, next *flight // guarded by the shard's mu
	lasts      bool    // guarded by the shard's mu: it is counted as a stream

	// Of the request's own goroutine.
	app    *app
	x      message.Exchange
	inst   *instance // counted on it, or nil
	stream bool
	// cutOf has to know the instance of a stream.
	streamOf *instance // guarded by the shard's mu

	out  upstream.Outgoing
	text []byte // room for values of out.Fields
	body requestBody
	// uploading: it is counted as an upload on inst. What reads the body takes it
	// back, too.
	uploading atomic.Bool
	tell      func(status int, fields []message.Field) // inform
}

var flightPool = sync.Pool{New: func() any {
	fl := new(flight)
	fl.tell = fl.inform
	return fl
}}

// begin registers a request, or returns nil if there are too many. The caller
// calls end.
func (f *flights) begin(a *app, x message.Exchange) *flight {
	if f.requests.Add(1)+f.streams.Load() > int64(f.most) {
		f.left(&f.requests)
		return nil
	}
	fl := flightPool.Get().(*flight)
	fl.all, fl.app, fl.x = f, a, x
	if on, ok := x.(interface{ Task() *eventloop.Task }); ok {
		fl.out.Task = on.Task()
	}
	fl.shard = &f.shards[x.Client().Connection%flightShards]
	fl.shard.mu.Lock()
	root := &fl.shard.root
	fl.prev, fl.next = root.prev, root
	root.prev.next, root.prev = fl, fl
	fl.shard.mu.Unlock()
	a.begin()
	x.Watch(fl)
	return fl
}

// ClientGone ends the request.
func (fl *flight) ClientGone() { fl.Do(errClientGone) }

// becomeStream says that the request will last: it is counted apart from now on.
func (fl *flight) becomeStream() {
	if fl.stream {
		return
	}
	fl.stream = true
	fl.all.streams.Add(1)
	fl.shard.mu.Lock()
	fl.lasts, fl.streamOf = true, fl.inst
	fl.shard.mu.Unlock()
	fl.all.left(&fl.all.requests)
	fl.x.Lasts()
	fl.inst.streams.Add(1)
	fl.release()
	if fl.inst.cut.Load() { // too late to be seen by cutOf
		fl.Do(errCut)
	}
}

// leave takes the request off its instance, which did not get it.
func (fl *flight) leave() {
	fl.release()
	fl.inst = nil
}

// release takes the request off the count of its instance.
func (fl *flight) release() {
	k := ordinary
	if fl.uploading.Swap(false) {
		k = upload
	}
	fl.app.release(fl.inst, k)
}

// uploaded says that all of the request's body has come.
func (fl *flight) uploaded() {
	if fl.uploading.Swap(false) {
		fl.app.uploaded(fl.inst)
	}
}

// end is the end of the request. Nothing of the flight is used after it.
func (fl *flight) end() {
	fl.x.Watch(nil)
	f := fl.all
	fl.shard.mu.Lock()
	fl.prev.next, fl.next.prev = fl.next, fl.prev
	fl.shard.mu.Unlock()
	if fl.inst != nil {
		fl.inst.finished.Add(1)
	}
	fl.app.end(fl.out.Task.Now())
	count := &f.requests
	if fl.stream {
		count = &f.streams
		fl.inst.streamEnded(fl.app.out)
	} else if fl.inst != nil {
		fl.release()
	}
	fl.body.close()
	clear(fl.out.Fields)
	fl.out.Clear()
	fl.Reset()
	fl.all, fl.shard, fl.prev, fl.next, fl.lasts, fl.streamOf = nil, nil, nil, nil, false, nil
	fl.app, fl.x, fl.inst, fl.stream = nil, nil, nil, false
	fl.text = fl.text[:0]
	flightPool.Put(fl)
	f.left(count)
}

// left takes one off a count, and tells those who wait for none.
func (f *flights) left(count *atomic.Int64) {
	count.Add(-1)
	if !f.wait.Load() || f.requests.Load()+f.streams.Load() > 0 {
		return
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.none != nil && f.requests.Load()+f.streams.Load() == 0 {
		close(f.none)
		f.none = nil
		f.wait.Store(false)
	}
}

// count returns how many there are of each kind.
func (f *flights) count() (requests, streams int) {
	return int(f.requests.Load()), int(f.streams.Load())
}

// cut ends all requests, or all streams, and returns how many they were.
func (f *flights) cut(streams bool) (n int) {
	f.each(func(fl *flight) {
		if fl.lasts == streams {
			fl.Do(errCut)
			n++
		}
	})
	return n
}

// cutOf ends the streams of these instances.
func (f *flights) cutOf(instances []*instance) {
	f.each(func(fl *flight) {
		if fl.lasts && slices.Contains(instances, fl.streamOf) {
			fl.Do(errCut)
		}
	})
}

// each calls do with every one, under its lock.
func (f *flights) each(do func(*flight)) {
	for i := range f.shards {
		s := &f.shards[i]
		s.mu.Lock()
		for fl := s.root.next; fl != &s.root; fl = fl.next {
			do(fl)
		}
		s.mu.Unlock()
	}
}

// gone returns a channel that is closed once there is none.
func (f *flights) gone() <-chan struct{} {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.none == nil {
		f.none = make(chan struct{})
		f.wait.Store(true)
	}
	none := f.none
	if f.requests.Load()+f.streams.Load() == 0 {
		close(f.none)
		f.none = nil
		f.wait.Store(false)
	}
	return none
}
