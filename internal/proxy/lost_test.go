package proxy

import (
	"bufio"
	"io"
	"net"
	"net/http"
	"sync/atomic"
	"testing"

	"tako/internal/wire"
)

// Both instances have connections that were used, on each of which the request may
// be lost, and be sent again on a fresh one.
func TestLostRequestArrivesTwiceOverAllInstances(t *testing.T) {
	m := serving(t)
	var killing atomic.Bool
	var arrived atomic.Int32
	held, answer := make(chan int), make(chan struct{})
	instance := func(n int) wire.Upstream {
		return rawInstance(t, func(_ int, c net.Conn) {
			for br := bufio.NewReader(c); ; {
				if _, err := http.ReadRequest(br); err != nil {
					return
				}
				if killing.Load() {
					arrived.Add(1)
					return
				}
				held <- n
				<-answer
				_, _ = io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
			}
		})
	}
	m.plainApp(instance(0), instance(1))
	client := m.client(false, nil)
	statuses := make(chan int)
	asked := 0
	for hit := [2]bool{}; hit != [2]bool{true, true}; asked++ {
		go func() {
			resp, err := client.Get("http://blog.test/")
			if err != nil {
				statuses <- 0
				return
			}
			_ = resp.Body.Close()
			statuses <- resp.StatusCode
		}()
		hit[<-held] = true
	}
	close(answer)
	for range asked {
		if status := <-statuses; status != http.StatusOK {
			t.Errorf("got %d while the instances were well", status)
		}
	}
	killing.Store(true)
	resp := m.raw("DELETE / HTTP/1.1\r\nHost: blog.test\r\nConnection: close\r\n\r\n")
	if got := arrived.Load(); resp.StatusCode != http.StatusBadGateway || got != 2 {
		t.Errorf("status %d, it arrived %d times, want 2", resp.StatusCode, got)
	}
	m.plainApp() // or the connections that are left would stay for a while
}

// An instance that dies may take a connection yet: what it lost goes to another
// one, not to it again.
func TestLostRequestGoesToAnotherInstanceAtOnce(t *testing.T) {
	m := serving(t)
	var dying atomic.Bool
	var lost atomic.Int32
	answer := func(c net.Conn, br *bufio.Reader, dies bool) {
		for {
			if _, err := http.ReadRequest(br); err != nil {
				return
			}
			if dies && dying.Load() {
				lost.Add(1)
				return
			}
			_, _ = io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
		}
	}
	m.plainApp(
		rawInstance(t, func(_ int, c net.Conn) { answer(c, bufio.NewReader(c), true) }),
		rawInstance(t, func(_ int, c net.Conn) { answer(c, bufio.NewReader(c), false) }),
	)
	ask := func() {
		resp := m.raw("GET / HTTP/1.1\r\nHost: blog.test\r\nConnection: close\r\n\r\n")
		if body := text(t, resp, nil); resp.StatusCode != http.StatusOK {
			t.Errorf("got %d %q", resp.StatusCode, body)
		}
	}
	for range 50 { // both have connections that were used
		ask()
	}
	dying.Store(true)
	for range 50 {
		ask()
	}
	if lost.Load() == 0 {
		t.Error("nothing was lost")
	}
}
