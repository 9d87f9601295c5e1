package ctl

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"tako/internal/management"
)

// maxSecrets bounds a file of secrets and a value from standard input, in bytes:
// they have to fit into one line of the management socket.
const maxSecrets = management.MaxLine

func (r *run) secretsCommand() *cobra.Command {
	set := &cobra.Command{
		Use: "set APP NAME[=VALUE]...", Short: "Set secrets of an app, and restart it with them", Args: cobra.MinimumNArgs(2),
		Long: `Set adds the named secrets to those that the app has, or changes them. Instances
are replaced one by one, so that they see the new values.

NAME=- reads the value from standard input. NAME alone asks for it on the
terminal, without showing it. A value on the command line can be seen by other
users of this machine while takoctl runs.`,
		Example: `  takoctl secrets set blog API_KEY
  takoctl secrets set blog TLS_KEY=- < key.pem`,
		RunE: func(cmd *cobra.Command, args []string) error {
			values, err := r.secretArgs(cmd.Context(), args[1:])
			if err != nil {
				return err
			}
			return r.with(cmd.Context(), func(ctx context.Context, s *conn) error {
				req := management.Request{Command: "update_secrets", App: args[0], Secrets: values, Merge: true, Progress: true}
				return ask(ctx, r, s, req, func(a reply) {
					text := "set " + plural(len(values), "secret") + " of " + string(a.App)
					if a.Restarted {
						text += ", and restarted it"
					}
					r.say("%s", text)
				})
			})
		},
	}
	return group("secrets", "Set the secrets of an app", set)
}

// secretArgs reads NAME=VALUE, NAME=- and NAME.
func (r *run) secretArgs(ctx context.Context, args []string) (map[string]string, error) {
	values := make(map[string]string, len(args))
	piped := false
	for _, arg := range args {
		name, value, given := strings.Cut(arg, "=")
		if _, twice := values[name]; twice || name == "" {
			return nil, usagef("want each secret once, as NAME=VALUE: %q", name)
		}
		var err error
		switch {
		case !given:
			if value, err = r.prompt(ctx, name); err != nil {
				return nil, err
			}
		case value == "-" && piped:
			return nil, usagef("standard input is the value of one secret, not two")
		case value == "-":
			piped = true
			if value, err = readAll(r.Stdin, "standard input"); err != nil {
				return nil, err
			}
			value = strings.TrimSuffix(strings.TrimSuffix(value, "\n"), "\r")
		}
		values[name] = value
	}
	return values, nil
}

// readSecrets reads the secrets of a deploy; nil for none, so that the app keeps
// its own.
func (r *run) readSecrets(args []string, file string) (map[string]string, error) {
	var values map[string]string
	if file != "" {
		f, err := os.Open(file)
		if err != nil {
			return nil, usagef("read secrets: %w", err)
		}
		defer f.Close()
		text, err := readAll(f, file)
		if err != nil {
			return nil, err
		}
		if values, err = parseSecrets(text); err != nil {
			return nil, usagef("read secrets of %s: %w", file, err)
		}
	}
	for _, arg := range args {
		name, value, given := strings.Cut(arg, "=")
		if !given || name == "" {
			return nil, usagef("--secret wants NAME=VALUE")
		}
		if values == nil {
			values = make(map[string]string)
		}
		values[name] = value
	}
	return values, nil
}

// parseSecrets reads a JSON object of strings, or lines NAME=VALUE, where empty
// lines and those that begin with '#' do not count. Errors do not repeat values.
func parseSecrets(text string) (map[string]string, error) {
	values := make(map[string]string)
	if strings.HasPrefix(strings.TrimSpace(text), "{") {
		if err := json.Unmarshal([]byte(text), &values); err != nil {
			return nil, fmt.Errorf("it is not a JSON object of strings")
		}
		return values, nil
	}
	n := 0
	for line := range strings.Lines(text) {
		n++
		line = strings.TrimRight(line, "\r\n")
		if trimmed := strings.TrimSpace(line); trimmed == "" || trimmed[0] == '#' {
			continue
		}
		name, value, given := strings.Cut(line, "=")
		if name = strings.TrimSpace(name); !given || name == "" {
			return nil, fmt.Errorf("line %d is not NAME=VALUE", n)
		}
		if _, twice := values[name]; twice {
			return nil, fmt.Errorf("line %d sets %s again", n, name)
		}
		values[name] = value
	}
	return values, nil
}

func readAll(from io.Reader, what string) (string, error) {
	b, err := io.ReadAll(io.LimitReader(from, maxSecrets+1))
	if err != nil {
		return "", fmt.Errorf("read %s: %w", what, err)
	}
	if len(b) > maxSecrets {
		return "", usagef("%s has more than %d bytes", what, maxSecrets)
	}
	return string(b), nil
}

// prompt asks for a value on the terminal, without showing it.
func (r *run) prompt(ctx context.Context, name string) (string, error) {
	f, ok := r.Stdin.(*os.File)
	if !ok || !terminal(f) {
		return "", usagef("no value for %s: write %s=VALUE, or %s=- to read it from standard input", name, name, name)
	}
	fd := int(f.Fd())
	was, err := unix.IoctlGetTermios(fd, unix.TCGETS)
	if err != nil {
		return "", fmt.Errorf("ask for %s: %w", name, err)
	}
	quiet := *was
	quiet.Lflag &^= unix.ECHO
	quiet.Lflag |= unix.ICANON | unix.ISIG
	if err := unix.IoctlSetTermios(fd, unix.TCSETS, &quiet); err != nil {
		return "", fmt.Errorf("ask for %s: %w", name, err)
	}
	defer func() { _ = unix.IoctlSetTermios(fd, unix.TCSETS, was) }()
	fmt.Fprintf(r.Stderr, "%s: ", clean(name))
	defer fmt.Fprintln(r.Stderr)

	type answer struct {
		text string
		err  error
	}
	got := make(chan answer, 1)
	go func() { // a read of a terminal cannot be ended: interrupted, it is left behind
		text, err := readLine(f)
		got <- answer{text, err}
	}()
	select {
	case a := <-got:
		return a.text, a.err
	case <-ctx.Done():
		return "", ctx.Err()
	}
}

// readLine reads one line, a byte at a time: what follows is not ours.
func readLine(from io.Reader) (string, error) {
	var line []byte
	b := make([]byte, 1)
	for len(line) < maxSecrets {
		n, err := from.Read(b)
		if n == 1 && b[0] == '\n' {
			return string(line), nil
		}
		line = append(line, b[:n]...)
		if err != nil {
			return "", fmt.Errorf("no value: %w", err)
		}
	}
	return "", fmt.Errorf("more than %d bytes", maxSecrets)
}
