package master

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"tako/internal/paths"
	"tako/internal/tako"
)

// makeTree makes the folders of a server, mends the modes of those that are
// ours, and refuses what belongs to somebody else with the command that would
// change it. Folders of one app are the agent's work: wire.Tree.
func makeTree(l paths.Layout) error {
	if err := makeRoot(l.Data, "--data-dir", 0o711); err != nil {
		return err
	}
	for dir, mode := range map[string]fs.FileMode{
		l.Apps(): 0o711, l.Certs(): 0o700, l.ACME(): 0o700, l.Backups(): 0o700,
	} {
		if err := makeOwn(dir, mode); err != nil {
			return err
		}
	}
	if filepath.Dir(l.Socket) != l.Run {
		if _, err := os.Stat(filepath.Dir(l.Socket)); err != nil {
			return fmt.Errorf("the folder of --socket: %w: make it first", err)
		}
		if err := makeOwn(l.Run, 0o711); err != nil {
			return err
		}
	} else if err := makeRun(l.Run); err != nil {
		return err
	}
	return makeOwn(l.Instances(), 0o711)
}

// makeRoot makes a folder and what is missing above it.
func makeRoot(dir, flag string, mode fs.FileMode) error {
	if err := os.MkdirAll(filepath.Dir(dir), 0o755); err != nil {
		return fmt.Errorf("%s: %w: make it, or choose another folder", flag, err)
	}
	return makeOwn(dir, mode)
}

// makeRun makes the run directory when it is missing. One that exists may be
// shared with others (/run/tako of a package is not): its mode is left alone.
func makeRun(dir string) error {
	fi, err := os.Stat(dir)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return makeRoot(dir, "--socket", 0o755)
	case err != nil:
		return fmt.Errorf("run directory: %w", err)
	case !fi.IsDir():
		return fmt.Errorf("run directory: %s is not a folder: choose another --socket", dir)
	}
	if st, ok := fi.Sys().(*syscall.Stat_t); ok && st.Uid != 0 && int(st.Uid) != os.Geteuid() {
		return fmt.Errorf("run directory: %s belongs to uid %d, who could put something else in the place of the socket: choose another --socket, or run: %s", dir, st.Uid, chownLine(dir))
	}
	if err := unix.Access(dir, unix.W_OK|unix.X_OK); err != nil {
		return fmt.Errorf("run directory: %s is not writable for uid %d: choose another --socket, or run: %s", dir, os.Geteuid(), chownLine(dir))
	}
	return nil
}

// makeOwn makes a folder that only we have, exclusively: a link or a folder of
// somebody else in its place is refused, never used. The mode of one that is
// ours is mended.
func makeOwn(dir string, mode fs.FileMode) error {
	err := os.Mkdir(dir, mode)
	if err != nil && !errors.Is(err, fs.ErrExist) {
		if errors.Is(err, fs.ErrPermission) {
			return fmt.Errorf("%w: uid %d may not write %s: choose another folder, or run: %s", err, os.Geteuid(), filepath.Dir(dir), chownLine(filepath.Dir(dir)))
		}
		return err
	}
	fi, err := os.Lstat(dir)
	if err != nil {
		return err
	}
	if fi.Mode()&fs.ModeSymlink != 0 {
		// An administrator's link (a data root on another disk) is fine where nobody
		// else could have put it, or could change what it leads to.
		if err := trusted(dir); err != nil {
			return err
		}
		if fi, err = os.Stat(dir); err != nil {
			return err
		}
	}
	if !fi.IsDir() {
		return fmt.Errorf("%s is not a folder: move it away, or choose another place", dir)
	}
	if st, ok := fi.Sys().(*syscall.Stat_t); ok && int(st.Uid) != os.Geteuid() {
		return fmt.Errorf("%s belongs to uid %d, and tako-master runs as uid %d: start it as that user, or run: %s", dir, st.Uid, os.Geteuid(), chownLine(dir))
	}
	if fi.Mode().Perm() != mode {
		if err := os.Chmod(dir, mode); err != nil {
			return err
		}
	}
	if err := unix.Access(dir, unix.W_OK|unix.X_OK); err != nil {
		return fmt.Errorf("%s is not writable (%w): is the file system mounted read-only?", dir, err)
	}
	return nil
}

// trusted says whether a link, and every folder above it, belong to root or us and
// are nobody else's to write.
func trusted(link string) error {
	for path := link; ; path = filepath.Dir(path) {
		fi, err := os.Lstat(path)
		if err != nil {
			return err
		}
		st, ok := fi.Sys().(*syscall.Stat_t)
		if !ok || st.Uid != 0 && int(st.Uid) != os.Geteuid() {
			return fmt.Errorf("%s is a link, and %s belongs to uid %d, who could change where it leads: name the folder itself", link, path, st.Uid)
		}
		if fi.Mode()&fs.ModeSymlink == 0 && fi.Mode().Perm()&0o022 != 0 {
			return fmt.Errorf("%s is a link, and others may write to %s: name the folder itself, or run: chmod go-w %s", link, path, path)
		}
		if path == filepath.Dir(path) {
			return nil
		}
	}
}

func chownLine(dir string) string {
	return fmt.Sprintf("chown -R %d:%d %s", os.Geteuid(), os.Getegid(), dir)
}

// lockRoot makes us the one owner of the data root. The lock is held as long as
// the returned file is open, also over an exec that keeps its descriptor. While
// another server is that, the error is CodeConflict.
func lockRoot(path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|syscall.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, fmt.Errorf("lock the data root: %w", err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		pid := make([]byte, 20)
		n, _ := f.ReadAt(pid, 0)
		_ = f.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			return nil, tako.Errorf(tako.CodeConflict, "the data root %s is in use by tako-master with pid %s: stop that one, choose another --data-dir, or serve beside it with --instance-port-offset",
				filepath.Dir(path), strings.TrimSpace(string(pid[:n])))
		}
		return nil, fmt.Errorf("lock the data root: %w", err)
	}
	writePID(f)
	return f, nil
}

// writePID writes into the lock whose it is.
func writePID(f *os.File) {
	if err := f.Truncate(0); err == nil {
		// For people only: an error here is a full disk, and harmless.
		_, _ = f.WriteAt([]byte(strconv.Itoa(os.Getpid())+"\n"), 0)
	}
}
