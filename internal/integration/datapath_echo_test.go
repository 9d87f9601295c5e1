package integration

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"

	"tako/internal/takotest"
)

// An echoRequest is a request whose every part the app has to say again.
type echoRequest struct {
	id      string
	method  string
	target  string
	fields  [][2]string
	body    []byte
	chunked bool  // or counted, if there is a body
	chunks  []int // the sizes of the first ones
	trailer [][2]string
	want    int    // bytes of the answer
	how     string // the answer is counted, chunked or until-close
}

// echoKind is what an app can take.
type echoKind struct {
	methods  []string
	trailers bool
	obsText  bool
	hows     []string
	maxBody  int
}

func pick[T any](r *rand.Rand, from []T) T { return from[r.IntN(len(from))] }

// text is random text of these characters.
func text(r *rand.Rand, from string, n int) string {
	b := make([]byte, n)
	for i := range b {
		b[i] = from[r.IntN(len(from))]
	}
	return string(b)
}

const (
	letters    = "abcdefghijklmnopqrstuvwxyz"
	unreserved = letters + "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-._~"
	pathChars  = unreserved + "!$&'()*+,;=:@"
)

// sizes at which buffers, chunks and frames end.
var sizes = []int{0, 1, 2, 15, 16, 17, 255, 256, 1023, 1024, 4095, 4096, 4097, 8192, 16383, 16384, 16385, 32768, 65535, 65536, 65537, 100_000}

func bodySize(r *rand.Rand, most int) int {
	if r.IntN(2) == 0 {
		return min(pick(r, sizes), most)
	}
	return r.IntN(min(most, 2000))
}

// newEcho makes a request up.
func newEcho(r *rand.Rand, id string, k *echoKind) *echoRequest {
	e := &echoRequest{id: id, method: pick(r, k.methods), want: bodySize(r, 100_000), how: pick(r, k.hows)}
	var path strings.Builder
	for i := range 1 + r.IntN(4) {
		switch part := r.IntN(8); {
		case i > 0 && part == 0:
			path.WriteString("/") // two in a row
		case part == 1:
			path.WriteString("/%" + text(r, "0123456789abcdefABCDEF", 1) + text(r, "0123456789abcdefABCDEF", 1))
		default:
			path.WriteString("/" + text(r, letters, 1) + text(r, pathChars, r.IntN(20)))
		}
	}
	e.target = path.String()
	if r.IntN(2) == 0 {
		e.target += "?" + text(r, pathChars+"/?", r.IntN(200))
	}
	value := func() string {
		chars := unreserved + "!\"#$&'()*+,/:;<=>?@[]{}|\\^` \t"
		if k.obsText {
			chars += "\x80\xe9\xff"
		}
		return strings.Trim(text(r, chars, pick(r, []int{0, 1, 10, 60, 700})), " \t")
	}
	for range r.IntN(8) {
		e.fields = append(e.fields, [2]string{"X-F" + text(r, letters+"-!'*.^", r.IntN(3)), value()})
	}
	if r.IntN(5) < 2 || e.method == http.MethodPost {
		e.body = filler(r.Uint64(), bodySize(r, k.maxBody))
		if e.chunked = r.IntN(2) == 0; e.chunked {
			for range r.IntN(6) {
				e.chunks = append(e.chunks, 1+pick(r, sizes))
			}
			if k.trailers {
				for i := range r.IntN(3) {
					e.trailer = append(e.trailer, [2]string{"X-T" + strconv.Itoa(i), value()})
				}
			}
		}
	}
	return e
}

// sum is the hash of fields, whatever the order of their names and however these
// are written.
func sum(fields [][2]string) string {
	lines := make([]string, 0, len(fields))
	for _, f := range fields {
		lines = append(lines, strings.ToLower(f[0])+":"+f[1])
	}
	slices.SortStableFunc(lines, func(a, b string) int {
		a, _, _ = strings.Cut(a, ":")
		b, _, _ = strings.Cut(b, ":")
		return strings.Compare(a, b)
	})
	return fmt.Sprintf("%x", sha256.Sum256([]byte(strings.Join(lines, "\n"))))
}

// says is what the app has to say of it.
func (e *echoRequest) says() string {
	return fmt.Sprintf("%s %s f=%s b=%d:%x t=%s", e.method, e.target, sum(e.fields), len(e.body), sha256.Sum256(e.body), sum(e.trailer))
}

