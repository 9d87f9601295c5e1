package h2

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/http"
	"slices"
	"strings"
	"testing"

	"github.com/hashicorp/go-hclog"
	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	"tako/internal/proxy/message"
)

func TestAnswersAreWrittenForTheProtocol(t *testing.T) {
	type tc struct {
		method string
		r      message.Response
		body   string
		want   string
	}
	cases := []tc{
		{"GET", message.Response{Status: 200, Length: 2, HasLength: true, Fields: []message.Field{
			field("Content-Type", "text/plain"), field("X-Mixed", "Y"), field("Connection", "close, x-hop"), field("X-Hop", "1"),
			field("Transfer-Encoding", "chunked"), field("Keep-Alive", "timeout=5"), field("Upgrade", "h2c"), field("Trailer", "x"),
			field("Content-Length", "77"),
		}, Nominates: true}, "ok", "200 content-type=text/plain x-mixed=Y content-length=2 date ok"},
		{"GET", message.Response{Status: 200, Length: message.Unknown, Fields: []message.Field{field("Date", "yesterday")}}, "some", "200 date=yesterday some"},
		{"GET", message.Response{Status: 200, Length: 0, HasLength: true}, "", "200 content-length=0 date "},
		{"HEAD", message.Response{Status: 200, Length: 1234, HasLength: true}, "thrown away", "200 content-length=1234 date "},
		{"GET", message.Response{Status: 204}, "thrown away", "204 date "},
		{"GET", message.Response{Status: 304, Length: 99, HasLength: true, Fields: []message.Field{field("ETag", `"x"`)}}, "", `304 etag="x" content-length=99 date `},
		{"GET", message.Response{Status: 599, Length: message.Unknown}, "", "599 date "},
	}
	now := make(chan tc, 1)
	p := serve(t, func(x message.Exchange) {
		c := <-now
		if err := x.Begin(&c.r); err != nil {
			t.Error(err)
		}
		if _, err := x.Write([]byte(c.body)); err != nil && c.body != "" {
			t.Error(err)
		}
		if err := x.End(nil); err != nil {
			t.Error(err)
		}
	})
	for i, c := range cases {
		now <- c
		id := uint32(2*i + 1)
		p.ask(id, true, base(c.method, "/")...)
		a := p.hear(id)
		got := a.status
		for _, f := range a.head.fields[1:] {
			got += " " + f.Name
			if f.Name != "date" || f.Value == "yesterday" {
				got += "=" + f.Value
			} else if _, err := http.ParseTime(f.Value); err != nil {
				t.Error(err)
			}
		}
		got += " " + a.body
		if got != c.want || !a.ended {
			t.Errorf("got %q, want %q", got, c.want)
		}
	}
}

func TestEndIsInTheLastFrame(t *testing.T) {
	p := serve(t, func(x message.Exchange) { respond(x, "hello") })
	p.get(1)
	p.await(http2.FrameHeaders, 1)
	if e := p.await(http2.FrameData, 1); !e.ends() || string(e.payload) != "hello" {
		t.Errorf("got %v", e)
	}
}

func TestInterimAnswersAndTrailersGoOut(t *testing.T) {
	p := serve(t, func(x message.Exchange) {
		for range 2 {
			if err := x.Inform(103, []message.Field{field("Link", "</a>; rel=preload")}); err != nil {
				t.Error(err)
			}
		}
		_ = x.Begin(&message.Response{Status: 200, Length: message.Unknown})
		if err := x.Inform(103, nil); err == nil {
			t.Error("an interim answer after the head")
		}
		_, _ = x.Write([]byte("body"))
		if err := x.End([]message.Field{field("Grpc-Status", "0"), field("Content-Length", "4"), field("Connection", "x")}); err != nil {
			t.Error(err)
		}
	})
	p.get(1)
	a := p.hear(1)
	if want := []string{"103", "103"}; !slices.Equal(a.interim, want) || a.body != "body" || !a.ended || fmt.Sprint(a.trailer.fields) != `[header field "grpc-status" = "0"]` {
		t.Errorf("got %+v", a)
	}
}

func TestTrailerOfWhichNothingMayBeSentIsAnEnd(t *testing.T) {
	p := serve(t, func(x message.Exchange) {
		_ = x.Begin(&message.Response{Status: 200, Length: message.Unknown})
		_ = x.End([]message.Field{field("Content-Length", "4")})
	})
	for id := uint32(1); id < 9; id += 2 {
		if id == 5 { // the table's size is to be told in the next block, which is that trailer or one after it
			p.do(p.fr.WriteSettings(http2.Setting{ID: http2.SettingHeaderTableSize, Val: 0}))
			p.await(http2.FrameSettings, 0)
		}
		p.get(id)
		if a := p.hear(id); a.status != "200" || a.trailer.fields != nil || !a.ended {
			t.Errorf("got %+v", a)
		}
	}
}

