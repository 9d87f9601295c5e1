// Package ctl is takoctl: it turns a command line into commands of the
// management socket, here or over ssh, and the replies into text for people or
// JSON for programs. Main is the whole program, so that tests run it in process.
//
// It decides nothing about apps; what is allowed and what happened is for the
// server to say. Results go to standard output, everything else to standard
// error.
package ctl

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/mattn/go-isatty"
	"github.com/spf13/cobra"

	"tako/internal/management"
	"tako/internal/paths"
	"tako/internal/tako"
	"tako/internal/version"
)

// The exit codes.
const (
	ExitDone        = 0
	ExitFailed      = 1 // it was tried and did not work
	ExitUsage       = 2
	ExitUnreachable = 3
	ExitRefused     = 4 // nothing was tried
)

// DefaultTimeout bounds a command that does not follow something.
const DefaultTimeout = 30 * time.Minute

// Env is what a run of takoctl has around it.
type Env struct {
	Stdin          io.Reader
	Stdout, Stderr io.Writer
	Getenv         func(string) string
	Now            func() time.Time
}

// Main runs takoctl with args (without the program's name) until it is done or
// ctx ends, and returns the exit code. It opens and closes only what is its own.
func Main(ctx context.Context, args []string, env Env) int {
	if _, file := env.Stderr.(*os.File); !file {
		env.Stderr = &shared{w: env.Stderr} // an ssh writes there too
	}
	r := &run{Env: env}
	root := r.root()
	root.SetArgs(args)
	root.SetIn(env.Stdin)
	root.SetOut(env.Stdout)
	root.SetErr(env.Stderr)
	err := root.ExecuteContext(ctx)
	if err == nil {
		return ExitDone
	}
	if !r.began {
		err = usageError{err}
	}
	return r.report(err)
}

// A run is one run of takoctl.
type run struct {
	Env
	socket  string
	host    string
	json    bool
	timeout time.Duration
	began   bool // the command line was good
}

// shared is a Writer for several goroutines.
type shared struct {
	mu sync.Mutex
	w  io.Writer // guarded by mu
}

func (s *shared) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.w.Write(p)
}

// A usageError is about the command line.
type usageError struct{ error }

func (e usageError) Unwrap() error { return e.error }

func usagef(format string, args ...any) error { return usageError{fmt.Errorf(format, args...)} }

// An unreachableError says that there was no server to ask.
type unreachableError struct{ error }

func (e unreachableError) Unwrap() error { return e.error }

// report prints an error and returns its exit code.
func (r *run) report(err error) int {
	text, lines := err.Error(), []string(nil)
	code := ExitFailed
	if e, ok := errors.AsType[*tako.Error](err); ok {
		switch e.Code {
		case tako.CodeInvalid, tako.CodeNotFound, tako.CodeConflict, tako.CodeBusy, tako.CodeForbidden:
			code = ExitRefused
		case tako.CodeFailed, tako.CodeInternal:
		}
		if undone, last, ok := rollbackText(e.Message); ok {
			text, lines = undone, last
		}
	}
	if _, ok := errors.AsType[unreachableError](err); ok {
		code = ExitUnreachable
	}
	if _, ok := errors.AsType[usageError](err); ok {
		code = ExitUsage
		text += "\nSee takoctl --help."
	}
	switch {
	case errors.Is(err, context.DeadlineExceeded):
		text = fmt.Sprintf("no end after %v; the server may go on with it: see takoctl status, or wait longer with --timeout", r.timeout)
	case errors.Is(err, context.Canceled):
		text = "interrupted; the server may go on with it: see takoctl status"
	}
	text, rest, _ := strings.Cut(strings.TrimRight(text, "\n"), "\n")
	fmt.Fprintf(r.Stderr, "takoctl: %s\n", clean(text))
	if rest != "" {
		lines = append(strings.Split(rest, "\n"), lines...)
	}
	for _, line := range lines {
		fmt.Fprintf(r.Stderr, "    %s\n", clean(line))
	}
	return code
}

// rollbackText reads the error of a rolling update that was undone, which is a
// JSON text.
func rollbackText(message string) (text string, lines []string, ok bool) {
	var m struct {
		App        string   `json:"app"`
		Error      string   `json:"error"`
		LastLines  []string `json:"last_lines"`
		RolledBack bool     `json:"rolled_back"`
	}
	if !strings.HasPrefix(message, "{") || json.Unmarshal([]byte(message), &m) != nil || !m.RolledBack {
		return "", nil, false
	}
	text = fmt.Sprintf("%s was rolled back to what ran before: %s", m.App, m.Error)
	if len(m.LastLines) > 0 {
		text += "\nThe last lines of the instance that failed:"
	}
	return text, m.LastLines, true
}

