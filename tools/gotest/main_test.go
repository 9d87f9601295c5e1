package main

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// TestMain is the tool itself when a test runs it.
func TestMain(m *testing.M) {
	if os.Getenv("BE_GOTEST") != "" {
		main()
		return
	}
	os.Exit(m.Run())
}

// moody are the tests of the packages that the tool is run on. once fails the
// first time that it is asked for a name.
var moody = map[string]string{
	"fine": `func TestFine(t *testing.T) {}`,
	"flaky": `
func TestFine(t *testing.T) {}
func TestFlaky(t *testing.T) { t.Log("it ran"); once(t, "flaky") }
func TestWithin(t *testing.T) { t.Run("one", func(t *testing.T) { once(t, "within") }) }`,
	"broken": `
func TestBroken(t *testing.T) { t.Error("it broke") }
func TestFlaky(t *testing.T)  { once(t, "broken") }`,
	"skips": `func TestSkips(t *testing.T) { if asked("skips") { t.Skip("not now") }; t.Fail() }`,
	"panics": `
func TestFlaky(t *testing.T)  { once(t, "panics") }
func TestPanics(t *testing.T) { once(t, "panic"); panic("at the disco") }`,
	"exits": `
func TestFlaky(t *testing.T) { once(t, "exits") }
func TestExits(t *testing.T) { os.Exit(1) }`,
	"leaves": `
func TestFlaky(t *testing.T) { once(t, "leaves") }
func TestMain(m *testing.M)  { m.Run(); os.Exit(1) }`,
	"builds": `func TestFlaky(t *testing.T) { undefined }`,
	"races": `
func TestRaces(t *testing.T) {
	if asked("races") { return }
	n, done := 0, make(chan bool)
	go func() { n++; done <- true }()
	n++
	<-done
	t.Log(n)
}`,
	"args": `
func TestFlaky(t *testing.T) { if !testing.Short() { t.Fatal("not short") }; once(t, "args") }
func TestOther(t *testing.T) { t.Error("not asked for") }`,
}

const prelude = `package p

import (
	"os"
	"testing"
)

func asked(name string) bool {
	_, err := os.Stat("../asked-" + name)
	_ = os.WriteFile("../asked-"+name, nil, 0o600)
	return err == nil
}

func once(t *testing.T, name string) {
	t.Helper()
	if !asked(name) {
		t.Errorf("%s is moody", name)
	}
}
`

// runTool runs the tool over packages of moody and returns its output and status.
func runTool(t *testing.T, args ...string) (string, int) {
	t.Helper()
	dir := t.TempDir()
	write := func(name, text string) {
		t.Helper()
		path := filepath.Join(dir, name)
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o700), os.WriteFile(path, []byte(text), 0o600)); err != nil {
			t.Fatal(err)
		}
	}
	write("go.mod", "module moody\n\ngo 1.26\n")
	for name, text := range moody {
		write(name+"/p_test.go", prelude+text)
	}
	tool := exec.CommandContext(t.Context(), os.Args[0], args...)
	tool.Dir = dir
	tool.Env = append(os.Environ(), "BE_GOTEST=1", "GOFLAGS=", "GOWORK=off")
	out, err := tool.CombinedOutput()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	return string(out), tool.ProcessState.ExitCode()
}

