//go:build !race

// The race detector has pools forget what they are given.

package h1

import (
	"bytes"
	"fmt"
	"io"
	"testing"

	"tako/internal/proxy/message"
)

// answering answers each request the same, without memory of its own.
func answering(body []byte) attached {
	resp := message.Response{Status: 200, Length: int64(len(body)), HasLength: true, Fields: []message.Field{field("Content-Type", "text/plain")}}
	sink := make([]byte, 4096)
	return func(x message.Exchange) {
		if _, ok := x.Buffered(); !ok {
			for {
				if _, err := x.ReadBody(sink); err != nil {
					break
				}
			}
		}
		_ = x.Begin(&resp)
		_, _ = x.Write(body)
		_ = x.End(nil)
	}
}

// ask sends raw and reads as many bytes as the first answer had.
func (c *client) ask(raw []byte) func() {
	c.send(string(raw))
	first := make([]byte, 64<<10)
	n, err := io.ReadAtLeast(c, first, 1)
	for err == nil && !bytes.HasSuffix(first[:n], []byte("end")) {
		var m int
		m, err = c.Read(first[n:])
		n += m
	}
	if err != nil {
		c.t.Fatal(err)
	}
	return func() {
		if _, err := c.Write(raw); err != nil {
			c.t.Fatal(err)
		}
		if _, err := io.ReadFull(c, first[:n]); err != nil {
			c.t.Fatal(err)
		}
	}
}

var exchangesWithoutMemory = map[string]string{
	"get":     browserHead,
	"length":  "POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 5\r\n\r\nhello",
	"chunked": "POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n3\r\nyou\r\n0\r\n\r\n",
	"large":   "POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n2000\r\n" + fmt.Sprintf("%08192d", 0) + "\r\n0\r\n\r\n",
}

func TestAnExchangeNeedsNoMemory(t *testing.T) {
	everywhereBy(t, limits(), answering(append(bytes.Repeat([]byte("x"), 1021), "end"...)), func(t *testing.T, s *server) {
		for name, raw := range exchangesWithoutMemory {
			most := 0.
			if s.tls != nil {
				most = 2 // crypto/tls takes one for each record it reads, on either side
				if loops != nil {
					most++ // and when it is asked what it has already
				}
			}
			if n := testing.AllocsPerRun(300, s.dial().ask([]byte(raw))); n > most {
				t.Errorf("%s: %v allocations, want %v", name, n, most)
			}
		}
	})
}

func BenchmarkExchange(b *testing.B) {
	for name, raw := range exchangesWithoutMemory {
		b.Run(name, func(b *testing.B) {
			s := serveOn(b, "unix", limits(), nil, answering(append(bytes.Repeat([]byte("x"), 1021), "end"...)))
			once := s.dial().ask([]byte(raw))
			b.ReportAllocs()
			for b.Loop() {
				once()
			}
		})
	}
}
