package agent

import (
	"errors"
	"time"

	"tako/internal/wire"
)

// begin adopts what was held until the agent before had gone.
func (a *agent) begin() error {
	var errs []error
	for id, m := range a.held {
		delete(a.held, id)
		body, ok := m.Body.(*wire.Adopt)
		if !ok || a.instances[id] != nil { // the second cannot come of a correct master
			m.Discard()
			continue
		}
		errs = append(errs, a.adopt(m, body))
		m.Discard()
	}
	return errors.Join(errs...)
}

// resume tells the next master all that is known here, once the steps that the
// dead one asked for have ended.
func (a *agent) resume() error {
	if a.resuming == nil || len(a.calls) > 0 {
		return nil
	}
	asked := a.resuming
	a.resuming = nil
	if err := a.conn.Resumed(asked, len(a.instances)+len(a.held)); err != nil {
		return err
	}
	a.log.Info("going on with another tako-master", "instances", len(a.instances)+len(a.held))
	for _, inst := range a.instances {
		if err := a.present(inst); err != nil {
			return err
		}
	}
	for _, m := range a.held {
		body, ok := m.Body.(*wire.Adopt)
		if !ok {
			continue
		}
		if err := a.conn.Send(0, &wire.Present{Adopt: *body, Good: body.Via != "", Held: true}, m.Files...); err != nil {
			return err
		}
	}
	return nil
}

// present tells of one instance.
func (a *agent) present(inst *instance) error {
	m := &wire.Present{Adopt: wire.Adopt{Start: *inst.spec, Via: inst.via}, Good: inst.good}
	if inst.process == nil {
		m.Stopping = !inst.stopAt.IsZero()
		return a.conn.Send(0, m)
	}
	p := inst.process
	m.Adopt.PID, m.Adopt.AfterMS = p.PID, time.Since(p.Started).Milliseconds()
	m.Limits, m.Stopping = p.Limits, p.Stopping()
	files, err := p.Duplicates()
	if err != nil { // it has just ended
		return a.conn.Send(0, m)
	}
	defer func() {
		for _, fd := range files {
			fd.Close()
		}
	}()
	m.Held = true
	return a.conn.Send(0, m, files[:]...)
}
