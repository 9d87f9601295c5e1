package management

import (
	"context"
	"io"

	"tako/internal/tako"
)

// A Backend carries out commands. tako-master is the one in the programs. What
// it is given has passed the checks of this border: ids are parsed, the mode was
// normal for a mutating command when it was asked. An error that is a
// *tako.Error reaches the caller as its sentence; of any other the caller is
// told only that it is internal, and the log has the rest.
type Backend interface {
	// Upgrading reports whether mutating commands are refused now.
	Upgrading() bool
	// Owner returns the pid of the server that owns the data root, if that is
	// another one: every command that would change something is then refused,
	// naming it. 0 is this server itself.
	Owner() int

	ServerInfo(ctx context.Context) (ServerInfo, error)
	// Reload asks for a reload and returns what is known of those before. It does
	// not wait: the reload waits for this very command to end.
	Reload(ctx context.Context) (ReloadInfo, error)
	EnterUpgrading(ctx context.Context, owner string, force bool) error
	ExitUpgrading(ctx context.Context, owner string, force bool) error

	Deploy(ctx context.Context, r DeployRequest, progress Progress) (DeployResult, error)
	Rollback(ctx context.Context, app tako.AppID, version tako.ReleaseID, progress Progress) (DeployResult, error)
	Stop(ctx context.Context, app tako.AppID) error
	Delete(ctx context.Context, app tako.AppID) (existed bool, err error)
	Restart(ctx context.Context, app tako.AppID, progress Progress) (DeployResult, error)
	Scale(ctx context.Context, app tako.AppID, instances uint8, progress Progress) error
	UpdateSecrets(ctx context.Context, app tako.AppID, secrets map[string]string, merge bool, progress Progress) (restarted bool, err error)

	Status(ctx context.Context, app tako.AppID) (AppStatus, error)
	List(ctx context.Context) ([]AppSummary, error)
	ListReleases(ctx context.Context, app tako.AppID) ([]Release, error)
	Routes(ctx context.Context) ([]AppRoutes, error)

	// Upload unpacks an archive (tar in zstd) into a new release folder and
	// returns its path, for a Deploy to follow. It reads archive to its end or
	// returns an error.
	Upload(ctx context.Context, app tako.AppID, version tako.ReleaseID, archive io.Reader) (UploadResult, error)

	// Logs sends the newest lines of an app's logs, oldest first, and with
	// r.Follow every new one until ctx ends or send fails.
	Logs(ctx context.Context, r LogsRequest, send func(LogLine) error) error
}

// Progress is told what a long command is doing, one short sentence at a time.
// It never blocks and is never nil.
type Progress func(text string)

// DeployRequest is the deploy command. Path is as the caller gave it: the
// backend resolves it, since only it knows the data root.
type DeployRequest struct {
	App     tako.AppID
	Version tako.ReleaseID
	Path    string
	Routes  []string
	// Secrets replace all of the app's. Nil, when the field was absent: the app
	// keeps what it has (column B made that an empty set, losing them).
	Secrets map[string]string
	// Instances is 0 for on demand.
	Instances uint8
	// IdleTimeout is in seconds.
	IdleTimeout uint32
}

// DeployResult is what a deploy, rollback or restart came to. Which fields are
// shown depends on the shape: see its MarshalJSON.
type DeployResult struct {
	App     tako.AppID
	Version tako.ReleaseID
	// Rolled is whether instances existed before, so that this was a rolling
	// update with NewInstances and OldInstances; else NewApp counts.
	Rolled       bool
	NewApp       bool
	NewInstances int
	OldInstances int
	OnDemand     bool
}

// RollbackError is the error of a rolling update that was undone: its sentence
// is a JSON text, as column B has it.
//
//	{"app":A,"error":"…","rolled_back":true,"status":"rollback"}
type RollbackError struct {
	App   tako.AppID
	Cause string
	// LastLines are the newest lines of the failing instance's output.
	LastLines []string
}

// ServerInfo is the reply to server_info.
type ServerInfo struct {
	PID                  int               `json:"pid"`
	Version              string            `json:"server_version"`
	Mode                 tako.Mode         `json:"mode"`
	Upgrade              *UpgradeLock      `json:"upgrade_lock"` // null when nobody holds it
	Socket               string            `json:"socket"`
	DataDir              string            `json:"data_dir"`
	HTTPPort             uint16            `json:"http_port"`
	HTTPSPort            uint16            `json:"https_port"`
	NoACME               bool              `json:"no_acme"`
	ACMEStaging          bool              `json:"acme_staging"`
	ACMEEmail            *string           `json:"acme_email"`
	RenewalIntervalHours uint64            `json:"renewal_interval_hours"`
	InstancePortOffset   uint16            `json:"instance_port_offset"`
	Role                 string            `json:"role"`         // RoleOwner or RoleFollower
	OwnerPID             int               `json:"owner_pid"`    // of the owner of the data root
	FollowerPID          *int              `json:"follower_pid"` // of a second server beside this owner
	UptimeSecs           uint64            `json:"uptime_secs"`
	Isolation            string            `json:"isolation"` // which walls stand, in a sentence
	Processes            []Process         `json:"processes"`
	Reload               *ReloadInfo       `json:"reload,omitempty"`
	Restored             *Restored         `json:"restored,omitempty"`
	Limits               map[string]uint64 `json:"limits"` // every named limit of the server
}

