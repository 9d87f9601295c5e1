package agent

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"
	"golang.org/x/sys/unix"

	"tako/internal/agent/launch"
	"tako/internal/archive"
	"tako/internal/ipc"
	"tako/internal/tako"
	"tako/internal/wire"
)

// patience is how long a test waits for what must come.
const patience = 20 * time.Second

// A rig is an agent in this process and the master's end of its channel.
type rig struct {
	tb    testing.TB
	conn  *wire.Conn
	calls *wire.Calls
	msgs  chan wire.Message
	ended chan error
	dir   string // open to every user
	prog  string // the test app, open to every user
}

var unprivileged = wire.AgentSettings{PortMin: 1, PortMax: 65535}

func newRig(tb testing.TB, settings wire.AgentSettings) *rig {
	tb.Helper()
	r, theirs := prepare(tb)
	ch, err := ipc.Open(theirs)
	must(tb, err)
	ctx, cancel := context.WithCancel(context.Background())
	go func() { r.ended <- Run(ctx, Config{Channel: ch, Version: "test"}, hclog.NewNullLogger()) }()
	tb.Cleanup(cancel)
	r.greet(settings)
	return r
}

// prepare makes everything but the agent, whose end of the channel it returns.
func prepare(tb testing.TB) (*rig, ipc.FD) {
	tb.Helper()
	dir, err := os.MkdirTemp("", "tako-agent") //nolint:usetesting // t.TempDir is closed to other users
	must(tb, err)
	must(tb, os.Chmod(dir, 0o755))
	tb.Cleanup(func() { os.RemoveAll(dir) })
	r := &rig{tb: tb, msgs: make(chan wire.Message, 1000), ended: make(chan error, 1), dir: dir, prog: filepath.Join(dir, "app")}
	exe, err := os.ReadFile("/proc/self/exe")
	must(tb, err)
	must(tb, os.WriteFile(r.prog, exe, 0o755))
	ours, theirs, err := ipc.Pair()
	must(tb, err)
	r.conn = wire.NewConn(ours, wire.LinkAgent, wire.Master)
	r.calls = wire.NewCalls(r.conn)
	received := make(chan struct{})
	go func() {
		defer close(received)
		for {
			m, err := r.conn.Receive()
			if err != nil {
				r.calls.End()
				return
			}
			if m.ID != 0 {
				r.calls.Answer(m)
				continue
			}
			r.msgs <- m
		}
	}()
	tb.Cleanup(func() {
		r.conn.Close()
		<-received
		select {
		case <-r.ended:
		case <-time.After(patience):
			tb.Error("the agent did not end")
		}
		for len(r.msgs) > 0 {
			m := <-r.msgs
			m.Discard()
		}
	})
	return r, theirs
}

func (r *rig) greet(settings wire.AgentSettings) {
	r.tb.Helper()
	must(r.tb, r.conn.Send(0, &wire.Hello{Protocol: wire.ProtocolVersion, Generation: 1}))
	want[*wire.Hello](r)
	must(r.tb, r.conn.Send(0, &settings))
	want[*wire.Ready](r)
}

func must(tb testing.TB, err error) {
	tb.Helper()
	if err != nil {
		tb.Fatal(err)
	}
}

// want waits for the next message of a type and drops others.
func want[T any](r *rig) T {
	r.tb.Helper()
	body, files := wantFiles[T](r)
	for _, f := range files {
		f.Close()
	}
	return body
}

func wantFiles[T any](r *rig) (T, []ipc.FD) {
	r.tb.Helper()
	timeout := time.After(patience)
	for {
		select {
		case m := <-r.msgs:
			if body, ok := m.Body.(T); ok {
				return body, m.Files
			}
			r.tb.Logf("passed over %T %+v", m.Body, m.Body)
			m.Discard()
		case <-timeout:
			var none T
			r.tb.Fatalf("no %T came", none)
		}
	}
}

func freePort(tb testing.TB) uint16 {
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	must(tb, err)
	defer l.Close()
	return uint16(l.Addr().(*net.TCPAddr).Port)
}

