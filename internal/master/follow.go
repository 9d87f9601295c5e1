package master

import (
	"context"
	"errors"
	"os"
	"slices"
	"sync"
	"time"

	"tako/internal/cert"
	"tako/internal/logging"
	"tako/internal/management"
	"tako/internal/release"
	"tako/internal/rollout"
	"tako/internal/store"
	"tako/internal/tako"
	"tako/internal/wire"
)

// What a second server could not do after the owner, because an instance does not
// become well, say, it tries again: HeedRetry later, and after growing pauses of
// at most HeedRetryMost.
const (
	HeedRetry     = time.Second
	HeedRetryMost = time.Minute
)

// SecretsWait bounds the wait for secrets.json to be what the database says: the
// owner moves it into its place after the commit.
const SecretsWait = 5 * time.Second

// A follower looks what the owner has changed and does the same.
type follower struct {
	*server
	ctx      context.Context
	heed     context.Context // ends with the server, and not with a reload
	seen     int64
	calm     bool // at the last look everything was as the owner has it
	outdated bool // the database has a schema that we do not know
	failure  string
}

// heeding is what outlasts a follower, whose successor goes on with it after a
// reload that failed.
type heeding struct {
	mu    sync.Mutex
	busy  int                  // apps that follow now
	quiet chan struct{}        // closed when none does any more; nil: none does
	retry map[tako.AppID]retry // apps that could not
}

func (h *heeding) begin() {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.busy++; h.quiet == nil {
		h.quiet = make(chan struct{})
	}
}

// end notes how the app did. It returns the pause before the next try.
func (h *heeding) end(app tako.AppID, err error) (pause time.Duration) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.busy--; h.busy == 0 {
		close(h.quiet)
		h.quiet = nil
	}
	if err == nil {
		delete(h.retry, app)
		return 0
	}
	pause = min(max(2*h.retry[app].pause, HeedRetry), HeedRetryMost)
	if h.retry == nil {
		h.retry = make(map[tako.AppID]retry)
	}
	h.retry[app] = retry{at: time.Now().Add(pause), pause: pause}
	return pause
}

// wait waits until no app follows any more. Nobody may begin meanwhile.
func (h *heeding) wait() {
	h.mu.Lock()
	quiet := h.quiet
	h.mu.Unlock()
	if quiet != nil {
		<-quiet
	}
}

// A retry is when an app may try again, and the pause that led there.
type retry struct {
	at    time.Time
	pause time.Duration
}

// overlap is what a server has to do with another one of its data root, until ctx
// ends: to follow it, then to take its place; and to let itself be followed.
func (s *server) overlap(ctx context.Context) {
	f := &follower{server: s, ctx: ctx, heed: s.untilStop(ctx)}
	var rest sync.WaitGroup
	defer rest.Wait()
	if s.follows() {
		if !f.follow() {
			return
		}
		rest.Go(f.catchUp)
		rest.Go(func() { f.endLeftovers(LeftoverWait, f.instances, f.stopping) }) // what the owner, killed, left
	}
	s.serveSecond(ctx)
}

// untilStop returns a context that a reload does not end, and a stop does.
func (s *server) untilStop(ctx context.Context) context.Context {
	ctx, end := context.WithCancelCause(context.WithoutCancel(ctx))
	go func() {
		<-s.stopping // or an exec
		end(errNoServer)
	}()
	return ctx
}

// follow returns true once this server has taken the owner's place, and false when
// ctx has ended.
func (f *follower) follow() bool {
	defer func() {
		if l := f.owner.Swap(nil); l != nil {
			_ = l.conn.Close()
			<-l.ended
		}
	}()
	tick := time.NewTicker(FollowEvery)
	defer tick.Stop()
	for {
		select {
		case <-f.ctx.Done():
			return false
		case <-tick.C:
		case <-f.looking:
		}
		if f.tryLock() {
			err := f.succeed()
			if err == nil {
				return true
			}
			if err.Error() != f.failure {
				f.failure = err.Error()
				f.log.Error("the owner of the data root has gone and its place cannot be taken yet: apps are served on, changes are refused", logging.Err, err)
			}
		} else {
			f.relink()
		}
		f.look()
	}
}

