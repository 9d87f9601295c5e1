package integration

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/xml"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	"tako/internal/takotest"
)

// An h2Case is a request in frames. What it wants and how it is judged is as for
// a wireCase, but that a refusal may be the end of the stream too.
type h2Case struct {
	name, rule, want string
	head             [][2]string
	body             []string // DATA frames; nil: the head ends the stream
	trailer          [][2]string
	// Of what the app saw.
	wantBody  string
	wantField [2]string
}

// poison is a request that nobody makes: it is hidden in values and bodies.
const poison = "GET /poison HTTP/1.1\r\nHost: h0.localhost\r\n\r\n"

// h2Cases lists them, for the host of one app.
func h2Cases(host string) []h2Case {
	type fields = [][2]string
	var all []h2Case
	// pseudo is a head of these four, and more behind them.
	pseudo := func(method, scheme, authority, path string, more ...[2]string) fields {
		return append(fields{{":method", method}, {":scheme", scheme}, {":authority", authority}, {":path", path}}, more...)
	}
	get := func(more ...[2]string) fields { return pseudo("GET", "https", host, "/ok", more...) }
	post := func(more ...[2]string) fields { return pseudo("POST", "https", host, "/ok", more...) }
	add := func(c h2Case) { all = append(all, c) }
	refuse := func(name, rule string, head fields, body ...string) {
		add(h2Case{name: name, rule: "RFC " + rule, want: "refuse", head: head, body: body})
	}
	either := func(name, rule string, head fields, body ...string) {
		add(h2Case{name: name, rule: "RFC " + rule, want: "any", head: head, body: body})
	}

	add(h2Case{name: "valid/get", rule: "RFC 9113 8.1", want: "accept", head: get()})
	add(h2Case{name: "valid/head", rule: "RFC 9113 8.1", want: "accept", head: pseudo("HEAD", "https", host, "/ok")})
	add(h2Case{name: "valid/body", rule: "RFC 9113 8.1", want: "accept", head: post(), body: []string{"he", "", "llo"}, wantBody: "hello"})
	add(h2Case{name: "valid/body-of-known-length", rule: "RFC 9113 8.1.1", want: "accept", head: post([2]string{"content-length", "5"}), body: []string{"hello"}, wantBody: "hello"})
	add(h2Case{name: "valid/empty-body", rule: "RFC 9113 8.1", want: "accept", head: post(), body: []string{""}})
	add(h2Case{name: "valid/trailers", rule: "RFC 9113 8.1", want: "accept", head: post(), body: []string{"hello"}, trailer: fields{{"x-a", "b"}}, wantBody: "hello"})
	add(h2Case{name: "valid/te-trailers", rule: "RFC 9113 8.2.2", want: "accept", head: get([2]string{"te", "trailers"})})
	add(h2Case{name: "valid/cookies", rule: "RFC 9113 8.2.3", want: "accept", head: get([2]string{"cookie", "a=1"}, [2]string{"cookie", "b=2"}), wantField: [2]string{"cookie", "a=1; b=2"}})
	add(h2Case{name: "valid/looks-like-a-request", rule: "RFC 9113 8.1", want: "accept", head: post(), body: []string{poison}, wantBody: poison})
	either("valid/host-alone", "9113 8.3.1", fields{{":method", "GET"}, {":scheme", "https"}, {":path", "/ok"}, {"host", host}})
	either("valid/options-asterisk", "9113 8.3.1", pseudo("OPTIONS", "https", host, "*"))
	either("valid/obs-text", "9113 8.2.1", get([2]string{"x-a", "caf\xe9"}))

	for _, f := range []struct{ name, field, value string }{
		{"coding-chunked", "transfer-encoding", "chunked"},
		{"coding-identity", "transfer-encoding", "identity"},
		{"te", "te", "gzip"},
		{"te-list", "te", "trailers, gzip"},
		{"connection", "connection", "close"},
		{"connection-empty", "connection", ""},
		{"keep-alive", "keep-alive", "timeout=5"},
		{"proxy-connection", "proxy-connection", "keep-alive"},
		{"upgrade", "upgrade", "h2c"},
	} {
		refuse("connection-specific/"+f.name, "9113 8.2.2", get([2]string{f.field, f.value}))
	}
	refuse("connection-specific/chunks", "9113 8.2.2", post([2]string{"transfer-encoding", "chunked"}), "0\r\n\r\n"+poison)
	refuse("connection-specific/chunks-and-length", "9113 8.2.2", post([2]string{"transfer-encoding", "chunked"}, [2]string{"content-length", "5"}), "hello")
	either("connection-specific/obfuscated", "9113 8.2.1", post([2]string{"transfer-encoding ", "chunked"}), "0\r\n\r\n"+poison)

	length := func(value string) fields { return post([2]string{"content-length", value}) }
	refuse("length/too-short", "9113 8.1.1", length("2"), "hello")
	refuse("length/too-long", "9113 8.1.1", length("50"), "hello")
	refuse("length/zero", "9113 8.1.1", length("0"), poison)
	refuse("length/plus", "9110 8.6", length("+5"), "hello")
	refuse("length/minus", "9110 8.6", length("-5"), "hello")
	refuse("length/letters", "9110 8.6", length("five"), "hello")
	refuse("length/hexadecimal", "9110 8.6", length("0x5"), "hello")
	refuse("length/over-64-bits", "9110 8.6", length("18446744073709551621"), "hello")
	refuse("length/two-different", "9110 8.6", post([2]string{"content-length", "5"}, [2]string{"content-length", "6"}), "hello")
	refuse("length/list-different", "9110 8.6", length("5, 6"), "hello")
	either("length/list-same", "9110 8.6", length("5, 5"), "hello")
	refuse("length/without-a-body", "9113 8.1.1", get([2]string{"content-length", "5"}))

	for name, value := range map[string]string{"crlf": "a\r\nx-injected: 1", "lf": "a\nx-injected: 1", "cr": "a\rx-injected: 1", "nul": "a\x00b", "crlf-request": "a\r\n\r\n" + poison} {
		refuse("value/"+name, "9113 8.2.1", get([2]string{"x-a", value}))
	}
	for name, value := range map[string]string{"space-ahead": " a", "space-behind": "a ", "tab-ahead": "\ta", "control": "a\x01b", "del": "a\x7fb"} {
		either("value/"+name, "9113 8.2.1", get([2]string{"x-a", value}))
	}
	for name, field := range map[string]string{
		"upper-case": "X-A", "space": "x a", "colon": "x-a:b", "crlf": "x-a\r\nx-injected", "empty": "", "nul": "x\x00a", "del": "x\x7fa", "high": "x\xe9a", "bracket": "x(a",
		"space-behind": "x-a ", "colon-value": "x-injected: 1\r\nx-a", "tab": "x\ta", "lf": "x\na", "slash": "x/a",
	} {
		refuse("name/"+name, "9113 8.2.1", get([2]string{field, "b"}))
	}
	for name, path := range map[string]string{
		"crlf": "/ok HTTP/1.1\r\nx-injected: 1\r\nx: ", "space": "/ok HTTP/1.1 x", "nul": "/o\x00k", "lf": "/ok\n", "cr": "/ok\r", "tab": "/o\tk", "empty": "", "no-slash": "ok", "authority": "other.localhost:80",
	} {
		refuse("path/"+name, "9113 8.3.1", pseudo("GET", "https", host, path))
	}
	for name, path := range map[string]string{"absolute": "http://other.localhost/ok", "fragment": "/ok#x", "asterisk": "*", "del": "/o\x7f", "two-slashes": "//other.localhost/ok"} {
		either("path/"+name, "9113 8.3.1", pseudo("GET", "https", host, path))
	}
	for name, method := range map[string]string{"request": "GET /poison HTTP/1.1\r\nx-injected: 1\r\nx:", "crlf": "GET\r\nx-injected: 1", "bracket": "GE(T", "empty": "", "nul": "G\x00T", "tab": "GET\t/poison", "space": "GET "} {
		refuse("method/"+name, "9110 9.1", pseudo(method, "https", host, "/ok"))
	}
	for name, authority := range map[string]string{
		"crlf": host + "\r\nx-injected: 1", "space": host + " other", "userinfo": "u@" + host, "slash": host + "/x", "nul": host + "\x00", "question": host + "?x", "backslash": host + `\x`, "hash": host + "#x", "lf": host + "\n",
	} {
		refuse("authority/"+name, "9113 8.3.1", pseudo("GET", "https", authority, "/ok"))
	}
	either("authority/empty", "9113 8.3.1", pseudo("GET", "https", "", "/ok"))
	for name, scheme := range map[string]string{"crlf": "https\r\nx-injected: 1", "url": "http://other.localhost/poison?", "space": "ht tp"} {
		refuse("scheme/"+name, "9113 8.3.1", pseudo("GET", scheme, host, "/ok"))
	}

	refuse("pseudo/two-methods", "9113 8.3", get([2]string{":method", "POST"}))
	refuse("pseudo/two-paths", "9113 8.3", get([2]string{":path", "/poison"}))
	refuse("pseudo/two-schemes", "9113 8.3", get([2]string{":scheme", "http"}))
	refuse("pseudo/two-authorities", "9113 8.3", get([2]string{":authority", "other.localhost"}))
	refuse("pseudo/unknown", "9113 8.3", append(fields{{":x", "1"}}, get()...))
	refuse("pseudo/status", "9113 8.3", append(fields{{":status", "200"}}, get()...))
	refuse("pseudo/upper-case", "9113 8.3", fields{{":Method", "GET"}, {":scheme", "https"}, {":authority", host}, {":path", "/ok"}})
	refuse("pseudo/behind-a-field", "9113 8.3", fields{{":method", "GET"}, {":scheme", "https"}, {"x-a", "b"}, {":authority", host}, {":path", "/ok"}})
	refuse("pseudo/no-method", "9113 8.3.1", fields{{":scheme", "https"}, {":authority", host}, {":path", "/ok"}})
	refuse("pseudo/no-path", "9113 8.3.1", fields{{":method", "GET"}, {":scheme", "https"}, {":authority", host}})
	refuse("pseudo/no-scheme", "9113 8.3.1", fields{{":method", "GET"}, {":authority", host}, {":path", "/ok"}})
	refuse("pseudo/none", "9113 8.3.1", fields{{"host", host}})
	refuse("pseudo/protocol-of-a-get", "8441 4", append(fields{{":protocol", "websocket"}}, get()...))
	either("host/another", "9113 8.3.1", get([2]string{"host", "other.localhost"}))
	refuse("host/two", "9113 8.3.1", get([2]string{"host", host}, [2]string{"host", "other.localhost"}))
	refuse("connect/plain", "9113 8.5", fields{{":method", "CONNECT"}, {":authority", host + ":443"}})
	refuse("connect/with-a-path", "9113 8.5", pseudo("CONNECT", "https", host, "/ok"))

	for _, trailer := range []struct {
		name, want string
		field      [2]string
	}{
		{"pseudo", "refuse", [2]string{":path", "/poison"}},
		{"length", "any", [2]string{"content-length", "50"}},
		{"coding", "any", [2]string{"transfer-encoding", "chunked"}},
		{"crlf-request", "any", [2]string{"x-a", "a\r\n\r\n" + poison}},
		{"host", "any", [2]string{"host", "other.localhost"}},
		{"upper-case", "any", [2]string{"X-A", "b"}},
	} {
		add(h2Case{name: "trailer/" + trailer.name, rule: "RFC 9113 8.1", want: trailer.want, head: post(), body: []string{"hello"}, trailer: fields{trailer.field}})
	}
	refuse("size/value-of-1500-kb", "9113 10.5.1", get([2]string{"x-a", strings.Repeat("a", 1_500_000)}))
	many := make(fields, 20_000)
	for i := range many {
		many[i] = [2]string{"x", "y"}
	}
	either("size/fields-20000", "9113 10.5.1", get(many...))
	return all
}

