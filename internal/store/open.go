package store

import (
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"syscall"
	"time"

	"github.com/hashicorp/go-hclog"
	sqlite3 "modernc.org/sqlite/lib"

	"tako/internal/tako"
	"tako/internal/uptime"
)

// The reasons for which Open refuses a file it leaves as it is.
var (
	ErrNewerSchema = errors.New("the database is from a newer tako")
	ErrNotOurs     = errors.New("the file is a database of some other program")
	ErrDamaged     = errors.New("the database is damaged or missing, and no good backup is there")
)

// applicationID is in the header of every database of ours: "tako".
const applicationID = 0x74616b6f

// sideFiles are the endings of what SQLite keeps beside a database.
var sideFiles = []string{"", "-wal", "-shm", "-journal"}

// Open opens the state, or makes it if there was never any. It brings an older
// schema up to date, after a backup, and takes over the apps of a tako-server
// database, which it keeps beside as <path>.v2-original. A damaged file is set
// aside as <path>.damaged-<unix seconds> and the newest good backup takes its
// place: see Restored. The files are readable by their owner alone.
func Open(ctx context.Context, o Options) (*DB, error) {
	all, err := loadMigrations()
	if err != nil {
		return nil, err
	}
	return open(ctx, o, all)
}

func open(ctx context.Context, o Options, all []migration) (*DB, error) {
	if o.Now == nil {
		o.Now = time.Now
	}
	if o.Uptime == nil {
		o.Uptime = uptime.Now
	}
	if o.Log == nil {
		o.Log = hclog.NewNullLogger()
	}
	d := &DB{o: o, all: all}
	if err := d.openWith(ctx, all); err != nil {
		return nil, err
	}
	return d, nil
}

// openWith opens for changes, giving up the reserve if it must.
func (d *DB) openWith(ctx context.Context, all []migration) error {
	err := d.open(ctx, all)
	if noSpace(err) && d.spendReserve() {
		d.o.Log.Warn("gave up the reserve file to open the database", "error", err)
		err = d.open(ctx, all)
	}
	if err != nil {
		return err
	}
	d.rememberRestore(ctx)
	d.makeReserve()
	if d.reserve < ReserveBytes {
		d.o.Log.Warn("little room on the disk: the reserve file is not whole", "path", d.o.ReservePath, "bytes", d.reserve)
	}
	return nil
}

func (d *DB) open(ctx context.Context, all []migration) error {
	path := d.o.Path
	newest := all[len(all)-1].version
	backups, err := d.listBackups()
	if err != nil {
		return err
	}
	if err := secure(path); err != nil {
		return err
	}
	var version int
	fi, err := os.Lstat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		if len(backups) > 0 {
			err = d.restoreFrom(ctx, backups, newest, "the file is missing")
			break
		}
		if _, werr := os.Lstat(path + "-wal"); werr == nil {
			return fmt.Errorf("open database %s: %w: only its -wal file is there; to start empty, move that away", path, ErrDamaged)
		}
		err = d.create(ctx, all, nil)
	case err != nil:
		return fmt.Errorf("open database: %w", err)
	case fi.Size() == 0:
		err = d.restoreFrom(ctx, backups, newest, "the file is empty")
	default:
		version, err = inspect(ctx, path, newest)
		if damage, ok := errors.AsType[*damageError](err); ok {
			version, err = 0, d.restoreFrom(ctx, backups, newest, damage.why)
		}
	}
	switch {
	case err != nil:
		return err
	case version == originalVersion:
		if err := d.adoptOriginal(ctx, all); err != nil {
			return err
		}
	case version > newest:
		return fmt.Errorf("open database %s: %w: it has schema %d%s; this tako %s knows schemas up to %d: install the newer tako, or restore a backup from %s",
			path, ErrNewerSchema, version, writtenBy(ctx, path), d.o.Version, newest, d.o.BackupDir)
	}

	if d.sql, err = dial(path, false); err != nil {
		return err
	}
	if err := d.migrate(ctx, all); err != nil {
		_ = d.sql.Close() // the first error says more
		return fmt.Errorf("open database %s: %w", path, err)
	}
	if d.file, err = os.Stat(path); err != nil {
		return errors.Join(fmt.Errorf("open database: %w", err), d.sql.Close())
	}
	return nil
}

// migrate backs up an older database before it changes it.
func (d *DB) migrate(ctx context.Context, all []migration) error {
	version, err := userVersion(ctx, d.sql)
	if err != nil {
		return err
	}
	if newest := all[len(all)-1].version; version < newest {
		name, err := d.backupNow(ctx)
		if err != nil {
			return fmt.Errorf("back up before the change of schema: %w", err)
		}
		d.o.Log.Info("changing the schema of the database", "from", version, "to", newest, "backup", name)
	}
	return migrate(ctx, d.sql, all, version, d.o)
}

