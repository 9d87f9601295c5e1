package balance

import (
	"math/rand/v2"
	"slices"
	"testing"
)

type fake struct {
	name  string
	load  int64
	young int // Share is Whole without it
}

func (f *fake) InFlight() int64 { return f.load }
func (f *fake) Share() int      { return Whole - f.young }

// script returns the numbers of ns in turn.
func script(t *testing.T, ns ...int) func(int) int {
	t.Helper()
	return func(n int) int {
		t.Helper()
		if len(ns) == 0 {
			t.Fatalf("asked for more random numbers than expected")
		}
		got := ns[0]
		ns = ns[1:]
		if got >= n {
			t.Fatalf("number %d is out of range %d", got, n)
		}
		return got
	}
}

func TestPickTakesTheLessBusyOfTwo(t *testing.T) {
	a, b, c := &fake{"a", 5, 0}, &fake{"b", 1, 0}, &fake{"c", 3, 0}
	young := &fake{"young", 0, 900}
	all := []*fake{a, b, c}
	for _, test := range []struct {
		name    string
		from    []*fake
		not     []*fake
		numbers []int
		want    *fake
	}{
		{"none at all", nil, nil, nil, nil},
		{"only one", []*fake{a}, nil, nil, a},
		{"only one, and not that", []*fake{a}, []*fake{a}, nil, nil},
		{"second is less busy", all, nil, []int{0, 0}, b},
		{"first is less busy", all, nil, []int{1, 0}, b},
		{"the last two", all, nil, []int{2, 1}, b},
		{"never twice the same", all, nil, []int{0, 1}, c},
		{"equals: the first drawn", []*fake{c, {"d", 3, 0}}, nil, []int{0, 0}, c},
		{"the first drawn takes none", all, []*fake{b}, []int{1, 0}, a},
		{"the second drawn takes none", all, []*fake{b}, []int{0, 0}, a},
		{"both drawn take none", all, []*fake{a, b}, []int{0, 0}, c},
		{"all take none", all, all, []int{0, 0}, nil},
		{"a new one stands back", []*fake{young, a}, nil, []int{0, 0, 100}, a},
		{"a new one stands back, second", []*fake{a, young}, nil, []int{0, 0, 999}, a},
		{"a new one's turn", []*fake{young, a}, nil, []int{0, 0, 99}, young},
		{"two new ones", []*fake{young, {"y", 1, 900}}, nil, []int{1, 0}, young},
		{"a new one is all there is", []*fake{a, young}, []*fake{a}, []int{0, 0}, young},
	} {
		takes := func(u *fake) bool { return !slices.Contains(test.not, u) }
		got, ok := Pick(test.from, takes, script(t, test.numbers...))
		if got != test.want || ok != (test.want != nil) {
			t.Errorf("%s: got %v, %v, want %v", test.name, got, ok, test.want)
		}
	}
}

func TestPickAllocatesNothing(t *testing.T) {
	all := []*fake{{load: 1}, {load: 2}, {load: 3}}
	not := all[1]
	if n := testing.AllocsPerRun(100, func() {
		Pick(all, func(u *fake) bool { return u != not }, rand.IntN)
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
}
