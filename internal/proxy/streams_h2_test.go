package proxy

import (
	"bufio"
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"io"
	"net"
	"net/http"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	"tako/internal/wire"
)

// h2Client speaks HTTP/2 with the proxy frame by frame.
type h2Client struct {
	t      testing.TB
	conn   net.Conn
	framer *http2.Framer
	head   bytes.Buffer
	enc    *hpack.Encoder
}

// h2Dial connects over TLS, trusting root.
func (m *master) h2Dial(root *x509.Certificate) *h2Client {
	m.t.Helper()
	roots := x509.NewCertPool()
	roots.AddCert(root)
	conn, err := tls.Dial("tcp", m.tls, &tls.Config{RootCAs: roots, ServerName: "blog.test", NextProtos: []string{"h2"}})
	check0(m.t, err)
	m.t.Cleanup(func() { _ = conn.Close() })
	check0(m.t, conn.SetDeadline(time.Now().Add(2*patience)))
	c := &h2Client{t: m.t, conn: conn, framer: http2.NewFramer(conn, conn)}
	c.enc = hpack.NewEncoder(&c.head)
	c.framer.ReadMetaHeaders = hpack.NewDecoder(4096, nil)
	_, err = io.WriteString(conn, http2.ClientPreface)
	check0(m.t, err)
	check0(m.t, c.framer.WriteSettings())
	return c
}

// webSocket asks for one, by an extended CONNECT with these fields, too.
func (c *h2Client) webSocket(stream uint32, fields ...hpack.HeaderField) {
	c.t.Helper()
	c.head.Reset()
	for _, f := range append([]hpack.HeaderField{
		{Name: ":method", Value: http.MethodConnect},
		{Name: ":protocol", Value: "websocket"},
		{Name: ":scheme", Value: "https"},
		{Name: ":authority", Value: "blog.test"},
		{Name: ":path", Value: "/"},
		{Name: "sec-websocket-version", Value: "13"},
	}, fields...) {
		check0(c.t, c.enc.WriteField(f))
	}
	check0(c.t, c.framer.WriteHeaders(http2.HeadersFrameParam{StreamID: stream, BlockFragment: c.head.Bytes(), EndHeaders: true}))
}

// until reads up to the first frame that is it.
func (c *h2Client) until(is func(http2.Frame) bool) {
	c.t.Helper()
	for {
		f, err := c.framer.ReadFrame()
		check0(c.t, err)
		if is(f) {
			return
		}
	}
}

func isOpen(f http2.Frame) bool {
	h, ok := f.(*http2.MetaHeadersFrame)
	return ok && h.PseudoValue("status") == "200"
}

// h2WebSockets is an app that takes WebSockets and says nothing.
func h2WebSockets(t testing.TB) (*master, *x509.Certificate, wire.Upstream) {
	t.Helper()
	m := serving(t)
	cert, leaf := m.certificate("c", true, "blog.test")
	m.send(cert)
	up := webSocket(t, func(_ net.Conn, br *bufio.Reader) { _, _ = io.Copy(io.Discard, br) })
	m.plainApp(up)
	return m, leaf, up
}

// What closes a WebSocket that does not take a proper close must not come when
// its stream is another's already.
func TestWebSocketOfHTTP2IsClosedProperlyAndOnce(t *testing.T) {
	m, leaf, up := h2WebSockets(t)
	c := m.h2Dial(leaf)
	c.webSocket(1)
	c.until(isOpen)
	up.Draining = true
	m.plainApp(up)
	expect[*wire.Quiet](m)
	up.CutStreams = true
	m.plainApp(up)
	c.until(func(f http2.Frame) bool {
		d, ok := f.(*http2.DataFrame)
		return ok && bytes.Equal(d.Data(), closeGoingAway)
	})
	check0(t, c.framer.WriteData(1, true, []byte{0x88, 0x82, 0, 0, 0, 0, 3, 0xe9}))
	if q := expect[*wire.Quiet](m); q.Streams != 0 {
		t.Errorf("%d streams are left", q.Streams)
	}
	// The time for the close passes while another request has the stream's place.
	other := served(t, func(http.ResponseWriter, *http.Request) { time.Sleep(CloseTime + 200*time.Millisecond) })
	m.plainApp(other)
	roots := x509.NewCertPool()
	roots.AddCert(leaf)
	resp, err := m.client(true, roots).Get("https://blog.test/")
	if text(t, resp, err); resp.StatusCode != http.StatusOK {
		t.Errorf("the next request got %d", resp.StatusCode)
	}
}

func TestClientThatDropsItsWebSocketsHarmsNobody(t *testing.T) {
	m, leaf, _ := h2WebSockets(t)
	const rounds, each = 10, 90
	for range rounds {
		c := m.h2Dial(leaf)
		for i := range uint32(each) {
			c.webSocket(2*i + 1)
		}
		open := 0
		c.until(func(f http2.Frame) bool {
			if isOpen(f) {
				open++
			}
			return open == each
		})
		_ = c.conn.Close()
	}
	c := m.h2Dial(leaf)
	c.webSocket(1)
	c.until(isOpen)
}
