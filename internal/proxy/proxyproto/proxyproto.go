package proxyproto

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strconv"
	"time"
)

// The limits of a header, in bytes with its end.
const (
	// MaxV1 is what version 1 says itself.
	MaxV1 = 107
	// MaxV2 leaves room for extensions behind the addresses, a certificate say.
	MaxV2 = 4 << 10
)

// What is wrong with a connection.
var (
	ErrNone    = errors.New("it does not begin with a PROXY protocol header")
	ErrInvalid = errors.New("its PROXY protocol header is broken")
	ErrTooLong = fmt.Errorf("its PROXY protocol header is longer than %d bytes, or %d of version 2", MaxV1, MaxV2)
)

var (
	prefixV1 = []byte("PROXY ")
	prefixV2 = []byte("\r\n\r\n\x00\r\nQUIT\n")
)

const headV2 = 16 // the part of fixed length

// A Client is who a header says that the connection is of.
type Client struct {
	// Addr is not valid if Local, or if the balancer does not tell: UNKNOWN, UNSPEC,
	// or a Unix socket.
	Addr netip.AddrPort
	// Local: the balancer itself, as in its probes. In all other cases the client is
	// somebody else, told or not.
	Local bool
}

// Read reads the header at the beginning of a connection, by the deadline, and
// returns the client that it names. What follows the header is left in the
// connection; its read deadline is taken off. An error is one of this package's,
// or of reading.
func Read(c net.Conn, deadline time.Time) (Client, error) {
	if err := c.SetReadDeadline(deadline); err != nil {
		return Client{}, err
	}
	client, err := read(c)
	if err != nil {
		return Client{}, fmt.Errorf("read who the client is: %w", err)
	}
	return client, c.SetReadDeadline(time.Time{})
}

func read(r io.Reader) (Client, error) {
	var buf [MaxV1]byte
	// No header is shorter than this beginning of version 2.
	first := buf[:len(prefixV2)]
	for n := 0; n < len(first); {
		m, err := r.Read(first[n:])
		n += m
		if !bytes.HasPrefix(prefixV2, first[:n]) && !bytes.HasPrefix(prefixV1, first[:min(n, len(prefixV1))]) {
			return Client{}, ErrNone
		}
		if err != nil && n < len(first) {
			return Client{}, cut(err)
		}
	}
	if first[0] == prefixV2[0] {
		return readV2(r)
	}
	n := len(first)
	for ; buf[n-1] != '\n'; n++ {
		if n == len(buf) {
			return Client{}, ErrTooLong
		}
		// Nothing says where the line ends but its end.
		if _, err := io.ReadFull(r, buf[n:n+1]); err != nil {
			return Client{}, cut(err)
		}
	}
	return parseV1(buf[:n])
}

// cut is the error of a connection that ended within the header.
func cut(err error) error {
	if err == io.EOF { //nolint:errorlint // readers return it bare
		return io.ErrUnexpectedEOF
	}
	return err
}

// parseV1 parses a line of version 1, which begins with prefixV1 and ends in LF.
func parseV1(line []byte) (Client, error) {
	line, ok := bytes.CutSuffix(line[len(prefixV1):], []byte("\r\n"))
	if !ok || bytes.IndexByte(line, '\n') >= 0 || bytes.IndexByte(line, '\r') >= 0 {
		return Client{}, ErrInvalid
	}
	if rest, is := bytes.CutPrefix(line, []byte("UNKNOWN")); is && (len(rest) == 0 || rest[0] == ' ') {
		return Client{}, nil // what follows is to be ignored
	}
	words := bytes.Split(line, []byte{' '})
	if len(words) != 5 {
		return Client{}, ErrInvalid
	}
	var is6 bool
	switch string(words[0]) {
	case "TCP4":
	case "TCP6":
		is6 = true
	default:
		return Client{}, ErrInvalid
	}
	from, ok1 := address(words[1], is6)
	_, ok2 := address(words[2], is6)
	port, ok3 := number(words[3])
	_, ok4 := number(words[4])
	if !ok1 || !ok2 || !ok3 || !ok4 {
		return Client{}, ErrInvalid
	}
	return Client{Addr: netip.AddrPortFrom(from, port)}, nil
}

// address parses an address of that family.
func address(b []byte, is6 bool) (netip.Addr, bool) {
	a, err := netip.ParseAddr(string(b))
	if err != nil || a.Is4() == is6 || a.Zone() != "" {
		return netip.Addr{}, false
	}
	return a.Unmap(), true
}

// number parses a port as version 1 writes it, without leading zeros.
func number(b []byte) (uint16, bool) {
	n, err := strconv.ParseUint(string(b), 10, 16)
	return uint16(n), err == nil && (b[0] != '0' || len(b) == 1)
}

// The values of version 2.
const (
	version2  = 0x20
	cmdLocal  = 0x0
	cmdProxy  = 0x1
	famUnspec = 0x00 // and any transport
	famTCP4   = 0x11
	famTCP6   = 0x21
	famUnix   = 0x31 // stream
)

// readV2 reads version 2 behind its prefix.
func readV2(r io.Reader) (Client, error) {
	var head [headV2]byte
	fixed := head[len(prefixV2):]
	if _, err := io.ReadFull(r, fixed); err != nil {
		return Client{}, cut(err)
	}
	if fixed[0]&0xf0 != version2 {
		return Client{}, ErrInvalid
	}
	n := int(binary.BigEndian.Uint16(fixed[2:]))
	if n > MaxV2-headV2 {
		return Client{}, ErrTooLong
	}
	body := make([]byte, n)
	if _, err := io.ReadFull(r, body); err != nil {
		return Client{}, cut(err)
	}
	switch fixed[0] & 0xf {
	case cmdLocal:
		return Client{Local: true}, nil // what it says of addresses is to be ignored
	case cmdProxy:
		return parseV2(fixed[1], body)
	}
	return Client{}, ErrInvalid
}

// parseV2 parses addresses and extensions of version 2.
func parseV2(family byte, b []byte) (Client, error) {
	var size, addresses int // of one address, and of all with their ports
	switch family {
	case famUnspec:
		return Client{}, nil
	case famTCP4:
		size, addresses = 4, 12
	case famTCP6:
		size, addresses = 16, 36
	case famUnix:
		addresses = 216
	default:
		return Client{}, ErrInvalid
	}
	if len(b) < addresses || !areExtensions(b[addresses:]) {
		return Client{}, ErrInvalid
	}
	from, ok := netip.AddrFromSlice(b[:size])
	if !ok { // of a Unix socket
		return Client{}, nil
	}
	return Client{Addr: netip.AddrPortFrom(from.Unmap(), binary.BigEndian.Uint16(b[2*size:]))}, nil
}

// areExtensions: b is a row of types, lengths and values, whose meaning is no
// matter.
func areExtensions(b []byte) bool {
	for len(b) >= 3 {
		n := 3 + int(binary.BigEndian.Uint16(b[1:]))
		if n > len(b) {
			return false
		}
		b = b[n:]
	}
	return len(b) == 0
}
