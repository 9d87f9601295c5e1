package store

import (
	"context"
	"database/sql"
	"errors"
	"fmt"

	"tako/internal/tako"
)

// AllocateUID returns the uid of an app, its own for ever: it is kept over a
// delete, since files may still belong to it, and so is one outside the range
// that was given out before. A new one is the lowest of lo to hi that no app
// ever had; when none is left the error is CodeFailed.
func (d *DB) AllocateUID(ctx context.Context, id tako.AppID, lo, hi uint32) (uid uint32, err error) {
	if lo == 0 || lo > hi {
		return 0, fmt.Errorf("allocate uid for app %s: %d to %d is not a range of uids", id, lo, hi)
	}
	err = d.write(ctx, "allocate uid for app "+string(id), false, func(tx *sql.Tx) error {
		err := tx.QueryRowContext(ctx, `SELECT uid FROM uids WHERE app = ?`, id).Scan(&uid)
		if !errors.Is(err, sql.ErrNoRows) {
			return err
		}
		next := int64(lo)
		err = each(ctx, tx, func(scan func(...any) error) error {
			var taken int64
			if err := scan(&taken); err != nil {
				return err
			}
			if taken == next {
				next++
			}
			return nil
		}, `SELECT uid FROM uids WHERE uid BETWEEN ? AND ? ORDER BY uid`, lo, hi)
		if err != nil {
			return err
		}
		if next > int64(hi) {
			return tako.Errorf(tako.CodeFailed, "no uid is left for app %s: all of %d to %d were given out, and those of deleted apps are kept: widen the range of app uids", id, lo, hi)
		}
		uid = uint32(next)
		_, err = tx.ExecContext(ctx, `INSERT INTO uids (app, uid) VALUES (?, ?)`, id, uid)
		return err
	})
	return uid, err
}

// AllocatePorts returns the first of width adjacent ports that are the app's
// until it is deleted. It is the same again while it lies in lo to hi and is
// wide enough; else the lowest that overlaps no other app's. When there is none
// the error is CodeFailed.
func (d *DB) AllocatePorts(ctx context.Context, id tako.AppID, lo, hi, width uint16) (base uint16, err error) {
	if lo == 0 || width == 0 || lo > hi {
		return 0, fmt.Errorf("allocate ports for app %s: %d of %d to %d is not a range of ports", id, width, lo, hi)
	}
	err = d.write(ctx, "allocate ports for app "+string(id), false, func(tx *sql.Tx) error {
		next, kept := int(lo), false // int: 65535 + 1 is a number
		gap := 0
		err := each(ctx, tx, func(scan func(...any) error) error {
			var app string
			var b, w int
			if err := scan(&app, &b, &w); err != nil {
				return err
			}
			switch {
			case app == string(id):
				if b >= int(lo) && b+w-1 <= int(hi) && w >= int(width) {
					base, kept = uint16(b), true
				}
			case gap == 0 && b >= next+int(width):
				gap = next
			default:
				next = max(next, b+w)
			}
			return nil
		}, `SELECT app, base, width FROM ports ORDER BY base`)
		if err != nil || kept {
			return err
		}
		if gap == 0 {
			gap = next
		}
		if gap+int(width)-1 > int(hi) {
			return tako.Errorf(tako.CodeFailed, "no %d adjacent ports are free in %d to %d for app %s: widen the range of instance ports, or delete an app", width, lo, hi, id)
		}
		base = uint16(gap)
		_, err = tx.ExecContext(ctx, `INSERT OR REPLACE INTO ports (app, base, width) VALUES (?, ?, ?)`, id, base, width)
		return err
	})
	if err != nil {
		return 0, err
	}
	return base, nil
}
