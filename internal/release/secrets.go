package release

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"slices"
	"strings"
	"syscall"
	"unicode/utf8"

	"tako/internal/atomicfile"
	"tako/internal/tako"
)

// MaxSecretsFile bounds a secrets file, in bytes.
const MaxSecretsFile = 1 << 20

// ValidateSecrets says whether secrets can be an app's: names that are
// environment variables', values in UTF-8 without NUL, and no more than MaxVars,
// MaxVarName, MaxVarValue and MaxVarsTotal allow. The error is a CodeInvalid
// Error, and never holds a value.
func ValidateSecrets(secrets map[string]string) error {
	bad := func(format string, args ...any) error {
		return tako.Errorf(tako.CodeInvalid, "Invalid secrets: %s", fmt.Sprintf(format, args...))
	}
	for _, name := range slices.Sorted(maps.Keys(secrets)) {
		if why := checkName(name); why != "" {
			return bad("%.80q: %s", name, why)
		}
		if strings.Contains(secrets[name], "\x00") {
			return bad("the value of %s has a NUL byte in it; take it out", name)
		}
		if !utf8.ValidString(secrets[name]) {
			return bad("the value of %s is not UTF-8; encode it, as base64 for one", name)
		}
	}
	if why := checkSize(secrets); why != "" {
		return bad("%s", why)
	}
	if len(encode(secrets)) > MaxSecretsFile { // escapes make a file larger than its values
		return bad("their JSON is longer than %d bytes", MaxSecretsFile)
	}
	return nil
}

// ReadSecrets reads an app's secrets; a file that is not there has none. It
// refuses a file that is not regular, that anyone but its owner may read or
// write, that is larger than MaxSecretsFile, or that is not what WriteSecrets
// makes. The map is never nil without an error.
func ReadSecrets(path string) (map[string]string, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NOFOLLOW|syscall.O_NONBLOCK, 0)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return map[string]string{}, nil
	case errors.Is(err, syscall.ELOOP):
		return nil, fmt.Errorf("read secrets %s: it is a link; put the file itself there", path)
	case err != nil:
		return nil, fmt.Errorf("read secrets %s: %w", path, reason(err))
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, fmt.Errorf("read secrets %s: %w", path, reason(err))
	}
	if mode := info.Mode(); mode.IsRegular() && mode.Perm()&0o077 != 0 {
		return nil, fmt.Errorf("read secrets %s: others than its owner may read or write it (mode %04o): chmod 600 %s", path, mode.Perm(), quote(path))
	}
	data, err := readRegular(f, MaxSecretsFile)
	if err != nil {
		return nil, fmt.Errorf("read secrets %s: %w", path, reason(err))
	}
	secrets := map[string]string{}
	tree, err := decodeTree(data)
	if err != nil {
		return nil, fmt.Errorf("read secrets %s: %w", path, err)
	}
	fields, ok := tree.(map[string]any)
	if !ok {
		return nil, fmt.Errorf("read secrets %s: got %s, want an object", path, kind(tree))
	}
	err = reading(func() {
		for _, name := range slices.Sorted(maps.Keys(fields)) {
			secrets[name] = asString(name, fields[name])
		}
	})
	if err == nil {
		err = ValidateSecrets(secrets)
	}
	if err != nil {
		return nil, fmt.Errorf("read secrets %s: %w", path, err)
	}
	return secrets, nil
}

// quote writes a path for a shell.
func quote(path string) string {
	if strings.Trim(path, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789/._-+") == "" {
		return path
	}
	return "'" + strings.ReplaceAll(path, "'", `'\''`) + "'"
}

// WriteSecrets replaces an app's secrets file, with mode 0600 from its first
// moment: a reader finds the old secrets or the new. Secrets that ValidateSecrets
// refuses are not written.
func WriteSecrets(path string, secrets map[string]string) error {
	if err := ValidateSecrets(secrets); err != nil {
		return err
	}
	return atomicfile.WriteFile(path, encode(secrets), 0o600)
}

// HashSecrets returns the SHA-256 of the secrets in hexadecimal: the same for the
// same names and values, and for none as for nil.
func HashSecrets(secrets map[string]string) string {
	sum := sha256.Sum256(encode(secrets))
	return hex.EncodeToString(sum[:])
}

// encode writes secrets as JSON, sorted by name, for people to read too. The
// hashes in a database depend on it: another form is another hash.
func encode(secrets map[string]string) []byte {
	if secrets == nil {
		secrets = map[string]string{}
	}
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	e.SetIndent("", "  ")
	if err := e.Encode(secrets); err != nil {
		panic("a map of strings always has a JSON form: " + err.Error())
	}
	return b.Bytes()
}
