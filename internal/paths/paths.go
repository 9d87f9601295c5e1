// Package paths names every file and folder that tako uses, from one data root
// and one run directory. It touches none of them.
package paths

import (
	"fmt"
	"path/filepath"
	"strconv"

	"tako/internal/tako"
)

// The defaults of a server.
const (
	DefaultSocket = "/var/run/tako/tako.sock"
	DefaultData   = "/opt/tako"
	SettingsName  = "server-config.toml"
)

// MaxSocketPath is the longest path of a Unix socket, in bytes: sun_path has 108
// and ends in a NUL.
const MaxSocketPath = 107

// Layout is where a server keeps its things. Both folders are absolute.
type Layout struct {
	// Data is the data root: what must survive.
	Data string
	// Run is the run directory: what a restart may lose.
	Run string
	// Socket is the stable path of the management socket.
	Socket string
	// Second is the pid of a server that was started beside the owner of the data
	// root, and 0 for any other: its instances' sockets have a folder of their own.
	Second int
}

// Database is the SQLite file of the runtime state.
func (l Layout) Database() string { return filepath.Join(l.Data, "runtime-state.sqlite3") }

// Backups is the folder of the database's daily backups.
func (l Layout) Backups() string { return filepath.Join(l.Data, "backups") }

// Reserve is the file that is given up for stop and delete on a full disk.
func (l Layout) Reserve() string { return filepath.Join(l.Data, "reserve") }

// Lock is the file whose flock makes a server the one owner of the data root. It
// holds the owner's pid, for people.
func (l Layout) Lock() string { return filepath.Join(l.Data, "lock") }

// Settings is the settings file of a server started without --config.
func (l Layout) Settings() string { return filepath.Join(l.Data, SettingsName) }

// Certs is the folder of certificates: <domain>/fullchain.pem and privkey.pem.
func (l Layout) Certs() string { return filepath.Join(l.Data, "certs") }

// ACME is the folder of ACME accounts.
func (l Layout) ACME() string { return filepath.Join(l.Data, "acme") }

// Apps is the folder of all apps.
func (l Layout) Apps() string { return filepath.Join(l.Data, "apps") }

// App is one app's folder.
func (l Layout) App(app tako.AppID) AppLayout {
	return AppLayout{
		Dir:    filepath.Join(l.Apps(), string(app)),
		RunDir: filepath.Join(l.Instances(), string(app)),
	}
}

// SecondSocket is where the owner of the data root hands its listeners to a
// second server.
func (l Layout) SecondSocket() string { return filepath.Join(l.Data, "second.sock") }

// SecondPrefix begins the name of the folder of a second server's sockets; its
// pid ends it.
const SecondPrefix = "instances-"

// Instances is the folder of the apps' sockets.
func (l Layout) Instances() string {
	if l.Second != 0 {
		return filepath.Join(l.Run, SecondPrefix+strconv.Itoa(l.Second))
	}
	return filepath.Join(l.Run, "instances")
}

// Profiles is the socket on which tako-proxy answers with profiles of itself, if
// it is to.
func (l Layout) Profiles() string {
	if l.Second != 0 {
		return filepath.Join(l.Run, "pprof-"+strconv.Itoa(l.Second)+".sock")
	}
	return filepath.Join(l.Run, "pprof.sock")
}

// PIDSocket is the management socket of one process, beside the stable path,
// which is a link to it.
func (l Layout) PIDSocket(pid int) string {
	return filepath.Join(filepath.Dir(l.Socket), "tako-"+strconv.Itoa(pid)+".sock")
}

// AppLayout is where one app's things are.
type AppLayout struct {
	Dir    string
	RunDir string
}

// Releases holds a folder per release.
func (a AppLayout) Releases() string { return filepath.Join(a.Dir, "releases") }

// Release is one release's folder.
func (a AppLayout) Release(v tako.ReleaseID) string { return filepath.Join(a.Releases(), string(v)) }

// Current is the link to the serving release, relative: releases/<version>.
func (a AppLayout) Current() string { return filepath.Join(a.Dir, "current") }

// Secrets is the app's secrets file; SecretsNext is the one a deploy starts new
// instances from, before it is committed.
func (a AppLayout) Secrets() string     { return filepath.Join(a.Dir, "secrets.json") }
func (a AppLayout) SecretsNext() string { return filepath.Join(a.Dir, "secrets.json.next") }

// Data is the app's own folder, kept over releases; Temp its temporary one.
func (a AppLayout) Data() string { return filepath.Join(a.Dir, "data") }
func (a AppLayout) Temp() string { return filepath.Join(a.Dir, "tmp") }

// Logs is the folder of the app's output.
func (a AppLayout) Logs() string { return filepath.Join(a.Dir, "shared", "logs") }

// InstanceSocket is where an instance may listen. ok is false if the path is
// longer than MaxSocketPath: the instance is then offered only its port.
func (a AppLayout) InstanceSocket(n uint32) (path string, ok bool) {
	path = filepath.Join(a.RunDir, strconv.FormatUint(uint64(n), 10)+".sock")
	return path, len(path) <= MaxSocketPath
}

// CheckSocket says whether path can be a management socket, the names of its
// processes' sockets included.
func CheckSocket(path string) error {
	longest := len(filepath.Join(filepath.Dir(path), "tako-4194304.sock"))
	longest = max(longest, len(path))
	if longest > MaxSocketPath {
		return fmt.Errorf("the socket path %s needs %d bytes with its tako-PID.sock neighbour; a Unix socket's path has at most %d: choose a shorter --socket", path, longest, MaxSocketPath)
	}
	return nil
}
