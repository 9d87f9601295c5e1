package master

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"os/user"
	"slices"
	"strconv"
	"time"

	"tako/internal/logging"
	"tako/internal/management"
	"tako/internal/release"
	"tako/internal/rollout"
	"tako/internal/route"
	"tako/internal/store"
	"tako/internal/tako"
	"tako/internal/wire"
)

// Limits of apps and releases.
const (
	// MaxInstances bounds the instances of an app. Fewer fit into a range of
	// PortsPerApp during a rolling update, hence the number.
	MaxInstances = 64
	// MaxReleaseBytes and MaxReleaseFiles bound what an upload may unpack to.
	MaxReleaseBytes = 4 << 30
	MaxReleaseFiles = 200_000
	// UploadTime bounds an upload from its first byte to its last.
	UploadTime = time.Hour
	// HaltTime bounds how long a stop waits for the last instance.
	HaltTime = 5 * time.Minute
	// MaxErrorOutput bounds a step's output in an error, in bytes.
	MaxErrorOutput = 1200
	// DefaultWaiters and DefaultWait bound the queue of an app that chooses
	// nothing.
	DefaultWaiters = 100
	DefaultWait    = 30 * time.Second
)

var _ management.Backend = (*server)(nil)

// lookup returns an app the server has met, or nil.
func (s *server) lookup(id tako.AppID) *app {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.apps[id]
}

// app returns the app with this id, committed or not.
func (s *server) app(id tako.AppID) *app {
	s.mu.Lock()
	defer s.mu.Unlock()
	a := s.apps[id]
	if a == nil {
		a = newApp(s, id)
		s.apps[id] = a
	}
	return a
}

// known returns an app that was deployed.
func (s *server) known(id tako.AppID) (*app, error) {
	if a := s.lookup(id); a != nil && a.registration().ID != "" {
		return a, nil
	}
	return nil, tako.Errorf(tako.CodeNotFound, "App not found: %s", id)
}

// allApps returns every app, by name.
func (s *server) allApps() []*app {
	s.mu.Lock()
	defer s.mu.Unlock()
	all := make([]*app, 0, len(s.apps))
	for _, a := range s.apps {
		all = append(all, a)
	}
	slices.SortFunc(all, func(a, b *app) int { return cmp.Compare(a.id, b.id) })
	return all
}

// registration returns a copy of what is committed of the app.
func (a *app) registration() store.App {
	a.mu.Lock()
	defer a.mu.Unlock()
	reg := a.reg
	reg.Routes = slices.Clone(reg.Routes)
	return reg
}

func (a *app) hasInstances() bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return len(a.core.View(time.Now()).All) > 0
}

// Stop implements management.Backend.
func (s *server) Stop(ctx context.Context, id tako.AppID) error {
	a, err := s.known(id)
	if err != nil {
		return tako.Errorf(tako.CodeNotFound, "Stop failed: App not found: %s", id)
	}
	if !a.tryOp() {
		return errDeployBusy(id)
	}
	defer a.endOp()
	if err := s.db.SetStopped(ctx, id, true); err != nil {
		return err
	}
	a.mu.Lock()
	a.reg.Stopped = true
	a.mu.Unlock()
	return a.halt(ctx)
}

// halt stops every instance of the app and waits for the last to end.
func (a *app) halt(ctx context.Context) error {
	a.mu.Lock()
	drainDone(a.done)
	a.stepLocked(rollout.Stop{})
	var draining []uint32
	for _, in := range a.core.View(time.Now()).All {
		if in.Draining {
			draining = append(draining, in.N)
		}
	}
	a.mu.Unlock()
	for _, n := range draining { // a proxy that was told of a delete may have said so before
		a.srv.checkQuiet(a.instance(n))
	}
	ctx, cancel := context.WithTimeoutCause(ctx, HaltTime, tako.Errorf(tako.CodeFailed,
		"Stop failed: an instance of '%s' does not end within %s, not even killed; it may be stuck in the kernel", a.id, HaltTime))
	defer cancel()
	_, err := a.wait(ctx, "stop", func(string) {})
	return err
}

