// Package logging sets up hclog for the programs of tako and passes a child's
// lines on. The master writes text or JSON where it is told to; children write
// JSON lines to standard error, which the master reads with Relay and writes
// again under the child's name. It promises that no child can write in another's
// name, start a line of its own, or make a line longer than MaxLine. What is
// worth a line is for everybody else to say.
package logging

import (
	"fmt"
	"io"
	"os"
	"slices"
	"strings"

	"github.com/hashicorp/go-hclog"
)

// The keys of pairs. One word for one thing, in every program.
const (
	App        = "app"
	Release    = "release"
	Build      = "build"
	Instance   = "instance"
	Route      = "route"
	Upstream   = "upstream"
	PID        = "pid"
	UID        = "uid"
	Role       = "role"
	Generation = "generation"
	Err        = "err"
	Exit       = "exit"
	Signal     = "signal"
	Delay      = "delay"
	Path       = "path"
	Addr       = "addr"
	Command    = "command"
	Request    = "request"
	Host       = "host"
	Version    = "version"
	Revision   = "revision"
	Reason     = "reason"
)

// The choices of New.
var (
	Levels  = []string{"trace", "debug", "info", "warn", "error"}
	Formats = []string{"text", "json"}
)

// New makes the logger of a program that writes to w: name goes into each line,
// level is one of Levels, format one of Formats. The error for another value
// names the choices.
func New(w io.Writer, name, level, format string) (hclog.Logger, error) {
	if err := oneOf("log level", level, Levels); err != nil {
		return nil, err
	}
	if err := oneOf("log format", format, Formats); err != nil {
		return nil, err
	}
	return hclog.New(&hclog.LoggerOptions{
		Name: name, Level: hclog.LevelFromString(level), Output: w, JSONFormat: format == "json",
	}), nil
}

// Child makes the logger of a child: JSON lines on standard error, for Relay in
// the master. The level comes in the flag -log-level, so that what nobody will
// read is not written.
func Child(name, level string) (hclog.Logger, error) {
	return New(os.Stderr, name, level, "json")
}

func oneOf(what, value string, choices []string) error {
	if slices.Contains(choices, value) {
		return nil
	}
	return fmt.Errorf("%s %q: use one of %s", what, value, strings.Join(choices, ", "))
}
