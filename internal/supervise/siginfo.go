package supervise

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// siginfo is the kernel's siginfo_t as waitid fills it in, on 64-bit machines.
type siginfo struct {
	signo, errno, code, _ int32
	pid                   int32
	_                     [108]byte
}

// raw is the same memory as the type that unix.Waitid takes.
func (s *siginfo) raw() *unix.Siginfo { return (*unix.Siginfo)(unsafe.Pointer(s)) }

// The two have one size.
var (
	_ [unsafe.Sizeof(siginfo{}) - unsafe.Sizeof(unix.Siginfo{})]byte
	_ [unsafe.Sizeof(unix.Siginfo{}) - unsafe.Sizeof(siginfo{})]byte
)
