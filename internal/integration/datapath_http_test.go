package integration

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"net/http/httptrace"
	"net/textproto"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"tako/internal/takotest"
)

// manners is an app that answers as its paths say.
func manners(w http.ResponseWriter, r *http.Request) {
	rc := http.NewResponseController(w)
	switch r.URL.Path {
	case "/hints":
		w.Header().Set("Link", "</a.css>; rel=preload")
		w.WriteHeader(http.StatusEarlyHints)
		w.Header().Del("Link")
		io.WriteString(w, "hinted")
	case "/417":
		w.WriteHeader(http.StatusExpectationFailed)
	case "/413": // unread
		w.Header().Set("Connection", "close")
		w.WriteHeader(http.StatusRequestEntityTooLarge)
		io.WriteString(w, "too large")
	case "/204":
		w.WriteHeader(http.StatusNoContent)
	case "/304":
		w.Header().Set("Content-Length", "1234")
		w.Header().Set("ETag", `"a"`)
		w.WriteHeader(http.StatusNotModified)
	case "/head":
		w.Header().Set("Content-Length", "1234")
		if r.Method != http.MethodHead {
			w.Write(make([]byte, 1234))
		}
	case "/empty":
		w.Header().Set("Content-Length", "0")
	case "/stream":
		rc.Flush()
		for i := range 3 {
			fmt.Fprintf(w, "part %d.", i)
			rc.Flush()
		}
	case "/trailers":
		n, _ := io.Copy(io.Discard, r.Body)
		w.Header().Set("Trailer", "X-Sum")
		fmt.Fprintf(w, "%d %s", n, r.Trailer.Get("X-Sum"))
		w.Header().Set("X-Sum", "43")
	case "/fields":
		fields := make(map[string][]string)
		maps.Copy(fields, r.Header)
		json.NewEncoder(w).Encode(fields)
	default:
		n, err := io.Copy(io.Discard, r.Body)
		if err != nil {
			w.WriteHeader(http.StatusBadRequest)
		}
		fmt.Fprintf(w, "%s %d", r.Method, n)
	}
}

// said writes text on a connection and reads one answer to a request of method.
func said(t *testing.T, c net.Conn, in *bufio.Reader, method, text string) (*http.Response, string) {
	t.Helper()
	if _, err := io.WriteString(c, text); err != nil {
		t.Fatal(err)
	}
	return readAnswer(t, in, method)
}

func readAnswer(t *testing.T, in *bufio.Reader, method string) (*http.Response, string) {
	t.Helper()
	res, err := http.ReadResponse(in, &http.Request{Method: method})
	if err != nil {
		t.Fatal(err)
	}
	body, err := io.ReadAll(res.Body)
	if err != nil {
		t.Fatal(err)
	}
	return res, string(body)
}

// ended wants the server to end the connection.
func ended(t *testing.T, in *bufio.Reader) {
	t.Helper()
	if b, err := in.ReadByte(); !errors.Is(err, io.EOF) {
		t.Errorf("the connection goes on with %q, %v", b, err)
	}
}

