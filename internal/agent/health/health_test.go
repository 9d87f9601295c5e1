package health

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"tako/internal/wire"
)

func TestAttemptsGetFewerWithTime(t *testing.T) {
	for since, want := range map[time.Duration]time.Duration{
		0:                       1500 * time.Microsecond,
		199 * time.Millisecond:  1500 * time.Microsecond,
		200 * time.Millisecond:  10 * time.Millisecond,
		1999 * time.Millisecond: 10 * time.Millisecond,
		2 * time.Second:         100 * time.Millisecond,
		30 * time.Second:        100 * time.Millisecond,
	} {
		if got := pause(since); got != want {
			t.Errorf("after %s: got %s, want %s", since, got, want)
		}
	}
}

func TestStatusLineIsReadAndNothingElse(t *testing.T) {
	for line, want := range map[string]int{
		"HTTP/1.1 200 OK\r\n":   200,
		"HTTP/1.0 404\n":        404,
		"HTTP/1.1 503 \r\nbody": 503,
		"HTTP/1.1 99 no\r\n":    0,
		"HTTP/1.1 2000\r\n":     0,
		"HTTP/2 200\r\n":        0,
		"HTTP/1.1 +20 x\r\n":    0,
		"SSH-2.0-OpenSSH\r\n":   0,
		"":                      0,
		strings.Repeat("x", MaxStatusLine+1) + "\r\n": 0,
	} {
		got, err := readStatus(strings.NewReader(line))
		if got != want || (err == nil) != (want != 0) {
			t.Errorf("%.40q: got %d, %v, want %d", line, got, err, want)
		}
		slow, err2 := readStatus(bufio.NewReaderSize(&oneByte{strings.NewReader(line)}, 16))
		if slow != got || (err == nil) != (err2 == nil) {
			t.Errorf("%.40q byte by byte: got %d, %v", line, slow, err2)
		}
	}
}

type oneByte struct{ r io.Reader }

func (o *oneByte) Read(p []byte) (int, error) { return o.r.Read(p[:min(1, len(p))]) }

func FuzzStatusLine(f *testing.F) {
	f.Add([]byte("HTTP/1.1 200 OK\r\nA: b\r\n\r\n"))
	f.Add([]byte("HTTP/1.1 2"))
	f.Fuzz(func(t *testing.T, b []byte) {
		code, err := readStatus(strings.NewReader(string(b)))
		if (err == nil) != (code >= 100 && code <= 999) {
			t.Errorf("%q: %d, %v", b, code, err)
		}
	})
}

func TestCodesAreGoodAsTheProbeSays(t *testing.T) {
	p := &wire.Probe{}
	for status, want := range map[int]bool{199: false, 200: true, 299: true, 302: false} {
		if good(p, status) != want {
			t.Errorf("%d without codes: %v", status, !want)
		}
	}
	p.Codes = [][2]int{{200, 200}, {300, 399}}
	for status, want := range map[int]bool{200: true, 201: false, 302: true, 404: false} {
		if good(p, status) != want {
			t.Errorf("%d: %v", status, !want)
		}
	}
}

func TestTargetsThatWouldBendARequestAreRefused(t *testing.T) {
	base := Target{Port: 80, Probe: wire.Probe{Kind: wire.ProbeHTTP, Path: "/status", Host: "tako-internal"}}
	if err := base.Check(); err != nil {
		t.Fatal(err)
	}
	for name, change := range map[string]func(t *Target){
		"blank in path":  func(t *Target) { t.Probe.Path = "/a b" },
		"header in path": func(t *Target) { t.Probe.Path = "/\r\nA:b" },
		"relative path":  func(t *Target) { t.Probe.Path = "status" },
		"no host":        func(t *Target) { t.Probe.Host = "" },
		"header in host": func(t *Target) { t.Probe.Host = "a\nb" },
		"unknown kind":   func(t *Target) { t.Probe.Kind = "grpc" },
		"nowhere":        func(t *Target) { t.Port = 0 },
	} {
		bad := base
		change(&bad)
		if bad.Check() == nil {
			t.Errorf("%s: not refused", name)
		}
	}
}

