package eventloop

import (
	"net"
	"sync"
	"sync/atomic"
	"testing"
)

func TestBlockedTaskDoesNotStopOthers(t *testing.T) {
	g := newGroup(t, 1)
	l := g.Pick()
	may := make(chan struct{})
	var before, within, after bool
	blocked := begin(l, func(task *Task) {
		before = task.Attached()
		task.Block(func() {
			within = task.Attached()
			<-may
			task.Block(func() {}) // is nothing more
		})
		after = task.Attached()
	})
	settle(t, l) // which the loop has time for
	c, other := onLoop(t, l, "tcp")
	e := &echo{c: c, closed: make(chan struct{})}
	c.Idle(e)
	write(t, other, []byte("x"))
	readFull(t, other, 1)
	select {
	case <-blocked:
		t.Error("the blocked one has ended")
	default:
	}
	close(may)
	await(t, blocked)
	if !before || within || !after {
		t.Errorf("attached before, within and after Block: %t, %t, %t", before, within, after)
	}
	_ = other.Close()
	await(t, e.closed)
}

func TestDetachedTaskUsesConnections(t *testing.T) {
	each(t, func(t *testing.T, network string) {
		g := newGroup(t, 1)
		l := g.Pick()
		c, other := onLoop(t, l, network)
		turn := func(task *Task) {
			c.Own(task)
			b := make([]byte, 1)
			for range 3 { // on, off and on the loop
				for range 2 * fairShare {
					if _, err := c.Read(b); err != nil {
						t.Error(err)
						return
					}
					if _, err := c.Write(b); err != nil {
						t.Error(err)
						return
					}
				}
				if task.Attached() {
					task.Detach()
					task.Detach()
				} else {
					task.Attach()
					task.Attach()
				}
			}
		}
		done := begin(l, turn)
		for range 3 * 2 * fairShare { // each waits for the one before
			write(t, other, []byte{'x'})
			readFull(t, other, 1)
		}
		await(t, done)
		settle(t, l)
	})
}

func TestTaskThatEndsDetachedIsNotKept(t *testing.T) {
	g := newGroup(t, 1)
	l := g.Pick()
	var first, second *Task
	await(t, begin(l, func(task *Task) { first = task; task.Detach() }))
	await(t, begin(l, func(task *Task) { second = task }))
	if first == second {
		t.Error("it is used again")
	}
	settle(t, l)
	var third *Task
	await(t, begin(l, func(task *Task) { third = task }))
	if second != third {
		t.Error("one that ended on the loop is not used again")
	}
}

func TestEachParkIsForOneWake(t *testing.T) {
	g := newGroup(t, 1)
	l := g.Pick()
	var task *Task
	var passed atomic.Int32
	started := make(chan struct{})
	done := begin(l, func(self *Task) {
		task = self
		self.Wake() // before its Park
		self.Wake()
		close(started)
		for range 4 {
			self.Park()
			passed.Add(1)
		}
	})
	await(t, started)
	for _, want := range []int32{2, 3} {
		settle(t, l)
		if n := passed.Load(); n != want {
			t.Fatalf("passed %d times, want %d", n, want)
		}
		task.Wake()
	}
	await(t, done)
	if n := passed.Load(); n != 4 {
		t.Errorf("passed %d times", n)
	}
}

func TestWakesFromEverywhereAreCounted(t *testing.T) {
	const wakers, wakes = 4, 500
	g := newGroup(t, 2)
	var task *Task
	started := make(chan struct{})
	done := begin(g.Pick(), func(self *Task) {
		task = self
		close(started)
		for range wakers * wakes {
			self.Park()
		}
	})
	await(t, started)
	var wg sync.WaitGroup
	for range wakers {
		wg.Go(func() {
			for range wakes {
				task.Wake()
			}
		})
	}
	wg.Wait()
	await(t, done)
}

func TestTaskWithEndlessDataLetsOthersRun(t *testing.T) {
	each(t, func(t *testing.T, network string) {
		g := newGroup(t, 1)
		l := g.Pick()
		c, other := onLoop(t, l, network)
		short, far := onLoop(t, l, "unix")
		write(t, other, make([]byte, 10*fairShare))
		stop := false // of the loop's goroutine
		second := begin(l, func(task *Task) {
			short.Own(task)
			if _, err := short.Read(make([]byte, 1)); err != nil {
				t.Error(err)
			}
			stop = true
		})
		settle(t, l)
		reads := 0
		await(t, begin(l, func(task *Task) {
			c.Own(task)
			if _, err := far.Write([]byte("x")); err != nil {
				t.Error(err)
			}
			for one := make([]byte, 1); !stop && reads < 10*fairShare; reads++ {
				if _, err := c.Read(one); err != nil {
					t.Error(err)
					return
				}
			}
		}))
		if reads > fairShare || reads == 0 {
			t.Errorf("it has read %d times before the other one ran", reads)
		}
		await(t, second)
	})
}

func TestNilTaskIsOnNoLoop(t *testing.T) {
	var task *Task
	if task.Attached() || task.Loop() != nil {
		t.Error("a nil Task is on a loop")
	}
	task.Detach()
	task.Attach()
	ran := false
	task.Block(func() { ran = true })
	if !ran {
		t.Error("Block has not called")
	}
	if task.Now().IsZero() {
		t.Error("a nil Task has no time")
	}
}

// BenchmarkExchange is what a short exchange costs: 100 bytes there and back. Both
// ends are of the kind that its name says.
func BenchmarkExchange(b *testing.B) {
	const size = 100
	message := make([]byte, size)
	b.Run("loop", func(b *testing.B) {
		g := newGroup(b, 1)
		l := g.Pick()
		near, far := pair(b, "unix")
		on, back := adopt(b, l, near), adopt(b, l, far)
		echoed := begin(l, func(task *Task) {
			back.Own(task)
			in := make([]byte, size)
			for {
				n, err := back.Read(in)
				if err != nil {
					return
				}
				if _, err := back.Write(in[:n]); err != nil {
					return
				}
			}
		})
		b.ReportAllocs()
		await(b, begin(l, func(task *Task) {
			on.Own(task)
			in := make([]byte, size)
			for b.Loop() {
				if _, n, err := on.Swap(message, in, false); n != size || err != nil {
					b.Error(n, err)
					return
				}
			}
		}))
		_ = on.Close()
		await(b, echoed)
	})
	b.Run("net", func(b *testing.B) {
		near, far := pair(b, "unix")
		echoed := make(chan struct{})
		go func(c net.Conn) { defer close(echoed); sendBack(c) }(far)
		in := make([]byte, size)
		b.ReportAllocs()
		for b.Loop() {
			if _, err := near.Write(message); err != nil {
				b.Fatal(err)
			}
			if n, err := near.Read(in); n != size || err != nil {
				b.Fatal(n, err)
			}
		}
		_ = near.Close()
		await(b, echoed)
	})
}
