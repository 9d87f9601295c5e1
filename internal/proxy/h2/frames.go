package h2

import (
	"encoding/binary"
	"errors"
	"net/http"
	"slices"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

// take acts on a whole frame that is not DATA. Its error ends the connection.
func (c *conn) take(f frameHeader, p []byte) error {
	switch f.kind { //nolint:exhaustive // an unknown kind is ignored (RFC 9113, 4.1)
	case http2.FrameHeaders:
		return c.headers(f, p)
	case http2.FrameContinuation:
		if !c.inBlock {
			return fault(http2.ErrCodeProtocol, "CONTINUATION of nothing")
		}
		if c.fragments++; c.fragments > MaxContinuations {
			return fault(http2.ErrCodeEnhanceYourCalm, "too many CONTINUATION frames")
		}
		return c.fragment(p, f.has(http2.FlagContinuationEndHeaders))
	case http2.FrameSettings:
		return c.settings(f, p)
	case http2.FramePing:
		return c.ping(f, p)
	case http2.FrameWindowUpdate:
		return c.windowUpdate(f, p)
	case http2.FrameRSTStream:
		return c.rstStream(f, p)
	case http2.FramePriority:
		return c.priority(f, p)
	case http2.FrameGoAway:
		if f.id != 0 {
			return fault(http2.ErrCodeProtocol, "GOAWAY on a stream")
		}
		if f.length < 8 {
			return fault(http2.ErrCodeFrameSize, "GOAWAY of a wrong length")
		}
		if err := c.spend(pings); err != nil {
			return err
		}
		c.mu.Lock()
		c.clientGo = true
		if len(c.open) == 0 {
			c.leave()
		}
		c.mu.Unlock()
		return nil
	case http2.FramePushPromise:
		return fault(http2.ErrCodeProtocol, "PUSH_PROMISE of a client")
	}
	return c.spend(priorities)
}

// spend takes one from a budget. The caller does not hold mu.
func (c *conn) spend(f flood) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.purse.spend(f, c.clock) {
		return calm(f)
	}
	return nil
}

func calm(f flood) error {
	return fault(http2.ErrCodeEnhanceYourCalm, "too many "+budgets[f].name)
}

func (c *conn) settings(f frameHeader, p []byte) error {
	switch {
	case f.id != 0:
		return fault(http2.ErrCodeProtocol, "SETTINGS on a stream")
	case f.has(http2.FlagSettingsAck) && f.length > 0, f.length%6 != 0:
		return fault(http2.ErrCodeFrameSize, "SETTINGS of a wrong length")
	case f.has(http2.FlagSettingsAck) && !c.settled:
		return fault(http2.ErrCodeProtocol, "no SETTINGS at the beginning")
	}
	if f.length > 6*MaxSettings {
		return fault(http2.ErrCodeEnhanceYourCalm, "too many settings at once")
	}
	if err := c.spend(settings); err != nil || f.has(http2.FlagSettingsAck) {
		return err
	}
	c.settled = true
	c.mu.Lock()
	defer c.mu.Unlock()
	for ; len(p) > 0; p = p[6:] {
		v := binary.BigEndian.Uint32(p[2:])
		switch http2.SettingID(binary.BigEndian.Uint16(p)) { //nolint:exhaustive // the others are about what we do not do
		case http2.SettingHeaderTableSize:
			c.enc.resize(v)
		case http2.SettingEnablePush, http2.SettingEnableConnectProtocol:
			if v > 1 {
				return fault(http2.ErrCodeProtocol, "a setting that is neither 0 nor 1")
			}
		case http2.SettingInitialWindowSize:
			if v > maxWindow {
				return fault(http2.ErrCodeFlowControl, "an initial window that is too large")
			}
			more := int64(v) - c.firstWindow
			c.firstWindow = int64(v)
			for _, s := range c.open {
				if s.sendWindow += more; s.sendWindow > maxWindow {
					return fault(http2.ErrCodeFlowControl, "a window that is too large")
				}
				s.writable.Signal()
			}
		case http2.SettingMaxFrameSize:
			if v < frameSize || v > 1<<24-1 {
				return fault(http2.ErrCodeProtocol, "a frame size that is not allowed")
			}
		}
	}
	c.frame(0, http2.FrameSettings, http2.FlagSettingsAck, 0)
	return c.addControl()
}

