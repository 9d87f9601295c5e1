package release

import (
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"tako/internal/paths"
	"tako/internal/tako"
)

// newApp returns an app with the releases v1 and v2, in a folder without links.
func newApp(tb testing.TB) paths.AppLayout {
	tb.Helper()
	data, err := filepath.EvalSymlinks(tb.TempDir())
	if err != nil {
		tb.Fatal(err)
	}
	app := paths.Layout{Data: data}.App("blog")
	for _, v := range []tako.ReleaseID{"v1", "v2"} {
		if err := os.MkdirAll(filepath.Join(app.Release(v), "web", "api"), 0o755); err != nil {
			tb.Fatal(err)
		}
	}
	return app
}

func symlink(tb testing.TB, target, path string) {
	tb.Helper()
	if err := os.Symlink(target, path); err != nil {
		tb.Fatal(err)
	}
}

func TestResolveTakesTheReleasesOwnFolderAndThoseBelow(t *testing.T) {
	app := newApp(t)
	symlink(t, "web", filepath.Join(app.Release("v1"), "link"))
	symlink(t, app.Dir, filepath.Join(filepath.Dir(app.Dir), "alias"))
	for _, c := range []struct{ give, dir, sub string }{
		{app.Release("v1"), app.Release("v1"), ""},
		{app.Release("v1") + "/", app.Release("v1"), ""},
		{app.Release("v1") + "/../v1/./web", app.Release("v1") + "/web", "web"},
		{app.Release("v1") + "/web/api", app.Release("v1") + "/web/api", "web/api"},
		{app.Release("v1") + "/link/api", app.Release("v1") + "/web/api", "web/api"},
		{filepath.Join(filepath.Dir(app.Dir), "alias/releases/v1"), app.Release("v1"), ""},
	} {
		dir, err := Resolve(app, "v1", c.give)
		if err != nil || dir != c.dir || Sub(app, "v1", dir) != c.sub {
			t.Errorf("Resolve(%s) = %s (below: %q), %v; want %s (%q)", c.give, dir, Sub(app, "v1", dir), err, c.dir, c.sub)
		}
	}
	if got := Sub(app, "v2", app.Release("v1")+"/web"); got != "" {
		t.Errorf("Sub of another release's folder = %q, want none", got)
	}
}

func TestResolveKeepsTheDataRootAsItIsNamed(t *testing.T) {
	app := newApp(t)
	alias := filepath.Join(t.TempDir(), "data")
	symlink(t, filepath.Dir(filepath.Dir(app.Dir)), alias)
	named := paths.Layout{Data: alias}.App("blog")
	for _, give := range []string{named.Release("v1"), app.Release("v1")} {
		if dir, err := Resolve(named, "v1", give); err != nil || dir != named.Release("v1") {
			t.Errorf("Resolve(%s) = %s, %v; want %s", give, dir, err, named.Release("v1"))
		}
	}
}

func TestResolveRefuses(t *testing.T) {
	app := newApp(t)
	other := paths.Layout{Data: filepath.Dir(filepath.Dir(app.Dir))}.App("shop").Release("v1")
	outside := t.TempDir()
	for _, dir := range []string{other, filepath.Join(app.Dir, "releases-x"), app.Release("v10")} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	r := app.Releases()
	write(t, r+"/v1/file", "")
	symlink(t, outside, r+"/v1/out")
	symlink(t, "../v2", r+"/v1/sibling")
	symlink(t, "v2", r+"/v3")
	symlink(t, outside, r+"/v4")
	symlink(t, "loop", r+"/v1/loop")
	long := "/" + strings.Repeat("a", MaxPath)
	for _, c := range []struct{ version, give, want string }{
		{"v1", r + "/none", r + "/none (no such file or directory)"},
		{"v1", r + "/v1/loop", r + "/v1/loop (EvalSymlinks: too many links)"},
		{"v1", r + "/v1/\x00", r + "/v1/\x00 (invalid argument)"},
		{"v1", r + "/v1/" + strings.Repeat("a", 300), r + "/v1/" + strings.Repeat("a", 300) + " (file name too long)"},
		{"v1", "", " (not an absolute path)"},
		{"v1", "releases/v1", "releases/v1 (not an absolute path)"},
		{"v1", long, long[:80] + "... (longer than 4095 bytes)"},
		{"v1", r + "/v1/file", "'" + r + "/v1/file' must be an existing directory"},
		{"v1", "/", "'/' must stay under '" + r + "'"},
		{"v1", app.Dir, "'" + app.Dir + "' must stay under '" + r + "'"},
		{"v1", r + "/../releases-x", "'" + r + "-x' must stay under '" + r + "'"},
		{"v1", other, "'" + other + "' must stay under '" + r + "'"},
		{"v1", r + "/v1/out", "'" + outside + "' must stay under '" + r + "'"},
		{"v4", r + "/v4", "'" + outside + "' must stay under '" + r + "'"},
		{"v1", r, "'" + r + "' holds all releases; give the folder of release 'v1'"},
		{"v1", r + "/v1/..", "'" + r + "' holds all releases; give the folder of release 'v1'"},
		{"v1", r + "/v2", "'" + r + "/v2' belongs to release 'v2', not to 'v1'; give that release's own folder"},
		{"v1", r + "/v10", "'" + r + "/v10' belongs to release 'v10', not to 'v1'; give that release's own folder"},
		{"v1", r + "/v1/sibling/web", "'" + r + "/v2/web' belongs to release 'v2', not to 'v1'; give that release's own folder"},
		{"v3", r + "/v3", "'" + r + "/v2' belongs to release 'v2', not to 'v3'; give that release's own folder"},
	} {
		_, err := Resolve(app, tako.ReleaseID(c.version), c.give)
		refused(t, fmt.Sprintf("Resolve(%s, %.80s)", c.version, c.give), err, "Invalid release path: "+c.want)
	}
	none := paths.Layout{Data: filepath.Dir(filepath.Dir(app.Dir))}.App("none")
	_, err := Resolve(none, "v1", outside)
	refused(t, "app without releases", err, "Invalid release path: "+none.Releases()+" (no such file or directory)")
}

