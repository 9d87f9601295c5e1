// Package launch runs one program for an app: an instance, or a step such as its
// install step. It starts it through a second stage of tako-agent's own program
// that gives up the agent's powers and becomes the app's user, reads its output
// for ever, sees its end at once, and leaves nothing of its process group behind.
//
// It promises that secrets stand in no argument list and in no environment but
// the app's own, that an app which floods its output slows down itself alone, and
// that a program that could not be started says why. When to start and to stop
// is for package agent to say; whether an instance is well, for package health.
//
// What an instance has started ends with it, whichever way it got out of sight:
// by its control group where there is one to have, else as package-private
// strays are found.
package launch

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
	"unicode/utf8"

	"golang.org/x/sys/unix"

	"tako/internal/ipc"
	"tako/internal/wire"
)

// The limits of a process.
const (
	// StartTimeout bounds the time until the program runs.
	StartTimeout = 10 * time.Second
	// DrainTimeout bounds the reading of output after the program's end: others
	// may hold its pipes.
	DrainTimeout = time.Second
	// MaxGrace is the longest time between SIGTERM and SIGKILL.
	MaxGrace = 10 * time.Minute
)

// Config says what to run.
type Config struct {
	Command wire.Command
	// Users that the command may run as; both 0: this process's own only.
	MinUID, MaxUID uint32
	// Log takes the output, as lines of Instance.
	Log      *Log
	Instance uint32
	// Build marks both outputs as StreamBuild.
	Build bool
	// Groups makes its control group, under Name; nil: it has none.
	Groups *Groups
	Name   string
	Limits wire.Limits
	// Siblings are the processes that run as the same user, this one included:
	// where only a user's processes can be bounded, they share the bound.
	Siblings int
}

// A Process is a program that was started. Its group lives no longer than it.
type Process struct {
	PID     int
	Started time.Time
	// Limits says by what its limits are kept, and which are not.
	Limits string

	child    *child
	outputs  []*os.File // the reading ends of its output, until Done
	group    *group
	command  wire.Command
	log      *Log
	instance uint32
	oom      oomWatch      // without a group of its own
	kills    int64         // of the group, before we watched
	exited   chan struct{} // the program has ended
	done     chan struct{} // and the rest is settled

	mu     sync.Mutex
	killed bool        // by us
	gone   bool        // its number may be another's
	kill   *time.Timer // nil until Stop
	killAt time.Time

	outMu sync.Mutex
	lines []string // newest, at most wire.MaxLastLines
	heads [2]headTail
	exit  wire.Exit // written before done is closed
}

