package sandbox

import (
	"errors"
	"fmt"
	"runtime"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// defaultPath is where programs are looked up when env has no PATH.
const defaultPath = "/usr/local/bin:/usr/bin:/bin"

// Exec becomes another program as id, without any capability that id does not
// keep: the second stage of what tako-agent starts. With no id the user stays
// and all capabilities go. It returns only if it fails, and the process is of no
// use then but to report that.
//
// In order: before (when not nil) runs with all powers, for what needs them;
// umask and the soft limit of open files are set; powers go; dir is entered;
// argv[0] is looked up in env's PATH unless it has a slash, and executed with
// default signal dispositions, an empty mask and descriptors 0 to 2 only. So dir
// and program must be the new user's to reach. A session of its own is for the
// parent's SysProcAttr.
func Exec(id *Identity, dir string, argv, env []string, umask int, before func() error) error {
	if len(argv) == 0 || argv[0] == "" {
		return errors.New("execute: no program given")
	}
	runtime.LockOSThread() // for good
	if before != nil {
		if err := before(); err != nil {
			return err
		}
	}
	unix.Umask(umask)
	// By package syscall: it then leaves the limit alone when it executes.
	var files syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &files); err != nil {
		return fmt.Errorf("limit open files: %w", err)
	}
	files.Cur = min(SoftFiles, files.Max)
	if err := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &files); err != nil {
		return fmt.Errorf("limit open files: %w", err)
	}
	if _, err := (drop{id: id, firstFD: 3}).run(); err != nil {
		return err
	}
	if err := unix.Chdir(dir); err != nil {
		return fmt.Errorf("enter folder %s: %w", dir, err)
	}
	return fmt.Errorf("execute %s: %w", argv[0], execIn(argv, env))
}

// execIn tries each folder of PATH as execvp does, so that there is no time
// between the look-up and the use.
func execIn(argv, env []string) error {
	if strings.Contains(argv[0], "/") {
		return syscall.Exec(argv[0], argv, env)
	}
	path := defaultPath
	for _, e := range env {
		if p, ok := strings.CutPrefix(e, "PATH="); ok {
			path = p
		}
	}
	var found error
	for dir := range strings.SplitSeq(path, ":") {
		if dir == "" {
			dir = "."
		}
		err := syscall.Exec(dir+"/"+argv[0], argv, env)
		switch {
		case errors.Is(err, unix.ENOENT), errors.Is(err, unix.ENOTDIR):
		case errors.Is(err, unix.EACCES):
			found = err // it is there, or the folder is closed: another may do
		default:
			return err
		}
	}
	if found == nil {
		return fmt.Errorf("not found in PATH %s: %w", path, unix.ENOENT)
	}
	return found
}
