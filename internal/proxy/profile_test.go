package proxy

import (
	"compress/gzip"
	"io"
	"net"
	"path/filepath"
	"strings"
	"testing"

	"github.com/hashicorp/go-hclog"
)

// profiled serves profiles on the socket at path, and returns how to ask there and how to
// end it, which comes by itself at the test's end.
func profiled(t *testing.T) (path string, ask func(request string) string, end func()) {
	t.Helper()
	path = filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	over, done := make(chan struct{}), make(chan struct{})
	go func() {
		serveProfiles(l, over, hclog.NewNullLogger())
		close(done)
	}()
	ended := false
	end = func() {
		if !ended {
			ended = true
			close(over)
			<-done
		}
	}
	t.Cleanup(end)
	return path, func(request string) string {
		c, err := net.Dial("unix", path)
		if err != nil {
			t.Error(err)
			return ""
		}
		defer c.Close()
		// A connection is reset if it is closed before all was read: nothing came then.
		_, _ = io.WriteString(c, request)
		text, _ := io.ReadAll(c)
		return string(text)
	}, end
}

func TestProfilesAreWhatPprofReads(t *testing.T) {
	_, ask, _ := profiled(t)
	for _, name := range []string{"heap", "allocs", "goroutine", "cpu?seconds=1"} {
		head, text, ok := strings.Cut(ask("GET /"+name+" HTTP/1.1\r\nHost: tako\r\n\r\n"), "\r\n\r\n")
		if !ok || !strings.HasPrefix(head, "HTTP/1.0 200 OK\r\n") {
			t.Errorf("%s: %q", name, head)
			continue
		}
		z, err := gzip.NewReader(strings.NewReader(text))
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if n, err := io.Copy(io.Discard, z); err != nil || n == 0 {
			t.Errorf("%s: %d bytes, %v", name, n, err)
		}
	}
}

func TestProfilesThatThereAreNotAreRefused(t *testing.T) {
	_, ask, _ := profiled(t)
	for request, want := range map[string]string{
		"GET /debug/pprof/ HTTP/1.1\r\n\r\n":        "there is no profile",
		"GET /cpu?seconds=0 HTTP/1.1\r\n\r\n":       "is not from 1 to 60",
		"GET /cpu?seconds=61 HTTP/1.1\r\n\r\n":      "is not from 1 to 60",
		"GET /cpu?seconds=x HTTP/1.1\r\n\r\n":       "is not from 1 to 60",
		"POST /heap HTTP/1.1\r\n\r\n":               "",
		"GET /heap\r\n\r\n":                         "",
		"\r\n\r\n":                                  "",
		strings.Repeat("x", maxProfiler) + "\r\n":   "",
		"GET " + strings.Repeat("/", 20) + "\n\r\n": "",
	} {
		got := ask(request)
		if want == "" && got != "" || want != "" && (!strings.HasPrefix(got, "HTTP/1.0 400 ") || !strings.Contains(got, want)) {
			t.Errorf("%.40q is answered %q, want %q", request, got, want)
		}
	}
}

func TestALongProfileEndsWithTheProcess(t *testing.T) {
	path, ask, end := profiled(t)
	c, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := io.WriteString(c, "GET /cpu?seconds=60 HTTP/1.1\r\n\r\n"); err != nil {
		t.Fatal(err)
	}
	ask("GET /heap HTTP/1.1\r\n\r\n") // was accepted after it
	end()
	if text, err := io.ReadAll(c); err != nil || !strings.HasPrefix(string(text), "HTTP/1.0 200 OK\r\n") {
		t.Errorf("it got %.60q, %v", text, err)
	}
}
