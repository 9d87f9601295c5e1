package h2

import (
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/net/http2"

	"tako/internal/proxy/message"
)

// TestFloodsEndTheConnection spends each budget: as much as is allowed goes, and
// not much more.
func TestFloodsEndTheConnection(t *testing.T) {
	hold := func(x message.Exchange) { // until its client goes
		w := make(watcher)
		x.Watch(w)
		<-w
	}
	for name, c := range map[string]struct {
		burst   int
		handler func(x message.Exchange)
		begin   func(p *peer)
		send    func(p *peer, i uint32)
	}{
		"rapid reset": {burst: ResetBurst, handler: hold, send: func(p *peer, i uint32) {
			p.get(2*i + 1)
			p.do(p.fr.WriteRSTStream(2*i+1, http2.ErrCodeCancel))
		}},
		"made us reset": {burst: ResetBurst, handler: hold, send: func(p *peer, i uint32) {
			p.get(2*i + 1)
			p.do(p.fr.WriteWindowUpdate(2*i+1, 0))
		}},
		"malformed heads": {burst: ResetBurst, handler: hold, send: func(p *peer, i uint32) { p.ask(2*i+1, true, "x", "y") }},
		"refused heads":   {burst: ResetBurst, handler: hold, send: func(p *peer, i uint32) { p.ask(2*i+1, true, ":method", "CONNECT", ":authority", "a:1") }},
		"settings":        {burst: SettingsBurst - 1, handler: ok, send: func(p *peer, _ uint32) { p.do(p.fr.WriteSettings()) }},
		"settings acks":   {burst: SettingsBurst - 1, handler: ok, send: func(p *peer, _ uint32) { p.do(p.fr.WriteSettingsAck()) }},
		"ping":            {burst: PingBurst, handler: ok, send: func(p *peer, _ uint32) { p.do(p.fr.WritePing(false, [8]byte{})) }},
		"ping acks":       {burst: PingBurst, handler: ok, send: func(p *peer, _ uint32) { p.do(p.fr.WritePing(true, [8]byte{})) }},
		"goaway":          {burst: PingBurst, handler: hold, begin: func(p *peer) { p.get(1) }, send: func(p *peer, _ uint32) { p.do(p.fr.WriteGoAway(0, 0, nil)) }},
		"priority": {burst: PriorityBurst, handler: ok, send: func(p *peer, i uint32) {
			p.do(p.fr.WritePriority(2*i+1, http2.PriorityParam{Weight: 7}))
		}},
		"unknown frames": {burst: PriorityBurst, handler: ok, send: func(p *peer, _ uint32) { p.frame(0xbe, 0, 0) }},
		"empty data": {
			burst: EmptyBurst, handler: hold, begin: func(p *peer) { p.ask(1, false, base("POST", "/")...) },
			send: func(p *peer, _ uint32) { p.data(1, false, "") },
		},
		"windows": {burst: WindowBurst, handler: ok, send: func(p *peer, _ uint32) { p.do(p.fr.WriteWindowUpdate(0, 1)) }},
		"windows of a stream": {
			burst: WindowBurst, handler: hold, begin: func(p *peer) { p.get(1) },
			send: func(p *peer, _ uint32) { p.do(p.fr.WriteWindowUpdate(1, 1)) },
		},
		"windows of next to nothing": {
			burst: WindowBurst / 2, handler: func(x message.Exchange) { respond(x, strings.Repeat("a", 1<<20)) },
			begin: func(p *peer) {
				p.do(p.fr.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: 0}))
				p.get(1)
				p.await(http2.FrameHeaders, 1)
			},
			send: func(p *peer, _ uint32) {
				p.do(p.fr.WriteWindowUpdate(0, 1))
				p.do(p.fr.WriteWindowUpdate(1, 1))
			},
		},
		"data after a reset of ours": {
			burst: ClosedBurst, handler: func(x message.Exchange) { respond(x, "no") },
			begin: func(p *peer) {
				p.ask(1, false, base("POST", "/")...)
				p.await(http2.FrameRSTStream, 1, http2.FrameHeaders, http2.FrameData)
			},
			send: func(p *peer, _ uint32) { p.data(1, false, "x") },
		},
		"resets of what has ended": {
			burst: ClosedBurst, handler: ok, begin: func(p *peer) { p.wantOK(1) },
			send: func(p *peer, _ uint32) { p.do(p.fr.WriteRSTStream(1, http2.ErrCodeCancel)) },
		},
		"trailers after a reset of ours": {
			burst: ClosedBurst, handler: func(x message.Exchange) { respond(x, "no") },
			begin: func(p *peer) {
				p.ask(1, false, base("POST", "/")...)
				p.await(http2.FrameRSTStream, 1, http2.FrameHeaders, http2.FrameData)
			},
			send: func(p *peer, _ uint32) { p.ask(1, true, "x", "y") },
		},
	} {
		t.Run(name, func(t *testing.T) {
			p := serve(t, c.handler)
			if c.begin != nil {
				c.begin(p)
			}
			i := uint32(0)
			for ; int(i) < c.burst-2; i++ {
				c.send(p, i)
			}
			// It still answers.
			p.do(p.fr.WriteSettings())
			for ended := false; !ended; {
				e, ok := p.next()
				if !ok || e.kind == http2.FrameGoAway && e.code() != http2.ErrCodeNo {
					t.Fatalf("the connection ended within the budget of %d, at %d", c.burst, i)
				}
				ended = e.kind == http2.FrameSettings
			}
			done := make(chan struct{})
			go func() { // for as long as it lasts: time gives some more
				defer close(done)
				defer unfork()
				p := p.fork()
				for i := i; i < 100000; i++ {
					c.send(p, i)
				}
			}()
			p.wantGoAway(http2.ErrCodeEnhanceYourCalm)
			<-done
		})
	}
}

