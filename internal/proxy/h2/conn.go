package h2

import (
	"encoding/binary"
	"errors"
	"io"
	"net"
	"sync"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	"tako/internal/proxy/message"
)

// The windows of the receiving side, in bytes (RFC 9113, 5.2).
const (
	// ConnWindow bounds what all bodies of a connection may have sent that nobody
	// has read.
	ConnWindow = 1 << 20
	// FirstWindow bounds that of one body nobody has begun to read. It is the
	// protocol's own.
	FirstWindow = 65535
	// StreamWindow bounds that of one body that is being read.
	StreamWindow = 256 << 10
)

// frameSize bounds the payload of frames in both directions. It is the least
// that the protocol allows for a limit.
const frameSize = 16 << 10

const headerSize = 9 // of a frame

// drainWait is how long a client has to answer the PING after its first GOAWAY.
const drainWait = time.Second

// What ends exchanges before their time.
var (
	errClosed      = errors.New("the server was closed")
	errGone        = errors.New("the client has gone")
	errReset       = errors.New("the client took its request back")
	errMalformed   = errors.New("the client broke the protocol")
	errInterrupted = errors.New("the exchange was interrupted")
)

// protocolError ends a connection with a GOAWAY.
type protocolError struct {
	code   http2.ErrCode
	reason string
}

func (e *protocolError) Error() string { return e.reason + " (" + e.code.String() + ")" }

func fault(code http2.ErrCode, reason string) error { return &protocolError{code, reason} }

// How a stream ended.
type ending uint8

const (
	unknown     ending = iota
	byBoth             // with END_STREAM both ways
	byClient           // with the client's RST_STREAM
	byUs               // with ours: what is on its way still comes, and is thrown away
	neverBegan         // it came after the last stream of a GOAWAY
	remembered  = 64   // the streams of which that is known
	noDeadline  = time.Duration(0)
	maxWindow   = 1<<31 - 1
	maxStreamID = 1<<31 - 1
)

// conn is one connection. One goroutine reads, in serve; whoever has something
// to send appends it to out, and a worker writes for all.
type conn struct {
	srv    *Server
	nc     net.Conn
	client *message.Client
	limits message.Limits
	began  time.Time

	// Of the reader.
	buf       []byte // small, or big
	r, w      int    // what was read and not used
	big       *readBuffer
	small     [1024]byte
	dec       *hpack.Decoder
	h         *head // takes the fields of the block that is being read, nil for none
	blockID   uint32
	blockSize int
	decoded   int
	inBlock   bool
	blockEnds bool // END_STREAM
	fragments int
	settled   bool // the first SETTINGS came
	clock     func() time.Duration
	trailer   *stream // whose trailer the block is
	unwanted  *stream // made for the block and not in open yet

	mu sync.Mutex // guards all below, and the streams

	purse    purse
	open     []*stream
	held     []*stream // of them, those that wait for the end of what was read, to be answered
	lasting  int       // of them, those that last
	answered int       // of them, those that count no more against the limit
	last     uint32    // the highest id that came
	acted    uint32    // the highest id that was not refused for a GOAWAY
	ended    [remembered]struct {
		id  uint32
		how ending
	}
	nextEnded int

	ready    bool // the preface came
	bringing bool // a head is on its way
	dead     bool // nothing can be sent or read any more
	why      error
	leaving  bool // GOAWAY was sent with the last stream's id; nothing new is taken
	parting  bool // nothing will be sent any more but what is in out
	parted   bool // and that was sent
	draining bool // the first GOAWAY was sent
	clientGo bool // the client sent a GOAWAY

	out      *frames
	outGen   uint64 // counts the buffers that out was
	control  int    // the bytes in out that answer control frames
	writing  bool
	written  sync.Cond // writing has become false, or a stream has left open
	roomy    sync.Cond // out has room
	reserved int       // of out, for streams that were told to go on
	waiters  []*stream // for room or the connection's window, the first is next
	enc      encoder
	scratch  []byte

	sendWindow  int64
	firstWindow int64 // of each stream that the client opens
	recvWindow  int64 // what the client may still send
	unacked     int64 // what was read of it

	timer     *time.Timer
	armed     time.Duration
	headSince time.Duration // a head, or the preface, is on its way since then
	idleSince time.Duration
	heard     time.Duration // when something came last
	pinged    time.Duration // when we asked whether the client lives
	drainedAt time.Duration
	writeFrom time.Duration // when the write that goes on began
	partedAt  time.Duration
	faultAt   time.Duration // when the client broke the protocol
}

