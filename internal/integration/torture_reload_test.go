package integration

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"tako/internal/takotest"
)

// ways are how visitors come, each a row of its own.
var ways = []struct {
	name string
	way  takotest.Way
}{
	{"a new connection per request", takotest.Way{Protocol: takotest.HTTP1}},
	{"kept connections", takotest.Way{Protocol: takotest.HTTP1, Kept: true}},
	{"TLS, a new connection per request", takotest.Way{Protocol: takotest.TLS1}},
	{"TLS, a new connection per request, sessions resumed", takotest.Way{Protocol: takotest.TLS1, Resume: true}},
	{"TLS, kept connections", takotest.Way{Protocol: takotest.TLS1, Kept: true, Resume: true}},
	{"HTTP/2, 8 streams per connection", takotest.Way{Protocol: takotest.H2, Streams: 8, Resume: true}},
}

// TestNoReloadLosesARequest reloads under visitors who come in each way: all at
// once in the short form, one after another in the long one.
func TestNoReloadLosesARequest(t *testing.T) {
	t.Parallel()
	if !soaking() {
		var mixed []takotest.Way
		for _, w := range ways {
			mixed = append(mixed, w.way)
		}
		reloadsUnder(t, 4, "visitors of every kind", mixed...)
		return
	}
	for _, w := range ways {
		t.Run(w.name, func(t *testing.T) { reloadsUnder(t, 50, w.name, w.way) })
	}
}

func reloadsUnder(t *testing.T, reloads int, name string, ways ...takotest.Way) {
	s, l := blogUnder(t, tortured(ways...))
	before, pids := known(t, s), instancePIDs(t, s, "blog")
	var worst time.Duration
	for i := range reloads {
		began := time.Now()
		good(t, s, fmt.Sprintf("reload %d", i+1))
		worst = max(worst, time.Since(began))
	}
	r := l.Stop()
	more := fmt.Sprintf("the longest reload took %s", worst.Round(time.Millisecond))
	if r.Full+r.Resumed > 0 {
		more += fmt.Sprintf(", %d TLS handshakes, %d of them resumed", r.Full+r.Resumed, r.Resumed)
	}
	noFailures(t, fmt.Sprintf("%d reloads, %s", reloads, name), l, more)
	// Every client's first connection has no session to resume; all the others do,
	// but where clients that share connections open two at once.
	if w := ways[0]; len(ways) == 1 && w.Resume && w.Streams == 0 && r.Full > 64 {
		t.Errorf("%d full handshakes by 64 clients that resume their sessions", r.Full)
	}
	after := settled(t, s)
	if after.PID != before.PID || after.Reload.Count != uint64(reloads) {
		t.Errorf("pid %d and %d reloads, want %d and %d", after.PID, after.Reload.Count, before.PID, reloads)
	}
	for _, p := range after.Processes {
		if p.Role != "tako-master" && p.Generation < uint64(reloads) {
			t.Errorf("%s is of the old image: pid %d, generation %d", p.Role, p.PID, p.Generation)
		}
	}
	if now := instancePIDs(t, s, "blog"); !slices.Equal(now, pids) {
		t.Errorf("instances %v, before %v", now, pids)
	}
	// The next deploy finds a server like any other.
	lay(t, s, "blog", "2", quick(nil))
	if _, err := ask(s, "blog", "2", nil); err != nil {
		t.Errorf("deploy after the reloads: %v", err)
	}
}

// TestReloadsInQuickSuccessionLoseNothing: wishes that come while one is under way
// are one.
func TestReloadsInQuickSuccessionLoseNothing(t *testing.T) {
	t.Parallel()
	s, l := blogUnder(t, tortured())
	wishes := long(20, 6)
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	for sent := 0; sent < wishes; <-tick.C {
		if s.Signal(s.PID(), syscall.SIGHUP) == nil { // not in the middle of an exec
			sent++
		}
	}
	good(t, s, "one more")
	info := settled(t, s)
	noFailures(t, fmt.Sprintf("%d reloads at 10 per second", wishes), l, fmt.Sprintf("%d were done, the others were the same wish", info.Reload.Count-1))
	if info.Reload.Failed > 0 {
		t.Errorf("%d reloads failed: %s", info.Reload.Failed, info.Reload.LastError)
	}
}

