// Package fdstore keeps duplicates of descriptors with the service manager, which
// passes them to the next process of the unit when this one has died: systemd's
// FDSTORE=1, FDNAME= and FDSTOREREMOVE=1, and LISTEN_FDS at a start.
//
// It promises that nobody waits for the service manager, that what is kept and
// dropped arrives there in order, and that a bound on their number is kept. What
// comes back is not to be trusted: it is for whoever asks for a name to look what
// the descriptor is. Without a service manager, or with one that keeps nothing,
// everything here does nothing, and nothing comes back.
package fdstore

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/hashicorp/go-hclog"
	"golang.org/x/sys/unix"

	"tako/internal/ipc"
)

// Prefix begins the name of everything that is kept: what has another name comes
// from a socket unit, as does what ends like the name of one.
const (
	Prefix     = "tako-"
	unitSuffix = ".socket"
)

// The limits of what is kept.
const (
	// MaxKept bounds the descriptors, the same as FileDescriptorStoreMax= in the
	// unit. A smaller number there ($FDSTORE, from systemd 254 on) holds.
	MaxKept = 4096
	// Reserved of them are for tako's own processes and sockets, and not for what
	// is kept with KeepSpare.
	Reserved = 64
	// MaxName is the longest name, in bytes.
	MaxName = 255
	// sendTime bounds the wait for a service manager that does not read.
	sendTime = 5 * time.Second
)

// ErrFull is returned when there is no room for another descriptor.
var ErrFull = errors.New("the service manager's store of descriptors is full: raise FileDescriptorStoreMax= in the unit, " + strconv.Itoa(MaxKept) + " at most")

// A Store is the service manager's store of this unit. A nil Store keeps nothing.
// Its methods may be called from any goroutine.
type Store struct {
	log  hclog.Logger
	fd   ipc.FD
	to   unix.Sockaddr
	most int

	mu     sync.Mutex
	names  map[string]bool // that are kept; guarded by mu
	queue  []message       // guarded by mu
	busy   bool            // guarded by mu: a goroutine sends
	idle   *sync.Cond      // of mu: the queue is empty and nobody sends
	failed bool            // guarded by mu: the last message did not get there
}

type message struct {
	text string
	fd   ipc.FD // ours; 0 for none
}

// Open returns the store of the service manager that started this process, nil
// if none did. names are already there. The caller closes it.
func Open(names []string, log hclog.Logger) (*Store, error) {
	path := os.Getenv("NOTIFY_SOCKET")
	if path == "" || path[0] != '/' && path[0] != '@' {
		return nil, nil //nolint:nilnil // a nil Store is one that keeps nothing
	}
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("store of descriptors: %w", err)
	}
	wait := unix.NsecToTimeval(sendTime.Nanoseconds())
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &wait); err != nil {
		ipc.FD(fd).Close()
		return nil, fmt.Errorf("store of descriptors: %w", err)
	}
	s := &Store{log: log, fd: ipc.FD(fd), to: &unix.SockaddrUnix{Name: path}, most: MaxKept, names: make(map[string]bool)}
	if n, err := strconv.Atoi(os.Getenv("FDSTORE")); err == nil && n >= 0 {
		s.most = min(n, MaxKept)
	}
	s.idle = sync.NewCond(&s.mu)
	for _, name := range names {
		s.names[name] = true
	}
	return s, nil
}

// Close waits until everything was sent, and forgets the store, which stays. It
// may come twice; nothing else may come after it.
func (s *Store) Close() {
	if s == nil {
		return
	}
	s.Flush()
	s.mu.Lock()
	defer s.mu.Unlock()
	s.fd.Close()
	s.fd = 0
}

// ValidName reports whether a name can be given to the service manager: Prefix
// and then printable ASCII but no colon, MaxName bytes at most, and not the name
// of a socket unit, which is what its sockets are called that have no other.
func ValidName(name string) bool {
	for i := range len(name) {
		if name[i] <= ' ' || name[i] >= 0x7f || name[i] == ':' {
			return false
		}
	}
	return strings.HasPrefix(name, Prefix) && !strings.HasSuffix(name, unitSuffix) && len(name) <= MaxName
}

