package store

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"net/url"
	"os"
	"sync"
	"time"

	"github.com/hashicorp/go-hclog"
	"modernc.org/sqlite"
	sqlite3 "modernc.org/sqlite/lib"

	"tako/internal/tako"
)

// busyTimeout is how long a statement waits for another process's lock, say of
// somebody who looks into the file with the sqlite3 program.
const busyTimeout = 5 * time.Second

// Options say where the state is. Path, BackupDir and ReservePath are absolute
// and should be on one file system; the folder of Path exists.
type Options struct {
	Path        string
	BackupDir   string
	ReservePath string
	Log         hclog.Logger
	// Version is the program's, recorded beside each schema change.
	Version string
	// Now is time.Now if nil.
	Now func() time.Time
	// Uptime is by what the lease of the upgrade lock is counted, since nobody sets
	// it: the boot that runs and how long it has. nil is uptime.Now; an empty boot
	// is one that is not known.
	Uptime func() (boot string, up time.Duration)
}

// DB is an open state file. Its methods may be called from several goroutines.
type DB struct {
	o       Options
	all     []migration
	restore Restore    // what Open did, if it did
	backups sync.Mutex // one backup at a time

	// mu orders the changes; the database has one connection, so it is taken
	// before that. Lock order: backups, mu, conn.
	mu      sync.Mutex
	reserve int64 // bytes the reserve file holds

	// conn is held for reading over each use of sql; TakeOver replaces it.
	conn      sync.RWMutex
	sql       *sql.DB
	file      os.FileInfo // of the file that sql has open
	following bool        // it is another process's to change
}

// Close ends the connection after the call under way. It may come twice.
func (d *DB) Close() error {
	d.conn.RLock()
	defer d.conn.RUnlock()
	if err := d.sql.Close(); err != nil {
		return fmt.Errorf("close database %s: %w", d.o.Path, err)
	}
	return nil
}

// Restored returns the backup that Open put in the place of a damaged or missing
// file. What was changed after it was made is lost.
func (d *DB) Restored() (from string, ok bool) { return d.restore.Backup, d.restore.Backup != "" }

// write makes one change: f runs in a transaction, committed when it returns nil.
// With spend, a full disk is met by giving up the reserve and running f again.
func (d *DB) write(ctx context.Context, what string, spend bool, f func(tx *sql.Tx) error) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.conn.RLock()
	defer d.conn.RUnlock()
	if d.following {
		return fmt.Errorf("%s: %w", what, ErrFollowing)
	}
	if err := d.inPlace(what); err != nil {
		return err
	}
	err := transact(ctx, d.sql, nil, f)
	if spend && noSpace(err) && d.spendReserve() {
		d.o.Log.Warn("gave up the reserve file to make room", "for", what, "error", err)
		err = transact(ctx, d.sql, nil, f)
	}
	if err != nil {
		if hasCode(err, diskErrors...) {
			d.forgetTail(ctx)
		}
		return d.explain(what, err)
	}
	d.makeReserve()
	return nil
}

// inPlace refuses a change that would go to a file which no start finds again,
// since somebody moved the database away or put another in its place.
func (d *DB) inPlace(what string) error {
	fi, err := os.Stat(d.o.Path)
	if err == nil && os.SameFile(fi, d.file) {
		return nil
	}
	return tako.Errorf(tako.CodeFailed,
		"%s: %s was moved or replaced while it is in use; nothing was changed: put it back, or restart tako-master to use what is there now", what, d.o.Path)
}

// forgetTail empties the log, if the disk lets it: behind what is valid it may
// hold the whole of a change whose sync failed, which we have taken back and a
// start after a crash would find.
func (d *DB) forgetTail(ctx context.Context) {
	if _, err := d.sql.ExecContext(ctx, `PRAGMA wal_checkpoint(TRUNCATE)`); err != nil {
		d.o.Log.Error("a change that failed may be found by the next start: the disk fails", "error", err)
	}
}

