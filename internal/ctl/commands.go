package ctl

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"tako/internal/management"
	"tako/internal/tako"
)

// reply is what several commands answer.
type reply struct {
	App       tako.AppID `json:"app"`
	Owner     string     `json:"owner"`
	Existed   bool       `json:"existed"`
	Restarted bool       `json:"restarted"`
	Instances int        `json:"instances"`
}

func (r *run) statusCommand() *cobra.Command {
	return r.command(&cobra.Command{
		Use: "status APP", Short: "Show an app and its instances", Args: cobra.ExactArgs(1),
		Example: "  takoctl status blog\n  takoctl --json status blog | jq .state",
	},
		func(ctx context.Context, s *conn, args []string) error {
			return ask(ctx, r, s, management.Request{Command: "status", App: args[0]}, r.showStatus)
		})
}

func (r *run) showStatus(a management.AppStatus) {
	line := func(name, format string, v ...any) { r.say("%-10s %s", name, fmt.Sprintf(format, v...)) }
	line("app", "%s", clean(string(a.Name)))
	line("state", "%s", r.state(string(a.State)))
	if a.RetryInMS != nil {
		line("next try", "in %s", seconds(uint64(max(*a.RetryInMS, 0)+999)/1000))
	}
	line("version", "%s", clean(string(a.Version)))
	if a.DeployedAt != nil {
		line("deployed", "%s", r.ago(a.DeployedAt))
	}
	if a.OnDemand {
		line("instances", "on demand, stopped after %s without a request", seconds(uint64(a.IdleSecs)))
	} else {
		line("instances", "%d wanted", a.Wanted)
	}
	line("routes", "%s", clean(strings.Join(a.Routes, ", ")))
	if len(a.Instances) > 0 && a.Instances[0].Limits != "" {
		line("limits", "kept by %s", clean(a.Instances[0].Limits))
	}
	if a.LastError != nil {
		line("last error", "%s", clean(*a.LastError))
	}
	if len(a.Instances) == 0 {
		return
	}
	r.say("")
	t := r.table("INSTANCE", "VERSION", "STATE", "PID", "UP", "REQUESTS", "NOW", "RESTARTS", "VIA")
	builds := a.Builds
	if len(builds) == 0 {
		builds = []management.Build{{Version: a.Version, Instances: a.Instances}}
	}
	for _, b := range builds {
		for _, i := range b.Instances {
			pid := ""
			if i.PID != nil {
				pid = strconv.Itoa(*i.PID)
			}
			via := i.Transport
			if via == "tcp" {
				via = fmt.Sprintf("tcp %d", i.Port)
			}
			if i.Process != "" {
				via = "process " + clean(i.Process)
			}
			t.add(i.ID, b.Version, i.State, pid, seconds(i.UptimeSecs), i.RequestsTotal, i.InFlight, i.Restarts, via)
		}
	}
	t.write(r.Stdout)
}

type appList struct {
	Apps []management.AppSummary `json:"apps"`
}

func (r *run) listCommand() *cobra.Command {
	return r.command(&cobra.Command{Use: "list", Aliases: []string{"ls"}, Short: "List the apps", Args: cobra.NoArgs},
		func(ctx context.Context, s *conn, _ []string) error {
			return ask(ctx, r, s, management.Request{Command: "list"}, func(l appList) {
				if len(l.Apps) == 0 {
					r.say("no apps yet; see takoctl deploy --help")
					return
				}
				t := r.table("APP", "STATE", "INSTANCES", "VERSION")
				for _, a := range l.Apps {
					t.add(a.Name, a.State, a.Instances, a.Version)
				}
				t.write(r.Stdout)
			})
		})
}

type releases struct {
	Releases []management.Release `json:"releases"`
}