// Names returns what is kept, sorted.
func (s *Store) Names() []string {
	if s == nil {
		return nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	names := make([]string, 0, len(s.names))
	for name := range s.names {
		names = append(names, name)
	}
	slices.Sort(names)
	return names
}

// Keep has a duplicate of fd kept under a name that nothing else has; a name that
// is kept already stays what it is. It does not wait. The error is ErrFull, or
// the system's.
func (s *Store) Keep(name string, fd ipc.FD) error { return s.keep(name, fd, 0) }

// KeepSpare is Keep for what may be missing: it leaves Reserved free.
func (s *Store) KeepSpare(name string, fd ipc.FD) error { return s.keep(name, fd, Reserved) }

func (s *Store) keep(name string, fd ipc.FD, reserve int) error {
	if s == nil {
		return nil
	}
	if !ValidName(name) {
		return fmt.Errorf("keep descriptor %q: not a name for the service manager", name)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.names[name] {
		return nil
	}
	if len(s.names) >= s.most-reserve {
		return fmt.Errorf("keep descriptor %s: %w", name, ErrFull)
	}
	dup, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 3)
	if err != nil {
		return fmt.Errorf("keep descriptor %s: %w", name, err)
	}
	s.names[name] = true
	s.send(message{"FDSTORE=1\nFDNAME=" + name, ipc.FD(dup)})
	return nil
}

// Drop has what is kept under these names closed. It does not wait.
func (s *Store) Drop(names ...string) {
	if s == nil {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, name := range names {
		if s.names[name] {
			delete(s.names, name)
			s.send(message{text: "FDSTOREREMOVE=1\nFDNAME=" + name})
		}
	}
}

// Flush waits until everything was sent, or given up.
func (s *Store) Flush() {
	if s == nil {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for s.busy {
		s.idle.Wait()
	}
}

// send puts a message into the queue. Called with mu held.
func (s *Store) send(m message) {
	s.queue = append(s.queue, m)
	if s.busy {
		return
	}
	s.busy = true
	go s.deliver()
}

// deliver sends until the queue is empty.
func (s *Store) deliver() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for len(s.queue) > 0 {
		m := s.queue[0]
		s.queue = s.queue[1:]
		flags := unix.MSG_NOSIGNAL
		if s.failed {
			flags |= unix.MSG_DONTWAIT // it was waited for once
		}
		s.mu.Unlock()
		err := s.tell(m, flags)
		m.fd.Close()
		s.mu.Lock()
		said := s.failed
		if s.failed = err != nil; s.failed && !said {
			s.log.Warn("the service manager does not take descriptors: should tako-master die, everything starts anew", "error", err)
		}
	}
	s.busy = false
	s.idle.Broadcast()
}

func (s *Store) tell(m message, flags int) error {
	var rights []byte
	if m.fd != 0 {
		rights = unix.UnixRights(int(m.fd))
	}
	for {
		err := unix.Sendmsg(int(s.fd), []byte(m.text), rights, s.to, flags)
		if !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}

// Passed are descriptors that came from the service manager, by name.
type Passed map[string]ipc.FD

// Take takes a descriptor out, for the caller to close; 0 if it is not there.
func (p Passed) Take(name string) ipc.FD {
	fd := p[name]
	delete(p, name)
	return fd
}

// Close closes what nobody took.
func (p Passed) Close() {
	for name, fd := range p {
		fd.Close()
		delete(p, name)
	}
}

// Names returns the names of what is left, sorted.
func (p Passed) Names() []string {
	names := make([]string, 0, len(p))
	for name := range p {
		names = append(names, name)
	}
	slices.Sort(names)
	return names
}

// Sort tells what was kept from what comes from socket units, of descriptors
// passed as first, first+1 … by these names. All become close-on-exec. Of two
// with one name the later is kept, as a later Keep would mean it.
func Sort(names []string, first int) (kept Passed, units map[ipc.FD]string) {
	kept, units = make(Passed), make(map[ipc.FD]string)
	for i, name := range names {
		fd := ipc.FD(first + i)
		unix.CloseOnExec(int(fd))
		if !strings.HasPrefix(name, Prefix) || strings.HasSuffix(name, unitSuffix) {
			units[fd] = name
			continue
		}
		kept[name].Close()
		kept[name] = fd
	}
	return kept, units
}