// Start starts a program and returns once it runs, or ctx ends. The descriptors returned are
// duplicates: its pidfd and the reading ends of its standard output and error;
// they are the caller's to close. The error is a sentence for the operator.
func Start(ctx context.Context, c Config) (*Process, [3]ipc.FD, error) {
	var none [3]ipc.FD
	if err := checkUser(c.Command.User, c.MinUID, c.MaxUID); err != nil {
		return nil, none, err
	}
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return nil, none, err
	}
	defer null.Close() // nothing was written
	what := execSpec{Command: c.Command, MinUID: c.MinUID, MaxUID: c.MaxUID}
	var grp *group
	limits := ""
	if c.Groups != nil {
		grp, limits = c.Groups.make(c.Name, c.Limits)
	}
	if grp == nil && c.Limits.PIDs > 0 && c.Command.User.UID != 0 {
		what.MaxProcs = c.Limits.PIDs * max(c.Siblings, 1)
		limits = "rlimits: pids only"
	}
	running := false
	defer func() {
		if !running {
			grp.remove()
		}
	}()
	if grp != nil {
		what.Groups, what.MustEnter = grp.v1, c.Limits != wire.Limits{}
	}
	spec, err := sealedSpec(what)
	if err != nil {
		return nil, none, err
	}
	defer spec.Close()
	var pipes [3][2]int // output, error, and the stage's own complaint
	defer func() {
		for _, p := range pipes {
			ipc.FD(p[1]).Close()
		}
	}()
	for i := range pipes {
		if err := unix.Pipe2(pipes[i][:], unix.O_CLOEXEC); err != nil {
			for _, p := range pipes {
				ipc.FD(p[0]).Close()
			}
			return nil, none, fmt.Errorf("make a pipe: %w", err)
		}
	}
	var readers [3]*os.File
	for i, name := range []string{"stdout", "stderr", "complaint"} {
		_ = unix.SetNonblock(pipes[i][0], true) // of our own end alone
		readers[i] = os.NewFile(uintptr(pipes[i][0]), name)
	}
	closeReaders := func() {
		for _, r := range readers {
			_ = r.Close()
		}
	}

	ch, err := c.Groups.spawn(grp, []string{ExecName}, []uintptr{null.Fd(), uintptr(pipes[0][1]), uintptr(pipes[1][1]), uintptr(spec), uintptr(pipes[2][1])})
	if err != nil {
		closeReaders()
		return nil, none, err
	}
	started := time.Now()
	for i := range pipes { // or the ends below would never come
		ipc.FD(pipes[i][1]).Close()
		pipes[i][1] = 0
	}
	if err := complaint(ctx, readers[2]); err != nil {
		ch.signalGroup(unix.SIGKILL)
		ch.wait()
		ch.reap()
		closeReaders()
		return nil, none, err
	}
	_ = readers[2].Close()
	files, err := duplicates(ch.pidfd, readers[0], readers[1])
	if err != nil {
		ch.signalGroup(unix.SIGKILL)
		ch.wait()
		ch.reap()
		closeReaders()
		return nil, none, err
	}
	running = true
	p := c.process(ch, started)
	p.Limits, p.group = limits, grp
	if grp != nil && grp.v2 == "" && strings.Contains(limits, "v2") {
		p.Limits = NoClone
	}
	if grp == nil {
		p.oom = watchOOM(ch.pid)
	}
	p.follow(c.Build, readers[:2])
	return p, files, nil
}

// Adopt takes over a process that another one has started with Start, by the
// descriptors that Start returned then; they are its own from here on. The
// process may have ended already. Of c it needs no limits.
func Adopt(c Config, pid int, started time.Time, files [3]ipc.FD) (*Process, error) {
	var open [3]*os.File
	for i, name := range []string{"pidfd", "stdout", "stderr"} {
		_ = unix.SetNonblock(int(files[i]), true) // then a thread waits
		open[i] = files[i].File(name)
	}
	if of := pidOf(open[0]); pid <= 1 || of != pid && of != -1 {
		for _, f := range open {
			_ = f.Close()
		}
		return nil, fmt.Errorf("the descriptor is of process %d, not of %d", of, pid)
	}
	p := c.process(&child{pid: pid, pidfd: open[0], adopted: true}, started)
	if c.Groups != nil {
		p.group = c.Groups.find(c.Name)
	}
	p.kills, _ = p.group.kills()
	p.follow(c.Build, open[1:])
	return p, nil
}

// pidOf returns the number of a pidfd's process, -1 if it has ended.
func pidOf(f *os.File) int {
	pid := 0
	raw, err := f.SyscallConn()
	if err != nil {
		return 0
	}
	_ = raw.Control(func(fd uintptr) { // 0 then
		b, _ := os.ReadFile(fmt.Sprintf("/proc/self/fdinfo/%d", fd)) // as above
		for line := range strings.Lines(string(b)) {
			if n, ok := strings.CutPrefix(line, "Pid:"); ok {
				pid, _ = strconv.Atoi(strings.TrimSpace(n)) // as above
			}
		}
	})
	return pid
}

func (c *Config) process(ch *child, started time.Time) *Process {
	return &Process{
		PID: ch.pid, Started: started, child: ch, command: c.Command, log: c.Log, instance: c.Instance,
		exited: make(chan struct{}), done: make(chan struct{}),
	}
}

// follow reads the outputs and sees the process to its end, in goroutines.
func (p *Process) follow(build bool, readers []*os.File) {
	streams := [2]string{StreamOut, StreamErr}
	if build {
		streams = [2]string{StreamBuild, StreamBuild}
	}
	p.outputs = readers
	var pumps sync.WaitGroup
	for i := range 2 {
		pumps.Go(func() { p.pump(readers[i], streams[i], i) })
	}
	go p.run(&pumps)
}

