package integration

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"tako/internal/takotest"
)

// The slow clients, and what holds for them on a machine of its own.
const (
	slowClients   = 1000             // in all of the tests; in the short ones
	slowFew       = 40               // so many
	slowHeadsGone = 15 * time.Second // the last of them has lost its connection
	slowShown     = 75 * time.Second // how long the others are watched
	slowBodiesMiB = 60               // of tako-proxy's memory at most
	slowReadsMiB  = 100
)

// A slowCrowd is clients that take their time, each with a connection.
type slowCrowd struct {
	conns   []net.Conn
	began   time.Time
	over    chan struct{}
	wg      sync.WaitGroup
	ended   atomic.Int64 // of them
	lastEnd atomic.Int64 // nanoseconds after began
}

// crowd opens n connections to address, sends first on each and then does what
// more says, until that returns false: the connection has ended.
func crowd(t *testing.T, n int, address, first string, more func(c net.Conn, over <-chan struct{}) bool) *slowCrowd {
	t.Helper()
	k := &slowCrowd{began: time.Now(), over: make(chan struct{})}
	t.Cleanup(k.end)
	for range n {
		c, err := net.DialTimeout("tcp", address, answerWait)
		if err != nil {
			t.Fatalf("client %d of %d: %v", len(k.conns), n, err)
		}
		if tcp, ok := c.(*net.TCPConn); ok {
			tcp.SetReadBuffer(4096)
		}
		k.conns = append(k.conns, c)
		k.wg.Go(func() {
			if _, err := io.WriteString(c, first); err == nil {
				for more(c, k.over) {
				}
			}
			select {
			case <-k.over:
			default:
				k.ended.Add(1)
				k.lastEnd.Store(int64(time.Since(k.began)))
			}
		})
	}
	return k
}

// wait returns when every client has lost its connection, or after a time.
func (k *slowCrowd) wait(within time.Duration) {
	done := make(chan struct{})
	go func() { k.wg.Wait(); close(done) }()
	select {
	case <-done:
	case <-time.After(within):
	}
}

func (k *slowCrowd) end() {
	select {
	case <-k.over:
		return
	default:
	}
	close(k.over)
	for _, c := range k.conns {
		c.Close()
	}
	k.wg.Wait()
}

// everySecond calls f each second until it returns an error or over is closed.
func everySecond(over <-chan struct{}, f func() error) {
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			if f() != nil {
				return
			}
		case <-over:
			return
		}
	}
}

// honest asks url on new connections, one after another, until the returned
// function is called, which says how long the requests took.
func honest(t *testing.T, s *takotest.Server, hostPath string) (stop func() []time.Duration) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	var took []time.Duration
	done := make(chan struct{})
	go func() {
		defer close(done)
		for ctx.Err() == nil {
			answer, err := s.Get(ctx, takotest.HTTP1, hostPath)
			if ctx.Err() != nil {
				return
			}
			if err != nil || answer.StatusCode != http.StatusOK {
				t.Errorf("an honest client is not served: %v, %v", answer.Response, err)
				return
			}
			took = append(took, answer.Took)
			time.Sleep(20 * time.Millisecond)
		}
	}()
	return func() []time.Duration {
		cancel()
		<-done
		return took
	}
}

// share is the duration that this share of all is not above.
func share(all []time.Duration, of float64) time.Duration {
	if len(all) == 0 {
		return 0
	}
	slices.Sort(all)
	return all[min(len(all)-1, int(of*float64(len(all))))]
}

// peak watches the memory of tako-proxy until the returned function is called,
// which says its most in MiB.
func peak(t *testing.T, s *takotest.Server) (stop func() int) {
	t.Helper()
	over, done := make(chan struct{}), make(chan struct{})
	most := 0
	go func() {
		defer close(done)
		everySecond(over, func() error {
			for _, p := range s.Processes() {
				if !strings.HasPrefix(p.Command, "tako-proxy ") {
					continue
				}
				text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.PID))
				if err != nil {
					continue // it has just ended
				}
				for line := range strings.Lines(string(text)) {
					if rest, ok := strings.CutPrefix(line, "VmRSS:"); ok {
						kib, _ := strconv.Atoi(strings.Fields(rest)[0])
						most = max(most, kib>>10)
					}
				}
			}
			return nil
		})
	}()
	return func() int {
		close(over)
		<-done
		return most
	}
}

// served starts a server with two apps that answer plain HTTP, and says where.
func served(t *testing.T) (s *takotest.Server, address string) {
	t.Helper()
	s = start(t, takotest.Options{})
	deploy(t, s, "slow", "1", quick(nil))
	deploy(t, s, "other", "1", quick(nil))
	return s, net.JoinHostPort("127.0.0.1", strconv.Itoa(s.HTTP))
}

