package release

import (
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

func TestSecretsComeBackAsWritten(t *testing.T) {
	path := filepath.Join(t.TempDir(), "secrets.json")
	old := syscall.Umask(0)
	defer syscall.Umask(old)
	for _, want := range []map[string]string{
		nil,
		{"B": "2", "A": "<&>\n\"\u2028é", "EMPTY": ""},
		{"A": "replaced"},
	} {
		if err := WriteSecrets(path, want); err != nil {
			t.Fatal(err)
		}
		got, err := ReadSecrets(path)
		if err != nil || got == nil || !maps.Equal(got, want) {
			t.Errorf("ReadSecrets = %q, %v; want %q", got, err, want)
		}
		info, err := os.Lstat(path)
		if err != nil || info.Mode() != 0o600 {
			t.Errorf("mode %v, %v; want 0600", info.Mode(), err)
		}
	}
	entries, err := os.ReadDir(filepath.Dir(path))
	if err != nil || len(entries) != 1 {
		t.Errorf("beside the secrets: %v, %v", entries, err)
	}
}

func TestSecretsFileIsSortedAndReadable(t *testing.T) {
	path := filepath.Join(t.TempDir(), "secrets.json")
	if err := WriteSecrets(path, map[string]string{"B": "2", "A": "a&b"}); err != nil {
		t.Fatal(err)
	}
	got, err := os.ReadFile(path)
	if want := "{\n  \"A\": \"a&b\",\n  \"B\": \"2\"\n}\n"; err != nil || string(got) != want {
		t.Errorf("file %q, %v; want %q", got, err, want)
	}
}

func TestSecretsThatAreRefusedAreNotWritten(t *testing.T) {
	path := filepath.Join(t.TempDir(), "secrets.json")
	if err := WriteSecrets(path, map[string]string{"A": "1"}); err != nil {
		t.Fatal(err)
	}
	refused(t, "bad name", WriteSecrets(path, map[string]string{"A B": "2"}),
		`Invalid secrets: "A B": a name is made of letters, digits and '_' and does not begin with a digit`)
	if got, err := ReadSecrets(path); err != nil || got["A"] != "1" {
		t.Errorf("the old secrets are %q, %v", got, err)
	}
}

func TestReadSecretsOfAMissingFileIsEmpty(t *testing.T) {
	got, err := ReadSecrets(filepath.Join(t.TempDir(), "none", "secrets.json"))
	if err != nil || got == nil || len(got) != 0 {
		t.Errorf("got %v, %v; want an empty map", got, err)
	}
}

func TestReadSecretsRefuses(t *testing.T) {
	dir := t.TempDir()
	content := func(text string, mode os.FileMode) func(string) error {
		return func(p string) error {
			if err := os.WriteFile(p, []byte(text), 0o600); err != nil {
				return err
			}
			return os.Chmod(p, mode)
		}
	}
	good := filepath.Join(dir, "good")
	if err := WriteSecrets(good, nil); err != nil {
		t.Fatal(err)
	}
	for i, c := range []struct {
		make func(path string) error
		want string
	}{
		{content("{}", 0o640), "others than its owner may read or write it (mode 0640): chmod 600 PATH"},
		{content("{}", 0o604), "others than its owner may read or write it (mode 0604): chmod 600 PATH"},
		{content("{}", 0o620), "others than its owner may read or write it (mode 0620): chmod 600 PATH"},
		{func(p string) error { return os.Symlink(good, p) }, "it is a link; put the file itself there"},
		{func(p string) error { return os.Mkdir(p, 0o700) }, "it is not a regular file"},
		{func(p string) error { return syscall.Mkfifo(p, 0o600) }, "it is not a regular file"},
		{content(strings.Repeat(" ", MaxSecretsFile)+"{}", 0o600), "it is larger than 1048576 bytes"},
		{content("", 0o600), "the JSON ends too early"},
		{content(`{"A": "1", "A": "2"}`, 0o600), `field "A": it is there twice; keep one`},
		{content(`{}{}`, 0o600), "something follows the JSON value, which ends at byte 2"},
		{content(`["A"]`, 0o600), "got a list, want an object"},
		{content(`{"A": {}}`, 0o600), `field "A": got an object, want a string`},
		{content(`{"A": null}`, 0o600), `field "A": got null, want a string`},
		{content(`{"A-B": "x"}`, 0o600), `Invalid secrets: "A-B": a name is made of letters, digits and '_' and does not begin with a digit`},
	} {
		path := filepath.Join(dir, fmt.Sprintf("s%d.json", i))
		if err := c.make(path); err != nil {
			t.Fatal(err)
		}
		_, err := ReadSecrets(path)
		if want := "read secrets " + path + ": " + strings.ReplaceAll(c.want, "PATH", path); err == nil || err.Error() != want {
			t.Errorf("%d:\n got %v\nwant %s", i, err, want)
		}
	}
	odd := filepath.Join(dir, "it's odd")
	if err := content("{}", 0o644)(odd); err != nil {
		t.Fatal(err)
	}
	_, err := ReadSecrets(odd)
	if want := "chmod 600 '" + dir + `/it'\''s odd'`; err == nil || !strings.HasSuffix(err.Error(), want) {
		t.Errorf("got %v, want a command that a shell takes: %s", err, want)
	}
}

func TestValidateSecrets(t *testing.T) {
	many := make(map[string]string)
	for i := range MaxVars {
		many[fmt.Sprintf("N%d", i)] = ""
	}
	large := map[string]string{}
	for i := range 8 {
		large[fmt.Sprintf("V%d", i)] = strings.Repeat("x", MaxVarValue-2)
	}
	name := strings.Repeat("N", MaxVarName)
	for _, good := range []map[string]string{nil, {"_a9": "", "PORT": "é"}, {name: strings.Repeat("x", MaxVarValue)}, many, large} {
		if err := ValidateSecrets(good); err != nil {
			t.Errorf("%d secrets: %v", len(good), err)
		}
	}
	many["ONE_MORE"] = ""
	large["ONE_MORE"] = ""
	escapes := map[string]string{}
	for i := range 7 {
		escapes[fmt.Sprintf("V%d", i)] = strings.Repeat("\x01", MaxVarValue)
	}
	for _, c := range []struct {
		give map[string]string
		want string
	}{
		{map[string]string{"": "x"}, `"": a name is made of letters, digits and '_' and does not begin with a digit`},
		{map[string]string{"é": "x"}, `"é": a name is made of letters, digits and '_' and does not begin with a digit`},
		{map[string]string{"A\n": "x"}, `"A\n": a name is made of letters, digits and '_' and does not begin with a digit`},
		{map[string]string{name + "N": "x"}, `"` + name[:80] + `": the name is longer than 256 bytes`},
		{map[string]string{"A": "sec\x00ret"}, "the value of A has a NUL byte in it; take it out"},
		{map[string]string{"A": "sec\xffret"}, "the value of A is not UTF-8; encode it, as base64 for one"},
		{map[string]string{"B": strings.Repeat("x", MaxVarValue+1), "A": strings.Repeat("x", MaxVarValue+1)}, "the value of A is longer than 65536 bytes"},
		{many, "1001 variables are more than 1000"},
		{large, "names and values are 524296 bytes together, more than 524288"},
		{escapes, "their JSON is longer than 1048576 bytes"},
	} {
		refused(t, c.want, ValidateSecrets(c.give), "Invalid secrets: "+c.want)
	}
}

func TestHashSecretsDependsOnNamesAndValuesOnly(t *testing.T) {
	// These hashes are in databases: they may never change.
	const none = "ca3d163bab055381827226140568f3bef7eaac187cebd76878e0b63e9e442356"
	if HashSecrets(nil) != none || HashSecrets(map[string]string{}) != none {
		t.Errorf("no secrets have the hash %s, want %s", HashSecrets(nil), none)
	}
	const two = "271500fc830b0fa50009213b2004b63b2b4b06f300625cb62624522516736bc6"
	for range 20 {
		if got := HashSecrets(map[string]string{"B": "2", "A": "a&b"}); got != two {
			t.Fatalf("hash %s, want %s", got, two)
		}
	}
	seen := map[string]bool{}
	for _, m := range []map[string]string{nil, {"A": ""}, {"A": "1"}, {"A": "1", "B": ""}, {"A1": ""}, {"A": "1\",\n  \"B\": \""}} {
		if seen[HashSecrets(m)] {
			t.Errorf("%q has the hash of another", m)
		}
		seen[HashSecrets(m)] = true
	}
}