// The roles of a server: it owns its data root, or it serves beside the owner and
// takes its place when that one has gone.
const (
	RoleOwner    = "owner"
	RoleFollower = "follower"
)

// Restored says when a backup last took the place of a damaged or missing database.
// What was changed after the backup was made is lost.
type Restored struct {
	At      int64   `json:"at_unix_secs"`
	Backup  string  `json:"backup"`
	Damaged *string `json:"damaged"` // what was set aside; null if the database was missing
}

// ReloadInfo is what is known of reloads.
type ReloadInfo struct {
	Count      uint64 `json:"count"`  // that reached a new image of the server
	Failed     uint64 `json:"failed"` // that did not come to their end
	Running    bool   `json:"running"`
	LastError  string `json:"last_error"` // of the last one; "" when it succeeded
	FinishedAt int64  `json:"finished_at_unix_secs"`
}

// UpgradeLock is the durable upgrade lock.
type UpgradeLock struct {
	Owner      string `json:"owner"`
	AcquiredAt int64  `json:"acquired_at_unix_secs"`
	AgeSecs    int64  `json:"age_secs"`
	// LeaseSecs is how long the lock is still safe from other owners; 0 when its
	// lease has run out.
	LeaseSecs int64 `json:"lease_secs"`
}

// Process is one process of the server.
type Process struct {
	Role       string `json:"role"`
	PID        int    `json:"pid"`
	Generation uint64 `json:"generation"`
	State      string `json:"state"` // starting, ready, draining
	UptimeSecs uint64 `json:"uptime_secs"`
	User       string `json:"user"`
}

// AppStatus is the reply to status.
type AppStatus struct {
	Name       tako.AppID     `json:"name"`
	Version    tako.ReleaseID `json:"version"`
	Instances  []Instance     `json:"instances"`
	Builds     []Build        `json:"builds"`
	State      tako.AppState  `json:"state"`
	LastError  *string        `json:"last_error"`
	Routes     []string       `json:"routes"`
	Wanted     uint8          `json:"instances_wanted"` // 0 is on demand
	OnDemand   bool           `json:"on_demand"`
	IdleSecs   uint32         `json:"idle_timeout_secs"`
	RetryInMS  *int64         `json:"retry_in_ms"` // to the next try of a crash loop
	DeployedAt *int64         `json:"deployed_at_unix_secs"`
}

// Build is the instances of one version: the app's current version first, then
// the others in ascending order.
type Build struct {
	Version   tako.ReleaseID `json:"version"`
	State     tako.AppState  `json:"state"`
	Instances []Instance     `json:"instances"`
}

// Instance is one process of an app.
type Instance struct {
	ID            uint32             `json:"id"`
	Process       string             `json:"process,omitempty"` // "" is the one with routes
	State         tako.InstanceState `json:"state"`
	Port          uint16             `json:"port"`
	PID           *int               `json:"pid"`
	UptimeSecs    uint64             `json:"uptime_secs"`
	RequestsTotal uint64             `json:"requests_total"`
	InFlight      int                `json:"in_flight"`
	Transport     string             `json:"transport"` // unix, tcp, or "" before it answered
	Restarts      uint64             `json:"restarts"`  // of the app's slot this one fills
	Limits        string             `json:"limits"`    // by what its limits are kept, and which are not; "" for none
}

// AppSummary is one row of list.
type AppSummary struct {
	Name      tako.AppID     `json:"name"`
	Version   tako.ReleaseID `json:"version"`
	State     tako.AppState  `json:"state"`
	Instances int            `json:"instances"`
}

// AppRoutes is one row of routes.
type AppRoutes struct {
	App    tako.AppID `json:"app"`
	Routes []string   `json:"routes"`
}

// Release is one row of list_releases, newest first.
type Release struct {
	Version       tako.ReleaseID `json:"version"`
	Current       bool           `json:"current"`
	DeployedAt    *int64         `json:"deployed_at_unix_secs"`
	CommitMessage *string        `json:"commit_message"`
	GitDirty      *bool          `json:"git_dirty"`
}

// UploadResult is the reply to upload.
type UploadResult struct {
	Path  string `json:"path"`
	Files int    `json:"files"`
	Bytes int64  `json:"bytes"`
}

// LogsRequest is the logs command.
type LogsRequest struct {
	App    tako.AppID
	Lines  int // how many old ones; 0 to MaxLogLines
	Follow bool
}

// LogLine is one line of an app's output.
type LogLine struct {
	Time     string `json:"time"`     // RFC 3339 with nanoseconds, UTC
	Instance uint32 `json:"instance"` // 0 for build steps
	Stream   string `json:"stream"`   // stdout, stderr, build, tako
	Text     string `json:"text"`
}
