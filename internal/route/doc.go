// Package route decides which app a request is for. A Pattern is a route as the
// operator writes it, checked and normalised; a Table finds the best pattern for
// a host and a path.
//
// Precedence: an exact host before any wildcard, a longer wildcard suffix before
// a shorter one, a longer path before a shorter one, an exact path before a
// prefix of the same length. A host whose patterns do not take the path leaves
// the request to the next wildcard. The outcome depends on the patterns alone,
// never on their order.
//
// A path is compared as its raw bytes, undecoded and without its query: percent
// escapes match only themselves. Whether a host or a request is well formed is
// for the caller; a host this package cannot read matches nothing.
package route
