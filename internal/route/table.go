package route

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strings"
)

// Entry is a pattern and what it leads to.
type Entry[V any] struct {
	Pattern
	Value V
}

// Table finds the best entry for a request. It never changes once built, so any
// number of goroutines may use it, and an atomic pointer to it can be swapped. A
// nil Table and the zero Table have no entries.
type Table[V any] struct {
	// Each list is one host's entries, best first. Lists are shared with tables
	// made by With and never changed. Wild has the hosts of wildcards, without
	// their "*.".
	exact map[string][]Entry[V]
	wild  map[string][]Entry[V]
	n     int
}

// Build makes a Table of entries in any order. It is an error if one has the
// zero Pattern, or if two have the same one.
func Build[V any](entries []Entry[V]) (*Table[V], error) {
	return (*Table[V])(nil).With(nil, entries)
}

// With returns a Table with the entries of t whose values remove does not ask to
// take away, and those of add. t stays as it is. A nil remove keeps all. The
// errors are Build's.
func (t *Table[V]) With(remove func(V) bool, add []Entry[V]) (*Table[V], error) {
	next := &Table[V]{}
	if t != nil {
		next.n = t.n
		next.exact, next.wild = maps.Clone(t.exact), maps.Clone(t.wild)
	}
	if remove != nil {
		next.n -= drop(next.exact, remove) + drop(next.wild, remove)
	}
	if len(add) == 0 {
		return next, nil
	}
	if next.exact == nil {
		next.exact = make(map[string][]Entry[V])
	}
	if next.wild == nil {
		next.wild = make(map[string][]Entry[V])
	}
	// Lists in fresh are ours to append to; all others are shared.
	fresh := make(map[string]bool, len(add))
	for _, e := range add {
		if e.Pattern == (Pattern{}) {
			return nil, fmt.Errorf("build the route table: an entry has no pattern")
		}
		hosts, host := next.place(e.Pattern)
		if !fresh[e.host] {
			fresh[e.host] = true
			hosts[host] = slices.Clip(hosts[host])
		}
		hosts[host] = append(hosts[host], e)
		next.n++
	}
	for _, e := range add {
		if !fresh[e.host] {
			continue // sorted before
		}
		fresh[e.host] = false
		hosts, host := next.place(e.Pattern)
		list := hosts[host]
		slices.SortFunc(list, func(a, b Entry[V]) int { return better(a.Pattern, b.Pattern) })
		for i := 1; i < len(list); i++ {
			if list[i].Pattern == list[i-1].Pattern {
				return nil, fmt.Errorf("build the route table: two entries have the pattern %s", list[i].Pattern)
			}
		}
	}
	return next, nil
}

// place returns the map that p's host belongs to, and its key there.
func (t *Table[V]) place(p Pattern) (hosts map[string][]Entry[V], host string) {
	if suffix, ok := strings.CutPrefix(p.host, "*."); ok {
		return t.wild, suffix
	}
	return t.exact, p.host
}

// drop takes the entries whose values remove asks for out of hosts, without
// touching a list, and returns how many they were.
func drop[V any](hosts map[string][]Entry[V], remove func(V) bool) int {
	dropped := 0
	for host, list := range hosts {
		if !slices.ContainsFunc(list, func(e Entry[V]) bool { return remove(e.Value) }) {
			continue
		}
		kept := make([]Entry[V], 0, len(list))
		for _, e := range list {
			if !remove(e.Value) {
				kept = append(kept, e)
			}
		}
		dropped += len(list) - len(kept)
		if len(kept) == 0 {
			delete(hosts, host)
		} else {
			hosts[host] = kept
		}
	}
	return dropped
}

// better orders patterns of one host, the first to try first.
func better(a, b Pattern) int {
	if c := cmp.Compare(len(b.Literal()), len(a.Literal())); c != 0 {
		return c
	}
	if a.IsPrefix() != b.IsPrefix() {
		if a.IsPrefix() {
			return 1
		}
		return -1
	}
	return cmp.Compare(a.path, b.path)
}

// Len returns the number of entries.
func (t *Table[V]) Len() int {
	if t == nil {
		return 0
	}
	return t.n
}

// Match returns the best entry for a request. Host is as the request has it, in
// any case, with or without a port and one trailing dot; a host with an empty
// label or with a byte that no name has, an IPv6 address among them, matches
// nothing. Path is the raw path without the query; one that does not begin with
// a slash, as that of OPTIONS *, counts as "/". It does not allocate or block.
func (t *Table[V]) Match(host, path string) (V, Pattern, bool) {
	var none V
	if t == nil {
		return none, Pattern{}, false
	}
	var buf [MaxHost]byte
	n, ok := fold(&buf, host)
	if !ok {
		return none, Pattern{}, false
	}
	if path == "" || path[0] != '/' {
		path = "/"
	}
	// Slashes after a path mean nothing to an exact path. "/" becomes "".
	trimmed := strings.TrimRight(path, "/")
	if e := find(t.exact[string(buf[:n])], path, trimmed); e != nil {
		return e.Value, e.Pattern, true
	}
	if len(t.wild) == 0 {
		return none, Pattern{}, false
	}
	for i := range n {
		if buf[i] != '.' {
			continue
		}
		if e := find(t.wild[string(buf[i+1:n])], path, trimmed); e != nil {
			return e.Value, e.Pattern, true
		}
	}
	return none, Pattern{}, false
}

// find returns the first entry of list that takes the path, or nil.
func find[V any](list []Entry[V], path, trimmed string) *Entry[V] {
	for i := range list {
		if list[i].takes(path, trimmed) {
			return &list[i]
		}
	}
	return nil
}

// takes reports whether p's path is one for path, which is trimmed with any
// slashes after it.
func (p Pattern) takes(path, trimmed string) bool {
	switch literal := p.Literal(); {
	case !p.IsPrefix():
		return trimmed == strings.TrimSuffix(literal, "/")
	case len(path) == len(literal):
		return path == literal
	default:
		return len(path) > len(literal) && path[len(literal)] == '/' && path[:len(literal)] == literal
	}
}

// fold writes the name in host to buf, in lower case and without port and
// trailing dot, and returns its length. ok is false if it cannot be a name that
// a pattern has.
func fold(buf *[MaxHost]byte, host string) (n int, ok bool) {
	if i := strings.IndexByte(host, ':'); i >= 0 {
		for j := i + 1; j < len(host); j++ {
			if host[j] < '0' || host[j] > '9' {
				return 0, false
			}
		}
		host = host[:i]
	}
	host = strings.TrimSuffix(host, ".")
	if host == "" || len(host) > len(buf) || host[len(host)-1] == '.' {
		return 0, false
	}
	before := byte('.')
	for i := range len(host) {
		c := host[i]
		switch {
		case c >= 'A' && c <= 'Z':
			c += 'a' - 'A'
		case c >= 'a' && c <= 'z', c >= '0' && c <= '9', c == '-', c == '_':
		case c == '.' && before != '.':
		default:
			return 0, false
		}
		buf[i] = c
		before = c
	}
	return len(host), true
}
