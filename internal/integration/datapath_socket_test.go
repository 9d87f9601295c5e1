package integration

import (
	"bufio"
	"bytes"
	"crypto/sha1"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	"tako/internal/takotest"
)

// h2Tunnel is the one stream of a connection: what extended CONNECT opens.
type h2Tunnel struct {
	conn   net.Conn
	framer *http2.Framer
	status string

	mu      sync.Mutex // above all that follows, and the framer's writes
	changed *sync.Cond
	windows [2]int64 // what may be sent: on the connection, on the stream
	initial int64
	came    bytes.Buffer
	over    error // why no more comes
	headed  bool
	enabled bool
}

const tunnelWindow = 1 << 20

// openTunnel opens a WebSocket over HTTP/2 (RFC 8441).
func openTunnel(t testing.TB, s *takotest.Server, host, path string) (*h2Tunnel, error) {
	h := &h2Tunnel{conn: overTLS(t, s, host), windows: [2]int64{65535, 65535}, initial: 65535}
	h.changed = sync.NewCond(&h.mu)
	h.framer = http2.NewFramer(h.conn, h.conn)
	h.framer.ReadMetaHeaders = hpack.NewDecoder(4096, nil)
	if _, err := io.WriteString(h.conn, http2.ClientPreface); err != nil {
		return nil, err
	}
	err := errors.Join(
		h.framer.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: tunnelWindow}),
		h.framer.WriteWindowUpdate(0, tunnelWindow),
	)
	if err != nil {
		return nil, err
	}
	go h.read()
	h.mu.Lock()
	defer h.mu.Unlock()
	for !h.enabled && h.over == nil {
		h.changed.Wait()
	}
	if h.over != nil {
		return nil, h.over
	}
	err = h.framer.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, EndHeaders: true, BlockFragment: block([][2]string{
		{":method", "CONNECT"}, {":protocol", "websocket"}, {":scheme", "https"}, {":authority", host}, {":path", path}, {"sec-websocket-version", "13"},
	})})
	for err == nil && !h.headed && h.over == nil {
		h.changed.Wait()
	}
	if err == nil {
		err = h.over
	}
	return h, err
}

func (h *h2Tunnel) read() {
	for {
		f, err := h.framer.ReadFrame()
		h.mu.Lock()
		if err == nil {
			err = h.take(f)
		}
		if h.over == nil {
			h.over = err
		}
		h.changed.Broadcast()
		h.mu.Unlock()
		if err != nil {
			return
		}
	}
}

// take is called with mu.
func (h *h2Tunnel) take(f http2.Frame) error {
	switch f := f.(type) {
	case *http2.SettingsFrame:
		if f.IsAck() {
			return nil
		}
		if v, ok := f.Value(http2.SettingInitialWindowSize); ok {
			h.windows[1] += int64(v) - h.initial
			h.initial = int64(v)
		}
		if v, ok := f.Value(http2.SettingEnableConnectProtocol); ok && v == 1 {
			h.enabled = true
		}
		return h.framer.WriteSettingsAck()
	case *http2.PingFrame:
		if !f.IsAck() {
			return h.framer.WritePing(true, f.Data)
		}
	case *http2.WindowUpdateFrame:
		h.windows[min(f.StreamID, 1)] += int64(f.Increment)
	case *http2.MetaHeadersFrame:
		h.status, h.headed = f.PseudoValue("status"), true
		if f.StreamEnded() {
			return io.EOF
		}
	case *http2.DataFrame:
		h.came.Write(f.Data())
		if n := f.Length; n > 0 && !f.StreamEnded() {
			if err := errors.Join(h.framer.WriteWindowUpdate(0, n), h.framer.WriteWindowUpdate(1, n)); err != nil {
				return err
			}
		}
		if f.StreamEnded() {
			return io.EOF
		}
	case *http2.RSTStreamFrame:
		return fmt.Errorf("the stream was reset: %v", f.ErrCode)
	case *http2.GoAwayFrame:
		return fmt.Errorf("the connection ends: %v %q", f.ErrCode, f.DebugData())
	}
	return nil
}

func (h *h2Tunnel) Read(p []byte) (int, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for h.came.Len() == 0 {
		if h.over != nil {
			return 0, h.over
		}
		h.changed.Wait()
	}
	return h.came.Read(p)
}