// installAll installs the programs of a folder.
func installAll(t *testing.T, s *takotest.Server, dir string) {
	t.Helper()
	for _, name := range takotest.Programs {
		install(t, s, name, filepath.Join(dir, name))
	}
}

// runs holds a process to running the program that is installed.
func runs(t *testing.T, s *takotest.Server, role string, pid int) {
	t.Helper()
	image, err := os.Stat(fmt.Sprintf("/proc/%d/exe", pid))
	if errors.Is(err, fs.ErrPermission) {
		t.Logf("whether %s runs the installed program may only root see", role)
		return
	}
	if err != nil {
		t.Errorf("image of %s: %v", role, err)
		return
	}
	installed, err := os.Stat(s.Program(role))
	if err != nil {
		t.Fatal(err)
	}
	if !os.SameFile(image, installed) {
		to, _ := os.Readlink(fmt.Sprintf("/proc/%d/exe", pid))
		t.Errorf("%s, pid %d, runs %s and not the installed program", role, pid, to)
	}
}

// TestReloadIntoAnotherVersionAndBack installs programs of another version, and
// then those of before again.
func TestReloadIntoAnotherVersionAndBack(t *testing.T) {
	t.Parallel()
	const version = "1000.0.1"
	next, err := takotest.BuildVersion(version)
	if err != nil {
		t.Fatal(err)
	}
	first, err := takotest.Build()
	if err != nil {
		t.Fatal(err)
	}
	s, l := blogUnder(t, tortured())
	before := known(t, s)
	seen := map[int]bool{}
	for _, step := range []struct{ dir, version string }{{next, version}, {first, before.Version}} {
		installAll(t, s, step.dir)
		good(t, s, "reload into "+step.version)
		info := settled(t, s)
		if info.Version != step.version || info.PID != before.PID {
			t.Errorf("version %s, pid %d; want %s and %d", info.Version, info.PID, step.version, before.PID)
		}
		for _, p := range info.Processes {
			if runs(t, s, p.Role, p.PID); p.Role != "tako-master" && seen[p.PID] {
				t.Errorf("%s %d is of the version before", p.Role, p.PID)
			}
			seen[p.PID] = true
		}
	}
	noFailures(t, "a reload into another version, and back", l, "same PID, all three programs were the installed ones each time")
}

// stopped waits until every thread of a process stands still.
func stopped(t *testing.T, pid int) {
	t.Helper()
	until(t, 10*time.Second, "a stopped process", func() bool {
		stats, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/stat", pid))
		if err != nil || len(stats) == 0 {
			t.Fatalf("threads of %d: %v", pid, err)
		}
		for _, name := range stats {
			b, err := os.ReadFile(name)
			if err == nil && !strings.HasPrefix(string(b[strings.LastIndexByte(string(b), ')')+1:]), " T") {
				return false
			}
		}
		return true
	})
}

