package main

import (
	"bufio"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"
)

// Bounds of the checks.
const (
	askTimeout  = 10 * time.Second // of one request or command
	replaceWait = 15 * time.Second // for a new instance after one was killed
)

// checker asks the running demo and counts.
type checker struct {
	srv            *server
	passed, failed int
}

// check records one outcome.
func (c *checker) check(what string, err error) {
	if err != nil {
		c.failed++
		fmt.Printf("FAIL  %s: %v\n", what, err)
		return
	}
	c.passed++
	fmt.Printf("ok    %s\n", what)
}

func (c *checker) verdict() error {
	fmt.Printf("demo-check: %d passed, %d failed\n", c.passed, c.failed)
	if c.failed > 0 {
		return errors.New("the server's log ended:\n" + c.srv.tail())
	}
	return nil
}

func (c *checker) all(ctx context.Context) {
	h1, h2 := c.client(false), c.client(true)
	c.check("HTTP is redirected to HTTPS, with path, query and port", c.redirect(ctx, h1))
	c.check("hello answers over HTTPS", get(ctx, h1, c.url("hello", "/"), "HTTP/1.1", "Hello from tako"))
	c.check("hello answers over HTTP/2", get(ctx, h2, c.url("hello", "/"), "HTTP/2.0", "Hello from tako"))
	c.check("counter answers", get(ctx, h1, c.url("counter", "/"), "HTTP/1.1", "visit "))
	c.check("a host without a route is 404", c.unknown(ctx, h1))
	c.check("a rollout shows the new release and loses no request", c.rollout(ctx, h1))
	c.check("a killed instance costs no more than what it held, and is replaced", c.kill(ctx, h1))
}

// client makes a client that finds every host on the loopback address and
// believes every certificate: the demo's are self-signed.
func (c *checker) client(h2 bool) *http.Client {
	transport := &http.Transport{
		DialContext: func(ctx context.Context, network, addr string) (net.Conn, error) {
			_, port, err := net.SplitHostPort(addr)
			if err != nil {
				return nil, err
			}
			return new(net.Dialer).DialContext(ctx, network, net.JoinHostPort("127.0.0.1", port))
		},
		TLSClientConfig: &tls.Config{InsecureSkipVerify: true},
		Protocols:       new(http.Protocols),
	}
	transport.Protocols.SetHTTP1(!h2)
	transport.Protocols.SetHTTP2(h2)
	return &http.Client{
		Transport:     transport,
		Timeout:       askTimeout,
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
}

func (c *checker) url(app, path string) string {
	return fmt.Sprintf("https://%s.localhost:%d%s", app, c.srv.https, path)
}

// fetch gets url and returns the answer with its body read.
func fetch(ctx context.Context, client *http.Client, url string) (*http.Response, string, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return nil, "", err
	}
	res, err := client.Do(req)
	if err != nil {
		return nil, "", err
	}
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	return res, string(body), err
}

// get wants 200, this protocol and this text in the body.
func get(ctx context.Context, client *http.Client, url, proto, text string) error {
	res, body, err := fetch(ctx, client, url)
	switch {
	case err != nil:
		return err
	case res.StatusCode != http.StatusOK || res.Proto != proto || !strings.Contains(body, text):
		return fmt.Errorf("got %s %s %q, want %s 200 with %q", res.Proto, res.Status, body, proto, text)
	}
	return nil
}

func (c *checker) redirect(ctx context.Context, client *http.Client) error {
	res, _, err := fetch(ctx, client, fmt.Sprintf("http://hello.localhost:%d/a?b=c", c.srv.http))
	if err != nil {
		return err
	}
	want := c.url("hello", "/a?b=c")
	if got := res.Header.Get("Location"); res.StatusCode != http.StatusTemporaryRedirect || got != want {
		return fmt.Errorf("got %s to %q, want 307 to %q", res.Status, got, want)
	}
	return nil
}

func (c *checker) unknown(ctx context.Context, client *http.Client) error {
	res, _, err := fetch(ctx, client, c.url("nobody", "/"))
	if err == nil && res.StatusCode != http.StatusNotFound {
		err = fmt.Errorf("got %s", res.Status)
	}
	return err
}

// rollout deploys hello with another greeting while requests go on.
func (c *checker) rollout(ctx context.Context, client *http.Client) error {
	const greeting = "Hello once more"
	src := filepath.Join(c.srv.dir, "src", "hello")
	text, err := os.ReadFile(filepath.Join(src, "main.go"))
	if err != nil {
		return err
	}
	text = []byte(strings.Replace(string(text), "Hello from tako", greeting, 1))
	if err := os.WriteFile(filepath.Join(src, "main.go"), text, 0o600); err != nil {
		return err
	}
	if err := build(ctx, src); err != nil {
		return err
	}

	during, end := context.WithCancel(ctx)
	var (
		asking sync.WaitGroup
		mu     sync.Mutex
		asked  int
		lost   []error // guarded by mu, as is asked
	)
	for range 4 {
		asking.Go(func() {
			for during.Err() == nil {
				err := get(ctx, client, c.url("hello", "/"), "HTTP/1.1", "Hello")
				mu.Lock()
				asked++
				if err != nil {
					lost = append(lost, err)
				}
				mu.Unlock()
			}
		})
	}
	err = c.srv.deploy(ctx, apps[0])
	end()
	asking.Wait()
	switch {
	case err != nil:
		return err
	case len(lost) > 0:
		return fmt.Errorf("%d of %d requests failed, the first: %w", len(lost), asked, lost[0])
	case asked == 0:
		return errors.New("no request was made during the rollout")
	}
	return get(ctx, client, c.url("hello", "/"), "HTTP/1.1", greeting)
}

