package release

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"syscall"
	"testing"
	"time"
	"unicode/utf8"

	"tako/internal/tako"
)

const file = "/r/app.json"

func parse(tb testing.TB, text string) *Manifest {
	tb.Helper()
	m, err := Parse(file, []byte(text))
	if err != nil {
		tb.Fatalf("Parse(%s): %v", text, err)
	}
	return m
}

// refused checks that err is a CodeInvalid Error with this text.
func refused(tb testing.TB, what string, err error, want string) {
	tb.Helper()
	var e *tako.Error
	if !errors.As(err, &e) || e.Code != tako.CodeInvalid || e.Message != want {
		tb.Errorf("%s:\n got %v\nwant %s", what, err, want)
	}
}

func write(tb testing.TB, path, text string) {
	tb.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		tb.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		tb.Fatal(err)
	}
}

func TestManifestDefaults(t *testing.T) {
	got := parse(t, `{"runtime": " node ", "main": "index.js", "start": [], "install": " ", "release": "", "env_vars": {}, "limits": null,
		"app_name": "x", "secret_names": ["A"], "Runtime": 3}`)
	want := &Manifest{
		Runtime: "node", Main: "index.js", Env: map[string]string{}, HTTPSRedirect: true, Protocol: ProtocolHTTP1,
		Health:    Health{Path: "/status", Host: "tako-internal", Codes: [][2]int{{200, 299}}, Interval: time.Second, Timeout: 900 * time.Millisecond},
		Processes: map[string]Process{},
		Timeouts: Timeouts{
			Ready: 30 * time.Second, Drain: 30 * time.Second, Streams: time.Minute, Grace: 10 * time.Second,
			Stability: 3 * time.Second, Install: 10 * time.Minute, Release: 10 * time.Minute,
		},
		Queue: Queue{Waiters: 100, Wait: 30 * time.Second}, file: file,
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got  %+v\nwant %+v", got, want)
	}
}

func TestProbeOfAnInstanceThatSpeaksH2CIsAConnection(t *testing.T) {
	for text, connect := range map[string]bool{
		`"protocol": "h2c"`: true, `"protocol": "h2c", "health": {"path": "/up"}`: true,
		`"protocol": "h2c", "health": {"kind": "http"}`: false, `"protocol": "http1"`: false, `"health": {"kind": "connect"}`: true,
	} {
		m := parse(t, `{"runtime": "node", "main": "index.js", `+text+`}`)
		if m.Health.Connect != connect {
			t.Errorf("%s: connect %v, want %v", text, m.Health.Connect, connect)
		}
	}
}

func TestManifestTakesEveryField(t *testing.T) {
	got := parse(t, `{"runtime": "go", "main": "./bin/app", "start": ["{main}", "-x={main}", "{main}"], "install": "make\n", "release": ["{main}", "migrate"],
		"env_vars": {"A": "1", "PORT": "9", "TAKO_X": ""}, "commit_message": "", "git_dirty": false, "https_redirect": false, "protocol": "h2c", "listen": null,
		"health": {"kind": "connect", "path": "/up?x=1", "host": "a.b:80", "codes": [200, "204", "3xx", "400-404"], "interval_ms": 200},
		"processes": {"worker": {"start": ["{main}", "work"], "instances": 2}, "b": {"start": ["sh"]}, "none": {"start": ["sh"], "instances": 0}},
		"limits": {"memory": "512M", "cpu": 1.5, "pids": 64, "request_body": "10M"},
		"timeouts": {"ready": 1, "drain": 0, "streams": 0.5, "grace": 0, "stability": 0, "install": 2, "release": 7200},
		"queue": {"waiters": 0, "wait": 0.25}}`)
	clean := false
	message := ""
	want := &Manifest{
		Runtime: "go", Main: "./bin/app", Start: []string{"{main}", "-x={main}", "{main}"}, Install: "make", Release: []string{"./bin/app", "migrate"},
		Env: map[string]string{"A": "1", "PORT": "9", "TAKO_X": ""}, CommitMessage: &message, GitDirty: &clean, Protocol: ProtocolH2C,
		Health: Health{
			Connect: true, Path: "/up?x=1", Host: "a.b:80", Codes: [][2]int{{200, 200}, {204, 204}, {300, 399}, {400, 404}},
			Interval: 200 * time.Millisecond, Timeout: 180 * time.Millisecond,
		},
		Processes: map[string]Process{
			"worker": {Start: []string{"./bin/app", "work"}, Instances: 2}, "b": {Start: []string{"sh"}, Instances: 1}, "none": {Start: []string{"sh"}},
		},
		Limits:   Limits{Memory: 512 << 20, CPU: 1.5, PIDs: 64, RequestBody: 10 << 20},
		Timeouts: Timeouts{Ready: time.Second, Streams: 500 * time.Millisecond, Install: 2 * time.Second, Release: 2 * time.Hour},
		Queue:    Queue{Wait: 250 * time.Millisecond}, file: file,
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got  %+v\nwant %+v", got, want)
	}
	if m := parse(t, `{"runtime": "x", "start": ["run"], "release": "rake db:migrate && true"}`); !reflect.DeepEqual(m.Release, []string{"sh", "-lc", "rake db:migrate && true"}) {
		t.Errorf("release = %q", m.Release)
	}
}

