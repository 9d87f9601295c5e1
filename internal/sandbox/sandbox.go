// Package sandbox gives up power for good, and tries afterwards whether it is
// really gone. Enter does it for tako-proxy and tako-agent, first thing in their
// main; Exec for what tako-agent starts.
//
// User, groups and capabilities belong to a thread, and a Go program has many.
// So both drop them on one locked thread by raw calls and then execute: the new
// image begins with that thread alone, and all its threads are what it was.
//
// It promises that after Enter or Exec the process has exactly the user, groups
// and capabilities it was to have and no new privileges by any program; it does
// not decide whom to become. Filters that come after the drop have their place
// at the end of (drop).run, on the same thread, before the signal mask is reset:
// first Landlock (what files and ports may be reached), which needs no new
// privileges to be set, then seccomp (what may be asked of the kernel), which
// must come last since it forbids the calls made until then. Both are per thread
// too, and need nothing else once the image is executed.
package sandbox

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"strings"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// On 32-bit systems the calls below take 16-bit users and groups.
var _ [^uint(0)>>63 - 1]struct{}

// firstOwnFD is the first descriptor that does not survive Enter: before it
// stand standard input, output, error and the channel.
const firstOwnFD = 4

// SoftFiles is the soft limit of open files that Exec sets, if the hard limit
// allows: programs that still use select(2) break beyond it, and those that can
// use more raise it themselves.
const SoftFiles = 1024

// Enter is called first thing in main, before another goroutine runs and before
// os.Args is read. If the first argument is Identity.Arg it takes that identity
// on, executes the program again without it, verifies the outcome, and returns
// with os.Args as they would be without. Otherwise the user stays; with
// noNewPrivs the program is executed again once, unless the flag is set already.
// Descriptors from 4 on are then closed on the way.
//
// The process is called name from here on. An error means that powers may be
// left: exit.
func Enter(name string, noNewPrivs bool) error {
	setName(name)
	if len(os.Args) > 1 {
		if s, ok := strings.CutPrefix(os.Args[1], argAs); ok {
			id, err := parse(s)
			if err != nil {
				return err
			}
			return again(&id)
		}
		if s, ok := strings.CutPrefix(os.Args[1], argIs); ok {
			s, open := strings.CutSuffix(s, openBounds)
			id, err := parse(s)
			if err != nil {
				return err
			}
			os.Args = append(os.Args[:1], os.Args[2:]...)
			return verify(id, open)
		}
	}
	if noNewPrivs && !hasNoNewPrivs() {
		return again(nil)
	}
	return nil
}

// again executes this program once more as id, or as the same user when id is
// nil. It returns only if that fails.
func again(id *Identity) error {
	runtime.LockOSThread() // for good: the thread is of no other use
	args := os.Args
	if id == nil {
		if err := closeOnExec(firstOwnFD); err != nil {
			return err
		}
		if err := setNoNewPrivs(); err != nil {
			return err
		}
	} else {
		open, err := drop{id: id, firstFD: firstOwnFD}.run()
		if err != nil {
			return err
		}
		marker := argIs + id.text()
		if open {
			marker += openBounds
		}
		args = append([]string{os.Args[0], marker}, os.Args[2:]...)
	}
	if err := syscall.Exec("/proc/self/exe", args, os.Environ()); err != nil {
		return fmt.Errorf("execute %s again: %w", os.Args[0], err)
	}
	return nil
}

// drop is what is to be given up on a locked thread.
type drop struct {
	id      *Identity // nil: user and groups stay, all capabilities go
	firstFD uint      // descriptors from here on close on exec
}

// run drops, in the one order that works. It reports whether the bounding set
// had to be left open. After an error the thread must not go on.
func (d drop) run() (open bool, err error) {
	if err := closeOnExec(d.firstFD); err != nil {
		return false, err
	}
	keep := Identity{}
	if d.id != nil {
		keep = *d.id
		if err := keep.validate(); err != nil {
			return false, err
		}
	}
	if open, err = dropBounds(keep.keepSet()); err != nil {
		return false, err
	}
	if d.id != nil {
		if err := become(keep); err != nil {
			return false, err
		}
	}
	if err := setCaps(keep.Keep); err != nil {
		return false, err
	}
	if err := setNoNewPrivs(); err != nil {
		return false, err
	}
	// Landlock and seccomp: here.
	return open, resetSignals()
}

func closeOnExec(first uint) error {
	if err := unix.CloseRange(first, ^uint(0), unix.CLOSE_RANGE_CLOEXEC); err != nil {
		return fmt.Errorf("mark descriptors close-on-exec (this needs Linux 5.11): %w", err)
	}
	return nil
}