func (h *h2Tunnel) Write(p []byte) (wrote int, err error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for wrote < len(p) {
		n := min(int64(len(p)-wrote), h.windows[0], h.windows[1], 16384)
		switch {
		case h.over != nil:
			return wrote, h.over
		case n <= 0:
			h.changed.Wait()
			continue
		}
		if err := h.framer.WriteData(1, false, p[wrote:wrote+int(n)]); err != nil {
			return wrote, err
		}
		h.windows[0] -= n
		h.windows[1] -= n
		wrote += int(n)
	}
	return wrote, nil
}

// A wsFrame is one of WebSocket's (RFC 6455, 5.2).
type wsFrame struct {
	first   byte // FIN, the reserved bits and the opcode
	payload []byte
}

func (f wsFrame) String() string { return fmt.Sprintf("%02x with %d bytes", f.first, len(f.payload)) }

const (
	wsFin = 0x80

	wsMore, wsText, wsBinary, wsClose, wsPing, wsPong = 0, 1, 2, 8, 9, 10
)

// bytes is the frame as a client sends it, masked, or as a server does.
func (f wsFrame) bytes(masked bool) []byte {
	n := len(f.payload)
	b := make([]byte, 0, n+14)
	mask := byte(0)
	if masked {
		mask = 0x80
	}
	switch {
	case n < 126:
		b = append(b, f.first, mask|byte(n))
	case n < 1<<16:
		b = binary.BigEndian.AppendUint16(append(b, f.first, mask|126), uint16(n))
	default:
		b = binary.BigEndian.AppendUint64(append(b, f.first, mask|127), uint64(n))
	}
	if !masked {
		return append(b, f.payload...)
	}
	key := [4]byte{0x12, 0xf0, 0x81, byte(n)}
	b = append(b, key[:]...)
	at := len(b)
	b = append(b, f.payload...)
	for i := range f.payload {
		b[at+i] ^= key[i%4]
	}
	return b
}

// readFrame reads one, and wants it masked or not.
func readFrame(in *bufio.Reader, masked bool) (f wsFrame, err error) {
	var head [2]byte
	if _, err = io.ReadFull(in, head[:]); err != nil {
		return f, err
	}
	if (head[1]&0x80 != 0) != masked {
		return f, fmt.Errorf("a frame %x: masked must be %v", head, masked)
	}
	f.first = head[0]
	n := uint64(head[1] & 0x7f)
	long := make([]byte, map[uint64]int{126: 2, 127: 8}[n])
	if _, err = io.ReadFull(in, long); err != nil {
		return f, err
	}
	for i, b := range long {
		if i == 0 {
			n = 0
		}
		n = n<<8 | uint64(b)
	}
	if n > 64<<20 {
		return f, fmt.Errorf("a frame of %d bytes", n)
	}
	var key [4]byte
	if masked {
		if _, err = io.ReadFull(in, key[:]); err != nil {
			return f, err
		}
	}
	f.payload = make([]byte, n)
	_, err = io.ReadFull(in, f.payload)
	if masked {
		for i := range f.payload {
			f.payload[i] ^= key[i%4]
		}
	}
	return f, err
}

const wsGUID = "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"

// wsAccept is what a server answers to a key.
func wsAccept(key string) string {
	sum := sha1.Sum([]byte(key + wsGUID))
	return base64.StdEncoding.EncodeToString(sum[:])
}

// wsEcho sends back every frame as it came, but a pong for a ping, and ends
// behind a close.
func wsEcho(w http.ResponseWriter, r *http.Request) {
	if !strings.EqualFold(r.Header.Get("Upgrade"), "websocket") || r.Header.Get("Sec-WebSocket-Version") != "13" || r.Method != http.MethodGet {
		http.Error(w, "no WebSocket", http.StatusUpgradeRequired)
		return
	}
	c, rw, err := http.NewResponseController(w).Hijack()
	if err != nil {
		return
	}
	defer c.Close()
	fmt.Fprintf(rw, "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: %s\r\n\r\n", wsAccept(r.Header.Get("Sec-WebSocket-Key")))
	for {
		if err := rw.Flush(); err != nil {
			return
		}
		f, err := readFrame(rw.Reader, true)
		if err != nil {
			return
		}
		if f.first == wsFin|wsPing {
			f.first = wsFin | wsPong
		}
		rw.Write(f.bytes(false))
		if f.first == wsFin|wsClose {
			rw.Flush()
			return
		}
	}
}

