package eventloop

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"regexp"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// each runs a test for each kind of socket.
func each(t *testing.T, f func(t *testing.T, network string)) {
	for _, network := range networks {
		t.Run(network, func(t *testing.T) { f(t, network) })
	}
}

// echo is a connection that waits idle, and has what comes sent back.
type echo struct {
	c      *Conn
	turns  atomic.Int32
	closed chan struct{}
}

func (e *echo) Start(t *Task) {
	e.c.Own(t)
	e.turns.Add(1)
	b := make([]byte, 1+rand.IntN(8<<10))
	for range 1 + rand.IntN(4) {
		n, err := e.c.Read(b)
		if err == nil {
			_, err = e.c.Write(b[:n])
		}
		if err != nil {
			_ = e.c.Close()
			close(e.closed)
			return
		}
	}
	e.c.Idle(e)
}

func TestManyConnectionsAreEchoedByTwoLoops(t *testing.T) {
	each(t, func(t *testing.T, network string) {
		const conns, size = 40, 200_000
		g := newGroup(t, 2)
		var wg sync.WaitGroup
		for i := range conns {
			c, other := onLoop(t, g.Pick(), network)
			e := &echo{c: c, closed: make(chan struct{})}
			c.Idle(e)
			sent := noise(i, size)
			wg.Go(func() {
				for b := sent; len(b) > 0; {
					n := min(len(b), 1+rand.IntN(20_000))
					if _, err := other.Write(b[:n]); err != nil {
						t.Error(err)
						return
					}
					b = b[n:]
				}
				_ = other.(interface{ CloseWrite() error }).CloseWrite()
			})
			wg.Go(func() {
				_ = other.SetReadDeadline(time.Now().Add(patience))
				got, err := io.ReadAll(other)
				if err != nil {
					t.Error(err)
				}
				same(t, got, sent)
				select {
				case <-e.closed:
				case <-time.After(patience):
					t.Error("the task does not end")
				}
				if e.turns.Load() == 0 {
					t.Error("no task was begun")
				}
			})
		}
		wg.Wait()
		if n := g.Conns(); n != 0 {
			t.Errorf("%d connections are left", n)
		}
	})
}

func TestBothHalvesAreUsedAtOnce(t *testing.T) {
	// Off the loop one goroutine reads while another writes.
	each(t, func(t *testing.T, network string) {
		const size = 1 << 20
		g := newGroup(t, 1)
		c, other := onLoop(t, g.Pick(), network)
		up, down := noise(1, size), noise(2, size)
		var wg sync.WaitGroup
		wg.Go(func() { _, _ = other.Write(up) })
		wg.Go(func() { _, _ = c.Write(down) })
		wg.Go(func() { same(t, readFull(t, other, size), down) })
		wg.Go(func() {
			b := make([]byte, size)
			if _, err := io.ReadFull(c, b); err != nil {
				t.Error(err)
			}
			same(t, b, up)
		})
		wg.Wait()
	})
}

// begun is what an idle connection has come to.
type begun struct {
	loop *Loop
	got  string
	err  error
}

// reads is a Starter that reads all there is until the first error, and tells.
func reads(c *Conn, to chan<- begun) Starter {
	return starter(func(t *Task) {
		c.Own(t)
		var is begun
		is.loop = t.Loop()
		for b := make([]byte, 100); is.err == nil; {
			var n int
			n, is.err = c.Read(b)
			is.got += string(b[:n])
		}
		_ = c.Close()
		to <- is
	})
}

