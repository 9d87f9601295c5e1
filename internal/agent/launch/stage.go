package launch

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"tako/internal/ipc"
	"tako/internal/sandbox"
	"tako/internal/tako"
	"tako/internal/wire"
)

// The second stage: this program again, under another argv[0]. Its descriptors
// are those of what it becomes, and two of its own: what to do, as a sealed
// memfd, and where to say why that cannot be done.
const (
	// ExecName is argv[0] of the stage that becomes an app's program.
	ExecName = "tako-exec"

	specFD      = 3
	complaintFD = 4

	maxSpec      = 16 << 20
	maxComplaint = 4096

	// appMask keeps what an app makes from strangers, and lets the group of its
	// socket folder connect.
	appMask = 0o007
	// helperMask is for what tako makes itself.
	helperMask = 0o027
	// oomScore makes the kernel choose an instance before tako when memory runs
	// out.
	oomScore = "500"
)

// execSpec is what ExecName has to do.
type execSpec struct {
	Command        wire.Command
	MinUID, MaxUID uint32
	// Groups are folders of control groups to enter; with MustEnter it is an error
	// if that fails.
	Groups    []string
	MustEnter bool
	// MaxProcs bounds the processes of its user, 0: it does not.
	MaxProcs int
}

// Exec is the stage ExecName. It returns only to say, on its complaint pipe, why
// the program could not be started; the caller then exits.
func Exec() {
	err := execCommand()
	_, _ = io.WriteString(os.NewFile(complaintFD, "complaint"), clip(err.Error(), maxComplaint)) // nobody else to tell
}

func execCommand() error {
	var spec execSpec
	if err := readSpec(&spec); err != nil {
		return err
	}
	c := &spec.Command
	if err := checkUser(c.User, spec.MinUID, spec.MaxUID); err != nil {
		return err
	}
	_ = os.WriteFile("/proc/self/oom_score_adj", []byte(oomScore), 0) // a kernel may lack it
	var id *sandbox.Identity
	if c.User.UID != 0 {
		id = &sandbox.Identity{UID: c.User.UID, GID: c.User.GID}
	}
	err := sandbox.Exec(id, c.Dir, c.Argv, c.Env, appMask, spec.limit)
	// This thread is the app's user now: what that user finds is the reason.
	if derr := unix.Chdir(c.Dir); derr != nil {
		return fmt.Errorf("cannot start %q: its folder %s: %w", c.Argv[0], c.Dir, derr)
	}
	if perr := lookPath(c.Argv[0], c.Env); perr != nil {
		return fmt.Errorf("cannot start %q: %w", c.Argv[0], perr)
	}
	return fmt.Errorf("cannot start %q: %w", c.Argv[0], err)
}

// limit bounds this process, while it still has the agent's powers.
func (s *execSpec) limit() error {
	if err := enter(s.Groups); err != nil && s.MustEnter {
		return err
	}
	if s.MaxProcs == 0 {
		return nil
	}
	var now unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NPROC, &now); err != nil {
		return fmt.Errorf("limit processes: %w", err)
	}
	n := min(uint64(s.MaxProcs), now.Max) // not negative
	if err := unix.Setrlimit(unix.RLIMIT_NPROC, &unix.Rlimit{Cur: n, Max: n}); err != nil {
		return fmt.Errorf("limit processes: %w", err)
	}
	return nil
}

// lookPath says why a program is not to be found, or cannot be run, with the
// PATH of env.
func lookPath(name string, env []string) error {
	if strings.Contains(name, "/") {
		return runnable(name)
	}
	path := "unset"
	for _, v := range env {
		if p, ok := strings.CutPrefix(v, "PATH="); ok {
			path = p
		}
	}
	if path == "unset" {
		return nil // sandbox has its own then
	}
	for _, dir := range filepath.SplitList(path) {
		file := filepath.Join(dir, name)
		err := runnable(file)
		if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR) {
			continue
		}
		if err != nil {
			return fmt.Errorf("%s: %w", file, err)
		}
		return nil
	}
	return fmt.Errorf("not found in PATH (%s)", path)
}

