package message

import "time"

// Limits are those of connections with clients, whatever protocol they speak. A
// server's copy never changes while it serves.
type Limits struct {
	// Head bounds the time from a request's first byte, or from the connection's
	// beginning, to the end of its head; with TLS the handshake has as much before.
	Head time.Duration
	// Keep is how long a connection may wait for its next request.
	Keep time.Duration
	// Body bounds each wait for a piece of a request's body.
	Body time.Duration
	// BodyRate is the least number of bytes a second of a request's body, on average
	// since it began, once Body has passed.
	BodyRate int
	// Write bounds each write to a client that does not read.
	Write time.Duration
	// DrainBytes bounds what is read, and thrown away, of a body that nobody wanted, so
	// that the connection can be used again.
	DrainBytes int64
	// Linger is how long a connection that ends is still read, its bytes thrown away, so
	// that what was sent last is not lost in a reset: each wait for more bytes, and all
	// of it unless LingerBody goes for it.
	Linger time.Duration
	// LingerBody bounds that where the client is still sending a body that nobody wanted:
	// many clients read their answer only after it.
	LingerBody time.Duration
	// HalfOpen is how long an exchange goes on whose client has ended its own half
	// of the connection: it may wait for its answer, or may have gone.
	HalfOpen time.Duration
	// Streams bounds the requests at once on one connection of HTTP/2.
	Streams uint32
}

// DefaultLimits are those that a proxy runs with.
func DefaultLimits() Limits {
	return Limits{
		Head: 10 * time.Second, Keep: 120 * time.Second, Body: 60 * time.Second, BodyRate: 512, Write: 60 * time.Second,
		DrainBytes: 256 << 10, Linger: time.Second, LingerBody: 10 * time.Second, HalfOpen: 10 * time.Second, Streams: 100,
	}
}
