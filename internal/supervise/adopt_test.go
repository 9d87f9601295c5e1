package supervise

import (
	"errors"
	"os/exec"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"
	"golang.org/x/sys/unix"

	"tako/internal/ipc"
)

// TestChildOfADeadProcessIsAdopted: its end is seen, though nobody here is its
// parent, and a descriptor of another process is refused.
func TestChildOfADeadProcessIsAdopted(t *testing.T) {
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0); err != nil { // other tests become one
		t.Fatal(err)
	}
	// The shell has gone when this returns, and its child is somebody else's.
	out, err := exec.Command("/bin/sh", "-c", "sleep 600 >/dev/null 2>&1 & echo $!").Output()
	if err != nil {
		t.Fatal(err)
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(out)))
	if err != nil {
		t.Fatal(err)
	}
	handed := func(pid int) Handed {
		fd, err := OpenPID(pid)
		if err != nil {
			t.Fatal(err)
		}
		var pipe [2]int
		if err := unix.Pipe2(pipe[:], unix.O_CLOEXEC); err != nil {
			t.Fatal(err)
		}
		ipc.FD(pipe[1]).Close()
		return Handed{Role: "tako-proxy", PID: pid, PIDFD: ipc.FD(fd), Output: ipc.FD(pipe[0]), Started: time.Now()}
	}
	ch, theirs, err := ipc.Pair()
	if err != nil {
		t.Fatal(err)
	}
	defer theirs.Close()

	wrong := handed(pid)
	wrong.PID = unix.Getppid()
	if _, err := Adopt(wrong, ch, hclog.NewNullLogger()); err == nil {
		t.Error("a descriptor of another process was taken")
	}
	wrong.PIDFD.Close()
	wrong.Output.Close()

	c, err := Adopt(handed(pid), ch, hclog.NewNullLogger())
	if err != nil {
		t.Fatal(err)
	}
	select {
	case <-c.Done():
		t.Fatal("it is said to have ended")
	case <-time.After(20 * time.Millisecond):
	}
	if err := c.Kill(); err != nil {
		t.Error(err)
	}
	if e := c.Exit(); !errors.Is(e.Err, ErrNotOurs) {
		t.Errorf("its end: %v", e)
	}
	if err := c.Close(); err != nil {
		t.Error(err)
	}
}

func TestPIDOfTellsWhatADescriptorIs(t *testing.T) {
	fd, err := OpenPID(unix.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	defer ipc.FD(fd).Close()
	if pid := PIDOf(fd); pid != unix.Getpid() {
		t.Errorf("our own: %d", pid)
	}
	if pid := PIDOf(0); pid != 0 {
		t.Errorf("standard input: %d", pid)
	}
	if AwaitEnd(fd, time.Millisecond) {
		t.Error("we have ended")
	}
}