func TestIdleConnectionBegins(t *testing.T) {
	for name, event := range map[string]struct {
		happens func(c *Conn, other net.Conn)
		got     string
		err     error
	}{
		"on data that comes with the end": {func(_ *Conn, other net.Conn) {
			_, _ = other.Write([]byte("last"))
			_ = other.Close()
		}, "last", io.EOF},
		"on the end":                   {func(_ *Conn, other net.Conn) { _ = other.Close() }, "", io.EOF},
		"when another one closes it":   {func(c *Conn, _ net.Conn) { _ = c.Close() }, "", net.ErrClosed},
		"on a deadline that is over":   {func(c *Conn, _ net.Conn) { _ = c.SetReadDeadline(past) }, "", os.ErrDeadlineExceeded},
		"on a deadline that comes":     {func(c *Conn, _ net.Conn) { _ = c.SetDeadline(time.Now().Add(time.Millisecond)) }, "", os.ErrDeadlineExceeded},
		"on a deadline that is nearer": {func(c *Conn, _ net.Conn) { _, _ = c.SetReadDeadline(future), c.SetReadDeadline(past) }, "", os.ErrDeadlineExceeded},
		"after a deadline is taken off": {func(c *Conn, other net.Conn) {
			_, _, _ = c.SetReadDeadline(future), c.SetReadDeadline(time.Time{}), other.Close()
		}, "", io.EOF},
	} {
		t.Run(name, func(t *testing.T) {
			each(t, func(t *testing.T, network string) {
				g := newGroup(t, 2)
				for _, first := range []string{"idle", "event"} { // what comes first
					l := g.Pick()
					c, other := onLoop(t, l, network)
					told := make(chan begun, 2)
					if first == "event" {
						event.happens(c, other)
					}
					settle(t, l)
					c.Idle(reads(c, told))
					if first == "idle" {
						settle(t, l)
						if len(told) > 0 {
							t.Fatalf("it has begun before anything has happened: %+v", <-told)
						}
						event.happens(c, other)
					}
					is := await(t, told)
					if is.got != event.got || !errors.Is(is.err, event.err) || is.loop != l {
						t.Errorf("%s first: got %q and %v, want %q and %v", first, is.got, is.err, event.got, event.err)
					}
					settle(t, l)
					if len(told) > 0 {
						t.Errorf("%s first: it began twice", first)
					}
				}
			})
		})
	}
}

func TestIdleConnectionBeginsOnlyForWhatIsNew(t *testing.T) {
	// What came while the task ran was read by it: there is nothing to begin for. The
	// same is true of a deadline that was taken off again.
	g := newGroup(t, 1)
	l := g.Pick()
	for name, happens := range map[string]func(c *Conn, other net.Conn){
		"bytes":    func(_ *Conn, other net.Conn) { write(t, other, []byte("more")) },
		"deadline": func(c *Conn, _ net.Conn) { _, _ = c.SetReadDeadline(past), c.SetReadDeadline(time.Time{}) },
	} {
		c, other := onLoop(t, l, "tcp")
		may, read := make(chan struct{}), make(chan int, 1)
		second := make(chan begun, 1)
		c.Idle(starter(func(task *Task) {
			c.Own(task)
			b := make([]byte, 10)
			n, _ := c.Read(b)
			task.Block(func() { <-may })
			_ = c.SetReadDeadline(time.Time{})
			if name == "bytes" {
				m, _ := c.Read(b)
				n += m
			}
			read <- n
			c.Idle(reads(c, second))
		}))
		write(t, other, []byte("some"))
		until(t, func() bool { // it was read
			empty := false
			_ = c.Control(func(uintptr) { empty = c.rd.dry && l.conns.Load() > 0 && quiet(c.fd) })
			return empty
		})
		happens(c, other)
		settle(t, l)
		close(may)
		await(t, read)
		settle(t, l)
		c.rd.mu.Lock()
		idle := c.rd.begin != nil
		c.rd.mu.Unlock()
		if !idle {
			t.Errorf("%s: a task was begun with nothing to do", name)
		}
		_ = other.Close()
		if is := await(t, second); is.got != "" || is.err != io.EOF { //nolint:errorlint // Read returns it bare
			t.Errorf("%s: got %q and %v", name, is.got, is.err)
		}
	}
}

func TestReadsNothingLess(t *testing.T) {
	// After each segment the reader is parked, or about to be: the next one wakes it.
	each(t, func(t *testing.T, network string) {
		g := newGroup(t, 1)
		l := g.Pick()
		for _, segments := range [][]string{
			{"abc", "de"},                 // both shorter than the buffer
			{"12345678", "x"},             // the first fills it
			{"12345678", "12345678"},      // both fill it
			{"1234567812345678", "y", ""}, // more than fits
		} {
			c, other := onLoop(t, l, network)
			got := make(chan string, 100)
			done := begin(l, func(task *Task) {
				c.Own(task)
				for b := make([]byte, 8); ; {
					n, err := c.Read(b)
					if err != nil {
						got <- fmt.Sprint(err)
						return
					}
					got <- string(b[:n])
				}
			})
			for _, s := range segments {
				settle(t, l)
				if !c.rd.waits() {
					t.Fatalf("%q: the reader is not parked", segments)
				}
				write(t, other, []byte(s))
				for left := s; left != ""; {
					piece := await(t, got)
					if len(piece) > len(left) || left[:len(piece)] != piece {
						t.Fatalf("%q: got %q, want %q", segments, piece, left)
					}
					left = left[len(piece):]
				}
			}
			// The last data with the end, which a short read must not hide.
			write(t, other, []byte("end"))
			_ = other.Close()
			if a, b := await(t, got), await(t, got); a != "end" || b != io.EOF.Error() {
				t.Errorf("%q: at the end got %q and %q", segments, a, b)
			}
			await(t, done)
		}
	})
}

