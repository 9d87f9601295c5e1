package ctl

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os/exec"
	"strings"
	"sync"
	"time"

	"github.com/spf13/cobra"

	"tako/internal/management"
	"tako/internal/paths"
	"tako/internal/tako"
)

// sshGrace is how long an ssh whose streams were closed has to end.
const sshGrace = 5 * time.Second

// A conn is a Client, and the ssh under it if there is one.
type conn struct {
	*management.Client
	ssh *sshStreams
}

// dial connects to the server.
func (r *run) dial(ctx context.Context) (*conn, error) {
	if r.host != "" {
		ssh, err := r.startSSH(ctx)
		if err != nil {
			return nil, unreachableError{err}
		}
		return &conn{management.NewClient(ssh), ssh}, nil
	}
	c, err := management.Dial(ctx, r.socketPath())
	if err != nil {
		return nil, unreachableError{err}
	}
	return &conn{c, nil}, nil
}

func (r *run) socketPath() string {
	if r.socket == "" {
		return paths.DefaultSocket
	}
	return r.socket
}

// closed closes the connection after a command that ended with err, and says
// what became of it: without an answer from the server, the end of ssh is the
// reason.
func (c *conn) closed(ctx context.Context, err error) error {
	closing := c.Close()
	if _, told := errors.AsType[*tako.Error](err); err == nil || told || ctx.Err() != nil {
		return err
	}
	if c.ssh != nil && closing != nil {
		return unreachableError{fmt.Errorf("ssh to %s: %w; does `ssh %s takoctl version` work?", c.ssh.host, closing, c.ssh.host)}
	}
	if errors.Is(err, io.ErrUnexpectedEOF) {
		return unreachableError{err}
	}
	return err
}

// checkHost refuses what ssh could take for an option.
func checkHost(host string) error {
	if strings.HasPrefix(host, "-") || strings.ContainsFunc(host, func(c rune) bool { return c <= ' ' || c == 0x7f }) {
		return usagef("invalid --host %q: want user@box", host)
	}
	return nil
}

// sshStreams are the standard streams of an ssh that runs takoctl dial-stdio.
type sshStreams struct {
	io.Reader
	io.Writer
	host  string
	close func() error
}

// Close closes the streams and waits for ssh. It returns how ssh ended.
func (s *sshStreams) Close() error { return s.close() }

// startSSH starts an ssh. It is ended when its streams are closed.
func (r *run) startSSH(ctx context.Context) (*sshStreams, error) {
	program := r.Getenv("TAKO_SSH")
	if program == "" {
		program = "ssh"
	}
	remote := "takoctl dial-stdio"
	if r.socket != "" {
		remote += " --socket=" + quote(r.socket)
	}
	ctx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	cmd := exec.CommandContext(ctx, program, "-T", "--", r.host, remote)
	cmd.Stderr = r.Stderr
	cmd.WaitDelay = time.Second
	in, err := cmd.StdinPipe()
	if err != nil {
		cancel()
		return nil, fmt.Errorf("start ssh: %w", err)
	}
	// Not StdoutPipe: Wait must not close what a Read is under way on.
	out, w := io.Pipe()
	cmd.Stdout = w
	if err := cmd.Start(); err != nil {
		cancel()
		return nil, fmt.Errorf("start ssh: %w", err)
	}
	var ended error
	done := make(chan struct{})
	go func() {
		ended = cmd.Wait()
		w.Close()
		close(done)
	}()
	return &sshStreams{Reader: out, Writer: in, host: r.host, close: sync.OnceValue(func() error {
		in.Close()
		out.Close()
		late := time.AfterFunc(sshGrace, cancel)
		<-done
		late.Stop()
		cancel()
		return ended
	})}, nil
}

// quote makes one word of s for a POSIX shell.
func quote(s string) string { return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'" }

func (r *run) dialStdioCommand() *cobra.Command {
	return &cobra.Command{
		Use: "dial-stdio", Hidden: true, Args: cobra.NoArgs,
		Short: "Connect standard input and output to the management socket; what --host runs on the other side",
		RunE: func(cmd *cobra.Command, _ []string) error {
			if r.host != "" {
				return usagef("dial-stdio has no --host")
			}
			var d net.Dialer
			c, err := d.DialContext(cmd.Context(), "unix", r.socketPath())
			if err != nil {
				return unreachableError{fmt.Errorf("connect to %s: %w; is tako-master running, and are you a member of the socket's group?", r.socketPath(), err)}
			}
			return r.relay(cmd.Context(), c.(*net.UnixConn))
		},
	}
}

// relay copies both ways until the server closes, or standard input ends and the
// server has said all.
func (r *run) relay(ctx context.Context, c *net.UnixConn) error {
	defer c.Close()
	defer context.AfterFunc(ctx, func() { c.Close() })()
	go func() {
		_, _ = io.Copy(c, r.Stdin)
		_ = c.CloseWrite()
	}()
	if _, err := io.Copy(r.Stdout, c); err != nil && ctx.Err() == nil {
		return fmt.Errorf("relay: %w", err)
	}
	return nil
}
