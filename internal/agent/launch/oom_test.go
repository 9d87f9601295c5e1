package launch

import (
	"os"
	"path/filepath"
	"testing"
)

func TestKillsForMemoryAreCountedFromTheStart(t *testing.T) {
	file := filepath.Join(t.TempDir(), "memory.events")
	write := func(text string) {
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("low 0\noom 9\noom_kill 2\noom_group_kill 7\n")
	n, ok := oomKills(file)
	if n != 2 || !ok {
		t.Fatalf("got %d, %v", n, ok)
	}
	w := oomWatch{file: file, count: n}
	if w.happened() {
		t.Error("it happened before it happened")
	}
	write("oom_kill_disable 0\nunder_oom 0\noom_kill 3\n")
	if !w.happened() {
		t.Error("it did not happen")
	}
	if (oomWatch{}).happened() {
		t.Error("it happened where nothing is known")
	}
}
