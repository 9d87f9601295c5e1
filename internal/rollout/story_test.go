package rollout_test

import (
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"tako/internal/rollout"
)

var update = flag.Bool("update", false, "rewrite the stories in testdata with what happens now")

// TestStories plays every story in testdata. A line that begins with a time is
// something that happens; the indented lines below it are what the app does and
// how it looks afterwards.
func TestStories(t *testing.T) {
	files, err := filepath.Glob("testdata/*.txt")
	if err != nil || len(files) == 0 {
		t.Fatalf("no stories in testdata (%v)", err)
	}
	for _, file := range files {
		t.Run(strings.TrimSuffix(filepath.Base(file), ".txt"), func(t *testing.T) {
			want, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			got := play(t, string(want))
			if *update {
				if err := os.WriteFile(file, []byte(got), 0o644); err != nil {
					t.Fatal(err)
				}
				return
			}
			if got != string(want) {
				t.Errorf("the story goes otherwise now (rewrite with -update and read the difference):\n%s", got)
			}
		})
	}
}

func play(t *testing.T, story string) string {
	t.Helper()
	var out strings.Builder
	app := rollout.New(nil)
	zero := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	now := zero
	show := func(acts []rollout.Action) {
		for _, act := range acts {
			fmt.Fprintf(&out, "    %s\n", actionText(act))
		}
		fmt.Fprintf(&out, "    = %s\n", viewText(app.View(now)))
	}
	for line := range strings.Lines(story) {
		line = strings.TrimRight(line, "\n")
		if strings.HasPrefix(line, " ") {
			continue // what happened when the story was written
		}
		words := strings.Fields(line)
		if len(words) == 0 || words[0] == "#" {
			fmt.Fprintln(&out, line)
			continue
		}
		after, err := time.ParseDuration(words[0])
		if err != nil {
			t.Fatalf("line %q: %v", line, err)
		}
		at := zero.Add(after)
		for {
			next, ok := app.Next()
			if !ok || next.After(at) {
				break
			}
			now = next
			if acts := app.Step(now, rollout.Tick{}); len(acts) > 0 {
				fmt.Fprintf(&out, "  (%v)\n", now.Sub(zero))
				show(acts)
			}
		}
		now = at
		fmt.Fprintln(&out, line)
		if words[1] == "wait" {
			continue
		}
		show(app.Step(now, fact(t, words[1:])))
	}
	return out.String()
}

// fact reads "probed 1 good 2", "roll build=2 instances=3" and so on.
func fact(t *testing.T, w []string) rollout.Fact {
	t.Helper()
	num := func(s string) uint32 {
		n, err := strconv.ParseUint(s, 10, 32)
		if err != nil {
			t.Fatalf("%v: %v", w, err)
		}
		return uint32(n)
	}
	plan := rollout.Plan{Instances: 1, Timing: rollout.DefaultTiming, Idle: 5 * time.Minute}
	has := func(word string) bool {
		return slices.Contains(w[1:], word)
	}
	for _, x := range w[1:] {
		k, v, ok := strings.Cut(x, "=")
		switch {
		case !ok:
		case k == "build":
			plan.Build = rollout.Build(num(v))
		case k == "instances":
			plan.Instances = int(num(v))
		case k == "worker":
			plan.Workers = map[string]int{"worker": int(num(v))}
		case k == "idle":
			d, err := time.ParseDuration(v)
			if err != nil {
				t.Fatal(err)
			}
			plan.Idle = d
		default:
			t.Fatalf("unknown word %q", x)
		}
	}
	switch w[0] {
	case "restore":
		return rollout.Restore{Plan: plan, Stopped: has("stopped")}
	case "roll":
		return rollout.Roll{Plan: plan}
	case "committed":
		return rollout.Committed{Build: plan.Build}
	case "commit-failed":
		return rollout.Committed{Build: plan.Build, Err: "disk full"}
	case "scale":
		return rollout.Scale{Instances: plan.Instances}
	case "stop":
		return rollout.Stop{}
	case "start-failed":
		return rollout.StartFailed{N: num(w[1]), Reason: "no such program"}
	case "good":
		return rollout.Probed{N: num(w[1]), Good: true, Streak: int(num(w[2])), Via: "unix"}
	case "bad":
		return rollout.Probed{N: num(w[1]), Streak: int(num(w[2])), Accepts: has("accepts"), Detail: "no answer in 900ms"}
	case "exited":
		return rollout.Exited{N: num(w[1]), Reason: "exit code 3", Lines: []string{"oops"}}
	case "unreachable":
		return rollout.Unreachable{N: num(w[1])}
	case "quiet":
		q := rollout.Quiet{N: num(w[1])}
		if len(w) > 2 {
			q.Streams = int(num(w[2]))
		}
		return q
	case "busy":
		return rollout.Traffic{Busy: true}
	case "idle":
		d, err := time.ParseDuration(w[1])
		if err != nil {
			t.Fatal(err)
		}
		return rollout.Traffic{IdleFor: d}
	case "wake":
		return rollout.Wake{}
	case "tick":
		return rollout.Tick{}
	}
	t.Fatalf("unknown fact %v", w)
	return nil
}

func actionText(act rollout.Action) string {
	switch a := act.(type) {
	case rollout.StartInstance:
		if a.Process != rollout.Web {
			return fmt.Sprintf("start %d of build %d, process %s", a.N, a.Build, a.Process)
		}
		return fmt.Sprintf("start %d of build %d", a.N, a.Build)
	case rollout.StopInstance:
		return fmt.Sprintf("stop %d, grace %v", a.N, a.Grace)
	case rollout.Publish:
		return "publish"
	case rollout.Commit:
		return fmt.Sprintf("commit build %d", a.Build)
	case rollout.Done:
		if a.Failure != nil {
			return fmt.Sprintf("done %s: FAILED by %d: %s %q", a.What, a.Failure.N, a.Failure.Reason, a.Failure.Lines)
		}
		return fmt.Sprintf("done %s: %d new, %d old", a.What, a.New, a.Old)
	}
	return fmt.Sprintf("%#v", act)
}

func viewText(v rollout.View) string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s", v.State)
	for _, in := range v.All {
		fmt.Fprintf(&b, " %d:%s%s", in.N, in.Process, in.State)
		if in.Serves {
			b.WriteString("*")
		}
	}
	if v.Trouble != "" {
		fmt.Fprintf(&b, " trouble=%s retry-after=%v", v.Trouble, v.RetryAfter)
	}
	if v.Why != "" {
		fmt.Fprintf(&b, " (%s)", v.Why)
	}
	if v.MayWait {
		b.WriteString(" may-wait")
	}
	return b.String()
}
