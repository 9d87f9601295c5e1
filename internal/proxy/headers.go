package proxy

import (
	"bytes"
	"encoding/base64"
	"encoding/hex"
	"math/rand/v2"
	"net/netip"

	"tako/internal/proxy/h1"
	"tako/internal/proxy/message"
)

// MaxRequestID bounds an X-Request-ID that is kept, in bytes.
const MaxRequestID = 128

// The names of the fields that are ours to write, and of one that is made for
// WebSockets over HTTP/2.
var (
	nameForwardedFor   = []byte("X-Forwarded-For")
	nameForwardedProto = []byte("X-Forwarded-Proto")
	nameForwardedHost  = []byte("X-Forwarded-Host")
	nameForwardedPort  = []byte("X-Forwarded-Port")
	nameRequestID      = []byte("X-Request-Id")
	nameTE             = []byte("TE")
	nameWebSocketKey   = []byte("Sec-WebSocket-Key")
	trailers           = []byte("trailers")
)

// ours reports whether a field says who a client is: one that a client may not
// set.
func ours(id message.ID) bool {
	switch id { //nolint:exhaustive // all others do not
	case message.Forwarded, message.XRealIP, message.XRequestID, message.XForwardedFor, message.XForwardedHost,
		message.XForwardedPort, message.XForwardedProto, message.Disguised:
		return true
	}
	return false
}

// client is who sent a request and how.
type client struct {
	addr    netip.Addr // not valid for a Unix socket
	trusted bool       // a proxy whose word is believed
	https   bool       // the user's own connection is encrypted
}

// clientOf reads it from the request.
func clientOf(r *message.Request, from *message.Client, st *state) client {
	c := client{addr: from.Addr, https: from.Secure}
	c.trusted = len(st.trusted) > 0 && st.isTrusted(c.addr)
	if c.trusted && !c.https {
		proto, _, _ := bytes.Cut(r.Get(message.XForwardedProto), []byte{','})
		c.https = message.EqualFold(message.Trim(proto), "https")
	}
	return c
}

// add appends a field for the app whose value is text appended to fl.text by the
// caller, from there on.
func (fl *flight) add(id message.ID, name []byte, from int) {
	fl.out.Fields = append(fl.out.Fields, message.Field{ID: id, Name: name, Value: fl.text[from:len(fl.text):len(fl.text)]})
}

// requestFields makes the fields for the app, and returns the request's id.
func (fl *flight) requestFields(r *message.Request, c client) (id []byte) {
	var had [4]bool // for, proto, host, port of a trusted proxy
	for i := range r.Fields {
		f := &r.Fields[i]
		if f.ID == message.Other && !r.Nominates {
			fl.out.Fields = append(fl.out.Fields, *f)
			continue
		}
		switch {
		case f.ID.Hop() && f.ID != message.Trailer, f.ID == message.Proxy: // what of Trailer goes on is upstream's to say; CGI takes Proxy for HTTP_PROXY
			continue
		case r.Nominates && h1.Nominated(r.Fields, f):
			continue
		case !ours(f.ID):
		case !c.trusted, f.ID == message.XRequestID, f.ID == message.XForwardedFor, f.ID == message.Disguised && bytes.IndexByte(f.Name, '_') >= 0:
			continue // what is believed of the last three is written below
		case f.ID == message.XForwardedProto:
			had[1] = true
		case f.ID == message.XForwardedHost:
			had[2] = true
		case f.ID == message.XForwardedPort:
			had[3] = true
		}
		fl.out.Fields = append(fl.out.Fields, *f)
	}
	if r.TETrailers {
		fl.out.Fields = append(fl.out.Fields, message.Field{ID: message.TE, Name: nameTE, Value: trailers})
	}
	if c.addr.IsValid() {
		from := len(fl.text)
		if c.trusted {
			for i := range r.Fields {
				if r.Fields[i].ID == message.XForwardedFor {
					fl.text = append(append(fl.text, r.Fields[i].Value...), ", "...)
				}
			}
		}
		fl.text = c.addr.AppendTo(fl.text)
		fl.add(message.XForwardedFor, nameForwardedFor, from)
	}
	if !had[1] {
		proto := protoHTTP
		if c.https {
			proto = protoHTTPS
		}
		fl.out.Fields = append(fl.out.Fields, message.Field{ID: message.XForwardedProto, Name: nameForwardedProto, Value: proto})
	}
	if !had[2] {
		fl.out.Fields = append(fl.out.Fields, message.Field{ID: message.XForwardedHost, Name: nameForwardedHost, Value: r.Host})
	}
	if !had[3] {
		_, port, _ := message.ParseHost(r.Host) // the codec has refused what is none
		switch {
		case port != nil:
		case c.https:
			port = port443
		default:
			port = port80
		}
		fl.out.Fields = append(fl.out.Fields, message.Field{ID: message.XForwardedPort, Name: nameForwardedPort, Value: port})
	}
	id = fl.requestID(r, c)
	fl.out.Fields = append(fl.out.Fields, message.Field{ID: message.XRequestID, Name: nameRequestID, Value: id})
	return id
}

var (
	protoHTTP, protoHTTPS = []byte("http"), []byte("https")
	port80, port443       = []byte("80"), []byte("443")
)

// requestID keeps the id of a trusted proxy, and makes one otherwise. It names a
// request in logs; nothing depends on nobody guessing it.
func (fl *flight) requestID(r *message.Request, c client) []byte {
	if c.trusted {
		if id := r.Get(message.XRequestID); validID(id) && single(r.Fields, message.XRequestID) {
			return id
		}
	}
	var b [16]byte
	a, z := rand.Uint64(), rand.Uint64()
	for i := range 8 {
		b[i], b[8+i] = byte(a>>(8*i)), byte(z>>(8*i))
	}
	from := len(fl.text)
	fl.text = hex.AppendEncode(fl.text, b[:])
	return fl.text[from:len(fl.text):len(fl.text)]
}

func single(fields []message.Field, id message.ID) bool {
	n := 0
	for i := range fields {
		if fields[i].ID == id {
			n++
		}
	}
	return n == 1
}

func validID(id []byte) bool {
	if len(id) == 0 || len(id) > MaxRequestID {
		return false
	}
	for _, c := range id {
		if c <= ' ' || c > '~' {
			return false
		}
	}
	return true
}

// webSocketKey adds the key that an app wants to see, which HTTP/2 has not
// (RFC 8441, 5.1), in place of any that the client has sent all the same. Nobody
// looks at what comes of it.
func (fl *flight) webSocketKey() {
	fl.out.Fields = without(fl.out.Fields, message.SecWebSocketKey)
	var b [16]byte
	for i := range b {
		b[i] = byte(rand.Uint32())
	}
	from := len(fl.text)
	fl.text = base64.StdEncoding.AppendEncode(fl.text, b[:])
	fl.add(message.SecWebSocketKey, nameWebSocketKey, from)
}

// responseFields takes out of an app's answer what is about its connection or
// ours to say, and adds the request's id.
func responseFields(r *message.Response, id []byte) {
	to := r.Fields[:0]
	for i := range r.Fields {
		f := r.Fields[i]
		if f.ID == message.XRequestID || r.Nominates && f.ID != message.Connection && h1.Nominated(r.Fields, &f) {
			continue
		}
		to = append(to, f)
	}
	r.Fields = append(to, message.Field{ID: message.XRequestID, Name: nameRequestID, Value: id})
}
