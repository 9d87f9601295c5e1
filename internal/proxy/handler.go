package proxy

import (
	"bytes"
	"errors"
	"io"
	"net/http"
	"os"
	"strconv"
	"sync"
	"sync/atomic"
	"time"
	"unsafe"

	"github.com/hashicorp/go-hclog"

	"tako/internal/proxy/h1"
	"tako/internal/proxy/message"
	"tako/internal/proxy/upstream"
)

const (
	// MaxTries bounds the instances that are tried for one request.
	MaxTries        = 3
	challengePrefix = "/.well-known/acme-challenge/"
	copyBuffer      = 64 << 10
)

// handler answers requests by what state says at the moment.
type handler struct {
	state   *atomic.Pointer[state]
	flights *flights
	log     hclog.Logger
}

var (
	nameContentType  = []byte("Content-Type")
	nameCacheControl = []byte("Cache-Control")
	nameLocation     = []byte("Location")
	nameRetryAfter   = []byte("Retry-After")
	textPlain        = []byte("text/plain")
	noStore          = []byte("no-store")
)

// answer is a whole answer of our own. What the client still has to send of its
// request is the codec's matter.
func answer(x message.Exchange, status int, body string, fields ...message.Field) {
	fields = append(fields, message.Field{ID: message.ContentType, Name: nameContentType, Value: textPlain})
	if status >= 500 {
		fields = append(fields, message.Field{ID: message.CacheControl, Name: nameCacheControl, Value: noStore})
	}
	err := x.Begin(&message.Response{Status: status, Fields: fields, Length: int64(len(body)), HasLength: true})
	if err == nil && message.HasBody(x.Request().Method, status) {
		_, err = io.WriteString(x, body)
	}
	if err == nil {
		err = x.End(nil)
	}
	if err != nil {
		x.Abort() // a client that has gone needs no answer
	}
}

// view is b as a string, for a look-up that keeps nothing of it.
func view(b []byte) string { return unsafe.String(unsafe.SliceData(b), len(b)) }

// Handle answers one request.
func (h *handler) Handle(x message.Exchange) {
	r := x.Request()
	if r.IsMethod(http.MethodConnect) && !r.Extended {
		answer(x, http.StatusMethodNotAllowed, "Method Not Allowed")
		return
	}
	st := h.state.Load()
	path, _, _ := bytes.Cut(r.Target, []byte{'?'})
	if len(path) > len(challengePrefix) && string(path[:len(challengePrefix)]) == challengePrefix {
		if keyAuth, ok := st.challenges[string(path[len(challengePrefix):])]; ok {
			answer(x, http.StatusOK, keyAuth)
		} else {
			answer(x, http.StatusNotFound, "Token not found")
		}
		return
	}
	c := clientOf(r, x.Client(), st)
	a, _, found := st.routes.Match(view(r.Host), view(path))
	if !c.https && (!found || !a.conf.Load().PlainHTTP) {
		redirect(x, st.httpsPort)
		return
	}
	if !found {
		answer(x, errNoRoute.status, errNoRoute.body)
		return
	}
	h.forward(x, a, c)
}

// forward has an instance of a answer the request.
func (h *handler) forward(x message.Exchange, a *app, c client) {
	fl := h.flights.begin(a, x)
	if fl == nil {
		h.refuse(x, nil, errInstanceQueueFull)
		return
	}
	defer fl.end()
	r := x.Request()
	out := &fl.out
	out.Method, out.Target, out.Host = r.Method, r.Target, r.Host
	out.Length, out.HasLength, out.Expect, out.TETrailers = r.Length, r.HasLength, r.Expect, r.TETrailers
	id := fl.requestFields(r, c)
	if r.Upgrade != nil {
		out.Upgrade = r.Upgrade
		out.Task.Detach()
		if r.Extended {
			if !message.EqualFold(r.Upgrade, "websocket") {
				h.refuse(x, fl, errNoWebSockets)
				return
			}
			out.Method, out.Length, out.HasLength = methodGet, 0, false // its body is the stream's
			fl.webSocketKey()
		}
	}
	if out.Length != 0 {
		if err := fl.takeBody(a.conf.Load()); err != nil {
			h.refuse(x, fl, err)
			return
		}
	}
	if r.Major == 2 || r.Minor > 0 {
		out.Inform = fl.tell
	}
	in, err := h.exchange(fl)
	if err != nil {
		h.refuse(x, fl, err)
		return
	}
	defer in.Close()
	if in.Tunnel != nil {
		h.tunnel(fl, in, id)
		return
	}
	if r.Extended && in.Status/100 == 2 {
		h.refuse(x, fl, errNotSwitched) // the client would take it for the stream it asked for
		return
	}
	resp := &in.Response
	responseFields(resp, id)
	if isEventStream(resp) || streams(r, in, fl.inst) {
		fl.becomeStream()
	}
	if err := reply(fl, in); err != nil {
		h.log.Debug("answer cut", "app", a.id, "instance", fl.inst.id, "error", err)
		x.Abort() // the client must not take it for the whole
	}
}

var (
	errNotSwitched = errors.New("the app answered as if nobody had asked for a WebSocket")
	// errNoWebSockets: the protocol asked for is none, or the instance speaks HTTP/2,
	// to which nothing is upgraded.
	errNoWebSockets = &refusal{status: http.StatusNotImplemented, body: "Not Implemented"}
)

var methodGet = []byte(http.MethodGet)

// inform passes on an answer before the answer.
func (fl *flight) inform(status int, fields []message.Field) {
	kept := make([]message.Field, 0, len(fields))
	for _, f := range fields {
		if f.ID != message.XRequestID && !h1.Nominated(fields, &f) {
			kept = append(kept, f)
		}
	}
	_ = fl.x.Inform(status, kept) // what is wrong with the client shows at the answer
}

