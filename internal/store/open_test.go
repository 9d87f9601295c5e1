package store

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/go-hclog"

	"tako/internal/tako"
)

func TestNewerDatabaseIsRefusedAndUntouched(t *testing.T) {
	dir := t.TempDir()
	o := options(dir)
	closeDB(t, openIn(t, dir))
	rawSQL(t, o.Path, `INSERT INTO schema_changes VALUES (99, 'later', 0, '9.9.9')`, `PRAGMA user_version = 99`)
	before, err := os.ReadFile(o.Path)
	ok(t, err)
	_, err = Open(t.Context(), o)
	if !errors.Is(err, ErrNewerSchema) {
		t.Fatalf("Open = %v, want ErrNewerSchema", err)
	}
	for _, part := range []string{"99", "9.9.9", "1.2.3", "10", o.BackupDir, "install the newer tako"} {
		if !strings.Contains(err.Error(), part) {
			t.Errorf("%q does not name %q", err, part)
		}
	}
	if after, err := os.ReadFile(o.Path); err != nil || !bytes.Equal(before, after) {
		t.Errorf("the file changed (%v)", err)
	}
}

func TestForeignDatabaseIsRefused(t *testing.T) {
	o := options(t.TempDir())
	rawSQL(t, o.Path, `CREATE TABLE t (x)`)
	if _, err := Open(t.Context(), o); !errors.Is(err, ErrNotOurs) {
		t.Errorf("Open = %v, want ErrNotOurs", err)
	}
}

// damages are what may happen to the file between two starts.
var damages = map[string]func(t testing.TB, path string){
	"bytes flipped in the middle": func(t testing.TB, path string) {
		b, err := os.ReadFile(path)
		ok(t, err)
		for i := len(b)/2 - 3000; i < len(b)/2+3000; i++ {
			b[i] ^= 0x5a
		}
		ok(t, os.WriteFile(path, b, 0o600))
	},
	"half the file": func(t testing.TB, path string) {
		fi, err := os.Stat(path)
		ok(t, err)
		ok(t, os.Truncate(path, fi.Size()/2))
	},
	"a bit of the header": func(t testing.TB, path string) { ok(t, os.Truncate(path, 50)) },
	"empty":               func(t testing.TB, path string) { ok(t, os.Truncate(path, 0)) },
	"missing":             func(t testing.TB, path string) { ok(t, os.Remove(path)) },
	"not a database": func(t testing.TB, path string) {
		ok(t, os.WriteFile(path, bytes.Repeat([]byte("no database "), 999), 0o600))
	},
	"a name no parser makes": func(t testing.TB, path string) {
		rawSQL(t, path, `PRAGMA foreign_keys = 0`, `UPDATE apps SET name = 'bl/g'`)
	},
	"a schema without its tables": func(t testing.TB, path string) { rawSQL(t, path, `DROP TABLE routes`) },
}

func TestDamagedFileIsReplacedByTheNewestGoodBackup(t *testing.T) {
	for name, damage := range damages {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			o := options(dir)
			now := start
			o.Now = func() time.Time { return now }
			d, err := Open(t.Context(), o)
			ok(t, err)
			a := blog()
			ok(t, d.SaveApp(t.Context(), a))
			good, err := d.Backup(t.Context())
			ok(t, err)
			ok(t, d.SetStopped(t.Context(), "blog", true))
			now = now.Add(time.Hour)
			bad, err := d.Backup(t.Context())
			ok(t, err)
			closeDB(t, d)
			damages["half the file"](t, bad) // the older must do
			damage(t, o.Path)

			var log bytes.Buffer
			o.Log = hclog.New(&hclog.LoggerOptions{Output: &log})
			d, err = Open(t.Context(), o)
			ok(t, err)
			defer closeDB(t, d)
			wantApps(t, d, a)
			if from, restored := d.Restored(); !restored || from != good {
				t.Errorf("Restored = %s, %v, want %s", from, restored, good)
			}
			if last, err := d.LastRestore(t.Context()); err != nil || last == nil || last.Backup != good || !last.At.Equal(now) || (last.Damaged == "") != (name == "missing") {
				t.Errorf("LastRestore = %+v, %v", last, err)
			}
			for _, part := range []string{"[ERROR]", good, bad} {
				if !strings.Contains(log.String(), part) {
					t.Errorf("the log does not say %q:\n%s", part, &log)
				}
			}
			aside := o.Path + ".damaged-" + strconv.FormatInt(now.Unix(), 10)
			if _, err := os.Stat(aside); (err != nil) != (name == "missing") {
				t.Errorf("the damaged file: %v", err)
			}
			ok(t, d.SaveApp(t.Context(), a))
		})
	}
}

