package store

import (
	"errors"
	"fmt"
	"os"
	"syscall"
)

// The size of the reserve file, in bytes. On a disk that is nearly full it is
// made smaller, down to MinReserveBytes; a stop or a delete needs a few pages.
const (
	ReserveBytes    = 1 << 20
	MinReserveBytes = 64 << 10
)

// MakeReserve makes the reserve file, or makes it whole again after it was given
// up: as large as there is room for. It is tried by Open and after each change,
// so that few need call it.
func (d *DB) MakeReserve() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.growReserve()
}

// makeReserve is MakeReserve where a failure is nobody's: the next change tries
// again. d.mu is held.
func (d *DB) makeReserve() {
	if d.reserve == ReserveBytes {
		return
	}
	before := d.reserve
	if err := d.growReserve(); err != nil {
		d.o.Log.Debug("no room for the reserve file", "error", err)
	} else if d.reserve == ReserveBytes && before > 0 {
		d.o.Log.Info("the reserve file is whole again")
	}
}

func (d *DB) growReserve() error {
	f, err := os.OpenFile(d.o.ReservePath, os.O_RDWR|os.O_CREATE|syscall.O_NOFOLLOW, 0o600)
	if err != nil {
		return fmt.Errorf("make reserve: %w", err)
	}
	defer f.Close()
	if err := f.Chmod(0o600); err != nil {
		return fmt.Errorf("make reserve: %w", err)
	}
	for want := int64(ReserveBytes); want >= MinReserveBytes && want > d.reserve; want /= 2 {
		if err = allocate(f, want); err == nil {
			err = f.Truncate(want) // of a file that was larger
		}
		if err == nil {
			d.reserve = want
			return nil
		}
		// What was half made must not take the room that is left.
		if terr := f.Truncate(d.reserve); terr != nil {
			return fmt.Errorf("make reserve: %w", errors.Join(err, terr))
		}
	}
	if err != nil {
		return fmt.Errorf("make reserve: %w", err)
	}
	return nil
}

// allocate gives f its blocks up to size.
func allocate(f *os.File, size int64) error {
	err := syscall.Fallocate(int(f.Fd()), 0, 0, size)
	if !errors.Is(err, syscall.EOPNOTSUPP) {
		return err
	}
	zeros := make([]byte, MinReserveBytes)
	for at := int64(0); at < size; at += int64(len(zeros)) {
		if _, err := f.WriteAt(zeros, at); err != nil {
			return err
		}
	}
	return f.Sync()
}

// spendReserve frees the blocks of the reserve file and reports whether there
// were any. d.mu is held.
func (d *DB) spendReserve() bool {
	fi, err := os.Lstat(d.o.ReservePath)
	if err != nil || !fi.Mode().IsRegular() || fi.Size() == 0 {
		return false
	}
	if err := os.Truncate(d.o.ReservePath, 0); err != nil {
		d.o.Log.Error("cannot give up the reserve file", "path", d.o.ReservePath, "error", err)
		return false
	}
	d.reserve = 0
	return true
}