// Delete implements management.Backend.
func (s *server) Delete(ctx context.Context, id tako.AppID) (existed bool, err error) {
	a, err := s.known(id)
	if err != nil {
		return false, nil // deleting what is not there is done
	}
	if !a.tryOp() {
		return false, errDeployBusy(id)
	}
	defer a.endOp()
	if _, err := s.db.DeleteApp(ctx, id); err != nil {
		return false, err
	}
	a.mu.Lock()
	a.reg = store.App{UID: a.reg.UID}
	a.revision++
	s.proxies.send(&wire.AppGone{App: id, Revision: a.revision})
	a.broken, a.lastError = "", ""
	a.mu.Unlock()
	a.removeSecrets()
	return true, a.halt(ctx)
}

// removeSecrets removes what the next app of this name must not find, of an app
// that is in the database no more.
func (a *app) removeSecrets() {
	for _, path := range []string{a.layout.Secrets(), a.layout.SecretsNext(), a.layout.Current()} {
		if e := os.Remove(path); e != nil && !errors.Is(e, os.ErrNotExist) {
			a.log.Error("a file of the deleted app stays", logging.Err, e)
		}
	}
}

// Scale implements management.Backend.
func (s *server) Scale(ctx context.Context, id tako.AppID, instances uint8, progress management.Progress) error {
	a, err := s.known(id)
	if err != nil {
		return err
	}
	if int(instances) > MaxInstances {
		return tako.Errorf(tako.CodeInvalid, "%d instances are more than the %d an app may have", instances, MaxInstances)
	}
	if !a.tryOp() {
		return errDeployBusy(id)
	}
	defer a.endOp()
	if err := s.db.SetInstances(ctx, id, instances); err != nil {
		return err
	}
	a.mu.Lock()
	a.reg.Instances = instances
	a.stepLocked(rollout.Scale{Instances: int(instances)})
	a.mu.Unlock()
	progress(a.describe())
	return nil
}

// Status implements management.Backend.
func (s *server) Status(_ context.Context, id tako.AppID) (management.AppStatus, error) {
	a, err := s.known(id)
	if err != nil {
		return management.AppStatus{}, err
	}
	return a.status(), nil
}

func (a *app) status() management.AppStatus {
	a.mu.Lock()
	defer a.mu.Unlock()
	now := time.Now()
	v := a.core.View(now)
	st := management.AppStatus{
		Name: a.id, Version: a.reg.Release, State: v.State, Routes: slices.Clone(a.reg.Routes),
		Wanted: a.reg.Instances, OnDemand: a.reg.Instances == 0, IdleSecs: uint32(a.reg.IdleTimeout / time.Second), // it came as 32 bits
		Instances: []management.Instance{}, Builds: []management.Build{},
	}
	if !a.reg.DeployedAt.IsZero() {
		at := a.reg.DeployedAt.Unix()
		st.DeployedAt = &at
	}
	why := v.Why
	if a.broken != "" {
		st.State, why = tako.AppError, a.broken
	}
	if why != "" {
		st.LastError = &why
	}
	if v.RetryIn > 0 {
		ms := v.RetryIn.Milliseconds()
		st.RetryInMS = &ms
	}
	builds := make(map[tako.ReleaseID]*management.Build)
	for _, in := range v.All {
		p := a.procs[in.N]
		if p == nil {
			continue
		}
		requests, inFlight := a.srv.proxies.requestsOf(a.instance(in.N))
		row := management.Instance{
			ID: in.N, Process: in.Process, State: in.State, Port: p.port, UptimeSecs: uint64(now.Sub(in.StartedAt) / time.Second), // not negative
			RequestsTotal: p.requests + requests, InFlight: inFlight, Transport: in.Via, Limits: p.limits, Restarts: p.restarts,
		}
		if p.pid > 0 {
			pid := p.pid
			row.PID = &pid
		}
		st.Instances = append(st.Instances, row)
		b := builds[p.build.release]
		if b == nil {
			b = &management.Build{Version: p.build.release}
			builds[p.build.release] = b
		}
		b.Instances = append(b.Instances, row)
	}
	for _, b := range builds {
		b.State = buildState(b.Instances)
		st.Builds = append(st.Builds, *b)
	}
	slices.SortFunc(st.Builds, func(x, y management.Build) int {
		if (x.Version == st.Version) != (y.Version == st.Version) {
			if x.Version == st.Version {
				return -1
			}
			return 1
		}
		return cmp.Compare(x.Version, y.Version)
	})
	return st
}

