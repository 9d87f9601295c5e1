package store

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"tako/internal/tako"
)

func followIn(t testing.TB, dir string) *DB {
	t.Helper()
	d, err := Follow(t.Context(), options(dir))
	ok(t, err)
	t.Cleanup(func() { closeDB(t, d) })
	return d
}

func TestFollowerSeesEachChangeAndMakesNone(t *testing.T) {
	dir := t.TempDir()
	owner := openIn(t, dir)
	d := followIn(t, dir)
	if !d.Following() || owner.Following() {
		t.Fatal("it is not the second that follows")
	}
	last, err := d.Seen(t.Context())
	ok(t, err)
	a := blog()
	steps := []struct {
		name   string
		change func() error
	}{
		{"save", func() error { return owner.SaveApp(t.Context(), a) }},
		{"scale", func() error { return owner.SetInstances(t.Context(), a.ID, 7) }},
		{"secrets", func() error { return owner.SetSecretsHash(t.Context(), a.ID, "other") }},
		{"stop", func() error { return owner.SetStopped(t.Context(), a.ID, true) }},
		{"lock", func() error { _, err := owner.EnterUpgrading(t.Context(), "me", false, start); return err }},
		{"delete", func() error { _, err := owner.DeleteApp(t.Context(), a.ID); return err }},
	}
	for _, s := range steps {
		if now, err := d.Seen(t.Context()); err != nil || now != last {
			t.Errorf("before %s: seen %d, %v, want %d: nothing has changed", s.name, now, err, last)
		}
		ok(t, s.change())
		now, err := d.Seen(t.Context())
		if err != nil || now == last {
			t.Errorf("after %s: seen %d, %v, want another number", s.name, now, err)
		}
		last = now
		want, err := owner.Apps(t.Context())
		ok(t, err)
		wantApps(t, d, want...)
	}
	if mode, lock, err := d.Mode(t.Context()); err != nil || mode != tako.ModeUpgrading || lock.Owner != "me" {
		t.Errorf("mode %s of %v, %v, want the owner's", mode, lock, err)
	}
	for name, change := range map[string]func() error{
		"save":   func() error { return d.SaveApp(t.Context(), blog()) },
		"delete": func() error { _, err := d.DeleteApp(t.Context(), a.ID); return err },
		"ports":  func() error { _, err := d.AllocatePorts(t.Context(), a.ID, 20000, 20100, 4); return err },
		"lock":   func() error { _, err := d.EnterUpgrading(t.Context(), "me", true, start); return err },
		"backup": func() error { _, err := d.Backup(t.Context()); return err },
	} {
		if err := change(); !errors.Is(err, ErrFollowing) {
			t.Errorf("%s by the follower: %v, want ErrFollowing", name, err)
		}
	}
	ok(t, d.CopyTo(t.Context(), filepath.Join(dir, "copy"))) // for a look of its own
	// The guard behind that one: the connection itself cannot write.
	if _, err := d.sql.Exec(`DELETE FROM uids`); err == nil {
		t.Error("the follower's connection writes")
	}
}

func TestFollowerFindsWhatWasGivenOut(t *testing.T) {
	dir := t.TempDir()
	owner := openIn(t, dir)
	d := followIn(t, dir)
	if base, uid, err := d.Given(t.Context(), "blog"); base != 0 || uid != 0 || err != nil {
		t.Errorf("given %d, %d, %v, want nothing yet", base, uid, err)
	}
	wantBase, err := owner.AllocatePorts(t.Context(), "blog", 20000, 20100, 4)
	ok(t, err)
	wantUID, err := owner.AllocateUID(t.Context(), "blog", 70000, 70010)
	ok(t, err)
	if base, uid, err := d.Given(t.Context(), "blog"); base != wantBase || uid != wantUID || err != nil {
		t.Errorf("given %d, %d, %v, want %d, %d", base, uid, err, wantBase, wantUID)
	}
}

