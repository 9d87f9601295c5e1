package main

import (
	"bytes"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"slices"
	"strings"
	"testing"
	"time"
)

func TestAnswerIsHeldToWhatTheAppSays(t *testing.T) {
	right := response("text/plain", body[:smallBody])
	wrong := bytes.Clone(right)
	wrong[len(wrong)-7] ^= 1
	for _, test := range []struct {
		name, fault string
		text        []byte
	}{
		{"right", "", right},
		{"lower case", "", bytes.Replace(right, []byte("Content-Length"), []byte("content-length"), 1)},
		{"one wrong byte", "a wrong body", wrong},
		{"another status", "HTTP/1.1 502", bytes.Replace(right, []byte("200 OK"), []byte("502 No"), 1)},
		{"another length", "a body of 1025 bytes, want 1024", bytes.Replace(right, []byte("1024"), []byte("1025"), 1)},
		{"no length", "without a length", bytes.Replace(right, []byte("Content-Length"), []byte("X-Length"), 1)},
		{"more behind it", "bytes after the response", append(bytes.Clone(right), 'x')},
		{"no end of the head", "a head without end", bytes.Repeat([]byte("x"), maxHead+1)},
	} {
		// Cut at every place, the verdict is the same.
		for cut := range test.text {
			var a answer
			a.reset(smallBody)
			done, err := a.feed(test.text[:cut])
			if err == nil {
				if done && test.fault == "" {
					t.Fatalf("%s: done after %d of %d bytes", test.name, cut, len(test.text))
				}
				done, err = a.feed(test.text[cut:])
			}
			if test.fault == "" && (err != nil || !done) || test.fault != "" && (err == nil || !strings.Contains(err.Error(), test.fault)) {
				t.Fatalf("%s, cut at %d: done %v, %v; want the fault %q", test.name, cut, done, err, test.fault)
			}
		}
	}
}

// site answers as the app does, but for its body where it is told to be wrong.
func site(t *testing.T, wrong bool) *httptest.Server {
	t.Helper()
	text := bytes.Clone(body[:smallBody])
	if wrong {
		text[9]++
	}
	s := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/big" {
			w.Header().Set("Content-Length", fmt.Sprint(largeBody))
			w.Write(body[:largeBody])
			return
		}
		w.Write(text)
	}))
	s.EnableHTTP2 = true
	t.Cleanup(s.Close)
	return s
}

// tryLoad runs a load to its end, as bench does.
func tryLoad(t *testing.T, s *httptest.Server, args ...string) (said string, err error) {
	t.Helper()
	for _, long := range []string{"50ms", "1s", "10s"} { // a busy machine may answer nothing in that time
		var out bytes.Buffer
		all := append([]string{"-addr", s.Listener.Addr().String(), "-host", "localhost", "-for", long, "-conns", "3"}, args...)
		err = runLoad(all, strings.NewReader("go\n"), &out)
		if said = out.String(); err != nil || !strings.Contains(said, `"n":0,"errors":0`) {
			break
		}
	}
	return said, err
}

func TestLoadsCountWhatIsRightAndWhatIsWrong(t *testing.T) {
	for name, args := range map[string][]string{
		"h1": nil, "h1-tls": {"-tls"}, "big": {"-path", "/big"}, "big-tls": {"-path", "/big", "-tls"}, "hosts": {"-hosts", "100"},
		"h2": {"-kind", "h2", "-streams", "4"}, "handshake": {"-kind", "handshake", "-tls"}, "resume": {"-kind", "handshake", "-tls", "-resume"},
	} {
		for _, wrong := range []bool{false, true} {
			if wrong && strings.HasPrefix(name, "big") {
				continue
			}
			t.Run(fmt.Sprintf("%s wrong=%v", name, wrong), func(t *testing.T) {
				s := site(t, wrong)
				if slices.Contains(args, "-tls") || name == "h2" {
					s.StartTLS()
				} else {
					s.Start()
				}
				said, err := tryLoad(t, s, args...)
				if wrong {
					if err == nil && (!strings.Contains(said, `"n":0,`) || !strings.Contains(said, "a wrong body")) {
						t.Errorf("a wrong body passed: %s", said)
					}
					return
				}
				if err != nil || !strings.HasPrefix(said, "ready\n") || strings.Contains(said, `"n":0,`) || !strings.Contains(said, `"errors":0`) {
					t.Errorf("it said %q, %v", said, err)
				}
			})
		}
	}
}

