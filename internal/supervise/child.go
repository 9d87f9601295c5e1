// Package supervise starts the master's children, says when they end, and how
// long to wait before the next one; and it is where tako sends signals. It
// promises that a child gets its channel, a log pipe and nothing else of the
// master's, that what runs is the file that the caller opened, and that no signal
// reaches another process than the one meant. What is said over the channel, and
// what a child's end means, is for the master to decide.
package supervise

import (
	"fmt"
	"os"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/hashicorp/go-hclog"
	"golang.org/x/sys/unix"

	"tako/internal/ipc"
	"tako/internal/sandbox"
)

// relayGrace bounds how long the output of a child that has ended is read, if
// somebody else still holds the pipe.
const relayGrace = 2 * time.Second

// OutputRoom is how many bytes of log a child can write while nobody reads, as
// between two tako-masters, before it waits. It is asked of the system, which may
// give less.
const OutputRoom = 1 << 20

// inherited are the names of the master's environment that children get.
var inherited = []string{"PATH", "LANG", "TZ"}

// A Spec is a child to start.
type Spec struct {
	// Role is its name: argv[0], and whose lines its log lines are.
	Role string
	// Program is a descriptor of the executable, opened for reading by the caller,
	// who still closes it. What runs is what was opened. It must be a binary: a
	// script's interpreter could not open it.
	Program int
	Args    []string // after argv[0]
	Env     []string // all it gets, beside the master's PATH, LANG and TZ
	// Identity is what it becomes (it calls sandbox.Enter); nil: the master's user.
	Identity *sandbox.Identity
}

// Exit is how a child ended.
type Exit struct {
	Code   int            // -1 when a signal ended it
	Signal syscall.Signal // 0 when it ended itself
	Err    error          // the status is not to be had, and why; Code is -1
}

func (e Exit) String() string {
	switch {
	case e.Err != nil:
		return e.Err.Error()
	case e.Signal != 0:
		return name(e.Signal)
	}
	return fmt.Sprintf("exit status %d", e.Code)
}

// A Child is a started process, alone in a process group, so that a terminal's
// Ctrl-C reaches the master only. Whoever started it calls Close.
type Child struct {
	// Channel is the master's end. Whoever wraps it may close it.
	Channel *ipc.Channel
	// PID is for logs; signals go through Signal.
	PID     int
	Role    string
	Started time.Time

	done    chan struct{} // closed once exit is set
	relayed chan struct{} // closed once the output was read to its end
	exit    Exit
	output  *os.File // the reading end of its log pipe

	mu    sync.Mutex
	pidfd int // guarded by mu; -1 once closed
}

// Start starts a child. Its descriptors are: 0 /dev/null, 1 and 2 a pipe whose
// lines go to log under the child's name, 3 the channel. On an error nothing is
// left behind.
func Start(spec Spec, log hclog.Logger) (_ *Child, err error) {
	fail := func(err error) (*Child, error) { return nil, fmt.Errorf("start %s: %w", spec.Role, err) }
	channel, theirs, err := ipc.Pair()
	if err != nil {
		return fail(err)
	}
	theirEnd := theirs.File("channel")
	defer theirEnd.Close()
	defer func() {
		if err != nil {
			_ = channel.Close()
		}
	}()
	null, err := os.Open(os.DevNull)
	if err != nil {
		return fail(err)
	}
	defer null.Close()
	output, w, err := os.Pipe()
	if err != nil {
		return fail(err)
	}
	defer w.Close()
	_, _ = unix.FcntlInt(w.Fd(), unix.F_SETPIPE_SZ, OutputRoom) // less will do
	defer func() {
		if err != nil {
			_ = output.Close()
		}
	}()
	// A number that the child's own descriptors cannot take while it is made.
	program, err := unix.FcntlInt(uintptr(spec.Program), unix.F_DUPFD_CLOEXEC, 64+int(w.Fd()))
	if err != nil {
		return fail(fmt.Errorf("program: %w", err))
	}
	defer unix.Close(program)

	argv := []string{spec.Role}
	if spec.Identity != nil {
		argv = append(argv, spec.Identity.Arg())
	}
	pidfd := -1
	var proc *os.Process
	err = Fork(func() (int, error) {
		var err error
		proc, err = os.StartProcess(fmt.Sprintf("/proc/self/fd/%d", program), append(argv, spec.Args...), &os.ProcAttr{
			Dir:   "/",
			Env:   environment(spec.Env),
			Files: []*os.File{null, w, w, theirEnd},
			Sys:   &syscall.SysProcAttr{Setpgid: true, PidFD: &pidfd},
		})
		if err != nil {
			return 0, err
		}
		return proc.Pid, nil
	})
	if err != nil {
		return fail(err)
	}
	if pidfd < 0 {
		_ = proc.Kill()
		_ = wait(proc)
		return fail(fmt.Errorf("the system gives no pidfd (this needs Linux 5.4)"))
	}
	c := &Child{
		Channel: channel, PID: proc.Pid, Role: spec.Role, Started: time.Now(),
		done: make(chan struct{}), relayed: make(chan struct{}), pidfd: pidfd, output: output,
	}
	c.watch(func() Exit { return wait(proc) }, log)
	return c, nil
}

// environment is env and what is inherited, unless env says otherwise.
func environment(env []string) []string {
	env = append([]string{}, env...) // never nil, which would mean all of the master's
	for _, name := range inherited {
		set := slices.ContainsFunc(env, func(e string) bool { return strings.HasPrefix(e, name+"=") })
		if v, ok := os.LookupEnv(name); ok && !set {
			env = append(env, name+"="+v)
		}
	}
	return env
}

func wait(proc *os.Process) Exit {
	state, err := proc.Wait()
	Waited(proc.Pid)
	if err != nil {
		return Exit{Code: -1, Err: fmt.Errorf("wait for process: %w", err)}
	}
	if ws, ok := state.Sys().(syscall.WaitStatus); ok && ws.Signaled() {
		return Exit{Code: -1, Signal: ws.Signal()}
	}
	return Exit{Code: state.ExitCode()}
}

// Done is closed when the child has ended and was waited for.
func (c *Child) Done() <-chan struct{} { return c.done }

// Exit waits for the child's end and says how it came.
func (c *Child) Exit() Exit {
	<-c.done
	return c.exit
}

// Signal sends a signal; os.ErrProcessDone if the child has ended.
func (c *Child) Signal(sig syscall.Signal) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.pidfd < 0 {
		return os.ErrProcessDone
	}
	return Signal(c.pidfd, sig)
}

// Terminate asks the child to end.
func (c *Child) Terminate() error { return c.Signal(syscall.SIGTERM) }

// Kill ends the child at once.
func (c *Child) Kill() error { return c.Signal(syscall.SIGKILL) }

// PIDFD returns a duplicate of the child's pidfd for the caller to close.
func (c *Child) PIDFD() (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.pidfd < 0 {
		return -1, os.ErrProcessDone
	}
	fd, err := unix.FcntlInt(uintptr(c.pidfd), unix.F_DUPFD_CLOEXEC, 3)
	if err != nil {
		return -1, fmt.Errorf("duplicate pidfd: %w", err)
	}
	return fd, nil
}

// Close kills the child if it still runs, waits for its end and its last line,
// and gives back every descriptor. It may come twice.
func (c *Child) Close() error {
	_ = c.Kill()
	<-c.done
	<-c.relayed
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.pidfd >= 0 {
		_ = unix.Close(c.pidfd)
		c.pidfd = -1
	}
	return c.Channel.Close()
}
