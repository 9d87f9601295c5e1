package proxy

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync"
	"time"

	"github.com/hashicorp/go-hclog"

	"tako/internal/ipc"
	"tako/internal/proxy/eventloop"
	"tako/internal/tako"
	"tako/internal/wire"
)

// link is a socket beside the channel on which the proxy asks and somebody
// answers. It may be replaced; calls under way then fail with wire.ErrGone.
//
// With loops, one of them reads what comes: who asks from a task is then woken
// without the scheduler.
type link struct {
	kind  wire.Link
	log   hclog.Logger
	loops *eventloop.Group
	wg    sync.WaitGroup

	mu      sync.Mutex
	conn    *wire.Conn
	calls   *wire.Calls
	changed chan struct{} // closed by the next open, once somebody waits for it
}

// open takes over the socket fd, and closes the one before it.
func (l *link) open(fd ipc.FD) error {
	ch, on, loop, err := l.channel(fd)
	if err != nil {
		return fmt.Errorf("%s: %w", l.kind, err)
	}
	conn := wire.NewConn(ch, l.kind, wire.Proxy)
	calls := wire.NewCalls(conn)
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.conn != nil {
		_ = l.conn.Close()
	}
	l.conn, l.calls = conn, calls
	if l.changed != nil {
		close(l.changed)
		l.changed = nil
	}
	l.wg.Add(1)
	r := &linkReader{link: l, conn: conn, calls: calls, on: on}
	if loop == nil {
		go r.read()
	} else {
		loop.Begin(r)
	}
	return nil
}

// channel makes one of fd, which it owns: on a loop, if there is one that takes it.
func (l *link) channel(fd ipc.FD) (*ipc.Channel, *eventloop.Raw, *eventloop.Loop, error) {
	if loop := l.loops.Pick(); loop != nil && ipc.Check(fd) == nil {
		if on, err := loop.Raw(int(fd)); err == nil {
			return ipc.On(on), on, loop, nil
		}
	}
	ch, err := ipc.Open(fd)
	return ch, nil, nil, err
}

// linkReader hands over the answers that come by a link.
type linkReader struct {
	link  *link
	conn  *wire.Conn
	calls *wire.Calls
	on    *eventloop.Raw // nil off the loops
}

// Start reads on a loop.
func (r *linkReader) Start(t *eventloop.Task) {
	r.on.Own(t)
	r.read()
}

func (r *linkReader) read() {
	defer r.link.wg.Done()
	defer r.calls.End()
	for {
		m, err := r.conn.Receive()
		if err != nil {
			if !errors.Is(err, net.ErrClosed) {
				r.link.log.Warn("a socket has ended; what it was for does not work until there is another", "link", r.link.kind, "error", err)
			}
			_ = r.conn.Close()
			return
		}
		r.calls.Answer(m)
	}
}

// doAgain asks. If the socket has ended, or does before the answer, it waits for
// the next one and asks there, until ctx ends: for what may be asked twice.
func (l *link) doAgain(ctx context.Context, body any) (wire.Message, error) {
	for {
		l.mu.Lock()
		calls := l.calls
		if l.changed == nil {
			l.changed = make(chan struct{})
		}
		changed := l.changed
		l.mu.Unlock()
		err := wire.ErrGone
		if calls != nil {
			var m wire.Message
			m, err = calls.Do(ctx, body)
			if _, answered := errors.AsType[*tako.Error](err); err == nil || answered || ctx.Err() != nil {
				return m, err
			}
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return wire.Message{}, err
		}
	}
}

// close ends the link and waits for its goroutine. It may come twice.
func (l *link) close() {
	l.mu.Lock()
	if l.conn != nil {
		_ = l.conn.Close()
	}
	l.mu.Unlock()
	l.wg.Wait()
}

// sign has the master sign a handshake. Between two masters it waits for the next.
func (l *link) sign(ctx context.Context, s *wire.Sign) ([]byte, error) {
	m, err := l.doAgain(ctx, s)
	if err != nil {
		return nil, err
	}
	return signatureOf(m)
}

func signatureOf(m wire.Message) ([]byte, error) {
	defer m.Discard()
	signed, ok := m.Body.(*wire.Signed)
	if !ok {
		return nil, fmt.Errorf("a call to sign was answered by %T", m.Body)
	}
	return signed.Signature, nil
}

// signOn is sign from a task, which parks meanwhile. It reports false if that was in
// vain: then sign may know more.
func (l *link) signOn(t *eventloop.Task, s *wire.Sign) (signature []byte, ok bool) {
	l.mu.Lock()
	calls := l.calls
	l.mu.Unlock()
	if calls == nil {
		return nil, false
	}
	var m wire.Message
	var failed error
	id, err := calls.Begin(s, func(answer wire.Message, err error) {
		m, failed = answer, err
		t.Wake()
	})
	if err != nil {
		return nil, false
	}
	late := time.AfterFunc(SignTime, func() {
		if calls.Forget(id) {
			failed = context.DeadlineExceeded
			t.Wake()
		}
	})
	t.Park()
	late.Stop()
	if failed != nil {
		return nil, false
	}
	signature, err = signatureOf(m)
	return signature, err == nil
}

// dial has the agent connect to an instance. Between two agents it waits for the
// next.
func (l *link) dial(ctx context.Context, id tako.InstanceID) (net.Conn, error) {
	m, err := l.doAgain(ctx, &wire.Dial{Instance: id})
	if err != nil {
		return nil, err
	}
	defer m.Discard()
	if len(m.Files) != 1 {
		return nil, fmt.Errorf("a call to dial was answered by %T with %d descriptors", m.Body, len(m.Files))
	}
	fd := m.Files[0]
	m.Files = nil
	return connOfFD(fd)
}
