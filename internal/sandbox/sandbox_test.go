package sandbox

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// The test binary executed again does what this variable says.
const actVar = "SANDBOX_TEST_ACT"

// noSleep keeps the race detector from waiting a second at each exit.
const noSleep = "GORACE=atexit_sleep_ms=0"

func TestMain(m *testing.M) {
	switch act := os.Getenv(actVar); act {
	case "":
		os.Exit(m.Run())
	case "enter", "enter-nnp":
		if err := Enter("tako-test", act == "enter-nnp"); err != nil {
			fail(err)
		}
		look()
	case "exec":
		var e execArgs
		if err := json.Unmarshal([]byte(os.Args[1]), &e); err != nil {
			fail(err)
		}
		fail(Exec(e.ID, e.Dir, e.Argv, e.Env, 0o027, func() error {
			return disturb()
		}))
	case "look":
		look()
	case "verify":
		id, err := ParseArg(os.Args[1])
		if err == nil {
			err = Verify(id)
		}
		fail(err)
	}
}

type execArgs struct {
	ID        *Identity
	Dir       string
	Argv, Env []string
}

func fail(err error) {
	fmt.Fprintln(os.Stderr, err)
	os.Exit(1)
}

// seen is what a process finds when it looks at itself and tries things.
type seen struct {
	Args   []string
	Status map[string]string
	Dir    string
	Env    []string
	FDs    []string
	Umask  int
	Files  uint64
	Worked []string // forbidden things that worked
}

func look() {
	s := seen{Args: os.Args, Status: map[string]string{}, Env: os.Environ()}
	s.Umask = unix.Umask(0o022)
	b, _ := os.ReadFile("/proc/self/status")
	for line := range strings.Lines(string(b)) {
		k, v, _ := strings.Cut(line, ":")
		s.Status[k] = strings.Join(strings.Fields(v), " ")
	}
	s.Dir, _ = os.Getwd()
	for fd := range 10 {
		if l, err := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", fd)); err == nil && !strings.Contains(l, "anon_inode") && !strings.HasPrefix(l, "/proc") && !strings.HasPrefix(l, "/sys") {
			s.FDs = append(s.FDs, fmt.Sprint(fd))
		}
	}
	var lim syscall.Rlimit
	_ = unix.Prlimit(0, unix.RLIMIT_NOFILE, nil, (*unix.Rlimit)(&lim))
	s.Files = lim.Cur
	file := os.Getenv("SECRET")
	for _, t := range []struct { // the identity last: it changes what the others may
		what string
		try  func() error
	}{
		{"open", func() error { f, err := os.Open(file); f.Close(); return err }},
		{"chown", func() error { return os.Chown(file, 1, 1) }},
		{"chroot", func() error { return unix.Chroot("/") }},
		{"renice", func() error { return unix.Setpriority(unix.PRIO_PROCESS, 0, -1) }},
		{"nnp", func() error { _, err := prctl(unix.PR_SET_NO_NEW_PRIVS, 0, 0); return err }},
		{"net-bind", func() error { return setCaps([]uintptr{unix.CAP_NET_BIND_SERVICE}) }},
		{"groups", func() error { return setGroups([]uint32{0}) }},
		{"setgid", func() error { return setRes(unix.SYS_SETRESGID, 0) }},
		{"setuid", func() error { return setRes(unix.SYS_SETRESUID, 0) }},
	} {
		if t.try() == nil {
			s.Worked = append(s.Worked, t.what)
		}
	}
	_ = json.NewEncoder(os.Stdout).Encode(s)
	os.Exit(0)
}

