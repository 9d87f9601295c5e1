package proxy

import (
	"context"
	"errors"
	"io"
	"maps"
	"net/http"
	"os"
	"runtime/debug"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/go-hclog"
	"golang.org/x/net/http/httpguts"

	"tako/internal/proxy/upstream"
)

// The limits of a request on the client's side, beside those of the front.
const (
	// BodyTime bounds each wait for a piece of a request's body.
	BodyTime = 60 * time.Second
	// ReplyTime bounds each write to a client that does not read, on HTTP/1.1.
	ReplyTime = 60 * time.Second
	// LingerTime and MaxLinger bound what is read, and thrown away, of a body that
	// nobody wanted, so that the client gets to read its answer.
	LingerTime = 500 * time.Millisecond
	MaxLinger  = 256 << 10
	// MaxTries bounds the instances that are tried for one request.
	MaxTries = 3

	challengePrefix = "/.well-known/acme-challenge/"
	deadlineSlack   = 5 * time.Second // how late a write deadline may be renewed
	replyBuffer     = 32 << 10
)

// handler answers requests by what state says at the moment.
type handler struct {
	state    *atomic.Pointer[state]
	flights  *flights
	draining atomic.Bool
	log      hclog.Logger
}

// answer is a whole answer of our own.
func answer(w http.ResponseWriter, r *http.Request, status int, body string) {
	h := w.Header()
	h.Set("Content-Type", "text/plain")
	h.Set("Content-Length", strconv.Itoa(len(body)))
	if status >= 500 {
		h.Set("Cache-Control", "no-store")
	}
	if r.ProtoMajor == 1 && r.ContentLength != 0 { // nobody will read its body
		h.Set("Connection", "close")
		_ = http.NewResponseController(w).SetReadDeadline(time.Now().Add(LingerTime))
	}
	renew(w, r)
	w.WriteHeader(status)
	if r.Method != http.MethodHead {
		_, _ = io.WriteString(w, body) // a client that has gone needs no answer
	}
}

// renew gives the next writes to the client ReplyTime. HTTP/2 has a limit for
// each connection instead, since a stream's would run while nothing is written.
func renew(w http.ResponseWriter, r *http.Request) {
	if r.ProtoMajor == 1 {
		_ = http.NewResponseController(w).SetWriteDeadline(time.Now().Add(ReplyTime))
	}
}

// ServeHTTP answers one request.
func (h *handler) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	defer func() {
		if p := recover(); p != nil {
			if p != http.ErrAbortHandler { //nolint:errorlint // the value itself
				h.log.Error("panic while answering a request; please report it", "panic", p, "stack", string(debug.Stack()))
			}
			panic(http.ErrAbortHandler)
		}
	}()
	// A request with both Content-Length and Transfer-Encoding cannot be told from
	// one with the latter alone here: after either, nothing more is read as a
	// request of this connection.
	if h.draining.Load() || r.ProtoMajor == 1 && len(r.TransferEncoding) > 0 {
		w.Header().Set("Connection", "close")
	}
	name, ok := splitHost(r.Host)
	if hosts := r.Header["Host"]; !ok || len(hosts) > 0 && (len(hosts) > 1 || !strings.EqualFold(hosts[0], r.Host)) {
		answer(w, r, http.StatusBadRequest, "Bad Request")
		return
	}
	if r.Method == http.MethodConnect {
		answer(w, r, http.StatusMethodNotAllowed, "Method Not Allowed")
		return
	}
	st := h.state.Load()
	target := target(r)
	path, _, _ := strings.Cut(target, "?")
	if token, ok := strings.CutPrefix(path, challengePrefix); ok {
		if keyAuth, ok := st.challenges[token]; ok {
			answer(w, r, http.StatusOK, keyAuth)
		} else {
			answer(w, r, http.StatusNotFound, "Token not found")
		}
		return
	}
	c := clientOf(r, st)
	a, _, found := st.routes.Match(r.Host, path)
	if !c.https && (!found || !a.conf.Load().PlainHTTP) {
		redirect(w, r, name, target, st.httpsPort)
		return
	}
	if !found {
		answer(w, r, errNoRoute.status, errNoRoute.body)
		return
	}
	h.forward(w, r, a, c, target)
}

