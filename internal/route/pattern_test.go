package route

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"tako/internal/tako"
)

func mustParse(tb testing.TB, s string) Pattern {
	tb.Helper()
	p, err := Parse(s)
	if err != nil {
		tb.Fatalf("Parse(%q): %v", s, err)
	}
	return p
}

func TestParseNormalises(t *testing.T) {
	label := strings.Repeat("a", MaxLabel)
	longest := label + "." + label + "." + label + "." + strings.Repeat("b", MaxHost-3*MaxLabel-3)
	for _, c := range []struct {
		give, host, path string
		wildcard         bool
	}{
		{"example.com", "example.com", "", false},
		{"EXAMPLE.Com", "example.com", "", false},
		{"example.com.", "example.com", "", false},
		{"example.com/*", "example.com", "", false},
		{"example.com/", "example.com", "/", false},
		{"example.com/a", "example.com", "/a", false},
		{"example.com/a/", "example.com", "/a", false},
		{"example.com/a/*", "example.com", "/a/*", false},
		{"example.com/A/b.c/*", "example.com", "/A/b.c/*", false},
		{"example.com/a%20b", "example.com", "/a%20b", false},
		{"example.com/...", "example.com", "/...", false},
		{"*.example.com", "*.example.com", "", true},
		{"*.Example.com./x", "*.example.com", "/x", true},
		{"*.localhost", "*.localhost", "", true},
		{"localhost", "localhost", "", false},
		{"127.0.0.1", "127.0.0.1", "", false},
		{"127.0.0.1/x", "127.0.0.1", "/x", false},
		{"1.example.com", "1.example.com", "", false},
		{"4chan", "4chan", "", false},
		{"a--b.example.com", "a--b.example.com", "", false},
		{"r3---sn-x.example.com", "r3---sn-x.example.com", "", false},
		{"bücher.example", "xn--bcher-kva.example", "", false},
		{"BÜCHER.example/x", "xn--bcher-kva.example", "/x", false},
		{"*.bücher.example", "*.xn--bcher-kva.example", "", true},
		{"XN--BCHER-KVA.example", "xn--bcher-kva.example", "", false},
		{"例え。テスト", "xn--r8jz45g.xn--zckzah", "", false},
		{"straße.de", "xn--strae-oqa.de", "", false},
		{"１２７.0.0.1", "127.0.0.1", "", false},
		{longest, longest, "", false},
		{"h/" + strings.Repeat("a", MaxPath-1), "h", "/" + strings.Repeat("a", MaxPath-1), false},
	} {
		p, err := Parse(c.give)
		if err != nil {
			t.Errorf("Parse(%q): %v", c.give, err)
			continue
		}
		if p.Host() != c.host || p.Path() != c.path || p.IsWildcard() != c.wildcard || p.String() != c.host+c.path {
			t.Errorf("Parse(%q) = host %q path %q wildcard %v, want %q %q %v", c.give, p.Host(), p.Path(), p.IsWildcard(), c.host, c.path, c.wildcard)
		}
		if again := mustParse(t, p.String()); again != p {
			t.Errorf("Parse(%q) = %v, want %v again", p, again, p)
		}
	}
}