func TestDataPathMannersOfHTTP(t *testing.T) {
	t.Parallel()
	s := start(t, takotest.Options{})
	serveApp(t, s, "app", http.HandlerFunc(manners), nil)
	serveApp(t, s, "small", http.HandlerFunc(manners), map[string]any{"limits": map[string]any{"request_body": "1K"}})
	serveRaw(t, s, "close", func(c *net.TCPConn) { // answers until it closes
		in := bufio.NewReader(c)
		if _, err := http.ReadRequest(in); err == nil {
			io.WriteString(c, "HTTP/1.0 200 OK\r\n\r\nuntil the end")
		}
	})
	const host = "app.localhost"
	const head = " HTTP/1.1\r\nHost: " + host + "\r\n"
	for _, p := range []takotest.Protocol{takotest.HTTP1, takotest.TLS1} {
		open := func(t *testing.T) (net.Conn, *bufio.Reader) {
			c := connect(t, s, p, host)
			return c, bufio.NewReader(c)
		}
		t.Run(string(p), func(t *testing.T) {
			t.Run("100 only when the app wants the body", func(t *testing.T) {
				c, in := open(t)
				res, _ := said(t, c, in, "POST", "POST /"+head+"Content-Length: 5\r\nExpect: 100-continue\r\n\r\n")
				if res.StatusCode != http.StatusContinue {
					t.Fatalf("%s, want 100", res.Status)
				}
				if res, body := said(t, c, in, "POST", "hello"); res.StatusCode != 200 || body != "POST 5" {
					t.Errorf("%s %q", res.Status, body)
				}
			})
			for path, want := range map[string]int{"/417": 417, "/413": 413} {
				t.Run("no 100 before "+path, func(t *testing.T) {
					c, in := open(t)
					if res, _ := said(t, c, in, "POST", "POST "+path+head+"Content-Length: 500000000\r\nExpect: 100-continue\r\n\r\n"); res.StatusCode != want {
						t.Errorf("%s, want %d", res.Status, want)
					}
					ended(t, in) // what comes next could be the body
				})
			}
			t.Run("an upload that is refused before it is read", func(t *testing.T) {
				c, in := open(t)
				go func() {
					io.WriteString(c, "POST /413"+head+"Content-Length: 500000000\r\n\r\n")
					for block := make([]byte, 64<<10); ; {
						if _, err := c.Write(block); err != nil {
							return
						}
					}
				}()
				if res, body := readAnswer(t, in, "POST"); res.StatusCode != 413 || body != "too large" {
					t.Errorf("%s %q", res.Status, body)
				}
			})
			t.Run("a client that has ended its half gets its answer", func(t *testing.T) {
				c, in := open(t)
				if _, err := io.WriteString(c, "POST /"+head+"Content-Length: 5\r\n\r\nhello"); err != nil {
					t.Fatal(err)
				}
				closeWrite(t, c)
				if res, body := readAnswer(t, in, "POST"); res.StatusCode != 200 || body != "POST 5" {
					t.Errorf("%s %q", res.Status, body)
				}
				ended(t, in)
			})
			t.Run("answers without a body, one after the other", func(t *testing.T) {
				c, in := open(t)
				for _, x := range []struct {
					method, path string
					status       int
					length       string
				}{
					{"HEAD", "/head", 200, "1234"},
					{"GET", "/head", 200, "1234"},
					{"GET", "/204", 204, ""},
					{"GET", "/304", 304, "1234"},
					{"GET", "/empty", 200, "0"},
					{"HEAD", "/empty", 200, "0"},
					{"HEAD", "/304", 304, "1234"},
					{"POST", "/empty", 200, "0"},
				} {
					fields := "\r\n"
					if x.method == "POST" {
						fields = "Content-Length: 0\r\n\r\n"
					}
					res, body := said(t, c, in, x.method, x.method+" "+x.path+head+fields)
					wantBody := 0
					if x.method == "GET" && x.path == "/head" {
						wantBody = 1234
					}
					if res.StatusCode != x.status || len(body) != wantBody || x.status != 304 && res.Header.Get("Content-Length") != x.length {
						t.Errorf("%s %s: %s, length %q, body of %d, want %d, %q, %d", x.method, x.path, res.Status, res.Header.Get("Content-Length"), len(body), x.status, x.length, wantBody)
					}
				}
			})
			t.Run("HTTP/1.0", func(t *testing.T) {
				c, in := open(t)
				res, body := said(t, c, in, "GET", "GET /empty HTTP/1.0\r\nHost: "+host+"\r\nConnection: keep-alive\r\n\r\n")
				if res.StatusCode != 200 || !strings.EqualFold(res.Header.Get("Connection"), "keep-alive") || body != "" {
					t.Fatalf("%s %v", res.Status, res.Header)
				}
				res, body = said(t, c, in, "GET", "GET /stream HTTP/1.0\r\nHost: "+host+"\r\n\r\n")
				if res.StatusCode != 200 || len(res.TransferEncoding) > 0 || body != "part 0.part 1.part 2." {
					t.Errorf("%s, coding %q: %q", res.Status, res.TransferEncoding, body)
				}
				ended(t, in)
				c, in = open(t)
				if res, body := said(t, c, in, "GET", "GET /hints HTTP/1.0\r\nHost: "+host+"\r\n\r\n"); res.StatusCode != 200 || body != "hinted" {
					t.Errorf("%s %q: HTTP/1.0 knows no interim answers", res.Status, body)
				}
				ended(t, in)
			})
			t.Run("an answer until the app closes", func(t *testing.T) {
				c, in := open(t)
				for range 2 {
					if res, body := said(t, c, in, "GET", "GET / HTTP/1.1\r\nHost: close.localhost\r\n\r\n"); res.StatusCode != 200 || body != "until the end" || !res.ProtoAtLeast(1, 1) {
						t.Errorf("%s %s %q", res.Proto, res.Status, body)
					}
				}
			})
			t.Run("the largest body that an app takes", func(t *testing.T) {
				for _, n := range []int{1024, 1025, 100_000} {
					want := 200
					if n > 1024 {
						want = 413
					}
					c, in := open(t)
					if res, _ := said(t, c, in, "POST", fmt.Sprintf("POST / HTTP/1.1\r\nHost: small.localhost\r\nContent-Length: %d\r\n\r\n%s", n, make([]byte, n))); res.StatusCode != want {
						t.Errorf("counted, %d bytes: %s, want %d", n, res.Status, want)
					}
					c, in = open(t)
					if res, _ := said(t, c, in, "POST", fmt.Sprintf("POST / HTTP/1.1\r\nHost: small.localhost\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\n\r\n", n, make([]byte, n))); res.StatusCode != want {
						t.Errorf("chunked, %d bytes: %s, want %d", n, res.Status, want)
					}
				}
			})
		})
	}
	for _, p := range protocols {
		t.Run("client/"+string(p), func(t *testing.T) {
			client := s.Client(p)
			defer client.CloseIdleConnections()
			client.Transport.(*http.Transport).ExpectContinueTimeout = takotest.AskWait
			do := func(method, path string, body io.Reader, change func(*http.Request)) (takotest.Answer, error) {
				req, err := http.NewRequest(method, s.URL(p, path), body)
				if err != nil {
					t.Fatal(err)
				}
				if change != nil {
					change(req)
				}
				return takotest.Do(client, req)
			}
			var hints []string
			answer, err := do("GET", host+"/hints", nil, func(r *http.Request) {
				*r = *r.WithContext(httptrace.WithClientTrace(r.Context(), &httptrace.ClientTrace{Got1xxResponse: func(code int, h textproto.MIMEHeader) error {
					hints = append(hints, fmt.Sprint(code, " ", h.Get("Link")))
					return nil
				}}))
			})
			if err != nil || answer.Text != "hinted" || len(hints) != 1 || hints[0] != "103 </a.css>; rel=preload" || answer.Header.Get("Link") != "" {
				t.Errorf("early hints: %v, %q, %q", err, answer.Text, hints)
			}
			answer, err = do("POST", host+"/", strings.NewReader("hello"), func(r *http.Request) { r.Header.Set("Expect", "100-continue") })
			if err != nil || answer.Text != "POST 5" {
				t.Errorf("100-continue: %v, %q", err, answer.Text)
			}
			for path, want := range map[string]int{"/417": 417, "/413": 413} {
				answer, err = do("POST", host+path, strings.NewReader("hello"), func(r *http.Request) { r.Header.Set("Expect", "100-continue") })
				if err != nil || answer.StatusCode != want {
					t.Errorf("100-continue refused: %v, %v, want %d", answer.Response, err, want)
				}
			}
			answer, err = do("POST", host+"/413", io.LimitReader(zeroes{}, 5<<20), nil)
			if err == nil && answer.StatusCode != 413 || err != nil && p == takotest.H2 {
				t.Errorf("an upload that is not read: %v, %v", answer.Response, err)
			}
			for _, n := range []int{1024, 1025} {
				for _, length := range []int64{int64(n), -1} {
					answer, err = do("POST", "small.localhost/", bytes.NewReader(make([]byte, n)), func(r *http.Request) { r.ContentLength = length })
					if want := map[int]int{1024: 200, 1025: 413}[n]; err != nil || answer.StatusCode != want {
						t.Errorf("%d bytes of a body, length %d: %v, %v, want %d", n, length, answer.Response, err, want)
					}
				}
			}
			answer, err = do("POST", host+"/trailers", strings.NewReader("hello"), func(r *http.Request) {
				r.ContentLength, r.Trailer = -1, http.Header{"X-Sum": {"42"}}
				r.Header.Set("TE", "trailers")
			})
			if err != nil || answer.Text != "5 42" || answer.Trailer.Get("X-Sum") != "43" {
				t.Errorf("trailers: %v, %q, %v", err, answer.Text, answer.Trailer)
			}
			answer, err = do("GET", "close.localhost/", nil, nil)
			if err != nil || answer.Text != "until the end" {
				t.Errorf("until close: %v, %q", err, answer.Text)
			}
			answer, err = do("HEAD", host+"/head", nil, nil)
			if err != nil || answer.ContentLength != 1234 || answer.Text != "" {
				t.Errorf("HEAD: %v, %d", err, answer.ContentLength)
			}
			// What a stranger says of itself is not believed.
			answer, err = do("GET", host+"/fields", nil, spoof)
			if err != nil || strings.Contains(answer.Text, "203.0.113.") || strings.Contains(answer.Text, "spoofed") {
				t.Errorf("a stranger is believed: %v, %s", err, answer.Text)
			}
			for _, want := range []string{`"X-Forwarded-For":["127.0.0.1"]`, `"X-Forwarded-Host":["app.localhost:`, `"X-Forwarded-Proto":["http` + map[bool]string{true: "", false: "s"}[p == takotest.HTTP1] + `"]`} {
				if !strings.Contains(answer.Text, want) {
					t.Errorf("no %s in %s", want, answer.Text)
				}
			}
		})
	}
}