// buildState derives a build's state from its instances'.
func buildState(ins []management.Instance) tako.AppState {
	has := func(states ...tako.InstanceState) bool {
		return slices.ContainsFunc(ins, func(in management.Instance) bool { return slices.Contains(states, in.State) })
	}
	switch {
	case has(tako.InstanceHealthy, tako.InstanceReady):
		return tako.AppRunning
	case has(tako.InstanceStarting, tako.InstanceDraining):
		return tako.AppDeploying
	case has(tako.InstanceUnhealthy):
		return tako.AppError
	}
	return tako.AppStopped
}

// List implements management.Backend.
func (s *server) List(context.Context) ([]management.AppSummary, error) {
	rows := []management.AppSummary{}
	for _, a := range s.allApps() {
		if a.registration().ID == "" {
			continue
		}
		st := a.status()
		rows = append(rows, management.AppSummary{Name: a.id, Version: st.Version, State: st.State, Instances: len(st.Instances)})
	}
	return rows, nil
}

// Routes implements management.Backend.
func (s *server) Routes(context.Context) ([]management.AppRoutes, error) {
	rows := []management.AppRoutes{}
	for _, a := range s.allApps() {
		if reg := a.registration(); reg.ID != "" {
			rows = append(rows, management.AppRoutes{App: a.id, Routes: reg.Routes})
		}
	}
	return rows, nil
}

// ListReleases implements management.Backend.
func (s *server) ListReleases(_ context.Context, id tako.AppID) ([]management.Release, error) {
	a, err := s.known(id)
	if err != nil {
		return nil, err
	}
	reg := a.registration()
	stored, err := release.List(a.layout, reg.Release, release.Sub(a.layout, reg.Release, reg.Path))
	if err != nil {
		return nil, err
	}
	rows := make([]management.Release, len(stored))
	for i, r := range stored {
		rows[i] = management.Release{Version: r.Version, Current: r.Current, DeployedAt: r.DeployedAt, CommitMessage: r.CommitMessage, GitDirty: r.GitDirty}
	}
	return rows, nil
}

// Upgrading implements management.Backend.
func (s *server) Upgrading() bool { return s.upgrading.Load() }

// Owner implements management.Backend.
func (s *server) Owner() int { return int(s.ownerPID.Load()) }

// EnterUpgrading implements management.Backend.
func (s *server) EnterUpgrading(ctx context.Context, owner string, force bool) error {
	_, err := s.db.EnterUpgrading(ctx, owner, force, time.Now())
	if held, ok := errors.AsType[*store.LockedError](err); ok {
		return tako.Errorf(tako.CodeConflict, "Server is already upgrading (owner: %s).", held.Holder.Owner)
	}
	if err != nil {
		if e := tako.AsError(err); e.Code != tako.CodeInternal {
			return e
		}
		s.log.Error("enter upgrading", logging.Err, err)
		return tako.Errorf(tako.CodeFailed, "Failed to enter upgrading mode: %v", err)
	}
	s.upgrading.Store(true)
	s.log.Info("upgrading: mutating commands are refused", "owner", owner, "force", force)
	return nil
}

// ExitUpgrading implements management.Backend.
func (s *server) ExitUpgrading(ctx context.Context, owner string, force bool) error {
	err := s.db.ExitUpgrading(ctx, owner, force)
	if errors.Is(err, store.ErrNotHolder) {
		return tako.Errorf(tako.CodeConflict, "Failed to exit upgrading mode: owner does not hold the upgrade lock.")
	}
	if err != nil {
		if e := tako.AsError(err); e.Code != tako.CodeInternal {
			return e
		}
		s.log.Error("exit upgrading", logging.Err, err)
		return tako.Errorf(tako.CodeFailed, "Failed to exit upgrading mode: %v", err)
	}
	s.upgrading.Store(false)
	s.log.Info("no longer upgrading", "owner", owner, "force", force)
	return nil
}

