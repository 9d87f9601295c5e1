package ctl

import (
	"fmt"
	"testing"
	"time"

	"tako/internal/management"
)

func logLineAt(at time.Time, text string) management.LogLine {
	return management.LogLine{Time: at.UTC().Format(time.RFC3339Nano), Instance: 1, Stream: "stdout", Text: text}
}

// TestLinesAskedForAgainAreShownOnce: of the old lines that come again, those that
// were shown are old, and so is what came before the first of them.
func TestLinesAskedForAgainAreShownOnce(t *testing.T) {
	start := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	var lines []management.LogLine
	for i := range 3 * followOverlap {
		lines = append(lines, logLineAt(start.Add(time.Duration(i)*time.Millisecond), fmt.Sprintf("line %d", i)))
	}
	s := newShown()
	if s.old(lines[0]) {
		t.Error("a line is old before any was shown")
	}
	from, to := followOverlap/2, 2*followOverlap // more than is remembered
	for _, l := range lines[from:to] {
		s.add(l)
	}
	for i, l := range lines[to-followOverlap/2:] {
		if got, want := s.old(l), i < followOverlap/2; got != want {
			t.Fatalf("%s: old is %v", l.Text, got)
		}
	}
	if !s.old(lines[0]) || !s.old(lines[from]) {
		t.Error("a line from before what is remembered is not old")
	}
	late := logLineAt(start.Add(time.Duration(to-1)*time.Millisecond-followSlack/10), "of another instance")
	if s.old(late) {
		t.Error("a line that was not shown is old, for its clock is a little behind")
	}
	if len(s.seen) != followOverlap {
		t.Errorf("%d lines are remembered, want %d", len(s.seen), followOverlap)
	}
}