// wire is the request by HTTP/1.1.
func (e *echoRequest) wire(host string) []byte {
	var b bytes.Buffer
	fmt.Fprintf(&b, "%s %s HTTP/1.1\r\nHost: %s\r\nX-Id: %s\r\nX-Want: %d\r\nX-How: %s\r\n", e.method, e.target, host, e.id, e.want, e.how)
	for _, f := range e.fields {
		fmt.Fprintf(&b, "%s: %s\r\n", f[0], f[1])
	}
	switch {
	case e.body == nil:
		b.WriteString("\r\n")
	case !e.chunked:
		fmt.Fprintf(&b, "Content-Length: %d\r\n\r\n%s", len(e.body), e.body)
	default:
		b.WriteString("Transfer-Encoding: chunked\r\n")
		for _, f := range e.trailer { // some apps take only what was announced
			fmt.Fprintf(&b, "Trailer: %s\r\n", f[0])
		}
		b.WriteString("\r\n")
		rest := e.body
		for i := 0; len(rest) > 0; i++ {
			n := len(rest)
			if i < len(e.chunks) {
				n = min(n, e.chunks[i])
			}
			fmt.Fprintf(&b, "%x\r\n%s\r\n", n, rest[:n])
			rest = rest[n:]
		}
		b.WriteString("0\r\n")
		for _, f := range e.trailer {
			fmt.Fprintf(&b, "%s: %s\r\n", f[0], f[1])
		}
		b.WriteString("\r\n")
	}
	return b.Bytes()
}

// request is the request for a client of net/http.
func (e *echoRequest) request(base string) (*http.Request, error) {
	u, err := url.Parse(base)
	if err != nil {
		return nil, err
	}
	u.Path, u.Opaque = "", e.target // as it is
	req := &http.Request{Method: e.method, URL: u, Host: u.Host, Header: http.Header{"X-Id": {e.id}, "X-Want": {strconv.Itoa(e.want)}, "X-How": {e.how}}}
	for _, f := range e.fields {
		req.Header[f[0]] = append(req.Header[f[0]], f[1])
	}
	if e.body != nil {
		req.Body, req.ContentLength = io.NopCloser(bytes.NewReader(e.body)), int64(len(e.body))
		if e.chunked {
			req.ContentLength = -1
			req.Trailer = http.Header{}
			for _, f := range e.trailer {
				req.Trailer[f[0]] = append(req.Trailer[f[0]], f[1])
			}
		}
		if len(e.body) == 0 && !e.chunked {
			req.Body = http.NoBody
		}
	}
	return req, nil
}

// check says what is wrong with an answer.
func (e *echoRequest) check(res *http.Response, body []byte, err error) error {
	wantBody := echoBody(e.id, e.want)
	if e.method == http.MethodHead {
		wantBody = nil
	}
	switch {
	case err != nil:
		return fmt.Errorf("%s: %w", e.id, err)
	case res.StatusCode != http.StatusOK:
		return fmt.Errorf("%s: %s: %.200s (sent %.300q)", e.id, res.Status, body, e.wire("h"))
	case res.Header.Get("X-Id") != e.id:
		return fmt.Errorf("%s got the answer of %s", e.id, res.Header.Get("X-Id"))
	case !bytes.Equal(body, wantBody):
		return fmt.Errorf("%s: %d bytes, want %d of its own", e.id, len(body), len(wantBody))
	case res.Header.Get("X-Says") != e.says():
		return fmt.Errorf("%s: the app saw\n\t%s\nnot\n\t%s\nfields %q, trailer %q", e.id, res.Header.Get("X-Says"), e.says(), e.fields, e.trailer)
	}
	return nil
}

// echoBody is the body of an answer: its request's id, over and over.
func echoBody(id string, n int) []byte {
	return bytes.Repeat([]byte(id+","), n/(len(id)+1)+1)[:n]
}

// goEcho is the app by net/http.
type goEcho struct {
	mu    sync.Mutex
	count map[string]int // guarded by mu: by id
}

func only(h http.Header, prefix string) (all [][2]string) {
	for name, values := range h {
		if strings.HasPrefix(strings.ToLower(name), prefix) {
			for _, v := range values {
				all = append(all, [2]string{name, v})
			}
		}
	}
	return all
}

func (g *goEcho) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	id := r.Header.Get("X-Id")
	g.mu.Lock()
	g.count[id]++
	g.mu.Unlock()
	hash := sha256.New()
	n, err := io.Copy(hash, r.Body)
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	h := w.Header()
	fields := slices.DeleteFunc(only(r.Header, "x-f"), func(f [2]string) bool { return strings.HasPrefix(f[0], "X-Forwarded") })
	h.Set("X-Id", id)
	h.Set("X-Says", fmt.Sprintf("%s %s f=%s b=%d:%x t=%s", r.Method, r.RequestURI, sum(fields), n, hash.Sum(nil), sum(only(r.Trailer, "x-t"))))
	want, _ := strconv.Atoi(r.Header.Get("X-Want"))
	body := echoBody(id, want)
	switch r.Header.Get("X-How") {
	case "counted":
		h.Set("Content-Length", strconv.Itoa(want))
	case "chunked":
		if r.Method != http.MethodHead {
			http.NewResponseController(w).Flush()
		}
	case "close":
		h.Set("Connection", "close")
		h.Set("Transfer-Encoding", "identity")
	}
	w.Write(body)
}

