package supervise

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"tako/internal/ipc"
	"tako/internal/logging"
	"tako/internal/sandbox"
)

// The test binary started by Start does what its first argument says.
func TestMain(m *testing.M) {
	if os.Args[0] == "tako-test" {
		child()
	}
	goleak.VerifyTestMain(m)
}

// noSleep keeps the race detector from waiting a second at each exit.
const noSleep = "GORACE=atexit_sleep_ms=0"

func child() {
	if err := sandbox.Enter("tako-test", false); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	ch, err := ipc.Open(3)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	comm, _ := os.ReadFile("/proc/self/comm")
	null, _ := os.Readlink("/proc/self/fd/0")
	var open []int
	for fd := range 64 {
		if l, err := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", fd)); err == nil && (strings.HasPrefix(l, "pipe:") || strings.HasPrefix(l, "socket:")) {
			open = append(open, fd)
		}
	}
	dir, _ := os.Getwd()
	body, _ := json.Marshal(report{Args: os.Args, Env: os.Environ(), Name: strings.TrimSpace(string(comm)), Stdin: null, Dir: dir, UID: os.Getuid(), PGID: unix.Getpgrp(), Open: open})
	if err := ch.Send(ipc.Record{Kind: 1, Body: body}); err != nil {
		os.Exit(1)
	}
	log, _ := logging.Child("tako-test", "info")
	log.Info("hello", "n", 1)
	switch os.Args[len(os.Args)-1] {
	case "exit":
		os.Exit(3)
	case "panic":
		panic("boom")
	}
	_, _ = ch.Receive() // until the master has gone
	os.Exit(0)
}

type report struct {
	Args, Env        []string
	Name, Stdin, Dir string
	UID, PGID        int
	Open             []int
}

// lines is a log that a test can wait on and read.
type lines struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (l *lines) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.Write(b)
}

func (l *lines) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.String()
}

func start(t testing.TB, log hclog.Logger, id *sandbox.Identity, args ...string) (*Child, report) {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(exe)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	c, err := Start(Spec{Role: "tako-test", Program: int(f.Fd()), Args: args, Env: []string{"A=1", "TZ=UTC", noSleep}, Identity: id}, log)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	r, err := c.Channel.Receive()
	if err != nil {
		t.Fatalf("the child says nothing: %v", err)
	}
	var rep report
	if err := json.Unmarshal(r.Body, &rep); err != nil {
		t.Fatal(err)
	}
	return c, rep
}

func ends(t testing.TB, c *Child) Exit {
	t.Helper()
	select {
	case <-c.Done():
		return c.Exit()
	case <-time.After(30 * time.Second):
		t.Fatal("the child does not end")
		return Exit{}
	}
}

func TestChildGetsItsChannelAndNothingElse(t *testing.T) {
	t.Setenv("TAKO_SECRET", "x")
	t.Setenv("NOTIFY_SOCKET", "/x")
	t.Setenv("LISTEN_FDS", "1")
	t.Setenv("PATH", "/usr/bin:/bin")
	t.Setenv("LANG", "C")
	t.Setenv("TZ", "Asia/Tokyo")
	var out lines
	log, err := logging.New(&out, "tako-master", "info", "json")
	if err != nil {
		t.Fatal(err)
	}
	c, rep := start(t, log, nil, "-log-level", "info")
	raw, err := c.output.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	if err := raw.Control(func(fd uintptr) {
		if room, err := unix.FcntlInt(fd, unix.F_GETPIPE_SZ, 0); err != nil || room != OutputRoom && os.Geteuid() == 0 {
			t.Errorf("room for %d bytes of log, want %d: %v", room, OutputRoom, err)
		}
	}); err != nil {
		t.Error(err)
	}
	if want := []string{"A=1", "TZ=UTC", noSleep, "PATH=/usr/bin:/bin", "LANG=C"}; !slices.Equal(rep.Env, want) {
		t.Errorf("environment %q, want %q", rep.Env, want)
	}
	if want := []string{"tako-test", "-log-level", "info"}; !slices.Equal(rep.Args, want) {
		t.Errorf("arguments %q, want %q", rep.Args, want)
	}
	if rep.Name != "tako-test" || rep.Stdin != "/dev/null" || rep.Dir != "/" || rep.PGID != c.PID {
		t.Errorf("got %+v, pid %d", rep, c.PID)
	}
	// The channel's descriptor 3 is another number once it is open.
	if len(rep.Open) != 3 || rep.Open[0] != 1 || rep.Open[1] != 2 {
		t.Errorf("pipes and sockets %v, want 1, 2 and the channel", rep.Open)
	}
	if err := c.Channel.Close(); err != nil {
		t.Fatal(err)
	}
	if e := ends(t, c); e != (Exit{}) {
		t.Errorf("ended with %s, want exit status 0", e)
	}
	if err := c.Close(); err != nil && !errors.Is(err, os.ErrClosed) && !strings.Contains(err.Error(), "closed") {
		t.Error(err)
	}
	if s := out.String(); !strings.Contains(s, `"@module":"tako-test"`) || !strings.Contains(s, `"@message":"hello"`) {
		t.Errorf("log %s, want the child's line", s)
	}
}

func TestChildTakesOnItsIdentity(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("to become another user needs root")
	}
	_, rep := start(t, hclog.NewNullLogger(), &sandbox.Identity{UID: 70011, GID: 70011}, "-x")
	if rep.UID != 70011 || rep.Name != "tako-test" || !slices.Equal(rep.Args, []string{"tako-test", "-x"}) {
		t.Errorf("got %+v", rep)
	}
}