// catchUp follows what the last owner had still committed.
func (f *follower) catchUp() {
	tick := time.NewTicker(FollowEvery)
	defer tick.Stop()
	f.calm = false
	for f.look(); !f.calm; f.look() {
		select {
		case <-f.ctx.Done():
			return
		case <-tick.C:
		case <-f.looking:
		}
	}
}

// look compares the database with what runs here, and has each app that differs
// follow in a goroutine of its own.
func (f *follower) look() {
	link := f.owner.Load()
	asked := uint64(0)
	if link != nil {
		asked = link.asked.Load() // before the look: what it says has been committed
	}
	seen, err := f.db.Seen(f.ctx)
	switch {
	case errors.Is(err, store.ErrOtherSchema) && !f.outdated:
		f.outdated = true
		f.log.Warn("the owner of the data root is of another version now: reloading into what is installed", logging.Err, err)
		f.wantReload()
	case err != nil && !errors.Is(err, store.ErrOtherSchema):
		f.log.Error("the owner's changes cannot be seen", logging.Err, err)
		return
	}
	under := false
	if seen != f.seen || !f.calm {
		regs, err := f.db.Apps(f.ctx)
		if err != nil {
			f.log.Error("the owner's changes cannot be read", logging.Err, err)
			return
		}
		f.seen = seen
		f.calm, under = f.compare(regs)
	}
	if link != nil && !under && asked > link.settled {
		if err := link.conn.Send(0, &wire.Settled{Revision: asked}); err == nil {
			link.settled = asked
		}
	}
}

// compare starts what is to be done. calm is whether there is nothing; under,
// whether something is under way.
func (f *follower) compare(regs []store.App) (calm, under bool) {
	ids := make(map[tako.AppID]store.App, len(regs))
	for _, reg := range regs {
		ids[reg.ID] = reg
	}
	for _, a := range f.allApps() {
		if _, ok := ids[a.id]; !ok {
			ids[a.id] = store.App{}
		}
	}
	f.heeding.mu.Lock()
	under = f.heeding.busy > 0 // before the registrations are looked at: they change first
	f.heeding.mu.Unlock()
	calm = !under
	for id, want := range ids {
		a := f.app(id)
		if sameApp(a.registration(), want) {
			continue
		}
		calm = false
		f.heeding.mu.Lock()
		wait := time.Now().Before(f.heeding.retry[id].at)
		f.heeding.mu.Unlock()
		if wait {
			continue
		}
		under = true
		a.mu.Lock()
		restoring := a.restoring != nil
		a.mu.Unlock()
		if restoring || !a.tryOp() {
			continue // it is being done
		}
		f.heeding.begin()
		go func() {
			// Not to be cut off by a reload, which waits for it: half a rollout cannot
			// be handed over. Each step has its own limits.
			err := a.heed(f.heed)
			a.endOp()
			pause := f.heeding.end(a.id, err)
			if err != nil && f.heed.Err() == nil {
				a.log.Error("the owner's change was not followed; trying again", logging.Err, err, "in", pause.String())
			}
			f.lookSoon()
		}()
	}
	return calm, under
}

// sameApp reports whether two registrations ask for the same. What was given to an
// app is each server's own matter.
func sameApp(a, b store.App) bool {
	return sameBuild(a, b) && a.Instances == b.Instances && a.Stopped == b.Stopped && a.SecretsHash == b.SecretsHash
}

// sameBuild reports whether one deploy made both. The database keeps milliseconds.
func sameBuild(a, b store.App) bool {
	return a.ID == b.ID && a.Release == b.Release && a.Path == b.Path && a.IdleTimeout == b.IdleTimeout &&
		a.DeployedAt.UnixMilli() == b.DeployedAt.UnixMilli() && slices.Equal(a.Routes, b.Routes)
}

