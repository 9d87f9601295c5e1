// Gotest runs go test in phases, one after another, shows what failed and ends
// with one verdict over all of them:
//
//	gotest [-skips FILE] [-strict] [-show] -- NAME ARG... [-- NAME ARG...]...
//
// Each phase is a name and the arguments of go test. A phase that fails does not
// stop the next. A test that skips must stand in FILE, one "package TestName" or
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
	"io"
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
}

// allowance is what may skip.
type allowance struct {
	tests map[string]bool // "package TestName", "package"
	words []string        // of reasons
}

func main() {
	skips := flag.String("skips", "", "file that lists the tests that may skip")
	strict := flag.Bool("strict", false, "fail on a skip that is not listed")
	flag.Usage = func() {
		fmt.Fprintln(flag.CommandLine.Output(), "usage: gotest [-skips FILE] [-strict] [-show] -- NAME ARG... [-- NAME ARG...]...")
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
	for _, phase := range phases {
		began := time.Now()
		t, err := run(phase[1:], allowed)
		if err != nil {
			fmt.Fprintf(os.Stderr, "gotest: %s: %v\n", phase[0], err)
			t.failed = max(t.failed, 1)
		}
		fmt.Printf("%s: %d passed, %d failed, %d skipped in %s\n\n", phase[0], t.passed, t.failed, t.skipped, time.Since(began).Round(time.Second))
		all.passed += t.passed
		all.failed += t.failed
		all.skipped += t.skipped
		all.unexpected = append(all.unexpected, t.unexpected...)
	}
	for _, s := range all.unexpected {
		fmt.Printf("skipped and not listed in %s: %s\n", *skips, s)
	}
	fmt.Printf("%d passed, %d failed, %d skipped\n", all.passed, all.failed, all.skipped)
	if all.failed > 0 || all.passed == 0 || *strict && len(all.unexpected) > 0 {
		fmt.Println("verdict: FAIL")
		os.Exit(1)
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
	cmd := exec.Command("go", append([]string{"test", "-json"}, args...)...)
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		return tally{}, err
	}
	if err := cmd.Start(); err != nil {
		return tally{}, err
	}
	t, readErr := read(out, allowed)
	if err := cmd.Wait(); err != nil {
		return t, err
	}
	return t, readErr
}

func read(r io.Reader, allowed allowance) (tally, error) {
	var t tally
	output := make(map[string][]string) // of each package and test until it ends
	lines := bufio.NewScanner(r)
	lines.Buffer(nil, 16<<20)
	for lines.Scan() {
		var e event
		if err := json.Unmarshal(lines.Bytes(), &e); err != nil {
			fmt.Println(lines.Text())
			continue
		}
		key := e.Package + " " + e.Test
		switch e.Action {
		case "build-output":
			output[e.ImportPath] = append(output[e.ImportPath], e.Output)
		case "output":
			output[key] = append(output[key], e.Output)
		case "pass", "fail", "skip":
			if e.Test == "" && e.Action == "fail" {
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
	}
	return t, lines.Err()
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
