package master

import (
	"maps"
	"os"
	"path/filepath"
	"strconv"
	"testing"
)

func TestOwnControlGroupsAreFoundInEveryLayout(t *testing.T) {
	for _, c := range []struct {
		name, mountinfo, cgroup string
		want                    map[string]string
	}{
		{
			"version 2 alone",
			"31 23 0:28 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n",
			"0::/system.slice/tako.service\n",
			map[string]string{"": "/sys/fs/cgroup/system.slice/tako.service"},
		},
		{
			"both, controllers mounted together",
			"33 31 0:30 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n" +
				"35 31 0:32 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n" +
				"41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n",
			"4:memory:/a/b\n1:cpu,cpuacct:/\n0::/\n",
			map[string]string{"": "/sys/fs/cgroup/unified", "cpu": "/sys/fs/cgroup/cpu,cpuacct", "memory": "/sys/fs/cgroup/memory/a/b"},
		},
		{
			"a container that sees its own part",
			"31 23 0:28 /docker/x /sys/fs/cgroup ro - cgroup2 cgroup rw\n",
			"0::/docker/x/inner\n",
			map[string]string{"": "/sys/fs/cgroup/inner"},
		},
		{
			"a part that is not ours",
			"31 23 0:28 /docker/x /sys/fs/cgroup ro - cgroup2 cgroup rw\nnonsense\n",
			"0::/docker/xy\nnonsense\n",
			map[string]string{},
		},
		{"none", "", "", map[string]string{}},
	} {
		if got := ownGroups(c.cgroup, groupMounts(c.mountinfo)); !maps.Equal(got, c.want) {
			t.Errorf("%s: got %q, want %q", c.name, got, c.want)
		}
	}
}

func TestOnlyEmptyGroupsOfDeadServersAreRemoved(t *testing.T) {
	above := t.TempDir()
	const nobody = "4194305" // above the highest pid there can be
	mine := groupPrefix + strconv.Itoa(os.Getpid())
	for _, dir := range []string{
		groupPrefix + nobody + "/main", groupPrefix + nobody + "/blog.1",
		groupPrefix + nobody + "0/main/used", mine + "/main", "tako-x", "tako-0" + nobody, "other-" + nobody,
	} {
		if err := os.MkdirAll(filepath.Join(above, dir), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	sweepGroups(above, "")
	for name, want := range map[string]bool{
		groupPrefix + nobody: false, groupPrefix + nobody + "0": true, mine: true, "tako-x": true, "tako-0" + nobody: true, "other-" + nobody: true,
	} {
		if _, err := os.Stat(filepath.Join(above, name)); (err == nil) != want {
			t.Errorf("%s is there: %v, want %v", name, err == nil, want)
		}
	}
}