// runnable says why a file cannot be run.
func runnable(file string) error {
	var st unix.Stat_t
	if err := unix.Stat(file, &st); err != nil {
		return err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return errors.New("not a file")
	}
	if st.Mode&0o111 == 0 {
		return errors.New("not executable: chmod +x it")
	}
	return unix.Faccessat(unix.AT_FDCWD, file, unix.X_OK, unix.AT_EACCESS)
}

// sealedSpec puts a spec where only the stage reads it.
func sealedSpec(spec any) (ipc.FD, error) {
	b, err := json.Marshal(spec)
	if err != nil {
		return 0, fmt.Errorf("write down what to start: %w", err)
	}
	fd, err := unix.MemfdCreate("tako-spec", unix.MFD_CLOEXEC)
	if err != nil {
		return 0, fmt.Errorf("memfd: %w", err)
	}
	for off := 0; off < len(b); {
		n, err := unix.Pwrite(fd, b[off:], int64(off))
		if err != nil && !errors.Is(err, unix.EINTR) {
			ipc.FD(fd).Close()
			return 0, fmt.Errorf("memfd: %w", err)
		}
		off += max(n, 0)
	}
	return ipc.FD(fd), nil
}

func readSpec(into any) error {
	f := os.NewFile(specFD, "spec")
	b, err := io.ReadAll(io.NewSectionReader(f, 0, maxSpec))
	if err == nil {
		err = json.Unmarshal(b, into)
	}
	if err != nil {
		return fmt.Errorf("read what to start: %w", err)
	}
	return nil
}

// helpAnswer is what a helper writes to its standard output.
type helpAnswer struct {
	Code    tako.Code `json:",omitempty"`
	Message string    `json:",omitempty"`
	Result  any
}

// Helper is a stage that does work of tako's own as another user, or as nobody
// in particular, without any powers: it becomes that user, does what it is asked,
// and answers. Its arguments are those of Help, or self, name and the request
// once it is whom it is to be. It returns for the caller to exit.
func Helper(args []string, do func(request []byte, input *os.File) (any, error)) {
	var result any
	var err error
	if args[0] != self {
		err = helperBecome(args)
	} else {
		unix.Umask(helperMask)
		result, err = do([]byte(args[2]), os.NewFile(0, "input"))
	}
	a := helpAnswer{Result: result}
	if err != nil {
		e := tako.AsError(err)
		a = helpAnswer{Code: e.Code, Message: e.Message}
	}
	if b, err := json.Marshal(a); err == nil {
		_, _ = os.Stdout.Write(b) // nobody else to tell
	}
}

// helperBecome executes this program again, as whom the first argument says.
func helperBecome(args []string) error {
	if len(args) != 3 {
		return fmt.Errorf("%s is started by tako-agent", args[0])
	}
	var id *Identity
	if err := json.Unmarshal([]byte(args[1]), &id); err != nil {
		return fmt.Errorf("%s: %w", args[0], err)
	}
	next := []string{self, args[0], args[2]}
	if id == nil {
		return sandbox.Exec(nil, "/", next, nil, helperMask, nil)
	}
	if id.UID != 0 {
		return sandbox.Exec(&sandbox.Identity{UID: id.UID, GID: id.GID, Groups: id.Groups}, "/", next, nil, helperMask, nil)
	}
	// The data root is root's: root without any powers is no more than the owner
	// of those files.
	return sandbox.Exec(nil, "/", next, nil, helperMask, func() error {
		groups := make([]int, 0, len(id.Groups))
		for _, g := range id.Groups {
			groups = append(groups, int(g))
		}
		if err := unix.Setgroups(groups); err != nil {
			return fmt.Errorf("take on groups %v: %w", groups, err)
		}
		if err := unix.Setresgid(int(id.GID), int(id.GID), int(id.GID)); err != nil {
			return fmt.Errorf("take on group %d: %w", id.GID, err)
		}
		if err := unix.Setresuid(0, 0, 0); err != nil {
			return fmt.Errorf("become the owner of the data root: %w", err)
		}
		return nil
	})
}

// IsHelper returns which helper the arguments of this program ask for, "" for
// none.
func IsHelper(args []string) string {
	switch {
	case len(args) == 3 && args[0] == self:
		return args[1]
	case len(args) > 0:
		return args[0]
	}
	return ""
}
