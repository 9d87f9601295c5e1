package management

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"

	"tako/internal/tako"
)

var update = flag.Bool("update", false, "rewrite the golden files")

const deployLine = `{"command":"deploy","app":"blog","version":"v1","path":"/p","routes":["blog.test"],"instances":2,"idle_timeout":300}`

func TestRepliesHaveTheirShapes(t *testing.T) {
	last, retry, at, pid := "Instance marked dead", int64(1500), int64(1700000000), 4711
	f := &fake{
		info: ServerInfo{
			PID: 1, Version: "0.0.1-test", Mode: tako.ModeUpgrading, Upgrade: &UpgradeLock{Owner: "me", AcquiredAt: at, AgeSecs: 5},
			Socket: "/run/tako/tako.sock", Limits: map[string]uint64{"apps": 3},
		},
		status: AppStatus{
			Name: "blog", Version: "v1", State: tako.AppCrashLoop, LastError: &last, Wanted: 2, RetryInMS: &retry, DeployedAt: &at,
			Instances: []Instance{{ID: 1, State: tako.InstanceHealthy, Port: 20000, PID: &pid, Transport: "unix"}},
			Builds:    []Build{{Version: "v1", State: tako.AppRunning}},
		},
	}
	s := serve(t, f, nil)
	c := s.dial(t)
	var out strings.Builder
	show := func(title, reply string) { fmt.Fprintf(&out, "# %s\n%s\n\n", title, reply) }
	ask := func(request string) { show(request, c.ask(t, request)) }

	ask(`{"command":"hello","protocol_version":1}`)
	ask(`{"command":"hello","protocol_version":3}`)
	ask(`{"command":"server_info"}`)
	for _, d := range []DeployResult{
		{NewApp: true},
		{NewApp: true, OnDemand: true},
		{Rolled: true, NewInstances: 2, OldInstances: 1},
		{Rolled: true, NewInstances: 1, OldInstances: 1, OnDemand: true},
	} {
		d.App, d.Version = "blog", "v1"
		f.deployed = d
		ask(deployLine)
	}
	ask(`{"command":"rollback","app":"blog","version":"v0"}`)
	ask(`{"command":"restart","app":"blog"}`)
	ask(`{"command":"stop","app":"blog"}`)
	ask(`{"command":"delete","app":"blog"}`)
	ask(`{"command":"scale","app":"blog","instances":0}`)
	ask(`{"command":"update_secrets","app":"blog","secrets":{"A":"b"},"merge":true}`)
	ask(`{"command":"status","app":"blog"}`)
	ask(`{"command":"list"}`)
	ask(`{"command":"list_releases","app":"blog"}`)
	ask(`{"command":"routes"}`)
	ask(`{"command":"enter_upgrading","owner":"me"}`)
	ask(`{"command":"exit_upgrading","owner":"me"}`)
	logs := `{"command":"logs","app":"blog","lines":5}`
	show(logs, c.ask(t, logs)+"\n"+c.line(t))
	f.deploy = func(_ context.Context, _ DeployRequest, p Progress) (DeployResult, error) {
		p("starting instance 1 of 2")
		return DeployResult{}, &RollbackError{App: "blog", Cause: "Health check failed: Instance startup timeout", LastLines: []string{"boom"}}
	}
	ask(deployLine)
	progress := strings.TrimSuffix(deployLine, "}") + `,"progress":true}`
	show(progress, c.ask(t, progress)+"\n"+c.line(t))
	c.send(t, `{"command":"upload","app":"blog","version":"v1"}`+"\n\x00\x00\x00\x03abc\x00\x00\x00\x00")
	show("upload of 3 bytes", c.line(t))

	golden := filepath.Join("testdata", "replies.golden")
	if *update {
		if err := os.MkdirAll("testdata", 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(golden, []byte(out.String()), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(golden)
	if err != nil {
		t.Fatal(err)
	}
	if out.String() != string(want) {
		t.Errorf("replies differ from %s (-update rewrites it)\n got %s\nwant %s", golden, out.String(), want)
	}
}

func TestRollbackErrorWithoutLinesIsTheOldText(t *testing.T) {
	e := &RollbackError{App: "a", Cause: "Health check failed: x"}
	if want := `{"app":"a","error":"Health check failed: x","rolled_back":true,"status":"rollback"}`; e.Error() != want {
		t.Errorf("got %s, want %s", e.Error(), want)
	}
}

func TestChecksComeInTheirOrder(t *testing.T) {
	f := &fake{err: tako.Errorf(tako.CodeNotFound, "body")}
	f.upgrading.Store(true)
	s := serve(t, f, nil)
	blocked := func(label string) string {
		return "Server is upgrading; '" + label + "' is temporarily blocked. Please retry shortly."
	}
	for _, c := range []struct{ in, want, code string }{
		{`{"command":"rollback","app":"A","version":"/"}`, "Invalid app name: must start with a lowercase letter", "invalid"},
		{`{"command":"rollback","app":"a","version":"/"}`, "Invalid release version: path separators are not allowed", "invalid"},
		{`{"command":"rollback","app":"a","version":"1"}`, blocked("rollback"), "busy"},
		{deployLine, blocked("deploy"), "busy"},
		{`{"command":"stop","app":"a"}`, blocked("stop"), "busy"},
		{`{"command":"delete","app":"a"}`, blocked("delete"), "busy"},
		{`{"command":"update_secrets","app":"a","secrets":{}}`, blocked("update-secrets"), "busy"},
		{`{"command":"restart","app":"a"}`, blocked("restart"), "busy"},
		{`{"command":"scale","app":"a","instances":1}`, blocked("scale"), "busy"},
		{`{"command":"status","app":"a"}`, "body", "not_found"},
		{`{"command":"list"}`, "body", "not_found"},
		{`{"command":"list_releases","app":"a"}`, "body", "not_found"},
		{`{"command":"routes"}`, "body", "not_found"},
		{`{"command":"server_info"}`, "body", "not_found"},
		{`{"command":"logs","app":"a","lines":10001}`, "Invalid lines: 10001; at most 10000 are given", "invalid"},
		{`{"command":"exit_upgrading","owner":""}`, "body", "not_found"},
		{`{"command":"enter_upgrading","owner":"` + strings.Repeat("o", MaxOwner) + `"}`, "body", "not_found"},
		{`{"command":"enter_upgrading","owner":"` + strings.Repeat("o", MaxOwner+1) + `"}`, "Invalid owner: must be 256 bytes or fewer", "invalid"},
		{`{"command":"hello","protocol_version":1,"x":1}`, "", ""},
		{`{"command":"upload","app":"a","version":"1"}`, blocked("upload"), "busy"}, // the last: it ends the connection
	} {
		conn := s.dial(t)
		wantError(t, c.in, conn.ask(t, c.in), c.want, c.code)
	}
}

// TestWhoFollowsRefusesEveryChangeAndNamesTheOwner: of every command in the table,
// those that change something, and no other.
func TestWhoFollowsRefusesEveryChangeAndNamesTheOwner(t *testing.T) {
	f := &fake{err: tako.Errorf(tako.CodeNotFound, "body")}
	f.upgrading.Store(true) // it comes first: the owner's mode is the owner's to tell
	f.owner.Store(812)
	f.logs = func(context.Context, LogsRequest, func(LogLine) error) error { return f.err }
	s := serve(t, f, nil)
	refused := map[string]string{
		"deploy": "deploy", "stop": "stop", "delete": "delete", "rollback": "rollback", "update_secrets": "update-secrets", "restart": "restart",
		"scale": "scale", "upload": "upload", "enter_upgrading": "enter_upgrading", "exit_upgrading": "exit_upgrading",
	}
	for _, c := range commands {
		if c.name == "hello" {
			continue
		}
		line := map[string]any{"command": c.name}
		for name, v := range map[string]any{
			"app": "a", "version": "1", "path": "/p", "routes": []string{"a.b"}, "secrets": map[string]string{}, "instances": 1, "idle_timeout": 1, "owner": "o",
		} {
			if c.has(name) {
				line[name] = v
			}
		}
		b, err := json.Marshal(line)
		if err != nil {
			t.Fatal(err)
		}
		want, code := "body", "not_found"
		if label, ok := refused[c.name]; ok {
			want = "The server with pid 812 owns the data root; '" + label + "' is refused by this one, which follows it. Please send it to tako-812.sock, or retry when that server has gone."
			code = "conflict"
			delete(refused, c.name)
		}
		wantError(t, string(b), s.dial(t).ask(t, string(b)), want, code)
	}
	if len(refused) > 0 {
		t.Errorf("not in the table: %v", refused)
	}
}

func wantError(t testing.TB, in, got, want, code string) {
	t.Helper()
	var l textLine
	if err := json.Unmarshal([]byte(got), &l); err != nil {
		t.Fatalf("%s: %v", got, err)
	}
	if want == "" && l.Status == "ok" {
		return
	}
	if l.Status != "error" || l.Message != want || string(l.Code) != code {
		t.Errorf("%.200s\n got %s\nwant %s (%s)", in, got, want, code)
	}
}

func TestABadLineIsAnsweredAndTheConnectionLives(t *testing.T) {
	c := serve(t, &fake{}, nil).dial(t)
	for _, bad := range []struct{ in, want string }{
		{``, "Invalid command: EOF while parsing a value"},
		{"\xff\xfe", "Invalid command: json line is not valid UTF-8"},
		{`{"command":"stop"}`, "Invalid command: missing field `app`"},
		{strings.Repeat("x", MaxLine), fmt.Sprintf("Invalid command: json line exceeds max length (%d > %d)", MaxLine+1, MaxLine)},
	} {
		wantError(t, bad.in, c.ask(t, bad.in), bad.want, "invalid")
	}
	fits := `{"command":"list"}`
	if got := c.ask(t, fits+strings.Repeat(" ", MaxLine-1-len(fits))); !strings.HasPrefix(got, `{"status":"ok"`) {
		t.Errorf("a line of exactly MaxLine: %s", got)
	}
	c.send(t, fits) // without a newline
	if err := c.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if got := c.line(t); !strings.HasPrefix(got, `{"status":"ok"`) {
		t.Errorf("the last line: %s", got)
	}
	c.ended(t)
}

func TestManyRequestsInOneWriteAreAnsweredInOrder(t *testing.T) {
	f := &fake{calls: make(chan string, 3)}
	c := serve(t, f, nil).dial(t)
	c.send(t, `{"command":"list"}`+"\n"+`{"command":"routes"}`+"\n"+`{"command":"stop","app":"a"}`+"\n")
	for _, want := range []string{`"apps"`, `"routes"`, `"stopped"`} {
		if got := c.line(t); !strings.Contains(got, want) {
			t.Errorf("got %s, want %s", got, want)
		}
	}
}

func TestALineThatNeverEndsIsCutOff(t *testing.T) {
	s := serve(t, &fake{}, func(c *Config) { c.Limits.LineTimeout = 50 * time.Millisecond })
	c := s.dial(t)
	c.send(t, `{"comm`)
	wantError(t, "half a line", c.line(t), "Invalid command: no newline within 50ms of the line's first byte", "invalid")
	c.ended(t)
}

func TestAnIdleConnectionIsClosed(t *testing.T) {
	s := serve(t, &fake{}, func(c *Config) { c.Limits.IdleTimeout = 50 * time.Millisecond })
	s.dial(t).ended(t)
}

func TestALongLineDoesNotFillMemory(t *testing.T) {
	c := serve(t, &fake{}, nil).dial(t)
	chunk := strings.Repeat("y", 1<<20)
	for range 16 {
		c.send(t, chunk)
	}
	wantError(t, "16 MiB", c.ask(t, ""), fmt.Sprintf("Invalid command: json line exceeds max length (%d > %d)", 16<<20+1, MaxLine), "invalid")
	if got := c.ask(t, `{"command":"list"}`); !strings.Contains(got, "ok") {
		t.Error(got)
	}
}

func TestTheConnectionAfterTheLastIsRefused(t *testing.T) {
	s := serve(t, &fake{}, nil)
	var all []*rawConn
	for range MaxConnections {
		c := s.dial(t)
		c.ask(t, `{"command":"list"}`)
		all = append(all, c)
	}
	c := s.dial(t)
	wantError(t, "one more", c.line(t), "Too many management connections (limit 128). Please retry shortly.", "busy")
	c.ended(t)
	_ = all[0].Close()
	for { // the place is free once the server has seen it
		got := ""
		c := s.dial(t)
		if _, err := io.WriteString(c, `{"command":"list"}`+"\n"); err == nil {
			got, _ = c.in.ReadString('\n')
		}
		if strings.HasPrefix(got, `{"status":"ok"`) {
			break
		}
	}
}

func TestConnectionsAreServedSideBySide(t *testing.T) {
	release := make(chan struct{})
	f := &fake{deploy: func(context.Context, DeployRequest, Progress) (DeployResult, error) {
		<-release
		return DeployResult{App: "blog", Version: "v1"}, nil
	}}
	s := serve(t, f, nil)
	slow := s.dial(t)
	slow.send(t, deployLine+"\n")
	var wg sync.WaitGroup
	for range 20 {
		c := s.dial(t)
		wg.Go(func() {
			for range 20 {
				if _, err := io.WriteString(c, `{"command":"list"}`+"\n"); err != nil {
					t.Error(err)
				}
				if l, err := c.in.ReadString('\n'); err != nil || !strings.Contains(l, "blog") {
					t.Errorf("%q, %v", l, err)
				}
			}
		})
	}
	wg.Wait()
	close(release)
	if got := slow.line(t); !strings.Contains(got, "deployed") {
		t.Error(got)
	}
}

func TestInternalErrorsStayInTheLog(t *testing.T) {
	var log syncBuffer
	f := &fake{err: fmt.Errorf("open /secret/place: %w", os.ErrPermission)}
	s := serve(t, f, func(c *Config) {
		c.Log = hclog.New(&hclog.LoggerOptions{Output: &log, Level: hclog.Debug})
	})
	got := s.dial(t).ask(t, `{"command":"list"}`)
	wantError(t, "list", got, "Internal error; the server's log has the details.", "internal")
	if !strings.Contains(log.String(), "/secret/place") {
		t.Errorf("log: %s", log.String())
	}
}

type syncBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *syncBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *syncBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

func TestAbsentSecretsAreNil(t *testing.T) {
	f := &fake{}
	c := serve(t, f, nil).dial(t)
	c.ask(t, deployLine)
	f.mu.Lock()
	absent := f.got.Secrets
	f.mu.Unlock()
	c.ask(t, strings.TrimSuffix(deployLine, "}")+`,"secrets":{}}`)
	f.mu.Lock()
	empty := f.got.Secrets
	f.mu.Unlock()
	if absent != nil || empty == nil {
		t.Errorf("absent %v, empty %v", absent, empty)
	}
}

func TestASlowReaderOfProgressDoesNotHoldUpTheCommand(t *testing.T) {
	finished := make(chan struct{})
	f := &fake{deploy: func(_ context.Context, _ DeployRequest, p Progress) (DeployResult, error) {
		for range 5000 {
			p(strings.Repeat("z", 3*MaxProgressText))
		}
		close(finished)
		return DeployResult{App: "blog", Version: "v1"}, nil
	}}
	c := serve(t, f, nil).dial(t)
	c.send(t, strings.TrimSuffix(deployLine, "}")+`,"progress":true}`+"\n")
	select {
	case <-finished: // and nothing was read so far
	case <-time.After(10 * time.Second):
		t.Fatal("the command hangs")
	}
	lines := 0
	for {
		l := c.line(t)
		if strings.Contains(l, `"ok"`) {
			break
		}
		if len(l) > MaxProgressText+100 {
			t.Fatalf("a progress line of %d bytes", len(l))
		}
		lines++
	}
	if lines == 0 || lines >= 5000 {
		t.Errorf("%d progress lines", lines)
	}
}

func TestADeployGoesOnWithoutItsClient(t *testing.T) {
	started, done := make(chan struct{}), make(chan error, 1)
	release := make(chan struct{})
	f := &fake{deploy: func(ctx context.Context, _ DeployRequest, _ Progress) (DeployResult, error) {
		close(started)
		<-release
		done <- ctx.Err()
		return DeployResult{}, nil
	}}
	c := serve(t, f, nil).dial(t)
	c.send(t, deployLine+"\n")
	<-started
	_ = c.Close()
	close(release)
	if err := <-done; err != nil {
		t.Errorf("its context ended: %v", err)
	}
}

func TestFollowedLogsEndWithTheirClient(t *testing.T) {
	ended := make(chan struct{}, 3)
	f := &fake{logs: func(ctx context.Context, r LogsRequest, send func(LogLine) error) error {
		if err := send(LogLine{Text: "one"}); err != nil {
			return err
		}
		<-ctx.Done()
		ended <- struct{}{}
		return ctx.Err()
	}}
	s := serve(t, f, nil)
	follow := `{"command":"logs","app":"a","follow":true}`
	c := s.dial(t)
	c.ask(t, follow)
	_ = c.Close()
	<-ended

	c = s.dial(t) // another request ends the stream, and is answered
	c.ask(t, follow)
	if got := c.ask(t, `{"command":"list"}`); got != `{"status":"ok","data":{}}` {
		t.Errorf("end of the stream: %s", got)
	}
	if got := c.line(t); !strings.Contains(got, "apps") {
		t.Errorf("the request after: %s", got)
	}
	<-ended

	c.ask(t, follow)
	s.stop(t) // and so does the end of the server
	if got := c.line(t); !strings.Contains(got, `"ok"`) {
		t.Error(got)
	}
	<-ended
}

func TestAClientThatDoesNotReadIsGivenUp(t *testing.T) {
	gaveUp := make(chan error, 1)
	f := &fake{logs: func(_ context.Context, _ LogsRequest, send func(LogLine) error) error {
		for {
			if err := send(LogLine{Text: strings.Repeat("w", 4096)}); err != nil {
				gaveUp <- err
				return err
			}
		}
	}}
	s := serve(t, f, func(c *Config) { c.Limits.WriteTimeout = 50 * time.Millisecond })
	s.dial(t).send(t, `{"command":"logs","app":"a","follow":true}`+"\n")
	if err := <-gaveUp; !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Error(err)
	}
}

func TestLimitsThatAreNotSetAreTheConstants(t *testing.T) {
	want := Limits{
		MaxConnections: 128, IdleTimeout: 5 * time.Minute, LineTimeout: 30 * time.Second, WriteTimeout: 30 * time.Second,
		DrainTimeout: 2 * time.Minute, UploadIdleTimeout: time.Minute, MaxUploadBytes: 4 << 30,
	}
	if got := (Limits{}).orDefaults(); got != want {
		t.Errorf("got %+v, want %+v", got, want)
	}
}

func TestTheEndClosesIdleConnectionsAndAnswersTheRest(t *testing.T) {
	started, release := make(chan struct{}), make(chan struct{})
	f := &fake{deploy: func(ctx context.Context, _ DeployRequest, _ Progress) (DeployResult, error) {
		close(started)
		<-release
		return DeployResult{App: "blog", Version: "v1"}, ctx.Err()
	}}
	s := serve(t, f, nil)
	idle, busy := s.dial(t), s.dial(t)
	idle.ask(t, `{"command":"list"}`)
	busy.send(t, deployLine+"\n"+`{"command":"list"}`+"\n")
	<-started
	s.cancel()
	idle.ended(t) // while the deploy runs
	select {
	case <-s.done:
		t.Fatal("Serve returned with a command running")
	default:
	}
	close(release)
	if got := busy.line(t); !strings.Contains(got, "deployed") {
		t.Error(got)
	}
	if got := busy.line(t); !strings.Contains(got, "apps") {
		t.Errorf("a request that had arrived: %s", got)
	}
	busy.ended(t)
}

func TestACommandThatOutlastsTheDrainIsEnded(t *testing.T) {
	started := make(chan struct{})
	f := &fake{deploy: func(ctx context.Context, _ DeployRequest, _ Progress) (DeployResult, error) {
		close(started)
		<-ctx.Done()
		return DeployResult{}, ctx.Err()
	}}
	s := serve(t, f, func(c *Config) { c.Limits.DrainTimeout = 50 * time.Millisecond })
	c := s.dial(t)
	c.send(t, deployLine+"\n")
	<-started
	s.cancel()
	wantError(t, "deploy", c.line(t), "The server is stopping; 'deploy' was not finished. Please retry shortly.", "busy")
	s.stop(t)
}

func TestConnectionsWaitForTheNextServe(t *testing.T) {
	dir := shortDir(t)
	path, link := filepath.Join(dir, "tako-1.sock"), filepath.Join(dir, "tako.sock")
	ln, err := Listen(path, link, 0o600, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	cfg := Config{Listener: ln, Backend: &fake{}, OwnUID: uint32(os.Getuid())}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if err := Serve(ctx, cfg); err != nil {
		t.Fatal(err)
	}
	s := &served{path: link}
	c := s.dial(t)
	c.send(t, `{"command":"list"}`+"\n")
	ctx, cancel = context.WithCancel(context.Background())
	done := make(chan error)
	go func() { done <- Serve(ctx, cfg) }()
	if got := c.line(t); !strings.Contains(got, "apps") {
		t.Error(got)
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

func TestAListenerThatBreaksIsAnError(t *testing.T) {
	dir := shortDir(t)
	ln, err := Listen(filepath.Join(dir, "tako-1.sock"), filepath.Join(dir, "tako.sock"), 0o600, 0)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error)
	go func() { done <- Serve(context.Background(), Config{Listener: ln, Backend: &fake{}}) }()
	if c, err := net.Dial("unix", filepath.Join(dir, "tako-1.sock")); err == nil { // it serves
		_, _ = c.Write([]byte("{\n"))
		_, _ = c.Read(make([]byte, 1))
		_ = c.Close()
	}
	_ = ln.Close()
	if err := <-done; !errors.Is(err, net.ErrClosed) {
		t.Errorf("got %v", err)
	}
}

func TestUploads(t *testing.T) {
	const line = `{"command":"upload","app":"blog","version":"v1"}` + "\n"
	s := serve(t, &fake{}, func(c *Config) { c.Limits.MaxUploadBytes = 10 })
	hasty := serve(t, &fake{}, func(c *Config) { c.Limits.UploadIdleTimeout = 100 * time.Millisecond })
	for _, c := range []struct{ name, body, want, code string }{
		{"chunks", "\x00\x00\x00\x03abc\x00\x00\x00\x01d\x00\x00\x00\x00", "", ""},
		{"nothing", "\x00\x00\x00\x00", "", ""},
		{"as long as allowed", "\x00\x00\x00\x0a0123456789\x00\x00\x00\x00", "", ""},
		{"too long", "\x00\x00\x00\x09012345678\x00\x00\x00\x02xx\x00\x00\x00\x00", "Upload too large: more than 10 bytes", "invalid"},
		{"chunk too long", "\x00\x10\x00\x01", "Upload broken: a chunk of 1048577 bytes, the limit is 1048576", "invalid"},
		{"stalled", "\x00\x00\x00\x03a", "Upload stopped: nothing came for 100ms", "failed"},
		{"bad app", "\x00\x00\x00\x00", "Invalid app name: must start with a lowercase letter", "invalid"},
		{"no version", "\x00\x00\x00\x00", "Invalid command: missing field `version`", "invalid"},
	} {
		conn, in := s.dial(t), line
		switch c.name {
		case "stalled":
			conn = hasty.dial(t)
		case "bad app":
			in = strings.Replace(line, "blog", "Blog", 1)
		case "no version":
			in = `{"command":"upload","app":"blog"}` + "\n"
		}
		conn.send(t, in+c.body)
		wantError(t, c.name, conn.line(t), c.want, c.code)
		if c.want != "" {
			conn.ended(t)
		} else if got := conn.ask(t, `{"command":"list"}`); !strings.Contains(got, "apps") {
			t.Errorf("%s: the connection after it: %s", c.name, got)
		}
	}
	c := s.dial(t)
	c.send(t, line+"\x00\x00\x00\x03ab")
	if err := c.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	wantError(t, "truncated", c.line(t), "Upload incomplete: the connection ended before the end of the upload", "invalid")
}

func TestAnUploadThatTheBackendGivesUpEndsTheConnection(t *testing.T) {
	f := &fake{upload: func(_ context.Context, r io.Reader) (UploadResult, error) {
		_, _ = r.Read(make([]byte, 1))
		return UploadResult{}, tako.Errorf(tako.CodeInvalid, "Invalid archive: not zstd")
	}}
	s := serve(t, f, nil)
	c, err := Dial(t.Context(), s.path)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	_, err = c.Upload(t.Context(), "blog", "v1", io.LimitReader(zeros{}, 64<<20))
	if e, ok := errors.AsType[*tako.Error](err); !ok || e.Message != "Invalid archive: not zstd" {
		t.Errorf("got %v", err)
	}
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { clear(p); return len(p), nil }

// as runs this test's program as somebody else and returns the first line that
// the server had for it.
func as(t *testing.T, sock string, uid uint32, groups []uint32, line string) string {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("only root can be somebody else")
	}
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = []string{"TAKO_TEST_DIAL=" + sock, "TAKO_TEST_LINE=" + line, "GORACE=atexit_sleep_ms=0"}
	cmd.Dir = "/"
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: uid, Groups: groups}}
	out, err := cmd.Output()
	if err != nil {
		t.Skipf("cannot run as uid %d: %v %s", uid, err, out)
	}
	return strings.TrimSuffix(string(out), "\n")
}

func TestOnlyRootTheOwnUserAndTheGroupMayCommand(t *testing.T) {
	const own, gid = 64001, 64002
	f := &fake{}
	start := func(group uint32) string {
		s := serve(t, f, func(c *Config) { c.OwnUID, c.SocketGID = own, group })
		dir := filepath.Dir(s.path)
		for _, err := range []error{os.Chmod(dir, 0o755), os.Chmod(s.path, 0o666)} { // let them come as far as the check
			if err != nil {
				t.Fatal(err)
			}
		}
		return s.path
	}
	sock := start(gid)
	list := `{"command":"list"}`
	for _, c := range []struct {
		name   string
		uid    uint32
		groups []uint32
		ok     bool
	}{
		{"the own user", own, nil, true},
		{"a member", 64003, []uint32{64009, gid}, true},
		{"a member by primary group", gid, nil, true},
		{"a member of many groups", 64003, append(manyGroups(200), gid), true},
		{"a stranger", 64003, []uint32{64009}, false},
	} {
		got := as(t, sock, c.uid, c.groups, list)
		if strings.HasPrefix(got, `{"status":"ok"`) != c.ok {
			t.Errorf("%s: %s", c.name, got)
		}
	}
	wantError(t, "a stranger", as(t, sock, 64003, nil, list),
		"Permission denied: uid 64003 may not use the management socket; only root, uid 64001 and members of group 64002 may. Please try again with sudo.", "forbidden")
	wantError(t, "no group", as(t, start(0), 64003, nil, list),
		"Permission denied: uid 64003 may not use the management socket; only root and uid 64001 may. Please try again with sudo.", "forbidden")
	wantError(t, "a group with a name", as(t, start(1), 64003, nil, list),
		"Permission denied: uid 64003 may not use the management socket; only root, uid 64001 and members of group daemon may. To become one: `sudo usermod -aG daemon NAME`, then log in again.", "forbidden")

	for _, command := range []string{"enter", "exit"} {
		force := `{"command":"` + command + `_upgrading","owner":"x","force":true}`
		wantError(t, force, as(t, sock, 64003, []uint32{gid}, force),
			"'force' is only for root and the server's own user; you are uid 64003. Please try again with sudo.", "forbidden")
		if got := as(t, sock, own, nil, force); !strings.HasPrefix(got, `{"status":"ok"`) {
			t.Errorf("the own user: %s", got)
		}
		plain := strings.Replace(force, "true", "false", 1)
		if got := as(t, sock, 64003, []uint32{gid}, plain); !strings.HasPrefix(got, `{"status":"ok"`) {
			t.Errorf("a member without force: %s", got)
		}
	}
}

func manyGroups(n uint32) []uint32 {
	all := make([]uint32, n)
	for i := range all {
		all[i] = 65000 + uint32(i)
	}
	return all
}
