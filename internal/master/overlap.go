package master

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"tako/internal/ipc"
	"tako/internal/logging"
	"tako/internal/management"
	"tako/internal/paths"
	"tako/internal/tako"
	"tako/internal/wire"
)

// Two servers may have one data root for a while. The owner of its lock writes;
// a second one, started with --instance-port-offset, is handed the owner's
// listening sockets, so that nothing waits in a queue that is closed, runs its own
// instances of each app, follows the owner's changes, and takes its place when it
// has gone. Here is how they talk; follow.go is what the second does.

// Times of a second server.
const (
	// FollowEvery is how often it looks for changes and for the owner's lock.
	FollowEvery = 200 * time.Millisecond
	// FollowWait is how long it waits at its start for the owner to answer.
	FollowWait = 10 * time.Second
	// WarmWait bounds how long the owner's proxy answers alone while the second's
	// instances come up.
	WarmWait = 60 * time.Second
	// SettleWait bounds how long an owner's command waits for the second to do the
	// same.
	SettleWait = 30 * time.Second
)

// follows reports whether another server owns the data root.
func (s *server) follows() bool { return s.ownerPID.Load() != 0 }

// A second is what an owner knows of the server beside it.
type second struct {
	mu       sync.Mutex
	conn     *wire.Conn // nil while there is none
	pid      int
	follow   wire.Follow   // of the last one
	revision uint64        // of the last command that it was told of
	settled  uint64        // the last that it has settled
	changed  chan struct{} // closed when one of these changes; nil: nobody waits
}

func (c *second) changedLocked() {
	if c.changed != nil {
		close(c.changed)
		c.changed = nil
	}
}

// connected returns the pid of the second server, 0 while there is none.
func (c *second) connected() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.conn == nil {
		return 0
	}
	return c.pid
}

// byDirectory calls f with a path of the socket that is short enough whatever the
// data root is called.
func byDirectory[T any](socket string, f func(path string) (T, error)) (T, error) {
	dir, err := os.Open(filepath.Dir(socket))
	if err != nil {
		var none T
		return none, err
	}
	defer dir.Close()
	return f(fmt.Sprintf("/proc/self/fd/%d/%s", dir.Fd(), filepath.Base(socket)))
}

// listenSecond makes the socket at which a second server asks. We hold the lock:
// what is there is a dead owner's.
func listenSecond(socket string) (*net.UnixListener, error) {
	if err := os.Remove(socket); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	return byDirectory(socket, func(path string) (*net.UnixListener, error) {
		ln, err := net.ListenUnix("unixpacket", &net.UnixAddr{Name: path, Net: "unixpacket"})
		if err != nil {
			return nil, err
		}
		ln.SetUnlinkOnClose(false)
		if err := os.Chmod(socket, 0o600); err != nil { // who came before is looked at all the same
			return nil, errors.Join(err, ln.Close())
		}
		return ln, nil
	})
}

// trust returns the pid at the other end, which is of our own user or root's.
func trust(c *net.UnixConn) (pid int, err error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return 0, err
	}
	var cred *unix.Ucred
	ctl := raw.Control(func(fd uintptr) { cred, err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) })
	if err := errors.Join(ctl, err); err != nil {
		return 0, err
	}
	if cred.Uid != 0 && int(cred.Uid) != os.Geteuid() {
		return 0, fmt.Errorf("pid %d is of uid %d, neither root nor ours", cred.Pid, cred.Uid)
	}
	return int(cred.Pid), nil
}

// speak makes a link of a connection, which it owns.
func speak(c *net.UnixConn, self wire.Role) (*wire.Conn, error) {
	fd, err := dupOf(c)
	_ = c.Close()
	if err != nil {
		return nil, err
	}
	ch, err := ipc.Open(fd)
	if err != nil {
		return nil, err
	}
	return wire.NewConn(ch, wire.LinkSecond, self), nil
}

