// Package upstream is the way to one instance of an app: HTTP/1.1 over a pool of
// connections of its own, or HTTP/2 without TLS. It writes a request from its
// parsed fields and nothing else, frames its body itself, and hands the answer
// over as it arrives, as views of the bytes that came.
//
// A connection of HTTP/1.1 goes back to its pool only if request and answer were
// exchanged whole and nothing is left over, and before it is used again it is looked
// at: if anything has come since, or its end, another one is taken. So an answer is
// never another request's, but for one thing that nobody can tell from outside: what
// an instance sends unasked in the instant between that look and its answer counts as
// the answer. A request is sent a second time only on a connection that had been
// used before, that died without a byte of answer, and only if the method may be
// repeated and nothing of the body was read that cannot be read again. An exchange
// on a connection that was used before allocates nothing, and its goroutine,
// or its task on an event loop, parks once. How a connection is made is the caller's matter, and so is which fields an
// app may see.
package upstream
