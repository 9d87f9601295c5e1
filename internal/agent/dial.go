package agent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"

	"tako/internal/agent/health"
	"tako/internal/ipc"
	"tako/internal/logging"
	"tako/internal/tako"
	"tako/internal/wire"
)

// DialTimeout bounds one dial.
const DialTimeout = time.Second

// target is where an instance that listens on TCP is reached, and whose listener
// that has to be.
type target struct {
	port uint16
	uid  uint32
}

// dialable holds the instances that answered on TCP. Any goroutine may use it.
type dialable struct {
	mu      sync.RWMutex
	targets map[tako.InstanceID]target
}

func (d *dialable) put(id tako.InstanceID, t target) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.targets == nil {
		d.targets = make(map[tako.InstanceID]target)
	}
	d.targets[id] = t
}

func (d *dialable) remove(id tako.InstanceID) {
	d.mu.Lock()
	defer d.mu.Unlock()
	delete(d.targets, id)
}

func (d *dialable) get(id tako.InstanceID) (target, bool) {
	d.mu.RLock()
	defer d.mu.RUnlock()
	t, ok := d.targets[id]
	return t, ok
}

// addDialer serves one more dialling socket until its other end closes.
func (a *agent) addDialer(m *wire.Message) error {
	ch, err := ipc.Open(m.Files[0])
	m.Files = nil
	if err != nil {
		return fmt.Errorf("%w: dialling socket: %w", ipc.ErrProtocol, err)
	}
	select {
	case a.dialers <- struct{}{}:
	default:
		_ = ch.Close()
		return fmt.Errorf("%w: more than %d dialling sockets", ipc.ErrProtocol, MaxDialers)
	}
	a.all.Go(func() {
		a.serveDials(wire.NewConn(ch, wire.LinkDialing, wire.Agent))
		<-a.dialers
	})
	return nil
}

// serveDials answers the dials of one proxy. What the proxy does wrong costs it
// this socket and nothing else.
func (a *agent) serveDials(conn *wire.Conn) {
	defer conn.Close() // it has gone, or is to go
	defer context.AfterFunc(a.work, func() { _ = conn.Close() })()
	var all sync.WaitGroup
	defer all.Wait()
	slots := make(chan struct{}, MaxDials)
	for {
		m, err := conn.Receive()
		if err != nil {
			if !errors.Is(err, io.EOF) && a.work.Err() == nil {
				a.log.Warn("dialling socket closed", logging.Reason, err.Error())
			}
			return
		}
		id := m.ID
		dial, ok := m.Body.(*wire.Dial)
		m.Discard()
		if !ok {
			return
		}
		select {
		case slots <- struct{}{}:
		default:
			if conn.ReplyError(id, tako.Errorf(tako.CodeBusy, "%d dials are under way", MaxDials)) != nil {
				return
			}
			continue
		}
		all.Go(func() {
			defer func() { <-slots }()
			if err := a.dial(conn, id, dial.Instance); err != nil {
				_ = conn.Close() // the proxy does not read: Receive ends this socket
			}
		})
	}
}

// dial connects to an instance and passes the connection on. The error is of
// conn: one of the instance is an answer.
func (a *agent) dial(conn *wire.Conn, id uint64, instance tako.InstanceID) error {
	t, ok := a.dialable.get(instance)
	if !ok {
		return conn.ReplyError(id, tako.Errorf(tako.CodeNotFound, "instance %s is not there, not ready, or not on TCP", instance))
	}
	ctx, cancel := context.WithTimeout(a.work, DialTimeout)
	defer cancel()
	tcp, err := health.Dial(ctx, t.port, t.uid)
	if err != nil {
		return conn.ReplyError(id, tako.Errorf(tako.CodeFailed, "connect to instance %s: %s", instance, err))
	}
	defer tcp.Close() // the proxy has its own descriptor of it
	raw, err := tcp.SyscallConn()
	if err != nil {
		return conn.ReplyError(id, err)
	}
	var sent error
	if err := raw.Control(func(fd uintptr) { // not File: that would make it blocking
		sent = conn.Reply(id, &wire.Dialed{}, ipc.FD(fd))
	}); err != nil {
		return conn.ReplyError(id, err)
	}
	return sent
}
