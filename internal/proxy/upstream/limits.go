package upstream

import (
	"errors"
	"net"
	"time"
)

// The limits of an exchange, beside those of its messages in package h1.
const (
	// FirstByteTime bounds the time from the end of the request to the first byte
	// of the answer; on a connection that was used before it may be deadlineSlack more.
	FirstByteTime = 60 * time.Second
	// WriteTime bounds each write to an instance that does not read.
	WriteTime = 60 * time.Second
	// ContinueTime is how long a body is held back for a 100 (Continue).
	ContinueTime = time.Second
	// settleTime bounds the wait for the last write of a body whose answer has
	// already come.
	settleTime = 10 * time.Millisecond
	// lastTime bounds the wait for an answer from an instance that does not take the
	// body any more.
	lastTime = time.Second
	// MaxSendings bounds how often a request is sent, to all instances together, that
	// may have been acted on each time: one that kills is not to go around.
	MaxSendings = 2
)

// ErrTimeout means that FirstByteTime passed.
var ErrTimeout = errors.New("the instance did not answer in time")

// A LostError says that the connection ended before the first byte of an answer.
// What became of the request nobody knows.
type LostError struct {
	Err error
	// Repeatable: the request may be sent once more, to another instance. It never is
	// after MaxSendings, save that an instance said it did not look at the last.
	Repeatable bool
}

func (e *LostError) Error() string { return "the connection ended before an answer: " + e.Err.Error() }
func (e *LostError) Unwrap() error { return e.Err }

// A BodyError says that the body of the request could not be read to its end:
// the client's fault, not the instance's.
type BodyError struct{ Err error }

func (e *BodyError) Error() string { return "read the request's body: " + e.Err.Error() }
func (e *BodyError) Unwrap() error { return e.Err }

func isTimeout(err error) bool {
	ne, ok := errors.AsType[net.Error](err)
	return ok && ne.Timeout()
}
