package store

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"time"

	"github.com/hashicorp/go-hclog"

	"tako/internal/tako"
	"tako/internal/uptime"
)

// The reasons for which a database cannot be followed, or not changed.
var (
	ErrOtherSchema = errors.New("the database has another schema than this tako")
	ErrFollowing   = errors.New("the database is another process's to change")
)

// Schema is the number of the schema that this tako makes and follows.
func Schema() (int, error) {
	all, err := loadMigrations()
	if err != nil {
		return 0, err
	}
	return all[len(all)-1].version, nil
}

// Follow opens the state of a living owner to read what that one writes; it makes
// and changes nothing. Its schema must be exactly ours: else the error wraps
// ErrOtherSchema, and ErrNewerSchema if it is a later one. Until TakeOver every
// change is refused with ErrFollowing. A Backup is one.
func Follow(ctx context.Context, o Options) (*DB, error) {
	all, err := loadMigrations()
	if err != nil {
		return nil, err
	}
	return follow(ctx, o, all)
}

func follow(ctx context.Context, o Options, all []migration) (*DB, error) {
	if o.Now == nil {
		o.Now = time.Now
	}
	if o.Uptime == nil {
		o.Uptime = uptime.Now
	}
	if o.Log == nil {
		o.Log = hclog.NewNullLogger()
	}
	d := &DB{o: o, all: all, following: true}
	if _, err := os.Lstat(o.Path); errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("follow database %s: %w", o.Path, err)
	}
	newest := all[len(all)-1].version
	if _, err := inspect(ctx, o.Path, newest); err != nil {
		return nil, err
	}
	var err error
	if d.sql, err = dial(o.Path, true); err != nil {
		return nil, err
	}
	if err := d.sameSchema(ctx); err != nil {
		return nil, errors.Join(err, d.sql.Close())
	}
	return d, nil
}

// sameSchema says whether the database has the schema that we know.
func (d *DB) sameSchema(ctx context.Context) error {
	version, err := userVersion(ctx, d.sql)
	if err != nil {
		return err
	}
	newest := d.all[len(d.all)-1].version
	switch {
	case version > newest:
		return fmt.Errorf("follow database %s: %w, %w: it has schema %d%s, this tako %s knows %d: start the version that its owner runs",
			d.o.Path, ErrOtherSchema, ErrNewerSchema, version, writtenBy(ctx, d.o.Path), d.o.Version, newest)
	case version < newest:
		return fmt.Errorf("follow database %s: %w: it has schema %d%s, this tako %s has %d: reload its owner into this version first",
			d.o.Path, ErrOtherSchema, version, writtenBy(ctx, d.o.Path), d.o.Version, newest)
	}
	return nil
}

// Seen returns a number that is another one after each change that another
// process made. After the schema was changed it is ErrOtherSchema: what is read
// may still be right, what is not known is not seen.
func (d *DB) Seen(ctx context.Context) (version int64, err error) {
	d.conn.RLock()
	defer d.conn.RUnlock()
	if err := d.sql.QueryRowContext(ctx, `PRAGMA data_version`).Scan(&version); err != nil {
		return 0, d.explain("look for changes", err)
	}
	if !d.following {
		return version, nil
	}
	return version, d.sameSchema(ctx)
}

// Following reports whether the state is another process's to change.
func (d *DB) Following() bool {
	d.conn.RLock()
	defer d.conn.RUnlock()
	return d.following
}

// TakeOver makes a followed state our own, as Open does: the caller now holds the
// lock of the data root. After an error it is followed as before.
func (d *DB) TakeOver(ctx context.Context) error {
	d.backups.Lock()
	defer d.backups.Unlock()
	d.mu.Lock()
	defer d.mu.Unlock()
	d.conn.Lock()
	defer d.conn.Unlock()
	if !d.following {
		return nil
	}
	if err := d.sql.Close(); err != nil {
		return fmt.Errorf("take over database %s: %w", d.o.Path, err)
	}
	err := d.openWith(ctx, d.all)
	if err != nil {
		var again error
		if d.sql, again = dial(d.o.Path, true); again != nil {
			return errors.Join(err, again)
		}
		return err
	}
	d.following = false
	return nil
}

// Given returns what was given out to an app: the first of its ports and its uid,
// 0 for what was not.
func (d *DB) Given(ctx context.Context, id tako.AppID) (base uint16, uid uint32, err error) {
	err = d.read(ctx, "read what app "+string(id)+" was given", func(tx *sql.Tx) error {
		err := tx.QueryRowContext(ctx, `SELECT base FROM ports WHERE app = ?`, id).Scan(&base)
		if err != nil && !errors.Is(err, sql.ErrNoRows) {
			return err
		}
		err = tx.QueryRowContext(ctx, `SELECT uid FROM uids WHERE app = ?`, id).Scan(&uid)
		if err != nil && !errors.Is(err, sql.ErrNoRows) {
			return err
		}
		return nil
	})
	return base, uid, err
}
