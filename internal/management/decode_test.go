package management

import (
	"strings"
	"testing"
	"unicode/utf8"
)

func TestBadRequestsAreRefusedWithTheReason(t *testing.T) {
	deploy := func(change string) string {
		return `{"command":"deploy","app":"a","version":"1","path":"/p","routes":["a.test"],"idle_timeout":5` + change + `}`
	}
	for _, c := range []struct{ in, want string }{
		{``, "EOF while parsing a value"},
		{"  \t\r", "EOF while parsing a value"},
		{"\xff", "json line is not valid UTF-8"},
		{`{"command":`, "unexpected end of JSON input"},
		{`nonsense`, "invalid character 'o' in literal null (expecting 'u')"},
		{`{"command":"list"} x`, "invalid character 'x' after top-level value"},
		{`[1]`, "invalid type: sequence, expected an object with a `command`"},
		{`"list"`, "invalid type: string \"list\", expected an object with a `command`"},
		{`{}`, "missing field `command`"},
		{`{"command":null}`, "invalid type: null, expected a string (field `command`)"},
		{`{"Command":"list"}`, "missing field `command`"},
		{`{"command":"list","command":"list"}`, "duplicate field `command`"},
		{`{"command":"xyz"}`, "unknown variant `xyz`, expected one of `hello`, `deploy`, `stop`, `delete`, `status`, `list`, `list_releases`, `routes`, `rollback`, `update_secrets`, `server_info`, `enter_upgrading`, `exit_upgrading`, `restart`, `scale`, `upload`, `logs`, `reload`"},
		{`{"command":"hello"}`, "missing field `protocol_version`"},
		{`{"command":"hello","protocol_version":4294967296}`, "invalid value: integer `4294967296`, expected u32 (field `protocol_version`)"},
		{`{"command":"stop"}`, "missing field `app`"},
		{`{"command":"stop","app":7}`, "invalid type: integer `7`, expected a string (field `app`)"},
		{`{"command":"stop","app":true}`, "invalid type: boolean `true`, expected a string (field `app`)"},
		{`{"command":"stop","app":"a","app":"b"}`, "duplicate field `app`"},
		{`{"command":"stop","app":"\ud800"}`, "lone leading surrogate in hex escape"},
		{`{"command":"stop","app":"\ud800\u0041"}`, "lone leading surrogate in hex escape"},
		{`{"command":"stop","app":"\udc00"}`, "lone trailing surrogate in hex escape"},
		{deploy(``), "missing field `instances`"},
		{deploy(`,"instances":300`), "invalid value: integer `300`, expected u8 (field `instances`)"},
		{deploy(`,"instances":-1`), "invalid value: integer `-1`, expected u8 (field `instances`)"},
		{deploy(`,"instances":1.0`), "invalid type: floating point `1.0`, expected u8 (field `instances`)"},
		{deploy(`,"instances":"1"`), "invalid type: string \"1\", expected u8 (field `instances`)"},
		{deploy(`,"instances":1,"secrets":null`), "invalid type: null, expected a map (field `secrets`)"},
		{deploy(`,"instances":1,"secrets":{"A":12345}`), "invalid type: integer, expected a string at key `A` (field `secrets`)"},
		{deploy(`,"instances":1,"secrets":{"A":"x","A":"y"}`), "duplicate key `A` (field `secrets`)"},
		{deploy(`,"instances":1,"secrets":"hidden"`), "invalid type: string, expected a map (field `secrets`)"},
		{deploy(`,"instances":1,"progress":1`), "invalid type: integer `1`, expected a boolean (field `progress`)"},
		{`{"command":"deploy","app":"a","version":"1","path":"/p","routes":"a"}`, "invalid type: string \"a\", expected a sequence (field `routes`)"},
		{`{"command":"deploy","app":"a","version":"1","path":"/p","routes":["a",null]}`, "invalid type: null, expected a string at index 1 (field `routes`)"},
		{`{"command":"deploy","app":"a","version":"1","path":"/p"}`, "missing field `routes`"},
		{`{"command":"update_secrets","app":"a"}`, "missing field `secrets`"},
		{`{"command":"list","x":` + strings.Repeat("[", MaxDepth) + strings.Repeat("]", MaxDepth) + `}`, "recursion limit exceeded"},
	} {
		_, _, err := decode([]byte(c.in))
		if err == nil || err.Error() != c.want {
			t.Errorf("decode %.100s\n got %v\nwant %s", c.in, err, c.want)
		}
	}
}

func TestUnknownVariantQuotesOnlyTheBeginning(t *testing.T) {
	_, _, err := decode([]byte(`{"command":"` + strings.Repeat("x", 10_000) + `"}`))
	if err == nil || len(err.Error()) > 1000 {
		t.Errorf("got %d bytes", len(err.Error()))
	}
}

func TestGoodRequestsAreUnderstood(t *testing.T) {
	for _, in := range []string{
		`{"command":"list"}`,
		`{"extra":{"a":[1,null]},"extra":2,"command":"list"}` + "\r",
		`{"app":"a","command":"stop"}`,
		`{"command":"list","x":` + strings.Repeat("[", MaxDepth-1) + strings.Repeat("]", MaxDepth-1) + `}`,
		`{"command":"logs","app":"a"}`,
	} {
		if _, _, err := decode([]byte(in)); err != nil {
			t.Errorf("decode %.80s: %v", in, err)
		}
	}
	_, a, err := decode([]byte(`{"command":"update_secrets","app":"a","secrets":{"K":"\ud83d\ude00 \\u \u00e9"},"merge":true}`))
	if err != nil || a.secrets["K"] != "😀 \\u é" || !a.merge {
		t.Errorf("got %+v, %v", a, err)
	}
	_, a, err = decode([]byte(`{"command":"deploy","app":"a","version":"1","path":"/p","routes":[],"idle_timeout":4294967295,"instances":255}`))
	if err != nil || a.secrets != nil || a.instances != 255 || a.idleTimeout != 4294967295 || a.routes == nil {
		t.Errorf("got %+v, %v", a, err)
	}
}

func FuzzDecode(f *testing.F) {
	for _, s := range []string{
		`{"command":"list"}`, `{"command":"hello","protocol_version":1}`, `{"command":"scale","app":"a","instances":3}`,
		`{"command":"deploy","app":"a","version":"1","path":"/p","routes":["x"],"secrets":{"A":"b"},"instances":1,"idle_timeout":2}`,
		`{"command":"stop","app":"\ud800\udc00\\u"}`, `[[[[`, "\xff", `{"a":`, `"\u`, `{"command":"stop","app":"\`,
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		cmd, a, err := decode(b)
		switch {
		case err == nil && (cmd == nil || a == nil):
			t.Fatalf("%q: nothing came of it", b)
		case err != nil && (len(err.Error()) > 4096 || !utf8.ValidString(err.Error()) || a != nil):
			t.Fatalf("%q: %q", b, err)
		case err == nil && cmd.has("app") && !utf8.ValidString(a.app):
			t.Fatalf("%q: app %q", b, a.app)
		}
	})
}
