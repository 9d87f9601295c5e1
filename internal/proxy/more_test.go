package proxy

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptrace"
	"net/textproto"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"

	"tako/internal/proxy/message"
	"tako/internal/proxy/upstream"
	"tako/internal/wire"
)

func TestAnswersToFailedExchanges(t *testing.T) {
	h := &handler{log: hclog.NewNullLogger()}
	for _, test := range []struct {
		err    error
		status int
		body   string
	}{
		{upstream.ErrTimeout, 504, "Gateway Timeout"},
		{errInstanceQueueFull, 503, "Instance queue is full"},
		{&upstream.DialError{Err: errors.New("x")}, 502, "Bad Gateway"},
		{errors.New("x"), 502, "Bad Gateway"},
		{errCut, 503, "Service Unavailable"},
		{&upstream.BodyError{Err: os.ErrDeadlineExceeded}, 408, "Request Timeout"},
		{&upstream.BodyError{Err: errors.New("x")}, 400, "Bad Request"},
		{errStartTimeout, 504, "App startup timed out"},
		{errStartQueueFull, 503, "App startup queue is full"},
	} {
		x := &recorded{}
		h.refuse(x, &flight{app: newApp("blog", nil)}, test.err)
		if x.answer.Status != test.status || string(x.body) != test.body || x.answer.Length != int64(len(test.body)) || !x.ended ||
			(string(x.answer.Get(message.CacheControl)) == "no-store") != (test.status >= 500) {
			t.Errorf("%v: got %d %q %v", test.err, x.answer.Status, x.body, x.answer.Fields)
		}
	}
}

func TestConnectionWithClientIsKeptAfterUploads(t *testing.T) {
	m := serving(t)
	m.plainApp(served(t, func(w http.ResponseWriter, r *http.Request) { _, _ = io.Copy(w, r.Body) }))
	client := m.client(false, nil)
	for i := range 20 {
		reused := false
		ctx := httptrace.WithClientTrace(t.Context(), &httptrace.ClientTrace{GotConn: func(c httptrace.GotConnInfo) { reused = c.Reused }})
		var body io.Reader = strings.NewReader("body")
		if i == 10 {
			body = io.MultiReader(body)
		}
		req, _ := http.NewRequestWithContext(ctx, http.MethodPost, "http://blog.test/", body)
		resp, err := client.Do(req)
		if got := text(t, resp, err); got != "body" || reused != (i > 0) {
			t.Fatalf("request %d: %q, reused %t", i, got, reused)
		}
	}
}

func TestNothingIsReadBehindARequestOfDoubtfulLength(t *testing.T) {
	m := serving(t)
	var seen atomic.Int32
	m.plainApp(served(t, func(http.ResponseWriter, *http.Request) { seen.Add(1) }))
	c, err := net.Dial("tcp", m.plain)
	check0(t, err)
	defer c.Close()
	check0(t, c.SetDeadline(time.Now().Add(patience)))
	_, err = io.WriteString(c, "POST / HTTP/1.1\r\nHost: blog.test\r\nContent-Length: 60\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET /evil HTTP/1.1\r\nHost: blog.test\r\n\r\n")
	check0(t, err)
	b, err := io.ReadAll(c)
	if n := strings.Count(string(b), "HTTP/1.1 "); n != 1 || seen.Load() != 0 || !strings.HasPrefix(string(b), "HTTP/1.1 400 ") {
		t.Errorf("%d answers, the app saw %d requests (%v): %q", n, seen.Load(), err, b)
	}
}

func TestMalformedUploadIsBadRequest(t *testing.T) {
	m := serving(t)
	var whole atomic.Bool
	m.plainApp(served(t, func(_ http.ResponseWriter, r *http.Request) {
		_, err := io.ReadAll(r.Body)
		whole.Store(err == nil)
	}))
	resp := m.raw("POST / HTTP/1.1\r\nHost: blog.test\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\nzzz\r\n")
	if resp.StatusCode != 400 || !resp.Close || whole.Load() {
		t.Errorf("got %d, close %t, the app saw a whole body: %t", resp.StatusCode, resp.Close, whole.Load())
	}
}

func TestInstanceThatDiesDuringAnUpload(t *testing.T) {
	m := serving(t)
	m.plainApp(rawInstance(t, func(_ int, c net.Conn) { _, _ = http.ReadRequest(bufio.NewReader(c)) }))
	resp := m.raw("POST / HTTP/1.1\r\nHost: blog.test\r\nContent-Length: 100000\r\n\r\nonly the beginning")
	if body := text(t, resp, nil); resp.StatusCode != 502 || body != "Bad Gateway" {
		t.Errorf("got %d %q", resp.StatusCode, body)
	}
}

