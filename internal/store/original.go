package store

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"time"
)

// originalVersion is the schema number of tako-server 0.0.1, whose database has
// the name of ours.
const originalVersion = 2

// checkOriginal says whether a database that is not ours is tako-server's.
func checkOriginal(ctx context.Context, tx *sql.Tx, version int) error {
	var found int
	if err := tx.QueryRowContext(ctx, `SELECT (SELECT count(*) FROM pragma_table_info('apps') WHERE name = 'command_json')
		+ (SELECT count(*) FROM sqlite_schema WHERE type = 'table' AND name IN ('schema_meta', 'app_routes'))`).Scan(&found); err != nil {
		return err
	}
	if version != originalVersion || found != 3 {
		return fmt.Errorf("%w (application id other than tako's, schema %d): move it away", ErrNotOurs, version)
	}
	return nil
}

// adoptOriginal puts a database of ours with the apps, routes and upgrade lock of
// the original in its place. What cannot be taken over is logged and left out;
// the original stays, unchanged, as <path>.v2-original.
func (d *DB) adoptOriginal(ctx context.Context, all []migration) error {
	path := d.o.Path
	apps, lock, err := d.readOriginal(ctx)
	if err != nil {
		return fmt.Errorf("take over tako-server database %s: %w", path, err)
	}
	// The log of one database must never meet another.
	if _, err := os.Lstat(path + "-wal"); !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("take over tako-server database %s: its -wal file did not go away: stop the tako-server that has it open and start again", path)
	}
	keep := path + ".v2-original"
	if err := keepAs(path, keep); err != nil {
		// Another original is there; lose neither.
		keep += "-" + strconv.FormatInt(d.o.Now().Unix(), 10)
		if err := keepAs(path, keep); err != nil {
			return fmt.Errorf("keep tako-server database: %w", err)
		}
	}
	err = d.create(ctx, all, func(ctx context.Context, tx *sql.Tx) error {
		for _, a := range apps {
			if err := saveApp(ctx, tx, a); err != nil {
				return err
			}
		}
		if lock == nil {
			return nil
		}
		_, err := tx.ExecContext(ctx, `INSERT INTO upgrade_lock (id, owner, acquired_at_ms, renewed_at_ms) VALUES (1, ?, ?, ?)`,
			lock.Owner, lock.AcquiredAt.UnixMilli(), lock.RenewedAt.UnixMilli())
		return err
	})
	if err != nil {
		return err
	}
	d.o.Log.Info("took over the database of tako-server", "apps", len(apps), "kept", keep)
	return nil
}

// keepAs gives the file a second name, unless it has it already.
func keepAs(path, keep string) error {
	err := os.Link(path, keep)
	if !errors.Is(err, fs.ErrExist) {
		return errors.Join(err, syncDir(filepath.Dir(path)))
	}
	a, aerr := os.Lstat(path)
	b, berr := os.Lstat(keep)
	if aerr == nil && berr == nil && os.SameFile(a, b) {
		return nil
	}
	return err
}

// readOriginal reads what there is to take over. Closing the connection moves
// the original's log into its file, so that one file is all of it.
func (d *DB) readOriginal(ctx context.Context) (apps []App, lock *Lock, err error) {
	db, err := dial(d.o.Path, false)
	if err != nil {
		return nil, nil, err
	}
	defer func() { err = errors.Join(err, db.Close()) }()
	routes, owner := map[string][]string{}, map[string]string{}
	err = transact(ctx, db, nil, func(tx *sql.Tx) error {
		if err := each(ctx, tx, func(scan func(...any) error) error {
			var app, route string
			if err := scan(&app, &route); err != nil {
				return err
			}
			if other, taken := owner[route]; taken {
				d.o.Log.Error("a route of two apps stays with the first", "route", route, "app", other, "other", app)
				return nil
			}
			owner[route] = app
			routes[app] = append(routes[app], route)
			return nil
		}, `SELECT app_name, route FROM app_routes ORDER BY app_name, route`); err != nil {
			return err
		}
		if err := each(ctx, tx, func(scan func(...any) error) error {
			var name, version, path string
			var instances, port, idle int64
			if err := scan(&name, &version, &path, &instances, &port, &idle); err != nil {
				return err
			}
			a := App{Path: path, Routes: routes[name], IdleTimeout: time.Duration(idle) * time.Second}
			var err error
			a.ID, a.Release, err = parseIDs(name, version)
			const maxIdle = int64(1) << 32 // seconds: the field of the deploy command
			if err == nil && (!filepath.IsAbs(path) || instances < 0 || instances > 255 || port < 0 || port > 65535 || idle < 0 || idle >= maxIdle) {
				err = fmt.Errorf("path %q, %d instances, port %d or idle timeout %d s is out of bounds", path, instances, port, idle)
			}
			if err != nil {
				d.o.Log.Error("an app cannot be taken over: deploy it again", "app", name, "error", err)
				return nil
			}
			a.Instances, a.BasePort = uint8(instances), uint16(port)
			apps = append(apps, a)
			return nil
		}, `SELECT name, version, path, min_instances, base_port, idle_timeout_secs FROM apps ORDER BY name`); err != nil {
			return err
		}
		var l Lock
		var at int64
		err := tx.QueryRowContext(ctx, `SELECT l.owner, l.acquired_at_unix_secs FROM upgrade_lock l, server_state s
			WHERE s.server_mode = 'upgrading' AND l.owner <> ''`).Scan(&l.Owner, &at)
		if errors.Is(err, sql.ErrNoRows) {
			return nil
		}
		l.AcquiredAt = time.Unix(at, 0)
		l.RenewedAt = l.AcquiredAt
		lock = &l
		return err
	})
	return apps, lock, err
}
