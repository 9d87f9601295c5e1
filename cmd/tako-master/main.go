// Command tako-master runs a tako server: see package master and --help.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"github.com/spf13/pflag"

	"tako/internal/logging"
	"tako/internal/master"
	"tako/internal/version"
	"tako/internal/wire"
)

func main() {
	// First of all: until then a SIGHUP is ignored, if another image of this
	// process was here before, or ends the process.
	hup := make(chan os.Signal, 1)
	signal.Notify(hup, syscall.SIGHUP)
	stop := make(chan os.Signal, 1)
	signal.Notify(stop, syscall.SIGTERM, syscall.SIGINT)
	ctx, cancel := context.WithCancel(context.Background())
	go func() {
		<-stop
		cancel()
	}()
	os.Exit(run(ctx, os.Args[1:], master.Signals{Reload: hup, Stop: stop}))
}

func run(ctx context.Context, args []string, signals master.Signals) int {
	var c master.Config
	flags := master.NewFlags(&c)
	flags.Usage = func() { fmt.Fprint(os.Stdout, master.Usage+flags.FlagUsages()) }
	fail := func(status int, err error) int {
		fmt.Fprintf(os.Stderr, "tako-master: %v\n", err)
		return status
	}
	err := flags.Parse(args)
	if errors.Is(err, pflag.ErrHelp) {
		return wire.ExitDone
	}
	if err == nil && flags.NArg() > 0 {
		err = fmt.Errorf("unexpected argument %q; tako-master --help lists the flags", flags.Arg(0))
	}
	if err != nil {
		return fail(wire.ExitUsage, err)
	}
	if c.Version {
		fmt.Fprintln(os.Stdout, "tako-master", version.String())
		return wire.ExitDone
	}
	if err := errors.Join(master.LoadSettings(flags, &c), c.Validate()); err != nil {
		return fail(wire.ExitUsage, err)
	}
	if c.Preflight != "" {
		reply, err := master.Preflight(context.Background(), c, version.Version, c.Preflight)
		if err != nil {
			return fail(wire.ExitUsage, err)
		}
		fmt.Fprintln(os.Stdout, reply)
		return wire.ExitDone
	}
	if c.Check {
		fmt.Fprintln(os.Stdout, "flags and settings are good")
		return wire.ExitDone
	}
	log, err := logging.New(os.Stderr, "tako-master", c.LogLevel, c.LogFormat)
	if err != nil {
		return fail(wire.ExitUsage, err)
	}
	signal.Ignore(syscall.SIGPIPE)
	if err := master.Run(ctx, c, version.Version, signals, log); err != nil {
		return fail(wire.ExitFailed, err)
	}
	return wire.ExitDone
}
