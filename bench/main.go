// Bench compares tako with nginx, HAProxy and Caddy on this machine, in one run:
// the real programs with deployed apps, every proxy with the same certificate,
// settings and apps, one short measurement after another, in turn. It prints
// ratios; docs/PERFORMANCE.md says what they mean. Everything is on the loopback
// address, has an end, and is ended by its pid.
//
// The same program is the app that they all speak to (bench app), and the load
// (bench load). Every byte of every answer is compared: one that is wrong fails its row.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"tako/internal/takotest"
)

// options come from the flags.
type options struct {
	targets   []string
	workloads []workload
	views     []view
	rounds    int
	each      time.Duration
	hosts     int
	conns     int
	inFlight  int
	json      string
	rows      []string
}

// The bounds of the options.
const (
	mostRounds  = 100
	mostSeconds = 60
	mostHosts   = 20_000
	mostConns   = 15_000
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := run(ctx, os.Args[1:], os.Stdin, os.Stdout)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string, in io.Reader, out io.Writer) error {
	open := limitFiles()
	if len(args) > 0 {
		switch args[0] {
		case "app":
			return runApp(args[1:])
		case "load":
			return runLoad(args[1:], in, out)
		}
	}
	o, err := parse(args)
	if errors.Is(err, flag.ErrHelp) {
		return nil
	}
	if err != nil {
		return err
	}
	if o.rows != nil {
		rows, err := readRows(o.rows)
		if err != nil {
			return err
		}
		return verdict(out, o, rows)
	}
	if need := uint64(2*o.conns + 1000); open < need && slices.ContainsFunc(o.workloads, func(w workload) bool { return w.alone }) { //nolint:gosec // bounded above
		return fmt.Errorf("%d connections need a limit of %d open files, it is %d: raise it (ulimit -n), or ask for fewer with --conns", o.conns, need, open)
	}
	if err := install(ctx, o.targets, out); err != nil {
		return err
	}
	b := &bench{o: o, out: out, open: open}
	if b.cpus, err = cpus(); err != nil {
		return err
	}
	if b.dir, err = takotest.TempDir(); err != nil {
		return err
	}
	defer os.RemoveAll(b.dir)
	defer takotest.Clean()
	if b.self, err = copySelf(b.dir); err != nil {
		return err
	}
	began := time.Now()
	about(ctx, out, b.cpus, o.targets)
	err = b.run(ctx)
	if o.json != "" {
		text, bad := json.MarshalIndent(b.rows, "", " ")
		err = errors.Join(err, bad, os.WriteFile(o.json, append(text, '\n'), 0o644)) //nolint:gosec // for everybody
	}
	if err != nil {
		return err
	}
	fmt.Fprintf(out, "\n%d measurements in %s\n", len(b.rows), time.Since(began).Round(time.Second))
	return verdict(out, o, b.rows)
}

// verdict prints the tables. Wrong answers are an error; a bar that is not
// reached is only said.
func verdict(out io.Writer, o *options, rows []row) error {
	failed, missed := report(out, o, rows)
	fmt.Fprintln(out)
	for _, m := range missed {
		fmt.Fprintln(out, "not reached:", m)
	}
	if len(failed) > 0 {
		return fmt.Errorf("failed, with wrong answers or none: %s", strings.Join(failed, "; "))
	}
	return nil
}

// readRows reads what --json wrote. The rounds of the second file come after
// those of the first.
func readRows(files []string) (all []row, err error) {
	for _, name := range files {
		text, err := os.ReadFile(name)
		if err != nil {
			return nil, err
		}
		var rows []row
		if err := json.Unmarshal(text, &rows); err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
		from := 0
		for _, r := range all {
			from = max(from, r.Round+1)
		}
		for _, r := range rows {
			r.Round += from
			all = append(all, r)
		}
	}
	return all, nil
}

