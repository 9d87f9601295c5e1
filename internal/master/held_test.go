package master

import (
	"errors"
	"os"
	"path/filepath"
	"strconv"
	"testing"

	"github.com/hashicorp/go-hclog"

	"tako/internal/paths"
)

func exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}

// folder makes a folder with a file in it.
func folder(t *testing.T, path ...string) string {
	t.Helper()
	dir := filepath.Join(path...)
	if err := errors.Join(os.MkdirAll(dir, 0o711), os.WriteFile(filepath.Join(dir, "1.sock"), nil, 0o600)); err != nil {
		t.Fatal(err)
	}
	return dir
}

// TestSweepApartSparesWhatIsHeld: whatever the pid in a folder's name is that of.
func TestSweepApartSparesWhatIsHeld(t *testing.T) {
	run := t.TempDir()
	apart := func(pid int) string { return folder(t, run, paths.SecondPrefix+strconv.Itoa(pid)) }
	const nobody = 1 << 30                                     // no pid is as high
	living, dead, another := apart(nobody), apart(1), apart(2) // a living one of another namespace; and two that are gone, with a pid that lives here
	owners, ours := apart(nobody+1), apart(os.Getpid())        // of a version that holds nothing
	stranger, odd, own := folder(t, run, paths.SecondPrefix+"x"), folder(t, run, paths.SecondPrefix+"007"), folder(t, run, "instances")
	f, err := hold(living)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	s := &server{layout: paths.Layout{Run: run, Second: os.Getpid()}, log: hclog.NewNullLogger()}
	s.sweepApart(nobody + 1)
	for dir, want := range map[string]bool{living: true, dead: false, another: false, owners: true, ours: true, stranger: true, odd: true, own: true} {
		if exists(dir) != want {
			t.Errorf("%s: there %t, want %t", dir, !want, want)
		}
	}
}

// TestAFolderIsHeldByOne until that lets go; also one with an equal pid.
func TestAFolderIsHeldByOne(t *testing.T) {
	run := t.TempDir()
	one := &server{layout: paths.Layout{Run: run, Second: 7}, log: hclog.NewNullLogger()}
	if err := one.makeApart(); err != nil {
		t.Fatal(err)
	}
	dir := folder(t, one.layout.Instances())
	two := &server{layout: one.layout, log: one.log}
	if err := two.makeApart(); !errors.Is(err, errHeld) {
		t.Errorf("the second holder: %v", err)
	}
	two.removeApart()
	if !exists(filepath.Join(dir, "1.sock")) {
		t.Error("who was refused removed the folder")
	}
	_ = one.apart.Close() // it dies
	if err := two.makeApart(); err != nil {
		t.Errorf("after the first: %v", err)
	}
	if exists(filepath.Join(dir, "1.sock")) {
		t.Error("it begins with what a dead one left")
	}
	two.removeApart()
	if exists(dir) {
		t.Error("the folder stays")
	}
}

// TestSweepSparesAPreflightUnderWay: it may be the second server's.
func TestSweepSparesAPreflightUnderWay(t *testing.T) {
	data := t.TempDir()
	s := &server{layout: paths.Layout{Data: data, Run: data}, log: hclog.NewNullLogger()}
	dir, held, err := s.makePreflight()
	if err != nil {
		t.Fatal(err)
	}
	cut := folder(t, data, preflightPrefix+"1")
	s.sweep()
	if !exists(dir) || exists(cut) {
		t.Errorf("under way: there %t; cut off: there %t", exists(dir), exists(cut))
	}
	_ = held.Close()
	s.sweep()
	if exists(dir) {
		t.Error("it stays after its end")
	}
}
