package supervise

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"
)

// beat runs a heartbeat against a peer and returns when it was found late, as
// the time since the start, or 0 when ctx ended first. peer gets each id and the
// channel to answer in.
func beat(t *testing.T, most time.Duration, peer func(id uint64, pongs chan<- uint64) error) (late time.Duration) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), most)
	defer cancel()
	start := time.Now()
	pongs := make(chan uint64, 8)
	Heartbeat(ctx, HeartbeatInterval, HeartbeatMissed, func(id uint64) error { return peer(id, pongs) }, pongs, func() {
		if late != 0 {
			t.Error("late was called twice")
		}
		late = time.Since(start)
	})
	synctest.Wait()
	return late
}

func TestPeerThatAnswersIsNeverLate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var last uint64
		late := beat(t, time.Hour, func(id uint64, pongs chan<- uint64) error {
			if id != last+1 {
				t.Errorf("ping %d after %d", id, last)
			}
			last = id
			time.AfterFunc(1900*time.Millisecond, func() { pongs <- id })
			return nil
		})
		if late != 0 || last < 1799 {
			t.Errorf("late after %s, %d pings in an hour", late, last)
		}
	})
}

func TestSilentPeerIsLateAfterThreePings(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		late := beat(t, time.Hour, func(id uint64, pongs chan<- uint64) error {
			if id <= 5 {
				pongs <- id
			}
			return nil
		})
		// The sixth goes out after 10 s; 6, 7 and 8 stay unanswered.
		if late != 16*time.Second {
			t.Errorf("late after %s, want 16 s", late)
		}
	})
}

func TestPeerThatMissesTwoIsForgiven(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		if late := beat(t, time.Hour, func(id uint64, pongs chan<- uint64) error {
			if id%3 == 0 {
				pongs <- id
			}
			return nil
		}); late != 0 {
			t.Errorf("late after %s", late)
		}
	})
}

func TestPongForThePastOrFutureDoesNotCount(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		if late := beat(t, time.Hour, func(id uint64, pongs chan<- uint64) error {
			pongs <- id + 1000
			pongs <- 0
			return nil
		}); late != 6*time.Second {
			t.Errorf("late after %s, want 6 s", late)
		}
	})
}

func TestSendThatFailsIsLate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		if late := beat(t, time.Hour, func(uint64, chan<- uint64) error {
			time.Sleep(5 * time.Second)
			return errors.New("does not read")
		}); late != 5*time.Second {
			t.Errorf("late after %s, want 5 s", late)
		}
	})
}
