package h2

import (
	"context"
	"errors"
	"io"
	"os"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/net/http2"

	"tako/internal/proxy/message"
)

// wait lets seconds pass, and what is due in them happen.
func wait(seconds time.Duration) {
	time.Sleep(seconds * time.Second)
	synctest.Wait()
}

// wantEndAfter wants the connection to end after that time, by the clock of the
// test, and not before. It says whether a GOAWAY came.
func (p *peer) wantEndAfter(d time.Duration) (said bool) {
	p.t.Helper()
	from := time.Now()
	for {
		select {
		case e, ok := <-p.events:
			if ok {
				said = said || e.kind == http2.FrameGoAway
				continue
			}
		case <-time.After(time.Hour):
			p.t.Fatal("the connection never ended")
		}
		break
	}
	if took := time.Since(from); took < d || took > d+2*time.Second {
		p.t.Errorf("the connection ended after %v, want %v", took, d)
	}
	return said
}

var limits = message.DefaultLimits()

func TestPrefaceHasItsTime(t *testing.T) {
	for name, first := range map[string]string{"nothing": "", "half": http2.ClientPreface[:10]} {
		inTime(t, func(t *testing.T) {
			p := quietly(t, &Server{Handler: handlerFunc(ok)})
			if first != "" {
				p.raw([]byte(first))
			}
			synctest.Wait()
			if busy, idle := p.srv.Count(); busy != 1 || idle != 0 {
				t.Errorf("%s: %d busy, %d idle", name, busy, idle)
			}
			p.wantEndAfter(limits.Head)
		})
	}
	p := quietly(t, &Server{Handler: handlerFunc(ok)})
	p.raw([]byte("GET / HTTP/1.1\r\nHost: x\r\n\r\n"))
	p.wantGoAway(http2.ErrCodeProtocol)
}

func TestHeadHasItsTime(t *testing.T) {
	for name, send := range map[string]func(p *peer, piece []byte){
		"half a frame": func(p *peer, piece []byte) { p.raw([]byte{0, 0, 50, 1, 4, 0, 0, 0, 3}); p.raw(piece[:5]) },
		"half a block": func(p *peer, piece []byte) { p.frame(http2.FrameHeaders, 0, 3, piece...) },
		"trickled": func(p *peer, piece []byte) {
			p.frame(http2.FrameHeaders, 0, 3, piece[0])
			go func() {
				p := p.fork()
				for _, b := range piece[1:] {
					time.Sleep(time.Second)
					if p.fr.WriteContinuation(3, false, []byte{b}) != nil {
						return
					}
				}
			}()
		},
	} {
		t.Run(name, func(t *testing.T) {
			inTime(t, func(t *testing.T) {
				p := serve(t, ok)
				p.wantOK(1)
				send(p, p.encode(base("GET", "/", "x", strings.Repeat("y", 30))...))
				synctest.Wait()
				if busy, idle := p.srv.Count(); busy != 1 || idle != 0 {
					t.Errorf("%d busy, %d idle", busy, idle)
				}
				p.wantEndAfter(limits.Head)
				wait(2)
			})
		})
	}
}

func TestIdleConnectionEnds(t *testing.T) {
	inTime(t, func(t *testing.T) {
		p := serve(t, ok)
		if !p.wantEndAfter(limits.Keep + limits.Linger) {
			t.Error("no GOAWAY came")
		}
	})
	inTime(t, func(t *testing.T) {
		p := serve(t, ok)
		for i := range uint32(5) {
			wait(limits.Keep/time.Second - 10)
			p.wantOK(2*i + 1)
		}
		if busy, idle := p.srv.Count(); busy != 0 || idle != 1 {
			t.Errorf("%d busy, %d idle", busy, idle)
		}
		p.wantEndAfter(limits.Keep + limits.Linger)
	})
}

