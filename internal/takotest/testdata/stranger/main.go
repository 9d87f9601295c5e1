// Stranger stands in for a tako-proxy of another version: it greets with a protocol
// that no master speaks.
package main

import (
	"fmt"
	"os"

	"tako/internal/ipc"
	"tako/internal/wire"
)

func main() {
	if len(os.Args) > 1 && os.Args[1] == "--version" {
		fmt.Println("stranger")
		return
	}
	if err := run(); err != nil {
		fmt.Fprintf(os.Stderr, "stranger: %v\n", err)
		os.Exit(1)
	}
}

func run() error {
	channel, err := ipc.Open(wire.ChannelFD)
	if err != nil {
		return err
	}
	conn := wire.NewConn(channel, wire.LinkProxy, wire.Proxy)
	m, err := conn.Receive()
	if err != nil {
		return err
	}
	hello, ok := m.Body.(*wire.Hello)
	if !ok {
		return fmt.Errorf("greeted with %T", m.Body)
	}
	if err := conn.Send(0, &wire.Hello{Protocol: wire.ProtocolVersion + 1, Version: "stranger", Generation: hello.Generation, PID: os.Getpid()}); err != nil {
		return err
	}
	_, err = conn.Receive() // the master hangs up
	return err
}
