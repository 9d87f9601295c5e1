package management

import (
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

func listen(t testing.TB, dir string, pid int) (*net.UnixListener, error) {
	t.Helper()
	ln, err := Listen(filepath.Join(dir, "tako-"+strconv.Itoa(pid)+".sock"), filepath.Join(dir, "tako.sock"), 0o660, 0)
	if ln != nil {
		t.Cleanup(func() { _ = ln.Close() })
	}
	return ln, err
}

// dead leaves a socket as a server that was killed does.
func dead(t testing.TB, path string, age time.Duration) {
	t.Helper()
	ln, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	ln.SetUnlinkOnClose(false)
	_ = ln.Close()
	then := time.Now().Add(-age)
	if err := os.Chtimes(path, then, then); err != nil {
		t.Fatal(err)
	}
}

func exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}

func TestListenMakesSocketAndRelativeLink(t *testing.T) {
	dir := shortDir(t)
	ln, err := listen(t, dir, 7)
	if err != nil {
		t.Fatal(err)
	}
	link, path := filepath.Join(dir, "tako.sock"), filepath.Join(dir, "tako-7.sock")
	if to, _ := os.Readlink(link); to != "tako-7.sock" {
		t.Errorf("link to %q", to)
	}
	if st, _ := os.Stat(path); st.Mode().Perm() != 0o660 || st.Mode()&os.ModeSocket == 0 {
		t.Errorf("mode %v", st.Mode())
	}
	c, err := net.Dial("unix", link)
	if err != nil {
		t.Fatal(err)
	}
	_ = c.Close()
	_ = ln.Close()
	if !exists(path) {
		t.Error("Close took the socket away")
	}
	for range 2 { // twice is fine
		if err := Unlisten(path, link); err != nil {
			t.Error(err)
		}
	}
	if left, _ := os.ReadDir(dir); len(left) != 0 {
		t.Errorf("left over: %v", left)
	}
}

func TestListenGivesTheSocketToTheGroup(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("only root gives files away")
	}
	dir := shortDir(t)
	path := filepath.Join(dir, "tako-7.sock")
	ln, err := Listen(path, filepath.Join(dir, "tako.sock"), 0o660, 64002)
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	var st syscall.Stat_t
	if err := syscall.Stat(path, &st); err != nil || st.Gid != 64002 || st.Mode&0o777 != 0o660 {
		t.Errorf("gid %d, mode %o, %v", st.Gid, st.Mode, err)
	}
}

