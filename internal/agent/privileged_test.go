package agent

import (
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"tako/internal/ipc"
	"tako/internal/tako"
	"tako/internal/wire"
)

// The users of the tests: nobody's on any machine that follows the design.
const (
	ownerUID = 69_001
	netGID   = 69_002
	agentUID = 69_003
	appUID   = 70_001
	otherUID = 70_002
)

var privileged = wire.AgentSettings{
	InstanceGroup: netGID, MinAppUID: 70_000, MaxAppUID: 79_999, PortMin: 1, PortMax: 65535, Owner: ownerUID, OwnerGroup: ownerUID,
}

// needRoot skips a test that has to change users.
func needRoot(tb testing.TB) {
	if os.Geteuid() != 0 {
		tb.Skip("this test starts programs as other users: run it as root")
	}
}

// tree is the Tree of an app in a data root of the owner's.
func (r *rig) tree(uid uint32) *wire.Tree {
	r.tb.Helper()
	name := fmt.Sprintf("app-%d", uid)
	m := &wire.Tree{App: tako.AppID(name), AppDir: filepath.Join(r.dir, "apps", name), RunDir: filepath.Join(r.dir, "instances", name), User: wire.User{UID: uid, GID: uid}}
	for _, dir := range []string{filepath.Dir(m.AppDir), m.AppDir, filepath.Dir(m.RunDir)} {
		if err := os.Mkdir(dir, 0o711); err == nil {
			must(r.tb, os.Chmod(dir, 0o711))
			must(r.tb, os.Chown(dir, ownerUID, ownerUID))
		}
	}
	return m
}

func (r *rig) release(m *wire.Tree, name string) string {
	r.tb.Helper()
	dir := filepath.Join(m.AppDir, "releases", name)
	must(r.tb, os.Mkdir(dir, 0o755))
	must(r.tb, os.Chown(dir, ownerUID, ownerUID))
	return dir
}

func TestTreeOfAUserPerAppHasOwnersAndModesOfTheTable(t *testing.T) {
	needRoot(t)
	r := newCapableRig(t)
	m := r.tree(appUID)
	_, err := r.do(m)
	must(t, err)
	dir := r.release(m, "v1")
	check := func(releaseMode uint32) {
		t.Helper()
		checkMode(t, m.AppDir, 0o710, ownerUID, appUID)
		checkMode(t, m.AppDir+"/releases", 0o710, ownerUID, appUID)
		checkMode(t, m.AppDir+"/data", 0o700, appUID, appUID)
		checkMode(t, m.AppDir+"/tmp", 0o700, appUID, appUID)
		checkMode(t, m.AppDir+"/shared/logs", 0o2770, ownerUID, -1)
		checkMode(t, m.RunDir, 0o2770, appUID, netGID)
		checkMode(t, filepath.Dir(m.RunDir), 0o711, ownerUID, ownerUID)
		checkMode(t, dir, releaseMode, ownerUID, appUID)
	}
	m.Release, m.Installing = "v1", true
	_, err = r.do(m)
	must(t, err)
	check(0o770)
	m.Installing = false
	_, err = r.do(m)
	must(t, err)
	check(0o750)

	// A second server's, beside: only the folder of its sockets is made.
	beside := *m
	second := r.dir + "/instances-2"
	must(t, os.Mkdir(second, 0o711))
	must(t, os.Chown(second, ownerUID, ownerUID))
	must(t, os.Chmod(m.AppDir+"/data", 0o750))
	beside.RunDir, beside.Release, beside.Beside = filepath.Join(second, string(m.App)), "", true
	_, err = r.do(&beside)
	must(t, err)
	checkMode(t, m.AppDir+"/data", 0o750, appUID, appUID)
	checkMode(t, beside.RunDir, 0o2770, appUID, netGID)
	checkMode(t, second, 0o711, ownerUID, ownerUID)
}

func TestTreeThatIsSomebodyElsesNamesTheCommandToRun(t *testing.T) {
	needRoot(t)
	r := newRig(t, privileged)
	m := r.tree(appUID)
	must(t, os.Chown(m.AppDir, 12345, 12345))
	_, err := r.do(m)
	if e := tako.AsError(err); e == nil || e.Code != tako.CodeFailed || !strings.Contains(e.Message, fmt.Sprintf("run chown %d %s", ownerUID, m.AppDir)) {
		t.Errorf("got %v", err)
	}
}

// newCapableRig is a rig whose agent is a process of tako-agent's user, with the
// three capabilities of the design and no others.
func newCapableRig(tb testing.TB) *rig { return newCapableRigWith(tb, privileged) }

