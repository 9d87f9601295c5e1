package h2

import (
	"errors"
	"io"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"

	"golang.org/x/net/http2"

	"tako/internal/proxy/message"
)

// wantSilence wants no frame to come until everything waits. Only inTime.
func (p *peer) wantSilence() {
	p.t.Helper()
	synctest.Wait()
	select {
	case e := <-p.events:
		p.t.Errorf("got %v, want nothing", e)
	default:
	}
}

func TestBodiesKeepToTheClientsWindows(t *testing.T) {
	inTime(t, func(t *testing.T) {
		body := strings.Repeat("abcdefghij", 20)
		p := serve(t, func(x message.Exchange) { respond(x, body) }, http2.Setting{ID: http2.SettingInitialWindowSize, Val: 10})
		p.get(1)
		p.await(http2.FrameHeaders, 1)
		if e := p.await(http2.FrameData, 1); len(e.payload) != 10 || e.ends() {
			t.Errorf("got %v, want 10 bytes", e)
		}
		p.wantSilence()
		p.do(p.fr.WriteWindowUpdate(1, 30))
		if e := p.await(http2.FrameData, 1); len(e.payload) != 30 {
			t.Errorf("got %v, want 30 bytes", e)
		}
		p.do(p.fr.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: 0})) // 10 less: it is negative now
		p.do(p.fr.WriteWindowUpdate(1, 10))
		p.await(http2.FrameSettings, 0)
		p.wantSilence()
		p.do(p.fr.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: 1000}))
		if a := p.hear(1); len(a.body) != 160 || !a.ended {
			t.Errorf("got %d bytes more", len(a.body))
		}
	})
}

func TestBodiesShareTheConnectionsWindow(t *testing.T) {
	inTime(t, func(t *testing.T) {
		body := strings.Repeat("a", 50000)
		p := serve(t, func(x message.Exchange) { respond(x, body) }, http2.Setting{ID: http2.SettingInitialWindowSize, Val: 1 << 20})
		p.get(1)
		p.get(3)
		got := map[uint32]int{}
		take := func(n int) {
			for n > 0 {
				e, _ := p.next()
				if e.kind == http2.FrameData {
					got[e.id] += len(e.payload)
					n -= len(e.payload)
				}
			}
		}
		take(FirstWindow)
		p.wantSilence()
		p.do(p.fr.WriteWindowUpdate(0, 1))
		take(1)
		p.wantSilence()
		p.do(p.fr.WriteWindowUpdate(0, 100000))
		take(100000 - FirstWindow - 1)
		if got[1] != 50000 || got[3] != 50000 {
			t.Errorf("got %v", got)
		}
	})
}

func TestWindowsThatOverflowEndWhatTheyAreOf(t *testing.T) {
	block := func(x message.Exchange) { respond(x, "x") }
	zero := http2.Setting{ID: http2.SettingInitialWindowSize, Val: 0}
	p := serve(t, block, zero)
	p.get(1)
	p.await(http2.FrameHeaders, 1)
	p.do(p.fr.WriteWindowUpdate(1, 1<<31-1))
	if e := p.await(http2.FrameData, 1); len(e.payload) != 1 {
		t.Errorf("got %v", e)
	}

	p = serve(t, func(x message.Exchange) { _, _ = x.ReadBody(make([]byte, 1)) })
	p.ask(1, false, base("POST", "/")...)
	p.do(p.fr.WriteWindowUpdate(1, 1<<31-1))
	p.wantReset(1, http2.ErrCodeFlowControl)
	p.do(p.fr.WriteWindowUpdate(0, 1<<31-1))
	p.wantGoAway(http2.ErrCodeFlowControl)
}

func TestClientsKeepToOurWindows(t *testing.T) {
	hold := make(chan struct{})
	defer close(hold)
	srv := &Server{Handler: handlerFunc(func(message.Exchange) { <-hold })}
	p := meet(t, srv)
	full := strings.Repeat("a", frameSize)
	// One stream's.
	p.ask(1, false, base("POST", "/")...)
	for range 4 {
		p.data(1, false, full)
	}
	p.wantReset(1, http2.ErrCodeFlowControl)
	// The connection's: 16 streams fill it.
	for id := uint32(3); id < 3+2*16; id += 2 {
		p.ask(id, false, base("POST", "/")...)
		for range 3 {
			p.data(id, false, full)
		}
		p.data(id, false, full[1:])
	}
	p.ask(101, false, base("POST", "/")...)
	p.data(101, false, full)
	p.wantGoAway(http2.ErrCodeFlowControl)
}

