//go:build poison

package h2

// poison spoils memory that goes back to its pool, so that a view kept too long
// shows in the tests.
func poison(b []byte) {
	b = b[:cap(b)]
	for i := range b {
		b[i] = 0xDB
	}
}
