package master

import (
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"
	"golang.org/x/sys/unix"

	"tako/internal/ipc"
	"tako/internal/paths"
	"tako/internal/store"
	"tako/internal/tako"
	"tako/internal/wire"
)

// owner is a server that has one listener and lets itself be asked in a data root
// with a name that is longer than a socket's may be.
func owner(t *testing.T) (s, second *server) {
	t.Helper()
	data := filepath.Join(t.TempDir(), strings.Repeat("a-long-name-", 12))
	if err := os.Mkdir(data, 0o755); err != nil {
		t.Fatal(err)
	}
	fd, err := listenTCP(netip.MustParseAddrPort("127.0.0.1:0"))
	if err != nil {
		t.Fatal(err)
	}
	addr, err := boundTo(fd)
	if err != nil {
		t.Fatal(err)
	}
	layout := paths.Layout{Data: data, Run: data, Socket: "/run/x/tako.sock"}
	s = &server{
		layout: layout, log: hclog.NewNullLogger(), apps: make(map[tako.AppID]*app), stopping: make(chan struct{}),
		listeners: []listener{{name: wire.ListenerHTTP, fd: fd, addr: addr}},
	}
	t.Cleanup(s.closePorts)
	second = &server{layout: layout, log: hclog.NewNullLogger(), apps: make(map[tako.AppID]*app), looking: make(chan struct{}, 1), owned: make(chan struct{})}
	return s, second
}

// serving runs the owner's side until the test ends.
func serving(t *testing.T, s *server) {
	t.Helper()
	done := make(chan struct{})
	go func() {
		defer close(done)
		s.serveSecond(t.Context())
	}()
	t.Cleanup(func() { <-done })
	for end := time.Now().Add(10 * time.Second); ; time.Sleep(time.Millisecond) {
		if _, err := os.Stat(s.layout.SecondSocket()); err == nil {
			return
		}
		if time.Now().After(end) {
			t.Fatal("there is no socket to ask at")
		}
	}
}

func TestASecondServerIsHandedTheListenersAndAThirdIsNot(t *testing.T) {
	s, second := owner(t)
	serving(t, s)
	j, err := second.join()
	if err != nil {
		t.Fatal(err)
	}
	defer j.discard()
	if j.pid != os.Getpid() || len(j.ports) != 1 || j.ports[0].addr != s.listeners[0].addr || j.ports[0].name != wire.ListenerHTTP || j.shared.FirstInstance != 1001 {
		t.Errorf("joined %+v", j)
	}
	if keys := s.tickets.current(); len(j.keys) != len(keys) || !slices.Equal(j.keys[0], keys[0]) {
		t.Error("it has other keys of session tickets")
	}
	// The socket itself, and not one beside it: what waits in one waits in the other.
	client, err := net.Dial("tcp", s.listeners[0].addr.String())
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	if _, _, err := unix.Accept4(int(j.ports[0].fd), unix.SOCK_CLOEXEC); err != nil {
		t.Errorf("accept on the second's descriptor: %v", err)
	}
	if pid := s.second.connected(); pid != os.Getpid() {
		t.Errorf("connected: %d", pid)
	}
	third := &server{layout: second.layout, log: second.log}
	if _, err := third.join(); tako.AsError(err).Code != tako.CodeConflict || !strings.Contains(err.Error(), "serves beside it already") {
		t.Errorf("a third: %v", err)
	}
	_ = j.conn.Close()
	for end := time.Now().Add(10 * time.Second); s.second.connected() != 0; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("the end of the second is not seen")
		}
	}
	again, err := third.join()
	if err != nil {
		t.Fatalf("after the second has gone: %v", err)
	}
	again.discard()
}

