package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"time"
)

// settle is how long a proxy gets to come to rest before its memory is read.
const settle = 3 * time.Second

// A row is one measurement.
type row struct {
	View     view   `json:"view"`
	Workload string `json:"workload"`
	Target   string `json:"target"`
	Round    int    `json:"round"`
	result
	RPS    float64 `json:"rps"`
	CPU    float64 `json:"cpu_us"` // of the proxy's processes for each answer
	User   float64 `json:"user_us"`
	System float64 `json:"system_us"`
	// PSS is of the proxy's processes, in KiB, under load; Conn what an idle
	// connection adds.
	PSS  int     `json:"pss_kib"`
	Conn float64 `json:"kib_per_connection,omitempty"`
}

// good: the row says something.
func (r *row) good() bool { return r.Errors == 0 && (r.N > 0 || r.Conn > 0) }

// bench is one run.
type bench struct {
	o    *options
	self string // this program, where the apps' users may start it
	dir  string
	cpus []int
	out  io.Writer
	open uint64
	rows []row
}

// processors are those of the proxies, and those of load and apps.
func (b *bench) processors(v view) (proxy, rest []int) {
	two := b.cpus[:min(2, len(b.cpus))]
	if v == cpuView && len(two) == 2 {
		return two[1:], two[:1]
	}
	return two, two
}

// run measures all that was asked for.
func (b *bench) run(ctx context.Context) error {
	var together, hosts, alone, idle []workload
	for _, w := range b.o.workloads {
		switch {
		case w.idle:
			idle = append(idle, w)
		case w.alone:
			alone = append(alone, w)
		case w.hosts:
			hosts = append(hosts, w)
		default:
			together = append(together, w)
		}
	}
	for _, v := range b.o.views {
		for _, group := range []struct {
			hosts int
			of    []workload
		}{{0, together}, {b.o.hosts, hosts}} {
			if len(group.of) > 0 {
				if err := b.together(ctx, v, group.hosts, group.of); err != nil {
					return err
				}
			}
		}
		if err := b.alone(ctx, v, alone, b.o.rounds); err != nil {
			return err
		}
	}
	return b.alone(ctx, memView, idle, 1)
}

// order is that of a round: every second one is reversed, so that what changes
// with time changes for everybody.
func order(round int, titles []string) []string {
	titles = slices.Clone(titles)
	if round%2 == 1 {
		slices.Reverse(titles)
	}
	return titles
}

// together measures with all proxies alive, one after another in each round.
func (b *bench) together(ctx context.Context, v view, hosts int, of []workload) (err error) {
	targets, stop, err := b.stage(v, hosts, b.o.targets)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, stop()) }()
	for round := range b.o.rounds {
		for i := range of {
			for _, title := range order(round, b.o.targets) {
				if err := b.measure(ctx, v, round, &of[i], targets[title]); err != nil {
					return err
				}
			}
		}
	}
	return nil
}

// alone measures with one proxy alive at a time, fresh for each workload: idle
// connections of the others would use up the ports, and memory would be of what
// was before.
func (b *bench) alone(ctx context.Context, v view, of []workload, rounds int) error {
	for round := range rounds {
		for i := range of {
			for _, title := range order(round, b.o.targets) {
				targets, stop, err := b.stage(v, 0, []string{title})
				if err == nil {
					err = b.measure(ctx, v, round, &of[i], targets[title])
					err = errors.Join(err, stop())
				}
				if err != nil {
					return err
				}
			}
		}
	}
	return nil
}

// stage starts proxies, and first a tako, whose apps they all speak to.
func (b *bench) stage(v view, hosts int, titles []string) (targets map[string]target, stop func() error, err error) {
	proxies, rest := b.processors(v)
	s := &scene{dir: b.dir, cpus: proxies, hosts: hosts, openMost: b.open, inFlight: b.o.inFlight}
	targets = make(map[string]target)
	stop = func() (err error) {
		for _, t := range targets {
			err = errors.Join(err, t.stop())
		}
		return err
	}
	titles = slices.Clone(titles)
	slices.SortStableFunc(titles, func(a, b string) int { return isTako(b) - isTako(a) })
	if isTako(titles[0]) == 0 {
		titles = append([]string{"tako"}, titles...) // for its apps alone
	}
	for _, title := range slices.Backward(titles) { // the first tako last: its apps are the scene's
		if isTako(title) == 1 {
			if targets[title], err = startTako(s, title, b.self, rest); err != nil {
				delete(targets, title)
				return nil, nil, errors.Join(err, stop())
			}
		}
	}
	for _, title := range titles {
		if isTako(title) == 0 {
			if targets[title], err = startPeer(s, title); err != nil {
				delete(targets, title)
				return nil, nil, errors.Join(err, stop())
			}
		}
	}
	return targets, stop, nil
}

