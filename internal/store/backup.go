package store

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
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
	backupTime   = "20060102-150405" // UTC: the order of names is the order of time
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
	path = filepath.Join(d.o.BackupDir, backupPrefix+d.o.Now().UTC().Format(backupTime)+backupSuffix)
	if err := d.backup(ctx, path); err != nil {
		return "", d.explain("back up database to "+path, err)
	}
	d.prune(filepath.Base(path))
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

// prune removes the oldest backups, never the one just made, which is not the
// newest by name when the clock was set back.
func (d *DB) prune(made string) {
	names, err := d.listBackups()
	if err != nil {
		d.o.Log.Warn("cannot remove old backups", "error", err)
		return
	}
	names = slices.DeleteFunc(names, func(n string) bool { return n == made })
	for _, n := range names[:max(len(names)-(BackupsKept-1), 0)] {
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

// BackupLoop makes a backup every BackupEvery, the first at once if the newest
// is that old, until ctx ends.
func (d *DB) BackupLoop(ctx context.Context) {
	wait := time.Duration(0)
	if names, err := d.listBackups(); err == nil && len(names) > 0 {
		newest, _ := backupTimeOf(names[len(names)-1])
		// One from the future, before a clock was set back, does not count.
		if age := d.o.Now().Sub(newest); age >= 0 {
			wait = max(BackupEvery-age, 0)
		}
	}
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