// instance is what status says of an instance, as far as it matters here.
type instance struct {
	ID    uint32 `json:"id"`
	State string `json:"state"`
	PID   int    `json:"pid"`
}

func (c *checker) healthy(ctx context.Context, app string) ([]instance, error) {
	var status struct {
		Instances []instance `json:"instances"`
	}
	if err := c.srv.ask(ctx, map[string]any{"command": "status", "app": app}, &status); err != nil {
		return nil, err
	}
	var healthy []instance
	for _, i := range status.Instances {
		if i.State == "healthy" {
			healthy = append(healthy, i)
		}
	}
	return healthy, nil
}

// kill kills one of counter's two instances, asks on, and waits for a new one.
func (c *checker) kill(ctx context.Context, client *http.Client) error {
	before, err := c.healthy(ctx, "counter")
	if err != nil {
		return err
	}
	if len(before) != 2 {
		return fmt.Errorf("want 2 healthy instances to begin with, got %v", before)
	}
	victim := before[0].PID
	if victim <= 1 {
		return fmt.Errorf("status names the pid %d", victim)
	}
	process, err := os.FindProcess(victim)
	if err != nil {
		return err
	}
	if err := process.Signal(syscall.SIGKILL); err != nil {
		return fmt.Errorf("kill instance %d: %w", before[0].ID, err)
	}
	// Nothing was in flight: the other instance answers everything.
	for range 20 {
		if err := get(ctx, client, c.url("counter", "/"), "HTTP/1.1", "visit "); err != nil {
			return fmt.Errorf("after the kill: %w", err)
		}
	}
	ctx, cancel := context.WithTimeout(ctx, replaceWait)
	defer cancel()
	for {
		now, err := c.healthy(ctx, "counter")
		if err != nil {
			return err
		}
		if len(now) == 2 && now[0].PID != victim && now[1].PID != victim {
			return nil
		}
		select {
		case <-time.After(50 * time.Millisecond):
		case <-ctx.Done():
			return fmt.Errorf("no replacement within %s: %v", replaceWait, now)
		}
	}
}

// clean stops the server and looks for what it may have left running.
func (c *checker) clean(dir string) {
	began := time.Now()
	c.check("tako stops in order on SIGTERM", c.srv.stop())
	fmt.Printf("      in %s\n", time.Since(began).Round(time.Millisecond))
	c.check("no process of it is left", leftovers(dir))
}

// leftovers names processes that still run from below dir or name it.
func leftovers(dir string) error {
	commands, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		return err
	}
	var left []string
	for _, name := range commands {
		line, err := os.ReadFile(name)
		if err != nil {
			continue // it has ended, or is not ours to see
		}
		proc := filepath.Dir(name)
		cwd, _ := os.Readlink(filepath.Join(proc, "cwd"))
		exe, _ := os.Readlink(filepath.Join(proc, "exe"))
		if strings.Contains(string(line), dir) || strings.HasPrefix(cwd, dir) || strings.HasPrefix(exe, dir) {
			left = append(left, filepath.Base(proc)+" "+strings.ReplaceAll(string(line), "\x00", " "))
		}
	}
	if len(left) > 0 {
		return errors.New(strings.Join(left, "; "))
	}
	return nil
}

// ask sends one command over the management socket and decodes the reply's data
// into data, unless that is nil.
func (srv *server) ask(ctx context.Context, command map[string]any, data any) error {
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	conn, err := new(net.Dialer).DialContext(ctx, "unix", srv.socket)
	if err != nil {
		return err
	}
	defer conn.Close()
	deadline, _ := ctx.Deadline()
	if err := conn.SetDeadline(deadline); err != nil {
		return err
	}
	if err := json.NewEncoder(conn).Encode(command); err != nil {
		return err
	}
	line, err := bufio.NewReader(conn).ReadBytes('\n')
	if err != nil {
		return fmt.Errorf("%s: %w", command["command"], err)
	}
	var reply struct {
		Status  string          `json:"status"`
		Message string          `json:"message"`
		Data    json.RawMessage `json:"data"`
	}
	if err := json.Unmarshal(line, &reply); err != nil {
		return fmt.Errorf("%s: %w", command["command"], err)
	}
	if reply.Status != "ok" {
		return fmt.Errorf("%s: %s", command["command"], reply.Message)
	}
	if data == nil {
		return nil
	}
	return json.Unmarshal(reply.Data, data)
}
