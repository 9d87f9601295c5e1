package upstream

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"testing"
	"time"

	"tako/internal/proxy/eventloop"
)

type starter func(*eventloop.Task)

func (f starter) Start(t *eventloop.Task) { f(t) }

func group(t testing.TB) *eventloop.Group {
	t.Helper()
	g, err := eventloop.NewGroup(2)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := g.Close(10 * time.Second); err != nil || g.Conns() != 0 {
			t.Errorf("%d connections are left on the loops: %v", g.Conns(), err)
		}
	})
	return g
}

// onLoop runs f in a task of the next loop, and returns that loop.
func onLoop(t testing.TB, g *eventloop.Group, f func(task *eventloop.Task)) *eventloop.Loop {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	near, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	far, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer far.Close()
	loop := g.Pick()
	on, err := loop.Adopt(near)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	on.Idle(starter(func(task *eventloop.Task) {
		defer close(done)
		f(task)
		_ = on.Close()
	}))
	_, _ = far.Write([]byte{0})
	select {
	case <-done:
	case <-time.After(30 * time.Second):
		t.Fatal("the task does not end")
	}
	return loop
}

// askOn is ask by a task.
func askOn(t testing.TB, g *eventloop.Group, p *Pool) (loop *eventloop.Loop, body string, err error) {
	t.Helper()
	loop = onLoop(t, g, func(task *eventloop.Task) {
		r := outgoing("GET")
		r.Task = task
		_, body, err = ask(t, p, r)
	})
	return loop, body, err
}

func wantConns(t testing.TB, p *Pool, open, idle int) {
	t.Helper()
	if o, i := p.Conns(); o != open || i != idle {
		t.Errorf("%d connections, %d idle; want %d, %d", o, i, open, idle)
	}
}

// One connection serves tasks of all loops, and those of none, as it is idle.
func TestIdleConnectionGoesToWhereItIsWanted(t *testing.T) {
	for _, size := range []int{2, 300 << 10} {
		want := strings.Repeat("x", size)
		p, conns := listeningOn(t, "tcp", func(_ int, c net.Conn, br *bufio.Reader) {
			for {
				if _, _, ok := next(br); !ok {
					return
				}
				_, _ = fmt.Fprintf(c, "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\n\r\n", size, want)
			}
		})
		g := group(t)
		t.Cleanup(p.Retire)
		seen := make(map[*eventloop.Loop]bool)
		for n := range 6 {
			if n%3 == 2 {
				if _, body, err := ask(t, p, outgoing("GET")); body != want || err != nil {
					t.Fatalf("off the loops: %d bytes, %v", len(body), err)
				}
				if g.Conns() != 0 || len(p.shards[0].links) != 1 {
					t.Error("the connection is still on a loop")
				}
			} else {
				loop, body, err := askOn(t, g, p)
				if body != want || err != nil {
					t.Fatalf("on a loop: %d bytes, %v", len(body), err)
				}
				seen[loop] = true
				if g.Conns() != 1 || len(p.shards[p.shardOf(loop)].links) != 1 {
					t.Error("the connection is not on the loop that asked")
				}
			}
			wantConns(t, p, 1, 1)
		}
		if n := conns.Load(); n != 1 || len(seen) != 2 {
			t.Errorf("%d connections were made, for %d loops", n, len(seen))
		}
	}
}

func TestStaleConnectionOfALoopIsNotUsed(t *testing.T) {
	for _, late := range []string{"", "HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil"} { // the end, or more
		now, sent := make(chan bool), make(chan bool)
		p, conns := listeningOn(t, "tcp", func(n int, c net.Conn, br *bufio.Reader) {
			if _, _, ok := next(br); !ok {
				return
			}
			_, _ = io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
			if n > 0 {
				_, _ = br.ReadByte()
				return
			}
			<-now
			if late == "" {
				_ = c.(*net.TCPConn).CloseWrite()
			} else {
				_, _ = io.WriteString(c, late)
			}
			close(sent)
			if _, err := br.ReadByte(); err == nil {
				t.Error("the stale connection was used")
			}
		})
		g := group(t)
		t.Cleanup(p.Retire)
		if _, body, err := askOn(t, g, p); body != "ok" || err != nil {
			t.Fatalf("%q, %v", body, err)
		}
		close(now)
		<-sent
		for i := range p.shards {
			for _, l := range p.shards[i].links {
				for l.silent() {
					time.Sleep(time.Millisecond)
				}
			}
		}
		if _, body, err := askOn(t, g, p); body != "ok" || err != nil || conns.Load() != 2 {
			t.Errorf("%q, %v, %d connections", body, err, conns.Load())
		}
		wantConns(t, p, 1, 1)
	}
}

func TestRetireClosesIdleConnectionsOfAllLoops(t *testing.T) {
	p, _ := listeningOn(t, "tcp", func(_ int, c net.Conn, br *bufio.Reader) { answering(c) })
	g := group(t)
	made := func(task *eventloop.Task) {
		l, _, err := p.get(new(Cancel), task, time.Now(), true)
		if err != nil {
			t.Error(err)
			return
		}
		p.put(l, time.Now())
	}
	made(nil)
	onLoop(t, g, made)
	onLoop(t, g, made)
	wantConns(t, p, 3, 3)
	if n := g.Conns(); n != 2 {
		t.Errorf("%d are on the loops", n)
	}
	p.Retire()
	wantConns(t, p, 0, 0)
	if n := g.Conns(); n != 0 {
		t.Errorf("%d are on the loops", n)
	}
	if _, _, err := askOn(t, g, p); err != nil { // served, and not kept
		t.Error(err)
	}
	wantConns(t, p, 0, 0)
}

// place is one in a queue.
type place chan error

func (p place) Cancel(cause error) { p <- cause }

func TestCancelTellsWhoeverWaitsInAQueue(t *testing.T) {
	cause := errors.New("no more")
	var c Cancel
	w := make(place, 2)
	if !c.Wait(w) {
		t.Fatal("ended already")
	}
	c.Do(cause)
	c.Do(io.EOF)
	if err := <-w; !errors.Is(err, cause) {
		t.Errorf("told %v", err)
	}
	c.Waited()
	if c.Wait(w) || len(w) > 0 {
		t.Error("a wait began after the end, or was told twice")
	}
	c.Reset()
	if !c.Wait(w) {
		t.Error("ended after a reset")
	}
	c.Waited()
	c.Do(cause)
	if len(w) > 0 {
		t.Error("one that waits no more was told")
	}
}
