package proxy

import (
	"bufio"
	"context"
	"crypto/x509"
	"fmt"
	"io"
	"net"
	"net/http"
	"testing"
	"testing/synctest"
	"time"

	"tako/internal/wire"
)

// send connects and sends the beginning of a request, whose connection ends with
// the test.
func (m *master) begin(request string) (net.Conn, *bufio.Reader) {
	m.t.Helper()
	c, err := net.Dial("tcp", m.plain)
	check0(m.t, err)
	m.t.Cleanup(func() { _ = c.Close() })
	check0(m.t, c.SetDeadline(time.Now().Add(patience)))
	_, err = io.WriteString(c, request)
	check0(m.t, err)
	return c, bufio.NewReader(c)
}

// status reads an answer.
func status(t testing.TB, br *bufio.Reader) int {
	t.Helper()
	resp, err := http.ReadResponse(br, nil)
	check0(t, err)
	_, err = io.Copy(io.Discard, resp.Body)
	check0(t, err)
	return resp.StatusCode
}

const slowUpload = "POST / HTTP/1.1\r\nHost: blog.test\r\nContent-Length: 1000\r\n\r\n"

// Who sends a head and nothing more holds no place of an instance, and who sends
// the rest slowly leaves half of them to others.
func TestSlowUploadsLeaveRoomForOthers(t *testing.T) {
	m := serving(t)
	came := make(chan string, 10)
	m.app(wire.App{PlainHTTP: true, MaxInFlight: 4, Instances: []wire.Upstream{served(t, func(_ http.ResponseWriter, r *http.Request) {
		came <- r.Method
		_, _ = io.Copy(io.Discard, r.Body)
	})}})
	for range 8 {
		m.begin(slowUpload)
	}
	type upload struct {
		c  net.Conn
		br *bufio.Reader
	}
	var uploads []upload
	for range 2 {
		c, br := m.begin(slowUpload + "x")
		if got := <-came; got != http.MethodPost {
			t.Fatalf("a %s came", got)
		}
		uploads = append(uploads, upload{c, br})
	}
	c, br := m.begin(slowUpload + "x")
	m.settled(1)
	uploads = append(uploads, upload{c, br})
	for range 3 {
		if resp := m.raw("GET / HTTP/1.1\r\nHost: blog.test\r\n\r\n"); resp.StatusCode != http.StatusOK {
			t.Errorf("beside uploads: %d", resp.StatusCode)
		}
		if got := <-came; got != http.MethodGet {
			t.Errorf("a %s came before the uploads have ended", got)
		}
	}
	for i, u := range uploads {
		_, err := u.c.Write(make([]byte, 999))
		check0(t, err)
		if got := status(t, u.br); got != http.StatusOK {
			t.Errorf("upload %d: %d", i, got)
		}
	}
	if got := <-came; got != http.MethodPost {
		t.Errorf("a %s came last", got)
	}
}

// An upload that has come whole is one no more, though its answer takes long.
func TestUploadThatHasComeLeavesItsPlace(t *testing.T) {
	m := serving(t)
	begun, came, goOn := make(chan bool, 10), make(chan int, 10), make(chan struct{})
	m.app(wire.App{PlainHTTP: true, MaxInFlight: 2, Instances: []wire.Upstream{served(t, func(_ http.ResponseWriter, r *http.Request) {
		begun <- true
		n, _ := io.Copy(io.Discard, r.Body)
		came <- int(n)
		<-goOn
	})}})
	c, br := m.begin(slowUpload + "x")
	<-begun // so that it is not the one that waits
	_, br2 := m.begin(slowUpload + "x")
	m.settled(1)
	_, err := c.Write(make([]byte, 999))
	check0(t, err)
	if n := <-came; n != 1000 {
		t.Errorf("%d bytes came", n)
	}
	m.settled(0) // the second one has its instance
	close(goOn)
	if got := status(t, br); got != http.StatusOK {
		t.Errorf("got %d", got)
	}
	_ = br2
}

