package message

import (
	"fmt"
	"net"
	"net/http"
	"net/netip"
)

// The limits of every head from a client, whatever protocol brings it.
const (
	// MaxHead bounds a head in bytes: start line and field lines with their ends,
	// or the sum of names, values and 4 for each field in HTTP/2. Beyond: 431.
	MaxHead = 32 << 10
	// MaxFields bounds the fields of a head, and those of a trailer. Beyond: 431.
	MaxFields = 128
	// MaxTarget bounds a request's target in bytes. Beyond: 414.
	MaxTarget = 16 << 10
)

// Unknown is the Length of a body whose end shows only when it comes.
const Unknown = -1

// A Field is one field line. Name is as the sender wrote it, so of any case from
// HTTP/1; Value has no white space at its ends.
type Field struct {
	Name, Value []byte
	// ID is what Lookup says of Name.
	ID ID
}

// A Request is the head of a request that keeps all the rules of this package:
// it can be written to an app as it stands, but for what is about one hop.
type Request struct {
	Major, Minor uint8 // 1.0, 1.1 or 2.0
	Method       []byte
	// Target is path and query in origin form, or "*". An absolute form was taken
	// apart by the codec.
	Target []byte
	// Host is Host or :authority, valid by ParseHost and the only one there was.
	Host []byte
	// Fields are the others in their order, those about the hop and about framing
	// included; never Host, never a pseudo-field.
	Fields []Field
	// Length is the length of the body, 0 for none, Unknown if it shows at its end.
	Length int64
	// HasLength: the sender said Length, 0 too.
	HasLength bool
	// Expect: 100-continue is waited for.
	Expect bool
	// Nominates: Connection names fields, beside close, keep-alive, upgrade and te.
	Nominates bool
	// TETrailers: the sender reads trailers.
	TETrailers bool
	// Upgrade is the one protocol asked for by Upgrade and Connection, or by
	// :protocol of an extended CONNECT (RFC 8441), nil for none.
	Upgrade []byte
	// Extended: an extended CONNECT; Method is then CONNECT.
	Extended bool
}

// Reset makes r empty, keeping the room of Fields.
func (r *Request) Reset() {
	fields := r.Fields[:0]
	*r = Request{Fields: fields}
}

// IsMethod reports whether the method is m. Methods have case.
func (r *Request) IsMethod(m string) bool { return string(r.Method) == m }

// Get returns the value of the first field of that id, nil if there is none.
func (r *Request) Get(id ID) []byte { return get(r.Fields, id) }

// A Response is the head of an answer.
type Response struct {
	Status int
	// Fields are as in Request. The writer leaves out those about the hop and about
	// framing and sets its own.
	Fields []Field
	// Length is the length of the body that follows, Unknown if it shows at its end.
	// For HEAD and 304 it is what Content-Length said, and no body follows.
	Length int64
	// HasLength: Length is to be said, 0 too. False for 1xx and 204.
	HasLength bool
	// Nominates is as in Request.
	Nominates bool
	// Upgrade is the protocol of a 101, nil for none.
	Upgrade []byte
}

// Reset makes r empty, keeping the room of Fields.
func (r *Response) Reset() {
	fields := r.Fields[:0]
	*r = Response{Fields: fields}
}

// Get returns the value of the first field of that id, nil if there is none.
func (r *Response) Get(id ID) []byte { return get(r.Fields, id) }

func get(fields []Field, id ID) []byte {
	for i := range fields {
		if fields[i].ID == id {
			return fields[i].Value
		}
	}
	return nil
}

// HasBody reports whether a body follows this status to such a request.
func HasBody(method []byte, status int) bool {
	return status >= 200 && status != http.StatusNoContent && status != http.StatusNotModified && string(method) != http.MethodHead
}

// An Error says that what a client sent is not a message, or is one over a limit.
type Error struct {
	// Status is the answer, 4xx or 5xx. The connection ends after it.
	Status int
	// Reason is for logs; it never has bytes of the client.
	Reason string
}

func (e *Error) Error() string { return fmt.Sprintf("%s (%d)", e.Reason, e.Status) }

