// Package proxyproto reads the PROXY protocol, versions 1 and 2, that a balancer
// in front sends before anything else to say who its client is. Whether a peer
// may say so is the caller's matter.
//
// It is strict: a connection that begins with anything else is not one to go on
// with, since then the client's own bytes would be taken for the balancer's. Not
// a byte behind the header is read.
package proxyproto
