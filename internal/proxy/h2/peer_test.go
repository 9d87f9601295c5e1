package h2

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	"tako/internal/proxy/message"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

type handlerFunc func(x message.Exchange)

func (f handlerFunc) Handle(x message.Exchange) { f(x) }

// event is a frame that the server sent.
type event struct {
	kind    http2.FrameType
	flags   http2.Flags
	id      uint32
	payload []byte
	fields  []hpack.HeaderField // of HEADERS and all their CONTINUATION
}

func (e event) String() string {
	return fmt.Sprintf("%v %#x on %d, %d bytes %v", e.kind, e.flags, e.id, len(e.payload), e.fields)
}

func (e event) ends() bool { return e.flags&http2.FlagDataEndStream != 0 }

func (e event) get(name string) string {
	for _, f := range e.fields {
		if f.Name == name {
			return f.Value
		}
	}
	return ""
}

// code is that of a RST_STREAM or GOAWAY.
func (e event) code() http2.ErrCode {
	p := e.payload
	if e.kind == http2.FrameGoAway {
		p = p[4:]
	}
	return http2.ErrCode(uint32(p[0])<<24 | uint32(p[1])<<16 | uint32(p[2])<<8 | uint32(p[3]))
}

// last is the last stream of a GOAWAY, or the increment of a WINDOW_UPDATE.
func (e event) last() uint32 {
	return uint32(e.payload[0]&0x7f)<<24 | uint32(e.payload[1])<<16 | uint32(e.payload[2])<<8 | uint32(e.payload[3])
}

// peer is a client that says whatever a test wants it to.
type peer struct {
	t      testing.TB
	srv    *Server
	nc     net.Conn
	fr     *http2.Framer
	block  *bytes.Buffer
	enc    *hpack.Encoder
	events chan event // closed at the end of the connection
	served chan struct{}
	gate   chan struct{} // full: the peer does not read
	auto   bool          // give back windows
	stash  []event       // what came and nobody asked for
}

// backlog is how many frames a peer reads ahead of its test.
const backlog = 1 << 12

// quietly makes a connection that has said nothing.
func quietly(t testing.TB, srv *Server) *peer {
	t.Helper()
	near, far := net.Pipe()
	p := &peer{t: t, block: new(bytes.Buffer), srv: srv, nc: near, fr: http2.NewFramer(near, near), events: make(chan event, backlog), served: make(chan struct{}), gate: make(chan struct{}, 1)}
	p.fr.AllowIllegalWrites = true
	p.enc = hpack.NewEncoder(p.block)
	go func() {
		defer close(p.served)
		srv.Serve(far, &message.Client{Secure: true})
	}()
	go p.read()
	t.Cleanup(func() {
		p.close()
		srv.Close()
	})
	return p
}

func (p *peer) close() {
	_ = p.nc.Close()
	select {
	case <-p.gate:
	default:
	}
	<-p.served
	for range p.events {
	}
}

func (p *peer) read() {
	defer close(p.events)
	var block []byte
	var head event
	dec := hpack.NewDecoder(tableSize, func(f hpack.HeaderField) { head.fields = append(head.fields, f) })
	b := make([]byte, headerSize+frameSize)
	for {
		p.gate <- struct{}{}
		<-p.gate
		if _, err := io.ReadFull(p.nc, b[:headerSize]); err != nil {
			return
		}
		n := int(b[0])<<16 | int(b[1])<<8 | int(b[2])
		e := event{
			kind: http2.FrameType(b[3]), flags: http2.Flags(b[4]), id: uint32(b[5]&0x7f)<<24 | uint32(b[6])<<16 | uint32(b[7])<<8 | uint32(b[8]),
			payload: make([]byte, n),
		}
		if n > frameSize {
			p.t.Errorf("the server sent a frame of %d bytes", n)
			return
		}
		if _, err := io.ReadFull(p.nc, e.payload); err != nil {
			return
		}
		switch e.kind { //nolint:exhaustive // the others stand for themselves
		case http2.FrameHeaders:
			head, block = e, e.payload
		case http2.FrameContinuation:
			block = append(block, e.payload...)
			head.flags |= e.flags & http2.FlagHeadersEndHeaders
		default:
			p.events <- e
			continue
		}
		if head.flags&http2.FlagHeadersEndHeaders != 0 {
			if _, err := dec.Write(block); err != nil {
				p.t.Errorf("fields of the server: %v", err)
			}
			_ = dec.Close()
			p.events <- head
		}
	}
}

