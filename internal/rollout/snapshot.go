package rollout

import (
	"errors"
	"fmt"
	"time"
)

// A Snapshot is an App between two Steps, for the next image of the server to go
// on with. Its zero times mean what they mean in an App.
type Snapshot struct {
	Plan      Plan               `json:"plan"`
	Have      bool               `json:"have"`
	Stopped   bool               `json:"stopped"`
	Awake     bool               `json:"awake"`
	NextN     uint32             `json:"next_n"`
	QuietAt   time.Time          `json:"quiet_at"`
	Busy      bool               `json:"busy"`
	Paces     map[string]Paced   `json:"paces"`
	Instances []InstanceSnapshot `json:"instances"`
}

// Paced is the pace of one process in a Snapshot.
type Paced struct {
	Crashes   int       `json:"crashes"`
	CrashedAt time.Time `json:"crashed_at"`
	NextStart time.Time `json:"next_start"`
	Trouble   string    `json:"trouble"`
}

// InstanceSnapshot is one instance in a Snapshot.
type InstanceSnapshot struct {
	N          uint32    `json:"n"`
	Process    string    `json:"process"`
	Build      Build     `json:"build"`
	Stage      string    `json:"stage"`
	Timing     Timing    `json:"timing"`
	StartedAt  time.Time `json:"started_at"`
	GoodAt     time.Time `json:"good_at"`
	ServedAt   time.Time `json:"served_at"`
	Good       int       `json:"good"`
	Bad        int       `json:"bad"`
	Accepts    bool      `json:"accepts"`
	Via        string    `json:"via"`
	Detail     string    `json:"detail"`
	Condemned  bool      `json:"condemned"`
	Quiet      bool      `json:"quiet"`
	Streams    int       `json:"streams"`
	DrainUntil time.Time `json:"drain_until"`
	CutAt      time.Time `json:"cut_at"`
	Cutting    bool      `json:"cutting"`
	CutUntil   time.Time `json:"cut_until"`
}

// ErrRolling is returned by Snapshot while a command is under way: only an app at
// rest can be handed over.
var ErrRolling = errors.New("a rollout or stop is under way")

var stages = map[stage]string{starting: "starting", proved: "proved", serving: "serving", drained: "drained", ending: "ending"}

// Snapshot returns the app as it is. It fails with ErrRolling during a rollout or
// a stop.
func (a *App) Snapshot() (Snapshot, error) {
	if a.roll != nil || a.stopping {
		return Snapshot{}, ErrRolling
	}
	s := Snapshot{
		Plan: a.plan, Have: a.have, Stopped: a.stopped, Awake: a.awake, NextN: a.nextN,
		QuietAt: a.quietAt, Busy: a.busy, Paces: make(map[string]Paced, len(a.paces)),
	}
	for name, p := range a.paces {
		s.Paces[name] = Paced{Crashes: p.crashes, CrashedAt: p.crashedAt, NextStart: p.nextStart, Trouble: p.trouble}
	}
	for _, in := range a.instances {
		s.Instances = append(s.Instances, InstanceSnapshot{
			N: in.n, Process: in.process, Build: in.build, Stage: stages[in.stage], Timing: in.timing,
			StartedAt: in.startedAt, GoodAt: in.goodAt, ServedAt: in.servedAt, Good: in.good, Bad: in.bad,
			Accepts: in.accepts, Via: in.via, Detail: in.detail, Condemned: in.condemned, Quiet: in.quiet,
			Streams: in.streams, DrainUntil: in.drainUntil, CutAt: in.cutAt, Cutting: in.cutting, CutUntil: in.cutUntil,
		})
	}
	return s, nil
}

// Resume makes an app of a snapshot. The first Step publishes it, whatever the
// proxies knew before.
func Resume(s Snapshot, jitter func() float64) (*App, error) {
	a := New(jitter)
	a.plan, a.have, a.stopped, a.awake = s.Plan, s.Have, s.Stopped, s.Awake
	a.nextN, a.quietAt, a.busy = max(s.NextN, 1), s.QuietAt, s.Busy
	for name, p := range s.Paces {
		a.paces[name] = &pace{crashes: p.Crashes, crashedAt: p.CrashedAt, nextStart: p.NextStart, trouble: p.Trouble}
	}
	last := uint32(0)
	for _, i := range s.Instances {
		in := &instance{
			n: i.N, process: i.Process, build: i.Build, timing: i.Timing,
			startedAt: i.StartedAt, goodAt: i.GoodAt, servedAt: i.ServedAt, good: i.Good, bad: i.Bad,
			accepts: i.Accepts, via: i.Via, detail: i.Detail, condemned: i.Condemned, quiet: i.Quiet,
			streams: i.Streams, drainUntil: i.DrainUntil, cutAt: i.CutAt, cutting: i.Cutting, cutUntil: i.CutUntil,
		}
		known := false
		for st, name := range stages {
			if name == i.Stage {
				in.stage, known = st, true
			}
		}
		if !known || i.N <= last || i.N >= a.nextN {
			return nil, fmt.Errorf("snapshot of instance %d (%s): out of order or of an unknown stage", i.N, i.Stage)
		}
		last = i.N
		a.instances = append(a.instances, in)
	}
	return a, nil
}