func TestManifestRefusals(t *testing.T) {
	const parsing = "failed to parse deploy manifest /r/app.json: "
	// with is a good manifest with one more field.
	with := func(field string) string { return `{"runtime": "node", "main": "a.js", ` + field + `}` }
	names := func(n int, value string) string {
		var b strings.Builder
		for i := range n {
			fmt.Fprintf(&b, `, "n%d": %s`, i, value)
		}
		return "{" + b.String()[2:] + "}"
	}
	for _, c := range []struct{ give, want string }{
		{"", parsing + "the JSON ends too early"},
		{`{"runtime"`, parsing + "the JSON ends too early"},
		{`{"runtime": "node`, parsing + "the JSON ends too early"},
		{"nonsense", parsing + "invalid character 'o' in literal null (expecting 'u')"},
		{"[]", parsing + "got a list, want an object"},
		{"null", parsing + "got null, want an object"},
		{"\xff{}", parsing + "it is not UTF-8"},
		{with(`"x": 1`) + "{", parsing + "something follows the JSON value, which ends at byte 43"},
		{with(`"x": 1`) + " x", parsing + "something follows the JSON value, which ends at byte 43"},
		{with(`"main": "b.js"`), parsing + `field "main": it is there twice; keep one`},
		{with(`"x": [{"y": {"z": 1, "z": 1}}]`), parsing + `field "x[0].y.z": it is there twice; keep one`},
		{with(`"x": ` + strings.Repeat("[", 40)), parsing + `field "x` + strings.Repeat("[0]", 31) + `": values are nested deeper than 32`},

		{`{"main": "a.js"}`, parsing + `missing field "runtime"`},
		{`{"main": "a.js", "runtime": null}`, parsing + `missing field "runtime"`},
		{`{"runtime": "node"}`, parsing + `missing field "main"`},
		{`{"runtime": "node", "start": []}`, parsing + `missing field "main"`},
		{`{"runtime": " ", "main": "a"}`, "deploy manifest /r/app.json has empty runtime field"},
		{`{"runtime": "node", "main": "\t"}`, "deploy manifest /r/app.json has empty main field"},
		{`{"runtime": "node", "main": "", "start": ["x"]}`, "deploy manifest /r/app.json has empty main field"},
		{`{"runtime": "node", "start": ["x", "{main}"]}`, parsing + `field "start[1]": it is {main}, and there is no main; add the field main`},
		{`{"runtime": 1, "main": "a"}`, parsing + `field "runtime": got a number, want a string`},
		{`{"runtime": "a\u0000", "main": "a"}`, parsing + `field "runtime": it has a NUL byte in it; take it out`},
		{`{"runtime": "node", "main": ["a"]}`, parsing + `field "main": got a list, want a string`},
		{`{"runtime": "node", "main": "/bin/sh"}`, parsing + `field "main": "/bin/sh" may leave the release; give the path of a file inside it, relative to it and without ..`},
		{`{"runtime": "node", "main": "a/../b"}`, parsing + `field "main": "a/../b" may leave the release; give the path of a file inside it, relative to it and without ..`},
		{`{"runtime": "node", "main": "./"}`, parsing + `field "main": "./" is the release's folder; give a file inside it`},
		{`{"runtime": "node", "main": "-e"}`, parsing + `field "main": "-e" would be read as an option; put ./ before it`},
		{`{"runtime": "node", "main": "` + strings.Repeat("a", 1025) + `"}`, parsing + `field "main": it is longer than 1024 bytes`},

		{with(`"start": "node a.js"`), parsing + `field "start": got a string, want a list of strings`},
		{with(`"start": ["node", 1]`), parsing + `field "start[1]": got a number, want a string`},
		{with(`"start": ["node", null]`), parsing + `field "start[1]": got null, want a string`},
		{with(`"start": [" "]`), parsing + `field "start[0]": the program is empty`},
		{with(`"start": ["a\u0000"]`), parsing + `field "start[0]": it has a NUL byte in it; take it out`},
		{with(`"start": ["a"` + strings.Repeat(`, "a"`, MaxArgs) + `]`), parsing + `field "start": 257 arguments are more than 256`},
		{with(`"install": false`), parsing + `field "install": got a boolean, want a string`},
		{with(`"release": 1`), parsing + `field "release": got a number, want a string, for the shell, or a list of strings`},
		{with(`"release": ["x", {}]`), parsing + `field "release[1]": got an object, want a string`},
		{with(`"release": "a\u0000"`), parsing + `field "release": it has a NUL byte in it; take it out`},
		{with(`"commit_message": 1`), parsing + `field "commit_message": got a number, want a string`},
		{with(`"git_dirty": "yes"`), parsing + `field "git_dirty": got a string, want a boolean`},
		{with(`"https_redirect": 0`), parsing + `field "https_redirect": got a number, want a boolean`},
		{with(`"protocol": "h2"`), parsing + `field "protocol": got "h2", want "http1" or "h2c"`},
		{with(`"listen": "fd"`), parsing + `field "listen": instances are not handed a listening socket; leave the field out and listen on $TAKO_APP_SOCKET or $PORT`},
		{with(`"listen": "tcp"`), parsing + `field "listen": "tcp" is not known; leave the field out and listen on $TAKO_APP_SOCKET or $PORT`},

		{with(`"env_vars": []`), parsing + `field "env_vars": got a list, want an object`},
		{with(`"env_vars": {"A": 1}`), parsing + `field "env_vars.A": got a number, want a string`},
		{with(`"env_vars": {"A": null}`), parsing + `field "env_vars.A": got null, want a string`},
		{with(`"env_vars": {"A": "\u0000"}`), parsing + `field "env_vars.A": it has a NUL byte in it; take it out`},
		{with(`"env_vars": {"1A": ""}`), parsing + `field "env_vars.1A": a name is made of letters, digits and '_' and does not begin with a digit`},
		{with(`"env_vars": {"": ""}`), parsing + `field "env_vars.": a name is made of letters, digits and '_' and does not begin with a digit`},
		{with(`"env_vars": {"A=B": ""}`), parsing + `field "env_vars.A=B": a name is made of letters, digits and '_' and does not begin with a digit`},
		{with(`"env_vars": {"` + strings.Repeat("A", MaxVarName+1) + `": ""}`), parsing + `field "env_vars.` + strings.Repeat("A", maxName-9) + `": the name is longer than 256 bytes`},
		{with(`"env_vars": ` + names(MaxVars+1, `""`)), parsing + `field "env_vars": 1001 variables are more than 1000`},
		{with(`"env_vars": {"A": "` + strings.Repeat("x", MaxVarValue+1) + `"}`), parsing + `field "env_vars": the value of A is longer than 65536 bytes`},

		{with(`"health": "/up"`), parsing + `field "health": got a string, want an object`},
		{with(`"health": {"kind": "tcp"}`), parsing + `field "health.kind": got "tcp", want "http" or "connect"`},
		{with(`"health": {"path": "up"}`), parsing + `field "health.path": got "up", want a path of at most 1024 printable ASCII characters that begins with a slash`},
		{with(`"health": {"path": "/a b"}`), parsing + `field "health.path": got "/a b", want a path of at most 1024 printable ASCII characters that begins with a slash`},
		{with(`"health": {"path": "/\r\nX: y"}`), parsing + `field "health.path": got "/\r\nX: y", want a path of at most 1024 printable ASCII characters that begins with a slash`},
		{with(`"health": {"host": ""}`), parsing + `field "health.host": got "", want a host of letters, digits, '-', '_', '.' and ':', at most 253`},
		{with(`"health": {"host": "a\nb"}`), parsing + `field "health.host": got "a\nb", want a host of letters, digits, '-', '_', '.' and ':', at most 253`},
		{with(`"health": {"codes": 200}`), parsing + `field "health.codes": got a number, want a list of statuses like 200, "200-299" or "3xx"`},
		{with(`"health": {"codes": []}`), parsing + `field "health.codes": got 0 entries, want 1 to 32`},
		{with(`"health": {"codes": [200` + strings.Repeat(`, 200`, MaxCodes) + `]}`), parsing + `field "health.codes": got 33 entries, want 1 to 32`},
		{with(`"health": {"codes": [99]}`), parsing + `field "health.codes[0]": got 99, want a whole number from 100 to 599`},
		{with(`"health": {"codes": [200, true]}`), parsing + `field "health.codes[1]": got a boolean, want a whole number from 100 to 599`},
		{with(`"health": {"codes": ["299-200"]}`), parsing + `field "health.codes[0]": got "299-200", want a status like 200, "200-299" or "3xx"`},
		{with(`"health": {"codes": ["6xx"]}`), parsing + `field "health.codes[0]": got "6xx", want a status like 200, "200-299" or "3xx"`},
		{with(`"health": {"interval_ms": 99}`), parsing + `field "health.interval_ms": got 99, want a whole number from 100 to 60000`},
		{with(`"health": {"interval_ms": 60001}`), parsing + `field "health.interval_ms": got 60001, want a whole number from 100 to 60000`},
		{with(`"health": {"timeout_ms": 99}`), parsing + `field "health.timeout_ms": got 99, want a whole number from 100 to 60000`},
		{with(`"health": {"timeout_ms": 2000}`), parsing + `field "health.timeout_ms": 2000 is more than interval_ms, which is 1000; raise that too`},

		{with(`"processes": []`), parsing + `field "processes": got a list, want an object`},
		{with(`"processes": {"a": null}`), parsing + `field "processes.a": got null, want an object`},
		{with(`"processes": {"A": {}}`), parsing + `field "processes.A": a process's name is 1 to 32 of a-z, 0-9 and '-', beginning with a letter and not ending in '-'`},
		{with(`"processes": {"` + strings.Repeat("a", 33) + `": {}}`), parsing + `field "processes.` + strings.Repeat("a", 33) + `": a process's name is 1 to 32 of a-z, 0-9 and '-', beginning with a letter and not ending in '-'`},
		{with(`"processes": {"web": {}}`), parsing + `field "processes.web": web is the process that start and main describe; choose another name`},
		{with(`"processes": {"a": {}}`), parsing + `field "processes.a.start": it is missing; give the command as a list of strings`},
		{with(`"processes": {"a": {"start": ["x"], "instances": "2"}}`), parsing + `field "processes.a.instances": got a string, want a whole number from 0 to 64`},
		{with(`"processes": {"a": {"start": ["x"], "instances": 65}}`), parsing + `field "processes.a.instances": got 65, want a whole number from 0 to 64`},
		{with(`"processes": {"a": {"start": ["x"], "instances": 1.5}}`), parsing + `field "processes.a.instances": got 1.5, want a whole number from 0 to 64`},
		{with(`"processes": ` + names(MaxProcesses+1, `{"start": ["x"]}`)), parsing + `field "processes": 17 processes are more than 16`},

		{with(`"limits": 1`), parsing + `field "limits": got a number, want an object`},
		{with(`"limits": {"memory": 512}`), parsing + `field "limits.memory": got a number, want a size like "512M" or "2G", from 4M to 1T`},
		{with(`"limits": {"memory": "lots"}`), parsing + `field "limits.memory": got "lots", want a size like "512M" or "2G", from 4M to 1T`},
		{with(`"limits": {"request_body": "512"}`), parsing + `field "limits.request_body": got "512", want a size like "10M" or "1G", from 1K to 1T`},
		{with(`"limits": {"request_body": 5}`), parsing + `field "limits.request_body": got a number, want a size like "10M" or "1G", from 1K to 1T`},
		{with(`"limits": {"memory": "3M"}`), parsing + `field "limits.memory": got "3M", want a size like "512M" or "2G", from 4M to 1T`},
		{with(`"limits": {"memory": "2T"}`), parsing + `field "limits.memory": got "2T", want a size like "512M" or "2G", from 4M to 1T`},
		{with(`"limits": {"memory": "999999999999999T"}`), parsing + `field "limits.memory": got "999999999999999T", want a size like "512M" or "2G", from 4M to 1T`},
		{with(`"limits": {"cpu": 0}`), parsing + `field "limits.cpu": got 0, want a number from 0.01 to 1024`},
		{with(`"limits": {"cpu": 1e999}`), parsing + `field "limits.cpu": got 1e999, want a number from 0.01 to 1024`},
		{with(`"limits": {"cpu": "1"}`), parsing + `field "limits.cpu": got a string, want a number from 0.01 to 1024`},
		{with(`"limits": {"pids": 0}`), parsing + `field "limits.pids": got 0, want a whole number from 1 to 4194304`},

		{with(`"timeouts": {"ready": 0}`), parsing + `field "timeouts.ready": got 0, want a number from 1 to 600`},
		{with(`"timeouts": {"drain": 3601}`), parsing + `field "timeouts.drain": got 3601, want a number from 0 to 3600`},
		{with(`"timeouts": {"streams": 86401}`), parsing + `field "timeouts.streams": got 86401, want a number from 0 to 86400`},
		{with(`"timeouts": {"grace": -1}`), parsing + `field "timeouts.grace": got -1, want a number from 0 to 600`},
		{with(`"timeouts": {"stability": "3s"}`), parsing + `field "timeouts.stability": got a string, want a number from 0 to 600`},
		{with(`"timeouts": {"install": 7201}`), parsing + `field "timeouts.install": got 7201, want a number from 1 to 7200`},
		{with(`"timeouts": {"release": 7201}`), parsing + `field "timeouts.release": got 7201, want a number from 1 to 7200`},
		{with(`"queue": {"waiters": 100001}`), parsing + `field "queue.waiters": got 100001, want a whole number from 0 to 100000`},
		{with(`"queue": {"wait": 601}`), parsing + `field "queue.wait": got 601, want a number from 0 to 600`},
	} {
		_, err := Parse(file, []byte(c.give))
		refused(t, fmt.Sprintf("Parse(%.200s)", c.give), err, "Invalid app release: "+c.want)
	}
	var large strings.Builder
	for i := range 9 {
		fmt.Fprintf(&large, `, "V%d": %q`, i, strings.Repeat("x", MaxVarValue))
	}
	_, err := Parse(file, []byte(with(`"env_vars": {`+large.String()[2:]+`}`)))
	refused(t, "too much in all", err, "Invalid app release: "+parsing+`field "env_vars": names and values are 589842 bytes together, more than 524288`)
	_, err = Parse(file, make([]byte, MaxManifest+1))
	refused(t, "too large", err, "Invalid app release: failed to read deploy manifest /r/app.json: it is larger than 1048576 bytes")
}

