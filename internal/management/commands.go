package management

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"

	"tako/internal/tako"
)

// ProtocolVersion is what hello agrees on.
const ProtocolVersion = 1

// Capabilities is what hello says the server can do. Names are only appended.
var Capabilities = []string{
	"deploy_instances_idle_timeout", "on_demand_cold_start", "idle_scale_to_zero",
	"upgrade_mode_control", "server_runtime_info", "release_history", "rollback",
	"upload", "logs", "scale", "restart", "progress", "reload",
}

// A command is one row of the table: all that this border knows of it.
type command struct {
	name string
	// label is set for a mutating command: it is refused while the server is
	// upgrading, by this name.
	label string
	// changes says that it changes the state without being such a command.
	changes bool
	// owners says that the request is only for root and the server's own user.
	owners func(*args) bool
	// body says that bytes follow the request line, so that the connection is of
	// no more use after an error.
	body   bool
	fields []field
	run    func(context.Context, *call) (any, error)
}

// A call is one command under way. Its ids are valid.
type call struct {
	*args
	app      tako.AppID
	version  tako.ReleaseID
	backend  Backend
	progress Progress
	s        *session
}

var forced = func(a *args) bool { return a.force }

// commands is the table. Checks come in this order: the fields, the app's name,
// the version, owners, whose the state is, the label, and then whatever run finds.
var (
	commands     []*command
	commandNames string // for the text about an unknown one
)

func init() { // run functions refer to what refers to the table
	commands = []*command{
		{name: "hello", fields: []field{fProtocolVersion}, run: runHello},
		{name: "deploy", label: "deploy", run: runDeploy, fields: []field{fApp, fVersion, fPath, fRoutes, fSecrets.orAbsent(), fInstances, fIdleTimeout, fProgress}},
		{name: "stop", label: "stop", fields: []field{fApp}, run: runStop},
		{name: "delete", label: "delete", fields: []field{fApp}, run: runDelete},
		{name: "status", fields: []field{fApp}, run: runStatus},
		{name: "list", run: runList},
		{name: "list_releases", fields: []field{fApp}, run: runListReleases},
		{name: "routes", run: runRoutes},
		{name: "rollback", label: "rollback", fields: []field{fApp, fVersion, fProgress}, run: runRollback},
		{name: "update_secrets", label: "update-secrets", fields: []field{fApp, fSecrets, fMerge, fProgress}, run: runUpdateSecrets},
		{name: "server_info", run: runServerInfo},
		{name: "enter_upgrading", changes: true, owners: forced, fields: []field{fOwner, fForce}, run: runEnterUpgrading},
		{name: "exit_upgrading", changes: true, owners: forced, fields: []field{fOwner, fForce}, run: runExitUpgrading},
		{name: "restart", label: "restart", fields: []field{fApp, fProgress}, run: runRestart},
		{name: "scale", label: "scale", fields: []field{fApp, fInstances, fProgress}, run: runScale},
		{name: "upload", label: "upload", body: true, fields: []field{fApp, fVersion}, run: runUpload},
		{name: "logs", fields: []field{fApp, fLines, fFollow}, run: runLogs},
		{name: "reload", run: runReload}, // also while upgrading: an upgrade is a reload
	}
	names := make([]string, len(commands))
	for i, c := range commands {
		names[i] = "`" + c.name + "`"
	}
	commandNames = strings.Join(names, ", ")
}

func (c *command) has(name string) bool {
	return slices.ContainsFunc(c.fields, func(f field) bool { return f.name == name })
}

// check makes a call of a decoded request, or says why it may not be.
func (c *command) check(a *args, s *session) (*call, error) {
	k := &call{args: a, backend: s.srv.Backend, progress: func(string) {}, s: s}
	var err error
	if c.has(fApp.name) {
		if k.app, err = tako.ParseAppID(a.app); err != nil {
			return nil, err
		}
	}
	if c.has(fVersion.name) {
		if k.version, err = tako.ParseReleaseID(a.version); err != nil {
			return nil, err
		}
	}
	if c.has(fOwner.name) && len(a.owner) > MaxOwner {
		return nil, tako.Errorf(tako.CodeInvalid, "Invalid owner: must be %d bytes or fewer", MaxOwner)
	}
	if c.owners != nil && c.owners(a) && !s.peer.owns(s.srv.OwnUID) {
		return nil, tako.Errorf(tako.CodeForbidden, "'force' is only for root and the server's own user; you are uid %d. Please try again with sudo.", s.peer.UID)
	}
	if c.label != "" || c.changes {
		if pid := s.srv.Backend.Owner(); pid != 0 {
			return nil, tako.Errorf(tako.CodeConflict, "The server with pid %d owns the data root; '%s' is refused by this one, which follows it. Please send it to tako-%d.sock, or retry when that server has gone.",
				pid, cmp.Or(c.label, c.name), pid)
		}
	}
	if c.label != "" && s.srv.Backend.Upgrading() {
		return nil, tako.Errorf(tako.CodeBusy, "Server is upgrading; '%s' is temporarily blocked. Please retry shortly.", c.label)
	}
	return k, nil
}