// TestWaitingConnectionsAreServedAfterAReload stops the proxy while visitors
// connect: their connections wait, accepted by nobody, for the next one.
func TestWaitingConnectionsAreServedAfterAReload(t *testing.T) {
	t.Parallel()
	const waiting = 200
	s := start(t, takotest.Options{})
	deploy(t, s, "blog", "1", quick(nil))
	old := serving(t, s, "tako-proxy", 0)
	if err := s.Signal(old, syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	stopped(t, old)
	conns := make([]net.Conn, waiting)
	for i := range conns {
		c, err := net.Dial("tcp", net.JoinHostPort("127.0.0.1", strconv.Itoa(s.HTTP)))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		if _, err := io.WriteString(c, "GET / HTTP/1.1\r\nHost: blog.localhost\r\nConnection: close\r\n\r\n"); err != nil {
			t.Fatal(err)
		}
		conns[i] = c
	}
	good(t, s, "the reload")
	failed := 0
	for i, c := range conns {
		if err := answered(c); err != nil {
			if failed++; failed < 5 {
				t.Errorf("connection %d: %v", i, err)
			}
		}
	}
	row(t, "200 connections waiting unaccepted across a reload", waiting, failed, "none was reset")
	// The old one wakes up, finds itself replaced and leaves; or it was missed in
	// its heartbeat.
	_ = s.Signal(old, syscall.SIGCONT)
	gone(t, old)
}

// answered reads an answer, which must be a good one.
func answered(c net.Conn) error {
	if err := c.SetReadDeadline(time.Now().Add(20 * time.Second)); err != nil {
		return err
	}
	res, err := http.ReadResponse(bufio.NewReader(c), nil)
	if err != nil {
		return err
	}
	defer res.Body.Close()
	if _, err := io.Copy(io.Discard, res.Body); err != nil {
		return err
	}
	if res.StatusCode != http.StatusOK {
		return errors.New(res.Status)
	}
	return nil
}

// TestManagementSocketIsThereThroughReloads: whoever connects is connected, and
// whoever asks is answered, at any moment of a reload.
func TestManagementSocketIsThereThroughReloads(t *testing.T) {
	t.Parallel()
	s := start(t, takotest.Options{})
	deploy(t, s, "blog", "1", quick(nil))
	var mu sync.Mutex
	asked, refused := 0, []string(nil)
	var asking sync.WaitGroup
	stop := make(chan struct{})
	finish := sync.OnceFunc(func() { close(stop); asking.Wait() })
	defer finish()
	for range long(16, 4) {
		asking.Go(func() {
			for {
				select {
				case <-stop:
					return
				case <-time.After(time.Millisecond):
				}
				_, err := s.Ask("list", nil)
				mu.Lock()
				if asked++; err != nil {
					refused = append(refused, err.Error())
				}
				mu.Unlock()
			}
		})
	}
	reloads := long(50, 5)
	var took []time.Duration
	for i := range reloads {
		began := time.Now()
		good(t, s, fmt.Sprintf("reload %d", i+1))
		took = append(took, time.Since(began))
	}
	finish()
	slices.Sort(took)
	row(t, fmt.Sprintf("commands asked through %d reloads", reloads), asked, len(refused), fmt.Sprintf("a reload took %s, at most %s", took[reloads/2].Round(time.Millisecond), took[reloads-1].Round(time.Millisecond)))
	for _, text := range refused[:min(len(refused), 5)] {
		t.Error(text)
	}
}

// TestReloadTakesLessThanHalfASecond, with nothing to wait for.
func TestReloadTakesLessThanHalfASecond(t *testing.T) {
	t.Parallel()
	s := start(t, takotest.Options{})
	deploy(t, s, "blog", "1", quick(nil))
	reloads := long(20, 2)
	var took []time.Duration
	for i := range reloads {
		began := time.Now()
		good(t, s, fmt.Sprintf("reload %d", i+1))
		took = append(took, time.Since(began))
		settled(t, s)
	}
	slices.Sort(took)
	// A reload is six starts of programs.
	start := programStart(t, s)
	row(t, fmt.Sprintf("%d reloads of an idle server", reloads), 0, 0, fmt.Sprintf("took %s, at most %s; to start a program took %s",
		took[reloads/2].Round(time.Millisecond), took[reloads-1].Round(time.Millisecond), start.Round(time.Millisecond)))
	if limit := 500*time.Millisecond + 6*start; soaking() && took[reloads/2] > limit {
		t.Errorf("half of the reloads took %s or longer, more than %s", took[reloads/2], limit)
	}
}