func TestListenTakesRelativePaths(t *testing.T) {
	t.Chdir(shortDir(t))
	if err := os.Mkdir("run", 0o755); err != nil {
		t.Fatal(err)
	}
	ln, err := Listen("run/tako-7.sock", "run/tako.sock", 0o600, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	if to, _ := os.Readlink("run/tako.sock"); to != "tako-7.sock" {
		t.Errorf("link to %q", to)
	}
}

func TestALivingServerIsRefusedByPID(t *testing.T) {
	dir := shortDir(t)
	if _, err := listen(t, dir, 7); err != nil {
		t.Fatal(err)
	}
	_, err := listen(t, dir, 8)
	want := "the server with pid " + strconv.Itoa(os.Getpid()) + " answers at " + filepath.Join(dir, "tako.sock") + " already: stop it first, or choose another path with --socket"
	if err == nil || err.Error() != want {
		t.Errorf("got %v\nwant %s", err, want)
	}
	if !exists(filepath.Join(dir, "tako-7.sock")) || exists(filepath.Join(dir, "tako-8.sock")) {
		t.Error("the refusal changed something")
	}
}

func TestLeftoversOfDeadServersAreCleared(t *testing.T) {
	dir := shortDir(t)
	file := func(name string) string { return filepath.Join(dir, name) }
	dead(t, file("tako-4190001.sock"), 0) // no such process
	dead(t, file("tako-"+strconv.Itoa(os.Getpid())+".sock"), time.Hour)
	dead(t, file("tako-1.sock"), 0) // lives, and may be about to listen
	dead(t, file("tako-x.sock"), time.Hour)
	if err := os.WriteFile(file("tako-2.sock"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	alive, err := net.Listen("unix", file("tako-4190002.sock"))
	if err != nil {
		t.Fatal(err)
	}
	defer alive.Close()
	if err := os.Symlink("tako-4190001.sock", file("tako.sock")); err != nil {
		t.Fatal(err)
	}
	if _, err := listen(t, dir, 7); err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]bool{
		"tako-4190001.sock": false, "tako-" + strconv.Itoa(os.Getpid()) + ".sock": false,
		"tako-1.sock": true, "tako-x.sock": true, "tako-2.sock": true, "tako-4190002.sock": true, "tako-7.sock": true,
	} {
		if exists(file(name)) != want {
			t.Errorf("%s: there %v, want %v", name, !want, want)
		}
	}
	if to, _ := os.Readlink(file("tako.sock")); to != "tako-7.sock" {
		t.Errorf("link to %q", to)
	}
}

func TestADanglingLinkAndADeadSocketAtTheLinkAreReplaced(t *testing.T) {
	for name, make := range map[string]func(string) error{
		"dangling": func(p string) error { return os.Symlink("gone.sock", p) },
		"socket":   func(p string) error { dead(t, p, 0); return nil },
	} {
		dir := shortDir(t)
		if err := make(filepath.Join(dir, "tako.sock")); err != nil {
			t.Fatal(err)
		}
		if _, err := listen(t, dir, 7); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestWhatIsNoSocketIsNeverRemoved(t *testing.T) {
	for _, name := range []string{"tako.sock", "tako-7.sock"} {
		dir := shortDir(t)
		p := filepath.Join(dir, name)
		if err := os.WriteFile(p, []byte("mine"), 0o600); err != nil {
			t.Fatal(err)
		}
		_, err := listen(t, dir, 7)
		if err == nil || err.Error() != p+" is in the way and is not a socket: move it, or choose another path with --socket" {
			t.Errorf("%s: %v", name, err)
		}
		if b, _ := os.ReadFile(p); string(b) != "mine" {
			t.Errorf("%s was touched", name)
		}
	}
	dir := shortDir(t)
	if err := os.Symlink("/etc/hostname", filepath.Join(dir, "tako.sock")); err != nil {
		t.Fatal(err)
	}
	if _, err := listen(t, dir, 7); err == nil || !strings.Contains(err.Error(), "which is not a socket") {
		t.Errorf("a link to a file: %v", err)
	}
}

func TestUnlistenLeavesASuccessorsLink(t *testing.T) {
	dir := shortDir(t)
	if _, err := listen(t, dir, 7); err != nil {
		t.Fatal(err)
	}
	old, link, next := filepath.Join(dir, "tako-7.sock"), filepath.Join(dir, "tako.sock"), filepath.Join(dir, "tako-8.sock")
	if err := Link(next, link); err != nil {
		t.Fatal(err)
	}
	if err := Unlisten(old, link); err != nil {
		t.Fatal(err)
	}
	if to, _ := os.Readlink(link); to != "tako-8.sock" || exists(old) {
		t.Errorf("link to %q, old socket there: %v", to, exists(old))
	}
}

func TestAPathThatIsTooLongIsSaid(t *testing.T) {
	dir := filepath.Join(shortDir(t), strings.Repeat("d", 100))
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if _, err := listen(t, dir, 7); err == nil || !strings.Contains(err.Error(), "the system takes 107") {
		t.Errorf("got %v", err)
	}
	if left, _ := os.ReadDir(dir); len(left) != 0 {
		t.Errorf("left over: %v", left)
	}
}

// In a directory like /tmp the system does not follow another user's links.
func TestAnotherUsersDeadServerInAStickyDirectory(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("only root can give files to somebody else")
	}
	dir := shortDir(t)
	if err := os.Chmod(dir, 0o777|os.ModeSticky); err != nil {
		t.Fatal(err)
	}
	if _, err := listen(t, dir, 7); err != nil {
		t.Fatal(err)
	}
	path, link := filepath.Join(dir, "tako-7.sock"), filepath.Join(dir, "tako.sock")
	for _, p := range []string{path, link} {
		if err := os.Lchown(p, 64001, 64001); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := listen(t, dir, 8); err == nil || !strings.Contains(err.Error(), "answers at") {
		t.Errorf("a living one: %v", err)
	}
	if _, err := Dial(t.Context(), link); err != nil && !strings.Contains(err.Error(), "name the socket that it points to") {
		t.Errorf("the client's hint: %v", err) // nil where fs.protected_symlinks is off
	}
}

func TestASecondServerLeavesTheLinkToTheFirstUntilThatHasGone(t *testing.T) {
	dir := shortDir(t)
	first, err := listen(t, dir, 7)
	if err != nil {
		t.Fatal(err)
	}
	link, own := filepath.Join(dir, "tako.sock"), filepath.Join(dir, "tako-8.sock")
	second, err := ListenBeside(own, link, 0o660, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer second.Close()
	if to, _ := os.Readlink(link); to != "tako-7.sock" {
		t.Errorf("link to %q", to)
	}
	if c, err := net.Dial("unix", own); err != nil {
		t.Error(err)
	} else {
		_ = c.Close()
	}
	if err := TakeLink(own, link); err == nil || !strings.Contains(err.Error(), "answers") {
		t.Errorf("the link of a living server was taken: %v", err)
	}
	_ = first.Close() // killed: all it had is still there
	then := time.Now().Add(-time.Minute)
	if err := os.Chtimes(filepath.Join(dir, "tako-7.sock"), then, then); err != nil {
		t.Fatal(err)
	}
	for range 2 { // again is nothing
		if err := TakeLink(own, link); err != nil {
			t.Error(err)
		}
	}
	if to, _ := os.Readlink(link); to != "tako-8.sock" {
		t.Errorf("link to %q", to)
	}
	if exists(filepath.Join(dir, "tako-7.sock")) {
		t.Error("the dead server's socket is still there")
	}
	// And where nobody has the link it is made at once.
	alone := shortDir(t)
	third, err := ListenBeside(filepath.Join(alone, "tako-9.sock"), filepath.Join(alone, "tako.sock"), 0o660, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer third.Close()
	if to, _ := os.Readlink(filepath.Join(alone, "tako.sock")); to != "tako-9.sock" {
		t.Errorf("link to %q", to)
	}
}