// ServerInfo implements management.Backend.
func (s *server) ServerInfo(ctx context.Context) (management.ServerInfo, error) {
	mode, lock, err := s.db.Mode(ctx)
	if err != nil {
		return management.ServerInfo{}, err
	}
	info := management.ServerInfo{
		PID: os.Getpid(), Version: s.version, Mode: mode,
		Socket: s.layout.Socket, DataDir: s.layout.Data,
		HTTPPort: s.httpPort(), HTTPSPort: s.httpsPort(),
		NoACME: s.s.NoACME, ACMEStaging: s.s.ACMEStaging, RenewalIntervalHours: s.s.RenewalHours,
		InstancePortOffset: s.s.InstancePortOffset, Role: management.RoleOwner, OwnerPID: os.Getpid(),
		UptimeSecs: uint64(time.Since(s.startedAt) / time.Second), // not negative
		Isolation:  isolation(s.privileged),
		Processes:  s.processes(),
		Reload:     s.reload.info(),
		Limits: map[string]uint64{
			"routes_per_app": route.MaxPerApp, "instances_per_app": MaxInstances,
			"release_bytes": MaxReleaseBytes, "release_files": MaxReleaseFiles,
			"log_bytes": LogBytes, "log_files": LogFiles,
			"management_line_bytes": management.MaxLine, "management_connections": management.MaxConnections,
		},
	}
	if s.s.ACMEEmail != "" {
		info.ACMEEmail = &s.s.ACMEEmail
	}
	if pid := s.Owner(); pid != 0 {
		info.Role, info.OwnerPID = management.RoleFollower, pid
	} else if pid := s.second.connected(); pid != 0 {
		info.FollowerPID = &pid
	}
	if lock != nil {
		info.Upgrade = &management.UpgradeLock{
			Owner: lock.Owner, AcquiredAt: lock.AcquiredAt.Unix(), AgeSecs: int64(lock.Age(time.Now()) / time.Second),
			LeaseSecs: int64(max(store.UpgradeLease-lock.Idle(time.Now()), 0) / time.Second),
		}
	}
	// What cannot be read of it was logged when it happened.
	if r, err := s.db.LastRestore(ctx); err == nil && r != nil {
		info.Restored = &management.Restored{At: r.At.Unix(), Backup: r.Backup}
		if r.Damaged != "" {
			info.Restored.Damaged = &r.Damaged
		}
	}
	return info, nil
}

// processes lists the server's processes, ourselves first.
func (s *server) processes() []management.Process {
	self := strconv.Itoa(os.Geteuid())
	name := func(uid string) string {
		if u, err := user.LookupId(uid); err == nil {
			return u.Username
		}
		return uid
	}
	rows := []management.Process{{
		Role: string(wire.Master), PID: os.Getpid(), Generation: 1, State: "ready",
		UptimeSecs: uint64(time.Since(s.startedAt) / time.Second), User: name(self), // not negative
	}}
	add := func(l *link, uid *uint32) {
		who := self
		if uid != nil {
			who = strconv.FormatUint(uint64(*uid), 10)
		}
		rows = append(rows, management.Process{
			Role: string(l.role), PID: l.child.PID, Generation: l.generation, State: *l.state.Load(),
			UptimeSecs: uint64(time.Since(l.startedAt) / time.Second), User: name(who), // not negative
		})
	}
	for _, l := range s.proxies.all() {
		var uid *uint32
		if s.proxyID != nil {
			uid = &s.proxyID.UID
		}
		add(l.link, uid)
	}
	s.agentMu.Lock()
	agent := s.agent
	s.agentMu.Unlock()
	if agent != nil {
		var uid *uint32
		if s.agentID != nil {
			uid = &s.agentID.UID
		}
		add(agent, uid)
	}
	return rows
}

// count writes "1 instance", "3 instances".
func count(n int, what string) string {
	if n == 1 {
		return "1 " + what
	}
	return fmt.Sprintf("%d %ss", n, what)
}

// ensureCertificates makes the certificates that routes need and we can make,
// and shows them to the proxies. A failure is logged: the fallback answers.
func (s *server) ensureCertificates(routes []string) {
	if s.follows() {
		s.showCertificates(s.certs.Reread()) // the owner has made them
		return
	}
	var hosts []string
	for _, text := range routes {
		if p, err := route.Parse(text); err == nil && !slices.Contains(hosts, p.Host()) {
			hosts = append(hosts, p.Host())
		}
	}
	made, err := s.certs.Ensure(hosts)
	if err != nil {
		s.log.Error("certificate not made", logging.Err, err)
	}
	for _, c := range made {
		s.proxies.send(certMessage(c))
	}
}
