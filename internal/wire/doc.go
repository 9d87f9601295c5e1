// Package wire is what tako's processes say to each other: the kinds of
// messages, their fields, limits and descriptors, the order they come in, and
// the table of what each side may send in each state. How a message travels is
// package ipc's matter.
//
// Every message is a struct here with one Kind. A Conn sends and receives them,
// and holds the peer to the table: an unknown kind, a kind out of its state, a
// wrong number of descriptors, an unknown field, bytes left over, all end the
// channel with an error that wraps ipc.ErrProtocol. The master then replaces the
// child; a child that sees its master break the rules exits with ExitPeer.
//
// Kinds are written numbers, never reused: a peer of another build must fail on
// what it does not know and never misread it. New fields may be added where the
// zero value means what was before.
package wire