func TestClientThatGoesEndsTheRequest(t *testing.T) {
	m := serving(t)
	begun, gone := make(chan struct{}), make(chan struct{})
	m.plainApp(served(t, func(_ http.ResponseWriter, r *http.Request) {
		close(begun)
		<-r.Context().Done()
		close(gone)
	}))
	ctx, cancel := context.WithCancel(t.Context())
	go func() {
		<-begun
		cancel()
	}()
	req, _ := http.NewRequestWithContext(ctx, http.MethodGet, "http://blog.test/", nil)
	if resp, err := m.client(false, nil).Do(req); err == nil {
		_ = resp.Body.Close()
		t.Error("an answer came")
	}
	select {
	case <-gone:
	case <-time.After(patience):
		t.Error("the instance was not told")
	}
}

func TestOldClientsAndHEAD(t *testing.T) {
	m := serving(t)
	m.plainApp(rawInstance(t, func(_ int, c net.Conn) {
		r, err := http.ReadRequest(bufio.NewReader(c))
		if err != nil {
			return
		}
		if r.Method == http.MethodHead {
			_, _ = io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 1234\r\n\r\n")
			return
		}
		_, _ = io.WriteString(c, "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n")
	}))
	resp := m.raw("GET / HTTP/1.0\r\nHost: blog.test\r\n\r\n")
	if got := text(t, resp, nil); got != "abc" || resp.TransferEncoding != nil || resp.Header["Content-Type"] != nil {
		t.Errorf("HTTP/1.0: %q %v %v", got, resp.TransferEncoding, resp.Header)
	}
	resp = m.raw("HEAD / HTTP/1.1\r\nHost: blog.test\r\n\r\n")
	if got := text(t, resp, nil); got != "" || resp.ContentLength != 1234 {
		t.Errorf("HEAD: %q, length %d", got, resp.ContentLength)
	}
}

func TestEarlyHintsArePassedOn(t *testing.T) {
	m := serving(t)
	m.plainApp(served(t, func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Link", "</a.css>")
		w.WriteHeader(http.StatusEarlyHints)
		w.Header().Del("Link")
	}))
	var hints []string
	ctx := httptrace.WithClientTrace(t.Context(), &httptrace.ClientTrace{Got1xxResponse: func(code int, h textproto.MIMEHeader) error {
		hints = append(hints, fmt.Sprint(code, h.Get("Link")))
		return nil
	}})
	req, _ := http.NewRequestWithContext(ctx, http.MethodGet, "http://blog.test/", nil)
	resp, err := m.client(false, nil).Do(req)
	text(t, resp, err)
	if fmt.Sprint(hints) != "[103</a.css>]" || resp.Header.Get("Link") != "" {
		t.Errorf("hints %v, then %v", hints, resp.Header)
	}
}

func TestAppsDoNotTouchEachOther(t *testing.T) {
	m := serving(t)
	m.plainApp(served(t, func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "blog") }))
	m.app(wire.App{App: "shop", Routes: []string{"shop.test"}, PlainHTTP: true})
	m.revision++
	m.send(&wire.AppGone{App: "shop", Revision: m.revision})
	expect[*wire.Applied](m)
	if got := text(t, m.raw("GET / HTTP/1.1\r\nHost: blog.test\r\n\r\n"), nil); got != "blog" {
		t.Errorf("got %q", got)
	}
	if resp := m.raw("GET / HTTP/1.1\r\nHost: shop.test\r\n\r\n"); resp.StatusCode != 307 {
		t.Errorf("the app that is gone answers %d", resp.StatusCode)
	}
}

// Two proxies share a listening socket; one leaves while clients connect anew
// for each request. None may notice.
func TestHandoverBetweenProxiesLosesNoRequest(t *testing.T) {
	up := served(t, func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "whole") })
	first := serving(t)
	first.plainApp(up)
	second := greeted(t)
	second.shared = first
	second.configure()
	second.plainApp(up)
	second.send(&wire.Serve{})
	expect[*wire.Ready](second)

	stop := make(chan struct{})
	var wg sync.WaitGroup
	var served, failed atomic.Int64
	for i := range 4 {
		wg.Go(func() {
			client := first.client(false, nil)
			client.Transport.(*http.Transport).DisableKeepAlives = i%2 == 0
			for {
				select {
				case <-stop:
					client.CloseIdleConnections()
					return
				default:
				}
				resp, err := client.Get("http://blog.test/")
				if err != nil {
					failed.Add(1)
					t.Error(err)
					return
				}
				b, err := io.ReadAll(resp.Body)
				_ = resp.Body.Close()
				if string(b) != "whole" || err != nil {
					failed.Add(1)
				}
				served.Add(1)
			}
		})
	}
	for served.Load() < 100 && failed.Load() == 0 {
		time.Sleep(time.Millisecond)
	}
	first.send(&wire.Drain{RequestsMS: 20000, StreamsMS: 20000})
	if d := expect[*wire.Drained](first); d.Cut != 0 {
		t.Errorf("%d were cut", d.Cut)
	}
	if err := first.ended(); err != nil {
		t.Error(err)
	}
	for before := served.Load(); served.Load() < before+100 && failed.Load() == 0; {
		time.Sleep(time.Millisecond)
	}
	close(stop)
	wg.Wait()
	if failed.Load() != 0 {
		t.Errorf("%d of %d failed", failed.Load(), served.Load())
	}
}
