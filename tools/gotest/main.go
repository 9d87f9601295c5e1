// Gotest runs go test in phases, one after another, shows what failed and ends
// with one verdict over all of them:
//
//	gotest [-skips FILE] [-strict] [-again N] [-show] -- NAME ARG... [-- NAME ARG...]...
//
// Each phase is a name and the arguments of go test. A phase that fails does not
// stop the next.
//
// With -again a test that failed runs a second time, on its own; one that passes
// then is reported as flaky, with what it said both times, and does not fail the
// run. Nothing runs again after more than N failed tests in a phase, nor in a
// package that did not build, panicked, raced or ended before its tests did.
//
// A test that skips must stand in FILE, one "package TestName" or
// "package" a line ('#' begins a comment); with -strict any other skip fails the
// run. A line "unprivileged WORD" is for users other than root: they may skip what
// gives WORD in its reason. With -show what passed is shown too, with what it
// logged. The exit status is 0 only if everything passed.
package main

import (
	"bufio"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"slices"
	"strings"
	"time"
)

// event is a line of go test -json.
type event struct {
	Action      string
	Package     string
	ImportPath  string // of build output
	Test        string
	Elapsed     float64
	Output      string
	FailedBuild string
}

// show is whether what passed is shown.
var show = flag.Bool("show", false, "show what passed too, with what it logged")

type tally struct {
	passed, failed, skipped int
	unexpected              []string // skips that are not in the list
	blamed                  string   // the package that a failed test was in last
	failures                []*failure
	beyond                  map[string]bool // packages in which more went wrong than tests
}

// failure is a test of a package that failed, or tests within it.
type failure struct {
	pkg, test string
	count     int      // of failed tests, itself and those within
	output    []string // of all of them
}

// allowance is what may skip.
type allowance struct {
	tests map[string]bool // "package TestName", "package"
	words []string        // of reasons
}

func main() {
	skips := flag.String("skips", "", "file that lists the tests that may skip")
	strict := flag.Bool("strict", false, "fail on a skip that is not listed")
	again := flag.Int("again", 0, "run a failed test once more on its own, if at most so many failed in a phase")
	flag.Usage = func() {
		fmt.Fprintln(flag.CommandLine.Output(), "usage: gotest [-skips FILE] [-strict] [-again N] [-show] -- NAME ARG... [-- NAME ARG...]...")
		flag.PrintDefaults()
	}
	flag.Parse()
	phases := split(flag.Args())
	if len(phases) == 0 {
		flag.Usage()
		os.Exit(2)
	}
	allowed, err := readSkips(*skips)
	if err != nil {
		fmt.Fprintln(os.Stderr, "gotest:", err)
		os.Exit(2)
	}
	// go test gets the terminal's interrupt too and reports before it leaves.
	signal.Ignore(os.Interrupt)

	var all tally
	var flaky []string
	for _, phase := range phases {
		began := time.Now()
		t, err := run(phase[1:], allowed)
		if err != nil {
			fmt.Fprintf(os.Stderr, "gotest: %s: %v\n", phase[0], err)
			t.failed = max(t.failed, 1)
		}
		flaky = append(flaky, t.runAgain(phase[1:], *again)...)
		fmt.Printf("%s: %d passed, %d failed, %d skipped in %s\n\n", phase[0], t.passed, t.failed, t.skipped, time.Since(began).Round(time.Second))
		all.passed += t.passed
		all.failed += t.failed
		all.skipped += t.skipped
		all.unexpected = append(all.unexpected, t.unexpected...)
	}
	for _, s := range all.unexpected {
		fmt.Printf("skipped and not listed in %s: %s\n", *skips, s)
	}
	for _, f := range flaky {
		fmt.Printf("FLAKY: %s failed, and passed when run again on its own\n", f)
	}
	fmt.Printf("%d passed, %d failed, %d flaky, %d skipped\n", all.passed, all.failed, len(flaky), all.skipped)
	if all.failed > 0 || all.passed == 0 || *strict && len(all.unexpected) > 0 {
		fmt.Println("verdict: FAIL")
		os.Exit(1)
	}
	if len(flaky) > 0 {
		fmt.Printf("verdict: PASS, with %d flaky\n", len(flaky))
		return
	}
	fmt.Println("verdict: PASS")
}

// split cuts the arguments at each "--"; the flag package took the first.
func split(args []string) [][]string {
	var phases [][]string
	for len(args) > 0 {
		phase := args
		if i := slices.Index(args, "--"); i >= 0 {
			phase, args = args[:i], args[i+1:]
		} else {
			args = nil
		}
		if len(phase) > 0 {
			phases = append(phases, phase)
		}
	}
	return phases
}

