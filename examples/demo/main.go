// Demo starts tako with a temporary data root, deploys two small apps with
// takoctl and says what to try. It runs from the root of the repository, after
// make build, and stops everything it started when it is interrupted.
//
// With --check it asks the apps itself instead, on free ports: redirect, HTTPS,
// HTTP/2, a rollout under load, the death of an instance, a clean stop. It ends
// with a verdict.
package main

import (
	"cmp"
	"context"
	"errors"
	"flag"
	"fmt"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// Bounds of the waits.
const (
	startWait = 30 * time.Second // for the management socket
	stopWait  = 15 * time.Second // after SIGTERM
)

// settings come from the flags.
type settings struct {
	http, https int
	check       bool
	bin         string // the folder of the programs
}

// app is one of the apps that the demo deploys.
type app struct {
	name, dir, route string
	flags            []string // more of takoctl deploy
}

var apps = []app{
	{name: "hello", dir: "examples/hello-go", route: "hello.localhost"},
	{name: "counter", dir: "examples/counter-go", route: "counter.localhost", flags: []string{"--instances", "2"}},
}

func main() {
	// The server gets SIGTERM when the thread that started it ends: it shall be
	// the main one, which ends with the demo.
	runtime.LockOSThread()
	var s settings
	flag.IntVar(&s.http, "http", 8080, "HTTP port")
	flag.IntVar(&s.https, "https", 8443, "HTTPS port")
	flag.BoolVar(&s.check, "check", false, "ask the apps on free ports, and end with a verdict")
	flag.StringVar(&s.bin, "bin", "bin", "folder of tako's programs")
	flag.Parse()

	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP)
	defer stop()
	if err := run(ctx, s); err != nil {
		fmt.Fprintln(os.Stderr, "demo:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, s settings) (err error) {
	if s.check {
		if s.http, s.https, err = freePorts(); err != nil {
			return err
		}
	}
	if err := portsFree(s); err != nil {
		return err
	}
	// A short path, since a Unix socket's has at most 107 bytes; others may pass
	// through, since as root the proxy and the apps are other users.
	dir, err := os.MkdirTemp("/tmp", "tako-demo-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	if err := os.Chmod(dir, 0o711); err != nil {
		return err
	}

	say("starting tako-master on ports %d and %d, data in %s", s.http, s.https, dir)
	srv, err := start(ctx, s, dir)
	if err != nil {
		return err
	}
	stopped := false
	defer func() {
		if !stopped {
			err = errors.Join(err, srv.stop())
		}
	}()
	for _, a := range apps {
		began := time.Now()
		if err := a.stage(ctx, dir); err != nil {
			return err
		}
		if err := srv.deploy(ctx, a); err != nil {
			return err
		}
		say("deployed %s in %s", a.name, time.Since(began).Round(100*time.Millisecond))
	}
	if s.check {
		c := &checker{srv: srv}
		c.all(ctx)
		stopped = true
		c.clean(dir)
		return c.verdict()
	}
	invite(s, srv)
	select {
	case <-ctx.Done():
		fmt.Println()
		say("stopping")
		return nil
	case <-srv.done:
		return fmt.Errorf("tako-master ended by itself: %w\n%s", srv.exit, srv.tail())
	}
}

func say(format string, args ...any) { fmt.Printf("demo: "+format+"\n", args...) }

// invite prints what a person can do with the running demo.
func invite(s settings, srv *server) {
	ctl := filepath.Join(s.bin, "takoctl")
	if abs, err := filepath.Abs(ctl); err == nil {
		ctl = abs
	}
	fmt.Printf(`
Two apps are up. Ask them (-k, since the certificates are self-signed):

  curl -k https://hello.localhost:%[2]d/
  curl -k https://counter.localhost:%[2]d/        # again and again: two instances take turns
  curl -i http://hello.localhost:%[1]d/           # a redirect to HTTPS
  curl -kN https://hello.localhost:%[2]d/stream   # server-sent events

In another terminal:

  export TAKO_SOCKET=%[5]s
  %[3]s status hello
  %[3]s logs hello -f

Try next:

  a rollout     edit the greeting in %[4]s/main.go, then
                cd %[4]s && CGO_ENABLED=0 go build -o app . && %[3]s deploy . --app hello --route hello.localhost
  a crash       kill -9 an instance of counter, by a pid that '%[3]s status counter' shows, and ask again

Ctrl-C stops everything and removes %[6]s.
`, s.http, s.https, ctl, filepath.Join(srv.dir, "src", "hello"), srv.socket, srv.dir)
}

// portsFree says which port is taken before anything is started.
func portsFree(s settings) error {
	for _, port := range []int{s.http, s.https} {
		l, err := net.Listen("tcp", ":"+strconv.Itoa(port))
		if err != nil {
			return fmt.Errorf("port %d cannot be had: %w\nchoose others: make demo HTTP=8081 HTTPS=8444", port, err)
		}
		l.Close()
	}
	return nil
}

// freePorts finds two ports that nobody listens on now.
func freePorts() (int, int, error) {
	var ports [2]int
	for i := range ports {
		l, err := net.Listen("tcp", ":0")
		if err != nil {
			return 0, 0, err
		}
		defer l.Close() // after both are known: they must differ
		ports[i] = l.Addr().(*net.TCPAddr).Port
	}
	return ports[0], ports[1], nil
}

// stage copies the app's source below dir and builds it there: with the built
// program beside it, the app's install step has nothing to do.
func (a app) stage(ctx context.Context, dir string) error {
	to := filepath.Join(dir, "src", a.name)
	if err := os.CopyFS(to, os.DirFS(a.dir)); err != nil {
		return fmt.Errorf("copy %s: %w", a.dir, err)
	}
	return build(ctx, to)
}

func build(ctx context.Context, dir string) error {
	cmd := exec.CommandContext(ctx, cmp.Or(os.Getenv("GO"), "go"), "build", "-o", "app", ".")
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("build %s: %w\n%s", dir, err, out)
	}
	return nil
}

// server is the tako-master that the demo started.
type server struct {
	settings
	dir    string // everything of the demo is below it
	socket string
	cmd    *exec.Cmd
	done   chan struct{} // closed when it has ended
	exit   error         // valid after done
}

// start starts tako-master and returns when its management socket answers.
func start(ctx context.Context, s settings, dir string) (*server, error) {
	srv := &server{settings: s, dir: dir, socket: filepath.Join(dir, "run", "tako.sock"), done: make(chan struct{})}
	log, err := os.OpenFile(srv.log(), os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return nil, err
	}
	defer log.Close()
	srv.cmd = exec.Command(filepath.Join(s.bin, "tako-master"),
		"--socket", srv.socket, "--port", strconv.Itoa(s.http), "--tls-port", strconv.Itoa(s.https),
		"--listen-address", "127.0.0.1", "--data-dir", filepath.Join(dir, "data"), "--no-acme")
	srv.cmd.Stdout, srv.cmd.Stderr = log, log
	// A group of its own, so that Ctrl-C reaches the demo alone, which stops it in
	// order; and if the demo itself is killed the server stops too.
	srv.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGTERM}
	if err := srv.cmd.Start(); err != nil {
		return nil, fmt.Errorf("%w\nthe programs come from: make build", err)
	}
	go func() {
		srv.exit = srv.cmd.Wait()
		close(srv.done)
	}()
	if err := srv.ready(ctx); err != nil {
		return nil, errors.Join(fmt.Errorf("%w\n%s", err, srv.tail()), srv.stop())
	}
	return srv, nil
}