func TestFollowedStateIsTakenOver(t *testing.T) {
	dir := t.TempDir()
	owner, err := Open(t.Context(), options(dir))
	ok(t, err)
	d := followIn(t, dir)
	ok(t, owner.SaveApp(t.Context(), blog()))
	closeDB(t, owner)
	var reads sync.WaitGroup
	for range 8 { // reads go on meanwhile
		reads.Go(func() {
			for range 50 {
				wantApps(t, d, blog())
			}
		})
	}
	ok(t, d.TakeOver(t.Context()))
	reads.Wait()
	ok(t, d.TakeOver(t.Context())) // again is nothing
	if d.Following() {
		t.Error("it still follows")
	}
	other := blog()
	other.ID, other.Routes = "wiki", []string{"wiki.example.com"}
	ok(t, d.SaveApp(t.Context(), other))
	wantApps(t, d, blog(), other)
	if _, err := d.Backup(t.Context()); err != nil {
		t.Error(err)
	}
	if fi, err := os.Stat(options(dir).ReservePath); err != nil || fi.Size() != ReserveBytes {
		t.Errorf("the reserve file is not there: %v", err)
	}
	third := followIn(t, dir)
	wantApps(t, third, blog(), other)
}

func TestFollowerRefusesAnotherSchema(t *testing.T) {
	dir := t.TempDir()
	owner := openIn(t, dir)
	ok(t, owner.SaveApp(t.Context(), blog()))
	all, err := loadMigrations()
	ok(t, err)
	next := append(slices.Clone(all), migration{version: 99, name: "next", sql: `CREATE TABLE later (x)`})
	before := tree(t, dir)
	if _, err := follow(t.Context(), options(dir), next); !errors.Is(err, ErrOtherSchema) || errors.Is(err, ErrNewerSchema) || !strings.Contains(err.Error(), "reload its owner") {
		t.Errorf("an older database: %v", err)
	}
	d := followIn(t, dir)
	if _, err := d.Seen(t.Context()); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(before, tree(t, dir)) {
		t.Errorf("to follow changed what is there:\n%s\nbefore\n%s", tree(t, dir), before)
	}
	// The owner is reloaded into a later version meanwhile.
	if _, err := owner.sql.Exec(`PRAGMA user_version = 99`); err != nil {
		t.Fatal(err)
	}
	if _, err := d.Seen(t.Context()); !errors.Is(err, ErrNewerSchema) {
		t.Errorf("Seen = %v, want ErrNewerSchema", err)
	}
	wantApps(t, d, blog()) // it reads what it knows
	if _, err := Follow(t.Context(), options(dir)); !errors.Is(err, ErrNewerSchema) || !strings.Contains(err.Error(), "start the version that its owner runs") {
		t.Errorf("Follow = %v, want ErrNewerSchema", err)
	}
	// And goes: it cannot be taken over, and is followed on.
	ok(t, owner.Close())
	if err := d.TakeOver(t.Context()); !errors.Is(err, ErrNewerSchema) {
		t.Errorf("TakeOver = %v, want ErrNewerSchema", err)
	}
	wantApps(t, d, blog())
	if !d.Following() {
		t.Error("it does not follow any more")
	}
}

func TestNothingIsFollowedWhereNothingIs(t *testing.T) {
	dir := t.TempDir()
	if _, err := Follow(t.Context(), options(dir)); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("Follow = %v, want not exist", err)
	}
	if left := tree(t, dir); len(left) != 0 {
		t.Errorf("it made %s", left)
	}
}

// tree lists the files of a folder, and when each was changed, but for SQLite's
// shared memory.
func tree(t testing.TB, dir string) []byte {
	t.Helper()
	var b bytes.Buffer
	ok(t, filepath.WalkDir(dir, func(path string, e os.DirEntry, err error) error {
		if err != nil || e.IsDir() || strings.HasSuffix(path, "-shm") {
			return err
		}
		fi, err := e.Info()
		if err == nil {
			b.WriteString(e.Name() + " " + fi.ModTime().Format(time.RFC3339Nano) + "\n")
		}
		return err
	}))
	return b.Bytes()
}