func TestReadsWhileBytesCome(t *testing.T) {
	// Bytes come between the reading and the parking, at all times there are.
	each(t, func(t *testing.T, network string) {
		const rounds = 3000
		g := newGroup(t, 1)
		c, other := onLoop(t, g.Pick(), network)
		sent := noise(3, rounds)
		done := begin(g.Pick(), func(task *Task) {
			c.Own(task)
			var got []byte
			for b := make([]byte, 4); ; {
				n, err := c.Read(b)
				got = append(got, b[:n]...)
				if err != nil {
					break
				}
			}
			same(t, got, sent)
		})
		for b := sent; len(b) > 0; {
			n := min(len(b), 1+rand.IntN(5))
			write(t, other, b[:n])
			b = b[n:]
		}
		_ = other.Close()
		await(t, done)
	})
}

func TestWriteWaitsForRoom(t *testing.T) {
	each(t, func(t *testing.T, network string) {
		const size = bulk
		g := newGroup(t, 1)
		l := g.Pick()
		c, other := onLoop(t, l, network)
		sent := noise(4, size)
		var n int
		var err error
		done := begin(l, func(task *Task) {
			c.Own(task)
			n, err = c.Write(sent)
		})
		settle(t, l)
		if !c.wr.waits() {
			t.Fatal("the writer is not parked")
		}
		same(t, readFull(t, other, size), sent)
		await(t, done)
		if n != size || err != nil {
			t.Errorf("wrote %d of %d bytes: %v", n, size, err)
		}
	})
}

func TestDeadlineEndsParkedReadsAndWrites(t *testing.T) {
	each(t, func(t *testing.T, network string) {
		g := newGroup(t, 1)
		l := g.Pick()
		for _, on := range []bool{true, false} {
			for name, limit := range map[string]func(c *Conn){
				"over":   func(c *Conn) { _ = c.SetDeadline(past) },
				"coming": func(c *Conn) { _ = c.SetDeadline(time.Now().Add(time.Millisecond)) },
			} {
				c, _ := onLoop(t, l, network)
				done, wrote, readErr, writeErr := parked(t, l, c, on)
				limit(c)
				await(t, done)
				if !errors.Is(readErr(), os.ErrDeadlineExceeded) || !errors.Is(writeErr(), os.ErrDeadlineExceeded) || wrote() == 0 || wrote() == bulk {
					t.Errorf("on the loop: %t, %s: %v, %v, wrote %d", on, name, readErr(), writeErr(), wrote())
				}
				if _, err := c.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
					t.Errorf("a read after the deadline: %v", err)
				}
			}
		}
	})
}

func TestCloseWakesReaderAndWriter(t *testing.T) {
	each(t, func(t *testing.T, network string) {
		g := newGroup(t, 1)
		l := g.Pick()
		for _, on := range []bool{true, false} {
			c, _ := onLoop(t, l, network)
			done, wrote, readErr, writeErr := parked(t, l, c, on)
			if err := c.Close(); err != nil {
				t.Fatal(err)
			}
			await(t, done)
			if !errors.Is(readErr(), net.ErrClosed) || !errors.Is(writeErr(), net.ErrClosed) || wrote() == bulk {
				t.Errorf("on the loop: %t: %v, %v, wrote %d", on, readErr(), writeErr(), wrote())
			}
			for name, err := range map[string]error{
				"Close": c.Close(), "CloseWrite": c.CloseWrite(), "SetDeadline": c.SetDeadline(past), "SetLinger": c.SetLinger(0),
				"Control": c.Control(func(uintptr) {}), "Move": c.Move(l),
			} {
				if !errors.Is(err, net.ErrClosed) {
					t.Errorf("%s after Close: %v", name, err)
				}
			}
			if _, err := c.Surrender(); !errors.Is(err, net.ErrClosed) {
				t.Errorf("Surrender after Close: %v", err)
			}
			if _, _, err := c.Swap([]byte("x"), make([]byte, 1), true); !errors.Is(err, net.ErrClosed) {
				t.Errorf("Swap after Close: %v", err)
			}
		}
	})
}

