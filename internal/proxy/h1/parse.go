package h1

import (
	"bytes"
	"math"
	"net/http"

	"tako/internal/proxy/message"
)

// The limits of heads, beside those of package message, which are for clients.
const (
	// MaxMethod bounds a method in bytes. Beyond: 501.
	MaxMethod = 32
	// MaxResponseHead bounds the head of an app's answer in bytes, and
	// MaxResponseFields its fields.
	MaxResponseHead   = 256 << 10
	MaxResponseFields = 1024
)

// What is wrong with a request.
var (
	errLine        = &message.Error{Status: http.StatusBadRequest, Reason: "the request line is none"}
	errMethod      = &message.Error{Status: http.StatusNotImplemented, Reason: "the method is longer than any"}
	errConnect     = &message.Error{Status: http.StatusMethodNotAllowed, Reason: "there is no CONNECT here"}
	errTarget      = &message.Error{Status: http.StatusBadRequest, Reason: "the target is none"}
	errLongTarget  = &message.Error{Status: http.StatusRequestURITooLong, Reason: "the target is too long"}
	errVersion     = &message.Error{Status: http.StatusHTTPVersionNotSupported, Reason: "the version is not 1.0 or 1.1"}
	errField       = &message.Error{Status: http.StatusBadRequest, Reason: "a field line is none"}
	errLongHead    = &message.Error{Status: http.StatusRequestHeaderFieldsTooLarge, Reason: "the head is too long"}
	errManyFields  = &message.Error{Status: http.StatusRequestHeaderFieldsTooLarge, Reason: "there are too many fields"}
	errHost        = &message.Error{Status: http.StatusBadRequest, Reason: "there is not one valid host"}
	errOtherHost   = &message.Error{Status: http.StatusBadRequest, Reason: "the target's authority is not the host"}
	errLength      = &message.Error{Status: http.StatusBadRequest, Reason: "the content length is no number"}
	errFraming     = &message.Error{Status: http.StatusBadRequest, Reason: "the body is framed twice"}
	errCoding      = &message.Error{Status: http.StatusBadRequest, Reason: "the transfer coding is not chunked"}
	errOtherCoding = &message.Error{Status: http.StatusNotImplemented, Reason: "a transfer coding beside chunked"}
	errOldCoding   = &message.Error{Status: http.StatusBadRequest, Reason: "a transfer coding in HTTP/1.0"}
	errExpectation = &message.Error{Status: http.StatusExpectationFailed, Reason: "an expectation that is not 100-continue"}
)

// What is wrong with an answer.
var (
	errStatusLine     = &message.Error{Status: http.StatusBadGateway, Reason: "the status line is none"}
	errAnswerField    = &message.Error{Status: http.StatusBadGateway, Reason: "a field line of the answer is none"}
	errAnswerHead     = &message.Error{Status: http.StatusBadGateway, Reason: "the head of the answer is too long"}
	errAnswerFields   = &message.Error{Status: http.StatusBadGateway, Reason: "the answer has too many fields"}
	errAnswerLength   = &message.Error{Status: http.StatusBadGateway, Reason: "the content length of the answer is no number"}
	errAnswerFraming  = &message.Error{Status: http.StatusBadGateway, Reason: "the body of the answer is framed twice"}
	errAnswerCoding   = &message.Error{Status: http.StatusBadGateway, Reason: "the transfer coding of the answer is not chunked"}
	errInterimFraming = &message.Error{Status: http.StatusBadGateway, Reason: "an interim answer with a body"}
)

// A RequestHead is a request with what is about its connection only. The zero
// value is ready; its Fields keep their room from one head to the next.
type RequestHead struct {
	message.Request
	// Close: the client wants no other request answered on this connection.
	Close bool
	// Chunked: the body is in chunks; Length is then Unknown.
	Chunked bool
}

// Reset makes r empty, keeping the room of Fields.
func (r *RequestHead) Reset() {
	r.Request.Reset()
	r.Close, r.Chunked = false, false
}

