package supervise

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/hashicorp/go-hclog"
	"golang.org/x/sys/unix"

	"tako/internal/ipc"
	"tako/internal/logging"
)

// A Handed is a child on its way from one image of this process to the next,
// which stays its parent. The descriptors are the receiver's.
type Handed struct {
	Role    string    `json:"role"`
	PID     int       `json:"pid"`
	PIDFD   ipc.FD    `json:"pidfd"`
	Output  ipc.FD    `json:"output"` // the reading end of its log pipe
	Started time.Time `json:"started"`
}

// HandOver returns duplicates of what the next image needs to Adopt the child.
// The channel is not among them: whoever speaks over it hands it over.
func (c *Child) HandOver() (Handed, error) {
	pidfd, err := c.PIDFD()
	if err != nil {
		return Handed{}, fmt.Errorf("hand over %s: %w", c.Role, err)
	}
	raw, err := c.output.SyscallConn()
	if err != nil {
		ipc.FD(pidfd).Close()
		return Handed{}, fmt.Errorf("hand over %s: %w", c.Role, err)
	}
	out := -1
	var dupErr error
	err = raw.Control(func(fd uintptr) { out, dupErr = unix.FcntlInt(fd, unix.F_DUPFD_CLOEXEC, 3) })
	if err == nil {
		err = dupErr
	}
	if err != nil {
		ipc.FD(pidfd).Close()
		return Handed{}, fmt.Errorf("hand over %s: %w", c.Role, err)
	}
	return Handed{Role: c.Role, PID: c.PID, PIDFD: ipc.FD(pidfd), Output: ipc.FD(out), Started: c.Started}, nil
}

// ErrNotOurs is the Err of an Exit of a child that another process started: only
// a parent is told.
var ErrNotOurs = errors.New("exit status unknown")

// Adopt goes on with a child that an older image of this process started, or a
// process of the same program that has died since. Its channel is given; h's
// descriptors are the Child's from here on.
func Adopt(h Handed, channel *ipc.Channel, log hclog.Logger) (*Child, error) {
	if of := PIDOf(int(h.PIDFD)); h.PID <= 1 || of != h.PID && of != -1 {
		return nil, fmt.Errorf("adopt %s: the descriptor is of process %d, not of %d", h.Role, of, h.PID)
	}
	if err := unix.SetNonblock(int(h.Output), true); err != nil {
		return nil, fmt.Errorf("adopt %s: its output: %w", h.Role, err)
	}
	c := &Child{
		Channel: channel, PID: h.PID, Role: h.Role, Started: h.Started,
		done: make(chan struct{}), relayed: make(chan struct{}), pidfd: int(h.PIDFD),
		output: h.Output.File(h.Role + " output"),
	}
	if r, ok := Look(h.PID); !ok || r.Parent != os.Getpid() {
		// The dead one's: whoever reaps it now, its number tells nothing.
		pidfd, err := unix.FcntlInt(uintptr(h.PIDFD), unix.F_DUPFD_CLOEXEC, 3)
		if err != nil {
			return nil, fmt.Errorf("adopt %s: %w", h.Role, err)
		}
		c.watch(func() Exit {
			defer unix.Close(pidfd)
			for !AwaitEnd(pidfd, time.Hour) { // nobody else may wait for it
			}
			return Exit{Code: -1, Err: ErrNotOurs}
		}, log)
		return c, nil
	}
	proc, err := os.FindProcess(h.PID)
	if err != nil {
		return nil, fmt.Errorf("adopt %s: process %d: %w", h.Role, h.PID, err)
	}
	own.Lock()
	own.pids[h.PID] = true
	own.Unlock()
	c.watch(func() Exit { return wait(proc) }, log)
	return c, nil
}

// PIDOf returns the number of a pidfd's process, -1 if it has ended, and 0 if the
// descriptor is no pidfd.
func PIDOf(pidfd int) int {
	b, err := os.ReadFile(fmt.Sprintf("/proc/self/fdinfo/%d", pidfd))
	if err != nil {
		return 0
	}
	for line := range strings.Lines(string(b)) {
		if text, ok := strings.CutPrefix(line, "Pid:"); ok {
			if n, err := strconv.Atoi(strings.TrimSpace(text)); err == nil {
				return n
			}
		}
	}
	return 0
}

// AwaitEnd blocks a thread until the process of a pidfd has ended, for limit at
// most, and reports whether it has.
func AwaitEnd(pidfd int, limit time.Duration) bool {
	for late := time.Now().Add(limit); ; {
		p := []unix.PollFd{{Fd: int32(pidfd), Events: unix.POLLIN}} //nolint:gosec // a descriptor
		n, err := unix.Poll(p, int(min(max(time.Until(late), 0), time.Hour).Milliseconds()))
		switch {
		case n > 0 || err != nil && !errors.Is(err, unix.EINTR):
			return true
		case time.Now().After(late):
			return false
		}
	}
}

// watch reads the child's output and waits for its end.
func (c *Child) watch(wait func() Exit, log hclog.Logger) {
	ctx, cancel := context.WithCancel(context.Background())
	go func() {
		defer close(c.relayed)
		defer c.output.Close()
		defer cancel()
		logging.Relay(ctx, c.output, log, c.Role)
	}()
	go func() {
		c.exit = wait()
		close(c.done)
		time.AfterFunc(relayGrace, cancel)
	}()
}
