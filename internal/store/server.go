package store

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"time"

	"tako/internal/tako"
)

// Limits of the server's own state.
const (
	// UpgradeLease is how long after its last renewal an upgrade lock is safe
	// from other owners.
	UpgradeLease = 600 * time.Second
	// MaxOwner is the longest name of a lock's owner, in bytes.
	MaxOwner = 256
	// MaxServerValue is the largest server value, in bytes.
	MaxServerValue = 64 << 10
)

// The troubles with the upgrade lock.
var (
	ErrLocked    = errors.New("the upgrade lock is held by another owner")
	ErrNotHolder = errors.New("the upgrade lock is not held by this owner")
)

// Lock is the upgrade lock while somebody holds it.
type Lock struct {
	Owner      string
	AcquiredAt time.Time
	RenewedAt  time.Time
}

// Age is how long the lock has been held; never negative, though clocks are set
// back.
func (l Lock) Age(now time.Time) time.Duration { return max(now.Sub(l.AcquiredAt), 0) }

// Idle is how long ago the lock was renewed; never negative.
func (l Lock) Idle(now time.Time) time.Duration { return max(now.Sub(l.RenewedAt), 0) }

// LockedError is an ErrLocked, and a CodeConflict error for the caller.
type LockedError struct {
	Holder    Lock
	Age, Idle time.Duration
}

func (e *LockedError) Error() string {
	return fmt.Sprintf("the upgrade lock is held by %q, for %s, renewed %s ago: wait until it is released or was not renewed for %s, or take it over with force",
		e.Holder.Owner, e.Age.Round(time.Second), e.Idle.Round(time.Second), UpgradeLease)
}

// Unwrap gives errors.Is and tako.AsError their parts.
func (e *LockedError) Unwrap() []error {
	return []error{ErrLocked, tako.Errorf(tako.CodeConflict, "%s", e.Error())}
}

// EnterUpgrading sets the server upgrading and gives owner the lock, in one
// transaction. The holder enters again and so renews its lease. From another it
// is taken only with force or when the lease ran out; else the error is a
// *LockedError. A clock set back prolongs a lease and never cuts it short.
func (d *DB) EnterUpgrading(ctx context.Context, owner string, force bool, now time.Time) (lock Lock, err error) {
	if owner == "" || len(owner) > MaxOwner {
		return Lock{}, tako.Errorf(tako.CodeInvalid, "the owner of an upgrade lock has 1 to %d bytes, not %d", MaxOwner, len(owner))
	}
	now = time.UnixMilli(now.UnixMilli()).UTC()
	err = d.write(ctx, "enter upgrading", false, func(tx *sql.Tx) error {
		lock = Lock{Owner: owner, AcquiredAt: now, RenewedAt: now}
		held, err := queryLock(ctx, tx)
		switch {
		case err != nil:
			return err
		case held == nil:
		case held.Owner == owner:
			lock.AcquiredAt = held.AcquiredAt
		case force || held.Idle(now) >= UpgradeLease:
			d.o.Log.Warn("upgrade lock taken over", "from", held.Owner, "by", owner, "force", force, "idle", held.Idle(now))
		default:
			return &LockedError{Holder: *held, Age: held.Age(now), Idle: held.Idle(now)}
		}
		_, err = tx.ExecContext(ctx, `INSERT OR REPLACE INTO upgrade_lock (id, owner, acquired_at_ms, renewed_at_ms) VALUES (1, ?, ?, ?)`,
			lock.Owner, lock.AcquiredAt.UnixMilli(), lock.RenewedAt.UnixMilli())
		return err
	})
	if err != nil {
		return Lock{}, err
	}
	return lock, nil
}

// ExitUpgrading releases the lock and sets the server normal, in one transaction.
// When owner does not hold the lock the error is ErrNotHolder, and CodeConflict
// for the caller; with force whoever holds it loses it, and it is no error if
// nobody does. It works on a full disk.
func (d *DB) ExitUpgrading(ctx context.Context, owner string, force bool) error {
	return d.write(ctx, "exit upgrading", true, func(tx *sql.Tx) error {
		held, err := queryLock(ctx, tx)
		switch {
		case err != nil:
			return err
		case held == nil && force:
			return nil
		case held == nil:
			return fmt.Errorf("%w: %w", ErrNotHolder, tako.Errorf(tako.CodeConflict, "nobody holds the upgrade lock"))
		case held.Owner != owner && !force:
			return fmt.Errorf("%w: %w", ErrNotHolder, tako.Errorf(tako.CodeConflict, "the upgrade lock is held by %q, not by %q: name its owner, or use force", held.Owner, owner))
		}
		_, err = tx.ExecContext(ctx, `DELETE FROM upgrade_lock`)
		return err
	})
}

// Mode returns the server's mode, with the lock while it is upgrading, else nil.
func (d *DB) Mode(ctx context.Context) (mode tako.Mode, lock *Lock, err error) {
	err = d.read(ctx, "read server mode", func(tx *sql.Tx) error {
		lock, err = queryLock(ctx, tx)
		return err
	})
	switch {
	case err != nil:
		return "", nil, err
	case lock == nil:
		return tako.ModeNormal, nil, nil
	}
	return tako.ModeUpgrading, lock, nil
}

func queryLock(ctx context.Context, tx *sql.Tx) (*Lock, error) {
	var l Lock
	var acquired, renewed int64
	err := tx.QueryRowContext(ctx, `SELECT owner, acquired_at_ms, renewed_at_ms FROM upgrade_lock WHERE id = 1`).Scan(&l.Owner, &acquired, &renewed)
	if errors.Is(err, sql.ErrNoRows) {
		return nil, nil // no lock is an answer
	}
	if err != nil {
		return nil, err
	}
	l.AcquiredAt, l.RenewedAt = time.UnixMilli(acquired).UTC(), time.UnixMilli(renewed).UTC()
	return &l, nil
}

// ServerValue returns a value of the server itself, nil if it was never set.
func (d *DB) ServerValue(ctx context.Context, key string) (value []byte, err error) {
	err = d.read(ctx, "read server value "+key, func(tx *sql.Tx) error {
		err := tx.QueryRowContext(ctx, `SELECT value FROM server_values WHERE key = ?`, key).Scan(&value)
		if errors.Is(err, sql.ErrNoRows) {
			return nil
		}
		if value == nil {
			value = []byte{} // it was set, to nothing
		}
		return err
	})
	return value, err
}

// SetServerValue keeps a value of at most MaxServerValue bytes.
func (d *DB) SetServerValue(ctx context.Context, key string, value []byte) error {
	if key == "" || len(value) > MaxServerValue {
		return fmt.Errorf("set server value %q: %d bytes; a value has a key and at most %d bytes", key, len(value), MaxServerValue)
	}
	if value == nil {
		value = []byte{}
	}
	return d.write(ctx, "set server value "+key, false, func(tx *sql.Tx) error {
		_, err := tx.ExecContext(ctx, `INSERT OR REPLACE INTO server_values (key, value) VALUES (?, ?)`, key, value)
		return err
	})
}
