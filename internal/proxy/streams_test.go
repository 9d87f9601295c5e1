package proxy

import (
	"bufio"
	"bytes"
	"crypto/x509"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"tako/internal/wire"
)

// frame makes a frame with a payload of n bytes.
func frame(opcode byte, n int, masked bool) []byte {
	b := []byte{0x80 | opcode, byte(n)}
	switch {
	case n >= 1<<16:
		b[1] = 127
		b = binary.BigEndian.AppendUint64(b, uint64(n))
	case n >= 126:
		b[1] = 126
		b = binary.BigEndian.AppendUint16(b, uint16(n))
	}
	if masked {
		b[1] |= 0x80
		b = append(b, 1, 2, 3, 4)
	}
	return append(b, bytes.Repeat([]byte{0x81}, n)...)
}

func TestFramesAreFollowedHoweverTheyAreCut(t *testing.T) {
	var all []byte
	ends := map[int]bool{}
	for i, n := range []int{0, 1, 125, 126, 127, 3000, 65535, 65536, 0} {
		all = append(all, frame(1, n, i%2 == 1)...)
		ends[len(all)] = true
	}
	for _, step := range []int{1, 2, 3, 7, 1000, 70000, len(all)} {
		var f frames
		for from := 0; from < len(all); from += step {
			to := min(from+step, len(all))
			want := -1
			for end := range ends {
				if end > from && end <= to {
					want = max(want, end-from)
				}
			}
			if got := f.follow(all[from:to]); got != want || f.between() != ends[to] || f.closed {
				t.Fatalf("bytes %d to %d: got %d, want %d, between frames: %t", from, to, got, want, f.between())
			}
		}
	}
	var f frames
	f.follow(frame(opcodeClose, 2, false))
	if !f.closed {
		t.Error("a Close frame was not noticed")
	}
}

func FuzzFramesAreTheSameWhateverTheCuts(f *testing.F) {
	f.Add(frame(1, 200, true), uint8(3))
	f.Add(bytes.Repeat([]byte{0xff}, 40), uint8(9))
	f.Fuzz(func(t *testing.T, b []byte, step uint8) {
		var whole, parts frames
		want, got := whole.follow(b), -1
		for from := 0; from < len(b); from += int(step) + 1 {
			if n := parts.follow(b[from:min(from+int(step)+1, len(b))]); n >= 0 {
				got = from + n
			}
		}
		if got != want || whole != parts {
			t.Errorf("got %d %+v, want %d %+v", got, parts, want, whole)
		}
	})
}

