package supervise

import (
	"context"
	"fmt"
	"os"
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

// Adopt goes on with a child that an older image of this process started. Its
// channel is given; h's descriptors are the Child's from here on.
func Adopt(h Handed, channel *ipc.Channel, log hclog.Logger) (*Child, error) {
	proc, err := os.FindProcess(h.PID)
	if err != nil || h.PID <= 1 {
		return nil, fmt.Errorf("adopt %s: process %d: %w", h.Role, h.PID, err)
	}
	if err := unix.SetNonblock(int(h.Output), true); err != nil {
		return nil, fmt.Errorf("adopt %s: its output: %w", h.Role, err)
	}
	c := &Child{
		Channel: channel, PID: h.PID, Role: h.Role, Started: h.Started,
		done: make(chan struct{}), relayed: make(chan struct{}), pidfd: int(h.PIDFD),
		output: h.Output.File(h.Role + " output"),
	}
	own.Lock()
	own.pids[h.PID] = true
	own.Unlock()
	c.watch(proc, log)
	return c, nil
}

// watch reads the child's output and waits for its end.
func (c *Child) watch(proc *os.Process, log hclog.Logger) {
	ctx, cancel := context.WithCancel(context.Background())
	go func() {
		defer close(c.relayed)
		defer c.output.Close()
		defer cancel()
		logging.Relay(ctx, c.output, log, c.Role)
	}()
	go func() {
		c.exit = wait(proc)
		close(c.done)
		time.AfterFunc(relayGrace, cancel)
	}()
}
