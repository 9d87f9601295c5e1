package message

import (
	"bytes"
	"net/netip"
)

// lower maps ASCII letters to lower case, and all else to itself.
var lower = func() (t [256]byte) {
	for i := range t {
		t[i] = byte(i)
		if i >= 'A' && i <= 'Z' {
			t[i] += 'a' - 'A'
		}
	}
	return t
}()

// The classes of bytes.
const (
	isToken  = 1 << iota // RFC 9110, 5.6.2
	isValue              // in a field value: visible, obs-text, space, tab
	isTarget             // in a target: visible ASCII but '"', '#', '<', '>', '\', '^', '`', '{', '|', '}'
	isName               // in a host name: letters, digits, '.', '-', '_'
)

var class = func() (t [256]byte) {
	for i := range 256 {
		c := byte(i)
		alnum := c >= '0' && c <= '9' || c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z'
		if alnum || bytes.IndexByte([]byte("!#$%&'*+-.^_`|~"), c) >= 0 {
			t[i] |= isToken
		}
		if c == '\t' || c >= ' ' && c != 0x7f {
			t[i] |= isValue
		}
		// What RFC 3986 does not allow and browsers send all the same in a query or
		// path ('"', '<', '>', '\', '^', '`', '{', '|', '}') is let through: apps
		// live with it, and it changes no framing.
		if c > ' ' && c < 0x7f && c != '#' {
			t[i] |= isTarget
		}
		if alnum || c == '.' || c == '-' || c == '_' {
			t[i] |= isName
		}
	}
	return t
}()

func all(b []byte, is byte) bool {
	for _, c := range b {
		if class[c]&is == 0 {
			return false
		}
	}
	return true
}

// ValidToken reports whether b is a token (RFC 9110, 5.6.2): a method or the name
// of a field.
func ValidToken(b []byte) bool { return len(b) > 0 && all(b, isToken) }

// ValidValue reports whether b may be the value of a field: no control byte but
// tab, so neither CR, LF nor NUL.
func ValidValue(b []byte) bool { return all(b, isValue) }

// ValidTarget reports whether b is a target in origin form, or "*": visible
// ASCII without a fragment.
func ValidTarget(b []byte) bool {
	return len(b) > 0 && (b[0] == '/' || len(b) == 1 && b[0] == '*') && all(b, isTarget)
}

// EqualFold reports whether b is the lower-case s but for the case of ASCII
// letters.
func EqualFold(b []byte, s string) bool {
	if len(b) != len(s) {
		return false
	}
	for i, c := range b {
		if lower[c] != s[i] {
			return false
		}
	}
	return true
}

// AppendLower appends b in lower case.
func AppendLower(to, b []byte) []byte {
	for _, c := range b {
		to = append(to, lower[c])
	}
	return to
}

// Trim takes spaces and tabs off both ends.
func Trim(b []byte) []byte {
	for len(b) > 0 && (b[0] == ' ' || b[0] == '\t') {
		b = b[1:]
	}
	for len(b) > 0 && (b[len(b)-1] == ' ' || b[len(b)-1] == '\t') {
		b = b[:len(b)-1]
	}
	return b
}

// HasToken reports whether the comma-separated list b has the lower-case token t,
// in any case.
func HasToken(b []byte, t string) bool {
	for len(b) > 0 {
		item := b
		if i := bytes.IndexByte(b, ','); i >= 0 {
			item, b = b[:i], b[i+1:]
		} else {
			b = nil
		}
		if EqualFold(Trim(item), t) {
			return true
		}
	}
	return false
}

// maxHost bounds a host name without its port, in bytes (RFC 1035, 2.3.4).
const maxHost = 255

// ParseHost takes the port off an authority of the form host[:port] and reports
// whether it is one: a name of letters, digits, '.', '-' and '_', an IPv4
// address, or an IPv6 address in brackets, which name keeps; a port, if any, from
// 1 to 65535. There is no user part. Port is nil for none.
func ParseHost(host []byte) (name, port []byte, ok bool) {
	if len(host) > 0 && host[0] == '[' {
		end := bytes.IndexByte(host, ']')
		if end < 0 {
			return nil, nil, false
		}
		name, port = host[:end+1], host[end+1:]
		addr, err := netip.ParseAddr(string(name[1:end]))
		if err != nil || !addr.Is6() || addr.Zone() != "" {
			return nil, nil, false
		}
		if len(port) > 0 {
			if port[0] != ':' {
				return nil, nil, false
			}
			port = port[1:]
		}
	} else {
		name, port, _ = bytes.Cut(host, []byte{':'})
		if len(name) == 0 || len(name) > maxHost || !all(name, isName) {
			return nil, nil, false
		}
	}
	if len(port) == 0 {
		return name, nil, true
	}
	n := 0
	for _, c := range port {
		if c < '0' || c > '9' || len(port) > 5 {
			return nil, nil, false
		}
		n = n*10 + int(c-'0')
	}
	return name, port, n > 0 && n <= 65535
}