// webSocket is an instance that agrees to speak WebSocket and then does f.
func webSocket(t testing.TB, f func(c net.Conn, br *bufio.Reader)) wire.Upstream {
	return rawInstance(t, func(_ int, c net.Conn) {
		br := bufio.NewReader(c)
		if _, err := http.ReadRequest(br); err != nil {
			return
		}
		_, _ = io.WriteString(c, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Accept: a\r\n\r\n")
		f(c, br)
	})
}

func read(t testing.TB, r io.Reader, want []byte) {
	t.Helper()
	got := make([]byte, len(want))
	if n, err := io.ReadFull(r, got); err != nil || !bytes.Equal(got, want) {
		t.Fatalf("got %q (%v), want %q", got[:n], err, want)
	}
}

func TestWebSocketsAreClosedProperly(t *testing.T) {
	for _, byDrain := range []bool{false, true} {
		m := serving(t)
		half, rest := make(chan struct{}), make(chan struct{})
		heard := make(chan []byte, 1)
		data := frame(2, 3000, false)
		up := webSocket(t, func(c net.Conn, br *bufio.Reader) {
			_, _ = c.Write(data[:1000])
			close(half)
			<-rest
			_, _ = c.Write(append(append([]byte(nil), data[1000:]...), frame(1, 5, false)...))
			b, _ := io.ReadAll(br)
			heard <- b
		})
		revision := m.plainApp(up)
		c, br := upgraded(t, m)
		<-half
		read(t, br, data[:1000])
		if byDrain {
			m.send(&wire.Drain{RequestsMS: 1000, StreamsMS: 0})
		} else {
			up.Draining = true
			revision = m.plainApp(up)
			if q := expect[*wire.Quiet](m); q.Streams != 1 || q.Revision != revision {
				t.Fatalf("got %+v", q)
			}
			up.CutStreams = true
			m.plainApp(up)
		}
		// Nothing stands within the frame that is under way.
		check0(t, c.SetReadDeadline(time.Now().Add(50*time.Millisecond)))
		if b, err := br.ReadByte(); err == nil {
			t.Fatalf("a byte %x within a frame", b)
		}
		check0(t, c.SetReadDeadline(time.Now().Add(patience)))
		close(rest)
		read(t, br, data[1000:])
		if b, err := br.Peek(2); err == nil && b[0] == 0x81 { // both came at once, before it
			read(t, br, frame(1, 5, false))
		}
		read(t, br, closeGoingAway)
		answer := append([]byte{0x88, 0x82, 0, 0, 0, 0}, 0x03, 0xe9)
		_, err := c.Write(answer)
		check0(t, err)
		check0(t, c.(*net.TCPConn).CloseWrite())
		if b := <-heard; !bytes.HasSuffix(b, answer) {
			t.Errorf("the instance heard %x, want the client's Close", b)
		}
		if b, err := io.ReadAll(br); len(b) != 0 || err != nil {
			t.Errorf("after the Close: %x, %v", b, err)
		}
		if byDrain {
			if d := expect[*wire.Drained](m); d.Cut != 1 {
				t.Errorf("%d were cut", d.Cut)
			}
		} else if q := expect[*wire.Quiet](m); q.Streams != 0 || q.Revision != revision || q.Instance != up.Instance {
			t.Errorf("after the last stream: %+v", q)
		}
	}
}

func TestWebSocketWithinAFrameIsClosedInTime(t *testing.T) {
	m := serving(t)
	gone := make(chan struct{})
	up := webSocket(t, func(c net.Conn, br *bufio.Reader) {
		defer close(gone)
		_, _ = c.Write(frame(2, 3000, false)[:1000])
		_, _ = io.Copy(io.Discard, br)
	})
	m.plainApp(up)
	_, br := upgraded(t, m)
	read(t, br, frame(2, 3000, false)[:1000])
	up.Draining, up.CutStreams = true, true
	began := time.Now()
	m.plainApp(up)
	_, err := br.ReadByte()
	if took := time.Since(began); err == nil || took < CloseTime/2 || took > CloseTime+patience/2 {
		t.Errorf("closed after %s: %v", took, err)
	}
	<-gone
	for expect[*wire.Quiet](m).Streams != 0 {
	}
}

func TestOtherTunnelsAreJustClosed(t *testing.T) {
	m := serving(t)
	up := rawInstance(t, func(_ int, c net.Conn) {
		br := bufio.NewReader(c)
		_, _ = http.ReadRequest(br)
		_, _ = io.WriteString(c, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: other\r\n\r\n")
		_, _ = io.Copy(io.Discard, br)
	})
	m.plainApp(up)
	c, err := net.Dial("tcp", m.plain)
	check0(t, err)
	defer c.Close()
	_, err = io.WriteString(c, "GET / HTTP/1.1\r\nHost: blog.test\r\nConnection: Upgrade\r\nUpgrade: other\r\n\r\n")
	check0(t, err)
	br := bufio.NewReader(c)
	if resp, err := http.ReadResponse(br, nil); err != nil || resp.StatusCode != 101 {
		t.Fatalf("got %v, %v", resp, err)
	}
	up.Draining, up.CutStreams = true, true
	m.plainApp(up)
	check0(t, c.SetReadDeadline(time.Now().Add(patience)))
	if b, err := br.ReadByte(); err == nil {
		t.Errorf("got a byte %x", b)
	}
	for expect[*wire.Quiet](m).Streams != 0 {
	}
}

func TestStreamsOfEventsEndProperly(t *testing.T) {
	for _, byDrain := range []bool{false, true} {
		for _, protocol := range []string{"HTTP/1.1", "HTTP/2.0"} {
			t.Run(fmt.Sprint(protocol, byDrain), func(t *testing.T) {
				m := serving(t)
				cert, leaf := m.certificate("c", false, "blog.test")
				m.send(cert)
				up := served(t, func(w http.ResponseWriter, r *http.Request) {
					w.Header().Set("Content-Type", "text/event-stream")
					_, _ = io.WriteString(w, "data: 1\n\ndata: ha")
					_ = http.NewResponseController(w).Flush()
					<-r.Context().Done()
				})
				m.plainApp(up)
				pool := x509.NewCertPool()
				pool.AddCert(leaf)
				client, url := m.client(false, nil), "http://blog.test/"
				if protocol == "HTTP/2.0" {
					client, url = m.client(true, pool), "https://blog.test/"
				}
				resp, err := client.Get(url)
				check0(t, err)
				defer resp.Body.Close()
				read(t, resp.Body, []byte("data: 1\n\ndata: ha"))
				if byDrain {
					m.send(&wire.Drain{RequestsMS: 1000, StreamsMS: 10})
				} else {
					up.Draining, up.CutStreams = true, true
					m.plainApp(up)
				}
				if rest, err := io.ReadAll(resp.Body); len(rest) != 0 || err != nil || resp.Proto != protocol {
					t.Errorf("%s: it ended with %q, %v", resp.Proto, rest, err)
				}
				if byDrain {
					if d := expect[*wire.Drained](m); d.Cut != 1 {
						t.Errorf("%d were cut", d.Cut)
					}
					return
				}
				for expect[*wire.Quiet](m).Streams != 0 {
				}
			})
		}
	}
}

// An instance that dies is no end of its streams: that does not look whole.
func TestStreamOfADeadInstanceDoesNotEndProperly(t *testing.T) {
	m := serving(t)
	m.plainApp(rawInstance(t, func(_ int, c net.Conn) {
		_, _ = http.ReadRequest(bufio.NewReader(c))
		_, _ = io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n")
	}))
	resp, err := m.client(false, nil).Get("http://blog.test/")
	check0(t, err)
	defer resp.Body.Close()
	if b, err := io.ReadAll(resp.Body); string(b) != "abc" || err == nil {
		t.Errorf("got %q, %v", b, err)
	}
}

// The last of several streams is told of at once, and only the last.
func TestQuietComesAgainWithTheLastStream(t *testing.T) {
	m := serving(t)
	up := webSocket(t, func(c net.Conn, br *bufio.Reader) { _, _ = io.Copy(c, br) })
	m.plainApp(up)
	var conns []net.Conn
	for range 3 {
		c, err := net.Dial("tcp", m.plain)
		check0(t, err)
		defer c.Close()
		check0(t, c.SetDeadline(time.Now().Add(patience)))
		_, err = io.WriteString(c, "GET /ws HTTP/1.1\r\nHost: blog.test\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\nx")
		check0(t, err)
		br := bufio.NewReader(c)
		resp, err := http.ReadResponse(br, nil)
		check0(t, err)
		if b, err := br.ReadByte(); resp.StatusCode != 101 || b != 'x' {
			t.Fatalf("got %d, %v", resp.StatusCode, err)
		}
		conns = append(conns, c)
	}
	up.Draining = true
	revision := m.plainApp(up)
	if q := expect[*wire.Quiet](m); q.Streams != 3 {
		t.Errorf("got %+v", q)
	}
	for _, c := range conns {
		_ = c.Close()
	}
	if q := expect[*wire.Quiet](m); q.Streams != 0 || q.Revision != revision {
		t.Errorf("got %+v", q)
	}
}

func TestTunnelOfAClientThatDoesNotReadEnds(t *testing.T) {
	client, far := net.Pipe()
	defer far.Close()
	w := &tunnel{client: &hijacked{Conn: client, limit: 10 * time.Millisecond}}
	var ne net.Error
	if err := w.write([]byte(strings.Repeat("x", 100))); !errors.As(err, &ne) || !ne.Timeout() {
		t.Errorf("got %v", err)
	}
}

// A request that turns out to be a stream when their time is over ends at once.
func TestLateStreamEndsAtOnce(t *testing.T) {
	m := serving(t)
	begun, goOn := make(chan struct{}), make(chan struct{})
	up := served(t, func(w http.ResponseWriter, r *http.Request) {
		close(begun)
		<-goOn
		w.Header().Set("Content-Type", "text/event-stream")
		_ = http.NewResponseController(w).Flush()
		<-r.Context().Done()
	})
	m.plainApp(up)
	answer := make(chan string, 1)
	go func() {
		resp, err := m.client(false, nil).Get("http://blog.test/")
		if err != nil {
			answer <- err.Error()
			return
		}
		b, err := io.ReadAll(resp.Body)
		_ = resp.Body.Close()
		answer <- fmt.Sprint(resp.StatusCode, len(b), err)
	}()
	<-begun
	up.Draining, up.CutStreams = true, true
	m.plainApp(up)
	close(goOn)
	if got := <-answer; got != "200 0 <nil>" {
		t.Errorf("got %s", got)
	}
	for expect[*wire.Quiet](m).Streams != 0 {
	}
}
