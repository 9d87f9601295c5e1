package ctl

import (
	"bytes"
	"io"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// openTerminal returns both ends of a new terminal.
func openTerminal(t testing.TB) (person, program *os.File) {
	t.Helper()
	person, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Skipf("no terminals here: %v", err)
	}
	t.Cleanup(func() { person.Close() })
	n, err := unix.IoctlGetInt(int(person.Fd()), unix.TIOCGPTN)
	if err == nil {
		err = unix.IoctlSetPointerInt(int(person.Fd()), unix.TIOCSPTLCK, 0)
	}
	if err == nil {
		program, err = os.OpenFile("/dev/pts/"+strconv.Itoa(n), os.O_RDWR|unix.O_NOCTTY, 0)
	}
	if err != nil {
		t.Skipf("no terminals here: %v", err)
	}
	t.Cleanup(func() { program.Close() })
	return person, program
}

func TestSecretIsAskedForWithoutShowingIt(t *testing.T) {
	person, program := openTerminal(t)
	b := &backend{}
	socket := server(t, b)
	before, err := unix.IoctlGetTermios(int(program.Fd()), unix.TCGETS)
	if err != nil {
		t.Fatal(err)
	}
	typed := make(chan struct{})
	asked := onWrite(func() { // the echo is off once it asks
		person.WriteString("hunter2\n")
		close(typed)
	})
	var out bytes.Buffer
	code := Main(t.Context(), []string{"--socket", socket, "secrets", "set", "blog", "KEY"},
		Env{program, &out, asked, func(string) string { return "" }, time.Now})
	<-typed
	if code != ExitDone || len(b.calls) != 1 || b.calls[0] != "secrets blog map[KEY:hunter2] true" {
		t.Errorf("code %d, called %q", code, b.calls)
	}
	after, err := unix.IoctlGetTermios(int(program.Fd()), unix.TCGETS)
	if err != nil || *after != *before {
		t.Errorf("the terminal was left as %+v, %v", after, err)
	}
	program.WriteString("end\n")
	buf := make([]byte, 100)
	if n, _ := person.Read(buf); strings.Contains(string(buf[:n]), "hunter2") {
		t.Errorf("the terminal showed %q", buf[:n])
	}
}

func TestDeleteAsksOnATerminal(t *testing.T) {
	for answer, calls := range map[string]int{"y\n": 1, "n\n": 0, "\n": 0} {
		person, program := openTerminal(t)
		b := &backend{}
		person.WriteString(answer)
		code := Main(t.Context(), []string{"--socket", server(t, b), "delete", "blog"},
			Env{program, &bytes.Buffer{}, &bytes.Buffer{}, func(string) string { return "" }, time.Now})
		if len(b.calls) != calls || (code == ExitDone) != (calls == 1) {
			t.Errorf("%q: code %d, called %q", answer, code, b.calls)
		}
	}
}

func TestTablesAreColouredOnATerminalOnly(t *testing.T) {
	socket := server(t, &backend{})
	for noColor, want := range map[string]bool{"": true, "1": false} {
		person, program := openTerminal(t)
		Main(t.Context(), []string{"--socket", socket, "list"}, Env{
			strings.NewReader(""), program, &bytes.Buffer{},
			func(k string) string { return map[string]string{"NO_COLOR": noColor}[k] }, time.Now,
		})
		program.Close()
		shown, _ := io.ReadAll(person) // the end of a terminal is an error
		if got := strings.Contains(string(shown), "\x1b[32mrunning\x1b[0m"); got != want {
			t.Errorf("NO_COLOR=%q: %q", noColor, shown)
		}
	}
}

// A writeFunc calls its function at the first write.
type writeFunc struct {
	f func()
}

func onWrite(f func()) *writeFunc { return &writeFunc{f} }

func (w *writeFunc) Write(p []byte) (int, error) {
	if w.f != nil {
		w.f()
		w.f = nil
	}
	return len(p), nil
}
