package main

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"time"
)

// What of HTTP/2 (RFC 9113) the load speaks: requests without a body, answers
// that begin with the static table's ":status: 200", as every proxy writes it.
const (
	frameData         = 0
	frameHeaders      = 1
	frameReset        = 3
	frameSettings     = 4
	framePing         = 6
	frameGoAway       = 7
	frameWindow       = 8
	frameContinuation = 9

	flagEndStream  = 1
	flagAck        = 1
	flagEndHeaders = 4
	flagPadded     = 8
	flagPriority   = 32

	h2Preface   = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
	h2MaxFrame  = 16 << 10
	h2Window    = 1<<31 - 1
	h2Replenish = 1 << 29 // bytes that came before the window is opened again
	status200   = 0x88
)

// h2 opens connections and returns a closed loop over them: so many streams at a
// time on each.
func (l *load) h2() (func() error, error) {
	l.secure = true
	l.tls.NextProtos = []string{"h2"}
	conns := make([]*h2Conn, l.conns)
	for i := range conns {
		c, err := l.dial(l.tls)
		if err == nil {
			conns[i], err = newH2(l, c)
		}
		if err != nil {
			return nil, err
		}
	}
	return func() error {
		var wg sync.WaitGroup
		for _, c := range conns {
			wg.Go(func() {
				defer c.conn.Close()
				if err := c.run(); err != nil {
					l.fail(err)
				}
			})
		}
		wg.Wait()
		return nil
	}, nil
}

type h2Stream struct {
	asked time.Time
	off   int  // of its body
	ok    bool // its head was read
}

type h2Conn struct {
	load    *load
	conn    net.Conn
	in      *bufio.Reader
	out     []byte // what to write before the next read
	next    uint32
	streams map[uint32]*h2Stream
	free    []*h2Stream
	first   []byte // the header block of the first request, which fills the table
	later   []byte
	came    int
}

func frame(out []byte, kind, flags byte, stream uint32, payload ...byte) []byte {
	n := len(payload)
	out = append(out, byte(n>>16), byte(n>>8), byte(n), kind, flags)
	out = binary.BigEndian.AppendUint32(out, stream)
	return append(out, payload...)
}

func newH2(l *load, c net.Conn) (*h2Conn, error) {
	h := &h2Conn{load: l, conn: c, in: bufio.NewReaderSize(c, 64<<10), next: 1, streams: make(map[uint32]*h2Stream)}
	path := []byte{0x84} // :path /
	if l.path != "/" {
		path = append([]byte{0x04, byte(len(l.path))}, l.path...)
	}
	// :method GET, :scheme https, :path, and an :authority that the table keeps.
	h.first = append(append([]byte{0x82, 0x87}, path...), 0x41, byte(len(l.host)))
	h.first = append(h.first, l.host...)
	h.later = append(append([]byte{0x82, 0x87}, path...), 0xbe)
	out := []byte(h2Preface)
	out = frame(out, frameSettings, 0, 0, 0, 4, 0x7f, 0xff, 0xff, 0xff) // SETTINGS_INITIAL_WINDOW_SIZE
	out = frame(out, frameWindow, 0, 0, binary.BigEndian.AppendUint32(nil, h2Window-65_535)...)
	_, err := c.Write(out)
	return h, err
}

func (h *h2Conn) ask() {
	s := new(h2Stream)
	if n := len(h.free); n > 0 {
		s, h.free = h.free[n-1], h.free[:n-1]
	}
	*s = h2Stream{asked: time.Now()}
	block := h.later
	if h.next == 1 {
		block = h.first
	}
	h.streams[h.next] = s
	h.out = frame(h.out, frameHeaders, flagEndStream|flagEndHeaders, h.next, block...)
	h.next += 2
}

func (h *h2Conn) run() error {
	if err := h.conn.SetDeadline(h.load.end.Add(answerTime)); err != nil {
		return err
	}
	for range h.load.streams {
		h.ask()
	}
	buf := make([]byte, h2MaxFrame)
	for len(h.streams) > 0 {
		if len(h.out) > 0 && h.in.Buffered() == 0 {
			if _, err := h.conn.Write(h.out); err != nil {
				return err
			}
			h.out = h.out[:0]
		}
		var head [9]byte
		if _, err := io.ReadFull(h.in, head[:]); err != nil {
			return err
		}
		n := int(head[0])<<16 | int(head[1])<<8 | int(head[2])
		if n > len(buf) {
			return fmt.Errorf("a frame of %d bytes", n)
		}
		if _, err := io.ReadFull(h.in, buf[:n]); err != nil {
			return err
		}
		if err := h.frame(head[3], head[4], binary.BigEndian.Uint32(head[5:])&h2Window, buf[:n]); err != nil {
			return err
		}
	}
	return nil
}

func (h *h2Conn) frame(kind, flags byte, id uint32, p []byte) error {
	switch kind {
	case frameSettings:
		if flags&flagAck == 0 {
			h.out = frame(h.out, frameSettings, flagAck, 0)
		}
		return nil
	case framePing:
		if flags&flagAck == 0 {
			h.out = frame(h.out, framePing, flagAck, 0, p...)
		}
		return nil
	case frameGoAway:
		return fmt.Errorf("GOAWAY %x", p)
	case frameReset, frameContinuation:
		return fmt.Errorf("a frame of kind %d: %x", kind, p)
	case frameHeaders, frameData:
	default:
		return nil
	}
	s := h.streams[id]
	if s == nil || flags&flagPadded != 0 || kind == frameHeaders && flags&flagPriority != 0 {
		return fmt.Errorf("kind %d with flags %x on stream %d, which is not expected", kind, flags, id)
	}
	if kind == frameHeaders {
		for len(p) > 0 && p[0]&0xe0 == 0x20 { // the table's size
			p = p[1:]
		}
		if s.ok || len(p) == 0 || p[0] != status200 || flags&flagEndHeaders == 0 {
			return fmt.Errorf("a head that is not of a 200: %.20x", p)
		}
		s.ok = true
	} else {
		if !s.ok || s.off+len(p) > h.load.want || !bytes.Equal(p, body[s.off:s.off+len(p)]) {
			return errors.New("a wrong body")
		}
		s.off += len(p)
		if h.came += len(p); h.came >= h2Replenish {
			h.out = frame(h.out, frameWindow, 0, 0, binary.BigEndian.AppendUint32(nil, uint32(h.came))...) //nolint:gosec // below 1<<30
			h.came = 0
		}
	}
	if flags&flagEndStream == 0 {
		return nil
	}
	if s.off != h.load.want {
		return fmt.Errorf("a body of %d bytes, want %d", s.off, h.load.want)
	}
	delete(h.streams, id)
	h.free = append(h.free, s)
	if h.load.good(s.asked) {
		h.ask()
	}
	return nil
}
