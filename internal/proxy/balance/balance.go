// Package balance picks the upstream that a request goes to: the less busy of
// two taken at random, where one that is new stands back for a while. It decides
// on what it is given and keeps nothing; what an upstream is, and whether it may
// take requests at all, is the caller's matter.
package balance

// Whole is the Share of an upstream that is not new.
const Whole = 1000

// Upstream is what Pick has to know of an upstream.
type Upstream interface {
	comparable
	// InFlight is how many requests it has now.
	InFlight() int64
	// Share is how much it is to take of the requests that would be its, from 0 to
	// Whole.
	Share() int
}

// Pick returns one of from for which takes is true, and false if there is none.
// Only then, and when neither of the two taken at random would do, is each of
// from looked at. Draw returns a random number from 0 to n-1.
func Pick[U Upstream](from []U, takes func(U) bool, draw func(n int) int) (U, bool) {
	var none U
	switch len(from) {
	case 0:
		return none, false
	case 1:
		if takes(from[0]) {
			return from[0], true
		}
		return none, false
	}
	i, j := draw(len(from)), draw(len(from)-1)
	if j >= i {
		j++ // two different ones, each pair as likely as any other
	}
	a, b := from[i], from[j]
	switch ta, tb := takes(a), takes(b); {
	case ta && tb:
		return better(a, b, draw), true
	case ta:
		return a, true
	case tb:
		return b, true
	}
	best, found := none, false
	for _, u := range from {
		if takes(u) && (!found || u.InFlight() < best.InFlight()) {
			best, found = u, true
		}
	}
	return best, found
}

// better is the less busy one, but for the newer one standing back.
func better[U Upstream](a, b U, draw func(n int) int) U {
	sa, sb := a.Share(), b.Share()
	switch {
	case sa < sb && draw(Whole) >= sa:
		return b
	case sb < sa && draw(Whole) >= sb:
		return a
	case b.InFlight() < a.InFlight():
		return b
	}
	return a
}
