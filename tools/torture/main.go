// Torture runs the long forms of tests, one after another, and prints the table of
// what they counted:
//
//	torture [-run REGEXP] [-each DURATION] PACKAGE...
//
// Each test runs by itself, with TAKO_SOAK set, for at most DURATION, and where
// the system allows it in a PID and a network namespace of its own: what it kills
// is its own, its traffic goes nowhere, and nothing of it is left. A test gives rows
// by logging lines such as
//
//	row: 50 reloads | 123456 | 0 | what else there is to say
//
// with the number of requests and of those that failed; one that gives none is a
// row by its name. The exit status is 0 only if every row is good and there is one.
package main

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"text/tabwriter"
	"time"
	"unsafe"
)

// apart begins a command in namespaces of its own. A shell is process 1 there: it
// waits for every child.
var apart = []string{
	"unshare", "--pid", "--fork", "--kill-child", "--mount-proc", "--net",
	"sh", "-c", `self=$1; shift; "$self" -loopback && "$@"; exit $?`, "sh",
}

// row is a line of the table.
type row struct {
	test, what, requests, failed, more string
	skipped                            bool
}

type torture struct {
	apart  bool
	each   time.Duration
	rows   []row
	failed map[string]bool // tests, and those within them
}

func main() {
	run := flag.String("run", ".", "the `regexp` of the tests")
	each := flag.Duration("each", 20*time.Minute, "how long a test may take")
	loopback := flag.Bool("loopback", false, "only bring up the loopback interface: for the tool itself")
	flag.Parse()
	if *loopback {
		if err := loopbackUp(); err != nil {
			fail(err)
		}
		return
	}
	if flag.NArg() == 0 {
		flag.Usage()
		os.Exit(2)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	t := &torture{each: *each, failed: make(map[string]bool)}
	if err := t.all(ctx, *run, flag.Args()); err != nil {
		fail(err)
	}
	if !t.print() {
		os.Exit(1)
	}
}

func fail(err error) {
	fmt.Fprintln(os.Stderr, "torture:", err)
	os.Exit(1)
}

// all runs the tests of all packages.
func (t *torture) all(ctx context.Context, run string, packages []string) error {
	if out, err := t.command(ctx, []string{"true"}, true).CombinedOutput(); err != nil {
		fmt.Printf("not in namespaces of their own, which this system refuses: %v %s\n", err, bytes.TrimSpace(out))
	} else {
		t.apart = true
		fmt.Println("each test runs in a PID and a network namespace of its own")
	}
	dir, err := os.MkdirTemp("", "torture")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	for _, p := range packages {
		binary := filepath.Join(dir, "test")
		where, err := output(ctx, "go", "list", "-f", "{{.Dir}}", p)
		if err == nil {
			_, err = output(ctx, "go", "test", "-c", "-o", binary, p)
		}
		if err != nil {
			return err
		}
		names, err := output(ctx, binary, "-test.list", run)
		if err != nil {
			return err
		}
		for _, name := range strings.Fields(names) {
			if err := t.one(ctx, binary, strings.TrimSpace(where), name); err != nil {
				return err
			}
		}
	}
	return nil
}

// command makes a command, in namespaces of its own if own.
func (t *torture) command(ctx context.Context, argv []string, own bool) *exec.Cmd {
	if own {
		self, err := os.Executable()
		if err != nil {
			fail(err)
		}
		argv = slices.Concat(apart, []string{self}, argv)
	}
	cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
	cmd.WaitDelay = 5 * time.Second
	return cmd
}

// one runs a test. Only an interrupt is an error.
func (t *torture) one(ctx context.Context, binary, dir, name string) error {
	began := time.Now()
	bounded, cancel := context.WithTimeout(ctx, t.each+time.Minute)
	defer cancel()
	cmd := t.command(bounded, []string{binary, "-test.run", "^" + name + "$", "-test.v", "-test.parallel=1", "-test.timeout", t.each.String()}, t.apart)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "TAKO_SOAK=1")
	out, err := cmd.CombinedOutput()
	if ctx.Err() != nil {
		return errors.New("interrupted")
	}
	rows := t.read(name, string(out))
	verdict := "ok  "
	if err != nil {
		verdict = "FAIL"
		t.failed[name] = true
		for line := range strings.Lines(string(out)) {
			if !strings.Contains(line, " [DEBUG] ") { // of the servers' logs, which are long
				fmt.Print(line)
			}
		}
		fmt.Println(err)
	}
	fmt.Printf("%s  %s %.0fs\n", verdict, name, time.Since(began).Seconds())
	for _, r := range rows {
		fmt.Printf("      %s | %s | %s | %s\n", r.what, r.requests, r.failed, r.more)
	}
	t.rows = append(t.rows, rows...)
	return nil
}

