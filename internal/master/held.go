package master

import (
	"errors"
	"fmt"
	"io/fs"
	"os"

	"golang.org/x/sys/unix"
)

// A folder that lives as long as a process is held by that: by a flock, which ends
// with its holder however that ends, and is seen from every namespace of processes,
// where a pid in the folder's name would mean another process or none.

// errHeld says that somebody living holds a folder.
var errHeld = errors.New("a living process holds it")

// hold opens a folder and holds it until the file is closed, also over an exec that
// keeps its descriptor. The error is errHeld while another has it.
func hold(dir string) (*os.File, error) {
	f, err := os.OpenFile(dir, os.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW, 0)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		if errors.Is(err, unix.EWOULDBLOCK) {
			err = errHeld
		}
		return nil, errors.Join(fmt.Errorf("hold %s: %w", dir, err), f.Close())
	}
	return f, nil
}

// holdMade makes a folder and holds it: removeUnheld may come in between.
func holdMade(mkdir func() (dir string, err error)) (dir string, held *os.File, err error) {
	for range 10 {
		if dir, err = mkdir(); err != nil {
			return "", nil, err
		}
		if held, err = hold(dir); errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return "", nil, err
		}
		ours, e1 := held.Stat()
		there, e2 := os.Lstat(dir)
		if e1 == nil && e2 == nil && os.SameFile(ours, there) {
			return dir, held, nil
		}
		_ = held.Close()
		err = fmt.Errorf("hold %s: %w", dir, fs.ErrNotExist)
	}
	return "", nil, err
}

// removeUnheld removes a folder that nobody holds.
func removeUnheld(dir string) {
	f, err := hold(dir)
	if err != nil {
		return // whoever removes it next will see
	}
	defer f.Close() // after the removal: see holdMade
	_ = os.RemoveAll(dir)
}
