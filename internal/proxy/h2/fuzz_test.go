package h2

import (
	"bytes"
	"errors"
	"io"
	"net"
	"strings"
	"testing"
	"testing/synctest"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	"tako/internal/proxy/message"
)

// checked is a handler that holds every request to what message.Request promises.
func checked(t testing.TB) func(x message.Exchange) {
	return func(x message.Exchange) {
		r := x.Request()
		if !message.ValidToken(r.Method) || !message.ValidTarget(r.Target) || len(r.Fields) > message.MaxFields || len(r.Target) > message.MaxTarget {
			t.Errorf("a request of %q %q with %d fields", r.Method, r.Target, len(r.Fields))
		}
		if _, _, ok := message.ParseHost(r.Host); !ok {
			t.Errorf("a request to %q", r.Host)
		}
		for _, f := range append(r.Fields, x.Trailer()...) {
			if !message.ValidToken(f.Name) || bytes.ToLower(f.Name)[0] != f.Name[0] || !message.ValidValue(f.Value) || f.ID == message.Host ||
				f.ID == message.TransferEncoding || f.ID == message.Connection || len(message.Trim(f.Value)) != len(f.Value) {
				t.Errorf("a field %q: %q", f.Name, f.Value)
			}
		}
		switch {
		case r.Extended:
			echo(x)
			return
		case len(r.Target)%5 == 1:
			respond(x, strings.Repeat("a", 100*len(r.Target)))
			return
		case len(r.Target)%5 == 2:
			_ = x.Inform(103, r.Fields)
		case len(r.Target)%5 == 3:
			return
		}
		n := int64(0)
		var b [100]byte
		for {
			k, err := x.ReadBody(b[:])
			n += int64(k)
			if err == nil {
				continue
			}
			if !errors.Is(err, io.EOF) {
				return
			}
			break
		}
		if r.HasLength && n != r.Length {
			t.Errorf("a whole body of %d bytes, not %d", n, r.Length)
		}
		for _, f := range x.Trailer() {
			if !f.ID.InTrailer() {
				t.Errorf("%q in a trailer", f.Name)
			}
		}
		if x.Begin(&message.Response{Status: 200, Length: message.Unknown, Fields: r.Fields}) == nil {
			_, _ = x.Write(b[:])
			_ = x.End(r.Fields)
		}
	}
}

// FuzzServe feeds a connection any bytes after its preface: whatever they are it
// ends, with all its handlers, and in its time; the handlers see only requests
// that keep the rules; and what the server says is itself HTTP/2.
func FuzzServe(f *testing.F) {
	var block bytes.Buffer
	enc := hpack.NewEncoder(&block)
	seed := func(write func(fr *http2.Framer, head func(fields ...string) []byte)) {
		var b bytes.Buffer
		fr := http2.NewFramer(&b, nil)
		fr.AllowIllegalWrites = true
		_ = fr.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: 100})
		write(fr, func(fields ...string) []byte {
			block.Reset()
			for i := 0; i < len(fields); i += 2 {
				_ = enc.WriteField(hpack.HeaderField{Name: fields[i], Value: fields[i+1]})
			}
			return bytes.Clone(block.Bytes())
		})
		f.Add(b.Bytes(), uint16(7))
		enc = hpack.NewEncoder(&block)
	}
	seed(func(fr *http2.Framer, head func(fields ...string) []byte) {
		for i := range uint32(6) {
			_ = fr.WriteHeaders(http2.HeadersFrameParam{StreamID: 2*i + 1, BlockFragment: head(base("POST", "/"+strings.Repeat("a", int(i)))...), EndHeaders: true, PadLength: byte(i)})
			_ = fr.WriteData(2*i+1, i%2 == 0, []byte("hello"))
			_ = fr.WriteWindowUpdate(2*i+1, 1000)
			_ = fr.WriteWindowUpdate(0, 1000)
		}
		_ = fr.WriteHeaders(http2.HeadersFrameParam{StreamID: 3, BlockFragment: head("x", "y"), EndHeaders: true, EndStream: true})
		_ = fr.WriteRSTStream(7, http2.ErrCodeCancel)
		_ = fr.WritePing(false, [8]byte{})
		_ = fr.WritePriority(9, http2.PriorityParam{StreamDep: 1})
		_ = fr.WriteGoAway(0, 0, nil)
	})
	seed(func(fr *http2.Framer, head func(fields ...string) []byte) {
		b := head(base("POST", "/aaa", "content-length", "5", "cookie", "a", "cookie", "b", "expect", "100-continue")...)
		_ = fr.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: b[:10]})
		_ = fr.WriteContinuation(1, true, b[10:])
		_ = fr.WriteDataPadded(1, false, []byte("he"), make([]byte, 10))
		_ = fr.WriteSettings(http2.Setting{ID: http2.SettingHeaderTableSize, Val: 0}, http2.Setting{ID: http2.SettingInitialWindowSize, Val: 5})
		_ = fr.WriteData(1, true, []byte("llo"))
		_ = fr.WriteHeaders(http2.HeadersFrameParam{StreamID: 3, BlockFragment: head(connect...), EndHeaders: true})
		_ = fr.WriteData(3, false, []byte("hello"))
		_ = fr.WriteData(3, true, []byte("bye"))
		_ = fr.WriteHeaders(http2.HeadersFrameParam{StreamID: 5, BlockFragment: head(":method", "CONNECT", ":authority", "a:1"), EndHeaders: true})
	})
	f.Fuzz(func(t *testing.T, b []byte, cut uint16) {
		synctest.Test(t, func(t *testing.T) {
			srv := &Server{Handler: handlerFunc(checked(t))}
			near, far := net.Pipe()
			served, read := make(chan struct{}), make(chan struct{})
			go func() {
				defer close(served)
				srv.Serve(far, &message.Client{})
			}()
			go func() {
				defer close(read)
				fr := http2.NewFramer(nil, near)
				fr.ReadMetaHeaders = hpack.NewDecoder(tableSize, nil)
				for {
					if _, err := fr.ReadFrame(); err != nil {
						if _, bad := errors.AsType[http2.ConnectionError](err); bad {
							t.Errorf("the server said: %v", err)
						}
						if _, bad := errors.AsType[http2.StreamError](err); bad {
							t.Errorf("the server said: %v", err)
						}
						break
					}
				}
				_, _ = io.Copy(io.Discard, near)
			}()
			_, _ = near.Write([]byte(http2.ClientPreface))
			for len(b) > 0 {
				n := min(len(b), 1+int(cut))
				if _, err := near.Write(b[:n]); err != nil {
					break
				}
				b = b[n:]
			}
			synctest.Wait()
			if cut%2 == 0 {
				_ = near.Close()
			}
			<-served // by its own limits otherwise
			<-read
			_ = near.Close()
			srv.Close()
		})
	})
}
