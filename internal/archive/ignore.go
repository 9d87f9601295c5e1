package archive

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"unicode/utf8"
)

// The files that say what stays at home.
const (
	gitIgnore  = ".gitignore"
	takoIgnore = ".takoignore"
)

// MaxIgnore bounds an ignore file, in bytes.
const MaxIgnore = 1 << 20

// A pattern is one line of an ignore file.
type pattern struct {
	parts   []string // between slashes; one part for a pattern without
	negated bool
	dirOnly bool
	// anywhere: the line had no slash but at its end, and is about the last part
	// of a path in any folder below.
	anywhere bool
}

// A ruleset is the patterns of one ignore file, and the folder they are about:
// "" for the top, else "a/b/".
type ruleset struct {
	base     string
	patterns []pattern
}

// parsePatterns reads an ignore file as git does: comments, negation with '!',
// '\' before a character that means something, spaces at the end of a line cut.
func parsePatterns(text []byte) []pattern {
	var list []pattern
	text = bytes.TrimPrefix(text, []byte("\xef\xbb\xbf"))
	for raw := range bytes.Lines(text) {
		line := string(raw)
		if cut, ok := strings.CutSuffix(line, "\n"); ok {
			line = strings.TrimSuffix(cut, "\r")
		}
		if strings.HasPrefix(line, "#") {
			continue
		}
		line = trimSpaces(line)
		var p pattern
		line, p.negated = strings.CutPrefix(line, "!")
		line, p.dirOnly = strings.CutSuffix(line, "/")
		p.anywhere = !strings.Contains(line, "/")
		if line = strings.TrimPrefix(line, "/"); line == "" {
			continue
		}
		p.parts = strings.Split(line, "/")
		list = append(list, p)
	}
	return list
}

// trimSpaces cuts the spaces at the end, up to one that '\' protects.
func trimSpaces(s string) string {
	keep := 0
	for i := 0; i < len(s); i++ {
		switch s[i] {
		case ' ':
			continue
		case '\\':
			i++
		}
		keep = min(i+1, len(s))
	}
	return s[:keep]
}

// match finds the last pattern about name, a path below the top. found is false
// if there is none.
func (r ruleset) match(name string, dir bool) (ignored, found bool) {
	rel, below := strings.CutPrefix(name, r.base)
	if !below {
		return false, false
	}
	for _, p := range slices.Backward(r.patterns) {
		if p.dirOnly && !dir {
			continue
		}
		if p.anywhere && matchPart(p.parts[0], path.Base(rel)) || !p.anywhere && matchParts(p.parts, strings.Split(rel, "/")) {
			return !p.negated, true
		}
	}
	return false, false
}

// matchParts matches parts of a path, where a part of only stars, two or more,
// stands for any number of them: at the end for at least one.
func matchParts(pat, name []string) bool {
	many := func(s string) bool { return len(s) >= 2 && strings.Trim(s, "*") == "" }
	star, from := -1, 0
	p, n := 0, 0
	for n < len(name) {
		switch {
		case p < len(pat) && many(pat[p]):
			if p == len(pat)-1 {
				return true
			}
			star, from = p, n
			p++
		case p < len(pat) && matchPart(pat[p], name[n]):
			p, n = p+1, n+1
		case star >= 0:
			from++
			p, n = star+1, from
		default:
			return false
		}
	}
	return p == len(pat)
}

// matchPart matches one part of a path with *, ?, [classes] and '\'.
func matchPart(pat, name string) bool {
	star, from := -1, 0
	p, n := 0, 0
	for n < len(name) {
		if p < len(pat) && pat[p] == '*' {
			star, from = p, n
			p++
			continue
		}
		if used, ok, valid := matchByte(pat[p:], name[n]); !valid {
			return false
		} else if ok {
			p, n = p+used, n+1
			continue
		}
		if star < 0 {
			return false
		}
		from++
		p, n = star+1, from
	}
	for p < len(pat) && pat[p] == '*' {
		p++
	}
	return p == len(pat)
}

// matchByte matches the first thing of pat against one byte and says how much of
// pat that was. valid is false for a pattern that can match nothing: one that
// ends in '\' or within a class.
func matchByte(pat string, c byte) (used int, ok, valid bool) {
	if pat == "" {
		return 0, false, true
	}
	switch pat[0] {
	case '?':
		return 1, true, true
	case '\\':
		if len(pat) == 1 {
			return 0, false, false
		}
		return 2, pat[1] == c, true
	case '[':
		return matchClass(pat, c)
	}
	return 1, pat[0] == c, true
}

// matchClass is matchByte for "[…]".
func matchClass(pat string, c byte) (used int, ok, valid bool) {
	i := 1
	negated := i < len(pat) && (pat[i] == '!' || pat[i] == '^')
	if negated {
		i++
	}
	for first := true; ; first = false {
		if i >= len(pat) {
			return 0, false, false
		}
		if pat[i] == ']' && !first {
			return i + 1, ok != negated, true
		}
		if strings.HasPrefix(pat[i:], "[:") {
			if name, _, closed := strings.Cut(pat[i+2:], ":]"); closed && !strings.Contains(name, "]") {
				in, known := inClass(name, c)
				if !known {
					return 0, false, false
				}
				ok = ok || in
				i += len(name) + 4
				continue
			}
		}
		lo, next, valid := classByte(pat, i)
		if !valid {
			return 0, false, false
		}
		hi := lo
		if next+1 < len(pat) && pat[next] == '-' && pat[next+1] != ']' {
			if hi, next, valid = classByte(pat, next+1); !valid {
				return 0, false, false
			}
		}
		ok = ok || lo <= c && c <= hi
		i = next
	}
}