func (r *run) releasesCommand() *cobra.Command {
	return r.command(&cobra.Command{Use: "releases APP", Short: "List an app's releases, newest first", Args: cobra.ExactArgs(1)},
		func(ctx context.Context, s *conn, args []string) error {
			return ask(ctx, r, s, management.Request{Command: "list_releases", App: args[0]}, func(l releases) {
				if len(l.Releases) == 0 {
					r.say("no releases")
					return
				}
				t := r.table("VERSION", "CURRENT", "DEPLOYED", "COMMIT")
				for _, x := range l.Releases {
					current, commit := "", ""
					if x.Current {
						current = "current"
					}
					if x.CommitMessage != nil {
						commit, _, _ = strings.Cut(*x.CommitMessage, "\n")
					}
					if x.GitDirty != nil && *x.GitDirty {
						commit = strings.TrimSpace(commit + " (with changes)")
					}
					t.add(x.Version, current, r.ago(x.DeployedAt), commit)
				}
				t.write(r.Stdout)
			})
		})
}

type routeList struct {
	Routes []management.AppRoutes `json:"routes"`
}

func (r *run) routesCommand() *cobra.Command {
	return r.command(&cobra.Command{Use: "routes", Short: "List the routes and the apps they lead to", Args: cobra.NoArgs},
		func(ctx context.Context, s *conn, _ []string) error {
			return ask(ctx, r, s, management.Request{Command: "routes"}, func(l routeList) {
				if len(l.Routes) == 0 {
					r.say("no routes yet; see takoctl deploy --help")
					return
				}
				t := r.table("ROUTE", "APP")
				for _, a := range l.Routes {
					for _, route := range a.Routes {
						t.add(route, a.App)
					}
				}
				t.write(r.Stdout)
			})
		})
}

func (r *run) rollbackCommand() *cobra.Command {
	return r.command(&cobra.Command{
		Use: "rollback APP [VERSION]", Short: "Run an earlier release again", Args: cobra.RangeArgs(1, 2),
		Long:    "Rollback deploys a release that is still on the server, with the routes, secrets\nand instances of now. Without VERSION that is the one before the current one.",
		Example: "  takoctl rollback blog\n  takoctl rollback blog 1.3.2",
	},
		func(ctx context.Context, s *conn, args []string) error {
			req := management.Request{Command: "rollback", App: args[0], Progress: true}
			if len(args) == 2 {
				req.Version = args[1]
			} else {
				var l releases
				if err := s.Do(ctx, management.Request{Command: "list_releases", App: args[0]}, nil, &l); err != nil {
					return err
				}
				v, err := previous(args[0], l.Releases)
				if err != nil {
					return err
				}
				req.Version = string(v)
			}
			r.step("rolling back to " + req.Version)
			return ask(ctx, r, s, req, func(d management.DeployResult) { r.deployed(d, "rolled back") })
		})
}

// previous is the release before the current one, of a list with the newest
// first.
func previous(app string, list []management.Release) (tako.ReleaseID, error) {
	for i, x := range list {
		if !x.Current {
			continue
		}
		if i+1 < len(list) {
			return list[i+1].Version, nil
		}
		return "", tako.Errorf(tako.CodeNotFound, "%s has no release before %s", app, x.Version)
	}
	return "", tako.Errorf(tako.CodeNotFound, "%s has no current release: name the version, one of takoctl releases %s", app, app)
}

func (r *run) restartCommand() *cobra.Command {
	return r.command(&cobra.Command{Use: "restart APP", Short: "Replace an app's instances one by one", Args: cobra.ExactArgs(1)},
		func(ctx context.Context, s *conn, args []string) error {
			return ask(ctx, r, s, management.Request{Command: "restart", App: args[0], Progress: true},
				func(d management.DeployResult) { r.deployed(d, "restarted") })
		})
}

func (r *run) scaleCommand() *cobra.Command {
	var n uint8
	c := &cobra.Command{
		Use: "scale APP N", Short: "Change how many instances an app has", Example: "  takoctl scale blog 4\n  takoctl scale blog 0    # on demand",
		Args: func(cmd *cobra.Command, args []string) error {
			if err := cobra.ExactArgs(2)(cmd, args); err != nil {
				return err
			}
			v, err := strconv.ParseUint(args[1], 10, 8)
			if err != nil {
				return fmt.Errorf("%q is not a number of instances from 0 to 255", args[1])
			}
			n = uint8(v)
			return nil
		},
	}
	return r.command(c, func(ctx context.Context, s *conn, args []string) error {
		return ask(ctx, r, s, management.Request{Command: "scale", App: args[0], Instances: &n, Progress: true}, func(a reply) {
			if a.Instances == 0 {
				r.say("%s runs on demand", a.App)
				return
			}
			r.say("%s has %s", a.App, plural(a.Instances, "instance"))
		})
	})
}

