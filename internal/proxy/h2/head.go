package h2

import (
	"bytes"
	"net/http"

	"golang.org/x/net/http2/hpack"

	"tako/internal/proxy/message"
)

// head gathers one block of fields: the head of a request, or its trailer. What
// it has are views of buf and cookie.
type head struct {
	buf    []byte
	cookie []byte // the crumbs, joined (RFC 9113, 8.2.3)
	fields []message.Field

	method, scheme, authority, path, protocol, host []byte
	pseudo                                          uint8 // those that came, as bits

	trailer  bool
	size     int
	long     bool   // over message.MaxHead or MaxFields
	wrong    string // why it is malformed, "" if it is not
	regular  bool   // a field that is not a pseudo-field came
	cookieAt int    // its place among fields and 1, 0 for none
	length   int64  // of content-length, Unknown for none
	lengths  bool
	expect   bool
	refuse   int // the status for what is asked for, and is not to be had
	trailers bool
}

// maxKeptHead bounds the memory for heads that goes back to a pool, in bytes.
const maxKeptHead = 8 << 10

func (h *head) reset(trailer bool) {
	poison(h.buf)
	poison(h.cookie)
	if cap(h.buf) > maxKeptHead {
		h.buf = nil
	}
	if cap(h.cookie) > maxKeptHead {
		h.cookie = nil
	}
	clear(h.fields)
	*h = head{buf: h.buf[:0], cookie: h.cookie[:0], fields: h.fields[:0], trailer: trailer, length: message.Unknown}
}

// keep copies s. The views that were given out stay valid when buf moves.
func (h *head) keep(s string) []byte {
	n := len(h.buf)
	if cap(h.buf)-n < len(s) {
		h.buf = make([]byte, 0, max(512, 2*cap(h.buf), len(s)))
		n = 0
	}
	h.buf = append(h.buf, s...)
	return h.buf[n:len(h.buf):len(h.buf)]
}

// The pseudo-fields of requests, as bits.
const (
	hasMethod = 1 << iota
	hasScheme
	hasAuthority
	hasPath
	hasProtocol
)

// add takes the next field of the block.
func (h *head) add(f hpack.HeaderField) {
	h.size += len(f.Name) + len(f.Value) + 4
	switch {
	case h.wrong != "" || h.long:
	case h.size > message.MaxHead:
		h.long = true
	case len(f.Name) > 0 && f.Name[0] == ':':
		h.addPseudo(f)
	default:
		h.regular = true
		h.addField(f)
	}
}

func (h *head) addPseudo(f hpack.HeaderField) {
	var bit uint8
	var to *[]byte
	switch f.Name {
	case ":method":
		bit, to = hasMethod, &h.method
	case ":scheme":
		bit, to = hasScheme, &h.scheme
	case ":authority":
		bit, to = hasAuthority, &h.authority
	case ":path":
		bit, to = hasPath, &h.path
	case ":protocol":
		bit, to = hasProtocol, &h.protocol
	}
	switch {
	case bit == 0:
		h.wrong = "an unknown pseudo-field"
	case h.trailer:
		h.wrong = "a pseudo-field in a trailer"
	case h.regular:
		h.wrong = "a pseudo-field after the others"
	case h.pseudo&bit != 0:
		h.wrong = "a pseudo-field twice"
	default:
		h.pseudo |= bit
		*to = h.keep(f.Value)
	}
}

func (h *head) addField(f hpack.HeaderField) {
	name := h.keep(f.Name)
	if !validName(name) {
		h.wrong = "a field name that is none, or not in lower case"
		return
	}
	value := h.keep(f.Value)
	if !message.ValidValue(value) || len(value) != len(message.Trim(value)) {
		h.wrong = "a field value that is none"
		return
	}
	id := message.Lookup(name)
	switch id { //nolint:exhaustive // the others say nothing to the codec
	case message.Connection, message.KeepAlive, message.ProxyConnection, message.TransferEncoding, message.Upgrade, message.HTTP2Settings:
		h.wrong = "a field about a connection" // RFC 9113, 8.2.2
		return
	}
	if h.trailer {
		if !id.InTrailer() {
			return
		}
	} else if !h.interpret(id, value) {
		return
	}
	if len(h.fields) == message.MaxFields {
		h.long = true
		return
	}
	h.fields = append(h.fields, message.Field{Name: name, Value: value, ID: id})
}