// watch runs Watch against a port and returns its reports.
func watch(t *testing.T, target Target) <-chan wire.Probed {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	reports, done := make(chan wire.Probed), make(chan struct{})
	target.Started = time.Now()
	if target.ReadyWithin == 0 {
		target.ReadyWithin = time.Minute
	}
	if target.Probe.Kind == "" {
		target.Probe = wire.Probe{Kind: wire.ProbeHTTP, Path: "/status", Host: "tako-internal", IntervalMS: 20, TimeoutMS: 200}
	}
	go func() {
		defer close(done)
		Watch(ctx, target, func(p wire.Probed) {
			select {
			case reports <- p:
			case <-ctx.Done():
			}
		})
	}()
	t.Cleanup(func() { cancel(); <-done })
	return reports
}

func next(t *testing.T, reports <-chan wire.Probed) wire.Probed {
	t.Helper()
	select {
	case p := <-reports:
		return p
	case <-time.After(20 * time.Second):
		t.Fatal("no report came")
	}
	panic("unreachable")
}

func portOf(t *testing.T, addr string) uint16 {
	t.Helper()
	return netip.MustParseAddrPort(addr).Port()
}

func TestSteadyProbeCountsOutcomesInARow(t *testing.T) {
	var status atomic.Int32
	status.Store(200)
	var request atomic.Pointer[http.Request]
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		request.Store(r)
		w.WriteHeader(int(status.Load()))
	}))
	defer srv.Close()
	reports := watch(t, Target{Port: portOf(t, srv.Listener.Addr().String())})
	for streak := 1; streak <= 3; streak++ {
		if p := next(t, reports); !p.Good || p.Streak != streak || p.Via != wire.TransportTCP || p.Detail != "" {
			t.Fatalf("probe %d: %+v", streak, p)
		}
	}
	if r := request.Load(); r.Host != "tako-internal" || r.URL.Path != "/status" || !r.Close {
		t.Errorf("request: %v %v, close %v", r.Host, r.URL, r.Close)
	}
	status.Store(500)
	p := next(t, reports)
	for p.Good { // one may have been on its way
		p = next(t, reports)
	}
	if p.Streak != 1 || !p.Accepts || p.Detail != "GET /status answered 500" {
		t.Errorf("%+v", p)
	}
	if p := next(t, reports); p.Good || p.Streak != 2 {
		t.Errorf("%+v", p)
	}
	status.Store(204)
	for p = next(t, reports); !p.Good; p = next(t, reports) {
	}
	if p.Streak != 1 {
		t.Errorf("%+v", p)
	}
}

func TestInstanceThatHangsIsNotGoodInTime(t *testing.T) {
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var hang atomic.Bool
	srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if hang.Load() {
			<-r.Context().Done()
		}
	})}
	go srv.Serve(l) // ends with the test
	defer srv.Close()
	reports := watch(t, Target{Port: portOf(t, l.Addr().String())})
	next(t, reports)
	hang.Store(true)
	p := next(t, reports)
	for p.Good {
		p = next(t, reports)
	}
	if !p.Accepts || p.Detail != "GET /status got no answer: none within 200ms" {
		t.Errorf("%+v", p)
	}
	srv.Close()
	for p = next(t, reports); p.Accepts; p = next(t, reports) {
	}
	if p.Good || !strings.Contains(p.Detail, "nothing listens on 127.0.0.1:") {
		t.Errorf("%+v", p)
	}
}

func TestReasonForNoAnswerIsTheTimeOnlyIfItRanOut(t *testing.T) {
	target := Target{Probe: wire.Probe{Path: "/status", Host: "tako-internal"}}
	for _, ranOut := range []bool{true, false} {
		near, far := net.Pipe()
		ctx, cancel := context.WithTimeout(t.Context(), time.Hour)
		want := "GET /status got no answer: the connection was closed"
		if ranOut {
			ctx, cancel = context.WithTimeout(t.Context(), 0)
			want = "GET /status got no answer: none within 1s"
		}
		far.Close()
		if a := target.request(ctx, near, time.Second); a.detail != want || a.rank != accepted {
			t.Errorf("ran out %v: %+v, want %q", ranOut, a, want)
		}
		near.Close()
		cancel()
	}
}

