package ctl

import (
	"fmt"
	"io"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"tako/internal/tako"
)

// clean makes text of others safe for a terminal: control characters become
// visible, tabs stay.
func clean(s string) string {
	if !strings.ContainsFunc(s, hostile) && utf8.ValidString(s) {
		return s
	}
	var b strings.Builder
	for _, c := range s {
		if hostile(c) {
			fmt.Fprintf(&b, `\x%02x`, c)
		} else {
			b.WriteRune(c)
		}
	}
	return b.String()
}

func hostile(c rune) bool {
	return unicode.IsControl(c) && c != '\t' || unicode.Is(unicode.Bidi_Control, c)
}

// A table aligns columns of text.
type table struct {
	head  []string
	rows  [][]string
	color func(cell string) (code string)
}

func (t *table) add(cells ...any) {
	row := make([]string, len(cells))
	for i, c := range cells {
		row[i] = clean(fmt.Sprint(c))
		if row[i] == "" {
			row[i] = "-"
		}
	}
	t.rows = append(t.rows, row)
}

func (t *table) write(w io.Writer) {
	width := make([]int, len(t.head))
	for _, row := range append([][]string{t.head}, t.rows...) {
		for i, cell := range row {
			width[i] = max(width[i], utf8.RuneCountInString(cell))
		}
	}
	for n, row := range append([][]string{t.head}, t.rows...) {
		var b strings.Builder
		for i, cell := range row {
			pad := strings.Repeat(" ", width[i]-utf8.RuneCountInString(cell)+2)
			if i == len(row)-1 {
				pad = ""
			}
			if t.color != nil && n > 0 {
				if code := t.color(cell); code != "" {
					cell = "\x1b[" + code + "m" + cell + "\x1b[0m"
				}
			}
			b.WriteString(cell + pad)
		}
		fmt.Fprintln(w, b.String())
	}
}

// table makes a table with these columns, in colour on a terminal.
func (r *run) table(head ...string) *table {
	t := &table{head: head}
	if r.colorful() {
		t.color = stateColor
	}
	return t
}

func (r *run) colorful() bool { return terminal(r.Stdout) && r.Getenv("NO_COLOR") == "" }

// state is a state word, in colour on a terminal.
func (r *run) state(s string) string {
	s = clean(s)
	if code := stateColor(s); code != "" && r.colorful() {
		return "\x1b[" + code + "m" + s + "\x1b[0m"
	}
	return s
}

// stateColor is the colour of a state word, "" for any other text.
func stateColor(s string) string {
	switch s {
	case string(tako.AppRunning), string(tako.InstanceHealthy):
		return "32"
	case string(tako.AppDeploying), string(tako.InstanceStarting), string(tako.InstanceReady), string(tako.InstanceDraining):
		return "33"
	case string(tako.AppError), string(tako.AppCrashLoop), string(tako.InstanceUnhealthy):
		return "31"
	case string(tako.AppIdle), string(tako.AppStopped):
		return "2"
	}
	return ""
}

// ago is a time in the past for people; "" for none.
func (r *run) ago(unix *int64) string {
	if unix == nil {
		return ""
	}
	return short(r.Now().Sub(time.Unix(*unix, 0))) + " ago"
}

// short is a duration in its largest unit.
func short(d time.Duration) string {
	switch d = max(d, 0); {
	case d < time.Minute:
		return fmt.Sprintf("%ds", d/time.Second)
	case d < time.Hour:
		return fmt.Sprintf("%dm", d/time.Minute)
	case d < 48*time.Hour:
		return fmt.Sprintf("%dh", d/time.Hour)
	}
	return fmt.Sprintf("%dd", d/(24*time.Hour))
}

func seconds(n uint64) string { return short(time.Duration(min(n, 1<<32)) * time.Second) }

// size is a number of bytes for people.
func size(n int64) string {
	const unit = 1024
	if n < unit {
		return fmt.Sprintf("%d B", n)
	}
	v, units := float64(n)/unit, "KMGT"
	for v >= unit && len(units) > 1 {
		v, units = v/unit, units[1:]
	}
	return fmt.Sprintf("%.1f %ciB", v, units[0])
}

func plural(n int, one string) string {
	if n == 1 {
		return "1 " + one
	}
	return fmt.Sprintf("%d %ss", n, one)
}