// serveSecond hands the listeners to a second server that asks, until ctx ends.
func (s *server) serveSecond(ctx context.Context) {
	socket := s.layout.SecondSocket()
	ln, err := listenSecond(socket)
	if err != nil {
		s.log.Warn("no second server can be started beside this one", logging.Err, err)
		return
	}
	defer os.Remove(socket)
	var serving sync.WaitGroup
	defer serving.Wait()
	defer ln.Close()
	defer context.AfterFunc(ctx, func() { _ = ln.Close() })()
	for ctx.Err() == nil {
		c, err := ln.AcceptUnix()
		if ctx.Err() != nil {
			return
		}
		if err != nil {
			s.log.Warn("a second server could not ask", logging.Err, err)
			select {
			case <-time.After(FollowEvery):
			case <-ctx.Done():
			}
			continue
		}
		conn, err := s.admitSecond(c)
		if err != nil {
			s.log.Warn("a second server was refused", logging.Err, err)
			continue
		}
		serving.Go(func() { s.hearSecond(ctx, conn) })
	}
}

// admitSecond greets who asks, and makes it the second server unless there is one.
func (s *server) admitSecond(c *net.UnixConn) (_ *wire.Conn, err error) {
	pid, err := trust(c)
	if err != nil {
		return nil, errors.Join(err, c.Close())
	}
	conn, err := speak(c, wire.Master)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			_ = conn.Close()
		}
	}()
	if err := conn.SetReadDeadline(time.Now().Add(ReadyTimeout)); err != nil {
		return nil, err
	}
	if err := conn.Send(0, &wire.Hello{Protocol: wire.ProtocolVersion, Version: s.version, PID: os.Getpid()}); err != nil {
		return nil, err
	}
	if m, err := conn.Receive(); err != nil {
		return nil, err
	} else if h, ok := m.Body.(*wire.Hello); !ok || h.Protocol != wire.ProtocolVersion {
		return nil, fmt.Errorf("pid %d speaks another protocol", pid)
	}
	m, err := conn.Receive()
	if err != nil {
		return nil, err
	}
	follow, ok := m.Body.(*wire.Follow)
	if !ok {
		return nil, fmt.Errorf("pid %d says %T", pid, m.Body)
	}
	if err := conn.SetReadDeadline(time.Time{}); err != nil {
		return nil, err
	}
	shared := &wire.Shared{Activated: s.activated, FirstInstance: s.nextThousand()}
	fds := make([]ipc.FD, 0, len(s.listeners))
	for _, l := range s.listeners {
		shared.Names, fds = append(shared.Names, l.name), append(fds, l.fd)
	}

	c2 := &s.second
	c2.mu.Lock()
	defer c2.mu.Unlock()
	if c2.conn != nil {
		busy := tako.Errorf(tako.CodeConflict, "pid %d serves beside it already: stop that one first", c2.pid)
		return nil, errors.Join(busy, conn.ReplyError(m.ID, busy))
	}
	if err := conn.Reply(m.ID, shared, fds...); err != nil {
		return nil, err
	}
	if err := conn.Send(0, &wire.Tickets{Keys: s.tickets.current()}); err != nil {
		return nil, err
	}
	c2.conn, c2.pid, c2.follow, c2.settled = conn, pid, *follow, c2.revision
	s.log.Info("a second server serves beside this one", logging.PID, pid)
	return conn, nil
}

// nextThousand is a number above those of the instances that run now.
func (s *server) nextThousand() uint32 {
	highest := uint32(0)
	for _, a := range s.allApps() {
		a.mu.Lock()
		for n := range a.procs {
			highest = max(highest, n)
		}
		a.mu.Unlock()
	}
	return (highest/1000+1)*1000 + 1
}

// hearSecond hears the second server to its end.
func (s *server) hearSecond(ctx context.Context, conn *wire.Conn) {
	defer context.AfterFunc(ctx, func() { _ = conn.Close() })()
	c := &s.second
	for {
		m, err := conn.Receive()
		if err != nil {
			_ = conn.Close()
			c.mu.Lock()
			c.conn = nil
			if ctx.Err() == nil {
				c.follow = wire.Follow{}
				s.log.Info("the second server has left", logging.PID, c.pid)
			}
			c.changedLocked()
			c.mu.Unlock()
			return
		}
		if b, ok := m.Body.(*wire.Settled); ok {
			c.mu.Lock()
			c.settled = max(c.settled, b.Revision)
			c.changedLocked()
			c.mu.Unlock()
		}
		m.Discard()
	}
}

