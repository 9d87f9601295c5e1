package master

import (
	"errors"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"tako/internal/fdstore"
	"tako/internal/handoff"
	"tako/internal/ipc"
	"tako/internal/logging"
	"tako/internal/tako"
	"tako/internal/wire"
)

// What the service manager keeps for the tako-master after us, should we die, by
// name. What is kept as an "about" is a sealed memfd.
//
//	tako-lock                        the lock of the data root
//	tako-management                  the management socket, if we made it
//	tako-port-<http|https>-<address> each port that we opened
//	tako-state-<n>                   aboutState; the highest n is the newest
//	tako-proxy-<generation>-<part>   about (aboutChild), pidfd, output, channel
//	tako-agent-<generation>-<part>   the same
//	tako-instance-<app>.<n>-<part>   about (aboutInstance), pidfd, stdout, stderr
const (
	keptLock     = "tako-lock"
	keptMgmt     = "tako-management"
	keptPort     = "tako-port-"
	keptStates   = "tako-state-"
	keptInstance = "tako-instance-"
)

// The parts of a child and of an instance. An about is kept first, and a channel
// last: where there is a channel the rest is there too.
var (
	childParts    = []string{"about", "pidfd", "output", "channel"}
	instanceParts = []string{"about", "pidfd", "stdout", "stderr"}
)

// aboutState is what a tako-master knows and no child of it.
type aboutState struct {
	Tickets   [][]byte `json:"tickets"`
	PID       int      `json:"pid"`        // in the name of the management socket
	GroupsPID int      `json:"groups_pid"` // in the name of our control groups
	Agents    uint64   `json:"agents"`     // the newest generation
	Proxies   uint64   `json:"proxies"`
}

// aboutChild is what the next tako-master has to know of a child before it can
// speak with it.
type aboutChild struct {
	Role       wire.Role `json:"role"`
	Generation uint64    `json:"generation"`
	PID        int       `json:"pid"`
	Version    string    `json:"version"`
	Protocol   int       `json:"protocol"`
	Started    time.Time `json:"started"`
	Settings   string    `json:"settings"` // see settingsOf
}

// aboutInstance is what the next tako-master has to know of an instance should
// tako-agent have died too.
type aboutInstance struct {
	Start    wire.Start `json:"start"`
	PID      int        `json:"pid"`
	Started  time.Time  `json:"started"`
	Limits   string     `json:"limits"`
	Restarts uint64     `json:"restarts"`
}

// keeping is what of us is with the service manager.
type keeping struct {
	store  *fdstore.Store
	passed fdstore.Passed // what came back from it, until somebody takes it

	mu    sync.Mutex
	state string // the name of the newest state; guarded by mu
	n     uint64 // its number; guarded by mu
	full  bool   // it was said that there is no room; guarded by mu
}

func partsOf(base string, parts []string) []string {
	names := make([]string, len(parts))
	for i, p := range parts {
		names[i] = base + "-" + p
	}
	return names
}

func childName(role wire.Role, generation uint64) string {
	return string(role) + "-" + strconv.FormatUint(generation, 10)
}

func instanceNames(id tako.InstanceID) []string {
	return partsOf(keptInstance+id.String(), instanceParts)
}

// portName is the name of a port: an address without what a name may not have.
func portName(l listener) string {
	return keptPort + l.name + "-" + strings.ReplaceAll(l.addr.String(), ":", "_")
}

// keepAs has descriptors kept, all or none of them. Errors are said here: without
// it everything works, but for our own death.
func (s *server) keepAs(spare bool, names []string, fds ...ipc.FD) {
	put := s.kept.store.Keep
	if spare {
		put = s.kept.store.KeepSpare
	}
	for i, fd := range fds {
		err := put(names[i], fd)
		if err == nil {
			continue
		}
		s.kept.store.Drop(names...)
		full := errors.Is(err, fdstore.ErrFull)
		s.kept.mu.Lock()
		said := s.kept.full && full
		s.kept.full = s.kept.full || full
		s.kept.mu.Unlock()
		if !said {
			s.log.Warn("not kept with the service manager: should tako-master and tako-agent die at one time, it is lost", "name", names[i], logging.Err, err)
		}
		return
	}
}

// keepSockets has the lock, the ports and the management socket kept: those that
// are ours, and not of socket units.
func (s *server) keepSockets() {
	if s.kept.store == nil {
		return
	}
	if s.lock != nil {
		if fd, err := dupOf(s.lock); err == nil {
			s.keepAs(false, []string{keptLock}, fd)
			fd.Close()
		}
	}
	if s.mgmtOwn && s.mgmt != nil {
		if fd, err := dupOf(s.mgmt); err == nil {
			s.keepAs(false, []string{keptMgmt}, fd)
			fd.Close()
		}
	}
	if !s.activated {
		for _, l := range s.listeners {
			s.keepAs(false, []string{portName(l)}, l.fd)
		}
	}
}

