package wire

import (
	"bytes"
	"encoding/json"
	"flag"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"maps"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"testing"

	"go.uber.org/goleak"

	"tako/internal/ipc"
	"tako/internal/tako"
)

var update = flag.Bool("update", false, "write the golden files anew")

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// golden compares got with a file in testdata.
func golden(t testing.TB, name, got string) {
	t.Helper()
	name = filepath.Join("testdata", name)
	if *update {
		if err := os.WriteFile(name, []byte(got), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	b, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	want := strings.Split(string(b), "\n")
	for i, line := range strings.Split(got, "\n") {
		if i >= len(want) || line != want[i] {
			t.Fatalf("%s line %d: got %q; see what changed with -update: kinds are never used for something else", name, i+1, line)
		}
	}
	if got != string(b) {
		t.Errorf("%s has lines that are gone", name)
	}
}

// each calls f for every rule in a fixed order.
func each(f func(link Link, from Role, r *Rule)) {
	for _, link := range []Link{LinkProxy, LinkAgent, LinkSigning, LinkDialing, LinkSecond} {
		for _, from := range slices.Sorted(maps.Keys(permits[link])) {
			for i := range permits[link][from] {
				f(link, from, &permits[link][from][i])
			}
		}
	}
}

func name(r *Rule) string { return r.body.Elem().Name() }

func TestTableIsTheOneAgreedOn(t *testing.T) {
	var b strings.Builder
	fmt.Fprintln(&b, "kind message           link           from         in                            once files reply next")
	each(func(link Link, from Role, r *Rule) {
		var in []string
		for _, s := range r.In {
			in = append(in, s.String())
		}
		files, next := strconv.Itoa(r.Files), "-"
		if r.FilesOf != nil {
			files = "*"
		}
		if r.Next != Starting {
			next = r.Next.String()
		}
		yes := map[bool]string{true: "yes", false: "-"}
		fmt.Fprintf(&b, "%4d %-17s %-14s %-12s %-29s %-4s %-5s %-5s %s\n",
			r.Kind, name(r), link, from, strings.Join(in, ","), yes[r.Once], files, yes[r.Reply], next)
	})
	golden(t, "table.golden", b.String())
}

// kinds reads the constants of kinds.go.
func kinds(t testing.TB) map[string]Kind {
	t.Helper()
	f, err := parser.ParseFile(token.NewFileSet(), "kinds.go", nil, 0)
	if err != nil {
		t.Fatal(err)
	}
	all := make(map[string]Kind)
	ast.Inspect(f, func(n ast.Node) bool {
		spec, ok := n.(*ast.ValueSpec)
		if !ok {
			return true
		}
		for i, id := range spec.Names {
			lit, ok := spec.Values[i].(*ast.BasicLit)
			if !ok {
				t.Fatalf("%s is not a written number", id.Name)
			}
			n, err := strconv.ParseUint(lit.Value, 10, 16)
			if err != nil {
				t.Fatalf("%s: %v", id.Name, err)
			}
			all[strings.TrimPrefix(id.Name, "Kind")] = Kind(n)
		}
		return true
	})
	return all
}

func TestEveryKindIsInTheTableUnderItsOwnName(t *testing.T) {
	all := kinds(t)
	used := make(map[Kind]string)
	for n, k := range all {
		if other, ok := used[k]; ok {
			t.Errorf("%s and %s are both %d", n, other, k)
		}
		used[k] = n
	}
	seen := make(map[string]bool)
	ranges := map[Link]Kind{LinkProxy: 100, LinkAgent: 200, LinkSigning: 300, LinkDialing: 300, LinkSecond: 400}
	each(func(link Link, from Role, r *Rule) {
		seen[name(r)] = true
		if used[r.Kind] != name(r) {
			t.Errorf("%s from %s: kind %d is %s, the message is %s", link, from, r.Kind, used[r.Kind], name(r))
		}
		if low := ranges[link]; r.Kind >= 100 && (r.Kind < low || r.Kind >= low+100) {
			t.Errorf("%s: kind %d is outside its range", link, r.Kind)
		}
		if len(r.In) == 0 || r.Files < 0 || r.Files > ipc.MaxFiles {
			t.Errorf("%s from %s: %s can never be sent", link, from, name(r))
		}
	})
	for n := range all {
		if !seen[n] {
			t.Errorf("Kind%s is in no table", n)
		}
	}
	for link, sides := range permits {
		if len(sides) != 2 {
			t.Errorf("%s has %d sides", link, len(sides))
		}
		for from, rules := range sides {
			byKind, byType := map[Kind]bool{}, map[reflect.Type]bool{}
			for _, r := range rules {
				if byKind[r.Kind] || byType[r.body] {
					t.Errorf("%s from %s: %d stands there twice", link, from, r.Kind)
				}
				byKind[r.Kind], byType[r.body] = true, true
			}
		}
	}
}

// fill sets every field to something that shows where it went.
func fill(t testing.TB, v reflect.Value, path string, n *int) {
	t.Helper()
	*n++
	if v.Type() == reflect.TypeFor[tako.InstanceID]() {
		v.Set(reflect.ValueOf(tako.InstanceID{App: "blog", N: uint32(*n)})) // small
		return
	}
	switch v.Kind() { //nolint:exhaustive // the default fails
	case reflect.Struct:
		for i := range v.NumField() {
			f := v.Type().Field(i)
			if f.Tag.Get("json") == "" {
				t.Errorf("%s.%s has no json name", path, f.Name)
			}
			fill(t, v.Field(i), f.Name, n)
		}
	case reflect.String:
		v.SetString(strings.ToLower(path) + strconv.Itoa(*n))
	case reflect.Bool:
		v.SetBool(true)
	case reflect.Int, reflect.Int64:
		v.SetInt(int64(*n))
	case reflect.Uint16, reflect.Uint32, reflect.Uint64:
		v.SetUint(uint64(*n)) // small
	case reflect.Uint8:
		v.SetUint(uint64(*n % 256)) // small
	case reflect.Slice:
		v.Set(reflect.MakeSlice(v.Type(), 2, 2))
		fallthrough
	case reflect.Array:
		for i := range v.Len() {
			fill(t, v.Index(i), path, n)
		}
	default:
		t.Fatalf("%s is a %s: say here how to fill it", path, v.Type())
	}
}

func example(t testing.TB, r *Rule) any {
	body, n := r.New(), 0
	fill(t, reflect.ValueOf(body).Elem(), name(r), &n)
	return body
}

func TestExampleOfEveryMessage(t *testing.T) {
	var b strings.Builder
	seen := make(map[Kind]bool)
	each(func(_ Link, _ Role, r *Rule) {
		if seen[r.Kind] {
			return
		}
		seen[r.Kind] = true
		body := example(t, r)
		text, err := json.Marshal(body)
		if err != nil {
			t.Fatalf("%s: %v", name(r), err)
		}
		fmt.Fprintf(&b, "%d %s %s\n", r.Kind, name(r), text)
		back := r.New()
		if err := decode(text, back); err != nil || !reflect.DeepEqual(back, body) {
			t.Errorf("%s came back as %+v, %v", text, back, err)
		}
	})
	golden(t, "messages.golden", b.String())
}

// record makes the record that r permits.
func record(t testing.TB, r *Rule) ipc.Record {
	t.Helper()
	body := example(t, r)
	text, err := json.Marshal(body)
	if err != nil {
		t.Fatal(err)
	}
	rec := ipc.Record{Kind: uint16(r.Kind), ID: 7, Body: text, Files: make([]ipc.FD, files(r, body))}
	if r.Reply {
		rec.Flags |= ipc.Reply
	}
	if r.Kind == KindFault {
		rec.Flags |= ipc.Failed
	}
	return rec
}

func files(r *Rule, body any) int {
	if r.FilesOf != nil {
		return r.FilesOf(body)
	}
	return r.Files
}

var states = []State{Starting, Configuring, Serving, Draining, Finished}

func newSide(link Link, from Role, state State) *side {
	return &side{role: from, rules: permits[link][from], state: state, seen: make(map[Kind]bool)}
}

// Each kind of every table, and some of none, is tried in each state from each
// side, with the record that its own rule would want.
func TestOnlyWhatTheTablePermitsIsAccepted(t *testing.T) {
	wants := make(map[Kind]ipc.Record) // a well-formed record of each kind
	each(func(_ Link, _ Role, r *Rule) { wants[r.Kind] = record(t, r) })
	for _, k := range []Kind{0, 8, 99, 199, 304, 0xffff} {
		wants[k] = ipc.Record{Kind: uint16(k), Body: []byte("{}")}
	}
	accepted := 0
	for link, sides := range permits {
		for from, rules := range sides {
			for _, state := range states {
				for kind, rec := range wants {
					i := slices.IndexFunc(rules, func(r Rule) bool { return r.Kind == kind })
					want := i >= 0 && slices.Contains(rules[i].In, state)
					s := newSide(link, from, state)
					m, err := s.accept(rec)
					if (err == nil) != want {
						t.Errorf("%s from %s while %s: kind %d: %v, want accepted %v", link, from, state, kind, err, want)
						continue
					}
					if err != nil {
						if !isViolation(err) || s.state != state || len(s.seen) > 0 {
							t.Errorf("kind %d refused by %v, state %s → %s", kind, err, state, s.state)
						}
						continue
					}
					accepted++
					next := state
					if n := rules[i].Next; n != Starting {
						next = n
					}
					if s.state != next || m.Kind != kind || m.ID != 7 || len(m.Files) != len(rec.Files) {
						t.Errorf("%s from %s: kind %d while %s led to %s, want %s; %+v", link, from, kind, state, s.state, next, m)
					}
					s.state = state
					if _, err := s.accept(rec); (err == nil) == rules[i].Once {
						t.Errorf("%s from %s: kind %d a second time: %v, once %v", link, from, kind, err, rules[i].Once)
					}
				}
			}
		}
	}
	if accepted < 60 {
		t.Errorf("only %d were accepted at all", accepted)
	}
}

func TestRecordMustFitItsRule(t *testing.T) {
	each(func(link Link, from Role, r *Rule) {
		good := record(t, r)
		changed := func(f func(rec *ipc.Record)) ipc.Record {
			rec := good
			rec.Files = slices.Clone(good.Files)
			f(&rec)
			return rec
		}
		bad := map[string]ipc.Record{
			"reply turned": changed(func(rec *ipc.Record) { rec.Flags ^= ipc.Reply }),
			"fault turned": changed(func(rec *ipc.Record) { rec.Flags ^= ipc.Failed }),
			"one file more": changed(func(rec *ipc.Record) {
				rec.Files = append(rec.Files, 0)
			}),
			"no body":      changed(func(rec *ipc.Record) { rec.Body = nil }),
			"not JSON":     changed(func(rec *ipc.Record) { rec.Body = []byte("{") }),
			"a list":       changed(func(rec *ipc.Record) { rec.Body = []byte("[]") }),
			"bytes left":   changed(func(rec *ipc.Record) { rec.Body = append(slices.Clone(rec.Body), " {}"...) }),
			"a comma left": changed(func(rec *ipc.Record) { rec.Body = append(slices.Clone(rec.Body), ',') }),
			"unknown field": changed(func(rec *ipc.Record) {
				rec.Body = append([]byte(`{"zzz":1`), bytes.Replace(rec.Body, []byte("{"), []byte(","), 1)...)
			}),
		}
		if string(good.Body) == "{}" {
			bad["unknown field"] = changed(func(rec *ipc.Record) { rec.Body = []byte(`{"zzz":1}`) })
		}
		if len(good.Files) > 0 {
			bad["one file fewer"] = changed(func(rec *ipc.Record) { rec.Files = rec.Files[1:] })
		}
		if _, err := newSide(link, from, r.In[0]).accept(good); err != nil {
			t.Errorf("%s from %s: %s: %v", link, from, name(r), err)
		}
		for what, rec := range bad {
			s := newSide(link, from, r.In[0])
			if _, err := s.accept(rec); !isViolation(err) || s.state != r.In[0] {
				t.Errorf("%s from %s: %s with %s: %v, state %s", link, from, name(r), what, err, s.state)
			}
		}
	})
}

func FuzzAccept(f *testing.F) {
	links := []Link{LinkProxy, LinkAgent, LinkSigning, LinkDialing, LinkSecond}
	each(func(link Link, from Role, r *Rule) {
		rec := record(f, r)
		f.Add(uint8(slices.Index(links, link)), from == Proxy || from == Agent && link == LinkAgent, uint8(r.In[0]), rec.Kind, uint16(rec.Flags), rec.Body, uint8(len(rec.Files))) // small
	})
	f.Fuzz(func(t *testing.T, link uint8, second bool, state uint8, kind, flags uint16, body []byte, nfiles uint8) {
		l := links[int(link)%len(links)]
		from := slices.Sorted(maps.Keys(permits[l]))[map[bool]int{true: 1}[second]]
		s := newSide(l, from, states[int(state)%len(states)])
		m, err := s.accept(ipc.Record{Kind: kind, Flags: ipc.Flags(flags), Body: body, Files: make([]ipc.FD, nfiles%20)})
		if err != nil {
			if !isViolation(err) {
				t.Errorf("%v is no violation", err)
			}
			return
		}
		again, err := json.Marshal(m.Body)
		if err != nil {
			t.Fatalf("%q became %+v: %v", body, m.Body, err)
		}
		if bytes.Contains(again, []byte(`":".0"`)) {
			return // an instance left out: it has no text, and nobody has such a one
		}
		back := s.byType(m.Body).New()
		if err := decode(again, back); err != nil || !reflect.DeepEqual(back, m.Body) {
			t.Errorf("%q became %s, then %+v, %v", body, again, back, err)
		}
	})
}

func BenchmarkByType(b *testing.B) {
	s := newSide(LinkProxy, Master, Serving)
	for b.Loop() {
		if s.byType(&Drain{}) == nil {
			b.Fatal("not found")
		}
	}
}