func (r *run) stopCommand() *cobra.Command {
	return r.command(&cobra.Command{Use: "stop APP", Short: "Stop an app until the next deploy", Args: cobra.ExactArgs(1)},
		func(ctx context.Context, s *conn, args []string) error {
			return ask(ctx, r, s, management.Request{Command: "stop", App: args[0]}, func(a reply) { r.say("stopped %s", a.App) })
		})
}

func (r *run) deleteCommand() *cobra.Command {
	var yes bool
	c := &cobra.Command{Use: "delete APP", Short: "Stop an app and forget its routes, state and secrets", Args: cobra.ExactArgs(1)}
	c.Flags().BoolVarP(&yes, "yes", "y", false, "do not ask")
	c.RunE = func(cmd *cobra.Command, args []string) error {
		if !yes {
			if !terminal(r.Stdin) {
				return usagef("delete forgets the app, its routes and secrets: say --yes")
			}
			fmt.Fprintf(r.Stderr, "Forget %s, its routes and secrets? Releases and data stay on disk. [y/N] ", clean(args[0]))
			answer, err := bufio.NewReader(r.Stdin).ReadString('\n')
			if a := strings.ToLower(strings.TrimSpace(answer)); err != nil || a != "y" && a != "yes" {
				return fmt.Errorf("%s was not removed", args[0])
			}
		}
		return r.with(cmd.Context(), func(ctx context.Context, s *conn) error {
			return ask(ctx, r, s, management.Request{Command: "delete", App: args[0]}, func(a reply) {
				if a.Existed {
					r.say("deleted %s", a.App)
					return
				}
				r.say("there was no %s", a.App)
			})
		})
	}
	return c
}

func (r *run) logsCommand() *cobra.Command {
	var lines uint32
	var follow bool
	var app string
	c := &cobra.Command{
		Use: "logs APP", Short: "Show what an app wrote", Args: cobra.MaximumNArgs(1),
		Long:    "Logs shows the newest lines of an app's output, oldest first. With --json each\nline is a JSON object of its own. -f goes on through a reload of the server.",
		Example: "  takoctl logs blog -n 20\n  takoctl logs blog -f",
	}
	c.Flags().Uint32VarP(&lines, "lines", "n", management.DefaultLogLines, "how many lines")
	c.Flags().BoolVarP(&follow, "follow", "f", false, "go on with new lines as they come")
	c.Flags().StringVar(&app, "app", "", "the app, in place of the argument")
	c.PreRun = func(cmd *cobra.Command, _ []string) {
		if follow && !cmd.Flags().Changed("timeout") {
			r.timeout = 0
		}
	}
	return r.command(c, func(ctx context.Context, s *conn, args []string) error {
		if lines > management.MaxLogLines {
			return usagef("-n %d: at most %d lines are given", lines, management.MaxLogLines)
		}
		switch {
		case len(args) == 1 && app == "":
			app = args[0]
		case len(args) == 0 && app != "":
		default:
			return usagef("logs wants one app: takoctl logs APP")
		}
		req := management.LogsRequest{App: tako.AppID(app), Lines: int(lines), Follow: follow}
		if follow {
			return r.follow(ctx, s, req)
		}
		return s.Logs(ctx, req, r.logLine)
	})
}

func (r *run) logLine(l management.LogLine) error {
	if r.json {
		b, err := json.Marshal(l)
		if err != nil {
			return err
		}
		return r.printJSON(b)
	}
	from := "build"
	if l.Instance != 0 {
		from = strconv.FormatUint(uint64(l.Instance), 10)
		if l.Stream == "stderr" || l.Stream == "tako" {
			from += " " + l.Stream
		}
	}
	at, _, _ := strings.Cut(l.Time, ".")
	_, err := fmt.Fprintf(r.Stdout, "%s [%s] %s\n", clean(strings.TrimSuffix(at, "Z")), clean(from), clean(l.Text))
	return err
}