// meet makes a connection, and says and hears what every one begins with.
func meet(t testing.TB, srv *Server, settings ...http2.Setting) *peer {
	t.Helper()
	p := quietly(t, srv)
	p.raw([]byte(http2.ClientPreface))
	p.do(p.fr.WriteSettings(settings...))
	p.await(http2.FrameSettings, 0)
	p.await(http2.FrameWindowUpdate, 0)
	if e := p.await(http2.FrameSettings, 0); e.flags != http2.FlagSettingsAck {
		t.Fatalf("got %v, want the acknowledgement of SETTINGS", e)
	}
	return p
}

func serve(t testing.TB, h func(x message.Exchange), settings ...http2.Setting) *peer {
	t.Helper()
	return meet(t, &Server{Handler: handlerFunc(h)}, settings...)
}

func (p *peer) do(err error) {
	p.t.Helper()
	if err != nil {
		p.t.Fatal(err)
	}
}

func (p *peer) raw(b []byte) {
	p.t.Helper()
	_, err := p.nc.Write(b)
	p.do(err)
}

// frame sends any frame.
func (p *peer) frame(kind http2.FrameType, flags http2.Flags, id uint32, payload ...byte) {
	p.t.Helper()
	p.do(p.fr.WriteRawFrame(kind, flags, id, payload))
}

// encode returns fields, of pairs, as a block.
func (p *peer) encode(fields ...string) []byte {
	p.block.Reset()
	for i := 0; i < len(fields); i += 2 {
		p.do(p.enc.WriteField(hpack.HeaderField{Name: fields[i], Value: fields[i+1]}))
	}
	return bytes.Clone(p.block.Bytes())
}

// base are the fields of a request, before others.
func base(method, path string, more ...string) []string {
	return append([]string{":method", method, ":scheme", "https", ":authority", "h2.test", ":path", path}, more...)
}

// ask sends a head. End: no body follows.
func (p *peer) ask(id uint32, end bool, fields ...string) {
	p.t.Helper()
	flags := http2.FlagHeadersEndHeaders
	if end {
		flags |= http2.FlagHeadersEndStream
	}
	p.frame(http2.FrameHeaders, flags, id, p.encode(fields...)...)
}

func (p *peer) get(id uint32) { p.t.Helper(); p.ask(id, true, base("GET", "/")...) }

func (p *peer) data(id uint32, end bool, b string) {
	p.t.Helper()
	p.do(p.fr.WriteData(id, end, []byte(b)))
}

const patience = 20 * time.Second

// next returns the next frame of the server, whatever it is.
func (p *peer) next() (event, bool) {
	p.t.Helper()
	select {
	case e, ok := <-p.events:
		return e, ok
	case <-time.After(patience):
		p.t.Fatal("no frame came")
		return event{}, false
	}
}

// await returns the next frame of one of those kinds on that stream. It puts
// aside what there is on other streams, and skips WINDOW_UPDATE.
func (p *peer) await(kind http2.FrameType, id uint32, or ...http2.FrameType) event {
	p.t.Helper()
	kinds := append(or, kind)
	for i := 0; ; {
		var e event
		ok := true
		if i < len(p.stash) {
			if e = p.stash[i]; e.id != id {
				i++
				continue
			}
			p.stash = slices.Delete(p.stash, i, i+1)
		} else {
			e, ok = p.next()
		}
		switch {
		case !ok:
			p.t.Fatalf("the connection ended; want %v on %d", kinds, id)
		case e.id == id && slices.Contains(kinds, e.kind):
			return e
		case e.id != id || e.kind == http2.FrameWindowUpdate:
			if e.kind == http2.FrameGoAway && e.code() != http2.ErrCodeNo {
				p.t.Fatalf("got GOAWAY %v, want %v on %d", e.code(), kinds, id)
			}
			if e.id != id && e.kind != http2.FrameWindowUpdate {
				p.stash = append(p.stash, e)
				i = len(p.stash)
			}
		default:
			p.t.Fatalf("got %v; want %v on %d", e, kinds, id)
		}
	}
}

// answer is what came on one stream.
type answer struct {
	status  string
	head    event
	interim []string
	body    string
	trailer event
	ended   bool // END_STREAM came
	reset   bool
	code    http2.ErrCode
}

