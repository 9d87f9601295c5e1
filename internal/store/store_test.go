package store

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"

	"tako/internal/tako"
)

func TestMain(m *testing.M) {
	if dir := os.Getenv("TAKO_STORE_TEST_WRITER"); dir != "" {
		writeUntilKilled(dir)
		return
	}
	goleak.VerifyTestMain(m)
}

var start = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)

func options(dir string) Options {
	return Options{
		Path:        filepath.Join(dir, "runtime-state.sqlite3"),
		BackupDir:   filepath.Join(dir, "backups"),
		ReservePath: filepath.Join(dir, "reserve"),
		Version:     "1.2.3",
		Now:         func() time.Time { return start },
		Uptime:      func() (string, time.Duration) { return "", 0 },
	}
}

func openIn(t testing.TB, dir string) *DB {
	t.Helper()
	d, err := Open(t.Context(), options(dir))
	if err != nil {
		t.Fatalf("Open: %v", err)
	}
	t.Cleanup(func() { closeDB(t, d) })
	return d
}

func closeDB(t testing.TB, d *DB) {
	t.Helper()
	if err := d.Close(); err != nil {
		t.Fatalf("Close: %v", err)
	}
}

func ok(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func wantCode(t testing.TB, err error, code tako.Code, parts ...string) {
	t.Helper()
	if err == nil || tako.AsError(err).Code != code {
		t.Fatalf("error %v, want code %s", err, code)
	}
	for _, p := range parts {
		if !strings.Contains(tako.AsError(err).Message, p) {
			t.Errorf("message %q does not name %q", tako.AsError(err).Message, p)
		}
	}
}

func blog() App {
	return App{
		ID: "blog", Release: "v1", Path: "/opt/tako/apps/blog/releases/v1", Instances: 2, IdleTimeout: 90 * time.Second,
		Routes: []string{"z.example.com", "a.example.com/x/*"}, BasePort: 20000, UID: 70000, SecretsHash: "h1", DeployedAt: start,
	}
}

func wantApps(t testing.TB, d *DB, want ...App) {
	t.Helper()
	got, err := d.Apps(t.Context())
	ok(t, err)
	if len(got) != len(want) || len(want) > 0 && !reflect.DeepEqual(got, want) {
		t.Fatalf("Apps\n got %+v\nwant %+v", got, want)
	}
}

func TestAppComesBackAsItWasSaved(t *testing.T) {
	dir := t.TempDir()
	d := openIn(t, dir)
	a, b := blog(), App{ID: "api", Release: "r.2", Path: "/x", PreviousRelease: "r.1", Stopped: true}
	ok(t, d.SaveApp(t.Context(), a))
	ok(t, d.SaveApp(t.Context(), b))
	wantApps(t, d, b, a)
	closeDB(t, d)

	d = openIn(t, dir)
	wantApps(t, d, b, a)
	a.Release, a.PreviousRelease, a.Path, a.Routes = "v2", "v1", "/opt/tako/apps/blog/releases/v2", []string{"b.example.com", "z.example.com"}
	a.DeployedAt = start.Add(time.Hour)
	ok(t, d.SaveApp(t.Context(), a))
	ok(t, d.SetInstances(t.Context(), "blog", 0))
	ok(t, d.SetStopped(t.Context(), "blog", true))
	ok(t, d.SetSecretsHash(t.Context(), "blog", "h2"))
	a.Instances, a.Stopped, a.SecretsHash = 0, true, "h2"
	got, err := d.App(t.Context(), "blog")
	ok(t, err)
	if !reflect.DeepEqual(got, a) {
		t.Errorf("App\n got %+v\nwant %+v", got, a)
	}
	if _, ok := d.Restored(); ok {
		t.Error("Restored without a restore")
	}
}

func TestUnknownAppIsNotFound(t *testing.T) {
	d := openIn(t, t.TempDir())
	_, err := d.App(t.Context(), "nope")
	wantCode(t, err, tako.CodeNotFound, "nope")
	wantCode(t, d.SetStopped(t.Context(), "nope", true), tako.CodeNotFound)
	if existed, err := d.DeleteApp(t.Context(), "nope"); existed || err != nil {
		t.Errorf("DeleteApp = %v, %v, want false, nil", existed, err)
	}
	wantApps(t, d)
}

func TestRouteBelongsToOneApp(t *testing.T) {
	d := openIn(t, t.TempDir())
	a := blog()
	ok(t, d.SaveApp(t.Context(), a))
	other := App{ID: "shop", Release: "v1", Path: "/shop", Routes: []string{"shop.example.com", "z.example.com"}}
	wantCode(t, d.SaveApp(t.Context(), other), tako.CodeConflict, "blog", "z.example.com")
	other.Routes = []string{"s.example.com", "s.example.com"}
	wantCode(t, d.SaveApp(t.Context(), other), tako.CodeInvalid, "s.example.com")
	wantApps(t, d, a) // nothing of the refused app stayed

	if existed, err := d.DeleteApp(t.Context(), "blog"); !existed || err != nil {
		t.Fatalf("DeleteApp = %v, %v, want true, nil", existed, err)
	}
	other.Routes = []string{"z.example.com"}
	ok(t, d.SaveApp(t.Context(), other))
	wantApps(t, d, other)
}

func TestDeploysAreRememberedUpToTheLimit(t *testing.T) {
	d := openIn(t, t.TempDir())
	a := blog()
	for i := range MaxDeploys + 5 {
		a.Release, a.DeployedAt = tako.ReleaseID(fmt.Sprintf("v%d", i)), start.Add(time.Duration(i)*time.Minute)
		ok(t, d.SaveApp(t.Context(), a))
		ok(t, d.SaveApp(t.Context(), a)) // the same again is no deploy
	}
	got, err := d.Deploys(t.Context(), "blog")
	ok(t, err)
	if len(got) != MaxDeploys || got[0].Release != "v104" || got[99].Release != "v5" || !got[0].DeployedAt.Equal(a.DeployedAt) {
		t.Errorf("%d deploys from %+v to %+v, want %d from v104 to v5", len(got), got[0], got[len(got)-1], MaxDeploys)
	}
}

func TestPendingRolloutEndsWithItsCommitOrItsGivingUp(t *testing.T) {
	dir := t.TempDir()
	d := openIn(t, dir)
	want := []Pending{
		{App: "blog", Release: "v1", Path: "/b", SecretsHash: "h", StartedAt: start},
		{App: "shop", Release: "v1", Path: "/s", StartedAt: start},
	}
	for _, p := range want {
		ok(t, d.BeginRollout(t.Context(), p))
	}
	closeDB(t, d)
	d = openIn(t, dir)
	got, err := d.Pending(t.Context())
	ok(t, err)
	if !reflect.DeepEqual(got, want) {
		t.Errorf("Pending\n got %+v\nwant %+v", got, want)
	}
	base, err := d.AllocatePorts(t.Context(), "shop", 20000, 20010, 4)
	ok(t, err)
	ok(t, d.SaveApp(t.Context(), blog()))
	ok(t, d.AbandonRollout(t.Context(), "shop"))
	ok(t, d.AbandonRollout(t.Context(), "shop"))
	if got, err := d.Pending(t.Context()); err != nil || len(got) != 0 {
		t.Errorf("Pending = %+v, %v, want none", got, err)
	}
	if again, err := d.AllocatePorts(t.Context(), "wiki", 20000, 20010, 4); err != nil || again != base {
		t.Errorf("ports of the abandoned first deploy: %d, %v, want %d again", again, err, base)
	}
}

func TestUIDsStayWithTheirApp(t *testing.T) {
	d := openIn(t, t.TempDir())
	get := func(id tako.AppID) uint32 {
		t.Helper()
		uid, err := d.AllocateUID(t.Context(), id, 70000, 70002)
		ok(t, err)
		return uid
	}
	if a, b := get("a"), get("b"); a != 70000 || b != 70001 {
		t.Fatalf("uids %d, %d, want the lowest", a, b)
	}
	_, err := d.DeleteApp(t.Context(), "a")
	ok(t, err)
	if c, a := get("c"), get("a"); c != 70002 || a != 70000 {
		t.Fatalf("uids %d, %d, want a new one and the old one again", c, a)
	}
	_, err = d.AllocateUID(t.Context(), "d", 70000, 70002)
	wantCode(t, err, tako.CodeFailed, "70000", "70002")
}

func TestPortsNeverOverlap(t *testing.T) {
	d := openIn(t, t.TempDir())
	steps := []struct {
		id       tako.AppID
		delete   bool
		lo, hi   uint16
		width    uint16
		want     uint16 // 0 is none left
		whatStep string
	}{
		{"a", false, 20000, 20011, 4, 20000, "first"},
		{"b", false, 20000, 20011, 4, 20004, "second"},
		{"c", false, 20000, 20011, 4, 20008, "third"},
		{"d", false, 20000, 20011, 1, 0, "full"},
		{"a", false, 20000, 20011, 2, 20000, "narrower keeps its place"},
		{"b", true, 0, 0, 0, 0, "freed"},
		{"d", false, 20000, 20011, 5, 0, "the gap is too narrow"},
		{"d", false, 20000, 20011, 3, 20004, "the gap"},
		{"a", false, 20000, 20020, 6, 20012, "wider moves"},
		{"e", false, 20000, 20020, 4, 20000, "where it was"},
		{"f", false, 65530, 65535, 6, 65530, "to the last port"},
		{"g", false, 65530, 65535, 1, 0, "beyond the last port"},
	}
	for _, s := range steps {
		if s.delete {
			_, err := d.DeleteApp(t.Context(), s.id)
			ok(t, err)
			continue
		}
		got, err := d.AllocatePorts(t.Context(), s.id, s.lo, s.hi, s.width)
		if got != s.want || (err == nil) != (s.want != 0) {
			t.Errorf("%s: app %s: %d, %v, want %d", s.whatStep, s.id, got, err, s.want)
		}
		if err != nil {
			wantCode(t, err, tako.CodeFailed)
		}
	}
}

func TestUpgradeLock(t *testing.T) {
	d := openIn(t, t.TempDir())
	steps := []struct {
		name    string
		owner   string
		exit    bool
		force   bool
		at      time.Duration
		err     error
		holder  string        // afterwards; "" is mode normal
		held    time.Duration // when it was acquired
		renewed time.Duration
	}{
		{"exit without a lock", "one", true, false, 0, ErrNotHolder, "", 0, 0},
		{"forced exit without a lock", "one", true, true, 0, nil, "", 0, 0},
		{"first", "one", false, false, 0, nil, "one", 0, 0},
		{"another", "two", false, false, 599 * time.Second, ErrLocked, "one", 0, 0},
		{"again renews", "one", false, false, 599 * time.Second, nil, "one", 0, 599 * time.Second},
		{"another within the renewed lease", "two", false, false, 1198 * time.Second, ErrLocked, "one", 0, 599 * time.Second},
		{"clock set back frees nothing", "two", false, false, -time.Hour, ErrLocked, "one", 0, 599 * time.Second},
		{"lease ran out", "two", false, false, 1199 * time.Second, nil, "two", 1199 * time.Second, 1199 * time.Second},
		{"exit by another", "one", true, false, 1200 * time.Second, ErrNotHolder, "two", 1199 * time.Second, 1199 * time.Second},
		{"by force", "three", false, true, 1201 * time.Second, nil, "three", 1201 * time.Second, 1201 * time.Second},
		{"renewed after the clock was set back", "three", false, false, -time.Hour, nil, "three", 1201 * time.Second, -time.Hour},
		{"and the lease is whole", "two", false, false, -time.Hour + 599*time.Second, ErrLocked, "three", 1201 * time.Second, -time.Hour},
		{"exit", "three", true, false, 0, nil, "", 0, 0},
		{"next", "two", false, false, 0, nil, "two", 0, 0},
		{"forced exit", "one", true, true, 0, nil, "", 0, 0},
	}
	for _, s := range steps {
		var err error
		if s.exit {
			err = d.ExitUpgrading(t.Context(), s.owner, s.force)
		} else {
			var lock Lock
			lock, err = d.EnterUpgrading(t.Context(), s.owner, s.force, start.Add(s.at))
			if err == nil && (lock.Owner != s.owner || !lock.AcquiredAt.Equal(start.Add(s.held))) {
				t.Errorf("%s: lock %+v", s.name, lock)
			}
		}
		if !errors.Is(err, s.err) {
			t.Errorf("%s: error %v, want %v", s.name, err, s.err)
		}
		if locked, is := errors.AsType[*LockedError](err); is && (locked.Age < 0 || locked.Idle < 0 || locked.Holder.Owner != s.holder) {
			t.Errorf("%s: %+v, want the holder %s and ages not below 0", s.name, locked, s.holder)
		}
		if err != nil {
			wantCode(t, err, tako.CodeConflict)
		}
		mode, lock, err := d.Mode(t.Context())
		ok(t, err)
		switch {
		case s.holder == "":
			if mode != tako.ModeNormal || lock != nil {
				t.Errorf("%s: then %s, %+v, want normal", s.name, mode, lock)
			}
		case mode != tako.ModeUpgrading || lock == nil:
			t.Errorf("%s: then %s, %+v, want upgrading by %s", s.name, mode, lock, s.holder)
		case *lock != Lock{s.holder, start.Add(s.held), start.Add(s.renewed)}:
			t.Errorf("%s: then %+v, want %s since %s, renewed %s", s.name, *lock, s.holder, s.held, s.renewed)
		}
	}
	_, err := d.EnterUpgrading(t.Context(), strings.Repeat("x", MaxOwner+1), false, start)
	wantCode(t, err, tako.CodeInvalid)
}

// The clock jumps; the uptime of a boot does not.
func TestLeaseIsCountedByTheUptimeOfTheBoot(t *testing.T) {
	dir := t.TempDir()
	var d *DB
	var wall, up time.Duration
	boot := "one"
	o := options(dir)
	o.Now = func() time.Time { return start.Add(wall) }
	o.Uptime = func() (string, time.Duration) { return boot, up }
	open := func() {
		t.Helper()
		var err error
		d, err = Open(t.Context(), o)
		ok(t, err)
	}
	open()
	enter := func(owner string) (Lock, error) { return d.EnterUpgrading(t.Context(), owner, false, o.Now()) }
	held := func(what string, age, idle time.Duration) {
		t.Helper()
		_, err := enter("other")
		locked, is := errors.AsType[*LockedError](err)
		if !is || locked.Age != age || locked.Idle != idle {
			t.Fatalf("%s: %+v, want held for %s, renewed %s ago", what, err, age, idle)
		}
		_, lock, err := d.Mode(t.Context())
		ok(t, err)
		if lock == nil || lock.Age(o.Now()) != age || lock.Idle(o.Now()) != idle {
			t.Fatalf("%s: the mode has %+v, want %s and %s", what, lock, age, idle)
		}
	}
	_, err := enter("me")
	ok(t, err)
	wall, up = wall+time.Hour, up+time.Minute
	held("set forward by 59 minutes", time.Minute, time.Minute)
	_, err = enter("me")
	ok(t, err)
	wall, up = wall-48*time.Hour, up+time.Minute
	held("renewed, then set back by two days", 2*time.Minute, time.Minute)
	closeDB(t, d)
	open()
	held("and after a restart of the server", 2*time.Minute, time.Minute)
	up += UpgradeLease - time.Minute - 1*time.Millisecond
	held("a moment before its end", UpgradeLease+time.Minute-time.Millisecond, UpgradeLease-time.Millisecond)
	up += time.Millisecond
	lock, err := enter("third")
	if err != nil || !lock.AcquiredAt.Equal(o.Now()) {
		t.Fatalf("after its end: %+v, %v", lock, err)
	}

	boot, up = "two", time.Second // the machine restarts: only the clock is left
	wall += time.Minute
	held("in the next boot", time.Minute, time.Minute)
	_, err = enter("third")
	ok(t, err)
	up, wall = up+time.Minute, wall+time.Hour
	held("renewed in the next boot", 2*time.Minute, time.Minute)

	// Another version renews it and knows nothing of uptimes.
	up = time.Hour
	_, err = d.sql.Exec(`UPDATE upgrade_lock SET renewed_at_ms = ?`, o.Now().Add(-time.Second).UnixMilli())
	ok(t, err)
	if _, err := enter("me"); !errors.Is(err, ErrLocked) {
		t.Fatalf("renewed by another version a second ago: %v", err)
	}
	closeDB(t, d)
}

func TestServerValues(t *testing.T) {
	d := openIn(t, t.TempDir())
	if v, err := d.ServerValue(t.Context(), "id"); v != nil || err != nil {
		t.Errorf("unset value: %q, %v", v, err)
	}
	for _, want := range []string{"abc", "", strings.Repeat("x", MaxServerValue)} {
		ok(t, d.SetServerValue(t.Context(), "id", []byte(want)))
		if v, err := d.ServerValue(t.Context(), "id"); string(v) != want || v == nil || err != nil {
			t.Errorf("value of %d bytes came back with %d, %v", len(want), len(v), err)
		}
	}
	if err := d.SetServerValue(t.Context(), "id", make([]byte, MaxServerValue+1)); err == nil {
		t.Error("a value beyond MaxServerValue was taken")
	}
}

func TestFilesAreForTheirOwnerAlone(t *testing.T) {
	dir := t.TempDir()
	for _, umask := range []int{0, 0o777} {
		old := syscall.Umask(umask)
		d, err := Open(t.Context(), options(filepath.Join(dir)))
		if err == nil {
			err = d.SaveApp(t.Context(), blog())
		}
		if err == nil && umask == 0 {
			_, err = d.Backup(t.Context())
		}
		syscall.Umask(old)
		ok(t, err)
		n := 0
		ok(t, filepath.WalkDir(dir, func(path string, e os.DirEntry, err error) error {
			if err != nil || e.IsDir() {
				return err
			}
			n++
			if fi, err := e.Info(); err != nil || fi.Mode().Perm() != 0o600 {
				t.Errorf("umask %o: %s has mode %v, %v", umask, path, fi.Mode(), err)
			}
			return nil
		}))
		if n != 5 { // database, wal, shm, reserve, backup
			t.Errorf("%d files, want 5", n)
		}
		closeDB(t, d)
		ok(t, os.Chmod(options(dir).Path, 0o644)) // somebody's mistake is mended
	}
}

func TestConnectionIsSetForDurability(t *testing.T) {
	d := openIn(t, t.TempDir())
	for pragma, want := range map[string]string{
		"journal_mode": "wal", "synchronous": "2", "foreign_keys": "1", "busy_timeout": "5000",
		"trusted_schema": "0", "cell_size_check": "1", "temp_store": "2",
	} {
		var got string
		ok(t, d.sql.QueryRow("PRAGMA "+pragma).Scan(&got))
		if got != want {
			t.Errorf("%s = %s, want %s", pragma, got, want)
		}
	}
}

func TestManyCallersAtOnce(t *testing.T) {
	d := openIn(t, t.TempDir())
	ctx, cancel := context.WithCancel(t.Context())
	var loop, wg sync.WaitGroup
	loop.Go(func() { d.BackupLoop(ctx) })
	for i := range 8 {
		wg.Go(func() {
			id := tako.AppID(fmt.Sprintf("app%d", i))
			for n := range 10 {
				a := App{ID: id, Release: tako.ReleaseID(fmt.Sprint(n)), Path: "/a", Routes: []string{string(id) + ".example.com"}}
				var err error
				if a.UID, err = d.AllocateUID(ctx, id, 70000, 70010); err != nil {
					t.Error(err)
				}
				if a.BasePort, err = d.AllocatePorts(ctx, id, 20000, 20100, 4); err != nil {
					t.Error(err)
				}
				if err := d.SaveApp(ctx, a); err != nil {
					t.Error(err)
				}
				if _, err := d.Apps(ctx); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	if path, err := d.Backup(ctx); err != nil {
		t.Errorf("Backup: %s, %v", path, err)
	}
	cancel()
	loop.Wait()
	apps, err := d.Apps(t.Context())
	ok(t, err)
	seen := map[any]bool{}
	for _, a := range apps {
		if seen[a.UID] || seen[a.BasePort] || a.Release != "9" {
			t.Errorf("app %+v shares a uid or port, or is old", a)
		}
		seen[a.UID], seen[a.BasePort] = true, true
	}
	if len(apps) != 8 {
		t.Errorf("%d apps, want 8", len(apps))
	}
}

func TestCallEndsWithItsContext(t *testing.T) {
	d := openIn(t, t.TempDir())
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := d.SaveApp(ctx, blog()); !errors.Is(err, context.Canceled) {
		t.Errorf("SaveApp = %v, want canceled", err)
	}
	wantApps(t, d)
	ok(t, d.SaveApp(t.Context(), blog()))
}

// rawSQL runs statements on a database file that nobody has open.
func rawSQL(t testing.TB, path string, statements ...string) {
	t.Helper()
	db, err := sql.Open("sqlite", path)
	ok(t, err)
	defer db.Close()
	db.SetMaxOpenConns(1)
	for _, s := range statements {
		if _, err := db.Exec(s); err != nil {
			t.Fatalf("%s: %v", s, err)
		}
	}
}
