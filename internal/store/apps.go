package store

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"time"

	"tako/internal/tako"
)

// MaxDeploys is how many deploys of an app are remembered.
const MaxDeploys = 100

// App is what is committed of one app.
type App struct {
	ID      tako.AppID
	Release tako.ReleaseID
	// Path is the absolute folder of the release.
	Path string
	// Instances is 0 for on demand.
	Instances   uint8
	IdleTimeout time.Duration
	// Routes keep their order. No two apps have one in common.
	Routes   []string
	BasePort uint16
	// UID is 0 when the app has no user of its own.
	UID             uint32
	Stopped         bool
	SecretsHash     string
	DeployedAt      time.Time
	PreviousRelease tako.ReleaseID // "" when there was none
}

// Deploy is one committed rollout of an app.
type Deploy struct {
	Release    tako.ReleaseID
	DeployedAt time.Time
}

// Pending is a rollout that has begun and was neither committed nor given up.
type Pending struct {
	App         tako.AppID
	Release     tako.ReleaseID
	Path        string
	SecretsHash string
	StartedAt   time.Time
}

// Apps returns every app, by name; none is an empty slice.
func (d *DB) Apps(ctx context.Context) (apps []App, err error) {
	err = d.read(ctx, "read apps", func(tx *sql.Tx) error {
		apps, err = queryApps(ctx, tx, "")
		return err
	})
	return apps, err
}

// App returns one app. Of an unknown one the error is CodeNotFound.
func (d *DB) App(ctx context.Context, id tako.AppID) (app App, err error) {
	err = d.read(ctx, "read app "+string(id), func(tx *sql.Tx) error {
		apps, err := queryApps(ctx, tx, id)
		if err != nil {
			return err
		}
		if len(apps) == 0 {
			return notFound(id)
		}
		app = apps[0]
		return nil
	})
	return app, err
}

func notFound(id tako.AppID) error { return tako.Errorf(tako.CodeNotFound, "App not found: %s", id) }

// queryApps returns the apps by name, or the one with the id if it is not empty.
func queryApps(ctx context.Context, tx *sql.Tx, id tako.AppID) ([]App, error) {
	apps := []App{}
	err := each(ctx, tx, func(scan func(...any) error) error {
		var a App
		var name, release, previous string
		var idle, deployed int64
		if err := scan(&name, &release, &a.Path, &a.Instances, &idle, &a.BasePort, &a.UID, &a.Stopped, &a.SecretsHash, &deployed, &previous); err != nil {
			return err
		}
		var err error
		if a.ID, a.Release, err = parseIDs(name, release); err != nil {
			return err
		}
		if previous != "" {
			if a.PreviousRelease, err = tako.ParseReleaseID(previous); err != nil {
				return fmt.Errorf("app %s: %w", name, err)
			}
		}
		a.IdleTimeout = time.Duration(idle) * time.Millisecond
		a.DeployedAt = fromMS(deployed)
		apps = append(apps, a)
		return nil
	}, `SELECT name, release, path, instances, idle_timeout_ms, base_port, uid, stopped, secrets_hash, deployed_at_ms, previous_release
	    FROM apps WHERE ?1 = '' OR name = ?1 ORDER BY name`, id)
	if err != nil {
		return nil, err
	}
	at := make(map[string]*App, len(apps))
	for i := range apps {
		at[string(apps[i].ID)] = &apps[i]
	}
	err = each(ctx, tx, func(scan func(...any) error) error {
		var name, route string
		if err := scan(&name, &route); err != nil {
			return err
		}
		if a := at[name]; a != nil {
			a.Routes = append(a.Routes, route)
		}
		return nil
	}, `SELECT app, route FROM routes WHERE ?1 = '' OR app = ?1 ORDER BY app, position`, id)
	return apps, err
}

func parseIDs(app, release string) (tako.AppID, tako.ReleaseID, error) {
	a, err := tako.ParseAppID(app)
	if err != nil {
		return "", "", fmt.Errorf("app %q: %w", app, err)
	}
	r, err := tako.ParseReleaseID(release)
	if err != nil {
		return "", "", fmt.Errorf("app %s, release %q: %w", app, release, err)
	}
	return a, r, nil
}

