// Package h2 is the server's side of HTTP/2 (RFC 9113): one goroutine reads a
// connection's frames, each stream has a worker, and whoever has something to
// send leaves it in one buffer, which another worker writes for all. It has the
// streams, their windows, limits and budgets, and writes its own frames and field
// blocks; only to decode a block is golang.org/x/net's matter. WebSockets come by
// extended CONNECT (RFC 8441). Priorities are ignored, nothing is pushed.
//
// A request keeps the same rules as one of HTTP/1.1 before a handler sees it, and
// the last byte of a body with a content-length is handed out only when the body
// has ended with it: what is malformed never looks whole to an app. A slow client
// holds up its own streams, and a slow handler its own body; what waits to be
// written to a connection, and what was read and is not wanted yet, is bounded.
//
// With the build tag poison memory is filled with 0xDB when it goes back to its
// pool, so that a view kept too long shows in the tests.
//
// Listening, TLS, routes and what an answer says are for others.
package h2
