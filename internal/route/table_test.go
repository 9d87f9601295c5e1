package route

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"pgregory.net/rapid"
)

func build(tb testing.TB, routes ...string) *Table[string] {
	tb.Helper()
	var entries []Entry[string]
	for _, s := range routes {
		entries = append(entries, Entry[string]{mustParse(tb, s), s})
	}
	t, err := Build(entries)
	if err != nil {
		tb.Fatal(err)
	}
	return t
}

func TestMatchTakesTheBestRoute(t *testing.T) {
	table := build(t,
		"example.com", "example.com/", "example.com/api", "example.com/api/*", "example.com/api/v2/*", "example.com/a%20b",
		"*.example.com", "*.eu.example.com", "*.example.com/only/*", "shop.eu.example.com/cart/*",
		"127.0.0.1", "localhost", "*.localhost/x", "xn--bcher-kva.example")
	for _, c := range []struct{ host, path, want string }{
		{"example.com", "/", "example.com/"},
		{"example.com", "//", "example.com/"},
		{"example.com", "", "example.com/"},
		{"example.com", "*", "example.com/"},
		{"example.com", "/x", "example.com"},
		{"example.com", "/api", "example.com/api"},
		{"example.com", "/api/", "example.com/api"},
		{"example.com", "/api//", "example.com/api"},
		{"example.com", "/api/v1", "example.com/api/*"},
		{"example.com", "/api/v2", "example.com/api/v2/*"},
		{"example.com", "/api/v2/x/y", "example.com/api/v2/*"},
		{"example.com", "/api/v22", "example.com/api/*"},
		{"example.com", "/apix", "example.com"},
		{"example.com", "/API", "example.com"},
		{"example.com", "/%61pi", "example.com"},
		{"example.com", "/a%20b/", "example.com/a%20b"},
		{"EXAMPLE.com.:443", "/api", "example.com/api"},
		{"a.example.com", "/", "*.example.com"},
		{"a.b.c.example.com", "/", "*.example.com"},
		{"a.example.com", "/only", "*.example.com/only/*"},
		{"eu.example.com", "/", "*.example.com"},
		{"a.eu.example.com", "/", "*.eu.example.com"},
		{"a.b.eu.example.com", "/only/x", "*.eu.example.com"},
		{"shop.eu.example.com", "/cart/1", "shop.eu.example.com/cart/*"},
		{"shop.eu.example.com", "/", "*.eu.example.com"}, // the exact host takes only /cart
		{"127.0.0.1:8080", "/", "127.0.0.1"},
		{"localhost", "/x", "localhost"},
		{"a.localhost", "/x/", "*.localhost/x"},
		{"XN--bcher-kva.EXAMPLE", "/", "xn--bcher-kva.example"},
		{"a_b.example.com", "/", "*.example.com"},

		{"a.localhost", "/y", ""},
		{"com", "/", ""},
		{"example.org", "/", ""},
		{"xexample.com", "/", ""},
		{".example.com", "/", ""},
		{"a..example.com", "/", ""},
		{"example.com..", "/", ""},
		{"*.example.com", "/", ""},
		{"example.com:", "/x", "example.com"},
		{"example.com:http", "/", ""},
		{"example.com:80:80", "/", ""},
		{"[::1]", "/", ""},
		{"[::1]:8080", "/", ""},
		{"::1", "/", ""},
		{"", "/", ""},
		{".", "/", ""},
		{":80", "/", ""},
		{"example.com/", "/", ""},
		{"user@example.com", "/", ""},
		{"exämple.example.com", "/", ""},
		{"a b.example.com", "/", ""},
		{strings.Repeat("a.", 200) + "example.com", "/", ""},
	} {
		v, p, ok := table.Match(c.host, c.path)
		if v != c.want || ok != (c.want != "") || ok && p != mustParse(t, c.want) {
			t.Errorf("Match(%q, %q) = %q, %v, %v; want %q", c.host, c.path, v, p, ok, c.want)
		}
	}
}

func TestNilAndEmptyTablesMatchNothing(t *testing.T) {
	for _, table := range []*Table[int]{nil, {}} {
		if _, _, ok := table.Match("example.com", "/"); ok || table.Len() != 0 {
			t.Errorf("an empty table matches")
		}
	}
}

