//go:build poison

package h1

import (
	"bytes"
	"testing"
)

func TestWhatGoesBackToAPoolIsSpoilt(t *testing.T) {
	b := Get(10)
	view := b.B[:5]
	copy(view, "hello")
	Put(b)
	if !bytes.Equal(view, []byte{0xDB, 0xDB, 0xDB, 0xDB, 0xDB}) {
		t.Errorf("a view that was kept: %q", view)
	}
}
