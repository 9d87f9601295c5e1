package h1

import (
	"errors"
	"strings"
	"testing"

	"tako/internal/proxy/message"
)

// parseRequest parses what must be a whole head or an error.
func parseRequest(t testing.TB, raw string) (*RequestHead, int, *message.Error) {
	t.Helper()
	r := &RequestHead{}
	n, err := ParseRequest([]byte(raw), r)
	if err == nil {
		return r, n, nil
	}
	e, ok := errors.AsType[*message.Error](err)
	if !ok || n != 0 {
		t.Fatalf("%q: %d, %v", raw, n, err)
	}
	return r, n, e
}

func TestRequestsThatAreRead(t *testing.T) {
	type want struct {
		method, target, host string
		minor                uint8
		length               int64
		fields               int
		close                bool
	}
	for raw, want := range map[string]want{
		"GET / HTTP/1.1\r\nHost: h\r\n\r\n":                                                      {"GET", "/", "h", 1, 0, 0, false},
		"GET / HTTP/1.2\r\nHost: h\r\n\r\n":                                                      {"GET", "/", "h", 1, 0, 0, false},
		"\r\nGET /?a=b HTTP/1.1\r\nHost:h:80\r\nX:\r\n\r\n":                                      {"GET", "/?a=b", "h:80", 1, 0, 1, false},
		"GET / HTTP/1.0\r\n\r\n":                                                                 {"GET", "/", "", 0, 0, 0, true},
		"GET / HTTP/1.0\r\nConnection: Keep-Alive\r\n\r\n":                                       {"GET", "/", "", 0, 0, 1, false},
		"GET / HTTP/1.1\r\nHost: h\r\nConnection: x, close\r\nConnection: keep-alive\r\n\r\n":    {"GET", "/", "h", 1, 0, 2, true},
		"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: \t005 \t\r\n\r\n":                         {"POST", "/", "h", 1, 5, 1, false},
		"POST / HTTP/1.1\r\nHost: h\r\ntRANSFER-eNCODING:\tChUnKeD\t\r\n\r\n":                    {"POST", "/", "h", 1, message.Unknown, 1, false},
		"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 9223372036854775807\r\n\r\n":              {"POST", "/", "h", 1, 1<<63 - 1, 1, false},
		"OPTIONS * HTTP/1.1\r\nHost: h\r\n\r\n":                                                  {"OPTIONS", "*", "h", 1, 0, 0, false},
		"GET http://H/p?q HTTP/1.1\r\nHost: h:80\r\n\r\n":                                        {"GET", "/p?q", "h:80", 1, 0, 0, false},
		"GET HTTPS://h?q HTTP/1.1\r\nHost: h:443\r\n\r\n":                                        {"GET", "/?q", "h:443", 1, 0, 0, false},
		"GET http://h HTTP/1.0\r\n\r\n":                                                          {"GET", "/", "h", 0, 0, 0, true},
		"OPTIONS http://h HTTP/1.1\r\nHost: h\r\n\r\n":                                           {"OPTIONS", "*", "h", 1, 0, 0, false},
		"get /a|b\\c HTTP/1.1\r\nx!#$%&'*+-.^`|~0: \xe9\t1\r\nHost: [::1]:1\r\nhostx: 1\r\n\r\n": {"get", "/a|b\\c", "[::1]:1", 1, 0, 2, false},
	} {
		r, n, err := parseRequest(t, raw)
		if err != nil || n != len(raw) {
			t.Errorf("%q: %d, %v", raw, n, err)
			continue
		}
		if string(r.Method) != want.method || string(r.Target) != want.target || string(r.Host) != want.host || r.Minor != want.minor ||
			r.Length != want.length || len(r.Fields) != want.fields || r.Close != want.close || r.Chunked != (want.length == message.Unknown) {
			t.Errorf("%q: %s %s %s %+v", raw, r.Method, r.Target, r.Host, r)
		}
	}
}

