package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// stopTime is what a process gets to end before it is killed.
const stopTime = 5 * time.Second

// ticks is USER_HZ, in which Linux counts processor time for programs.
const ticks = 100

// usage is processor time, in seconds.
type usage struct{ user, system float64 }

func (u usage) minus(v usage) usage { return usage{u.user - v.user, u.system - v.system} }

// spent is what the processes have used since they began.
func spent(pids []int) (u usage, err error) {
	for _, pid := range pids {
		fields, err := stat(pid)
		if err != nil {
			return u, err
		}
		for i, of := range []*float64{&u.user, &u.system} {
			n, err := strconv.ParseFloat(fields[11+i], 64)
			if err != nil {
				return u, err
			}
			*of += n / ticks
		}
	}
	return u, nil
}

// stat is /proc/PID/stat from the process's state on.
func stat(pid int) ([]string, error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return nil, err
	}
	fields := strings.Fields(string(text[bytes.LastIndexByte(text, ')')+1:]))
	if len(fields) < 20 {
		return nil, fmt.Errorf("/proc/%d/stat has %d fields", pid, len(fields))
	}
	return fields, nil
}

// memory is the processes' proportional set size in KiB.
func memory(pids []int) (kib int, err error) {
	for _, pid := range pids {
		text, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps_rollup", pid))
		if err != nil {
			return 0, err
		}
		for line := range strings.Lines(string(text)) {
			if rest, ok := strings.CutPrefix(line, "Pss:"); ok {
				n, err := strconv.Atoi(strings.Fields(rest)[0])
				if err != nil {
					return 0, err
				}
				kib += n
			}
		}
	}
	return kib, nil
}

// family is a process and its descendants.
func family(pid int) []int {
	children := make(map[int][]int)
	entries, _ := filepath.Glob("/proc/[0-9]*") // the pattern is good
	for _, e := range entries {
		child, err := strconv.Atoi(filepath.Base(e))
		if err != nil {
			continue
		}
		if fields, err := stat(child); err == nil {
			if parent, err := strconv.Atoi(fields[1]); err == nil {
				children[parent] = append(children[parent], child)
			}
		}
	}
	all := []int{pid}
	for i := 0; i < len(all); i++ {
		all = append(all, children[all[i]]...)
	}
	return all
}

// cpus are the processors that this process may use.
func cpus() ([]int, error) {
	var set unix.CPUSet
	if err := unix.SchedGetaffinity(0, &set); err != nil {
		return nil, err
	}
	var all []int
	for i := 0; len(all) < set.Count(); i++ {
		if set.IsSet(i) {
			all = append(all, i)
		}
	}
	return all, nil
}

func setOf(on []int) *unix.CPUSet {
	set := new(unix.CPUSet)
	for _, cpu := range on {
		set.Set(cpu)
	}
	return set
}

// onCPUs calls f, which starts a process, so that it is on these processors from
// its first instruction, and all that it starts too.
func onCPUs(on []int, f func() error) error {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	var before unix.CPUSet
	if err := errors.Join(unix.SchedGetaffinity(0, &before), unix.SchedSetaffinity(0, setOf(on))); err != nil {
		return err
	}
	return errors.Join(f(), unix.SchedSetaffinity(0, &before))
}

// move puts every thread of a process on these processors.
func move(pid int, on []int) error {
	threads, err := os.ReadDir(fmt.Sprintf("/proc/%d/task", pid))
	for _, t := range threads {
		if tid, bad := strconv.Atoi(t.Name()); bad == nil {
			err = errors.Join(err, unix.SchedSetaffinity(tid, setOf(on)))
		}
	}
	return err
}

// A child is a process that we started.
type child struct {
	cmd  *exec.Cmd
	said *os.File // its standard error, for when it goes wrong
	done chan error
}

// start starts a program on these processors. It is told to end when we die.
func start(dir string, on []int, stdin io.Reader, stdout io.Writer, program string, args ...string) (*child, error) {
	said, err := os.CreateTemp(dir, filepath.Base(program)+".*.log")
	if err != nil {
		return nil, err
	}
	c := &child{cmd: exec.Command(program, args...), said: said, done: make(chan error, 1)}
	c.cmd.Stdin, c.cmd.Stdout, c.cmd.Stderr = stdin, stdout, said
	c.cmd.Env = append(os.Environ(), "HOME="+dir, "XDG_CONFIG_HOME="+dir, "XDG_DATA_HOME="+dir)
	c.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGTERM}
	if err := onCPUs(on, c.cmd.Start); err != nil {
		said.Close()
		return nil, err
	}
	go func() { c.done <- c.cmd.Wait() }()
	return c, nil
}

func (c *child) pid() int { return c.cmd.Process.Pid }

// log is the end of what the process said.
func (c *child) log() string {
	text, _ := os.ReadFile(c.said.Name()) // there is nothing to say without it
	return string(text[max(0, len(text)-2000):])
}

// ended waits for a process that ends by itself.
func (c *child) ended(within time.Duration) error {
	select {
	case err := <-c.done:
		c.done <- err
		if err != nil {
			return fmt.Errorf("%s: %w\n%s", filepath.Base(c.cmd.Path), err, c.log())
		}
		return nil
	case <-time.After(within):
		return fmt.Errorf("%s still runs after %s", filepath.Base(c.cmd.Path), within)
	}
}

// stop ends the process and what it started.
func (c *child) stop() {
	var handles []*os.Process // before any of them can end
	for _, pid := range family(c.pid()) {
		if p, err := os.FindProcess(pid); err == nil && pid > 1 {
			handles = append(handles, p)
		}
	}
	_ = c.cmd.Process.Signal(syscall.SIGTERM) // it may have ended
	if err := c.ended(stopTime); err != nil {
		for _, p := range slices.Backward(handles) {
			_ = p.Kill() // likewise
		}
		err := <-c.done
		c.done <- err
	}
	c.said.Close()
}
