package store

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"tako/internal/tako"
)

func TestDatabaseThatWasReplacedTakesNoChange(t *testing.T) {
	dir := t.TempDir()
	d := openIn(t, dir)
	ok(t, d.SaveApp(t.Context(), blog()))
	path, away := options(dir).Path, filepath.Join(dir, "away")
	changes := map[string]func() error{
		"save":   func() error { return d.SaveApp(t.Context(), App{ID: "shop", Release: "v1", Path: "/shop"}) },
		"stop":   func() error { return d.SetStopped(t.Context(), "blog", true) },
		"delete": func() error { _, err := d.DeleteApp(t.Context(), "blog"); return err },
	}
	ok(t, os.Rename(path, away))
	for _, replaced := range []bool{false, true} {
		if replaced {
			text, err := os.ReadFile(away)
			ok(t, err)
			ok(t, os.WriteFile(path, text, 0o600))
		}
		for name, change := range changes {
			if err := change(); err == nil {
				t.Errorf("%s, replaced %v: it worked", name, replaced)
			} else {
				wantCode(t, err, tako.CodeFailed, "put it back, or restart")
			}
		}
		wantApps(t, d, blog())
	}
	ok(t, os.Rename(away, path))
	ok(t, changes["delete"]())
	wantApps(t, d)
}

func bigApp() App {
	a := App{ID: "big", Release: "v1", Path: "/big"}
	for _, c := range "abcdefghijklmnopqrstuvwxyz" {
		a.Routes = append(a.Routes, strings.Repeat(string(c), 20_000))
	}
	return a
}

func TestFullDatabaseChangesNothing(t *testing.T) {
	d := openIn(t, t.TempDir())
	ok(t, d.SaveApp(t.Context(), blog()))
	var pages int
	ok(t, d.sql.QueryRow(`PRAGMA page_count`).Scan(&pages))
	if _, err := d.sql.Exec(`PRAGMA max_page_count = 1`); err != nil { // as low as it goes: what there is
		t.Fatal(err)
	}
	wantCode(t, d.SaveApp(t.Context(), bigApp()), tako.CodeFailed, "free some disk space")
	wantApps(t, d, blog())
	if d.reserve != ReserveBytes {
		t.Errorf("a save spent the reserve: %d bytes are left", d.reserve)
	}
}

// smallDisk mounts a file system of its own, or skips.
func smallDisk(t *testing.T, size string) string {
	if os.Getuid() != 0 {
		t.Skip("mounting a small tmpfs needs root")
	}
	dir := t.TempDir()
	if err := syscall.Mount("tmpfs", dir, "tmpfs", 0, "size="+size); err != nil {
		t.Skipf("cannot mount a small tmpfs here: %v", err)
	}
	t.Cleanup(func() {
		if err := syscall.Unmount(dir, syscall.MNT_DETACH); err != nil {
			t.Errorf("unmount %s: %v", dir, err)
		}
	})
	return dir
}

// fill takes every block that is left and returns how to give them back.
func fill(t *testing.T, dir string) (free func()) {
	t.Helper()
	name := filepath.Join(dir, "filler")
	f, err := os.OpenFile(name, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	ok(t, err)
	defer f.Close()
	for err == nil {
		_, err = f.Write(make([]byte, 4096))
	}
	if !errors.Is(err, syscall.ENOSPC) {
		t.Fatal(err)
	}
	return func() { ok(t, os.Remove(name)) }
}

func TestStopAndDeleteWorkOnAFullDisk(t *testing.T) {
	dir := smallDisk(t, "6m")
	o := options(dir)
	d, err := Open(t.Context(), o)
	ok(t, err)
	defer func() { closeDB(t, d) }()
	size := func() int64 {
		fi, err := os.Stat(o.ReservePath)
		ok(t, err)
		if n := fi.Sys().(*syscall.Stat_t).Blocks * 512; n != fi.Size() || n != d.reserve {
			t.Errorf("the reserve has %d bytes on disk, is %d long and counts as %d", n, fi.Size(), d.reserve)
		}
		return fi.Size()
	}
	if n := size(); n != ReserveBytes {
		t.Fatalf("the reserve has %d bytes, want %d", n, ReserveBytes)
	}
	a := blog()
	ok(t, d.SaveApp(t.Context(), a))
	ok(t, d.SaveApp(t.Context(), App{ID: "shop", Release: "v1", Path: "/shop"}))
	// A fresh log has no blocks of its own that a change could use again.
	closeDB(t, d)
	d, err = Open(t.Context(), o)
	ok(t, err)
	free := fill(t, dir)

	wantCode(t, d.SaveApp(t.Context(), bigApp()), tako.CodeFailed, "free some disk space")
	if _, err := d.Backup(t.Context()); err == nil {
		t.Error("a backup was made on a full disk")
	}
	if n := size(); n != ReserveBytes {
		t.Errorf("a save or a backup spent the reserve: %d bytes are left", n)
	}
	for range 30 {
		if err := d.SetStopped(t.Context(), "blog", true); err != nil {
			t.Fatalf("stop on a full disk: %v", err)
		}
		fillMore(t, dir)
	}
	a.Stopped = true
	if n := size(); n < MinReserveBytes || n >= ReserveBytes {
		t.Errorf("after the stops the reserve has %d bytes, want some", n)
	}
	if existed, err := d.DeleteApp(t.Context(), "shop"); !existed || err != nil {
		t.Fatalf("delete on a full disk: %v, %v", existed, err)
	}
	wantApps(t, d, a)
	closeDB(t, d)
	fillMore(t, dir)
	d, err = Open(t.Context(), o)
	if err != nil {
		t.Fatalf("start on a full disk: %v", err)
	}
	wantApps(t, d, a)

	free()
	ok(t, d.SetSecretsHash(t.Context(), "blog", "h9"))
	if n := size(); n != ReserveBytes {
		t.Errorf("with room again the reserve has %d bytes, want %d", n, ReserveBytes)
	}
}

// fillMore takes what was freed since.
func fillMore(t *testing.T, dir string) { fill(t, dir) }