func TestDamagedFileWithoutBackupIsNoEmptyStart(t *testing.T) {
	for name, damage := range damages {
		if name == "missing" { // is a first start
			continue
		}
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			o := options(dir)
			d := openIn(t, dir)
			ok(t, d.SaveApp(t.Context(), blog()))
			closeDB(t, d)
			damage(t, o.Path)
			before, err := os.ReadFile(o.Path)
			ok(t, err)
			for range 2 { // the second start is no different
				_, err = Open(t.Context(), o)
				if !errors.Is(err, ErrDamaged) || !strings.Contains(err.Error(), "put a good backup in its place") {
					t.Fatalf("Open = %v, want ErrDamaged and what to do", err)
				}
			}
			if after, err := os.ReadFile(o.Path); err != nil || !bytes.Equal(before, after) {
				t.Errorf("the damaged file changed (%v)", err)
			}
		})
	}
}

func TestLogWithoutItsDatabaseIsNoEmptyStart(t *testing.T) {
	o := options(t.TempDir())
	ok(t, os.WriteFile(o.Path+"-wal", []byte("x"), 0o600))
	if _, err := Open(t.Context(), o); !errors.Is(err, ErrDamaged) {
		t.Errorf("Open = %v, want ErrDamaged", err)
	}
}

func TestSevenBackupsAreKept(t *testing.T) {
	dir := t.TempDir()
	o := options(dir)
	now := start
	o.Now = func() time.Time { return now }
	d, err := Open(t.Context(), o)
	ok(t, err)
	defer closeDB(t, d)
	for range BackupsKept + 3 {
		now = now.Add(BackupEvery)
		_, err := d.Backup(t.Context())
		ok(t, err)
	}
	now = start // the clock is set back
	back, err := d.Backup(t.Context())
	ok(t, err)
	names, err := d.listBackups()
	ok(t, err)
	if len(names) != BackupsKept || names[6] != filepath.Base(back) || names[5] != "runtime-state-20260311-120000.sqlite3" {
		t.Errorf("backups %v, want %d, the last of them %s", names, BackupsKept, back)
	}
}

func TestNewestBackupIsTheOneMadeLastWhateverTheClockSaid(t *testing.T) {
	dir := t.TempDir()
	o := options(dir)
	now := start
	o.Now = func() time.Time { return now }
	d, err := Open(t.Context(), o)
	ok(t, err)
	a := blog()
	for _, jump := range []time.Duration{0, 1000 * time.Hour, -900 * time.Hour, 0, -5000 * time.Hour, time.Minute} {
		now = now.Add(jump)
		a.Instances++
		ok(t, d.SaveApp(t.Context(), a))
		_, err := d.Backup(t.Context())
		ok(t, err)
	}
	closeDB(t, d)
	ok(t, os.Remove(o.Path))
	d, err = Open(t.Context(), o)
	ok(t, err)
	defer closeDB(t, d)
	wantApps(t, d, a)
	last, err := d.LastRestore(t.Context())
	ok(t, err)
	if last == nil || last.Damaged != "" || !last.At.Equal(now) {
		t.Errorf("LastRestore = %+v, want one of a missing file at %s", last, now)
	}
}

func TestStartsInARowMakeNoBackupEach(t *testing.T) {
	dir := t.TempDir()
	o := options(dir)
	now := start
	o.Now = func() time.Time { return now }
	d, err := Open(t.Context(), o)
	ok(t, err)
	defer closeDB(t, d)
	if due := d.backupDue(); due != 0 {
		t.Errorf("the first is due in %s", due)
	}
	made, err := d.Backup(t.Context())
	ok(t, err)
	for _, c := range []struct {
		name  string
		now   time.Duration // after the time in the name
		wrote time.Duration // before now
		want  time.Duration
	}{
		{"just made", time.Second, time.Second, BackupEvery - time.Second},
		{"old", 30 * time.Hour, 30 * time.Hour, 0},
		{"named after the future, written an hour ago", -time.Minute, time.Hour, BackupEvery - time.Hour},
		{"named after the future, written two days ago", -1000 * time.Hour, 48 * time.Hour, 0},
		{"written in the future too", -time.Hour, -time.Hour, BackupRetry},
	} {
		now = start.Add(c.now)
		ok(t, os.Chtimes(made, now, now.Add(-c.wrote)))
		if due := d.backupDue(); due != c.want {
			t.Errorf("%s: due in %s, want %s", c.name, due, c.want)
		}
	}
}