// hear returns the answer on a stream up to its END_STREAM or RST_STREAM, and
// gives back what it takes of the windows.
func (p *peer) hear(id uint32) (a answer) {
	p.t.Helper()
	var body strings.Builder
	defer func() { a.body = body.String() }()
	for {
		e := p.await(http2.FrameHeaders, id, http2.FrameData, http2.FrameRSTStream)
		switch {
		case e.kind == http2.FrameRSTStream:
			a.reset, a.code = true, e.code()
			return a
		case e.kind == http2.FrameData:
			body.Write(e.payload)
			if n := len(e.payload); n > 0 && p.auto {
				p.do(p.fr.WriteWindowUpdate(0, uint32(n)))
				if !e.ends() {
					p.do(p.fr.WriteWindowUpdate(id, uint32(n)))
				}
			}
		case a.status == "" && e.get(":status") < "200":
			a.interim = append(a.interim, e.get(":status"))
		case a.status == "":
			a.status, a.head = e.get(":status"), e
		default:
			a.trailer = e
		}
		if e.ends() {
			a.ended = true
			return a
		}
	}
}

// wantOK asks for something ordinary and wants it answered with 200.
func (p *peer) wantOK(id uint32) {
	p.t.Helper()
	p.get(id)
	if a := p.hear(id); a.status != "200" || !a.ended {
		p.t.Fatalf("got %+v, want an answer of 200", a)
	}
}

// wantReset wants a stream reset with that code.
func (p *peer) wantReset(id uint32, code http2.ErrCode) {
	p.t.Helper()
	if a := p.hear(id); !a.reset || a.code != code {
		p.t.Fatalf("got %+v, want a reset with %v", a, code)
	}
}

// wantGoAway wants the connection to end with that code.
func (p *peer) wantGoAway(code http2.ErrCode) {
	p.t.Helper()
	for {
		e, ok := p.next()
		if !ok {
			p.t.Fatalf("the connection ended, want GOAWAY %v first", code)
		}
		if e.kind != http2.FrameGoAway {
			continue
		}
		if e.code() != code {
			p.t.Fatalf("got GOAWAY %v, want %v", e.code(), code)
		}
		break
	}
	p.wantEnd()
}

// wantEnd wants nothing to come but the end of the connection.
func (p *peer) wantEnd() {
	p.t.Helper()
	for {
		if _, ok := p.next(); !ok {
			return
		}
	}
}

// fork is for another goroutine to send by. A failure ends it by a panic that
// unfork takes.
func (p *peer) fork() *peer {
	q := &peer{t: quiet{p.t}, nc: p.nc, fr: http2.NewFramer(p.nc, nil), block: new(bytes.Buffer)}
	q.fr.AllowIllegalWrites = true
	q.enc = hpack.NewEncoder(q.block)
	return q
}

type cut struct{}

func unfork() {
	if v := recover(); v != nil && v != (cut{}) {
		panic(v)
	}
}

// quiet ends by a panic what would fail the test.
type quiet struct{ testing.TB }

func (quiet) Fatal(...any) { panic(cut{}) }
func (quiet) Helper()      {}

// wantSettled wants nothing to be left of the streams when the last one has ended:
// every window was given back.
func (p *peer) wantSettled() {
	p.t.Helper()
	all := p.srv.all()
	if len(all) == 0 {
		return // it has ended
	}
	c := all[0]
	c.mu.Lock()
	defer c.mu.Unlock()
	for len(c.open) > 0 {
		c.written.Wait()
	}
	if c.dead {
		return
	}
	if c.recvWindow+c.unacked != ConnWindow || c.reserved != 0 || c.answered != 0 || c.lasting != 0 || len(c.waiters) != 0 || len(c.held) != 0 {
		p.t.Errorf("the window is %d and %d, %d bytes are reserved; %d answered, %d last, %d wait, %d are held",
			c.recvWindow, c.unacked, c.reserved, c.answered, c.lasting, len(c.waiters), len(c.held))
	}
}

// ok answers with 200 and no body, having read the request's.
func ok(x message.Exchange) {
	var b [512]byte
	for {
		if _, err := x.ReadBody(b[:]); err != nil {
			if !errors.Is(err, io.EOF) {
				x.Abort()
				return
			}
			break
		}
	}
	if x.Begin(&message.Response{Status: 200}) == nil {
		_ = x.End(nil)
	}
}

// respond answers with 200 and that body.
func respond(x message.Exchange, body string) {
	if x.Begin(&message.Response{Status: 200, Length: int64(len(body)), HasLength: true}) != nil {
		return
	}
	if _, err := x.Write([]byte(body)); err == nil {
		_ = x.End(nil)
	}
}

func field(name, value string) message.Field {
	return message.Field{Name: []byte(name), Value: []byte(value), ID: message.Lookup([]byte(name))}
}

// inTime runs f by a clock of its own.
func inTime(t *testing.T, f func(t *testing.T)) {
	t.Helper()
	synctest.Test(t, f)
}
