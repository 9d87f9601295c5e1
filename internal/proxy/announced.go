package proxy

import (
	"errors"
	"net"
	"net/netip"
	"time"

	"tako/internal/proxy/message"
	"tako/internal/proxy/proxyproto"
)

var (
	errStranger = errors.New("only trusted proxies may connect, since they announce clients by the PROXY protocol")
	errTooMany  = errors.New("too many connections of the announced client")
)

// announced reads who the client of a new connection is, where the balancers in
// front announce them; elsewhere it is the peer itself. On an error the connection
// is to be closed; otherwise nothing of the client's was read, and there is no
// read deadline.
func (d *doorman) announced(c net.Conn, by time.Time) (proxyproto.Client, error) {
	if !d.announces() {
		return proxyproto.Client{Local: true}, nil
	}
	if !d.exempt(addrOf(c.RemoteAddr())) {
		return proxyproto.Client{}, errStranger
	}
	return proxyproto.Read(c, by)
}

// announce seats the client that a balancer has announced, and says in c who that
// is. One of whom nothing is told has no address, so that nobody believes it as
// the balancer itself would be; it keeps the balancer's seat.
func (s seat) announce(who proxyproto.Client, c *message.Client) (seat, error) {
	if who.Local {
		return s, nil
	}
	c.Addr = who.Addr.Addr()
	if !who.Addr.IsValid() {
		return s, nil
	}
	return s.pass(who.Addr)
}

// pass gives a balancer's place to its client, whose own count then matters.
// Without an error s is no longer to be left, but what it returns.
func (s seat) pass(client netip.AddrPort) (seat, error) {
	theirs, ok := s.door.admit(net.TCPAddrFromAddrPort(client))
	if !ok {
		return s, errTooMany
	}
	s.leave()
	return theirs, nil
}