// run executes the test binary from a place where anybody may, and returns what
// it saw, or its error.
func run(t testing.TB, act string, attr *syscall.SysProcAttr, args ...string) (seen, error) {
	t.Helper()
	dir, err := os.MkdirTemp("", "sandbox") //nolint:usetesting // t.TempDir is closed to other users
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	secret := filepath.Join(dir, "secret")
	if err := os.WriteFile(secret, []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), self(t, dir), args...)
	cmd.Env = []string{actVar + "=" + act, "SECRET=" + secret, noSleep}
	cmd.Dir = "/"
	cmd.SysProcAttr = attr
	for range 3 { // 3 is the channel's place, 4 and 5 are leaks
		f, err := os.Open(os.DevNull)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		cmd.ExtraFiles = append(cmd.ExtraFiles, f)
	}
	var out, errOut bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errOut
	if err := cmd.Run(); err != nil {
		return seen{}, fmt.Errorf("%w: %s", err, errOut.String())
	}
	var s seen
	if err := json.Unmarshal(out.Bytes(), &s); err != nil {
		t.Fatalf("%s said %q, %q: %v", act, out.String(), errOut.String(), err)
	}
	return s, nil
}

func self(t testing.TB, dir string) string {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(exe)
	if err != nil {
		t.Fatal(err)
	}
	to := filepath.Join(dir, "program")
	if err := os.WriteFile(to, b, 0o755); err != nil { // others have to execute it
		t.Fatal(err)
	}
	return to
}

func needRoot(t testing.TB) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("to become another user needs root")
	}
	if bnd, err := prctl(unix.PR_CAPBSET_READ, unix.CAP_SETPCAP, 0); err != nil || bnd == 0 {
		t.Skip("root here has no CAP_SETPCAP")
	}
}

func want(t testing.TB, s seen, status map[string]string) {
	t.Helper()
	for k, w := range status {
		if s.Status[k] != w {
			t.Errorf("%s is %q, want %q", k, s.Status[k], w)
		}
	}
}

const none = "0000000000000000"

func TestEnterGivesUpEverything(t *testing.T) {
	needRoot(t)
	id := Identity{UID: 70011, GID: 70012, Groups: []uint32{70014, 70013}}
	s, err := run(t, "enter", nil, id.Arg(), "-log-level", "info")
	if err != nil {
		t.Fatal(err)
	}
	want(t, s, map[string]string{
		"Uid": "70011 70011 70011 70011", "Gid": "70012 70012 70012 70012", "Groups": "70013 70014",
		"CapInh": none, "CapPrm": none, "CapEff": none, "CapBnd": none, "CapAmb": none, "NoNewPrivs": "1", "Name": "tako-test",
	})
	if len(s.Worked) > 0 {
		t.Errorf("still worked: %v", s.Worked)
	}
	if !reflect.DeepEqual(s.Args[1:], []string{"-log-level", "info"}) {
		t.Errorf("arguments %q, want those behind the identity", s.Args)
	}
	if !reflect.DeepEqual(s.FDs, []string{"0", "1", "2", "3"}) {
		t.Errorf("descriptors %v, want 0 to 3", s.FDs)
	}
}

func TestEnterKeepsWhatItIsTold(t *testing.T) {
	needRoot(t)
	id := Identity{UID: 70011, GID: 70012, Keep: []uintptr{unix.CAP_SETUID, unix.CAP_SETGID, unix.CAP_KILL}}
	s, err := run(t, "enter", nil, id.Arg())
	if err != nil {
		t.Fatal(err)
	}
	const kept = "00000000000000e0"
	want(t, s, map[string]string{
		"Groups": "", "CapInh": kept, "CapPrm": kept, "CapEff": kept, "CapBnd": kept, "CapAmb": kept, "NoNewPrivs": "1",
	})
	for _, bad := range []string{"chown", "open", "chroot", "renice", "net-bind", "nnp"} {
		if slices.Contains(s.Worked, bad) {
			t.Errorf("%s still worked", bad)
		}
	}
}

func TestEnterWithoutIdentity(t *testing.T) {
	needRoot(t)
	nobody := func() *syscall.SysProcAttr {
		return &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 70021, Gid: 70021}}
	}
	s, err := run(t, "enter-nnp", nobody(), "-x")
	if err != nil {
		t.Fatal(err)
	}
	want(t, s, map[string]string{"Uid": "70021 70021 70021 70021", "NoNewPrivs": "1", "CapEff": none, "Name": "tako-test"})
	if !reflect.DeepEqual(s.Args[1:], []string{"-x"}) {
		t.Errorf("arguments %q, want them unchanged", s.Args)
	}
	if s, err = run(t, "enter", nobody()); err != nil {
		t.Fatal(err)
	}
	want(t, s, map[string]string{"NoNewPrivs": "0"})
}