func TestParseRefusesAndSaysWhatToDo(t *testing.T) {
	long := strings.Repeat("a", MaxLabel+1)
	for _, c := range []struct{ give, want string }{
		{"", "it has no host; begin it with one, like example.com/path"},
		{"/x", "it has no host; begin it with one, like example.com/path"},
		{"https://example.com/", "it is a URL; leave out the https://"},
		{"example.com:8080", "it has a port; leave that out, the server's ports serve every route"},
		{"example.com:8080/x", "it has a port; leave that out, the server's ports serve every route"},
		{"::1", "an IPv6 address cannot be a host here; use a name"},
		{"[::1]", "an IPv6 address cannot be a host here; use a name"},
		{"*", "a * stands only for the whole front of a host, as in *.example.com; write the host out"},
		{"*/x", "a * stands only for the whole front of a host, as in *.example.com; write the host out"},
		{"*.*.example.com", "a * stands only for the whole front of a host, as in *.example.com; write the host out"},
		{"a.*.com", "a * stands only for the whole front of a host, as in *.example.com; write the host out"},
		{"a*.example.com", "a * stands only for the whole front of a host, as in *.example.com; write the host out"},
		{"*.", "its host has an empty label; take out the extra dot"},
		{".", "its host has an empty label; take out the extra dot"},
		{".example.com", "its host has an empty label; take out the extra dot"},
		{"a..example.com", "its host has an empty label; take out the extra dot"},
		{"example.com..", "its host has an empty label; take out the extra dot"},
		{long + ".com", "a label of its host is longer than 63 bytes; shorten it"},
		{strings.Repeat("a.", 126) + "bc", "its host is longer than 253 bytes; shorten it"},
		{"*." + strings.Repeat("a.", 125) + "bc", "its host is longer than 253 bytes; shorten it"},
		{"-a.com", "a label of its host begins or ends with '-'; take that out"},
		{"a-.com", "a label of its host begins or ends with '-'; take that out"},
		{"a_b.com", `its host has '_' in it; only letters, digits, '-' and dots are allowed`},
		{"user@example.com", `its host has '@' in it; only letters, digits, '-' and dots are allowed`},
		{"example.com?x", `its host has '?' in it; only letters, digits, '-' and dots are allowed`},
		{"xn--a.com", "the host is not a valid international name (idna: invalid label \"\\u0080\"); correct it or write its xn-- form"},
		{"a.com\xff", "the host is not a valid international name (it is not UTF-8); correct it or write its xn-- form"},
		{"1.2.3", "its host ends in a number and is not an IPv4 address like 127.0.0.1; use a name"},
		{"256.1.1.1", "its host ends in a number and is not an IPv4 address like 127.0.0.1; use a name"},
		{"127.0.0.01", "its host ends in a number and is not an IPv4 address like 127.0.0.1; use a name"},
		{"0x7f.0x1", "its host ends in a number and is not an IPv4 address like 127.0.0.1; use a name"},
		{"*.0.0.1", "its host ends in a number and is not an IPv4 address like 127.0.0.1; use a name"},
		{"*.127.0.0.1", "its host ends in a number and is not an IPv4 address like 127.0.0.1; use a name"},
		{"h/a b", "it has a space in it; take it out"},
		{" h", "it has a space in it; take it out"},
		{"h\n", "it has the control byte 0x0a in it; take it out"},
		{"h/\x00", "it has the control byte 0x00 in it; take it out"},
		{"h/\x7f", "it has the control byte 0x7f in it; take it out"},
		{"h/a*", "a * stands only at the end of a path and after a slash, as in /api/*; write the path out"},
		{"h/*/a", "a * stands only at the end of a path and after a slash, as in /api/*; write the path out"},
		{"h/a/*/", "a * stands only at the end of a path and after a slash, as in /api/*; write the path out"},
		{"h/**", "a * stands only at the end of a path and after a slash, as in /api/*; write the path out"},
		{"h/a?b", "its path has '?' in it; a route has no query and no fragment, leave them out"},
		{"h/a#b", "its path has '#' in it; a route has no query and no fragment, leave them out"},
		{`h/a\b`, "its path has a backslash in it; use /"},
		{"h/ü", "its path is not plain ASCII; write it with percent escapes, as browsers send it"},
		{"h/a%2", "its path has a % without two hexadecimal digits after it; correct the escape"},
		{"h/a%zz", "its path has a % without two hexadecimal digits after it; correct the escape"},
		{"h/a%2/*", "its path has a % without two hexadecimal digits after it; correct the escape"},
		{"h//", "its path has two slashes in a row; leave one out"},
		{"h//*", "its path has two slashes in a row; leave one out"},
		{"h/a//b", "its path has two slashes in a row; leave one out"},
		{"h/a//", "its path has two slashes in a row; leave one out"},
		{"h/a//*", "its path has two slashes in a row; leave one out"},
		{"h/.", "its path has a segment . or .. in it; write the path out"},
		{"h/../a", "its path has a segment . or .. in it; write the path out"},
		{"h/a/..", "its path has a segment . or .. in it; write the path out"},
		{"h/a/%2E./*", "its path has a segment . or .. in it; write the path out"},
		{"h/" + strings.Repeat("a", MaxPath), "its path is longer than 1024 bytes; shorten it"},
		{"h/" + strings.Repeat("a", MaxPath-2) + "/*", "its path is longer than 1024 bytes; shorten it"},
		{strings.Repeat("a", MaxText+1), "it is longer than 4096 bytes; shorten it"},
	} {
		_, err := Parse(c.give)
		var e *tako.Error
		if !errors.As(err, &e) || e.Code != tako.CodeInvalid {
			t.Errorf("Parse(%.80q) = %v, want a CodeInvalid error", c.give, err)
			continue
		}
		quoted := fmt.Sprintf("%q", c.give)
		if len(c.give) > 256 {
			quoted = fmt.Sprintf("%q...", c.give[:256])
		}
		if want := "Invalid route " + quoted + ": " + c.want + "."; e.Message != want {
			t.Errorf("Parse(%.80q):\n got %s\nwant %s", c.give, e.Message, want)
		}
	}
}

