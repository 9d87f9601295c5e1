package integration

import (
	"bufio"
	"bytes"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"tako/internal/takotest"
)

// Times of the conformance tests. They are for a machine that is busy: what is
// over sooner takes less.
const (
	answerWait = 30 * time.Second       // for an answer that is to come, or the end of a connection
	quietWait  = 200 * time.Millisecond // for one that is not
	appsBeside = 8                      // cases that are tried at one time, each with an app of its own
)

// conforming reports whether all of the conformance tests are to run: make
// conformance.
func conforming() bool { return os.Getenv("TAKO_CONFORMANCE") != "" }

// A wireCase is bytes that a client sends, and what has to come of them. Bytes
// above 0x7f stand in the files as the characters with those numbers. The app has
// the host h0.localhost.
type wireCase struct {
	Name string `json:"name"`
	Rule string `json:"rule"` // where it is written
	// Want is "accept": answered 2xx and seen by the app; "refuse": answered 4xx or
	// 5xx, or closed, and not seen by the app; "any": either. Whatever it is, the app
	// must never see anything ambiguous.
	Want string `json:"want"`
	Must bool   `json:"must"` // the rule says MUST
	Send string `json:"send"`
	// Fill takes the place of {fill} in Send.
	Fill repeat `json:"fill"`
	// Also are further statuses of a refusal.
	Also []int `json:"also"`
	// Requests is how many the app is to see, 1 by default.
	Requests int `json:"requests"`
	// What the app has to see: the first body, fields that are not there, by name or
	// whole, fields that are, and the host.
	Body    *repeat           `json:"body"`
	Absent  []string          `json:"absent"`
	Present map[string]string `json:"present"`
	Wanted  []string          `json:"wanted"`
	Host    string            `json:"host"`
	// How it is sent: byte by byte; with the end of the client's half behind it.
	Bytewise  bool `json:"bytewise"`
	HalfClose bool `json:"half_close"`
	// Closes: the connection has to be closed after the answer.
	Closes bool `json:"closes"`
}

// repeat is a text several times over.
type repeat struct {
	Text  string `json:"text"`
	Times int    `json:"times"`
}

func (r repeat) bytes() []byte { return bytes.Repeat(latin1(r.Text), r.Times) }

// latin1 is a byte for each character.
func latin1(s string) []byte {
	b := make([]byte, 0, len(s))
	for _, r := range s {
		b = append(b, byte(r))
	}
	return b
}

// wireCases reads the files.
func wireCases(t *testing.T) []wireCase {
	t.Helper()
	files, err := filepath.Glob("testdata/conformance/*.json")
	if err != nil || len(files) == 0 {
		t.Fatalf("no cases: %v", err)
	}
	var all []wireCase
	for _, name := range files {
		text, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		var cases []wireCase
		d := json.NewDecoder(bytes.NewReader(text))
		d.DisallowUnknownFields()
		if err := d.Decode(&cases); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		all = append(all, cases...)
	}
	return all
}

// seen is one request as it came to the app.
type seen struct {
	head   string
	body   []byte
	whole  bool
	faults []string // by which readers could take it for something else
}

// fields are the lines of the head.
func (s *seen) fields() (all [][2]string) {
	for _, line := range strings.Split(s.head, "\r\n")[1:] {
		name, value, _ := strings.Cut(line, ":")
		all = append(all, [2]string{name, strings.Trim(value, " \t")})
	}
	return all
}

// get is the value of a field, and how often it is there.
func (s *seen) get(name string) (value string, n int) {
	for _, f := range s.fields() {
		if strings.EqualFold(f[0], name) {
			value, n = f[1], n+1
		}
	}
	return value, n
}

// recorder is an app that takes down what comes, and repairs nothing.
type recorder struct {
	listener net.Listener

	mu  sync.Mutex
	all []*seen // guarded by mu
}

func newRecorder(t *testing.T) *recorder {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	r := &recorder{listener: l}
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go r.serve(c)
		}
	}()
	return r
}