// bulk is more than two sockets hold.
const bulk = 4 << 20

// parked returns once a reader and a writer of c are parked, by tasks of l or off
// it. The results may be asked for after done.
func parked(t *testing.T, l *Loop, c *Conn, on bool) (done <-chan struct{}, wrote func() int, readErr, writeErr func() error) {
	t.Helper()
	var n int
	var rerr, werr error
	read := func() { _, rerr = c.Read(make([]byte, 1)) }
	send := func() { n, werr = c.Write(make([]byte, bulk)) }
	all := make(chan struct{})
	if on {
		// Own is for one task: the writer's parks under its name, too.
		reader := begin(l, func(task *Task) { c.Own(task); read() })
		settle(t, l)
		writer := begin(l, func(task *Task) { c.Own(task); send() })
		settle(t, l)
		go func() { defer close(all); <-reader; <-writer }()
	} else {
		var wg sync.WaitGroup
		wg.Go(read)
		wg.Go(send)
		go func() { defer close(all); wg.Wait() }()
	}
	until(t, func() bool { return c.rd.waits() && c.wr.waits() })
	return all, func() int { return n }, func() error { return rerr }, func() error { return werr }
}

func TestSwapLooksFirst(t *testing.T) {
	each(t, func(t *testing.T, network string) {
		g := newGroup(t, 1)
		l := g.Pick()
		for _, on := range []bool{true, false} {
			for name, is := range map[string]struct {
				before func(c *Conn, other net.Conn)
				look   bool
				err    error
			}{
				"silent":                    {func(*Conn, net.Conn) {}, true, nil},
				"silent, not looked at":     {func(*Conn, net.Conn) {}, false, nil},
				"ended":                     {func(_ *Conn, other net.Conn) { _ = other.Close() }, true, ErrStale},
				"half ended":                {func(_ *Conn, other net.Conn) { _ = other.(interface{ CloseWrite() error }).CloseWrite() }, true, ErrStale},
				"not silent":                {func(_ *Conn, other net.Conn) { write(t, other, []byte("?")) }, true, ErrStale},
				"not silent, not looked at": {func(_ *Conn, other net.Conn) { write(t, other, []byte("?")) }, false, nil},
				"late":                      {func(c *Conn, _ net.Conn) { _ = c.SetReadDeadline(past) }, true, os.ErrDeadlineExceeded},
				"late after writing":        {func(c *Conn, _ net.Conn) { _ = c.SetReadDeadline(past) }, false, os.ErrDeadlineExceeded},
			} {
				c, other := onLoop(t, l, network)
				is.before(c, other)
				if name != "half ended" { // the kernel knows first
					settle(t, l)
				}
				in := make([]byte, 10)
				var wrote, got int
				var err error
				swap := func(task *Task) {
					c.Own(task)
					wrote, got, err = c.Swap([]byte("question"), in, is.look)
				}
				var done <-chan struct{}
				if on {
					done = begin(l, swap)
				} else {
					off := make(chan struct{})
					go func() { defer close(off); swap(nil) }()
					done = off
				}
				want := "answer"
				if is.err == nil {
					if q := readFull(t, other, 8); string(q) != "question" {
						t.Errorf("%s: the other end got %q", name, q)
					}
					if name == "not silent, not looked at" {
						want = "?"
					} else {
						write(t, other, []byte(want))
					}
				}
				await(t, done)
				if is.err == nil {
					if err != nil || wrote != 8 || string(in[:got]) != want {
						t.Errorf("%s: wrote %d, got %q, %v", name, wrote, in[:got], err)
					}
				} else if !errors.Is(err, is.err) || got != 0 || is.look && wrote != 0 {
					t.Errorf("%s: wrote %d, got %d, %v, want %v", name, wrote, got, err, is.err)
				}
			}
		}
	})
}