func TestRequestsThatAreRefused(t *testing.T) {
	const get = "GET / HTTP/1.1\r\nHost: h\r\n"
	for raw, status := range map[string]int{
		"GET /\r\n":                                    400,
		"GET / HTTP/1.1\nHost: h\n\n":                  400,
		"GET / HTTP/1.1\rHost: h\r\r":                  400,
		"GET  / HTTP/1.1\r\n":                          400,
		" GET / HTTP/1.1\r\n":                          400,
		"GET / HTTP/1.1 \r\n":                          400,
		"GET\t/ HTTP/1.1\r\n":                          400,
		"GET / http/1.1\r\n":                           400,
		"GET / HTTP/1.10\r\n":                          400,
		"GET / HTTP/1,1\r\n":                           400,
		"GET / HTTP/2.0\r\n":                           505,
		"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n":             505,
		"GET / HTTP/0.9\r\n":                           505,
		"\r\n\r\nGET / HTTP/1.1\r\n":                   400,
		"\rG":                                          400,
		"\x16\x03\x01":                                 400,
		"G(T":                                          400,
		"GET /\x01":                                    400,
		"GET /a#b":                                     400,
		"GET /\xc3\xa9":                                400,
		"GET * HTTP/1.1\r\nHost: h\r\n\r\n":            400,
		"GET a HTTP/1.1\r\nHost: h\r\n\r\n":            400,
		"GET ftp://h/ HTTP/1.1\r\nHost: h\r\n\r\n":     400,
		"GET http:///a HTTP/1.1\r\nHost: h\r\n\r\n":    400,
		"GET http://u@h/ HTTP/1.1\r\nHost: h\r\n\r\n":  400,
		"GET http://g/ HTTP/1.1\r\nHost: h\r\n\r\n":    400,
		"GET http://h:81/ HTTP/1.1\r\nHost: h\r\n\r\n": 400,
		"CONNECT h:1 HTTP/1.1\r\nHost: h:1\r\n\r\n":    405,
		"GET / HTTP/1.1\r\n\r\n":                       400,
		"GET http://h/ HTTP/1.1\r\n\r\n":               400,
		get + "host: h\r\n\r\n":                        400,
		"GET / HTTP/1.0\r\nHost: a b\r\n\r\n":          400,
		"GET / HTTP/1.1\r\nHost:\r\n\r\n":              400,
		get + "X : 1\r\n":                              400,
		get + "X: 1\r\n folded\r\n":                    400,
		get + "X: 1\n":                                 400,
		get + "X: a\rb\r\n":                            400,
		get + "X: a\x00b":                              400,
		get + ": 1":                                    400,
		get + "X\r\n":                                  400,
		get + "\n":                                     400,
		get + "\rX: 1\r\n\r\n":                         400,
		get + "Content-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n":          400,
		get + "Content-Length: 1\r\nContent-Length: 1\r\n\r\n":                   400,
		get + "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n": 400,
		get + "Content-Length: 1, 1\r\n\r\n":                                     400,
		get + "Content-Length: +1\r\n\r\n":                                       400,
		get + "Content-Length: \r\n\r\n":                                         400,
		get + "Content-Length: 0x1\r\n\r\n":                                      400,
		get + "Content-Length: 9223372036854775808\r\n\r\n":                      400,
		get + "Transfer-Encoding: gzip\r\n\r\n":                                  400,
		get + "Transfer-Encoding: chunked, identity\r\n\r\n":                     400,
		get + "Transfer-Encoding: chunked, chunked\r\n\r\n":                      400,
		get + "Transfer-Encoding: chunked,\r\n\r\n":                              400,
		get + "Transfer-Encoding: \"chunked\"\r\n\r\n":                           400,
		get + "Transfer-Encoding:\r\n\r\n":                                       400,
		get + "Transfer-Encoding: gzip, chunked\r\n\r\n":                         501,
		"POST / HTTP/1.0\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n":       400,
		get + "Expect: 200-ok\r\n\r\n":                                           417,
		get + "Expect: 100-continue\r\nExpect: 100-continue\r\n\r\n":             417,
		strings.Repeat("A", MaxMethod+1):                                         501,
		"GET /" + strings.Repeat("a", message.MaxTarget):                         414,
		get + "X: " + strings.Repeat("a", message.MaxHead):                       431,
		get + strings.Repeat("X: 1\r\n", message.MaxFields) + "\r\n":             431,
	} {
		if _, n, err := parseRequest(t, raw); err == nil || err.Status != status {
			t.Errorf("%.100q: %d, %v, want %d", raw, n, err, status)
		}
	}
}

