package takotest

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

// Manager stands in for systemd as far as tako-master has to do with it: it keeps
// the descriptors that come with FDSTORE=1 under their FDNAME, forgets those of
// FDSTOREREMOVE=1 and those whose other end has gone, and passes the rest to the
// next process as LISTEN_FDS. Its methods may be called from any goroutine.
type Manager struct {
	path string
	fd   int
	done chan struct{} // closed when nothing is received any more

	mu   sync.Mutex
	kept []keptFD
}

type keptFD struct {
	name string
	fd   int
}

func newManager(path string) (*Manager, error) {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	if err := unix.Bind(fd, &unix.SockaddrUnix{Name: path}); err != nil {
		return nil, errors.Join(err, unix.Close(fd))
	}
	if err := os.Chmod(path, 0o777); err != nil { // for a server of another user
		return nil, errors.Join(err, unix.Close(fd))
	}
	m := &Manager{path: path, fd: fd, done: make(chan struct{})}
	go m.receive()
	return m, nil
}

// lastWord ends receive.
const lastWord = "close"

func (m *Manager) receive() {
	defer close(m.done)
	buf, oob := make([]byte, 64<<10), make([]byte, unix.CmsgSpace(4*253))
	for {
		n, oobn, _, _, err := unix.Recvmsg(m.fd, buf, oob, unix.MSG_CMSG_CLOEXEC)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil || string(buf[:n]) == lastWord {
			return
		}
		var fds []int
		if msgs, err := unix.ParseSocketControlMessage(oob[:oobn]); err == nil {
			for _, msg := range msgs {
				if rights, err := unix.ParseUnixRights(&msg); err == nil {
					fds = append(fds, rights...)
				}
			}
		}
		m.take(string(buf[:n]), fds)
	}
}

func (m *Manager) take(text string, fds []int) {
	m.mu.Lock()
	defer m.mu.Unlock()
	var keep, forget bool
	name := "stored"
	for line := range strings.Lines(text) {
		switch key, value, _ := strings.Cut(strings.TrimSpace(line), "="); key {
		case "FDSTORE":
			keep = value == "1"
		case "FDSTOREREMOVE":
			forget = value == "1"
		case "FDNAME":
			name = value
		}
	}
	if keep {
		for _, fd := range fds {
			m.kept = append(m.kept, keptFD{name, fd})
		}
		return
	}
	if forget {
		m.forget(func(k keptFD) bool { return k.name == name })
	}
	for _, fd := range fds {
		_ = unix.Close(fd)
	}
}

// forget closes some of what is kept. Called with mu held.
func (m *Manager) forget(which func(keptFD) bool) {
	m.kept = slices.DeleteFunc(m.kept, func(k keptFD) bool {
		yes := which(k)
		if yes {
			_ = unix.Close(k.fd)
		}
		return yes
	})
}

// Kept are the names of what is kept, in the order in which it came.
func (m *Manager) Kept() []string {
	m.mu.Lock()
	defer m.mu.Unlock()
	var names []string
	for _, k := range m.kept {
		names = append(names, k.name)
	}
	return names
}

// Empty closes everything that is kept, as systemd does when a unit has stopped.
func (m *Manager) Empty() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.forget(func(keptFD) bool { return true })
}

// Change puts another descriptor in the place of what is kept under a name. Change
// owns the one it is given; the one it returns is the Manager's.
func (m *Manager) Change(name string, change func(fd int) (int, error)) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	for i, k := range m.kept {
		if k.name == name {
			fd, err := change(k.fd)
			m.kept[i].fd = fd
			return err
		}
	}
	return fmt.Errorf("nothing is kept as %s", name)
}

// pass passes what is kept to a process that is to be started. The caller calls
// what it returns once it was.
func (m *Manager) pass(cmd *exec.Cmd) (started func()) {
	if m == nil {
		return func() {}
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.forget(func(k keptFD) bool { return hungUp(k.fd) })
	cmd.Env = append(cmd.Env, "NOTIFY_SOCKET="+m.path)
	var names []string
	for _, k := range m.kept {
		fd, err := Dup(k.fd)
		if err != nil {
			continue
		}
		names = append(names, k.name)
		cmd.ExtraFiles = append(cmd.ExtraFiles, os.NewFile(uintptr(fd), k.name))
	}
	if len(names) > 0 {
		// The number of a process is known to itself first.
		cmd.Args = append([]string{"sh", "-c", `export LISTEN_PID=$$; exec "$0" "$@"`, cmd.Path}, cmd.Args[1:]...)
		cmd.Path = "/bin/sh"
		cmd.Env = append(cmd.Env, fmt.Sprintf("LISTEN_FDS=%d", len(names)), "LISTEN_FDNAMES="+strings.Join(names, ":"))
	}
	return func() {
		for _, f := range cmd.ExtraFiles {
			_ = f.Close()
		}
	}
}

// hungUp reports whether the other end of a socket or pipe has gone.
func hungUp(fd int) bool {
	p := []unix.PollFd{{Fd: int32(fd)}}
	_, err := unix.Poll(p, 0)
	return err == nil && p[0].Revents&(unix.POLLERR|unix.POLLHUP) != 0
}

// close ends the manager and closes what it keeps. It may come twice.
func (m *Manager) close() {
	select {
	case <-m.done:
		return
	default:
	}
	if fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0); err == nil {
		_ = unix.Sendto(fd, []byte(lastWord), 0, &unix.SockaddrUnix{Name: m.path})
		_ = unix.Close(fd)
		<-m.done
	}
	m.Empty()
	_ = unix.Close(m.fd)
}

// Sealed returns a memfd that holds b and can never change again.
func Sealed(b []byte) (int, error) {
	fd, err := unix.MemfdCreate("takotest", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		return -1, err
	}
	_, err = unix.Write(fd, b)
	if err == nil {
		_, err = unix.FcntlInt(uintptr(fd), unix.F_ADD_SEALS, unix.F_SEAL_SEAL|unix.F_SEAL_SHRINK|unix.F_SEAL_GROW|unix.F_SEAL_WRITE)
	}
	if err != nil {
		return -1, errors.Join(err, unix.Close(fd))
	}
	return fd, nil
}

// Dup duplicates a descriptor, close-on-exec.
func Dup(fd int) (int, error) { return unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 3) }
