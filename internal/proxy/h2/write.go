package h2

import (
	"encoding/binary"
	"os"
	"runtime"
	"slices"
	"strconv"

	"golang.org/x/net/http2"

	"tako/internal/proxy/message"
)

// The limits of what waits to be written to one connection, in bytes.
const (
	// maxPending is from when on bodies wait.
	maxPending = 64 << 10
	// maxHeads is from when on heads wait, and pieces of bodies up to smallPiece,
	// which pass the larger ones.
	maxHeads   = 2 * maxPending
	smallPiece = 4 << 10
	// flushAt is from when on a Write does not wait for the next one.
	flushAt = 8 << 10
	// piece is what a client must take within Limits.Write.
	piece = 32 << 10
)

// frame appends the header of a frame to out. The caller holds mu.
func (c *conn) frame(n int, kind http2.FrameType, flags http2.Flags, id uint32) {
	if c.out == nil {
		c.out = newFrames()
	}
	c.out.b = append(c.out.b, byte(n>>16), byte(n>>8), byte(n), byte(kind), byte(flags), byte(id>>24), byte(id>>16), byte(id>>8), byte(id)) //nolint:gosec // its bytes
}

func (c *conn) appendSettings() {
	c.frame(3*6, http2.FrameSettings, 0, 0)
	for _, s := range [...]http2.Setting{
		{ID: http2.SettingMaxConcurrentStreams, Val: c.limits.Streams},
		// The protocol counts 32 for a field, package message 4.
		{ID: http2.SettingMaxHeaderListSize, Val: message.MaxHead + message.MaxFields*(entryCost-4)},
		{ID: http2.SettingEnableConnectProtocol, Val: 1},
	} {
		c.out.b = binary.BigEndian.AppendUint16(c.out.b, uint16(s.ID))
		c.out.b = binary.BigEndian.AppendUint32(c.out.b, s.Val)
	}
	c.appendWindow(0, ConnWindow-FirstWindow)
}

func (c *conn) appendWindow(id uint32, n int64) {
	c.frame(4, http2.FrameWindowUpdate, 0, id)
	c.out.b = binary.BigEndian.AppendUint32(c.out.b, uint32(n)) //nolint:gosec // a window
}

func (c *conn) appendReset(id uint32, code http2.ErrCode) {
	c.frame(4, http2.FrameRSTStream, 0, id)
	c.out.b = binary.BigEndian.AppendUint32(c.out.b, uint32(code))
}

func (c *conn) appendGoAway(last uint32, code http2.ErrCode) {
	c.frame(8, http2.FrameGoAway, 0, 0)
	c.out.b = binary.BigEndian.AppendUint32(c.out.b, last)
	c.out.b = binary.BigEndian.AppendUint32(c.out.b, uint32(code))
}

// kick has a worker write what is in out, if none does. The caller holds mu.
func (c *conn) kick() {
	if c.out == nil || c.writing || c.dead || c.parted || len(c.out.b) == 0 {
		return
	}
	c.writing = true
	c.srv.workers.run(task{c: c})
}

// flush writes until there is nothing left. Only one worker does at a time.
func (c *conn) flush() {
	// The streams that have an answer now get it into the same record.
	runtime.Gosched()
	c.mu.Lock()
	for c.out != nil && len(c.out.b) > 0 && !c.dead && !c.parted {
		out := c.out
		c.out = nil
		c.outGen++
		c.control = 0
		c.writeFrom = c.now()
		c.arm(c.writeFrom + c.limits.Write)
		c.grant()
		c.roomy.Broadcast()
		c.mu.Unlock()
		_, err := c.nc.Write(out.b)
		out.free()
		c.mu.Lock()
		c.writeFrom = noDeadline
		if err != nil {
			c.die(errGone)
		}
	}
	if c.parting {
		c.closeSending()
	}
	c.writing = false
	if c.dead && c.out != nil {
		c.out.free()
		c.out = nil
	}
	c.written.Broadcast()
	c.mu.Unlock()
}

func (c *conn) pending() int {
	if c.out == nil {
		return c.reserved
	}
	return c.reserved + len(c.out.b)
}

// grant lets the streams go on that have waited longest, one frame each, as far
// as there is room and window. The caller holds mu.
func (c *conn) grant() {
	for len(c.waiters) > 0 && c.sendWindow > 0 && c.pending() < maxPending {
		s := c.waiters[0]
		c.waiters = slices.Delete(c.waiters, 0, 1)
		s.waiting = false
		if n := min(int64(s.want), s.sendWindow, c.sendWindow); n > 0 {
			s.granted = int(n)
			s.sendWindow -= n
			c.sendWindow -= n
			c.reserved += int(n)
		}
		s.writable.Signal()
	}
}

// acquire returns how many of n bytes of a body the stream may append now, one
// at least; it waits for that. The windows are then charged. The caller holds
// mu.
func (s *stream) acquire(n int) (int, error) {
	c := s.c
	n = min(n, frameSize)
	for {
		if s.granted > 0 {
			n, s.granted = s.granted, 0
			c.reserved -= n
			if err := s.err(); err != nil {
				c.sendWindow += int64(n)
				c.grant()
				return 0, err
			}
			return n, nil
		}
		if err := s.err(); err != nil {
			c.unqueue(s)
			return 0, err
		}
		if s.writeLate {
			c.unqueue(s)
			return 0, os.ErrDeadlineExceeded
		}
		if !s.waiting && s.sendWindow > 0 {
			ahead := len(c.waiters) == 0 && c.pending() < maxPending || n <= smallPiece && c.pending() < maxHeads
			if k := min(int64(n), s.sendWindow, c.sendWindow); k > 0 && ahead {
				s.sendWindow -= k
				c.sendWindow -= k
				return int(k), nil
			}
			s.waiting, s.want = true, n
			c.waiters = append(c.waiters, s)
		}
		c.kick()
		if s.stalled == noDeadline && (s.sendWindow <= 0 || c.sendWindow <= 0) {
			s.stalled = c.now()
			c.arm(s.stalled + c.limits.Write)
		}
		s.writable.Wait()
	}
}