// The beginning that was read before, and the rest, are the body; small ones that
// come behind their heads are no uploads at all.
func TestBodiesThatComeInPiecesArriveWhole(t *testing.T) {
	m := serving(t)
	m.app(wire.App{PlainHTTP: true, MaxInFlight: 1, MaxBody: 20_000, Instances: []wire.Upstream{served(t, func(w http.ResponseWriter, r *http.Request) {
		b, err := io.ReadAll(r.Body)
		fmt.Fprintf(w, "%d %v %v", len(b), r.ContentLength, err)
	})}})
	for _, size := range []int{1, 2, FirstPiece - 1, FirstPiece, FirstPiece + 1, 20_000, 20_001} {
		for _, chunked := range []bool{false, true} {
			head, length := fmt.Sprintf("Content-Length: %d\r\n\r\n", size), size
			body, end := string(make([]byte, size)), ""
			if chunked {
				head, length, end = fmt.Sprintf("Transfer-Encoding: chunked\r\n\r\n%x\r\n", size), -1, "\r\n0\r\n\r\n"
			}
			c, br := m.begin("POST / HTTP/1.1\r\nHost: blog.test\r\n" + head)
			_, err := io.WriteString(c, body[:size/2])
			check0(t, err)
			_, err = io.WriteString(c, body[size/2:]+end)
			check0(t, err)
			resp, err := http.ReadResponse(br, nil)
			check0(t, err)
			b, err := io.ReadAll(resp.Body)
			check0(t, err)
			if size > 20_000 {
				if resp.StatusCode != http.StatusRequestEntityTooLarge {
					t.Errorf("%d bytes, chunked %t: %d", size, chunked, resp.StatusCode)
				}
				continue
			}
			exact, whole := fmt.Sprintf("%d %d <nil>", size, length), fmt.Sprintf("%d %d <nil>", size, size)
			if got := string(b); resp.StatusCode != http.StatusOK || got != exact && got != whole {
				t.Errorf("%d bytes, chunked %t: %d %q", size, chunked, resp.StatusCode, got)
			}
		}
	}
}

func TestBodyThatNeverBeginsIsItsClientsFault(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := piped(t, func(http.ResponseWriter, *http.Request) { t.Error("it reached the app") })
		_, err := io.WriteString(c, slowUpload)
		check0(t, err)
		began := time.Now()
		if got := status(t, bufio.NewReader(c)); got != http.StatusRequestTimeout || time.Since(began) < limits.Body {
			t.Errorf("got %d after %s", got, time.Since(began))
		}
	})
	synctest.Test(t, func(t *testing.T) {
		c := piped(t, func(http.ResponseWriter, *http.Request) { t.Error("it reached the app") })
		_, err := io.WriteString(c, "POST / HTTP/1.1\r\nHost: blog.test\r\nTransfer-Encoding: chunked\r\n\r\n")
		check0(t, err)
		synctest.Wait()
		_, err = io.WriteString(c, "zzz\r\n")
		check0(t, err)
		if got := status(t, bufio.NewReader(c)); got != http.StatusBadRequest {
			t.Errorf("got %d", got)
		}
	})
}

// A drain does not wait for a body that does not begin.
func TestRequestWhoseBodyDoesNotBeginIsCut(t *testing.T) {
	m := serving(t)
	m.plainApp(served(t, func(http.ResponseWriter, *http.Request) { t.Error("it reached the app") }))
	_, br := m.begin(slowUpload)
	for {
		if tr := <-m.traffic; tr.Apps[0].IdleMS == 0 { // it is under way
			break
		}
	}
	m.send(&wire.Drain{RequestsMS: 10, StreamsMS: 10})
	if got := status(t, br); got != http.StatusServiceUnavailable {
		t.Errorf("got %d", got)
	}
	if d := expect[*wire.Drained](m); d.Cut != 1 {
		t.Errorf("%d were cut", d.Cut)
	}
}

// Who waits to be told to go on is told by the app, and a call may leave the
// first word to the app.
func TestSomeBodiesAreNotWaitedFor(t *testing.T) {
	m := serving(t)
	m.plainApp(served(t, func(w http.ResponseWriter, r *http.Request) {
		b, err := io.ReadAll(r.Body)
		fmt.Fprint(w, len(b), err)
	}))
	c, br := m.begin("POST / HTTP/1.1\r\nHost: blog.test\r\nContent-Length: 3\r\nExpect: 100-continue\r\n\r\n")
	if got := status(t, br); got != http.StatusContinue {
		t.Fatalf("got %d", got)
	}
	_, err := io.WriteString(c, "abc")
	check0(t, err)
	if got := status(t, br); got != http.StatusOK {
		t.Errorf("got %d", got)
	}

	cert, leaf := m.certificate("blog", true, "blog.test")
	m.send(cert)
	roots := x509.NewCertPool()
	roots.AddCert(leaf)
	m.app(wire.App{Instances: []wire.Upstream{servedH2C(t, func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "application/grpc")
		_ = http.NewResponseController(w).Flush()
		b, err := io.ReadAll(r.Body)
		fmt.Fprint(w, len(b), err)
	})}})
	pr, pw := io.Pipe()
	req, _ := http.NewRequestWithContext(t.Context(), http.MethodPost, "https://blog.test/pkg.Service/Watch", pr)
	req.Header.Set("Content-Type", "application/grpc")
	resp, err := m.client(true, roots).Do(req) // returns with the head of the answer
	check0(t, err)
	defer resp.Body.Close()
	_, err = io.WriteString(pw, "abc")
	check0(t, err)
	check0(t, pw.Close())
	if b, err := io.ReadAll(resp.Body); string(b) != "3<nil>" && string(b) != "3 <nil>" || err != nil {
		t.Errorf("got %q, %v", b, err)
	}
}

