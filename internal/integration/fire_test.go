package integration

import (
	"bytes"
	"cmp"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"math/rand/v2"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"tako/internal/takotest"
)

// fireApp is the app that is changed under fire, in releases "1" and "2".
const fireApp = "blog"

// fireState is what a server says and its disk holds of that app, nil if there is
// none, and of the server's mode.
type fireState struct {
	Mode string
	App  *fireAppState
}

type fireAppState struct {
	Version, Route, Secret string
	Instances              int
	Stopped                bool
}

func (s fireState) String() string {
	if s.App == nil {
		return s.Mode + ", no app"
	}
	return fmt.Sprintf("%s, %+v", s.Mode, *s.App)
}

// fireOp is a mutating command and what it makes of a state that it succeeds in.
type fireOp struct {
	name  string
	ask   func(s *takotest.Server) error
	model func(*fireState)
	// free says that it works without any room on the disk.
	free bool
}

// fireOps are the commands that a state allows, each with n in what it changes.
func fireOps(now fireState, n int) []fireOp {
	type fields = map[string]any
	command := func(name string, f fields) func(*takotest.Server) error {
		return func(s *takotest.Server) error { _, err := s.Ask(name, f); return err }
	}
	owner := fields{"owner": "fire"}
	if now.Mode == "upgrading" {
		return []fireOp{{"exit_upgrading", command("exit_upgrading", owner), func(s *fireState) { s.Mode = "normal" }, true}}
	}
	secret, route := fmt.Sprintf("secret-%d", n), fmt.Sprintf("r%d.localhost", n)
	version := func(n int) string { return fmt.Sprint(n%2 + 1) }
	deploy := fireOp{"deploy", func(s *takotest.Server) error {
		_, err := ask(s, fireApp, version(n), fields{"routes": []string{route}, "secrets": fields{"SECRET": secret}})
		return err
	}, func(s *fireState) {
		s.App = &fireAppState{Version: version(n), Route: route, Secret: secret, Instances: 1}
	}, false}
	if now.App == nil {
		return []fireOp{deploy}
	}
	change := func(f func(a *fireAppState)) func(*fireState) {
		return func(s *fireState) {
			a := *s.App
			f(&a)
			s.App = &a
		}
	}
	secrets := func(merge bool) func(*takotest.Server) error {
		return command("update_secrets", fields{"app": fireApp, "secrets": fields{"SECRET": secret}, "merge": merge})
	}
	return []fireOp{
		deploy,
		{"rollback", command("rollback", fields{"app": fireApp, "version": version(n)}), change(func(a *fireAppState) { a.Version, a.Stopped = version(n), false }), false},
		{"restart", command("restart", fields{"app": fireApp}), change(func(a *fireAppState) { a.Stopped = false }), false},
		{"update_secrets", secrets(false), change(func(a *fireAppState) { a.Secret = secret }), false},
		{"update_secrets, merged", secrets(true), change(func(a *fireAppState) { a.Secret = secret }), false},
		{"scale", command("scale", fields{"app": fireApp, "instances": n%2 + 1}), change(func(a *fireAppState) { a.Instances = n%2 + 1 }), false},
		{"enter_upgrading", command("enter_upgrading", owner), func(s *fireState) { s.Mode = "upgrading" }, false},
		{"stop", command("stop", fields{"app": fireApp}), change(func(a *fireAppState) { a.Stopped = true }), true},
		{"delete", command("delete", fields{"app": fireApp}), func(s *fireState) { s.App = nil }, true},
	}
}

// after is the state that an op makes of another.
func (o fireOp) after(before fireState) fireState {
	o.model(&before) // a copy; what App leads to is not changed
	return before
}