func TestSlowHandlerStopsItsOwnBodyOnly(t *testing.T) {
	hold := make(chan struct{})
	p := serve(t, func(x message.Exchange) {
		if string(x.Request().Target) == "/slow" {
			<-hold
		}
		ok(x)
	})
	full := strings.Repeat("a", frameSize)
	slow := []uint32{1, 3, 5, 7, 9, 11, 13, 15}
	for _, id := range slow {
		p.ask(id, false, base("POST", "/slow")...)
		for range 3 {
			p.data(id, false, full)
		}
		p.data(id, false, full[1:])
	}
	// Much more than the windows through another one meanwhile.
	p.ask(101, false, base("POST", "/")...)
	window, conn, left := FirstWindow, ConnWindow-len(slow)*FirstWindow, 4<<20
	for left > 0 {
		for window < frameSize || conn < frameSize {
			e, ok := p.next()
			switch {
			case !ok:
				t.Fatal("the connection ended")
			case e.kind == http2.FrameWindowUpdate && e.id == 101:
				window += int(e.last())
			case e.kind == http2.FrameWindowUpdate && e.id == 0:
				conn += int(e.last())
			}
		}
		p.data(101, left == frameSize, full)
		window, conn, left = window-frameSize, conn-frameSize, left-frameSize
	}
	if a := p.hear(101); a.status != "200" {
		t.Fatalf("got %+v", a)
	}
	close(hold)
	for _, id := range slow {
		p.data(id, true, "")
		if a := p.hear(id); a.status != "200" {
			t.Errorf("got %+v", a)
		}
	}
}

// window returns what the next WINDOW_UPDATE of a stream gives.
func (p *peer) window(id uint32) int {
	p.t.Helper()
	for {
		e, ok := p.next()
		if !ok || e.kind == http2.FrameRSTStream {
			p.t.Fatalf("got %v, want WINDOW_UPDATE", e)
		}
		if e.kind == http2.FrameWindowUpdate && e.id == id {
			return int(e.last())
		}
	}
}

func TestPaddingIsGivenBack(t *testing.T) {
	got := make(chan string, 1)
	p := serve(t, bodies(got))
	p.ask(1, false, base("POST", "/", "content-length", "20000")...)
	pad := make([]byte, 200)
	window := FirstWindow
	for i := range 20000 { // 4 MB of padding
		for ; window < 202; window += p.window(1) {
		}
		window -= 202
		p.do(p.fr.WriteDataPadded(1, i == 19999, []byte("a"), pad))
	}
	if s := <-got; len(s) != 20000 {
		t.Errorf("got %d bytes", len(s))
	}
	p.hear(1)
	p.wantSettled()
}

func TestSmallAnswersPassLargeOnes(t *testing.T) {
	inTime(t, func(t *testing.T) {
		large := make([]byte, 1<<20)
		p := serve(t, func(x message.Exchange) {
			if string(x.Request().Target) == "/large" {
				_ = x.Begin(&message.Response{Status: 200, Length: message.Unknown})
				for {
					if _, err := x.Write(large); err != nil {
						return
					}
				}
			}
			respond(x, "small")
		}, http2.Setting{ID: http2.SettingInitialWindowSize, Val: 1<<31 - 1})
		p.do(p.fr.WriteWindowUpdate(0, 1<<31-1-FirstWindow))
		p.gate <- struct{}{} // the peer reads one frame more at most, until it may again
		for id := uint32(1); id < 81; id += 2 {
			p.ask(id, true, base("GET", "/large")...)
		}
		synctest.Wait()
		p.get(81)
		synctest.Wait() // all wait for the peer now
		<-p.gate
		between := 0
		for {
			e, ok := p.next()
			if !ok {
				t.Fatal("the connection ended")
			}
			if e.id == 81 && e.ends() {
				break
			}
			between += len(e.payload)
		}
		if most := 2*maxHeads + 4*frameSize; between > most {
			t.Errorf("%d bytes of others came first, want %d at most", between, most)
		}
		p.do(p.nc.Close())
	})
}