// settlePath is asked for when a case is over: what was on its way to the app
// before it has come by then.
const settlePath = "/settle"

// take returns what came since it was called last, after a request of its own has
// come through.
func (r *recorder) take(t *testing.T, s *takotest.Server, host string) []*seen {
	t.Helper()
	if answer, err := s.Get(t.Context(), takotest.HTTP1, host+settlePath); err != nil || answer.StatusCode != http.StatusOK {
		t.Errorf("%s is not answered any more: %v, %v", host, answer.Response, err)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	var all []*seen
	for _, s := range r.all {
		if !strings.HasPrefix(s.head, "GET "+settlePath+" ") {
			as := *s // as it is now: it may not be whole
			all = append(all, &as)
		}
	}
	r.all = nil
	return all
}

func (r *recorder) serve(c net.Conn) {
	defer c.Close()
	in := bufio.NewReader(c)
	for r.one(c, in) {
	}
}

// one takes one request; false: the last.
func (r *recorder) one(c net.Conn, in *bufio.Reader) bool {
	if _, err := in.Peek(1); err != nil {
		return false
	}
	s := new(seen)
	r.mu.Lock()
	r.all = append(r.all, s)
	r.mu.Unlock()
	return r.read(s, c, in)
}

// note writes down what f does.
func (r *recorder) note(f func()) {
	r.mu.Lock()
	defer r.mu.Unlock()
	f()
}

func (r *recorder) read(s *seen, c net.Conn, in *bufio.Reader) (more bool) {
	var head []byte
	for !bytes.HasSuffix(head, []byte("\r\n\r\n")) {
		b, err := in.ReadByte()
		if err != nil || len(head) > 4<<20 {
			r.note(func() { s.head, s.faults = string(head), append(s.faults, "a head without end") })
			return false
		}
		head = append(head, b)
	}
	text := string(head[:len(head)-4])
	faults, length, chunked, expects, last := judgeHead(text)
	if strings.Contains(text, "/poison ") {
		faults = append(faults, "a request that nobody made")
	}
	r.note(func() { s.head, s.faults = text, faults })
	if expects {
		io.WriteString(c, "HTTP/1.1 100 Continue\r\n\r\n")
	}
	body, err := readBody(in, length, chunked)
	r.note(func() {
		s.body, s.whole = body, err == nil
		if err != nil && !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) {
			s.faults = append(s.faults, err.Error())
		}
	})
	if err != nil {
		return false
	}
	answer := "HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 2\r\n\r\n"
	if !strings.HasPrefix(text, "HEAD ") {
		answer += "ok"
	}
	_, err = io.WriteString(c, answer)
	return err == nil && !last
}

// judgeHead finds what must not reach an app, and how the body is framed.
func judgeHead(text string) (faults []string, length int, chunked, expects, last bool) {
	fault := func(format string, args ...any) { faults = append(faults, fmt.Sprintf(format, args...)) }
	lines := strings.Split(text, "\r\n")
	words := strings.Split(lines[0], " ")
	if len(words) != 3 || words[0] == "" || words[1] == "" || words[2] != "HTTP/1.1" && words[2] != "HTTP/1.0" || strings.ContainsAny(lines[0], "\t\v\f") {
		fault("the line %q", lines[0])
	}
	if strings.ContainsAny(strings.ReplaceAll(text, "\r\n", ""), "\r\n\x00") {
		fault("CR, LF or NUL in %q", text)
	}
	count := make(map[string]int)
	for _, line := range lines[1:] {
		name, value, ok := strings.Cut(line, ":")
		value = strings.Trim(value, " \t")
		if !ok || name == "" || strings.ContainsAny(name, " \t\v\f") {
			fault("the field line %q", line)
			continue
		}
		key := strings.ToLower(name)
		count[key]++
		switch key {
		case "content-length":
			n, err := strconv.Atoi(value)
			if err != nil || strings.Trim(value, "0123456789") != "" {
				fault("the length %q", value)
			}
			length = n
		case "transfer-encoding":
			if !strings.EqualFold(value, "chunked") {
				fault("the coding %q", value)
			}
			chunked = true
		case "expect":
			expects = strings.EqualFold(value, "100-continue")
		case "connection":
			last = last || strings.Contains(strings.ToLower(value), "close")
		}
	}
	for _, once := range []string{"host", "content-length", "transfer-encoding"} {
		if count[once] > 1 {
			fault("%d times %s", count[once], once)
		}
	}
	if count["content-length"] > 0 && chunked {
		fault("both a length and a coding")
	}
	return faults, length, chunked, expects, last
}