func newCapableRigWith(tb testing.TB, settings wire.AgentSettings) *rig {
	tb.Helper()
	r, theirs := prepare(tb)
	channel := theirs.File("channel")
	p, err := os.StartProcess(r.prog, []string{"tako-agent", "test-agent"}, &os.ProcAttr{
		Dir: "/", Env: []string{}, Files: []*os.File{nil, os.Stderr, os.Stderr, channel},
		Sys: &syscall.SysProcAttr{
			Credential:  &syscall.Credential{Uid: agentUID, Gid: agentUID, Groups: []uint32{netGID}},
			AmbientCaps: []uintptr{unix.CAP_SETUID, unix.CAP_SETGID, unix.CAP_KILL},
		},
	})
	must(tb, err)
	must(tb, channel.Close())
	go func() {
		_, err := p.Wait()
		r.ended <- err
	}()
	if settings.Groups.V2 != "" { // as tako-master does
		must(tb, os.WriteFile(settings.Groups.V2+"/main/cgroup.procs", fmt.Append(nil, p.Pid), 0))
	}
	r.greet(settings)
	return r
}

func TestInstanceRunsAsItsOwnUserAndReachesOnlyItsOwn(t *testing.T) {
	needRoot(t)
	t.Run("agent is root", func(t *testing.T) { reachesOnlyItsOwn(t, newRig(t, privileged)) })
	t.Run("agent has three capabilities", func(t *testing.T) { reachesOnlyItsOwn(t, newCapableRig(t)) })
}

func reachesOnlyItsOwn(t *testing.T, r *rig) {
	m, other := r.tree(appUID), r.tree(otherUID)
	for _, tree := range []*wire.Tree{m, other} {
		_, err := r.do(tree)
		must(t, err)
	}
	v1 := r.release(m, "v1")
	m.Release = "v1"
	_, err := r.do(m)
	must(t, err)
	s := r.app(1, "env")
	s.Command.Dir, s.Command.User = v1, m.User
	s.LogDir = m.AppDir + "/shared/logs"
	r.start(s)
	e := want[*wire.Exited](r)
	for _, l := range []string{"cwd " + v1, fmt.Sprintf("ids %d %d []", appUID, appUID)} {
		if !slices.Contains(e.LastLines, l) {
			t.Errorf("no line %q in %q", l, e.LastLines)
		}
	}
	if b, err := os.ReadFile(s.LogDir + "/current.log"); err != nil || !strings.Contains(string(b), "cwd "+v1) {
		t.Errorf("log: %s, %v", b, err)
	}
	paths := []string{
		m.AppDir + "/data/x", m.AppDir + "/tmp/x", m.RunDir + "/x",
		v1 + "/x", m.AppDir + "/x", s.LogDir + "/x", other.AppDir + "/data/x", other.RunDir + "/x", filepath.Dir(m.RunDir) + "/x",
	}
	s = r.app(2, "write", paths...)
	s.Command.Dir, s.Command.User = v1, m.User
	r.start(s)
	e = want[*wire.Exited](r)
	for i, path := range paths {
		line := "write " + path + " <nil>"
		if got, want := slices.Contains(e.LastLines, line), i < 3; got != want {
			t.Errorf("%s could be written: %v, want %v\n%q", path, got, want, e.LastLines)
		}
	}
	checkMode(t, m.RunDir+"/x", 0o660, appUID, netGID)
	for n, kind := range []string{"unix", "tcp"} {
		s = r.app(uint32(3+n), kind)
		if kind == "unix" {
			s.Socket = m.RunDir + "/3.sock"
			s.Command.Env[3] = "TAKO_APP_SOCKET=" + s.Socket
		}
		s.Command.Dir, s.Command.User, s.LogDir = v1, m.User, m.AppDir+"/shared/logs"
		r.start(s)
		if p := want[*wire.Probed](r); !p.Good || string(p.Via) != kind {
			t.Errorf("%s: %+v", kind, p)
		}
		must(t, r.conn.Send(0, &wire.Stop{Instance: s.Instance, GraceMS: 5000}))
		if e := want[*wire.Exited](r); e.Exit != (wire.Exit{}) {
			t.Errorf("%s: %+v", kind, e)
		}
	}
}

func TestInstanceOfAnotherUserIsRefused(t *testing.T) {
	needRoot(t)
	r := newRig(t, privileged)
	for i, u := range []wire.User{{}, {UID: 1, GID: appUID}, {UID: appUID, GID: 1}, {UID: 80_000, GID: 80_000}} {
		m := r.app(uint32(i+1), "env")
		m.Command.User = u
		must(t, r.conn.Send(0, m))
		if f := want[*wire.StartFailed](r); !strings.Contains(f.Reason, "tako") {
			t.Errorf("%v: %q", u, f.Reason)
		}
	}
}

