package proxy

import (
	"context"
	"errors"
	"slices"
	"sync"
)

// errCut is the cause of contexts that ended because the proxy, or the instance,
// is leaving.
var errCut = errors.New("the time for requests or streams is over")

// flights are the requests that are on their way, streams apart, so that a drain
// can wait for them and end them.
type flights struct {
	most int // at once

	mu       sync.Mutex
	requests map[*flight]bool
	streams  map[*flight]*instance
	none     chan struct{} // closed when both are empty, if somebody waits
}

func newFlights(most int) *flights {
	return &flights{most: most, requests: make(map[*flight]bool), streams: make(map[*flight]*instance)}
}

// flight is one request, from its route to its last byte.
type flight struct {
	all    *flights
	app    *app
	conn   *clientConn
	cancel context.CancelCauseFunc
	// detach makes the context outlive the client's sending half: net/http takes
	// its end for the client's. It reports false if that has come already.
	detach func() bool
	// Of the request's own goroutine.
	inst   *instance // counted on it, or nil
	stream bool
}

// begin registers a request, or returns nil if there are too many. The caller
// calls end.
func (f *flights) begin(ctx context.Context, a *app, conn *clientConn) (*flight, context.Context) {
	client := ctx
	ctx, cancel := context.WithCancelCause(context.WithoutCancel(client))
	fl := &flight{all: f, app: a, conn: conn, cancel: cancel}
	f.mu.Lock()
	full := len(f.requests)+len(f.streams) >= f.most
	if !full {
		f.requests[fl] = true
	}
	f.mu.Unlock()
	if full {
		cancel(nil)
		return nil, client
	}
	a.begin()
	fl.detach = context.AfterFunc(client, func() { cancel(context.Cause(client)) })
	return fl, ctx
}

// becomeStream says that the request will last: it is counted apart from now on.
func (fl *flight) becomeStream() {
	if fl.stream {
		return
	}
	fl.stream = true
	fl.all.mu.Lock()
	delete(fl.all.requests, fl)
	fl.all.streams[fl] = fl.inst
	fl.all.mu.Unlock()
	fl.conn.streams.Add(1)
	fl.inst.streams.Add(1)
	fl.app.release(fl.inst)
	if fl.inst.cut.Load() { // too late to be seen by cutOf
		fl.cancel(errCut)
	}
}

// leave takes the request off its instance, which did not get it.
func (fl *flight) leave() {
	fl.app.release(fl.inst)
	fl.inst = nil
}

// end is the end of the request.
func (fl *flight) end() {
	fl.detach()
	fl.cancel(nil)
	if fl.inst != nil {
		fl.inst.finished.Add(1)
	}
	fl.app.end()
	if fl.stream {
		fl.conn.streams.Add(-1)
		fl.inst.streamEnded(fl.app.out)
	} else if fl.inst != nil {
		fl.app.release(fl.inst)
	}
	fl.all.mu.Lock()
	defer fl.all.mu.Unlock()
	delete(fl.all.requests, fl)
	delete(fl.all.streams, fl)
	if fl.all.none != nil && len(fl.all.requests)+len(fl.all.streams) == 0 {
		close(fl.all.none)
		fl.all.none = nil
	}
}

// count returns how many there are of each kind.
func (f *flights) count() (requests, streams int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return len(f.requests), len(f.streams)
}

// cut ends all requests, or all streams, and returns how many they were.
func (f *flights) cut(streams bool) int {
	f.mu.Lock()
	defer f.mu.Unlock()
	if streams {
		for fl := range f.streams {
			fl.cancel(errCut)
		}
		return len(f.streams)
	}
	for fl := range f.requests {
		fl.cancel(errCut)
	}
	return len(f.requests)
}

// cutOf ends the streams of these instances.
func (f *flights) cutOf(instances []*instance) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for fl, i := range f.streams {
		if slices.Contains(instances, i) {
			fl.cancel(errCut)
		}
	}
}

// gone returns a channel that is closed once there is none.
func (f *flights) gone() <-chan struct{} {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.none == nil {
		f.none = make(chan struct{})
	}
	none := f.none
	if len(f.requests)+len(f.streams) == 0 {
		close(f.none)
		f.none = nil
	}
	return none
}
