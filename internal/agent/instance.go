package agent

import (
	"context"
	"crypto/rand"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"tako/internal/agent/health"
	"tako/internal/agent/launch"
	"tako/internal/ipc"
	"tako/internal/logging"
	"tako/internal/tako"
	"tako/internal/wire"
)

// An instance is known from its Start to its StartFailed or Exited.
type instance struct {
	spec    *wire.Start
	log     *sharedLog
	process *launch.Process // nil until it runs
	via     wire.Transport  // where it answered, "" if it never did
	good    bool            // a probe was good
	stopAt  time.Time       // set by a Stop that came before that
}

// The events that come to the loop.
type (
	startFailed struct {
		id  tako.InstanceID
		err error
	}
	started struct {
		id      tako.InstanceID
		process *launch.Process
		files   [3]ipc.FD // the loop closes them
	}
	probed     struct{ wire.Probed }
	exited     struct{ id tako.InstanceID }
	logGone    struct{ log *sharedLog } // one user fewer
	sendFailed struct{ err error }
	stepEnded  struct{} // a Tree, Unpack or Run
)

// sharedLog is an app's log with the number of its users.
type sharedLog struct {
	*launch.Log
	dir   string
	users int
}

func (a *agent) takeLog(dir string, bytes int64, files int, gid uint32) *sharedLog {
	l := a.logs[dir]
	if l == nil {
		l = &sharedLog{Log: launch.NewLog(dir, gid, bytes, files), dir: dir}
		a.logs[dir] = l
	} else {
		l.Resize(bytes, files)
	}
	l.users++
	return l
}

func (a *agent) dropLog(l *sharedLog) {
	if l.users--; l.users == 0 {
		a.all.Go(l.Close) // the disk may be slow
		delete(a.logs, l.dir)
	}
}

// start begins an instance. A message that no correct master sends is an error.
func (a *agent) start(m *wire.Start) error {
	t := a.target(m)
	if a.instances[m.Instance] != nil { // to say that it failed would be untrue of the first
		return fmt.Errorf("%w: start %s: it is there already", ipc.ErrProtocol, m.Instance)
	}
	if err := a.checkStart(m, &t); err != nil {
		// One instance that cannot be started is no reason to end all the others.
		a.log.Error("start refused", logging.Instance, m.Instance.String(), logging.Reason, err.Error())
		return a.conn.Send(0, &wire.StartFailed{Instance: m.Instance, Reason: err.Error()})
	}
	if len(a.instances) >= MaxInstances {
		return a.conn.Send(0, &wire.StartFailed{Instance: m.Instance, Reason: fmt.Sprintf("%d instances are running, the limit: stop some first", MaxInstances)})
	}
	inst := &instance{spec: m, log: a.takeLog(m.LogDir, m.LogBytes, m.LogFiles, m.Command.User.GID)}
	a.instances[m.Instance] = inst
	c := a.config(m, inst.log.Log)
	for id := range a.instances {
		if id.App == m.Instance.App {
			c.Siblings++
		}
	}
	a.all.Go(func() { a.live(t, m, c) })
	return nil
}

// adopt takes over an instance that another agent has started. It runs: the ranges
// of the settings are for what starts, and one that cannot be watched costs itself
// and nothing else. While it is only to be held the agent before can go on, so that
// the master may as well know.
func (a *agent) adopt(m *wire.Message, body *wire.Adopt) error {
	spec := &body.Start
	if before := a.held[spec.Instance]; before != nil {
		before.Discard()
		delete(a.held, spec.Instance)
	}
	t := a.target(spec)
	bad := checkSpec(spec, &t)
	if body.Hold {
		if bad != nil {
			return fmt.Errorf("%w: hold %s: %w", ipc.ErrProtocol, spec.Instance, bad)
		}
		held := *m
		m.Files, body.Hold = nil, false
		a.held[spec.Instance] = &held
		return nil
	}
	if a.instances[spec.Instance] != nil {
		a.log.Error("instance is there already", logging.Instance, spec.Instance.String())
		return nil
	}
	inst := &instance{spec: spec, log: a.takeLog(spec.LogDir, spec.LogBytes, spec.LogFiles, spec.Command.User.GID)}
	began := time.Now().Add(-time.Duration(max(body.AfterMS, 0)) * time.Millisecond)
	files := [3]ipc.FD(m.Files)
	m.Files = nil
	p, err := launch.Adopt(a.config(spec, inst.log.Log), body.PID, began, files)
	if err != nil {
		a.dropLog(inst.log)
		return a.lost(spec.Instance, err)
	}
	inst.process, inst.via, inst.good = p, body.Via, body.Via != ""
	a.instances[spec.Instance] = inst
	if body.Via == wire.TransportTCP {
		a.dialable.put(spec.Instance, target{spec.Port, spec.Command.User.UID})
	}
	t.Via = body.Via
	a.log.Debug("instance adopted", logging.Instance, spec.Instance.String(), logging.PID, p.PID)
	if bad != nil {
		a.log.Error("instance cannot be watched: it is stopped", logging.Instance, spec.Instance.String(), logging.Reason, bad.Error())
		t.Probe = wire.Probe{Kind: wire.ProbeAlive}
		p.Stop(LeaveGrace)
	}
	a.all.Go(func() { a.follow(t, spec, p, inst.log.Log) })
	return nil
}

