// Package upstream speaks HTTP/1.1 with one instance of an app, over a pool of
// connections of its own. It writes a request from its parsed fields and nothing
// else, frames its body itself, and hands the answer over as it arrives.
//
// A connection goes back to the pool only if request and answer were exchanged
// whole and nothing is left over; so an answer can never be another request's. A
// request is sent a second time only on a connection that had been used before,
// that died without a byte of answer, and only if the method may be repeated and
// nothing of the body was read. How a connection is made is the caller's matter,
// and so is which headers an app may see.
package upstream
