package integration

import (
	"fmt"
	"testing"
	"time"

	"tako/internal/takotest"
)

// TestAppChangesItsProtocolUnderLoad rolls from HTTP/1.1 to h2c and back: while
// both kinds of instances serve, each is asked in its own way.
func TestAppChangesItsProtocolUnderLoad(t *testing.T) {
	t.Parallel()
	s := start(t, takotest.Options{})
	two := map[string]any{"instances": 2}
	lay(t, s, "blog", "0", quick(nil))
	if _, err := ask(s, "blog", "0", two); err != nil {
		t.Fatal(err)
	}
	l := s.Load(t.Context(), "blog.localhost/", takotest.LoadOptions{Clients: 8, Pause: 20 * time.Millisecond})
	defer l.Stop()
	for i, step := range []struct {
		protocol, want string
		flags          []string
	}{
		{"h2c", "HTTP/2.0", []string{"-h2c"}},
		{"h2c", "HTTP/2.0", []string{"-h2c", "-listen", "tcp"}},
		{"http1", "HTTP/1.1", nil},
	} {
		version := fmt.Sprint(i + 1)
		lay(t, s, "blog", version, quick(map[string]any{"protocol": step.protocol}), step.flags...)
		if _, err := ask(s, "blog", version, two); err != nil {
			t.Fatalf("deploy %s: %v", version, err)
		}
		if a := about(t, s, "blog.localhost"); a.Version != version || a.Protocol != step.want {
			t.Errorf("after the deploy of %s version %s is asked by %s", version, a.Version, a.Protocol)
		}
	}
	if r := l.Stop(); r.Failures > 0 {
		t.Errorf("%v", r)
	} else {
		t.Log(r)
	}
}
