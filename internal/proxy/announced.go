package proxy

import (
	"errors"
	"net"
	"net/netip"
	"time"

	"tako/internal/proxy/proxyproto"
)

var (
	errStranger = errors.New("only trusted proxies may connect, since they announce clients by the PROXY protocol")
	errTooMany  = errors.New("too many connections of the announced client")
)

// announced reads who the client of a new connection is, where the balancers in
// front announce them. The address is not valid if it is the peer. On an error
// the connection is to be closed; otherwise nothing of the client's was read, and
// there is no read deadline.
func (d *doorman) announced(c net.Conn, by time.Time) (netip.AddrPort, error) {
	if !d.announces() {
		return netip.AddrPort{}, nil
	}
	if !d.exempt(addrOf(c.RemoteAddr())) {
		return netip.AddrPort{}, errStranger
	}
	return proxyproto.Read(c, by)
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
