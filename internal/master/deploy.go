package master

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"tako/internal/logging"
	"tako/internal/management"
	"tako/internal/paths"
	"tako/internal/release"
	"tako/internal/rollout"
	"tako/internal/route"
	"tako/internal/store"
	"tako/internal/tako"
	"tako/internal/wire"
)

// A roll is one rollout as a command asks for it.
type roll struct {
	release   tako.ReleaseID
	dir       string
	routes    []string // normalised
	secrets   map[string]string
	instances uint8
	idle      time.Duration
	install   bool // run the install step first
}

// Deploy implements management.Backend.
func (s *server) Deploy(ctx context.Context, r management.DeployRequest, progress management.Progress) (management.DeployResult, error) {
	a := s.app(r.App)
	if !a.tryOp() {
		return management.DeployResult{}, errDeployBusy(r.App)
	}
	defer a.endOp()
	patterns, err := route.ParseAll(r.Routes)
	if err != nil {
		return management.DeployResult{}, err
	}
	if int(r.Instances) > MaxInstances {
		return management.DeployResult{}, tako.Errorf(tako.CodeInvalid, "Deploy rejected: %d instances are more than the %d an app may have", r.Instances, MaxInstances)
	}
	dir, err := release.Resolve(a.layout, r.Version, r.Path)
	if err != nil {
		return management.DeployResult{}, err
	}
	secrets := r.Secrets
	if secrets == nil {
		if err := a.settle(); err != nil {
			return management.DeployResult{}, err
		}
		if secrets, err = release.ReadSecrets(a.layout.Secrets()); err != nil {
			return management.DeployResult{}, tako.Errorf(tako.CodeFailed, "Failed to read secrets: %v", err)
		}
	} else if err := release.ValidateSecrets(secrets); err != nil {
		return management.DeployResult{}, err
	}
	return s.roll(ctx, a, roll{
		release: r.Version, dir: dir, routes: texts(patterns), secrets: secrets,
		instances: r.Instances, idle: time.Duration(r.IdleTimeout) * time.Second, install: true,
	}, patterns, progress)
}

func errDeployBusy(app tako.AppID) error {
	return tako.Errorf(tako.CodeBusy, "Deploy already in progress for app '%s'. Please wait and try again.", app)
}

func texts(patterns []route.Pattern) []string {
	out := make([]string, len(patterns))
	for i, p := range patterns {
		out[i] = p.String()
	}
	return out
}

// roll runs a rollout from the first check to the end of the drain. The caller
// holds a.op. On any error everything is as it was before.
func (s *server) roll(ctx context.Context, a *app, r roll, patterns []route.Pattern, progress management.Progress) (management.DeployResult, error) {
	var none management.DeployResult
	b, err := a.loadBuild(r.release, r.dir, r.secrets, r.routes)
	if err != nil {
		return none, err
	}
	unclaim, err := s.claim(a.id, patterns)
	if err != nil {
		return none, err
	}
	defer unclaim()
	if err := s.prepareApp(ctx, a); err != nil {
		return none, fmt.Errorf("prepare app %s: %w", a.id, err)
	}
	if r.install {
		if err := a.install(ctx, b, progress); err != nil {
			return none, err
		}
	}
	if err := a.tree(ctx, b, false); err != nil {
		return none, err
	}
	if r.install {
		if err := a.releaseCommand(ctx, b, progress); err != nil {
			return none, err
		}
	}
	if err := a.settle(); err != nil {
		return none, err
	}
	// New instances start from these; they replace secrets.json after the commit.
	if err := release.WriteSecrets(a.layout.SecretsNext(), r.secrets); err != nil {
		return none, tako.Errorf(tako.CodeFailed, "Failed to write secrets: %v", err)
	}
	hash := release.HashSecrets(r.secrets)
	now := time.Now()
	if err := s.db.BeginRollout(ctx, store.Pending{App: a.id, Release: r.release, Path: r.dir, SecretsHash: hash, StartedAt: now}); err != nil {
		return none, errors.Join(err, os.Remove(a.layout.SecretsNext()))
	}

	next := a.registration()
	newApp := next.ID == ""
	if r.release != next.Release {
		next.PreviousRelease = next.Release
	}
	next.ID, next.Release, next.Path, next.Routes = a.id, r.release, r.dir, r.routes
	next.Instances, next.IdleTimeout, next.Stopped = r.instances, r.idle, false
	next.SecretsHash, next.DeployedAt = hash, now
	b.rollout = rolloutOf(next)

	progress(fmt.Sprintf("starting %s of %s %s", count(max(1, int(r.instances)), "instance"), a.id, r.release))
	a.mu.Lock()
	drainDone(a.done)
	a.builds[b.number] = b
	var fate fate
	a.committer = func() error {
		if !fate.commit() {
			return errNoServer
		}
		defer fate.committed()
		return s.commit(a, next, progress)
	}
	a.stepLocked(rollout.Roll{Plan: b.plan(r.instances, r.idle)})
	a.mu.Unlock()

	d, err := a.wait(ctx, "roll", progress)
	switch {
	case err != nil && !fate.giveUp() && a.registration().Release == r.release && a.registration().SecretsHash == hash:
		// The server stops, and the deploy is durable: the next start has it.
		progress("committed; the server stops before the old instances have drained")
		d.New, err = max(1, int(r.instances)), nil
	case err == nil && d.Failure != nil:
		err = a.deployError(d, r.instances == 0)
	}
	if err != nil {
		// The server may be stopping, and ctx with it: clean up all the same.
		clean, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
		defer cancel()
		if e := s.db.AbandonRollout(clean, a.id); e != nil {
			a.log.Error("rollout not taken off the books; the next start does it", logging.Err, e)
		}
		if e := os.Remove(a.layout.SecretsNext()); e != nil && !errors.Is(e, os.ErrNotExist) {
			a.log.Error("secrets of the failed rollout not removed; the next start does it", logging.Err, e)
		}
		return none, err
	}
	a.prune()
	a.mu.Lock()
	revision := a.published
	a.mu.Unlock()
	s.proxies.awaitApplied(ctx, a.id, revision)
	a.log.Info("deployed", logging.Release, string(r.release), "new", d.New, "old", d.Old)
	return management.DeployResult{
		App: a.id, Version: r.release, Rolled: d.Old > 0, NewApp: newApp,
		NewInstances: d.New, OldInstances: d.Old, OnDemand: r.instances == 0,
	}, nil
}

