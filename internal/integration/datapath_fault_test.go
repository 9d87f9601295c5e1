package integration

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"tako/internal/takotest"
)

// A toxic is what goes wrong between the proxy and an app, or in the app.
type toxic struct {
	name   string
	method string
	body   int // bytes of the request
	// serve answers a request whose body was not read; false: it was the last one.
	serve func(c *net.TCPConn, req *http.Request, body []byte) bool
	// What the client has to get: one of these statuses with the whole body, or, if
	// cut, an answer that is seen not to be whole.
	statuses []int
	cut      bool
	// settle: what is wrong with the connection comes a bit later than the answer.
	// The proxy looks at those that were idle for so long.
	settle bool
}

// settleTime is long after a connection is looked at before its use.
const settleTime = 200 * time.Millisecond

const answerSize = 20_000

// toxicBody is the whole of an answer to the request of that id.
func toxicBody(id string) []byte { return echoBody(id, answerSize) }

// countedAnswer is a whole answer.
func countedAnswer(body []byte) []byte {
	return fmt.Appendf(nil, "HTTP/1.1 200 OK\r\nContent-Length: %d\r\nX-A: b\r\n\r\n%s", len(body), body)
}

func chunkedAnswer(body []byte, last bool) []byte {
	var b bytes.Buffer
	b.WriteString("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
	for len(body) > 0 {
		n := min(len(body), 7001)
		fmt.Fprintf(&b, "%x\r\n%s\r\n", n, body[:n])
		body = body[n:]
	}
	if last {
		b.WriteString("0\r\n\r\n")
	}
	return b.Bytes()
}

// reset ends a connection at once.
func reset(c *net.TCPConn) bool {
	c.SetLinger(0)
	c.Close()
	return false
}

func toxics() []toxic {
	type conn = *net.TCPConn
	ok, bad := []int{200}, []int{502}
	// sends is an answer of these bytes after the request was read.
	sends := func(more bool, text func(body []byte) []byte) func(conn, *http.Request, []byte) bool {
		return func(c conn, req *http.Request, body []byte) bool {
			io.Copy(io.Discard, req.Body)
			_, err := c.Write(text(body))
			return more && err == nil
		}
	}
	slowly := func(pause time.Duration, size int, text func(body []byte) []byte) func(conn, *http.Request, []byte) bool {
		return func(c conn, req *http.Request, body []byte) bool {
			io.Copy(io.Discard, req.Body)
			b := text(body)
			for len(b) > 0 {
				n := min(size, len(b))
				if _, err := c.Write(b[:n]); err != nil {
					return false
				}
				b = b[n:]
				time.Sleep(pause)
			}
			return true
		}
	}
	half := func(text func(body []byte) []byte, end func(conn) bool) func(conn, *http.Request, []byte) bool {
		return func(c conn, req *http.Request, body []byte) bool {
			io.Copy(io.Discard, req.Body)
			b := text(body)
			c.Write(b[:len(b)/2])
			return end(c)
		}
	}
	gone := func(conn) bool { return false }
	whole := func(b []byte) []byte { return chunkedAnswer(b, true) }
	untilClose := func(b []byte) []byte { return append([]byte("HTTP/1.1 200 OK\r\n\r\n"), b...) }
	text := func(s string) func([]byte) []byte { return func([]byte) []byte { return []byte(s) } }
	all := []toxic{
		{name: "latency", serve: func(c conn, req *http.Request, body []byte) bool {
			time.Sleep(20 * time.Millisecond)
			c.Write([]byte("H"))
			time.Sleep(20 * time.Millisecond)
			_, err := c.Write(countedAnswer(body)[1:])
			return err == nil
		}, statuses: ok},
		{name: "slices of a byte", serve: slowly(0, 1, countedAnswer), statuses: ok},
		{name: "slices of a byte, chunked", serve: slowly(0, 1, whole), statuses: ok},
		{name: "slices of 3 bytes, to a body", method: "POST", body: 20_000, serve: slowly(0, 3, whole), statuses: ok},
		{name: "a head byte by byte, slowly", serve: func(c conn, req *http.Request, body []byte) bool {
			b := countedAnswer(body)
			n := bytes.Index(b, []byte("\r\n\r\n")) + 6
			for i := range n {
				c.Write(b[i : i+1])
				time.Sleep(time.Millisecond)
			}
			_, err := c.Write(b[n:])
			return err == nil
		}, statuses: ok},
		{name: "little bandwidth", serve: slowly(time.Millisecond, 2000, countedAnswer), statuses: ok},
		{name: "little bandwidth, until close", serve: func(c conn, req *http.Request, body []byte) bool {
			slowly(time.Millisecond, 2000, untilClose)(c, req, body)
			return false
		}, statuses: ok},
		{name: "half a counted answer", serve: half(countedAnswer, gone), cut: true},
		{name: "half a counted answer, reset", serve: half(countedAnswer, reset), cut: true},
		{name: "half a chunked answer", serve: half(whole, gone), cut: true},
		{name: "half a chunked answer, reset", serve: half(whole, reset), cut: true},
		{name: "no last chunk", serve: sends(false, func(b []byte) []byte { return chunkedAnswer(b, false) }), cut: true},
		{name: "no last line of a chunk", serve: sends(false, func(b []byte) []byte { return chunkedAnswer(b, true)[:len(chunkedAnswer(b, true))-2] }), cut: true},
		{name: "a broken chunk", serve: sends(true, func(b []byte) []byte { return append(chunkedAnswer(b, false), "zz\r\n"...) }), cut: true},
		{name: "one byte too few", serve: sends(false, func(b []byte) []byte { return countedAnswer(b)[:len(countedAnswer(b))-1] }), cut: true},
		{name: "an answer until a reset", serve: func(c conn, req *http.Request, body []byte) bool {
			c.Write(untilClose(body)[:answerSize/2])
			time.Sleep(50 * time.Millisecond) // or it is lost on the way
			return reset(c)
		}, cut: true},
		{name: "half a head", serve: sends(false, text("HTTP/1.1 200 OK\r\nContent-Le")), statuses: bad},
		{name: "half a head, reset", serve: half(text("HTTP/1.1 200 OK\r\nContent-Length: 10\r\nX-A: b"), reset), statuses: bad},
		{name: "no answer", method: "POST", body: 10, serve: sends(false, text("")), statuses: bad},
		{name: "no answer to what may be repeated", serve: sends(false, text("")), statuses: bad},
		{name: "a reset for an answer", method: "POST", body: 10, serve: func(c conn, _ *http.Request, _ []byte) bool { return reset(c) }, statuses: bad},
		{name: "rubbish", serve: sends(false, text("\x16\x03\x01 what\r\n\r\n")), statuses: bad},
		{name: "two lengths", serve: sends(false, text("HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\nabc")), statuses: bad},
		{name: "length and coding", serve: sends(false, text("HTTP/1.1 200 OK\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n")), statuses: bad},
		{name: "a head without end", serve: sends(false, text("HTTP/1.1 200 OK\r\nX-A: "+strings.Repeat("a", 1<<20))), statuses: bad},
		{name: "data after the answer", serve: sends(true, func(b []byte) []byte { return append(countedAnswer(b), countedAnswer([]byte("another's"))...) }), statuses: ok},
		{name: "data after the chunks", serve: sends(true, func(b []byte) []byte { return append(chunkedAnswer(b, true), countedAnswer([]byte("another's"))...) }), statuses: ok},
		{name: "an answer to HEAD with a body", method: "HEAD", serve: sends(true, countedAnswer), statuses: ok},
		{name: "an answer before the body is read, and all of it then", method: "POST", body: 300_000, serve: func(c conn, req *http.Request, body []byte) bool {
			c.Write(countedAnswer(body))
			_, err := io.Copy(io.Discard, req.Body)
			return err == nil
		}, statuses: ok},
		{name: "an answer before the body is read, and the end", method: "POST", body: 3_000_000, serve: func(c conn, req *http.Request, body []byte) bool {
			c.Write(countedAnswer(body))
			c.CloseWrite()
			time.Sleep(20 * time.Millisecond) // a reset at once would take the answer along
			return false
		}, statuses: ok},
		{name: "a few interim answers", serve: sends(true, func(b []byte) []byte {
			return append(bytes.Repeat([]byte("HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n"), 10), countedAnswer(b)...)
		}), statuses: ok},
		{name: "a storm of interim answers", serve: sends(false, func(b []byte) []byte {
			return append(bytes.Repeat([]byte("HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n"), 1000), countedAnswer(b)...)
		}), statuses: bad},
		{name: "a switch that nobody asked for", serve: sends(false, text("HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\nhello")), statuses: bad},
	}
	if soaking() { // these depend on time
		all = append(all, []toxic{
			{name: "data a while after the answer", settle: true, serve: func(c conn, req *http.Request, body []byte) bool {
				c.Write(countedAnswer(body))
				time.Sleep(5 * time.Millisecond)
				_, err := c.Write(countedAnswer([]byte("another's")))
				return err == nil
			}, statuses: ok},
			{name: "the end of a connection after each answer", settle: true, serve: sends(false, countedAnswer), statuses: ok},
		}...)
		all = append(all, toxic{name: "silence", method: "POST", body: 10, serve: func(c conn, req *http.Request, _ []byte) bool {
			io.Copy(io.Discard, c) // until the proxy has had enough
			return false
		}, statuses: []int{504}})
	}
	return all
}

// TestDataPathFaultsBetweenProxyAndApp: a client gets the whole answer to its own
// request, or is told that there is none, or sees that it is not whole.
func TestDataPathFaultsBetweenProxyAndApp(t *testing.T) {
	t.Parallel()
	s := start(t, takotest.Options{})
	all := toxics()
	// One for each protocol, so that nobody uses another's connections.
	app := func(p takotest.Protocol) string { return "toxic" + strconv.Itoa(slices.Index(protocols, p)) }
	serve := func(c *net.TCPConn) {
		in := bufio.NewReader(c)
		for {
			req, err := http.ReadRequest(in)
			if err != nil {
				return
			}
			id := req.Header.Get("X-Id")
			which, err := strconv.Atoi(req.URL.Query().Get("toxic"))
			if err != nil { // a good one
				n, err := io.Copy(io.Discard, req.Body)
				if err == nil {
					_, err = c.Write(countedAnswer(fmt.Appendf(nil, "%s %d", id, n)))
				}
				if err != nil {
					return
				}
				continue
			}
			if !all[which].serve(c, req, toxicBody(id)) {
				return
			}
		}
	}
	for _, p := range protocols {
		serveRaw(t, s, app(p), serve)
	}
	rounds := 1
	if soaking() {
		rounds = 20
	}
	each(protocols, func(p takotest.Protocol) {
		host := hostOf(app(p))
		client := s.Client(p)
		client.Timeout = 2 * takotest.AskWait
		defer client.CloseIdleConnections()
		for round := range rounds {
			for i, x := range all {
				if x.name == "silence" && round > 0 {
					continue
				}
				id := fmt.Sprintf("%s-%d-%d", p, round, i)
				if err := poisoned(s, client, p, host, id, i, &x); err != nil {
					t.Errorf("%s: %s: %v", p, x.name, err)
				}
				if x.settle {
					time.Sleep(settleTime)
				}
				for range 2 { // it is as if nothing had been
					if err := healthy(s, client, p, host, id); err != nil {
						t.Errorf("%s: after %s: %v", p, x.name, err)
					}
				}
			}
		}
	})
	t.Logf("%d faults in each of %d protocols, %d times", len(all), len(protocols), rounds)
}

func poisoned(s *takotest.Server, client *http.Client, p takotest.Protocol, host, id string, which int, x *toxic) error {
	method, body := x.method, io.Reader(nil)
	if method == "" {
		method = http.MethodGet
	}
	if x.body > 0 {
		body = bytes.NewReader(make([]byte, x.body))
	}
	req, err := http.NewRequest(method, s.URL(p, fmt.Sprintf("%s/?toxic=%d", host, which)), body)
	if err != nil {
		return err
	}
	req.Header.Set("X-Id", id)
	answer, err := takotest.Do(client, req)
	if x.cut {
		switch {
		case err == nil && answer.StatusCode == http.StatusOK:
			return fmt.Errorf("an answer of %d bytes, %d from the app, looks whole", len(answer.Text), answerSize)
		case err == nil && answer.StatusCode != http.StatusBadGateway:
			return errors.New(answer.Status)
		case !strings.HasPrefix(string(toxicBody(id)), answer.Text) && err != nil:
			return fmt.Errorf("%.60q is another's", answer.Text)
		}
		return nil
	}
	if err != nil {
		return err
	}
	for _, status := range x.statuses {
		if status != answer.StatusCode {
			continue
		}
		want := string(toxicBody(id))
		if status != http.StatusOK || method == http.MethodHead {
			return nil
		}
		if answer.Text != want {
			return fmt.Errorf("%d bytes %.60q, want %d of its own", len(answer.Text), answer.Text, len(want))
		}
		return nil
	}
	return fmt.Errorf("%s, want %d: %.60q", answer.Status, x.statuses, answer.Text)
}

func healthy(s *takotest.Server, client *http.Client, p takotest.Protocol, host, id string) error {
	req, err := http.NewRequest(http.MethodPut, s.URL(p, host+"/"), strings.NewReader("fine"))
	if err != nil {
		return err
	}
	req.Header.Set("X-Id", id)
	answer, err := takotest.Do(client, req)
	if err != nil {
		return err
	}
	if want := id + " 4"; answer.StatusCode != http.StatusOK || answer.Text != want {
		return fmt.Errorf("%s %.60q, want 200 %q", answer.Status, answer.Text, want)
	}
	return nil
}
