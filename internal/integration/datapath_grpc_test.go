package integration

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"tako/internal/takotest"
)

// message is text as gRPC sends it.
func message(text []byte) []byte {
	return append(binary.BigEndian.AppendUint32([]byte{0}, uint32(len(text))), text...)
}

// readMessage reads one; io.EOF is the end between two.
func readMessage(r io.Reader) ([]byte, error) {
	var head [5]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return nil, err
	}
	n := binary.BigEndian.Uint32(head[1:])
	if head[0] != 0 || n > 16<<20 {
		return nil, fmt.Errorf("the head of a message %x", head)
	}
	text := make([]byte, n)
	_, err := io.ReadFull(r, text)
	if errors.Is(err, io.EOF) {
		err = io.ErrUnexpectedEOF
	}
	return text, err
}

// calls is an app with methods as gRPC has them.
type calls struct {
	all       sync.WaitGroup // of a crowd: not yet there
	cancelled chan string    // methods whose client has gone
}

func (g *calls) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	rc := http.NewResponseController(w)
	if r.ProtoMajor != 2 || r.Header.Get("Te") != "trailers" || r.Header.Get("Content-Type") != "application/grpc" {
		http.Error(w, fmt.Sprint(r.Proto, r.Header), http.StatusTeapot)
		return
	}
	h := w.Header()
	h.Set("Content-Type", "application/grpc")
	status := func(code, text string) {
		h.Set(http.TrailerPrefix+"Grpc-Status", code)
		h.Set(http.TrailerPrefix+"Grpc-Message", text)
	}
	switch r.URL.Path {
	case "/test.Echo/Unary":
		text, err := readMessage(r.Body)
		if err != nil {
			status("13", err.Error())
			return
		}
		w.Write(message(text))
		status("0", "fine")
	case "/test.Echo/Refused": // nothing but trailers
		h.Set("Grpc-Status", "7")
		h.Set("Grpc-Message", "not you")
	case "/test.Echo/Stream", "/test.Echo/Crowd":
		rc.Flush()
		if r.URL.Path == "/test.Echo/Crowd" {
			g.all.Done()
			g.all.Wait()
		}
		for {
			text, err := readMessage(r.Body)
			if errors.Is(err, io.EOF) {
				status("0", "streamed")
				return
			}
			if err != nil {
				g.cancelled <- r.URL.Path
				return
			}
			w.Write(message(text))
			rc.Flush()
		}
	case "/test.Echo/Wait": // until the client goes
		rc.Flush()
		<-r.Context().Done()
		g.cancelled <- r.URL.Path + " " + r.Header.Get("Grpc-Timeout")
	case "/test.Echo/Dies": // in the middle of its answer
		w.Write(message([]byte("first")))
		rc.Flush()
		panic(http.ErrAbortHandler)
	}
}

// call begins one.
func call(ctx context.Context, s *takotest.Server, client *http.Client, method string, body io.Reader) (*http.Response, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, s.URL(takotest.H2, "grpc.localhost/test.Echo/"+method), body)
	if err != nil {
		return nil, err
	}
	req.Header = http.Header{"Content-Type": {"application/grpc"}, "Te": {"trailers"}, "Grpc-Timeout": {"50S"}}
	return client.Do(req)
}

// conversation is a stream that sends each message when the one before has come
// back.
func conversation(ctx context.Context, s *takotest.Server, client *http.Client, method string, n int) error {
	pr, pw := io.Pipe()
	defer pw.Close()
	res, err := call(ctx, s, client, method, pr)
	if err != nil {
		return err
	}
	defer res.Body.Close()
	if res.StatusCode != http.StatusOK {
		return errors.New(res.Status)
	}
	for i := range n {
		want := fmt.Appendf(nil, "message %d", i)
		if _, err := pw.Write(message(want)); err != nil {
			return err
		}
		got, err := readMessage(res.Body)
		if err != nil || string(got) != string(want) {
			return fmt.Errorf("%q, %w, want %q", got, err, want)
		}
	}
	if err := pw.Close(); err != nil {
		return err
	}
	if _, err := readMessage(res.Body); !errors.Is(err, io.EOF) {
		return fmt.Errorf("behind the last message: %w", err)
	}
	if res.Trailer.Get("Grpc-Status") != "0" || res.Trailer.Get("Grpc-Message") != "streamed" {
		return fmt.Errorf("trailer %v", res.Trailer)
	}
	return nil
}