// readBody reads a body that is framed as proxies frame it: no extensions.
func readBody(in *bufio.Reader, length int, chunked bool) ([]byte, error) {
	if !chunked {
		body := make([]byte, length)
		n, err := io.ReadFull(in, body)
		return body[:n], err
	}
	var body []byte
	for {
		line, err := in.ReadString('\n')
		if err != nil {
			return body, err
		}
		size, err := strconv.ParseUint(strings.TrimSuffix(line, "\r\n"), 16, 31)
		if err != nil {
			return body, fmt.Errorf("the chunk size %q", line)
		}
		if size == 0 {
			break
		}
		chunk := make([]byte, size+2)
		if _, err := io.ReadFull(in, chunk); err != nil {
			return body, err
		}
		if !bytes.HasSuffix(chunk, []byte("\r\n")) {
			return body, errors.New("a chunk without its end")
		}
		body = append(body, chunk[:size]...)
	}
	for { // trailers
		line, err := in.ReadString('\n')
		if err != nil || line == "\r\n" {
			return body, err
		}
	}
}

// talked is what a client got.
type talked struct {
	statuses []int // of final answers
	closed   bool
	note     string
}

// talk sends a case and reads until its answers have come and no more, or until
// the connection ends.
func talk(conn net.Conn, c *wireCase, send []byte) (got talked) {
	defer conn.Close()
	sent := make(chan struct{})
	go func() {
		defer close(sent)
		step := len(send)
		if c.Bytewise {
			step = 1
		}
		for i := 0; i < len(send); i += step {
			if _, err := conn.Write(send[i:min(len(send), i+step)]); err != nil {
				return
			}
			if c.Bytewise {
				time.Sleep(time.Millisecond)
			}
		}
		if half, ok := conn.(interface{ CloseWrite() error }); ok && c.HalfClose {
			half.CloseWrite()
		}
	}()
	defer func() { conn.Close(); <-sent }()
	in := bufio.NewReader(conn)
	method := http.MethodGet
	if bytes.HasPrefix(send, []byte("HEAD ")) {
		method = http.MethodHead
	}
	for {
		wait := answerWait
		if len(got.statuses) >= max(1, c.Requests) && !c.Closes {
			wait = quietWait
		}
		conn.SetReadDeadline(time.Now().Add(wait))
		if _, err := in.Peek(1); err != nil {
			got.closed = !errors.Is(err, os.ErrDeadlineExceeded)
			return got
		}
		res, err := http.ReadResponse(in, &http.Request{Method: method})
		if err == nil {
			_, err = io.Copy(io.Discard, res.Body)
		}
		if err != nil {
			got.note, got.closed = "an answer that cannot be read: "+err.Error(), true
			return got
		}
		if res.StatusCode >= 200 {
			got.statuses = append(got.statuses, res.StatusCode)
		}
	}
}