// app is a Start of the test app of this kind.
func (r *rig) app(n uint32, kind string, more ...string) *wire.Start {
	r.tb.Helper()
	id := tako.InstanceID{App: "blog", N: n}
	logs := filepath.Join(r.dir, "logs")
	must(r.tb, os.MkdirAll(logs, 0o755))
	m := &wire.Start{
		Instance: id, Port: freePort(r.tb), Socket: filepath.Join(r.dir, id.String()+".sock"),
		Probe:  wire.Probe{Kind: wire.ProbeHTTP, Path: "/status", Host: "tako-internal", IntervalMS: 50, TimeoutMS: 900},
		LogDir: logs, ReadyMS: 10_000,
	}
	m.Command = wire.Command{Dir: r.dir, Argv: append([]string{r.prog, "test-app", kind}, more...), Env: []string{
		"PATH=/usr/bin:/bin", "HOST=127.0.0.1", fmt.Sprintf("PORT=%d", m.Port), "TAKO_APP_SOCKET=" + m.Socket,
		"GORACE=atexit_sleep_ms=0", // the race detector's wait at each exit
	}}
	return m
}

func (r *rig) start(m *wire.Start) *wire.Started {
	r.tb.Helper()
	must(r.tb, r.conn.Send(0, m))
	return want[*wire.Started](r)
}

func (r *rig) logText() string {
	b, _ := os.ReadFile(filepath.Join(r.dir, "logs", launch.LogName))
	return string(b)
}

func TestInstanceComesUpOverUnixAndOverTCP(t *testing.T) {
	r := newRig(t, unprivileged)
	for i, kind := range []wire.Transport{wire.TransportUnix, wire.TransportTCP} {
		m := r.app(uint32(i+1), string(kind))
		must(t, r.conn.Send(0, m))
		started, files := wantFiles[*wire.Started](r)
		var st unix.Stat_t
		for _, f := range files {
			must(t, unix.Fstat(int(f), &st))
			f.Close()
		}
		if started.PID <= 1 {
			t.Fatalf("pid %d", started.PID)
		}
		for streak := 1; streak <= 3; streak++ {
			p := want[*wire.Probed](r)
			if !p.Good || p.Via != kind || p.Streak != streak || p.Instance != m.Instance {
				t.Fatalf("%s: probe %d: %+v", kind, streak, p)
			}
		}
		must(t, r.conn.Send(0, &wire.Stop{Instance: m.Instance, GraceMS: 5000}))
		e := want[*wire.Exited](r)
		if e.Exit != (wire.Exit{}) || !slices.Contains(e.LastLines, "asked to stop") {
			t.Fatalf("%s: %+v", kind, e)
		}
	}
}

func TestInstanceThatEndsAtOnceIsReportedWithItsExitAndLastLines(t *testing.T) {
	r := newRig(t, unprivileged)
	m := r.app(1, "crash")
	r.start(m)
	e := want[*wire.Exited](r)
	if e.Exit.Code != 3 || e.Exit.Signal != "" || !slices.Contains(e.LastLines, "about to fail") || !slices.Contains(e.LastLines, "no such table: users") {
		t.Fatalf("%+v", e)
	}
	var seen []string
	for line := range strings.SplitSeq(strings.TrimSpace(r.logText()), "\n") {
		var l struct {
			Time, Stream, Text string
			Instance           uint32
		}
		dec := json.NewDecoder(strings.NewReader(line))
		dec.DisallowUnknownFields()
		must(t, dec.Decode(&l))
		if _, err := time.Parse(time.RFC3339Nano, l.Time); err != nil || l.Instance != 1 {
			t.Errorf("log line %s", line)
		}
		if l.Stream == launch.StreamTako && l.Text != "ended with status 3" {
			t.Errorf("log line %s", line)
		}
		seen = append(seen, l.Stream+" "+l.Text)
	}
	slices.Sort(seen)
	if want := []string{"stderr no such table: users", "stdout about to fail", "tako ended with status 3"}; !slices.Equal(seen, want) {
		t.Errorf("log: got %q, want %q", seen, want)
	}
}

