package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"tako/internal/agent/launch"
	"tako/internal/ipc"
	"tako/internal/logging"
	"tako/internal/tako"
	"tako/internal/wire"
)

// TreeTimeout bounds the work on one app's folders.
const TreeTimeout = 20 * time.Second

// Modes of folders. The sticky bit of an opened one keeps its guest from moving
// or removing what others have in it.
const (
	modeApp        = 0o710
	modeAppOpen    = unix.S_ISVTX | 0o770
	modeApps       = 0o711 // of the folder of all socket folders
	modeAppsOpen   = unix.S_ISVTX | 0o771
	modeReleases   = 0o710
	modeRelease    = 0o750
	modeInstalling = 0o770
	modePrivate    = 0o700
	modeShared     = 0o710
	modeLogs       = unix.S_ISGID | 0o770
	modeSockets    = unix.S_ISGID | 0o770
)

// A folder is one to make or mend: it shall be a directory of whoever does it.
type folder struct {
	Path string
	Mode uint32
	// Group it shall belong to; 0: leave it.
	Group uint32
	// Exists: it is not to be made.
	Exists bool
}

// checkTree refuses what no correct master sends.
func (a *agent) checkTree(m *wire.Tree) error {
	bad := func(format string, args ...any) error {
		return fmt.Errorf("%w: tree of %s: %s", ipc.ErrProtocol, m.App, fmt.Sprintf(format, args...))
	}
	if !clean(m.AppDir) || !clean(m.RunDir) {
		return bad("folders %q and %q", m.AppDir, m.RunDir)
	}
	if m.Release != "" {
		if _, err := tako.ParseReleaseID(m.Release); err != nil {
			return bad("release %q", m.Release)
		}
	}
	return a.checkUser(m.User)
}

// checkUser refuses a user that no app of this server can have.
func (a *agent) checkUser(u wire.User) error {
	lo, hi := a.settings.MinAppUID, a.settings.MaxAppUID
	in := func(id uint32) bool { return lo != 0 && id >= lo && id <= hi }
	if u == (wire.User{}) && lo == 0 || in(u.UID) && in(u.GID) {
		return nil
	}
	return fmt.Errorf("%w: user %d:%d is not one that apps run as (%d to %d)", ipc.ErrProtocol, u.UID, u.GID, lo, hi)
}

// makeTree makes or mends an app's folders.
//
// With a user per app three helpers do it, each without any powers, so that
// nobody needs to give a folder away. The owner of the data root, who is for once
// in the app's group too, makes what is its own, and lets that group into the
// parents of the app's folders; the app's user makes its folders there; the owner
// shuts the parents again. They are open for the app only in that time, and only
// if something is missing: on an app's first Tree, when none of its processes
// runs yet. Were one running, the sticky bit would still keep it from moving or
// removing anything of the owner's.
func (a *agent) makeTree(m *wire.Tree) error {
	a.trees.Lock()
	defer a.trees.Unlock()
	ctx, cancel := context.WithTimeoutCause(a.work, TreeTimeout, fmt.Errorf("not done within %s", TreeTimeout))
	defer cancel()
	if m.Beside {
		return a.treeError(m, a.makeRunDir(ctx, m))
	}
	left := a.unpacks.staleIn(filepath.Join(m.AppDir, "releases"))
	if m.User.UID == 0 {
		left.remove()
		return a.treeError(m, mendAll(ownersFolders(m, 0, modePrivate), appsFolders(m, 0)))
	}
	agentGID := uint32(os.Getegid()) // a group is 32 bits
	instances := filepath.Dir(m.RunDir)
	own := treeWork{Folders: ownersFolders(m, agentGID, modeLogs), Stale: left, Missing: []string{
		filepath.Join(m.AppDir, "data"), filepath.Join(m.AppDir, "tmp"), m.RunDir,
	}, Open: []folder{
		{Path: m.AppDir, Mode: modeAppOpen, Group: m.User.GID, Exists: true},
		{Path: instances, Mode: modeAppsOpen, Group: m.User.GID, Exists: true},
	}}
	shut := []folder{
		{Path: m.AppDir, Mode: modeApp, Group: m.User.GID, Exists: true},
		{Path: instances, Mode: modeApps, Group: a.settings.OwnerGroup, Exists: true},
	}
	return a.treeError(m, a.makeTogether(ctx, m, own, appsFolders(m, a.settings.InstanceGroup), shut))
}

// makeRunDir makes the folder of an app's sockets alone.
func (a *agent) makeRunDir(ctx context.Context, m *wire.Tree) error {
	all := appsFolders(m, a.settings.InstanceGroup)
	run := all[len(all)-1:]
	if m.User.UID == 0 {
		return mendAll(run)
	}
	instances := filepath.Dir(m.RunDir)
	own := treeWork{Missing: []string{m.RunDir}, Open: []folder{{Path: instances, Mode: modeAppsOpen, Group: m.User.GID, Exists: true}}}
	return a.makeTogether(ctx, m, own, run, []folder{{Path: instances, Mode: modeApps, Group: a.settings.OwnerGroup, Exists: true}})
}

