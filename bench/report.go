package main

import (
	"fmt"
	"io"
	"math"
	"slices"
	"strings"
)

// reference is what ratios are to.
const reference = "nginx"

// median of nothing is NaN.
func median(of []float64) float64 {
	if len(of) == 0 {
		return math.NaN()
	}
	of = slices.Sorted(slices.Values(of))
	middle := len(of) / 2
	if len(of)%2 == 1 {
		return of[middle]
	}
	return (of[middle-1] + of[middle]) / 2
}

// table answers questions about the rows.
type table []row

// of are the rows of a target, one for each round.
func (t table) of(v view, w, target string) (found []row) {
	for _, r := range t {
		if r.View == v && r.Workload == w && r.Target == target {
			found = append(found, r)
		}
	}
	return found
}

// failed: a row that went wrong takes its workload with it.
func (t table) failed(v view, w, target string) bool {
	return slices.ContainsFunc(t.of(v, w, target), func(r row) bool { return !r.good() })
}

func cpuOf(r *row) float64 { return r.CPU }
func rpsOf(r *row) float64 { return r.RPS }
func p99Of(r *row) float64 { return r.P99 }
func pssOf(r *row) float64 { return float64(r.PSS) / 1024 }
func keepOf(r *row) float64 {
	return r.Conn
}

// each is what was measured in every round.
func (t table) each(v view, w, target string, what func(*row) float64) (all []float64) {
	for _, r := range t.of(v, w, target) {
		all = append(all, what(&r))
	}
	return all
}

// ratios are a target's figures to those of another in the same round.
func (t table) ratios(v view, w, target, to string, what func(*row) float64) (all []float64) {
	for _, r := range t.of(v, w, target) {
		for _, ref := range t.of(v, w, to) {
			if ref.Round == r.Round && r.good() && ref.good() && what(&ref) > 0 {
				all = append(all, what(&r)/what(&ref))
			}
		}
	}
	return all
}

// report prints the tables, in Markdown, and returns what failed and which bars
// were not reached.
func report(out io.Writer, o *options, rows []row) (failed, missed []string) {
	t := table(rows)
	for _, v := range o.views {
		title, what, less := "processor time for each request, the proxy on a core of its own", cpuOf, true
		if v == rpsView {
			title, what, less = "requests a second, all on the same two cores", rpsOf, false
		}
		fmt.Fprintf(out, "\n%s; ratio to %s, median of the rounds (lowest–highest)\n\n", title, reference)
		heading(out, o.targets, "workload", "reach", "aim")
		for _, w := range o.workloads {
			if w.idle {
				continue
			}
			goal := w.cpu
			if v == rpsView {
				goal = w.rps
			}
			fmt.Fprintf(out, "| %s |", w.title)
			for _, target := range o.targets {
				if t.failed(v, w.name, target) {
					failed = append(failed, fmt.Sprintf("%s %s %s", v, w.name, target))
					fmt.Fprint(out, " FAILED |")
					continue
				}
				all := t.ratios(v, w.name, target, reference, what)
				ratio := median(all)
				fmt.Fprintf(out, " %s |", spread(all))
				if target == "tako" && (less && ratio > goal.reach || !less && ratio < goal.reach) {
					missed = append(missed, fmt.Sprintf("%s %s: %.2f, to reach %.2f", v, w.name, ratio, goal.reach))
				}
			}
			sign := "≥"
			if less {
				sign = "≤"
			}
			fmt.Fprintf(out, " %s %.2f | %s %.2f |\n", sign, goal.reach, sign, goal.aim)
		}
		t.absolute(out, o, v, what)
	}
	failed, missed = t.more(out, o, failed, missed)
	return failed, missed
}

func heading(out io.Writer, targets []string, first string, more ...string) {
	names := append(append([]string{first}, targets...), more...)
	fmt.Fprintf(out, "| %s |\n|%s\n", strings.Join(names, " | "), strings.Repeat("---|", len(names)))
}

// figure prints one number, if there is one.
func figure(format string, of float64) string {
	if math.IsNaN(of) {
		return "–"
	}
	return fmt.Sprintf(format, of)
}

