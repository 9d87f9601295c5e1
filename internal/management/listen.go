package management

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// listenBacklog is how many clients may wait to be accepted.
const listenBacklog = 1024

// probeTimeout bounds the attempt to reach another server.
const probeTimeout = time.Second

// newSocketAge is for how long a socket that refuses, of a process that lives,
// may be between its bind and its listen.
const newSocketAge = 10 * time.Second

// Listen makes the socket path (tako-{pid}.sock) with the given mode and, unless
// gid is 0, group, and then points the symbolic link (tako.sock) to it. There is
// no moment at which the socket is open to more than it will be. It clears away
// what dead servers left: the link, and tako-{pid}.sock beside it; a living
// server, and anything that is not a socket, is an error and stays. The caller
// calls Unlisten in the end.
func Listen(path, link string, mode fs.FileMode, gid uint32) (*net.UnixListener, error) {
	path, link, err := absolute(path, link)
	if err != nil {
		return nil, err
	}
	if err := clearLeftovers(path, link); err != nil {
		return nil, err
	}
	ln, err := bind(path, mode, gid)
	if err != nil {
		return nil, err
	}
	if err := Link(path, link); err != nil {
		_ = ln.Close()
		_ = os.Remove(path)
		return nil, err
	}
	return ln, nil
}

// Unlisten takes away the link, if it still points to path, and the socket. What
// is gone already is fine.
func Unlisten(path, link string) error {
	path, link, err := absolute(path, link)
	if err != nil {
		return err
	}
	return errors.Join(Unlink(path, link), removeSocket(path))
}

// Link points link to path, at once for everybody: a text relative to the
// link's directory is put beside it and renamed. A link that is there is
// replaced, a socket too; anything else is an error.
func Link(path, link string) error {
	path, link, err := absolute(path, link)
	if err != nil {
		return err
	}
	if st, err := os.Lstat(link); err == nil && st.Mode()&(fs.ModeSymlink|fs.ModeSocket) == 0 {
		return inTheWay(link)
	}
	text, err := filepath.Rel(filepath.Dir(link), path)
	if err != nil {
		return fmt.Errorf("link %s: %w", link, err)
	}
	tmp := filepath.Join(filepath.Dir(link), fmt.Sprintf(".%s.%d", filepath.Base(link), os.Getpid()))
	if st, err := os.Lstat(tmp); err == nil && st.Mode()&fs.ModeSymlink != 0 {
		_ = os.Remove(tmp) // of an earlier process with our number
	}
	if err := os.Symlink(text, tmp); err != nil {
		return fmt.Errorf("link %s: %w", link, err)
	}
	if err := os.Rename(tmp, link); err != nil {
		_ = os.Remove(tmp)
		return fmt.Errorf("link %s: %w", link, err)
	}
	return nil
}

// Unlink takes away link if it points to path.
func Unlink(path, link string) error {
	path, link, err := absolute(path, link)
	if err != nil {
		return err
	}
	if to, ok := target(link); !ok || to != path {
		return nil
	}
	if err := os.Remove(link); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove link: %w", err)
	}
	return nil
}

func absolute(path, link string) (string, string, error) {
	p, err1 := filepath.Abs(path)
	l, err2 := filepath.Abs(link)
	if err := errors.Join(err1, err2); err != nil {
		return "", "", fmt.Errorf("management socket: %w", err)
	}
	return p, l, nil
}

// target returns what a symbolic link points to, as an absolute path. The system
// would not follow another user's link in a directory like /tmp, not even for
// root; reading it is always allowed.
func target(link string) (string, bool) {
	to, err := os.Readlink(link)
	if err != nil {
		return "", false
	}
	if !filepath.IsAbs(to) {
		to = filepath.Join(filepath.Dir(link), to)
	}
	return filepath.Clean(to), true
}

func bind(path string, mode fs.FileMode, gid uint32) (*net.UnixListener, error) {
	fail := func(err error) error { return fmt.Errorf("listen on %s: %w", path, err) }
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return nil, fail(err)
	}
	f := os.NewFile(uintptr(fd), path)
	defer f.Close() // FileListener has a copy
	// A socket's file takes its mode from the descriptor, less the umask: this way
	// it is never wider than wanted. Nobody can connect before listen, either.
	if err := unix.Fchmod(fd, 0o600); err != nil {
		return nil, fail(err)
	}
	if err := unix.Bind(fd, &unix.SockaddrUnix{Name: path}); err != nil {
		if errors.Is(err, unix.EINVAL) {
			return nil, tooLong(path, err)
		}
		return nil, fail(err)
	}
	undo := func(err error) (*net.UnixListener, error) {
		_ = os.Remove(path)
		return nil, fail(err)
	}
	if gid != 0 {
		if err := os.Lchown(path, -1, int(gid)); err != nil {
			return undo(err)
		}
	}
	if err := unix.Fchmodat(unix.AT_FDCWD, path, uint32(mode.Perm()), 0); err != nil {
		return undo(err)
	}
	if err := unix.Listen(fd, listenBacklog); err != nil {
		return undo(err)
	}
	ln, err := net.FileListener(f)
	if err != nil {
		return undo(err)
	}
	u, ok := ln.(*net.UnixListener)
	if !ok {
		_ = ln.Close()
		return undo(fmt.Errorf("a %T, not a Unix socket", ln))
	}
	u.SetUnlinkOnClose(false)
	return u, nil
}

