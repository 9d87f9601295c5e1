package supervise

import (
	"errors"
	"fmt"
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

// This file is the only place in tako that sends signals. Processes are named by
// pidfd, which cannot come to mean another one. kill(2) knows numbers only, and
// 0, 1 and -1 mean "my group", init and "everything", so the one use of it, for
// groups, is guarded.

// OpenPID returns a pidfd of the process, close-on-exec, which the caller closes.
// It refuses pid 1 and below. The error is os.ErrProcessDone when there is no
// such process. Who is not the parent has to check who it is once it is open.
func OpenPID(pid int) (int, error) {
	if pid <= 1 {
		return -1, fmt.Errorf("open process %d: not a process to handle", pid)
	}
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return -1, fmt.Errorf("open process %d: %w", pid, done(err))
	}
	return fd, nil
}

// Signal sends a signal to the process of a pidfd. The error is os.ErrProcessDone
// when it has ended.
func Signal(pidfd int, sig syscall.Signal) error {
	if err := unix.PidfdSendSignal(pidfd, sig, nil, 0); err != nil {
		return fmt.Errorf("send %s: %w", name(sig), done(err))
	}
	return nil
}

// SignalGroup sends a signal to every process of a group. It refuses group 1 and
// below, and the caller's own. The group's leader must be a process that the
// caller has not waited for yet, or the number may be another's by now. The error
// is os.ErrProcessDone when nobody is left in it.
func SignalGroup(pgid int, sig syscall.Signal) error {
	if pgid <= 1 || pgid == unix.Getpgrp() {
		return fmt.Errorf("send %s to group %d: not a group to signal", name(sig), pgid)
	}
	if err := unix.Kill(-pgid, sig); err != nil {
		return fmt.Errorf("send %s to group %d: %w", name(sig), pgid, done(err))
	}
	return nil
}

func done(err error) error {
	if errors.Is(err, unix.ESRCH) {
		return os.ErrProcessDone
	}
	return err
}

func name(sig syscall.Signal) string {
	if s := unix.SignalName(sig); s != "" {
		return s
	}
	return fmt.Sprintf("signal %d", int(sig))
}