func TestOnlyATestThatFailsTwiceFailsTheRun(t *testing.T) {
	const flakyAgain = "moody/flaky TestFlaky runs again"
	for _, c := range []struct {
		name   string
		args   string
		status int
		want   []string
		not    []string
	}{
		{"all pass", "-again 10 -- unit ./fine", 0,
			[]string{"1 passed, 0 failed, 0 flaky, 0 skipped", "verdict: PASS\n"}, []string{"FLAKY", "again"}},
		{"flaky", "-again 10 -- unit ./fine ./flaky", 0,
			[]string{flakyAgain, "FLAKY moody/flaky TestFlaky. It failed with:\n", "flaky is moody", "--- PASS: TestFlaky", "it ran",
				"FLAKY: moody/flaky TestFlaky failed, and passed when run again on its own",
				"FLAKY: moody/flaky TestWithin failed", "4 passed, 0 failed, 2 flaky, 0 skipped", "verdict: PASS, with 2 flaky\n"},
			[]string{"exit status"}},
		{"flaky without the switch", "-- unit ./flaky", 1,
			[]string{"flaky is moody", "verdict: FAIL"}, []string{"FLAKY", "again"}},
		{"too many", "-again 1 -- unit ./flaky", 1,
			[]string{"2 tests failed: too many to be run again", "verdict: FAIL"}, []string{"FLAKY"}},
		{"one of two fails twice", "-again 10 -- unit ./broken", 1,
			[]string{"moody/broken TestBroken failed again:\n", "1 passed, 1 failed, 1 flaky", "verdict: FAIL"}, nil},
		{"skips the second time", "-again 10 -- unit ./fine ./skips", 1,
			[]string{"TestSkips failed again:\n", "verdict: FAIL"}, []string{"FLAKY"}},
		{"panic", "-again 10 -- unit ./panics ./flaky", 1,
			[]string{"moody/panics TestFlaky is not run again", flakyAgain, "verdict: FAIL"}, []string{"FLAKY moody/panics"}},
		{"exit", "-again 10 -- unit ./exits", 1,
			[]string{"moody/exits TestFlaky is not run again", "verdict: FAIL"}, []string{"FLAKY"}},
		{"package fails without its tests", "-again 10 -- unit ./leaves", 1,
			[]string{"moody/leaves TestFlaky failed again", "verdict: FAIL"}, []string{"FLAKY"}},
		{"no build", "-again 10 -- unit ./builds ./flaky", 1,
			[]string{"FAIL  moody/builds", flakyAgain, "verdict: FAIL"}, []string{"moody/builds TestFlaky"}},
		{"each phase on its own", "-again 2 -- one -short ./args -- two ./flaky", 1,
			[]string{"moody/args TestOther failed again", "FLAKY: moody/args TestFlaky", "FLAKY: moody/flaky TestFlaky", "verdict: FAIL"}, nil},
		{"another directory", "-again 2 -- one -C flaky .", 0,
			[]string{"FLAKY: moody/flaky TestFlaky", "verdict: PASS, with 2 flaky"}, nil},
		{"flags of the phase", "-again 2 -- one -short -run TestFlaky -timeout=1m ./args", 0,
			[]string{"FLAKY: moody/args TestFlaky", "verdict: PASS, with 1 flaky"}, []string{"TestOther"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			out, status := runTool(t, strings.Fields(c.args)...)
			if status != c.status {
				t.Errorf("status %d, want %d", status, c.status)
			}
			for _, want := range c.want {
				if !strings.Contains(out, want) {
					t.Errorf("no %q", want)
				}
			}
			for _, not := range c.not {
				if strings.Contains(out, not) {
					t.Errorf("it says %q", not)
				}
			}
			if t.Failed() {
				t.Log(out)
			}
		})
	}
}

func TestARaceIsNeverRunAgain(t *testing.T) {
	if _, err := exec.LookPath("gcc"); err != nil {
		t.Skip("the race detector needs a C compiler")
	}
	out, status := runTool(t, "-again", "10", "--", "race", "-race", "./races")
	if status != 1 || !strings.Contains(out, "moody/races TestRaces is not run again") || strings.Contains(out, "FLAKY") {
		t.Errorf("status %d:\n%s", status, out)
	}
}

func TestFlagsAreToldFromPackages(t *testing.T) {
	for args, want := range map[string]string{
		"":                                  "",
		"./...":                             "",
		"-race tako/a tako/b":               "-race",
		"-count 1 -parallel 4 ./x/...":      "-count 1 -parallel 4",
		"--timeout 30m -run=A|B ./x -short": "--timeout 30m -run=A|B -short",
	} {
		if got := flagsOf(strings.Fields(args)); !slices.Equal(got, strings.Fields(want)) {
			t.Errorf("%q: %q, want %q", args, got, want)
		}
	}
}
