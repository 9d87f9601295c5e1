package version

import (
	"runtime/debug"
	"testing"
)

func TestStringNamesVersionAndCommit(t *testing.T) {
	v, c := Version, Commit
	t.Cleanup(func() { Version, Commit = v, c })
	Version, Commit = "1.2.3", "0123456789ab-dirty"
	if got, want := String(), "1.2.3 (0123456789ab-dirty)"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
}

func TestCommitRecordedByTheGoToolIsShortened(t *testing.T) {
	full := debug.BuildSetting{Key: "vcs.revision", Value: "0123456789abcdef0123456789abcdef01234567"}
	modified := debug.BuildSetting{Key: "vcs.modified", Value: "true"}
	clean := debug.BuildSetting{Key: "vcs.modified", Value: "false"}
	for _, c := range []struct {
		name     string
		settings []debug.BuildSetting
		want     string
	}{
		{"clean tree", []debug.BuildSetting{full, clean}, "0123456789ab"},
		{"tree with changes", []debug.BuildSetting{full, modified}, "0123456789ab-dirty"},
		{"outside git", nil, ""},
		{"changes of nothing", []debug.BuildSetting{modified}, ""},
	} {
		if got := recorded(c.settings); got != c.want {
			t.Errorf("%s: got %q, want %q", c.name, got, c.want)
		}
	}
}