// observe is the state as the server tells it, once no command is under way.
func observe(t *testing.T, s *takotest.Server) fireState {
	t.Helper()
	var state fireState
	var info struct {
		Mode string `json:"mode"`
	}
	data, err := s.Ask("server_info", nil)
	if err == nil {
		err = json.Unmarshal(data, &info)
	}
	if err != nil {
		t.Fatalf("server_info: %v", err)
	}
	state.Mode = info.Mode
	data, err = s.Ask("status", map[string]any{"app": fireApp})
	if err != nil {
		if !strings.Contains(err.Error(), "not found") {
			t.Fatalf("status: %v", err)
		}
		return state
	}
	var st struct {
		Version, State string
		Routes         []string
		Wanted         int `json:"instances_wanted"`
	}
	if err := json.Unmarshal(data, &st); err != nil {
		t.Fatal(err)
	}
	state.App = &fireAppState{Version: st.Version, Route: strings.Join(st.Routes, ","), Instances: st.Wanted, Stopped: st.State == "stopped"}
	text, err := os.ReadFile(filepath.Join(s.Data, "apps", fireApp, "secrets.json"))
	var secrets map[string]string
	if err == nil {
		err = json.Unmarshal(text, &secrets)
	}
	if err != nil {
		t.Fatalf("secrets: %v", err)
	}
	state.App.Secret = secrets["SECRET"]
	return state
}

// settle waits, after a start, until the server has one of these states again, and
// returns it.
func settle(t *testing.T, s *takotest.Server, when string, either ...fireState) fireState {
	t.Helper()
	var got fireState
	began := time.Now()
	for time.Since(began) < takotest.StartWait {
		got = observe(t, s)
		for _, want := range either {
			if reflect.DeepEqual(got, want) {
				return got
			}
		}
		time.Sleep(5 * time.Millisecond) // its apps are being restored
	}
	t.Fatalf("%s: got %v, want one of %v", when, got, either)
	return got
}

// served waits until the app that a state has is served as the state says, by a
// process with its version and secret.
func (s fireState) served(t *testing.T, on *takotest.Server) {
	t.Helper()
	if s.App == nil || s.App.Stopped {
		return
	}
	want := []string{"SECRET=" + s.App.Secret, "TAKO_VERSION=" + s.App.Version}
	var answer takotest.Answer
	var err error
	began := time.Now()
	for time.Since(began) < takotest.StartWait {
		if answer, err = on.Get(t.Context(), takotest.TLS1, s.App.Route+"/env"); err == nil && answer.StatusCode == http.StatusOK &&
			strings.Contains(answer.Text, want[0]+`"`) && strings.Contains(answer.Text, want[1]+`"`) {
			return
		}
		time.Sleep(5 * time.Millisecond)
	}
	t.Fatalf("%s is not served with %q: %v, %v %s", s.App.Route, want, err, answer.Response, answer.Text)
}

// attempt runs one command and holds it to all or nothing. It returns the state
// after it.
func (o fireOp) attempt(t *testing.T, s *takotest.Server, before fireState, when string) (fireState, error) {
	t.Helper()
	err := o.ask(s)
	want := before
	if err == nil {
		want = o.after(before)
	}
	got := observe(t, s)
	if !reflect.DeepEqual(got, want) {
		t.Fatalf("%s %s: it answered %v:\n was %v\n got %v\nwant %v", o.name, when, err, before, got, want)
	}
	return got, err
}

// fireServer makes a server whose data root is a file system of its own.
func fireServer(t *testing.T, mount func(dir string) error) *takotest.Server {
	t.Helper()
	s := prepare(t, takotest.Options{})
	if err := os.Mkdir(s.Data, 0o711); err != nil {
		t.Fatal(err)
	}
	if err := mount(s.Data); err != nil {
		t.Skipf("no file system of its own for the data root: %v", err)
	}
	t.Cleanup(func() {
		if err := errors.Join(s.Stop(), unmount(s.Data)); err != nil {
			t.Error(err)
		}
	})
	if err := os.Chmod(s.Data, 0o711); err != nil {
		t.Fatal(err)
	}
	return s
}

// fireStart starts the server with both releases there, and the first deployed.
func fireStart(t *testing.T, s *takotest.Server) fireState {
	t.Helper()
	if err := s.Start(); err != nil {
		t.Fatal(err)
	}
	for _, version := range []string{"1", "2"} {
		fireRelease(t, releaseDir(s, fireApp, version))
	}
	if err := command("sync", "-f", s.Data); err != nil { // an upload is synced by the server
		t.Fatal(err)
	}
	return fireBase(t, s, fireState{Mode: "normal"})
}

