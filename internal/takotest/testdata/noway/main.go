// Noway stands in for a tako-master that starts and passes its pre-flight but
// cannot go on after a reload: its data root is then nowhere.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"tako/internal/handoff"
	"tako/internal/logging"
	"tako/internal/master"
)

func main() {
	hup := make(chan os.Signal, 1)
	signal.Notify(hup, syscall.SIGHUP)
	stop := make(chan os.Signal, 1)
	signal.Notify(stop, syscall.SIGTERM)
	ctx, cancel := context.WithCancel(context.Background())
	go func() {
		<-stop
		cancel()
	}()
	err := run(ctx, master.Signals{Reload: hup, Stop: stop})
	if err != nil {
		fmt.Fprintf(os.Stderr, "noway: %v\n", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, signals master.Signals) error {
	var c master.Config
	flags := master.NewFlags(&c)
	if err := errors.Join(flags.Parse(os.Args[1:]), master.LoadSettings(flags, &c), c.Validate()); err != nil {
		return err
	}
	if c.Preflight != "" {
		reply, err := master.Preflight(ctx, c, "noway", c.Preflight)
		if err == nil {
			fmt.Println(reply)
		}
		return err
	}
	if _, resumed := os.LookupEnv(handoff.Env); resumed {
		c.DataDir = "/dev/null/nowhere"
	}
	log, err := logging.New(os.Stderr, "tako-master", c.LogLevel, c.LogFormat)
	if err != nil {
		return err
	}
	return master.Run(ctx, c, "noway", signals, log)
}