// forward has an instance of a answer the request.
func (h *handler) forward(w http.ResponseWriter, r *http.Request, a *app, c client, target string) {
	fl, ctx := h.flights.begin(r.Context(), a, connOf(r))
	if fl == nil {
		h.refuse(w, r, nil, errInstanceQueueFull)
		return
	}
	defer fl.end()
	id := idOf(r, c)
	ids := []string{id} // for all that has it
	w.Header()[requestID] = ids
	rc := http.NewResponseController(w)

	req := &upstream.Request{
		Method: r.Method, Target: target, Host: r.Host, Header: requestHeader(r, c, ids),
		ContentLength: r.ContentLength,
		WriteZero:     r.Header["Content-Length"] != nil || r.Method == http.MethodPost || r.Method == http.MethodPut || r.Method == http.MethodPatch,
		Upgrade:       upgradeOf(r),
		Expect:        r.ProtoAtLeast(1, 1) && httpguts.HeaderValuesContainsToken(r.Header["Expect"], "100-continue"),
	}
	var body *clientBody
	if r.ContentLength != 0 && r.Body != nil {
		body = &clientBody{r: r, rc: rc, trailer: trailer(r.Trailer)}
		req.Body, req.StopBody, req.Trailer = body, body.stop, body.trailer
	}
	if r.ProtoAtLeast(1, 1) {
		req.Informational = func(status int, from http.Header) { informational(w, r, status, from) }
	}

	resp, err := h.exchange(ctx, fl, req, func() {
		if body != nil && r.ProtoMajor == 1 {
			_ = rc.EnableFullDuplex() // or net/http reads the body itself before an early answer
		}
	})
	if err != nil {
		h.refuse(w, r, fl, err)
		if body != nil {
			body.linger(rc)
		}
		return
	}
	if resp.Tunnel != nil {
		h.tunnel(ctx, rc, fl, resp, id)
		return
	}
	defer resp.Body.Close() // it returns none
	header := w.Header()
	responseHeader(header, resp.Header)
	header[requestID] = ids
	for name := range trailer(resp.Trailer) {
		header.Add("Trailer", name)
	}
	if h.draining.Load() || resp.Unsent && r.ProtoMajor == 1 {
		header.Set("Connection", "close")
	}
	if isEventStream(resp.Header) {
		fl.becomeStream()
	}
	renew(w, r)
	w.WriteHeader(resp.Status)
	err = reply(w, rc, r, resp)
	if err != nil && fl.stream && resp.ContentLength < 0 && errors.Is(context.Cause(ctx), errCut) {
		return // a stream of events ends properly wherever it is cut: the client asks for the rest
	}
	if err != nil {
		h.log.Debug("answer cut", "app", a.id, "instance", fl.inst.id, "error", err)
		panic(http.ErrAbortHandler) // the client must not take it for the whole
	}
	for name := range trailer(resp.Trailer) {
		header[name] = resp.Trailer[name]
	}
	if resp.Unsent && body != nil {
		_ = rc.Flush()
		body.stop()
		_ = resp.Body.Close()
		body.linger(rc)
	}
}

// exchange picks an instance and sends the request there; when it cannot be
// connected to, or goes away without an answer to what may be repeated, to
// another one. Before is called before anything is read of the body.
func (h *handler) exchange(ctx context.Context, fl *flight, req *upstream.Request, before func()) (*upstream.Response, error) {
	var tried *instance
	var failed error
	repeated := false
	for range MaxTries {
		inst, err := fl.app.acquire(ctx, tried)
		if err == errNoOther { //nolint:errorlint // it is never wrapped
			return nil, failed
		}
		if err != nil {
			return nil, err
		}
		fl.inst = inst
		before()
		resp, err := inst.pool.Do(ctx, req)
		if err == nil {
			inst.answered()
			return resp, nil
		}
		if transport, refused := trouble(err); transport {
			now := time.Now()
			inst.failed(refused, now)
			if refused {
				inst.unreachable(fl.app.out, now)
			}
		}
		if lost, is := errors.AsType[*upstream.LostError](err); is && lost.Repeatable && !repeated {
			repeated = true // a request that kills is not to go around
		} else if _, unsent := errors.AsType[*upstream.DialError](err); !unsent {
			return nil, err
		}
		h.log.Debug("an instance fails; another one is tried", "app", fl.app.id, "instance", inst.id, "error", err)
		fl.leave()
		tried, failed = inst, err
	}
	return nil, failed
}

