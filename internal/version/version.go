// Package version says which build of tako a program is. make build writes the
// values in; a program built by plain go build is "devel", with the commit that
// the Go tool recorded if it did.
package version

import "runtime/debug"

// Set at link time: -ldflags "-X tako/internal/version.Version=… -X …Commit=…".
var (
	// Version is the release number, without a v.
	Version = "devel"
	// Commit is the abbreviated git commit, with "-dirty" for a tree with changes;
	// "" when it is not known.
	Commit = ""
)

// commitLength is how much of a recorded commit is shown: as much as make build
// writes in.
const commitLength = 12

// String returns "0.1.0 (0123456789ab)", or the version alone when the commit is
// not known.
func String() string {
	commit := Commit
	if info, ok := debug.ReadBuildInfo(); commit == "" && ok {
		commit = recorded(info.Settings)
	}
	if commit == "" {
		return Version
	}
	return Version + " (" + commit + ")"
}

// recorded is the commit that the Go tool wrote into the program, "" for none.
func recorded(settings []debug.BuildSetting) string {
	var revision, dirty string
	for _, s := range settings {
		switch {
		case s.Key == "vcs.revision":
			revision = s.Value[:min(len(s.Value), commitLength)]
		case s.Key == "vcs.modified" && s.Value == "true":
			dirty = "-dirty"
		}
	}
	if revision == "" {
		return ""
	}
	return revision + dirty
}