func TestEndOfAChildIsTold(t *testing.T) {
	for _, c := range []struct {
		act  string
		end  func(*Child) error
		want string
	}{
		{"exit", nil, "exit status 3"},
		{"panic", nil, "exit status 2"},
		{"wait", (*Child).Kill, "SIGKILL"},
		{"wait", (*Child).Terminate, "SIGTERM"},
	} {
		var out lines
		log, err := logging.New(&out, "tako-master", "info", "json")
		if err != nil {
			t.Fatal(err)
		}
		child, _ := start(t, log, nil, c.act)
		if c.end != nil {
			if err := c.end(child); err != nil {
				t.Fatal(err)
			}
		}
		if e := ends(t, child); e.String() != c.want {
			t.Errorf("%s: %s, want %s", c.act, e, c.want)
		}
		if err := child.Kill(); !errors.Is(err, os.ErrProcessDone) {
			t.Errorf("%s: Kill after the end: %v, want ErrProcessDone", c.act, err)
		}
		if err := child.Close(); err != nil {
			t.Errorf("%s: %v", c.act, err)
		}
		if err := child.Kill(); !errors.Is(err, os.ErrProcessDone) {
			t.Errorf("%s: Kill after Close: %v, want ErrProcessDone", c.act, err)
		}
		if _, err := child.PIDFD(); !errors.Is(err, os.ErrProcessDone) {
			t.Errorf("%s: PIDFD after Close: %v", c.act, err)
		}
		if c.act == "panic" && !strings.Contains(out.String(), `panic: boom\n`) {
			t.Errorf("log %s, want the panic", out.String())
		}
	}
}

func TestCloseKillsAndLeavesNoDescriptor(t *testing.T) {
	c, _ := start(t, hclog.NewNullLogger(), nil) // the runtime opens some of its own once
	_ = c.Close()
	before := countFDs(t)
	for range 5 {
		c, _ := start(t, hclog.NewNullLogger(), nil)
		fd, err := c.PIDFD()
		if err != nil {
			t.Fatal(err)
		}
		if err := c.Close(); err != nil {
			t.Fatal(err)
		}
		if e := c.Exit(); e.Signal != syscall.SIGKILL {
			t.Errorf("ended with %s", e)
		}
		if err := Signal(fd, 0); !errors.Is(err, os.ErrProcessDone) {
			t.Errorf("signal to a process that ended: %v", err)
		}
		ipc.FD(fd).Close()
		_ = c.Close()
	}
	if after := countFDs(t); after != before {
		t.Errorf("%d descriptors, %d before", after, before)
	}
}

func TestStartThatFailsLeavesNothing(t *testing.T) {
	text, err := os.Open("supervise_test.go")
	if err != nil {
		t.Fatal(err)
	}
	defer text.Close()
	before := countFDs(t)
	for _, program := range []int{-1, 9999, int(text.Fd())} {
		if c, err := Start(Spec{Role: "tako-test", Program: program}, hclog.NewNullLogger()); err == nil {
			_ = c.Close()
			t.Errorf("program %d was started", program)
		} else if !strings.HasPrefix(err.Error(), "start tako-test: ") {
			t.Errorf("program %d: %v", program, err)
		}
	}
	if after := countFDs(t); after != before {
		t.Errorf("%d descriptors, %d before", after, before)
	}
}

func TestProgramMayHaveAnyNumber(t *testing.T) {
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(exe)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for least := range 24 { // around the numbers that the child's own take
		fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, least)
		if err != nil {
			t.Fatal(err)
		}
		c, err := Start(Spec{Role: "tako-test", Program: fd, Args: []string{"exit"}, Env: []string{noSleep}}, hclog.NewNullLogger())
		ipc.FD(fd).Close()
		if err != nil {
			t.Fatalf("descriptor %d: %v", fd, err)
		}
		if e := ends(t, c); e.Code != 3 {
			t.Errorf("descriptor %d: %s", fd, e)
		}
		_ = c.Close()
	}
}

func TestSignalsRefuseWhatIsNotOneProcess(t *testing.T) {
	for _, pgid := range []int{1, 0, -1, -2, unix.Getpgrp()} {
		if err := SignalGroup(pgid, 0); err == nil || !strings.Contains(err.Error(), "not a group to signal") {
			t.Errorf("SignalGroup(%d): %v", pgid, err)
		}
	}
	for _, pid := range []int{1, 0, -1, -7} {
		if fd, err := OpenPID(pid); err == nil {
			ipc.FD(fd).Close()
			t.Errorf("OpenPID(%d) works", pid)
		}
	}
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	defer w.Close()
	for _, fd := range []int{-1, int(r.Fd())} {
		if err := Signal(fd, 0); err == nil || errors.Is(err, os.ErrProcessDone) {
			t.Errorf("Signal(%d): %v", fd, err)
		}
	}
}

func TestSignalGroupReachesTheGroup(t *testing.T) {
	c, _ := start(t, hclog.NewNullLogger(), nil)
	fd, err := OpenPID(c.PID)
	if err != nil {
		t.Fatal(err)
	}
	defer ipc.FD(fd).Close()
	if err := SignalGroup(c.PID, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if e := ends(t, c); e.Signal != syscall.SIGKILL {
		t.Errorf("ended with %s", e)
	}
	if err := Signal(fd, syscall.SIGTERM); !errors.Is(err, os.ErrProcessDone) {
		t.Errorf("a pidfd of a process that ended: %v", err)
	}
	if _, err := c.Channel.Receive(); !errors.Is(err, io.EOF) {
		t.Errorf("channel of a child that ended: %v, want EOF", err)
	}
}

func countFDs(t testing.TB) int {
	t.Helper()
	d, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(d)
}