// spread is a median and its range.
func spread(all []float64) string {
	switch {
	case len(all) == 0:
		return "–"
	case len(all) == 1:
		return fmt.Sprintf("%.2f", all[0])
	}
	return fmt.Sprintf("%.2f (%.2f–%.2f)", median(all), slices.Min(all), slices.Max(all))
}

// absolute is for whoever reads along: figures of this machine and hour.
func (t table) absolute(out io.Writer, o *options, v view, what func(*row) float64) {
	unit := "µs"
	if v == rpsView {
		unit = "req/s"
	}
	fmt.Fprintf(out, "\nmedian, and best round, in %s:", unit)
	for _, w := range o.workloads {
		if w.idle {
			continue
		}
		var texts []string
		for _, target := range o.targets {
			all := t.each(v, w.name, target, what)
			if len(all) == 0 {
				continue
			}
			best := slices.Max(all)
			if v == cpuView {
				best = slices.Min(all)
			}
			texts = append(texts, fmt.Sprintf("%s %.4g, %.4g", target, median(all), best))
		}
		fmt.Fprintf(out, " %s: %s.", w.name, strings.Join(texts, "; "))
	}
	fmt.Fprintln(out)
}

// more is what is not a ratio of the two views: latency and memory with many
// connections, many hosts against one, Caddy.
func (t table) more(out io.Writer, o *options, failed, missed []string) ([]string, []string) {
	has := func(name string) bool {
		return slices.ContainsFunc(o.workloads, func(w workload) bool { return w.name == name })
	}
	first := true
	line := func(name string, value func(target string) string, goal string) {
		if first {
			first = false
			fmt.Fprint(out, "\nmemory (PSS of all processes) and the rest\n\n")
			heading(out, o.targets, "", "reach")
		}
		fmt.Fprintf(out, "| %s |", name)
		for _, target := range o.targets {
			fmt.Fprintf(out, " %s |", value(target))
		}
		fmt.Fprintf(out, " %s |\n", goal)
	}
	for _, w := range o.workloads {
		switch {
		case w.idle:
			line("KiB for "+w.title, func(target string) string {
				if t.failed(memView, w.name, target) {
					failed = append(failed, fmt.Sprintf("%s %s %s", memView, w.name, target))
					return "FAILED"
				}
				kib := median(t.each(memView, w.name, target, keepOf))
				if target == "tako" && kib > w.memory.reach {
					missed = append(missed, fmt.Sprintf("%s: %.1f KiB, to reach %.0f", w.name, kib, w.memory.reach))
				}
				return figure("%.1f", kib)
			}, fmt.Sprintf("≤ %.0f", w.memory.reach))
		case w.alone:
			v := o.views[len(o.views)-1]
			line(fmt.Sprintf("MiB with %d active TLS connections", w.conns(o)), func(target string) string {
				mib := median(t.each(v, w.name, target, pssOf))
				if target == "tako" && mib > w.memory.reach {
					missed = append(missed, fmt.Sprintf("%s: %.0f MiB, to reach %.0f", w.name, mib, w.memory.reach))
				}
				return figure("%.0f", mib)
			}, fmt.Sprintf("≤ %.0f", w.memory.reach))
			line("their p99, ratio to "+reference, func(target string) string {
				return spread(t.ratios(v, w.name, target, reference, p99Of))
			}, "≤ 1.2")
		}
	}
	for _, w := range []string{"hosts", "hosts-one"} {
		if has("h1") && has(w) && slices.Contains(o.views, cpuView) {
			line("processor time of "+w+", ratio to its own of h1", func(target string) string {
				return figure("%.2f", median(t.each(cpuView, w, target, cpuOf))/median(t.each(cpuView, "h1", target, cpuOf)))
			}, "≤ 1.05")
		}
	}
	if slices.Contains(o.targets, "caddy") && slices.Contains(o.views, cpuView) {
		for _, w := range []struct {
			name string
			goal string
		}{{"h1", "≤ 0.25"}, {"h1-tls", "≤ 0.25"}, {"h2", "≤ 0.17"}} {
			if has(w.name) {
				line("processor time of "+w.name+", ratio to caddy", func(target string) string {
					return spread(t.ratios(cpuView, w.name, target, "caddy", cpuOf))
				}, w.goal)
			}
		}
	}
	return failed, missed
}