func (srv *server) log() string { return filepath.Join(srv.dir, "server.log") }

// tail is the end of the server's log.
func (srv *server) tail() string {
	text, err := os.ReadFile(srv.log())
	if err != nil {
		return err.Error()
	}
	lines := strings.Split(strings.TrimSpace(string(text)), "\n")
	return strings.Join(lines[max(0, len(lines)-20):], "\n")
}

// ready waits until the management socket answers.
func (srv *server) ready(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, startWait)
	defer cancel()
	var last error
	for {
		if last = srv.ask(ctx, map[string]any{"command": "server_info"}, nil); last == nil {
			return nil
		}
		select {
		case <-time.After(20 * time.Millisecond):
		case <-srv.done:
			return fmt.Errorf("tako-master did not start: %w", srv.exit)
		case <-ctx.Done():
			return fmt.Errorf("tako-master does not answer: %w", last)
		}
	}
}

// deploy deploys the staged app with takoctl, as a person would.
func (srv *server) deploy(ctx context.Context, a app) error {
	args := append([]string{"--socket", srv.socket, "deploy", filepath.Join(srv.dir, "src", a.name), "--app", a.name, "--route", a.route}, a.flags...)
	out, err := exec.CommandContext(ctx, filepath.Join(srv.bin, "takoctl"), args...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("takoctl %s: %w\n%s\nthe server's log ends:\n%s", strings.Join(args, " "), err, out, srv.tail())
	}
	return nil
}

// stop ends the server in order, and by force if that takes too long.
func (srv *server) stop() error {
	select {
	case <-srv.done:
		return nil
	default:
	}
	if err := srv.cmd.Process.Signal(syscall.SIGTERM); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return err
	}
	select {
	case <-srv.done:
		return srv.exit
	case <-time.After(stopWait):
		srv.cmd.Process.Kill()
		<-srv.done
		return fmt.Errorf("tako-master did not stop within %s and was killed\n%s", stopWait, srv.tail())
	}
}