// interpret reads what a field says to the codec, and reports whether it is to
// stand among the fields.
func (h *head) interpret(id message.ID, value []byte) bool {
	switch id { //nolint:exhaustive // the others say nothing to the codec
	case message.TE:
		if h.trailers = message.EqualFold(value, "trailers"); !h.trailers {
			h.wrong = "te that is not trailers" // RFC 9113, 8.2.2
		}
	case message.Host:
		if h.host != nil {
			h.wrong = "two hosts"
		}
		h.host = value
		return false
	case message.ContentLength:
		n, ok := parseLength(value)
		if h.lengths || !ok {
			h.wrong = "content-length that is not one number"
		}
		h.lengths, h.length = true, n
	case message.Expect:
		if h.expect = message.EqualFold(value, "100-continue"); !h.expect {
			h.refuse = http.StatusExpectationFailed
		}
	case message.Cookie:
		if h.cookieAt > 0 {
			h.cookie = append(append(h.cookie, "; "...), value...)
			return false
		}
		h.cookie = append(h.cookie[:0], value...)
		h.cookieAt = len(h.fields) + 1
	}
	return true
}

// request checks the head as a whole and makes a request of it. Ended says that
// no body follows. If the head is malformed, wrong says why.
func (h *head) request(r *message.Request, ended bool) {
	r.Reset()
	if h.wrong != "" || h.long {
		return
	}
	connect := string(h.method) == http.MethodConnect
	extended := h.pseudo&hasProtocol != 0
	switch {
	case !message.ValidToken(h.method):
		h.wrong = "no method"
	case extended && !connect:
		h.wrong = ":protocol without CONNECT"
	case connect && !extended:
		if h.pseudo != hasMethod|hasAuthority {
			h.wrong = "CONNECT with more than an authority" // RFC 9113, 8.5
		}
	case string(h.scheme) != "https" && string(h.scheme) != "http":
		h.wrong = "no scheme of HTTP"
	case !message.ValidTarget(h.path):
		h.wrong = "no path"
	case h.path[0] == '*' && string(h.method) != http.MethodOptions:
		h.wrong = "* for another method than OPTIONS"
	case extended && !message.ValidToken(h.protocol):
		h.wrong = "no protocol"
	case extended && (ended || h.lengths):
		h.wrong = "an extended CONNECT with an end"
	}
	if h.wrong != "" {
		return
	}
	host := h.host
	if h.pseudo&hasAuthority != 0 {
		if host != nil && !bytes.EqualFold(host, h.authority) {
			h.wrong = "a host that is not the authority"
			return
		}
		host = h.authority
	}
	if _, _, ok := message.ParseHost(host); !ok {
		h.wrong = "no host"
		return
	}
	if ended && h.lengths && h.length != 0 {
		h.wrong = "less than content-length"
		return
	}
	if h.cookieAt > 0 {
		h.fields[h.cookieAt-1].Value = h.cookie
	}
	switch {
	case connect && !extended:
		h.refuse = http.StatusMethodNotAllowed
	case len(h.method) > maxMethod:
		h.refuse = http.StatusNotImplemented
	case len(h.path) > message.MaxTarget:
		h.refuse = http.StatusRequestURITooLong
	}
	r.Major, r.Method, r.Target, r.Host, r.Fields = 2, h.method, h.path, host, h.fields
	r.Length, r.HasLength = h.length, h.lengths
	if ended || extended {
		r.Length = max(0, r.Length)
	}
	r.Expect = h.expect && r.Length != 0
	r.TETrailers = h.trailers
	r.Extended = extended
	if extended {
		r.Upgrade = h.protocol
	}
}

// maxMethod bounds a method in bytes. Beyond: 501.
const maxMethod = 32

// validName: a token in lower case.
func validName(b []byte) bool {
	for _, c := range b {
		if !nameByte[c] {
			return false
		}
	}
	return len(b) > 0
}

var nameByte = func() (t [256]bool) {
	for i := range t {
		c := byte(i)
		t[i] = message.ValidToken([]byte{c}) && (c < 'A' || c > 'Z')
	}
	return t
}()

// parseLength reads a length of at most 18 digits.
func parseLength(b []byte) (int64, bool) {
	n := int64(0)
	for _, c := range b {
		if c < '0' || c > '9' {
			return 0, false
		}
		n = n*10 + int64(c-'0')
	}
	return n, len(b) > 0 && len(b) <= 18
}