// ParseRequest parses the head of a request at the beginning of b into r, which
// then has views of b, and returns the length of the head. Zero and no error
// mean that more bytes are needed; r means nothing then. An error is a
// *message.Error, and comes as soon as no further byte can make a head of b:
// the connection is to be answered and closed. One empty line before the head
// is left out (RFC 9112, 2.2). Versions 1.2 to 1.9 are read as 1.1 (RFC 9110, 2.5).
func ParseRequest(b []byte, r *RequestHead) (n int, err error) {
	r.Reset()
	rest := b
	if len(rest) > 0 && rest[0] == '\r' {
		if len(rest) == 1 {
			return 0, nil
		}
		if rest[1] != '\n' {
			return 0, errLine
		}
		rest = rest[2:]
	}
	line, rest, ok, bad := cutLine(rest)
	switch {
	case bad:
		return 0, errLine
	case !ok:
		return 0, checkLine(line)
	}
	if err := r.parseLine(line); err != nil {
		return 0, err
	}
	p := fieldParser{fields: r.Fields, most: message.MaxFields}
	left, res := p.parse(rest)
	r.Fields = p.fields
	n = len(b) - len(left)
	switch {
	case res == tooMany:
		return 0, errManyFields
	case res == invalid:
		return 0, errField
	case n > message.MaxHead || res == incomplete && len(b) >= message.MaxHead:
		return 0, errLongHead
	case res == incomplete:
		return 0, nil
	}
	if err := r.interpret(); err != nil {
		return 0, err
	}
	return n, nil
}

// cutLine takes the first line and its CRLF off b. If ok is false there is no
// end yet and line is all there is, without a CR that may be the end's. Bad says
// that the line ends in a bare LF.
func cutLine(b []byte) (line, rest []byte, ok, bad bool) {
	i := bytes.IndexByte(b, '\n')
	if i < 0 {
		if k := len(b); k > 0 && b[k-1] == '\r' {
			return b[:k-1], b, false, false
		}
		return b, b, false, false
	}
	if i == 0 || b[i-1] != '\r' {
		return nil, b, false, true
	}
	return b[:i-1], b[i+1:], true, false
}

// checkLine returns an error if line cannot be the beginning of a request line.
func checkLine(line []byte) error {
	method, after, ok := bytes.Cut(line, space)
	if len(method) > 0 && !message.ValidToken(method) || ok && len(method) == 0 {
		return errLine
	}
	if len(method) > MaxMethod {
		return errMethod
	}
	target, version, ok := bytes.Cut(after, space)
	if !validVisible(target) || ok && len(target) == 0 {
		return errTarget
	}
	if len(target) > message.MaxTarget {
		return errLongTarget
	}
	if len(version) > len("HTTP/1.1") || !bytes.HasPrefix(version, []byte("HTTP/")[:min(len(version), 5)]) {
		return errLine
	}
	return nil
}

var space = []byte(" ")

// validVisible: a target in any of its forms.
func validVisible(b []byte) bool {
	for _, c := range b {
		if c <= ' ' || c >= 0x7f || c == '#' {
			return false
		}
	}
	return true
}

// parseLine parses the request line, but for the target's form.
func (r *RequestHead) parseLine(line []byte) error {
	if err := checkLine(line); err != nil {
		return err
	}
	i := bytes.IndexByte(line, ' ')
	j := bytes.LastIndexByte(line, ' ')
	if i <= 0 || j <= i+1 { // checkLine knows of no third space
		return errLine
	}
	r.Method, r.Target = line[:i], line[i+1:j]
	v := line[j+1:]
	if len(v) != len("HTTP/1.1") || v[5] < '0' || v[5] > '9' || v[6] != '.' || v[7] < '0' || v[7] > '9' {
		return errLine
	}
	if v[5] != '1' {
		return errVersion
	}
	r.Major, r.Minor = 1, min(v[7]-'0', 1)
	return nil
}

