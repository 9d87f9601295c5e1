package supervise

import (
	"os"
	"strings"
	"testing"
	"time"
)

func TestPolicyStories(t *testing.T) {
	b, err := os.ReadFile("testdata/policy.txt")
	if err != nil {
		t.Fatal(err)
	}
	endings := map[string]Ending{"never": NeverReady, "crashed": Crashed, "stopped": Stopped}
	middle := func() float64 { return 0.5 }
	p, line := Policy{Rand: middle}, 0
	for l := range strings.Lines(string(b)) {
		line++
		f := strings.Fields(l)
		switch {
		case len(f) == 0:
			p = Policy{Rand: middle}
			continue
		case f[0] == "#":
			continue
		case len(f) != 4 || f[2] != "->":
			t.Fatalf("line %d: %q", line, l)
		}
		how, ok := endings[f[0]]
		served, err1 := time.ParseDuration(f[1])
		want, err2 := time.ParseDuration(f[3])
		if !ok || err1 != nil || err2 != nil {
			t.Fatalf("line %d: %q", line, l)
		}
		if got := p.Next(how, served).Round(time.Microsecond); got != want {
			t.Errorf("line %d: %s after %s of service: %s, want %s", line, how, served, got, want)
		}
	}
}

func TestJitterStaysWithinItsBounds(t *testing.T) {
	for _, c := range []struct {
		random float64
		want   time.Duration
	}{{0, 800 * time.Millisecond}, {0.5, time.Second}, {1, 1200 * time.Millisecond}} {
		p := Policy{Rand: func() float64 { return c.random }}
		if got := p.Next(NeverReady, 0).Round(time.Microsecond); got != c.want {
			t.Errorf("random %v: %s, want %s", c.random, got, c.want)
		}
	}
	for range 1000 {
		if got := new(Policy).Next(NeverReady, 0); got < 800*time.Millisecond || got > 1200*time.Millisecond {
			t.Fatalf("delay %s outside 1 s ± 20 %%", got)
		}
	}
	p := Policy{}
	for range 10_000 { // no overflow
		if d := p.Next(Crashed, 0); d < 0 || d > 12*time.Second {
			t.Fatalf("delay %s", d)
		}
	}
}