// shareTickets tells the second server the keys of session tickets.
func (s *server) shareTickets(keys [][]byte) {
	s.second.mu.Lock()
	defer s.second.mu.Unlock()
	if s.second.conn != nil {
		if err := s.second.conn.Send(0, &wire.Tickets{Keys: keys}); err != nil {
			_ = s.second.conn.Close() // it asks again
		}
	}
}

// announce tells the second server that a command was carried out, and waits
// until it has done the same, so that a request after the reply finds what the
// reply says whoever answers it.
func (s *server) announce(ctx context.Context, progress management.Progress) {
	c := &s.second
	c.mu.Lock()
	conn, pid := c.conn, c.pid
	if conn == nil {
		c.mu.Unlock()
		return
	}
	c.revision++
	revision := c.revision
	c.mu.Unlock()
	if err := conn.Send(0, &wire.Changed{Revision: revision}); err != nil {
		return // it has gone
	}
	progress(fmt.Sprintf("waiting for the second server, pid %d", pid))
	late := time.NewTimer(SettleWait)
	defer late.Stop()
	for {
		c.mu.Lock()
		done := c.conn != conn || c.settled >= revision
		if c.changed == nil {
			c.changed = make(chan struct{})
		}
		changed := c.changed
		c.mu.Unlock()
		if done {
			return
		}
		select {
		case <-changed:
		case <-late.C:
			s.log.Warn("the second server has not followed yet", logging.PID, pid, "waited", SettleWait.String())
			return
		case <-s.stopping:
			return
		case <-ctx.Done():
			return
		}
	}
}

// passLink points the link of the management socket to the second server, as we
// stop: it is there for the reading, and soon for all.
func (s *server) passLink() {
	s.second.mu.Lock()
	to := s.second.follow
	s.second.mu.Unlock()
	if to.Socket == "" || to.Link != s.layout.Socket || !s.mgmtOwn {
		return
	}
	if err := management.Link(to.Socket, to.Link); err != nil {
		s.log.Warn("the management socket's link was not passed on", logging.Err, err)
	}
}

// An announcer is the backend of an owner: after each command the second server
// does the same.
type announcer struct{ *server }

func silent(string) {}

func (a announcer) told(ctx context.Context, err error, progress management.Progress) {
	if err == nil {
		a.announce(ctx, progress)
	}
}

// Deploy implements management.Backend.
func (a announcer) Deploy(ctx context.Context, r management.DeployRequest, progress management.Progress) (management.DeployResult, error) {
	res, err := a.server.Deploy(ctx, r, progress)
	a.told(ctx, err, progress)
	return res, err
}

// Rollback implements management.Backend.
func (a announcer) Rollback(ctx context.Context, app tako.AppID, version tako.ReleaseID, progress management.Progress) (management.DeployResult, error) {
	res, err := a.server.Rollback(ctx, app, version, progress)
	a.told(ctx, err, progress)
	return res, err
}

// Restart implements management.Backend.
func (a announcer) Restart(ctx context.Context, app tako.AppID, progress management.Progress) (management.DeployResult, error) {
	res, err := a.server.Restart(ctx, app, progress)
	a.told(ctx, err, progress)
	return res, err
}

// Stop implements management.Backend.
func (a announcer) Stop(ctx context.Context, app tako.AppID) error {
	err := a.server.Stop(ctx, app)
	a.told(ctx, err, silent)
	return err
}

// Delete implements management.Backend.
func (a announcer) Delete(ctx context.Context, app tako.AppID) (bool, error) {
	existed, err := a.server.Delete(ctx, app)
	a.told(ctx, err, silent)
	return existed, err
}

