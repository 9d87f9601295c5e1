// Package takotest helps tests that run the real programs: it builds them once
// for each test binary, starts servers on free ports with short temporary
// folders, asks them as an operator and as a visitor, and makes apps that behave
// or misbehave. A server that a test started is stopped at its end, and the test
// fails if anything of it still runs.
package takotest

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"sync"
	"testing"
)

// Programs are the names of the programs that Build makes.
var Programs = []string{"tako-master", "tako-proxy", "tako-agent", "takoctl"}

var built struct {
	once sync.Once
	dir  string
	err  error
}

// others are the builds of BuildVersion, by version.
var others struct {
	sync.Mutex
	dirs map[string]string // guarded by Mutex
}

// Main runs the tests of m and returns the status for os.Exit. It removes what
// Build made. A package that uses Build calls it from TestMain.
func Main(m *testing.M) int {
	code := m.Run()
	Clean()
	return code
}

// Clean removes what Build made; after it nothing can be built any more.
func Clean() {
	built.once.Do(func() { built.err = errors.New("nothing can be built after Clean") })
	if built.dir != "" {
		os.RemoveAll(built.dir)
	}
	others.Lock()
	defer others.Unlock()
	for _, dir := range others.dirs {
		os.RemoveAll(dir)
	}
	others.dirs = nil
}

// Build builds the programs and testapp, once for each test binary, and returns
// their folder.
func Build() (dir string, err error) {
	built.once.Do(func() { built.dir, built.err = build() })
	return built.dir, built.err
}

// BuildVersion builds the programs again, to say that they are of this version,
// once for each test binary, and returns their folder.
func BuildVersion(version string) (dir string, err error) {
	others.Lock()
	defer others.Unlock()
	if dir, ok := others.dirs[version]; ok {
		return dir, nil
	}
	if dir, err = TempDir(); err != nil {
		return "", err
	}
	var packages []string
	for _, p := range Programs {
		packages = append(packages, "./cmd/"+p)
	}
	if err := goBuild(dir+"/", "-X tako/internal/version.Version="+version, packages...); err != nil {
		return "", errors.Join(err, os.RemoveAll(dir))
	}
	if others.dirs == nil {
		others.dirs = make(map[string]string)
	}
	others.dirs[version] = dir
	return dir, nil
}

// BuildTestdata builds a program of testdata, which stands in for one of tako's,
// into a file.
func BuildTestdata(program, file string) error {
	return goBuild(file, "", "./internal/takotest/testdata/"+program)
}

func build() (string, error) {
	dir, err := TempDir()
	if err != nil {
		return "", err
	}
	packages := []string{"./internal/takotest/testapp"}
	for _, p := range Programs {
		packages = append(packages, "./cmd/"+p)
	}
	return dir, goBuild(dir+"/", "", packages...)
}

// goBuild builds packages with the flags of make build, so that what is compiled
// is shared with it.
func goBuild(out, ldflags string, packages ...string) error {
	root, err := Root()
	if err != nil {
		return err
	}
	cmd := exec.Command("go", append([]string{"build", "-trimpath", "-ldflags", ldflags, "-o", out}, packages...)...)
	cmd.Dir = root
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if text, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("build the programs: %w\n%s", err, text)
	}
	return nil
}

// Root is the root of the repository: the first folder with a go.mod from here
// upwards.
func Root() (string, error) {
	dir, err := os.Getwd()
	if err != nil {
		return "", err
	}
	for {
		if _, err := os.Stat(filepath.Join(dir, "go.mod")); err == nil {
			return dir, nil
		}
		parent := filepath.Dir(dir)
		if parent == dir {
			return "", errors.New("no go.mod above the working directory")
		}
		dir = parent
	}
}

// TempDir makes a temporary folder with a path short enough for Unix sockets
// below it, which other users may pass through: started as root, a server's
// processes are several users. The caller removes it.
func TempDir() (string, error) {
	dir, err := os.MkdirTemp("/tmp", "tk")
	if err != nil {
		return "", err
	}
	return dir, os.Chmod(dir, 0o711)
}

// The range of FreePorts: below instances' ports and those that the kernel gives to
// connections, one of which could sit on a port while its server restarts.
const (
	firstPort = 10_000
	lastPort  = 19_999
)

// handed are the ports that FreePorts has given away.
var handed = struct {
	sync.Mutex
	ports map[int]bool
}{ports: make(map[int]bool)}

// FreePorts finds n different TCP ports on the loopback address that nobody
// listens on now, and that it gives to nobody else in this process.
func FreePorts(n int) ([]int, error) {
	handed.Lock()
	defer handed.Unlock()
	var ports []int
	for tries := 0; len(ports) < n; tries++ {
		if tries > 10_000 {
			return nil, fmt.Errorf("no %d free ports from %d to %d", n, firstPort, lastPort)
		}
		port := firstPort + rand.IntN(lastPort-firstPort+1)
		if handed.ports[port] {
			continue
		}
		l, err := net.Listen("tcp", net.JoinHostPort("127.0.0.1", strconv.Itoa(port)))
		if err != nil {
			continue
		}
		if err := l.Close(); err != nil {
			return nil, err
		}
		handed.ports[port] = true
		ports = append(ports, port)
	}
	return ports, nil
}