// parse reads the flags.
func parse(args []string) (*options, error) {
	o := new(options)
	flags := flag.NewFlagSet("bench", flag.ContinueOnError)
	targets := flags.String("targets", "nginx,tako,haproxy,caddy", "proxies, in this order; tako=DIR is one of the programs in a folder")
	names := flags.String("workloads", "all", "rows: "+strings.Join(namesOf(workloads), ", "))
	views := flags.String("views", "cpu,rps", "cpu, rps or both")
	quick := flags.Bool("quick", false, "nginx and tako alone, for two minutes at most: 2 rounds of 1 s, without the rows that start proxies anew")
	seconds := flags.Float64("seconds", 3, "of one measurement")
	flags.IntVar(&o.rounds, "rounds", 3, "every second one in reversed order")
	flags.IntVar(&o.hosts, "hosts", 10_000, "of the row hosts")
	flags.IntVar(&o.conns, "conns", 5_000, "connections of the rows conns, idle and idle-tls")
	flags.IntVar(&o.inFlight, "in-flight", 0, "limits.in_flight of tako's apps (default: what tako does by itself)")
	rows := flags.String("rows", "", "measure nothing: print the tables of these files of --json, one after another in time")
	flags.StringVar(&o.json, "json", "", "file for all measurements")
	if err := flags.Parse(args); err != nil {
		return nil, err
	}
	given := make(map[string]bool)
	flags.Visit(func(f *flag.Flag) { given[f.Name] = true })
	if *quick {
		for name, value := range map[string]string{"targets": "nginx,tako", "rounds": "2", "seconds": "1", "workloads": "h1,h1-unix,h1-tls,h2,handshake,resume,big,big-tls"} {
			if !given[name] {
				if err := flags.Set(name, value); err != nil {
					return nil, err
				}
			}
		}
	}
	var faults []error
	fault := func(format string, args ...any) { faults = append(faults, fmt.Errorf(format, args...)) }
	if flags.NArg() > 0 {
		fault("unexpected argument %q", flags.Arg(0))
	}
	for target := range strings.SplitSeq(*targets, ",") {
		if _, known := peers[target]; !known && isTako(target) == 0 || slices.Contains(o.targets, target) {
			fault("--targets: %q is none of nginx, haproxy, caddy, tako, tako=DIR, or there twice", target)
		}
		o.targets = append(o.targets, target)
	}
	for name := range strings.SplitSeq(*names, ",") {
		i := slices.IndexFunc(workloads, func(w workload) bool { return w.name == name })
		switch {
		case name == "all":
			o.workloads = append(o.workloads, workloads...)
		case i < 0:
			fault("--workloads: there is no %q", name)
		default:
			o.workloads = append(o.workloads, workloads[i])
		}
	}
	for v := range strings.SplitSeq(*views, ",") {
		if v := view(v); v == cpuView || v == rpsView {
			o.views = append(o.views, v)
		} else {
			fault("--views: %q is neither cpu nor rps", v)
		}
	}
	if *rows != "" {
		o.rows = strings.Split(*rows, ",")
	}
	if o.rounds < 1 || o.rounds > mostRounds {
		fault("--rounds: %d is not from 1 to %d", o.rounds, mostRounds)
	}
	if *seconds < 0.1 || *seconds > mostSeconds {
		fault("--seconds: %g is not from 0.1 to %d", *seconds, mostSeconds)
	}
	o.each = time.Duration(*seconds * float64(time.Second))
	if o.hosts < 1 || o.hosts > mostHosts {
		fault("--hosts: %d is not from 1 to %d", o.hosts, mostHosts)
	}
	if o.inFlight < 0 || o.inFlight > 65_536 {
		fault("--in-flight: %d is not from 0 to 65536", o.inFlight)
	}
	if o.conns < 1 || o.conns > mostConns {
		fault("--conns: %d is not from 1 to %d", o.conns, mostConns)
	}
	return o, errors.Join(faults...)
}

func namesOf(all []workload) (names []string) {
	for _, w := range all {
		names = append(names, w.name)
	}
	return names
}

// install gets what is missing from Debian, as root, without letting it serve:
// Debian starts servers that it installs.
func install(ctx context.Context, targets []string, out io.Writer) error {
	var missing []string
	for _, target := range targets {
		if r, ok := peers[target]; ok {
			if _, err := find(r.version[0]); err != nil {
				missing = append(missing, r.pkg)
			}
		}
	}
	if len(missing) == 0 {
		return nil
	}
	hint := fmt.Errorf("missing: %s; on Debian: apt-get install %s; or leave them out with --targets", strings.Join(missing, ", "), strings.Join(missing, " "))
	apt, err := find("apt-get")
	if err != nil || os.Geteuid() != 0 {
		return hint
	}
	fmt.Fprintln(out, "installing", strings.Join(missing, ", "))
	steps := [][]string{{apt, "update", "-q"}, append([]string{apt, "install", "-qy", "--no-install-recommends"}, missing...)}
	if systemctl, err := find("systemctl"); err == nil {
		steps = append(steps, append([]string{systemctl, "disable", "--now"}, missing...))
	}
	for i, argv := range steps {
		cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
		cmd.Env = append(os.Environ(), "DEBIAN_FRONTEND=noninteractive", "RUNLEVEL=1")
		if said, err := cmd.CombinedOutput(); err != nil && i < 2 { // without systemd nothing was started
			return fmt.Errorf("%w\n%s: %w\n%s", hint, strings.Join(argv, " "), err, said)
		}
	}
	return nil
}

// copySelf puts this program where any user may start it.
func copySelf(dir string) (string, error) {
	self, err := os.Executable()
	if err != nil {
		return "", err
	}
	text, err := os.ReadFile(self)
	if err != nil {
		return "", err
	}
	to := filepath.Join(dir, "bench")
	return to, os.WriteFile(to, text, 0o755) //nolint:gosec // a program
}

// about says what is compared, and where.
func about(ctx context.Context, out io.Writer, cpus []int, targets []string) {
	var kernel syscall.Utsname
	_ = syscall.Uname(&kernel) // an empty release then
	release := make([]byte, 0, len(kernel.Release))
	for _, c := range kernel.Release {
		if c != 0 {
			release = append(release, byte(c))
		}
	}
	model := "unknown processor"
	if text, err := os.ReadFile("/proc/cpuinfo"); err == nil {
		for line := range strings.Lines(string(text)) {
			if name, value, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(name) == "model name" {
				model = strings.TrimSpace(value)
				break
			}
		}
	}
	load, _ := os.ReadFile("/proc/loadavg") // none is known then
	first, _, _ := strings.Cut(string(load), " ")
	fmt.Fprintf(out, "%s UTC, %s, %d processors, Linux %s, load %s\n", time.Now().UTC().Format("2006-01-02 15:04"), model, len(cpus), release, first)
	if len(cpus) < 2 {
		fmt.Fprintln(out, "one processor alone: the cpu view is not what it says")
	}
	for _, target := range targets {
		r, ok := peers[target]
		if !ok {
			continue
		}
		program, err := find(r.version[0])
		if err != nil {
			continue
		}
		said, _ := exec.CommandContext(ctx, program, r.version[1:]...).CombinedOutput() // no version then
		line, _, _ := strings.Cut(strings.TrimSpace(string(said)), "\n")
		fmt.Fprintf(out, "%s: %s\n", target, line)
	}
}