func TestManyLargeAnswersComeEvenly(t *testing.T) {
	const each = 4 << 20
	p := serve(t, func(x message.Exchange) { respond(x, strings.Repeat("a", each)) }, http2.Setting{ID: http2.SettingInitialWindowSize, Val: 0})
	p.do(p.fr.WriteWindowUpdate(0, 1<<31-1-FirstWindow))
	for id := uint32(1); id < 9; id += 2 {
		p.get(id)
		p.await(http2.FrameHeaders, id)
	}
	p.do(p.fr.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: 1<<31 - 1}))
	got := map[uint32]int{}
	for {
		e, _ := p.next()
		if e.kind != http2.FrameData {
			continue
		}
		got[e.id] += len(e.payload)
		if e.ends() {
			break // the first to be whole
		}
	}
	for id := uint32(1); id < 9; id += 2 {
		if got[id] < each/4 {
			t.Errorf("when one had all of its %d bytes, %d had %d", each, id, got[id])
		}
	}
}

func TestWhatWaitsToBeWrittenIsBounded(t *testing.T) {
	inTime(t, func(t *testing.T) {
		var c atomic.Pointer[conn]
		p := serve(t, func(x message.Exchange) {
			c.Store(x.(*stream).c)
			_ = x.Begin(&message.Response{Status: 200, Length: message.Unknown})
			for {
				if _, err := x.Write(make([]byte, 10000)); err != nil {
					return
				}
			}
		}, http2.Setting{ID: http2.SettingInitialWindowSize, Val: 1<<31 - 1})
		p.do(p.fr.WriteWindowUpdate(0, 1<<31-1-FirstWindow))
		p.gate <- struct{}{} // reads one frame more at most
		for id := uint32(1); id < 41; id += 2 {
			p.get(id)
		}
		synctest.Wait()
		c.Load().mu.Lock()
		n := c.Load().pending()
		c.Load().mu.Unlock()
		if n < maxPending/2 || n > maxPending+2*frameSize {
			t.Errorf("%d bytes wait, want about %d", n, maxPending)
		}
		<-p.gate
		p.await(http2.FrameHeaders, 39)
		p.do(p.nc.Close())
	})
}

func TestResetEndsAWaitingWrite(t *testing.T) {
	wrote := make(chan error, 1)
	p := serve(t, func(x message.Exchange) {
		_ = x.Begin(&message.Response{Status: 200, Length: message.Unknown})
		_, err := x.Write(make([]byte, 100))
		wrote <- err
	}, http2.Setting{ID: http2.SettingInitialWindowSize, Val: 0})
	p.get(1)
	p.await(http2.FrameHeaders, 1)
	p.do(p.fr.WriteRSTStream(1, http2.ErrCodeCancel))
	if err := <-wrote; !errors.Is(err, errReset) {
		t.Errorf("got %v", err)
	}
	p.get(3)
	p.await(http2.FrameHeaders, 3)
	_ = p.nc.Close()
	if err := <-wrote; err == nil {
		t.Error("a write to nobody")
	}
}

func TestInterruptEndsWaits(t *testing.T) {
	at := make(chan message.Exchange)
	wrote, read := make(chan error, 1), make(chan error, 1)
	p := serve(t, func(x message.Exchange) {
		_ = x.Begin(&message.Response{Status: 200, Length: message.Unknown})
		_ = x.Flush()
		done := make(chan struct{})
		go func() {
			defer close(done)
			_, err := x.ReadBody(make([]byte, 1))
			read <- err
		}()
		at <- x
		_, err := x.Write(make([]byte, 100))
		wrote <- err
		<-done
	}, http2.Setting{ID: http2.SettingInitialWindowSize, Val: 0})
	p.ask(1, false, base("POST", "/")...)
	(<-at).Interrupt()
	if err := <-wrote; !errors.Is(err, errInterrupted) {
		t.Errorf("got %v", err)
	}
	if err := <-read; !errors.Is(err, errInterrupted) {
		t.Errorf("got %v", err)
	}
	p.wantReset(1, http2.ErrCodeInternal)
	p.wantSettled()
}

type watcher chan struct{}

func (w watcher) ClientGone() { close(w) }

func TestWatcherIsToldWhenTheClientGoes(t *testing.T) {
	watching := make(chan watcher)
	p := serve(t, func(x message.Exchange) {
		w := make(watcher)
		x.Watch(w)
		watching <- w
		<-w
		if _, err := x.ReadBody(make([]byte, 1)); err == nil || errors.Is(err, io.EOF) {
			t.Errorf("ReadBody says %v", err)
		}
		late := make(watcher)
		x.Watch(late)
		<-late // at once
	})
	p.get(1)
	w := <-watching
	p.do(p.fr.WriteRSTStream(1, http2.ErrCodeCancel))
	<-w
	p.get(3)
	w = <-watching
	p.get(5)
	w2 := <-watching
	_ = p.nc.Close()
	<-w
	<-w2
	<-p.served
}
