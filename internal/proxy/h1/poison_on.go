//go:build poison

package h1

// Poisoned reports whether buffers are spoilt when they go back to their pool.
const Poisoned = true

func poison(b []byte) {
	for i := range b {
		b[i] = 0xDB
	}
}