// read runs f on one state of the database.
func (d *DB) read(ctx context.Context, what string, f func(tx *sql.Tx) error) error {
	d.conn.RLock()
	defer d.conn.RUnlock()
	if err := transact(ctx, d.sql, &sql.TxOptions{ReadOnly: true}, f); err != nil {
		return d.explain(what, err)
	}
	return nil
}

func (d *DB) explain(what string, err error) error {
	if hasCode(err, sqlite3.SQLITE_FULL) {
		return fmt.Errorf("%w (%w)", tako.Errorf(tako.CodeFailed,
			"%s: no room left to write %s; nothing was changed: free some disk space and try again", what, d.o.Path), err)
	}
	if hasCode(err, diskErrors...) {
		return fmt.Errorf("%w (%w)", tako.Errorf(tako.CodeFailed,
			"%s: the disk of %s fails; nothing was changed: the kernel's log (dmesg) says what is wrong with it", what, d.o.Path), err)
	}
	return fmt.Errorf("%s: %w", what, err)
}

func transact(ctx context.Context, db *sql.DB, o *sql.TxOptions, f func(tx *sql.Tx) error) error {
	tx, err := db.BeginTx(ctx, o)
	if err != nil {
		return fmt.Errorf("begin: %w", err)
	}
	defer func() { _ = tx.Rollback() }() // does nothing after a commit; there is no one to tell otherwise
	if err := f(tx); err != nil {
		return err
	}
	if err := tx.Commit(); err != nil {
		return fmt.Errorf("commit: %w", err)
	}
	return nil
}

// hasCode reports whether err is SQLite's with one of the primary codes.
func hasCode(err error, codes ...int) bool {
	e, ok := errors.AsType[*sqlite.Error](err)
	if !ok {
		return false
	}
	for _, c := range codes {
		if e.Code()&0xff == c {
			return true
		}
	}
	return false
}

// diskErrors are what SQLite makes of a disk that fails, or is read-only since.
var diskErrors = []int{sqlite3.SQLITE_IOERR, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN}

// noSpace reports whether giving up the reserve may help. A quota, and a shared
// memory file that cannot grow, come as I/O errors.
func noSpace(err error) bool {
	return hasCode(err, sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN)
}

// dial returns the one connection, not yet made. A change waits for the lock at
// its beginning, so that it cannot fail in the middle for want of it.
func dial(path string, readOnly bool) (*sql.DB, error) {
	q := url.Values{
		"mode":       {"rw"}, // never makes a file: that is done with the right mode elsewhere
		"_txlock":    {"immediate"},
		"_dqs":       {"0"},
		"_defensive": {"1"},
		"_pragma": {
			fmt.Sprintf("busy_timeout(%d)", busyTimeout.Milliseconds()),
			"trusted_schema(0)", "cell_size_check(1)", "temp_store(2)",
		},
	}
	if readOnly {
		q.Set("mode", "ro")
	} else {
		q["_pragma"] = append(q["_pragma"], "journal_mode(wal)", "synchronous(full)", "foreign_keys(1)",
			"wal_autocheckpoint(256)", "journal_size_limit(4194304)")
	}
	c, err := sqlite.NewConnector((&url.URL{Scheme: "file", Path: path, RawQuery: q.Encode()}).String())
	if err != nil {
		return nil, fmt.Errorf("open database %s: %w", path, err)
	}
	db := sql.OpenDB(c)
	db.SetMaxOpenConns(1)
	return db, nil
}

// ms and fromMS are how a time is kept: milliseconds of Unix, 0 for none.
func ms(t time.Time) int64 {
	if t.IsZero() {
		return 0
	}
	return max(t.UnixMilli(), 0)
}

func fromMS(v int64) time.Time {
	if v == 0 {
		return time.Time{}
	}
	return time.UnixMilli(v).UTC()
}

func syncDir(dir string) error {
	f, err := os.Open(dir)
	if err != nil {
		return fmt.Errorf("sync folder: %w", err)
	}
	defer f.Close()
	if err := f.Sync(); err != nil {
		return fmt.Errorf("sync folder: %w", err)
	}
	return nil
}