// lost says of an instance that was to be adopted that it is no more.
func (a *agent) lost(id tako.InstanceID, why error) error {
	a.log.Error("instance cannot be adopted", logging.Instance, id.String(), logging.Reason, why.Error())
	return a.conn.Send(0, &wire.Exited{Instance: id, Exit: wire.Exit{Code: -1, Forgotten: true}, LastLines: []string{"not adopted: " + why.Error()}})
}

// config is how an instance is started.
func (a *agent) config(m *wire.Start, log *launch.Log) launch.Config {
	return launch.Config{
		Command: m.Command, MinUID: a.settings.MinAppUID, MaxUID: a.settings.MaxAppUID,
		Log: log, Instance: m.Instance.N,
		Groups: a.groups, Name: m.Instance.String(), Limits: m.Limits,
	}
}

func (a *agent) target(m *wire.Start) health.Target {
	return health.Target{
		Instance: m.Instance, Probe: m.Probe, Socket: m.Socket, Port: m.Port, UID: m.Command.User.UID,
		ReadyWithin: time.Duration(m.ReadyMS) * time.Millisecond,
	}
}

// checkStart refuses what is not to be started with these settings.
func (a *agent) checkStart(m *wire.Start, t *health.Target) error {
	if m.Port != 0 && (m.Port < a.settings.PortMin || m.Port > a.settings.PortMax) {
		return fmt.Errorf("port %d is not from %d to %d", m.Port, a.settings.PortMin, a.settings.PortMax)
	}
	return checkSpec(m, t)
}

// checkSpec refuses what no settings permit.
func checkSpec(m *wire.Start, t *health.Target) error {
	switch {
	case m.Instance.N == 0:
		return fmt.Errorf("it has no number")
	case m.Socket != "" && !clean(m.Socket):
		return fmt.Errorf("socket %q", m.Socket)
	case m.ReadyMS < 0:
		return fmt.Errorf("%d ms to get ready", m.ReadyMS)
	}
	if err := t.Check(); err != nil {
		return err
	}
	return checkCommand(&m.Command, m.LogDir)
}

func checkCommand(c *wire.Command, logDir string) error {
	switch {
	case !clean(c.Dir):
		return fmt.Errorf("folder %q", c.Dir)
	case !clean(logDir):
		return fmt.Errorf("log folder %q", logDir)
	case len(c.Argv) == 0 || c.Argv[0] == "":
		return fmt.Errorf("no command")
	case len(c.Argv) > maxCommand || len(c.Env) > maxCommand:
		return fmt.Errorf("%d words and %d variables, the limit is %d", len(c.Argv), len(c.Env), maxCommand)
	}
	for _, list := range [][]string{c.Argv, c.Env} {
		for _, s := range list {
			if strings.IndexByte(s, 0) >= 0 {
				return fmt.Errorf("a NUL in the command or its environment")
			}
		}
	}
	return nil
}

// clean reports whether p is an absolute path in its shortest form.
func clean(p string) bool {
	return filepath.IsAbs(p) && filepath.Clean(p) == p && strings.IndexByte(p, 0) < 0
}

// live is the life of one instance, in a goroutine of its own.
func (a *agent) live(t health.Target, m *wire.Start, c launch.Config) {
	// Of an instance with this number before a restart of the server: programs that
	// bind find the name taken.
	removeSocket(m.Socket)
	p, files, err := launch.Start(a.work, c)
	if err != nil {
		c.Log.Note(m.Instance.N, err.Error())
		a.send(startFailed{m.Instance, err})
		return
	}
	if !a.send(started{m.Instance, p, files}) {
		for _, f := range files {
			f.Close()
		}
	}
	a.follow(t, m, p, c.Log)
}

// follow watches a process that runs to its end.
func (a *agent) follow(t health.Target, m *wire.Start, p *launch.Process, log *launch.Log) {
	ctx, cancel := context.WithCancel(a.work)
	var watching sync.WaitGroup
	t.PID, t.Started = p.PID, p.Started
	watching.Go(func() { health.Watch(ctx, t, func(o wire.Probed) { a.send(probed{o}) }) })
	select {
	case <-p.Exited():
	case <-a.work.Done():
		p.Stop(LeaveGrace)
	}
	cancel()
	watching.Wait() // so that no probe is reported after the end
	<-p.Done()
	removeSocket(m.Socket)
	log.Note(m.Instance.N, ending(p.Exit()))
	a.send(exited{m.Instance})
}