func TestUploadsHaveHalfOfThePlaces(t *testing.T) {
	for most, want := range map[int]int{1: 1, 2: 1, 3: 1, 4: 2, 256: 128, MaxQueued: 3000} {
		if got := uploadPlaces(most); got != want {
			t.Errorf("of %d: %d, want %d", most, got, want)
		}
	}
	synctest.Test(t, func(t *testing.T) {
		a, _ := testApp(4, 1)
		one := a.numbered(1)
		for range 2 {
			_, err := a.acquireOf(t.Context(), nil, upload)
			check0(t, err)
		}
		order := make(chan string, 10)
		wait := func(ctx context.Context, name string, k kind) {
			go func() {
				if i, err := a.acquireOf(ctx, nil, k); err != nil || i != one {
					name = fmt.Sprint(name, err)
				}
				order <- name
			}()
			synctest.Wait()
		}
		next := func(want string) {
			t.Helper()
			synctest.Wait()
			select {
			case got := <-order:
				if got != want {
					t.Errorf("%s was next, want %s", got, want)
				}
			default:
				t.Errorf("nobody was next, want %s", want)
			}
			if len(order) > 0 {
				t.Errorf("then came %s", <-order)
			}
		}
		ctx, cancel := context.WithCancel(t.Context())
		wait(t.Context(), "upload 1", upload)
		wait(ctx, "upload 2", upload)
		wait(t.Context(), "a", ordinary) // goes past both
		next("a")
		wait(t.Context(), "b", ordinary)
		next("b")
		wait(t.Context(), "c", ordinary) // now all places are taken
		wait(t.Context(), "upload 3", upload)
		wait(t.Context(), "d", ordinary)
		if len(order) > 0 || a.queued.Load() != 5 {
			t.Fatalf("%d wait", a.queued.Load())
		}
		cancel()
		next("upload 2context canceled")
		a.release(one, ordinary)
		next("c")
		a.release(one, upload) // the first one in turn is one
		next("upload 1")
		a.uploaded(one)
		if len(order) > 0 {
			t.Error("a place was given twice")
		}
		a.release(one, ordinary)
		next("upload 3")
		a.release(one, upload)
		next("d")
		for range 3 {
			a.release(one, ordinary)
		}
		a.release(one, upload)
		if one.requests.Load() != 0 || one.uploads.Load() != 0 || a.queued.Load() != 0 {
			t.Errorf("%d requests, %d uploads, %d in the queue in the end", one.requests.Load(), one.uploads.Load(), a.queued.Load())
		}
	})
}

// However many uploads wait, others find room in the queue.
func TestUploadsHaveHalfOfTheQueue(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, _ := testApp(1, 1)
		first, err := a.acquireOf(t.Context(), nil, upload)
		check0(t, err)
		done := make(chan kind, MaxQueued)
		wait := func(k kind) {
			go func() {
				i, err := a.acquireOf(t.Context(), nil, k)
				check0(t, err)
				a.release(i, k)
				done <- k
			}()
		}
		for range uploadPlaces(MaxQueued) {
			wait(upload)
		}
		synctest.Wait()
		if _, err := a.acquireOf(t.Context(), nil, upload); err != errInstanceQueueFull { //nolint:errorlint // it is never wrapped
			t.Errorf("one upload too many: %v", err)
		}
		for range MaxQueued - uploadPlaces(MaxQueued) {
			wait(ordinary)
		}
		synctest.Wait()
		if _, err := a.acquireOf(t.Context(), nil, ordinary); err != errInstanceQueueFull { //nolint:errorlint // it is never wrapped
			t.Errorf("one request too many: %v", err)
		}
		a.release(first, upload)
		for range MaxQueued {
			<-done
		}
	})
}