// fireRelease writes a small release: its program lies elsewhere.
func fireRelease(t *testing.T, dir string) {
	t.Helper()
	programs, err := takotest.Build()
	if err != nil {
		t.Fatal(err)
	}
	err = takotest.WriteApp(dir, quick(map[string]any{
		"start":    []string{filepath.Join(programs, "testapp")},
		"timeouts": map[string]any{"stability": 0, "ready": 20, "grace": 1, "drain": 2, "streams": 1},
	}))
	if err = errors.Join(err, os.Remove(filepath.Join(dir, "app"))); err != nil {
		t.Fatal(err)
	}
}

// fireBase deploys until the app is there as each attempt begins with it.
func fireBase(t *testing.T, s *takotest.Server, now fireState) fireState {
	t.Helper()
	for _, op := range append(fireOps(now, 0), fireOps(fireState{Mode: "normal"}, 0)...) {
		if op.name != "deploy" && op.name != "exit_upgrading" {
			continue
		}
		if err := op.ask(s); err != nil {
			t.Fatalf("%s: %v", op.name, err)
		}
		now = op.after(now)
	}
	if got := observe(t, s); !reflect.DeepEqual(got, now) {
		t.Fatalf("after a deploy: got %v, want %v", got, now)
	}
	return now
}

// TestFireFullDiskDuringEveryCommand leaves a command so many bytes and no more.
// It does all that it says, or it says why not and has changed nothing; stop,
// delete and the end of an upgrade do. The next start agrees.
func TestFireFullDiskDuringEveryCommand(t *testing.T) {
	t.Parallel()
	asRoot(t)
	s := fireServer(t, func(dir string) error { return syscall.Mount("tmpfs", dir, "tmpfs", 0, "size=64m") })
	base := fireStart(t, s)
	upgrading := base
	upgrading.Mode = "upgrading"
	room := []int64{0, 20 << 10}
	if soaking() {
		room = []int64{0, 4 << 10, 8 << 10, 12 << 10, 16 << 10, 20 << 10, 24 << 10, 32 << 10, 48 << 10, 64 << 10, 128 << 10, 512 << 10, 2 << 20}
	}
	uploaded := filepath.Join(t.TempDir(), "uploaded")
	fireRelease(t, uploaded)
	if err := os.WriteFile(filepath.Join(uploaded, "large"), make([]byte, 100<<10), 0o644); err != nil {
		t.Fatal(err)
	}
	refused, done := 0, 0
	for _, op := range slices.Concat(fireOps(base, 1), fireOps(upgrading, 1), []fireOp{fireUpload(uploaded, 1)}) {
		for i, bytes := range room {
			when := fmt.Sprintf("with %d KiB left", bytes>>10)
			before := base
			if op.name == "takoctl deploy" {
				op = fireUpload(uploaded, i) // a version is uploaded once
			}
			if op.name == "exit_upgrading" {
				if _, err := s.Ask("enter_upgrading", map[string]any{"owner": "fire"}); err != nil {
					t.Fatal(err)
				}
				before = upgrading
			}
			filler := fillDisk(t, s.Data)
			fi, err := os.Stat(filler)
			if err == nil {
				err = os.Truncate(filler, fi.Size()-bytes)
			}
			if err != nil {
				t.Fatal(err)
			}
			got, err := op.attempt(t, s, before, when)
			switch {
			case err == nil:
				done++
			case op.free:
				t.Errorf("%s %s: %v", op.name, when, err)
			default:
				refused++
				wantError(t, s, op.name+" "+when, err, `(?i).*(no space left on device|disk is full|free some disk space).*`)
			}
			if soaking() || bytes == 0 && op.free {
				if err := errors.Join(s.Kill(), s.Start()); err != nil {
					t.Fatalf("start after %s %s: %v", op.name, when, err)
				}
				settle(t, s, "after "+op.name+" "+when+" and a kill", got)
				got.served(t, s)
			}
			if err := os.Remove(filler); err != nil {
				t.Fatal(err)
			}
			got.served(t, s)
			base = fireBase(t, s, got)
		}
	}
	row(t, "every command with little or no room on the disk", refused+done, 0, fmt.Sprintf("commands: %d found no room and changed nothing, %d were done", refused, done))
	if refused == 0 || done == 0 {
		t.Errorf("the room left is no test: %d refused, %d done", refused, done)
	}
}