func TestSwapsOneAfterTheOther(t *testing.T) {
	// As on a kept connection to an app: each look finds it silent, though there were
	// answers before.
	each(t, func(t *testing.T, network string) {
		const rounds = 500
		g := newGroup(t, 1)
		l := g.Pick()
		c, other := onLoop(t, l, network)
		go func() { sendBack(other) }()
		done := begin(l, func(task *Task) {
			in := make([]byte, 100)
			for i := range rounds {
				c.Own(task)
				q := fmt.Appendf(nil, "question %d", i)
				wrote, got, err := c.Swap(q, in, true)
				if err != nil || wrote != len(q) || !bytes.Equal(in[:got], q) {
					t.Errorf("round %d: wrote %d, got %q, %v", i, wrote, in[:got], err)
					break
				}
				c.Own(nil)
			}
		})
		await(t, done)
		_ = c.Close()
	})
}

func TestMoveWhileBytesCome(t *testing.T) {
	each(t, func(t *testing.T, network string) {
		const size = 100_000
		g := newGroup(t, 2)
		c, other := onLoop(t, g.loops[0], network)
		sent := noise(5, size)
		moves := 0
		done := begin(g.loops[0], func(task *Task) {
			c.Own(task)
			var got []byte
			for b := make([]byte, 300); ; {
				n, err := c.Read(b)
				got = append(got, b[:n]...)
				if err != nil {
					break
				}
				if err := c.Move(g.loops[(c.Loop().Index()+1)%2]); err != nil {
					t.Error(err)
				}
				moves++
				if a, b := g.loops[0].conns.Load(), g.loops[1].conns.Load(); a+b != 1 || g.loops[c.Loop().Index()].conns.Load() != 1 {
					t.Errorf("the loops count %d and %d connections", a, b)
				}
			}
			same(t, got, sent)
		})
		for b := sent; len(b) > 0; {
			n := min(len(b), 1+rand.IntN(1000))
			write(t, other, b[:n])
			b = b[n:]
		}
		_ = other.Close()
		await(t, done)
		if moves < size/1000 {
			t.Errorf("%d moves", moves)
		}
	})
}

func TestMovedConnectionBeginsOnItsNewLoop(t *testing.T) {
	each(t, func(t *testing.T, network string) {
		g := newGroup(t, 2)
		for _, when := range []string{"before", "after"} { // bytes come, of the move
			c, other := onLoop(t, g.loops[0], network)
			if when == "before" {
				write(t, other, []byte("x"))
			}
			settle(t, g.loops[0])
			if err := c.Move(g.loops[1]); err != nil {
				t.Fatal(err)
			}
			told := make(chan begun, 1)
			c.Idle(reads(c, told))
			if when == "after" {
				write(t, other, []byte("x"))
			}
			_ = other.Close()
			if is := await(t, told); is.loop != g.loops[1] || is.got != "x" || is.err != io.EOF { //nolint:errorlint // Read returns it bare
				t.Errorf("bytes %s: %+v", when, is)
			}
		}
	})
}

func TestConnectionThatCannotMoveCanBeClosed(t *testing.T) {
	g := newGroup(t, 1)
	c, _ := onLoop(t, g.Pick(), "tcp")
	broken := &Loop{group: g, ep: -1}
	if err := c.Move(broken); !errors.Is(err, syscall.EBADF) {
		t.Fatalf("moved to a loop without epoll: %v", err)
	}
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	if n, m := g.Conns(), broken.conns.Load(); n != 0 || m != 0 {
		t.Errorf("the loops count %d and %d connections", n, m)
	}
}

func TestAdoptedConnectionWithBytesBeginsAtOnce(t *testing.T) {
	each(t, func(t *testing.T, network string) {
		g := newGroup(t, 1)
		a, b := pair(t, network)
		write(t, b, []byte("early"))
		_ = b.Close()
		local, remote := a.LocalAddr().String(), a.RemoteAddr().String()
		before := descriptors(t, "socket")
		c := adopt(t, g.Pick(), a)
		if n := descriptors(t, "socket"); n != before {
			t.Errorf("%d sockets, %d before", n, before)
		}
		if err := a.SetDeadline(past); !errors.Is(err, net.ErrClosed) {
			t.Errorf("what was adopted is not closed: %v", err)
		}
		if c.LocalAddr().String() != local || c.RemoteAddr().String() != remote {
			t.Errorf("addresses %s and %s, want %s and %s", c.LocalAddr(), c.RemoteAddr(), local, remote)
		}
		told := make(chan begun, 1)
		c.Idle(reads(c, told))
		if is := await(t, told); is.got != "early" || is.err != io.EOF { //nolint:errorlint // Read returns it bare
			t.Errorf("%+v", is)
		}
	})
}