// A Client is the other end of a connection from a client.
type Client struct {
	// Addr is not valid for a Unix socket. It is what a trusted PROXY protocol
	// header says, where there is one.
	Addr netip.Addr
	// Secure: the connection is TLS.
	Secure bool
	// Connection counts the connections of this process from 1.
	Connection uint64
}

// Exchange is one request and the way back for its answer. A codec makes it and
// hands it to its Handler, which answers before it returns. All methods are of
// the handler's goroutine; only ReadBody, Trailer and StopBody may be another's
// meanwhile, and Interrupt anybody's.
//
// The answer is: any Inform; Begin; any Write, ReadFrom and Flush; then End if it
// is whole, or Abort. Whatever Begin announced, the codec sees to it that a short
// answer never looks whole. An error of these methods means that the client does
// not get more; the handler then calls Abort or returns.
type Exchange interface {
	// Request is valid, with its views, until the handler returns.
	Request() *Request
	// Client is the same for all requests of a connection.
	Client() *Client

	// ReadBody reads what comes next of the request's body. It returns io.EOF at
	// the end, only if the body is whole; every wait has its limit, a timeout is
	// os.ErrDeadlineExceeded. The first call sends the 100 that the client waits
	// for, unless an answer has begun.
	ReadBody(p []byte) (int, error)
	// Buffered returns the whole body, if it has come already with the head, as a
	// view; ReadBody then has nothing more. False: use ReadBody.
	Buffered() ([]byte, bool)
	// Trailer returns the trailer fields after ReadBody's io.EOF: valid syntax,
	// none about the hop, framing, routing or trust.
	Trailer() []Field
	// StopBody makes a ReadBody that waits, and all after it, return soon: nobody
	// wants the rest.
	StopBody()

	// Inform sends an interim answer, 103 say, if the client's protocol has them.
	Inform(status int, fields []Field) error
	// Begin takes the head of the answer; its bytes go out with the first of the
	// body or at Flush. Fields are valid syntax; those about the hop are left out.
	// Length decides the framing; a Write to an answer without a body is thrown
	// away.
	Begin(r *Response) error
	// Write takes the next bytes of the body. It may keep them back until Flush,
	// the next Write, or End.
	Write(p []byte) (int, error)
	// Flush sends what was kept back.
	Flush() error
	// End is the end of a whole answer.
	End(trailer []Field) error
	// Abort ends an answer that is not whole, or that never began, so that the
	// client sees it.
	Abort()
	// Tunnel turns the exchange into a stream of bytes in both directions after
	// Begin of a 101, or of a 200 to an extended CONNECT. Closing it is the
	// caller's, before the handler returns.
	Tunnel() (Stream, error)

	// Lasts says that the exchange is a stream, which may take hours: the connection
	// no longer counts as busy for it, and its body may pause.
	Lasts()
	// Watch has w told once, from another goroutine, when the client has gone while
	// the handler is at work; at once if it has already. Nil takes it off: once
	// Watch, or the handler, has returned, no call to w is under way or will come.
	Watch(w Watcher)
	// Interrupt makes everything that waits for the client fail from now on.
	Interrupt()
}

// Watcher is told that a client has gone. ClientGone must not block, and is not
// called after the handler has returned.
type Watcher interface{ ClientGone() }

// Splicer is what an Exchange may be, too.
type Splicer interface {
	// CanSplice reports, once Begin has been called, whether SpliceFrom would not
	// return errors.ErrUnsupported.
	CanSplice() bool
	// SpliceFrom moves the next n bytes of the body from src to the client, in the
	// kernel where it can, and returns how many were moved. It is for large bodies
	// of a known length that are sent as they are. Errors.ErrUnsupported means that
	// nothing was read and Write is to be used. Any other error may be that of src,
	// whose deadlines are the caller's to set; the answer is to be aborted then.
	SpliceFrom(src net.Conn, n int64) (int64, error)
}

// Stream is the client's end of a tunnel. Reads and writes may be two
// goroutines'; Close anybody's.
type Stream interface {
	Read(p []byte) (int, error)
	Write(p []byte) (int, error)
	// CloseWrite says that nothing more will come.
	CloseWrite() error
	Close() error
}

// Handler answers a request.
type Handler interface {
	Handle(x Exchange)
}
