package atomicfile

import (
	"bytes"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"testing"
	"time"
)

// want checks that path alone is in its folder, with this content and mode.
func want(tb testing.TB, path, content string, mode fs.FileMode) {
	tb.Helper()
	got, err := os.ReadFile(path)
	if err != nil {
		tb.Fatal(err)
	}
	info, err := os.Lstat(path)
	if err != nil {
		tb.Fatal(err)
	}
	if string(got) != content || info.Mode() != mode {
		tb.Errorf("%s holds %q with mode %v, want %q, %v", path, got, info.Mode(), content, mode)
	}
	alone(tb, filepath.Dir(path), filepath.Base(path))
}

func alone(tb testing.TB, dir, name string) {
	tb.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		tb.Fatal(err)
	}
	if len(entries) != 1 || entries[0].Name() != name {
		tb.Errorf("%s holds %v, want %s alone", dir, entries, name)
	}
}

func TestWriteFileReplacesWithTheModeWhateverTheUmask(t *testing.T) {
	path := filepath.Join(t.TempDir(), "f")
	old := syscall.Umask(0o077)
	defer syscall.Umask(old)
	for _, c := range []struct {
		content string
		mode    fs.FileMode
	}{{"first", 0o600}, {"", 0o644}, {"third", 0o600}} {
		if err := WriteFile(path, []byte(c.content), c.mode); err != nil {
			t.Fatal(err)
		}
		want(t, path, c.content, c.mode)
	}
}

func TestWriteFileReplacesALinkAndDoesNotFollowIt(t *testing.T) {
	dir, elsewhere := t.TempDir(), filepath.Join(t.TempDir(), "elsewhere")
	if err := os.WriteFile(elsewhere, []byte("keep"), 0o600); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "f")
	if err := os.Symlink(elsewhere, path); err != nil {
		t.Fatal(err)
	}
	if err := WriteFile(path, []byte("new"), 0o600); err != nil {
		t.Fatal(err)
	}
	want(t, path, "new", 0o600)
	want(t, elsewhere, "keep", 0o600)
}

func TestAnErrorLeavesWhatWasThereAndNothingBeside(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "f")
	if err := os.MkdirAll(filepath.Join(path, "child"), 0o700); err != nil { // a rename over it fails
		t.Fatal(err)
	}
	if err := WriteFile(path, []byte("x"), 0o600); err == nil {
		t.Error("WriteFile replaced a folder")
	}
	if err := Symlink("x", path); err == nil {
		t.Error("Symlink replaced a folder")
	}
	alone(t, dir, "f")
	if err := WriteFile(filepath.Join(dir, "none", "f"), nil, 0o600); err == nil {
		t.Error("WriteFile wrote into a folder that is not there")
	}
}

func TestSymlinkIsMovedInOneStep(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "current")
	for _, target := range []string{"releases/v1", "releases/v2"} {
		if err := Symlink(target, path); err != nil {
			t.Fatal(err)
		}
		if got, err := os.Readlink(path); err != nil || got != target {
			t.Errorf("link is %q, %v; want %q", got, err, target)
		}
		alone(t, dir, "current")
	}
}

func TestReadersSeeOldOrNewWhole(t *testing.T) {
	path := filepath.Join(t.TempDir(), "f")
	contents := [][]byte{bytes.Repeat([]byte("a"), 100_000), bytes.Repeat([]byte("b"), 200_000)}
	if err := WriteFile(path, contents[0], 0o600); err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	for _, c := range contents {
		wg.Go(func() {
			for range 20 {
				if err := WriteFile(path, c, 0o600); err != nil {
					t.Error(err)
				}
			}
		})
	}
	for range 100 {
		got, err := os.ReadFile(path)
		if err != nil || !bytes.Equal(got, contents[0]) && !bytes.Equal(got, contents[1]) {
			t.Fatalf("read %d bytes, %v: neither the one nor the other content", len(got), err)
		}
	}
	wg.Wait()
	alone(t, filepath.Dir(path), "f")
}

func TestRemoveStaleTakesOldLeavingsOnly(t *testing.T) {
	dir := t.TempDir()
	for _, name := range []string{"file", prefix + "old", prefix + "young"} {
		if err := os.WriteFile(filepath.Join(dir, name), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	past := time.Now().Add(-2 * time.Hour)
	for _, name := range []string{"file", prefix + "old"} {
		if err := os.Chtimes(filepath.Join(dir, name), past, past); err != nil {
			t.Fatal(err)
		}
	}
	if err := RemoveStale(dir, time.Hour); err != nil {
		t.Fatal(err)
	}
	for name, there := range map[string]bool{"file": true, prefix + "old": false, prefix + "young": true} {
		if _, err := os.Lstat(filepath.Join(dir, name)); (err == nil) != there {
			t.Errorf("%s: %v, want there: %v", name, err, there)
		}
	}
	future := time.Now().Add(time.Hour) // before the clock was set back
	if err := os.Chtimes(filepath.Join(dir, prefix+"young"), future, future); err != nil {
		t.Fatal(err)
	}
	if err := RemoveStale(dir, 0); err != nil {
		t.Fatal(err)
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) != 1 || left[0].Name() != "file" {
		t.Errorf("without an age %v is left, %v", left, err)
	}
	if err := RemoveStale(filepath.Join(dir, "none"), 0); err != nil {
		t.Errorf("a folder that is not there: %v", err)
	}
}
