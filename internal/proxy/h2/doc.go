// Package h2 is the server's side of HTTP/2 (RFC 9113): one goroutine reads a
// connection's frames, each stream has a worker, and whoever has something to
// send writes for all who have. Frames and HPACK are golang.org/x/net's; the
// streams, their windows, limits and budgets are its own. A request keeps the
// same rules as one of HTTP/1.1 before a handler sees it.
package h2
