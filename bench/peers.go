package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"tako/internal/takotest"
)

// The hosts of the apps, by what they listen on.
const (
	hostTCP  = "tcp.localhost"
	hostUnix = "unix.localhost"
)

// idlePool is how many idle connections to an app a proxy keeps, where it has to
// be told.
const idlePool = 1024

// A target is a proxy under measurement.
type target interface {
	name() string
	// ports are where it answers HTTP and HTTPS on the loopback address.
	ports() (http, https int)
	// processes are those whose cost is its own.
	processes() []int
	stop() error
}

// A scene is what proxies are started for.
type scene struct {
	dir      string
	cpus     []int   // for the proxies
	hosts    int     // hosts beside the two; each app has hostsPerApp of them
	apps     []place // of those hosts
	tcp      place
	unix     place
	cert     string // both PEM files, of hostTCP
	key      string
	openMost uint64 // open files
	inFlight int    // at each of tako's apps
}

// peer is nginx, HAProxy or Caddy.
type peer struct {
	title       string
	child       *child
	http, https int
}

func (p *peer) name() string             { return p.title }
func (p *peer) ports() (http, https int) { return p.http, p.https }
func (p *peer) processes() []int         { return family(p.child.pid()) }
func (p *peer) stop() error              { p.child.stop(); return nil }

// A recipe is how to start a peer: its settings, and its command with the name of
// their file.
type recipe struct {
	pkg     string // of Debian
	version []string
	file    string
	write   func(s *scene, dir string, http, https int) (string, error)
	command func(dir, file string) []string
}

// peers are equal as far as they can be: the same certificate, TLS 1.2 and 1.3,
// no access log, connections to the apps kept, the usual forwarded fields, as many
// workers as processors.
var peers = map[string]recipe{
	"nginx": {
		pkg: "nginx", version: []string{"nginx", "-v"}, file: "nginx.conf", write: nginxConf,
		command: func(dir, file string) []string { return []string{"nginx", "-p", dir, "-c", file} },
	},
	"haproxy": {
		pkg: "haproxy", version: []string{"haproxy", "-v"}, file: "haproxy.cfg", write: haproxyConf,
		command: func(_, file string) []string { return []string{"haproxy", "-db", "-f", file} },
	},
	"caddy": {
		pkg: "caddy", version: []string{"caddy", "version"}, file: "caddy.json", write: caddyConf,
		command: func(_, file string) []string { return []string{"caddy", "run", "--config", file} },
	},
}

// startPeer starts one and waits until it answers.
func startPeer(s *scene, title string) (target, error) {
	r := peers[title]
	dir, err := os.MkdirTemp(s.dir, title)
	if err != nil {
		return nil, err
	}
	ports, err := takotest.FreePorts(2)
	if err != nil {
		return nil, err
	}
	text, err := r.write(s, dir, ports[0], ports[1])
	if err != nil {
		return nil, err
	}
	file := filepath.Join(dir, r.file)
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		return nil, err
	}
	argv := r.command(dir, file)
	program, err := find(argv[0])
	if err != nil {
		return nil, err
	}
	p := &peer{title: title, http: ports[0], https: ports[1]}
	if p.child, err = start(dir, s.cpus, nil, nil, program, argv[1:]...); err != nil {
		return nil, err
	}
	if err := answers(p); err != nil {
		p.child.stop()
		return nil, fmt.Errorf("%w\n%s", err, p.child.log())
	}
	return p, nil
}

// find is a program of the path or of the system's folders, which an ordinary
// user's path may lack.
func find(name string) (string, error) {
	if path, err := exec.LookPath(name); err == nil {
		return path, nil
	}
	return exec.LookPath(filepath.Join("/usr/sbin", name))
}

// answers waits until a proxy answers as the app does.
func answers(t target) error {
	port, _ := t.ports()
	deadline := time.Now().Add(takotest.StartWait)
	for {
		err := askOnce(port, request(hostTCP, "/"))
		if err == nil {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("%s does not answer: %w", t.name(), err)
		}
		time.Sleep(50 * time.Millisecond)
	}
}

func askOnce(port int, req []byte) error {
	c, err := net.DialTimeout("tcp", loopback(port), time.Second)
	if err != nil {
		return err
	}
	defer c.Close()
	return exchange(c, req, smallBody, new(answer), make([]byte, 4096))
}

func loopback(port int) string { return fmt.Sprintf("127.0.0.1:%d", port) }

// appOf is the number of the app of a host.
func appOf(host int) int { return host / hostsPerApp }

