package wire_test

import (
	"errors"
	"os"
	"testing"
	"time"

	"tako/internal/ipc"
	"tako/internal/wire"
)

func TestAnotherImageGoesOnWhereOneStopped(t *testing.T) {
	ch, fd, err := ipc.Pair()
	if err != nil {
		t.Fatal(err)
	}
	master := wire.NewConn(ch, wire.LinkProxy, wire.Master)
	other, err := ipc.Open(fd)
	if err != nil {
		t.Fatal(err)
	}
	proxy := wire.NewConn(other, wire.LinkProxy, wire.Proxy)
	defer proxy.Close()
	send := func(c *wire.Conn, body any) {
		t.Helper()
		if err := c.Send(0, body); err != nil {
			t.Fatal(err)
		}
	}
	receive := func(c *wire.Conn) any {
		t.Helper()
		m, err := c.Receive()
		if err != nil {
			t.Fatal(err)
		}
		return m.Body
	}
	send(master, &wire.Hello{Protocol: 1})
	receive(proxy)
	send(proxy, &wire.Hello{Protocol: 1})
	receive(master)
	send(master, &wire.Serve{})
	receive(proxy)
	send(proxy, &wire.Ready{})
	receive(master)
	send(proxy, &wire.Wake{App: "blog"}) // waits in the socket over the hand-over

	if err := master.SetReadDeadline(time.Unix(1, 0)); err != nil {
		t.Fatal(err)
	}
	if _, err := master.Receive(); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatalf("Receive after the deadline: %v", err)
	}
	dup, position, err := master.HandOver()
	if err != nil {
		t.Fatal(err)
	}
	if err := master.Close(); err != nil {
		t.Fatal(err)
	}
	ch2, err := ipc.Open(dup)
	if err != nil {
		t.Fatal(err)
	}
	next, err := wire.ResumeConn(ch2, wire.LinkProxy, wire.Master, position)
	if err != nil {
		t.Fatal(err)
	}
	defer next.Close()
	if _, ok := receive(next).(*wire.Wake); !ok {
		t.Error("what waited was lost")
	}
	if err := next.Send(0, &wire.Serve{}); err == nil {
		t.Error("a second Serve was permitted")
	}
	send(next, &wire.Drain{})
	if _, ok := receive(proxy).(*wire.Drain); !ok {
		t.Error("no Drain arrived")
	}
}
