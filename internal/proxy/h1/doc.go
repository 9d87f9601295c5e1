// Package h1 is HTTP/1.1 (RFC 9112), strict: what is not a message is refused
// and never repaired, and what is passed on is written anew from its parsed
// parts. It has the codec, of requests and answers alike, and the server that
// turns a client's connection into exchanges.
//
// Heads are views of pooled buffers and are valid as long as their exchange. With
// the build tag poison a buffer is filled with 0xDB when it goes back to its
// pool, so that a view kept too long shows in the tests.
//
// The server answers a connection by tasks of an event loop (package eventloop), or,
// where there are no loops, by one goroutine. It has no timer for any: a sweep over
// all of them keeps the limits, and tells a handler of a client that has gone. A
// connection that waits for its next request holds no buffer. An answer that is not
// whole never looks as if it were.
//
// Routes, apps, trust and what an answer says are the handler's matter.
package h1
