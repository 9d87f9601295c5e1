package ctl

import (
	"context"
	"errors"
	"time"

	"tako/internal/management"
	"tako/internal/tako"
)

// The numbers of a follow that goes on after the server ended it, as a reload does.
const (
	followWait    = 10 * time.Second // for a server that is not there
	followPause   = 200 * time.Millisecond
	followOverlap = 1000            // old lines that are asked for again
	followSlack   = 5 * time.Second // by which lines may be out of order
)

// A shown remembers the newest lines that were shown, so that none of them is shown
// again and none between is missed.
type shown struct {
	ring  [followOverlap]management.LogLine
	times [followOverlap]time.Time
	n     int
	seen  map[management.LogLine]bool
}

func newShown() *shown { return &shown{seen: make(map[management.LogLine]bool)} }

func (s *shown) add(l management.LogLine) {
	i := s.n % followOverlap
	if s.n >= followOverlap {
		delete(s.seen, s.ring[i])
	}
	s.ring[i], s.times[i] = l, lineTime(l)
	s.seen[l] = true
	s.n++
}

// lineTime is the zero time for a line that has none.
func lineTime(l management.LogLine) time.Time {
	t, _ := time.Parse(time.RFC3339Nano, l.Time)
	return t
}

// old reports whether an old line that was asked for again was shown, or comes from
// before what was.
func (s *shown) old(l management.LogLine) bool {
	if s.n == 0 {
		return false
	}
	oldest := s.times[0]
	if s.n > followOverlap {
		oldest = s.times[s.n%followOverlap]
	}
	floor := s.times[(s.n-1)%followOverlap].Add(-followSlack)
	if floor.Before(oldest) {
		floor = oldest
	}
	return s.seen[l] || lineTime(l).Before(floor)
}

// follow shows an app's lines for ever. When the server ends that, as it does in a
// reload, or goes and comes back within followWait, it goes on.
func (r *run) follow(ctx context.Context, s *conn, req management.LogsRequest) error {
	var cannotShow error
	before, began := newShown(), time.Now()
	show := func(l management.LogLine) error {
		before.add(l)
		cannotShow = r.logLine(l)
		return cannotShow
	}
	err := s.Logs(ctx, req, show)
	for lost := time.Now(); ctx.Err() == nil; {
		if err == nil {
			lost = time.Now()
		}
		if _, told := errors.AsType[*tako.Error](err); told || cannotShow != nil || time.Since(lost) > followWait {
			return err
		}
		select {
		case <-time.After(followPause):
		case <-ctx.Done():
			return nil
		}
		err = r.with(ctx, func(ctx context.Context, s *conn) error {
			again, n, known := req, 0, before.n == 0
			again.Lines = followOverlap
			return s.Logs(ctx, again, func(l management.LogLine) error {
				lost = time.Now()
				if n++; n <= followOverlap && (before.old(l) || before.n == 0 && lineTime(l).Before(began)) {
					known = true
					return nil
				}
				if n == followOverlap && !known {
					r.step("more lines came meanwhile than are shown: see the log files")
				}
				return show(l)
			})
		})
	}
	return nil
}