func TestStrangersListenerIsNotTheApps(t *testing.T) {
	needRoot(t)
	r := newRig(t, privileged)
	m := r.app(1, "silent")
	m.Command.User = wire.User{UID: appUID, GID: appUID}
	m.ReadyMS = 300
	l, err := net.Listen("tcp4", fmt.Sprintf("127.0.0.1:%d", m.Port)) // root's
	must(t, err)
	defer l.Close()
	r.start(m)
	if p := want[*wire.Probed](r); p.Good || !strings.Contains(p.Detail, "another user (uid 0)") {
		t.Errorf("%+v", p)
	}
	n := r.app(2, "tcp")
	n.Command.User = m.Command.User
	r.start(n)
	for p := want[*wire.Probed](r); p.Instance != n.Instance || !p.Good; p = want[*wire.Probed](r) {
	}
}

func TestUnpackMakesAReleaseOfTheAppsGroup(t *testing.T) {
	for _, s := range []wire.AgentSettings{unprivileged, privileged} {
		t.Run(fmt.Sprint("owner ", s.Owner), func(t *testing.T) {
			m := &wire.Tree{}
			uid, gid := os.Getuid(), -1
			if s.Owner != 0 {
				needRoot(t)
			}
			var r *rig
			if s.Owner == 0 {
				r = newRig(t, s)
			} else {
				r = newCapableRig(t)
				m, uid, gid = r.tree(appUID), ownerUID, appUID
			}
			if s.Owner == 0 {
				m.AppDir, m.RunDir, m.App = r.dir, filepath.Join(r.dir, "run"), "blog"
			}
			_, err := r.do(m)
			must(t, err)
			releases := filepath.Join(m.AppDir, "releases")
			u := &wire.Unpack{App: m.App, Dir: releases, Name: "v1", User: m.User, MaxBytes: 1000, MaxFiles: 10, TimeoutMS: 20_000}
			send := func() (wire.Message, error) {
				f := packed(t, map[string]string{"app.json": "{}", "index.js": strings.Repeat("x", 500)})
				return r.do(u, ipc.FD(f.Fd()))
			}
			got, err := send()
			must(t, err)
			if b := got.Body.(*wire.Unpacked); b.Files != 2 || b.Bytes != 502 {
				t.Errorf("%+v", b)
			}
			checkMode(t, releases+"/v1", 0o750, uid, gid)
			checkMode(t, releases+"/v1/app.json", 0o644, uid, gid)

			if _, err := send(); tako.AsError(err) == nil || tako.AsError(err).Code != tako.CodeConflict {
				t.Errorf("the same name again: %v", err)
			}
			u.Name, u.MaxBytes = "v2", 501
			if _, err := send(); tako.AsError(err) == nil || tako.AsError(err).Code != tako.CodeInvalid {
				t.Errorf("too much: %v", err)
			}
			u.Name, u.TimeoutMS = "v3", 200
			var pipe [2]int // that never ends
			must(t, unix.Pipe2(pipe[:], unix.O_CLOEXEC))
			_, err = r.do(u, ipc.FD(pipe[0]))
			ipc.FD(pipe[0]).Close()
			ipc.FD(pipe[1]).Close()
			if e := tako.AsError(err); e == nil || e.Code != tako.CodeFailed || !strings.Contains(e.Message, "within 200ms") {
				t.Errorf("too late: %v", err)
			}
			names, err := os.ReadDir(releases)
			must(t, err)
			if len(names) != 1 {
				t.Errorf("left behind: %v", names)
			}
		})
	}
}

func TestDialChecksWhoseListenerItIs(t *testing.T) {
	needRoot(t)
	r := newRig(t, privileged)
	ours, theirs, err := ipc.Pair()
	must(t, err)
	must(t, r.conn.Send(0, &wire.DialerSocket{}, theirs))
	theirs.Close()
	proxy := wire.NewConn(ours, wire.LinkDialing, wire.Proxy)
	defer proxy.Close()
	m := r.app(1, "tcp")
	m.Command.User = wire.User{UID: appUID, GID: appUID}
	r.start(m)
	want[*wire.Probed](r)
	must(t, proxy.Send(1, &wire.Dial{Instance: m.Instance}))
	answer, err := proxy.Receive()
	must(t, err)
	answer.Discard()
	if _, ok := answer.Body.(*wire.Dialed); !ok {
		t.Fatalf("%+v", answer.Body)
	}
}