func readSkips(name string) (allowance, error) {
	allowed := allowance{tests: make(map[string]bool)}
	if name == "" {
		return allowed, nil
	}
	text, err := os.ReadFile(name)
	if err != nil {
		return allowance{}, err
	}
	for line := range strings.Lines(string(text)) {
		line, _, _ = strings.Cut(line, "#")
		line = strings.Join(strings.Fields(line), " ")
		if word, ok := strings.CutPrefix(line, "unprivileged "); ok {
			if os.Geteuid() != 0 {
				allowed.words = append(allowed.words, word)
			}
		} else if line != "" {
			allowed.tests[line] = true
		}
	}
	return allowed, nil
}

// run runs one phase and prints what a person wants to see of it: a line per
// package, and the whole output of whatever failed.
func run(args []string, allowed allowance) (tally, error) {
	t := tally{beyond: make(map[string]bool)}
	output := make(map[string][]string) // of each package and test until it ends
	under := make(map[string][]string)  // the tests under way in each package
	err := stream(args, func(e event) {
		key := e.Package + " " + e.Test
		switch e.Action {
		case "build-output":
			output[e.ImportPath] = append(output[e.ImportPath], e.Output)
		case "run":
			under[e.Package] = append(under[e.Package], e.Test)
		case "output":
			output[key] = append(output[key], e.Output)
			if grave(e.Output) {
				t.beyond[e.Package] = true
			}
		case "pass", "fail", "skip":
			under[e.Package] = slices.DeleteFunc(under[e.Package], func(test string) bool { return test == e.Test })
			if e.Test == "" && e.Action == "fail" {
				if len(under[e.Package]) > 0 || e.FailedBuild != "" {
					t.beyond[e.Package] = true
				}
				// What was under way at a panic or a timeout never ends.
				for k, lines := range output {
					if strings.HasPrefix(k, e.Package+" ") && k != key {
						fmt.Print(strings.Join(lines, ""))
						delete(output, k)
					}
				}
			}
			end(&t, e, output[key], allowed)
			if e.FailedBuild != "" {
				fmt.Print(strings.Join(output[e.FailedBuild], ""))
			}
			delete(output, key)
		}
	})
	if exit, ok := err.(*exec.ExitError); ok && exit.ExitCode() == 1 && t.failed > 0 { //nolint:errorlint // stream returns it bare
		err = nil // it says no more than what was counted
	}
	return t, err
}

// stream runs go test and passes on its events. The error of a go test that ran
// and failed is an *exec.ExitError.
func stream(args []string, take func(event)) error {
	at := 0
	if len(args) > 1 && args[0] == "-C" {
		at = 2 // it has to be the first
	}
	cmd := exec.Command("go", slices.Concat([]string{"test"}, args[:at], []string{"-json"}, args[at:])...)
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	lines := bufio.NewScanner(out)
	lines.Buffer(nil, 16<<20)
	for lines.Scan() {
		var e event
		if json.Unmarshal(lines.Bytes(), &e) != nil {
			fmt.Println(lines.Text())
			continue
		}
		take(e)
	}
	if lines.Err() != nil {
		_ = out.Close() // so that it ends
	}
	if err := cmd.Wait(); err != nil {
		return err
	}
	return lines.Err()
}

// end counts what ended and shows it if it is a package or failed.
func end(t *tally, e event, output []string, allowed allowance) {
	if e.Test == "" {
		switch e.Action {
		case "pass":
			fmt.Printf("ok    %s %.1fs\n", e.Package, e.Elapsed)
		case "fail":
			fmt.Print(strings.Join(output, ""))
			fmt.Printf("FAIL  %s %.1fs\n", e.Package, e.Elapsed)
			if t.blamed != e.Package {
				t.failed++ // no single test is to blame: a build, a panic, TestMain
			}
		}
		return
	}
	switch e.Action {
	case "pass":
		t.passed++
		if *show {
			fmt.Printf("ok    %s %.1fs\n", e.Test, e.Elapsed)
			for _, line := range output {
				if !strings.HasPrefix(line, "===") && !strings.HasPrefix(line, "---") {
					fmt.Print(line)
				}
			}
		}
	case "fail":
		t.failed++
		t.blamed = e.Package
		t.remember(e, output)
		fmt.Print(strings.Join(output, ""))
	case "skip":
		t.skipped++
		root, _, _ := strings.Cut(e.Test, "/")
		if !allowed.tests[e.Package] && !allowed.tests[e.Package+" "+root] && !allowed.tests[e.Package+" "+e.Test] && !allowed.because(reason(output)) {
			t.unexpected = append(t.unexpected, e.Package+" "+e.Test+": "+reason(output))
		}
	}
}

// because reports whether a test may skip for this reason.
func (a allowance) because(reason string) bool {
	return slices.ContainsFunc(a.words, func(word string) bool { return strings.Contains(reason, word) })
}

// reason is what a skipped test said: its last line that is not go test's own.
func reason(output []string) string {
	for _, line := range slices.Backward(output) {
		if line = strings.TrimSpace(line); line != "" && !strings.HasPrefix(line, "---") && !strings.HasPrefix(line, "===") {
			return line
		}
	}
	return "no reason given"
}
