// Package proxy is the tako-proxy process: it takes HTTP and HTTPS from clients,
// finds the app that a request is for and hands it to one of the app's
// instances. All that it knows comes over its channel from tako-master, as
// package wire says; it reads no file and opens no listener.
//
// It promises that after Applied every new request sees that revision of the
// app; that after Quiet no request is in flight on an instance that it may not
// use any more; that no request is sent twice unless that cannot do harm; that
// an answer that was cut never looks whole; and that a drain loses no connection
// that was accepted and no request that was begun, within its limits.
//
// Packages h1 and h2 speak with clients and hand each request to the handler as a
// message.Exchange; package upstream speaks with instances; here are the routes,
// the queues, who is believed, and the drain.
//
// It leaves to tako-master which instances there are, when they are to start and
// whether they are well, and the private keys: handshakes are signed over the
// signing socket. Connections to instances on TCP are made by tako-agent.
package proxy
