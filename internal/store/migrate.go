package store

import (
	"context"
	"database/sql"
	"embed"
	"fmt"
	"strconv"
	"strings"
)

//go:embed migrations/*.sql
var migrationFiles embed.FS

// A migration is one numbered change of the schema. Once released it does not
// change; what it removes was unused for a release, since two versions of the
// program may share the file for a while.
type migration struct {
	version int
	name    string
	sql     string
}

// loadMigrations reads NNNN_name.sql, which the folder lists in order.
func loadMigrations() ([]migration, error) {
	files, err := migrationFiles.ReadDir("migrations")
	if err != nil {
		return nil, fmt.Errorf("read migrations: %w", err)
	}
	var all []migration
	for _, f := range files {
		number, name, _ := strings.Cut(strings.TrimSuffix(f.Name(), ".sql"), "_")
		version, err := strconv.Atoi(number)
		if err != nil {
			return nil, fmt.Errorf("read migrations: %s: %w", f.Name(), err)
		}
		text, err := migrationFiles.ReadFile("migrations/" + f.Name())
		if err != nil {
			return nil, fmt.Errorf("read migrations: %w", err)
		}
		all = append(all, migration{version: version, name: name, sql: string(text)})
	}
	return all, nil
}

// migrate applies what is newer than version, each change in a transaction that
// also records it.
func migrate(ctx context.Context, db *sql.DB, all []migration, version int, o Options) error {
	for _, m := range all {
		if m.version <= version {
			continue
		}
		err := transact(ctx, db, nil, func(tx *sql.Tx) error {
			if _, err := tx.ExecContext(ctx, m.sql); err != nil {
				return err
			}
			if _, err := tx.ExecContext(ctx, `INSERT INTO schema_changes (version, name, applied_at_ms, applied_by) VALUES (?, ?, ?, ?)`,
				m.version, m.name, ms(o.Now()), o.Version); err != nil {
				return err
			}
			_, err := tx.ExecContext(ctx, "PRAGMA user_version = "+strconv.Itoa(m.version)) // takes no parameter
			return err
		})
		if err != nil {
			return fmt.Errorf("change schema to %d (%s): %w", m.version, m.name, err)
		}
	}
	return nil
}
