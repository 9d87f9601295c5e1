// Command tako-proxy takes HTTP and HTTPS from clients and hands requests to the
// instances of apps. tako-master starts it; descriptor 3 is its channel to it.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"runtime"
	"syscall"

	"tako/internal/ipc"
	"tako/internal/logging"
	"tako/internal/proxy"
	"tako/internal/sandbox"
	"tako/internal/version"
	"tako/internal/wire"
)

const name = string(wire.Proxy)

func main() { os.Exit(run()) }

func run() int {
	// First of all, before anything is read: powers that are not needed go.
	if err := sandbox.Enter(name, true); err != nil {
		fmt.Fprintf(os.Stderr, "%s: give up powers: %v\n", name, err)
		return wire.ExitFailed
	}
	showVersion := flag.Bool("version", false, "print the version and exit")
	logLevel := flag.String("log-level", "info", "trace, debug, info, warn or error")
	flag.Usage = func() {
		fmt.Fprintf(flag.CommandLine.Output(), "%s answers HTTP and HTTPS for tako. tako-master starts it, not you.\n\nFlags:\n", name)
		flag.PrintDefaults()
	}
	flag.Parse()
	if *showVersion {
		fmt.Println(name, version.String())
		return wire.ExitDone
	}
	log, err := logging.Child(name, *logLevel)
	if err != nil || flag.NArg() > 0 {
		fmt.Fprintf(os.Stderr, "%s: bad flags (%v)\n", name, err)
		return wire.ExitUsage
	}
	channel, err := ipc.Open(wire.ChannelFD)
	if err != nil {
		fmt.Fprintf(os.Stderr, "%s is started by tako-master, and not by hand: %v\n", name, err)
		return wire.ExitUsage
	}
	// A terminal's signals are the master's to act on. And a log pipe without a reader
	// must not end this process: it finishes requests when the master has died.
	signal.Ignore(syscall.SIGHUP, syscall.SIGINT, syscall.SIGPIPE)
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	conf := proxy.Config{Channel: channel, Version: version.String(), Loops: runtime.GOMAXPROCS(0)}
	conf.Busy = func(busy bool) {
		// Busy event loops hold what runs goroutines: all else gets as much beside.
		n := conf.Loops
		if busy {
			n *= 2
		}
		runtime.GOMAXPROCS(n)
	}
	switch err := proxy.Run(ctx, conf, log); {
	case errors.Is(err, proxy.ErrMaster):
		log.Error("leaving", "error", err)
		return wire.ExitPeer
	case err != nil:
		log.Error("leaving", "error", err)
		return wire.ExitFailed
	}
	return wire.ExitDone
}
