package integration

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"tako/internal/takotest"
)

// groupFolders are the folders of control groups that a server with this pid has.
func groupFolders(pid int) (found []string) {
	for _, pattern := range []string{"/sys/fs/cgroup/", "/sys/fs/cgroup/*/", "/sys/fs/cgroup/*/*/", "/sys/fs/cgroup/*/*/*/", "/sys/fs/cgroup/*/*/*/*/"} {
		list, _ := filepath.Glob(pattern + "tako-" + strconv.Itoa(pid))
		found = append(found, list...)
	}
	return found
}

// TestLimitsOfAnAppAreKept deploys an app that takes more memory than it may.
func TestLimitsOfAnAppAreKept(t *testing.T) {
	asRoot(t)
	s := start(t, takotest.Options{})
	pid := s.PID()
	if len(groupFolders(pid)) == 0 {
		t.Skip("no control groups to have here")
	}
	deploy(t, s, "blog", "1", quick(map[string]any{"limits": map[string]any{"memory": "64M", "cpu": 1, "pids": 200}}))
	data, err := s.Ask("status", map[string]any{"app": "blog"})
	if err != nil {
		t.Fatal(err)
	}
	var st struct {
		Instances []struct {
			Limits string `json:"limits"`
		} `json:"instances"`
	}
	if err := json.Unmarshal(data, &st); err != nil {
		t.Fatal(err)
	}
	if len(st.Instances) != 1 || !strings.HasPrefix(st.Instances[0].Limits, "cgroup v") || strings.Contains(st.Instances[0].Limits, "not kept") {
		t.Fatalf("limits: %s", data)
	}
	// It takes 256 MiB.
	go func() { _, _ = s.Get(t.Context(), takotest.TLS1, "blog.localhost/eat?n=268435456") }()
	until(t, takotest.StartWait, "its end for lack of memory", func() bool {
		return strings.Contains(status(t, s, "blog").LastError, "killed for lack of memory")
	})
	until(t, takotest.StartWait, "its replacement", func() bool {
		_, err := tryAbout(s, "blog.localhost")
		return err == nil
	})
}

// TestControlGroupsOfServersThatAreGoneAreRemoved looks at what a server leaves
// when it is stopped, and what the next one finds when it was killed.
func TestControlGroupsOfServersThatAreGoneAreRemoved(t *testing.T) {
	asRoot(t)
	s := prepare(t, takotest.Options{})
	if err := s.Start(); err != nil {
		t.Fatal(err)
	}
	deploy(t, s, "blog", "1", quick(nil))
	first := s.PID()
	if len(groupFolders(first)) == 0 {
		t.Skip("no control groups to have here")
	}
	if err := s.Kill(); err != nil {
		t.Fatal(err)
	}
	if err := s.Start(); err != nil {
		t.Fatal(err)
	}
	if left := groupFolders(first); len(left) > 0 {
		t.Errorf("of a server that was killed: %q", left)
	}
	second := s.PID()
	if err := s.Stop(); err != nil {
		t.Fatal(err)
	}
	if left := groupFolders(second); len(left) > 0 {
		for _, dir := range left {
			entries, _ := os.ReadDir(dir)
			for _, e := range entries {
				if e.IsDir() {
					t.Log(dir, e.Name())
				}
			}
		}
		t.Errorf("of a server that was stopped: %q", left)
	}
}