// classByte reads one character of a class, '\' taken off.
func classByte(pat string, i int) (c byte, next int, valid bool) {
	if pat[i] == '\\' {
		if i++; i >= len(pat) {
			return 0, 0, false
		}
	}
	return pat[i], i + 1, true
}

func inClass(name string, c byte) (in, known bool) {
	lower, upper, digit := c >= 'a' && c <= 'z', c >= 'A' && c <= 'Z', c >= '0' && c <= '9'
	graph := c > ' ' && c < 0x7f
	switch name {
	case "alnum":
		return lower || upper || digit, true
	case "alpha":
		return lower || upper, true
	case "blank":
		return c == ' ' || c == '\t', true
	case "cntrl":
		return c < ' ' || c == 0x7f, true
	case "digit":
		return digit, true
	case "graph":
		return graph, true
	case "lower":
		return lower, true
	case "print":
		return graph || c == ' ', true
	case "punct":
		return graph && !lower && !upper && !digit, true
	case "space":
		return c == ' ' || c >= '\t' && c <= '\r', true
	case "upper":
		return upper, true
	case "xdigit":
		return digit || c >= 'a' && c <= 'f' || c >= 'A' && c <= 'F', true
	}
	return false, false
}

// rules are the ignore files that hold for a folder, the strongest last.
type rules struct {
	git, tako []ruleset
	// whole: .takoignore took this folder back in, and .gitignore files have no
	// say in it.
	whole bool
}

// ignores says whether name stays at home. What a .takoignore says goes before
// what any .gitignore says; within each the deepest file that has a pattern about
// name decides. back is whether a .takoignore took it in again.
func (r rules) ignores(name string, dir bool) (ignored, back bool) {
	for _, file := range slices.Backward(r.tako) {
		if ignored, found := file.match(name, dir); found {
			return ignored, !ignored
		}
	}
	if r.whole {
		return false, false
	}
	for _, file := range slices.Backward(r.git) {
		if ignored, found := file.match(name, dir); found {
			return ignored, false
		}
	}
	return false, false
}

// below returns the rules of the folder name, whose ignore files open reads.
func (r rules) below(name string, open func(name string) (io.ReadCloser, error)) (rules, error) {
	base := ""
	if name != "." {
		base = name + "/"
	}
	for file, list := range map[string]*[]ruleset{gitIgnore: &r.git, takoIgnore: &r.tako} {
		set, err := readRules(base, base+file, open)
		if err != nil {
			return rules{}, err
		}
		if len(set.patterns) > 0 {
			// A new slice: the folders beside this one have the old one.
			*list = append((*list)[:len(*list):len(*list)], set)
		}
	}
	return r, nil
}

// readRules reads an ignore file; none is an empty set, as is a folder or a link
// of that name.
func readRules(base, file string, open func(name string) (io.ReadCloser, error)) (ruleset, error) {
	f, err := open(file)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, errNotFile) {
		return ruleset{}, nil
	}
	if err != nil {
		return ruleset{}, err
	}
	defer f.Close()
	text, err := io.ReadAll(io.LimitReader(f, MaxIgnore+1))
	switch {
	case err != nil:
		return ruleset{}, err
	case len(text) > MaxIgnore:
		return ruleset{}, refuse("%s has more than %d bytes", file, MaxIgnore)
	case !utf8.Valid(text):
		return ruleset{}, refuse("%s is not UTF-8", file)
	}
	return ruleset{base: base, patterns: parsePatterns(text)}, nil
}

var errNotFile = errors.New("not a regular file")

// above reads the .gitignore files of the folders from the top of the git work
// tree that dir is in down to, without, dir: in git they hold for dir too. They
// are left out if dir is itself something that they ignore, since it was named
// on purpose. The names that the rules take begin at that top: prefix stands
// before those in dir.
func above(dir string) (r rules, prefix string, err error) {
	dir, err = filepath.Abs(dir)
	if err != nil {
		return rules{}, "", err
	}
	if dir, err = filepath.EvalSymlinks(dir); err != nil {
		return rules{}, "", err
	}
	top := dir
	for {
		if _, err := os.Lstat(filepath.Join(top, ".git")); err == nil {
			break
		}
		if top == filepath.Dir(top) {
			return rules{}, "", nil // not in a work tree
		}
		top = filepath.Dir(top)
	}
	rel, err := filepath.Rel(top, dir)
	if err != nil || rel == "." {
		return rules{}, "", err
	}
	open := func(name string) (io.ReadCloser, error) { return openFile(filepath.Join(top, name)) }
	base := ""
	for part := range strings.SplitSeq(rel, "/") {
		set, err := readRules(base, base+gitIgnore, open)
		if err != nil {
			return rules{}, "", fmt.Errorf("in %s: %w", top, err)
		}
		r.git = append(r.git, set)
		if ignored, _ := r.ignores(base+part, true); ignored {
			return rules{}, "", nil
		}
		base += part + "/"
	}
	return r, base, nil
}

// openFile opens a regular file, without following a link or waiting for a fifo.
func openFile(name string) (io.ReadCloser, error) {
	info, err := os.Lstat(name)
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() {
		return nil, errNotFile
	}
	return os.Open(name)
}
