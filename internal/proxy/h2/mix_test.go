package h2

import (
	"math/rand/v2"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/net/http2"

	"tako/internal/proxy/message"
)

// gossip is a watcher that interrupts its exchange, as a handler's would.
type gossip struct{ x message.Exchange }

func (g gossip) ClientGone() { g.x.Interrupt() }

// whims is a handler that does anything it may.
func whims(x message.Exchange) {
	random := rand.New(rand.NewPCG(rand.Uint64(), 1)) //nolint:gosec // a test
	for range random.IntN(20) {
		runtime.Gosched()
	}
	if random.IntN(2) == 0 {
		x.Watch(gossip{x})
		defer x.Watch(nil)
	}
	if random.IntN(8) == 0 {
		x.Lasts()
	}
	if x.Request().Extended {
		echo(x)
		return
	}
	var body sync.WaitGroup
	defer body.Wait()
	defer x.StopBody()
	switch random.IntN(4) {
	case 0:
		x.Buffered()
	case 1:
		b := make([]byte, 1+random.IntN(5000))
		body.Go(func() {
			for {
				if _, err := x.ReadBody(b); err != nil {
					x.Trailer()
					return
				}
			}
		})
	case 2:
		b := make([]byte, 100)
		for range random.IntN(5) {
			if _, err := x.ReadBody(b); err != nil {
				break
			}
		}
	}
	if random.IntN(5) == 0 {
		_ = x.Inform(103, nil)
	}
	if random.IntN(20) == 0 {
		return
	}
	r := message.Response{Status: 200 + random.IntN(5), Length: message.Unknown, Fields: x.Request().Fields}
	if random.IntN(2) == 0 {
		r.Length, r.HasLength = int64(random.IntN(3000)), true
	}
	if x.Begin(&r) != nil {
		return
	}
	left := random.IntN(100000)
	if r.HasLength {
		left = int(r.Length)
	}
	for left > 0 {
		n := min(left, 1+random.IntN(40000))
		if _, err := x.Write(make([]byte, n)); err != nil {
			return
		}
		if random.IntN(3) == 0 && x.Flush() != nil {
			return
		}
		left -= n
	}
	switch random.IntN(10) {
	case 0:
	case 1:
		x.Abort()
	case 2:
		_ = x.End([]message.Field{field("X-Sum", "1")})
	default:
		_ = x.End(nil)
	}
}

// TestAnythingAtAnyTime has clients and handlers do whatever the protocol allows
// them, and some of what it does not, in any order: nothing breaks or hangs, and
// what a connection lends is given back.
func TestAnythingAtAnyTime(t *testing.T) {
	connections, steps := 12, 400
	if testing.Short() {
		connections = 4
	}
	var all sync.WaitGroup
	for seed := range connections {
		p := serve(t, whims, http2.Setting{ID: http2.SettingInitialWindowSize, Val: 20000})
		all.Go(func() {
			defer unfork()
			random := rand.New(rand.NewPCG(uint64(seed), 2)) //nolint:gosec // a test
			go func() {                                      // reads, and gives windows
				defer unfork()
				q := p.fork()
				for e := range p.events {
					if n := len(e.payload); e.kind == http2.FrameData && n > 0 {
						q.do(q.fr.WriteWindowUpdate(0, uint32(n))) //nolint:gosec // a frame
					}
				}
			}()
			p := p.fork()
			next := uint32(1)
			some := func() uint32 { return 1 + 2*uint32(random.IntN(20)) } // of the last ones
			for range steps {
				id := next
				if k := some(); k < next {
					id = next - k - 1
				}
				if id%2 == 0 {
					id++
				}
				switch random.IntN(14) {
				case 0, 1, 2:
					p.ask(next, random.IntN(2) == 0, base("GET", "/", "x", "y")...)
					next += 2
				case 3:
					p.ask(next, false, base("POST", "/", "content-length", "3000")...)
					for range random.IntN(4) {
						p.data(next, random.IntN(8) == 0, strings.Repeat("a", 1000))
					}
					next += 2
				case 4:
					block := p.encode(base("POST", "/", "cookie", "a", "cookie", "b")...)
					cut := random.IntN(len(block))
					p.frame(http2.FrameHeaders, 0, next, block[:cut]...)
					if random.IntN(2) == 0 {
						time.Sleep(time.Microsecond)
					}
					p.frame(http2.FrameContinuation, http2.FlagContinuationEndHeaders, next, block[cut:]...)
					next += 2
				case 5:
					p.ask(next, false, connect...)
					p.data(next, random.IntN(2) == 0, "hello")
					next += 2
				case 6, 7:
					if id < next {
						p.data(id, random.IntN(3) == 0, strings.Repeat("b", random.IntN(2000)))
					}
				case 8:
					if id < next {
						p.do(p.fr.WriteRSTStream(id, http2.ErrCodeCancel))
					}
				case 9:
					if id < next {
						p.do(p.fr.WriteWindowUpdate(id, uint32(1+random.IntN(100000)))) //nolint:gosec // positive
					}
				case 10:
					p.do(p.fr.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: uint32(random.IntN(50000))})) //nolint:gosec // positive
				case 11:
					p.do(p.fr.WritePriority(id, http2.PriorityParam{Weight: 1}))
				case 12:
					p.do(p.fr.WritePing(false, [8]byte{}))
				case 13:
					time.Sleep(time.Duration(random.IntN(50)) * time.Microsecond)
				}
			}
			// Take all back that still waits.
			for id := uint32(1); id < next; id += 2 {
				p.do(p.fr.WriteRSTStream(id, http2.ErrCodeCancel))
			}
		})
		t.Cleanup(func() {
			if len(p.srv.all()) > 0 && !t.Failed() { // the budgets may have ended it
				p.wantSettled()
			}
		})
	}
	all.Wait()
}
