package management

import (
	"bufio"
	"context"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"

	"tako/internal/tako"
)

func TestMain(m *testing.M) {
	if sock := os.Getenv("TAKO_TEST_DIAL"); sock != "" {
		os.Exit(dialAsChild(sock))
	}
	goleak.VerifyTestMain(m)
}

// dialAsChild prints the first line that the server has for whoever runs it.
func dialAsChild(sock string) int {
	c, err := net.Dial("unix", sock)
	if err != nil {
		_, _ = os.Stdout.WriteString(err.Error() + "\n")
		return 1
	}
	_, _ = c.Write([]byte(os.Getenv("TAKO_TEST_LINE") + "\n")) // it may be closed already
	line, _ := bufio.NewReader(c).ReadString('\n')
	_, _ = os.Stdout.WriteString(line)
	return 0
}

// fake is a Backend whose answers a test sets; what it does not set works.
type fake struct {
	upgrading atomic.Bool
	owner     atomic.Int64
	err       error // of every command
	deployed  DeployResult
	calls     chan string
	deploy    func(context.Context, DeployRequest, Progress) (DeployResult, error)
	upload    func(context.Context, io.Reader) (UploadResult, error)
	logs      func(context.Context, LogsRequest, func(LogLine) error) error
	status    AppStatus
	info      ServerInfo

	mu  sync.Mutex
	got DeployRequest // guarded by mu
}

func (f *fake) call(name string) error {
	if f.calls != nil {
		f.calls <- name
	}
	return f.err
}
func (f *fake) Upgrading() bool { return f.upgrading.Load() }
func (f *fake) Owner() int      { return int(f.owner.Load()) }
func (f *fake) Reload(context.Context) (ReloadInfo, error) {
	return ReloadInfo{Count: 3}, f.call("reload")
}

func (f *fake) ServerInfo(context.Context) (ServerInfo, error) {
	return f.info, f.call("server_info")
}
func (f *fake) EnterUpgrading(_ context.Context, _ string, _ bool) error { return f.call("enter") }
func (f *fake) ExitUpgrading(_ context.Context, _ string, _ bool) error  { return f.call("exit") }
func (f *fake) Deploy(ctx context.Context, r DeployRequest, p Progress) (DeployResult, error) {
	f.mu.Lock()
	f.got = r
	f.mu.Unlock()
	if f.deploy != nil {
		return f.deploy(ctx, r, p)
	}
	return f.deployed, f.call("deploy")
}

func (f *fake) Rollback(context.Context, tako.AppID, tako.ReleaseID, Progress) (DeployResult, error) {
	return f.deployed, f.call("rollback")
}
func (f *fake) Stop(context.Context, tako.AppID) error { return f.call("stop") }
func (f *fake) Delete(context.Context, tako.AppID) (bool, error) {
	return true, f.call("delete")
}

func (f *fake) Restart(context.Context, tako.AppID, Progress) (DeployResult, error) {
	return f.deployed, f.call("restart")
}
func (f *fake) Scale(context.Context, tako.AppID, uint8, Progress) error { return f.call("scale") }
func (f *fake) UpdateSecrets(context.Context, tako.AppID, map[string]string, bool, Progress) (bool, error) {
	return true, f.call("update_secrets")
}

func (f *fake) Status(context.Context, tako.AppID) (AppStatus, error) {
	return f.status, f.call("status")
}

func (f *fake) List(context.Context) ([]AppSummary, error) {
	return []AppSummary{{Name: "blog", Version: "v1", State: tako.AppRunning, Instances: 2}}, f.call("list")
}

func (f *fake) ListReleases(context.Context, tako.AppID) ([]Release, error) {
	at, msg, dirty := int64(1700000000), "fix <it>", false
	return []Release{{Version: "v2", Current: true, DeployedAt: &at, CommitMessage: &msg, GitDirty: &dirty}, {Version: "v1"}}, f.call("list_releases")
}

func (f *fake) Routes(context.Context) ([]AppRoutes, error) {
	return []AppRoutes{{App: "blog", Routes: []string{"blog.test", "*.blog.test/api"}}, {App: "none"}}, f.call("routes")
}

func (f *fake) Upload(ctx context.Context, _ tako.AppID, _ tako.ReleaseID, r io.Reader) (UploadResult, error) {
	if f.upload != nil {
		return f.upload(ctx, r)
	}
	n, err := io.Copy(io.Discard, r)
	return UploadResult{Path: "/data/apps/blog/releases/v1", Files: 1, Bytes: n}, errors.Join(err, f.call("upload"))
}

func (f *fake) Logs(ctx context.Context, r LogsRequest, send func(LogLine) error) error {
	if f.logs != nil {
		return f.logs(ctx, r, send)
	}
	return errors.Join(send(LogLine{Time: "2026-01-02T03:04:05.000000006Z", Instance: 1, Stream: "stdout", Text: "hello <world>"}), f.call("logs"))
}

// served is a server under test.
type served struct {
	path   string
	cancel context.CancelFunc
	done   chan error
}

// serve starts a server on a socket of its own, which the end of the test ends.
func serve(t testing.TB, f *fake, change func(*Config)) *served {
	t.Helper()
	dir := shortDir(t)
	path, link := filepath.Join(dir, "tako-1.sock"), filepath.Join(dir, "tako.sock")
	ln, err := Listen(path, link, 0o660, 0)
	if err != nil {
		t.Fatal(err)
	}
	cfg := Config{Listener: ln, Backend: f, OwnUID: uint32(os.Getuid()), Version: "0.0.1-test"}
	if change != nil {
		change(&cfg)
	}
	ctx, cancel := context.WithCancel(context.Background())
	s := &served{path: link, cancel: cancel, done: make(chan error, 1)}
	go func() { s.done <- Serve(ctx, cfg) }()
	t.Cleanup(func() {
		s.stop(t)
		_ = ln.Close()
	})
	return s
}

func (s *served) stop(t testing.TB) {
	t.Helper()
	s.cancel()
	select {
	case err := <-s.done:
		if err != nil {
			t.Errorf("Serve: %v", err)
		}
		s.done <- nil
	case <-time.After(20 * time.Second):
		t.Fatal("Serve did not return")
	}
}

// shortDir is a temporary directory whose path fits a socket's address.
func shortDir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "tm") //nolint:usetesting // its path is too long
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	return dir
}

// rawConn is a client that says exactly what the test wants.
type rawConn struct {
	*net.UnixConn
	in *bufio.Reader
}

func (s *served) dial(t testing.TB) *rawConn {
	t.Helper()
	c, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: s.path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	_ = c.SetDeadline(time.Now().Add(20 * time.Second))
	return &rawConn{c, bufio.NewReader(c)}
}

func (c *rawConn) send(t testing.TB, text string) {
	t.Helper()
	if _, err := io.WriteString(c, text); err != nil {
		t.Fatalf("send: %v", err)
	}
}

func (c *rawConn) line(t testing.TB) string {
	t.Helper()
	l, err := c.in.ReadString('\n')
	if err != nil {
		t.Fatalf("read a reply: %v (got %q)", err, l)
	}
	return strings.TrimSuffix(l, "\n")
}

func (c *rawConn) ended(t testing.TB) {
	t.Helper()
	if l, err := c.in.ReadString('\n'); err == nil || os.IsTimeout(err) {
		t.Fatalf("connection lives on: %q, %v", l, err)
	}
}

func (c *rawConn) ask(t testing.TB, request string) string {
	t.Helper()
	c.send(t, request+"\n")
	return c.line(t)
}