func nginxConf(s *scene, dir string, http, https int) (string, error) {
	var b strings.Builder
	user := ""
	if os.Geteuid() == 0 {
		user = "user root;"
	}
	fmt.Fprintf(&b, `daemon off; %s pid %[2]s/pid; error_log %[2]s/error.log crit; worker_processes %[3]d; worker_rlimit_nofile %[4]d;
events { worker_connections %[5]d; multi_accept on; }
http {
access_log off; tcp_nodelay on; keepalive_timeout 65; keepalive_requests 1000000000;
server_names_hash_max_size 65536; server_names_hash_bucket_size 128;
client_body_temp_path %[2]s/t1; proxy_temp_path %[2]s/t2; fastcgi_temp_path %[2]s/t3; uwsgi_temp_path %[2]s/t4; scgi_temp_path %[2]s/t5;
proxy_http_version 1.1; proxy_set_header Connection ""; proxy_set_header Host $host; proxy_set_header X-Forwarded-For $remote_addr;
proxy_set_header X-Forwarded-Proto $scheme; proxy_set_header X-Forwarded-Host $host;
ssl_certificate %[6]s; ssl_certificate_key %[7]s; ssl_protocols TLSv1.2 TLSv1.3; ssl_session_cache shared:tls:10m;
`, user, dir, len(s.cpus), s.openMost, s.openMost-100, s.cert, s.key)
	upstream := func(name, at string) {
		fmt.Fprintf(&b, "upstream %s { server %s; keepalive %d; keepalive_requests 1000000000; }\n", name, at, idlePool)
	}
	server := func(name, upstream, first string) {
		fmt.Fprintf(&b, "server { listen 127.0.0.1:%d%s; listen 127.0.0.1:%d ssl http2%s; server_name %s; location / { proxy_pass http://%s; } }\n",
			http, first, https, first, name, upstream)
	}
	upstream("tcp", loopback(s.tcp.Port))
	upstream("unix", "unix:"+s.unix.Socket)
	for i, a := range s.apps {
		upstream(fmt.Sprintf("app%d", i), loopback(a.Port))
	}
	server(hostTCP, "tcp", fmt.Sprintf(" default_server reuseport backlog=%d", acceptQueue))
	server(hostUnix, "unix", "")
	for n := range s.hosts {
		server(hostName(n), fmt.Sprintf("app%d", appOf(n)), "")
	}
	b.WriteString("}\n")
	return b.String(), nil
}

func haproxyConf(s *scene, dir string, http, https int) (string, error) {
	both := filepath.Join(dir, "both.pem")
	chain, err := os.ReadFile(s.cert)
	key, keyErr := os.ReadFile(s.key)
	if err := errors.Join(err, keyErr); err != nil {
		return "", err
	}
	var hosts strings.Builder
	fmt.Fprintf(&hosts, "%s tcp\n%s unix\n", hostTCP, hostUnix)
	for n := range s.hosts {
		fmt.Fprintf(&hosts, "%s app%d\n", hostName(n), appOf(n))
	}
	hostMap := filepath.Join(dir, "hosts.map")
	if err := errors.Join(os.WriteFile(both, append(chain, key...), 0o600), os.WriteFile(hostMap, []byte(hosts.String()), 0o600)); err != nil {
		return "", err
	}
	var b strings.Builder
	fmt.Fprintf(&b, `global
 nbthread %d
 maxconn %d
 ssl-default-bind-options ssl-min-ver TLSv1.2
defaults
 mode http
 http-reuse always
 timeout connect 5s
 timeout client 65s
 timeout server 65s
 timeout http-keep-alive 65s
frontend all
 bind 127.0.0.1:%[3]d backlog %[5]d
 bind 127.0.0.1:%[4]d ssl crt %[6]s alpn h2,http/1.1 backlog %[5]d
 http-request set-header X-Forwarded-For %%[src]
 http-request set-header X-Forwarded-Proto %%[ssl_fc,iif(https,http)]
 http-request set-header X-Forwarded-Host %%[req.hdr(host)]
 use_backend %%[req.hdr(host),field(1,:),lower,map(%[7]s,tcp)]
`, len(s.cpus), s.openMost/2-200, http, https, acceptQueue, both, hostMap)
	backend := func(name, at string) {
		fmt.Fprintf(&b, "backend %s\n server one %s pool-max-conn %d\n", name, at, s.openMost)
	}
	backend("tcp", loopback(s.tcp.Port))
	backend("unix", "unix@"+s.unix.Socket)
	for i, a := range s.apps {
		backend(fmt.Sprintf("app%d", i), loopback(a.Port))
	}
	return b.String(), nil
}

func caddyConf(s *scene, _ string, http, https int) (string, error) {
	type object = map[string]any
	to := func(dial string) []object {
		return []object{{
			"handler": "reverse_proxy", "upstreams": []object{{"dial": dial}},
			"transport": object{"protocol": "http", "compression": false, "keep_alive": object{"max_idle_conns_per_host": acceptQueue}},
		}}
	}
	route := func(host, dial string) object {
		return object{"match": []object{{"host": []string{host}}}, "handle": to(dial), "terminal": true}
	}
	var routes []object
	for n := range s.hosts {
		routes = append(routes, route(hostName(n), loopback(s.apps[appOf(n)].Port)))
	}
	routes = append(routes, route(hostTCP, loopback(s.tcp.Port)), route(hostUnix, "unix/"+s.unix.Socket))
	server := func(port int, protocols ...string) object {
		return object{
			"listen": []string{loopback(port)}, "routes": routes, "protocols": protocols,
			"automatic_https": object{"disable": true},
		}
	}
	secure := server(https, "h1", "h2")
	secure["tls_connection_policies"] = []object{{}}
	text, err := json.Marshal(object{
		"admin":   object{"disabled": true},
		"logging": object{"logs": object{"default": object{"level": "ERROR"}}},
		"apps": object{
			"http": object{"http_port": 1, "https_port": 2, "servers": object{"plain": server(http, "h1"), "secure": secure}},
			"tls":  object{"certificates": object{"load_files": []object{{"certificate": s.cert, "key": s.key}}}},
		},
	})
	return string(text), err
}