func TestEachLimitOfAHeadIsMetButNotPassed(t *testing.T) {
	const get = "GET / HTTP/1.1\r\nHost: h\r\n"
	for name, raw := range map[string]string{
		"method": strings.Repeat("A", MaxMethod) + " / HTTP/1.1\r\nHost: h\r\n\r\n",
		"target": "GET /" + strings.Repeat("a", message.MaxTarget-1) + " HTTP/1.1\r\nHost: h\r\n\r\n",
		"head":   get + "X: " + strings.Repeat("a", message.MaxHead-len(get)-len("X: \r\n\r\n")) + "\r\n\r\n",
		"fields": get + strings.Repeat("X: 1\r\n", message.MaxFields-1) + "\r\n",
	} {
		if _, n, err := parseRequest(t, raw); err != nil || n != len(raw) {
			t.Errorf("%s: %d of %d, %v", name, n, len(raw), err)
		}
	}
}

func TestWhatAskedForAnUpgradeOrA100(t *testing.T) {
	for fields, want := range map[string]struct {
		upgrade                  string
		expect, nominates, trail bool
	}{
		"Connection: Upgrade\r\nUpgrade: websocket\r\n":                               {upgrade: "websocket"},
		"Upgrade: websocket\r\n":                                                      {},
		"Connection: upgrade\r\nUpgrade: a, b\r\n":                                    {},
		"Connection: upgrade\r\nUpgrade: a\r\nUpgrade: a\r\n":                         {},
		"Connection: upgrade\r\nUpgrade: websocket\r\nContent-Length: 1\r\n":          {},
		"Connection: upgrade\r\nUpgrade: websocket\r\nTransfer-Encoding: chunked\r\n": {},
		"Connection: upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\n":                     {nominates: true},
		"Connection: upgrade\r\nUpgrade: HTTP/2.0\r\n":                                {},
		"Expect: 100-Continue\r\nContent-Length: 1\r\n":                               {expect: true},
		"Expect: 100-continue\r\nTransfer-Encoding: chunked\r\n":                      {expect: true},
		"Expect: 100-continue\r\nContent-Length: 0\r\n":                               {},
		"Expect: 100-continue\r\n":                                                    {},
		"Connection: , close, TE,keep-alive ,\r\nTE: trailers;q=1, deflate\r\n":       {},
		"Connection: te\r\nTE: deflate\r\nTE: Trailers\r\n":                           {trail: true},
		"Connection: X-Custom\r\n":                                                    {nominates: true},
	} {
		r, _, err := parseRequest(t, "POST / HTTP/1.1\r\nHost: h\r\n"+fields+"\r\n")
		if err != nil || string(r.Upgrade) != want.upgrade || r.Expect != want.expect || r.Nominates != want.nominates || r.TETrailers != want.trail {
			t.Errorf("%q: upgrade %q, expect %v, nominates %v, trailers %v, %v", fields, r.Upgrade, r.Expect, r.Nominates, r.TETrailers, err)
		}
	}
	if r, _, err := parseRequest(t, "POST / HTTP/1.0\r\nExpect: anything\r\nConnection: upgrade\r\nUpgrade: a\r\nContent-Length: 1\r\n\r\n"); err != nil || r.Expect || r.Upgrade != nil {
		t.Errorf("HTTP/1.0 expects or upgrades: %v", err)
	}
}
