package integration

import (
	"errors"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"tako/internal/takotest"
)

func TestAnOrdinaryUserRunsTheWholeServer(t *testing.T) {
	t.Parallel()
	o := takotest.Options{}
	if os.Geteuid() == 0 {
		o.User = ordinary
	}
	s := prepare(t, o)
	if err := s.Start(); err != nil {
		t.Fatal(err)
	}
	uid := os.Geteuid()
	if o.User != 0 {
		uid = ordinary
	}
	upload(t, s, "blog", "1", quick(nil))
	if a := about(t, s, "blog.localhost"); a.UID != uid {
		t.Errorf("the app runs as uid %d, want %d", a.UID, uid)
	}
	upload(t, s, "blog", "2", quick(nil))
	if _, err := s.Ask("rollback", map[string]any{"app": "blog", "version": "1"}); err != nil {
		t.Error(err)
	}
	if v := about(t, s, "blog.localhost").Version; v != "1" {
		t.Errorf("version %s serves, want 1", v)
	}
	const sentence = "everything runs as one user: an app can read what tako can; start tako-master as root for users of their own"
	info, err := s.Ask("server_info", nil)
	if err != nil || !strings.Contains(string(info), sentence) {
		t.Errorf("server_info: %s, %v; want the sentence %q in it", info, err, sentence)
	}
	if n := logged(s, sentence); n != 1 {
		t.Errorf("the log says it %d times, want once", n)
	}
	for _, p := range s.Processes() {
		fi, err := os.Stat(filepath.Join("/proc", strconv.Itoa(p.PID)))
		if err != nil {
			continue // it has just ended
		}
		if owner := int(fi.Sys().(*syscall.Stat_t).Uid); owner != uid {
			t.Errorf("%v runs as uid %d, want %d", p, owner, uid)
		}
	}
	if _, err := s.Ask("stop", map[string]any{"app": "blog"}); err != nil {
		t.Error(err)
	}
	if answer, err := s.Get(t.Context(), takotest.HTTP1, "blog.localhost/"); err != nil || answer.StatusCode != 503 {
		t.Errorf("a stopped app is answered %v, %v; want 503", answer.Response, err)
	}
	if _, err := s.Ask("delete", map[string]any{"app": "blog"}); err != nil {
		t.Error(err)
	}
}

// TestCapableUserGivesEveryAppItsOwn runs the server as systemd would: not root,
// with the capabilities to start programs as other users.
func TestCapableUserGivesEveryAppItsOwn(t *testing.T) {
	t.Parallel()
	asRoot(t)
	s := prepare(t, takotest.Options{User: ordinary, Caps: []uintptr{unix.CAP_SETUID, unix.CAP_SETGID, unix.CAP_KILL}})
	if err := s.Start(); err != nil {
		t.Fatal(err)
	}
	upload(t, s, "blog", "1", quick(nil))
	upload(t, s, "shop", "1", quick(nil))
	blog, shop := about(t, s, "blog.localhost").UID, about(t, s, "shop.localhost").UID
	if blog < 70_000 || shop < 70_000 || blog == shop {
		t.Errorf("the apps run as uid %d and %d, want two of their own from 70000 on", blog, shop)
	}
	for path, mode := range map[string]os.FileMode{"": 0o710, "releases": 0o710, "data": 0o700, "tmp": 0o700, "releases/1": 0o750, "secrets.json": 0o600} {
		fi, err := os.Stat(filepath.Join(s.Data, "apps", "blog", path))
		if err != nil || fi.Mode().Perm() != mode {
			t.Errorf("apps/blog/%s: %v, %v; want mode %o", path, fi.Mode(), err, mode)
		}
	}
	if r := reload(t, s); r.LastError != "" {
		t.Errorf("reload: %s", r.LastError)
	}
	upload(t, s, "blog", "2", quick(nil))
	if a := about(t, s, "blog.localhost"); a.Version != "2" || a.UID != blog {
		t.Errorf("after a reload and a deploy: version %s as uid %d, want 2 as %d", a.Version, a.UID, blog)
	}
}