func TestShortAnswerNeverLooksWhole(t *testing.T) {
	var log strings.Builder
	for name, h := range map[string]func(x message.Exchange){
		"returned at once": func(message.Exchange) {},
		"aborted at once":  func(x message.Exchange) { x.Abort() },
		"no end": func(x message.Exchange) {
			_ = x.Begin(&message.Response{Status: 200, Length: message.Unknown})
			_, _ = x.Write([]byte("some"))
			_ = x.Flush()
		},
		"no flush": func(x message.Exchange) {
			_ = x.Begin(&message.Response{Status: 200, Length: message.Unknown})
			_, _ = x.Write([]byte("some"))
		},
		"all, but no end": func(x message.Exchange) {
			_ = x.Begin(&message.Response{Status: 200, Length: 4, HasLength: true})
			_, _ = x.Write([]byte("some"))
		},
		"aborted": func(x message.Exchange) {
			_ = x.Begin(&message.Response{Status: 200, Length: 10, HasLength: true})
			_, _ = x.Write([]byte("some"))
			x.Abort()
		},
		"too little": func(x message.Exchange) {
			_ = x.Begin(&message.Response{Status: 200, Length: 10, HasLength: true})
			_, _ = x.Write([]byte("some"))
			if err := x.End(nil); !errors.Is(err, errShort) {
				t.Errorf("End says %v", err)
			}
		},
		"too much": func(x message.Exchange) {
			_ = x.Begin(&message.Response{Status: 200, Length: 3, HasLength: true})
			if _, err := x.Write([]byte("some")); !errors.Is(err, errLong) {
				t.Errorf("Write says %v", err)
			}
		},
		"a bug": func(x message.Exchange) {
			_ = x.Begin(&message.Response{Status: 200, Length: message.Unknown})
			panic("a bug")
		},
	} {
		t.Run(name, func(t *testing.T) {
			p := meet(t, &Server{Handler: handlerFunc(h), Log: hclog.New(&hclog.LoggerOptions{Output: &log})})
			p.get(1)
			if a := p.hear(1); !a.reset || a.code != http2.ErrCodeInternal || a.ended {
				t.Errorf("got %+v, want a reset", a)
			}
		})
	}
	if !strings.Contains(log.String(), "a handler panicked: err=\"a bug\"") {
		t.Errorf("the log says %q", log.String())
	}
}

func TestEarlyAnswerStopsTheBody(t *testing.T) {
	p := serve(t, func(x message.Exchange) { respond(x, "no") })
	for id := uint32(1); id < 200; id += 2 {
		p.ask(id, false, base("POST", "/")...)
		if a := p.hear(id); a.body != "no" || !a.ended {
			t.Fatalf("got %+v", a)
		}
		if e := p.await(http2.FrameRSTStream, id); e.code() != http2.ErrCodeNo {
			t.Fatalf("got %v", e.code())
		}
		// What was on its way costs the connection's window nothing.
		for range 2 {
			p.data(id, false, strings.Repeat("a", frameSize))
		}
		p.ask(id, true, "x", "y")
	}
	p.wantOK(201)
	p.wantSettled()
}

func TestHeadLargerThanAFrameGoesOutInPieces(t *testing.T) {
	value := strings.Repeat("&", 3*frameSize)
	p := serve(t, func(x message.Exchange) {
		_ = x.Begin(&message.Response{Status: 200, Length: 2, HasLength: true, Fields: []message.Field{field("X-Long", value), field("X-After", "y")}})
		_, _ = x.Write([]byte("ok"))
		_ = x.End(nil)
	})
	p.get(1)
	if a := p.hear(1); a.head.get("x-long") != value || a.head.get("x-after") != "y" || a.body != "ok" || !a.ended {
		t.Errorf("got %v", a.head.flags)
	}
}

func TestWrongUseIsAnError(t *testing.T) {
	p := serve(t, func(x message.Exchange) {
		if _, err := x.Write([]byte("x")); err == nil {
			t.Error("a body before its head")
		}
		if x.End(nil) == nil {
			t.Error("an end before its head")
		}
		if x.Begin(&message.Response{Status: 101}) == nil {
			t.Error("101 without an upgrade")
		}
		if _, err := x.Tunnel(); err == nil {
			t.Error("a tunnel of nothing")
		}
		respond(x, "ok")
		if x.Begin(&message.Response{Status: 200}) == nil {
			t.Error("a second head")
		}
		if _, err := x.Write([]byte("x")); err == nil {
			t.Error("a body after its end")
		}
	})
	p.get(1)
	if a := p.hear(1); a.body != "ok" || !a.ended {
		t.Errorf("got %+v", a)
	}
}

