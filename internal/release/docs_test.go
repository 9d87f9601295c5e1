package release

import (
	"encoding/json"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"
)

const reference = "../../docs/APP.md"

// fieldsOf are the names that manifest.go reads out of objects, each as the
// reference has to name it.
func fieldsOf(t *testing.T) []string {
	source, err := os.ReadFile("manifest.go")
	if err != nil {
		t.Fatal(err)
	}
	section := "" // of the object that a function reads
	var names []string
	reads := regexp.MustCompile(`\b(o|p|q|m)\.(?:str|boolean|number|integer|seconds|size|list|object|has|readArgv|fields)(?:\(|\[)(?:o, |p, )?"([a-z_]+)"`)
	for line := range strings.Lines(string(source)) {
		for f, s := range map[string]string{
			"func readHealth(": "health.", "func readLimits(": "limits.", "func readTimeouts(": "timeouts.",
			"func (m *Manifest) readProcesses(": "processes.NAME.", "func (m *Manifest) read(": "", "func Parse(": "",
		} {
			if strings.HasPrefix(line, f) {
				section = s
			}
		}
		for _, found := range reads.FindAllStringSubmatch(line, -1) {
			name := section + found[2]
			if found[1] == "q" {
				name = "queue." + found[2]
			}
			if !slices.Contains(names, name) {
				names = append(names, name)
			}
		}
	}
	return names
}

func TestEveryFieldIsInTheReference(t *testing.T) {
	text, err := os.ReadFile(reference)
	if err != nil {
		t.Fatal(err)
	}
	names := fieldsOf(t)
	for _, want := range []string{"runtime", "release", "health.codes", "processes.NAME.start", "limits.memory", "timeouts.grace", "queue.wait"} {
		if !slices.Contains(names, want) {
			t.Errorf("this test does not find %s in manifest.go: it found %q", want, names)
		}
	}
	for _, name := range names {
		row := "| `" + name + "` |"
		section := slices.Contains([]string{"health", "limits", "timeouts", "queue"}, name) && strings.Contains(string(text), "\n### "+name+"\n")
		if !section && !strings.Contains(string(text), row) {
			t.Errorf("docs/APP.md has no row for the field %s", name)
		}
	}
}

func TestExamplesOfTheReferenceAreValid(t *testing.T) {
	text, err := os.ReadFile(reference)
	if err != nil {
		t.Fatal(err)
	}
	blocks := regexp.MustCompile("(?s)```json\n(.*?)```").FindAllStringSubmatch(string(text), -1)
	if len(blocks) < 8 {
		t.Fatalf("only %d examples", len(blocks))
	}
	for _, block := range blocks {
		m, err := Parse("app.json", []byte(block[1]))
		if err != nil {
			t.Errorf("%v:\n%s", err, block[1])
			continue
		}
		if _, err := m.Argv(t.TempDir()); err != nil {
			t.Errorf("%v:\n%s", err, block[1])
		}
		var fields map[string]json.RawMessage
		if err := json.Unmarshal([]byte(block[1]), &fields); err != nil {
			t.Error(err)
		}
		known := fieldsOf(t)
		for name := range fields {
			if !slices.Contains(known, name) {
				t.Errorf("%s is not a field:\n%s", name, block[1])
			}
		}
	}
}
