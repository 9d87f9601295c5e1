// Package archtest holds the module to the picture in docs/ARCHITECTURE.md: who
// may import whom, and what a program must not contain however it got there.
package archtest

import (
	"encoding/json"
	"errors"
	"io"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

const module = "tako"

// mayImport is that picture as a table: each package and the packages of this
// module that it may import. Roles never import each other. A change here is a
// change of the design.
var mayImport = map[string][]string{
	"cmd/tako-master": {"internal/master", "internal/logging", "internal/paths", "internal/sandbox", "internal/ipc", "internal/wire", "internal/version"},
	"cmd/tako-proxy":  {"internal/proxy", "internal/logging", "internal/sandbox", "internal/ipc", "internal/wire", "internal/version"},
	"cmd/tako-agent":  {"internal/agent", "internal/agent/launch", "internal/archive", "internal/logging", "internal/sandbox", "internal/ipc", "internal/wire", "internal/version"},
	"cmd/takoctl":     {"internal/ctl", "internal/version"},

	// Roles.
	"internal/master": {
		"internal/tako", "internal/wire", "internal/ipc", "internal/route", "internal/paths",
		"internal/store", "internal/management", "internal/rollout", "internal/cert", "internal/supervise",
		"internal/sandbox", "internal/release", "internal/atomicfile", "internal/logging", "internal/version", "internal/handoff", "internal/fdstore",
	},
	"internal/proxy": {
		"internal/tako", "internal/wire", "internal/ipc", "internal/route", "internal/sandbox",
		"internal/logging", "internal/version", "internal/proxy/balance", "internal/proxy/upstream",
		"internal/proxy/message", "internal/proxy/h1", "internal/proxy/h2", "internal/proxy/proxyproto",
		"internal/proxy/eventloop",
	},
	"internal/agent": {
		"internal/tako", "internal/wire", "internal/ipc", "internal/supervise", "internal/sandbox", "internal/logging",
		"internal/archive", "internal/version", "internal/agent/launch", "internal/agent/health",
	},
	"internal/ctl": {"internal/tako", "internal/management", "internal/archive", "internal/paths", "internal/release", "internal/version"},

	// Parts of one role.
	"internal/proxy/balance":    {"internal/tako", "internal/wire"},
	"internal/proxy/message":    nil,
	"internal/proxy/eventloop":  nil,
	"internal/proxy/h1":         {"internal/proxy/message", "internal/proxy/eventloop"},
	"internal/proxy/h2":         {"internal/proxy/message"},
	"internal/proxy/proxyproto": nil,
	"internal/proxy/upstream":   {"internal/proxy/message", "internal/proxy/h1", "internal/proxy/eventloop"},
	"internal/agent/launch":     {"internal/tako", "internal/wire", "internal/ipc", "internal/supervise", "internal/sandbox"},
	"internal/agent/health":     {"internal/tako", "internal/wire"},
	"internal/store":            {"internal/tako", "internal/uptime"},
	"internal/management":       {"internal/tako", "internal/route"},
	"internal/rollout":          {"internal/tako"},
	"internal/handoff":          {"internal/ipc", "internal/uptime"},
	"internal/fdstore":          {"internal/ipc"},
	"internal/cert":             {"internal/tako", "internal/atomicfile"},

	// Shared parts.
	"internal/wire":       {"internal/tako", "internal/ipc"},
	"internal/route":      {"internal/tako"},
	"internal/paths":      {"internal/tako"},
	"internal/release":    {"internal/tako", "internal/paths", "internal/atomicfile"},
	"internal/supervise":  {"internal/ipc", "internal/sandbox", "internal/logging"},
	"internal/archive":    {"internal/tako"},
	"internal/atomicfile": nil,
	"internal/sandbox":    nil,
	"internal/ipc":        nil,
	"internal/logging":    nil,
	"internal/uptime":     nil,
	"internal/version":    nil,

	// Words.
	"internal/tako": nil,

	// Tests, and what only runs beside the programs.
	"internal/archtest":         nil,
	"internal/takotest":         nil,
	"internal/takotest/testapp": nil,
	"internal/integration":      {"internal/takotest"},
	"examples/demo":             nil,
	"bench":                     {"internal/takotest"},
}

// mustNotLink names what a program must not contain, and why.
var mustNotLink = map[string]map[string]string{
	"cmd/tako-proxy": {
		"os/exec":             "the proxy reads strangers' bytes and must not be able to start programs",
		"database/sql":        "only tako-master opens the database",
		"internal/store":      "only tako-master opens the database",
		"internal/management": "only tako-master answers operators",
		"internal/supervise":  "only tako-master and tako-agent have children",
		"internal/cert":       "only tako-master has keys",
		"internal/archive":    "only tako-agent unpacks",
	},
	"cmd/tako-agent": {
		"database/sql":        "only tako-master opens the database",
		"internal/store":      "only tako-master opens the database",
		"internal/management": "only tako-master answers operators",
		"internal/cert":       "only tako-master has keys",
	},
	"cmd/takoctl": {
		"database/sql":       "takoctl speaks to a server, it is none",
		"internal/store":     "takoctl speaks to a server, it is none",
		"internal/master":    "takoctl speaks to a server, it is none",
		"internal/wire":      "the wire joins the processes of one server; takoctl is a client of the management socket",
		"internal/supervise": "takoctl has no children to keep",
	},
}

// homes names third-party packages that only these packages may import.
var homes = map[string][]string{
	"modernc.org/sqlite":            {"internal/store"},
	"database/sql":                  {"internal/store"},
	"github.com/spf13/cobra":        {"internal/ctl", "cmd/takoctl"},
	"github.com/coreos/go-systemd/": {"internal/master", "cmd/tako-master"},
}

func TestImportsFollowThePicture(t *testing.T) {
	seen := make(map[string]bool)
	for _, p := range list(t, "./...") {
		name := ours(p.ImportPath)
		seen[name] = true
		allowed, known := mayImport[name]
		if !known {
			t.Errorf("%s is not in the table of imports: add it there and to docs/ARCHITECTURE.md", name)
		}
		for _, imp := range p.Imports {
			if dep, isOurs := strings.CutPrefix(imp, module+"/"); isOurs && !slices.Contains(allowed, dep) {
				t.Errorf("%s imports %s: the table of imports does not allow it", name, dep)
			}
			for prefix, homes := range homes {
				if strings.HasPrefix(imp, prefix) && !slices.Contains(homes, name) {
					t.Errorf("%s imports %s, whose home is %s", name, imp, strings.Join(homes, ", "))
				}
			}
		}
	}
	for _, name := range slices.Sorted(maps.Keys(mayImport)) {
		if !seen[name] {
			t.Errorf("%s is in the table of imports but does not exist", name)
		}
	}
}

func TestProgramsDoNotLinkWhatTheyMustNotDo(t *testing.T) {
	exists := make(map[string]bool)
	for _, p := range list(t, "./...") {
		exists[ours(p.ImportPath)] = true
	}
	for program, banned := range mustNotLink {
		for _, p := range list(t, "./"+program) {
			for dep, why := range banned {
				full := dep
				if strings.HasPrefix(dep, "internal/") {
					full = module + "/" + dep
					if !exists[dep] {
						t.Errorf("%s is banned from %s but does not exist", dep, program)
					}
				}
				if slices.Contains(p.Deps, full) {
					t.Errorf("%s links %s: %s", program, dep, why)
				}
			}
		}
	}
}

func TestWordsAreOfTheStandardLibraryAlone(t *testing.T) {
	for _, p := range list(t, "./internal/tako") {
		for _, imp := range p.Imports {
			if first, _, _ := strings.Cut(imp, "/"); strings.Contains(first, ".") {
				t.Errorf("internal/tako imports %s", imp)
			}
		}
	}
}

// ours is an import path without the module's name.
func ours(path string) string { return strings.TrimPrefix(path, module+"/") }

type pkg struct {
	ImportPath string
	Imports    []string
	Deps       []string
}

func list(t *testing.T, pattern string) []pkg {
	t.Helper()
	watchSource(t)
	cmd := exec.CommandContext(t.Context(), "go", "list", "-json=ImportPath,Imports,Deps", pattern)
	cmd.Dir = "../.."
	out, err := cmd.Output()
	if err != nil {
		var said []byte
		if exit, ok := errors.AsType[*exec.ExitError](err); ok {
			said = exit.Stderr
		}
		t.Fatalf("go list %s: %v\n%s", pattern, err, said)
	}
	var pkgs []pkg
	for dec := json.NewDecoder(strings.NewReader(string(out))); ; {
		var p pkg
		if err := dec.Decode(&p); errors.Is(err, io.EOF) {
			return pkgs
		} else if err != nil {
			t.Fatalf("decode what go list %s printed: %v", pattern, err)
		}
		pkgs = append(pkgs, p)
	}
}

// watchSource looks at every source file: go test keeps the result of a test
// until something changes that the test itself has looked at, and it does not
// know what go list looks at.
func watchSource(t *testing.T) {
	t.Helper()
	err := filepath.WalkDir("../..", func(path string, d fs.DirEntry, err error) error {
		if err == nil && strings.HasSuffix(path, ".go") {
			_, err = os.Stat(path)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}
