package ctl

import (
	"bytes"
	"context"
	"flag"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"tako/internal/archive"
	"tako/internal/management"
	"tako/internal/tako"
)

var update = flag.Bool("update", false, "write the golden files anew")

// The test program is also the takoctl on the far side of a fake ssh.
func TestMain(m *testing.M) {
	if os.Getenv("CTL_TEST_TAKOCTL") != "" {
		os.Exit(Main(context.Background(), os.Args[1:], Env{os.Stdin, os.Stdout, os.Stderr, os.Getenv, time.Now}))
	}
	goleak.VerifyTestMain(m)
}

const nowUnix = 1_800_000_000

// backend is a server with one app, blog.
type backend struct {
	mu       sync.Mutex
	calls    []string
	deployed management.DeployRequest
	files    string // of the upload
	fail     error
	upErr    error
}

func (b *backend) note(format string, args ...any) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.calls = append(b.calls, fmt.Sprintf(format, args...))
	return b.fail
}

func (b *backend) Upgrading() bool { return false }
func (b *backend) Owner() int      { return 0 }
func (b *backend) Reload(context.Context) (management.ReloadInfo, error) {
	return management.ReloadInfo{}, nil
}

func (b *backend) ServerInfo(context.Context) (management.ServerInfo, error) {
	return management.ServerInfo{
		PID: 42, Role: management.RoleFollower, OwnerPID: 41, Version: "1.2.3", Mode: tako.ModeNormal, Socket: "/s", DataDir: "/d", HTTPPort: 80, HTTPSPort: 443,
		Restored:   &management.Restored{At: nowUnix - 3600, Backup: "/d/backups/b.sqlite3"},
		UptimeSecs: 7200, Isolation: "all walls stand", Upgrade: &management.UpgradeLock{Owner: "deb", AgeSecs: 61, LeaseSecs: 540},
		Processes: []management.Process{{Role: "proxy", PID: 43, Generation: 1, State: "ready", UptimeSecs: 60, User: "tako-proxy"}},
	}, b.note("info")
}

func (b *backend) EnterUpgrading(_ context.Context, o string, f bool) error {
	return b.note("enter %s %v", o, f)
}

func (b *backend) ExitUpgrading(_ context.Context, o string, f bool) error {
	return b.note("exit %s %v", o, f)
}

func (b *backend) Deploy(_ context.Context, r management.DeployRequest, p management.Progress) (management.DeployResult, error) {
	p("starting 1 instance")
	b.deployed = r
	return management.DeployResult{App: r.App, Version: r.Version, NewApp: r.App != "blog", Rolled: r.App == "blog", NewInstances: 2, OldInstances: 1}, b.note("deploy %s %s", r.App, r.Version)
}

func (b *backend) Rollback(_ context.Context, a tako.AppID, v tako.ReleaseID, _ management.Progress) (management.DeployResult, error) {
	return management.DeployResult{App: a, Version: v, Rolled: true, NewInstances: 1, OldInstances: 1}, b.note("rollback %s %s", a, v)
}
func (b *backend) Stop(_ context.Context, a tako.AppID) error { return b.note("stop %s", a) }
func (b *backend) Delete(_ context.Context, a tako.AppID) (bool, error) {
	return true, b.note("delete %s", a)
}

func (b *backend) Restart(_ context.Context, a tako.AppID, _ management.Progress) (management.DeployResult, error) {
	return management.DeployResult{App: a, Version: "v2", Rolled: true, NewInstances: 1, OldInstances: 1}, b.note("restart %s", a)
}

func (b *backend) Scale(_ context.Context, a tako.AppID, n uint8, _ management.Progress) error {
	return b.note("scale %s %d", a, n)
}

func (b *backend) UpdateSecrets(_ context.Context, a tako.AppID, s map[string]string, merge bool, _ management.Progress) (bool, error) {
	return true, b.note("secrets %s %v %v", a, s, merge)
}

