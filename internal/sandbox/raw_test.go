package sandbox

import (
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// disturb ignores SIGHUP and blocks SIGUSR1, as if whoever started this program
// had done so.
func disturb() error {
	act, mask := [8]uintptr{1}, uint64(1)<<(unix.SIGUSR1-1)
	if _, _, errno := syscall.RawSyscall6(unix.SYS_RT_SIGACTION, uintptr(unix.SIGHUP), uintptr(unsafe.Pointer(&act)), 0, 8, 0, 0); errno != 0 {
		return errno
	}
	_, _, errno := syscall.RawSyscall6(unix.SYS_RT_SIGPROCMASK, unix.SIG_BLOCK, uintptr(unsafe.Pointer(&mask)), 0, 8, 0, 0)
	return asError(errno)
}