func TestSettingsOfOneFrameAreBounded(t *testing.T) {
	p := serve(t, ok)
	one := make([]http2.Setting, MaxSettings)
	for i := range one {
		one[i] = http2.Setting{ID: http2.SettingInitialWindowSize, Val: uint32(i)} //nolint:gosec // small
	}
	p.do(p.fr.WriteSettings(one...))
	p.await(http2.FrameSettings, 0)
	p.do(p.fr.WriteSettings(append(one, one[0])...))
	p.wantGoAway(http2.ErrCodeEnhanceYourCalm)
}

func TestBudgetIsSpentToTheLast(t *testing.T) {
	var now time.Duration
	for f := range floods {
		var p purse
		spend := func(n int32) {
			t.Helper()
			for i := range n {
				if !p.spend(f, func() time.Duration { return now }) {
					t.Errorf("%s: there were %d, not %d", budgets[f].name, i, n)
					return
				}
			}
			if p.spend(f, func() time.Duration { return now }) {
				t.Errorf("%s: there were more than %d", budgets[f].name, n)
			}
		}
		now = 0
		spend(budgets[f].burst)
		now += time.Second
		spend(budgets[f].rate)
		now += time.Hour
		spend(budgets[f].burst)
	}
}

func TestBudgetsFillUpAgain(t *testing.T) {
	inTime(t, func(t *testing.T) {
		p := serve(t, ok)
		for i := range uint32(100) {
			p.wantOK(2*i + 1)
			for range PingBurst / 2 {
				p.do(p.fr.WritePing(false, [8]byte{}))
				p.await(http2.FramePing, 0)
			}
			wait(PingBurst / 2 / PingRate)
		}
		for i := range uint32(100) {
			for range WindowBurst / 200 {
				p.do(p.fr.WriteWindowUpdate(0, 1))
			}
			p.wantOK(2*i + 201)
			wait(1)
		}
	})
}

func TestReadingMuchAllowsManyWindowUpdates(t *testing.T) {
	const n = 4 << 20
	body := strings.Repeat("a", n)
	p := serve(t, func(x message.Exchange) { respond(x, body) })
	p.get(1)
	got, sent := 0, 0
	for got < n {
		e, _ := p.next()
		if e.kind != http2.FrameData {
			continue
		}
		got += len(e.payload)
		for left := len(e.payload); left > 0 && got < n; { // in pieces of 4 KiB each
			k := min(left, 4<<10)
			p.do(p.fr.WriteWindowUpdate(0, uint32(k)))
			p.do(p.fr.WriteWindowUpdate(1, uint32(k)))
			left -= k
			sent += 2
		}
	}
	if sent < WindowBurst {
		t.Errorf("only %d were sent, which is within the burst", sent)
	}
	p.do(p.fr.WritePing(false, [8]byte{}))
	p.await(http2.FramePing, 0)
}

func TestAnswersAllowMoreOfAll(t *testing.T) {
	inTime(t, func(t *testing.T) { // no time passes
		p := serve(t, func(x message.Exchange) { respond(x, "x") })
		p.auto = true
		for i := range uint32(2 * PriorityBurst) {
			id := 2*i + 1
			p.do(p.fr.WritePriority(id, http2.PriorityParam{Weight: 1}))
			p.frame(0xbe, 0, 0)
			p.get(id)
			p.hear(id)
			p.do(p.fr.WritePing(false, [8]byte{}))
			p.await(http2.FramePing, 0)
			p.do(p.fr.WriteRSTStream(id, http2.ErrCodeCancel)) // too late
			p.do(p.fr.WriteWindowUpdate(id, 1))
		}
		for i := range uint32(2 * ResetBurst) { // one of two is taken back
			id := 4*PriorityBurst + 4*i + 1
			p.get(id)
			p.hear(id)
			p.ask(id+2, false, base("POST", "/", "content-length", "0")...)
			p.do(p.fr.WriteRSTStream(id+2, http2.ErrCodeCancel))
		}
		p.wantOK(100001)
	})
}