// nodeEcho is the same by node.
const nodeEcho = `'use strict';
const http = require('node:http'), crypto = require('node:crypto');
const hex = (b) => crypto.createHash('sha256').update(b).digest('hex');
const counts = {};
function sum(raw, prefix) {
  const all = [];
  for (let i = 0; i < raw.length; i += 2) {
    const name = raw[i].toLowerCase();
    if (name.startsWith(prefix) && !name.startsWith('x-forwarded')) all.push([name, raw[i + 1]]);
  }
  all.sort((a, b) => a[0] < b[0] ? -1 : a[0] > b[0] ? 1 : 0);
  return hex(Buffer.from(all.map(([n, v]) => n + ':' + v).join('\n'), 'latin1'));
}
http.createServer((req, res) => {
  if (req.url === '/status') return res.end('ok');
  if (req.url === '/counts') return res.end(JSON.stringify(counts));
  const id = req.headers['x-id'], parts = [];
  counts[id] = (counts[id] ?? 0) + 1;
  req.on('data', (d) => parts.push(d));
  req.on('end', () => {
    const body = Buffer.concat(parts), want = Number(req.headers['x-want']);
    res.setHeader('X-Id', id);
    res.setHeader('X-Says', req.method + ' ' + req.url + ' f=' + sum(req.rawHeaders, 'x-f') + ' b=' + body.length + ':' + hex(body) + ' t=' + sum(req.rawTrailers, 'x-t'));
    const out = (id + ',').repeat(want / (id.length + 1) + 1).slice(0, want), how = req.headers['x-how'];
    if (how === 'counted') res.setHeader('Content-Length', want);
    if (how === 'close') { res.setHeader('Connection', 'close'); res.useChunkedEncodingByDefault = false; }
    if (how === 'chunked') res.write(out.slice(0, want / 2));
    res.end(how === 'chunked' ? out.slice(want / 2) : out);
  });
}).listen(process.env.TAKO_APP_SOCKET || process.env.PORT);
process.on('SIGTERM', () => process.exit(0));
`

// oracle sends requests in all protocols, and returns their ids.
func oracle(t *testing.T, s *takotest.Server, host string, k echoKind) (sent []*echoRequest) {
	t.Helper()
	r := seeded(t)
	rounds, clients := 6, 2
	if soaking() {
		rounds, clients = 400, 4
	}
	var mu sync.Mutex
	var wg sync.WaitGroup
	failed := 0
	fault := func(err error) bool {
		mu.Lock()
		defer mu.Unlock()
		if err != nil {
			if failed++; failed <= 10 {
				t.Error(err)
			}
		}
		return failed <= 10
	}
	for _, p := range protocols {
		for c := range clients {
			r := rand.New(rand.NewPCG(r.Uint64(), r.Uint64()))
			fresh := func(round, i int) *echoRequest {
				e := newEcho(r, fmt.Sprintf("%s-%d-%d-%d", p, c, round, i), &k)
				mu.Lock()
				sent = append(sent, e)
				mu.Unlock()
				return e
			}
			wg.Go(func() {
				client := s.Client(p)
				defer client.CloseIdleConnections()
				for round := range rounds {
					var batch []*echoRequest
					for i := range 1 + r.IntN(8) {
						batch = append(batch, fresh(round, i))
					}
					if p == takotest.H2 {
						each(batch, func(e *echoRequest) {
							req, err := e.request(s.URL(p, host+"/"))
							if err != nil {
								fault(err)
								return
							}
							answer, err := takotest.Do(client, req)
							fault(e.check(answer.Response, []byte(answer.Text), err))
						})
					} else {
						pipelined(s, p, host, batch, rand.New(rand.NewPCG(r.Uint64(), 0)), func(err error) { fault(err) })
					}
					if !fault(nil) {
						return
					}
				}
			})
		}
	}
	wg.Wait()
	t.Logf("%d requests, %d of them wrong", len(sent), failed)
	return sent
}

