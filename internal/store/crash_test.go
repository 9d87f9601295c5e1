package store

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
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

// TestTornLogLosesItsTornEndAlone cuts the log of a state at random places, as a
// disk does that loses what was not synced, and writes over its end: what is whole
// before that is found, in the order of the changes, and no backup is needed.
func TestTornLogLosesItsTornEndAlone(t *testing.T) {
	dir := t.TempDir()
	d := openIn(t, dir)
	const changes = 12
	sizes := make([]int64, changes+1) // of the log after each change
	wal := options(dir).Path + "-wal"
	size := func() int64 {
		fi, err := os.Stat(wal)
		ok(t, err)
		return fi.Size()
	}
	a := blog()
	a.Instances = 0
	ok(t, d.SaveApp(t.Context(), a))
	sizes[0] = size()
	for n := 1; n <= changes; n++ {
		ok(t, d.SetInstances(t.Context(), "blog", uint8(n)))
		sizes[n] = size()
	}
	database, err := os.ReadFile(options(dir).Path)
	ok(t, err)
	log, err := os.ReadFile(wal)
	ok(t, err)
	if len(log) != int(sizes[changes]) || sizes[0] == sizes[changes] {
		t.Fatalf("the log has %d bytes, after each change it had %v", len(log), sizes)
	}
	for range 25 {
		at := sizes[0] + rand.Int64N(sizes[changes]-sizes[0]+1)
		torn := slices.Clone(log)
		switch rand.IntN(3) {
		case 0:
			torn = torn[:at]
		case 1:
			clear(torn[at:])
		case 2:
			for i := range torn[at:] {
				torn[int(at)+i] ^= 0x5a
			}
		}
		copied := options(t.TempDir())
		ok(t, os.WriteFile(copied.Path, database, 0o600))
		ok(t, os.WriteFile(copied.Path+"-wal", torn, 0o600))
		want := 0
		for n := range sizes {
			if end := int(sizes[n]); end <= len(torn) && bytes.Equal(torn[:end], log[:end]) {
				want = n // what is cleared may have been clear
			}
		}
		again, err := Open(t.Context(), copied)
		if err != nil {
			t.Fatalf("a log of %d bytes torn at %d: %v", len(log), at, err)
		}
		apps, err := again.Apps(t.Context())
		ok(t, err)
		if len(apps) != 1 || int(apps[0].Instances) != want {
			t.Errorf("a log torn at %d of %v: %+v, want change %d", at, sizes, apps, want)
		}
		if from, restored := again.Restored(); restored {
			t.Errorf("a log torn at %d: restored from %s", at, from)
		}
		closeDB(t, again)
	}
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