func TestClosedConnectionIsNotAdopted(t *testing.T) {
	each(t, func(t *testing.T, network string) {
		g := newGroup(t, 1)
		a, _ := pair(t, network)
		_ = a.Close()
		before := descriptors(t, "socket")
		if _, err := g.Pick().Adopt(a); !errors.Is(err, net.ErrClosed) {
			t.Errorf("adopted: %v", err)
		}
		if n := descriptors(t, "socket"); n != before || g.Conns() != 0 {
			t.Errorf("%d sockets, %d before; %d connections", n, before, g.Conns())
		}
	})
}

func TestWhatIsNoSocketIsNotAdopted(t *testing.T) {
	g := newGroup(t, 1)
	a, b := net.Pipe()
	defer a.Close()
	defer b.Close()
	if _, err := g.Pick().Adopt(a); !errors.Is(err, errNoSocket) {
		t.Errorf("adopted: %v", err)
	}
}

func TestConnectionStaysUsableIfALoopCannotTakeIt(t *testing.T) {
	each(t, func(t *testing.T, network string) {
		g := newGroup(t, 1)
		g.table = g.table[:4] // nothing looks at it without connections
		for name, l := range map[string]*Loop{"its descriptor is too large": g.Pick(), "epoll fails": {group: &Group{table: make([]atomic.Pointer[Conn], 1<<16)}, ep: -1}} {
			a, b := pair(t, network)
			before := descriptors(t, "socket")
			if c, err := l.Adopt(a); err == nil {
				t.Errorf("%s: adopted as %d", name, number(t, c))
				_ = c.Close()
				continue
			}
			if n := descriptors(t, "socket"); n != before || g.Conns() != 0 || l.conns.Load() != 0 {
				t.Errorf("%s: %d sockets, %d before; %d connections", name, n, before, g.Conns())
			}
			for i := range l.group.table {
				if l.group.table[i].Load() != nil {
					t.Errorf("%s: %d is in the table", name, i)
				}
			}
			write(t, a, []byte("there"))
			write(t, b, []byte("back!"))
			if there, back := string(readFull(t, b, 5)), string(readFull(t, a, 5)); there != "there" || back != "back!" {
				t.Errorf("%s: got %q and %q", name, there, back)
			}
		}
	})
}

func TestSurrenderLosesNothing(t *testing.T) {
	each(t, func(t *testing.T, network string) {
		g := newGroup(t, 1)
		l := g.Pick()
		c, other := onLoop(t, l, network)
		sent := noise(6, 1000)
		write(t, other, sent[:600])
		first := make([]byte, 100)
		await(t, begin(l, func(task *Task) {
			c.Own(task)
			if _, err := io.ReadFull(c, first); err != nil {
				t.Error(err)
			}
			c.Own(nil)
		}))
		old := number(t, c)
		before := descriptors(t, "socket")
		nc, err := c.Surrender()
		if err != nil {
			t.Fatal(err)
		}
		defer nc.Close()
		if n := descriptors(t, "socket"); n != before || g.Conns() != 0 || g.table[old].Load() != nil {
			t.Errorf("%d sockets, %d before; %d connections", n, before, g.Conns())
		}
		if info, err := os.ReadFile(fmt.Sprintf("/proc/self/fdinfo/%d", l.ep)); err != nil || regexp.MustCompile(fmt.Sprintf(`tfd: +%d `, old)).Match(info) {
			t.Errorf("the loop hears of it still: %v\n%s", err, info)
		}
		if _, err := c.Read(first); !errors.Is(err, net.ErrClosed) {
			t.Errorf("the old one is not closed: %v", err)
		}
		write(t, other, sent[600:])
		same(t, append(first, readFull(t, nc, 900)...), sent)
		write(t, nc, []byte("back"))
		if got := readFull(t, other, 4); string(got) != "back" {
			t.Errorf("the other end got %q", got)
		}
		// It waits as those of package net do.
		_ = nc.SetReadDeadline(time.Now().Add(time.Millisecond))
		if _, err := nc.Read(first); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("a read with a deadline: %v", err)
		}
		_, tcp := nc.(*net.TCPConn)
		if tcp != (network == "tcp") {
			t.Errorf("it is a %T", nc)
		}
		if again, err := l.Adopt(nc); err != nil {
			t.Errorf("it is not adopted again: %v", err)
		} else {
			_ = again.Close()
		}
	})
}

