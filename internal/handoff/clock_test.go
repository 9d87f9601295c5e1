package handoff

import (
	"encoding/json"
	"testing"
	"time"
)

type timed struct {
	At    time.Time
	Never time.Time
	Ptr   *time.Time
	None  *time.Time
	List  []struct{ At time.Time }
	ByKey map[string]struct{ At time.Time }
	Bytes []byte
	Any   any
	inner time.Time
}

func TestTimesOfAStateKeepTheirDistance(t *testing.T) {
	now := time.Now()
	wall := now.Round(0)
	for name, jump := range map[string]time.Duration{"not set": 0, "set forward": time.Hour, "set back": -48 * time.Hour} {
		then := wall.Add(-jump - time.Minute) // a minute ago, by a clock that was set since
		ptr := then
		s := &timed{At: then, Ptr: &ptr, List: make([]struct{ At time.Time }, 1), ByKey: map[string]struct{ At time.Time }{"k": {then}}, Bytes: []byte("x"), Any: "x", inner: then}
		s.List[0].At = then
		anchor(s, now, jump)
		for what, got := range map[string]time.Time{"field": s.At, "pointer": *s.Ptr, "list": s.List[0].At, "map": s.ByKey["k"].At} {
			if d := now.Sub(got); d != time.Minute {
				t.Errorf("%s: %s is %s ago, want 1m", name, what, d)
			}
			if got.String() == got.Round(0).String() {
				t.Errorf("%s: %s has no monotonic clock", name, what)
			}
		}
		if !s.Never.IsZero() || s.None != nil || !s.inner.Equal(then) {
			t.Errorf("%s: %+v", name, s)
		}
	}
}

func TestJumpOfTheClockIsSeen(t *testing.T) {
	state := func(c clock) []byte {
		b, err := json.Marshal(map[string]any{"a": 1, clockField: c})
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	wall := time.Now()
	now := clock{Wall: wall, Boot: "one", Up: time.Hour}
	saved := func(wallAgo, upAgo time.Duration) clock {
		return clock{Wall: wall.Add(-wallAgo), Boot: "one", Up: now.Up - upAgo}
	}
	other := saved(time.Hour, time.Second)
	other.Boot = "two"
	for name, c := range map[string]struct {
		state []byte
		want  time.Duration
	}{
		"none":            {state(saved(time.Minute, time.Minute)), 0},
		"slewed":          {state(saved(time.Minute, time.Minute+time.Second/2)), 0},
		"forward":         {state(saved(time.Hour, time.Minute)), 59 * time.Minute},
		"back":            {state(saved(-time.Hour, time.Minute)), -61 * time.Minute},
		"another boot":    {state(other), 0},
		"an older image":  {[]byte(`{"a":1}`), 0},
		"not even a dict": {[]byte(`[1]`), 0},
	} {
		if got := jumped(c.state, now); got != c.want {
			t.Errorf("%s: jumped by %s, want %s", name, got, c.want)
		}
	}
}

func TestStateIsStampedAndStillItself(t *testing.T) {
	type plain struct{ A, B int }
	fd, err := Save(plain{1, 2})
	if err != nil {
		t.Fatal(err)
	}
	defer fd.Close()
	var back plain
	if err := Read(fd, &back); err != nil || back != (plain{1, 2}) {
		t.Errorf("%+v, %v", back, err)
	}
	var fields map[string]json.RawMessage
	if err := Read(fd, &fields); err != nil || len(fields) != 3 || fields[clockField] == nil {
		t.Errorf("%s, %v", fields, err)
	}
	for _, text := range []string{"{}", "[1]", "3", `"x"`, "null"} {
		if b, err := stamped([]byte(text)); err != nil || string(b) != text {
			t.Errorf("%s became %s, %v", text, b, err)
		}
	}
}
