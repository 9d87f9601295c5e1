package supervise

import (
	"os"
	"os/exec"
	"slices"
	"testing"
)

func TestLookKnowsAProcessByItsStart(t *testing.T) {
	me, ok := Look(os.Getpid())
	if !ok || me.PID != os.Getpid() || me.Parent != os.Getppid() || me.Start == 0 || me.Zombie {
		t.Fatalf("%+v, %v", me, ok)
	}
	if r, ok := Look(4194305); ok {
		t.Errorf("a process that cannot be: %+v", r)
	}
	if !slices.ContainsFunc(Processes(), func(r Relation) bool { return r.PID == me.PID && r.Start == me.Start }) {
		t.Error("we are not among the processes")
	}
}

func TestKillIfKillsOnlyTheProcessThatWasSeen(t *testing.T) {
	cmd := exec.Command("sleep", "60")
	if err := cmd.Start(); err != nil {
		t.Skip("no sleep here:", err)
	}
	r, ok := Look(cmd.Process.Pid)
	if !ok {
		t.Fatal("it is not there")
	}
	other := r
	other.Start++
	KillIf(other, nil)
	KillIf(r, func() bool { return false })
	if now, ok := Look(r.PID); !ok || now.Zombie {
		t.Error("it was killed for another")
	}
	KillIf(Relation{PID: 1}, nil) // refused by OpenPID
	KillIf(r, nil)
	if err := cmd.Wait(); err == nil {
		t.Error("it ended well")
	}
}

func TestChildrenOfForkAreNoOrphans(t *testing.T) {
	cmd := exec.Command("sleep", "60")
	err := Fork(func() (int, error) {
		if err := cmd.Start(); err != nil {
			return 0, err
		}
		return cmd.Process.Pid, nil
	})
	if err != nil {
		t.Skip("no sleep here:", err)
	}
	is := func(r Relation) bool { return r.PID == cmd.Process.Pid }
	if !slices.Contains(Own(), cmd.Process.Pid) || slices.ContainsFunc(Orphans(), is) {
		t.Error("a child of Fork is taken for an orphan")
	}
	Waited(cmd.Process.Pid)
	if slices.Contains(Own(), cmd.Process.Pid) || !slices.ContainsFunc(Orphans(), is) {
		t.Error("a child that nobody waits for is not taken for an orphan")
	}
	_ = cmd.Process.Kill()
	_ = cmd.Wait()
}
