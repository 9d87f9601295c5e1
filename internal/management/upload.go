package management

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"tako/internal/tako"
)

// An upload's bytes follow its request line as chunks: u32 length, big endian,
// 1 to MaxChunk, and that many bytes. A length of zero ends it.

// A chunkReader reads the bytes of an upload. Its errors are the client's, and
// stay.
type chunkReader struct {
	in     *bufio.Reader
	before func() error // sets the deadline of the next read
	limit  int64        // of all bytes
	idle   time.Duration

	total int64
	left  int // of the chunk
	err   error
}

// Read returns io.EOF after the zero length, and a *tako.Error for anything else
// that ends the upload.
func (r *chunkReader) Read(p []byte) (int, error) {
	if r.err != nil || len(p) == 0 {
		return 0, r.err
	}
	n, err := r.read(p)
	r.err = err
	return n, err
}

func (r *chunkReader) read(p []byte) (int, error) {
	if err := r.before(); err != nil {
		return 0, r.failed(err)
	}
	if r.left == 0 {
		var head [4]byte
		if _, err := io.ReadFull(r.in, head[:]); err != nil {
			return 0, r.failed(err)
		}
		size := binary.BigEndian.Uint32(head[:])
		switch {
		case size == 0:
			return 0, io.EOF
		case size > MaxChunk:
			return 0, tako.Errorf(tako.CodeInvalid, "Upload broken: a chunk of %d bytes, the limit is %d", size, MaxChunk)
		case r.total+int64(size) > r.limit:
			return 0, tako.Errorf(tako.CodeInvalid, "Upload too large: more than %d bytes", r.limit)
		}
		r.left = int(size)
		r.total += int64(size)
	}
	n, err := r.in.Read(p[:min(len(p), r.left)])
	r.left -= n
	if err != nil {
		return n, r.failed(err)
	}
	return n, nil
}

func (r *chunkReader) failed(err error) error {
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return tako.Errorf(tako.CodeFailed, "Upload stopped: nothing came for %v", r.idle)
	}
	return tako.Errorf(tako.CodeInvalid, "Upload incomplete: the connection ended before the end of the upload")
}

// upload hands the bytes to the backend. If they broke off, that is the reply,
// whatever the backend made of it.
func (s *session) upload(ctx context.Context, run func(context.Context, *chunkReader) (UploadResult, error)) (any, error) {
	limits := s.srv.Limits
	r := &chunkReader{in: s.in, limit: limits.MaxUploadBytes, idle: limits.UploadIdleTimeout, before: func() error {
		if err := s.readBy(limits.UploadIdleTimeout); err != nil {
			return err
		}
		if ctx.Err() != nil { // after the deadline was set, or the end of ctx could be missed
			return os.ErrDeadlineExceeded
		}
		return nil
	}}
	defer context.AfterFunc(ctx, func() { _ = s.conn.SetReadDeadline(time.Unix(1, 0)) })()
	s.spent = true
	res, err := run(ctx, r)
	if ctx.Err() != nil && err != nil {
		return nil, ctx.Err()
	}
	if r.err != nil && !errors.Is(r.err, io.EOF) {
		return nil, r.err
	}
	if err != nil {
		return nil, err
	}
	// A tar reader stops at the archive's end, before ours.
	_, _ = io.CopyN(io.Discard, r, MaxChunk)
	if r.err != nil && !errors.Is(r.err, io.EOF) {
		return nil, r.err
	}
	s.spent = r.err == nil
	return res, nil
}

// writeChunks sends all of r as an upload's bytes. The first error is r's, the
// second w's.
func writeChunks(w io.Writer, r io.Reader) (read, write error) {
	buf := make([]byte, 4+256<<10)
	for {
		n, err := 0, error(nil)
		for n < len(buf)-4 && err == nil {
			var m int
			m, err = r.Read(buf[4+n:])
			n += m
		}
		if n > 0 {
			binary.BigEndian.PutUint32(buf, uint32(n)) // at most len(buf)
			if _, err := w.Write(buf[:4+n]); err != nil {
				return nil, fmt.Errorf("send: %w", err)
			}
		}
		switch {
		case errors.Is(err, io.EOF):
			if _, err := w.Write(make([]byte, 4)); err != nil {
				return nil, fmt.Errorf("send: %w", err)
			}
			return nil, nil
		case err != nil:
			return fmt.Errorf("read the archive: %w", err), nil
		}
	}
}