func TestFieldsAreReadAsTheyWereEncoded(t *testing.T) {
	random := rand.New(rand.NewPCG(1, 2))
	var got []hpack.HeaderField
	dec := hpack.NewDecoder(tableSize, func(f hpack.HeaderField) { got = append(got, f) })
	var e encoder
	e.init()
	names := []string{"server", "date", "set-cookie", "x-a", "x-b", "content-type", "etag", "cache-control", "accept-encoding", "x-" + strings.Repeat("n", 300)}
	values := []string{"", "gzip, deflate", "a", "text/html; charset=utf-8", "&&&&", "\xff\xfe", strings.Repeat("v", 700), strings.Repeat("w", 5000)}
	for i := range 3000 {
		if random.IntN(100) == 0 {
			for range 1 + random.IntN(3) {
				e.resize(uint32(random.IntN(6000))) //nolint:gosec // positive
			}
		}
		b := e.begin(nil)
		var want []hpack.HeaderField
		for range random.IntN(5) {
			name, value := names[random.IntN(len(names))], values[random.IntN(len(values))]
			if random.IntN(4) == 0 {
				value = fmt.Sprint(random.IntN(50))
			}
			nb, vb := []byte(name), []byte(value)
			b = e.field(b, message.Lookup(nb), nb, vb)
			clear(nb) // nothing of them is kept
			clear(vb)
			want = append(want, hpack.HeaderField{Name: name, Value: value, Sensitive: name == "set-cookie"})
		}
		got = nil
		if _, err := dec.Write(b); err != nil {
			t.Fatalf("block %d: %v", i, err)
		}
		if err := dec.Close(); err != nil {
			t.Fatalf("block %d: %v", i, err)
		}
		if !slices.Equal(got, want) {
			t.Fatalf("block %d: got %v, want %v", i, got, want)
		}
		if e.size > e.max {
			t.Fatalf("block %d: the table has %d bytes of %d", i, e.size, e.max)
		}
	}
}

func TestStatusesAreReadAsTheyWereEncoded(t *testing.T) {
	var got string
	dec := hpack.NewDecoder(tableSize, func(f hpack.HeaderField) { got = f.Name + f.Value })
	var e encoder
	for status := 100; status < 1000; status++ {
		if _, err := dec.Write(e.status(nil, status)); err != nil {
			t.Fatal(err)
		}
		if want := fmt.Sprint(":status", status); got != want {
			t.Errorf("got %s, want %s", got, want)
		}
	}
}

func TestRepeatedFieldsCostOneByte(t *testing.T) {
	var e encoder
	e.init()
	var b []byte
	for range 3 {
		b = e.field(nil, message.ContentType, []byte("content-type"), []byte("text/html; charset=utf-8"))
	}
	if len(b) != 1 {
		t.Errorf("the third time it takes %d bytes", len(b))
	}
	for _, name := range []string{"set-cookie", "etag", "content-length"} {
		for range 3 {
			b = e.field(nil, message.Lookup([]byte(name)), []byte(name), []byte("12345678"))
		}
		if len(b) < 5 || bytes.IndexByte(b, 0x80) == 0 {
			t.Errorf("%s was put into the table", name)
		}
	}
	if len(e.entries) != 1 {
		t.Errorf("the table has %d entries, want 1", len(e.entries))
	}
}

func FuzzEncoder(f *testing.F) {
	f.Add("x-a", "b", uint16(100))
	f.Add("", "", uint16(0))
	f.Fuzz(func(t *testing.T, name, value string, size uint16) {
		var got []hpack.HeaderField
		dec := hpack.NewDecoder(tableSize, func(f hpack.HeaderField) { got = append(got, f) })
		var e encoder
		e.init()
		for i := range 4 {
			if i == 2 {
				e.resize(uint32(size))
			}
			got = nil
			b := e.field(e.begin(nil), message.Lookup([]byte(name)), []byte(name), []byte(value))
			if _, err := dec.Write(b); err != nil || dec.Close() != nil || len(got) != 1 || got[0].Name != name || got[0].Value != value {
				t.Fatalf("%q: %v, %v", b, got, err)
			}
		}
	})
}