func TestDataPathCallsOfGRPC(t *testing.T) {
	t.Parallel()
	s := start(t, takotest.Options{})
	app := &calls{cancelled: make(chan string, 2000)}
	serveApp(t, s, "grpc", app, map[string]any{"protocol": "h2c", "limits": map[string]any{"in_flight": 2000}})
	client := s.Client(takotest.H2)
	defer client.CloseIdleConnections()
	ctx := t.Context()

	t.Run("unary", func(t *testing.T) {
		for _, n := range []int{0, 1, 1000, 16384, 100_000, 4 << 20} {
			want := filler(uint64(n), n)
			res, err := call(ctx, s, client, "Unary", strings.NewReader(string(message(want))))
			if err != nil {
				t.Fatal(err)
			}
			got, err := readMessage(res.Body)
			if err != nil || string(got) != string(want) {
				t.Errorf("%d bytes came back as %d, %v", n, len(got), err)
			}
			if _, err := io.ReadAll(res.Body); err != nil {
				t.Error(err)
			}
			res.Body.Close()
			if res.ProtoMajor != 2 || res.Trailer.Get("Grpc-Status") != "0" || res.Trailer.Get("Grpc-Message") != "fine" {
				t.Errorf("%s, trailer %v", res.Proto, res.Trailer)
			}
		}
	})
	t.Run("refused", func(t *testing.T) {
		res, err := call(ctx, s, client, "Refused", strings.NewReader(string(message([]byte("x")))))
		if err != nil {
			t.Fatal(err)
		}
		defer res.Body.Close()
		if body, err := io.ReadAll(res.Body); err != nil || len(body) > 0 || res.Header.Get("Grpc-Status")+res.Trailer.Get("Grpc-Status") != "7" {
			t.Errorf("%q, %v, %v, %v", body, err, res.Header, res.Trailer)
		}
	})
	t.Run("streamed both ways", func(t *testing.T) {
		n := 100
		if soaking() {
			n = 20_000
		}
		if err := conversation(ctx, s, client, "Stream", n); err != nil {
			t.Error(err)
		}
	})
	gone := func(t *testing.T, want string) {
		t.Helper()
		select {
		case got := <-app.cancelled:
			if got != want {
				t.Errorf("the app saw the end of %q, want %q", got, want)
			}
		case <-time.After(takotest.AskWait):
			t.Errorf("the app did not see the end of %s", want)
		}
	}
	t.Run("cancelled", func(t *testing.T) {
		for _, method := range []string{"Wait", "Stream"} {
			ctx, cancel := context.WithCancel(ctx)
			pr, pw := io.Pipe()
			res, err := call(ctx, s, client, method, pr)
			if err != nil {
				t.Fatal(err)
			}
			cancel()
			res.Body.Close() // net/http looks at ctx only when the body is sent
			pw.Close()
			gone(t, "/test.Echo/"+method+map[string]string{"Wait": " 50S"}[method])
		}
	})
	t.Run("too late", func(t *testing.T) {
		ctx, cancel := context.WithTimeout(ctx, 300*time.Millisecond)
		defer cancel()
		res, err := call(ctx, s, client, "Wait", nil)
		if err == nil {
			_, err = io.ReadAll(res.Body)
			res.Body.Close()
		}
		if !errors.Is(err, context.DeadlineExceeded) {
			t.Error(err)
		}
		if res != nil { // or it never came so far
			gone(t, "/test.Echo/Wait 50S")
		}
	})
	t.Run("an app that dies", func(t *testing.T) {
		res, err := call(ctx, s, client, "Dies", strings.NewReader(string(message([]byte("x")))))
		if err != nil {
			t.Fatal(err)
		}
		defer res.Body.Close()
		if body, err := io.ReadAll(res.Body); err == nil {
			t.Errorf("half an answer looks whole: %q, %v", body, res.Trailer)
		}
	})
	t.Run("a thousand at once", func(t *testing.T) {
		const crowd = 1000
		app.all.Add(crowd)
		var wg sync.WaitGroup
		var mu sync.Mutex
		failed := 0
		for range 10 {
			client := s.Client(takotest.H2)
			client.Timeout = 2 * takotest.AskWait
			defer client.CloseIdleConnections()
			for range crowd / 10 {
				wg.Go(func() {
					if err := conversation(ctx, s, client, "Crowd", 5); err != nil {
						mu.Lock()
						defer mu.Unlock()
						if failed++; failed <= 5 {
							t.Error(err)
						}
					}
				})
			}
		}
		wg.Wait()
		t.Logf("%d of %d streams that were open at once failed", failed, crowd)
	})
}