// TestAnnounceWaitsUntilTheSecondHasSettled: as long as that lives.
func TestAnnounceWaitsUntilTheSecondHasSettled(t *testing.T) {
	s, second := owner(t)
	s.announce(t.Context(), silent) // there is none: nothing to wait for
	serving(t, s)
	j, err := second.join()
	if err != nil {
		t.Fatal(err)
	}
	defer j.discard()
	second.linkOwner(j)
	link := second.owner.Load()
	for revision := uint64(1); revision <= 2; revision++ {
		done := make(chan struct{})
		go func() {
			defer close(done)
			s.announce(t.Context(), silent)
		}()
		<-second.looking
		if asked := link.asked.Load(); asked != revision {
			t.Errorf("asked for %d, want %d", asked, revision)
		}
		select {
		case <-done:
			t.Fatal("it did not wait")
		case <-time.After(20 * time.Millisecond):
		}
		if revision == 1 {
			if err := j.conn.Send(0, &wire.Settled{Revision: revision}); err != nil {
				t.Fatal(err)
			}
		} else {
			_ = j.conn.Close() // it goes
		}
		<-done
	}
	<-link.ended
}

// TestOnlyRootAndOurselvesAreTrusted connects as somebody else, whom the mode of
// the socket would not even let that far.
func TestOnlyRootAndOurselvesAreTrusted(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: it connects as another user")
	}
	dir := t.TempDir()
	socket := filepath.Join(dir, "second.sock")
	ln, err := listenSecond(socket)
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	if fi, err := os.Stat(socket); err != nil || fi.Mode().Perm() != 0o600 {
		t.Errorf("the socket has mode %v, %v", fi.Mode(), err)
	}
	for _, path := range []string{filepath.Dir(dir), dir, socket} {
		if err := os.Chmod(path, 0o777); err != nil {
			t.Fatal(err)
		}
	}
	for _, uid := range []int{0, 61234} {
		dialed := make(chan error, 1)
		go func() {
			runtime.LockOSThread() // and never unlocked: the thread ends with its user
			if _, _, errno := unix.RawSyscall(unix.SYS_SETRESUID, ^uintptr(0), uintptr(uid), ^uintptr(0)); errno != 0 {
				dialed <- errno
				return
			}
			fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
			if err == nil {
				err = unix.Connect(fd, &unix.SockaddrUnix{Name: socket})
				defer unix.Close(fd)
			}
			dialed <- err
		}()
		if err := <-dialed; err != nil {
			t.Fatalf("uid %d: %v", uid, err)
		}
		c, err := ln.AcceptUnix()
		if err != nil {
			t.Fatal(err)
		}
		pid, err := trust(c)
		_ = c.Close()
		if (err == nil) != (uid == 0) || uid == 0 && pid != os.Getpid() {
			t.Errorf("uid %d: pid %d, %v", uid, pid, err)
		}
	}
}