// TestConformanceSlowHeadsAreCut: a client that never ends its head keeps its
// connection for some seconds only, however much it sends, and harms nobody.
func TestConformanceSlowHeadsAreCut(t *testing.T) {
	t.Parallel()
	s, address := served(t)
	n, within := slowFew, 4*answerWait // on a busy machine
	if conforming() {
		n, within = slowClients, slowHeadsGone
	}
	stop := honest(t, s, "slow.localhost/")
	k := crowd(t, n, address, "GET / HTTP/1.1\r\nHost: slow.localhost\r\nX-A: ", func(c net.Conn, over <-chan struct{}) bool {
		gone := make(chan struct{})
		go func() {
			io.Copy(io.Discard, c) // a farewell, and the end
			close(gone)
		}()
		defer func() { c.Close(); <-gone }()
		everySecond(over, func() error {
			select {
			case <-gone:
				return net.ErrClosed
			default:
			}
			_, err := io.WriteString(c, "b")
			return err
		})
		return false
	})
	k.wait(within)
	took := stop()
	t.Logf("slow heads: %d of %d cut, the last after %.1f s; honest clients: %d requests, median %s, 99 %% within %s",
		k.ended.Load(), n, time.Duration(k.lastEnd.Load()).Seconds(), len(took), share(took, 0.5), share(took, 0.99))
	if k.ended.Load() < int64(n) {
		t.Errorf("%d of %d clients are still connected after %s", int64(n)-k.ended.Load(), n, within)
	}
	if len(took) == 0 {
		t.Error("no honest client was served")
	}
}

// TestConformanceSlowBodiesCostLittle: clients that send their bodies by drops.
func TestConformanceSlowBodiesCostLittle(t *testing.T) {
	slowCosts(t, "slow bodies", slowBodiesMiB,
		"POST /eat HTTP/1.1\r\nHost: slow.localhost\r\nContent-Length: 65536\r\n\r\n", func(c net.Conn, over <-chan struct{}) bool {
			gone := make(chan struct{})
			go func() {
				io.Copy(io.Discard, c)
				close(gone)
			}()
			defer func() { c.Close(); <-gone }()
			everySecond(over, func() error {
				select {
				case <-gone:
					return net.ErrClosed
				default:
				}
				_, err := io.WriteString(c, "drop ")
				return err
			})
			return false
		})
}

// TestConformanceSlowReadsCostLittle: clients that take large answers by drops.
func TestConformanceSlowReadsCostLittle(t *testing.T) {
	slowCosts(t, "slow reads", slowReadsMiB, "GET /bytes?n=8000000 HTTP/1.1\r\nHost: slow.localhost\r\n\r\n", func(c net.Conn, over <-chan struct{}) bool {
		buf := make([]byte, 32)
		everySecond(over, func() error {
			_, err := c.Read(buf)
			return err
		})
		return false
	})
}

func slowCosts(t *testing.T, what string, mostMiB int, first string, more func(net.Conn, <-chan struct{}) bool) {
	t.Helper()
	if !conforming() {
		t.Skip("it takes a minute: make conformance")
	}
	s, address := served(t)
	rest := honest(t, s, "other.localhost/")
	time.Sleep(3 * time.Second) // as it is without them
	usual := rest()
	memory := peak(t, s)
	stop := honest(t, s, "other.localhost/")
	k := crowd(t, slowClients, address, first, more)
	k.wait(slowShown)
	took, mib := stop(), memory()
	t.Logf("%s: %d of %d cut within %s, the last after %.1f s; %d MiB at most; honest clients: %d requests, median %s, 99 %% within %s (without the others %s, %s)",
		what, k.ended.Load(), slowClients, slowShown, time.Duration(k.lastEnd.Load()).Seconds(), mib, len(took), share(took, 0.5), share(took, 0.99), share(usual, 0.5), share(usual, 0.99))
	if mib > mostMiB || mib == 0 {
		t.Errorf("tako-proxy took %d MiB, at most %d are to do", mib, mostMiB)
	}
	k.end()
	until(t, takotest.StopWait, "the requests of clients that have gone are over", func() bool {
		data, err := s.Ask("status", map[string]any{"app": "slow"})
		if err != nil {
			t.Error(err)
			return true
		}
		return inFlight(t, data) == 0
	})
}

// TestConformanceAnAnswerBeforeTheBody: an app that answers without reading is
// heard, whatever the client still sends.
func TestConformanceAnAnswerBeforeTheBody(t *testing.T) {
	t.Parallel()
	_, address := served(t)
	c, err := net.DialTimeout("tcp", address, answerWait)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(answerWait))
	if _, err := io.WriteString(c, "POST / HTTP/1.1\r\nHost: slow.localhost\r\nContent-Length: 100000000\r\n\r\n"); err != nil {
		t.Fatal(err)
	}
	sent := make(chan struct{})
	go func() {
		defer close(sent)
		for chunk := bytes.Repeat([]byte("x"), 64<<10); ; {
			if _, err := c.Write(chunk); err != nil {
				return
			}
		}
	}()
	res, err := http.ReadResponse(bufio.NewReader(c), nil)
	if err != nil || res.StatusCode != http.StatusOK {
		t.Errorf("got %v, %v", res, err)
	}
	c.Close()
	<-sent
}
