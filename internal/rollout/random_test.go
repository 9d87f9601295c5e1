package rollout_test

import (
	"encoding/json"
	"reflect"
	"slices"
	"testing"
	"time"

	"pgregory.net/rapid"

	"tako/internal/rollout"
)

// world is a naive model of what an app's processes and proxies do, enough to
// send facts that can happen.
type world struct {
	t         *rapid.T
	app       *rollout.App
	now       time.Time
	alive     map[uint32]rollout.Build
	stopping  map[uint32]bool
	good      map[uint32]int
	bad       map[uint32]int
	committed rollout.Build
	pending   rollout.Build // a Commit that waits for its answer
	rolling   bool
	stopWait  bool
	builds    rollout.Build
	wanted    int
	stopped   bool
}

func (w *world) step(f rollout.Fact) {
	before := w.app.View(w.now)
	for _, act := range w.app.Step(w.now, f) {
		switch a := act.(type) {
		case rollout.StartInstance:
			w.alive[a.N] = a.Build
			starting := 0
			for _, in := range w.app.View(w.now).All {
				if in.State == "starting" && in.Build == a.Build {
					starting++
				}
			}
			if starting > rollout.Parallel {
				w.t.Fatalf("%d instances of build %d come up at one time", starting, a.Build)
			}
		case rollout.StopInstance:
			if _, ok := w.alive[a.N]; !ok {
				w.t.Fatalf("stop of instance %d, which is gone", a.N)
			}
			if w.stopping[a.N] {
				w.t.Fatalf("instance %d is stopped twice", a.N)
			}
			w.stopping[a.N] = true
			// What served and was well before a rollout committed is not its to stop.
			for _, in := range before.All {
				if in.N == a.N && in.Serves && !in.Out && before.Rolling && w.pending == 0 && in.Build == w.committed && w.bad[a.N] < rollout.DeadAfter && !w.stopWait {
					w.t.Fatalf("serving instance %d of the committed build was stopped by %#v", a.N, f)
				}
			}
		case rollout.Commit:
			w.pending = a.Build
		case rollout.Done:
			switch a.What {
			case "roll":
				if !w.rolling {
					w.t.Fatalf("a rollout that was not asked for is done")
				}
				w.rolling = false
			case "stop":
				if !w.stopWait {
					w.t.Fatalf("a stop that was not asked for is done")
				}
				w.stopWait = false
			}
		}
	}
}

// reload puts a snapshot of the app, over JSON, in its place: nothing may differ.
func (w *world) reload() {
	snap, err := w.app.Snapshot()
	if err != nil {
		if !w.rolling && !w.stopWait {
			w.t.Fatalf("no snapshot of an app at rest: %v", err)
		}
		return
	}
	b, err := json.Marshal(snap)
	if err != nil {
		w.t.Fatal(err)
	}
	var again rollout.Snapshot
	if err := json.Unmarshal(b, &again); err != nil {
		w.t.Fatal(err)
	}
	app, err := rollout.Resume(again, nil)
	if err != nil {
		w.t.Fatal(err)
	}
	if before, after := w.app.View(w.now), app.View(w.now); !reflect.DeepEqual(utc(before), utc(after)) {
		w.t.Fatalf("the app looks otherwise after a reload:\n%+v\n%+v", before, after)
	}
	w.app = app
}

// utc makes the times of a view comparable.
func utc(v rollout.View) rollout.View {
	v.All = slices.Clone(v.All)
	for i := range v.All {
		v.All[i].StartedAt = v.All[i].StartedAt.UTC()
	}
	return v
}

func (w *world) advance(d time.Duration) {
	end := w.now.Add(d)
	for i := 0; ; i++ {
		next, ok := w.app.Next()
		if !ok || next.After(end) {
			break
		}
		if !next.After(w.now) {
			w.t.Fatalf("Next says %v, which is not after %v", next, w.now)
		}
		if i > 1000 {
			w.t.Fatal("Next never ends")
		}
		w.now = next
		w.step(rollout.Tick{})
	}
	w.now = end
}