type zeroes struct{}

func (zeroes) Read(p []byte) (int, error) { clear(p); return len(p), nil }

// spoof has a request say all that only a proxy may say.
func spoof(r *http.Request) {
	for name, value := range map[string]string{
		"X-Forwarded-For": "203.0.113.7", "X-Forwarded-Host": "spoofed", "X-Forwarded-Proto": "spoofed", "X-Forwarded-Port": "spoofed",
		"Forwarded": "for=203.0.113.7;host=spoofed", "X-Real-Ip": "203.0.113.8", "X-Request-Id": "spoofed", "X_Forwarded_For": "203.0.113.9", "X-Forwarded_Host": "spoofed",
	} {
		r.Header[name] = []string{value}
	}
}

func TestDataPathBelievesTrustedProxies(t *testing.T) {
	t.Parallel()
	s := start(t, takotest.Options{Flags: []string{"--trusted-proxies", "127.0.0.1"}})
	serveApp(t, s, "app", http.HandlerFunc(manners), nil)
	for _, p := range protocols {
		client := s.Client(p)
		defer client.CloseIdleConnections()
		req, err := http.NewRequest(http.MethodGet, s.URL(p, "app.localhost/fields"), nil)
		if err != nil {
			t.Fatal(err)
		}
		req.Header = http.Header{
			"X-Forwarded-For": {"203.0.113.7", "203.0.113.8"}, "X-Forwarded-Host": {"shop.example"}, "X-Forwarded-Proto": {"https"}, "X-Forwarded-Port": {"444"},
			"Forwarded": {"for=203.0.113.7"}, "X-Request-Id": {"abc-1"},
		}
		answer, err := takotest.Do(client, req)
		if err != nil {
			t.Errorf("%s: %v", p, err)
			continue
		}
		for _, want := range []string{
			`"X-Forwarded-For":["203.0.113.7, 203.0.113.8, 127.0.0.1"]`, `"X-Forwarded-Host":["shop.example"]`, `"X-Forwarded-Proto":["https"]`, `"X-Forwarded-Port":["444"]`,
			`"Forwarded":["for=203.0.113.7"]`, `"X-Request-Id":["abc-1"]`,
		} {
			if !strings.Contains(answer.Text, want) {
				t.Errorf("%s: no %s in %s", p, want, answer.Text)
			}
		}
	}
}

