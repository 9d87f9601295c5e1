package release

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"tako/internal/atomicfile"
	"tako/internal/paths"
	"tako/internal/tako"
)

// MaxPath bounds the path of a deploy, in bytes.
const MaxPath = 4095

// Resolve checks the path given for a deploy of version and returns the folder
// it means: layout.Release(version) or one below it, without links in what
// follows the app's releases. The error is a CodeInvalid Error whose text is part
// of the management protocol.
func Resolve(layout paths.AppLayout, version tako.ReleaseID, given string) (dir string, err error) {
	bad := func(format string, args ...any) (string, error) {
		return "", tako.Errorf(tako.CodeInvalid, "Invalid release path: %s", fmt.Sprintf(format, args...))
	}
	if len(given) > MaxPath {
		return bad("%.80s... (longer than %d bytes)", given, MaxPath)
	}
	if !filepath.IsAbs(given) {
		return bad("%s (not an absolute path)", given)
	}
	resolved, err := filepath.EvalSymlinks(given)
	if err != nil {
		return bad("%s (%v)", given, reason(err))
	}
	info, err := os.Stat(resolved)
	if err != nil {
		return bad("%s (%v)", given, reason(err))
	}
	if !info.IsDir() {
		return bad("'%s' must be an existing directory", resolved)
	}
	root, err := filepath.EvalSymlinks(layout.Releases())
	if err != nil {
		return bad("%s (%v)", layout.Releases(), reason(err))
	}
	below, err := filepath.Rel(root, resolved)
	if err != nil || !filepath.IsLocal(below) {
		return bad("'%s' must stay under '%s'", resolved, root)
	}
	if below == "." {
		return bad("'%s' holds all releases; give the folder of release '%s'", resolved, version)
	}
	if owner, _, _ := strings.Cut(below, "/"); owner != string(version) {
		return bad("'%s' belongs to release '%s', not to '%s'; give that release's own folder", resolved, owner, version)
	}
	return filepath.Join(layout.Releases(), below), nil
}

// Sub returns where a folder from Resolve is below its release: "" for the
// release's own. A rollback looks in the same place of another release.
func Sub(layout paths.AppLayout, version tako.ReleaseID, dir string) string {
	sub, err := filepath.Rel(layout.Release(version), dir)
	if err != nil || sub == "." || !filepath.IsLocal(sub) {
		return ""
	}
	return sub
}

// Stored is a release that is on disk.
type Stored struct {
	Version tako.ReleaseID
	Current bool
	// DeployedAt is when its folder last changed, in Unix seconds.
	DeployedAt    *int64
	CommitMessage *string // nil when unknown
	GitDirty      *bool   // nil when unknown
}

// List returns the releases on disk, newest first and among equal ones by
// descending version. Folders whose names are no release ids, files and links
// are not releases. Sub is from Sub: manifests are looked for there. An app
// without releases has an empty list. The error is an Error for the caller.
func List(layout paths.AppLayout, current tako.ReleaseID, sub string) ([]Stored, error) {
	entries, err := os.ReadDir(layout.Releases())
	if errors.Is(err, fs.ErrNotExist) {
		return []Stored{}, nil
	}
	if err != nil {
		return nil, tako.Errorf(tako.CodeFailed, "Failed to read releases directory '%s': %v", layout.Releases(), reason(err))
	}
	if !filepath.IsLocal(sub) {
		sub = ""
	}
	stored := []Stored{}
	for _, e := range entries {
		version, err := tako.ParseReleaseID(e.Name())
		if err != nil || !e.IsDir() {
			continue
		}
		s := Stored{Version: version, Current: version == current}
		if info, err := e.Info(); err == nil {
			s.DeployedAt = new(info.ModTime().Unix())
		} else if errors.Is(err, fs.ErrNotExist) {
			continue // pruned meanwhile
		}
		s.CommitMessage, s.GitDirty = commit(layout.Release(version), sub)
		stored = append(stored, s)
	}
	slices.SortFunc(stored, func(a, b Stored) int {
		return cmp.Or(cmp.Compare(b.when(), a.when()), cmp.Compare(b.Version, a.Version))
	})
	return stored, nil
}

// when is DeployedAt, 0 when unknown.
func (s Stored) when() int64 {
	if s.DeployedAt == nil {
		return 0
	}
	return *s.DeployedAt
}

// commit returns what the manifest in sub of the release in dir says of its
// origin. It asks less of the manifest than Load: an old release is listed as it
// is.
func commit(dir, sub string) (message *string, dirty *bool) {
	data, err := readManifest(dir, filepath.Join(sub, ManifestName))
	if err != nil {
		return nil, nil
	}
	tree, err := decodeTree(data)
	if err != nil {
		return nil, nil
	}
	fields, _ := tree.(map[string]any)
	if s, ok := fields["commit_message"].(string); ok {
		message = &s
	}
	if b, ok := fields["git_dirty"].(bool); ok {
		dirty = &b
	}
	return message, dirty
}

// Current returns the release that the app's link names, "" when there is no
// link or it names none.
func Current(layout paths.AppLayout) tako.ReleaseID {
	target, err := os.Readlink(layout.Current())
	if err != nil {
		return ""
	}
	version, err := tako.ParseReleaseID(filepath.Base(target))
	if err != nil {
		return ""
	}
	return version
}

// SetCurrent makes the app's link name version, whose folder must be there. The
// link is always there once it was, naming the old release or the new.
func SetCurrent(layout paths.AppLayout, version tako.ReleaseID) error {
	info, err := os.Lstat(layout.Release(version))
	if err != nil {
		return fmt.Errorf("set the current release: %w", err)
	}
	if !info.IsDir() {
		return fmt.Errorf("set the current release: %s is not a folder", layout.Release(version))
	}
	target, err := filepath.Rel(layout.Dir, layout.Release(version))
	if err != nil {
		return fmt.Errorf("set the current release: %w", err)
	}
	if err := atomicfile.Symlink(target, layout.Current()); err != nil {
		return fmt.Errorf("set the current release: %w", err)
	}
	return nil
}