func TestLoadReadsTheManifestOfARelease(t *testing.T) {
	dir := t.TempDir()
	write(t, filepath.Join(dir, "conf", "app.json"), `{"runtime": "node", "main": "a.js"}`)
	if err := os.Symlink("conf/app.json", filepath.Join(dir, ManifestName)); err != nil { // a link inside is fine
		t.Fatal(err)
	}
	m, err := Load(dir)
	if err != nil || m.Main != "a.js" {
		t.Fatalf("Load = %+v, %v", m, err)
	}
}

func TestLoadRefusesWhatIsNotAFileOfTheRelease(t *testing.T) {
	outside := filepath.Join(t.TempDir(), "app.json")
	write(t, outside, `{"runtime": "node", "main": "a.js"}`)
	for _, c := range []struct {
		name string
		make func(path string) error
		want string
	}{
		{"missing", func(string) error { return nil }, "missing deploy manifest %s"},
		{"folder", func(p string) error { return os.Mkdir(p, 0o755) }, "failed to read deploy manifest %s: it is not a regular file"},
		{"pipe", func(p string) error { return syscall.Mkfifo(p, 0o644) }, "failed to read deploy manifest %s: it is not a regular file"},
		{"link out", func(p string) error { return os.Symlink(outside, p) }, "failed to read deploy manifest %s: path escapes from parent"},
		{"dangling link", func(p string) error { return os.Symlink("nowhere", p) }, "missing deploy manifest %s"},
		{"large", func(p string) error { return os.WriteFile(p, make([]byte, MaxManifest+1), 0o644) }, "failed to read deploy manifest %s: it is larger than 1048576 bytes"},
		{"broken", func(p string) error { return os.WriteFile(p, []byte("{"), 0o644) }, "failed to parse deploy manifest %s: the JSON ends too early"},
	} {
		dir := t.TempDir()
		path := filepath.Join(dir, ManifestName)
		if err := c.make(path); err != nil {
			t.Fatal(err)
		}
		_, err := Load(dir)
		refused(t, c.name, err, "Invalid app release: "+fmt.Sprintf(c.want, path))
	}
	_, err := Load("/nonexistent/release")
	refused(t, "no release", err, "Invalid app release: missing deploy manifest /nonexistent/release/app.json")
}