// announcement is a header of the PROXY protocol for a client.
func announcement(version int, client string) []byte {
	if version == 1 {
		return fmt.Appendf(nil, "PROXY TCP4 %s 127.0.0.1 4321 443\r\n", client)
	}
	b := []byte("\r\n\r\n\x00\r\nQUIT\n\x21\x11\x00\x0c")
	b = append(b, net.ParseIP(client).To4()...)
	b = append(b, 127, 0, 0, 1)
	return binary.BigEndian.AppendUint16(binary.BigEndian.AppendUint16(b, 4321), 443)
}

func TestDataPathAnnouncedClients(t *testing.T) {
	t.Parallel()
	s := prepare(t, takotest.Options{Flags: []string{"--proxy-protocol", "--trusted-proxies", "127.0.0.2"}})
	if err := s.Start(); err != nil {
		t.Fatal(err)
	}
	serveApp(t, s, "app", http.HandlerFunc(manners), nil)
	const request = "GET /fields HTTP/1.1\r\nHost: app.localhost\r\nX-Forwarded-For: 203.0.113.99\r\nConnection: close\r\n\r\n"
	ask := func(from string, header []byte) string {
		d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(from)}, Timeout: answerWait}
		c, err := d.Dial("tcp", net.JoinHostPort("127.0.0.1", strconv.Itoa(s.HTTP)))
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		if err := c.SetDeadline(time.Now().Add(takotest.AskWait)); err != nil {
			t.Fatal(err)
		}
		// Byte by byte, as the worst of networks would have it.
		_ = writeIn(c, append(header, request...), func() int { return 1 }) // one that is refused may be closed meanwhile
		text, err := io.ReadAll(c)
		if err != nil && errors.Is(err, os.ErrDeadlineExceeded) {
			t.Error("a connection is neither served nor closed")
		}
		return string(text)
	}
	for version := 1; version <= 2; version++ {
		if text := ask("127.0.0.2", announcement(version, "198.51.100.7")); !strings.Contains(text, `"X-Forwarded-For":["198.51.100.7"]`) {
			t.Errorf("version %d: %q", version, text)
		}
	}
	for name, text := range map[string]string{
		"this host, not named": ask("127.0.0.1", announcement(2, "198.51.100.7")),
		"a stranger":           ask("127.0.0.9", announcement(1, "198.51.100.7")),
		"a stranger, 2":        ask("127.0.0.9", announcement(2, "198.51.100.7")),
		"no announcement":      ask("127.0.0.2", nil),
		"another protocol":     ask("127.0.0.2", []byte("PROXY TCP5 1.2.3.4 1.2.3.4 1 2\r\n")),
		"an address that errs": ask("127.0.0.2", announcement(1, "198.51.100.777")),
	} {
		if text != "" {
			t.Errorf("%s is answered %q", name, text)
		}
	}
}

