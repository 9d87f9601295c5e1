package route

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"unicode/utf8"

	"golang.org/x/net/idna"

	"tako/internal/tako"
)

// Bounds of routes. Lengths are in bytes, of the normalised text, but for
// MaxText, which is of what was given.
const (
	MaxText   = 4096
	MaxHost   = 253
	MaxLabel  = 63
	MaxPath   = 1024
	MaxPerApp = 200
)

// Pattern is a normalised route. Two patterns that match the same requests by
// the same words are ==, so a Pattern may be a map key. The zero Pattern is no
// route; the others come from Parse.
type Pattern struct {
	host string // A-labels in lower case, "*." before a wildcard's suffix
	path string // "" for every path, "/p" for that one, "/p/*" for it and all below
}

// String returns the text that Parse gives the same Pattern for.
func (p Pattern) String() string { return p.host + p.path }

// Host returns the host in lower case and A-labels, with "*." before the suffix
// of a wildcard: the name of the certificate the route needs.
func (p Pattern) Host() string { return p.host }

// Path returns the path: "" for every path, "/p" for exactly that one with or
// without slashes after it, "/p/*" for it and all below.
func (p Pattern) Path() string { return p.path }

// IsWildcard reports whether the host is a wildcard: any name below its suffix at
// any depth, but not the suffix itself.
func (p Pattern) IsWildcard() bool { return strings.HasPrefix(p.host, "*.") }

// IsPrefix reports whether the path stands for all below it too.
func (p Pattern) IsPrefix() bool { return p.path == "" || strings.HasSuffix(p.path, "/*") }

// Literal returns the path without a "/*" after it: what IsPrefix is about, and
// what a file below the route is looked up without.
func (p Pattern) Literal() string { return strings.TrimSuffix(p.path, "/*") }

// Parse makes a Pattern of "host", "host/path" or "host/path/*". The error is a
// CodeInvalid Error that names the route and says what to do.
func Parse(s string) (Pattern, error) {
	if len(s) > MaxText {
		return Pattern{}, invalid(s, "it is longer than %d bytes; shorten it", MaxText)
	}
	for i := range len(s) {
		switch c := s[i]; {
		case c == ' ' || c == '\t':
			return Pattern{}, invalid(s, "it has a space in it; take it out")
		case c < ' ' || c == 0x7f:
			return Pattern{}, invalid(s, "it has the control byte 0x%02x in it; take it out", c)
		}
	}
	host, path := s, ""
	if i := strings.IndexByte(s, '/'); i >= 0 {
		host, path = s[:i], s[i:]
	}
	host, why := parseHost(host, path)
	if why != "" {
		return Pattern{}, invalid(s, "%s", why)
	}
	path, why = parsePath(path)
	if why != "" {
		return Pattern{}, invalid(s, "%s", why)
	}
	return Pattern{host: host, path: path}, nil
}

// ParseAll makes the patterns of one app, in the order given; one that repeats
// an earlier one is left out. The errors are CodeInvalid Errors.
func ParseAll(routes []string) ([]Pattern, error) {
	if len(routes) == 0 {
		return nil, tako.Errorf(tako.CodeInvalid, "Deploy rejected: app must define at least one route")
	}
	if len(routes) > MaxPerApp {
		return nil, tako.Errorf(tako.CodeInvalid, "Deploy rejected: %d routes are more than the %d an app may have. Use a wildcard host or a /* path in place of several.", len(routes), MaxPerApp)
	}
	for _, s := range routes {
		if strings.TrimSpace(s) == "" {
			return nil, tako.Errorf(tako.CodeInvalid, "Deploy rejected: routes must be non-empty values")
		}
	}
	all := make([]Pattern, 0, len(routes))
	seen := make(map[Pattern]bool, len(routes))
	for _, s := range routes {
		p, err := Parse(s)
		if err != nil {
			return nil, err
		}
		if !seen[p] {
			seen[p] = true
			all = append(all, p)
		}
	}
	return all, nil
}

// Conflict says whether app may have the patterns in want, given what every app
// holds; what app itself holds is no matter. The error is a CodeConflict Error
// that names the first pattern of want that another app holds, and that app.
func Conflict(held map[tako.AppID][]Pattern, app tako.AppID, want []Pattern) error {
	owner := make(map[Pattern]tako.AppID)
	for other, patterns := range held {
		if other == app {
			continue
		}
		for _, p := range patterns {
			if o, ok := owner[p]; !ok || other < o {
				owner[p] = other
			}
		}
	}
	for _, p := range want {
		if o, ok := owner[p]; ok {
			return tako.Errorf(tako.CodeConflict, "Deploy rejected: route '%s' is already used by app '%s'. Remove it there or choose another.", p, o)
		}
	}
	return nil
}

// invalid is the error for the route s. What is quoted of it is bounded.
func invalid(s, format string, args ...any) error {
	const most = 256
	quoted := fmt.Sprintf("%q", s)
	if len(s) > most {
		quoted = fmt.Sprintf("%q...", s[:most])
	}
	return tako.Errorf(tako.CodeInvalid, "Invalid route %s: %s.", quoted, fmt.Sprintf(format, args...))
}

