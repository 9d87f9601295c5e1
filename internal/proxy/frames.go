package proxy

import "encoding/binary"

// frames follows the frames of one direction of a WebSocket, so that one of ours
// can stand between two of them. The zero value is before the first one.
type frames struct {
	head   [10]byte // as far as it has come
	have   int      // bytes of it, 0 between frames
	left   uint64   // bytes that the frame still has, its masking key included
	within bool     // the head has come whole
	closed bool     // a Close frame has ended: nothing may follow
}

// closeGoingAway is a Close frame from a server, with status 1001.
var closeGoingAway = []byte{0x88, 0x02, 0x03, 0xe9}

const opcodeClose = 0x8

// between reports whether no frame is under way.
func (f *frames) between() bool { return f.have == 0 }

// follow takes the bytes that come next, and returns how many of them belong to
// frames that have ended, -1 if none ends in b.
func (f *frames) follow(b []byte) int {
	last := -1
	for n := 0; n < len(b); {
		if !f.within {
			f.head[f.have] = b[n]
			f.have++
			n++
			if !f.headEnds() {
				continue
			}
		}
		take := min(f.left, uint64(len(b)-n))
		n += int(take) //nolint:gosec // not more than len(b)
		if f.left -= take; f.left == 0 {
			f.closed = f.closed || f.head[0]&0xf == opcodeClose
			f.have, f.within = 0, false
			last = n
		}
	}
	return last
}

// headEnds reports whether the head is whole, and then knows what is left.
func (f *frames) headEnds() bool {
	if f.have < 2 {
		return false
	}
	size := f.head[1] & 0x7f
	switch {
	case size < 126 && f.have == 2:
		f.left = uint64(size)
	case size == 126 && f.have == 4:
		f.left = uint64(binary.BigEndian.Uint16(f.head[2:]))
	case size == 127 && f.have == 10:
		f.left = binary.BigEndian.Uint64(f.head[2:]) &^ (1 << 63)
	default:
		return false
	}
	if f.head[1]&0x80 != 0 {
		f.left += 4
	}
	f.within = true
	return true
}