func TestArgv(t *testing.T) {
	plain, wrapped := t.TempDir(), t.TempDir()
	entry := filepath.Join(wrapped, "node_modules/tako.sh/src/wrapper.ts")
	write(t, entry, "")
	for _, c := range []struct {
		manifest, dir string
		want          []string
	}{
		{`{"runtime": "bun", "main": "a.ts"}`, plain, []string{"bun", "run", "a.ts"}},
		{`{"runtime": "bun", "main": "a.ts"}`, wrapped, []string{"bun", "run", entry, "a.ts"}},
		{`{"runtime": "node", "main": "a.js"}`, wrapped, []string{"node", "a.js"}},
		{`{"runtime": "deno", "main": "a.ts"}`, plain, []string{"deno", "run", "--allow-net", "--allow-env", "--allow-read", "a.ts"}},
		{`{"runtime": "bun", "main": "a.ts", "start": ["x", "{main}", "{main}.map"]}`, wrapped, []string{"x", "a.ts", "{main}.map"}},
		{`{"runtime": "go", "start": ["./app"]}`, plain, []string{"./app"}},
	} {
		got, err := parse(t, c.manifest).Argv(c.dir)
		if err != nil || !reflect.DeepEqual(got, c.want) {
			t.Errorf("%s: %q, %v; want %q", c.manifest, got, err, c.want)
		}
	}
	_, err := parse(t, `{"runtime": "ruby", "main": "a.rb"}`).Argv(plain)
	refused(t, "ruby", err, "Invalid app release: unsupported runtime 'ruby' in deploy manifest /r/app.json")

	m := parse(t, `{"runtime": "x", "main": "a", "start": ["{main}"]}`)
	argv, err := m.Argv(plain)
	if err != nil || m.Start[0] != "{main}" {
		t.Errorf("Argv %q changed the manifest to %q, %v", argv, m.Start, err)
	}
}

