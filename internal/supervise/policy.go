package supervise

import (
	"math/rand/v2"
	"time"
)

// The numbers of Policy.
const (
	Healthy     = 60 * time.Second       // of service, after which earlier ends are forgotten
	CrashBurst  = 20                     // crashes that are answered at once; more are a loop
	CrashForget = 3 * time.Second        // of service, which makes up for one crash
	CrashDelay  = 100 * time.Millisecond // before the next start in a loop; then doubled
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

	crashes int // that nothing has made up for
	unready int // in a row, but for crashes between them
}

// Next takes note of an ending after so much time of service (since it was
// ready) and returns the delay before the next start. Crashes are answered at
// once, up to CrashBurst of them: what crashed once will mostly do well again,
// and somebody waits for it. Beyond, it is a loop, with delays that double until
// service makes up for it. A child that was never ready will hardly be so a moment
// later: its delays are longer. To be asked to end is no failure.
func (p *Policy) Next(how Ending, served time.Duration) time.Duration {
	switch {
	case how == NeverReady:
	case served >= Healthy:
		p.crashes, p.unready = 0, 0
	default:
		p.crashes = max(p.crashes-int(served/CrashForget), 0)
	}
	switch how {
	case Stopped:
		return 0
	case Crashed:
		p.crashes++
		if p.crashes <= CrashBurst {
			return 0
		}
		return p.jitter(double(CrashDelay, p.crashes-CrashBurst-1, CrashMax))
	case NeverReady:
		p.unready++
		return p.jitter(double(UnreadyWait, p.unready-1, UnreadyMax))
	}
	panic("supervise: unknown ending")
}

// Failures returns the number of failures that still count, for people.
func (p *Policy) Failures() int { return p.crashes + p.unready }

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