// interpret checks what the fields say about the request, and the target.
func (r *RequestHead) interpret() error {
	var s framing
	hosts, upgrades, expects := 0, 0, 0
	var upgrade, expect []byte
	keep := r.Minor > 0
	fields := r.Fields
	kept := 0
	for i := range fields {
		f := &fields[i]
		switch f.ID { //nolint:exhaustive // the others say nothing to the codec
		case message.Host:
			hosts++
			r.Host = f.Value
			continue // it is not among Fields
		case message.ContentLength, message.TransferEncoding:
			s.frame(f)
		case message.Connection:
			s.connection(f.Value, &keep, &r.Nominates)
		case message.Upgrade:
			upgrades++
			upgrade = f.Value
		case message.Expect:
			expects++
			expect = f.Value
		case message.TE:
			r.TETrailers = r.TETrailers || message.HasToken(f.Value, "trailers")
		}
		if kept != i {
			fields[kept] = *f
		}
		kept++
	}
	r.Fields = fields[:kept]
	r.Close = !keep

	switch {
	case s.codings > 0 && s.lengths > 0, s.codings > 1, s.lengths > 1:
		return errFraming
	case s.codings > 0 && r.Minor == 0:
		return errOldCoding
	case s.codings > 0 && !s.chunked && s.lastChunked:
		return errOtherCoding
	case s.codings > 0 && !s.chunked:
		return errCoding
	case s.lengths > 0 && s.length < 0:
		return errLength
	case s.codings > 0:
		r.Chunked, r.Length = true, message.Unknown
	case s.lengths > 0:
		r.HasLength, r.Length = true, s.length
	}

	if hosts > 1 || hosts == 0 && r.Minor > 0 {
		return errHost
	}
	if hosts > 0 {
		if _, _, ok := message.ParseHost(r.Host); !ok {
			return errHost
		}
	}
	if err := r.reduceTarget(); err != nil {
		return err
	}
	if r.Minor > 0 && expects > 0 { // RFC 9110, 10.1.1: HTTP/1.0 expects nothing
		if expects > 1 || !message.EqualFold(expect, "100-continue") {
			return errExpectation
		}
		r.Expect = r.Length != 0
	}
	if r.Minor > 0 && upgrades == 1 && s.upgrade && r.Length == 0 && message.ValidToken(upgradeName(upgrade)) && !isHTTP2(upgrade) {
		r.Upgrade = upgrade
	}
	return nil
}

// upgradeName is the name of a protocol without its version.
func upgradeName(protocol []byte) []byte {
	name, version, ok := bytes.Cut(protocol, []byte("/"))
	if ok && !message.ValidToken(version) {
		return nil
	}
	return name
}

// isHTTP2: an upgrade that would take the connection out of our hands.
func isHTTP2(protocol []byte) bool {
	return len(protocol) >= 2 && protocol[0]|0x20 == 'h' && protocol[1] == '2' ||
		len(protocol) >= 5 && message.EqualFold(protocol[:5], "http/")
}

// reduceTarget brings the target to origin form, or "*" (RFC 9112, 3.2).
func (r *RequestHead) reduceTarget() error {
	if r.IsMethod(http.MethodConnect) {
		return errConnect
	}
	t := r.Target
	switch t[0] {
	case '/':
		return nil
	case '*':
		if len(t) > 1 || !r.IsMethod(http.MethodOptions) {
			return errTarget
		}
		return nil
	}
	scheme, after, ok := bytes.Cut(t, []byte("://"))
	if !ok || !message.EqualFold(scheme, "http") && !message.EqualFold(scheme, "https") {
		return errTarget
	}
	end := bytes.IndexAny(after, "/?")
	if end < 0 {
		end = len(after)
	}
	authority, path := after[:end], after[end:]
	name, port, ok := message.ParseHost(authority)
	if !ok {
		return errTarget
	}
	hostName, hostPort, _ := message.ParseHost(r.Host) // an empty one in 1.0
	standard := []byte("80")
	if len(scheme) == len("https") {
		standard = []byte("443")
	}
	if len(port) == 0 {
		port = standard
	}
	if len(hostPort) == 0 {
		hostPort = standard
	}
	if r.Host == nil {
		r.Host = authority
	} else if !bytes.EqualFold(name, hostName) || !bytes.Equal(port, hostPort) {
		return errOtherHost
	}
	switch {
	case len(path) > 0 && path[0] == '/':
		r.Target = path
	case len(path) > 0: // only a query
		r.Target = append([]byte{'/'}, path...)
	case r.IsMethod(http.MethodOptions): // RFC 9112, 3.2.4
		r.Target = []byte("*")
	default:
		r.Target = []byte("/")
	}
	return nil
}