// fireImage makes an ext4 file system of so many MiB in a file of dir.
func fireImage(dir string, mib int) (string, error) {
	image := filepath.Join(dir, "image")
	err := os.WriteFile(image, nil, 0o600)
	if err == nil {
		err = os.Truncate(image, int64(mib)<<20)
	}
	if err == nil {
		err = command("mkfs.ext4", "-q", "-F", "-J", "size=4", image)
	}
	return image, err
}

func mountImage(image, dir string) error {
	return command("mount", "-o", "loop,data=ordered,commit=5", image, dir)
}

// unmount waits for what has just died: it may hold files for a moment more.
func unmount(dir string) error {
	err := syscall.Unmount(dir, 0)
	for end := time.Now().Add(takotest.StopWait); errors.Is(err, syscall.EBUSY) && time.Now().Before(end); err = syscall.Unmount(dir, 0) {
		time.Sleep(5 * time.Millisecond)
	}
	return err
}

func command(name string, args ...string) error {
	if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
		return fmt.Errorf("%s %s: %w: %s", name, strings.Join(args, " "), err, out)
	}
	return nil
}

// freeze stops every process of the server where it is, and waits until it has.
func freeze(t *testing.T, s *takotest.Server) {
	t.Helper()
	until(t, takotest.StopWait, "every process stands still", func() bool {
		still := true
		for _, p := range s.Processes() {
			stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", p.PID))
			if err != nil {
				continue // it has gone
			}
			if _, rest, _ := bytes.Cut(stat, []byte(") ")); len(rest) > 0 && rest[0] == 'T' {
				continue
			}
			still = false
			if err := s.Signal(p.PID, syscall.SIGSTOP); err != nil {
				t.Logf("it has gone: %v", err)
			}
		}
		return still
	})
}

// TestFirePowerCutsLoseNothingAcknowledged cuts the power under a row of commands:
// the server's data root is a file system of its own, and the next server gets a
// copy of what had reached the disk below it at one moment, and nothing of what
// was in memory. What was acknowledged is there; of the command that was under way
// all or nothing is.
//
// The disk is one that keeps its writes in order: a device that loses what it has
// in its own cache would show a flush that is missing, and this does not.
func TestFirePowerCutsLoseNothingAcknowledged(t *testing.T) {
	t.Parallel()
	asRoot(t)
	cuts := 3
	if soaking() {
		cuts = 50
	}
	var image string
	s := fireServer(t, func(dir string) (err error) {
		if image, err = fireImage(t.TempDir(), 96); err != nil {
			return err
		}
		return mountImage(image, dir)
	})
	uploaded := filepath.Join(t.TempDir(), "uploaded")
	fireRelease(t, uploaded)
	now := fireStart(t, s)
	n, acked, whole, log := 0, 0, 0, len(s.Log())
	for cut := range cuts {
		moment := time.Duration(rand.IntN(1500)) * time.Millisecond
		w := fireWriter{now: now, n: n, uploaded: uploaded, ended: make(chan struct{})}
		go w.write(s)
		if cut == 0 { // one at least, however busy the machine is
			until(t, takotest.AskWait, "a command is acknowledged", func() bool { return w.acked.Load() > 0 })
		}
		select {
		case <-time.After(moment):
		case <-w.ended:
			t.Fatalf("the commands ended by themselves: %v", w.err)
		}
		freeze(t, s)
		before, op := w.state()
		copied := image + ".cut"
		for again := true; again; { // until the kernel is done with what was under way
			if err := errors.Join(command("cp", "--sparse=always", image, copied), command("cp", "--sparse=always", image, copied+"2")); err != nil {
				t.Fatal(err)
			}
			again = command("cmp", "-s", copied, copied+"2") != nil
		}
		for _, p := range s.Processes() {
			if err := s.KillProcess(p.PID); err != nil {
				t.Logf("it has gone: %v", err)
			}
		}
		if err := errors.Join(s.Kill(), unmount(s.Data), os.Rename(copied, image), mountImage(image, s.Data), s.Start()); err != nil {
			t.Fatalf("start after power cut %d: %v", cut, err)
		}
		<-w.ended
		after := op.after(before)
		now = settle(t, s, fmt.Sprintf("after power cut %d, %s into %d commands, during %s", cut, moment, w.n-n, op.name), before, after)
		now.served(t, s)
		if reflect.DeepEqual(now, after) {
			whole++
		}
		acked += w.n - n
		n = w.n + 1
		if text := s.Log()[log:]; strings.Contains(text, "damaged") {
			t.Fatalf("after power cut %d the database was damaged", cut)
		}
		nothingHalf(t, s)
	}
	row(t, fmt.Sprintf("%d power cuts", cuts), acked, 0, fmt.Sprintf("acknowledged commands, none lost; of the %d under way %d were whole", cuts, whole))
	if acked == 0 {
		t.Error("no command was acknowledged")
	}
}