func TestInstanceThatDoesNotGetReadySaysWhy(t *testing.T) {
	for kind, text := range map[string]string{
		"silent":    "nothing listens on 127.0.0.1:%d or ",
		"elsewhere": "instead of 127.0.0.1:%d: use PORT and HOST",
		"404":       `GET /status answered 404: set "health" in app.json to a path that answers 200, or {"kind":"connect"}`,
	} {
		t.Run(kind, func(t *testing.T) {
			r := newRig(t, unprivileged)
			m := r.app(1, kind)
			m.ReadyMS = 700
			r.start(m)
			p := want[*wire.Probed](r)
			if strings.Contains(text, "%d") {
				text = fmt.Sprintf(text, m.Port)
			}
			if p.Good || !strings.Contains(p.Detail, text) || p.Via != "" || p.Accepts != (kind == "404") {
				t.Fatalf("got %+v, want %q", p, text)
			}
		})
	}
}

func TestHangingInstanceAcceptsAndIsNotGood(t *testing.T) {
	r := newRig(t, unprivileged)
	m := r.app(1, "hang")
	m.Probe.Kind = wire.ProbeConnect
	r.start(m)
	if p := want[*wire.Probed](r); !p.Good {
		t.Fatalf("%+v", p)
	}
}

func TestTenMebibytesBeforeListeningDoNotKeepAnInstanceFromComingUp(t *testing.T) {
	r := newRig(t, unprivileged)
	m := r.app(1, "flood")
	m.LogBytes, m.LogFiles = 1<<20, 3
	r.start(m)
	if p := want[*wire.Probed](r); !p.Good || p.Via != wire.TransportTCP {
		t.Fatalf("%+v", p)
	}
	names, err := filepath.Glob(filepath.Join(r.dir, "logs", "*"))
	must(t, err)
	if len(names) != 3 {
		t.Errorf("log files: %q, want 3", names)
	}
	for _, name := range names {
		st, err := os.Stat(name)
		must(t, err)
		if st.Size() > 1<<20 || st.Size() == 0 {
			t.Errorf("%s has %d bytes", name, st.Size())
		}
	}
}

func TestFloodingInstanceDelaysNoOtherAndCanBeStopped(t *testing.T) {
	r := newRig(t, unprivileged)
	flood := r.app(1, "endless")
	flood.LogBytes, flood.LogFiles, flood.ReadyMS = 1<<20, 2, 600_000
	r.start(flood)
	m := r.app(2, "tcp")
	m.LogDir = filepath.Join(r.dir, "other")
	must(t, os.Mkdir(m.LogDir, 0o755))
	r.start(m)
	for streak := 1; streak <= 10; streak++ {
		if p := want[*wire.Probed](r); !p.Good || p.Streak != streak || p.Instance != m.Instance {
			t.Fatalf("probe %d: %+v", streak, p)
		}
	}
	must(t, r.conn.Send(0, &wire.Stop{Instance: flood.Instance, GraceMS: 100}))
	if e := want[*wire.Exited](r); e.Instance != flood.Instance || e.Exit.Signal != "SIGKILL" || len(e.LastLines) != wire.MaxLastLines {
		t.Fatalf("%+v", e)
	}
}

func TestStopKillsTheWholeGroupAfterTheGrace(t *testing.T) {
	r := newRig(t, unprivileged)
	m := r.app(1, "stubborn")
	r.start(m)
	want[*wire.Probed](r)
	must(t, r.conn.Send(0, &wire.Stop{Instance: m.Instance, GraceMS: 600_000}))
	must(t, r.conn.Send(0, &wire.Stop{Instance: m.Instance, GraceMS: 200}))
	must(t, r.conn.Send(0, &wire.Stop{Instance: m.Instance, GraceMS: 500_000})) // the earliest holds
	e := want[*wire.Exited](r)
	if e.Exit.Signal != "SIGKILL" || e.Exit.Code != -1 {
		t.Fatalf("%+v", e)
	}
	var pid int
	for _, l := range e.LastLines {
		fmt.Sscanf(l, "grandchild %d", &pid)
	}
	waitGone(t, pid)
}

// waitGone waits until a process is no more, not even a zombie.
func waitGone(tb testing.TB, pid int) {
	tb.Helper()
	if pid <= 1 {
		tb.Fatalf("pid %d", pid)
	}
	for end := time.Now().Add(patience); ; time.Sleep(5 * time.Millisecond) {
		if _, err := os.Stat(fmt.Sprintf("/proc/%d", pid)); err != nil {
			return
		}
		if time.Now().After(end) {
			tb.Fatalf("process %d is still there", pid)
		}
	}
}

