package store

import (
	"context"
	"database/sql"
	"encoding/json"
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

// Lock is the upgrade lock while somebody holds it. Its times are by the clock as
// it is set now: one that was set since the lock was taken, and in the same boot,
// makes it neither older nor younger.
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
// *LockedError. After a restart of the machine a lease is counted by the clock; one
// set back prolongs it and never cuts it short.
func (d *DB) EnterUpgrading(ctx context.Context, owner string, force bool, now time.Time) (lock Lock, err error) {
	if owner == "" || len(owner) > MaxOwner {
		return Lock{}, tako.Errorf(tako.CodeInvalid, "the owner of an upgrade lock has 1 to %d bytes, not %d", MaxOwner, len(owner))
	}
	now = time.UnixMilli(now.UnixMilli()).UTC()
	err = d.write(ctx, "enter upgrading", false, func(tx *sql.Tx) error {
		lock = Lock{Owner: owner, AcquiredAt: now, RenewedAt: now}
		held, err := d.queryLock(ctx, tx, now)
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
		if err != nil {
			return err
		}
		return d.keepLease(ctx, tx, lock)
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
		held, err := d.queryLock(ctx, tx, d.o.Now())
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
		lock, err = d.queryLock(ctx, tx, d.o.Now())
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

func (d *DB) queryLock(ctx context.Context, tx *sql.Tx, now time.Time) (*Lock, error) {
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
	return &l, d.readLease(ctx, tx, &l, now)
}

// keyLease is the server value that has a lease by the uptime.
const keyLease = "upgrade_lease"

// A lease is when the upgrade lock was taken and renewed, in milliseconds of the
// uptime of a boot. It belongs to the lock that was renewed at RenewedAt: another
// version of tako may not know of it.
type lease struct {
	Boot       string `json:"boot"`
	AcquiredUp int64  `json:"acquired_up_ms"`
	RenewedUp  int64  `json:"renewed_up_ms"`
	RenewedAt  int64  `json:"renewed_at_ms"`
}

// keepLease writes the lease of a lock that is renewed now.
func (d *DB) keepLease(ctx context.Context, tx *sql.Tx, l Lock) error {
	boot, up := d.o.Uptime()
	text, err := json.Marshal(lease{
		Boot: boot, AcquiredUp: (up - l.RenewedAt.Sub(l.AcquiredAt)).Milliseconds(), RenewedUp: up.Milliseconds(), RenewedAt: l.RenewedAt.UnixMilli(),
	})
	if err != nil {
		return err
	}
	_, err = tx.ExecContext(ctx, `INSERT OR REPLACE INTO server_values (key, value) VALUES (?, ?)`, keyLease, text)
	return err
}

// readLease puts a lock's times right if its lease is of this boot.
func (d *DB) readLease(ctx context.Context, tx *sql.Tx, l *Lock, now time.Time) error {
	var text []byte
	err := tx.QueryRowContext(ctx, `SELECT value FROM server_values WHERE key = ?`, keyLease).Scan(&text)
	if errors.Is(err, sql.ErrNoRows) {
		return nil
	}
	var of lease
	if err != nil || json.Unmarshal(text, &of) != nil {
		return err // what cannot be read is as none
	}
	boot, up := d.o.Uptime()
	if boot == "" || of.Boot != boot || of.RenewedAt != l.RenewedAt.UnixMilli() {
		return nil
	}
	ago := func(then int64) time.Time {
		return time.UnixMilli(now.UnixMilli() - max(up.Milliseconds()-then, 0)).UTC()
	}
	l.AcquiredAt, l.RenewedAt = ago(of.AcquiredUp), ago(of.RenewedUp)
	return nil
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
