package h1

import (
	"errors"
	"net/http"
	"strings"
	"testing"

	"tako/internal/proxy/message"
)

func TestAnswersThatAreRead(t *testing.T) {
	type want struct {
		status        int
		length        int64
		hasLength     bool
		body, chunked bool
		close         bool
	}
	const unknown = message.Unknown
	for _, c := range []struct {
		method, raw string
		want        want
	}{
		{"GET", "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n", want{200, 5, true, true, false, false}},
		{"GET", "HTTP/1.1 200\r\nContent-Length: 0\r\n\r\n", want{200, 0, true, true, false, false}},
		{"GET", "HTTP/1.1 200 \r\nContent-Length: 5\r\nContent-Length: 5\r\n\r\n", want{200, 5, true, true, false, false}},
		{"GET", "HTTP/1.1 200 Tr\xe8s bien\r\n\r\n", want{200, unknown, false, true, false, true}},
		{"GET", "HTTP/1.1 599 x\r\nTransfer-Encoding: Chunked\r\n\r\n", want{599, unknown, false, true, true, false}},
		{"GET", "HTTP/1.0 200 OK\r\nContent-Length: 5\r\n\r\n", want{200, 5, true, true, false, true}},
		{"GET", "HTTP/1.0 200 OK\r\nConnection: keep-alive\r\nContent-Length: 5\r\n\r\n", want{200, 5, true, true, false, false}},
		{"GET", "HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 5\r\n\r\n", want{200, 5, true, true, false, true}},
		{"HEAD", "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n", want{200, 5, true, false, false, false}},
		{"HEAD", "HTTP/1.1 200 OK\r\n\r\n", want{200, unknown, false, false, false, false}},
		{"HEAD", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", want{200, unknown, false, false, false, false}},
		{"GET", "HTTP/1.1 304 x\r\nContent-Length: 5\r\n\r\n", want{304, 5, true, false, false, false}},
		{"GET", "HTTP/1.1 204 x\r\n\r\n", want{204, 0, false, false, false, false}},
		{"GET", "HTTP/1.1 204 x\r\nContent-Length: 5\r\n\r\n", want{204, 0, false, false, false, true}},
		{"GET", "HTTP/1.1 204 x\r\nTransfer-Encoding: chunked\r\n\r\n", want{204, 0, false, false, false, true}},
		{"GET", "HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n", want{103, 0, false, false, false, false}},
		{"GET", "HTTP/1.1 101 x\r\nConnection: Upgrade\r\nUpgrade: a\r\n\r\n", want{101, 0, false, false, false, false}},
	} {
		var r ResponseHead
		n, err := ParseResponse([]byte(c.raw+"rest"), []byte(c.method), &r)
		got := want{r.Status, r.Length, r.HasLength, r.Body, r.Chunked, r.Close}
		if err != nil || n != len(c.raw) || got != c.want {
			t.Errorf("%s %q: %d, %+v, %v, want %+v", c.method, c.raw, n, got, err, c.want)
		}
		if want := c.want.status == 101; (string(r.Upgrade) == "a") != want {
			t.Errorf("%s %q: upgrade %q", c.method, c.raw, r.Upgrade)
		}
	}
}

func TestAnswersThatAreRefused(t *testing.T) {
	const ok = "HTTP/1.1 200 OK\r\n"
	for _, raw := range []string{
		"X", "HTTP/2", "HTTP/1.2", "HTTP/1.1\r\n", "HTTP/1.1 20\r\n", "HTTP/1.1 2000\r\n", "HTTP/1.1 099 x\r\n", "HTTP/1.1 600 x\r\n", "HTTP/1.1  200 x\r\n",
		"HTTP/1.1 200 OK\n\n", "HTTP/1.1 200 O\x00K", "\r\nHTTP/1.1 200 OK\r\n\r\n",
		ok + "Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n",
		ok + "Content-Length: 5\r\nContent-Length: 6\r\n\r\n",
		ok + "Content-Length: 5, 5\r\n\r\n",
		ok + "Content-Length: -1\r\n\r\n",
		ok + "Transfer-Encoding: gzip, chunked\r\n\r\n",
		ok + "Transfer-Encoding: identity\r\n\r\n",
		ok + "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n",
		"HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
		"HTTP/1.1 103 x\r\nContent-Length: 5\r\n\r\n",
		"HTTP/1.1 101 x\r\nTransfer-Encoding: chunked\r\n\r\n",
		ok + "X : 1\r\n", ok + "X: 1\r\n 2\r\n", ok + "X: a\rb", ok + "X: 1\nY: 2\r\n\r\n", ok + "X\r\n",
		ok + strings.Repeat("X: 1\r\n", MaxResponseFields+1),
		ok + "X: " + strings.Repeat("a", MaxResponseHead),
		ok + strings.Repeat("a", MaxResponseHead),
		"HTTP/1.1 200 " + strings.Repeat("a", MaxResponseHead),
	} {
		var r ResponseHead
		n, err := ParseResponse([]byte(raw), []byte("GET"), &r)
		if e, is := errors.AsType[*message.Error](err); !is || e.Status != http.StatusBadGateway || n != 0 {
			t.Errorf("%.60q: %d, %v", raw, n, err)
		}
	}
}

func TestAnswersAtTheirLimits(t *testing.T) {
	const ok = "HTTP/1.1 200 OK\r\n"
	for _, raw := range []string{
		ok + strings.Repeat("X: 1\r\n", MaxResponseFields) + "\r\n",
		ok + "X: " + strings.Repeat("a", MaxResponseHead-len(ok)-len("X: \r\n\r\n")) + "\r\n\r\n",
	} {
		var r ResponseHead
		if n, err := ParseResponse([]byte(raw), []byte("GET"), &r); err != nil || n != len(raw) {
			t.Errorf("%.60q: %d of %d, %v", raw, n, len(raw), err)
		}
	}
}