// create makes a database beside its place, whole and in WAL mode, and then moves
// it there: a file at its place is never one that was being made.
func (d *DB) create(ctx context.Context, all []migration, fill func(ctx context.Context, tx *sql.Tx) error) (err error) {
	temp := d.o.Path + ".new"
	f, err := createTemp(temp)
	if err != nil {
		return err
	}
	defer removeTemp(temp)
	if err := f.Close(); err != nil {
		return fmt.Errorf("make database: %w", err)
	}
	db, err := dial(temp, false)
	if err != nil {
		return err
	}
	err = migrate(ctx, db, all, 0, d.o)
	if err == nil && fill != nil {
		err = transact(ctx, db, nil, func(tx *sql.Tx) error { return fill(ctx, tx) })
	}
	if err = errors.Join(err, db.Close()); err != nil {
		return fmt.Errorf("make database %s: %w", d.o.Path, err)
	}
	return moveInto(temp, d.o.Path)
}

// restoreFrom sets aside what is at the database's place and moves the newest good
// backup there. Without one it changes nothing and fails.
func (d *DB) restoreFrom(ctx context.Context, backups []string, newest int, why string) error {
	path, temp := d.o.Path, d.o.Path+".restore"
	d.o.Log.Error("the database is damaged or missing", "path", path, "reason", why)
	defer removeTemp(temp)
	for _, backup := range slices.Backward(backups) {
		from := filepath.Join(d.o.BackupDir, backup)
		if err := copyGood(ctx, from, temp, newest); err != nil {
			if noSpace(err) || errors.Is(err, syscall.ENOSPC) || ctx.Err() != nil {
				return fmt.Errorf("restore backup %s: %w", from, err)
			}
			d.o.Log.Error("cannot use a backup", "path", from, "error", err)
			continue
		}
		aside, err := setAside(path, d.o.Now())
		if err != nil {
			return err
		}
		if err := moveInto(temp, path); err != nil {
			return err
		}
		d.restore = Restore{At: d.o.Now().UTC(), Backup: from, Damaged: aside}
		if _, err := os.Lstat(aside); err != nil {
			d.restore.Damaged = "" // there was none
		}
		d.o.Log.Error("a backup took the place of the database: what was changed after it was made is lost; check the apps", "backup", from, "damaged", aside)
		return nil
	}
	return fmt.Errorf("open database %s: %w (%s; %d backups in %s tried): put a good backup in its place; or, to start empty and deploy every app again, move it and its -wal file, and those backups, away",
		path, ErrDamaged, why, len(backups), d.o.BackupDir)
}

// keyRestore is the server value that has the last Restore.
const keyRestore = "restored"

// A Restore says that a backup took the place of a damaged or missing database:
// what was changed after it was made is lost.
type Restore struct {
	At      time.Time `json:"at"`
	Backup  string    `json:"backup"`
	Damaged string    `json:"damaged"` // what was set aside, and its -wal file; "" if it was missing
}

// LastRestore returns the last time that Open put a backup in the place of the
// database, nil if it never did. It outlasts restarts.
func (d *DB) LastRestore(ctx context.Context) (*Restore, error) {
	text, err := d.ServerValue(ctx, keyRestore)
	if err != nil || text == nil {
		return nil, err
	}
	var r Restore
	if err := json.Unmarshal(text, &r); err != nil {
		return nil, fmt.Errorf("read the last restore: %w", err)
	}
	return &r, nil
}

// rememberRestore keeps what restore did. It has been logged, so a disk without
// room for it is no reason to fail.
func (d *DB) rememberRestore(ctx context.Context) {
	if d.restore.Backup == "" {
		return
	}
	text, err := json.Marshal(d.restore)
	if err == nil {
		err = transact(ctx, d.sql, nil, func(tx *sql.Tx) error {
			_, err := tx.ExecContext(ctx, `INSERT OR REPLACE INTO server_values (key, value) VALUES (?, ?)`, keyRestore, text)
			return err
		})
	}
	if err != nil {
		d.o.Log.Warn("it is not kept that a backup was restored", "error", err)
	}
}

// copyGood copies a backup to temp, proves it there and turns it to WAL mode.
func copyGood(ctx context.Context, from, temp string, newest int) error {
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := createTemp(temp)
	if err != nil {
		return err
	}
	_, err = io.Copy(out, in)
	if err = errors.Join(err, out.Close()); err != nil {
		return err
	}
	version, err := inspect(ctx, temp, newest)
	switch {
	case err != nil:
		return err
	case version == originalVersion || version > newest:
		return fmt.Errorf("it has schema %d; this tako knows up to %d", version, newest)
	}
	db, err := dial(temp, false)
	if err != nil {
		return err
	}
	return errors.Join(db.PingContext(ctx), db.Close())
}