// refuse answers a request that got no answer from an instance.
func (h *handler) refuse(w http.ResponseWriter, r *http.Request, fl *flight, err error) {
	if ref, ok := errors.AsType[*refusal](err); ok {
		if ref.retryAfterS > 0 {
			w.Header().Set("Retry-After", strconv.Itoa(ref.retryAfterS))
		}
		answer(w, r, ref.status, ref.body)
		return
	}
	bad, isBody := errors.AsType[*upstream.BodyError](err)
	switch {
	case errors.Is(err, errCut):
		w.Header().Set("Connection", "close")
		answer(w, r, http.StatusServiceUnavailable, "Service Unavailable")
	case isBody && errors.Is(bad, os.ErrDeadlineExceeded):
		answer(w, r, http.StatusRequestTimeout, "Request Timeout")
	case isBody:
		answer(w, r, http.StatusBadRequest, "Bad Request")
	case errors.Is(err, context.Canceled):
		panic(http.ErrAbortHandler) // nobody is there to read an answer
	case errors.Is(err, upstream.ErrTimeout):
		answer(w, r, http.StatusGatewayTimeout, "Gateway Timeout")
	default:
		h.log.Debug("no answer from the app", "app", fl.app.id, "error", err)
		answer(w, r, http.StatusBadGateway, "Bad Gateway")
	}
}

var replyBuffers = sync.Pool{New: func() any { b := make([]byte, replyBuffer); return &b }}

// reply copies the body as it arrives. What has no known length is flushed at
// once: somebody may wait for it.
func reply(w http.ResponseWriter, rc *http.ResponseController, r *http.Request, resp *upstream.Response) error {
	endless := resp.ContentLength < 0 && r.Method != http.MethodHead
	if endless {
		if err := rc.Flush(); err != nil {
			return err
		}
	}
	buf := replyBuffers.Get().(*[]byte)
	defer replyBuffers.Put(buf)
	renewed := time.Now()
	left := resp.ContentLength
	for {
		n, err := resp.Body.Read(*buf)
		if n > 0 {
			if now := time.Now(); now.Sub(renewed) > deadlineSlack {
				renew(w, r)
				renewed = now
			}
			if _, werr := w.Write((*buf)[:n]); werr != nil {
				return werr
			}
			left -= int64(n)
			if endless || n < len(*buf) && left > 0 {
				if ferr := rc.Flush(); ferr != nil {
					return ferr
				}
			}
		}
		if err == io.EOF { // readers return it bare
			return nil
		}
		if err != nil {
			return err
		}
	}
}

func isEventStream(h http.Header) bool {
	kind, _, _ := strings.Cut(h.Get("Content-Type"), ";")
	return strings.EqualFold(strings.TrimSpace(kind), "text/event-stream")
}

// informational passes on an answer before the answer.
func informational(w http.ResponseWriter, r *http.Request, status int, from http.Header) {
	renew(w, r)
	h := w.Header()
	before := h.Clone()
	responseHeader(h, from)
	delete(h, "Content-Type")
	w.WriteHeader(status)
	clear(h)
	maps.Copy(h, before)
}

// clientBody is the body of a request. Reading it has a deadline for each piece.
type clientBody struct {
	r       *http.Request
	rc      *http.ResponseController
	trailer http.Header // filled at the end

	mu      sync.Mutex // orders the setting of deadlines
	stopped bool
	ended   bool
}

func (b *clientBody) Read(p []byte) (int, error) {
	b.mu.Lock()
	if !b.stopped {
		_ = b.rc.SetReadDeadline(time.Now().Add(BodyTime))
	}
	b.mu.Unlock()
	n, err := b.r.Body.Read(p)
	if err != nil {
		b.mu.Lock()
		b.ended = true
		if !b.stopped {
			_ = b.rc.SetReadDeadline(time.Time{})
		}
		b.mu.Unlock()
		for name := range b.trailer {
			b.trailer[name] = b.r.Trailer[name]
		}
	}
	return n, err
}

// stop lets reading end soon.
func (b *clientBody) stop() {
	b.mu.Lock()
	defer b.mu.Unlock()
	if !b.stopped && !b.ended {
		b.stopped = true
		_ = b.rc.SetReadDeadline(time.Now().Add(LingerTime))
	}
}

// linger reads a bit more of a body that was stopped, so that what is still
// under way does not turn the answer into a reset connection.
func (b *clientBody) linger(rc *http.ResponseController) {
	b.mu.Lock()
	stopped, ended := b.stopped, b.ended
	b.mu.Unlock()
	if stopped && !ended {
		_ = rc.Flush()
		_, _ = io.CopyN(io.Discard, b, MaxLinger)
	}
}