// framing gathers what fields say about where a message ends, and what follows.
type framing struct {
	lengths, codings int
	length           int64 // of the last one, -1 for none
	differ           bool  // there were lengths that are not equal
	chunked          bool  // the coding was exactly "chunked"
	lastChunked      bool  // it was a list of others and chunked, which is a message (RFC 9112, 6.3)
	closing, upgrade bool  // of Connection
}

func (s *framing) frame(f *message.Field) {
	if f.ID == message.ContentLength {
		n := parseLength(f.Value)
		s.differ = s.differ || s.lengths > 0 && n != s.length
		s.length = n
		s.lengths++
		return
	}
	s.codings++
	s.chunked = message.EqualFold(f.Value, "chunked")
	if i := bytes.LastIndexByte(f.Value, ','); i >= 0 {
		s.lastChunked = message.EqualFold(message.Trim(f.Value[i+1:]), "chunked") && !message.HasToken(f.Value[:i], "chunked")
	}
}

// connection reads one Connection field.
func (s *framing) connection(list []byte, keep, nominates *bool) {
	for len(list) > 0 {
		item := list
		if i := bytes.IndexByte(list, ','); i >= 0 {
			item, list = list[:i], list[i+1:]
		} else {
			list = nil
		}
		item = message.Trim(item)
		switch {
		case len(item) == 0, message.EqualFold(item, "te"):
		case message.EqualFold(item, "close"):
			s.closing = true
		case message.EqualFold(item, "keep-alive"):
			*keep = true
		case message.EqualFold(item, "upgrade"):
			s.upgrade = true
		default:
			*nominates = true
		}
	}
	if s.closing {
		*keep = false
	}
}

// parseLength returns the number that b is, -1 if it is none or too large.
func parseLength(b []byte) int64 {
	if len(b) == 0 {
		return -1
	}
	n := int64(0)
	for _, c := range b {
		d := int64(c - '0')
		if c < '0' || c > '9' || n > (math.MaxInt64-d)/10 {
			return -1
		}
		n = n*10 + d
	}
	return n
}

// What came of parsing field lines.
type result uint8

const (
	complete   result = iota
	incomplete        // more bytes are needed
	invalid
	tooMany
)

// fieldParser parses field lines up to the empty line.
type fieldParser struct {
	fields []message.Field
	most   int
}

// parse returns what follows the empty line.
func (p *fieldParser) parse(b []byte) (rest []byte, res result) {
	for {
		line, rest, ok, bad := cutLine(b)
		switch {
		case bad:
			return b, invalid
		case !ok:
			return b, checkField(line, len(p.fields), p.most)
		case len(line) == 0:
			return rest, complete
		}
		i := bytes.IndexByte(line, ':')
		if i <= 0 || !message.ValidToken(line[:i]) { // a folded line, too, has no name
			return b, invalid
		}
		value := message.Trim(line[i+1:])
		if !message.ValidValue(value) {
			return b, invalid
		}
		if len(p.fields) == p.most {
			return b, tooMany
		}
		p.fields = append(p.fields, message.Field{Name: line[:i], Value: value, ID: message.Lookup(line[:i])})
		b = rest
	}
}

// checkField says whether line can be the beginning of a field line.
func checkField(line []byte, have, most int) result {
	name, value, ok := bytes.Cut(line, []byte(":"))
	switch {
	case len(line) == 0:
		return incomplete
	case !message.ValidToken(name), ok && !message.ValidValue(value):
		return invalid
	case have == most:
		return tooMany
	}
	return incomplete
}

// A ResponseHead is an answer with what is about its connection only. The zero
// value is ready; its Fields keep their room from one head to the next.
type ResponseHead struct {
	message.Response
	// Minor is the version after the point, 0 or 1.
	Minor uint8
	// Close: nothing may be sent after this exchange.
	Close bool
	// Body: a body follows. It is in chunks if Chunked; else it has Length bytes, and
	// if that is Unknown it ends with the connection.
	Body, Chunked bool
}