// setAside renames a database and what is beside it, the database first: what
// stays after a crash in between is then known to be without one.
func setAside(path string, now time.Time) (aside string, err error) {
	for unix := now.Unix(); ; unix++ {
		aside = path + ".damaged-" + strconv.FormatInt(unix, 10)
		if _, err := os.Lstat(aside); errors.Is(err, fs.ErrNotExist) {
			break
		} else if err != nil {
			return "", fmt.Errorf("set damaged database aside: %w", err)
		}
	}
	for _, s := range sideFiles {
		if err := os.Rename(path+s, aside+s); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return "", fmt.Errorf("set damaged database aside: %w", err)
		}
	}
	return aside, nil
}

// A damageError says that SQLite, or the meaning of the rows, shows damage.
type damageError struct{ why string }

func (e *damageError) Error() string { return "damaged: " + e.why }

// inspect checks a database without changing it and returns its schema version.
// The error is a *damageError, ErrNotOurs, or the world's.
func inspect(ctx context.Context, path string, newest int) (version int, err error) {
	db, err := dial(path, true)
	if err != nil {
		return 0, err
	}
	defer db.Close()
	err = transact(ctx, db, &sql.TxOptions{ReadOnly: true}, func(tx *sql.Tx) error {
		var verdict string
		if err := tx.QueryRowContext(ctx, `PRAGMA quick_check(1)`).Scan(&verdict); err != nil {
			return err
		}
		if verdict != "ok" {
			return &damageError{verdict}
		}
		var id int
		if err := tx.QueryRowContext(ctx, `PRAGMA application_id`).Scan(&id); err != nil {
			return err
		}
		if err := tx.QueryRowContext(ctx, `PRAGMA user_version`).Scan(&version); err != nil {
			return err
		}
		switch {
		case id != applicationID:
			return checkOriginal(ctx, tx, version)
		case version == newest:
			// Bytes that changed inside a value pass the quick check.
			_, err := queryApps(ctx, tx, "")
			if bad, ok := errors.AsType[*tako.Error](err); ok {
				return &damageError{bad.Message}
			}
			return err
		}
		return nil
	})
	// The statements are right, so an error in one is the file's.
	if hasCode(err, sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_ERROR) {
		return 0, &damageError{err.Error()}
	}
	if err != nil {
		return 0, fmt.Errorf("check database %s: %w", path, err)
	}
	return version, nil
}

func userVersion(ctx context.Context, db *sql.DB) (version int, err error) {
	if err := db.QueryRowContext(ctx, `PRAGMA user_version`).Scan(&version); err != nil {
		return 0, fmt.Errorf("read schema version: %w", err)
	}
	return version, nil
}

// writtenBy names the program that made the newest schema, if the file says so.
func writtenBy(ctx context.Context, path string) string {
	db, err := dial(path, true)
	if err != nil {
		return ""
	}
	defer db.Close()
	var by string
	if err := db.QueryRowContext(ctx, `SELECT applied_by FROM schema_changes ORDER BY version DESC LIMIT 1`).Scan(&by); err != nil {
		return "" // it is only a help
	}
	return ", made by tako " + by
}

// secure takes the files from everybody but their owner, before SQLite opens
// them: the files it makes later take after the database.
func secure(path string) error {
	for _, s := range sideFiles {
		fi, err := os.Lstat(path + s)
		switch {
		case errors.Is(err, fs.ErrNotExist):
			continue
		case err != nil:
			return fmt.Errorf("open database: %w", err)
		case !fi.Mode().IsRegular():
			return fmt.Errorf("open database: %s is not a regular file: move it away", path+s)
		case fi.Mode().Perm() != 0o600:
			if err := os.Chmod(path+s, 0o600); err != nil {
				return fmt.Errorf("open database: %w", err)
			}
		}
	}
	return nil
}

// createTemp makes an empty file that only its owner can read, whatever the
// umask, in the place of what a crash left.
func createTemp(name string) (*os.File, error) {
	removeTemp(name)
	f, err := os.OpenFile(name, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return nil, err
	}
	if err := f.Chmod(0o600); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

func removeTemp(name string) {
	for _, s := range sideFiles {
		_ = os.Remove(name + s) // createTemp finds out if one stays
	}
}

// moveInto makes temp durable, then renames it. Nothing has it open.
func moveInto(temp, path string) error {
	f, err := os.Open(temp)
	if err != nil {
		return err
	}
	if err := errors.Join(f.Sync(), f.Close()); err != nil {
		return fmt.Errorf("sync %s: %w", temp, err)
	}
	if err := os.Rename(temp, path); err != nil {
		return err
	}
	return syncDir(filepath.Dir(path))
}