func (c *conn) unqueue(s *stream) {
	if s.waiting {
		s.waiting = false
		if i := slices.Index(c.waiters, s); i >= 0 {
			c.waiters = slices.Delete(c.waiters, i, i+1)
		}
	}
}

// waitRoom waits until a head may be appended. The caller holds mu.
func (s *stream) waitRoom() error {
	c := s.c
	for {
		if err := s.err(); err != nil {
			return err
		}
		if c.pending() < maxHeads {
			return nil
		}
		c.kick()
		c.roomy.Wait()
	}
}

// appendData appends a frame of DATA. The caller holds mu, and has acquired it.
func (c *conn) appendData(s *stream, p []byte) {
	c.frame(len(p), http2.FrameData, 0, s.id)
	s.mark(headerSize)
	c.out.b = append(c.out.b, p...)
}

// mark remembers the frame whose header of n bytes is the last in out.
func (s *stream) mark(n int) {
	s.lastGen, s.lastAt = s.c.outGen, len(s.c.out.b)-n
}

// appendEnd says that nothing more follows on a stream, in its last frame if that
// still waits. The caller holds mu.
func (c *conn) appendEnd(s *stream) {
	if s.ended {
		return
	}
	s.ended = true
	if c.out != nil && s.lastGen == c.outGen && s.lastAt >= 0 {
		c.out.b[s.lastAt+4] |= byte(http2.FlagDataEndStream) // HEADERS have the same
	} else {
		c.frame(0, http2.FrameData, http2.FlagDataEndStream, s.id)
	}
	if s.clientEnded && !s.counted {
		s.counted = true
		c.answered++
	}
}

// beginHead begins a block of fields in out, and returns where.
func (c *conn) beginHead(s *stream) int {
	c.frame(0, http2.FrameHeaders, http2.FlagHeadersEndHeaders, s.id)
	s.mark(headerSize)
	c.out.b = c.enc.begin(c.out.b)
	return s.lastAt
}

// endHead puts in the lengths of a block that begins at from, and cuts it into
// frames.
func (c *conn) endHead(id uint32, from int) {
	b := c.out.b
	n := len(b) - from - headerSize
	if n <= frameSize {
		b[from], b[from+1], b[from+2] = byte(n>>16), byte(n>>8), byte(n) //nolint:gosec // its bytes
		return
	}
	rest := slices.Clone(b[from+headerSize+frameSize:])
	b[from], b[from+1], b[from+2] = byte(frameSize>>16), byte(frameSize>>8), byte(frameSize&0xff)
	b[from+4] &^= byte(http2.FlagHeadersEndHeaders)
	c.out.b = b[:from+headerSize+frameSize]
	for len(rest) > 0 {
		k, flags := min(len(rest), frameSize), http2.Flags(0)
		if k == len(rest) {
			flags = http2.FlagContinuationEndHeaders
		}
		c.frame(k, http2.FrameContinuation, flags, id)
		c.out.b = append(c.out.b, rest[:k]...)
		rest = rest[k:]
	}
}

// appendFields appends the fields that go beyond one connection, and reports
// whether Date was among them.
func (c *conn) appendFields(fields []message.Field, nominates bool) (dated bool) {
	for i := range fields {
		f := &fields[i]
		if f.ID.Hop() || nominates && nominated(fields, f) {
			continue
		}
		dated = dated || f.ID == message.Date
		c.scratch = message.AppendLower(c.scratch[:0], f.Name)
		c.out.b = c.enc.field(c.out.b, f.ID, c.scratch, f.Value)
	}
	return dated
}

// nominated: a Connection field among fields names f (RFC 9110, 7.6.1).
func nominated(fields []message.Field, f *message.Field) bool {
	if f.ID.Kept() {
		return false
	}
	name := string(message.AppendLower(nil, f.Name))
	for i := range fields {
		if fields[i].ID == message.Connection && message.HasToken(fields[i].Value, name) {
			return true
		}
	}
	return false
}

var (
	nameDate   = []byte("date")
	nameLength = []byte("content-length")
)

func (c *conn) appendLength(n int64) {
	var digits [20]byte
	c.out.b = c.enc.field(c.out.b, message.ContentLength, nameLength, strconv.AppendInt(digits[:0], n, 10))
}

// answerEmpty answers a stream that has no handler. The caller holds mu.
func (s *stream) answerEmpty(status int) {
	c := s.c
	from := c.beginHead(s)
	c.out.b = c.enc.status(c.out.b, status)
	c.appendLength(0)
	c.out.b = c.enc.field(c.out.b, message.Date, nameDate, c.srv.now())
	c.endHead(s.id, from)
	c.appendEnd(s)
	if !s.clientEnded {
		c.appendReset(s.id, http2.ErrCodeNo)
	}
}
