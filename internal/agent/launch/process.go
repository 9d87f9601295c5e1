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
// Limits of memory, processor and processes per instance belong into Config and
// the second stage.
package launch

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
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
}

// A Process is a program that was started. Its group lives no longer than it.
type Process struct {
	PID     int
	Started time.Time

	child    *child
	log      *Log
	instance uint32
	oom      oomWatch
	exited   chan struct{} // the program has ended
	done     chan struct{} // and the rest is settled

	mu     sync.Mutex
	gone   bool        // its number may be another's
	kill   *time.Timer // nil until Stop
	killAt time.Time

	outMu sync.Mutex
	lines []string // newest, at most wire.MaxLastLines
	heads [2][]byte
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
	spec, err := sealedSpec(execSpec{Command: c.Command, MinUID: c.MinUID, MaxUID: c.MaxUID})
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

	ch, err := spawn([]string{ExecName}, []uintptr{null.Fd(), uintptr(pipes[0][1]), uintptr(pipes[1][1]), uintptr(spec), uintptr(pipes[2][1])})
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
	p := &Process{
		PID: ch.pid, Started: started, child: ch, log: c.Log, instance: c.Instance,
		oom: watchOOM(ch.pid), exited: make(chan struct{}), done: make(chan struct{}),
	}
	streams := [2]string{StreamOut, StreamErr}
	if c.Build {
		streams = [2]string{StreamBuild, StreamBuild}
	}
	var pumps sync.WaitGroup
	for i := range 2 {
		pumps.Go(func() { p.pump(readers[i], streams[i], i) })
	}
	go p.run(&pumps, readers[:2])
	return p, files, nil
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
func (p *Process) run(pumps *sync.WaitGroup, outputs []*os.File) {
	p.child.wait()
	close(p.exited)
	for _, f := range outputs {
		_ = f.SetReadDeadline(time.Now().Add(DrainTimeout)) // it is a pipe
	}
	pumps.Wait()
	for _, f := range outputs {
		_ = f.Close()
	}
	p.mu.Lock()
	p.child.signalGroup(unix.SIGKILL) // what it left behind
	p.gone = true
	if p.kill != nil {
		p.kill.Stop()
	}
	p.mu.Unlock()
	status, ok := p.child.reap()
	p.exit = exitOf(status, ok)
	p.exit.OutOfMem = p.exit.Signal == "SIGKILL" && p.oom.happened()
	close(p.done)
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

// Heads returns the first wire.MaxRanOutput bytes of its two outputs.
func (p *Process) Heads() (stdout, stderr string) {
	p.outMu.Lock()
	defer p.outMu.Unlock()
	return strings.ToValidUTF8(string(p.heads[0]), "\uFFFD"), strings.ToValidUTF8(string(p.heads[1]), "\uFFFD")
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
	if room := wire.MaxRanOutput - len(p.heads[which]); room > 0 {
		p.heads[which] = append(p.heads[which], raw[:min(room, len(raw))]...)
	}
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
