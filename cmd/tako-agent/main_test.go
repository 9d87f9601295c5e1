package main

import (
	"errors"
	"os"
	"os/exec"
	"strings"
	"testing"

	"tako/internal/agent"
	"tako/internal/wire"
)

func TestMain(m *testing.M) {
	agent.Stage()
	if os.Getenv("TAKO_TEST_MAIN") != "" {
		os.Exit(run())
	}
	os.Exit(m.Run())
}

func program(t *testing.T, args ...string) *exec.Cmd {
	t.Helper()
	cmd := exec.Command("/proc/self/exe", args...)
	cmd.Env = []string{"TAKO_TEST_MAIN=1"}
	return cmd
}

func TestAgentStartedByHandSaysWhoStartsIt(t *testing.T) {
	out, err := program(t).CombinedOutput()
	if exit, ok := errors.AsType[*exec.ExitError](err); !ok || exit.ExitCode() != wire.ExitUsage || !strings.Contains(string(out), "started by tako-master, not by hand") {
		t.Errorf("%v: %s", err, out)
	}
}

func TestVersionIsPrinted(t *testing.T) {
	out, err := program(t, "--version").Output()
	if err != nil || !strings.HasPrefix(string(out), "tako-agent ") {
		t.Errorf("%v: %s", err, out)
	}
}
