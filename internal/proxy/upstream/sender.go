package upstream

import (
	"io"
	"sync"
	"sync/atomic"
	"time"

	"tako/internal/proxy/h1"
)

// sender writes a body that has not come yet, beside the reading of the answer.
// The nil one has nothing to send: its methods say what is then so.
type sender struct {
	l *link
	r *Outgoing

	done     chan struct{}
	goOn     chan bool    // with Expect: send the body or not; else nil
	claim    atomic.Int32 // who came first: claimedToSend or claimedToStop
	complete atomic.Bool  // the body was read to its end
	sent     bool         // and written; after done
	err      atomic.Pointer[BodyError]

	mu      sync.Mutex // orders the setting of the read deadline
	hasHead bool       // guarded by mu
}

const (
	claimedToSend = 1 // something of the body was, or will be, read
	claimedToStop = 2 // nothing will
)

func newSender(l *link, r *Outgoing) *sender {
	s := &sender{l: l, r: r, done: make(chan struct{})}
	if r.Expect {
		s.goOn = make(chan bool, 2)
	}
	// The time for the first byte begins after the body.
	l.unlimited()
	return s
}

// letGo ends the waiting for a 100.
func (s *sender) letGo(send bool) {
	if s != nil && s.goOn != nil {
		select {
		case s.goOn <- send:
		default:
		}
	}
}

// headCame is told that the answer's head is there, and reports whether the body
// was not read to its end by then.
func (s *sender) headCame() (unsent bool) {
	if s == nil {
		return false
	}
	s.letGo(false)
	s.mu.Lock()
	s.hasHead = true
	s.mu.Unlock()
	return !s.complete.Load()
}

// failure returns what was wrong with the body, nil if nothing was.
func (s *sender) failure() *BodyError {
	if s == nil {
		return nil
	}
	return s.err.Load()
}

// touched: something of the body was, or will be, read.
func (s *sender) touched() bool { return s != nil && s.claim.Load() == claimedToSend }

// settled reports whether the request went out whole. It waits a moment for what
// is being written.
func (s *sender) settled() bool {
	if s == nil {
		return true
	}
	if s.complete.Load() {
		timer := time.NewTimer(settleTime)
		defer timer.Stop()
		select {
		case <-s.done:
		case <-timer.C:
		}
	}
	select {
	case <-s.done:
		return s.sent
	default:
		return false
	}
}

// join waits for the end of the sending; the body is not to be read any more.
func (s *sender) join() {
	if s == nil {
		return
	}
	select {
	case <-s.done:
		return
	default:
	}
	stopped := s.claim.CompareAndSwap(0, claimedToStop)
	s.letGo(false)
	if !stopped && !s.complete.Load() {
		s.r.Body.StopBody()
	}
	<-s.done
}

// chunkRoom is the room before a piece for the line of its chunk: eight digits
// and CRLF.
const chunkRoom = 10

// run writes the body as it arrives.
func (s *sender) run() {
	defer close(s.done)
	if s.goOn != nil {
		timer := time.NewTimer(ContinueTime)
		defer timer.Stop()
		select {
		case send := <-s.goOn:
			if !send {
				return
			}
		case <-timer.C:
		}
	}
	if !s.claim.CompareAndSwap(0, claimedToSend) {
		return
	}
	buf := h1.Get(h1.HeadBuffer)
	defer h1.Put(buf)
	room := buf.B[chunkRoom : len(buf.B)-len("\r\n")]
	left, chunked := s.r.Length, s.r.Length < 0
	var armed time.Time
	for {
		n, err := s.r.Body.ReadBody(room)
		last := err == io.EOF //nolint:errorlint // the body returns it bare
		if err != nil && !last {
			s.spoil(&BodyError{Err: err})
			return
		}
		if !chunked {
			if left -= int64(n); left < 0 || last && left > 0 {
				s.spoil(s.r.errLength())
				return
			}
			last = left == 0
		}
		if last {
			s.complete.Store(true)
		}
		if now := time.Now(); now.Sub(armed) > deadlineSlack {
			_ = s.l.SetWriteDeadline(now.Add(WriteTime + deadlineSlack))
			armed = now
		}
		if n > 0 {
			if _, err := s.l.Write(piece(buf.B, n, chunked)); err != nil {
				s.answerWithin(lastTime) // which says why, perhaps
				return
			}
		}
		if !last {
			continue
		}
		if chunked {
			end, err := appendEnd(nil, s.r.Body.Trailer())
			if err != nil {
				s.spoil(&BodyError{Err: err})
				return
			}
			if _, err := s.l.Write(end); err != nil {
				s.answerWithin(lastTime)
				return
			}
		}
		s.sent = true
		s.answerWithin(FirstByteTime)
		return
	}
}

// answerWithin bounds the wait for the head of the answer from now on.
func (s *sender) answerWithin(d time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.hasHead {
		_ = s.l.SetReadDeadline(time.Now().Add(d))
	}
}

// spoil ends the exchange: the instance must not take what it got for the whole.
func (s *sender) spoil(err *BodyError) {
	s.err.Store(err)
	_ = s.l.Close()
}

// piece puts the framing around the n bytes at b[chunkRoom:].
func piece(b []byte, n int, chunked bool) []byte {
	if !chunked {
		return b[chunkRoom : chunkRoom+n]
	}
	var line [chunkRoom]byte
	head := h1.AppendChunkHeader(line[:0], n)
	start := chunkRoom - len(head)
	copy(b[start:], head)
	end := chunkRoom + n
	end += copy(b[end:], "\r\n")
	return b[start:end]
}
