package h1

import "sync"

// The sizes of pooled buffers.
const (
	SmallBuffer = 4 << 10  // for a head as it usually is
	OutBuffer   = 16 << 10 // for what goes out at once
	HeadBuffer  = 32 << 10 // for the longest head of a request
	CopyBuffer  = 64 << 10 // for copying bodies
)

// A Buffer is memory of a pool. Its owner is whoever got it, until Put.
type Buffer struct {
	// B has the length of the buffer's size; the owner may shorten it, not replace it.
	B    []byte
	free bool
}

var buffers = [...]struct {
	size int
	pool sync.Pool
}{{size: SmallBuffer}, {size: OutBuffer}, {size: HeadBuffer}, {size: CopyBuffer}, {size: MaxResponseHead}}

// Get returns a buffer of the smallest size that has n bytes. What is in it is
// anything. One beyond MaxResponseHead is of no pool.
func Get(n int) *Buffer {
	for i := range buffers {
		class := &buffers[i]
		if n > class.size {
			continue
		}
		b, ok := class.pool.Get().(*Buffer)
		if !ok {
			b = &Buffer{B: make([]byte, class.size)}
		}
		b.free = false
		b.B = b.B[:class.size]
		return b
	}
	return &Buffer{B: make([]byte, n)}
}

// Put gives b back. No view of it may be used after.
func Put(b *Buffer) {
	if b.free {
		panic("h1: a buffer was given back twice")
	}
	b.free = true
	b.B = b.B[:cap(b.B)]
	poison(b.B)
	for i := range buffers {
		if class := &buffers[i]; len(b.B) == class.size {
			class.pool.Put(b)
			return
		}
	}
}