func TestSurrenderWhileOthersClose(t *testing.T) {
	// Either it is closed, or a connection of package net. The loop goes on with others
	// that get its descriptor.
	const rounds = 300
	g := newGroup(t, 1)
	l := g.Pick()
	before := descriptors(t, "socket")
	for range rounds {
		a, b := pair(t, "unix")
		next, other := pair(t, "unix")
		c := adopt(t, l, a)
		var wg sync.WaitGroup
		wg.Go(func() { _ = c.Close() })
		wg.Go(func() {
			if nc, err := c.Surrender(); err == nil {
				_ = nc.Close()
			} else if !errors.Is(err, net.ErrClosed) {
				t.Error(err)
			}
		})
		on, err := l.Adopt(next)
		if err != nil {
			t.Fatal(err)
		}
		told := make(chan begun, 1)
		done := begin(l, func(*Task) { on.Idle(reads(on, told)) })
		await(t, done)
		wg.Wait()
		write(t, other, []byte("x"))
		_ = other.Close()
		if is := await(t, told); is.got != "x" || is.err != io.EOF { //nolint:errorlint // Read returns it bare
			t.Fatalf("%+v", is)
		}
		_ = b.Close()
	}
	if n := descriptors(t, "socket"); n != before {
		t.Errorf("%d sockets, %d before", n, before)
	}
}

func TestEventsOfAClosedConnectionDoNotReachTheNextWithItsDescriptor(t *testing.T) {
	// Two connections have news at once. The task of the first closes the second, whose
	// end the loop has taken from the kernel already, and makes another one.
	each(t, func(t *testing.T, network string) {
		g := newGroup(t, 1)
		l := g.Pick()
		first, news := onLoop(t, l, network)
		second, end := onLoop(t, l, network)
		fresh, far := pair(t, network)
		freed := number(t, second)
		for fd := -1; fd < freed; { // no other is free below it
			var err error
			if fd, err = unix.FcntlInt(0, unix.F_DUPFD_CLOEXEC, 3); err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { _ = syscall.Close(fd) })
		}
		var third *Conn
		var err error
		done := begin(l, func(task *Task) {
			first.Own(task)
			if _, err := first.Read(make([]byte, 1)); err != nil {
				t.Error(err)
			}
			_ = second.Close()
			third, err = l.Adopt(fresh)
		})
		settle(t, l)
		held, hold := make(chan struct{}), make(chan struct{})
		begin(l, func(*Task) { close(held); <-hold }) // which stops the loop
		await(t, held)
		write(t, news, []byte("x"))
		_ = end.(interface{ CloseWrite() error }).CloseWrite() // and keeps its own
		close(hold)
		await(t, done)
		_ = first.Close()
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { third.Close() })
		if n := number(t, third); n != freed {
			t.Fatalf("the new one is %d, the old one was %d", n, freed)
		}
		settle(t, l)
		third.rd.mu.Lock()
		ended := third.rd.ended
		third.rd.mu.Unlock()
		if ended {
			t.Error("the new one has the end of the old one")
		}
		go sendBack(far)
		in := make([]byte, 10)
		await(t, begin(l, func(task *Task) {
			third.Own(task)
			if _, n, err := third.Swap([]byte("hello"), in, true); err != nil || string(in[:n]) != "hello" {
				t.Errorf("got %q and %v", in[:n], err)
			}
		}))
		_ = third.Close()
	})
}