func (b *backend) Status(_ context.Context, a tako.AppID) (management.AppStatus, error) {
	if a != "blog" {
		return management.AppStatus{}, tako.Errorf(tako.CodeNotFound, "App not found: %s", a)
	}
	one := management.Instance{ID: 3, State: tako.InstanceHealthy, Port: 20001, PID: new(4711), UptimeSecs: 200, RequestsTotal: 12345, Transport: "unix"}
	two := management.Instance{ID: 4, State: tako.InstanceStarting, Port: 20002, Transport: "tcp", Restarts: 2}
	return management.AppStatus{
		Name: a, Version: "v2", State: tako.AppRunning, Routes: []string{"blog.example.com", "example.com/blog"}, Wanted: 2, IdleSecs: 77,
		Instances: []management.Instance{one, two}, LastError: new("it \x1b[31mfell"), DeployedAt: new(int64(nowUnix - 200)),
		Builds: []management.Build{{Version: "v2", State: tako.AppRunning, Instances: []management.Instance{one}}, {Version: "v1", Instances: []management.Instance{two}}},
	}, nil
}

func (b *backend) List(context.Context) ([]management.AppSummary, error) {
	return []management.AppSummary{{Name: "blog", Version: "v2", State: tako.AppRunning, Instances: 2}, {Name: "a-longer-name", Version: "v1", State: tako.AppCrashLoop}}, nil
}

func (b *backend) ListReleases(context.Context, tako.AppID) ([]management.Release, error) {
	return []management.Release{{Version: "v3"}, {Version: "v2", Current: true, DeployedAt: new(int64(nowUnix - 3600)), CommitMessage: new("say hello\n\nmore"), GitDirty: new(true)}, {Version: "v1", DeployedAt: new(int64(nowUnix - 864000))}}, nil
}

func (b *backend) Routes(context.Context) ([]management.AppRoutes, error) {
	return []management.AppRoutes{{App: "blog", Routes: []string{"blog.example.com", "example.com/blog"}}}, nil
}

func (b *backend) Upload(ctx context.Context, a tako.AppID, v tako.ReleaseID, r io.Reader) (management.UploadResult, error) {
	if b.upErr != nil {
		return management.UploadResult{}, b.upErr
	}
	dir, err := os.MkdirTemp("", "upload")
	if err != nil {
		return management.UploadResult{}, err
	}
	defer os.RemoveAll(dir)
	st, err := archive.Unpack(ctx, r, dir, archive.Limits{})
	names, _ := filepath.Glob(dir + "/*")
	for i := range names {
		names[i] = filepath.Base(names[i])
	}
	b.files = strings.Join(names, " ")
	return management.UploadResult{Path: "/srv/" + string(v), Files: st.Files, Bytes: st.Bytes}, err
}

func (b *backend) Logs(_ context.Context, r management.LogsRequest, send func(management.LogLine) error) error {
	for _, l := range []management.LogLine{{Time: "2026-01-02T03:04:05.5Z", Stream: "build", Text: "npm ci"}, {Time: "2026-01-02T03:04:06Z", Instance: 3, Stream: "stderr", Text: "oh\x1b]0;x\x07 no"}} {
		if err := send(l); err != nil {
			return err
		}
	}
	return nil
}

// server serves b and returns its socket.
func server(t testing.TB, b *backend) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "ctl") //nolint:usetesting // t.TempDir can be too long for a socket
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: dir + "/s", Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error)
	go func() {
		done <- management.Serve(ctx, management.Config{Listener: l, Backend: b, OwnUID: uint32(os.Getuid()), Version: "1.2.3"})
	}()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
		l.Close()
		os.RemoveAll(dir)
	})
	return dir + "/s"
}

// ctl runs takoctl.
func ctl(t testing.TB, env map[string]string, stdin string, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	var out, errs bytes.Buffer
	code = Main(t.Context(), args, Env{
		strings.NewReader(stdin), &out, &errs,
		func(k string) string { return env[k] }, func() time.Time { return time.Unix(nowUnix, 0) },
	})
	return code, out.String(), errs.String()
}