func TestParseAllMergesDuplicatesAndKeepsOrder(t *testing.T) {
	got, err := ParseAll([]string{"b.com", "a.com/x/", "B.com.", "a.com/x", "*.a.com", "b.com/*"})
	if err != nil {
		t.Fatal(err)
	}
	want := []Pattern{mustParse(t, "b.com"), mustParse(t, "a.com/x"), mustParse(t, "*.a.com")}
	if fmt.Sprint(got) != fmt.Sprint(want) {
		t.Fatalf("got %v, want %v", got, want)
	}
}

func TestParseAllRefuses(t *testing.T) {
	many := make([]string, MaxPerApp+1)
	for i := range many {
		many[i] = fmt.Sprintf("h%d.com", i)
	}
	if got, err := ParseAll(many[:MaxPerApp]); err != nil || len(got) != MaxPerApp {
		t.Fatalf("ParseAll of %d routes = %d, %v", MaxPerApp, len(got), err)
	}
	for _, c := range []struct {
		give []string
		want string
	}{
		{nil, "Deploy rejected: app must define at least one route"},
		{[]string{}, "Deploy rejected: app must define at least one route"},
		{[]string{"a.com", ""}, "Deploy rejected: routes must be non-empty values"},
		{[]string{"a.com", " \t\n"}, "Deploy rejected: routes must be non-empty values"},
		{many, "Deploy rejected: 201 routes are more than the 200 an app may have. Use a wildcard host or a /* path in place of several."},
		{[]string{"a.com", "*"}, `Invalid route "*": a * stands only for the whole front of a host, as in *.example.com; write the host out.`},
	} {
		_, err := ParseAll(c.give)
		var e *tako.Error
		if !errors.As(err, &e) || e.Code != tako.CodeInvalid || e.Message != c.want {
			t.Errorf("ParseAll(%d routes) = %v, want %s", len(c.give), err, c.want)
		}
	}
}

func TestConflictNamesTheOtherAppAndThePattern(t *testing.T) {
	p := func(s ...string) []Pattern {
		all, err := ParseAll(s)
		if err != nil {
			t.Fatal(err)
		}
		return all
	}
	held := map[tako.AppID][]Pattern{
		"blog":  p("blog.com", "*.blog.com", "blog.com/admin"),
		"shop":  p("shop.com", "blog.com/shop/*"),
		"shop2": p("shop.com"), // cannot be, yet the answer must not depend on a map's order
	}
	for range 20 {
		err := Conflict(held, "new", p("free.com", "SHOP.com.", "blog.com"))
		var e *tako.Error
		want := "Deploy rejected: route 'shop.com' is already used by app 'shop'. Remove it there or choose another."
		if !errors.As(err, &e) || e.Code != tako.CodeConflict || e.Message != want {
			t.Fatalf("Conflict = %v, want %s", err, want)
		}
	}
	if err := Conflict(held, "blog", p("blog.com", "*.blog.com", "new.com")); err != nil {
		t.Errorf("its own patterns: %v, want none", err)
	}
	if err := Conflict(held, "new", p("api.blog.com", "blog.com/shop", "*.com", "www.blog.com/admin")); err != nil {
		t.Errorf("patterns that only overlap: %v, want none", err)
	}
}

func FuzzParse(f *testing.F) {
	for _, s := range []string{"example.com", "*.example.com/a/*", "BÜCHER.example./x/", "例え。テスト", "h/%2e%2E", "*", "[::1]:80/", "127.0.0.1", "xn--a", "a\u00adb.com", "א1.com"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		p, err := Parse(s)
		if err != nil {
			var e *tako.Error
			if !errors.As(err, &e) || e.Code != tako.CodeInvalid || len(e.Message) > 8192 {
				t.Fatalf("Parse(%q) = %#v, want a CodeInvalid error of a bounded length", s, err)
			}
			return
		}
		again, err := Parse(p.String())
		if err != nil || again != p {
			t.Fatalf("Parse(%q) = %q; again: %q, %v", s, p, again, err)
		}
		if len(p.Host()) > MaxHost || len(p.Path()) > MaxPath {
			t.Fatalf("Parse(%q) is too long: %q", s, p)
		}
		table, err := Build([]Entry[int]{{p, 1}})
		if err != nil {
			t.Fatal(err)
		}
		host, path := p.Host(), p.Literal()
		if p.IsWildcard() {
			host = "a" + host[1:]
		}
		if path == "" {
			path = "/x"
		}
		if len(host) <= MaxHost {
			if _, got, ok := table.Match(strings.ToUpper(host)+".:80", path); !ok || got != p {
				t.Fatalf("%q does not match its own %s%s", p, host, path)
			}
		}
	})
}