// TestDataPathEngineChangesUnderLoad: a reload brings net/http in place of our own
// codecs, the next one brings them back, and nobody notices.
func TestDataPathEngineChangesUnderLoad(t *testing.T) {
	t.Parallel()
	s := prepare(t, takotest.Options{})
	engine := func(name string) {
		t.Helper()
		if err := errors.Join(os.MkdirAll(s.Data, 0o711), os.WriteFile(filepath.Join(s.Data, "server-config.toml"), fmt.Appendf(nil, "http-engine = %q\n", name), 0o600)); err != nil {
			t.Fatal(err)
		}
	}
	engine("tako")
	if err := s.Start(); err != nil {
		t.Fatal(err)
	}
	deploy(t, s, "blog", "1", quick(nil))
	// What tells them apart: only our own refuses a fragment.
	is := func() string {
		c := connect(t, s, takotest.HTTP1, "blog.localhost")
		res, _ := said(t, c, bufio.NewReader(c), "GET", "GET /#a HTTP/1.1\r\nHost: blog.localhost\r\nConnection: close\r\n\r\n")
		if res.StatusCode == http.StatusBadRequest {
			return "tako"
		}
		return "net/http"
	}
	clients := []takotest.Way{{Protocol: takotest.TLS1, Kept: true}, {Protocol: takotest.HTTP1, Kept: true}, {Protocol: takotest.TLS1}, {Protocol: takotest.HTTP1}, {Protocol: takotest.H2, Streams: 2}, {Protocol: takotest.H2, Streams: 2}}
	l := s.Load(t.Context(), "blog.localhost/", takotest.LoadOptions{Clients: 6, Ways: clients, Pause: 10 * time.Millisecond})
	defer l.Stop()
	for _, name := range []string{"net/http", "tako", "net/http", "tako"} {
		engine(name)
		if r := reload(t, s); r.LastError != "" {
			t.Fatal(r.LastError)
		}
		until(t, takotest.StartWait, name+" answers", func() bool { return is() == name })
	}
	r := l.Stop()
	if r.Failures > 0 || r.Requests == 0 {
		t.Errorf("%v", r)
	}
	t.Log(r)
}
