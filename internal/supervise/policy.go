package supervise

import (
	"math/rand/v2"
	"time"
)

// The numbers of Policy.
const (
	Healthy     = 60 * time.Second       // of service, after which earlier ends are forgotten
	CrashDelay  = 100 * time.Millisecond // before the second start in a row; then doubled
	CrashMax    = 10 * time.Second
	UnreadyWait = 1 * time.Second // after a child that was never ready; then doubled
	UnreadyMax  = 60 * time.Second
	Jitter      = 0.2 // of a delay, to either side
)

// Ending is how a child's life ended.
type Ending uint8

// The endings.
const (
	NeverReady Ending = iota // it ended, or was given up, before it was ready
	Crashed                  // it had been ready, and was not asked to end
	Stopped                  // it was asked to end
)

func (e Ending) String() string {
	switch e {
	case NeverReady:
		return "never ready"
	case Crashed:
		return "crashed"
	case Stopped:
		return "stopped"
	}
	return "unknown"
}

// Policy decides how long to wait before a child of one role is started again.
// It has no clock and starts nothing. The zero value is ready; one goroutine uses
// it.
type Policy struct {
	// Rand returns numbers in [0, 1) for the jitter; nil for the usual ones.
	Rand func() float64

	failures int // in a row
}

// Next takes note of an ending after so much time of service (since it was
// ready) and returns the delay before the next start. The first crash in a row
// is answered at once; the delays of the following ones double. A child that was
// never ready will hardly be so a moment later: its delays are longer. To be
// asked to end is no failure.
func (p *Policy) Next(how Ending, served time.Duration) time.Duration {
	if how != NeverReady && served >= Healthy {
		p.failures = 0
	}
	n := p.failures
	switch how {
	case Stopped:
		return 0
	case Crashed:
		p.failures++
		if n == 0 {
			return 0
		}
		return p.jitter(double(CrashDelay, n-1, CrashMax))
	case NeverReady:
		p.failures++
		return p.jitter(double(UnreadyWait, n, UnreadyMax))
	}
	panic("supervise: unknown ending")
}

// Failures returns the number of failures in a row, for people.
func (p *Policy) Failures() int { return p.failures }

func double(d time.Duration, times int, most time.Duration) time.Duration {
	for ; times > 0 && d < most; times-- {
		d *= 2
	}
	return min(d, most)
}

func (p *Policy) jitter(d time.Duration) time.Duration {
	random := p.Rand
	if random == nil {
		random = rand.Float64
	}
	return time.Duration(float64(d) * (1 - Jitter + 2*Jitter*random()))
}
