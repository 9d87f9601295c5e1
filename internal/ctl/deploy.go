package ctl

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"tako/internal/archive"
	"tako/internal/management"
	"tako/internal/release"
	"tako/internal/tako"
)

// What a deploy does unless told otherwise, for an app that is new.
const (
	defaultInstances   = 1
	defaultIdleTimeout = 5 * time.Minute
)

// progressEvery is how often the byte count on a terminal moves.
const progressEvery = 100 * time.Millisecond

const manifestHelp = `Every app has an app.json. The smallest ones:
  node, bun, deno:  {"runtime": "node", "main": "server.js"}
  Go, or any other program, built before the deploy:
                    {"runtime": "go", "start": ["./server"]}
The app listens on the port in PORT, or on the socket in TAKO_APP_SOCKET, and
answers GET /status with 200.`

const deployHelp = `Deploy packs the directory (default: the current one), sends it to the server as
a new release, and lets the server replace the running instances one by one. If
a new instance does not become well, the server keeps what ran before.

What .gitignore names is not sent. A .takoignore in the same form goes before it
and can take build output back in: a line "!dist/" sends that folder whole.

` + manifestHelp + `

For an app that exists, routes, instances and idle timeout stay as they are
unless given. Secrets stay too; if any are given, they replace all that the app
has. To change one alone, see takoctl secrets set.`

type deployFlags struct {
	app, version, path, secretsFile string
	routes, secrets                 []string
	instances                       uint8
	idle                            time.Duration
	instancesSet, idleSet           bool
}

func (r *run) deployCommand() *cobra.Command {
	var f deployFlags
	c := &cobra.Command{
		Use: "deploy [DIR]", Short: "Send a directory as a new release and run it", Long: deployHelp, Args: cobra.MaximumNArgs(1),
		Example: `  takoctl deploy . --app blog --route blog.example.com
  takoctl deploy dist --app blog --instances 2 --version 1.4.0
  takoctl deploy --app blog --version 1.4.0 --path /opt/tako/apps/blog/releases/1.4.0`,
	}
	c.Flags().StringVar(&f.app, "app", "", "`name` of the app (default: \"name\" of app.json, else the directory's name)")
	c.Flags().StringArrayVar(&f.routes, "route", nil, "`host` or host/path that leads to the app; repeat for more")
	c.Flags().StringVar(&f.version, "version", "", "name of the release (default: the git commit, else the time)")
	c.Flags().Uint8Var(&f.instances, "instances", defaultInstances, "how many processes; 0 starts one when a request comes")
	c.Flags().DurationVar(&f.idle, "idle-timeout", defaultIdleTimeout, "with --instances 0, stop a process after this long without a request")
	c.Flags().StringArrayVar(&f.secrets, "secret", nil, "`NAME=VALUE` for the app's environment; repeat for more")
	c.Flags().StringVar(&f.secretsFile, "secrets-file", "", "secrets from a `file`: a JSON object, or lines NAME=VALUE")
	c.Flags().StringVar(&f.path, "path", "", "deploy what is laid out at this `path` on the server, and send nothing")
	c.RunE = func(cmd *cobra.Command, args []string) error {
		f.instancesSet, f.idleSet = cmd.Flags().Changed("instances"), cmd.Flags().Changed("idle-timeout")
		return r.deploy(cmd.Context(), f, args)
	}
	return c
}

func (r *run) deploy(ctx context.Context, f deployFlags, args []string) error {
	req := management.Request{Command: "deploy", App: f.app, Version: f.version, Path: f.path, Progress: true}
	secrets, err := r.readSecrets(f.secrets, f.secretsFile)
	if err != nil {
		return err
	}
	req.Secrets = secrets
	if f.idle < 0 || f.idle/time.Second > 1<<32-1 {
		return usagef("--idle-timeout %v is out of range", f.idle)
	}

	var list *archive.Listing
	if f.path != "" {
		if len(args) > 0 || f.app == "" || f.version == "" {
			return usagef("--path needs --app and --version, and no directory: nothing is sent")
		}
	} else {
		dir := "."
		if len(args) > 0 {
			dir = args[0]
		}
		if list, err = r.prepare(ctx, dir, &req); err != nil {
			return err
		}
		defer list.Close()
	}
	if _, err := tako.ParseAppID(req.App); err != nil {
		return usagef("%w; choose another with --app", err)
	}
	if _, err := tako.ParseReleaseID(req.Version); err != nil {
		return usagef("%w; choose another with --version", err)
	}
	return r.with(ctx, func(ctx context.Context, s *conn) error {
		if err := fillFromStatus(ctx, s, f, &req); err != nil {
			return err
		}
		if list != nil {
			if req.Path, err = r.upload(ctx, s, req, list); err != nil {
				return err
			}
		}
		r.step(fmt.Sprintf("deploying %s %s", req.App, req.Version))
		return ask(ctx, r, s, req, func(d management.DeployResult) { r.deployed(d, "deployed") })
	})
}