func tooLong(path string, err error) error {
	return fmt.Errorf("socket %s: the path has %d bytes, the system takes 107; choose a shorter one with --socket: %w", path, len(path), err)
}

func inTheWay(path string) error {
	return fmt.Errorf("%s is in the way and is not a socket: move it, or choose another path with --socket", path)
}

// clearLeftovers removes what dead servers left. A living one is an error.
func clearLeftovers(path, link string) error {
	if err := clearOne(path); err != nil {
		return err
	}
	if err := clearOne(link); err != nil {
		return err
	}
	return clearDead(link)
}

// clearDead removes the sockets of dead servers beside the link.
func clearDead(link string) error {
	stem := strings.TrimSuffix(filepath.Base(link), ".sock") + "-"
	entries, err := os.ReadDir(filepath.Dir(link))
	if err != nil {
		return fmt.Errorf("management socket: %w", err)
	}
	for _, e := range entries {
		num, ok := strings.CutPrefix(strings.TrimSuffix(e.Name(), ".sock"), stem)
		pid, err := strconv.ParseInt(num, 10, 32)
		if !ok || err != nil || pid <= 0 || e.Type() != fs.ModeSocket || !strings.HasSuffix(e.Name(), ".sock") {
			continue
		}
		full := filepath.Join(filepath.Dir(link), e.Name())
		if info, err := e.Info(); err != nil || time.Since(info.ModTime()) < newSocketAge && lives(int(pid)) {
			continue
		}
		if _, err := probe(full); errors.Is(err, unix.ECONNREFUSED) {
			_ = os.Remove(full) // another user's, if this fails
		}
	}
	return nil
}

// clearOne removes a dead socket, or a link to none that lives.
func clearOne(name string) error {
	st, err := os.Lstat(name)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("management socket: %w", err)
	}
	socket := name
	if st.Mode()&fs.ModeSymlink != 0 {
		socket, _ = target(name)
		to, err := os.Lstat(socket)
		switch {
		case errors.Is(err, fs.ErrNotExist):
			return remove(name)
		case err != nil:
			return fmt.Errorf("management socket: %w", err)
		case to.Mode()&fs.ModeSocket == 0:
			return fmt.Errorf("%s points to %s, which is not a socket: move it, or choose another path with --socket", name, socket)
		}
	} else if st.Mode()&fs.ModeSocket == 0 {
		return inTheWay(name)
	}
	pid, err := probe(socket)
	switch {
	case err == nil:
		who := "a server"
		if pid > 0 {
			who = fmt.Sprintf("the server with pid %d", pid)
		}
		return fmt.Errorf("%s answers at %s already: stop it first, or choose another path with --socket", who, name)
	case errors.Is(err, unix.ECONNREFUSED):
		return remove(name)
	case errors.Is(err, fs.ErrNotExist):
		return nil
	}
	return fmt.Errorf("cannot tell whether a server lives at %s; if none does, remove it: %w", name, err)
}

func remove(name string) error {
	if err := os.Remove(name); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove what a dead server left: %w", err)
	}
	return nil
}

func removeSocket(path string) error {
	if st, err := os.Lstat(path); err != nil || st.Mode()&fs.ModeSocket == 0 {
		return nil //nolint:nilerr // gone, or not ours
	}
	return remove(path)
}

// probe connects to a socket and returns its listener's pid, 0 if that is not
// known. A queue that is full is a living server's.
func probe(path string) (int32, error) {
	c, err := net.DialTimeout("unix", path, probeTimeout) //nolint:noctx // bounded by itself
	if errors.Is(err, unix.EAGAIN) || errors.Is(err, os.ErrDeadlineExceeded) {
		return 0, nil
	}
	if err != nil {
		return 0, err
	}
	defer c.Close() // nothing was written
	u, ok := c.(*net.UnixConn)
	if !ok {
		return 0, nil
	}
	p, err := peerOf(u)
	if err != nil {
		return 0, nil // it answers; who it is was only for the text
	}
	return p.PID, nil
}

func lives(pid int) bool {
	fd, err := unix.PidfdOpen(pid, 0)
	if err == nil {
		_ = unix.Close(fd)
	}
	return !errors.Is(err, unix.ESRCH)
}

// ListenBeside is Listen where a living server may have the link already: then the
// link stays that one's, until TakeLink.
func ListenBeside(path, link string, mode fs.FileMode, gid uint32) (*net.UnixListener, error) {
	path, link, err := absolute(path, link)
	if err != nil {
		return nil, err
	}
	if _, err := probe(link); err != nil {
		return Listen(path, link, mode, gid) // and says what is wrong with it
	}
	if err := clearOne(path); err != nil {
		return nil, err
	}
	return bind(path, mode, gid)
}

// TakeLink points link to path once nobody answers at it any more; it does
// nothing if it leads there already. A living server's is an error. What dead
// servers left beside it is cleared away.
func TakeLink(path, link string) error {
	path, link, err := absolute(path, link)
	if err != nil {
		return err
	}
	if to, ok := target(link); ok && to == path {
		return nil
	}
	if err := clearOne(link); err != nil {
		return err
	}
	if err := Link(path, link); err != nil {
		return err
	}
	return clearDead(link)
}