func TestStopBeforeStartedIsCarriedOut(t *testing.T) {
	r := newRig(t, unprivileged)
	m := r.app(1, "silent")
	must(t, r.conn.Send(0, m))
	must(t, r.conn.Send(0, &wire.Stop{Instance: m.Instance, GraceMS: 1}))
	must(t, r.conn.Send(0, &wire.Stop{Instance: tako.InstanceID{App: "other", N: 1}}))
	want[*wire.Started](r)
	want[*wire.Exited](r)
}

func TestWhatCannotBeStartedSaysWhy(t *testing.T) {
	r := newRig(t, unprivileged)
	must(t, os.WriteFile(filepath.Join(r.dir, "plain"), nil, 0o644))
	must(t, os.WriteFile(filepath.Join(r.dir, "garbage"), []byte{0x7f, 1, 2}, 0o755))
	for i, c := range []struct{ argv0, dir, want string }{
		{"no-such-program", r.dir, `cannot start "no-such-program": not found in PATH (/usr/bin:/bin)`},
		{"./plain", r.dir, `cannot start "./plain": not executable: chmod +x it`},
		{"./gone", r.dir, `cannot start "./gone": no such file or directory`},
		{"./garbage", r.dir, `cannot start "./garbage": execute ./garbage: exec format error`},
		{"sh", filepath.Join(r.dir, "gone"), `cannot start "sh": its folder ` + r.dir + `/gone: no such file or directory`},
	} {
		m := r.app(uint32(i+1), "")
		m.Command.Argv, m.Command.Dir = []string{c.argv0}, c.dir
		must(t, r.conn.Send(0, m))
		f := want[*wire.StartFailed](r)
		if f.Instance != m.Instance || !strings.Contains(f.Reason, c.want) {
			t.Errorf("%s: got %q, want %q", c.argv0, f.Reason, c.want)
		}
	}
}

func TestInstanceHasExactlyTheEnvironmentItWasGiven(t *testing.T) {
	t.Setenv("TAKO_TEST_LEAK", "1")
	r := newRig(t, unprivileged)
	m := r.app(1, "env")
	m.Command.Env = []string{"A=b", "SECRET=s3"}
	r.start(m)
	e := want[*wire.Exited](r)
	wantLines := []string{"cwd " + r.dir, "umask 7", "leader true", "env A=b", "env SECRET=s3", "stdin /dev/null"}
	for _, l := range wantLines {
		if !slices.Contains(e.LastLines, l) {
			t.Errorf("no line %q in %q", l, e.LastLines)
		}
	}
	for _, l := range e.LastLines {
		if strings.HasPrefix(l, "env ") && l != "env A=b" && l != "env SECRET=s3" || strings.HasPrefix(l, "fd ") && !strings.Contains(l, "/proc/") {
			t.Errorf("it has %q", l)
		}
	}
}

func TestLongLinesAreSplitAndMarked(t *testing.T) {
	r := newRig(t, unprivileged)
	r.start(r.app(1, "long"))
	want[*wire.Exited](r)
	lines := strings.Split(strings.TrimSpace(r.logText()), "\n")
	if len(lines) != 3 || !strings.HasSuffix(lines[0], `é…"}`) || !strings.Contains(lines[1], `"text":"…é`) {
		t.Fatalf("%d lines", len(lines))
	}
}

func (r *rig) do(body any, files ...ipc.FD) (wire.Message, error) {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	return r.calls.Do(ctx, body, files...)
}

func (r *rig) run(kind string, timeout time.Duration, more ...string) *wire.Run {
	m := r.app(1, kind, more...)
	return &wire.Run{App: "blog", Name: "install", Command: m.Command, TimeoutMS: int(timeout.Milliseconds()), LogDir: m.LogDir}
}

func TestStepAnswersWithItsExitAndOutput(t *testing.T) {
	r := newRig(t, unprivileged)
	m, err := r.do(r.run("crash", patience))
	must(t, err)
	ran := m.Body.(*wire.Ran)
	if ran.Exit.Code != 3 || ran.TimedOut || ran.Stdout != "about to fail\n" || ran.Stderr != "no such table: users\n" {
		t.Errorf("%+v", ran)
	}
	if !strings.Contains(r.logText(), `"instance":0,"stream":"build","text":"about to fail"`) {
		t.Errorf("log: %s", r.logText())
	}
	if _, err := r.do(r.run("flood", 0)); !errors.Is(err, wire.ErrGone) {
		t.Errorf("a step without time: %v", err)
	}
}