// block is a header block without any state.
func block(fields [][2]string) []byte {
	var b bytes.Buffer
	e := hpack.NewEncoder(&b)
	e.SetMaxDynamicTableSize(0)
	for _, f := range fields {
		e.WriteField(hpack.HeaderField{Name: f[0], Value: f[1]})
	}
	return b.Bytes()
}

// talkH2 sends a case on a connection of its own.
func talkH2(s *takotest.Server, host string, c *h2Case) (got talked, err error) {
	conn, err := tls.DialWithDialer(&net.Dialer{Timeout: answerWait}, "tcp", net.JoinHostPort("127.0.0.1", strconv.Itoa(s.HTTPS)),
		&tls.Config{InsecureSkipVerify: true, ServerName: host, NextProtos: []string{"h2"}})
	if err != nil {
		return got, err
	}
	defer conn.Close()
	if p := conn.ConnectionState().NegotiatedProtocol; p != "h2" {
		return got, fmt.Errorf("it speaks %q", p)
	}
	conn.SetDeadline(time.Now().Add(answerWait))
	var out bytes.Buffer
	w := http2.NewFramer(&out, nil)
	w.AllowIllegalWrites = true
	out.WriteString(http2.ClientPreface)
	w.WriteSettings()
	head := func(fields [][2]string, last bool) {
		text := block(fields)
		n := min(len(text), 16_000)
		w.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: text[:n], EndHeaders: n == len(text), EndStream: last})
		for text = text[n:]; len(text) > 0; text = text[n:] {
			n = min(len(text), 16_000)
			w.WriteContinuation(1, n == len(text), text[:n])
		}
	}
	head(c.head, c.body == nil)
	for i, data := range c.body {
		w.WriteData(1, i == len(c.body)-1 && c.trailer == nil, []byte(data))
	}
	if c.trailer != nil {
		head(c.trailer, true)
	}
	var writing sync.Mutex // the frames come whole, these first
	sent := make(chan struct{})
	writing.Lock()
	go func() {
		defer close(sent)
		defer writing.Unlock()
		conn.Write(out.Bytes()) // it may be refused before its end
	}()
	defer func() { conn.Close(); <-sent }()
	status := 0
	decoder := hpack.NewDecoder(4096, func(f hpack.HeaderField) {
		if f.Name == ":status" {
			status, _ = strconv.Atoi(f.Value)
		}
	})
	in := http2.NewFramer(conn, conn)
	in.SetMaxReadFrameSize(1 << 20)
	for {
		f, err := in.ReadFrame()
		if err != nil {
			got.closed = !errors.Is(err, os.ErrDeadlineExceeded)
			return got, nil
		}
		ended := false
		switch f := f.(type) {
		case *http2.SettingsFrame:
			if !f.IsAck() && writing.TryLock() { // else it will have to do without
				in.WriteSettingsAck()
				writing.Unlock()
			}
		case *http2.HeadersFrame:
			if _, err := decoder.Write(f.HeaderBlockFragment()); err != nil {
				got.note = err.Error()
			}
			if status >= 200 {
				got.statuses = []int{status}
			}
			ended = f.StreamEnded()
		case *http2.DataFrame:
			ended = f.StreamEnded()
		case *http2.RSTStreamFrame:
			got.closed = true
			return got, nil
		case *http2.GoAwayFrame:
			got.closed = f.ErrCode != http2.ErrCodeNo
			ended = got.closed
		}
		if ended {
			return got, nil
		}
	}
}