func TestEnterWithoutPowerToChangeFails(t *testing.T) {
	needRoot(t)
	attr := &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 70021, Gid: 70021}}
	_, err := run(t, "enter", attr, Identity{UID: 70011, GID: 70012}.Arg())
	if err == nil || !strings.Contains(err.Error(), "operation not permitted") {
		t.Errorf("got %v, want operation not permitted", err)
	}
}

func TestEnterWithoutSetpcapLeavesOnlyTheBoundingSet(t *testing.T) {
	needRoot(t)
	s, err := run(t, "enter", &syscall.SysProcAttr{
		Credential:  &syscall.Credential{Uid: 70021, Gid: 70021},
		AmbientCaps: []uintptr{unix.CAP_SETUID, unix.CAP_SETGID},
	}, Identity{UID: 70011, GID: 70012}.Arg())
	if err != nil {
		t.Fatal(err)
	}
	want(t, s, map[string]string{"Uid": "70011 70011 70011 70011", "CapPrm": none, "CapAmb": none, "CapInh": none, "NoNewPrivs": "1"})
	if len(s.Worked) > 0 {
		t.Errorf("still worked: %v", s.Worked)
	}
}

func TestVerifyFindsWhatIsLeft(t *testing.T) {
	needRoot(t)
	id := Identity{UID: 70011, GID: 70012}
	for name, attr := range map[string]*syscall.SysProcAttr{
		"root":        nil,
		"other group": {Credential: &syscall.Credential{Uid: 70011, Gid: 70013}},
		"more groups": {Credential: &syscall.Credential{Uid: 70011, Gid: 70012, Groups: []uint32{70014}}},
		"capability":  {Credential: &syscall.Credential{Uid: 70011, Gid: 70012}, AmbientCaps: []uintptr{unix.CAP_SETUID}},
		"privileges":  {Credential: &syscall.Credential{Uid: 70011, Gid: 70012}},
	} {
		_, err := run(t, "verify", attr, id.Arg())
		if err == nil || !strings.Contains(err.Error(), "give up powers: ") {
			t.Errorf("%s: got %v, want an error", name, err)
		}
	}
	// A forged marker only verifies.
	if _, err := run(t, "enter", nil, argIs+id.text()); err == nil || !strings.Contains(err.Error(), "give up powers: Uid") {
		t.Errorf("marker: got %v, want an error", err)
	}
}