func TestDescriptorsAreUsedAgain(t *testing.T) {
	// Connections come and go on two loops, each with bytes of its own; those who close
	// them do so at any time.
	each(t, func(t *testing.T, network string) {
		const workers, rounds = 4, 60
		g := newGroup(t, 2)
		var wg sync.WaitGroup
		for w := range workers {
			wg.Go(func() {
				for i := range rounds {
					a, b := pair(t, network)
					c, err := g.Pick().Adopt(a)
					if err != nil {
						t.Error(err)
						return
					}
					e := &echo{c: c, closed: make(chan struct{})}
					c.Idle(e)
					sent := fmt.Appendf(nil, "%d of %d", i, w)
					_, _ = b.Write(sent)
					same(t, readFull(t, b, len(sent)), sent)
					switch i % 3 {
					case 0:
						_ = b.Close()
					case 1:
						_ = c.Close()
					case 2:
						_, _ = b.Write(sent)
						_ = c.Close()
					}
					<-e.closed
					_ = b.Close()
				}
			})
		}
		wg.Wait()
	})
}

func TestCloseWriteEndsOneHalf(t *testing.T) {
	each(t, func(t *testing.T, network string) {
		g := newGroup(t, 1)
		c, other := onLoop(t, g.Pick(), network)
		if _, err := c.Write([]byte("last")); err != nil {
			t.Fatal(err)
		}
		if err := c.CloseWrite(); err != nil {
			t.Fatal(err)
		}
		_ = other.SetReadDeadline(time.Now().Add(patience))
		if got, err := io.ReadAll(other); string(got) != "last" || err != nil {
			t.Errorf("the other end got %q, %v", got, err)
		}
		if _, err := c.Write([]byte("more")); !errors.Is(err, syscall.EPIPE) {
			t.Errorf("a write after CloseWrite: %v", err)
		}
		write(t, other, []byte("answer"))
		b := make([]byte, 10)
		if n, err := c.Read(b); string(b[:n]) != "answer" || err != nil {
			t.Errorf("got %q, %v", b[:n], err)
		}
	})
}

func TestLingerIsThatOfTheSocket(t *testing.T) {
	g := newGroup(t, 1)
	c, other := onLoop(t, g.Pick(), "tcp")
	for _, sec := range []int{7, -1, 0} {
		if err := c.SetLinger(sec); err != nil {
			t.Fatal(err)
		}
		// What x/sys has no reader for is seen by what it does: 0 resets.
	}
	_ = c.Close()
	if _, err := other.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("closed with SetLinger(0), the other end sees %v", err)
	}
	c, other = onLoop(t, g.Pick(), "tcp")
	_, _ = c.SetLinger(0), c.SetLinger(-1)
	_ = c.Close()
	if _, err := other.Read(make([]byte, 1)); err != io.EOF { //nolint:errorlint // net returns it bare
		t.Errorf("closed with SetLinger(-1), the other end sees %v", err)
	}
}

func TestControlHasTheSocket(t *testing.T) {
	each(t, func(t *testing.T, network string) {
		g := newGroup(t, 1)
		a, _ := pair(t, network)
		raw, err := a.(syscall.Conn).SyscallConn()
		if err != nil {
			t.Fatal(err)
		}
		var was string
		_ = raw.Control(func(fd uintptr) { was = inode(t, int(fd)) })
		c := adopt(t, g.Pick(), a)
		if is := inode(t, number(t, c)); is != was {
			t.Errorf("the socket is %s, was %s", is, was)
		}
		flags, err := unix.FcntlInt(uintptr(number(t, c)), unix.F_GETFD, 0)
		if err != nil || flags&unix.FD_CLOEXEC == 0 {
			t.Errorf("the descriptor survives an exec: %v", err)
		}
	})
}

func TestReadOfNothingDoesNotWait(t *testing.T) {
	g := newGroup(t, 1)
	c, _ := onLoop(t, g.Pick(), "tcp")
	if n, err := c.Read(nil); n != 0 || err != nil {
		t.Errorf("read %d, %v", n, err)
	}
	if n, err := c.Write(nil); n != 0 || err != nil {
		t.Errorf("wrote %d, %v", n, err)
	}
}

func TestConnectionResetByTheOtherEnd(t *testing.T) {
	g := newGroup(t, 1)
	l := g.Pick()
	c, other := onLoop(t, l, "tcp")
	var err error
	done := begin(l, func(task *Task) {
		c.Own(task)
		_, err = c.Read(make([]byte, 1))
	})
	settle(t, l)
	_ = other.(*net.TCPConn).SetLinger(0)
	_ = other.Close()
	await(t, done)
	if !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("read: %v", err)
	}
}
