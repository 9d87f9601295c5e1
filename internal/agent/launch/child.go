package launch

import (
	"errors"
	"fmt"
	"os"
	"syscall"

	"golang.org/x/sys/unix"

	"tako/internal/supervise"
)

// A child is a process of ours, the leader of a session and a group of its own.
// Its number stays taken until reap, so a signal to it or to its group reaches
// nobody else.
type child struct {
	pid   int
	pidfd *os.File
	// adopted: another process started it, and somebody else reaps it. Its number
	// is its own only as long as it runs.
	adopted bool
}

// self is this program's own file, also when its path now holds another one.
const self = "/proc/self/exe"

// spawn starts a second stage of this program, which argv[0] names, with files as
// its descriptors from 0, an empty environment, and nothing else. It is born in
// the control group of version 2 whose folder is open as cgroup, unless 0.
func spawn(argv []string, files []uintptr, cgroup int) (*child, error) {
	pidfd := -1
	attr := &syscall.ProcAttr{
		Env:   []string{},
		Files: files,
		Sys:   &syscall.SysProcAttr{Setsid: true, PidFD: &pidfd, UseCgroupFD: cgroup > 0, CgroupFD: cgroup},
	}
	var pid int
	err := supervise.Fork(func() (_ int, err error) {
		pid, err = syscall.ForkExec(self, argv, attr)
		return pid, err
	})
	if err != nil {
		return nil, fmt.Errorf("start %s: %w", argv[0], err)
	}
	c := &child{pid: pid}
	if pidfd < 0 {
		_ = supervise.SignalGroup(pid, unix.SIGKILL) // it is gone or going
		c.reap()
		return nil, fmt.Errorf("start %s: this kernel gives no pidfd: Linux 5.4 or later is needed", argv[0])
	}
	// Non-blocking, so that the runtime's poller waits and not a thread.
	_ = unix.SetNonblock(pidfd, true) // then a thread waits
	c.pidfd = os.NewFile(uintptr(pidfd), "pidfd")
	return c, nil
}

// wait blocks until the process has ended, and leaves it to be reaped.
func (c *child) wait() {
	raw, err := c.pidfd.SyscallConn()
	if err != nil {
		return
	}
	_ = raw.Read(func(fd uintptr) bool { return ended(int(fd)) }) // reap waits in any case
}

// over reports whether the process has ended.
func (c *child) over() bool {
	raw, err := c.pidfd.SyscallConn()
	if err != nil {
		return true
	}
	over := true
	_ = raw.Control(func(fd uintptr) { over = ended(int(fd)) }) // then it is over for us
	return over
}

// ended reports whether the process behind a pidfd has: it is readable then.
func ended(pidfd int) bool {
	p := []unix.PollFd{{Fd: int32(pidfd), Events: unix.POLLIN}}
	for {
		n, err := unix.Poll(p, 0)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		return err != nil || n > 0
	}
}

// reap takes the status of the process, which must be ending, and gives its
// number back. ok is false if the status is not to be had.
func (c *child) reap() (status unix.WaitStatus, ok bool) {
	for !c.adopted {
		_, err := unix.Wait4(c.pid, &status, 0, nil)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		ok = err == nil
		break
	}
	if !c.adopted {
		supervise.Waited(c.pid)
	}
	if c.pidfd != nil {
		_ = c.pidfd.Close()
	}
	return status, ok
}

// signalGroup signals the process and its group. It must not have been reaped.
func (c *child) signalGroup(sig unix.Signal) {
	if c.adopted && c.over() {
		return // who is left in the group is found otherwise
	}
	_ = supervise.SignalGroup(c.pid, sig) // nobody is left in it
}
