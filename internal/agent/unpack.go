package agent

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"tako/internal/agent/launch"
	"tako/internal/archive"
	"tako/internal/ipc"
	"tako/internal/tako"
	"tako/internal/wire"
)

// UnpackName is argv[0] of the helper that unpacks archives.
const UnpackName = "tako-unpack"

// incoming begins the name of a folder that is being unpacked into. What a crash
// leaves behind under such a name is removed by the next Unpack or Tree of the app.
const incoming = ".incoming-"

// removeTimeout bounds the removal of a part of an archive.
const removeTimeout = 30 * time.Second

// unpackWork is what the helper is asked: to unpack into Dir/Temp and rename it
// to Dir/Name, or to remove Dir/Temp if Name is empty.
type unpackWork struct {
	Dir, Temp, Name string
	Limits          archive.Limits
	Stale           stale
}

// unpacks are the folders that are being unpacked into, by path.
type unpacks struct {
	mu    sync.Mutex
	paths map[string]bool
}

func (u *unpacks) begin(path string) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.paths == nil {
		u.paths = make(map[string]bool)
	}
	u.paths[path] = true
}

func (u *unpacks) end(path string) {
	u.mu.Lock()
	defer u.mu.Unlock()
	delete(u.paths, path)
}

// stale is what an Unpack that was cut off has left in the folder Dir: what looks
// like it, was there Before, and is none of Live.
type stale struct {
	Dir    string
	Live   []string // paths
	Before time.Time
}

// staleIn says what is stale in dir, from now on.
func (u *unpacks) staleIn(dir string) stale {
	u.mu.Lock()
	defer u.mu.Unlock()
	return stale{Dir: dir, Live: slices.Collect(maps.Keys(u.paths)), Before: time.Now()}
}

// remove removes it. What cannot be removed stays for the next time.
func (s stale) remove() {
	entries, err := os.ReadDir(s.Dir)
	if err != nil {
		return
	}
	for _, e := range entries {
		path := filepath.Join(s.Dir, e.Name())
		if !e.IsDir() || !strings.HasPrefix(e.Name(), incoming) || slices.Contains(s.Live, path) {
			continue
		}
		if fi, err := e.Info(); err == nil && fi.ModTime().Before(s.Before) {
			_ = os.RemoveAll(path)
		}
	}
}

// checkUnpack refuses what no correct master sends.
func (a *agent) checkUnpack(m *wire.Unpack) error {
	_, err := tako.ParseReleaseID(m.Name)
	if err != nil || !clean(m.Dir) || m.MaxBytes <= 0 || m.MaxFiles <= 0 || m.TimeoutMS <= 0 {
		return fmt.Errorf("%w: unpack %q of %s into %q, at most %d bytes, %d files, %d ms", ipc.ErrProtocol, m.Name, m.App, m.Dir, m.MaxBytes, m.MaxFiles, m.TimeoutMS)
	}
	return a.checkUser(m.User)
}

// unpack has a helper without powers unpack an archive: the owner of the data
// root, in the app's group, so that the files are born in that group.
func (a *agent) unpack(ctx context.Context, m *wire.Unpack, input ipc.FD) (any, error) {
	limit := time.Duration(m.TimeoutMS) * time.Millisecond
	ctx, cancel := context.WithTimeoutCause(ctx, limit, fmt.Errorf("not done within %s", limit))
	defer cancel()
	var id *launch.Identity
	if m.User.UID != 0 {
		id = &launch.Identity{UID: a.settings.Owner, GID: m.User.GID}
	}
	work := unpackWork{
		Dir: m.Dir, Temp: incoming + rand.Text(), Name: m.Name,
		Limits: archive.Limits{MaxBytes: m.MaxBytes, MaxFiles: m.MaxFiles},
	}
	temp := filepath.Join(work.Dir, work.Temp)
	a.unpacks.begin(temp)
	defer a.unpacks.end(temp)
	work.Stale = a.unpacks.staleIn(m.Dir)
	var got wire.Unpacked
	err := launch.Help(ctx, UnpackName, id, work, input, &got)
	if err == nil {
		return &got, nil
	}
	if _, answered := errors.AsType[*tako.Error](err); !answered { // killed, or crashed: it could not remove its part
		work.Name = ""
		ctx, cancel := context.WithTimeout(context.WithoutCancel(a.work), removeTimeout)
		defer cancel()
		err = errors.Join(err, launch.Help(ctx, UnpackName, id, work, 0, &wire.Unpacked{}))
		return nil, tako.Errorf(tako.CodeFailed, "unpack release %s: %s", m.Name, err)
	}
	return nil, err
}

// unpackHelper is the helper UnpackName.
func unpackHelper(request []byte, input *os.File) (any, error) {
	var work unpackWork
	if err := json.Unmarshal(request, &work); err != nil {
		return nil, err
	}
	temp := filepath.Join(work.Dir, work.Temp)
	if work.Name == "" {
		return wire.Unpacked{}, os.RemoveAll(temp)
	}
	work.Stale.remove()
	stats, err := unpackInto(temp, filepath.Join(work.Dir, work.Name), input, work.Limits)
	if err != nil {
		return nil, errors.Join(err, os.RemoveAll(temp))
	}
	return wire.Unpacked{Files: stats.Files, Bytes: stats.Bytes}, nil
}

func unpackInto(temp, final string, input *os.File, limits archive.Limits) (archive.Stats, error) {
	if err := os.Mkdir(temp, modePrivate); err != nil {
		return archive.Stats{}, fmt.Errorf("make a folder to unpack into: %w", err)
	}
	stats, err := archive.Unpack(context.Background(), input, temp, limits)
	if err != nil {
		return stats, err
	}
	if err := os.Chmod(temp, modeRelease); err != nil {
		return stats, err
	}
	err = unix.Renameat2(unix.AT_FDCWD, temp, unix.AT_FDCWD, final, unix.RENAME_NOREPLACE)
	if errors.Is(err, os.ErrExist) {
		return stats, tako.Errorf(tako.CodeConflict, "release %s is there already: choose another version", filepath.Base(final))
	}
	if err != nil {
		return stats, fmt.Errorf("rename the unpacked release: %w", err)
	}
	dir, err := os.Open(filepath.Dir(final))
	if err != nil {
		return stats, err
	}
	defer dir.Close() // only synced
	return stats, dir.Sync()
}

// Stage does the work of a second stage if this program was started as one, and
// then exits. It is the first statement of main.
func Stage() {
	switch launch.IsHelper(os.Args) {
	case launch.ExecName:
		launch.Exec()
	case TreeName:
		launch.Helper(os.Args, treeHelper)
	case UnpackName:
		launch.Helper(os.Args, unpackHelper)
	case launch.SweepName:
		launch.Helper(os.Args, launch.Sweep)
	default:
		return
	}
	os.Exit(wire.ExitFailed) //nolint:forbidigo // it stands for main here; whatever it was, it is told
}