func TestBodyHasItsTime(t *testing.T) {
	read := func(to chan error) func(x message.Exchange) {
		return func(x message.Exchange) {
			_, err := io.Copy(io.Discard, reader{x})
			to <- err
		}
	}
	inTime(t, func(t *testing.T) {
		got := make(chan error, 1)
		p := serve(t, read(got))
		from := time.Now()
		p.ask(1, false, base("POST", "/")...)
		p.data(1, false, strings.Repeat("a", 15000)) // fast enough on average
		if err := <-got; !errors.Is(err, os.ErrDeadlineExceeded) || time.Since(from) < limits.Body || time.Since(from) > limits.Body+time.Second {
			t.Errorf("got %v after %v", err, time.Since(from))
		}
		p.wantReset(1, http2.ErrCodeInternal)
		p.wantOKlater(3)
	})
	inTime(t, func(t *testing.T) { // a byte now and then
		got := make(chan error, 1)
		p := serve(t, read(got))
		from := time.Now()
		p.ask(1, false, base("POST", "/")...)
		go func() {
			p := p.fork()
			for p.fr.WriteData(1, false, []byte("a")) == nil && time.Since(from) < 10*time.Minute {
				time.Sleep(5 * time.Second)
			}
		}()
		if err := <-got; !errors.Is(err, os.ErrDeadlineExceeded) || time.Since(from) < limits.Body || time.Since(from) > limits.Body+time.Second {
			t.Errorf("got %v after %v", err, time.Since(from))
		}
		_ = p.nc.Close()
		wait(600)
	})
	inTime(t, func(t *testing.T) { // slow, but fast enough, and for longer than the limit
		got := make(chan error, 1)
		p := serve(t, read(got))
		p.ask(1, false, base("POST", "/")...)
		from := time.Now()
		for flag := byte(0); flag == 0; {
			if time.Since(from) > limits.Body {
				flag = 1
			}
			p.raw([]byte{0, 0x40, 0, 0, flag, 0, 0, 0, 1})
			for range frameSize / 1024 {
				p.raw(make([]byte, 1024))
				wait(1)
			}
		}
		if err := <-got; err != nil {
			t.Errorf("got %v", err)
		}
	})
	inTime(t, func(t *testing.T) { // what the handler took costs the client nothing
		got := make(chan error, 1)
		p := serve(t, func(x message.Exchange) {
			time.Sleep(10 * time.Minute)
			read(got)(x)
		})
		p.ask(1, false, base("POST", "/")...)
		go p.pong() // for long nothing else is heard of the client
		wait(599)
		go func() {
			defer unfork()
			p := p.fork()
			for range 20 { // a client that lives
				time.Sleep(5 * time.Second)
				p.data(1, false, strings.Repeat("a", 3000))
			}
			p.data(1, true, "")
		}()
		if err := <-got; err != nil {
			t.Errorf("got %v", err)
		}
	})
}

// pong answers PING until the connection ends, and skips all else.
func (p *peer) pong() {
	fr := p.fork().fr
	for e := range p.events {
		if e.kind == http2.FramePing && e.flags == 0 {
			_ = fr.WritePing(true, [8]byte(e.payload))
		}
	}
}

// wantOKlater is wantOK of a handler that reads bodies.
func (p *peer) wantOKlater(id uint32) {
	p.t.Helper()
	p.get(id)
	p.wantReset(id, http2.ErrCodeInternal) // it answers nothing
}

func TestBodyOfNoBytesIsWaitedForABit(t *testing.T) {
	inTime(t, func(t *testing.T) {
		p := serve(t, func(message.Exchange) { t.Error("a handler was called") })
		p.ask(1, false, base("POST", "/", "content-length", "0")...)
		from := time.Now()
		p.wantReset(1, http2.ErrCodeCancel)
		if took := time.Since(from); took < limits.Head || took > limits.Head+time.Second {
			t.Errorf("after %v", took)
		}
	})
}