func runHello(_ context.Context, k *call) (any, error) {
	if k.protocolVersion != ProtocolVersion {
		return nil, tako.Errorf(tako.CodeInvalid, "Protocol version mismatch: client=%d server=%d", k.protocolVersion, ProtocolVersion)
	}
	return Hello{ProtocolVersion: ProtocolVersion, ServerVersion: k.s.srv.Version, Capabilities: Capabilities}, nil
}

func runServerInfo(ctx context.Context, k *call) (any, error) {
	info, err := k.backend.ServerInfo(ctx)
	if err != nil {
		return nil, err
	}
	limits := k.s.srv.Limits.named()
	maps.Copy(limits, info.Limits)
	info.Limits, info.Processes = limits, filled(info.Processes)
	return info, nil
}

func runReload(ctx context.Context, k *call) (any, error) {
	info, err := k.backend.Reload(ctx)
	return struct {
		Status string     `json:"status"`
		Reload ReloadInfo `json:"reload"`
	}{"reloading", info}, err
}

func runEnterUpgrading(ctx context.Context, k *call) (any, error) {
	if err := k.backend.EnterUpgrading(ctx, k.owner, k.force); err != nil {
		return nil, err
	}
	return lockReply{Status: tako.ModeUpgrading, Owner: k.owner}, nil
}

func runExitUpgrading(ctx context.Context, k *call) (any, error) {
	if err := k.backend.ExitUpgrading(ctx, k.owner, k.force); err != nil {
		return nil, err
	}
	return lockReply{Status: tako.ModeNormal, Owner: k.owner}, nil
}

func runDeploy(ctx context.Context, k *call) (any, error) {
	return k.backend.Deploy(ctx, DeployRequest{
		App: k.app, Version: k.version, Path: k.path, Routes: k.routes,
		Secrets: k.secrets, Instances: k.instances, IdleTimeout: k.idleTimeout,
	}, k.progress)
}

func runRollback(ctx context.Context, k *call) (any, error) {
	return k.backend.Rollback(ctx, k.app, k.version, k.progress)
}

func runRestart(ctx context.Context, k *call) (any, error) {
	return k.backend.Restart(ctx, k.app, k.progress)
}

func runStop(ctx context.Context, k *call) (any, error) {
	if err := k.backend.Stop(ctx, k.app); err != nil {
		return nil, err
	}
	return appReply{Status: "stopped", App: k.app}, nil
}

func runDelete(ctx context.Context, k *call) (any, error) {
	existed, err := k.backend.Delete(ctx, k.app)
	if err != nil {
		return nil, err
	}
	return deleteReply{appReply{Status: "deleted", App: k.app}, existed}, nil
}

func runScale(ctx context.Context, k *call) (any, error) {
	if err := k.backend.Scale(ctx, k.app, k.instances, k.progress); err != nil {
		return nil, err
	}
	return scaleReply{appReply{Status: "scaled", App: k.app}, k.instances}, nil
}

func runUpdateSecrets(ctx context.Context, k *call) (any, error) {
	restarted, err := k.backend.UpdateSecrets(ctx, k.app, k.secrets, k.merge, k.progress)
	if err != nil {
		return nil, err
	}
	return secretsReply{appReply{Status: "updated", App: k.app}, restarted}, nil
}

func runStatus(ctx context.Context, k *call) (any, error) {
	st, err := k.backend.Status(ctx, k.app)
	if err != nil {
		return nil, err
	}
	st.Instances, st.Builds, st.Routes = filled(st.Instances), slices.Clone(filled(st.Builds)), filled(st.Routes)
	for i := range st.Builds {
		st.Builds[i].Instances = filled(st.Builds[i].Instances)
	}
	return st, nil
}

func runList(ctx context.Context, k *call) (any, error) {
	apps, err := k.backend.List(ctx)
	if err != nil {
		return nil, err
	}
	return listReply{filled(apps)}, nil
}

func runListReleases(ctx context.Context, k *call) (any, error) {
	releases, err := k.backend.ListReleases(ctx, k.app)
	if err != nil {
		return nil, err
	}
	return releasesReply{k.app, filled(releases)}, nil
}

func runRoutes(ctx context.Context, k *call) (any, error) {
	routes, err := k.backend.Routes(ctx)
	if err != nil {
		return nil, err
	}
	routes = slices.Clone(filled(routes))
	for i := range routes {
		routes[i].Routes = filled(routes[i].Routes)
	}
	return routesReply{routes}, nil
}

func runUpload(ctx context.Context, k *call) (any, error) {
	return k.s.upload(ctx, func(ctx context.Context, r *chunkReader) (UploadResult, error) {
		return k.backend.Upload(ctx, k.app, k.version, r)
	})
}

func runLogs(ctx context.Context, k *call) (any, error) {
	if k.lines > MaxLogLines {
		return nil, tako.Errorf(tako.CodeInvalid, "Invalid lines: %d; at most %d are given", k.lines, MaxLogLines)
	}
	r := LogsRequest{App: k.app, Lines: int(k.lines), Follow: k.follow}
	if err := k.s.logs(ctx, r); err != nil {
		return nil, fmt.Errorf("logs of %s: %w", k.app, err)
	}
	return struct{}{}, nil
}

// filled makes an empty list of none, so that JSON has [] and not null.
func filled[T any](s []T) []T {
	if s == nil {
		return []T{}
	}
	return s
}