func TestASecondServerNamesThePortsOfTheFirst(t *testing.T) {
	config := func(port, tls uint16, addrs ...string) settled {
		s := settled{Config: Config{Port: port, TLSPort: tls}}
		for _, a := range addrs {
			s.listen = append(s.listen, netip.MustParseAddr(a))
		}
		return s
	}
	on := func(addrs ...string) (all []listener) {
		for i, a := range addrs {
			all = append(all, listener{name: []string{wire.ListenerHTTP, wire.ListenerHTTPS}[i%2], addr: netip.MustParseAddrPort(a)})
		}
		return all
	}
	for name, c := range map[string]struct {
		s     settled
		ports []listener
		same  bool
	}{
		"the same":         {config(80, 443, "127.0.0.1"), on("127.0.0.1:80", "127.0.0.1:443"), true},
		"any":              {config(0, 0, "127.0.0.1"), on("127.0.0.1:8080", "127.0.0.1:8443"), true},
		"another port":     {config(81, 443, "127.0.0.1"), on("127.0.0.1:80", "127.0.0.1:443"), false},
		"exchanged":        {config(443, 80, "127.0.0.1"), on("127.0.0.1:80", "127.0.0.1:443"), false},
		"another address":  {config(80, 443, "127.0.0.2"), on("127.0.0.1:80", "127.0.0.1:443"), false},
		"one more address": {config(80, 443, "127.0.0.1", "127.0.0.2"), on("127.0.0.1:80", "127.0.0.1:443"), false},
		"one less":         {config(80, 443, "127.0.0.1"), on("127.0.0.1:80", "127.0.0.1:443", "127.0.0.2:80", "127.0.0.2:443"), false},
		"all":              {config(80, 443), on("0.0.0.0:80", "0.0.0.0:443", "[::]:80", "[::]:443"), true},
		"without IPv6":     {config(80, 443), on("0.0.0.0:80", "0.0.0.0:443"), true},
	} {
		if err := samePorts(c.s, c.ports); (err == nil) != c.same {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestWhatTheOwnerCommittedIsTold: one field after another.
func TestWhatTheOwnerCommittedIsTold(t *testing.T) {
	at := time.Now()
	base := store.App{ID: "a", Release: "1", Path: "/p", Instances: 1, IdleTimeout: time.Minute, Routes: []string{"x", "y"}, SecretsHash: "h", DeployedAt: at}
	same := base
	same.DeployedAt, same.BasePort, same.UID, same.PreviousRelease = time.UnixMilli(at.UnixMilli()).UTC(), 7, 8, "0"
	if !sameApp(base, same) || !sameApp(store.App{UID: 1}, store.App{}) {
		t.Error("what is the same is told apart")
	}
	for name, change := range map[string]func(*store.App){
		"id": func(a *store.App) { a.ID = "" }, "release": func(a *store.App) { a.Release = "2" }, "path": func(a *store.App) { a.Path = "/q" },
		"idle": func(a *store.App) { a.IdleTimeout++ }, "routes": func(a *store.App) { a.Routes = []string{"x"} },
		"deployed": func(a *store.App) { a.DeployedAt = at.Add(time.Second) },
	} {
		b := base
		change(&b)
		if sameBuild(base, b) || sameApp(base, b) {
			t.Errorf("%s: not seen", name)
		}
	}
	for name, change := range map[string]func(*store.App){
		"instances": func(a *store.App) { a.Instances = 2 }, "stopped": func(a *store.App) { a.Stopped = true }, "secrets": func(a *store.App) { a.SecretsHash = "" },
	} {
		b := base
		change(&b)
		if !sameBuild(base, b) || sameApp(base, b) {
			t.Errorf("%s: not seen, or taken for a deploy", name)
		}
	}
}

// TestLockOfALivingOwnerIsNotTaken: and is as soon as that has gone.
func TestLockOfALivingOwnerIsNotTaken(t *testing.T) {
	path := filepath.Join(t.TempDir(), "lock")
	first, err := lockRoot(path)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := lockRoot(path); tako.AsError(err).Code != tako.CodeConflict {
		t.Errorf("a second owner: %v", err)
	}
	f, err := os.OpenFile(path, os.O_RDWR|syscall.O_NOFOLLOW, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	s := &server{lock: f}
	if s.tryLock() {
		t.Fatal("it has the lock of a living owner")
	}
	_ = first.Close()
	for range 2 { // again is no harm
		if !s.tryLock() {
			t.Error("it has not the lock of an owner that has gone")
		}
	}
}

// TestPortsThatTheOwnerMovedAgainAreClosed: each time it is found with others, and
// when it is back at the first.
func TestPortsThatTheOwnerMovedAgainAreClosed(t *testing.T) {
	s, second := owner(t)
	second.reloadWanted = make(chan struct{}, 1)
	serving(t, s)
	count := func() int {
		t.Helper()
		list, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Fatal(err)
		}
		n := 0
		for _, e := range list { // sockets at the owner's port
			fd, err := strconv.Atoi(e.Name())
			if addr, e := boundTo(ipc.FD(fd)); err == nil && e == nil && addr == s.listeners[0].addr {
				n++
			}
		}
		return n
	}
	find := func() {
		t.Helper()
		second.relink()
		link := second.owner.Load()
		if link == nil {
			t.Fatal("the owner was not found")
		}
		_ = link.conn.Close() // it reloads
		<-link.ended
		for end := time.Now().Add(10 * time.Second); s.second.connected() != 0; time.Sleep(time.Millisecond) {
			if time.Now().After(end) {
				t.Fatal("the end of the second is not seen")
			}
		}
	}
	before := count()
	for range 3 { // it serves none of them yet
		find()
		if n := count(); n != before+1 || second.movedPorts.Load() == nil {
			t.Errorf("%d sockets, want %d", n, before+1)
		}
	}
	second.listeners = s.listeners
	find()
	if n := count(); n != before || second.movedPorts.Load() != nil {
		t.Errorf("back at the first ports: %d sockets, want %d", n, before)
	}
}
