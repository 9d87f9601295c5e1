package h1

import (
	"crypto/tls"
	"errors"
	"io"
	"net/http"
	"testing"
	"time"

	"tako/internal/proxy/eventloop"
	"tako/internal/proxy/message"
)

// onOwnLoops runs the test on TCP and TLS with loops of its own, to which a
// connection goes after so many requests, 0 for LoopAfter; with sweeps often or
// seldom. The second run of all tests has nothing to add.
func onOwnLoops(t *testing.T, after int, often bool, h message.Handler, test func(t *testing.T, s *server, g *eventloop.Group)) {
	t.Helper()
	if loops != nil {
		return // it was on them in the first run
	}
	for _, secure := range []*tls.Config{nil, serverTLS(t)} {
		name := "tls"
		if secure == nil {
			name = "tcp"
		}
		t.Run(name, func(t *testing.T) {
			g, err := eventloop.NewGroup(1)
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() {
				if err := g.Close(time.Minute); err != nil || g.Conns() != 0 {
					t.Errorf("%d connections are left: %v", g.Conns(), err)
				}
			})
			l := limits()
			if often {
				l.HalfOpen = 40 * time.Millisecond
			}
			test(t, start(t, "tcp", &Server{Handler: h, Limits: l, Loops: g, loopAfter: after}, secure), g)
		})
	}
}

const (
	plainGet = "GET / HTTP/1.1\r\nHost: h\r\n\r\n"
	never    = 1 << 30 // requests
)

// sayWhere answers where it runs.
var sayWhere = attached(func(x message.Exchange) {
	where := "off"
	if x.(*conn).Task().Attached() {
		where = "on"
	}
	_ = say(x, http.StatusOK, where)
})

// dialLoop returns a connection that is on a loop: not for its first request if TLS
// had read that before.
func (s *server) dialLoop() *client {
	s.t.Helper()
	c := s.dial().send(plainGet)
	c.answer("GET")
	c.send(plainGet).want(http.StatusOK, "on")
	return c
}

func TestAPanicOnALoopEndsOnlyItsConnection(t *testing.T) {
	h := attached(func(x message.Exchange) {
		if string(x.Request().Target) == "/panic" {
			panic("out of order")
		}
		sayWhere(x)
	})
	onOwnLoops(t, -1, false, h, func(t *testing.T, s *server, g *eventloop.Group) {
		other := s.dialLoop()
		for range 10 {
			c := s.dialLoop()
			c.send("GET /panic HTTP/1.1\r\nHost: h\r\n\r\n")
			if n, err := c.br.Read(make([]byte, 1)); n > 0 || isTimeout(err) {
				t.Fatalf("after a panic: %d bytes, %v", n, err)
			}
			other.send(plainGet).want(http.StatusOK, "on")
		}
		until(t, "one connection is left", func() bool { return g.Conns() == 1 && s.open.Load() == 1 })
	})
}

func TestAConnectionGoesToALoopAfterItsSecondRequest(t *testing.T) {
	onOwnLoops(t, 0, false, sayWhere, func(t *testing.T, s *server, g *eventloop.Group) {
		c := s.dial()
		for range LoopAfter {
			c.send(plainGet).answer("GET")
		}
		c.send(plainGet).want(http.StatusOK, "on")
		if n := g.Conns(); n != 1 {
			t.Errorf("%d connections on the loops", n)
		}
	})
}

// Nothing else than the sweeps takes these to a loop: one that has brought a
// request, and one that has brought two at once.
func TestAnIdleConnectionGoesToALoopByItself(t *testing.T) {
	onOwnLoops(t, never, true, sayWhere, func(t *testing.T, s *server, g *eventloop.Group) {
		for n, first := range []string{plainGet, plainGet + plainGet} {
			c := s.dial().send(first)
			for range n + 1 {
				c.want(http.StatusOK, "off")
			}
			until(t, "it is on a loop", func() bool { return g.Conns() == int64(n+1) })
			for range 3 {
				c.send(plainGet).want(http.StatusOK, "on")
			}
			c.send(plainGet + plainGet)
			c.want(http.StatusOK, "on")
			c.want(http.StatusOK, "on")
		}
	})
}

// A sweep may have seen the connection idle just before its next request came, and
// then sets a deadline on what is a tunnel by now.
func TestATunnelIsNotCutByASweepThatWantedItOnALoop(t *testing.T) {
	failed := make(chan error, 1)
	begun := make(chan *conn, 1)
	h := attached(func(x message.Exchange) {
		r := x.Request()
		if r.Upgrade == nil {
			_ = say(x, http.StatusOK, "ok")
			return
		}
		c := x.(*conn)
		c.mu.Lock() // what move does
		c.moving = true
		_ = c.sock.Load().SetReadDeadline(past)
		c.mu.Unlock()
		err := x.Begin(&message.Response{Status: http.StatusSwitchingProtocols, Upgrade: r.Upgrade})
		stream, terr := x.Tunnel()
		if err = errors.Join(err, terr); err != nil {
			failed <- err
			return
		}
		defer stream.Close()
		begun <- c
		_, err = io.CopyN(stream, stream, 4)
		failed <- err
	})
	onOwnLoops(t, never, false, h, func(t *testing.T, s *server, _ *eventloop.Group) {
		c := s.dial().send(plainGet)
		c.want(http.StatusOK, "ok")
		c.send("GET / HTTP/1.1\r\nHost: h\r\nConnection: Upgrade\r\nUpgrade: x\r\n\r\n")
		if resp, err := http.ReadResponse(c.br, nil); err != nil || resp.StatusCode != http.StatusSwitchingProtocols {
			t.Fatalf("%+v, %v", resp, err)
		}
		select {
		case <-begun:
			c.send("ping")
		case err := <-failed:
			t.Fatal(err)
		}
		if err := <-failed; err != nil {
			t.Errorf("the tunnel ended: %v", err)
		}
		if got, err := io.ReadAll(c.br); string(got) != "ping" || err != nil {
			t.Errorf("%q, %v", got, err)
		}
	})
}

func TestConnectionsIdleOnLoopsEndByCloseIdle(t *testing.T) {
	onOwnLoops(t, -1, false, sayWhere, func(t *testing.T, s *server, g *eventloop.Group) {
		var clients []*client
		for range 20 {
			c := s.dialLoop()
			clients = append(clients, c)
		}
		until(t, "all wait", func() bool { busy, waiting := s.Count(); return busy == 0 && waiting == len(clients) })
		s.CloseIdle()
		for _, c := range clients {
			c.ends()
		}
		until(t, "none is left", func() bool { return g.Conns() == 0 && s.open.Load() == 0 })
	})
}
