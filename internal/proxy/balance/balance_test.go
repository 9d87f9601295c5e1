package balance

import "testing"

type fake struct {
	name string
	load int64
}

func (f *fake) InFlight() int64 { return f.load }

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
	a, b, c := &fake{"a", 5}, &fake{"b", 1}, &fake{"c", 3}
	all := []*fake{a, b, c}
	for _, test := range []struct {
		name    string
		first   []*fake
		reserve []*fake
		not     *fake
		numbers []int
		want    *fake
	}{
		{"none at all", nil, nil, nil, nil, nil},
		{"only one", []*fake{a}, []*fake{b}, nil, nil, a},
		{"second is less busy", all, nil, nil, []int{0, 0}, b},
		{"first is less busy", all, nil, nil, []int{1, 0}, b},
		{"the last two", all, nil, nil, []int{2, 1}, b},
		{"never twice the same", all, nil, nil, []int{0, 1}, c},
		{"equals: the first drawn", []*fake{c, {"d", 3}}, nil, nil, []int{0, 0}, c},
		{"reserve when there is no other", nil, []*fake{c}, nil, nil, c},
		{"reserve when the other is excepted", []*fake{a}, []*fake{c}, a, nil, c},
		{"excepted everywhere", []*fake{a}, []*fake{a}, a, nil, nil},
		{"excepted among three", all, nil, b, []int{0, 0}, c},
	} {
		got, ok := Pick(test.first, test.reserve, test.not, script(t, test.numbers...))
		if got != test.want || ok != (test.want != nil) {
			t.Errorf("%s: got %v, %v, want %v", test.name, got, ok, test.want)
		}
	}
}