func TestStepThatTakesTooLongIsKilled(t *testing.T) {
	r := newRig(t, unprivileged)
	m, err := r.do(r.run("deaf", 300*time.Millisecond))
	must(t, err)
	if ran := m.Body.(*wire.Ran); !ran.TimedOut || ran.Exit.Signal != "SIGKILL" {
		t.Errorf("%+v", ran)
	}
}

func TestStepWithoutProgramIsAFault(t *testing.T) {
	r := newRig(t, unprivileged)
	run := r.run("", patience)
	run.Command.Argv = []string{"npm-that-is-not-there", "ci"}
	_, err := r.do(run)
	if e := tako.AsError(err); e == nil || e.Code != tako.CodeFailed || !strings.Contains(e.Message, "not found in PATH") {
		t.Errorf("got %v", err)
	}
}

func TestEndOfTheChannelStopsEverything(t *testing.T) {
	r := newRig(t, unprivileged)
	var pids []int
	for i := range 3 {
		pids = append(pids, r.start(r.app(uint32(i+1), "tcp")).PID)
		for want[*wire.Probed](r).Instance.N != uint32(i+1) {
		}
	}
	r.conn.Close()
	select {
	case err := <-r.ended:
		if !errors.Is(err, io.EOF) {
			t.Errorf("Run: %v", err)
		}
		r.ended <- err
	case <-time.After(patience):
		t.Fatal("Run did not return")
	}
	for _, pid := range pids {
		waitGone(t, pid)
	}
	if n := strings.Count(r.logText(), "asked to stop"); n != 3 {
		t.Errorf("%d instances were asked to stop, want 3", n)
	}
}

func TestWrongStartFailsAndHarmsNoOther(t *testing.T) {
	r := newRig(t, wire.AgentSettings{PortMin: 1000, PortMax: 65535})
	good := r.app(1, "silent")
	r.start(good)
	n := uint32(1)
	for name, change := range map[string]func(m *wire.Start){
		"port out of range": func(m *wire.Start) { m.Port = 80 },
		"relative folder":   func(m *wire.Start) { m.Command.Dir = "releases/v1" },
		"no command":        func(m *wire.Start) { m.Command.Argv = nil },
		"header in a path":  func(m *wire.Start) { m.Probe.Path = "/x\r\nA: b" },
	} {
		n++
		m := r.app(n, "silent")
		change(m)
		must(t, r.conn.Send(0, m))
		if f := want[*wire.StartFailed](r); f.Instance != m.Instance || f.Reason == "" {
			t.Errorf("%s: %+v", name, f)
		}
	}
	must(t, r.conn.Send(0, &wire.Stop{Instance: good.Instance}))
	if e := want[*wire.Exited](r); e.Instance != good.Instance {
		t.Errorf("%+v", e)
	}
}

func TestStartOfWhatRunsEndsTheChannel(t *testing.T) {
	r := newRig(t, unprivileged)
	m := r.app(1, "silent")
	r.start(m)
	must(t, r.conn.Send(0, m))
	select {
	case err := <-r.ended:
		r.ended <- err
		if !errors.Is(err, ipc.ErrProtocol) {
			t.Errorf("Run: %v", err)
		}
	case <-time.After(patience):
		t.Error("the agent goes on")
	}
}

func TestOrphansAreReaped(t *testing.T) {
	r := newRig(t, unprivileged)
	r.start(r.app(1, "orphans"))
	want[*wire.Exited](r)
	for end := time.Now().Add(patience); ; time.Sleep(5 * time.Millisecond) {
		if len(zombies(t)) == 0 {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("zombies: %q", zombies(t))
		}
	}
}

// zombies returns the ended children of this process.
func zombies(tb testing.TB) (list []string) {
	names, err := filepath.Glob("/proc/[0-9]*/stat")
	must(tb, err)
	for _, name := range names {
		b, _ := os.ReadFile(name)
		_, rest, _ := bytes.Cut(b, []byte(") "))
		if bytes.HasPrefix(rest, fmt.Appendf(nil, "Z %d ", os.Getpid())) {
			list = append(list, string(b))
		}
	}
	return list
}