// TestConformanceOfHTTP2Requests: what a frame can carry and HTTP/1.1 cannot
// never reaches the app.
func TestConformanceOfHTTP2Requests(t *testing.T) {
	t.Parallel()
	for _, e := range engines() {
		s, apps := recorders(t, e, appsBeside)
		var count tally
		var wg sync.WaitGroup
		for i, app := range apps {
			wg.Go(func() {
				host := fmt.Sprintf("h%d.localhost", i)
				for n, c := range h2Cases(host) {
					if n%len(apps) == i {
						tryH2(t, e, s, &c, host, app, &count)
					}
				}
			})
		}
		wg.Wait()
		t.Logf("%d requests by HTTP/2, engine %s: %v", len(h2Cases("x")), e.name, &count)
	}
}

func tryH2(t *testing.T, e engine, s *takotest.Server, c *h2Case, host string, app *recorder, count *tally) {
	got, err := talkH2(s, host, c)
	if err != nil {
		t.Errorf("%s: %v", c.name, err)
		return
	}
	saw := app.take(t, s, host)
	rules := wireCase{Want: c.want, Host: host, Absent: []string{"x-injected", "connection: close, x", "te: gzip"}}
	if c.wantBody != "" {
		rules.Body = &repeat{Text: c.wantBody, Times: 1}
	}
	if c.wantField[0] != "" {
		rules.Present = map[string]string{c.wantField[0]: c.wantField[1]}
	}
	count.verdict(t, e, "h2 "+c.name, c.want, rules.judge(got, saw), fmt.Sprintf("%s: statuses %d, closed %v, %d at the app", c.rule, got.statuses, got.closed, len(saw)))
}