// each calls row for every row of a query, then returns the first error.
func each(ctx context.Context, tx *sql.Tx, row func(scan func(...any) error) error, query string, args ...any) error {
	rows, err := tx.QueryContext(ctx, query, args...)
	if err != nil {
		return err
	}
	defer rows.Close()
	for rows.Next() {
		if err := row(rows.Scan); err != nil {
			return err
		}
	}
	return rows.Err()
}

// SaveApp commits an app, new or not, with exactly its routes, and ends its
// pending rollout. If the app is new, or its release or DeployedAt changed, the
// deploy is remembered. A route of another app is a CodeConflict error that
// names both.
func (d *DB) SaveApp(ctx context.Context, a App) error {
	return d.write(ctx, "save app "+string(a.ID), false, func(tx *sql.Tx) error {
		if err := saveApp(ctx, tx, a); err != nil {
			return err
		}
		_, err := tx.ExecContext(ctx, `DELETE FROM pending_rollouts WHERE app = ?`, a.ID)
		return err
	})
}

func saveApp(ctx context.Context, tx *sql.Tx, a App) error {
	var release string
	var deployed int64
	err := tx.QueryRowContext(ctx, `SELECT release, deployed_at_ms FROM apps WHERE name = ?`, a.ID).Scan(&release, &deployed)
	if err != nil && !errors.Is(err, sql.ErrNoRows) {
		return err
	}
	if _, err := tx.ExecContext(ctx, `
		INSERT INTO apps (name, release, path, instances, idle_timeout_ms, base_port, uid, stopped, secrets_hash, deployed_at_ms, previous_release)
		VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
		ON CONFLICT (name) DO UPDATE SET release = excluded.release, path = excluded.path, instances = excluded.instances,
			idle_timeout_ms = excluded.idle_timeout_ms, base_port = excluded.base_port, uid = excluded.uid, stopped = excluded.stopped,
			secrets_hash = excluded.secrets_hash, deployed_at_ms = excluded.deployed_at_ms, previous_release = excluded.previous_release`,
		a.ID, a.Release, a.Path, a.Instances, a.IdleTimeout.Milliseconds(), a.BasePort, a.UID, a.Stopped, a.SecretsHash, ms(a.DeployedAt), a.PreviousRelease); err != nil {
		return err
	}
	if _, err := tx.ExecContext(ctx, `DELETE FROM routes WHERE app = ?`, a.ID); err != nil {
		return err
	}
	for i, route := range a.Routes {
		var owner string
		err := tx.QueryRowContext(ctx, `SELECT app FROM routes WHERE route = ?`, route).Scan(&owner)
		switch {
		case errors.Is(err, sql.ErrNoRows):
		case err != nil:
			return err
		case owner == string(a.ID):
			return tako.Errorf(tako.CodeInvalid, "route %s is given twice for app %s: name it once", route, a.ID)
		default:
			return tako.Errorf(tako.CodeConflict, "route %s belongs to app %s: remove it there first, or choose another for app %s", route, owner, a.ID)
		}
		if _, err := tx.ExecContext(ctx, `INSERT INTO routes (app, position, route) VALUES (?, ?, ?)`, a.ID, i, route); err != nil {
			return err
		}
	}
	if release == string(a.Release) && deployed == ms(a.DeployedAt) {
		return nil
	}
	if _, err := tx.ExecContext(ctx, `INSERT INTO deploys (app, release, deployed_at_ms) VALUES (?, ?, ?)`, a.ID, a.Release, ms(a.DeployedAt)); err != nil {
		return err
	}
	_, err = tx.ExecContext(ctx, `DELETE FROM deploys WHERE app = ?1 AND id NOT IN (SELECT id FROM deploys WHERE app = ?1 ORDER BY id DESC LIMIT ?2)`, a.ID, MaxDeploys)
	return err
}

// Deploys returns the newest MaxDeploys deploys of an app, newest first.
func (d *DB) Deploys(ctx context.Context, id tako.AppID) ([]Deploy, error) {
	deploys := []Deploy{}
	err := d.read(ctx, "read deploys of app "+string(id), func(tx *sql.Tx) error {
		return each(ctx, tx, func(scan func(...any) error) error {
			var release string
			var at int64
			if err := scan(&release, &at); err != nil {
				return err
			}
			_, r, err := parseIDs(string(id), release)
			deploys = append(deploys, Deploy{Release: r, DeployedAt: fromMS(at)})
			return err
		}, `SELECT release, deployed_at_ms FROM deploys WHERE app = ? ORDER BY id DESC`, id)
	})
	return deploys, err
}