// prepare finds what to send in dir, and fills in the app and the version.
func (r *run) prepare(ctx context.Context, dir string, req *management.Request) (*archive.Listing, error) {
	if info, err := os.Stat(dir); err != nil {
		return nil, usagef("%w", err)
	} else if !info.IsDir() {
		return nil, usagef("%s is not a directory", dir)
	}
	if _, err := os.Lstat(filepath.Join(dir, release.ManifestName)); errors.Is(err, fs.ErrNotExist) {
		return nil, usagef("there is no %s in %s\n%s", release.ManifestName, dir, manifestHelp)
	}
	if _, err := release.Load(dir); err != nil {
		return nil, err
	}
	if req.App == "" {
		req.App = appName(dir)
	}
	if req.Version == "" {
		req.Version = defaultVersion(ctx, dir, r.Now())
	}
	var last time.Time
	moving := terminal(r.Stderr) && !r.json
	var total int64
	opts := archive.Options{Wrote: func(n int64) {
		if now := time.Now(); moving && (now.Sub(last) >= progressEvery || n == total) {
			last = now
			fmt.Fprintf(r.Stderr, "\r  sent %s of %s\x1b[K", size(n), size(total))
			if n == total {
				fmt.Fprintln(r.Stderr)
			}
		}
	}}
	list, err := archive.List(ctx, dir, opts)
	if err != nil {
		return nil, err
	}
	total = list.Stats().Bytes
	if !list.Has(release.ManifestName) {
		list.Close()
		return nil, usagef("%s is ignored: take it out of .gitignore, or write \"!%s\" into .takoignore", release.ManifestName, release.ManifestName)
	}
	return list, nil
}

// upload sends the listing and returns the release's path on the server.
func (r *run) upload(ctx context.Context, s *conn, req management.Request, list *archive.Listing) (string, error) {
	st := list.Stats()
	r.step(fmt.Sprintf("sending %s, %s", plural(st.Files, "file"), size(st.Bytes)))
	in, out := io.Pipe()
	packed := make(chan struct{})
	go func() {
		defer close(packed)
		out.CloseWithError(list.Write(ctx, out))
	}()
	res, err := s.Upload(ctx, req.App, req.Version, in)
	in.Close() // ends Write, should the server have stopped reading
	<-packed
	if e, ok := errors.AsType[*tako.Error](err); ok && e.Code == tako.CodeConflict {
		return "", tako.Errorf(e.Code, "%s\nChoose another name with --version, or deploy what is there with --path.", e.Message)
	}
	return res.Path, err
}

// fillFromStatus takes what the command line left out from the app as it is.
func fillFromStatus(ctx context.Context, s *conn, f deployFlags, req *management.Request) error {
	instances, idle := f.instances, uint32(f.idle/time.Second) // checked
	req.Routes, req.Instances, req.IdleTimeout = f.routes, &instances, &idle
	if len(f.routes) > 0 && f.instancesSet && f.idleSet {
		return nil
	}
	var now management.AppStatus
	err := s.Do(ctx, management.Request{Command: "status", App: req.App}, nil, &now)
	if e, ok := errors.AsType[*tako.Error](err); ok && e.Code == tako.CodeNotFound {
		if len(f.routes) == 0 {
			return usagef("%s is a new app: say with --route which host leads to it, like --route %s.example.com", req.App, req.App)
		}
		return nil
	}
	if err != nil {
		return err
	}
	if len(f.routes) == 0 {
		if len(now.Routes) == 0 {
			return usagef("%s has no routes: say with --route which host leads to it", req.App)
		}
		req.Routes = now.Routes
	}
	if !f.instancesSet {
		instances = now.Wanted
	}
	if !f.idleSet {
		idle = now.IdleSecs
	}
	return nil
}

// deployed prints what a deploy, rollback or restart came to.
func (r *run) deployed(d management.DeployResult, did string) {
	text := fmt.Sprintf("%s %s %s", did, d.App, d.Version)
	switch {
	case d.Rolled:
		text += fmt.Sprintf(": %s in place of %d", plural(d.NewInstances, "instance"), d.OldInstances)
	case d.NewApp:
		text += ": a new app"
	}
	if d.OnDemand {
		text += ", on demand"
	}
	r.say("%s", clean(text))
}

// appName is the name in app.json, else that of the directory.
func appName(dir string) string {
	var m struct {
		Name string `json:"name"`
	}
	if data, err := os.ReadFile(filepath.Join(dir, release.ManifestName)); err == nil && json.Unmarshal(data, &m) == nil && m.Name != "" {
		return m.Name
	}
	if abs, err := filepath.Abs(dir); err == nil {
		return filepath.Base(abs)
	}
	return ""
}

var notInVersion = regexp.MustCompile(`[^A-Za-z0-9._-]+`)

// defaultVersion names a release after the commit of dir, with the time if there
// are changes on top of it, or after the time alone.
func defaultVersion(ctx context.Context, dir string, now time.Time) string {
	stamp := now.UTC().Format("20060102T150405Z")
	git := func(args ...string) (string, error) {
		cmd := exec.CommandContext(ctx, "git", append([]string{"-C", dir}, args...)...)
		out, err := cmd.Output()
		return strings.TrimSpace(string(out)), err
	}
	commit, err := git("rev-parse", "--short=12", "HEAD")
	if err != nil || commit == "" {
		return stamp
	}
	if changes, err := git("status", "--porcelain", "--", "."); err != nil || changes != "" {
		commit += "-dirty-" + stamp
	}
	return notInVersion.ReplaceAllString(commit, "-")
}