// Scale implements management.Backend.
func (a announcer) Scale(ctx context.Context, app tako.AppID, instances uint8, progress management.Progress) error {
	err := a.server.Scale(ctx, app, instances, progress)
	a.told(ctx, err, progress)
	return err
}

// UpdateSecrets implements management.Backend.
func (a announcer) UpdateSecrets(ctx context.Context, app tako.AppID, secrets map[string]string, merge bool, progress management.Progress) (bool, error) {
	restarted, err := a.server.UpdateSecrets(ctx, app, secrets, merge, progress)
	a.told(ctx, err, progress)
	return restarted, err
}

// An ownerLink is a second server's connection to the owner.
type ownerLink struct {
	conn *wire.Conn
	// asked is the newest revision that the owner waits for; settled, of the
	// following goroutine, the last that it was answered.
	asked   atomic.Uint64
	settled uint64
	ended   chan struct{} // closed when the owner has gone, or reloads
}

// joined is what an owner hands to a second server.
type joined struct {
	conn   *wire.Conn
	pid    int
	self   int // its pid as it sees itself, which is in the names of its files
	shared wire.Shared
	ports  []listener
	keys   [][]byte
}

func (j *joined) discard() {
	_ = j.conn.Close()
	closeAll(j.ports)
}

func closeAll(ports []listener) {
	for _, l := range ports {
		l.fd.Close()
	}
}

// JoinWait is how long a socket of the owner's may be there that does not listen
// yet.
const JoinWait = time.Second

// join asks the owner to serve beside it. An error that is a *tako.Error is the
// owner's refusal.
func (s *server) join() (j joined, err error) {
	var c *net.UnixConn
	for end := time.Now().Add(JoinWait); ; time.Sleep(JoinWait / 100) {
		c, err = byDirectory(s.layout.SecondSocket(), func(path string) (*net.UnixConn, error) {
			return net.DialUnix("unixpacket", nil, &net.UnixAddr{Name: path, Net: "unixpacket"})
		})
		if err == nil {
			break
		}
		if !errors.Is(err, syscall.ECONNREFUSED) || time.Now().After(end) {
			return j, fmt.Errorf("ask it for its listeners: %w", err)
		}
	}
	if j.pid, err = trust(c); err != nil {
		return j, errors.Join(err, c.Close())
	}
	if j.conn, err = speak(c, wire.Second); err != nil {
		return j, err
	}
	defer func() {
		if err != nil {
			j.discard()
		}
	}()
	if err := j.conn.SetReadDeadline(time.Now().Add(ReadyTimeout)); err != nil {
		return j, err
	}
	m, err := j.conn.Receive()
	if err != nil {
		return j, fmt.Errorf("it does not greet: %w", err)
	}
	hello, ok := m.Body.(*wire.Hello)
	if !ok || hello.Protocol != wire.ProtocolVersion {
		return j, tako.Errorf(tako.CodeConflict, "it speaks another protocol than version %s: start the version that it runs", s.version)
	}
	j.self = hello.PID
	if j.pid == 0 { // it lives in another namespace of processes
		j.pid = hello.PID
	}
	if err := j.conn.Send(0, &wire.Hello{Protocol: wire.ProtocolVersion, Version: s.version, PID: os.Getpid()}); err != nil {
		return j, err
	}
	if err := j.conn.Send(1, &wire.Follow{Socket: s.layout.PIDSocket(os.Getpid()), Link: s.layout.Socket}); err != nil {
		return j, err
	}
	if m, err = j.conn.Receive(); err != nil {
		return j, fmt.Errorf("it does not answer: %w", err)
	}
	switch b := m.Body.(type) {
	case *wire.Shared:
		j.shared = *b
	case *wire.Fault:
		return j, tako.Errorf(tako.Code(b.Code), "%s", b.Message)
	default:
		m.Discard()
		return j, fmt.Errorf("it answers %T", m.Body)
	}
	for i, fd := range m.Files {
		j.ports = append(j.ports, listener{name: j.shared.Names[i], fd: fd})
	}
	for i := range j.ports {
		l := &j.ports[i]
		if listening, err := unix.GetsockoptInt(int(l.fd), unix.SOL_SOCKET, unix.SO_ACCEPTCONN); err != nil || listening != 1 {
			return j, fmt.Errorf("its %s is not a listening socket", l.name)
		}
		if l.addr, err = boundTo(l.fd); err != nil {
			return j, err
		}
	}
	if m, err = j.conn.Receive(); err != nil {
		return j, err
	}
	keys, ok := m.Body.(*wire.Tickets)
	if !ok {
		m.Discard()
		return j, fmt.Errorf("it says %T", m.Body)
	}
	j.keys = keys.Keys
	return j, j.conn.SetReadDeadline(time.Time{})
}