// judge says what is wrong with what a case led to.
func (c *wireCase) judge(got talked, saw []*seen) (faults []string) {
	fault := func(format string, args ...any) { faults = append(faults, fmt.Sprintf(format, args...)) }
	if got.note != "" {
		fault("%s", got.note)
	}
	whole := 0
	for _, s := range saw {
		if s.whole {
			whole++
		}
		for _, f := range s.faults {
			if !s.whole && f == "a head without end" && s.head == "" {
				continue
			}
			fault("UNSAFE: the app saw %s", f)
		}
	}
	first := 0
	if len(got.statuses) > 0 {
		first = got.statuses[0]
	}
	if first == 0 && !got.closed {
		fault("HANG: neither an answer nor the end of the connection within %s", answerWait)
	}
	refused := whole == 0 && (first >= 400 || first == 0 && got.closed || slices.Contains(c.Also, first))
	switch {
	case c.Want == "refuse" && !refused:
		fault("it was not refused: status %d, the app saw %d", first, whole)
	case c.Want == "accept" && (first < 200 || first > 299 || len(got.statuses) < c.Requests):
		fault("it was not accepted: statuses %d", got.statuses)
	case c.Want == "accept" && whole != max(1, c.Requests):
		fault("the app saw %d requests, want %d", whole, max(1, c.Requests))
	}
	if whole == 0 {
		return faults
	}
	if c.Closes && !got.closed {
		fault("the connection was kept")
	}
	for i, s := range saw {
		if !s.whole {
			continue
		}
		if i == 0 && c.Body != nil && !bytes.Equal(s.body, c.Body.bytes()) {
			fault("the app saw the body %.60q of %d bytes", s.body, len(s.body))
		}
		for _, absent := range c.Absent {
			name, value, whole := strings.Cut(absent, ":")
			for _, f := range s.fields() {
				if strings.EqualFold(f[0], name) && (!whole || f[1] == strings.Trim(value, " ")) {
					fault("the app saw %s: %s", f[0], f[1])
				}
			}
		}
		for name, value := range c.Present {
			if got, n := s.get(name); n != 1 || got != value {
				fault("the app saw %d times %s: %q, want %q", n, name, got, value)
			}
		}
		for _, name := range c.Wanted {
			if _, n := s.get(name); n == 0 {
				fault("the app did not see %s", name)
			}
		}
		if host, _ := s.get("Host"); c.Host != "" && strings.ToLower(strings.Split(host, ":")[0]) != c.Host {
			fault("the app saw the host %q", host)
		}
	}
	return faults
}

// An engine is what speaks HTTP, and the cases that it is known to miss. A miss
// that is over is not one any more.
type engine struct {
	name   string
	misses []string
}

// engines are those to try: the default, and in all of the tests the other one.
func engines() []engine {
	if conforming() {
		return []engine{takoEngine, netHTTPEngine}
	}
	return []engine{takoEngine}
}

var (
	takoEngine = engine{name: "tako"}
	// Go's own is lenient in places where nobody can get between.
	netHTTPEngine = engine{name: "net/http", misses: []string{
		"chunk/ext-nul", "chunk/then-another", "host/absolute-empty-host", "line/target-fragment", "line/target-authority-get", "line/target-asterisk-get",
		"trailer/space-before-colon", "trailer/name-space", "valid/leading-crlf", "valid/pipeline-chunked-get",
		"h2 length/over-64-bits", "h2 length/letters", "h2 length/two-different", "h2 length/minus", "h2 length/plus", "h2 length/hexadecimal", "h2 length/list-different", "h2 length/zero",
		"h2 length/without-a-body", "h2 length/too-short", "h2 path/authority",
	}}
)

// recorders starts a server with apps that are recorders: h0.localhost and so on.
func recorders(t *testing.T, e engine, n int) (*takotest.Server, []*recorder) {
	t.Helper()
	s := prepare(t, takotest.Options{Flags: []string{"--http-engine", e.name}})
	if err := s.Start(); err != nil {
		t.Fatal(err)
	}
	all := make([]*recorder, n)
	for i := range all {
		all[i] = newRecorder(t)
		deploy(t, s, fmt.Sprintf("h%d", i), "1", quick(map[string]any{"health": map[string]any{"kind": "connect"}}), "-relay", all[i].listener.Addr().String())
	}
	return s, all
}

