package h2

import (
	"net"
	"testing"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	"tako/internal/proxy/message"
)

// BenchmarkEightStreams answers eight requests at a time on one connection, with
// 1 KiB each. Its allocations are the server's.
func BenchmarkEightStreams(b *testing.B) {
	body := make([]byte, 1024)
	answer := &message.Response{Status: 200, Length: int64(len(body)), HasLength: true, Fields: []message.Field{
		field("Content-Type", "text/plain; charset=utf-8"), field("Server", "tako"), field("ETag", `"0123456789abcdef"`),
	}}
	srv := &Server{Handler: handlerFunc(func(x message.Exchange) {
		if x.Begin(answer) == nil {
			_, _ = x.Write(body)
			_ = x.End(nil)
		}
	})}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		if nc, err := l.Accept(); err == nil {
			srv.Serve(nc, &message.Client{})
		}
	}()
	nc, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		b.Fatal(err)
	}
	defer func() {
		_ = nc.Close()
		<-done
		_ = l.Close()
		srv.Close()
	}()
	out := []byte(http2.ClientPreface)
	out = append(out, 0, 0, 6, 4, 0, 0, 0, 0, 0, 0, 4, 0x7f, 0xff, 0xff, 0xff, 0, 0, 4, 8, 0, 0, 0, 0, 0, 0x7f, 0, 0, 0)
	var block []byte
	blockOf := func(fields ...string) {
		enc := hpack.NewEncoder(writerTo{&block})
		for i := 0; i < len(fields); i += 2 {
			_ = enc.WriteField(hpack.HeaderField{Name: fields[i], Value: fields[i+1]})
		}
	}
	blockOf(base("GET", "/bench", "user-agent", "Mozilla/5.0 (X11; Linux x86_64)", "accept", "*/*")...)
	ask := func(id uint32, block []byte) {
		out = append(out, 0, 0, byte(len(block)), 1, 5, byte(id>>24), byte(id>>16), byte(id>>8), byte(id))
		out = append(out, block...)
	}
	buf := make([]byte, 64<<10)
	r, w := 0, 0
	header := make([]byte, headerSize)
	full := func(p []byte) {
		for len(p) > 0 {
			if r == w {
				n, err := nc.Read(buf)
				if err != nil {
					b.Fatal(err)
				}
				r, w = 0, n
			}
			n := copy(p, buf[r:w])
			r += n
			p = p[n:]
		}
	}
	payload := make([]byte, frameSize)
	hear := func(n int) {
		for n > 0 {
			full(header)
			size := int(header[1])<<8 | int(header[2])
			full(payload[:size])
			if header[3] == byte(http2.FrameData) && header[4]&1 != 0 {
				n--
			}
		}
	}
	id := uint32(1)
	ask(id, block)
	if _, err := nc.Write(out); err != nil {
		b.Fatal(err)
	}
	hear(1)
	// From now on all is in the table: :authority, :path, user-agent, accept.
	again := []byte{0x82, 0x87, 0x80 | 65, 0x80 | 64, 0x80 | 63, 0x80 | 62}
	received := 0
	b.ReportAllocs()
	b.ResetTimer()
	for n := 0; n < b.N; n += 8 {
		out = out[:0]
		for range 8 {
			id += 2
			ask(id, again)
		}
		if received += 8 * len(body); received > 1<<20 {
			out = append(out, 0, 0, 4, 8, 0, 0, 0, 0, 0, byte(received>>24), byte(received>>16), byte(received>>8), byte(received))
			received = 0
		}
		if _, err := nc.Write(out); err != nil {
			b.Fatal(err)
		}
		hear(8)
	}
}

type writerTo struct{ b *[]byte }

func (w writerTo) Write(p []byte) (int, error) {
	*w.b = append(*w.b, p...)
	return len(p), nil
}
