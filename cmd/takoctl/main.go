// Command takoctl deploys apps to a tako server and looks after them. See
// package ctl.
package main

import (
	"context"
	"os"
	"os/signal"
	"syscall"
	"time"

	"tako/internal/ctl"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	code := ctl.Main(ctx, os.Args[1:], ctl.Env{
		Stdin: os.Stdin, Stdout: os.Stdout, Stderr: os.Stderr, Getenv: os.Getenv, Now: time.Now,
	})
	stop()
	os.Exit(code)
}
