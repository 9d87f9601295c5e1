package management

import (
	"context"
	"net"
	"testing"
)

// TestConnectionsGoOnWithTheNextServe: whoever is connected when a Serve ends and
// another begins notices nothing, whether it had asked before or not, and whenever
// it asks.
func TestConnectionsGoOnWithTheNextServe(t *testing.T) {
	const request = `{"command":"list"}`
	left := make(chan *net.UnixConn, 10)
	var cfg Config
	f := &fake{}
	s := serve(t, f, func(c *Config) {
		c.Left = func(conn *net.UnixConn) { left <- conn }
		cfg = *c
	})
	silent, asked, inTheGap, half := s.dial(t), s.dial(t), s.dial(t), s.dial(t)
	want := asked.ask(t, request)
	inTheGap.ask(t, request)
	half.ask(t, request) // it is served by now
	half.send(t, request[:5])
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		s.stop(t)
	}()
	half.send(t, request[5:]+"\n") // it is answered by the one or the other
	<-ended
	inTheGap.send(t, request+"\n"+request+"\n")
	if len(left) != 4 {
		t.Errorf("%d connections were left, want 4", len(left))
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	cfg.Left, cfg.Waiting = nil, left
	go func() { done <- Serve(ctx, cfg) }()
	if one, two := inTheGap.line(t), inTheGap.line(t); one != want || two != want {
		t.Errorf("two requests between the two: %s, %s", one, two)
	}
	if got := half.line(t); got != want {
		t.Errorf("a request that had begun to arrive: %s", got)
	}
	for name, c := range map[string]*rawConn{"one that never asked": silent, "one that had asked": asked, "one that asked in two pieces": half} {
		if got := c.ask(t, request); got != want {
			t.Errorf("%s: %s", name, got)
		}
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
	silent.ended(t) // without Left they are closed
}