func TestLoadAsksOnlyThisHost(t *testing.T) {
	for _, addr := range []string{"192.0.2.1:80", "example.com:80", "127.0.0.1"} {
		if err := runLoad([]string{"-addr", addr}, strings.NewReader(""), io.Discard); err == nil || !strings.Contains(err.Error(), "loopback") {
			t.Errorf("%s: %v", addr, err)
		}
	}
}

func TestRatiosAreOfOneRoundAndTheirMedianCounts(t *testing.T) {
	o, err := parse([]string{"--targets", "nginx,tako", "--workloads", "h1,idle", "--views", "cpu"})
	if err != nil {
		t.Fatal(err)
	}
	var rows []row
	for round, cpu := range [][2]float64{{10, 11}, {20, 30}, {40, 80}} {
		for i, target := range o.targets {
			rows = append(rows, row{View: cpuView, Workload: "h1", Target: target, Round: round, CPU: cpu[i], result: result{N: 5}})
		}
	}
	for i, target := range o.targets {
		rows = append(rows, row{View: memView, Workload: "idle", Target: target, Conn: float64(5 + 6*i)})
	}
	var out bytes.Buffer
	failed, missed := report(&out, o, rows)
	for _, want := range []string{"| 1.00 (1.00–1.00) | 1.50 (1.10–2.00) | ≤ 1.10 | ≤ 0.95 |", "| KiB for an idle connection | 5.0 | 11.0 | ≤ 10 |"} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("no %q in\n%s", want, out.String())
		}
	}
	if len(failed) != 0 || !slices.Equal(missed, []string{"cpu h1: 1.50, to reach 1.10", "idle: 11.0 KiB, to reach 10"}) {
		t.Errorf("failed %q, missed %q", failed, missed)
	}

	rows[3].Errors = 1 // tako's second round
	out.Reset()
	if failed, _ = report(&out, o, rows); !slices.Equal(failed, []string{"cpu h1 tako"}) || !strings.Contains(out.String(), "| FAILED |") {
		t.Errorf("one wrong answer: failed %q\n%s", failed, out.String())
	}
}

func TestEverySecondRoundIsReversed(t *testing.T) {
	titles := []string{"a", "b", "c"}
	if got := order(0, titles); !slices.Equal(got, titles) {
		t.Errorf("round 0: %q", got)
	}
	if got := order(1, titles); !slices.Equal(got, []string{"c", "b", "a"}) || titles[0] != "a" {
		t.Errorf("round 1: %q of %q", got, titles)
	}
}

func TestBadFlagsAreAllNamed(t *testing.T) {
	_, err := parse([]string{"--targets", "apache,tako,tako", "--workloads", "h9", "--views", "x", "--rounds", "0", "--seconds", "1e9", "--hosts", "0", "--conns", "99999", "--in-flight", "-1"})
	for _, want := range []string{`"apache"`, `"tako" is none`, `"h9"`, `"x"`, "--rounds: 0", "--seconds: 1e+09", "--hosts: 0", "--conns: 99999", "--in-flight: -1"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("no %s in %v", want, err)
		}
	}
}

func TestQuickIsOverriddenByWhatIsGiven(t *testing.T) {
	o, err := parse([]string{"--quick", "--rounds", "5"})
	if err != nil || o.rounds != 5 || o.each != time.Second || !slices.Equal(o.targets, []string{"nginx", "tako"}) {
		t.Errorf("%+v, %v", o, err)
	}
}

func TestCostOfThisProcessIsSeen(t *testing.T) {
	me := []int{os.Getpid()}
	before, err := spent(me)
	if err != nil {
		t.Fatal(err)
	}
	for end := time.Now().Add(takesAWhile); ; { // until the kernel has counted something
		if after, err := spent(me); err != nil || after.minus(before).user > 0.05 {
			if err != nil {
				t.Fatal(err)
			}
			break
		}
		if time.Now().After(end) {
			t.Fatalf("no processor time was counted in %s", takesAWhile)
		}
	}
	if kib, err := memory(me); err != nil || kib < 100 {
		t.Errorf("memory %d KiB, %v", kib, err)
	}
	if all := family(me[0]); !slices.Contains(all, me[0]) {
		t.Errorf("%v is not with its children", all)
	}
	on, err := cpus()
	if err != nil || len(on) == 0 {
		t.Errorf("processors %v, %v", on, err)
	}
}

const takesAWhile = 30 * time.Second
