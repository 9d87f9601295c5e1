package launch

import (
	"bytes"
	"context"
	"encoding/json"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"tako/internal/supervise"
	"tako/internal/wire"
)

// Without a control group, what an instance has started is found by the traces
// it cannot well lose: the session it began in, its parents as long as they live,
// and, once they have died and it is a child of a reaper of tako's, the variables
// that tako gave to its ancestors. A process that both left the session and
// cleaned its environment is not found.

// The environment variables that tell whose a process is.
const (
	envApp      = "TAKO_APP="
	envInstance = "TAKO_INSTANCE="
)

// SweepName is argv[0] of the helper that kills strays as their own user.
const SweepName = "tako-sweep"

// strays are the processes that a leader's end left behind.
type strays struct {
	Leader int
	// App and Instance are the variables of its environment, with their names, ""
	// for one that it had not.
	App, Instance string
	// Reapers adopt orphans: tako-agent, and tako-master when that had died.
	Reapers []int
	// Spare are the leaders of other processes: nothing of them is a stray.
	Spare []int
}

// parent is tako-master, who started this process. Should it have died since,
// the orphans of a dead tako-agent are somebody else's.
var parent = os.Getppid()

// find returns the strays that run now.
func (s *strays) find() []supervise.Relation {
	all := supervise.Processes()
	parents := make(map[int]int, len(all))
	is := make(map[int]bool)
	for _, r := range all {
		parents[r.PID] = r.Parent
		if !r.Zombie && r.PID != s.Leader && s.one(r) {
			is[r.PID] = true
		}
	}
	var found []supervise.Relation
	for _, r := range all {
		for pid, depth := r.PID, 0; pid > 1 && depth < 64; pid, depth = parents[pid], depth+1 {
			if is[pid] && !r.Zombie {
				found = append(found, r)
				break
			}
		}
	}
	return found
}

// one reports whether a process is a stray by itself, not by its parents.
func (s *strays) one(r supervise.Relation) bool {
	switch {
	case slices.Contains(s.Spare, r.PID) || slices.Contains(s.Spare, r.Session):
		return false
	case r.Session == s.Leader || r.Group == s.Leader || r.Parent == s.Leader:
		return true
	}
	return slices.Contains(s.Reapers, r.Parent) && s.App != "" && s.marked(r.PID)
}

// marked reports whether a process has the variables of its environment.
func (s *strays) marked(pid int) bool {
	b, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/environ")
	if err != nil {
		return false // it has gone, or is another user's
	}
	app, instance := "", ""
	for v := range bytes.SplitSeq(b, []byte{0}) {
		switch {
		case bytes.HasPrefix(v, []byte(envApp)):
			app = string(v)
		case bytes.HasPrefix(v, []byte(envInstance)):
			instance = string(v)
		}
	}
	return app == s.App && instance == s.Instance
}

// kill kills strays until none is left, for EmptyTimeout at most.
func (s *strays) kill() {
	for end, pause := time.Now().Add(EmptyTimeout), time.Millisecond; time.Now().Before(end); pause = min(2*pause, 20*time.Millisecond) {
		found := s.find()
		if len(found) == 0 {
			return
		}
		for _, r := range found {
			supervise.KillIf(r, nil)
		}
		time.Sleep(pause) // a stranger's end sends no event
	}
}

// sweep kills what a leader's end left behind. Whoever may not read what other
// users' processes have in their environment has a helper do that as their user.
func sweep(c *wire.Command, leader int) {
	s := strays{Leader: leader, Reapers: []int{os.Getpid()}, Spare: supervise.Own()}
	if parent > 1 {
		s.Reapers = append(s.Reapers, parent)
	}
	for _, v := range c.Env {
		switch {
		case strings.HasPrefix(v, envApp):
			s.App = v
		case strings.HasPrefix(v, envInstance):
			s.Instance = v
		}
	}
	s.Spare = slices.DeleteFunc(s.Spare, func(pid int) bool { return pid == leader })
	s.kill()
	if c.User.UID == 0 || int(c.User.UID) == os.Geteuid() || s.App == "" {
		return
	}
	for _, r := range supervise.Processes() {
		if slices.Contains(s.Reapers, r.Parent) && !slices.Contains(s.Spare, r.PID) && r.PID != leader && !r.Zombie && belongs(r.PID, c.User.UID) {
			ctx, cancel := context.WithTimeout(context.Background(), 2*EmptyTimeout)
			defer cancel()
			id := &Identity{UID: c.User.UID, GID: c.User.GID}
			_ = Help(ctx, SweepName, id, s, 0, &struct{}{}) // what it cannot kill cannot be killed
			return
		}
	}
}

// belongs reports whether a process runs as this user.
func belongs(pid int, uid uint32) bool {
	b, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/status")
	if err != nil {
		return false
	}
	for line := range strings.Lines(string(b)) {
		if f := strings.Fields(line); len(f) > 1 && f[0] == "Uid:" {
			return f[1] == strconv.FormatUint(uint64(uid), 10)
		}
	}
	return false
}

// Sweep is the helper SweepName.
func Sweep(request []byte, _ *os.File) (any, error) {
	var s strays
	if err := json.Unmarshal(request, &s); err != nil {
		return nil, err
	}
	s.Spare = append(s.Spare, os.Getpid())
	s.kill()
	return struct{}{}, nil
}