func TestBuildRefusesADuplicateAndTheZeroPattern(t *testing.T) {
	p := mustParse(t, "example.com/a")
	if _, err := Build([]Entry[int]{{p, 1}, {p, 1}}); err == nil || err.Error() != "build the route table: two entries have the pattern example.com/a" {
		t.Errorf("duplicate: %v", err)
	}
	if _, err := Build([]Entry[int]{{Pattern{}, 1}}); err == nil || err.Error() != "build the route table: an entry has no pattern" {
		t.Errorf("zero pattern: %v", err)
	}
	table, err := Build([]Entry[int]{{p, 1}})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := table.With(nil, []Entry[int]{{p, 2}}); err == nil {
		t.Errorf("With took a second entry for %v", p)
	}
	if _, err := table.With(func(v int) bool { return v == 1 }, []Entry[int]{{p, 2}}); err != nil {
		t.Errorf("With could not replace %v: %v", p, err)
	}
}

// naive is Match as the package comment has it, over a plain list.
func naive(entries []Entry[int], host, path string) (int, bool) {
	host, _, _ = strings.Cut(strings.ToLower(host), ":")
	host = strings.TrimSuffix(host, ".")
	if !strings.HasPrefix(path, "/") {
		path = "/"
	}
	type rank struct{ exactHost, suffix, path, exactPath int }
	var best *rank
	value := 0
	for _, e := range entries {
		route := e.String()
		slash := strings.Index(route+"/", "/")
		h, p := route[:slash], route[slash:]
		var r rank
		switch {
		case h == host:
			r.exactHost = 1
		case strings.HasPrefix(h, "*") && strings.HasSuffix(host, h[1:]) && len(host) >= len(h):
			r.suffix = len(h)
		default:
			continue
		}
		switch {
		case p == "":
		case strings.HasSuffix(p, "/*"):
			p = strings.TrimSuffix(p, "/*")
			if path != p && !strings.HasPrefix(path, p+"/") {
				continue
			}
			r.path = len(p)
		default:
			r.path, r.exactPath = len(p), 1
			if strings.TrimRight(path, "/") != strings.TrimRight(p, "/") {
				continue
			}
		}
		if best == nil || slices.Compare([]int{r.exactHost, r.suffix, r.path, r.exactPath}, []int{best.exactHost, best.suffix, best.path, best.exactPath}) > 0 {
			best, value = &r, e.Value
		}
	}
	return value, best != nil
}

func drawHost(t *rapid.T) string {
	return strings.Join(rapid.SliceOfN(rapid.SampledFrom([]string{"a", "b", "c"}), 1, 4).Draw(t, "host"), ".")
}

func drawPath(t *rapid.T) string {
	var b strings.Builder
	for _, s := range rapid.SliceOfN(rapid.SampledFrom([]string{"x", "y", "xx"}), 0, 3).Draw(t, "path") {
		b.WriteString("/" + s)
	}
	return b.String()
}

func drawEntries(t *rapid.T) []Entry[int] {
	var entries []Entry[int]
	for i := range rapid.IntRange(0, 30).Draw(t, "n") {
		s := drawHost(t)
		if rapid.Bool().Draw(t, "wild") {
			s = "*." + s
		}
		s += drawPath(t) + rapid.SampledFrom([]string{"", "/", "/*"}).Draw(t, "end")
		p, err := Parse(s)
		if err != nil {
			t.Fatalf("Parse(%q): %v", s, err)
		}
		if !slices.ContainsFunc(entries, func(e Entry[int]) bool { return e.Pattern == p }) {
			entries = append(entries, Entry[int]{p, i + 1})
		}
	}
	return entries
}

func checkAgainstNaive(t *rapid.T, table *Table[int], entries []Entry[int]) {
	if table.Len() != len(entries) {
		t.Fatalf("Len() = %d, want %d", table.Len(), len(entries))
	}
	for range 20 {
		host := drawHost(t) + rapid.SampledFrom([]string{"", ".", ":80", ".:80"}).Draw(t, "tail")
		if rapid.Bool().Draw(t, "upper") {
			host = strings.ToUpper(host)
		}
		path := drawPath(t) + rapid.SampledFrom([]string{"", "/", "//"}).Draw(t, "slashes")
		want, wantOK := naive(entries, host, path)
		got, p, ok := table.Match(host, path)
		if got != want || ok != wantOK {
			t.Fatalf("Match(%q, %q) over %v = %d (%v), %v; want %d, %v", host, path, entries, got, p, ok, want, wantOK)
		}
	}
}

func TestMatchAgreesWithANaiveMatcher(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		entries := drawEntries(t)
		table, err := Build(entries)
		if err != nil {
			t.Fatal(err)
		}
		checkAgainstNaive(t, table, entries)
	})
}