func TestDialPassesAConnectionToAReadyInstance(t *testing.T) {
	r := newRig(t, unprivileged)
	ours, theirs, err := ipc.Pair()
	must(t, err)
	must(t, r.conn.Send(0, &wire.DialerSocket{}, theirs))
	theirs.Close()
	proxy := wire.NewConn(ours, wire.LinkDialing, wire.Proxy)
	defer proxy.Close()
	m := r.app(1, "tcp")
	must(t, proxy.Send(1, &wire.Dial{Instance: m.Instance}))
	answer, err := proxy.Receive()
	must(t, err)
	if f, ok := answer.Body.(*wire.Fault); !ok || f.Code != string(tako.CodeNotFound) || answer.ID != 1 {
		t.Fatalf("%+v", answer)
	}
	r.start(m)
	want[*wire.Probed](r)
	must(t, proxy.Send(2, &wire.Dial{Instance: m.Instance}))
	answer, err = proxy.Receive()
	must(t, err)
	if _, ok := answer.Body.(*wire.Dialed); !ok || len(answer.Files) != 1 {
		t.Fatalf("%+v", answer.Body)
	}
	fl, err := unix.FcntlInt(uintptr(answer.Files[0]), unix.F_GETFL, 0)
	must(t, err)
	if fl&unix.O_NONBLOCK == 0 {
		t.Error("the connection blocks")
	}
	f := answer.Files[0].File("conn")
	conn, err := net.FileConn(f)
	f.Close()
	must(t, err)
	defer conn.Close()
	must(t, conn.SetDeadline(time.Now().Add(patience)))
	io.WriteString(conn, "GET / HTTP/1.0\r\n\r\n")
	b, _ := io.ReadAll(conn)
	if !strings.HasPrefix(string(b), "HTTP/1.0 200") {
		t.Errorf("got %q", b)
	}
}

func TestTreeOfOneUserHasTheModesOfTheTable(t *testing.T) {
	r := newRig(t, unprivileged)
	app := filepath.Join(r.dir, "blog")
	must(t, os.MkdirAll(filepath.Join(app, "releases", "v1"), 0o777))
	tree := &wire.Tree{App: "blog", AppDir: app, RunDir: filepath.Join(r.dir, "sockets"), Release: "v1"}
	for range 2 {
		_, err := r.do(tree)
		must(t, err)
		for path, mode := range map[string]uint32{
			app: 0o710, app + "/releases": 0o710, app + "/releases/v1": 0o750, app + "/data": 0o700, app + "/tmp": 0o700,
			app + "/shared": 0o710, app + "/shared/logs": 0o700, tree.RunDir: 0o700,
		} {
			checkMode(t, path, mode, os.Getuid(), -1)
		}
	}
	must(t, os.RemoveAll(app+"/data"))
	must(t, os.Symlink("/", app+"/data"))
	if _, err := r.do(tree); tako.AsError(err) == nil {
		t.Error("a link in the place of a folder was taken")
	}
}

func checkMode(tb testing.TB, path string, mode uint32, uid, gid int) {
	tb.Helper()
	var st unix.Stat_t
	must(tb, unix.Lstat(path, &st))
	if st.Mode&0o7777 != mode || int(st.Uid) != uid || gid >= 0 && int(st.Gid) != gid {
		tb.Errorf("%s: mode %o of %d:%d, want %o of %d:%d", path, st.Mode&0o7777, st.Uid, st.Gid, mode, uid, gid)
	}
}

func packed(tb testing.TB, files map[string]string) *os.File {
	tb.Helper()
	dir := tb.TempDir()
	for name, text := range files {
		must(tb, os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644))
	}
	f, err := os.Create(filepath.Join(tb.TempDir(), "archive"))
	must(tb, err)
	tb.Cleanup(func() { f.Close() })
	pack(tb, f, dir)
	_, err = f.Seek(0, io.SeekStart)
	must(tb, err)
	return f
}

func pack(tb testing.TB, w io.Writer, dir string) {
	tb.Helper()
	_, err := archive.Pack(context.Background(), w, dir, archive.Options{})
	must(tb, err)
}