// Reset makes r empty, keeping the room of Fields.
func (r *ResponseHead) Reset() {
	r.Response.Reset()
	r.Minor, r.Close, r.Body, r.Chunked = 0, false, false, false
}

// ParseResponse parses the head of an answer to a request of that method, at the
// beginning of b, into r, which then has views of b, and returns the length of
// the head. Zero and no error mean that more bytes are needed. An error is a
// *message.Error of status 502. Equal Content-Length fields are taken for one.
// The lengths and codings that statuses without a body must not have are
// ignored, and nothing is sent on that connection again (RFC 9112, 6.3).
func ParseResponse(b, method []byte, r *ResponseHead) (n int, err error) {
	r.Reset()
	line, rest, ok, bad := cutLine(b)
	if bad || !checkStatusLine(line, ok) {
		return 0, errStatusLine
	}
	if !ok {
		if len(b) >= MaxResponseHead {
			return 0, errAnswerHead
		}
		return 0, nil
	}
	r.Minor = line[7] - '0'
	r.Status = int(line[9]-'0')*100 + int(line[10]-'0')*10 + int(line[11]-'0')
	p := fieldParser{fields: r.Fields, most: MaxResponseFields}
	left, res := p.parse(rest)
	r.Fields = p.fields
	n = len(b) - len(left)
	switch {
	case res == tooMany:
		return 0, errAnswerFields
	case res == invalid:
		return 0, errAnswerField
	case n > MaxResponseHead || res == incomplete && len(b) >= MaxResponseHead:
		return 0, errAnswerHead
	case res == incomplete:
		return 0, nil
	}
	if err := r.interpret(method); err != nil {
		return 0, err
	}
	return n, nil
}

// checkStatusLine: HTTP/1.x SP status [SP [reason]], or the beginning of it if it
// is not whole. Anything from 100 to 599 is a status.
func checkStatusLine(line []byte, whole bool) bool {
	const shape = "HTTP/1.x 999"
	for i, c := range line {
		switch {
		case i == 7 && c != '0' && c != '1',
			i == 9 && (c < '1' || c > '5'),
			(i == 10 || i == 11) && (c < '0' || c > '9'),
			i == len(shape) && c != ' ':
			return false
		case i == 7 || i >= 9:
		case c != shape[i]:
			return false
		}
	}
	if len(line) < len(shape) {
		return !whole
	}
	return message.ValidValue(line[len(shape):])
}

func (r *ResponseHead) interpret(method []byte) error {
	var s framing
	keep := r.Minor > 0
	upgrades := 0
	for i := range r.Fields {
		f := &r.Fields[i]
		switch f.ID { //nolint:exhaustive // the others say nothing to the codec
		case message.ContentLength, message.TransferEncoding:
			s.frame(f)
		case message.Connection:
			s.connection(f.Value, &keep, &r.Nominates)
		case message.Upgrade:
			upgrades++
			r.Upgrade = f.Value
		}
	}
	r.Close = !keep
	if r.Status != http.StatusSwitchingProtocols || upgrades != 1 || !s.upgrade {
		r.Upgrade = nil
	}
	switch {
	case s.codings > 0 && s.lengths > 0, s.codings > 1, s.differ:
		return errAnswerFraming
	case s.codings > 0 && (!s.chunked || r.Minor == 0):
		return errAnswerCoding
	case s.lengths > 0 && s.length < 0:
		return errAnswerLength
	}
	if r.Status < http.StatusOK || r.Status == http.StatusNoContent {
		if s.codings > 0 || s.lengths > 0 && s.length > 0 {
			if r.Status < http.StatusOK {
				return errInterimFraming
			}
			r.Close = true // it may well send that body
		}
		return nil
	}
	r.Body = message.HasBody(method, r.Status)
	r.Length = message.Unknown
	switch {
	case s.lengths > 0:
		r.HasLength, r.Length = true, s.length
	case s.codings > 0:
		r.Chunked = r.Body
	default:
		r.Close = r.Close || r.Body
	}
	return nil
}
