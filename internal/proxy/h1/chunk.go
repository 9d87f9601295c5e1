package h1

import (
	"math"
	"net/http"

	"tako/internal/proxy/message"
)

// The limits of a chunked body, beside message.MaxFields for its trailer.
const (
	// MaxChunkLine bounds the line before a chunk, in bytes without its end.
	MaxChunkLine = 2 << 10
	// MaxExtensions bounds what extensions may have, in bytes, beyond as many as
	// the chunks themselves have.
	MaxExtensions = 16 << 10
	// MaxTrailer bounds a trailer in bytes.
	MaxTrailer = 8 << 10
)

// What is wrong with a chunked body.
var (
	errChunk       = &message.Error{Status: http.StatusBadRequest, Reason: "the chunked body is none"}
	errChunkLine   = &message.Error{Status: http.StatusBadRequest, Reason: "the line before a chunk is too long"}
	errExtensions  = &message.Error{Status: http.StatusBadRequest, Reason: "the chunks have more extensions than content"}
	errTrailer     = &message.Error{Status: http.StatusBadRequest, Reason: "the trailer is none"}
	errLongTrailer = &message.Error{Status: http.StatusRequestHeaderFieldsTooLarge, Reason: "the trailer is too long"}
)

// A ChunkReader takes the chunks off a body (RFC 9112, 7.1) that is pushed to it
// as it arrives: however it is cut, the same comes out. The zero value is at the
// beginning of a body. Extensions are thrown away.
type ChunkReader struct {
	state   chunkState
	err     error
	digits  int   // of the size so far
	line    int   // bytes of this line so far
	left    int64 // of this chunk, or its size so far
	surplus int64 // bytes of extensions less those of data
	buf     []byte
	trailer []message.Field
}

type chunkState uint8

const (
	inSize chunkState = iota
	inExtension
	inQuotes     // of an extension
	afterEscape  // a backslash in quotes
	afterLineCR  // the LF of the size's line
	inData       // left bytes
	afterData    // the CR
	afterDataCR  // the LF
	inTrailer    // its first byte
	inTrailerOne // within a line
	afterEnd     // the LF of the empty line
	chunksDone
)

// Reset brings the reader to the beginning of a body. The trailer of the last
// one is no longer valid.
func (c *ChunkReader) Reset() {
	buf, trailer := c.buf[:0], c.trailer[:0]
	poison(buf[:cap(buf)])
	*c = ChunkReader{buf: buf, trailer: trailer}
}

// Next takes what comes next of the body and returns the next piece of its data,
// a view of in, and how much of in was used; the rest is to be passed again.
// Data is empty if there is none in in: all of it was used then, or done says
// that the body has ended. An error is a *message.Error, and all calls return it
// from then on; for an app's answer its status is to be taken for 502.
func (c *ChunkReader) Next(in []byte) (data []byte, used int, done bool, err error) {
	if c.err != nil {
		return nil, 0, false, c.err
	}
	for i := 0; i < len(in); {
		if c.state == inData {
			n := int(min(c.left, int64(len(in)-i)))
			if c.left -= int64(n); c.left == 0 {
				c.state = afterData
			}
			c.surplus = max(0, c.surplus-int64(n))
			return in[i : i+n], i + n, false, nil
		}
		if c.state == chunksDone {
			return nil, i, true, nil
		}
		if c.err = c.step(in[i]); c.err != nil {
			return nil, i, false, c.err
		}
		i++
	}
	return nil, len(in), c.state == chunksDone, nil
}

// Trailer returns the fields after the last chunk, without those that must not be
// there (RFC 9110, 6.5.1). It is valid until Reset.
func (c *ChunkReader) Trailer() []message.Field { return c.trailer }

// step takes one byte that is not data.
func (c *ChunkReader) step(b byte) error {
	switch c.state {
	case inSize:
		return c.size(b)
	case inExtension, inQuotes, afterEscape:
		return c.extension(b)
	case afterLineCR:
		if b != '\n' {
			return errChunk
		}
		c.line, c.digits = 0, 0
		c.state = inData
		if c.left == 0 {
			c.state = inTrailer
		}
	case afterData:
		if b != '\r' {
			return errChunk
		}
		c.state = afterDataCR
	case afterDataCR:
		if b != '\n' {
			return errChunk
		}
		c.state = inSize
	case inTrailer:
		if b == '\r' && len(c.buf) == 0 {
			c.state = afterEnd
			return nil
		}
		c.state = inTrailerOne
		return c.trail(b)
	case inTrailerOne:
		return c.trail(b)
	case afterEnd:
		if b != '\n' {
			return errTrailer
		}
		c.state = chunksDone
	case inData, chunksDone: // Next sees to them
	}
	return nil
}

// size takes a byte of the size of a chunk.
func (c *ChunkReader) size(b byte) error {
	var d byte
	switch {
	case b >= '0' && b <= '9':
		d = b - '0'
	case b >= 'a' && b <= 'f':
		d = b - 'a' + 10
	case b >= 'A' && b <= 'F':
		d = b - 'A' + 10
	case c.digits == 0:
		return errChunk
	case b == '\r':
		c.state = afterLineCR
		return nil
	case b == ';':
		c.state = inExtension
		c.line, c.surplus = c.digits+1, c.surplus+1
		return nil
	default:
		return errChunk
	}
	if c.digits == 0 {
		c.left = 0
	}
	if c.digits++; c.digits > 16 || c.left > math.MaxInt64>>4 {
		return errChunk
	}
	c.left = c.left<<4 | int64(d)
	return nil
}

// extension takes a byte of an extension. Whether it has a name and a value is
// nobody's concern, but where its quotes end is: a line ends outside of them.
func (c *ChunkReader) extension(b byte) error {
	if b == '\r' {
		if c.state != inExtension {
			return errChunk
		}
		c.state = afterLineCR
		return nil
	}
	if b < ' ' && b != '\t' || b == 0x7f {
		return errChunk
	}
	if c.line++; c.line > MaxChunkLine {
		return errChunkLine
	}
	if c.surplus++; c.surplus > MaxExtensions {
		return errExtensions
	}
	switch {
	case c.state == afterEscape:
		c.state = inQuotes
	case b == '"' && c.state == inQuotes:
		c.state = inExtension
	case b == '"':
		c.state = inQuotes
	case b == '\\' && c.state == inQuotes:
		c.state = afterEscape
	}
	return nil
}

// trail takes a byte of the trailer.
func (c *ChunkReader) trail(b byte) error {
	if len(c.buf) == MaxTrailer {
		return errLongTrailer
	}
	c.buf = append(c.buf, b)
	if b != '\n' {
		return nil
	}
	p := fieldParser{fields: c.trailer[:0], most: message.MaxFields}
	_, res := p.parse(c.buf)
	switch res {
	case incomplete:
		return nil
	case invalid:
		return errTrailer
	case tooMany:
		return errLongTrailer
	case complete:
	}
	c.trailer = p.fields[:0]
	for _, f := range p.fields {
		if f.ID.InTrailer() {
			c.trailer = append(c.trailer, f)
		}
	}
	c.state = chunksDone
	return nil
}

// Left returns how many bytes of data come next without anything between them.
func (c *ChunkReader) Left() int64 {
	if c.state != inData {
		return 0
	}
	return c.left
}
