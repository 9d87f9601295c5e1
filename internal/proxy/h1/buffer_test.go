package h1

import "testing"

func TestBuffersHaveTheRoomThatWasAskedFor(t *testing.T) {
	for _, n := range []int{0, 1, SmallBuffer, SmallBuffer + 1, OutBuffer, HeadBuffer, CopyBuffer, MaxResponseHead, MaxResponseHead + 1} {
		b := Get(n)
		if len(b.B) < n {
			t.Errorf("%d bytes, want %d", len(b.B), n)
		}
		b.B = b.B[:0]
		Put(b)
	}
}

func TestABufferCannotBeGivenBackTwice(t *testing.T) {
	b := Get(1)
	Put(b)
	defer func() {
		if recover() == nil {
			t.Error("it was")
		}
	}()
	Put(b)
}
