package store

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// How backups are made.
const (
	BackupEvery = 24 * time.Hour
	BackupRetry = time.Hour // after one that did not work
	BackupsKept = 7
)

const (
	backupPrefix = "runtime-state-"
	backupSuffix = ".sqlite3"
	backupTime   = "20060102-150405" // UTC; later than that of any backup before it
	backupTemp   = ".making"
)

// Backup writes a checked copy of the state as it is now into the folder of
// backups, removes those beyond the newest BackupsKept, and returns its path.
// Changes wait for it.
func (d *DB) Backup(ctx context.Context) (path string, err error) {
	d.backups.Lock()
	defer d.backups.Unlock()
	d.conn.RLock()
	defer d.conn.RUnlock()
	if d.following {
		return "", fmt.Errorf("back up database: %w", ErrFollowing)
	}
	return d.backupNow(ctx)
}

// backupNow is Backup with the locks held, or before there is anybody else.
func (d *DB) backupNow(ctx context.Context) (path string, err error) {
	at := d.o.Now().UTC()
	names, err := d.listBackups()
	if err != nil {
		return "", err
	}
	if len(names) > 0 {
		// The order of names is that in which backups were made, also after the clock
		// was set back: the newest is the one to restore, and the last to be removed.
		if newest, _ := backupTimeOf(names[len(names)-1]); at.Before(newest.Add(time.Second)) {
			at = newest.Add(time.Second)
		}
	}
	path = filepath.Join(d.o.BackupDir, backupPrefix+at.Format(backupTime)+backupSuffix)
	if err := d.backup(ctx, path); err != nil {
		return "", d.explain("back up database to "+path, err)
	}
	d.prune()
	return path, nil
}

func (d *DB) backup(ctx context.Context, path string) error {
	if err := os.MkdirAll(d.o.BackupDir, 0o700); err != nil {
		return err
	}
	temp := filepath.Join(d.o.BackupDir, backupPrefix+backupTemp)
	f, err := createTemp(temp)
	if err != nil {
		return err
	}
	defer removeTemp(temp)
	if err := f.Close(); err != nil {
		return err
	}
	if _, err := d.sql.ExecContext(ctx, `VACUUM INTO ?`, temp); err != nil {
		return err
	}
	version, err := userVersion(ctx, d.sql)
	if err != nil {
		return err
	}
	if _, err := inspect(ctx, temp, version); err != nil {
		return err
	}
	return moveInto(temp, path)
}

// prune removes the oldest backups.
func (d *DB) prune() {
	names, err := d.listBackups()
	if err != nil {
		d.o.Log.Warn("cannot remove old backups", "error", err)
		return
	}
	for _, n := range names[:max(len(names)-BackupsKept, 0)] {
		if err := os.Remove(filepath.Join(d.o.BackupDir, n)); err != nil {
			d.o.Log.Warn("cannot remove an old backup", "error", err)
		}
	}
}

// listBackups returns the file names of the backups, oldest first.
func (d *DB) listBackups() ([]string, error) {
	entries, err := os.ReadDir(d.o.BackupDir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("list backups: %w", err)
	}
	var names []string
	for _, e := range entries { // in order of name
		if _, ok := backupTimeOf(e.Name()); ok && e.Type().IsRegular() {
			names = append(names, e.Name())
		}
	}
	return names, nil
}

func backupTimeOf(name string) (time.Time, bool) {
	middle, ok := strings.CutPrefix(name, backupPrefix)
	middle, ok2 := strings.CutSuffix(middle, backupSuffix)
	t, err := time.Parse(backupTime, middle)
	return t, ok && ok2 && err == nil
}

// backupDue is how long the next backup has time.
func (d *DB) backupDue() time.Duration {
	names, err := d.listBackups()
	if err != nil || len(names) == 0 {
		return 0
	}
	newest, _ := backupTimeOf(names[len(names)-1])
	if age := d.o.Now().Sub(newest); age >= 0 {
		return max(BackupEvery-age, 0)
	}
	// It is from the future: the clock was set back. So that starts in a row do not
	// push all older ones out, there is one only if that file is not new.
	fi, err := os.Stat(filepath.Join(d.o.BackupDir, names[len(names)-1]))
	if err != nil {
		return 0
	}
	age := d.o.Now().Sub(fi.ModTime())
	if age < 0 {
		return BackupRetry
	}
	return max(BackupEvery-age, 0)
}

// BackupLoop makes a backup every BackupEvery, the first at once if the newest
// is that old, until ctx ends.
func (d *DB) BackupLoop(ctx context.Context) {
	wait := d.backupDue()
	for {
		timer := time.NewTimer(wait)
		select {
		case <-ctx.Done():
			timer.Stop()
			return
		case <-timer.C:
		}
		wait = BackupEvery
		switch path, err := d.Backup(ctx); {
		case ctx.Err() != nil:
			return
		case err != nil:
			d.o.Log.Error("the database was not backed up", "error", err, "next_try", BackupRetry)
			wait = BackupRetry
		default:
			d.o.Log.Info("the database was backed up", "path", path)
		}
	}
}

// CopyTo writes a copy of the state as it is now to path, which must not exist:
// for a check of what another program would make of it. Changes wait for it.
func (d *DB) CopyTo(ctx context.Context, path string) error {
	d.backups.Lock()
	defer d.backups.Unlock()
	d.conn.RLock()
	defer d.conn.RUnlock()
	if _, err := d.sql.ExecContext(ctx, `VACUUM INTO ?`, path); err != nil {
		return d.explain("copy database to "+path, err)
	}
	return nil
}
