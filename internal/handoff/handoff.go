// Package handoff carries a process over into the next image of its program: the
// same PID, the same descriptors, and its state in a sealed memfd.
//
//	old image                                   new image (same PID)
//	  |  Save(state)                              .
//	  |  Exec: descriptors kept open over exec,   .
//	  |        SIGHUP ignored, execve ----------> |  signal.Notify(SIGHUP), first of all
//	  |                                           |  Load(&state): TAKO_STATE_FD is unset,
//	  |                                           |        every descriptor close-on-exec again
//	  |  if execve fails Exec returns,            |  goes on, or Execs back into the old
//	  |  and nothing has changed                  |        program that its state carries
//
// A signal that arrives between execve and the first signal.Notify would end a Go
// program, and a blocked one is unblocked too early by the runtime: being ignored
// is what survives, so Exec ignores SIGHUP. A wish to stop must not be ignored: in
// that moment SIGTERM ends the program, as it would without a handler. What the
// state says, and which descriptors it names, is the caller's matter.
package handoff

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"tako/internal/ipc"
)

// Env names the descriptor of the state to the new image. It is the only thing
// that travels in the environment.
const Env = "TAKO_STATE_FD"

// MaxState bounds the state, in bytes.
const MaxState = 256 << 20

const seals = unix.F_SEAL_SEAL | unix.F_SEAL_SHRINK | unix.F_SEAL_GROW | unix.F_SEAL_WRITE

// Save writes state as JSON to a memfd that can never change again. The caller
// closes it.
func Save(state any) (ipc.FD, error) {
	b, err := json.Marshal(state)
	if err == nil {
		b, err = stamped(b)
	}
	if err != nil {
		return 0, fmt.Errorf("save state: %w", err)
	}
	if len(b) > MaxState {
		return 0, fmt.Errorf("save state: %d bytes, the limit is %d", len(b), MaxState)
	}
	fd, err := unix.MemfdCreate("tako-state", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		return 0, fmt.Errorf("save state: %w", err)
	}
	for len(b) > 0 {
		n, err := unix.Write(fd, b)
		if err != nil && !errors.Is(err, unix.EINTR) {
			ipc.FD(fd).Close()
			return 0, fmt.Errorf("save state: %w", err)
		}
		b = b[max(n, 0):]
	}
	if _, err := unix.FcntlInt(uintptr(fd), unix.F_ADD_SEALS, seals); err != nil {
		ipc.FD(fd).Close()
		return 0, fmt.Errorf("save state: %w", err)
	}
	return ipc.FD(fd), nil
}

// Read fills state, a pointer, from a memfd that Save made, which stays open. The
// times in it are as far from now as they were, whatever the clock was set to since
// or will be: they have the monotonic clock of this process.
func Read(fd ipc.FD, state any) error {
	got, err := unix.FcntlInt(uintptr(fd), unix.F_GET_SEALS, 0)
	if err != nil || got&seals != seals {
		return fmt.Errorf("read state: descriptor %d is not a sealed memfd", fd)
	}
	var st unix.Stat_t
	if err := unix.Fstat(int(fd), &st); err != nil {
		return fmt.Errorf("read state: %w", err)
	}
	if st.Size <= 0 || st.Size > MaxState {
		return fmt.Errorf("read state: %d bytes, the limit is %d", st.Size, MaxState)
	}
	b := make([]byte, st.Size)
	for off := 0; off < len(b); {
		n, err := unix.Pread(int(fd), b[off:], int64(off))
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil || n == 0 {
			return fmt.Errorf("read state: it ends after %d bytes of %d (%w)", off, len(b), err)
		}
		off += n
	}
	if err := json.Unmarshal(b, state); err != nil {
		return fmt.Errorf("read state: %w", err)
	}
	now := clockNow()
	anchor(state, now.Wall, jumped(b, now))
	return nil
}

// Load fills state if an older image handed one over; ok is false if this is an
// ordinary start. The memfd is closed and the environment forgets it.
func Load(state any) (ok bool, err error) {
	text, ok := os.LookupEnv(Env)
	if !ok {
		return false, nil
	}
	_ = os.Unsetenv(Env)
	n, err := strconv.Atoi(text)
	if err != nil || n < 3 {
		return false, fmt.Errorf("%s=%q is not a descriptor: it is for tako's own use", Env, text)
	}
	fd := ipc.FD(n)
	unix.CloseOnExec(n)
	defer fd.Close()
	if err := Read(fd, state); err != nil {
		return false, err
	}
	return true, nil
}

// Take makes a descriptor of a state ours: it must be open, and is close-on-exec
// from here on.
func Take(fd ipc.FD) error {
	if fd < 3 {
		return fmt.Errorf("descriptor %d cannot have been handed over", fd)
	}
	if _, err := unix.FcntlInt(uintptr(fd), unix.F_SETFD, unix.FD_CLOEXEC); err != nil {
		return fmt.Errorf("descriptor %d was handed over but is not open: %w", fd, err)
	}
	return nil
}

// Exec becomes the program behind the descriptor, with the state and the
// descriptors in keep. It returns only if that fails, or if last, which it calls
// as the last thing before, returns an error. Everything is as before then, but
// that SIGHUP is ignored.
func Exec(program ipc.FD, argv []string, state ipc.FD, keep []ipc.FD, last func() error) error {
	env := make([]string, 0, len(os.Environ())+1)
	for _, e := range os.Environ() {
		if !strings.HasPrefix(e, Env+"=") {
			env = append(env, e)
		}
	}
	env = append(env, Env+"="+strconv.Itoa(int(state)))

	// No child may be started between here and the exec: it would inherit all.
	syscall.ForkLock.Lock()
	defer syscall.ForkLock.Unlock()
	kept := append([]ipc.FD{state}, keep...)
	for i, fd := range kept {
		if _, err := unix.FcntlInt(uintptr(fd), unix.F_SETFD, 0); err != nil {
			for _, done := range kept[:i] {
				unix.CloseOnExec(int(done))
			}
			return fmt.Errorf("keep descriptor %d: %w", fd, err)
		}
	}
	signal.Ignore(syscall.SIGHUP)
	err := last()
	if err == nil {
		err = syscall.Exec("/proc/self/fd/"+strconv.Itoa(int(program)), argv, env)
	}
	for _, fd := range kept {
		unix.CloseOnExec(int(fd))
	}
	return fmt.Errorf("execute the new image: %w", err)
}