// removeSocket removes the socket that a process left behind. The folder is the
// app's, so what stands there may be anything: only a socket is removed.
func removeSocket(path string) {
	if path == "" {
		return
	}
	if fi, err := os.Lstat(path); err == nil && fi.Mode().Type() == fs.ModeSocket {
		_ = os.Remove(path) // if that fails the app says so when it binds
	}
}

// ending says for the app's log how an instance ended.
func ending(e wire.Exit) string {
	switch {
	case e.OutOfMem:
		return "ended: the kernel killed it for want of memory"
	case e.Signal != "":
		return "ended by " + e.Signal
	case e.Forgotten:
		return "ended"
	}
	return fmt.Sprintf("ended with status %d", e.Code)
}

// stop passes on a Stop. An instance that is gone needs none.
func (a *agent) stop(m *wire.Stop) {
	inst := a.instances[m.Instance]
	if inst == nil {
		return
	}
	grace := time.Duration(max(m.GraceMS, 0)) * time.Millisecond
	if inst.process != nil {
		inst.process.Stop(grace)
		return
	}
	if at := time.Now().Add(grace); inst.stopAt.IsZero() || at.Before(inst.stopAt) {
		inst.stopAt = at
	}
}

// event acts on one event. An error ends Run: the master cannot be told.
func (a *agent) event(e any) error {
	switch e := e.(type) {
	case sendFailed:
		return fmt.Errorf("answer tako-master: %w", e.err)
	case stepEnded:
		return a.resume()
	case logGone:
		a.dropLog(e.log)
	case startFailed:
		a.forget(e.id)
		a.log.Warn("instance could not be started", logging.Instance, e.id.String(), logging.Reason, e.err.Error())
		return a.conn.Send(0, &wire.StartFailed{Instance: e.id, Reason: e.err.Error()})
	case started:
		inst := a.instances[e.id]
		inst.process = e.process
		err := a.conn.Send(0, &wire.Started{Instance: e.id, PID: e.process.PID, Limits: e.process.Limits}, e.files[:]...)
		for _, f := range e.files {
			f.Close()
		}
		if !inst.stopAt.IsZero() {
			e.process.Stop(time.Until(inst.stopAt))
		}
		a.log.Debug("instance started", logging.Instance, e.id.String(), logging.PID, e.process.PID)
		return err
	case probed:
		if inst := a.instances[e.Instance]; e.Good {
			inst.good = true
			if e.Via != "" {
				inst.via = e.Via
			}
		}
		if e.Good && e.Via == wire.TransportTCP && e.Streak == 1 {
			m := a.instances[e.Instance].spec
			a.dialable.put(e.Instance, target{m.Port, m.Command.User.UID})
		}
		return a.conn.Send(0, &e.Probed)
	case exited:
		p := a.instances[e.id].process
		a.forget(e.id)
		a.log.Debug("instance ended", logging.Instance, e.id.String(), logging.Exit, p.Exit().Code, logging.Signal, p.Exit().Signal)
		return a.conn.Send(0, &wire.Exited{Instance: e.id, Exit: p.Exit(), LastLines: p.LastLines()})
	}
	return nil
}

func (a *agent) forget(id tako.InstanceID) {
	a.dialable.remove(id)
	a.dropLog(a.instances[id].log)
	delete(a.instances, id)
}

// checkRun refuses what no correct master sends.
func (a *agent) checkRun(m *wire.Run) error {
	err := checkCommand(&m.Command, m.LogDir)
	if err == nil && m.TimeoutMS <= 0 {
		err = fmt.Errorf("no time to run in")
	}
	if err != nil {
		return fmt.Errorf("%w: run %s of %s: %w", ipc.ErrProtocol, m.Name, m.App, err)
	}
	return nil
}

// runCommand runs a step of an app to its end.
func (a *agent) runCommand(ctx context.Context, m *wire.Run, log *launch.Log) (any, error) {
	p, files, err := launch.Start(ctx, launch.Config{
		Command: m.Command, MinUID: a.settings.MinAppUID, MaxUID: a.settings.MaxAppUID, Log: log, Build: true,
		Groups: a.groups, Name: string(m.App) + ".step-" + rand.Text(),
	})
	if err != nil {
		log.Note(0, err.Error())
		return nil, tako.Errorf(tako.CodeFailed, "%s", err)
	}
	for _, f := range files {
		f.Close()
	}
	limit := time.Duration(m.TimeoutMS) * time.Millisecond
	late := time.NewTimer(limit)
	defer late.Stop()
	timedOut := false
	select {
	case <-p.Exited():
	case <-late.C:
		timedOut = true
		log.Note(0, fmt.Sprintf("the %s step did not end within %s and was killed", m.Name, limit))
		p.Stop(0)
	case <-ctx.Done():
		p.Stop(0)
	}
	<-p.Done()
	ran := &wire.Ran{Exit: p.Exit(), TimedOut: timedOut}
	ran.Stdout, ran.Stderr = p.Outputs()
	return ran, nil
}