// openBeside makes this the second server of the data root: inUse says whose that
// is.
func (s *server) openBeside(ctx context.Context, inUse error) (*net.UnixListener, error) {
	refuse := func(err error) error { return fmt.Errorf("%w; serving beside it did not work: %w", inUse, err) }
	if len(s.unitPorts) > 0 || s.unitMgmt != 0 {
		return nil, refuse(errors.New("sockets were passed to this one: start it without socket units, it gets the first one's"))
	}
	var err error
	if s.lock, err = os.OpenFile(s.layout.Lock(), os.O_RDWR|unix.O_NOFOLLOW, 0); err != nil {
		return nil, refuse(err)
	}
	s.undo = append(s.undo, func() { _ = s.lock.Close() }, s.closePorts)
	s.layout.Second = os.Getpid()
	mgmt, err := management.ListenBeside(s.layout.PIDSocket(os.Getpid()), s.layout.Socket, 0o660, s.socketGID)
	if err != nil {
		return nil, refuse(err)
	}
	s.ownMgmt(mgmt)
	var j joined
	for end := time.Now().Add(FollowWait); ; {
		if j, err = s.join(); err == nil {
			break
		}
		if _, refused := errors.AsType[*tako.Error](err); refused || time.Now().After(end) {
			return nil, refuse(err)
		}
		select {
		case <-time.After(FollowEvery / 4): // it may be starting, or in a reload
		case <-ctx.Done():
			return nil, refuse(ctx.Err())
		}
	}
	s.listeners, s.activated, s.firstInstance = j.ports, j.shared.Activated, j.shared.FirstInstance
	if !s.activated {
		err = samePorts(s.s, j.ports)
	}
	if err == nil {
		s.sweepApart(j.self) // now that we are the one second
		s.undo = append(s.undo, s.removeApart)
		err = s.makeApart()
	}
	if err != nil {
		_ = j.conn.Close()
		return nil, refuse(err)
	}
	s.linkOwner(j)
	return mgmt, nil
}

// samePorts says whether the settings name what the owner listens on: when it has
// gone they count.
func samePorts(s settled, ports []listener) error {
	missing := wantedPorts(s)
	var extra []string
	for _, l := range ports {
		i := slices.IndexFunc(missing, func(w wantedPort) bool {
			return w.name == l.name && w.at.Addr() == l.addr.Addr() && (w.at.Port() == 0 || w.at.Port() == l.addr.Port())
		})
		if i < 0 {
			extra = append(extra, l.addr.String())
			continue
		}
		missing = slices.Delete(missing, i, i+1)
	}
	if len(s.listen) == 0 { // the host may have no IPv6
		missing = slices.DeleteFunc(missing, func(w wantedPort) bool { return w.at.Addr().Is6() })
	}
	if len(extra)+len(missing) == 0 {
		return nil
	}
	var all []string
	for _, l := range ports {
		all = append(all, l.name+" on "+l.addr.String())
	}
	return fmt.Errorf("it serves %s, and the settings of this one name other ports: give it the same --port, --tls-port and --listen-address", strings.Join(all, ", "))
}

