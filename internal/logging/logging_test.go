package logging

import (
	"bytes"
	"context"
	"encoding/json"
	"io"
	"os"
	"strings"
	"testing"

	"github.com/hashicorp/go-hclog"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestBadChoiceNamesTheGoodOnes(t *testing.T) {
	for _, c := range []struct{ level, format, want string }{
		{"loud", "text", `log level "loud": use one of trace, debug, info, warn, error`},
		{"", "text", `log level "": use one of trace, debug, info, warn, error`},
		{"INFO", "text", `log level "INFO": use one of trace, debug, info, warn, error`},
		{"off", "text", `log level "off": use one of trace, debug, info, warn, error`},
		{"info", "xml", `log format "xml": use one of text, json`},
	} {
		if _, err := New(io.Discard, "tako-master", c.level, c.format); err == nil || err.Error() != c.want {
			t.Errorf("New(%q, %q): %v, want %s", c.level, c.format, err, c.want)
		}
	}
	for _, l := range Levels {
		log, err := New(io.Discard, "tako-master", l, "json")
		if err != nil || log.GetLevel().String() != l {
			t.Errorf("level %q: %v, %v", l, log, err)
		}
	}
}

// relayed runs one child's output through Relay into a JSON log.
func relayed(t testing.TB, level, output string) []map[string]any {
	t.Helper()
	var buf bytes.Buffer
	log, err := New(&buf, "tako-master", level, "json")
	if err != nil {
		t.Fatal(err)
	}
	Relay(t.Context(), strings.NewReader(output), log.With(Generation, 4), "tako-proxy")
	var lines []map[string]any
	for line := range strings.Lines(buf.String()) {
		var m map[string]any
		if err := json.Unmarshal([]byte(line), &m); err != nil {
			t.Fatalf("relay wrote %q: %v", line, err)
		}
		lines = append(lines, m)
	}
	return lines
}

func TestRelayKeepsLevelMessageAndPairs(t *testing.T) {
	var out bytes.Buffer
	child := hclog.New(&hclog.LoggerOptions{Name: "tako-proxy", Level: hclog.Trace, Output: &out, JSONFormat: true})
	child.Named("tls").Warn("no certificate", Host, "a.example", "tries", 3, "names", []string{"x", "y"})
	child.Debug("quiet")
	got := relayed(t, "info", out.String())
	if len(got) != 1 {
		t.Fatalf("got %v, want the warning only", got)
	}
	for k, want := range map[string]any{
		"@level": "warn", "@message": "no certificate", "@module": "tako-proxy.tls",
		Host: "a.example", "tries": 3.0, "names": `["x","y"]`, Generation: 4.0,
	} {
		if got[0][k] != want {
			t.Errorf("%s is %v, want %v", k, got[0][k], want)
		}
	}
}

func TestChildCannotWriteAsSomebodyElse(t *testing.T) {
	for _, module := range []string{"tako-master", "tako-agent", "tako-proxyx", "", "tako-proxy"} {
		got := relayed(t, "info", `{"@level":"info","@message":"hi","@module":"`+module+`","generation":9,"@timestamp":"x"," @module":"tako-master"}`+"\n")
		if len(got) != 1 || got[0]["@module"] != "tako-proxy" || got[0][Generation] != 4.0 || got[0]["@timestamp"] == "x" {
			t.Errorf("module %q: got %v", module, got)
		}
	}
}

func TestChildCannotStartALine(t *testing.T) {
	var buf bytes.Buffer
	log, err := New(&buf, "tako-master", "info", "text")
	if err != nil {
		t.Fatal(err)
	}
	evil := `\n2026-01-01T00:00:00.000Z [INFO]  tako-master: forged`
	in := `{"@level":"info","@message":"a` + evil + `","@module":"tako-proxy.b` + evil + `","k` + evil + `":"v` + evil + `"}` + "\n" + "plain\x1b[2J\r" + "x\n"
	Relay(t.Context(), strings.NewReader(in), log, "tako-proxy")
	for line := range strings.Lines(buf.String()) {
		if strings.HasPrefix(line, "2026-01-01") || strings.ContainsAny(line, "\x1b\r") {
			t.Errorf("forged line %q", line)
		}
	}
}

func TestPanicStaysTogether(t *testing.T) {
	in := "stray\n" +
		"panic: boom\n\ngoroutine 1 [running]:\nmain.main()\n\t/x.go:3 +0x1\n" +
		`{"@level":"info","@message":"after","@module":"tako-proxy"}` + "\n" +
		"fatal error: all asleep\ngoroutine 2:\n"
	got := relayed(t, "info", in)
	if len(got) != 4 {
		t.Fatalf("got %d lines %v, want 4", len(got), got)
	}
	if got[0]["@message"] != "stray" || got[0]["@level"] != "error" {
		t.Errorf("a line that is not JSON: %v", got[0])
	}
	if want := "panic: boom\n\ngoroutine 1 [running]:\nmain.main()\n\t/x.go:3 +0x1\n"; got[1]["trace"] != want || got[1]["@level"] != "error" {
		t.Errorf("trace %q, want %q", got[1]["trace"], want)
	}
	if got[2]["@message"] != "after" || got[3]["trace"] != "fatal error: all asleep\ngoroutine 2:\n" {
		t.Errorf("the rest: %v", got[2:])
	}
}

func TestLongLineIsCutAndSaysSo(t *testing.T) {
	got := relayed(t, "info", strings.Repeat("a", 3*MaxLine)+"\nnext\n")
	if len(got) != 2 || got[0]["cut"] != true || len(got[0]["@message"].(string)) != MaxLine || got[1]["@message"] != "next" {
		t.Errorf("got %d lines, first cut: %v", len(got), got[0]["cut"])
	}
	got = relayed(t, "info", "panic: x\n"+strings.Repeat(strings.Repeat("b", 1000)+"\n", 100))
	if len(got) != 2 {
		t.Fatalf("a trace of 100 kB made %d entries, want 2", len(got))
	}
	for _, e := range got {
		if n := len(e["trace"].(string)); n > MaxTrace+1001 {
			t.Errorf("a trace of %d bytes", n)
		}
	}
}

func TestRelayEndsWithItsContext(t *testing.T) {
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	defer w.Close()
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		Relay(ctx, r, hclog.NewNullLogger(), "tako-proxy")
	}()
	cancel()
	<-done
}

func FuzzRelay(f *testing.F) {
	f.Add([]byte(`{"@level":"info","@message":"m","@module":"tako-proxy.x","a":{"b":[1]}}` + "\n"))
	f.Add([]byte("panic: x\n\xff\n{\n"))
	f.Add([]byte(`{"@level":"error","":1,"=":2}`))
	f.Fuzz(func(t *testing.T, in []byte) {
		for _, e := range relayed(t, "trace", string(in)) {
			m, _ := e["@module"].(string)
			if m != "tako-proxy" && !strings.HasPrefix(m, "tako-proxy.") || e[Generation] != 4.0 {
				t.Errorf("forged %v from %q", e, in)
			}
		}
	})
}