// checkUser refuses users that no app may be.
func checkUser(u wire.User, minUID, maxUID uint32) error {
	in := func(id uint32) bool { return id >= minUID && id <= maxUID }
	switch {
	case u == (wire.User{}) && minUID == 0 && maxUID == 0:
		return nil
	case u == (wire.User{}):
		return errors.New("an app must not run as tako-agent's own user: this is a fault of tako")
	case minUID == 0 || !in(u.UID) || !in(u.GID):
		return fmt.Errorf("user %d:%d is not one that apps run as (%d to %d): this is a fault of tako, or of its state", u.UID, u.GID, minUID, maxUID)
	}
	return nil
}

// complaint waits until the stage has become the program, which closes its end
// of the pipe, or has written why it cannot.
func complaint(ctx context.Context, r *os.File) error {
	_ = r.SetReadDeadline(time.Now().Add(StartTimeout)) // it is a pipe
	defer context.AfterFunc(ctx, func() { _ = r.SetReadDeadline(time.Now()) })()
	text, err := io.ReadAll(io.LimitReader(r, maxComplaint))
	if len(text) > 0 {
		return errors.New(strings.ToValidUTF8(string(text), "\uFFFD"))
	}
	if ctx.Err() != nil {
		return errors.New("the server is stopping")
	}
	if err != nil {
		return fmt.Errorf("the program did not begin to run within %s: the machine is overloaded", StartTimeout)
	}
	return nil
}

// duplicates makes descriptors for another process of these files.
func duplicates(files ...*os.File) (fds [3]ipc.FD, err error) {
	for i, f := range files {
		raw, cerr := f.SyscallConn()
		if cerr == nil {
			cerr = raw.Control(func(fd uintptr) {
				var n int
				if n, err = unix.FcntlInt(fd, unix.F_DUPFD_CLOEXEC, 3); err == nil {
					fds[i] = ipc.FD(n)
				}
			})
		}
		if err = errors.Join(err, cerr); err != nil {
			for _, fd := range fds {
				fd.Close()
			}
			return [3]ipc.FD{}, fmt.Errorf("duplicate a descriptor: %w", err)
		}
	}
	return fds, nil
}

// run sees the process to its end.
func (p *Process) run(pumps *sync.WaitGroup) {
	p.child.wait()
	close(p.exited)
	for _, f := range p.outputs {
		_ = f.SetReadDeadline(time.Now().Add(DrainTimeout)) // it is a pipe
	}
	pumps.Wait()
	for _, f := range p.outputs {
		_ = f.Close()
	}
	p.mu.Lock()
	p.child.signalGroup(unix.SIGKILL) // what it left behind
	p.gone = true
	if p.kill != nil {
		p.kill.Stop()
	}
	p.mu.Unlock()
	if p.group == nil || !p.group.empty() {
		sweep(&p.command, p.PID)
	}
	status, ok := p.child.reap()
	p.exit = exitOf(status, ok)
	p.exit.OutOfMem = p.outOfMem()
	p.group.remove()
	close(p.done)
}

// outOfMem reports whether the kernel killed the process for want of memory. Its
// own group knows; else it is a good guess.
func (p *Process) outOfMem() bool {
	if p.killed || p.exit.Signal != "SIGKILL" && !p.exit.Forgotten {
		return false
	}
	if n, ok := p.group.kills(); ok {
		return n > p.kills
	}
	return p.oom.happened()
}

func exitOf(status unix.WaitStatus, ok bool) wire.Exit {
	switch {
	case !ok:
		return wire.Exit{Code: -1, Forgotten: true}
	case status.Signaled():
		return wire.Exit{Code: -1, Signal: signalName(status.Signal())}
	}
	return wire.Exit{Code: status.ExitStatus()}
}

func signalName(s syscall.Signal) string {
	if name := unix.SignalName(s); name != "" {
		return name
	}
	return fmt.Sprintf("SIG%d", int(s))
}

// Duplicates returns duplicates of what Start returned, for the caller to close.
// It is an error once the process has ended.
func (p *Process) Duplicates() ([3]ipc.FD, error) {
	return duplicates(p.child.pidfd, p.outputs[0], p.outputs[1])
}

// Stopping reports whether it was asked to stop.
func (p *Process) Stopping() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.kill != nil
}

// Exited is closed when the process has ended; Done follows.
func (p *Process) Exited() <-chan struct{} { return p.exited }