// SetStopped says whether the app is stopped by command. Stopping works on a
// full disk.
func (d *DB) SetStopped(ctx context.Context, id tako.AppID, stopped bool) error {
	return d.set(ctx, id, "stopped state", stopped, `UPDATE apps SET stopped = ? WHERE name = ?`, stopped)
}

// SetSecretsHash records the hash of the app's committed secrets.
func (d *DB) SetSecretsHash(ctx context.Context, id tako.AppID, hash string) error {
	return d.set(ctx, id, "secrets hash", false, `UPDATE apps SET secrets_hash = ? WHERE name = ?`, hash)
}

// SetInstances changes the number of wanted instances; 0 is on demand.
func (d *DB) SetInstances(ctx context.Context, id tako.AppID, n uint8) error {
	return d.set(ctx, id, "instances", false, `UPDATE apps SET instances = ? WHERE name = ?`, n)
}

func (d *DB) set(ctx context.Context, id tako.AppID, what string, spend bool, update string, value any) error {
	return d.write(ctx, "set "+what+" of app "+string(id), spend, func(tx *sql.Tx) error {
		if n, err := affected(tx.ExecContext(ctx, update, value, id)); err != nil {
			return err
		} else if n == 0 {
			return notFound(id)
		}
		return nil
	})
}

func affected(r sql.Result, err error) (int64, error) {
	if err != nil {
		return 0, err
	}
	return r.RowsAffected()
}

// DeleteApp forgets an app, its routes, deploys, ports and pending rollout, and
// reports whether there was an app. Its uid stays its own. It works on a full
// disk.
func (d *DB) DeleteApp(ctx context.Context, id tako.AppID) (existed bool, err error) {
	err = d.write(ctx, "delete app "+string(id), true, func(tx *sql.Tx) error {
		n, err := affected(tx.ExecContext(ctx, `DELETE FROM apps WHERE name = ?`, id))
		if err != nil {
			return err
		}
		existed = n > 0
		if _, err := tx.ExecContext(ctx, `DELETE FROM pending_rollouts WHERE app = ?`, id); err != nil {
			return err
		}
		_, err = tx.ExecContext(ctx, `DELETE FROM ports WHERE app = ?`, id)
		return err
	})
	return existed && err == nil, err
}

// BeginRollout records a rollout before its first effect, so that the next start
// can finish or discard what a crash left. It takes the place of an older one of
// the app.
func (d *DB) BeginRollout(ctx context.Context, p Pending) error {
	return d.write(ctx, "begin rollout of app "+string(p.App), false, func(tx *sql.Tx) error {
		_, err := tx.ExecContext(ctx, `INSERT OR REPLACE INTO pending_rollouts (app, release, path, secrets_hash, started_at_ms) VALUES (?, ?, ?, ?, ?)`,
			p.App, p.Release, p.Path, p.SecretsHash, ms(p.StartedAt))
		return err
	})
}

// Pending returns the rollouts that have begun and not ended, by app.
func (d *DB) Pending(ctx context.Context) ([]Pending, error) {
	pending := []Pending{}
	err := d.read(ctx, "read pending rollouts", func(tx *sql.Tx) error {
		return each(ctx, tx, func(scan func(...any) error) error {
			var p Pending
			var app, release string
			var at int64
			err := scan(&app, &release, &p.Path, &p.SecretsHash, &at)
			if err == nil {
				p.App, p.Release, err = parseIDs(app, release)
			}
			p.StartedAt = fromMS(at)
			pending = append(pending, p)
			return err
		}, `SELECT app, release, path, secrets_hash, started_at_ms FROM pending_rollouts ORDER BY app`)
	})
	return pending, err
}

// AbandonRollout forgets the pending rollout of an app, and the ports of an app
// that never came to be. Without one it does nothing. It works on a full disk.
func (d *DB) AbandonRollout(ctx context.Context, id tako.AppID) error {
	return d.write(ctx, "abandon rollout of app "+string(id), true, func(tx *sql.Tx) error {
		if _, err := tx.ExecContext(ctx, `DELETE FROM pending_rollouts WHERE app = ?`, id); err != nil {
			return err
		}
		_, err := tx.ExecContext(ctx, `DELETE FROM ports WHERE app = ?1 AND NOT EXISTS (SELECT 1 FROM apps WHERE name = ?1)`, id)
		return err
	})
}