// keepState has what only we know kept, in the place of what was.
func (s *server) keepState() {
	if s.kept.store == nil {
		return
	}
	s.kept.mu.Lock()
	defer s.kept.mu.Unlock()
	fd, err := handoff.Save(&aboutState{
		Tickets: s.tickets.current(), PID: os.Getpid(), GroupsPID: s.groups.pid,
		Agents: s.agentGeneration.Load(), Proxies: s.proxyGeneration.Load(),
	})
	if err != nil {
		s.log.Warn("state not kept with the service manager", logging.Err, err)
		return
	}
	defer fd.Close()
	before := s.kept.state
	s.kept.n++
	s.kept.state = keptStates + strconv.FormatUint(s.kept.n, 10)
	if err := s.kept.store.Keep(s.kept.state, fd); err != nil {
		s.log.Warn("state not kept with the service manager", logging.Err, err)
	}
	s.kept.store.Drop(before)
}

// keepChild has a child kept, which has been greeted.
func (s *server) keepChild(l *link) {
	if s.kept.store == nil {
		return
	}
	l.kept = s.kept.store
	l.names = partsOf(childName(l.role, l.generation), childParts)
	about, err := handoff.Save(&aboutChild{
		Role: l.role, Generation: l.generation, PID: l.child.PID, Version: l.version, Protocol: wire.ProtocolVersion, Started: l.startedAt,
		Settings: l.settings,
	})
	if err != nil {
		s.log.Warn("child not kept with the service manager", logging.Err, err)
		return
	}
	defer about.Close()
	h, err := l.child.HandOver()
	if err != nil {
		return // it has ended
	}
	defer h.PIDFD.Close()
	defer h.Output.Close()
	channel, _, err := l.conn.HandOver()
	if err != nil {
		return // as above
	}
	defer channel.Close()
	s.keepAs(false, l.names, about, h.PIDFD, h.Output, channel)
}

// keepInstance has an instance kept. Called with mu of its app held.
func (s *server) keepInstance(id tako.InstanceID, p *process) {
	if s.kept.store == nil || len(p.held) != len(instanceParts)-1 {
		return
	}
	about, err := handoff.Save(&aboutInstance{Start: *p.start, PID: p.pid, Started: p.startedAt, Limits: p.limits, Restarts: p.restarts})
	if err != nil {
		s.log.Warn("instance not kept with the service manager", logging.Instance, id.String(), logging.Err, err)
		return
	}
	defer about.Close()
	s.keepAs(true, instanceNames(id), append([]ipc.FD{about}, p.held...)...)
}

func (s *server) dropInstance(id tako.InstanceID) { s.kept.store.Drop(instanceNames(id)...) }

// keepAll has everything kept that there is but for the children.
func (s *server) keepAll() {
	if s.kept.store == nil {
		return
	}
	s.keepSockets()
	s.keepState()
	for _, a := range s.allApps() {
		a.mu.Lock()
		for n, p := range a.procs {
			s.keepInstance(a.instance(n), p)
		}
		a.mu.Unlock()
	}
}

// aboutOf reads an about, and closes it.
func aboutOf[T any](fd ipc.FD) (about T, err error) {
	defer fd.Close()
	err = handoff.Read(fd, &about)
	return about, err
}

// isPipe reports whether a descriptor is the reading end of a pipe.
func isPipe(fd ipc.FD) bool {
	var st unix.Stat_t
	if fd <= 0 || unix.Fstat(int(fd), &st) != nil || st.Mode&unix.S_IFMT != unix.S_IFIFO {
		return false
	}
	flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFL, 0)
	return err == nil && flags&unix.O_ACCMODE == unix.O_RDONLY
}

// endedPipe is the reading end of a pipe that nobody writes to.
func endedPipe() (ipc.FD, error) {
	var p [2]int
	if err := unix.Pipe2(p[:], unix.O_CLOEXEC); err != nil {
		return 0, err
	}
	ipc.FD(p[1]).Close()
	return ipc.FD(p[0]), nil
}

// takeLock takes the lock of the data root: the one that was kept, if it is that.
func (s *server) takeLock() (*os.File, error) {
	fd := s.kept.passed.Take(keptLock)
	if fd == 0 {
		return lockRoot(s.layout.Lock())
	}
	var kept, own unix.Stat_t
	if unix.Fstat(int(fd), &kept) != nil || unix.Stat(s.layout.Lock(), &own) != nil ||
		kept.Dev != own.Dev || kept.Ino != own.Ino || unix.Flock(int(fd), unix.LOCK_EX|unix.LOCK_NB) != nil {
		fd.Close() // of another data root: the settings have changed
		s.kept.store.Drop(keptLock)
		s.kept.store.Flush()
		return lockRoot(s.layout.Lock())
	}
	f := fd.File("lock")
	writePID(f)
	return f, nil
}
