package proxy

import (
	"errors"
	"net"
	"net/netip"
	"sync"
	"syscall"
	"time"

	"github.com/hashicorp/go-hclog"

	"tako/internal/proxy/message"
)

// The limits of connections from clients. One more is closed as soon as it is
// accepted.
const (
	// MaxConnections bounds them all, and the requests at once, where the limit of
	// open files allows as many: each may need a descriptor to an instance too.
	MaxConnections = 65_536
	// ReservedFiles are kept back for all else: sockets to the master and the agent,
	// listeners, connections to instances that wait for use.
	ReservedFiles = 256
	// minConnections is for a limit of open files that leaves nothing.
	minConnections = 64
	// MaxPerClient bounds those of one address, IPv6 by its first 64 bits. It is
	// not for this host and the trusted proxies, which stand for many clients.
	MaxPerClient = 2048
	// refusalsEvery is how often at most refusals are logged.
	refusalsEvery = 10 * time.Second
)

// maxConnections is how many connections a limit of open files allows.
func maxConnections(files uint64) int {
	if files < ReservedFiles+2*minConnections {
		return minConnections
	}
	return int(min((files-ReservedFiles)/2, MaxConnections)) //nolint:gosec // not more than a constant
}

// openFiles is the limit of open files. The runtime has raised it to the hard
// limit at the start.
func openFiles() uint64 {
	var limit syscall.Rlimit
	if syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit) != nil {
		return 1024 // what it is where nobody has set it
	}
	return limit.Cur
}

// doorman counts connections and turns away what is too many.
type doorman struct {
	most, perClient int
	exempt          func(netip.Addr) bool // from perClient
	announces       func() bool           // whether balancers say who a client is
	log             hclog.Logger

	mu       sync.Mutex
	open     int
	byClient map[netip.Addr]int
	refused  int       // since it was last logged
	logged   time.Time // when that was
}

func newDoorman(most int, exempt func(netip.Addr) bool, log hclog.Logger) *doorman {
	return &doorman{most: most, perClient: MaxPerClient, exempt: exempt, announces: func() bool { return false }, log: log, byClient: make(map[netip.Addr]int)}
}

// clientKey is what stands for a client: not valid for a Unix socket.
func clientKey(addr net.Addr) netip.Addr {
	tcp, ok := addr.(*net.TCPAddr)
	if !ok {
		return netip.Addr{}
	}
	a := tcp.AddrPort().Addr().Unmap().WithZone("")
	if a.Is6() {
		p, _ := a.Prefix(64) // an IPv6 address has so many bits
		return p.Addr()
	}
	return a
}

// enter counts a connection, or says that it is one too many.
func (d *doorman) enter(key netip.Addr, exempt bool) bool {
	d.mu.Lock()
	ok := d.open < d.most && (exempt || d.byClient[key] < d.perClient)
	var refused int
	if ok {
		d.open++
		if !exempt {
			d.byClient[key]++
		}
	} else if d.refused++; time.Since(d.logged) >= refusalsEvery {
		refused, d.refused, d.logged = d.refused, 0, time.Now()
	}
	open := d.open
	d.mu.Unlock()
	if refused > 0 {
		d.log.Warn("too many connections; some are refused", "refused", refused, "open", open, "most", d.most, "client", key)
	}
	return ok
}

func (d *doorman) leave(key netip.Addr, exempt bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.open--
	if exempt {
		return
	}
	if d.byClient[key]--; d.byClient[key] == 0 {
		delete(d.byClient, key)
	}
}

// seat is the place of one connection in the counts.
type seat struct {
	door   *doorman
	key    netip.Addr
	exempt bool
}

// admit gives a connection from addr a place, if there is one.
func (d *doorman) admit(addr net.Addr) (seat, bool) {
	key := clientKey(addr)
	exempt := !key.IsValid() || key.IsLoopback() || d.exempt(addrOf(addr))
	return seat{door: d, key: key, exempt: exempt}, d.enter(key, exempt)
}

// leave gives the place back. It comes once.
func (s seat) leave() { s.door.leave(s.key, s.exempt) }

// guarded is a listener with a doorman.
type guarded struct {
	net.Listener
	door *doorman
	head time.Duration // for the announcement, and again for what comes next
}

// Accept waits for the next connection that may come in.
func (g guarded) Accept() (net.Conn, error) {
	for {
		c, err := g.Listener.Accept()
		if err != nil {
			return nil, err
		}
		if s, ok := g.door.admit(c.RemoteAddr()); ok {
			return &guest{Conn: c, seat: s, door: g.door, head: g.head, new: true}, nil
		}
		_ = c.Close()
	}
}

func addrOf(addr net.Addr) netip.Addr {
	if tcp, ok := addr.(*net.TCPAddr); ok {
		return tcp.AddrPort().Addr().Unmap().WithZone("")
	}
	return netip.Addr{}
}

// guest is a connection that is counted until it is closed.
type guest struct {
	net.Conn
	door   *doorman
	head   time.Duration
	new    bool            // nothing was read
	client *message.Client // of net/http's goroutine for the connection

	mu   sync.Mutex
	seat seat // guarded by mu
	gone bool // guarded by mu
}

// Read reads. The first one is of a goroutine that serves this connection alone:
// it learns who the client is.
func (g *guest) Read(b []byte) (int, error) {
	if g.new {
		g.new = false
		if err := g.announced(); err != nil {
			_ = g.Conn.Close()
			return 0, err
		}
	}
	return g.Conn.Read(b)
}

func (g *guest) announced() error {
	if !g.door.announces() {
		return nil
	}
	client, err := g.door.announced(g.Conn, time.Now().Add(g.head))
	if err != nil {
		return err
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.gone {
		return net.ErrClosed
	}
	if g.seat, err = g.seat.announce(client, g.client); err != nil {
		return err
	}
	return g.SetReadDeadline(time.Now().Add(g.head)) // as net/http had set it
}

// Close ends the connection. It may come twice.
func (g *guest) Close() error {
	err := g.Conn.Close()
	g.mu.Lock()
	defer g.mu.Unlock()
	if !g.gone {
		g.gone = true
		g.seat.leave()
	}
	return err
}

// CloseWrite ends the half that we send.
func (g *guest) CloseWrite() error {
	if h, ok := g.Conn.(interface{ CloseWrite() error }); ok {
		return h.CloseWrite()
	}
	return errors.ErrUnsupported
}