func newConn(s *Server, nc net.Conn, client *message.Client) *conn {
	c := &conn{
		srv: s, nc: nc, client: client, limits: s.limits(), began: time.Now(),
		sendWindow: FirstWindow, firstWindow: FirstWindow, recvWindow: ConnWindow,
	}
	c.clock = c.now
	c.buf = c.small[:]
	c.dec = hpack.NewDecoder(tableSize, c.emit)
	c.dec.SetMaxStringLength(MaxBlock)
	c.enc.init()
	c.written.L, c.roomy.L = &c.mu, &c.mu
	c.headSince = 1
	c.mu.Lock()
	c.timer = time.AfterFunc(c.limits.Head, c.tick)
	c.armed = c.limits.Head
	c.appendSettings()
	c.mu.Unlock()
	return c
}

// now is the time since the connection began, never noDeadline.
func (c *conn) now() time.Duration { return time.Since(c.began) + 1 }

// serve reads until the connection ends, and waits for the handlers.
func (c *conn) serve() {
	err := c.read()
	if e, ok := errors.AsType[*protocolError](err); ok {
		c.mu.Lock()
		c.part(e)
		c.mu.Unlock()
		c.linger()
	}
	c.mu.Lock()
	c.die(errGone)
	c.timer.Stop()
	c.held = nil
	var tells []func()
	for _, s := range c.open {
		if tell := s.teller(); tell != nil {
			tells = append(tells, tell)
		}
	}
	c.mu.Unlock()
	for _, tell := range tells {
		tell()
	}
	c.mu.Lock()
	for i := 0; i < len(c.open); {
		if s := c.open[i]; !s.working {
			c.remove(s, byClient)
			continue
		}
		i++
	}
	for len(c.open) > 0 || c.writing {
		c.written.Wait()
	}
	c.mu.Unlock()
	if c.h != nil {
		c.dropBlock()
	}
	c.releaseBig()
	if c.srv.Log != nil && !errors.Is(err, io.EOF) && !errors.Is(err, net.ErrClosed) {
		c.srv.Log.Debug("connection ended", "client", c.client.Addr, "err", err)
	}
}

// die ends the connection at once. The caller holds mu.
func (c *conn) die(why error) {
	if c.dead {
		return
	}
	c.dead, c.why = true, why
	_ = inner(c.nc).Close() // TLS would wait until its farewell is written
	for _, s := range c.open {
		s.stop(errGone)
	}
	c.waiters = nil
	if c.out != nil && !c.writing {
		c.out.free()
		c.out = nil
	}
	c.written.Broadcast()
	c.roomy.Broadcast()
}

// part sends a GOAWAY, ends all streams, and has the connection closed once that
// is written. The caller holds mu.
func (c *conn) part(e *protocolError) {
	if c.dead || c.parting {
		return
	}
	for _, s := range c.open {
		s.stop(errMalformed)
	}
	c.appendGoAway(c.acted, e.code)
	c.leaving = true
	c.faultAt = c.now()
	c.arm(c.faultAt + c.limits.Linger)
	c.endSending()
}

// leave takes no new stream from now on, and ends the connection after the last
// one. The caller holds mu.
func (c *conn) leave() {
	if c.leaving || c.dead {
		return
	}
	c.leaving, c.draining = true, true
	c.drainedAt = noDeadline
	c.appendGoAway(c.acted, http2.ErrCodeNo)
	if len(c.open) == 0 {
		c.endSending()
	}
	c.kick()
}

// endSending has the sending half closed after what is in out. The caller holds mu.
func (c *conn) endSending() {
	if c.parting || c.dead {
		return
	}
	c.parting = true
	c.kick()
	if !c.writing { // out was empty
		c.closeSending()
	}
}

// closeSending says that nothing more comes, and gives the client a moment to
// read what there is. The caller holds mu.
func (c *conn) closeSending() {
	if c.parted || c.dead {
		return
	}
	c.parted = true
	c.partedAt = c.now()
	c.arm(c.partedAt + c.limits.Linger)
	c.mu.Unlock()
	if t, ok := c.nc.(interface{ CloseWrite() error }); ok {
		_ = t.CloseWrite() // of TLS: its alert
	}
	if t, ok := inner(c.nc).(interface{ CloseWrite() error }); ok {
		_ = t.CloseWrite()
	}
	c.mu.Lock()
}

// linger reads what comes, and throws it away, until the client or the time ends
// it: a close with unread bytes would take away what was sent last.
func (c *conn) linger() {
	for left := c.limits.DrainBytes; left > 0; {
		n, err := c.nc.Read(c.buf)
		if err != nil {
			return
		}
		left -= int64(n)
	}
	// Whoever sends that much reads no GOAWAY.
}

// drain sends the first GOAWAY.
func (c *conn) drain() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.draining || c.dead {
		return
	}
	c.draining = true
	c.appendGoAway(maxStreamID, http2.ErrCodeNo)
	c.frame(len(drainPing), http2.FramePing, 0, 0)
	c.out.b = append(c.out.b, drainPing...)
	c.drainedAt = c.now()
	c.arm(c.drainedAt + drainWait)
	if c.ready {
		c.kick()
	}
}

