package takotest

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
)

// WriteApp makes an app to deploy in dir, which it makes too: testapp with these
// flags (see its --help), and what manifest adds to or changes in app.json. So
// that tests are quick, the default of "timeouts" has a short stability window.
func WriteApp(dir string, manifest map[string]any, flags ...string) error {
	programs, err := Build()
	if err != nil {
		return err
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	if err := copyProgram(filepath.Join(programs, "testapp"), filepath.Join(dir, "app")); err != nil {
		return err
	}
	m := map[string]any{
		"runtime": "go", "main": "app", "start": append([]string{"./app"}, flags...),
		"timeouts": map[string]any{"stability": 0.1},
	}
	maps.Copy(m, manifest)
	text, err := json.MarshalIndent(m, "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(dir, "app.json"), append(text, '\n'), 0o644)
}

// copyProgram copies a program. It is no link: a server gives a release to
// other users.
func copyProgram(from, to string) error {
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.OpenFile(to, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o755)
	if err != nil {
		return err
	}
	if _, err := io.Copy(out, in); err != nil {
		return errors.Join(fmt.Errorf("copy %s: %w", from, err), out.Close())
	}
	return out.Close()
}
