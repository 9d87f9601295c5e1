package master

import (
	"errors"
	"fmt"
	"io/fs"
	"os"

	"golang.org/x/sys/unix"

	"tako/internal/ipc"
	"tako/internal/logging"
	"tako/internal/wire"
)

// profilers may wait for the proxy to accept them.
const profilers = 4

// giveProfiling gives a proxy a profiling socket of its own. The path is the
// newest proxy's: one that drains keeps a socket that nobody can find. That it
// cannot be made costs the profiles alone.
func (s *server) giveProfiling(l *proxyLink) error {
	fd, err := listenProfiles(s.layout.Profiles())
	if err != nil {
		l.log.Warn("no profiles", logging.Err, err)
		return nil
	}
	defer fd.Close()
	return l.conn.Send(0, &wire.Profiling{}, fd)
}

// listenProfiles makes the socket at path anew. It listens only when nobody but
// its owner may connect.
func listenProfiles(path string) (ipc.FD, error) {
	if err := removeProfiles(path); err != nil {
		return 0, err
	}
	n, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return 0, fmt.Errorf("profiling socket: %w", err)
	}
	fd := ipc.FD(n)
	if err = unix.Bind(n, &unix.SockaddrUnix{Name: path}); err == nil {
		if err = os.Chmod(path, 0o600); err == nil {
			err = unix.Listen(n, profilers)
		}
	}
	if err != nil {
		fd.Close()
		return 0, fmt.Errorf("profiling socket %s: %w", path, err)
	}
	return fd, nil
}

// removeProfiles removes the socket at path, if one is there.
func removeProfiles(path string) error {
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("profiling socket: %w", err)
	}
	return nil
}
