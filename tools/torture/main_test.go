package main

import (
	"testing"
)

const said = `=== RUN   TestReloads
=== PAUSE TestReloads
=== CONT  TestReloads
=== RUN   TestReloads/kept
    torture_reload_test.go:68: row: 50 reloads, kept | 31862 | 0 | the longest took 924ms | indeed
=== RUN   TestReloads/h2
    torture_reload_test.go:68: row: 50 reloads, h2 | 10 | 3 | 
    torture_reload_test.go:70: 50 reloads, h2: row: this is none
--- FAIL: TestReloads (72.01s)
    --- PASS: TestReloads/kept (10.00s)
    --- FAIL: TestReloads/h2 (10.00s)
FAIL
`

func TestRowsAndTheirVerdictsAreReadFromATest(t *testing.T) {
	tt := &torture{failed: make(map[string]bool)}
	rows := tt.read("TestReloads", said)
	want := []row{
		{test: "TestReloads/kept", what: "50 reloads, kept", requests: "31862", failed: "0", more: "the longest took 924ms | indeed"},
		{test: "TestReloads/h2", what: "50 reloads, h2", requests: "10", failed: "3"},
	}
	if len(rows) != 2 || rows[0] != want[0] || rows[1] != want[1] {
		t.Errorf("got  %+v\nwant %+v", rows, want)
	}
	tt.rows = rows
	for test, want := range map[string]string{"TestReloads/kept": "ok", "TestReloads/h2": "FAIL", "TestReloads": "FAIL"} {
		if got := tt.verdict(row{test: test}); got != want {
			t.Errorf("%s: %s, want %s", test, got, want)
		}
	}
}

func TestATestWithoutRowsIsOne(t *testing.T) {
	tt := &torture{failed: make(map[string]bool)}
	rows := tt.read("TestX", "=== RUN   TestX\n    x_test.go:1: needs root\n--- SKIP: TestX (0.00s)\n")
	if len(rows) != 1 || rows[0].what != "TestX" || tt.verdict(rows[0]) != "skipped" {
		t.Errorf("%+v, %s", rows, tt.verdict(rows[0]))
	}
}