// pipelined sends all requests at once, cut anywhere, and reads their answers.
func pipelined(s *takotest.Server, p takotest.Protocol, host string, batch []*echoRequest, r *rand.Rand, fault func(error)) {
	conn, err := dialer(s, p == takotest.TLS1)(host)
	if err != nil {
		fault(err)
		return
	}
	var all []byte
	for _, e := range batch {
		all = append(all, e.wire(host)...)
	}
	most := pick(r, []int{7, 100, 5000, len(all)})
	if len(all)/most > 2000 {
		most = len(all)
	}
	written := make(chan error, 1)
	go func() { written <- writeIn(conn, all, func() int { return r.IntN(most) + 1 }) }()
	defer func() { conn.Close(); <-written }()
	in := bufio.NewReader(conn)
	for _, e := range batch {
		var body []byte
		res, err := http.ReadResponse(in, &http.Request{Method: e.method})
		if err == nil {
			body, err = io.ReadAll(res.Body)
		}
		if err := e.check(res, body, err); err != nil {
			fault(err)
			return
		}
	}
}

// once wants each request to have come exactly once.
func once(t *testing.T, sent []*echoRequest, count map[string]int) {
	t.Helper()
	for _, e := range sent {
		if n := count[e.id]; n != 1 {
			t.Errorf("the app saw %s %d times", e.id, n)
		}
		delete(count, e.id)
	}
	delete(count, "undefined")
	for id, n := range count {
		t.Errorf("the app saw %q %d times, which nobody sent", id, n)
	}
}

var (
	plainMethods = []string{"GET", "GET", "HEAD", "POST", "POST", "PUT", "DELETE", "PATCH", "OPTIONS"}
	allHows      = []string{"counted", "chunked", "close", ""}
)

func TestDataPathEchoesOfAGoApp(t *testing.T) {
	t.Parallel()
	s := start(t, takotest.Options{})
	app := &goEcho{count: make(map[string]int)}
	serveApp(t, s, "echo", app, nil)
	sent := oracle(t, s, hostOf("echo"), echoKind{
		methods: append([]string{"PROPFIND", "X-ANY.thing!"}, plainMethods...), trailers: true, obsText: true, hows: allHows, maxBody: 100_000,
	})
	once(t, sent, app.count)
}

func TestDataPathEchoesOfAnH2CApp(t *testing.T) {
	t.Parallel()
	s := start(t, takotest.Options{})
	app := &goEcho{count: make(map[string]int)}
	serveApp(t, s, "echo", app, map[string]any{"protocol": "h2c"})
	sent := oracle(t, s, hostOf("echo"), echoKind{
		methods: append([]string{"PROPFIND", "X-ANY.thing!"}, plainMethods...), trailers: true, obsText: true, hows: []string{"counted", "chunked", ""}, maxBody: 100_000,
	})
	once(t, sent, app.count)
}

func TestDataPathEchoesOfANodeApp(t *testing.T) {
	t.Parallel()
	if _, err := exec.LookPath("node"); err != nil {
		t.Skip("needs node")
	}
	s := start(t, takotest.Options{})
	dir := filepath.Join(t.TempDir(), "app")
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	manifest, err := json.Marshal(quick(map[string]any{"runtime": "node", "main": "server.js"}))
	if err != nil {
		t.Fatal(err)
	}
	for name, content := range map[string]string{"app.json": string(manifest), "server.js": nodeEcho} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if _, stderr, code, err := s.Ctl(t.Context(), "deploy", dir, "--app", "echo", "--route", hostOf("echo")); err != nil || code != 0 {
		t.Fatalf("deploy: %v, %d, %s", err, code, stderr)
	}
	sent := oracle(t, s, hostOf("echo"), echoKind{methods: append([]string{"PROPFIND", "REPORT"}, plainMethods...), trailers: true, obsText: true, hows: allHows, maxBody: 100_000})
	answer, err := s.Get(t.Context(), takotest.TLS1, hostOf("echo")+"/counts")
	count := make(map[string]int)
	if err == nil {
		err = json.Unmarshal([]byte(answer.Text), &count)
	}
	if err != nil {
		t.Fatal(err)
	}
	once(t, sent, count)
}

// nginxEcho is an app by nginx, that passes requests on to itself so that it
// writes down their bodies.
const nginxEcho = `daemon off; master_process off; pid DIR/pid; error_log DIR/error.log;
events { worker_connections 512; }
http {
  log_format seen escape=json '{"id":"$http_x_id","method":"$request_method","target":"$request_uri","body":"$request_body","a":"$http_x_fa"}';
  client_body_buffer_size 256k; client_body_in_single_buffer on; client_max_body_size 1m; proxy_max_temp_file_size 0; large_client_header_buffers 8 32k;
  client_body_temp_path DIR/body; proxy_temp_path DIR/proxy; fastcgi_temp_path DIR/f; uwsgi_temp_path DIR/u; scgi_temp_path DIR/s;
  server { listen 127.0.0.1:PORT; access_log DIR/seen.log seen;
    location / { proxy_pass http://unix:DIR/sock:; proxy_http_version 1.1; } }
  server { listen unix:DIR/sock; access_log off; keepalive_timeout 0;
    location / { add_header X-Id $http_x_id; return 200 "$http_x_id"; } }
}
`

