package takotest

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func TestProcessesOfAServerAreFoundByProgramFolderOrCommandLine(t *testing.T) {
	sleep, err := exec.LookPath("sleep")
	if err != nil {
		t.Fatal(err)
	}
	dir, err := TempDir()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	own := filepath.Join(dir, "sleep")
	if err := copyProgram(sleep, own); err != nil {
		t.Fatal(err)
	}
	byProgram, byFolder, byLine, stranger := exec.Command(own, "60"), exec.Command(sleep, "60"), exec.Command("sh", "-c", "read x; : "+dir+"/x"), exec.Command(sleep, "60")
	byFolder.Dir = filepath.Join(dir, "below")
	if err := os.Mkdir(byFolder.Dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if _, err := byLine.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	want := make(map[int]bool)
	for _, cmd := range []*exec.Cmd{byProgram, byFolder, byLine, stranger} {
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			cmd.Process.Kill()
			cmd.Wait()
		})
		want[cmd.Process.Pid] = cmd != stranger
	}

	// A program that was just executed has no command line for a moment.
	found := processes(dir)
	for end := time.Now().Add(10 * time.Second); len(found) < 3 && time.Now().Before(end); found = processes(dir) {
		time.Sleep(time.Millisecond)
	}
	if len(found) != 3 {
		t.Fatalf("found %v, want 3 processes", found)
	}
	for _, p := range found {
		if !want[p.PID] {
			t.Errorf("found %v, which is a stranger", p)
		}
		if err := p.kill(); err != nil {
			t.Error(err)
		}
	}
	for _, cmd := range []*exec.Cmd{byProgram, byFolder, byLine} {
		if err := cmd.Wait(); err == nil || !strings.Contains(err.Error(), "killed") {
			t.Errorf("%v ended with %v, want it killed", cmd, err)
		}
	}
	if left := processes(dir); len(left) != 0 {
		t.Errorf("still found: %v", left)
	}
}

func TestFreePortsAreDifferent(t *testing.T) {
	ports, err := FreePorts(20)
	if err != nil {
		t.Fatal(err)
	}
	seen := make(map[int]bool)
	for _, p := range ports {
		if seen[p] {
			t.Errorf("port %d came twice in %v", p, ports)
		}
		seen[p] = true
	}
}