func TestBlocksOfFieldsAreBounded(t *testing.T) {
	small := func(p *peer) []byte { return p.encode(base("GET", "/")...) }
	for name, send := range map[string]func(p *peer){
		"many CONTINUATION": func(p *peer) {
			p.frame(http2.FrameHeaders, http2.FlagHeadersEndStream, 1, small(p)...)
			for range MaxContinuations + 1 {
				p.frame(http2.FrameContinuation, 0, 1)
			}
		},
		"many bytes": func(p *peer) {
			p.frame(http2.FrameHeaders, http2.FlagHeadersEndStream, 1, small(p)...)
			for range MaxBlock/frameSize + 1 {
				p.frame(http2.FrameContinuation, 0, 1, p.encode("x", strings.Repeat("&", frameSize-500))...)
			}
		},
		"a string without end": func(p *peer) {
			p.frame(http2.FrameHeaders, http2.FlagHeadersEndStream, 1, 0x40, 1, 'x', 0x7f, 0xff, 0xff, 0x7f)
		},
		"few bytes that are many": func(p *peer) {
			// 4,000 bytes in the table, then named again and again.
			p.frame(http2.FrameHeaders, http2.FlagHeadersEndStream, 1, p.encode("x", strings.Repeat("&", 3900))...)
			bomb := make([]byte, 1000)
			for i := range bomb {
				bomb[i] = 0x80 | 62
			}
			p.frame(http2.FrameContinuation, http2.FlagContinuationEndHeaders, 1, bomb...)
		},
	} {
		t.Run(name, func(t *testing.T) {
			p := serve(t, func(message.Exchange) { t.Error("a handler was called") })
			go func() {
				defer unfork()
				send(p.fork())
			}()
			p.wantGoAway(http2.ErrCodeEnhanceYourCalm)
		})
	}
}

func TestResetsThatNobodyReadsAreBounded(t *testing.T) {
	inTime(t, func(t *testing.T) {
		p := serve(t, func(message.Exchange) { t.Error("a handler was called") })
		p.gate <- struct{}{}
		for range 2 { // the peer takes one frame at most; the next write waits
			p.do(p.fr.WritePing(false, [8]byte{}))
			synctest.Wait()
		}
		from := time.Now()
		func() {
			defer unfork()
			p := p.fork()
			for i := uint32(0); time.Since(from) < limits.Write; i++ { // as many as the budget of resets allows
				p.ask(2*i+1, true, "x", "y")
				if i >= ResetBurst-10 {
					time.Sleep(time.Second / ResetRate)
				}
			}
		}()
		most := time.Duration(MaxControl/(headerSize+8)-ResetBurst) * time.Second / ResetRate
		// How many a write that is under way has taken before is the scheduler's matter.
		if took := time.Since(from); took < most-time.Second || took > 2*most {
			t.Errorf("they went on for %v, want %v or a little more", took, most)
		}
	})
}

func TestStreamsAreLimited(t *testing.T) {
	release := make(chan struct{})
	srv := &Server{Handler: handlerFunc(func(x message.Exchange) {
		<-release
		ok(x)
	}), Limits: message.DefaultLimits()}
	srv.Limits.Streams = 10
	p := meet(t, srv)
	for i := range uint32(10) {
		p.get(2*i + 1)
	}
	p.get(21)
	p.wantReset(21, http2.ErrCodeRefusedStream)
	// One that was taken back counts until its handler has ended.
	p.do(p.fr.WriteRSTStream(1, http2.ErrCodeCancel))
	p.get(23)
	p.wantReset(23, http2.ErrCodeRefusedStream)
	// And one that we reset because of the client.
	p.do(p.fr.WriteWindowUpdate(3, 0))
	p.wantReset(3, http2.ErrCodeProtocol)
	p.get(25)
	p.wantReset(25, http2.ErrCodeRefusedStream)
	close(release)
	for i := uint32(2); i < 10; i++ {
		if a := p.hear(2*i + 1); a.status != "200" {
			t.Errorf("got %+v", a)
		}
	}
	p.wantOK(27)
}

func TestAnsweredStreamsDoNotCount(t *testing.T) {
	// The handlers stay a little after their answers.
	stay := make(chan struct{})
	srv := &Server{Handler: handlerFunc(func(x message.Exchange) {
		respond(x, "ok")
		<-stay
	}), Limits: message.DefaultLimits()}
	srv.Limits.Streams = 5
	p := meet(t, srv)
	for i := range uint32(5) {
		p.wantOK(2*i + 1)
	}
	for i := uint32(5); i < 10; i++ {
		p.wantOK(2*i + 1)
	}
	p.get(21) // twice as many: handlers that do not end are bounded too
	p.wantReset(21, http2.ErrCodeRefusedStream)
	close(stay)
}