// Done is closed when the process has ended, its output is read and its group is
// gone.
func (p *Process) Done() <-chan struct{} { return p.done }

// Exit says how it ended. Only after Done.
func (p *Process) Exit() wire.Exit { return p.exit }

// LastLines returns the newest lines of its output, oldest first.
func (p *Process) LastLines() []string {
	p.outMu.Lock()
	defer p.outMu.Unlock()
	return append([]string(nil), p.lines...)
}

// Outputs returns its two outputs, each as wire.Ran has them.
func (p *Process) Outputs() (stdout, stderr string) {
	p.outMu.Lock()
	defer p.outMu.Unlock()
	return p.heads[0].text(), p.heads[1].text()
}

// A headTail keeps the first and the last bytes of an output.
type headTail struct {
	head, tail []byte
	cut        bool // bytes between them were left out
}

const maxTail = wire.MaxRanOutput - wire.MaxRanHead

func (h *headTail) add(b []byte) {
	n := min(wire.MaxRanHead-len(h.head), len(b))
	h.head = append(h.head, b[:n]...)
	h.tail = append(h.tail, b[n:]...)
	if over := len(h.tail) - maxTail; over > 0 {
		h.tail = append(h.tail[:0], h.tail[over:]...)
		h.cut = true
	}
}

func (h *headTail) text() string {
	if !h.cut {
		return valid(string(h.head)+string(h.tail), wire.MaxRanOutput)
	}
	head, tail := string(h.head), string(h.tail[len(wire.RanCut):])
	for i := 0; i < utf8.UTFMax && tail != "" && !utf8.RuneStart(tail[0]); i++ { // not inside a character
		tail = tail[1:]
	}
	return valid(valid(head, len(head))+wire.RanCut+tail, wire.MaxRanOutput)
}

// valid is at most n bytes of s, with a mark for what is no UTF-8.
func valid(s string, n int) string {
	s = strings.ToValidUTF8(s, "?")
	return s[:min(n, len(s))]
}

// Stop ends the process: SIGTERM to its group, and SIGKILL after grace. Asked
// again, the earlier end holds. It does not wait.
func (p *Process) Stop(grace time.Duration) {
	grace = min(max(grace, 0), MaxGrace)
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.gone {
		return
	}
	at := time.Now().Add(grace)
	switch {
	case p.kill == nil:
		p.child.signalGroup(unix.SIGTERM)
		p.killAt = at
		p.kill = time.AfterFunc(grace, p.killNow)
	case at.Before(p.killAt):
		p.killAt = at
		p.kill.Reset(grace)
	}
}

func (p *Process) killNow() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.gone {
		p.killed = true
		p.child.signalGroup(unix.SIGKILL)
	}
}

// pump reads one output to its end and never stops for want of a place to write.
func (p *Process) pump(r io.Reader, stream string, which int) {
	buf := make([]byte, readSize)
	var s splitter
	for {
		n, err := r.Read(buf)
		p.keep(which, buf[:n], s.feed(buf[:n]), stream)
		if err != nil {
			p.keep(which, nil, s.rest(), stream)
			return
		}
		if wait := p.log.rates.take(time.Now(), n); wait > 0 {
			t := time.NewTimer(wait)
			select {
			case <-t.C:
			case <-p.exited: // a pipe's worth is left at most
			}
			t.Stop()
		}
	}
}

// keep stores what was read, in memory and in the log.
func (p *Process) keep(which int, raw []byte, lines []string, stream string) {
	p.outMu.Lock()
	p.heads[which].add(raw)
	for _, l := range lines[max(0, len(lines)-wire.MaxLastLines):] {
		p.lines = append(p.lines, clip(l, wire.MaxLastLine))
	}
	if over := len(p.lines) - wire.MaxLastLines; over > 0 {
		p.lines = append(p.lines[:0], p.lines[over:]...)
	}
	p.outMu.Unlock()
	p.log.write(p.instance, stream, lines)
}

// clip returns at most n bytes of s as valid UTF-8.
func clip(s string, n int) string {
	if s = strings.ToValidUTF8(s, "?"); len(s) <= n {
		return s
	}
	for n > 0 && !utf8.RuneStart(s[n]) {
		n--
	}
	return s[:n]
}
