package main

import (
	"bytes"
	"errors"
	"fmt"
	"strconv"
)

// answer follows the bytes of one HTTP/1.1 response and holds them to what the
// app says: status 200, a length, and exactly its body.
type answer struct {
	head []byte // until it is whole
	left int    // bytes of the body to come; -1: the head is not whole
	off  int    // in the body
	want int    // its length
}

func (a *answer) reset(want int) { a.head, a.left, a.off, a.want = a.head[:0], -1, 0, want }

// feed takes what was read. Done: the response ended with it. It is an error if
// more than that came, as nothing else was asked for.
func (a *answer) feed(p []byte) (done bool, err error) {
	if a.left < 0 {
		rest := p
		if len(a.head) > 0 {
			a.head = append(a.head, p...)
			rest = a.head
		}
		end := bytes.Index(rest, []byte("\r\n\r\n"))
		if end < 0 {
			if len(rest) > maxHead {
				return false, errors.New("a head without end")
			}
			if len(a.head) == 0 {
				a.head = append(a.head, p...)
			}
			return false, nil
		}
		if a.left, err = length(rest[:end+2]); err != nil {
			return false, err
		}
		if a.left != a.want {
			return false, fmt.Errorf("a body of %d bytes, want %d", a.left, a.want)
		}
		p = rest[end+4:]
	}
	if len(p) > a.left {
		return false, errors.New("bytes after the response")
	}
	if !bytes.Equal(p, body[a.off:a.off+len(p)]) {
		return false, fmt.Errorf("a wrong body within the %d bytes from %d", len(p), a.off)
	}
	a.off += len(p)
	a.left -= len(p)
	return a.left == 0, nil
}

// length reads a whole head: it has to be of a 200 with a Content-Length.
func length(head []byte) (int, error) {
	line, rest, _ := bytes.Cut(head, []byte("\r\n"))
	if !bytes.HasPrefix(line, []byte("HTTP/1.1 200")) {
		return 0, fmt.Errorf("%.60q", line)
	}
	const name = "content-length:"
	for len(rest) > 0 {
		line, rest, _ = bytes.Cut(rest, []byte("\r\n"))
		if len(line) > len(name) && bytes.EqualFold(line[:len(name)], []byte(name)) {
			return strconv.Atoi(string(bytes.TrimSpace(line[len(name):])))
		}
	}
	return 0, errors.New("a response without a length")
}