func golden(t testing.TB, name, got string) {
	t.Helper()
	file := filepath.Join("testdata", name+".golden")
	if *update {
		if err := os.WriteFile(file, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatalf("%v; run with -update", err)
	}
	if got != string(want) {
		t.Errorf("%s:\n got:\n%s\nwant:\n%s", file, got, want)
	}
}

func TestReadingCommandsPrintForPeopleAndPrograms(t *testing.T) {
	socket := server(t, &backend{})
	for name, args := range map[string][]string{
		"status": {"status", "blog"}, "list": {"list"}, "releases": {"releases", "blog"}, "routes": {"routes"},
		"logs": {"logs", "blog"}, "info": {"server", "info"},
		"status-json": {"--json", "status", "blog"}, "list-json": {"--json", "list"}, "logs-json": {"--json", "logs", "blog"},
		"help": {"--help"}, "deploy-help": {"deploy", "--help"},
	} {
		t.Run(name, func(t *testing.T) {
			code, out, errs := ctl(t, map[string]string{"TAKO_SOCKET": socket}, "", args...)
			if code != ExitDone || errs != "" {
				t.Errorf("code %d, %s", code, errs)
			}
			golden(t, name, out)
		})
	}
}

func TestChangingCommandsAskTheServer(t *testing.T) {
	for _, c := range []struct{ args, stdin, call, out string }{
		{"stop blog", "", "stop blog", "stopped blog\n"},
		{"delete blog --yes", "", "delete blog", "deleted blog\n"},
		{"restart blog", "", "restart blog", "restarted blog v2: 1 instance in place of 1\n"},
		{"scale blog 0", "", "scale blog 0", "blog runs on demand\n"},
		{"scale blog 3", "", "scale blog 3", "blog has 3 instances\n"},
		{"rollback blog", "", "rollback blog v1", "rolled back blog v1: 1 instance in place of 1\n"},
		{"rollback blog v3", "", "rollback blog v3", "rolled back blog v3: 1 instance in place of 1\n"},
		{"secrets set blog A=1 B=-", "x\ny\n", "secrets blog map[A:1 B:x\ny] true", "set 2 secrets of blog, and restarted it\n"},
		{"upgrade enter --owner o", "", "enter o false", "the server takes no changes; the upgrade lock belongs to o\n"},
		{"upgrade exit --owner o --force", "", "exit o true", "the server takes changes again; the upgrade lock of o is gone\n"},
	} {
		t.Run(c.args, func(t *testing.T) {
			b := &backend{}
			code, out, errs := ctl(t, nil, c.stdin, append([]string{"--socket", server(t, b)}, strings.Fields(c.args)...)...)
			if code != ExitDone || out != c.out || len(b.calls) != 1 || b.calls[0] != c.call {
				t.Errorf("code %d, printed %q (%s), called %q", code, out, errs, b.calls)
			}
		})
	}
}

func app(t testing.TB, files map[string]string) string {
	t.Helper()
	dir := t.TempDir()
	for name, text := range files {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

var nodeApp = map[string]string{"app.json": `{"name":"shop","runtime":"node","main":"s.js"}`, "s.js": "x", "debug.log": "x", ".gitignore": "*.log\n"}

func TestDeploySendsADirectoryAndDeploysIt(t *testing.T) {
	b := &backend{}
	code, out, errs := ctl(t, nil, "", "--socket", server(t, b), "deploy", app(t, nodeApp), "--route", "shop.example.com", "--secret", "A=b=c")
	if code != ExitDone {
		t.Fatalf("code %d: %s", code, errs)
	}
	if want := "deployed shop 20270115T080000Z: a new app\n"; out != want {
		t.Errorf("printed %q, want %q", out, want)
	}
	if want := "  sending 3 files, 53 B\n  deploying shop 20270115T080000Z\n  starting 1 instance\n"; errs != want {
		t.Errorf("steps %q, want %q", errs, want)
	}
	want := management.DeployRequest{
		App: "shop", Version: "20270115T080000Z", Path: "/srv/20270115T080000Z", Routes: []string{"shop.example.com"},
		Secrets: map[string]string{"A": "b=c"}, Instances: 1, IdleTimeout: 300,
	}
	if !reflect.DeepEqual(b.deployed, want) || b.files != ".gitignore app.json s.js" {
		t.Errorf("deployed %+v of %s", b.deployed, b.files)
	}
}

func TestDeployOfAnAppThatExistsKeepsWhatIsNotGiven(t *testing.T) {
	b := &backend{}
	code, _, errs := ctl(t, nil, "", "--socket", server(t, b), "deploy", app(t, nodeApp), "--app", "blog", "--version", "v9")
	want := management.DeployRequest{App: "blog", Version: "v9", Path: "/srv/v9", Routes: []string{"blog.example.com", "example.com/blog"}, Instances: 2, IdleTimeout: 77}
	if code != ExitDone || !reflect.DeepEqual(b.deployed, want) {
		t.Errorf("code %d (%s), deployed %+v", code, errs, b.deployed)
	}
}

func TestDeployOfAPathSendsNothing(t *testing.T) {
	b := &backend{}
	code, _, errs := ctl(t, nil, "", "--socket", server(t, b), "deploy", "--app", "blog", "--version", "v9", "--path", "/p")
	if code != ExitDone || b.deployed.Path != "/p" || b.files != "" {
		t.Errorf("code %d (%s), deployed %+v of %q", code, errs, b.deployed, b.files)
	}
}

func TestFaultsHaveTheirExitCodes(t *testing.T) {
	b := &backend{fail: &management.RollbackError{App: "blog", Cause: "Health check failed", LastLines: []string{"boom", "at line 3"}}}
	undone := server(t, b)
	busy := server(t, &backend{fail: tako.Errorf(tako.CodeBusy, "Please wait.")})
	broken := server(t, &backend{fail: io.ErrNoProgress})
	taken := server(t, &backend{upErr: tako.Errorf(tako.CodeConflict, "Release exists.")})
	good, bare := app(t, nodeApp), app(t, map[string]string{"s.js": ""})
	hidden := app(t, map[string]string{"app.json": nodeApp["app.json"], ".gitignore": "app.json\n", "s.js": ""})
	for _, c := range []struct {
		code int
		want string
		args []string
	}{
		{ExitFailed, "takoctl: blog was rolled back to what ran before: Health check failed\n    The last lines of the instance that failed:\n    boom\n    at line 3\n", []string{"--socket", undone, "restart", "blog"}},
		{ExitRefused, "takoctl: Please wait.\n", []string{"--socket", busy, "stop", "blog"}},
		{ExitFailed, "takoctl: Internal error", []string{"--socket", broken, "stop", "blog"}},
		{ExitRefused, "App not found: x", []string{"--socket", busy, "status", "x"}},
		{ExitRefused, "Choose another name with --version", []string{"--socket", taken, "deploy", good, "--route", "a.example.com"}},
		{ExitUsage, "say with --route", []string{"--socket", busy, "deploy", good}},
		{ExitUsage, `{"runtime": "node", "main": "server.js"}`, []string{"deploy", bare}},
		{ExitUsage, "app.json is ignored", []string{"deploy", hidden}},
		{ExitUsage, "choose another with --app", []string{"deploy", good, "--app", "No"}},
		{ExitUsage, "choose another with --version", []string{"deploy", good, "--version", "a/b"}},
		{ExitUsage, "not a directory", []string{"deploy", good + "/s.js"}},
		{ExitUsage, "--path needs", []string{"deploy", good, "--path", "/p"}},
		{ExitUsage, "unknown command", []string{"nope"}},
		{ExitUsage, "unknown command", []string{"upgrade", "nope"}},
		{ExitUsage, "unknown flag", []string{"list", "--nope"}},
		{ExitUsage, "0 to 255", []string{"scale", "blog", "256"}},
		{ExitUsage, "--owner", []string{"upgrade", "enter"}},
		{ExitUsage, "--yes", []string{"delete", "blog"}},
		{ExitUsage, "no value for A", []string{"secrets", "set", "blog", "A"}},
		{ExitUsage, "not two", []string{"secrets", "set", "blog", "A=-", "B=-"}},
		{ExitUsage, "at most 10000", []string{"--socket", busy, "logs", "blog", "-n", "10001"}},
		{ExitUsage, "invalid --host", []string{"--host", "-oProxyCommand=x", "list"}},
		{ExitUsage, "invalid --host", []string{"--host", "a b", "list"}},
		{ExitUnreachable, "is it running?", []string{"--socket", "/nowhere/s", "list"}},
		{ExitUnreachable, "start ssh", []string{"--host", "box", "list"}},
	} {
		code, out, errs := ctl(t, map[string]string{"TAKO_SSH": "/nowhere/ssh"}, "", c.args...)
		if code != c.code || !strings.Contains(errs, c.want) || out != "" || !strings.HasPrefix(errs, "takoctl: ") && c.code == ExitUsage {
			t.Errorf("%v: code %d, %q, printed %q; want %d, %q", c.args, code, errs, out, c.code, c.want)
		}
	}
}

// fakeSSH is an ssh that runs its last argument in a shell here, with this test
// program as takoctl, and keeps its arguments.
func fakeSSH(t testing.TB) (program, log string) {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	log = filepath.Join(dir, "log")
	script := fmt.Sprintf("#!/bin/sh\nprintf '%%s\\n' \"$@\" > %s\ntakoctl() { CTL_TEST_TAKOCTL=1 %s \"$@\"; }\neval \"$4\"\n", quote(log), quote(self))
	program = filepath.Join(dir, "ssh")
	if err := os.WriteFile(program, []byte(script), 0o700); err != nil {
		t.Fatal(err)
	}
	return program, log
}

func TestHostSpeaksThroughSSH(t *testing.T) {
	b := &backend{}
	socket := server(t, b)
	odd := filepath.Join(filepath.Dir(socket), "it's; odd $(x)")
	if err := os.Symlink(socket, odd); err != nil {
		t.Fatal(err)
	}
	ssh, log := fakeSSH(t)
	code, out, errs := ctl(t, map[string]string{"TAKO_SSH": ssh}, "", "--host", "me@box", "--socket", odd, "deploy", app(t, nodeApp), "--app", "blog", "--version", "v9")
	if code != ExitDone || out != "deployed blog v9: 2 instances in place of 1\n" {
		t.Errorf("code %d, %q, %q", code, out, errs)
	}
	args, _ := os.ReadFile(log)
	if want := "-T\n--\nme@box\ntakoctl dial-stdio --socket=" + quote(odd) + "\n"; string(args) != want {
		t.Errorf("ssh was called with %q, want %q", args, want)
	}
	ctl(t, map[string]string{"TAKO_SSH": ssh, "TAKO_SOCKET": socket}, "", "--host", "me@box", "list")
	args, _ = os.ReadFile(log)
	if want := "-T\n--\nme@box\ntakoctl dial-stdio\n"; string(args) != want {
		t.Errorf("this machine's TAKO_SOCKET went along: %q, want %q", args, want)
	}
	code, _, errs = ctl(t, map[string]string{"TAKO_SSH": ssh}, "", "--host", "me@box", "--socket", "/nowhere/s", "list")
	if code != ExitUnreachable || !strings.Contains(errs, "ssh to me@box: exit status 3") {
		t.Errorf("without a server there: code %d, %q", code, errs)
	}
}

func TestSecretsFiles(t *testing.T) {
	for text, want := range map[string]map[string]string{
		"{\"A\":\"1\",\"B\":\"x\\ny\"}": {"A": "1", "B": "x\ny"},
		"# c\n\nA=1\r\n B = 2=3 \n":     {"A": "1", "B": " 2=3 "},
		"A":                             nil, "A=1\nA=2": nil, "{\"A\":1}": nil, "=x": nil,
	} {
		got, err := parseSecrets(text)
		if (err != nil) != (want == nil) || want != nil && !reflect.DeepEqual(got, want) {
			t.Errorf("%q: got %v, %v, want %v", text, got, err, want)
		}
	}
}

func TestTimesAndSizesAreShort(t *testing.T) {
	for got, want := range map[string]string{
		short(-time.Second): "0s", short(59 * time.Second): "59s", short(47 * time.Hour): "47h", short(49 * time.Hour): "2d",
		size(1023): "1023 B", size(1536): "1.5 KiB", size(5 << 40): "5.0 TiB", clean("a\tb\x1b\u202e"): "a\tb\\x1b\\x202e",
	} {
		if got != want {
			t.Errorf("got %s, want %s", got, want)
		}
	}
}