// heed makes the app what the database says. The caller holds a.op.
func (a *app) heed(ctx context.Context) error {
	want, err := a.srv.db.App(ctx, a.id)
	have := a.registration()
	switch {
	case err != nil && tako.AsError(err).Code == tako.CodeNotFound:
		if have.ID == "" {
			return nil
		}
		a.log.Info("deleted by the owner of the data root")
		return a.vanish(ctx)
	case err != nil:
		return err
	}
	want.BasePort, want.UID = have.BasePort, have.UID
	switch {
	case sameApp(have, want):
	case have.ID == "":
		a.log.Info("deployed by the owner of the data root: following", logging.Release, string(want.Release))
		return a.appear(ctx, want)
	case want.Stopped:
		a.mu.Lock()
		a.reg = want
		a.mu.Unlock()
		if have.Stopped {
			return nil
		}
		a.log.Info("stopped by the owner of the data root")
		return a.halt(ctx)
	case have.Stopped || !sameBuild(have, want) || have.SecretsHash != want.SecretsHash && a.hasInstances():
		a.log.Info("changed by the owner of the data root: following", logging.Release, string(want.Release))
		return a.rollAfter(ctx, want)
	default:
		return a.adjust(ctx, have, want)
	}
	return nil
}

// adjust takes what needs no rollout: another number of instances, secrets of an
// app that has none.
func (a *app) adjust(ctx context.Context, have, want store.App) error {
	secrets, err := a.committedSecrets(ctx, want)
	if err != nil {
		return err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.reg = want
	if have.SecretsHash != want.SecretsHash {
		for _, b := range a.builds {
			b.secrets = secrets
		}
	}
	if have.Instances != want.Instances {
		a.stepLocked(rollout.Scale{Instances: int(want.Instances)})
	}
	return nil
}

// vanish forgets the app, whose files are the owner's matter.
func (a *app) vanish(ctx context.Context) error {
	a.mu.Lock()
	a.reg = store.App{UID: a.reg.UID}
	a.revision++
	a.srv.proxies.send(&wire.AppGone{App: a.id, Revision: a.revision})
	a.broken, a.lastError = "", ""
	a.mu.Unlock()
	return a.halt(ctx)
}

// appear brings an app up that was not there before; requests wait for it.
func (a *app) appear(ctx context.Context, want store.App) error {
	m, err := release.Load(want.Path)
	a.srv.ensureCertificates(want.Routes)
	a.mu.Lock()
	a.reg, a.broken = want, ""
	a.restoring = make(chan struct{})
	a.plainHTTP = err == nil && !m.HTTPSRedirect // an error is said by restore
	a.publish()
	a.mu.Unlock()
	err = a.restore(ctx, want)
	a.restored()
	a.mu.Lock()
	if err != nil {
		a.broken = err.Error()
		a.reg = store.App{ID: a.id, UID: a.reg.UID, BasePort: a.reg.BasePort, Routes: want.Routes} // not yet what is wanted
	}
	a.publish()
	a.mu.Unlock()
	if err != nil {
		return err
	}
	return a.comeUp(ctx)
}

// comeUp waits until the app answers, or is known not to.
func (a *app) comeUp(ctx context.Context) error {
	late := time.After(WarmWait)
	for !a.isUp() {
		select {
		case <-time.After(20 * time.Millisecond):
		case <-late:
			return nil
		case <-a.srv.stopping:
			return errNoServer
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	a.mu.Lock()
	revision := a.published
	a.mu.Unlock()
	a.srv.proxies.awaitApplied(ctx, a.id, revision)
	return nil
}

// isUp reports whether the app has come to rest after its start: it answers, or
// sleeps, or was stopped, or failed.
func (a *app) isUp() bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.restoring == nil && (a.broken != "" || a.core.View(time.Now()).State != tako.AppDeploying)
}

// rollAfter rolls to what the owner has committed: the same rollout, but for the
// steps that are done once for both, and the commit, which is done.
func (a *app) rollAfter(ctx context.Context, want store.App) error {
	secrets, err := a.committedSecrets(ctx, want)
	if err != nil {
		return err
	}
	b, err := a.loadBuild(want.Release, want.Path, secrets, want.Routes)
	if err != nil {
		return err
	}
	if err := a.srv.prepareApp(ctx, a); err != nil {
		return err
	}
	a.mu.Lock()
	want.BasePort, want.UID = a.reg.BasePort, a.reg.UID
	drainDone(a.done)
	a.builds[b.number] = b
	a.committer = func() error {
		a.srv.ensureCertificates(want.Routes)
		a.mu.Lock()
		defer a.mu.Unlock()
		a.reg, a.broken = want, ""
		clear(a.deaths)
		return nil
	}
	a.stepLocked(rollout.Roll{Plan: b.plan(want.Instances, want.IdleTimeout)})
	a.mu.Unlock()
	d, err := a.wait(ctx, "roll", silent)
	if err != nil {
		return err
	}
	if d.Failure != nil {
		return errors.New(d.Failure.Reason)
	}
	a.mu.Lock()
	revision := a.published
	a.mu.Unlock()
	a.srv.proxies.awaitApplied(ctx, a.id, revision)
	a.log.Info("followed", logging.Release, string(want.Release), "new", d.New, "old", d.Old)
	return nil
}

// committedSecrets returns the secrets that the database has the hash of: those of
// secrets.json, or, until the owner has moved it, of what stands beside it.
func (a *app) committedSecrets(ctx context.Context, want store.App) (map[string]string, error) {
	if !a.srv.follows() || want.SecretsHash == "" {
		return release.ReadSecrets(a.layout.Secrets())
	}
	late := time.After(SecretsWait)
	for {
		for _, path := range []string{a.layout.Secrets(), a.layout.SecretsNext()} {
			if secrets, err := release.ReadSecrets(path); err == nil && release.HashSecrets(secrets) == want.SecretsHash {
				return secrets, nil
			}
		}
		select {
		case <-time.After(20 * time.Millisecond):
		case <-late:
			a.log.Warn("secrets.json is not what was committed: somebody changed it by hand")
			return release.ReadSecrets(a.layout.Secrets())
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
}

// prepareBeside takes what the owner has given to an app.
func (s *server) prepareBeside(ctx context.Context, a *app) error {
	base, uid, err := s.db.Given(ctx, a.id)
	if err != nil {
		return err
	}
	if s.privileged && uid == 0 {
		return tako.Errorf(tako.CodeFailed, "the owner of the data root has given app '%s' no user: it does not run with the powers that this server has", a.id)
	}
	if !s.privileged {
		uid = 0
	}
	if base < s.s.portMin || base > s.s.portMax {
		base = s.s.portMin // the owner has other --instance-ports
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.reg.BasePort, a.reg.UID = base, uid
	return nil
}

// warm waits until a second server's apps have come up, or the owner has gone:
// until then the owner's proxy answers alone, and nobody waits for a start.
func (s *server) warm(ctx context.Context) {
	late := time.After(WarmWait)
	up := func() bool {
		select {
		case <-s.restored:
		default:
			return false
		}
		return !slices.ContainsFunc(s.allApps(), func(a *app) bool { return !a.isUp() })
	}
	for s.follows() && !up() {
		select {
		case <-time.After(20 * time.Millisecond):
		case <-s.owned:
			return
		case <-late:
			s.log.Warn("not every app has come up: serving all the same", "waited", WarmWait.String())
			return
		case <-ctx.Done():
			return
		}
	}
}

// SucceedTime bounds each try to take the owner's place.
const SucceedTime = 60 * time.Second

// succeed takes the place of the owner, whose lock we hold now.
func (s *server) succeed() error {
	ctx, cancel := context.WithTimeout(context.Background(), SucceedTime)
	defer cancel()
	last := s.ownerPID.Load()
	if err := s.db.TakeOver(ctx); err != nil {
		return err
	}
	regs, err := s.db.Apps(ctx)
	if err != nil {
		return err
	}
	writePID(s.lock)
	if err := s.settleCrashed(ctx, regs); err != nil {
		return err
	}
	if err := s.certs.Own(); err != nil {
		s.log.Error("certificates", logging.Err, err)
	}
	s.sweep()
	if s.mgmtOwn {
		if err := management.TakeLink(s.layout.PIDSocket(os.Getpid()), s.layout.Socket); err != nil {
			s.log.Error("the management socket's link stays where it is", logging.Err, err)
		}
	}
	s.ownerPID.Store(0)
	close(s.owned)
	s.log.Info("took the place of the owner of the data root, which has gone", logging.PID, last, "apps", len(regs))
	return nil
}

// backups makes the daily backups while the data root is ours.
func (s *server) backups(ctx context.Context) {
	select {
	case <-s.owned:
		s.db.BackupLoop(ctx)
	case <-ctx.Done():
	}
}

// showCertificates tells the proxies of certificates.
func (s *server) showCertificates(cs []cert.Certificate) {
	for _, c := range cs {
		s.proxies.send(certMessage(c))
	}
}
