package proxy

import (
	"tako/internal/wire"
)

// resume tells the next master all that is known here.
func (p *process) resume(m *wire.Message) error {
	if !p.out.opened() { // nothing that it would need
		return p.conn.Resumed(m, 0)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	holds := &wire.Holds{Certificates: p.certs.ids()}
	for _, a := range p.apps {
		holds.Apps = append(holds.Apps, a.holds())
	}
	if err := p.conn.Resumed(m, 1); err != nil {
		return err
	}
	if err := p.conn.Send(0, holds); err != nil {
		return err
	}
	p.log.Info("going on with another tako-master", "apps", len(p.apps))
	// What the dead one was told is told again.
	for _, a := range p.apps {
		a.settleAgain()
	}
	p.retell.Store(true)
	return nil
}

// holds is what is known of an app.
func (a *app) holds() wire.HeldApp {
	conf := a.conf.Load()
	h := wire.HeldApp{App: a.id, Revision: conf.Revision, Gone: conf.gone, Instances: conf.Instances}
	a.mu.Lock()
	defer a.mu.Unlock()
	for id := range a.instances {
		h.Newest = max(h.Newest, id.N)
	}
	for _, i := range a.leaving {
		h.Newest = max(h.Newest, i.id.N)
	}
	return h
}

// settleAgain sends Quiet again for each draining instance, once it is due.
func (a *app) settleAgain() {
	revision := a.conf.Load().Revision
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, i := range a.instances {
		if i.draining.Load() {
			i.expect(revision)
			i.settle(a.out)
		}
	}
}

// opened reports whether Ready was sent.
func (o *outbox) opened() bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.isOpen
}

// ids are the certificates that are held.
func (c *certs) ids() []string {
	ids := make([]string, 0, len(c.byID))
	for id := range c.byID {
		ids = append(ids, id)
	}
	return ids
}