// reply passes on the answer: at once, if it is small, in one piece.
func reply(fl *flight, in *upstream.Incoming) error {
	x, resp := fl.x, &in.Response
	if err := x.Begin(resp); err != nil {
		return err
	}
	endless := resp.Length < 0
	if b := in.Buffered(); len(b) > 0 {
		if _, err := x.Write(b); err != nil {
			return err
		}
	}
	if in.Whole() {
		return x.End(in.Trailer())
	}
	if endless {
		if err := x.Flush(); err != nil { // somebody may wait for it
			return err
		}
	}
	if s, ok := x.(message.Splicer); ok && in.Rest() > upstream.SpliceOver && s.CanSplice() {
		if err := x.Flush(); err != nil {
			return err
		}
		if _, err := in.SpliceTo(s.SpliceFrom); err != nil {
			return err
		}
		return x.End(nil)
	}
	buf := copyBuffers.Get().(*[]byte)
	defer copyBuffers.Put(buf)
	for {
		n, err := in.Read(*buf)
		if n > 0 {
			if _, werr := x.Write((*buf)[:n]); werr != nil {
				return werr
			}
			if err == nil && !in.Whole() && (endless || n < len(*buf)) {
				if ferr := x.Flush(); ferr != nil {
					return ferr
				}
			}
		}
		switch {
		case err == io.EOF: //nolint:errorlint // readers return it bare
			return x.End(in.Trailer())
		case err != nil && fl.stream && endless && errors.Is(fl.Cause(), errCut):
			return x.End(nil) // a stream of events ends properly wherever it is cut: the client asks for the rest
		case err != nil:
			return err
		}
	}
}

var copyBuffers = sync.Pool{New: func() any { b := make([]byte, copyBuffer); return &b }}

// exchange picks an instance and sends the request there; when it cannot be
// connected to, or goes away without an answer to what may be repeated, to
// another one.
func (h *handler) exchange(fl *flight) (*upstream.Incoming, error) {
	var tried *instance
	var failed error
	repeated := false
	k := ordinary
	if fl.out.Body != nil && !fl.body.whole {
		k = upload
	}
	for range MaxTries {
		inst, err := fl.app.try(tried, k)
		if inst == nil && err == nil {
			inst, err = fl.app.wait(fl, tried, k)
		}
		if err == errNoOther && fl.out.Elsewhere { //nolint:errorlint // it is never wrapped
			tried, fl.out.Elsewhere = nil, false // there was one, but not any more
			continue
		}
		if err == errNoOther { //nolint:errorlint // as above
			return nil, failed
		}
		if err != nil {
			return nil, err
		}
		fl.inst = inst
		fl.uploading.Store(k == upload)
		if fl.x.Request().Extended && inst.h2c {
			return nil, errNoWebSockets
		}
		if inst.h2c {
			fl.out.Task.Detach()
		}
		// An instance that dies may take a connection yet, and lose the request again.
		fl.out.Elsewhere = tried == nil && !repeated && fl.app.conf.Load().several()
		in, err := inst.pool.RoundTrip(&fl.Cancel, &fl.out)
		if err == nil {
			inst.answered()
			return in, nil
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
func (h *handler) refuse(x message.Exchange, fl *flight, err error) {
	if ref, ok := errors.AsType[*refusal](err); ok {
		var fields []message.Field
		if ref.retryAfterS > 0 {
			fields = append(fields, message.Field{ID: message.RetryAfter, Name: nameRetryAfter, Value: strconv.AppendInt(nil, int64(ref.retryAfterS), 10)})
		}
		answer(x, ref.status, ref.body, fields...)
		return
	}
	bad, isBody := errors.AsType[*upstream.BodyError](err)
	switch {
	case errors.Is(err, errBodyTooLarge):
		answer(x, http.StatusRequestEntityTooLarge, "Content Too Large")
	case errors.Is(err, errCut):
		answer(x, http.StatusServiceUnavailable, "Service Unavailable")
	case isBody && errors.Is(bad, os.ErrDeadlineExceeded):
		answer(x, http.StatusRequestTimeout, "Request Timeout")
	case isBody:
		answer(x, http.StatusBadRequest, "Bad Request")
	case errors.Is(err, errClientGone):
		x.Abort() // nobody is there to read an answer
	case errors.Is(err, upstream.ErrTimeout):
		answer(x, http.StatusGatewayTimeout, "Gateway Timeout")
	default:
		h.log.Debug("no answer from the app", "app", fl.app.id, "error", err)
		answer(x, http.StatusBadGateway, "Bad Gateway")
	}
}

// mayStream: it is a call of gRPC, where each side may be silent for as long as it
// likes, to an app that may know what that is.
func mayStream(r *message.Request, conf *appConf) bool {
	return r.Major == 2 && !conf.http1 && isGRPC(r.Get(message.ContentType))
}

// streams: the instance answers such a call before the request has come whole.
func streams(r *message.Request, in *upstream.Incoming, inst *instance) bool {
	return in.Unsent && inst.h2c && r.Major == 2 && isGRPC(r.Get(message.ContentType)) && isGRPC(in.Get(message.ContentType))
}

func isGRPC(contentType []byte) bool {
	const kind = "application/grpc"
	return len(contentType) >= len(kind) && message.EqualFold(contentType[:len(kind)], kind)
}

func isEventStream(r *message.Response) bool {
	kind, _, _ := bytes.Cut(r.Get(message.ContentType), []byte{';'})
	return message.EqualFold(message.Trim(kind), "text/event-stream")
}
