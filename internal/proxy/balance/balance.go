// Package balance picks the upstream that a request goes to: the less busy of
// two taken at random. It decides on what it is given and keeps nothing; what an
// upstream is, and whether it may take requests at all, is the caller's matter.
package balance

// Upstream is what Pick has to know of an upstream.
type Upstream interface {
	comparable
	// InFlight is how many requests it has now.
	InFlight() int64
}

// Pick returns one of first, or of reserve if first has none, and false if both
// have none. It never returns not, which may be the zero value for no exception.
// Intn returns a random number from 0 to n-1.
func Pick[U Upstream](first, reserve []U, not U, intn func(n int) int) (U, bool) {
	if u, ok := pick(first, not, intn); ok {
		return u, true
	}
	return pick(reserve, not, intn)
}

func pick[U Upstream](from []U, not U, intn func(n int) int) (U, bool) {
	var none U
	if not != none {
		kept := make([]U, 0, len(from))
		for _, u := range from {
			if u != not {
				kept = append(kept, u)
			}
		}
		from = kept
	}
	switch len(from) {
	case 0:
		return none, false
	case 1:
		return from[0], true
	}
	i, j := intn(len(from)), intn(len(from)-1)
	if j >= i {
		j++ // two different ones, each pair as likely as any other
	}
	if from[j].InFlight() < from[i].InFlight() {
		return from[j], true
	}
	return from[i], true
}
