package main

import (
	"strconv"
	"time"
)

// A view is how the processors are shared out.
type view string

const (
	// cpuView has the proxy on one processor, load and app on another; what counts is the
	// proxy's processor time for each request.
	cpuView view = "cpu"
	// rpsView has all of them on the same two; what counts is requests a second.
	rpsView view = "rps"
	// memView is rpsView, and what counts is memory.
	memView view = "memory"
)

// A bar is what tako is to reach, beside nginx in the same run, and what it aims
// at. Zero: there is none.
type bar struct{ reach, aim float64 }

// A workload is a row of the tables.
type workload struct {
	name, title string
	load        []string // flags of the load
	host        string
	hosts       bool // with many hosts
	oneApp      bool // which asks for those of one app alone
	alone       bool // with one proxy alive at a time
	idle        bool // measures memory alone
	secure      bool
	conns       func(o *options) int // 0: the load's default

	cpu, rps bar
	memory   bar // idle: KiB a connection; else MiB of the process
}

func fixed(n int) func(*options) int { return func(*options) int { return n } }

func manyConns(o *options) int { return o.conns }

var workloads = []workload{
	{
		name: "h1", title: "HTTP/1.1 keep-alive, 1 KiB, TCP upstream",
		load: []string{"-kind", "h1"}, host: hostTCP, conns: fixed(64),
		cpu: bar{1.10, 0.95}, rps: bar{0.85, 1.0},
	},
	{
		name: "h1-unix", title: "the same, Unix upstream",
		load: []string{"-kind", "h1"}, host: hostUnix, conns: fixed(64),
		cpu: bar{1.10, 0.95}, rps: bar{0.85, 1.0},
	},
	{
		name: "h1-tls", title: "HTTPS HTTP/1.1 keep-alive, 1 KiB",
		load: []string{"-kind", "h1", "-tls"}, host: hostTCP, conns: fixed(64), secure: true,
		cpu: bar{0.95, 0.80}, rps: bar{0.90, 1.05},
	},
	{
		name: "h2", title: "HTTPS h2, 32 connections × 8 streams, 1 KiB",
		load: []string{"-kind", "h2", "-streams", "8"}, host: hostTCP, conns: fixed(32), secure: true,
		cpu: bar{0.95, 0.60}, rps: bar{1.0, 1.3},
	},
	{
		name: "handshake", title: "full TLS handshake + 1 request",
		load: []string{"-kind", "handshake", "-tls"}, host: hostTCP, conns: fixed(16), secure: true,
		cpu: bar{1.15, 1.0}, rps: bar{0.85, 1.0},
	},
	{
		name: "resume", title: "resumed TLS handshake + 1 request",
		load: []string{"-kind", "handshake", "-tls", "-resume"}, host: hostTCP, conns: fixed(16), secure: true,
		cpu: bar{0.95, 0.75}, rps: bar{1.0, 1.3},
	},
	{
		name: "big", title: "1 MiB body",
		load: []string{"-kind", "h1", "-path", "/big"}, host: hostTCP, conns: fixed(8),
		cpu: bar{0.70, 0.35}, rps: bar{0.9, 1.2},
	},
	{
		name: "big-tls", title: "1 MiB body, HTTPS",
		load: []string{"-kind", "h1", "-path", "/big", "-tls"}, host: hostTCP, conns: fixed(8), secure: true,
		cpu: bar{1.0, 0.75}, rps: bar{0.9, 1.2},
	},
	{
		name: "hosts", title: "HTTP/1.1 keep-alive over many hosts of many apps",
		load: []string{"-kind", "h1"}, host: hostTCP, hosts: true, conns: fixed(64),
		cpu: bar{1.0, 0.65}, rps: bar{1.0, 1.4},
	},
	{
		name: "hosts-one", title: "the same over the hosts of one app among them",
		load: []string{"-kind", "h1"}, host: hostTCP, hosts: true, oneApp: true, conns: fixed(64),
		cpu: bar{1.0, 0.65}, rps: bar{1.0, 1.4},
	},
	{
		name: "conns", title: "many active TLS connections, HTTP/1.1",
		load: []string{"-kind", "h1", "-tls"}, host: hostTCP, alone: true, conns: manyConns, secure: true,
		cpu: bar{1.1, 0.9}, rps: bar{0.85, 1.1}, memory: bar{250, 150},
	},
	{
		name: "idle", title: "an idle connection",
		load: []string{"-kind", "idle"}, host: hostTCP, alone: true, idle: true, conns: manyConns,
		memory: bar{10, 6},
	},
	{
		name: "idle-tls", title: "an idle TLS connection",
		load: []string{"-kind", "idle", "-tls"}, host: hostTCP, alone: true, idle: true, conns: manyConns, secure: true,
		memory: bar{30, 20},
	},
}

// args are the arguments of the load for a proxy.
func (w *workload) args(o *options, t target) []string {
	plain, secure := t.ports()
	port := plain
	if w.secure {
		port = secure
	}
	args := append([]string{
		"load", "-addr", loopback(port), "-host", w.host, "-for", o.each.String(), "-conns", strconv.Itoa(w.conns(o)),
	}, w.load...)
	switch {
	case w.oneApp: // in the middle, for those who look one after another
		args = append(args, "-hosts", strconv.Itoa(min(hostsPerApp, o.hosts)), "-from", strconv.Itoa(o.hosts/2/hostsPerApp*hostsPerApp))
	case w.hosts:
		args = append(args, "-hosts", strconv.Itoa(o.hosts))
	}
	return args
}

// longest bounds a measurement, all told.
func (w *workload) longest(o *options) time.Duration { return openTime + o.each + 2*answerTime }
