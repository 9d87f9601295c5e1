package proxy

import (
	"crypto/rand"
	"encoding/hex"
	"net"
	"net/http"
	"net/netip"
	"net/textproto"
	"strings"

	"golang.org/x/net/http/httpguts"
)

// MaxRequestID bounds an X-Request-ID that is kept, in bytes.
const MaxRequestID = 128

// The fields that tell an app about its client. Those of a client that is not a
// trusted proxy are dropped.
const (
	forwardedFor   = "X-Forwarded-For"
	forwardedProto = "X-Forwarded-Proto"
	forwardedHost  = "X-Forwarded-Host"
	forwardedPort  = "X-Forwarded-Port"
	requestID      = "X-Request-Id"
)

// hopByHop are the fields that are about one connection only.
var hopByHop = map[string]bool{
	"Connection": true, "Keep-Alive": true, "Proxy-Connection": true, "Proxy-Authenticate": true,
	"Proxy-Authorization": true, "Te": true, "Trailer": true, "Transfer-Encoding": true, "Upgrade": true,
	"Http2-Settings": true, "Expect": true,
}

// kept are fields that no Connection field can make hop-by-hop: taking them away
// would change what a request means, or who sent it.
var kept = map[string]bool{
	"Host": true, "Content-Length": true, "Content-Type": true, "Authorization": true, "Cookie": true,
	"Set-Cookie": true, "Cache-Control": true, "Forwarded": true, "X-Real-Ip": true, requestID: true,
}

// ours reports whether a field is one that a client may not set, and whether
// its name only looks so to servers that take '_' for '-'.
func ours(name string) (is, disguised bool) {
	if strings.Contains(name, "_") {
		name, disguised = textproto.CanonicalMIMEHeaderKey(strings.ReplaceAll(name, "_", "-")), true
	}
	switch name {
	case "Forwarded", "X-Real-Ip", requestID:
		return true, disguised
	}
	return strings.HasPrefix(name, "X-Forwarded-"), disguised
}

// nominated returns the fields that h's Connection names, nil for none.
func nominated(h http.Header) map[string]bool {
	var names map[string]bool
	for _, v := range h["Connection"] {
		for name := range strings.SplitSeq(v, ",") {
			name = textproto.CanonicalMIMEHeaderKey(textproto.TrimString(name))
			if is, _ := ours(name); name == "" || is || kept[name] {
				continue
			}
			if names == nil {
				names = make(map[string]bool)
			}
			names[name] = true
		}
	}
	return names
}

// client is who sent a request and how.
type client struct {
	addr    netip.Addr // not valid for a Unix socket
	trusted bool       // a proxy whose word is believed
	https   bool       // the user's own connection is encrypted
}

// clientOf reads it from the request.
func clientOf(r *http.Request, st *state) client {
	var c client
	if ap, err := netip.ParseAddrPort(r.RemoteAddr); err == nil {
		c.addr = ap.Addr().Unmap().WithZone("")
	}
	c.trusted = st.isTrusted(c.addr)
	c.https = r.TLS != nil
	if c.trusted && !c.https {
		proto, _, _ := strings.Cut(r.Header.Get(forwardedProto), ",")
		c.https = strings.EqualFold(textproto.TrimString(proto), "https")
	}
	return c
}

// requestHeader makes the fields for the app.
func requestHeader(r *http.Request, c client, ids []string) http.Header {
	out := make(http.Header, len(r.Header)+5)
	hop := nominated(r.Header)
	for name, values := range r.Header {
		if hopByHop[name] || hop[name] || name == "Proxy" { // Proxy: CGI takes it for HTTP_PROXY
			continue
		}
		if is, disguised := ours(name); is && (disguised || !c.trusted) {
			continue
		}
		out[name] = values
	}
	if httpguts.HeaderValuesContainsToken(r.Header["Te"], "trailers") {
		out["Te"] = []string{"trailers"}
	}
	if c.addr.IsValid() {
		chain := c.addr.String()
		if before := out[forwardedFor]; len(before) > 0 {
			chain = strings.Join(before, ", ") + ", " + chain
		}
		out[forwardedFor] = []string{chain}
	}
	scheme, port := "http", "80"
	if c.https {
		scheme, port = "https", "443"
	}
	if _, p, err := net.SplitHostPort(r.Host); err == nil && p != "" {
		port = p
	}
	for _, f := range [...]struct{ name, value string }{{forwardedProto, scheme}, {forwardedHost, r.Host}, {forwardedPort, port}} {
		if len(out[f.name]) == 0 {
			out[f.name] = []string{f.value}
		}
	}
	out[requestID] = ids
	return out
}

// responseHeader copies an app's end-to-end fields.
func responseHeader(out, from http.Header) {
	hop := nominated(from)
	for name, values := range from {
		if !hopByHop[name] && !hop[name] {
			out[name] = values
		}
	}
	if _, ok := out["Content-Type"]; !ok {
		out["Content-Type"] = nil // or net/http guesses one
	}
}

// idOf keeps the id of a trusted proxy, and makes one otherwise.
func idOf(r *http.Request, c client) string {
	if ids := r.Header[requestID]; c.trusted && len(ids) == 1 && validID(ids[0]) {
		return ids[0]
	}
	var b [16]byte
	_, _ = rand.Read(b[:]) // never fails
	return hex.EncodeToString(b[:])
}

func validID(id string) bool {
	if id == "" || len(id) > MaxRequestID {
		return false
	}
	for i := range len(id) {
		if id[i] <= ' ' || id[i] > '~' {
			return false
		}
	}
	return true
}

// trailer is what may be passed on of announced trailers.
func trailer(t http.Header) http.Header {
	var out http.Header
	for name := range t {
		if is, _ := ours(name); is || hopByHop[name] || !httpguts.ValidTrailerHeader(name) {
			continue
		}
		if out == nil {
			out = make(http.Header)
		}
		out[name] = nil
	}
	return out
}
