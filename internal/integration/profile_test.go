package integration

import (
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"tako/internal/takotest"
)

// profileOf asks a server's profiling socket for one profile.
func profileOf(s *takotest.Server, name string) (string, error) {
	c, err := net.Dial("unix", filepath.Join(filepath.Dir(s.Socket), "pprof.sock"))
	if err != nil {
		return "", err
	}
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(takotest.AskWait)); err != nil {
		return "", err
	}
	if _, err := io.WriteString(c, "GET /"+name+" HTTP/1.1\r\nHost: tako\r\n\r\n"); err != nil {
		return "", err
	}
	text, err := io.ReadAll(c)
	return string(text), err
}

func TestProfilesAreForTheServersUserAndOnlyIfAskedFor(t *testing.T) {
	t.Parallel()
	s := start(t, takotest.Options{Flags: []string{"--pprof"}})
	path := filepath.Join(filepath.Dir(s.Socket), "pprof.sock")
	given := func() bool {
		text, err := profileOf(s, "heap")
		return err == nil && strings.HasPrefix(text, "HTTP/1.0 200 OK\r\n")
	}
	if !given() {
		t.Fatal("no heap profile")
	}
	if fi, err := os.Stat(path); err != nil || fi.Mode() != os.ModeSocket|0o600 {
		t.Errorf("the socket: %v, %v; want mode 0600", fi.Mode(), err)
	}
	for _, p := range s.Processes() {
		if strings.HasPrefix(p.Command, "tako-proxy ") {
			if err := s.KillProcess(p.PID); err != nil {
				t.Fatal(err)
			}
		}
	}
	until(t, takotest.StartWait, "the next proxy gives profiles", given)
	if r := reload(t, s); r.LastError != "" {
		t.Fatalf("reload: %s", r.LastError)
	}
	until(t, takotest.StartWait, "the one after a reload does", given)
	if err := s.Stop(); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Lstat(path); err == nil {
		t.Error("the socket is left behind by a server that stopped")
	}
	s.SetFlags()
	if err := s.Start(); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Lstat(path); err == nil {
		t.Error("there is a socket that nobody asked for")
	}
}