func TestBackupLoopBacksUpEachDay(t *testing.T) {
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		o := options(dir)
		o.Now = time.Now
		d, err := Open(t.Context(), o)
		ok(t, err)
		defer closeDB(t, d)
		count := func() int {
			names, err := d.listBackups()
			ok(t, err)
			return len(names)
		}
		done := make(chan struct{})
		go func() { d.BackupLoop(t.Context()); close(done) }()
		for _, s := range []struct {
			wait time.Duration
			want int
		}{{time.Second, 1}, {BackupEvery - 2*time.Second, 1}, {2 * time.Second, 2}, {3 * BackupEvery, 5}} {
			time.Sleep(s.wait)
			synctest.Wait()
			if n := count(); n != s.want {
				t.Errorf("after %s more: %d backups, want %d", s.wait, n, s.want)
			}
		}
	})
}

// The shape of tako-server's database.
var original = []string{
	`PRAGMA journal_mode = WAL`,
	`CREATE TABLE schema_meta (id INTEGER PRIMARY KEY CHECK (id = 1), schema_version INTEGER NOT NULL, min_binary_version TEXT NOT NULL, created_by TEXT NOT NULL)`,
	`INSERT INTO schema_meta VALUES (1, 2, '0.0.1', 'tako-server')`,
	`CREATE TABLE apps (name TEXT PRIMARY KEY, version TEXT NOT NULL, path TEXT NOT NULL, cwd TEXT NOT NULL, command_json TEXT NOT NULL,
		min_instances INTEGER NOT NULL, max_instances INTEGER NOT NULL, base_port INTEGER NOT NULL, idle_timeout_secs INTEGER NOT NULL)`,
	`CREATE TABLE app_routes (app_name TEXT NOT NULL REFERENCES apps (name) ON DELETE CASCADE, route TEXT NOT NULL, PRIMARY KEY (app_name, route))`,
	`CREATE TABLE server_state (id INTEGER PRIMARY KEY CHECK (id = 1), server_mode TEXT NOT NULL)`,
	`CREATE TABLE upgrade_lock (id INTEGER PRIMARY KEY CHECK (id = 1), owner TEXT NOT NULL, acquired_at_unix_secs INTEGER NOT NULL)`,
	`INSERT INTO apps VALUES ('blog', 'v7', '/opt/tako/apps/blog/releases/v7', '/opt/tako/apps/blog/releases/v7', '["bun","run"]', 2, 4, 41234, 300),
		('api', 'a1', '/opt/tako/apps/api/releases/a1', '/', '[]', 0, 4, 3000, 60), ('Bad_Name', 'v1', '/x', '/', '[]', 1, 4, 3000, 60)`,
	`INSERT INTO app_routes VALUES ('blog', 'blog.example.com'), ('blog', 'api.example.com'), ('api', 'api.example.com')`,
	`INSERT INTO server_state VALUES (1, 'upgrading')`,
	`INSERT INTO upgrade_lock VALUES (1, 'cli-1', 1700000000)`,
	`PRAGMA user_version = 2`,
}

func TestOriginalDatabaseIsTakenOver(t *testing.T) {
	dir := t.TempDir()
	o := options(dir)
	rawSQL(t, o.Path, original...)
	before, err := os.ReadFile(o.Path)
	ok(t, err)
	var log bytes.Buffer
	o.Log = hclog.New(&hclog.LoggerOptions{Output: &log})
	want := []App{
		{ID: "api", Release: "a1", Path: "/opt/tako/apps/api/releases/a1", BasePort: 3000, IdleTimeout: time.Minute, Routes: []string{"api.example.com"}},
		{
			ID: "blog", Release: "v7", Path: "/opt/tako/apps/blog/releases/v7", Instances: 2, BasePort: 41234, IdleTimeout: 5 * time.Minute,
			Routes: []string{"blog.example.com"},
		},
	}
	for range 2 { // the second start finds ours
		d, err := Open(t.Context(), o)
		ok(t, err)
		wantApps(t, d, want...)
		mode, lock, err := d.Mode(t.Context())
		if err != nil || mode != tako.ModeUpgrading || lock.Owner != "cli-1" || lock.AcquiredAt.Unix() != 1700000000 {
			t.Errorf("mode %s, %+v, %v, want the original's lock", mode, lock, err)
		}
		closeDB(t, d)
	}
	if kept, err := os.ReadFile(o.Path + ".v2-original"); err != nil || !bytes.Equal(kept, before) {
		t.Errorf("the original was not kept as it was: %v", err)
	}
	for _, part := range []string{"Bad_Name", "api.example.com"} {
		if !strings.Contains(log.String(), part) {
			t.Errorf("the log does not name %s:\n%s", part, &log)
		}
	}
}

