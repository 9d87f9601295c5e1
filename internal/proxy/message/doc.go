// Package message has HTTP messages as the codecs, the upstream and the handler
// of the proxy hand them to each other: heads as views of the bytes that came,
// the syntax that every head must keep whatever protocol brought it, and the
// exchange of one request for its answer.
//
// A view lives as long as its message: until the exchange ends, or until the
// next message is read into the same buffer. What is to be kept is cloned. The
// package reads and writes no bytes of a connection itself; h1 and h2 do.
package message