// The payloads of our PINGs.
const (
	drainPing = "tkdrain\x00"
	alivePing = "tkalive\x00"
)

// fill reads more, so that at least need bytes from r on are there.
func (c *conn) fill(need int) error {
	for c.w-c.r < need {
		if err := c.fillOnce(need); err != nil {
			return err
		}
	}
	return nil
}

func (c *conn) fillOnce(need int) error {
	switch {
	case c.r == c.w:
		full := c.w == len(c.buf)
		c.r, c.w = 0, 0
		if need > len(c.small) || full {
			c.takeBig()
		}
	case c.r+need > len(c.buf) || c.w == len(c.buf):
		if need > len(c.small) {
			c.takeBig()
		}
		c.w = copy(c.buf, c.buf[c.r:c.w])
		c.r = 0
	}
	if c.beforeRead(c.w > c.r) && c.w == 0 {
		c.releaseBig()
	}
	n, err := c.nc.Read(c.buf[c.w:])
	c.w += n
	if n > 0 {
		return nil
	}
	if err == nil {
		err = io.ErrNoProgress
	}
	return err
}

// takeBig makes buf the large one.
func (c *conn) takeBig() {
	if c.big != nil {
		return
	}
	c.big = readBuffers.Get().(*readBuffer)
	c.w = copy(c.big[:], c.buf[c.r:c.w])
	c.r = 0
	c.buf = c.big[:]
}

// releaseBig makes buf, which has nothing in it, the small one.
func (c *conn) releaseBig() {
	if c.big == nil {
		return
	}
	poison(c.big[:])
	readBuffers.Put(c.big)
	c.big, c.buf, c.r, c.w = nil, c.small[:], 0, 0
}

// beforeRead does what is left to do before the reader waits: it lets the
// requests begin whose bodies may have come by now, has written what is to be
// written, and looks at the time. It reports whether the connection is idle.
func (c *conn) beforeRead(partial bool) (idle bool) {
	c.mu.Lock()
	now := c.now()
	c.heard, c.pinged = now, noDeadline
	for _, s := range c.held {
		if s.held = false; s.stopped == nil {
			c.start(s)
		}
	}
	clear(c.held)
	c.held = c.held[:0]
	c.bringing = partial || c.inBlock
	switch {
	case !c.bringing:
		c.headSince = noDeadline
	case c.headSince == noDeadline:
		c.headSince = now
		c.arm(now + c.limits.Head)
	}
	if c.ready {
		c.kick()
	} else {
		c.headSince = 1
	}
	if len(c.open) == 0 && c.idleSince == noDeadline && c.ready {
		c.becomeIdle(now)
	}
	c.arm(now + c.limits.Keep)
	idle = len(c.open) == 0
	c.mu.Unlock()
	return idle
}

func (c *conn) becomeIdle(now time.Duration) {
	c.idleSince = now
	if (c.leaving || c.clientGo) && !c.parting {
		if !c.leaving {
			c.leave()
		} else {
			c.endSending()
		}
	}
}

// read is the reader.
func (c *conn) read() error {
	if err := c.fill(len(http2.ClientPreface)); err != nil {
		return err
	}
	if string(c.buf[:len(http2.ClientPreface)]) != http2.ClientPreface {
		return fault(http2.ErrCodeProtocol, "no preface")
	}
	c.r += len(http2.ClientPreface)
	c.mu.Lock()
	c.ready = true
	c.mu.Unlock()
	for {
		if err := c.fill(headerSize); err != nil {
			return err
		}
		b := c.buf[c.r:]
		f := frameHeader{
			length: int(b[0])<<16 | int(b[1])<<8 | int(b[2]), kind: http2.FrameType(b[3]), flags: http2.Flags(b[4]),
			id: binary.BigEndian.Uint32(b[5:]) & maxStreamID,
		}
		if f.length > frameSize {
			return fault(http2.ErrCodeFrameSize, "a frame larger than allowed")
		}
		switch {
		case c.inBlock && (f.kind != http2.FrameContinuation || f.id != c.blockID):
			return fault(http2.ErrCodeProtocol, "a frame within a block of fields")
		case !c.settled && f.kind != http2.FrameSettings:
			return fault(http2.ErrCodeProtocol, "no SETTINGS at the beginning")
		}
		if f.kind == http2.FrameData {
			c.r += headerSize
			if err := c.data(f); err != nil {
				return err
			}
			continue
		}
		if err := c.fill(headerSize + f.length); err != nil {
			return err
		}
		p := c.buf[c.r+headerSize : c.r+headerSize+f.length]
		c.r += headerSize + f.length
		if err := c.take(f, p); err != nil {
			return err
		}
	}
}

type frameHeader struct {
	length int
	kind   http2.FrameType
	flags  http2.Flags
	id     uint32
}

func (f frameHeader) has(flag http2.Flags) bool { return f.flags&flag != 0 }