func TestClientThatGivesNoWindowIsGivenUp(t *testing.T) {
	big := make([]byte, 1<<20)
	for name, trickle := range map[string]bool{"none": false, "a byte now and then": true} {
		t.Run(name, func(t *testing.T) {
			inTime(t, func(t *testing.T) {
				got := make(chan error, 2)
				p := serve(t, func(x message.Exchange) {
					_ = x.Begin(&message.Response{Status: 200, Length: message.Unknown})
					_, err := x.Write(big)
					got <- err
					x.Abort()
				})
				from := time.Now()
				p.get(1)
				if trickle {
					go func() {
						p := p.fork()
						for p.fr.WriteWindowUpdate(0, 1) == nil && p.fr.WriteWindowUpdate(1, 1) == nil && time.Since(from) < 10*time.Minute {
							time.Sleep(10 * time.Second)
						}
					}()
				}
				if err := <-got; !errors.Is(err, os.ErrDeadlineExceeded) {
					t.Errorf("got %v", err)
				}
				if took := time.Since(from); took < limits.Write || took > limits.Write+time.Second {
					t.Errorf("after %v", took)
				}
				if a := p.hear(1); !a.reset {
					t.Errorf("got %d bytes and no reset", len(a.body))
				}
				p.get(3) // the connection's window is gone too
				if err := <-got; !errors.Is(err, os.ErrDeadlineExceeded) {
					t.Errorf("got %v", err)
				}
				_ = p.nc.Close()
				wait(700)
			})
		})
	}
}

func TestClientThatReadsNothingIsGivenUp(t *testing.T) {
	inTime(t, func(t *testing.T) {
		got := make(chan error, 1)
		p := serve(t, func(x message.Exchange) {
			_ = x.Begin(&message.Response{Status: 200, Length: message.Unknown})
			_, err := x.Write(make([]byte, 1<<20))
			got <- err
		}, http2.Setting{ID: http2.SettingInitialWindowSize, Val: 1<<31 - 1})
		p.do(p.fr.WriteWindowUpdate(0, 1<<30))
		p.gate <- struct{}{}
		from := time.Now()
		p.get(1)
		if err := <-got; err == nil {
			t.Error("all was written to nobody")
		}
		if took := time.Since(from); took < limits.Write || took > limits.Write+time.Second {
			t.Errorf("after %v", took)
		}
		<-p.gate
		p.wantEnd()
	})
}

func TestClientThatIsNotHeardIsAsked(t *testing.T) {
	hold := func(x message.Exchange) {
		w := make(watcher)
		x.Watch(w)
		<-w
	}
	inTime(t, func(t *testing.T) {
		p := serve(t, hold)
		p.get(1)
		p.wantEndAfter(limits.Keep + limits.Head)
	})
	inTime(t, func(t *testing.T) {
		p := serve(t, hold)
		p.get(1)
		go p.pong()
		wait(3600)
		if p.fr.WritePing(false, [8]byte{}) != nil {
			t.Error("a client that answers was given up")
		}
	})
}

func TestDrainLosesNoStream(t *testing.T) {
	inTime(t, func(t *testing.T) {
		p := serve(t, func(x message.Exchange) {
			time.Sleep(5 * time.Second)
			ok(x)
		})
		p.get(1)
		synctest.Wait()
		p.srv.Drain()
		if e := p.await(http2.FrameGoAway, 0); e.last() != 1<<31-1 || e.code() != http2.ErrCodeNo {
			t.Fatalf("got %v, want one that takes all streams", e)
		}
		ping := p.await(http2.FramePing, 0)
		p.get(3) // it was on its way
		p.do(p.fr.WritePing(true, [8]byte(ping.payload)))
		if e := p.await(http2.FrameGoAway, 0); e.last() != 3 || e.code() != http2.ErrCodeNo {
			t.Fatalf("got %v, want one with the last stream", e)
		}
		p.get(5) // this one was told
		if busy, idle := p.srv.Count(); busy != 1 || idle != 0 {
			t.Errorf("%d busy, %d idle", busy, idle)
		}
		for _, id := range []uint32{1, 3} {
			if a := p.hear(id); a.status != "200" {
				t.Errorf("%d: got %+v", id, a)
			}
		}
		p.wantEndAfter(limits.Linger)
	})
}

func TestDrainWaitsASecondForAPing(t *testing.T) {
	inTime(t, func(t *testing.T) {
		p := serve(t, ok)
		from := time.Now()
		p.srv.Drain()
		p.await(http2.FrameGoAway, 0)
		p.await(http2.FramePing, 0)
		if e := p.await(http2.FrameGoAway, 0); e.last() != 0 {
			t.Errorf("got %v", e)
		}
		if took := time.Since(from); took != drainWait {
			t.Errorf("after %v", took)
		}
		p.wantEnd()
		// The next one is told at once.
		p = quietly(t, p.srv)
		p.raw([]byte(http2.ClientPreface))
		p.do(p.fr.WriteSettings())
		p.await(http2.FrameSettings, 0)
		p.await(http2.FrameGoAway, 0)
	})
}

