package handoff_test

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"tako/internal/handoff"
	"tako/internal/ipc"
)

type state struct {
	PID   int    `json:"pid"`
	Left  int    `json:"left"` // execs still to do
	Pipe  ipc.FD `json:"pipe"`
	Other ipc.FD `json:"other"` // not kept
}

// TestMain is also the program that changes images: it hands itself over a few
// times and then says what it found through the pipe it was given.
func TestMain(m *testing.M) {
	if os.Getenv("HANDOFF_TEST") == "" {
		os.Exit(m.Run())
	}
	hup := make(chan os.Signal, 1)
	signal.Notify(hup, syscall.SIGHUP)
	var st state
	resumed, err := handoff.Load(&st)
	if err == nil && resumed {
		err = handoff.Take(st.Pipe)
		if _, e := unix.FcntlInt(uintptr(st.Other), unix.F_GETFD, 0); st.Other != 0 && e == nil {
			err = fmt.Errorf("descriptor %d came along uninvited", st.Other)
		}
		if os.Getenv(handoff.Env) != "" {
			err = fmt.Errorf("the environment still names the state")
		}
	} else if err == nil {
		left, _ := strconv.Atoi(os.Getenv("HANDOFF_TEST"))
		st = state{PID: os.Getpid(), Left: left, Pipe: 3}
		unix.CloseOnExec(3)
	}
	if err == nil && st.Left > 0 {
		st.Left--
		extra, _ := unix.Open("/dev/null", unix.O_RDONLY|unix.O_CLOEXEC, 0)
		st.Other = ipc.FD(extra)
		self, _ := unix.Open("/proc/self/exe", unix.O_RDONLY|unix.O_CLOEXEC, 0)
		var fd ipc.FD
		if fd, err = handoff.Save(st); err == nil {
			err = handoff.Exec(ipc.FD(self), os.Args, fd, []ipc.FD{st.Pipe}, func() error { return nil })
		}
	}
	text := "done"
	if err != nil {
		text = err.Error()
	}
	b, _ := json.Marshal(map[string]any{"pid": st.PID, "now": os.Getpid(), "text": text})
	_, _ = unix.Write(int(st.Pipe), b)
	os.Exit(0)
}

func TestStateAndDescriptorsCrossTheExec(t *testing.T) {
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	cmd := exec.CommandContext(t.Context(), "/proc/self/exe")
	cmd.Env = append(os.Environ(), "HANDOFF_TEST=5")
	cmd.ExtraFiles = []*os.File{w}
	out, err := cmd.CombinedOutput()
	_ = w.Close()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	var said struct {
		PID, Now int
		Text     string
	}
	if err := json.NewDecoder(r).Decode(&said); err != nil {
		t.Fatal(err)
	}
	if said.Text != "done" || said.PID != said.Now || said.PID != cmd.Process.Pid {
		t.Errorf("after five images: %+v, started as %d", said, cmd.Process.Pid)
	}
}

func TestAFailedExecChangesNothing(t *testing.T) {
	null, err := os.Open(os.DevNull) // not a program
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	fd, err := handoff.Save(state{Left: 1})
	if err != nil {
		t.Fatal(err)
	}
	defer fd.Close()
	kept := ipc.FD(null.Fd())
	if err := handoff.Exec(kept, os.Args, fd, []ipc.FD{kept}, func() error { return nil }); err == nil || !strings.Contains(err.Error(), "execute the new image") {
		t.Fatalf("error %v", err)
	}
	for _, f := range []ipc.FD{fd, kept} {
		if flags, err := unix.FcntlInt(uintptr(f), unix.F_GETFD, 0); err != nil || flags&unix.FD_CLOEXEC == 0 {
			t.Errorf("descriptor %d would leak into children (flags %d, %v)", f, flags, err)
		}
	}
	if err := handoff.Exec(kept, os.Args, fd, []ipc.FD{9999}, func() error { return nil }); err == nil || !strings.Contains(err.Error(), "keep descriptor 9999") {
		t.Errorf("a closed descriptor: error %v", err)
	}
}

func TestWhatIsNotASealedStateIsRefused(t *testing.T) {
	open, err := unix.MemfdCreate("open", unix.MFD_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(open)
	if _, err := unix.Write(open, []byte("{}")); err != nil {
		t.Fatal(err)
	}
	var st state
	if err := handoff.Read(ipc.FD(open), &st); err == nil {
		t.Error("an unsealed memfd was read")
	}
	for _, text := range []string{"", "x", "1", "99999"} {
		t.Setenv(handoff.Env, text)
		if ok, err := handoff.Load(&st); ok || err == nil {
			t.Errorf("%s=%q: ok %t, error %v", handoff.Env, text, ok, err)
		}
		if _, set := os.LookupEnv(handoff.Env); set {
			t.Errorf("%s=%q stays in the environment", handoff.Env, text)
		}
	}
}