func TestEitherTransportMayAnswerFirst(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	srv := &http.Server{Handler: http.NotFoundHandler()}
	go srv.Serve(l) // ends with the test
	defer srv.Close()
	tcp := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {}))
	defer tcp.Close()
	if p := next(t, watch(t, Target{Socket: path, Port: portOf(t, tcp.Listener.Addr().String())})); !p.Good || p.Via != wire.TransportTCP {
		t.Errorf("the socket answers 404, the port 200: %+v", p)
	}
	connect := wire.Probe{Kind: wire.ProbeConnect}
	if p := next(t, watch(t, Target{Socket: path, Port: 1, Probe: connect})); !p.Good || p.Via != wire.TransportUnix {
		t.Errorf("a connect probe of the socket: %+v", p)
	}
}

func TestInstanceThatIsNotReadyInTimeIsReportedOnceAndStillWatched(t *testing.T) {
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	port := portOf(t, l.Addr().String())
	l.Close()
	reports := watch(t, Target{Port: port, ReadyWithin: 50 * time.Millisecond})
	if p := next(t, reports); p.Good || p.Streak != 1 || p.Accepts || p.AfterMS < 50 {
		t.Errorf("%+v", p)
	}
	if l, err = net.Listen("tcp4", fmt.Sprintf("127.0.0.1:%d", port)); err != nil {
		t.Skipf("the port was taken meanwhile: %v", err)
	}
	srv := &http.Server{Handler: http.HandlerFunc(func(http.ResponseWriter, *http.Request) {})}
	go srv.Serve(l) // ends with the test
	defer srv.Close()
	if p := next(t, reports); !p.Good || p.Streak != 1 {
		t.Errorf("%+v", p)
	}
}

func TestDialRefusesAStrangersListener(t *testing.T) {
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	port := portOf(t, l.Addr().String())
	me := uint32(os.Getuid()) // a user is 32 bits
	_, err = Dial(context.Background(), port, me+1)
	stranger, ok := errors.AsType[*StrangerError](err)
	if !ok || stranger.UID != me || stranger.Port != port {
		t.Errorf("got %v", err)
	}
	if err := ownedBy(port, me); err != nil {
		t.Errorf("our own: %v", err)
	}
	conn, err := Dial(context.Background(), port, 0)
	if err != nil {
		t.Fatal(err)
	}
	conn.Close()
}

func TestBothWaysToFindListenersAgree(t *testing.T) {
	for _, addr := range []string{"127.0.0.1:0", "0.0.0.0:0", "[::1]:0"} {
		l, err := net.Listen("tcp", addr)
		if err != nil {
			t.Logf("%s: %v", addr, err)
			continue
		}
		defer l.Close()
		want := netip.MustParseAddrPort(l.Addr().String())
		proc, err := procListeners("/proc/net", want.Port())
		if err != nil || len(proc) != 1 || proc[0].addr.Port() != want.Port() || addr[0] != '0' && proc[0].addr != want {
			t.Errorf("%s: /proc has %+v, %v", want, proc, err)
			continue
		}
		diag, err := diagListeners(want.Port())
		if err != nil {
			t.Logf("no sock_diag here: %v", err)
		} else if len(diag) != 1 || diag[0] != proc[0] {
			t.Errorf("%s: sock_diag has %+v, /proc %+v", want, diag, proc)
		}
	}
}

func FuzzProcTable(f *testing.F) {
	f.Add("  sl\n   0: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000  1000        0 12345 1\n", uint16(8080))
	f.Fuzz(func(t *testing.T, text string, port uint16) {
		ls, err := parseProc(strings.NewReader(text), nil, port)
		for _, l := range ls {
			if err == nil && port != 0 && l.addr.Port() != port {
				t.Errorf("%q: %v", text, l)
			}
		}
	})
}

func FuzzDiag(f *testing.F) {
	f.Add(make([]byte, diagMsgSize))
	f.Fuzz(func(t *testing.T, b []byte) { parseDiag(b) })
}

func TestAliveAsksNothingAndIsGoodTwice(t *testing.T) {
	target := Target{Started: time.Now(), Probe: wire.Probe{Kind: wire.ProbeAlive}}
	if err := target.Check(); err != nil {
		t.Fatalf("without socket and port: %v", err)
	}
	var got []int
	Watch(t.Context(), target, func(p wire.Probed) {
		if !p.Good || p.Via != "" {
			t.Errorf("%+v, want good and no transport", p)
		}
		got = append(got, p.Streak)
	})
	if !slices.Equal(got, []int{1, 2}) {
		t.Errorf("streaks %v, want 1 and 2", got)
	}
}