var (
	rowLine    = regexp.MustCompile(`^\s+\S+_test\.go:\d+: row: (.*)$`)
	headLine   = regexp.MustCompile(`^=== (?:RUN|CONT|NAME)\s+(\S+)$`)
	failedLine = regexp.MustCompile(`^\s*--- FAIL: (\S+)`)
	skipLine   = regexp.MustCompile(`^\s*--- SKIP: (\S+)`)
)

// read takes the rows and the failures out of what a test said.
func (t *torture) read(name, out string) (rows []row) {
	current, skipped := name, false
	for line := range strings.Lines(out) {
		line = strings.TrimRight(line, "\n")
		if m := headLine.FindStringSubmatch(line); m != nil {
			current = m[1]
		} else if m := failedLine.FindStringSubmatch(line); m != nil {
			t.failed[m[1]] = true
		} else if skipLine.MatchString(line) {
			skipped = true
		} else if m := rowLine.FindStringSubmatch(line); m != nil {
			f := strings.SplitN(m[1]+" |  |  | ", " | ", 4)
			rows = append(rows, row{test: current, what: f[0], requests: f[1], failed: f[2], more: strings.TrimRight(f[3], " |")})
		}
	}
	if len(rows) == 0 {
		rows = []row{{test: name, what: name, requests: "-", failed: "-", skipped: skipped}}
	}
	return rows
}

// verdict is that of the test, or the test within it, that a row is of.
func (t *torture) verdict(r row) string {
	switch {
	case t.failed[r.test]:
		return "FAIL"
	case r.skipped:
		return "skipped"
	}
	return "ok"
}

// print prints the table and reports whether all is well.
func (t *torture) print() (good bool) {
	fmt.Println()
	w := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "ROW\tREQUESTS\tFAILED\tVERDICT\t")
	good = len(t.rows) > 0
	for _, r := range t.rows {
		verdict := t.verdict(r)
		good = good && verdict != "FAIL"
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\n", r.what, r.requests, r.failed, verdict, r.more)
	}
	_ = w.Flush()
	for name := range t.failed {
		fmt.Println("failed:", name)
		good = false
	}
	if good {
		fmt.Println("verdict: PASS")
	} else {
		fmt.Println("verdict: FAIL")
	}
	return good
}

func output(ctx context.Context, argv ...string) (string, error) {
	var errs bytes.Buffer
	cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
	cmd.Stderr = &errs
	out, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("%s: %w: %s", strings.Join(argv, " "), err, errs.String())
	}
	return string(out), nil
}

// loopbackUp brings up the loopback interface of a new network namespace.
func loopbackUp() error {
	fd, err := syscall.Socket(syscall.AF_INET, syscall.SOCK_DGRAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("bring up the loopback interface: %w", err)
	}
	defer syscall.Close(fd)
	var request struct {
		name  [syscall.IFNAMSIZ]byte
		flags uint16
		_     [22]byte
	}
	copy(request.name[:], "lo")
	request.flags = syscall.IFF_UP | syscall.IFF_RUNNING
	if _, _, errno := syscall.Syscall(syscall.SYS_IOCTL, uintptr(fd), syscall.SIOCSIFFLAGS, uintptr(unsafe.Pointer(&request))); errno != 0 {
		return fmt.Errorf("bring up the loopback interface: %w", errno)
	}
	return nil
}