// addControl counts what the last control frame added to out.
func (c *conn) addControl() error {
	if c.control += headerSize + 8; c.control > MaxControl {
		return fault(http2.ErrCodeEnhanceYourCalm, "answers that are not read")
	}
	return nil
}

func (c *conn) ping(f frameHeader, p []byte) error {
	switch {
	case f.id != 0:
		return fault(http2.ErrCodeProtocol, "PING on a stream")
	case f.length != 8:
		return fault(http2.ErrCodeFrameSize, "PING of a wrong length")
	}
	if err := c.spend(pings); err != nil {
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if f.has(http2.FlagPingAck) {
		if string(p) == drainPing && c.draining {
			c.leave()
		}
		return nil
	}
	c.frame(8, http2.FramePing, http2.FlagPingAck, 0)
	if c.dead {
		return nil
	}
	c.out.b = append(c.out.b, p...)
	return c.addControl()
}

func (c *conn) windowUpdate(f frameHeader, p []byte) error {
	if f.length != 4 {
		return fault(http2.ErrCodeFrameSize, "WINDOW_UPDATE of a wrong length")
	}
	n := int64(binary.BigEndian.Uint32(p) & maxWindow)
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.purse.spend(windows, c.clock) {
		return calm(windows)
	}
	if f.id == 0 {
		if n == 0 {
			return fault(http2.ErrCodeProtocol, "WINDOW_UPDATE of nothing")
		}
		if c.sendWindow += n; c.sendWindow > maxWindow {
			return fault(http2.ErrCodeFlowControl, "a window that is too large")
		}
		c.grant()
		return nil
	}
	if f.id > c.last {
		return fault(http2.ErrCodeProtocol, "WINDOW_UPDATE on an idle stream")
	}
	s := c.find(f.id)
	if s == nil || s.stopped != nil {
		return nil // for what it had got before the end
	}
	if n == 0 {
		return c.breach(s, f.id, http2.ErrCodeProtocol)
	}
	if s.sendWindow += n; s.sendWindow > maxWindow {
		return c.breach(s, f.id, http2.ErrCodeFlowControl)
	}
	s.writable.Signal()
	return nil
}

// breach resets a stream, which may be nil for one that has ended, because the
// client broke the rules on it. The caller holds mu.
func (c *conn) breach(s *stream, id uint32, code http2.ErrCode) error {
	if !c.purse.spend(resets, c.clock) {
		return calm(resets)
	}
	if s == nil {
		c.appendReset(id, code)
		return c.addControl()
	}
	if s.stopped == nil {
		if !s.silent {
			c.appendReset(id, code)
			s.silent, s.how = true, byUs
		}
		c.gone(s, errMalformed)
	}
	return c.addControl()
}

func (c *conn) rstStream(f frameHeader, p []byte) error {
	switch {
	case f.length != 4:
		return fault(http2.ErrCodeFrameSize, "RST_STREAM of a wrong length")
	case f.id == 0:
		return fault(http2.ErrCodeProtocol, "RST_STREAM on the connection")
	}
	_ = p // whatever the reason
	c.mu.Lock()
	defer c.mu.Unlock()
	if f.id > c.last {
		return fault(http2.ErrCodeProtocol, "RST_STREAM on an idle stream")
	}
	s := c.find(f.id)
	if s == nil || s.stopped != nil || s.counted {
		if !c.purse.spend(closed, c.clock) {
			return calm(closed)
		}
		if s != nil {
			s.silent, s.how = true, byClient
		}
		return nil
	}
	if !c.purse.spend(resets, c.clock) {
		return calm(resets)
	}
	s.silent = true
	s.how = byClient
	c.gone(s, errReset)
	return nil
}

func (c *conn) priority(f frameHeader, p []byte) error {
	if f.id == 0 {
		return fault(http2.ErrCodeProtocol, "PRIORITY on the connection")
	}
	if err := c.spend(priorities); err != nil {
		return err
	}
	code := http2.ErrCodeNo
	switch {
	case f.length != 5:
		code = http2.ErrCodeFrameSize
	case binary.BigEndian.Uint32(p)&maxStreamID == f.id:
		code = http2.ErrCodeProtocol
	}
	if code == http2.ErrCodeNo {
		return nil // priorities are not for us (RFC 9113, 5.3)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	s := c.find(f.id)
	if s == nil {
		return fault(code, "PRIORITY that is none")
	}
	return c.breach(s, f.id, code)
}

// headers begins a block of fields.
func (c *conn) headers(f frameHeader, p []byte) error {
	if f.id == 0 {
		return fault(http2.ErrCodeProtocol, "HEADERS on the connection")
	}
	if f.id%2 == 0 {
		return fault(http2.ErrCodeProtocol, "a stream of the server's")
	}
	if f.has(http2.FlagHeadersPadded) {
		if len(p) == 0 || int(p[0]) >= len(p) {
			return fault(http2.ErrCodeProtocol, "padding larger than the frame")
		}
		p = p[1 : len(p)-int(p[0])]
	}
	self := false
	if f.has(http2.FlagHeadersPriority) {
		if len(p) < 5 {
			return fault(http2.ErrCodeFrameSize, "HEADERS without their priority")
		}
		self = binary.BigEndian.Uint32(p)&maxStreamID == f.id
		p = p[5:]
	}
	c.inBlock, c.blockID, c.blockSize, c.decoded, c.fragments = true, f.id, 0, 0, 0
	c.blockEnds = f.has(http2.FlagHeadersEndStream)
	c.mu.Lock()
	err := c.openBlock(f.id)
	c.mu.Unlock()
	if err != nil {
		return err
	}
	if self && c.h != nil {
		c.h.wrong = "a stream that depends on itself"
	}
	return c.fragment(p, f.has(http2.FlagHeadersEndHeaders))
}

// openBlock finds out what a block of fields on that stream is, and where its
// fields go. The caller holds mu.
func (c *conn) openBlock(id uint32) error {
	c.h, c.unwanted, c.trailer = nil, nil, nil
	if id > c.last {
		c.last = id
		if c.leaving || c.parting || c.dead {
			c.remember(id, neverBegan)
			return nil
		}
		c.unwanted = newStream(c, id)
		c.h = &c.unwanted.head
		return nil
	}
	s := c.find(id)
	if s != nil && s.stopped == nil && !s.silent {
		if s.clientEnded {
			return c.breach(s, id, http2.ErrCodeStreamClosed)
		}
		c.trailer = s
		s.trailer = new(head)
		s.trailer.reset(true)
		c.h = s.trailer
		return nil
	}
	how := c.howEnded(id)
	if s != nil {
		how = s.how
	}
	switch how {
	case byUs, neverBegan:
		if !c.purse.spend(closed, c.clock) {
			return calm(closed)
		}
		return nil
	case byClient:
		return c.breach(nil, id, http2.ErrCodeStreamClosed)
	case byBoth:
		return fault(http2.ErrCodeStreamClosed, "HEADERS on a stream that has ended")
	case unknown:
	}
	return fault(http2.ErrCodeProtocol, "a stream with a lower number than one before")
}

// emit takes a field that the decoder has read.
func (c *conn) emit(f hpack.HeaderField) {
	c.decoded += len(f.Name) + len(f.Value) + entryCost
	if c.h != nil {
		c.h.add(f)
	}
}

// fragment takes a piece of a block of fields.
func (c *conn) fragment(p []byte, last bool) error {
	if c.blockSize += len(p); c.blockSize > MaxBlock {
		return fault(http2.ErrCodeEnhanceYourCalm, "a block of fields that is too large")
	}
	if _, err := c.dec.Write(p); err != nil {
		if errors.Is(err, hpack.ErrStringLength) {
			return fault(http2.ErrCodeEnhanceYourCalm, "a string that is too long")
		}
		return fault(http2.ErrCodeCompression, err.Error())
	}
	if c.decoded > MaxDecoded {
		return fault(http2.ErrCodeEnhanceYourCalm, "a block of fields that is too large")
	}
	if !last {
		return nil
	}
	if err := c.dec.Close(); err != nil {
		return fault(http2.ErrCodeCompression, err.Error())
	}
	c.inBlock = false
	return c.block()
}

// dropBlock forgets the stream of a block that will not end.
func (c *conn) dropBlock() {
	if c.unwanted != nil {
		c.unwanted.release()
	}
	c.h, c.unwanted, c.trailer = nil, nil, nil
}

// block acts on a whole block of fields.
func (c *conn) block() error {
	s, t := c.unwanted, c.trailer
	c.h, c.unwanted, c.trailer = nil, nil, nil
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case s != nil:
		return c.begin(s)
	case t == nil || c.find(c.blockID) != t || t.stopped != nil || t.silent: // t may be another's by now
		return nil
	case t.trailer.wrong != "" || t.trailer.long || !c.blockEnds:
		return c.breach(t, t.id, http2.ErrCodeProtocol)
	}
	return c.endBody(t)
}

// begin takes a new stream. The caller holds mu.
func (c *conn) begin(s *stream) error {
	if c.dead || c.leaving { // meanwhile
		c.remember(s.id, neverBegan)
		s.release()
		return nil
	}
	c.acted = s.id
	s.clientEnded = c.blockEnds
	s.head.request(&s.request, c.blockEnds)
	most := int(c.limits.Streams) //nolint:gosec // a setting far below
	code := http2.ErrCodeNo
	switch {
	case s.head.wrong != "":
		code = http2.ErrCodeProtocol
	case len(c.open)-c.answered >= most || len(c.open) >= 2*most:
		code = http2.ErrCodeRefusedStream
	}
	if code != http2.ErrCodeNo {
		c.remember(s.id, byUs)
		id := s.id
		s.release()
		return c.breach(nil, id, code)
	}
	s.sendWindow = c.firstWindow
	c.open = append(c.open, s)
	c.idleSince = noDeadline
	status := s.head.refuse
	if s.head.long {
		status = http.StatusRequestHeaderFieldsTooLarge
	}
	switch {
	case status != 0:
		return c.refuse(s, status)
	case s.clientEnded || s.request.Extended:
		c.start(s)
	default:
		s.held = true
		if s.request.Length == 0 { // its handler would not see that more comes than that
			s.waitFrom = c.now()
			c.arm(s.waitFrom + c.limits.Head)
			return nil
		}
		c.held = append(c.held, s)
	}
	return nil
}

// refuse answers a stream without its handler. The caller holds mu.
func (c *conn) refuse(s *stream, status int) error {
	if !c.purse.spend(resets, c.clock) {
		return calm(resets)
	}
	s.answerEmpty(status)
	c.remove(s, byBoth)
	return c.addControl()
}

// start has the handler of s begin. The caller holds mu.
func (c *conn) start(s *stream) {
	s.working = true
	s.waitFrom = noDeadline
	c.srv.workers.run(task{s: s})
}

// data reads a frame of DATA, and gives what is in it to the stream as it comes.
func (c *conn) data(f frameHeader) error {
	if f.id == 0 {
		return fault(http2.ErrCodeProtocol, "DATA on the connection")
	}
	left, padding := f.length, 0
	if f.has(http2.FlagDataPadded) {
		if left == 0 {
			return fault(http2.ErrCodeFrameSize, "DATA without the length of its padding")
		}
		if err := c.fill(1); err != nil {
			return err
		}
		padding = int(c.buf[c.r])
		c.r++
		if left--; padding > left {
			return fault(http2.ErrCodeProtocol, "padding larger than the frame")
		}
		left -= padding
	}
	end := f.has(http2.FlagDataEndStream)
	c.mu.Lock()
	s, err := c.openData(f, left, end)
	c.mu.Unlock()
	if err != nil {
		return err
	}
	for left > 0 {
		if c.r == c.w {
			if err := c.fill(1); err != nil {
				return err
			}
		}
		n := min(left, c.w-c.r)
		p := c.buf[c.r : c.r+n]
		c.r += n
		left -= n
		c.mu.Lock()
		if s != nil && (c.find(f.id) != s || s.stopped != nil || s.finished) { // meanwhile
			s = nil
		}
		if s == nil {
			c.credit(n)
		} else {
			s.body.push(p)
			s.received += int64(n)
			s.readable.Signal()
		}
		c.mu.Unlock()
	}
	for padding > 0 {
		if c.r == c.w {
			if err := c.fill(1); err != nil {
				return err
			}
		}
		n := min(padding, c.w-c.r)
		c.r += n
		padding -= n
	}
	if end && s != nil {
		c.mu.Lock()
		defer c.mu.Unlock()
		if c.find(f.id) == s && s.stopped == nil {
			return c.endBody(s)
		}
	}
	return nil
}

// openData checks a frame of DATA of n bytes without its padding before they are
// read, and returns the stream that they are for, nil for none. The caller holds
// mu.
func (c *conn) openData(f frameHeader, n int, end bool) (*stream, error) {
	if f.id > c.last || f.id%2 == 0 {
		return nil, fault(http2.ErrCodeProtocol, "DATA on an idle stream")
	}
	if c.recvWindow -= int64(f.length); c.recvWindow < 0 {
		return nil, fault(http2.ErrCodeFlowControl, "more than the connection's window")
	}
	c.credit(f.length - n)
	if f.length == 0 && !end && !c.purse.spend(empties, c.clock) {
		return nil, calm(empties)
	}
	s := c.find(f.id)
	if s == nil || s.stopped != nil || s.finished {
		how := c.howEnded(f.id)
		if s != nil {
			how = s.how
		}
		if s != nil && s.finished {
			how = byUs // the answer is whole, its RST_STREAM is on the way
		}
		if how == byUs || how == neverBegan {
			if !c.purse.spend(closed, c.clock) {
				return nil, calm(closed)
			}
			return nil, nil //nolint:nilnil // for nobody
		}
		return nil, c.breach(nil, f.id, http2.ErrCodeStreamClosed)
	}
	if s.clientEnded {
		return nil, c.breach(s, f.id, http2.ErrCodeStreamClosed)
	}
	if s.recvWindow -= int64(f.length); s.recvWindow < 0 {
		return nil, c.breach(s, f.id, http2.ErrCodeFlowControl)
	}
	s.unacked += int64(f.length - n)
	if s.request.HasLength && !s.request.Extended {
		total := s.received + int64(n)
		if total > s.request.Length || end && total != s.request.Length {
			return nil, c.breach(s, f.id, http2.ErrCodeProtocol)
		}
	}
	return s, nil
}

// endBody takes the end of a body. The caller holds mu.
func (c *conn) endBody(s *stream) error {
	if s.request.HasLength && s.received != s.request.Length {
		return c.breach(s, s.id, http2.ErrCodeProtocol)
	}
	s.clientEnded = true
	s.readable.Signal()
	if s.held { // all of it is here
		s.held = false
		c.unhold(s)
		c.start(s)
	}
	return nil
}

func (c *conn) unhold(s *stream) {
	if i := slices.Index(c.held, s); i >= 0 {
		c.held = slices.Delete(c.held, i, i+1)
	}
}

// credit gives n bytes back to the connection's window. The caller holds mu, and
// has the connection kicked sooner or later.
func (c *conn) credit(n int) {
	if c.unacked += int64(n); c.unacked < ConnWindow/4 {
		return
	}
	c.appendWindow(0, c.unacked)
	c.recvWindow += c.unacked
	c.unacked = 0
}

// find returns the stream of that id that has not ended, or whose handler has
// not. The caller holds mu.
func (c *conn) find(id uint32) *stream {
	for _, s := range slices.Backward(c.open) {
		if s.id == id {
			return s
		}
	}
	return nil
}

func (c *conn) remember(id uint32, how ending) {
	c.ended[c.nextEnded].id, c.ended[c.nextEnded].how = id, how
	c.nextEnded = (c.nextEnded + 1) % remembered
}

func (c *conn) howEnded(id uint32) ending {
	for i := range c.ended {
		if c.ended[i].id == id {
			return c.ended[i].how
		}
	}
	return unknown
}

// gone ends what goes on between a stream and its client, and tells the handler.
// The caller holds mu, which is given up meanwhile.
func (c *conn) gone(s *stream, why error) {
	s.stop(why)
	if !s.working {
		c.unhold(s)
		c.remove(s, s.how)
		return
	}
	if tell := s.teller(); tell != nil {
		c.mu.Unlock()
		tell()
		c.mu.Lock()
	}
}

// remove takes a stream whose handler has ended, or never began, out. The caller
// holds mu; s is no more.
func (c *conn) remove(s *stream, how ending) {
	for i, o := range c.open {
		if o == s {
			last := len(c.open) - 1
			c.open[i] = c.open[last]
			c.open[last] = nil
			c.open = c.open[:last]
			break
		}
	}
	c.remember(s.id, how)
	if s.lasts {
		c.lasting--
	}
	if s.counted {
		c.answered--
	}
	if s.body.n > 0 {
		c.credit(s.body.n)
	}
	s.release()
	if len(c.open) == 0 {
		c.becomeIdle(c.now())
		c.written.Broadcast()
	}
}
