package main

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"tako/internal/ipc"
	"tako/internal/wire"
)

func build(t *testing.T) string {
	t.Helper()
	program := filepath.Join(t.TempDir(), "tako-proxy")
	if out, err := exec.Command("go", "build", "-o", program, ".").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	return program
}

func status(t *testing.T, err error) int {
	t.Helper()
	if err == nil {
		return 0
	}
	exit, ok := errors.AsType[*exec.ExitError](err)
	if !ok {
		t.Fatal(err)
	}
	return exit.ExitCode()
}

func TestProgramWantsAChannel(t *testing.T) {
	program := build(t)
	out, err := exec.Command(program, "--version").CombinedOutput()
	if status(t, err) != wire.ExitDone || !strings.HasPrefix(string(out), "tako-proxy ") {
		t.Errorf("--version: %v, %s", err, out)
	}

	file, err := os.Create(filepath.Join(t.TempDir(), "file"))
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	cmd := exec.Command(program)
	cmd.ExtraFiles = []*os.File{file}
	out, err = cmd.CombinedOutput()
	if status(t, err) != wire.ExitUsage || !strings.Contains(string(out), "tako-master") {
		t.Errorf("with a file for a channel: %v, %s", err, out)
	}

	ch, fd, err := ipc.Pair()
	if err != nil {
		t.Fatal(err)
	}
	end := fd.File("channel")
	defer end.Close()
	cmd = exec.Command(program)
	cmd.ExtraFiles = []*os.File{end}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	_ = end.Close()
	conn := wire.NewConn(ch, wire.LinkProxy, wire.Master)
	if err := conn.Send(0, &wire.Hello{Protocol: wire.ProtocolVersion, Generation: 3}); err != nil {
		t.Fatal(err)
	}
	m, err := conn.Receive()
	if h, ok := m.Body.(*wire.Hello); !ok || h.PID != cmd.Process.Pid || h.Generation != 3 {
		t.Errorf("greeting %+v, %v", m.Body, err)
	}
	_ = conn.Close()
	if got := status(t, cmd.Wait()); got != wire.ExitPeer {
		t.Errorf("after its master went: exit status %d, want %d", got, wire.ExitPeer)
	}
}