func TestListShowsNewestFirst(t *testing.T) {
	app := newApp(t)
	r := app.Releases()
	write(t, r+"/v1/app.json", `{"runtime": "node", "main": "a", "commit_message": "first", "git_dirty": true}`)
	write(t, r+"/v2/app.json", `{"commit_message": "no runtime, still listed", "git_dirty": "?"}`)
	write(t, r+"/v3/app.json", `{broken`)
	outside := filepath.Join(t.TempDir(), "app.json")
	write(t, outside, `{"commit_message": "not ours"}`)
	write(t, r+"/a4/x", "")
	symlink(t, outside, r+"/a4/app.json")
	write(t, r+"/file", "")
	write(t, r+"/not a release/app.json", "")
	symlink(t, "v1", r+"/link")
	for name, at := range map[string]int64{"v1": 1000, "v2": 3000, "v3": 2000, "a4": 2000} {
		if err := os.Chtimes(filepath.Join(r, name), time.Time{}, time.Unix(at, 5)); err != nil {
			t.Fatal(err)
		}
	}
	got, err := List(app, "v1", "")
	if err != nil {
		t.Fatal(err)
	}
	want := []Stored{
		{Version: "v2", DeployedAt: new(int64(3000)), CommitMessage: new("no runtime, still listed")},
		{Version: "v3", DeployedAt: new(int64(2000))},
		{Version: "a4", DeployedAt: new(int64(2000))},
		{Version: "v1", DeployedAt: new(int64(1000)), CommitMessage: new("first"), GitDirty: new(true), Current: true},
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got %+v, want %+v", got, want)
	}
}

func TestListLooksForManifestsBelowTheRelease(t *testing.T) {
	app := newApp(t)
	write(t, app.Release("v1")+"/web/app.json", `{"commit_message": "below"}`)
	outside := t.TempDir()
	write(t, outside+"/app.json", `{"commit_message": "not ours"}`)
	if err := os.RemoveAll(app.Release("v2") + "/web"); err != nil {
		t.Fatal(err)
	}
	symlink(t, outside, app.Release("v2")+"/web")
	got, err := List(app, "", "web")
	if err != nil || len(got) != 2 {
		t.Fatalf("List = %+v, %v", got, err)
	}
	for _, s := range got {
		if below := s.CommitMessage != nil && *s.CommitMessage == "below"; below != (s.Version == "v1") || s.Version == "v2" && s.CommitMessage != nil {
			t.Errorf("release %s has the message %v", s.Version, s.CommitMessage)
		}
	}
}

func TestListWithoutOrWithUnreadableReleases(t *testing.T) {
	app := paths.Layout{Data: t.TempDir()}.App("blog")
	if got, err := List(app, "", ""); err != nil || got == nil || len(got) != 0 {
		t.Errorf("List = %v, %v; want an empty list", got, err)
	}
	write(t, app.Releases(), "a file")
	_, err := List(app, "", "")
	if want := "Failed to read releases directory '" + app.Releases() + "': not a directory"; err == nil || err.Error() != want || tako.AsError(err).Code != tako.CodeFailed {
		t.Errorf("got %v, want %s", err, want)
	}
}

func TestSetCurrentMovesTheLink(t *testing.T) {
	app := newApp(t)
	if got := Current(app); got != "" {
		t.Errorf("Current without a link = %q", got)
	}
	for _, v := range []tako.ReleaseID{"v1", "v2", "v2"} {
		if err := SetCurrent(app, v); err != nil {
			t.Fatal(err)
		}
		target, err := os.Readlink(app.Current())
		if err != nil || target != "releases/"+string(v) || Current(app) != v {
			t.Errorf("current links to %q (%q), %v; want releases/%s", target, Current(app), err, v)
		}
	}
	if err := SetCurrent(app, "v9"); err == nil || Current(app) != "v2" {
		t.Errorf("SetCurrent to a release that is not there: %v, current is %q", err, Current(app))
	}
	entries, err := os.ReadDir(app.Dir)
	if err != nil || len(entries) != 2 { // releases and current
		t.Errorf("the app's folder holds %v, %v", entries, err)
	}
}
