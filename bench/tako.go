package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"

	"tako/internal/takotest"
)

const (
	// hostsPerApp is how many routes an app gets: tako takes 200 of one app.
	hostsPerApp = 200
	// deploying is how many apps are deployed at once.
	deploying = 4
)

// tako is a whole server: the real programs with deployed apps.
type tako struct {
	title    string
	server   *takotest.Server
	inFlight int // limits.in_flight of the apps; 0: what tako does by itself
}

func (t *tako) name() string             { return t.title }
func (t *tako) ports() (http, https int) { return t.server.HTTP, t.server.HTTPS }
func (t *tako) stop() error              { return t.server.Close() }

// processes are all of tako's, the apps not among them.
func (t *tako) processes() []int {
	var pids []int
	for _, p := range t.server.Processes() {
		program, _, _ := strings.Cut(p.Command, " ")
		switch filepath.Base(program) {
		case "tako-master", "tako-proxy", "tako-agent":
			pids = append(pids, p.PID)
		}
	}
	return pids
}

// startTako starts a server with the two apps, and with as many more as hosts
// need; "tako=DIR" is one of the programs in a folder.
func startTako(s *scene, title, self string, appCPUs []int) (*tako, error) {
	server, err := takotest.New(takotest.Options{Flags: []string{"--log-level", "warn"}})
	if err != nil {
		return nil, err
	}
	t := &tako{title: title, server: server, inFlight: s.inFlight}
	if _, dir, ok := strings.Cut(title, "="); ok {
		err = replace(server, dir)
	}
	if err == nil {
		err = onCPUs(s.cpus, server.Start)
	}
	if err != nil {
		return nil, errors.Join(err, t.stop())
	}
	fail := func(err error) (*tako, error) {
		return nil, errors.Join(fmt.Errorf("%s: %w", title, err), t.stop())
	}
	taker := filepath.Base(server.Dir)
	if s.tcp, err = t.deploy(self, "tcp", []string{"tcp", "take", taker}, []string{hostTCP}, appCPUs); err != nil {
		return fail(err)
	}
	if s.unix, err = t.deploy(self, "unix", []string{"unix"}, []string{hostUnix}, appCPUs); err != nil {
		return fail(err)
	}
	if s.apps, err = t.deployHosts(self, taker, s.hosts, appCPUs); err != nil {
		return fail(err)
	}
	if err := answers(t); err != nil {
		return fail(err)
	}
	certs := filepath.Join(server.Data, "certs", hostTCP)
	s.cert, s.key = filepath.Join(certs, "fullchain.pem"), filepath.Join(certs, "privkey.pem")
	return t, nil
}

// replace gives a server that does not run yet the programs of another folder.
func replace(server *takotest.Server, dir string) error {
	for _, name := range takotest.Programs {
		text, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			return err
		}
		to := server.Program(name)
		if err := errors.Join(os.Remove(to), os.WriteFile(to, text, 0o755)); err != nil { //nolint:gosec // a program
			return err
		}
	}
	return nil
}

func (t *tako) deployHosts(self, taker string, hosts int, on []int) ([]place, error) {
	apps := make([]place, (hosts+hostsPerApp-1)/hostsPerApp)
	errs := make([]error, len(apps))
	room := make(chan struct{}, deploying)
	var wg sync.WaitGroup
	for i := range apps {
		wg.Go(func() {
			room <- struct{}{}
			defer func() { <-room }()
			var routes []string
			for n := i * hostsPerApp; n < min(hosts, (i+1)*hostsPerApp); n++ {
				routes = append(routes, hostName(n))
			}
			apps[i], errs[i] = t.deploy(self, fmt.Sprintf("app%d", i), []string{"tcp", "give", taker}, routes, on)
		})
	}
	wg.Wait()
	return apps, errors.Join(errs...)
}

// deploy deploys the app, puts it on its processors and returns where it listens.
func (t *tako) deploy(self, name string, listen, routes []string, on []int) (at place, err error) {
	release := filepath.Join(t.server.Data, "apps", name, "releases", "1")
	settings := map[string]any{
		"runtime": "go", "start": append([]string{self, "app"}, listen...), "https_redirect": false, "timeouts": map[string]any{"stability": 0.1},
	}
	if t.inFlight > 0 {
		settings["limits"] = map[string]any{"in_flight": t.inFlight}
	}
	manifest, err := json.Marshal(settings)
	if err != nil {
		return at, err
	}
	if err := errors.Join(os.MkdirAll(release, 0o755), os.WriteFile(filepath.Join(release, "app.json"), manifest, 0o644)); err != nil { //nolint:gosec // for the app's user
		return at, err
	}
	_, err = t.server.Ask("deploy", map[string]any{
		"app": name, "version": "1", "path": release, "routes": routes, "instances": 1, "idle_timeout": 300,
	})
	if err != nil {
		return at, err
	}
	if at, err = t.where(routes[0]); err != nil {
		return at, err
	}
	return at, move(at.PID, on)
}

// where asks an app, through tako, where it listens.
func (t *tako) where(host string) (at place, err error) {
	client := http.Client{Timeout: answerTime, Transport: &http.Transport{DisableKeepAlives: true}}
	req, err := http.NewRequest(http.MethodGet, "http://"+net.JoinHostPort("127.0.0.1", fmt.Sprint(t.server.HTTP))+"/where", nil)
	if err != nil {
		return at, err
	}
	req.Host = host
	res, err := client.Do(req)
	if err != nil {
		return at, err
	}
	defer res.Body.Close()
	text, err := io.ReadAll(res.Body)
	if err == nil && res.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s/where is answered %s: %.100s", host, res.Status, text)
	}
	if err != nil {
		return at, err
	}
	return at, json.Unmarshal(text, &at)
}