const rootHelp = `takoctl deploys apps to a tako server and looks after them.

It speaks to the server on this machine, or with --host to another one over ssh.

Exit codes:
  0  done
  1  it was tried and failed
  2  the command line is wrong
  3  the server cannot be reached
  4  the server refused: invalid, not found, in conflict, busy or forbidden`

func (r *run) root() *cobra.Command {
	root := &cobra.Command{
		Use: "takoctl", Short: "Deploy apps to a tako server and look after them", Long: rootHelp,
		Example: `  takoctl deploy . --app blog --route blog.example.com
  takoctl --host admin@box.example.com status blog
  takoctl logs blog -f`,
		SilenceErrors: true, SilenceUsage: true, Version: version.String(),
		PersistentPreRunE: func(cmd *cobra.Command, _ []string) error {
			if r.socket == "" && r.host == "" { // TAKO_SOCKET is about this machine
				r.socket = r.Getenv("TAKO_SOCKET")
			}
			if r.host != "" {
				if err := checkHost(r.host); err != nil {
					return err
				}
			}
			r.began = true
			return nil
		},
	}
	root.SetVersionTemplate("takoctl {{.Version}}\n")
	f := root.PersistentFlags()
	f.StringVar(&r.socket, "socket", "", "management `path` (default "+paths.DefaultSocket+", or TAKO_SOCKET)")
	f.StringVar(&r.host, "host", "", "run on `user@box` over ssh, where takoctl must be installed too")
	f.BoolVar(&r.json, "json", false, "print what the server answered, as JSON for programs")
	f.DurationVar(&r.timeout, "timeout", DefaultTimeout, "give up after this long; logs -f goes on")

	root.AddGroup(&cobra.Group{ID: "apps", Title: "Apps:"}, &cobra.Group{ID: "server", Title: "The server:"})
	add := func(group string, list ...*cobra.Command) {
		for _, c := range list {
			c.GroupID = group
			root.AddCommand(c)
		}
	}
	add("apps", r.deployCommand(), r.statusCommand(), r.listCommand(), r.logsCommand(), r.releasesCommand(), r.routesCommand(),
		r.rollbackCommand(), r.restartCommand(), r.scaleCommand(), r.secretsCommand(), r.stopCommand(), r.deleteCommand())
	add("server", r.serverCommand(), r.upgradeCommand())
	root.AddCommand(r.versionCommand(), r.dialStdioCommand())
	return root
}

// group makes a command that only has others below it.
func group(use, short string, below ...*cobra.Command) *cobra.Command {
	c := &cobra.Command{Use: use, Short: short, RunE: func(cmd *cobra.Command, args []string) error {
		if len(args) > 0 {
			return usagef("unknown command %q for %q", args[0], cmd.CommandPath())
		}
		return cmd.Help()
	}}
	c.AddCommand(below...)
	return c
}

// command makes a command that talks to a server: do gets a connection, which is
// closed after it.
func (r *run) command(c *cobra.Command, do func(ctx context.Context, s *conn, args []string) error) *cobra.Command {
	c.RunE = func(cmd *cobra.Command, args []string) error {
		return r.with(cmd.Context(), func(ctx context.Context, s *conn) error { return do(ctx, s, args) })
	}
	return c
}

// with runs do with a connection.
func (r *run) with(ctx context.Context, do func(ctx context.Context, s *conn) error) error {
	if r.timeout > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, r.timeout)
		defer cancel()
	}
	s, err := r.dial(ctx)
	if err != nil {
		return err
	}
	return s.closed(ctx, do(ctx, s))
}

// ask sends a command and prints the reply as JSON, or as show has it.
func ask[T any](ctx context.Context, r *run, s *conn, req management.Request, show func(T)) error {
	var data json.RawMessage
	if err := s.Do(ctx, req, r.step, &data); err != nil {
		return err
	}
	if r.json {
		return r.printJSON(data)
	}
	var v T
	if err := json.Unmarshal(data, &v); err != nil {
		return fmt.Errorf("read the reply: %w; is takoctl as new as the server?", err)
	}
	show(v)
	return nil
}

func (r *run) printJSON(data json.RawMessage) error {
	_, err := fmt.Fprintf(r.Stdout, "%s\n", data)
	return err
}

// say prints a line of a result.
func (r *run) say(format string, args ...any) { fmt.Fprintf(r.Stdout, format+"\n", args...) }

// step prints what long work is doing. Programs do not want to know.
func (r *run) step(text string) {
	if !r.json {
		fmt.Fprintf(r.Stderr, "  %s\n", clean(text))
	}
}

// terminal reports whether v, a standard stream, is one.
func terminal(v any) bool {
	f, ok := v.(*os.File)
	return ok && isatty.IsTerminal(f.Fd())
}

func (r *run) versionCommand() *cobra.Command {
	return &cobra.Command{
		Use: "version", Short: "Print the version of takoctl", Args: cobra.NoArgs,
		Run: func(*cobra.Command, []string) { r.say("takoctl %s", version.String()) },
	}
}
