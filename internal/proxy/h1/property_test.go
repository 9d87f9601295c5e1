package h1

import (
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"tako/internal/proxy/message"
)

// mixed answers each request with its number and the bytes of the body that it
// was told to read, in the way that it was told.
func mixed(x message.Exchange) {
	var number, read, framed, piece int
	var how string
	if _, err := fmt.Sscanf(string(x.Request().Target), "/%d/%d/%d/%d/%s", &number, &read, &framed, &piece, &how); err != nil {
		panic(err)
	}
	var got []byte
	b, whole := []byte(nil), false
	if how == "buffered" {
		b, whole = x.Buffered()
	}
	if whole {
		got = b[:min(read, len(b))]
	} else {
		p := make([]byte, piece)
		for len(got) < read {
			n, err := x.ReadBody(p[:min(len(p), read-len(got))])
			if got = append(got, p[:n]...); err != nil {
				break
			}
		}
		if _, err := x.ReadBody(p[:0]); err != nil && !errors.Is(err, io.EOF) {
			panic(err)
		}
	}
	answer := fmt.Appendf(nil, "%d:%s", number, got)
	length := int64(len(answer))
	if framed == 0 {
		length = message.Unknown
	}
	_ = x.Begin(&message.Response{Status: http.StatusOK, Length: length})
	for len(answer) > 0 {
		n := min(piece, len(answer))
		if _, err := x.Write(answer[:n]); err != nil {
			return
		}
		if answer = answer[n:]; n%3 == 0 && x.Flush() != nil {
			return
		}
	}
	_ = x.End(nil)
}

// Whatever is asked in a row, in whatever pieces it comes, and however much of
// the bodies is read: each answer is that of its request.
func TestAnswersBelongToTheirRequests(t *testing.T) {
	s := serveOn(t, "unix", limits(), nil, handlerFunc(mixed))
	rapid.Check(t, func(rt *rapid.T) {
		var raw strings.Builder
		var want []string
		for i := range rapid.IntRange(1, 8).Draw(rt, "requests") {
			body := strings.Repeat(fmt.Sprintf("%x", i), rapid.OneOf(rapid.IntRange(0, 10), rapid.IntRange(0, 20_000)).Draw(rt, "body"))
			read := rapid.SampledFrom([]int{0, 1, 5000, 1 << 20}).Draw(rt, "read")
			fmt.Fprintf(&raw, "POST /%d/%d/%d/%d/%s HTTP/1.1\r\nHost: h\r\nX: %s\r\n", i, read, rapid.IntRange(0, 1).Draw(rt, "framed"),
				rapid.SampledFrom([]int{1, 100, 4096, 5000, 30_000}).Draw(rt, "piece"), rapid.SampledFrom([]string{"read", "buffered"}).Draw(rt, "how"),
				strings.Repeat("x", rapid.SampledFrom([]int{0, 100, 3000, 9000}).Draw(rt, "field")))
			want = append(want, fmt.Sprintf("%d:%s", i, body[:min(read, len(body))]))
			if rapid.Bool().Draw(rt, "chunked") {
				raw.WriteString("Transfer-Encoding: chunked\r\n\r\n")
				for left := body; left != ""; {
					n := min(len(left), rapid.SampledFrom([]int{1, 7, 300, 4096, 20_000}).Draw(rt, "chunk"))
					n = max(n, len(left)/20) // not too many
					fmt.Fprintf(&raw, "%x\r\n%s\r\n", n, left[:n])
					left = left[n:]
				}
				raw.WriteString("0\r\n\r\n")
			} else {
				fmt.Fprintf(&raw, "Content-Length: %d\r\n\r\n%s", len(body), body)
			}
		}
		cut := rapid.SampledFrom([]int{1, 10, 1000, 5000, 1 << 20}).Draw(rt, "cut")
		c := s.dial()
		defer c.Close()
		go func() {
			for all := raw.String(); all != ""; {
				n := min(max(cut, len(raw.String())/200), len(all))
				if _, err := io.WriteString(c, all[:n]); err != nil {
					return // closed after an answer before its body
				}
				all = all[n:]
			}
			_ = closeWrite(c.Conn)
		}()
		for i, body := range want {
			resp, err := http.ReadResponse(c.br, nil)
			if err != nil {
				rt.Fatalf("answer %d: %v", i, err)
			}
			got, err := io.ReadAll(resp.Body)
			if err != nil || string(got) != body {
				rt.Fatalf("answer %d: %.100q of %d bytes, %v, want %.100q of %d", i, got, len(got), err, body, len(body))
			}
			if resp.Close {
				break
			}
		}
		if rest, err := io.ReadAll(c.br); len(rest) > 0 || err != nil {
			rt.Fatalf("after the last answer: %q, %v", rest, err)
		}
	})
}
