package h1

import (
	"net/http"
	"strconv"

	"tako/internal/proxy/message"
)

// AppendRequestLine appends the line that begins a request of HTTP/1.1.
func AppendRequestLine(to, method, target []byte) []byte {
	to = append(to, method...)
	to = append(to, ' ')
	to = append(to, target...)
	return append(to, " HTTP/1.1\r\n"...)
}

// AppendStatusLine appends the line that begins an answer of HTTP/1.1.
func AppendStatusLine(to []byte, status int) []byte {
	to = append(to, "HTTP/1.1 "...)
	to = strconv.AppendInt(to, int64(status), 10)
	to = append(to, ' ')
	to = append(to, http.StatusText(status)...)
	return append(to, "\r\n"...)
}

// AppendField appends a field line.
func AppendField[N, V []byte | string](to []byte, name N, value V) []byte {
	to = append(to, name...)
	to = append(to, ": "...)
	to = append(to, value...)
	return append(to, "\r\n"...)
}

// AppendLength appends a Content-Length field.
func AppendLength(to []byte, n int64) []byte {
	to = append(to, "Content-Length: "...)
	to = strconv.AppendInt(to, n, 10)
	return append(to, "\r\n"...)
}

// AppendFields appends the fields that go beyond one connection. If nominates is
// set, those that Connection names among them are left out too, but for the ones
// that message.ID.Kept protects.
func AppendFields(to []byte, fields []message.Field, nominates bool) []byte {
	for i := range fields {
		f := &fields[i]
		if f.ID.Hop() || nominates && Nominated(fields, f) {
			continue
		}
		to = AppendField(to, f.Name, f.Value)
	}
	return to
}

// Nominated reports whether a Connection field among fields makes f one about
// this connection only (RFC 9110, 7.6.1).
func Nominated(fields []message.Field, f *message.Field) bool {
	if f.ID.Kept() {
		return false
	}
	var buf [64]byte
	name := message.AppendLower(buf[:0], f.Name)
	for i := range fields {
		if fields[i].ID == message.Connection && message.HasToken(fields[i].Value, string(name)) {
			return true
		}
	}
	return false
}

// AppendChunkHeader appends the line before a chunk of n bytes, more than none.
// The chunk is to be followed by CRLF.
func AppendChunkHeader(to []byte, n int) []byte {
	to = strconv.AppendInt(to, int64(n), 16)
	return append(to, "\r\n"...)
}

// AppendLastChunk appends the end of a chunked body, with its trailer.
func AppendLastChunk(to []byte, trailer []message.Field) []byte {
	to = append(to, "0\r\n"...)
	for i := range trailer {
		if trailer[i].ID.InTrailer() {
			to = AppendField(to, trailer[i].Name, trailer[i].Value)
		}
	}
	return append(to, "\r\n"...)
}