// A fate says whether a rollout is committed or given up, when both want it at one
// time: only one of them happens, and the other waits for it.
type fate struct {
	mu      sync.Mutex
	decided bool
	given   bool
	done    chan struct{} // closed by committed
}

// commit begins the commit, unless the rollout was given up.
func (f *fate) commit() bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.decided {
		return false
	}
	f.decided, f.done = true, make(chan struct{})
	return true
}

func (f *fate) committed() { close(f.done) }

// giveUp gives the rollout up and reports whether that was in time; if a commit
// has begun it waits for its end instead.
func (f *fate) giveUp() bool {
	f.mu.Lock()
	if !f.decided {
		f.decided, f.given = true, true
	}
	given, done := f.given, f.done
	f.mu.Unlock()
	if !given {
		<-done
	}
	return given
}

// commit makes a rollout durable. The database row is the moment: what follows
// is finished by the next start if a crash comes between.
func (s *server) commit(a *app, next store.App, progress management.Progress) error {
	progress("switching traffic to " + string(next.Release))
	s.ensureCertificates(next.Routes)
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	if err := s.db.SaveApp(ctx, next); err != nil {
		return err
	}
	a.mu.Lock()
	a.reg, a.broken = next, ""
	clear(a.deaths)
	a.mu.Unlock()
	if err := finishCommit(a.layout, next); err != nil {
		a.log.Error("deployed, but a file could not be moved; the next command or start does it", logging.Err, err)
	}
	return nil
}