func TestExec(t *testing.T) {
	needRoot(t)
	bin, err := os.MkdirTemp("", "sandbox") //nolint:usetesting // t.TempDir is closed to other users
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(bin) })
	if err := os.Chmod(bin, 0o755); err != nil {
		t.Fatal(err)
	}
	self(t, bin)
	closed := filepath.Join(bin, "closed")
	if err := os.Mkdir(closed, 0o700); err != nil {
		t.Fatal(err)
	}
	secret := filepath.Join(closed, "secret")
	if err := os.WriteFile(secret, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	id := &Identity{UID: 70031, GID: 70032, Groups: []uint32{70033}}
	env := []string{actVar + "=look", "PATH=/nowhere:" + closed + ":" + bin, "SECRET=" + secret, noSleep}
	start := func(e execArgs, attr *syscall.SysProcAttr) (seen, error) {
		arg, err := json.Marshal(e)
		if err != nil {
			t.Fatal(err)
		}
		return run(t, "exec", attr, string(arg))
	}

	s, err := start(execArgs{ID: id, Dir: bin, Argv: []string{"program", "a b"}, Env: env}, nil)
	if err != nil {
		t.Fatal(err)
	}
	want(t, s, map[string]string{
		"Uid": "70031 70031 70031 70031", "Gid": "70032 70032 70032 70032", "Groups": "70033",
		"CapInh": none, "CapPrm": none, "CapEff": none, "CapBnd": none, "CapAmb": none, "NoNewPrivs": "1",
		"SigBlk": none, "SigIgn": none,
	})
	if len(s.Worked) > 0 {
		t.Errorf("still worked: %v", s.Worked)
	}
	if !reflect.DeepEqual(s.Args, []string{"program", "a b"}) || s.Dir != bin || !reflect.DeepEqual(s.Env, env) || s.Umask != 0o027 {
		t.Errorf("got args %q in %s with %q and umask %o", s.Args, s.Dir, s.Env, s.Umask)
	}
	if !reflect.DeepEqual(s.FDs, []string{"0", "1", "2"}) {
		t.Errorf("descriptors %v, want 0 to 2", s.FDs)
	}

	// Without an identity the user stays, the capabilities go.
	s, err = start(execArgs{Dir: bin, Argv: []string{"./program"}, Env: env}, nil)
	if err != nil {
		t.Fatal(err)
	}
	want(t, s, map[string]string{"Uid": "0 0 0 0", "CapEff": none, "CapBnd": none, "NoNewPrivs": "1"})
	s, err = start(execArgs{Dir: bin, Argv: []string{"program"}, Env: env}, &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 70021, Gid: 70021}})
	if err != nil {
		t.Fatal(err)
	}
	want(t, s, map[string]string{"Uid": "70021 70021 70021 70021", "CapEff": none, "NoNewPrivs": "1"})

	for name, c := range map[string]struct {
		args execArgs
		want error
		text string
	}{
		"closed folder":  {execArgs{ID: id, Dir: closed, Argv: []string{"program"}, Env: env}, unix.EACCES, "enter folder " + closed},
		"closed program": {execArgs{ID: id, Dir: bin, Argv: []string{closed + "/x"}, Env: env}, unix.EACCES, "execute " + closed + "/x"},
		"unknown":        {execArgs{ID: id, Dir: bin, Argv: []string{"no-such"}, Env: []string{"PATH=" + bin}}, unix.ENOENT, "not found in PATH " + bin},
		"only closed":    {execArgs{ID: id, Dir: bin, Argv: []string{"secret"}, Env: []string{"PATH=" + closed}}, unix.EACCES, "execute secret"},
		"nothing":        {execArgs{ID: id, Dir: bin, Argv: nil}, errors.New(""), "no program given"},
		"root":           {execArgs{ID: &Identity{GID: 5}, Dir: bin, Argv: []string{"program"}, Env: env}, errors.New(""), "0 is not a user or group to become"},
	} {
		_, err := start(c.args, nil)
		if err == nil || !strings.Contains(err.Error(), c.text) || !strings.Contains(err.Error(), c.want.Error()) {
			t.Errorf("%s: got %v, want %s … %v", name, err, c.text, c.want)
		}
	}
}

func TestIdentityText(t *testing.T) {
	for _, id := range []Identity{
		{UID: 1, GID: 2},
		{UID: 70011, GID: 70012, Groups: []uint32{70013, 4}, Keep: []uintptr{unix.CAP_SETUID, 40}},
	} {
		got, err := ParseArg(id.Arg())
		if err != nil || !reflect.DeepEqual(got, id) {
			t.Errorf("%s came back as %+v, %v", id.Arg(), got, err)
		}
	}
	many := strings.TrimSuffix(strings.Repeat("5,", MaxGroups+1), ",")
	for _, bad := range []string{
		"", "--as=", "--as=1:2:", "--as=1:2:::", "--as=0:2::", "--as=1:0::", "--as=1:2:0:", "--as=4294967295:2::", "--as=1:4294967295::",
		"--as=4294967296:2::", "--as=-1:2::", "--as=1,2:2::", "--as=:2::", "--as=1:2:3,:", "--as=1:2::64", "--as=1:2:" + many + ":", "--is=1:2::",
	} {
		if id, err := ParseArg(bad); err == nil {
			t.Errorf("ParseArg(%q) = %+v, want an error", bad, id)
		}
	}
}

func FuzzParseArg(f *testing.F) {
	f.Add("--as=1:2:3,4:5")
	f.Fuzz(func(t *testing.T, s string) {
		id, err := ParseArg(s)
		if err != nil {
			return
		}
		if again, err := ParseArg(id.Arg()); err != nil || !reflect.DeepEqual(again, id) {
			t.Errorf("%q: %+v became %+v, %v", s, id, again, err)
		}
	})
}
