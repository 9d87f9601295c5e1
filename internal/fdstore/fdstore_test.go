package fdstore

import (
	"bytes"
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"testing"

	"github.com/hashicorp/go-hclog"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"tako/internal/ipc"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// manager is a service manager's socket.
func manager(t *testing.T) int {
	t.Helper()
	path := filepath.Join(t.TempDir(), "notify")
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ipc.FD(fd).Close() })
	if err := unix.Bind(fd, &unix.SockaddrUnix{Name: path}); err != nil {
		t.Fatal(err)
	}
	t.Setenv("NOTIFY_SOCKET", path)
	return fd
}

// next receives a message and how many descriptors came with it.
func next(t *testing.T, fd int) (string, int) {
	t.Helper()
	buf, oob := make([]byte, 4096), make([]byte, unix.CmsgSpace(16))
	n, oobn, _, _, err := unix.Recvmsg(fd, buf, oob, 0)
	if err != nil {
		t.Fatal(err)
	}
	files := 0
	if oobn > 0 {
		msgs, err := unix.ParseSocketControlMessage(oob[:oobn])
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range msgs {
			fds, err := unix.ParseUnixRights(&m)
			if err != nil {
				t.Fatal(err)
			}
			for _, fd := range fds {
				ipc.FD(fd).Close()
				files++
			}
		}
	}
	return string(buf[:n]), files
}

func open(t *testing.T, names ...string) *Store {
	t.Helper()
	s, err := Open(names, hclog.NewNullLogger())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Close)
	return s
}

func TestWhatIsKeptAndDroppedArrivesInOrder(t *testing.T) {
	fd := manager(t)
	s := open(t)
	for i := range 20 {
		if err := s.Keep(fmt.Sprintf("tako-%d", i), 0); err != nil {
			t.Fatal(err)
		}
		if err := s.Keep(fmt.Sprintf("tako-%d", i), 0); err != nil { // once is enough
			t.Fatal(err)
		}
		s.Drop(fmt.Sprintf("tako-%d", i), "tako-unknown")
	}
	for i := range 20 {
		if text, n := next(t, fd); text != fmt.Sprintf("FDSTORE=1\nFDNAME=tako-%d", i) || n != 1 {
			t.Fatalf("%q with %d descriptors", text, n)
		}
		if text, n := next(t, fd); text != fmt.Sprintf("FDSTOREREMOVE=1\nFDNAME=tako-%d", i) || n != 0 {
			t.Fatalf("%q with %d descriptors", text, n)
		}
	}
	s.Flush()
	if names := s.Names(); len(names) != 0 {
		t.Errorf("kept: %q", names)
	}
}

func TestNumberOfDescriptorsIsBounded(t *testing.T) {
	fd := manager(t)
	t.Setenv("FDSTORE", fmt.Sprint(Reserved+1))
	s := open(t, "tako-before")
	if err := s.KeepSpare("tako-spare", 0); !errors.Is(err, ErrFull) {
		t.Errorf("one too many that may be missing: %v", err)
	}
	go func() {
		for {
			if _, err := unix.Read(fd, make([]byte, 100)); err != nil {
				return
			}
		}
	}()
	for i := range Reserved {
		if err := s.Keep(fmt.Sprintf("tako-%d", i), 0); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.Keep("tako-more", 0); !errors.Is(err, ErrFull) {
		t.Errorf("one too many: %v", err)
	}
	s.Drop("tako-before")
	if err := s.Keep("tako-more", 0); err != nil {
		t.Errorf("with room again: %v", err)
	}
	s.Flush()
	_ = unix.Shutdown(fd, unix.SHUT_RD) // ends the reader
	if t.Setenv("FDSTORE", "1000000"); open(t).most != MaxKept {
		t.Error("MaxKept does not bound what the unit says")
	}
}

func TestWithoutAServiceManagerNothingIsKept(t *testing.T) {
	t.Setenv("NOTIFY_SOCKET", "")
	s := open(t)
	if s != nil {
		t.Fatal("a store of nobody")
	}
	if err := s.Keep("tako-x", 0); err != nil {
		t.Error(err)
	}
	s.Drop("tako-x")
	s.Flush()
	if s.Names() != nil {
		t.Error("it has names")
	}
}

func TestServiceManagerThatIsGoneIsSaidOnce(t *testing.T) {
	t.Setenv("NOTIFY_SOCKET", filepath.Join(t.TempDir(), "nobody"))
	var said bytes.Buffer
	s, err := Open(nil, hclog.New(&hclog.LoggerOptions{Output: &said}))
	if err != nil {
		t.Fatal(err)
	}
	for i := range 3 {
		if err := s.Keep(fmt.Sprintf("tako-%d", i), 0); err != nil {
			t.Error(err)
		}
	}
	s.Close()
	if strings.Count(said.String(), "WARN") != 1 {
		t.Errorf("it said %q", said.String())
	}
}

func TestNamesThatTheServiceManagerRefusesAreNotGiven(t *testing.T) {
	for name, want := range map[string]bool{
		"tako-proxy-1-channel": true, Prefix + strings.Repeat("a", MaxName-len(Prefix)): true,
		"tako-http.socket": false, "proxy": false, "tako-a:b": false, "tako-a\nb": false, "tako-ü": false, "tako- ": false, "": false,
		Prefix + strings.Repeat("a", MaxName): false,
	} {
		if ValidName(name) != want {
			t.Errorf("%q: %v", name, !want)
		}
	}
	manager(t)
	if err := open(t).Keep("tako-a:b", 0); err == nil {
		t.Error("it was kept")
	}
}

func TestWhatIsPassedIsToldApartByName(t *testing.T) {
	var fds [5]int
	for i := range fds {
		fds[i] = 200 + i // in a row, and nobody else's
		if err := unix.Dup3(0, fds[i], 0); err != nil {
			t.Fatal(err)
		}
	}
	defer ipc.FD(fds[4]).Close()
	kept, units := Sort([]string{"http", "tako-a", "tako-b", "tako-a", "tako-https.socket"}, fds[0])
	if len(units) != 2 || units[ipc.FD(fds[0])] != "http" || units[ipc.FD(fds[4])] != "tako-https.socket" {
		t.Errorf("from units: %v", units)
	}
	if fd := kept.Take("tako-a"); fd != ipc.FD(fds[3]) {
		t.Errorf("the later of two is %d, want %d", fd, fds[3])
	} else {
		fd.Close()
	}
	if kept.Take("tako-a") != 0 || len(kept.Names()) != 1 {
		t.Errorf("left: %q", kept.Names())
	}
	for _, fd := range fds[1:3] {
		flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0)
		if fd == fds[1] {
			if err == nil {
				t.Error("the first of two of one name is open")
			}
		} else if err != nil || flags&unix.FD_CLOEXEC == 0 {
			t.Errorf("descriptor %d: flags %d, %v", fd, flags, err)
		}
	}
	kept.Close()
	ipc.FD(fds[0]).Close()
	if _, err := unix.FcntlInt(uintptr(fds[2]), unix.F_GETFD, 0); err == nil {
		t.Error("what nobody took is open")
	}
}