// dropBounds empties the bounding set but for keep. Without CAP_SETPCAP that is
// not allowed; no new privileges then makes the set meaningless.
func dropBounds(keep uint64) (open bool, err error) {
	for c := uintptr(0); c <= maxCap; c++ {
		has, err := prctl(unix.PR_CAPBSET_READ, c, 0)
		if errors.Is(err, unix.EINVAL) {
			return open, nil // one past the last
		}
		if err != nil {
			return false, fmt.Errorf("read the bounding set: %w", err)
		}
		if has == 0 || keep&(1<<c) != 0 {
			continue
		}
		_, err = prctl(unix.PR_CAPBSET_DROP, c, 0)
		if errors.Is(err, unix.EPERM) {
			open = true
		} else if err != nil {
			return false, fmt.Errorf("drop capability %d from the bounding set: %w", c, err)
		}
	}
	return open, nil
}

// become takes on user and groups of id on this thread alone.
func become(id Identity) error {
	if len(id.Keep) > 0 {
		if _, err := prctl(unix.PR_SET_KEEPCAPS, 1, 0); err != nil {
			return fmt.Errorf("keep capabilities: %w", err)
		}
	}
	if err := setGroups(id.Groups); err != nil {
		return fmt.Errorf("take on groups %v: %w", id.Groups, err)
	}
	if err := setRes(unix.SYS_SETRESGID, id.GID); err != nil {
		return fmt.Errorf("take on group %d: %w", id.GID, err)
	}
	if err := setRes(unix.SYS_SETRESUID, id.UID); err != nil {
		return fmt.Errorf("take on user %d: %w", id.UID, err)
	}
	return nil
}

// The calls of package syscall would change every thread; these change one.

func setGroups(groups []uint32) error {
	var p unsafe.Pointer
	if len(groups) > 0 {
		p = unsafe.Pointer(&groups[0])
	}
	_, _, errno := syscall.RawSyscall(unix.SYS_SETGROUPS, uintptr(len(groups)), uintptr(p), 0)
	return asError(errno)
}

func setRes(call uintptr, id uint32) error {
	_, _, errno := syscall.RawSyscall(call, uintptr(id), uintptr(id), uintptr(id))
	return asError(errno)
}

func prctl(option int, arg2, arg3 uintptr) (int, error) {
	r, _, errno := syscall.RawSyscall6(unix.SYS_PRCTL, uintptr(option), arg2, arg3, 0, 0, 0)
	return int(r), asError(errno)
}

func asError(errno syscall.Errno) error {
	if errno == 0 {
		return nil
	}
	return errno
}

// setCaps makes keep the effective, permitted, inheritable and ambient set.
func setCaps(keep []uintptr) error {
	var set uint64
	for _, c := range keep {
		set |= 1 << c
	}
	hdr := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	lo, hi := uint32(set), uint32(set>>32) // the two halves
	data := [2]unix.CapUserData{
		{Effective: lo, Permitted: lo, Inheritable: lo},
		{Effective: hi, Permitted: hi, Inheritable: hi},
	}
	if err := unix.Capset(&hdr, &data[0]); err != nil {
		return fmt.Errorf("keep capabilities %v and no other: %w", keep, err)
	}
	if _, err := prctl(unix.PR_CAP_AMBIENT, unix.PR_CAP_AMBIENT_CLEAR_ALL, 0); err != nil {
		return fmt.Errorf("empty the ambient set: %w", err)
	}
	for _, c := range keep {
		if _, err := prctl(unix.PR_CAP_AMBIENT, unix.PR_CAP_AMBIENT_RAISE, c); err != nil {
			return fmt.Errorf("pass on capability %d: %w", c, err)
		}
	}
	return nil
}

func setNoNewPrivs() error {
	if _, err := prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0); err != nil {
		return fmt.Errorf("set no new privileges: %w", err)
	}
	return nil
}

func hasNoNewPrivs() bool {
	n, err := prctl(unix.PR_GET_NO_NEW_PRIVS, 0, 0)
	return err == nil && n == 1
}

// resetSignals empties this thread's mask and makes ignored signals default
// again; what the runtime handles is reset by the exec itself.
func resetSignals() error {
	var none uint64
	if _, _, errno := syscall.RawSyscall6(unix.SYS_RT_SIGPROCMASK, unix.SIG_SETMASK, uintptr(unsafe.Pointer(&none)), 0, 8, 0, 0); errno != 0 {
		return fmt.Errorf("reset the signal mask: %w", errno)
	}
	const ignored = 1 // SIG_IGN
	for sig := uintptr(1); sig <= 64; sig++ {
		var now, deflt [8]uintptr // the kernel's sigaction: the handler comes first
		if _, _, errno := syscall.RawSyscall6(unix.SYS_RT_SIGACTION, sig, 0, uintptr(unsafe.Pointer(&now)), 8, 0, 0); errno != 0 || now[0] != ignored {
			continue
		}
		if _, _, errno := syscall.RawSyscall6(unix.SYS_RT_SIGACTION, sig, uintptr(unsafe.Pointer(&deflt)), 0, 8, 0, 0); errno != 0 {
			return fmt.Errorf("reset signal %d: %w", sig, errno)
		}
	}
	return nil
}

// setName names the process for people; a program executed by descriptor would
// be called by its number.
func setName(name string) {
	_ = os.WriteFile("/proc/self/comm", []byte(name), 0) // for people only
}