func TestDataRootOfSomebodyElseIsRefusedWithTheCommandToRun(t *testing.T) {
	t.Parallel()
	asRoot(t)
	s := prepare(t, takotest.Options{User: ordinary})
	if err := os.Mkdir(s.Data, 0o755); err != nil { // root's
		t.Fatal(err)
	}
	refused(t, s, exitFailed, s.Data, "belongs to uid 0", "uid "+strconv.Itoa(ordinary), "chown -R")
}

func TestDataRootThatIsNotWritableIsRefused(t *testing.T) {
	t.Parallel()
	o := takotest.Options{}
	if os.Geteuid() == 0 {
		o.User = ordinary
	}
	s := prepare(t, o)
	closed := filepath.Join(s.Dir, "closed")
	if err := os.Mkdir(closed, 0o555); err != nil {
		t.Fatal(err)
	}
	s.SetFlags("--data-dir", filepath.Join(closed, "data"))
	refused(t, s, exitFailed, closed, "permission denied", "choose another folder, or run: chown")
}

// TestExampleLineOfTheManualRuns starts the server with the flags that the manual
// names, as root too, where files in /tmp are protected against being followed.
// Only the names and ports are this test's own.
func TestExampleLineOfTheManualRuns(t *testing.T) {
	t.Parallel()
	s := prepare(t, takotest.Options{})
	name := filepath.Base(s.Dir)
	s.Socket, s.Data = "/tmp/"+name+".sock", "/tmp/"+name+"-data"
	t.Cleanup(func() {
		for _, path := range []string{s.Data, "/tmp/" + name + ".run", s.Socket} {
			if err := os.RemoveAll(path); err != nil {
				t.Error(err)
			}
		}
	})
	master := exec.Command(s.Program("tako-master"), "--socket", s.Socket, "--port", strconv.Itoa(s.HTTP),
		"--tls-port", strconv.Itoa(s.HTTPS), "--data-dir", s.Data, "--no-acme")
	var said strings.Builder
	master.Stdout, master.Stderr = &said, &said
	if err := master.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- master.Wait() }()
	t.Cleanup(func() {
		if err := master.Process.Signal(os.Interrupt); err != nil && !errors.Is(err, os.ErrProcessDone) {
			t.Error(err)
		}
		select {
		case err := <-ended:
			if err != nil {
				t.Errorf("it ended with %v\n%s", err, said.String())
			}
		case <-time.After(takotest.StopWait):
			t.Errorf("it did not stop, %v", master.Process.Kill())
		}
		if t.Failed() {
			t.Logf("it said\n%s", said.String())
		}
	})
	until(t, takotest.StartWait, "it answers", func() bool { _, err := s.Ask("server_info", nil); return err == nil })
	deploy(t, s, "blog", "1", quick(nil))
	about(t, s, "blog.localhost")
	// On all addresses, as the line says nothing of one.
	if conn, err := net.DialTimeout("tcp", net.JoinHostPort("::1", strconv.Itoa(s.HTTP)), time.Second); err == nil {
		conn.Close()
	} else if _, noIPv6 := os.Stat("/proc/net/if_inet6"); noIPv6 == nil {
		t.Errorf("not on IPv6: %v", err)
	}
}

