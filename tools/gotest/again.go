package main

import (
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strings"
)

// grave reports whether a line of a test's output is of a trouble that is not the
// test's alone: a panic, a runtime that gave up, a data race.
func grave(line string) bool {
	return strings.HasPrefix(line, "panic: ") || strings.HasPrefix(line, "fatal error: ") ||
		strings.HasPrefix(line, "WARNING: DATA RACE") || strings.Contains(line, "race detected ")
}

// remember keeps what a failed test said, under the name that -run takes.
func (t *tally) remember(e event, output []string) {
	root, _, _ := strings.Cut(e.Test, "/")
	i := slices.IndexFunc(t.failures, func(f *failure) bool { return f.pkg == e.Package && f.test == root })
	if i < 0 {
		i = len(t.failures)
		t.failures = append(t.failures, &failure{pkg: e.Package, test: root})
	}
	t.failures[i].count++
	t.failures[i].output = append(t.failures[i].output, output...)
}

// runAgain gives the failed tests of a phase a second run, each on its own, and
// takes those that pass out of the count. It returns their names.
func (t *tally) runAgain(args []string, most int) (flaky []string) {
	if most == 0 || len(t.failures) == 0 {
		return nil
	}
	if len(t.failures) > most {
		fmt.Printf("%d tests failed: too many to be run again\n", len(t.failures))
		return nil
	}
	for _, f := range t.failures {
		name := f.pkg + " " + f.test
		if t.beyond[f.pkg] {
			fmt.Printf("%s is not run again: more went wrong in its package\n", name)
			continue
		}
		fmt.Printf("%s runs again on its own\n", name)
		passed, output, err := single(args, f)
		if err != nil {
			fmt.Fprintf(os.Stderr, "gotest: %s: %v\n", name, err)
			continue
		}
		if !passed {
			fmt.Printf("%s failed again:\n%s", name, output)
			continue
		}
		fmt.Printf("FLAKY %s. It failed with:\n%sand passed on its own with:\n%s", name, strings.Join(f.output, ""), output)
		t.failed -= f.count
		t.passed++
		flaky = append(flaky, name)
	}
	return flaky
}

// single runs one test by itself with the flags of its phase. It passed only if
// it ran, did not skip, and its package passed too.
func single(args []string, f *failure) (passed bool, output string, err error) {
	args = append(flagsOf(args), "-count=1", "-run=^"+f.test+"$", f.pkg)
	var ran, whole bool
	var text strings.Builder
	err = stream(args, func(e event) {
		switch {
		case e.Action == "output" || e.Action == "build-output":
			text.WriteString(e.Output)
		case e.Action == "pass" && e.Test == f.test:
			ran = true
		case e.Action == "pass" && e.Test == "":
			whole = true
		}
	})
	if _, failed := err.(*exec.ExitError); failed { //nolint:errorlint // stream returns it bare
		err = nil
	}
	return ran && whole, text.String(), err
}

// alone are the flags of go test that take no value.
var alone = []string{"a", "asan", "benchmem", "cover", "failfast", "fullpath", "msan", "n", "race", "short", "trimpath", "v", "work", "x"}

// flagsOf returns the arguments of go test without the packages.
func flagsOf(args []string) []string {
	var flags []string
	for i := 0; i < len(args); i++ {
		name, isFlag := strings.CutPrefix(args[i], "-")
		if !isFlag {
			continue
		}
		flags = append(flags, args[i])
		if !strings.Contains(name, "=") && !slices.Contains(alone, strings.TrimPrefix(name, "-")) && i+1 < len(args) {
			i++
			flags = append(flags, args[i])
		}
	}
	return flags
}