// dialer opens connections to a server, plain or over TLS with HTTP/1.1.
func dialer(s *takotest.Server, secure bool) func(host string) (net.Conn, error) {
	return func(host string) (net.Conn, error) {
		if !secure {
			return net.DialTimeout("tcp", net.JoinHostPort("127.0.0.1", strconv.Itoa(s.HTTP)), answerWait)
		}
		return tls.DialWithDialer(&net.Dialer{Timeout: answerWait}, "tcp", net.JoinHostPort("127.0.0.1", strconv.Itoa(s.HTTPS)),
			&tls.Config{InsecureSkipVerify: true, ServerName: host, NextProtos: []string{"http/1.1"}})
	}
}

// tally counts verdicts and says them in the log.
type tally struct {
	mu    sync.Mutex
	count map[string]int // guarded by mu
}

func (y *tally) add(kind string) {
	y.mu.Lock()
	defer y.mu.Unlock()
	if y.count == nil {
		y.count = make(map[string]int)
	}
	y.count[kind]++
}

func (y *tally) String() string {
	y.mu.Lock()
	defer y.mu.Unlock()
	var parts []string
	for _, kind := range slices.Sorted(maps.Keys(y.count)) {
		parts = append(parts, fmt.Sprintf("%s %d", kind, y.count[kind]))
	}
	return strings.Join(parts, ", ")
}

// verdict counts a case, and says what is wrong with it unless that is known.
func (y *tally) verdict(t *testing.T, e engine, name, kind string, faults []string, more string) {
	t.Helper()
	switch {
	case len(faults) == 0:
		y.add(kind + " passed")
	case slices.Contains(e.misses, name) && !strings.Contains(strings.Join(faults, ""), "UNSAFE"):
		y.add(kind + " missed")
	default:
		y.add(kind + " FAILED")
		t.Errorf("%s (%s)\n  %s\n  %s", name, kind, more, strings.Join(faults, "\n  "))
	}
}

// TestConformanceOfRequests sends every case of testdata/conformance through the
// real programs: none may hang, and the app must never see what could be read in
// two ways.
func TestConformanceOfRequests(t *testing.T) {
	t.Parallel()
	cases := wireCases(t)
	for _, e := range engines() {
		s, apps := recorders(t, e, appsBeside)
		secures := []bool{false}
		if conforming() {
			secures = append(secures, true)
		}
		for _, secure := range secures {
			dial := dialer(s, secure)
			var count tally
			next := make(chan *wireCase)
			var wg sync.WaitGroup
			for i, app := range apps {
				wg.Go(func() {
					host := fmt.Sprintf("h%d.localhost", i)
					for c := range next {
						try(t, c, e, s, host, app, dial, &count)
					}
				})
			}
			for i := range cases {
				next <- &cases[i]
			}
			close(next)
			wg.Wait()
			t.Logf("%d requests, engine %s, TLS %v: %v", len(cases), e.name, secure, &count)
		}
	}
}

// try tries one case.
func try(t *testing.T, c *wireCase, e engine, s *takotest.Server, host string, app *recorder, dial func(string) (net.Conn, error), count *tally) {
	mine, as := *c, strings.NewReplacer("h0.localhost", host, "H0.LOCALHOST", strings.ToUpper(host))
	mine.Host = as.Replace(c.Host)
	if c.Body != nil {
		mine.Body = &repeat{Text: as.Replace(c.Body.Text), Times: c.Body.Times}
	}
	send := bytes.Replace(latin1(as.Replace(c.Send)), []byte("{fill}"), c.Fill.bytes(), 1)
	conn, err := dial(host)
	if err != nil {
		t.Errorf("%s: %v", c.Name, err)
		return
	}
	got := talk(conn, &mine, send)
	saw := app.take(t, s, host)
	kind := c.Want
	if c.Must {
		kind += " (MUST)"
	}
	count.verdict(t, e, c.Name, kind, mine.judge(got, saw), fmt.Sprintf("%s: sent %.300q; statuses %d, closed %v, %d at the app", c.Rule, send, got.statuses, got.closed, len(saw)))
}