func isTako(title string) int {
	if title == "tako" || strings.HasPrefix(title, "tako=") {
		return 1
	}
	return 0
}

// measure makes one row. That a proxy answers wrongly is in the row; what is
// returned is trouble of our own, or that ctx has ended.
func (b *bench) measure(ctx context.Context, v view, round int, w *workload, t target) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	r := row{View: v, Workload: w.name, Target: t.name(), Round: round}
	if err := b.fill(&r, w, t); err != nil {
		r.Errors++
		r.FirstError = err.Error()
	}
	b.rows = append(b.rows, r)
	fmt.Fprintf(b.out, "%-6s %d %-9s %-8s", v, round, w.name, t.name())
	if w.idle {
		fmt.Fprintf(b.out, "%8.1f KiB a connection", r.Conn)
	} else {
		fmt.Fprintf(b.out, "%8.0f req/s %8.1f µs  p99 %7.1f ms  %4d MiB", r.RPS, r.CPU, r.P99, r.PSS>>10)
	}
	if r.Errors > 0 {
		fmt.Fprintf(b.out, "  %d errors: %s", r.Errors, r.FirstError)
	}
	fmt.Fprintln(b.out)
	return nil
}

// fill runs the load.
func (b *bench) fill(r *row, w *workload, t target) error {
	_, rest := b.processors(r.View)
	pids := t.processes()
	before, err := memory(pids)
	if err != nil {
		return err
	}
	c, err := b.startLoad(w, t, rest)
	if err != nil {
		return err
	}
	defer c.stop()
	if w.idle {
		time.Sleep(settle)
		if r.PSS, err = memory(pids); err == nil {
			r.Conn = float64(r.PSS-before) / float64(w.conns(b.o))
		}
		return err
	}
	began, err := spent(pids)
	if err != nil {
		return err
	}
	if err := c.begin(); err != nil {
		return err
	}
	time.Sleep(b.o.each * 7 / 10)
	if r.PSS, err = memory(pids); err != nil {
		return err
	}
	if r.result, err = c.result(); err != nil {
		return err
	}
	ended, err := spent(pids)
	if err != nil {
		return err
	}
	used, n := ended.minus(began), float64(max(r.N, 1))
	r.RPS = float64(r.N) / r.Seconds
	r.User, r.System = used.user/n*1e6, used.system/n*1e6
	r.CPU = r.User + r.System
	return nil
}

// loader is a running load.
type loader struct {
	*child
	stdin, stdout *os.File
	lines         *bufio.Reader
}

// startLoad starts a load and returns when its connections are open.
func (b *bench) startLoad(w *workload, t target, on []int) (*loader, error) {
	theirIn, in, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer theirIn.Close()
	out, theirOut, err := os.Pipe()
	if err != nil {
		return nil, errors.Join(err, in.Close())
	}
	defer theirOut.Close()
	l := &loader{stdin: in, stdout: out, lines: bufio.NewReader(out)}
	if l.child, err = start(b.dir, on, theirIn, theirOut, b.self, w.args(b.o, t)...); err != nil {
		return nil, errors.Join(err, in.Close(), out.Close())
	}
	if err := out.SetReadDeadline(time.Now().Add(w.longest(b.o))); err != nil {
		l.stop()
		return nil, err
	}
	if line, err := l.lines.ReadString('\n'); err != nil || line != "ready\n" {
		err := errors.Join(err, fmt.Errorf("the load does not begin: %s", l.log()))
		l.stop()
		return nil, err
	}
	return l, nil
}

func (l *loader) begin() error {
	_, err := l.stdin.WriteString("go\n")
	return err
}

func (l *loader) result() (r result, err error) {
	line, err := l.lines.ReadBytes('\n')
	if err != nil {
		return r, fmt.Errorf("the load ended early: %w: %s", err, l.log())
	}
	return r, json.Unmarshal(line, &r)
}

// stop ends the load, if it has not ended.
func (l *loader) stop() {
	l.stdin.Close()
	l.child.stop()
	l.stdout.Close()
}
