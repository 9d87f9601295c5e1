package store

import (
	"bufio"
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"testing"
	"time"

	"tako/internal/tako"
)

// writeUntilKilled is the child of TestAcknowledgedChangesSurviveKill: it saves
// apps with rising numbers and says each number once it is committed.
func writeUntilKilled(dir string) {
	o := options(dir)
	o.Now = nil
	d, err := Open(context.Background(), o)
	for n := 1; err == nil; n++ {
		a := App{
			ID: tako.AppID("app" + strconv.Itoa(n%5)), Release: tako.ReleaseID(strconv.Itoa(n)), Path: "/" + strconv.Itoa(n),
			Routes: []string{fmt.Sprintf("%d-%d.example.com", n%5, n)}, DeployedAt: time.UnixMilli(int64(n)),
		}
		if err = d.BeginRollout(context.Background(), Pending{App: a.ID, Release: a.Release, Path: a.Path}); err != nil {
			break
		}
		if err = d.SaveApp(context.Background(), a); err == nil {
			os.Stdout.WriteString(strconv.Itoa(n) + "\n")
		}
		if n%25 == 0 && err == nil {
			_, err = d.Backup(context.Background())
		}
	}
	os.Stdout.WriteString(err.Error() + "\n")
}

func TestAcknowledgedChangesSurviveKill(t *testing.T) {
	dir := t.TempDir()
	most := 0
	for range 20 {
		cmd := exec.CommandContext(t.Context(), os.Args[0])
		cmd.Env = append(os.Environ(), "TAKO_STORE_TEST_WRITER="+dir)
		out, err := cmd.StdoutPipe()
		ok(t, err)
		ok(t, cmd.Start())
		lines := bufio.NewScanner(out)
		acked := 0
		if lines.Scan() { // it is writing: kill it some time from now
			timer := time.AfterFunc(time.Duration(rand.IntN(60_000))*time.Microsecond, func() { _ = cmd.Process.Kill() })
			defer timer.Stop()
			for more := true; more; more = lines.Scan() {
				n, err := strconv.Atoi(lines.Text())
				if err != nil {
					t.Fatalf("the writer says %q", lines.Text())
				}
				acked = n
			}
		}
		_ = cmd.Wait() // killed
		most = max(most, acked)
		if acked == 0 {
			t.Fatal("the writer wrote nothing")
		}
		d := openIn(t, dir)
		if from, restored := d.Restored(); restored {
			t.Fatalf("restored from %s after a kill", from)
		}
		apps, err := d.Apps(t.Context())
		ok(t, err)
		newest := 0
		for _, a := range apps {
			n, err := strconv.Atoi(string(a.Release))
			if err != nil || a.Path != "/"+strconv.Itoa(n) || len(a.Routes) != 1 || a.Routes[0] != fmt.Sprintf("%d-%d.example.com", n%5, n) {
				t.Errorf("half an app: %+v", a)
			}
			newest = max(newest, n)
			// The next writer begins at 1 again.
			_, err = d.DeleteApp(t.Context(), a.ID)
			ok(t, err)
		}
		if newest != acked && newest != acked+1 {
			t.Errorf("after the kill the newest is %d, acknowledged was %d", newest, acked)
		}
		closeDB(t, d)
	}
	t.Logf("most acknowledged before a kill: %d", most)
	if left, _ := filepath.Glob(filepath.Join(dir, "*.new*")); len(left) > 0 {
		t.Errorf("left over: %v", left)
	}
}