// fireWriter sends one random command after another, until one fails.
type fireWriter struct {
	uploaded string // a release to upload
	ended    chan struct{}
	n        int // of acknowledged ones, with those before; to be read after ended
	err      error

	acked atomic.Int64

	mu    sync.Mutex
	now   fireState // as acknowledged
	under fireOp
}

func (w *fireWriter) write(s *takotest.Server) {
	defer close(w.ended)
	for ; w.err == nil; w.n++ {
		w.mu.Lock()
		ops := fireOps(w.now, w.n)
		if w.now.App != nil && w.now.Mode == "normal" {
			ops = append(ops, fireUpload(w.uploaded, w.n))
		}
		op := ops[rand.IntN(len(ops))]
		w.under = op
		w.mu.Unlock()
		if w.err = op.ask(s); w.err != nil {
			return
		}
		w.mu.Lock()
		w.now = op.after(w.now)
		w.under = fireOp{name: "nothing", model: func(*fireState) {}}
		w.mu.Unlock()
		w.acked.Add(1)
	}
}

// state is what was acknowledged and the command that is under way.
func (w *fireWriter) state() (fireState, fireOp) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.now, w.under
}

// fireUpload deploys a folder as a person does: it is packed, uploaded, unpacked.
func fireUpload(dir string, n int) fireOp {
	version, route := fmt.Sprintf("u%d", n), fmt.Sprintf("u%d.localhost", n)
	return fireOp{name: "takoctl deploy", ask: func(s *takotest.Server) error {
		_, stderr, code, err := s.Ctl(context.Background(), "deploy", dir, "--app", fireApp, "--version", version, "--route", route, "--instances", "1")
		if err == nil && code != 0 {
			err = fmt.Errorf("exit status %d: %s", code, stderr)
		}
		return err
	}, model: func(s *fireState) {
		s.App = &fireAppState{Version: version, Route: route, Secret: s.App.Secret, Instances: 1}
	}}
}

// nothingHalf looks for what a cut left half done: files on their way, and
// certificates without their key.
func nothingHalf(t *testing.T, s *takotest.Server) {
	t.Helper()
	err := filepath.WalkDir(s.Data, func(path string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		name := e.Name()
		if strings.HasPrefix(name, ".tako-new-") || strings.HasSuffix(name, ".next") || strings.HasPrefix(name, "runtime-state.sqlite3.") {
			t.Errorf("left over: %s", path)
		}
		if name == "fullchain.pem" {
			if _, err := tls.LoadX509KeyPair(path, filepath.Join(filepath.Dir(path), "privkey.pem")); err != nil {
				t.Errorf("%s: %v", path, err)
			}
		}
		return nil
	})
	if err != nil && !errors.Is(err, fs.ErrNotExist) { // an app writes there too
		t.Error(err)
	}
}

