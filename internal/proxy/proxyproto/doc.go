// Package proxyproto reads the PROXY protocol, versions 1 and 2, that a balancer
// in front sends before anything else to say who its client is. Whether a peer
// may say so is the caller's matter.
package proxyproto
