package h2

import "sync"

// block is a piece of a request's body between the reader of the connection and
// that of the body.
type block struct {
	b    []byte // what came, from off on; its capacity is fixed
	off  int
	next *block
}

// The sizes of blocks.
const (
	smallBlock = 2 << 10
	largeBlock = 16 << 10
)

var smallBlocks, largeBlocks sync.Pool

func newBlock(n int) *block {
	pool, size := &largeBlocks, largeBlock
	if n <= smallBlock {
		pool, size = &smallBlocks, smallBlock
	}
	b, ok := pool.Get().(*block)
	if !ok {
		b = &block{b: make([]byte, 0, size)}
	}
	return b
}

func (b *block) free() {
	poison(b.b)
	b.b, b.off, b.next = b.b[:0], 0, nil
	if cap(b.b) == smallBlock {
		smallBlocks.Put(b)
	} else {
		largeBlocks.Put(b)
	}
}

// queue is a body as far as it came and was not read.
type queue struct {
	first, last *block
	n           int
}

func (q *queue) push(p []byte) {
	for len(p) > 0 {
		if q.last == nil || len(q.last.b) == cap(q.last.b) {
			n := len(p)
			if q.last != nil {
				n = largeBlock // it is no small body
			}
			b := newBlock(n)
			if q.last == nil {
				q.first = b
			} else {
				q.last.next = b
			}
			q.last = b
		}
		b := q.last
		n := min(len(p), cap(b.b)-len(b.b))
		b.b = append(b.b, p[:n]...)
		p = p[n:]
		q.n += n
	}
}

// pop moves what fits to p.
func (q *queue) pop(p []byte) (n int) {
	for len(p) > 0 && q.first != nil {
		b := q.first
		k := copy(p, b.b[b.off:])
		b.off += k
		p = p[k:]
		n += k
		if b.off == len(b.b) {
			if q.first = b.next; q.first == nil {
				q.last = nil
			}
			b.free()
		}
	}
	q.n -= n
	return n
}

func (q *queue) free() {
	for q.first != nil {
		b := q.first
		q.first = b.next
		b.free()
	}
	*q = queue{}
}

// frames is memory for frames that are to be written.
type frames struct{ b []byte }

const (
	firstFrames = 4 << 10   // the room that it begins with
	maxFrames   = 256 << 10 // more does not go back to the pool
)

var framesPool = sync.Pool{New: func() any { return &frames{b: make([]byte, 0, firstFrames)} }}

func newFrames() *frames { return framesPool.Get().(*frames) }

func (f *frames) free() {
	poison(f.b)
	if f.b = f.b[:0]; cap(f.b) <= maxFrames {
		framesPool.Put(f)
	}
}

// readBuffer is the room for reading frames of a connection that is busy.
type readBuffer [readSize]byte

const readSize = 32 << 10

var readBuffers = sync.Pool{New: func() any { return new(readBuffer) }}