// TestFireIOErrorsChangeNothing has the disk fail under a command: the file system
// of the data root lies on a thin one that has run out, so that a write to a new
// block, or the journal's, is an I/O error and no lack of space. The command says
// so and has changed nothing, what ran serves on, and when the disk works again
// the next start finds what the server said.
func TestFireIOErrorsChangeNothing(t *testing.T) {
	t.Parallel()
	asRoot(t)
	names := []string{"deploy", "update_secrets", "stop"}
	if soaking() {
		names = nil
		for _, op := range fireOps(fireState{Mode: "normal", App: &fireAppState{}}, 1) {
			names = append(names, op.name)
		}
	}
	failing := 0
	for _, first := range names {
		t.Run(first, func(t *testing.T) {
			thin := t.TempDir()
			if err := syscall.Mount("tmpfs", thin, "tmpfs", 0, "size=32m"); err != nil {
				t.Skipf("a tmpfs cannot be mounted here: %v", err)
			}
			t.Cleanup(func() {
				if err := unmount(thin); err != nil {
					t.Error(err)
				}
			})
			var image string
			s := fireServer(t, func(dir string) (err error) {
				if image, err = fireImage(thin, 128); err != nil {
					return err
				}
				return mountImage(image, dir)
			})
			now := fireStart(t, s)
			now.served(t, s)
			before := about(t, s, now.App.Route)
			filler := fillDisk(t, thin)
			refused := 0
			uploaded := filepath.Join(t.TempDir(), "uploaded")
			fireRelease(t, uploaded)
			ops := append(fireOps(now, 1), fireUpload(uploaded, 1))
			slices.SortStableFunc(ops, func(a, b fireOp) int { return cmp.Compare(btoi(b.name == first), btoi(a.name == first)) })
			for _, op := range ops {
				if now.App == nil || now.Mode != "normal" {
					break // it was done without a new block
				}
				var err error
				if now, err = op.attempt(t, s, now, "while the disk fails"); err != nil {
					refused++
					t.Logf("%s: %v", op.name, err)
				}
			}
			if refused == len(ops) {
				if after := about(t, s, now.App.Route); after.PID != before.PID {
					t.Errorf("pid %d serves, before %d", after.PID, before.PID)
				}
				if err := s.KillProcess(before.PID); err != nil {
					t.Fatal(err)
				}
				until(t, takotest.StartWait, "an instance that dies is replaced", func() bool {
					after, err := tryAbout(s, now.App.Route)
					return err == nil && after.PID != before.PID
				})
			}
			if refused == 0 {
				t.Error("nothing was refused")
			}
			failing += refused
			if err := errors.Join(s.Kill(), os.Remove(filler), unmount(s.Data), mountImage(image, s.Data), s.Start()); err != nil {
				t.Fatalf("start on the disk that works again: %v", err)
			}
			settle(t, s, "after a start on the disk that works again", now).served(t, s)
			nothingHalf(t, s)
		})
	}
	if failing > 0 {
		row(t, "every command on a disk that fails", failing, 0, "commands that met an I/O error and changed nothing")
	}
}

