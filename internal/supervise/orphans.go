package supervise

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"os/signal"
	"slices"
	"strconv"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// own are the children that somebody in this program waits for, by number. Reap
// and Orphans leave them alone.
var own = struct {
	sync.Mutex
	pids map[int]bool
}{pids: make(map[int]bool)}

// Fork calls start, which makes a child, and lets nobody but the caller wait for
// that one. The caller calls Waited once it has.
func Fork(start func() (pid int, err error)) error {
	own.Lock() // so that it is known before it can end
	defer own.Unlock()
	pid, err := start()
	if err == nil {
		own.pids[pid] = true
	}
	return err
}

// Waited says that a child of Fork was waited for: its number may be another's.
func Waited(pid int) {
	own.Lock()
	defer own.Unlock()
	delete(own.pids, pid)
}

// Own returns the children of Fork that were not waited for yet.
func Own() []int {
	own.Lock()
	defer own.Unlock()
	return slices.Collect(maps.Keys(own.pids))
}

// Subreaper makes this process the parent of its descendants' orphans.
func Subreaper() error {
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("become the reaper of orphans: %w", err)
	}
	return nil
}

// Reap takes the status of every child that nobody here started: the orphans of
// descendants. It returns when ctx ends.
func Reap(ctx context.Context) {
	sig := make(chan os.Signal, 1)
	signal.Notify(sig, unix.SIGCHLD)
	defer signal.Stop(sig)
	again := time.NewTimer(0)
	defer again.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-sig:
		case <-again.C:
		}
		if !reapOrphans() { // one of ours stands in front and is taken in a moment
			again.Reset(10 * time.Millisecond)
		}
	}
}

// reapOrphans takes ended children up to the first that somebody waits for. It
// reports whether there was none such.
func reapOrphans() bool {
	for {
		var info siginfo
		err := unix.Waitid(unix.P_ALL, 0, info.raw(), unix.WEXITED|unix.WNOWAIT|unix.WNOHANG, nil)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil || info.pid == 0 {
			return true
		}
		pid := int(info.pid)
		own.Lock()
		waited := own.pids[pid]
		if !waited {
			_, _ = unix.Wait4(pid, nil, unix.WNOHANG, nil) // an orphan's status is nobody's concern
		}
		own.Unlock()
		if waited {
			return false
		}
	}
}

// A Relation is where a process stands among the others.
type Relation struct {
	PID, Parent, Group, Session int
	Zombie                      bool
	// Start tells two processes of one number apart: clock ticks since boot.
	Start uint64
}

// Orphans returns the children of this process that nobody in it started, zombies
// left out.
func Orphans() []Relation {
	me := os.Getpid()
	all := Processes()
	own.Lock()
	defer own.Unlock()
	var found []Relation
	for _, r := range all {
		if r.Parent == me && !own.pids[r.PID] && !r.Zombie {
			found = append(found, r)
		}
	}
	return found
}

// Processes returns every process that can be seen now.
func Processes() []Relation {
	dir, err := os.Open("/proc")
	if err != nil {
		return nil
	}
	defer dir.Close()
	names, _ := dir.Readdirnames(-1) // what could be read
	var all []Relation
	for _, name := range names {
		if pid, err := strconv.Atoi(name); err == nil {
			if r, ok := Look(pid); ok {
				all = append(all, r)
			}
		}
	}
	return all
}

// Look reads where a process stands; ok is false if there is no such process.
func Look(pid int) (r Relation, ok bool) {
	b, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if err != nil {
		return r, false
	}
	// The name, in brackets, may hold anything.
	i := bytes.LastIndexByte(b, ')')
	if i < 0 {
		return r, false
	}
	f := bytes.Fields(b[i+1:])
	if len(f) < 20 {
		return r, false
	}
	num := func(i int) int {
		n, err := strconv.Atoi(string(f[i]))
		ok = ok && err == nil
		return n
	}
	ok = true
	r = Relation{PID: pid, Parent: num(1), Group: num(2), Session: num(3), Zombie: f[0][0] == 'Z' || f[0][0] == 'X'}
	start, err := strconv.ParseUint(string(f[19]), 10, 64)
	r.Start = start
	return r, ok && err == nil
}

// TermIf asks the process that r is of to end, if it still is that one.
func TermIf(r Relation) { signalIf(r, unix.SIGTERM, nil) }

// KillIf kills the process that r is of, if it still is that one and still says
// yes once nothing else can take its number.
func KillIf(r Relation, still func() bool) { signalIf(r, unix.SIGKILL, still) }

func signalIf(r Relation, sig unix.Signal, still func() bool) {
	fd, err := OpenPID(r.PID)
	if err != nil {
		return
	}
	defer unix.Close(fd)
	if now, ok := Look(r.PID); ok && now.Start == r.Start && !now.Zombie && (still == nil || still()) {
		_ = Signal(fd, sig) // it has gone, or is another user's: the caller looks again
	}
}
