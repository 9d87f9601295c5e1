package archive

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// Each line of a .gitignore, the paths (a slash at the end: a folder), and those
// that stay at home.
var ignoreCases = []struct {
	name   string
	files  map[string]string
	paths  string
	ignore string
}{
	{"a name in any folder", map[string]string{".gitignore": "a.log\n"}, "a.log b/a.log b/c/a.log ba.log a.log.x", "a.log b/a.log b/c/a.log"},
	{"anchored", map[string]string{".gitignore": "/a\n"}, "a b/a", "a"},
	{"a slash in the middle anchors", map[string]string{".gitignore": "b/a\n"}, "b/a c/b/a", "b/a"},
	{"folders only", map[string]string{".gitignore": "out/\n"}, "out/x b/out", "out/x"},
	{"negation", map[string]string{".gitignore": "*.log\n!keep.log\n"}, "a.log keep.log b/keep.log", "a.log"},
	{"no way back into an ignored folder", map[string]string{".gitignore": "d/\n!d/a\n"}, "d/a", "d/a"},
	{"back by content", map[string]string{".gitignore": "d/*\n!d/a\n"}, "d/a d/b", "d/b"},
	{"nested file is stronger", map[string]string{".gitignore": "*.txt\n", "b/.gitignore": "!a.txt\n/c\n"}, "a.txt b/a.txt c b/c b/d/c", "a.txt b/c"},
	{"leading double star", map[string]string{".gitignore": "**/x/y\n"}, "x/y a/x/y a/b/x/y x/z/y", "x/y a/x/y a/b/x/y"},
	{"trailing double star", map[string]string{".gitignore": "a/**\n"}, "a/b a/c/d b/a", "a/b a/c/d"},
	{"middle double star", map[string]string{".gitignore": "a/**/b\n"}, "a/b a/x/b a/x/y/b c/a/b", "a/b a/x/b a/x/y/b"},
	{"double star in a name is one", map[string]string{".gitignore": "a/x**y\n"}, "a/xy a/xzzy a/x/y", "a/xy a/xzzy"},
	{"star stops at a slash", map[string]string{".gitignore": "a/*.c\n"}, "a/b.c a/b/c.c", "a/b.c"},
	{"question and classes", map[string]string{".gitignore": "?.o\n[a-c]x\n[!a]y\n[[:digit:]]z\n[]]w\n[a-]v\n"}, "a.o ab.o bx dx ay by 1z az ]w -v av bv", "a.o bx by 1z ]w -v av"},
	{"escapes", map[string]string{".gitignore": "\\#a\n\\!b\nc\\*\nd\\ \n"}, "#a !b c* cc", "#a !b c*"},
	{"comments and spaces", map[string]string{".gitignore": "#a\n\n  \nb   \n\tc\n"}, "#a a b c", "b"},
	{"carriage returns and a byte order mark", map[string]string{".gitignore": "\xef\xbb\xbfa\r\nb\r\n"}, "a b c", "a b"},
	{"broken patterns match nothing", map[string]string{".gitignore": "[a\nb\\\n/\n!\n"}, "a [a b", ""},
	{"stars everywhere", map[string]string{".gitignore": "*\n!*/\n!*.go\n"}, "a.go a.c b/a.go b/a.c", "a.c b/a.c"},
	{"only stars", map[string]string{".gitignore": "/**\n!/keep\n"}, "a keep", "a"},
	{"literal runs backtrack", map[string]string{".gitignore": "*ab*abc\n"}, "xabyababc abab", "xabyababc"},
}

func TestIgnoreMeansWhatItMeansToGit(t *testing.T) {
	for _, c := range ignoreCases {
		t.Run(c.name, func(t *testing.T) {
			dir := tree(t, c.files)
			want := map[string]bool{}
			for p := range strings.FieldsSeq(c.ignore) {
				want[p] = true
			}
			for p := range strings.FieldsSeq(c.paths) {
				write(t, dir, p, "x")
			}
			l, err := List(t.Context(), dir, Options{})
			if err != nil {
				t.Fatal(err)
			}
			defer l.Close()
			for p := range strings.FieldsSeq(c.paths) {
				if got := !l.Has(p); got != want[p] {
					t.Errorf("%s: ignored %v, want %v", p, got, want[p])
				}
				if ignored, ok := askGit(t, dir, p); ok && ignored != want[p] {
					t.Errorf("%s: git says ignored %v, the table %v", p, ignored, want[p])
				}
			}
		})
	}
}

// askGit reports what git check-ignore says; ok is false without git.
func askGit(t testing.TB, dir, name string) (ignored, ok bool) {
	t.Helper()
	git, err := exec.LookPath("git")
	if err != nil {
		return false, false
	}
	run := func(args ...string) error {
		cmd := exec.Command(git, args...)
		cmd.Dir = dir
		cmd.Env = append(os.Environ(), "GIT_CONFIG_GLOBAL=/dev/null", "GIT_CONFIG_SYSTEM=/dev/null")
		return cmd.Run()
	}
	if _, err := os.Stat(filepath.Join(dir, ".git")); err != nil {
		if err := run("init", "-q"); err != nil {
			t.Fatalf("git init: %v", err)
		}
	}
	return run("check-ignore", "-q", "--no-index", "--", name) == nil, true
}

func TestTakoIgnoreGoesBeforeGitIgnore(t *testing.T) {
	dir := tree(t, map[string]string{
		".gitignore": "dist/\n*.js\n.env\n", ".takoignore": "!dist/\n*.md\n", "a.js": "", "b.md": "", ".env": "",
		"dist/a.js": "", "dist/.gitignore": "*\n", "dist/deep/b.js": "", "dist/c.md": "", ".git/config": "", "dist/.git": "",
	})
	got := names(t, dir)
	want := ".gitignore .takoignore dist/ dist/.gitignore dist/a.js dist/deep/ dist/deep/b.js"
	if got != want {
		t.Errorf("packed %s\n  want %s", got, want)
	}
}

func TestIgnoreFilesAboveHoldInAWorkTree(t *testing.T) {
	top := tree(t, map[string]string{
		".git/config": "", ".gitignore": ".env\n/apps/web/secret\nbuild/\n", "apps/.gitignore": "node_modules\n",
		"apps/web/.env": "", "apps/web/secret": "", "apps/web/node_modules/x": "", "apps/web/a": "", "build/.env": "",
	})
	if got, want := names(t, filepath.Join(top, "apps/web")), "a"; got != want {
		t.Errorf("packed %s, want %s", got, want)
	}
	if got, want := names(t, filepath.Join(top, "build")), ".env"; got != want {
		t.Errorf("an ignored folder that was named: packed %s, want %s", got, want)
	}
}

func names(t testing.TB, dir string) string {
	t.Helper()
	l, err := List(t.Context(), dir, Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	var list []string
	for _, e := range l.entries {
		if e.info.IsDir() {
			e.name += "/"
		}
		list = append(list, e.name)
	}
	return strings.Join(list, " ")
}

func tree(t testing.TB, files map[string]string) string {
	t.Helper()
	dir := t.TempDir()
	for name, text := range files {
		write(t, dir, name, text)
	}
	return dir
}

func write(t testing.TB, dir, name, text string) {
	t.Helper()
	name = filepath.Join(dir, name)
	if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(name, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}