// TestFireDamagedDatabaseIsReplacedByABackupAndSaid damages the database of a
// server that was killed. The next one has the newest good backup, serves what it
// names, and says so: in its log and, from then on, in server_info.
func TestFireDamagedDatabaseIsReplacedByABackupAndSaid(t *testing.T) {
	t.Parallel()
	s := prepare(t, takotest.Options{})
	old := fireStart(t, s)
	database, backups := filepath.Join(s.Data, "runtime-state.sqlite3"), filepath.Join(s.Data, "backups")
	list := func() []string {
		names, err := filepath.Glob(filepath.Join(backups, "*"))
		if err != nil {
			t.Fatal(err)
		}
		return names
	}
	// The first start has made a backup of nothing; the next makes one of this.
	until(t, takotest.StartWait, "the first backup", func() bool { return len(list()) == 1 })
	if err := errors.Join(s.Stop(), os.Remove(list()[0]), s.Start()); err != nil {
		t.Fatal(err)
	}
	until(t, takotest.StartWait, "a backup", func() bool { return len(list()) == 1 && filepath.Ext(list()[0]) == ".sqlite3" })
	settle(t, s, "after a restart", old)
	damages := map[string]func(text []byte) error{
		"cut in the middle": func(text []byte) error { return os.Truncate(database, int64(len(text)/2)) },
		"torn": func(text []byte) error { // pages of it are of another time
			for at := 4096; at < len(text); at += 3 * 4096 {
				copy(text[at:min(at+2048, len(text))], bytes.Repeat([]byte{0xa5}, 2048))
			}
			return os.WriteFile(database, text, 0o600)
		},
		"gone":  func([]byte) error { return os.Remove(database) },
		"empty": func([]byte) error { return os.Truncate(database, 0) },
	}
	for _, name := range slices.Sorted(maps.Keys(damages)) {
		next := fireOps(old, 1)[0] // a deploy that no backup has
		if err := next.ask(s); err != nil {
			t.Fatal(err)
		}
		if err := s.Stop(); err != nil { // the log is in the database then
			t.Fatal(err)
		}
		text, err := os.ReadFile(database)
		if err == nil {
			err = damages[name](text)
		}
		if err != nil {
			t.Fatal(err)
		}
		logged := len(s.Log())
		if err := s.Start(); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		for _, said := range []string{"the database is damaged or missing", "a backup took the place of the database"} {
			if !strings.Contains(s.Log()[logged:], said) {
				t.Errorf("%s: the log does not say: %s", name, said)
			}
		}
		// The row is the backup's, and so is the route. Secrets are not in it: those
		// of the deploy that is lost stay, and belong to the app as before.
		restored := old
		app := *old.App
		app.Secret = next.after(old).App.Secret
		restored.App = &app
		settle(t, s, name, restored).served(t, s)
		data, err := s.Ask("server_info", nil)
		var info struct {
			Restored *struct {
				Backup  string  `json:"backup"`
				Damaged *string `json:"damaged"`
			} `json:"restored"`
		}
		if err == nil {
			err = json.Unmarshal(data, &info)
		}
		if r := info.Restored; err != nil || r == nil || r.Backup != list()[0] || (r.Damaged == nil) != (name == "gone") {
			t.Errorf("%s: server_info has %s, %v", name, data, err)
		}
		if out, _, _, err := s.Ctl(t.Context(), "server", "info"); err != nil || !strings.Contains(out, "what was changed after that backup is lost") {
			t.Errorf("%s: takoctl says %s, %v", name, out, err)
		}
		old = restored
		if err := s.Stop(); err != nil {
			t.Fatal(err)
		}
		if err := s.Start(); err != nil {
			t.Fatal(err)
		}
		settle(t, s, name+", and the start after that", old)
	}
	row(t, "a damaged database", len(damages), 0, "starts from the newest backup, said each time")
}

// TestFireChangeThatIsCommittedIsFinishedLater: once the row is in the database a
// change has happened, also if the file that belongs to it cannot be moved. What
// comes next finds it, and finishes it.
func TestFireChangeThatIsCommittedIsFinishedLater(t *testing.T) {
	t.Parallel()
	s := prepare(t, takotest.Options{})
	now := fireStart(t, s)
	secrets := filepath.Join(s.Data, "apps", fireApp, "secrets.json")
	for n, last := range []string{"restart", "update_secrets, merged", "kill", "deploy"} {
		var update, stop, next fireOp
		for _, op := range fireOps(now, n+1) {
			switch op.name {
			case "update_secrets":
				update = op
			case "stop":
				stop = op
			case last:
				next = op
			}
		}
		if err := stop.ask(s); err != nil {
			t.Fatal(err)
		}
		now = update.after(stop.after(now))
		// A folder in the way of the rename.
		if err := errors.Join(os.Rename(secrets, secrets+".old"), os.Mkdir(secrets, 0o700)); err != nil {
			t.Fatal(err)
		}
		if err := update.ask(s); err != nil {
			t.Fatalf("update_secrets: %v", err)
		}
		if last == "kill" {
			next = fireOp{last, func(s *takotest.Server) error { return errors.Join(s.Kill(), s.Start()) }, func(*fireState) {}, false}
		} else if err := next.ask(s); err == nil || !strings.Contains(err.Error(), "Failed to finish the last change") {
			t.Errorf("%s with the folder there: %v", last, err)
		}
		if err := os.Remove(secrets); err != nil {
			t.Fatal(err)
		}
		if err := next.ask(s); err != nil {
			t.Fatalf("%s: %v", last, err)
		}
		now = settle(t, s, last, next.after(now))
		now.served(t, s)
		if err := os.Remove(secrets + ".old"); err != nil {
			t.Fatal(err)
		}
	}
}

func btoi(b bool) int {
	if b {
		return 1
	}
	return 0
}