func TestInstallCommand(t *testing.T) {
	for _, c := range []struct {
		manifest string
		files    []string
		want     string
	}{
		{`{"runtime": "node", "main": "a"}`, []string{"package.json", "bun.lock"}, ""},
		{`{"runtime": "node", "main": "a", "install": " npm ci "}`, nil, "npm ci"},
		{`{"runtime": "bun", "main": "a", "install": "true"}`, []string{"package.json"}, "true"},
		{`{"runtime": "bun", "main": "a"}`, nil, ""},
		{`{"runtime": "bun", "main": "a"}`, []string{"bun.lock"}, ""},
		{`{"runtime": "bun", "main": "a"}`, []string{"package.json"}, "bun install --production"},
		{`{"runtime": "bun", "main": "a", "install": " "}`, []string{"package.json"}, "bun install --production"},
		{`{"runtime": "bun", "main": "a"}`, []string{"package.json", "bun.lock"}, "bun install --production --frozen-lockfile"},
		{`{"runtime": "bun", "main": "a"}`, []string{"package.json", "bun.lockb"}, "bun install --production --frozen-lockfile"},
	} {
		dir := t.TempDir()
		for _, f := range c.files {
			write(t, filepath.Join(dir, f), "")
		}
		got, ok := parse(t, c.manifest).InstallCommand(dir)
		if got != c.want || ok != (c.want != "") {
			t.Errorf("%s with %v: %q, %v; want %q", c.manifest, c.files, got, ok, c.want)
		}
	}
}