func TestDamagedOriginalIsNotTakenOver(t *testing.T) {
	o := options(t.TempDir())
	rawSQL(t, o.Path, original...)
	damages["half the file"](t, o.Path)
	if _, err := Open(t.Context(), o); !errors.Is(err, ErrDamaged) {
		t.Errorf("Open = %v, want ErrDamaged", err)
	}
}

// schemaOf returns the statements of a database's schema, and its version.
func schemaOf(t testing.TB, d *DB) string {
	t.Helper()
	rows, err := d.sql.Query(`SELECT sql FROM sqlite_schema WHERE sql IS NOT NULL ORDER BY name`)
	ok(t, err)
	defer rows.Close()
	var b strings.Builder
	for rows.Next() {
		var s string
		ok(t, rows.Scan(&s))
		b.WriteString(s + ";\n")
	}
	ok(t, rows.Err())
	return b.String()
}

// Every released schema is in testdata as it was, with a little data. A change
// to a released migration fails here: write a new one.
func TestEveryOlderSchemaComesUpToDate(t *testing.T) {
	want := schemaOf(t, openIn(t, t.TempDir()))
	files, err := filepath.Glob("testdata/schema-*.sql")
	ok(t, err)
	if len(files) == 0 {
		t.Fatal("no older schemas")
	}
	for _, f := range files {
		text, err := os.ReadFile(f)
		ok(t, err)
		dir := t.TempDir()
		rawSQL(t, options(dir).Path, string(text))
		d := openIn(t, dir)
		if got := schemaOf(t, d); got != want {
			t.Errorf("%s became\n%s\nwant\n%s", f, got, want)
		}
		apps, err := d.Apps(t.Context())
		if err != nil || len(apps) != 1 || apps[0].ID != "blog" || len(apps[0].Routes) != 2 {
			t.Errorf("%s: apps %+v, %v", f, apps, err)
		}
	}
}

func TestSchemaChangeIsOneTransactionAfterABackup(t *testing.T) {
	dir := t.TempDir()
	d := openIn(t, dir)
	ok(t, d.SaveApp(t.Context(), blog()))
	closeDB(t, d)
	all, err := loadMigrations()
	ok(t, err)
	next := migration{version: 11, name: "next", sql: `CREATE TABLE next (x INTEGER) STRICT; INSERT INTO nowhere VALUES (1);`}
	if _, err := open(t.Context(), options(dir), append(slices.Clone(all), next)); err == nil || !strings.Contains(err.Error(), "11 (next)") {
		t.Fatalf("a broken change: %v", err)
	}
	d = openIn(t, dir) // the older program still can
	wantApps(t, d, blog())
	names, err := d.listBackups()
	if err != nil || len(names) != 1 {
		t.Errorf("backups %v, %v, want one from before the change", names, err)
	}
	closeDB(t, d)

	next.sql = `CREATE TABLE next (x INTEGER) STRICT`
	d, err = open(t.Context(), options(dir), append(slices.Clone(all), next))
	ok(t, err)
	defer closeDB(t, d)
	wantApps(t, d, blog())
	var by string
	ok(t, d.sql.QueryRow(`SELECT applied_by FROM schema_changes WHERE version = 11 AND name = 'next'`).Scan(&by))
	if by != "1.2.3" {
		t.Errorf("the change was recorded as made by %q", by)
	}
}

func TestOriginalKilledBeforeItsCheckpointIsTakenOverWhole(t *testing.T) {
	from, o := filepath.Join(t.TempDir(), "db"), options(t.TempDir())
	rawSQL(t, from, original...)
	db, err := dial(from, false)
	ok(t, err)
	_, err = db.Exec(`INSERT INTO apps VALUES ('late', 'v1', '/late', '/', '[]', 1, 4, 3000, 60)`)
	ok(t, err)
	for _, s := range []string{"", "-wal"} { // as a kill leaves them
		b, err := os.ReadFile(from + s)
		ok(t, err)
		if len(b) == 0 {
			t.Fatalf("%s is empty", from+s)
		}
		ok(t, os.WriteFile(o.Path+s, b, 0o600))
	}
	ok(t, db.Close())
	d, err := Open(t.Context(), o)
	ok(t, err)
	defer closeDB(t, d)
	apps, err := d.Apps(t.Context())
	if err != nil || len(apps) != 3 || apps[2].ID != "late" {
		t.Errorf("apps %+v, %v, want late among them", apps, err)
	}
	if version, err := inspect(t.Context(), o.Path+".v2-original", 10); version != originalVersion || err != nil {
		t.Errorf("the kept original: schema %d, %v", version, err)
	}
}