func TestShutdownWaitsForTheLastAnswer(t *testing.T) {
	inTime(t, func(t *testing.T) {
		p := serve(t, func(x message.Exchange) {
			time.Sleep(30 * time.Second)
			ok(x)
		})
		p.get(1)
		synctest.Wait()
		from := time.Now()
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		p.srv.Shutdown(ctx)
		cancel()
		if took := time.Since(from); took != 10*time.Second {
			t.Errorf("it returned after %v, want when its time was over", took)
		}
		p.srv.Shutdown(t.Context())
		if took := time.Since(from); took < 30*time.Second || took > 31*time.Second {
			t.Errorf("it returned after %v", took)
		}
		if busy, idle := p.srv.Count(); busy+idle != 0 {
			t.Errorf("%d busy, %d idle", busy, idle)
		}
		p.srv.Shutdown(t.Context())
	})
}

func TestCloseIdleSparesRequests(t *testing.T) {
	inTime(t, func(t *testing.T) {
		srv := &Server{Handler: handlerFunc(func(x message.Exchange) {
			time.Sleep(time.Second)
			ok(x)
		})}
		idle, busy := meet(t, srv), meet(t, srv)
		busy.get(1)
		synctest.Wait()
		srv.CloseIdle()
		idle.wantGoAway(http2.ErrCodeNo)
		if a := busy.hear(1); a.status != "200" {
			t.Errorf("got %+v", a)
		}
		busy.wantOK(3)
	})
}

func TestCloseEndsAll(t *testing.T) {
	gone := make(chan struct{})
	p := serve(t, func(x message.Exchange) {
		w := make(watcher)
		x.Watch(w)
		<-w
		close(gone)
	})
	p.get(1)
	p.ask(3, false, base("POST", "/", "content-length", "0")...) // its handler has not begun
	p.do(p.fr.WritePing(false, [8]byte{}))
	p.await(http2.FramePing, 0)
	p.srv.Close()
	<-gone
	p.wantEnd()
	<-p.served
	late := quietly(t, p.srv)
	late.wantEnd()
}

func TestRequestsThatLastCountForNothing(t *testing.T) {
	inTime(t, func(t *testing.T) {
		end := make(chan struct{})
		p := serve(t, func(x message.Exchange) {
			if string(x.Request().Target) == "/lasts" {
				x.Lasts()
				x.Lasts()
			}
			<-end
			ok(x)
		})
		want := func(busy, idle int) {
			t.Helper()
			synctest.Wait()
			if b, i := p.srv.Count(); b != busy || i != idle {
				t.Errorf("%d busy, %d idle; want %d and %d", b, i, busy, idle)
			}
		}
		want(0, 1)
		p.ask(1, true, base("GET", "/lasts")...)
		want(0, 0)
		p.get(3)
		want(1, 0)
		end <- struct{}{}
		end <- struct{}{}
		want(0, 1)
	})
}

func TestWorkersEndWhenTheyAreNotNeeded(t *testing.T) {
	inTime(t, func(t *testing.T) {
		var begun int
		all := make(chan struct{})
		p := serve(t, func(x message.Exchange) {
			<-all
			ok(x)
		})
		for i := range uint32(50) {
			p.get(2*i + 1)
		}
		synctest.Wait()
		close(all)
		synctest.Wait()
		idle := func() int {
			p.srv.workers.mu.Lock()
			defer p.srv.workers.mu.Unlock()
			return len(p.srv.workers.idle)
		}
		if begun = idle(); begun < 50 {
			t.Errorf("%d workers wait, want 50", begun)
		}
		for i := range uint32(10) { // one is enough for these
			p.wantOK(2*i + 101)
			wait(workerIdle / time.Second / 2)
		}
		if n := idle(); n > 3 {
			t.Errorf("%d workers wait", n)
		}
		wait(2*workerIdle/time.Second + 1)
		if n := idle(); n != 0 {
			t.Errorf("%d workers wait", n)
		}
		p.wantOK(201)
	})
}