func FuzzParse(f *testing.F) {
	for _, s := range []string{
		`{"runtime": "node", "main": "a.js"}`,
		`{"runtime": "go", "start": ["./a", "{main}"], "main": "b", "release": "x", "env_vars": {"A": "b"}}`,
		`{"runtime": "go", "start": ["a"], "health": {"codes": [200, "3xx", "400-499"], "kind": "connect", "timeout_ms": 100}, "limits": {"memory": "4M", "cpu": 0.5}}`,
		`{"runtime": "go", "start": ["a"], "processes": {"w": {"start": ["b"], "instances": 3}}, "timeouts": {"ready": 1e1}, "queue": {"wait": 0.001}}`,
		`{"a": [1, {"a": null, "a": 1}]}`, `[[[[`, `{"a" 1}`, `{"a": 1,}`, `[1 2]`, `1 2`,
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		if _, err := decodeTree(data); err == nil && !json.Valid(data) {
			t.Fatalf("%q passes for JSON", data)
		} else if err != nil && json.Valid(data) && utf8.Valid(data) &&
			!strings.Contains(err.Error(), "it is there twice") && !strings.Contains(err.Error(), "nested deeper") {
			t.Fatalf("%q is refused: %v", data, err)
		}
		m, err := Parse(file, data)
		if err != nil {
			var e *tako.Error
			if !errors.As(err, &e) || e.Code != tako.CodeInvalid || len(e.Message) > 2000 {
				t.Fatalf("Parse(%q) = %#v, want a CodeInvalid error of a bounded length", data, err)
			}
			return
		}
		argv, err := m.Argv("/nonexistent")
		if err == nil && (len(argv) == 0 || argv[0] == "") {
			t.Fatalf("Parse(%q) has the argv %q", data, argv)
		}
		if m.Health.Timeout > m.Health.Interval || m.Health.Timeout < 100*time.Millisecond || len(m.Health.Codes) == 0 {
			t.Fatalf("Parse(%q) has the probe %+v", data, m.Health)
		}
		for name, p := range m.Processes {
			if len(p.Start) == 0 || p.Instances < 0 || p.Instances > MaxInstances {
				t.Fatalf("Parse(%q) has the process %s %+v", data, name, p)
			}
		}
	})
}
