package proxy

import (
	"tako/internal/proxy/message"
)

// handlerFunc is a handler that is a function.
type handlerFunc func(message.Exchange)

func (f handlerFunc) Handle(x message.Exchange) { f(x) }

// recorded is an exchange with nobody, which keeps the answer.
type recorded struct {
	message.Exchange // panics where it is called

	request message.Request
	client  message.Client
	answer  message.Response
	body    []byte
	ended   bool
	aborted bool
}

func (x *recorded) Request() *message.Request       { return &x.request }
func (x *recorded) Client() *message.Client         { return &x.client }
func (x *recorded) Watch(message.Watcher)           {}
func (x *recorded) Begin(r *message.Response) error { x.answer = *r; return nil }
func (x *recorded) Write(p []byte) (int, error)     { x.body = append(x.body, p...); return len(p), nil }
func (x *recorded) End([]message.Field) error       { x.ended = true; return nil }
func (x *recorded) Abort()                          { x.aborted = true }

// field makes a field as a codec does.
func field(name, value string) message.Field {
	return message.Field{Name: []byte(name), Value: []byte(value), ID: message.Lookup([]byte(name))}
}
