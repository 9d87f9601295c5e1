// Package atomicfile replaces files and links so that a reader, and the next
// start after a crash, finds the old content or the new, whole. It writes beside
// the file under a name of its own, syncs, renames, and syncs the folder.
//
// A crash can leave that name behind: RemoveStale takes such leavings away. Who
// may write at the same time is for the caller; the last one wins.
package atomicfile

import (
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// prefix begins the name of every file on its way.
const prefix = ".tako-new-"

// maxTries bounds the search for a free name; one of 128 random bits is free.
const maxTries = 10

// WriteFile makes path hold data with the permissions of mode, whatever the
// umask. Until all is written only its owner can read it. A link at path is
// replaced, not followed. After an error path has what it had before, unless
// only the last sync of the folder failed, and nothing is left beside it.
func WriteFile(path string, data []byte, mode fs.FileMode) error {
	var f *os.File
	temp, err := beside(path, func(name string) (err error) {
		f, err = os.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
		return err
	})
	if err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	_, err = f.Write(data)
	if err == nil {
		err = f.Chmod(mode.Perm())
	}
	if err == nil {
		err = f.Sync()
	}
	err = errors.Join(err, f.Close())
	if err == nil {
		err = os.Rename(temp, path)
	}
	if err != nil {
		return fmt.Errorf("write %s: %w", path, errors.Join(err, os.Remove(temp)))
	}
	return syncDir(path)
}

// Symlink makes path a link with the text target, in place of a file or a link
// that is there; a folder stays and is an error. Other errors are as WriteFile's.
func Symlink(target, path string) error {
	temp, err := beside(path, func(name string) error { return os.Symlink(target, name) })
	if err != nil {
		return fmt.Errorf("link %s: %w", path, err)
	}
	if err := os.Rename(temp, path); err != nil {
		return fmt.Errorf("link %s: %w", path, errors.Join(err, os.Remove(temp)))
	}
	return syncDir(path)
}

// RemoveStale removes what a crash in WriteFile or Symlink left in dir more than
// age ago; with 0 all of it, whatever the clock says now. A dir that is not there
// is fine.
func RemoveStale(dir string, age time.Duration) error {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("look for leavings: %w", err)
	}
	var faults []error
	for _, e := range entries {
		if !strings.HasPrefix(e.Name(), prefix) || e.IsDir() {
			continue
		}
		info, err := e.Info()
		if errors.Is(err, fs.ErrNotExist) || err == nil && age > 0 && time.Since(info.ModTime()) <= age {
			continue
		}
		if err == nil {
			err = os.Remove(filepath.Join(dir, e.Name()))
		}
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			faults = append(faults, fmt.Errorf("remove leavings: %w", err))
		}
	}
	return errors.Join(faults...)
}

// beside makes something new in path's folder and returns its name.
func beside(path string, create func(name string) error) (name string, err error) {
	for range maxTries {
		name = filepath.Join(filepath.Dir(path), prefix+rand.Text())
		if err = create(name); !errors.Is(err, fs.ErrExist) {
			break
		}
	}
	return name, err
}

// syncDir makes a rename to path last.
func syncDir(path string) error {
	dir, err := os.Open(filepath.Dir(path))
	if err != nil {
		return fmt.Errorf("sync the folder of %s: %w", path, err)
	}
	if err := errors.Join(dir.Sync(), dir.Close()); err != nil {
		return fmt.Errorf("sync the folder of %s: %w", path, err)
	}
	return nil
}
