package master

import (
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"tako/internal/logging"
	"tako/internal/supervise"
	"tako/internal/tako"
	"tako/internal/wire"
)

// LeftoverWait is how long processes of a tako-master that died may take to end:
// a tako-agent that it left behind stops its instances in less.
const LeftoverWait = ChildLeave

// LeftoverLook is the least time between the two looks that must agree on what was
// left: a look is no snapshot, and a parent that ends meanwhile is missing in it.
const LeftoverLook = 20 * time.Millisecond

// noInstances is for endLeftovers, when none of ours is to go on.
func noInstances() map[string]bool { return nil }

// endLeftovers ends the processes of instances of this data root that no living
// tako-master has, but for the known ones, so that nothing runs twice. While their
// tako-agent lives it is left to do that; after wait they are killed. Processes
// whose environment we may not read are not found. It returns early once giveUp,
// which may be nil, is closed.
func (s *server) endLeftovers(wait time.Duration, known func() map[string]bool, giveUp <-chan struct{}) {
	if s.follows() {
		return // they may be the owner's
	}
	told := make(map[int]bool)
	var before map[supervise.Relation]bool
	for end, pause := time.Now().Add(wait), LeftoverLook; ; pause = min(2*pause, 50*time.Millisecond) {
		left := s.leftovers(known)
		for r, stopping := range left {
			_, again := before[r]
			switch {
			case !again:
			case !time.Now().Before(end):
				supervise.KillIf(r, nil)
			case !stopping && !told[r.PID]:
				told[r.PID] = true
				s.log.Warn("ending a process that a dead tako-master left", logging.PID, r.PID)
				supervise.TermIf(r)
			}
		}
		switch {
		case len(left) == 0:
			return
		case time.Since(end) > OrphanWait:
			s.log.Error("a process that a dead tako-master left does not end", "processes", len(left))
			return
		}
		before = left
		select {
		case <-time.After(pause): // a stranger's end sends no event
		case <-giveUp:
			return
		}
	}
}

// leftovers returns the processes that endLeftovers is to end; the value is true
// while a tako-agent is about to.
func (s *server) leftovers(known func() map[string]bool) map[supervise.Relation]bool {
	all := make(map[int]supervise.Relation)
	for _, r := range supervise.Processes() {
		all[r.PID] = r
	}
	names := known() // after the look: an instance is known before it is started
	found := make(map[supervise.Relation]bool)
	for _, r := range all {
		name, ok := s.traces(r.PID)
		if !ok || names[name] || r.Zombie {
			continue
		}
		above := r     // the first ancestor that is none of an instance
		for range 64 { // deep enough
			next, ok := all[above.Parent]
			if !ok {
				break
			}
			above = next
			if _, of := s.traces(above.PID); !of {
				break
			}
		}
		program := programOf(above.PID)
		agents := program == wire.Agent
		if agents {
			program = programOf(above.Parent)
		}
		if program != wire.Master {
			found[r] = agents && above.PID != s.agentPID()
		}
	}
	return found
}

// agentPID is the number of our agent, 0 while there is none.
func (s *server) agentPID() int {
	if l := s.agentNow(); l != nil {
		return l.child.PID
	}
	return 0
}

// traces returns the name of the instance that a process is of, if it is one of
// this data root. A step of a deploy has the name of an instance without a number.
func (s *server) traces(pid int) (name string, ok bool) {
	b, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/environ")
	if err != nil {
		return "", false
	}
	var app, n, data string
	for v := range strings.SplitSeq(string(b), "\x00") {
		switch key, value, _ := strings.Cut(v, "="); key {
		case "TAKO_APP":
			app = value
		case "TAKO_INSTANCE":
			n = value
		case "TAKO_DATA_DIR":
			data = value
		}
	}
	id, err := tako.ParseAppID(app)
	if err != nil || data != s.layout.App(id).Data() {
		return "", false
	}
	return app + "." + n, true
}

// programOf is the program of tako that a process runs, or another's name.
func programOf(pid int) wire.Role {
	b, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/cmdline")
	if err != nil {
		return ""
	}
	argv0, _, _ := strings.Cut(string(b), "\x00")
	if name := filepath.Base(argv0); name != "tako-server" {
		return wire.Role(name)
	}
	return wire.Master // its second name
}

// instances names the instances that we have.
func (s *server) instances() map[string]bool {
	names := make(map[string]bool)
	for _, a := range s.allApps() {
		a.mu.Lock()
		for n := range a.procs {
			names[a.instance(n).String()] = true
		}
		a.mu.Unlock()
	}
	return names
}
