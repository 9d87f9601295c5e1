package h1

import (
	"crypto/tls"
	"net/http"
	"testing"
	"time"

	"tako/internal/proxy/eventloop"
	"tako/internal/proxy/message"
)

// onOwnLoops runs the test on TCP and TLS with loops of its own. The second run of all
// tests has nothing to add.
func onOwnLoops(t *testing.T, h message.Handler, test func(t *testing.T, s *server, g *eventloop.Group)) {
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
			test(t, startOn(t, g, "tcp", &Server{Handler: h, Limits: limits()}, secure), g)
		})
	}
}

const plainGet = "GET / HTTP/1.1\r\nHost: h\r\n\r\n"

// sayWhere answers where it runs.
var sayWhere = attached(func(x message.Exchange) {
	where := "off"
	if x.(*conn).Task().Attached() {
		where = "on"
	}
	_ = say(x, http.StatusOK, where)
})

func TestAPanicOnALoopEndsOnlyItsConnection(t *testing.T) {
	h := attached(func(x message.Exchange) {
		if string(x.Request().Target) == "/panic" {
			panic("out of order")
		}
		sayWhere(x)
	})
	onOwnLoops(t, h, func(t *testing.T, s *server, g *eventloop.Group) {
		other := s.dial()
		for range 10 {
			c := s.dial()
			c.send(plainGet).want(http.StatusOK, "on")
			c.send("GET /panic HTTP/1.1\r\nHost: h\r\n\r\n")
			if n, err := c.br.Read(make([]byte, 1)); n > 0 || isTimeout(err) {
				t.Fatalf("after a panic: %d bytes, %v", n, err)
			}
			other.send(plainGet).want(http.StatusOK, "on")
		}
		until(t, "one connection is left", func() bool { return g.Conns() == 1 && len(s.all(nil)) == 1 })
	})
}

func TestAConnectionThatWaitsOnALoopHoldsNothing(t *testing.T) {
	onOwnLoops(t, attached(echo), func(t *testing.T, s *server, g *eventloop.Group) {
		c := s.dial()
		for range 3 {
			c.send("POST /b HTTP/1.1\r\nHost: h\r\nContent-Length: 5\r\n\r\nhello").want(200, "POST /b hello")
		}
		until(t, "the connection waits", func() bool { _, idle := s.Count(); return idle == 1 })
		for _, conn := range s.all(nil) {
			if conn.in != nil || conn.x != nil {
				t.Error("it has memory")
			}
		}
		s.CloseIdle() // ordered after the look above, which the client's end is not
		c.ends()
	})
}

func TestConnectionsIdleOnLoopsEndByCloseIdle(t *testing.T) {
	onOwnLoops(t, sayWhere, func(t *testing.T, s *server, g *eventloop.Group) {
		var clients []*client
		for range 20 {
			c := s.dial()
			c.send(plainGet).want(http.StatusOK, "on")
			clients = append(clients, c)
		}
		until(t, "all wait", func() bool { busy, waiting := s.Count(); return busy == 0 && waiting == len(clients) })
		s.CloseIdle()
		for _, c := range clients {
			c.ends()
		}
		until(t, "none is left", func() bool { return g.Conns() == 0 && len(s.all(nil)) == 0 })
	})
}
