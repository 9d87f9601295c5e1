package eventloop

import (
	"runtime"
	"testing"
	"time"
)

// holding returns loops that hold their places, of which there are as many more.
func holding(t *testing.T, loops int) *Group {
	t.Helper()
	before := runtime.GOMAXPROCS(2 * loops)
	t.Cleanup(func() { runtime.GOMAXPROCS(before) })
	g := newGroup(t, loops)
	g.Hold(true)
	for _, l := range g.loops { // from now on it sleeps so
		settle(t, l)
	}
	return g
}

func TestLoopsThatHoldTheirPlacesLetTheWorldStop(t *testing.T) {
	holding(t, 2)
	for range 20 {
		began := time.Now()
		runtime.GC()
		if took := time.Since(began); took > time.Second {
			t.Errorf("the world was stopped after %s", took)
		}
	}
}

func TestLoopsThatHoldTheirPlacesAreWoken(t *testing.T) {
	each(t, func(t *testing.T, network string) {
		g := holding(t, 2)
		for i := range 50 {
			c, other := onLoop(t, g.Pick(), network)
			c.Idle(&echo{c: c, closed: make(chan struct{})})
			if i%10 == 0 {
				time.Sleep(20 * time.Millisecond) // the runtime takes a place back meanwhile
			}
			write(t, other, []byte("x"))
			readFull(t, other, 1)
			_ = other.Close()
		}
		until(t, func() bool { return g.Conns() == 0 })
	})
}

func TestALoopThatTurnsOftenSaysSo(t *testing.T) {
	g := newGroup(t, 1)
	c, other := onLoop(t, g.Pick(), "unix")
	c.Idle(&echo{c: c, closed: make(chan struct{})})
	go func() {
		b := make([]byte, 1)
		for {
			if _, err := other.Write(b); err != nil {
				return
			}
			if _, err := other.Read(b); err != nil {
				return
			}
		}
	}()
	await(t, g.Rush())
	g.Hold(true)
	select { // one may have been on its way
	case <-g.Rush():
	case <-time.After(10 * time.Millisecond):
	}
	before := g.Turns()
	until(t, func() bool { return g.Turns() > before+10*rushTurns })
	select {
	case <-g.Rush():
		t.Error("it says so again, though it holds its place")
	default:
	}
	_ = other.Close()
	until(t, func() bool { return g.Conns() == 0 })
}