// finishCommit moves what follows the database row: secrets and the current
// link. It may run again and again.
func finishCommit(l paths.AppLayout, reg store.App) error {
	next, err := release.ReadSecrets(l.SecretsNext())
	var errs []error
	switch {
	case err != nil:
		errs = append(errs, err)
	case release.HashSecrets(next) == reg.SecretsHash:
		if err := os.Rename(l.SecretsNext(), l.Secrets()); err != nil && !errors.Is(err, os.ErrNotExist) {
			errs = append(errs, err)
		}
	default: // of a rollout that was never committed
		if err := os.Remove(l.SecretsNext()); err != nil && !errors.Is(err, os.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	if release.Current(l) != reg.Release {
		if err := release.SetCurrent(l, reg.Release); err != nil {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// settle finishes a commit whose files could not be moved, before its secrets are
// read or others take their place beside them.
func (a *app) settle() error {
	reg := a.registration()
	if reg.ID == "" {
		return nil
	}
	if err := finishCommit(a.layout, reg); err != nil {
		return tako.Errorf(tako.CodeFailed, "Failed to finish the last change of '%s': %v", a.id, err)
	}
	return nil
}

func drainDone(ch chan rollout.Done) {
	for {
		select {
		case <-ch:
		default:
			return
		}
	}
}

// wait waits for the Done of a command and tells how it goes meanwhile.
func (a *app) wait(ctx context.Context, what string, progress management.Progress) (rollout.Done, error) {
	tick := time.NewTicker(200 * time.Millisecond)
	defer tick.Stop()
	last := ""
	for {
		select {
		case d := <-a.done:
			if d.What == what {
				return d, nil
			}
		case <-a.srv.stopping:
			return rollout.Done{}, errNoServer
		case <-ctx.Done():
			return rollout.Done{}, context.Cause(ctx)
		case <-tick.C:
			if text := a.describe(); text != last {
				last = text
				progress(text)
			}
		}
	}
}

// describe says in a line how the instances are.
func (a *app) describe() string {
	a.mu.Lock()
	defer a.mu.Unlock()
	var parts []string
	for _, in := range a.core.View(time.Now()).All {
		rel := ""
		if p := a.procs[in.N]; p != nil {
			rel = " of " + string(p.build.release)
		}
		parts = append(parts, fmt.Sprintf("instance %d%s is %s", in.N, rel, in.State))
	}
	return strings.Join(parts, ", ")
}

// deployError is the error of a rollout that was given up.
func (a *app) deployError(d rollout.Done, onDemand bool) error {
	f := d.Failure
	lines := f.Lines
	if len(lines) == 0 && f.N != 0 {
		lines = lastLines(a.layout.Logs(), f.N, wire.MaxLastLines)
	}
	if d.Old > 0 {
		return &management.RollbackError{App: a.id, Cause: f.Reason, LastLines: lines}
	}
	text := "Deploy failed: "
	if onDemand {
		text += "Warm instance startup failed: "
	}
	text += f.Reason
	if len(lines) > 0 {
		text += ": " + strings.Join(lines, "\n")
	}
	return tako.Errorf(tako.CodeFailed, "%s", text)
}

// claim reserves routes for an app until the returned function is called, so
// that two deploys under way cannot both take one.
func (s *server) claim(app tako.AppID, patterns []route.Pattern) (func(), error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	held := s.heldRoutes()
	for other, ps := range s.claims {
		held[other] = append(held[other], ps...)
	}
	if err := route.Conflict(held, app, patterns); err != nil {
		return nil, err
	}
	s.claims[app] = patterns
	return func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		delete(s.claims, app)
	}, nil
}

// heldRoutes returns the committed routes of every app. Called with mu held.
func (s *server) heldRoutes() map[tako.AppID][]route.Pattern {
	held := make(map[tako.AppID][]route.Pattern)
	for _, a := range s.apps {
		reg := a.registration()
		if reg.ID == "" {
			continue
		}
		for _, text := range reg.Routes {
			if p, err := route.Parse(text); err == nil {
				held[a.id] = append(held[a.id], p)
			}
		}
	}
	return held
}

// prepareApp gives an app its user, ports and folders.
func (s *server) prepareApp(ctx context.Context, a *app) error {
	if s.follows() {
		return s.prepareBeside(ctx, a)
	}
	if err := os.Mkdir(a.layout.Dir, 0o711); err != nil && !errors.Is(err, os.ErrExist) {
		return tako.Errorf(tako.CodeFailed, "Failed to make the app's folder: %v", err)
	}
	reg := a.registration()
	// What it has is kept as long as it fits the settings.
	base, err := s.db.AllocatePorts(ctx, a.id, s.s.portMin, s.s.portMax, PortsPerApp)
	if err != nil {
		return err
	}
	reg.BasePort = base
	if reg.UID == 0 && s.privileged {
		uid, err := s.db.AllocateUID(ctx, a.id, s.s.uidMin, s.s.uidMax)
		if err != nil {
			return err
		}
		reg.UID = uid
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.reg.BasePort, a.reg.UID = reg.BasePort, reg.UID
	return nil
}

// errTree is joined to the error of tree when it is the agent that did not answer.
var errTree = errors.New("the agent did not answer")

// tree has the agent make or mend the app's folders.
func (a *app) tree(ctx context.Context, b *build, installing bool) error {
	name := ""
	if b != nil {
		name = string(b.release)
	}
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	m, err := a.srv.agentCall(ctx, &wire.Tree{
		App: a.id, AppDir: a.layout.Dir, RunDir: a.layout.RunDir,
		Release: name, Installing: installing, User: a.user(), Beside: a.srv.follows(),
	})
	if err != nil {
		said := tako.Errorf(tako.CodeFailed, "Failed to prepare the folders of '%s': %v", a.id, err)
		if tako.AsError(err).Code == tako.CodeFailed {
			return said // the agent's word on what is wrong with them
		}
		return errors.Join(said, errTree)
	}
	m.Discard()
	return nil
}

// install runs the install step of a release, as the app's user.
func (a *app) install(ctx context.Context, b *build, progress management.Progress) error {
	command, ok := b.manifest.InstallCommand(b.dir)
	if !ok {
		return nil
	}
	if err := a.tree(ctx, b, true); err != nil {
		return err
	}
	progress("running the install step: " + command)
	limit := b.manifest.Timeouts.Install
	ran, err := a.runStep(ctx, b, "install", release.Shell(command), limit)
	switch {
	case err != nil:
		return tako.Errorf(tako.CodeFailed, "Invalid app release: Failed to run release install command '%s' in %s: %v", command, b.dir, err)
	case ran.TimedOut:
		return tako.Errorf(tako.CodeFailed, "Invalid app release: Release dependency install did not end within %s%s", limit, outputOf(ran))
	case ran.Exit.Code != 0:
		return tako.Errorf(tako.CodeFailed, "Invalid app release: Release dependency install failed (%s)%s", exitText(ran.Exit), outputOf(ran))
	}
	return nil
}

// releaseCommand runs the release command (migrations), once per deploy, before
// any new instance, as the app's user with the app's environment.
func (a *app) releaseCommand(ctx context.Context, b *build, progress management.Progress) error {
	argv := b.manifest.Release
	if argv == nil {
		return nil
	}
	text := strings.Join(argv, " ")
	progress("running the release command: " + text)
	limit := b.manifest.Timeouts.Release
	ran, err := a.runStep(ctx, b, "release", argv, limit)
	switch {
	case err != nil:
		return tako.Errorf(tako.CodeFailed, "Release command '%s' did not run: %v", text, err)
	case ran.TimedOut:
		return tako.Errorf(tako.CodeFailed, "Release command '%s' did not end within %s%s", text, limit, outputOf(ran))
	case ran.Exit.Code != 0:
		return tako.Errorf(tako.CodeFailed, "Release command '%s' failed (%s)%s", text, exitText(ran.Exit), outputOf(ran))
	}
	return nil
}

// runStep has the agent run a command of a release to its end.
func (a *app) runStep(ctx context.Context, b *build, name string, argv []string, limit time.Duration) (*wire.Ran, error) {
	ctx, cancel := context.WithTimeout(ctx, limit+30*time.Second) // the agent's limit comes first
	defer cancel()
	m, err := a.srv.agentCall(ctx, &wire.Run{
		App: a.id, Name: name,
		Command:   wire.Command{Dir: b.dir, Argv: argv, Env: environ(a.stepEnvironment(b)), User: a.user()},
		TimeoutMS: int(limit.Milliseconds()),
		LogDir:    a.layout.Logs(), LogBytes: LogBytes, LogFiles: LogFiles,
	})
	if err != nil {
		return nil, err
	}
	ran, ok := m.Body.(*wire.Ran)
	if !ok {
		m.Discard()
		return nil, fmt.Errorf("the agent answered %T", m.Body)
	}
	return ran, nil
}

// outputOf is the beginning of what a step said, standard error first.
func outputOf(ran *wire.Ran) string {
	out := strings.TrimSpace(ran.Stderr)
	if out == "" {
		out = strings.TrimSpace(ran.Stdout)
	}
	if out == "" {
		return ""
	}
	if len(out) > MaxErrorOutput {
		// Both ends: the reason of a failing package manager stands at its last.
		half := MaxErrorOutput / 2
		out = strings.ToValidUTF8(out[:half]+"\n[...]\n"+out[len(out)-half:], "")
	}
	return ": " + out
}

// Upload implements management.Backend.
func (s *server) Upload(ctx context.Context, app tako.AppID, version tako.ReleaseID, archive reader) (management.UploadResult, error) {
	return s.upload(ctx, app, version, archive)
}

// Rollback implements management.Backend.
func (s *server) Rollback(ctx context.Context, app tako.AppID, version tako.ReleaseID, progress management.Progress) (management.DeployResult, error) {
	a, err := s.known(app)
	if err != nil {
		return management.DeployResult{}, err
	}
	if !a.tryOp() {
		return management.DeployResult{}, errDeployBusy(app)
	}
	defer a.endOp()
	reg := a.registration()
	dir := filepath.Join(a.layout.Release(version), release.Sub(a.layout, reg.Release, reg.Path))
	if fi, err := os.Stat(a.layout.Release(version)); err != nil || !fi.IsDir() {
		return management.DeployResult{}, tako.Errorf(tako.CodeNotFound, "Release '%s' not found for app '%s'", version, app)
	}
	if len(reg.Routes) == 0 {
		return management.DeployResult{}, tako.Errorf(tako.CodeInvalid, "Cannot rollback '%s': no routes are configured", app)
	}
	dir, err = release.Resolve(a.layout, version, dir)
	if err != nil {
		return management.DeployResult{}, err
	}
	return s.again(ctx, a, reg, version, dir, nil, progress)
}

// Restart implements management.Backend.
func (s *server) Restart(ctx context.Context, app tako.AppID, progress management.Progress) (management.DeployResult, error) {
	a, err := s.known(app)
	if err != nil {
		return management.DeployResult{}, err
	}
	if !a.tryOp() {
		return management.DeployResult{}, errDeployBusy(app)
	}
	defer a.endOp()
	reg := a.registration()
	return s.again(ctx, a, reg, reg.Release, reg.Path, nil, progress)
}

// again is a rollout to what is on disk already, without its install step.
// Secrets are kept when nil.
func (s *server) again(ctx context.Context, a *app, reg store.App, v tako.ReleaseID, dir string, secrets map[string]string, progress management.Progress) (management.DeployResult, error) {
	patterns, err := route.ParseAll(reg.Routes)
	if err != nil {
		return management.DeployResult{}, err
	}
	if secrets == nil {
		if err := a.settle(); err != nil {
			return management.DeployResult{}, err
		}
		if secrets, err = release.ReadSecrets(a.layout.Secrets()); err != nil {
			return management.DeployResult{}, tako.Errorf(tako.CodeFailed, "Failed to read secrets: %v", err)
		}
	}
	return s.roll(ctx, a, roll{
		release: v, dir: dir, routes: reg.Routes, secrets: secrets,
		instances: reg.Instances, idle: reg.IdleTimeout,
	}, patterns, progress)
}

// UpdateSecrets implements management.Backend.
func (s *server) UpdateSecrets(ctx context.Context, app tako.AppID, secrets map[string]string, merge bool, progress management.Progress) (bool, error) {
	a := s.app(app)
	if !a.tryOp() {
		return false, errDeployBusy(app)
	}
	defer a.endOp()
	if err := a.settle(); err != nil {
		return false, err
	}
	if merge {
		old, err := release.ReadSecrets(a.layout.Secrets())
		if err != nil {
			return false, tako.Errorf(tako.CodeFailed, "Failed to read secrets: %v", err)
		}
		maps.Copy(old, secrets)
		secrets = old
	}
	if err := release.ValidateSecrets(secrets); err != nil {
		return false, err
	}
	reg := a.registration()
	if reg.ID == "" || !a.hasInstances() {
		return false, s.writeSecrets(ctx, a, reg, secrets)
	}
	if _, err := s.again(ctx, a, reg, reg.Release, reg.Path, secrets, progress); err != nil {
		return false, tako.Errorf(tako.AsError(err).Code, "Rolling restart failed: %v", err)
	}
	return true, nil
}

// writeSecrets replaces the secrets of an app that has no instance now.
func (s *server) writeSecrets(ctx context.Context, a *app, reg store.App, secrets map[string]string) error {
	if err := os.Mkdir(a.layout.Dir, 0o711); err != nil && !errors.Is(err, os.ErrExist) {
		return tako.Errorf(tako.CodeFailed, "Failed to write secrets: %v", err)
	}
	if reg.ID == "" {
		if err := release.WriteSecrets(a.layout.Secrets(), secrets); err != nil {
			return tako.Errorf(tako.CodeFailed, "Failed to write secrets: %v", err)
		}
		return nil
	}
	// In the order of a deploy: beside, the row with the hash, the rename.
	if err := release.WriteSecrets(a.layout.SecretsNext(), secrets); err != nil {
		return tako.Errorf(tako.CodeFailed, "Failed to write secrets: %v", err)
	}
	hash := release.HashSecrets(secrets)
	if err := s.db.SetSecretsHash(ctx, a.id, hash); err != nil {
		return errors.Join(err, os.Remove(a.layout.SecretsNext()))
	}
	reg.SecretsHash = hash
	a.mu.Lock()
	a.reg.SecretsHash = hash
	for _, b := range a.builds {
		b.secrets = secrets // of a sleeping app: the next start has them
	}
	woke := len(a.procs) > 0
	a.mu.Unlock()
	if woke {
		a.log.Warn("a request woke the app while its secrets were changed: the instance may have the old ones until its next start")
	}
	if err := finishCommit(a.layout, reg); err != nil {
		a.log.Error("secrets changed, but their file could not be moved; the next command or start does it", logging.Err, err)
	}
	return nil
}