// openSocket opens a WebSocket by p, and checks the answer.
func openSocket(t testing.TB, s *takotest.Server, p takotest.Protocol, host string) (io.ReadWriter, *bufio.Reader) {
	t.Helper()
	if p == takotest.H2 {
		h, err := openTunnel(t, s, host, "/socket")
		if err != nil || h.status != "200" {
			t.Fatalf("status %q, %v", h.status, err)
		}
		return h, bufio.NewReader(h)
	}
	c := connect(t, s, p, host)
	const key = "dGhlIHNhbXBsZSBub25jZQ=="
	fmt.Fprintf(c, "GET /socket HTTP/1.1\r\nHost: %s\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: %s\r\n\r\n", host, key)
	in := bufio.NewReader(c)
	res, err := http.ReadResponse(in, nil)
	if err != nil || res.StatusCode != http.StatusSwitchingProtocols || res.Header.Get("Sec-WebSocket-Accept") != wsAccept(key) {
		t.Fatalf("%v, %v", res, err)
	}
	return c, in
}

func TestDataPathWebSockets(t *testing.T) {
	t.Parallel()
	s := start(t, takotest.Options{})
	const host = "socket.localhost"
	serveApp(t, s, "socket", http.HandlerFunc(wsEcho), nil)
	lengths := []int{0, 1, 2, 125, 126, 127, 128, 1000, 16383, 16384, 65535, 65536, 65537, 1 << 20}
	rounds := 1
	if soaking() {
		lengths, rounds = append(lengths, 16<<20), 20
	}
	closes := [][]byte{{}}
	for _, code := range []uint16{1000, 1001, 1002, 1003, 1007, 1008, 1009, 1010, 1011, 3000, 3999, 4000, 4999} {
		closes = append(closes, append(binary.BigEndian.AppendUint16(nil, code), fmt.Sprint("because of ", code)...))
	}
	closes = append(closes, binary.BigEndian.AppendUint16(nil, 1000), append([]byte{3, 232}, bytes.Repeat([]byte("x"), 123)...))
	r := seeded(t)
	var mu sync.Mutex
	each(protocols, func(p takotest.Protocol) {
		t.Run(string(p), func(t *testing.T) {
			mu.Lock()
			r := rand.New(rand.NewPCG(r.Uint64(), 0))
			mu.Unlock()
			for range rounds {
				var frames []wsFrame
				for _, n := range lengths {
					frames = append(frames, wsFrame{wsFin | wsBinary, filler(uint64(n), n)}, wsFrame{wsFin | wsText, echoBody("ü", n/3*3)})
				}
				for range 20 { // a message in fragments, with pings between, and bits that an extension would use
					frames = append(frames, wsFrame{wsText, filler(1, r.IntN(300))})
					for range r.IntN(4) {
						frames = append(frames, wsFrame{wsFin | wsPing, filler(2, r.IntN(126))}, wsFrame{wsMore, filler(3, r.IntN(70_000))}, wsFrame{wsFin | wsPong, nil})
					}
					frames = append(frames, wsFrame{wsFin | wsMore, filler(4, r.IntN(300))}, wsFrame{wsFin | 0x40 | wsBinary, filler(5, r.IntN(300))})
				}
				for _, size := range []int{1 << 30, 50_000, 1000} {
					sendFrames(t, s, p, host, frames, func() int { return 1 + r.IntN(size) })
				}
				sendFrames(t, s, p, host, frames[:8], func() int { return 1 })
				for _, payload := range closes {
					sendFrames(t, s, p, host, []wsFrame{{wsFin | wsText, []byte("before")}, {wsFin | wsClose, payload}}, func() int { return 1 << 20 })
				}
			}
		})
	})
}

// sendFrames sends frames in pieces and wants them back, and behind a close the
// end.
func sendFrames(t *testing.T, s *takotest.Server, p takotest.Protocol, host string, frames []wsFrame, size func() int) {
	t.Helper()
	c, in := openSocket(t, s, p, host)
	sent := make(chan error, 1)
	go func() {
		var all []byte
		for _, f := range frames {
			all = append(all, f.bytes(true)...)
		}
		sent <- writeIn(c, all, size)
	}()
	for i, want := range frames {
		if want.first == wsFin|wsPing {
			want.first = wsFin | wsPong
		}
		got, err := readFrame(in, false)
		if err != nil || got.first != want.first || !bytes.Equal(got.payload, want.payload) {
			t.Fatalf("frame %d: got %v, %v, want %v", i, got, err, want)
		}
	}
	if err := <-sent; err != nil {
		t.Error(err)
	}
	if frames[len(frames)-1].first == wsFin|wsClose {
		if b, err := in.ReadByte(); !errors.Is(err, io.EOF) {
			t.Errorf("behind the close: %x, %v", b, err)
		}
	}
	if closer, ok := c.(io.Closer); ok {
		closer.Close()
	} else {
		c.(*h2Tunnel).conn.Close()
	}
}
