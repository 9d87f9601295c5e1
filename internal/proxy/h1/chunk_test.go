package h1

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"tako/internal/proxy/message"
)

// dechunk pushes raw to a reader in pieces of at most size bytes. It returns the
// data, what was not used, and the trailer as lines.
func dechunk(raw string, size int) (data, rest, trailer string, done bool, err error) {
	var c ChunkReader
	var out strings.Builder
	for in := []byte(raw); len(in) > 0 && !done && err == nil; {
		piece := in[:min(size, len(in))]
		for len(piece) > 0 && !done && err == nil {
			var d []byte
			var used int
			d, used, done, err = c.Next(piece)
			out.Write(d)
			piece, in = piece[used:], in[used:]
		}
		rest = string(in)
	}
	for _, f := range c.Trailer() {
		trailer += fmt.Sprintf("%s=%s\n", f.Name, f.Value)
	}
	return out.String(), rest, trailer, done, err
}

func TestChunksInEveryCut(t *testing.T) {
	for raw, want := range map[string]struct{ data, trailer string }{
		"5\r\nhello\r\n0\r\n\r\n": {"hello", ""},
		"0\r\n\r\n":               {"", ""},
		"000A\r\n0123456789\r\nb\r\n0123456789a\r\n0000000000000000\r\n\r\n":                                                    {"01234567890123456789a", ""},
		"5;a=\"b;\\\"c d\";x\r\nhello\r\n0;\r\n\r\n":                                                                            {"hello", ""},
		"1\r\na\r\n0\r\nX-Trail: 1 \r\ny:\r\n\r\n":                                                                              {"a", "X-Trail=1\ny=\n"},
		"1\r\na\r\n0\r\nContent-Length: 1\r\nHost: h\r\nX_Forwarded_For: 1\r\nCookie: c\r\nETag: e\r\nAuthorization: a\r\n\r\n": {"a", "ETag=e\n"},
	} {
		for size := 1; size <= len(raw)+8; size++ {
			data, rest, trailer, done, err := dechunk(raw+"GET / HT", size)
			if err != nil || !done || data != want.data || trailer != want.trailer || rest != "GET / HT" {
				t.Fatalf("%q in pieces of %d: %q, %q, rest %q, %v, %v", raw, size, data, trailer, rest, done, err)
			}
		}
	}
}

func TestChunksThatAreRefused(t *testing.T) {
	for _, raw := range []string{
		"\r\n", ";a\r\n", "g\r\n", "-1\r\n", "+1\r\n", "0x1\r\n", " 1\r\n", "1 \r\n", "1 ;a\r\n", "1\n", "1\rX", "1;a\n", "1;a\rX", "1;\x00", "1;\x7f",
		"1;\"a\r\n", "1\r\nab", "1\r\na\n", "1\r\na\rX", "1\r\na0\r\n",
		"8000000000000000\r\n", "ffffffffffffffff\r\n", "10000000000000000\r\n", "00000000000000001\r\n",
		"0\r\n\n", "0\r\nX: 1\n\r\n", "0\r\nX : 1\r\n\r\n", "0\r\nX: 1\r\n 2\r\n\r\n", "0\r\n: 1\r\n\r\n", "0\r\n\rX", "0\r\nX\r\n\r\n",
		"1;" + strings.Repeat("a", MaxChunkLine),
		strings.Repeat("1;"+strings.Repeat("a", 1000)+"\r\nx\r\n", 20),
		"0\r\nX: " + strings.Repeat("a", MaxTrailer),
		"0\r\n" + strings.Repeat("X: 1\r\n", message.MaxFields+1),
	} {
		for _, size := range []int{1, 7, len(raw)} {
			data, _, _, done, err := dechunk(raw, size)
			if _, is := errors.AsType[*message.Error](err); !is || done {
				t.Errorf("%.60q in pieces of %d: %q, %v, %v", raw, size, data, done, err)
			}
		}
	}
}

func TestExtensionsAreMeasuredByTheContent(t *testing.T) {
	raw := strings.Repeat("400;"+strings.Repeat("a", 1000)+"\r\n"+strings.Repeat("x", 0x400)+"\r\n", 64) + "0\r\n\r\n"
	if data, _, _, done, err := dechunk(raw, 4096); err != nil || !done || len(data) != 64<<10 {
		t.Errorf("%d bytes, %v, %v", len(data), done, err)
	}
}

func TestAnErrorOfChunksStays(t *testing.T) {
	var c ChunkReader
	_, _, _, first := c.Next([]byte("x"))
	if _, _, _, err := c.Next([]byte("1\r\na\r\n")); first == nil || !errors.Is(err, first) {
		t.Errorf("%v, then %v", first, err)
	}
	c.Reset()
	if data, used, done, err := c.Next([]byte("1\r\na\r\n0\r\n\r\n")); string(data) != "a" || used != 4 || done || err != nil {
		t.Errorf("after Reset: %q, %d, %v, %v", data, used, done, err)
	}
}
