package launch

import (
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// oomWatch remembers how often the kernel had killed for memory in a process's
// control group when it started. Groups may be shared: the answer is a good
// guess.
type oomWatch struct {
	file  string // "" where there is nothing to read
	count int64
}

func watchOOM(pid int) oomWatch {
	b, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "cgroup"))
	if err != nil {
		return oomWatch{}
	}
	for line := range strings.SplitSeq(string(b), "\n") {
		f := strings.SplitN(line, ":", 3) // hierarchy, controllers, path
		if len(f) != 3 {
			continue
		}
		var file string
		switch f[1] {
		case "":
			file = filepath.Join("/sys/fs/cgroup", f[2], "memory.events")
		case "memory":
			file = filepath.Join("/sys/fs/cgroup/memory", f[2], "memory.oom_control")
		default:
			continue
		}
		if n, ok := oomKills(file); ok {
			return oomWatch{file: file, count: n}
		}
	}
	return oomWatch{}
}

// happened reports whether the count has risen.
func (w oomWatch) happened() bool {
	if w.file == "" {
		return false
	}
	n, ok := oomKills(w.file)
	return ok && n > w.count
}

// oomKills reads the line "oom_kill N" of a control group's file.
func oomKills(file string) (int64, bool) {
	b, err := os.ReadFile(file)
	if err != nil {
		return 0, false
	}
	for line := range strings.SplitSeq(string(b), "\n") {
		if num, ok := strings.CutPrefix(line, "oom_kill "); ok {
			n, err := strconv.ParseInt(num, 10, 64)
			return n, err == nil
		}
	}
	return 0, false
}
