package tako

import (
	"errors"
	"fmt"
)

// Code says for machines what kind of trouble an Error is.
type Code string

// The codes. They cross the management socket beside the sentence.
const (
	CodeInvalid   Code = "invalid"   // the caller's input is wrong; the same call fails again
	CodeNotFound  Code = "not_found" // no such app, release, instance
	CodeConflict  Code = "conflict"  // something else holds what was asked for
	CodeBusy      Code = "busy"      // the same call may work in a moment
	CodeForbidden Code = "forbidden" // the caller may not
	CodeFailed    Code = "failed"    // it was tried and did not work; the text says why
	CodeInternal  Code = "internal"  // ours or the world's fault; the log has the rest
)

// Error is an error for the caller: a code for machines and a sentence for
// people. Only these two ever cross a socket.
type Error struct {
	Code    Code
	Message string
}

func (e *Error) Error() string { return e.Message }

// Errorf makes an Error. It does not wrap: what crosses a socket is text.
func Errorf(code Code, format string, args ...any) *Error {
	return &Error{Code: code, Message: fmt.Sprintf(format, args...)}
}

// AsError returns the Error inside err, or a CodeInternal one with err's text,
// or nil for nil.
func AsError(err error) *Error {
	if err == nil {
		return nil
	}
	if e, ok := errors.AsType[*Error](err); ok {
		return e
	}
	return &Error{Code: CodeInternal, Message: err.Error()}
}