// TestDataPathEchoesOfNginx: nginx reads requests in its own way; what it takes
// down is what was sent.
func TestDataPathEchoesOfNginx(t *testing.T) {
	t.Parallel()
	program, err := exec.LookPath("nginx")
	if err != nil {
		if soaking() {
			t.Skip("needs nginx")
		}
		return
	}
	s := start(t, takotest.Options{})
	ports, err := takotest.FreePorts(1)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	conf := strings.NewReplacer("DIR", dir, "PORT", strconv.Itoa(ports[0])).Replace(nginxEcho)
	if err := os.WriteFile(filepath.Join(dir, "nginx.conf"), []byte(conf), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(program, "-p", dir, "-c", filepath.Join(dir, "nginx.conf"))
	var said bytes.Buffer
	cmd.Stdout, cmd.Stderr = &said, &said
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
		if t.Failed() {
			t.Logf("nginx: %s", said.String())
		}
	})
	address := net.JoinHostPort("127.0.0.1", strconv.Itoa(ports[0]))
	until(t, takotest.StartWait, "nginx listens", func() bool {
		c, err := net.Dial("tcp", address)
		if err == nil {
			c.Close()
		}
		return err == nil
	})
	relayed(t, s, "echo", address, nil)
	sent := nginxOracle(t, s, hostOf("echo"))

	type line struct{ ID, Method, Target, Body, A string }
	seen := make(map[string]line)
	count := make(map[string]int)
	until(t, takotest.AskWait, "nginx has written all down", func() bool { // after its answer
		log, err := os.ReadFile(filepath.Join(dir, "seen.log"))
		return err == nil && bytes.Count(log, []byte("\n")) >= len(sent)
	})
	log, err := os.ReadFile(filepath.Join(dir, "seen.log"))
	if err != nil {
		t.Fatal(err)
	}
	for text := range strings.Lines(string(log)) {
		var l line
		if err := json.Unmarshal([]byte(text), &l); err != nil {
			t.Fatalf("%q: %v", text, err)
		}
		count[l.ID]++
		seen[l.ID] = l
	}
	for _, e := range sent {
		l := seen[e.id]
		if l.Method != e.method || l.Target != e.target || l.Body != string(e.body) || l.A != e.fields[0][1] {
			t.Errorf("nginx saw %.300v, not %s %s %q and %d bytes", l, e.method, e.target, e.fields, len(e.body))
		}
	}
	once(t, sent, count)
}

// nginxOracle sends what nginx can write down: bodies of text.
func nginxOracle(t *testing.T, s *takotest.Server, host string) (sent []*echoRequest) {
	t.Helper()
	r := seeded(t)
	rounds := 10
	if soaking() {
		rounds = 500
	}
	kind := echoKind{methods: plainMethods, hows: allHows, maxBody: 100_000}
	var mu sync.Mutex
	each(protocols, func(p takotest.Protocol) {
		mu.Lock()
		r := rand.New(rand.NewPCG(r.Uint64(), 0))
		mu.Unlock()
		client := s.Client(p)
		defer client.CloseIdleConnections()
		for round := range rounds {
			e := newEcho(r, fmt.Sprintf("%s-%d", p, round), &kind)
			e.fields = [][2]string{{"X-Fa", text(r, letters, r.IntN(300))}}
			e.body = []byte(text(r, letters, len(e.body)))
			if len(e.body) == 0 {
				e.body, e.chunked = nil, false
			}
			mu.Lock()
			sent = append(sent, e)
			mu.Unlock()
			req, err := e.request(s.URL(p, host+"/"))
			if err != nil {
				t.Error(err)
				return
			}
			answer, err := takotest.Do(client, req)
			want := e.id
			if e.method == http.MethodHead {
				want = ""
			}
			if err != nil || answer.StatusCode != http.StatusOK || answer.Text != want || answer.Header.Get("X-Id") != e.id {
				t.Errorf("%s %s: %v, %v, %.100q", e.id, e.method, answer.Response, err, answer.Text)
				return
			}
		}
	})
	t.Logf("%d requests", len(sent))
	return sent
}