// TestNoOrderOfFactsBreaksThePromises plays random worlds.
func TestNoOrderOfFactsBreaksThePromises(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		w := &world{
			t: t, app: rollout.New(nil), now: time.Unix(1_700_000_000, 0),
			alive: make(map[uint32]rollout.Build), stopping: make(map[uint32]bool),
			good: make(map[uint32]int), bad: make(map[uint32]int),
		}
		plan := func() rollout.Plan {
			w.builds++
			w.wanted = rapid.IntRange(0, 5).Draw(t, "instances")
			return rollout.Plan{Build: w.builds, Instances: w.wanted, Idle: 30 * time.Second, Timing: rollout.DefaultTiming}
		}
		pick := func() (uint32, bool) {
			var ns []uint32
			for n := uint32(1); n < 10_000 && len(ns) < len(w.alive); n++ {
				if _, ok := w.alive[n]; ok {
					ns = append(ns, n)
				}
			}
			if len(ns) == 0 {
				return 0, false
			}
			return rapid.SampledFrom(ns).Draw(t, "instance"), true
		}
		gone := func(n uint32) {
			delete(w.alive, n)
			delete(w.stopping, n)
		}
		w.committed = 1
		w.step(rollout.Restore{Plan: plan()})
		for range rapid.IntRange(1, 60).Draw(t, "facts") {
			w.advance(time.Duration(rapid.IntRange(1, 20_000).Draw(t, "ms")) * time.Millisecond)
			if rapid.IntRange(0, 9).Draw(t, "reload") == 0 {
				w.reload()
			}
			switch rapid.SampledFrom([]string{"good", "good", "good", "bad", "exited", "roll", "commit", "commit", "quiet", "stop", "wake", "busy", "idle", "unreachable", "scale"}).Draw(t, "fact") {
			case "good":
				if n, ok := pick(); ok {
					w.good[n]++
					w.bad[n] = 0
					w.step(rollout.Probed{N: n, Good: true, Streak: w.good[n], Via: "unix"})
				}
			case "bad":
				if n, ok := pick(); ok {
					w.bad[n]++
					w.good[n] = 0
					w.step(rollout.Probed{N: n, Streak: w.bad[n], Accepts: rapid.Bool().Draw(t, "accepts")})
				}
			case "exited":
				if n, ok := pick(); ok {
					gone(n)
					w.step(rollout.Exited{N: n, Reason: "exit code 1"})
				}
			case "roll":
				if !w.rolling && !w.stopWait {
					w.rolling = true
					w.step(rollout.Roll{Plan: plan()})
				}
			case "commit":
				if build := w.pending; build != 0 {
					f := rollout.Committed{Build: build}
					if rapid.Bool().Draw(t, "disk full") {
						f.Err = "disk full"
					} else {
						w.committed, w.stopped = build, false
					}
					w.step(f)
					w.pending = 0
				}
			case "quiet":
				if n, ok := pick(); ok {
					w.step(rollout.Quiet{N: n, Streams: rapid.IntRange(0, 1).Draw(t, "streams")})
				}
			case "stop":
				if !w.rolling && !w.stopWait {
					w.stopWait, w.stopped = true, true
					w.step(rollout.Stop{})
				}
			case "wake":
				w.step(rollout.Wake{})
			case "busy":
				w.step(rollout.Traffic{Busy: true})
			case "idle":
				w.step(rollout.Traffic{IdleFor: time.Second})
			case "unreachable":
				if n, ok := pick(); ok {
					w.step(rollout.Unreachable{N: n})
				}
			case "scale":
				if !w.rolling && !w.stopWait {
					w.wanted = rapid.IntRange(0, 5).Draw(t, "instances")
					w.step(rollout.Scale{Instances: w.wanted})
				}
			}
		}
		// In the end the world is kind: what is stopped ends, what runs is good.
		for range 40 {
			for n := range w.stopping {
				gone(n)
				w.step(rollout.Exited{N: n, Reason: "signal SIGTERM"})
			}
			for n := range w.alive {
				w.good[n]++
				w.bad[n] = 0
				w.step(rollout.Probed{N: n, Good: true, Streak: w.good[n], Via: "unix"})
			}
			if build := w.pending; build != 0 {
				w.committed, w.stopped = build, false
				w.pending = 0
				w.step(rollout.Committed{Build: build})
			}
			w.advance(10 * time.Second)
		}
		if w.rolling || w.stopWait {
			t.Fatalf("a command never ended: rollout %t, stop %t", w.rolling, w.stopWait)
		}
		v := w.app.View(w.now)
		serving := 0
		for _, in := range v.All {
			if in.Serves && !in.Out {
				serving++
			}
		}
		switch {
		case w.stopped && len(v.All) > 0:
			t.Fatalf("stopped, and %d instances left: %+v", len(v.All), v)
		case !w.stopped && v.Instances > 0 && serving != v.Instances:
			t.Fatalf("%d instances serve, %d are wanted: %+v", serving, v.Instances, v)
		}
	})
}