func (r *run) serverCommand() *cobra.Command {
	info := r.command(&cobra.Command{Use: "info", Short: "Show the server, its processes and its settings", Args: cobra.NoArgs},
		func(ctx context.Context, s *conn, _ []string) error {
			return ask(ctx, r, s, management.Request{Command: "server_info"}, r.showServer)
		})
	return group("server", "Look at the server, and reload it", info, r.reloadCommand())
}

func (r *run) showServer(i management.ServerInfo) {
	line := func(name, format string, v ...any) { r.say("%-10s %s", name, clean(fmt.Sprintf(format, v...))) }
	line("version", "%s", i.Version)
	line("mode", "%s", i.Mode)
	if i.Upgrade != nil {
		text := "its lease has run out: another may take it"
		if i.Upgrade.LeaseSecs > 0 {
			text = "another may take it in " + seconds(uint64(i.Upgrade.LeaseSecs)) // positive
		}
		line("upgrade", "held by %s for %s; %s", i.Upgrade.Owner, seconds(uint64(max(i.Upgrade.AgeSecs, 0))), text)
	}
	switch {
	case i.Role == management.RoleFollower:
		line("role", "follower of pid %d, which takes the changes", i.OwnerPID)
	case i.FollowerPID != nil:
		line("role", "owner; pid %d follows", *i.FollowerPID)
	}
	line("up", "%s, pid %d", seconds(i.UptimeSecs), i.PID)
	line("socket", "%s", i.Socket)
	line("data", "%s", i.DataDir)
	line("ports", "%d for HTTP, %d for HTTPS", i.HTTPPort, i.HTTPSPort)
	switch {
	case i.NoACME:
		line("acme", "off")
	case i.ACMEStaging:
		line("acme", "staging")
	default:
		line("acme", "wanted; this version obtains no certificates yet")
	}
	line("isolation", "%s", i.Isolation)
	if b := i.Restored; b != nil {
		line("restored", "%s from %s: what was changed after that backup is lost", r.ago(&b.At), b.Backup)
	}
	if r := i.Reload; r != nil && r.Count+r.Failed > 0 {
		text := fmt.Sprintf("%d times", r.Count)
		if r.LastError != "" {
			text += ", the last one failed: " + r.LastError
		}
		line("reloaded", "%s", text)
	}
	if len(i.Processes) == 0 {
		return
	}
	r.say("")
	t := r.table("PROCESS", "PID", "USER", "GENERATION", "STATE", "UP")
	for _, p := range i.Processes {
		t.add(p.Role, p.PID, p.User, p.Generation, p.State, seconds(p.UptimeSecs))
	}
	t.write(r.Stdout)
}

func (r *run) upgradeCommand() *cobra.Command {
	one := func(name, command, short, did string) *cobra.Command {
		var owner string
		var force bool
		c := &cobra.Command{Use: name, Short: short, Example: "  takoctl upgrade " + name + " --owner package-2.0"}
		c.Flags().StringVar(&owner, "owner", "", "who upgrades; only the same `owner` can end it")
		c.Flags().BoolVar(&force, "force", false, "even if another owner holds the lock; for root and the server's user")
		c.Args = func(cmd *cobra.Command, args []string) error {
			if len(args) > 0 || !cmd.Flags().Changed("owner") {
				return fmt.Errorf("want --owner, and nothing else")
			}
			return nil
		}
		return r.command(c, func(ctx context.Context, s *conn, _ []string) error {
			return ask(ctx, r, s, management.Request{Command: command, Owner: &owner, Force: force},
				func(a reply) { r.say(did, clean(a.Owner)) })
		})
	}
	return group("upgrade", "Hold changes back while the server is upgraded",
		one("enter", "enter_upgrading", "Refuse deploys and other changes from now on", "the server takes no changes; the upgrade lock belongs to %s"),
		one("exit", "exit_upgrading", "Take changes again", "the server takes changes again; the upgrade lock of %s is gone"))
}
