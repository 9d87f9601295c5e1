package message

import "bytes"

// ID names the fields that somebody here asks for; Other is every other one.
type ID uint8

// The fields that have an ID.
const (
	Other ID = iota
	Accept
	AcceptEncoding
	Age
	AltSvc
	Authorization
	CacheControl
	Connection
	ContentEncoding
	ContentLength
	ContentType
	Cookie
	Date
	ETag
	Expect
	Forwarded
	Host
	HTTP2Settings
	KeepAlive
	Location
	Proxy
	ProxyAuthenticate
	ProxyAuthorization
	ProxyConnection
	Range
	RetryAfter
	SecWebSocketAccept
	SecWebSocketKey
	SecWebSocketVersion
	Server
	SetCookie
	TE
	Trailer
	TransferEncoding
	Upgrade
	UserAgent
	Vary
	XForwardedFor
	XForwardedHost
	XForwardedPort
	XForwardedProto
	XRealIP
	XRequestID

	// Disguised is any name that a server which takes '_' for '-' reads as one of
	// those above, and X-Forwarded and any other X-Forwarded-*.
	Disguised

	ids
)

var names = [ids]string{
	Accept: "accept", AcceptEncoding: "accept-encoding", Age: "age", AltSvc: "alt-svc", Authorization: "authorization",
	CacheControl: "cache-control", Connection: "connection", ContentEncoding: "content-encoding",
	ContentLength: "content-length", ContentType: "content-type", Cookie: "cookie", Date: "date", ETag: "etag",
	Expect: "expect", Forwarded: "forwarded", Host: "host", HTTP2Settings: "http2-settings", KeepAlive: "keep-alive",
	Location: "location", Proxy: "proxy", ProxyAuthenticate: "proxy-authenticate", ProxyAuthorization: "proxy-authorization",
	ProxyConnection: "proxy-connection", Range: "range", RetryAfter: "retry-after",
	SecWebSocketAccept: "sec-websocket-accept", SecWebSocketKey: "sec-websocket-key",
	SecWebSocketVersion: "sec-websocket-version", Server: "server", SetCookie: "set-cookie", TE: "te", Trailer: "trailer",
	TransferEncoding: "transfer-encoding", Upgrade: "upgrade", UserAgent: "user-agent", Vary: "vary",
	XForwardedFor: "x-forwarded-for", XForwardedHost: "x-forwarded-host", XForwardedPort: "x-forwarded-port",
	XForwardedProto: "x-forwarded-proto", XRealIP: "x-real-ip", XRequestID: "x-request-id",
}

// String returns the name in lower case, "" for Other and Disguised.
func (id ID) String() string { return names[id] }

const longestName = 24 // of those in names; the tests say so

// byLength has the IDs of names of each length.
var byLength = func() (by [longestName + 1][]ID) {
	for id, name := range names {
		if name != "" {
			by[len(name)] = append(by[len(name)], ID(id)) //nolint:gosec // fewer than 256
		}
	}
	return by
}()

// Lookup returns the ID of a field name of any case.
func Lookup(name []byte) ID {
	if id := lookup(name); id != Other {
		return id
	}
	if disguised(name) {
		return Disguised
	}
	return Other
}

// lookup finds name as it stands.
func lookup(name []byte) ID {
	if len(name) <= longestName {
		for _, id := range byLength[len(name)] {
			if EqualFold(name, names[id]) {
				return id
			}
		}
	}
	return Other
}

// disguised: name, which has no ID, has one with '-' for '_', or is an
// X-Forwarded or X-Forwarded-* of either spelling.
func disguised(name []byte) bool {
	under := bytes.IndexByte(name, '_') >= 0
	if !under && (len(name) < len(forwarded) || lower[name[0]] != forwarded[0]) {
		return false
	}
	var buf [longestName]byte
	n := copy(buf[:], name)
	if under {
		for i, c := range buf[:n] {
			if c == '_' {
				buf[i] = '-'
			}
		}
	}
	if n >= len(forwarded) && EqualFold(buf[:len(forwarded)], forwarded) && (n == len(forwarded) || buf[len(forwarded)] == '-') {
		return true
	}
	return under && n == len(name) && lookup(buf[:n]) != Other
}

const forwarded = "x-forwarded"

// Hop reports whether a field of that id is about one connection only
// (RFC 9110, 7.6.1), framing included.
func (id ID) Hop() bool { return hop[id] }

var hop = [ids]bool{
	Connection: true, KeepAlive: true, ProxyConnection: true, ProxyAuthenticate: true, ProxyAuthorization: true,
	TE: true, Trailer: true, TransferEncoding: true, Upgrade: true, HTTP2Settings: true, Expect: true, ContentLength: true,
	Host: true,
}

// Kept reports whether a field of that id goes on even if Connection names it:
// taking it away would change what a message means, or who sent it.
func (id ID) Kept() bool { return kept[id] }

var kept = [ids]bool{
	Host: true, ContentLength: true, ContentType: true, Authorization: true, Cookie: true, SetCookie: true, CacheControl: true,
	Forwarded: true, XForwardedFor: true, XForwardedHost: true, XForwardedPort: true, XForwardedProto: true, XRealIP: true,
	XRequestID: true, Disguised: true,
}

// InTrailer reports whether a field of that id may stand in a trailer: it is
// about no hop, and says nothing of framing, routing, trust, or how the content
// is to be taken (RFC 9110, 6.5.1).
func (id ID) InTrailer() bool { return !hop[id] && !kept[id] && !early[id] }

var early = [ids]bool{
	Age: true, ContentEncoding: true, Date: true, HTTP2Settings: true, Location: true, Proxy: true, Range: true,
	RetryAfter: true, Vary: true,
}