// TestAFullDiskHarmsNothing: what changes is refused and says why, what ran
// before serves, and stop and delete work.
func TestAFullDiskHarmsNothing(t *testing.T) {
	t.Parallel()
	asRoot(t)
	s := prepare(t, takotest.Options{})
	if err := os.Mkdir(s.Data, 0o711); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Mount("tmpfs", s.Data, "tmpfs", 0, "size=96m,mode=0711"); err != nil {
		t.Skipf("a tmpfs cannot be mounted here: %v", err)
	}
	t.Cleanup(func() {
		if err := errors.Join(s.Stop(), syscall.Unmount(s.Data, 0)); err != nil {
			t.Error(err)
		}
	})
	if err := s.Start(); err != nil {
		t.Fatal(err)
	}
	type fields = map[string]any
	deploy(t, s, "good", "1", quick(nil))
	deploy(t, s, "other", "1", quick(nil))
	deploy(t, s, "blog", "1", quick(nil))
	lay(t, s, "blog", "2", quick(nil))
	if _, err := ask(s, "blog", "2", fields{"secrets": fields{"PASSWORD": "old"}}); err != nil {
		t.Fatal(err)
	}
	lay(t, s, "blog", "3", quick(nil))
	good, blog := about(t, s, "good.localhost"), about(t, s, "blog.localhost")
	fill := fillDisk(t, s.Data)

	const full = `(?i).*(no space left on device|disk is full|free some disk space).*`
	big := fields{"PASSWORD": strings.Repeat("x", 60<<10)}
	_, err := ask(s, "blog", "3", fields{"secrets": big})
	wantError(t, s, "deploy on a full disk", err, full)
	_, err = s.Ask("update_secrets", fields{"app": "blog", "secrets": big})
	wantError(t, s, "update_secrets on a full disk", err, full)
	_, err = s.Ask("rollback", fields{"app": "blog", "version": "1"})
	wantError(t, s, "rollback on a full disk", err, full)
	_, stderr, code, err := s.Ctl(t.Context(), "deploy", releaseDir(s, "good", "1"), "--app", "new", "--route", "new.localhost")
	if err != nil || code == 0 {
		t.Errorf("an upload to a full disk: %v, exit status %d, %s", err, code, stderr)
	}
	wantError(t, s, "an upload to a full disk", errors.New(stderr), full)

	check := func(when string) {
		t.Helper()
		if a := about(t, s, "good.localhost"); a.PID != good.PID {
			t.Errorf("%s: good was pid %d and is %d", when, good.PID, a.PID)
		}
		if a := about(t, s, "blog.localhost"); a.PID != blog.PID || a.Version != "2" {
			t.Errorf("%s: blog was %+v and is %+v", when, blog, a)
		}
		if st := status(t, s, "blog"); st.Version != "2" || st.State != "running" {
			t.Errorf("%s: blog is %+v", when, st)
		}
	}
	check("on a full disk")
	if secrets, err := os.ReadFile(filepath.Join(s.Data, "apps", "blog", "secrets.json")); err != nil || !strings.Contains(string(secrets), `"old"`) {
		t.Errorf("secrets.json: %.100s, %v", secrets, err)
	}
	if _, err := s.Ask("stop", fields{"app": "other"}); err != nil {
		t.Errorf("stop on a full disk: %v", err)
	}
	if _, err := s.Ask("delete", fields{"app": "other"}); err != nil {
		t.Errorf("delete on a full disk: %v", err)
	}
	check("after stop and delete")

	if err := os.Remove(fill); err != nil {
		t.Fatal(err)
	}
	if _, err := ask(s, "blog", "3", nil); err != nil {
		t.Errorf("deploy with space again: %v", err)
	}
	if v := about(t, s, "blog.localhost").Version; v != "3" {
		t.Errorf("version %s serves, want 3", v)
	}
}

// fillDisk writes a file until there is no space left, and returns its name.
func fillDisk(t *testing.T, dir string) string {
	t.Helper()
	name := filepath.Join(dir, "filler")
	f, err := os.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	block := make([]byte, 1<<20)
	for len(block) >= 512 {
		switch _, err := f.Write(block); {
		case errors.Is(err, syscall.ENOSPC):
			block = block[:len(block)/2]
		case err != nil:
			t.Fatal(err)
		}
	}
	if _, err := os.Stat(name); errors.Is(err, fs.ErrNotExist) {
		t.Fatal("the filler is gone")
	}
	return name
}
