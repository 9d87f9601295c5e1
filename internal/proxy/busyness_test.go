package proxy

import (
	"slices"
	"testing"
	"time"

	"tako/internal/proxy/eventloop"
)

// Loops are busy from a rush on, and stay so while they turn half as often.
func TestLoopsHoldTheirPlacesWhileTheyAreBusy(t *testing.T) {
	g := group(t, 1)
	var told []bool
	b := busyness{loops: g, tell: func(is bool) {
		told = append(told, is)
	}}
	b.look()
	b.rushes()
	b.rushes()
	if want := []bool{true}; !slices.Equal(told, want) || !b.busy {
		t.Errorf("after a rush: told %v, busy %t", told, b.busy)
	}
	b.look() // it has been so for a moment only
	if !b.busy {
		t.Error("not busy at the first look after a rush")
	}
	const least = eventloop.BusyTurns * int64(TrafficEvery) / int64(time.Second) / 2
	b.turns = g.Turns() - least
	if b.look(); !b.busy {
		t.Errorf("not busy with %d turns", least)
	}
	b.turns = g.Turns() - least + 1
	if b.look(); b.busy {
		t.Errorf("busy with %d turns", least-1)
	}
	b.look()
	b.rushes()
	if want := []bool{true, false, true}; !slices.Equal(told, want) {
		t.Errorf("told %v, want %v", told, want)
	}
	b.loops.Hold(false)
}