// TestConformanceByH2spec runs the tests of h2spec, the pinned one of tools/go.mod,
// against an app that answers with a body, as some of them need.
func TestConformanceByH2spec(t *testing.T) {
	if !conforming() {
		t.Skip("it downloads and builds a tool: make conformance")
	}
	s := start(t, takotest.Options{})
	lay(t, s, "body", "1", quick(nil))
	if _, err := ask(s, "body", "1", map[string]any{"routes": []string{"127.0.0.1"}}); err != nil { // it knows no names
		t.Fatal(err)
	}
	report := filepath.Join(t.TempDir(), "report.xml")
	ctx, stop := context.WithTimeout(t.Context(), 4*time.Minute)
	defer stop()
	cmd := exec.CommandContext(ctx, "go", "tool", "-modfile=../../tools/go.mod", "h2spec",
		"--host", "127.0.0.1", "--port", strconv.Itoa(s.HTTPS), "--tls", "--insecure", "--path", "/", "--timeout", "4", "--junit-report", report)
	out, err := cmd.CombinedOutput() // it fails if a test does
	text, readErr := os.ReadFile(report)
	if readErr != nil {
		t.Fatalf("h2spec: %v, %v\n%s", err, readErr, out)
	}
	var suites struct {
		Suites []struct {
			Tests    int `xml:"tests,attr"`
			Skipped  int `xml:"skipped,attr"`
			Failures int `xml:"failures,attr"`
			Errors   int `xml:"errors,attr"`
		} `xml:"testsuite"`
	}
	if err := xml.Unmarshal(text, &suites); err != nil {
		t.Fatal(err)
	}
	var all, bad, skipped int
	for _, suite := range suites.Suites {
		all, bad, skipped = all+suite.Tests, bad+suite.Failures+suite.Errors, skipped+suite.Skipped
	}
	t.Logf("h2spec: %d of %d passed, %d skipped", all-bad-skipped, all, skipped)
	if all < 145 || bad > 0 || skipped > 0 {
		lines := regexp.MustCompile(`(?m)^\s*(×|.*tests,).*$`).FindAll(bytes.ReplaceAll(out, []byte("\r"), []byte("\n")), -1)
		t.Errorf("h2spec: %d tests, %d failed, %d skipped:\n%s", all, bad, skipped, bytes.Join(lines, []byte("\n")))
	}
}