// makeTogether has the owner do own, the app's user make apps, and the owner shut
// what it opened for that.
func (a *agent) makeTogether(ctx context.Context, m *wire.Tree, own treeWork, apps, shut []folder) error {
	owner := &launch.Identity{UID: a.settings.Owner, GID: a.settings.OwnerGroup, Groups: groups(m.User.GID, uint32(os.Getegid()))} // a group is 32 bits
	app := &launch.Identity{UID: m.User.UID, GID: m.User.GID, Groups: groups(a.settings.InstanceGroup)}
	var state treeState
	err := launch.Help(ctx, TreeName, owner, own, 0, &state)
	if err == nil {
		err = launch.Help(ctx, TreeName, app, treeWork{Folders: apps}, 0, &treeState{})
	}
	if state.Opened {
		// Also after a fault, and with a time of its own.
		ctx, cancel := context.WithTimeout(context.WithoutCancel(a.work), TreeTimeout)
		defer cancel()
		err = errors.Join(err, launch.Help(ctx, TreeName, owner, treeWork{Folders: shut}, 0, &treeState{}))
	}
	return err
}

// groups leaves out 0: nobody is put into root's group.
func groups(ids ...uint32) []uint32 {
	return slices.DeleteFunc(ids, func(g uint32) bool { return g == 0 })
}

// treeError makes an answer of an error: what is wrong with the disk is for the
// operator to mend.
func (a *agent) treeError(m *wire.Tree, err error) error {
	if err == nil {
		return nil
	}
	a.log.Error("folders of an app are not as they should be", logging.App, string(m.App), logging.Reason, err.Error())
	return tako.Errorf(tako.CodeFailed, "folders of app %s: %s", m.App, err)
}

// ownersFolders are those of the owner of the data root. agentGID is the group
// of the logs.
func ownersFolders(m *wire.Tree, agentGID, logs uint32) []folder {
	gid := m.User.GID
	list := []folder{
		{Path: m.AppDir, Mode: modeApp, Group: gid, Exists: true},
		{Path: filepath.Join(m.AppDir, "releases"), Mode: modeReleases, Group: gid},
		{Path: filepath.Join(m.AppDir, "shared"), Mode: modeShared, Group: gid},
		{Path: filepath.Join(m.AppDir, "shared", "logs"), Mode: logs, Group: agentGID},
	}
	if m.Release != "" {
		f := folder{Path: filepath.Join(m.AppDir, "releases", m.Release), Mode: modeRelease, Group: gid, Exists: true}
		if m.Installing {
			f.Mode = modeInstalling
		}
		list = append(list, f)
	}
	return list
}

// appsFolders are those of the app's user; its socket folder also of group.
func appsFolders(m *wire.Tree, group uint32) []folder {
	sockets := uint32(modePrivate)
	if group != 0 {
		sockets = modeSockets
	}
	return []folder{
		{Path: filepath.Join(m.AppDir, "data"), Mode: modePrivate},
		{Path: filepath.Join(m.AppDir, "tmp"), Mode: modePrivate},
		{Path: m.RunDir, Mode: sockets, Group: group},
	}
}

// TreeName is argv[0] of the helper that makes folders.
const TreeName = "tako-tree"

// treeWork is what the helper is asked.
type treeWork struct {
	Folders []folder
	// If any of Missing is not there, Open are mended after Folders.
	Missing []string
	Open    []folder
	// Stale is removed first.
	Stale stale
}

// treeState is what it answers.
type treeState struct {
	Opened bool
}

// treeHelper is the helper TreeName.
func treeHelper(request []byte, _ *os.File) (any, error) {
	var work treeWork
	if err := json.Unmarshal(request, &work); err != nil {
		return nil, err
	}
	work.Stale.remove()
	if err := mendAll(work.Folders); err != nil {
		return nil, err
	}
	for _, path := range work.Missing {
		if _, err := os.Lstat(path); !errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err := mendAll(work.Open); err != nil {
			return nil, err
		}
		return treeState{Opened: true}, nil
	}
	return treeState{}, nil
}

func mendAll(lists ...[]folder) error {
	for _, list := range lists {
		for _, f := range list {
			if err := f.mend(); err != nil {
				return err
			}
		}
	}
	return nil
}

// mend makes the folder, or gives it its mode and group. It follows no link at
// its end, and refuses what belongs to another user.
func (f folder) mend() error {
	if !f.Exists {
		if err := os.Mkdir(f.Path, modePrivate); err != nil && !errors.Is(err, os.ErrExist) {
			return err
		}
	}
	fd, err := unix.Open(f.Path, unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open folder %s: %w", f.Path, err)
	}
	defer ipc.FD(fd).Close()
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return fmt.Errorf("folder %s: %w", f.Path, err)
	}
	if me := os.Geteuid(); int(st.Uid) != me {
		return fmt.Errorf("folder %s belongs to user %d, not to %d: run chown %d %s", f.Path, st.Uid, me, me, f.Path)
	}
	by := "/proc/self/fd/" + strconv.Itoa(fd) // O_PATH: the folder may be shut even to us
	if f.Group != 0 && st.Gid != f.Group {
		if err := unix.Chown(by, -1, int(f.Group)); err != nil {
			return fmt.Errorf("give folder %s to group %d: %w", f.Path, f.Group, err)
		}
	}
	if st.Mode&0o7777 != f.Mode || f.Group != 0 && st.Gid != f.Group {
		if err := unix.Chmod(by, f.Mode); err != nil {
			return fmt.Errorf("set the mode of folder %s to %o: %w", f.Path, f.Mode, err)
		}
	}
	return nil
}
