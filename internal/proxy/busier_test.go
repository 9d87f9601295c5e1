package proxy

import (
	"testing"
	"time"
)

// Loops become busy by more than BusyTurns a second, and stay so until they have
// half of that.
func TestLoopsAreBusyUntilTheyTurnHalfAsOften(t *testing.T) {
	const most = BusyTurns * int64(TrafficEvery) / int64(time.Second)
	busy := false
	for n, step := range []struct {
		turns      int64
		news, busy bool
	}{
		{0, false, false},
		{most/2 + 1, false, false},
		{most, false, false},
		{most + 1, true, true},
		{most + 1, false, true},
		{most, false, true},
		{most/2 + 1, false, true},
		{most / 2, true, false},
		{most, false, false},
		{10 * most, true, true},
		{0, true, false},
		{0, false, false},
	} {
		if news := busier(&busy, step.turns); news != step.news || busy != step.busy {
			t.Errorf("step %d, %d turns: news %t, busy %t; want %t, %t", n, step.turns, news, busy, step.news, step.busy)
		}
	}
}
