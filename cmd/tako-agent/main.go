// Command tako-agent starts, probes and stops the instances of apps, as
// tako-master says over descriptor 3. It is started by tako-master and not by
// hand; under other names it is its own second stages.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"

	"tako/internal/agent"
	"tako/internal/ipc"
	"tako/internal/logging"
	"tako/internal/sandbox"
	"tako/internal/version"
	"tako/internal/wire"
)

func main() {
	agent.Stage() // does not return if this is one
	os.Exit(run())
}

func run() int {
	if err := sandbox.Enter(string(wire.Agent), true); err != nil {
		fmt.Fprintf(os.Stderr, "tako-agent: %v\n", err)
		return wire.ExitFailed
	}
	show := flag.Bool("version", false, "print the version and exit")
	level := flag.String("log-level", "info", "trace, debug, info, warn or error")
	flag.Usage = func() {
		fmt.Fprint(flag.CommandLine.Output(), "tako-agent starts and probes apps for tako. tako-master starts it, not you.\n\nFlags:\n")
		flag.PrintDefaults()
	}
	flag.Parse()
	if *show {
		fmt.Println("tako-agent", version.String())
		return wire.ExitDone
	}
	channel, err := ipc.Open(wire.ChannelFD)
	if err != nil || flag.NArg() > 0 {
		fmt.Fprintln(os.Stderr, "tako-agent is started by tako-master, not by hand: run tako-master")
		return wire.ExitUsage
	}
	log, err := logging.Child(string(wire.Agent), *level)
	if err != nil {
		fmt.Fprintf(os.Stderr, "tako-agent: %v\n", err)
		return wire.ExitUsage
	}
	// A log pipe without a reader must not end this process: its last work comes
	// when the master has died.
	// A SIGHUP is for tako-master. Neither is ignored: apps would inherit that.
	signal.Notify(make(chan os.Signal, 1), syscall.SIGPIPE, syscall.SIGHUP)
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	switch err := agent.Run(ctx, agent.Config{Channel: channel, Version: version.String()}, log); {
	case err == nil, errors.Is(err, agent.ErrReleased):
		return wire.ExitDone
	case errors.Is(err, io.EOF):
		log.Info("tako-master has gone, all instances are stopped")
		return wire.ExitPeer
	case errors.Is(err, ipc.ErrProtocol):
		log.Error("tako-master broke the rules of the channel", logging.Err, err)
		return wire.ExitPeer
	default:
		log.Error("tako-agent failed", logging.Err, err)
		return wire.ExitFailed
	}
}
