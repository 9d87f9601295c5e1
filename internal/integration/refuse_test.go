package integration

import (
	"encoding/binary"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"tako/internal/takotest"
)

// launch makes a server for a test and does not start it.
func launch(t *testing.T, flags ...string) *takotest.Server {
	t.Helper()
	return prepare(t, takotest.Options{Flags: flags})
}

// refused wants the server to leave by itself with an error that has each text.
func refused(t *testing.T, s *takotest.Server, code int, texts ...string) {
	t.Helper()
	if err := s.Launch(); err != nil {
		t.Fatal(err)
	}
	got, err := s.Exit()
	if err != nil {
		t.Fatal(err)
	}
	if got != code {
		t.Errorf("exit status %d, want %d", got, code)
	}
	for _, text := range texts {
		if !strings.Contains(s.Log(), text) {
			t.Errorf("%q is not in what it said:\n%s", text, s.Log())
		}
	}
	if left := s.Processes(); len(left) > 0 {
		t.Errorf("it left %v", left)
	}
}

// The exit statuses of tako's programs.
const (
	exitFailed = 1
	exitUsage  = 2
)

func TestPortInUseIsRefusedByNumber(t *testing.T) {
	t.Parallel()
	s := launch(t)
	l, err := net.Listen("tcp", net.JoinHostPort("127.0.0.1", strconv.Itoa(s.HTTPS)))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	refused(t, s, exitFailed, fmt.Sprintf("port %d is in use by ", s.HTTPS), fmt.Sprintf("(pid %d)", os.Getpid()), "stop it, or choose another port with --tls-port")
}

func TestPortsOfALivingServerAreRefusedByItsPIDAndItServesOn(t *testing.T) {
	t.Parallel()
	first := start(t, takotest.Options{})
	second := launch(t, "--port", strconv.Itoa(first.HTTP))
	holder := 0
	for _, p := range first.Processes() { // the first of those that hold it is named
		if strings.Contains(p.Command, "tako-master") {
			holder = p.PID
		}
	}
	refused(t, second, exitFailed, fmt.Sprintf("port %d is in use by tako-", first.HTTP), "--port")
	if holder == 0 {
		t.Error("the first server has gone")
	}
}

func TestSocketPathThatIsTooLongIsRefused(t *testing.T) {
	t.Parallel()
	s := launch(t)
	s.SetFlags("--socket", filepath.Join(s.Dir, strings.Repeat("long/", 20), "tako.sock"))
	refused(t, s, exitUsage, "107", "--socket")
}

func TestFaultsOfFlagsAreReportedTogether(t *testing.T) {
	t.Parallel()
	refused(t, launch(t, "--instance-ports", "9-1", "--log-level", "loud", "--trusted-proxies", "somebody"), exitUsage,
		"--instance-ports", "--log-level", "--trusted-proxies")
}

func TestDataRootThatCannotBeMadeIsRefused(t *testing.T) {
	t.Parallel()
	s := launch(t)
	file := filepath.Join(s.Dir, "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	s.SetFlags("--data-dir", filepath.Join(file, "data"))
	refused(t, s, exitFailed, file)
}

func TestSecondServerOnADataRootIsRefusedAndHarmsNothing(t *testing.T) {
	t.Parallel()
	first := start(t, takotest.Options{})
	second := launch(t, "--data-dir", first.Data)
	refused(t, second, exitFailed, first.Data, strconv.Itoa(first.PID()))
	if _, err := first.Ask("list", nil); err != nil {
		t.Errorf("the first server does not answer any more: %v", err)
	}
}

func TestSecondServerOnASocketIsRefusedAndHarmsNothing(t *testing.T) {
	t.Parallel()
	first := start(t, takotest.Options{})
	second := launch(t, "--socket", first.Socket)
	refused(t, second, exitFailed, first.Socket)
	if _, err := first.Ask("list", nil); err != nil {
		t.Errorf("the first server does not answer any more: %v", err)
	}
}

func TestLeftoversOfADeadServerAreCleaned(t *testing.T) {
	t.Parallel()
	s := launch(t)
	for range 2 { // the second start finds what the kill left
		if err := s.Start(); err != nil {
			t.Fatal(err)
		}
		if err := s.Kill(); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.Start(); err != nil {
		t.Fatal(err)
	}
	socks, err := filepath.Glob(filepath.Join(filepath.Dir(s.Socket), "tako-*.sock"))
	if err != nil {
		t.Fatal(err)
	}
	if len(socks) != 1 {
		t.Errorf("sockets of dead servers are left: %v", socks)
	}
}

func TestDatabaseFromTheFutureIsRefusedAndKept(t *testing.T) {
	t.Parallel()
	s := launch(t)
	if err := s.Start(); err != nil {
		t.Fatal(err)
	}
	if err := s.Stop(); err != nil {
		t.Fatal(err)
	}
	setSchema(t, filepath.Join(s.Data, "runtime-state.sqlite3"), 9999)
	refused(t, s, exitFailed, "9999")
	if _, err := os.Stat(filepath.Join(s.Data, "runtime-state.sqlite3")); err != nil {
		t.Errorf("the database was not kept: %v", err)
	}
}

// setSchema writes the schema's number into a database that nobody has open: it
// stands in the file's header, at byte 60, big endian.
func setSchema(t *testing.T, file string, number uint32) {
	t.Helper()
	f, err := os.OpenFile(file, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteAt(binary.BigEndian.AppendUint32(nil, number), 60); err != nil {
		t.Fatal(err)
	}
}