func TestWithAgreesWithBuildAndLeavesTheOldTable(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		type kept struct {
			table   *Table[int]
			entries []Entry[int]
		}
		var history []kept
		var table *Table[int]
		var entries []Entry[int]
		for step := range rapid.IntRange(1, 5).Draw(t, "steps") {
			third := rapid.IntRange(0, 3).Draw(t, "third") // 3: nothing goes
			remove := func(v int) bool { return v%3 == third }
			entries = slices.DeleteFunc(slices.Clone(entries), func(e Entry[int]) bool { return remove(e.Value) })
			var add []Entry[int]
			for _, e := range drawEntries(t) {
				e.Value += 100 * step
				if !slices.ContainsFunc(entries, func(o Entry[int]) bool { return o.Pattern == e.Pattern }) {
					add = append(add, e)
				}
			}
			entries = append(entries, add...)
			next, err := table.With(remove, add)
			if err != nil {
				t.Fatal(err)
			}
			table = next
			history = append(history, kept{table, slices.Clone(entries)})
		}
		for _, k := range history {
			checkAgainstNaive(t, k.table, k.entries)
		}
	})
}

func FuzzMatch(f *testing.F) {
	for _, s := range []string{"example.com", "a.example.com:80", "[::1]:80", "a..b", "EXAMPLE.COM.", "\x00", ":", strings.Repeat("a.", 300)} {
		f.Add(s, "/api/x")
	}
	f.Add("example.com", "*")
	table := build(f, "example.com/api/*", "*.example.com", "*.com/x", "example.com/")
	f.Fuzz(func(t *testing.T, host, path string) {
		v, p, ok := table.Match(host, path)
		if ok != (v != "") || ok && mustParse(t, v) != p || !ok && p != (Pattern{}) {
			t.Fatalf("Match(%q, %q) = %q, %v, %v", host, path, v, p, ok)
		}
		if ok && !strings.Contains(strings.ToLower(host), strings.TrimPrefix(p.Host(), "*.")) {
			t.Fatalf("Match(%q, %q) = %v", host, path, p)
		}
	})
}

// big returns a table of n hosts, an app of three routes to each, and some hosts.
func big(tb testing.TB, n int) (*Table[int], []string) {
	tb.Helper()
	var entries []Entry[int]
	var hosts []string
	for i := range n {
		host := fmt.Sprintf("app-%d.example.com", i)
		if i%2 == 1 {
			host = fmt.Sprintf("*.app-%d.example.com", i)
		}
		for _, path := range []string{"", "/api/*", "/about"} {
			entries = append(entries, Entry[int]{mustParse(tb, host+path), i})
		}
		hosts = append(hosts, strings.Replace(host, "*", "www", 1))
	}
	rand.Shuffle(len(hosts), func(i, j int) { hosts[i], hosts[j] = hosts[j], hosts[i] })
	t, err := Build(entries)
	if err != nil {
		tb.Fatal(err)
	}
	return t, hosts
}

func TestMatchDoesNotAllocate(t *testing.T) {
	table, _ := big(t, 100)
	for _, host := range []string{
		"app-2.example.com", "APP-2.Example.COM", "app-2.example.com:8080", "APP-2.example.com.:8080", "a.B.c.app-3.example.com",
		"app-2.example.com.", "nobody.example.org", "[::1]:8080", "[2001:db8::1]", "::1", "", "bad host", strings.Repeat("a.", 126) + "b", strings.Repeat("A", 5000),
	} {
		for _, path := range []string{"/", "/api/x/y/", "/about///", "*"} {
			if n := testing.AllocsPerRun(100, func() { table.Match(host, path) }); n != 0 {
				t.Errorf("Match(%.40q, %q) allocates %v times", host, path, n)
			}
		}
	}
}

func BenchmarkMatch(b *testing.B) {
	table, hosts := big(b, 10_000)
	for _, c := range []struct{ name, tail, path string }{{"plain", "", "/"}, {"port and path", ".:8080", "/api/v1/users/1"}} {
		b.Run(c.name, func(b *testing.B) {
			asked := make([]string, len(hosts))
			for i, h := range hosts {
				asked[i] = h + c.tail
			}
			b.ReportAllocs()
			i := 0
			for b.Loop() {
				if _, _, ok := table.Match(asked[i%len(asked)], c.path); !ok {
					b.Fatal("no match")
				}
				i++
			}
		})
	}
	b.Run("unknown host", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			table.Match("a.b.c.d.example.org", "/")
		}
	})
	b.Run("126 labels", func(b *testing.B) {
		host := strings.Repeat("a.", 126) + "b"
		b.ReportAllocs()
		for b.Loop() {
			table.Match(host, "/")
		}
	})
}

func BenchmarkWith(b *testing.B) {
	table, _ := big(b, 10_000)
	add := []Entry[int]{{mustParse(b, "app-4.example.com"), 4}, {mustParse(b, "new.example.com"), 4}}
	b.ReportAllocs()
	for b.Loop() {
		if _, err := table.With(func(v int) bool { return v == 4 }, add); err != nil {
			b.Fatal(err)
		}
	}
}