// linkOwner goes on with a connection to the owner.
func (s *server) linkOwner(j joined) {
	l := &ownerLink{conn: j.conn, ended: make(chan struct{})}
	s.ownerPID.Store(int64(j.pid))
	s.owner.Store(l)
	s.tickets.set(j.keys)
	go func() {
		defer close(l.ended)
		for {
			m, err := l.conn.Receive()
			if err != nil {
				_ = l.conn.Close()
				s.lookSoon()
				return
			}
			switch b := m.Body.(type) {
			case *wire.Tickets:
				s.tickets.set(b.Keys)
				s.proxies.send(&wire.TicketKeys{Keys: s.tickets.current()})
			case *wire.Changed:
				l.asked.Store(b.Revision)
				s.lookSoon()
			}
			m.Discard()
		}
	}()
}

// lookSoon has the following goroutine look for changes now.
func (s *server) lookSoon() {
	select {
	case s.looking <- struct{}{}:
	default:
	}
}

// relink connects to the owner again after it reloaded. Should it serve other
// ports now, a reload of our own takes those.
func (s *server) relink() {
	if l := s.owner.Load(); l != nil {
		select {
		case <-l.ended:
		default:
			return
		}
	}
	j, err := s.join()
	if err != nil {
		s.log.Debug("the owner of the data root is not reached", logging.Err, err)
		return // it is looked for again, and so is its lock
	}
	if j.pid != int(s.ownerPID.Load()) {
		s.log.Warn("the data root has another owner now", logging.PID, j.pid)
	}
	same := len(j.ports) == len(s.listeners)
	for _, l := range j.ports {
		same = same && slices.ContainsFunc(s.listeners, func(x listener) bool { return x.name == l.name && x.addr == l.addr })
	}
	var moved *[]listener
	if same {
		closeAll(j.ports)
	} else {
		s.log.Info("the owner of the data root serves other ports now: reloading to serve them too")
		moved = &j.ports
	}
	if before := s.movedPorts.Swap(moved); before != nil { // of a reload that failed, or is to come
		closeAll(*before)
	}
	if moved != nil {
		s.wantReload()
	}
	s.linkOwner(j)
	s.proxies.send(&wire.TicketKeys{Keys: s.tickets.current()})
}

// portsToHand are the listeners that the next image is to serve.
func (s *server) portsToHand() []listener {
	if moved := s.movedPorts.Load(); moved != nil {
		return *moved
	}
	return s.listeners
}

// tryLock reports whether the lock of the data root is ours now.
func (s *server) tryLock() bool {
	return unix.Flock(int(s.lock.Fd()), unix.LOCK_EX|unix.LOCK_NB) == nil
}

// makeApart makes the folder of a second server's sockets, empty, and holds it.
func (s *server) makeApart() error {
	dir, held, err := holdMade(func() (string, error) { return s.layout.Instances(), makeOwn(s.layout.Instances(), 0o711) })
	if errors.Is(err, errHeld) {
		return fmt.Errorf("%w: a server with the same pid, in another namespace of processes, has its sockets there: choose another --socket folder for this one", err)
	}
	if err != nil {
		return err
	}
	s.apart = held
	left, err := os.ReadDir(dir)
	for _, e := range left { // of a dead server with our pid
		err = errors.Join(err, os.RemoveAll(filepath.Join(dir, e.Name())))
	}
	return err
}

// removeApart removes the folder of a second server's sockets, if it is ours.
func (s *server) removeApart() {
	if s.apart == nil {
		return
	}
	_ = os.RemoveAll(s.layout.Instances()) // else the next second server sweeps it
	_ = s.apart.Close()
	s.apart = nil
}

// sweepApart removes the folders of second servers that are gone. The owner may
// have been one: its folder stays, also if its version holds none.
func (s *server) sweepApart(owner int) {
	entries, err := os.ReadDir(s.layout.Run)
	if err != nil {
		return
	}
	for _, e := range entries {
		num, ok := strings.CutPrefix(e.Name(), paths.SecondPrefix)
		pid, err := strconv.Atoi(num)
		if ok && err == nil && strconv.Itoa(pid) == num && pid != owner && pid != s.layout.Second {
			removeUnheld(filepath.Join(s.layout.Run, e.Name()))
		}
	}
}