// parseHost normalises a host without spaces and control bytes. path is what
// followed it, for better advice only. Why is "" when all is well.
func parseHost(s, path string) (host, why string) {
	if s == "" {
		return "", "it has no host; begin it with one, like example.com/path"
	}
	if strings.HasSuffix(s, ":") && strings.HasPrefix(path, "//") {
		return "", "it is a URL; leave out the " + s + "//"
	}
	if s[0] == '[' || strings.Count(s, ":") > 1 {
		return "", "an IPv6 address cannot be a host here; use a name"
	}
	if strings.Contains(s, ":") {
		return "", "it has a port; leave that out, the server's ports serve every route"
	}
	prefix, suffix := "", s
	if rest, ok := strings.CutPrefix(s, "*."); ok {
		prefix, suffix = "*.", rest
	}
	if s == "*" || strings.Contains(suffix, "*") {
		return "", "a * stands only for the whole front of a host, as in *.example.com; write the host out"
	}
	name, err := toASCII(suffix)
	if err != nil {
		return "", "the host is not a valid international name (" + err.Error() + "); correct it or write its xn-- form"
	}
	name = strings.TrimSuffix(name, ".")
	if len(prefix)+len(name) > MaxHost {
		return "", fmt.Sprintf("its host is longer than %d bytes; shorten it", MaxHost)
	}
	last := ""
	for label := range strings.SplitSeq(name, ".") {
		if label == "" {
			return "", "its host has an empty label; take out the extra dot"
		}
		if len(label) > MaxLabel {
			return "", fmt.Sprintf("a label of its host is longer than %d bytes; shorten it", MaxLabel)
		}
		if label[0] == '-' || label[len(label)-1] == '-' {
			return "", "a label of its host begins or ends with '-'; take that out"
		}
		for i := range len(label) {
			if c := label[i]; (c < 'a' || c > 'z') && (c < '0' || c > '9') && c != '-' {
				return "", fmt.Sprintf("its host has %q in it; only letters, digits, '-' and dots are allowed", c)
			}
		}
		last = label
	}
	if looksNumeric(last) {
		// Browsers read such a host as an IPv4 address in an odd notation, or
		// refuse it: it would never arrive here as it was written.
		if addr, err := netip.ParseAddr(name); prefix != "" || err != nil || !addr.Is4() {
			return "", "its host ends in a number and is not an IPv4 address like 127.0.0.1; use a name"
		}
	}
	return prefix + name, ""
}

// toASCII maps a host to lower-case A-labels. A host of plain ASCII labels needs
// no more than folding: the stricter rules on hyphens would refuse names in use.
func toASCII(s string) (string, error) {
	if !utf8.ValidString(s) {
		return "", errors.New("it is not UTF-8")
	}
	plain := true
	for i := range len(s) {
		plain = plain && s[i] < utf8.RuneSelf
	}
	lower := strings.ToLower(s)
	if plain && !strings.HasPrefix(lower, "xn--") && !strings.Contains(lower, ".xn--") {
		return lower, nil
	}
	name, err := idna.Lookup.ToASCII(s)
	if err != nil {
		return "", err
	}
	// A name that is not its own normal form could be held twice.
	if again, err := idna.Lookup.ToASCII(name); err != nil || again != name {
		return "", errors.New("it has no stable form")
	}
	return name, nil
}

// looksNumeric reports whether a host that ends in label is read as an IPv4
// address by browsers.
func looksNumeric(label string) bool {
	hex := strings.HasPrefix(label, "0x")
	if hex {
		label = label[2:]
	}
	for i := range len(label) {
		c := label[i]
		if (c < '0' || c > '9') && (!hex || c < 'a' || c > 'f') {
			return false
		}
	}
	return true
}

// parsePath normalises a path, which is "" or begins with '/', without spaces
// and control bytes. Why is "" when all is well.
func parsePath(s string) (path, why string) {
	if s == "" || s == "/" || s == "/*" {
		return strings.TrimSuffix(s, "/*"), ""
	}
	literal, prefix := strings.CutSuffix(s, "/*")
	for i := 0; i < len(literal); i++ {
		switch c := literal[i]; {
		case c == '*':
			return "", "a * stands only at the end of a path and after a slash, as in /api/*; write the path out"
		case c == '?' || c == '#':
			return "", fmt.Sprintf("its path has %q in it; a route has no query and no fragment, leave them out", c)
		case c == '\\':
			return "", `its path has a backslash in it; use /`
		case c >= utf8.RuneSelf:
			return "", "its path is not plain ASCII; write it with percent escapes, as browsers send it"
		case c == '%':
			if i+2 >= len(literal) || !isHex(literal[i+1]) || !isHex(literal[i+2]) {
				return "", "its path has a % without two hexadecimal digits after it; correct the escape"
			}
			i += 2
		}
	}
	if strings.Contains(s, "//") {
		return "", "its path has two slashes in a row; leave one out"
	}
	literal = strings.TrimSuffix(literal, "/")
	for segment := range strings.SplitSeq(literal, "/") {
		if d := strings.ReplaceAll(strings.ToLower(segment), "%2e", "."); d == "." || d == ".." {
			return "", "its path has a segment . or .. in it; write the path out"
		}
	}
	path = literal
	if prefix {
		path += "/*"
	}
	if len(path) > MaxPath {
		return "", fmt.Sprintf("its path is longer than %d bytes; shorten it", MaxPath)
	}
	return path, ""
}

func isHex(c byte) bool {
	return c >= '0' && c <= '9' || c >= 'a' && c <= 'f' || c >= 'A' && c <= 'F'
}
