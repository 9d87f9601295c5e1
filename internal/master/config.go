package master

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"github.com/BurntSushi/toml"
	"github.com/spf13/pflag"

	"tako/internal/paths"
	"tako/internal/tako"
	"tako/internal/wire"
)

// Config is how a server is to run. NewFlags fills it.
type Config struct {
	Socket        string
	SocketGroup   string
	DataDir       string
	SettingsFile  string // --config; "" is server-config.toml in the data root, if it is there
	LibexecDir    string
	ListenAddress []string
	Port          uint16
	TLSPort       uint16

	NoACME       bool
	ACMEStaging  bool
	ACMEEmail    string
	RenewalHours uint64

	InstancePorts      string
	InstancePortOffset uint16
	TrustedProxies     []string
	ProxyProtocol      bool
	HTTPEngine         string

	KeepReleases     int
	KeepReleasesDays int

	ProxyUser string
	AgentUser string
	AppUIDs   string

	LogLevel  string
	LogFormat string
	PProf     bool

	Check     bool
	Preflight string // for a reload: check against this copy of the database
	Version   bool
}

// Usage is the text above the flags in --help.
const Usage = `tako-master runs many web apps on this host and stands between them and the internet.

It starts tako-proxy and tako-agent from its own folder, opens the ports, keeps
its state in the data root, and answers takoctl on the management socket. SIGTERM
stops it in order; SIGHUP reloads it: the installed version and the settings take
over in the same process, and no request is lost.

Usage:
  tako-master [flags]

Try it as any user:
  tako-master --socket /tmp/tako.sock --port 8080 --tls-port 8443 --data-dir /tmp/tako-data --no-acme
  takoctl --socket /tmp/tako.sock deploy ./my-app --app my-app --route my-app.localhost

Every flag may also stand in the settings file under the same name, as in
  port = 8080
  trusted-proxies = ["10.0.0.0/8"]
Flags win over the file.

Flags:
`

// NewFlags returns the flags of tako-master, bound to c.
func NewFlags(c *Config) *pflag.FlagSet {
	f := pflag.NewFlagSet("tako-master", pflag.ContinueOnError)
	f.SortFlags = false
	f.StringVar(&c.Socket, "socket", paths.DefaultSocket, "management socket; a link to tako-PID.sock beside it")
	f.StringVar(&c.SocketGroup, "socket-group", "tako", "group that may use the management socket, if it exists")
	f.Uint16Var(&c.Port, "port", 80, "port for HTTP")
	f.Uint16Var(&c.TLSPort, "tls-port", 443, "port for HTTPS")
	f.StringSliceVar(&c.ListenAddress, "listen-address", nil, "addresses to listen on (default: all of IPv4 and IPv6)")
	f.StringVar(&c.DataDir, "data-dir", paths.DefaultData, "data root: apps, state, certificates")
	f.StringVar(&c.SettingsFile, "config", "", "settings file (default: "+paths.SettingsName+" in the data root, if it is there)")
	f.BoolVar(&c.NoACME, "no-acme", false, "do not ask for certificates of a public authority (this version obtains none yet)")
	f.BoolVar(&c.ACMEStaging, "acme-staging", false, "use the authority's staging directory")
	f.StringVar(&c.ACMEEmail, "acme-email", "", "contact for the authority")
	f.Uint64Var(&c.RenewalHours, "renewal-interval-hours", 12, "how often certificates are looked at for renewal")
	f.StringVar(&c.InstancePorts, "instance-ports", "20000-31999", "TCP ports on loopback for instances")
	f.Uint16Var(&c.InstancePortOffset, "instance-port-offset", 0, "shift the apps' preferred instance ports; not 0: serve beside the owner of the data root if it has one, on its ports, follow it, and take its place when it has gone")
	f.StringSliceVar(&c.TrustedProxies, "trusted-proxies", nil, "addresses or prefixes whose X-Forwarded-* are believed (default: nobody's)")
	f.BoolVar(&c.ProxyProtocol, "proxy-protocol", false, "connections come from trusted-proxies only and begin with a PROXY protocol header")
	f.StringVar(&c.HTTPEngine, "http-engine", string(wire.EngineTako), "what speaks HTTP with clients: tako, or Go's own net/http, which is slower and less strict")
	f.IntVar(&c.KeepReleases, "keep-releases", 10, "releases of an app to keep on disk at least")
	f.IntVar(&c.KeepReleasesDays, "keep-releases-days", 30, "days to keep every release for")
	f.StringVar(&c.ProxyUser, "proxy-user", "tako-proxy", "user of tako-proxy, by name or UID:GID")
	f.StringVar(&c.AgentUser, "agent-user", "tako-agent", "user of tako-agent, by name or UID:GID")
	f.StringVar(&c.AppUIDs, "app-uids", "70000-79999", "users that apps run as, one each")
	f.StringVar(&c.LibexecDir, "libexec-dir", "", "folder of tako-proxy and tako-agent (default: that of tako-master)")
	f.StringVar(&c.LogLevel, "log-level", "info", "trace, debug, info, warn or error")
	f.StringVar(&c.LogFormat, "log-format", "text", "text or json")
	f.BoolVar(&c.PProf, "pprof", false, "let the server's user take profiles of tako-proxy, from pprof.sock in the run directory")
	f.BoolVar(&c.Check, "check", false, "check flags and settings, then exit")
	f.BoolVar(&c.Version, "version", false, "print the version, then exit")
	f.StringVar(&c.Preflight, "preflight", "", "check what a reload would find, with this copy of the database")
	if err := f.MarkHidden("preflight"); err != nil {
		panic(err) // the flag stands one line above
	}
	return f
}

// notInFile are flags that make no sense in the settings file.
var notInFile = []string{"config", "check", "preflight", "version", "data-dir"}

// MaxSettings bounds the settings file, in bytes.
const MaxSettings = 1 << 20

// LoadSettings reads the settings file into the flags that were not given. The
// default file may be missing; one that was asked for may not.
func LoadSettings(f *pflag.FlagSet, c *Config) error {
	path, asked := c.SettingsFile, c.SettingsFile != ""
	if !asked {
		path = filepath.Join(c.DataDir, paths.SettingsName)
	}
	file, err := os.Open(path)
	if !asked && (errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ENOTDIR)) {
		return nil // if the data root is no good, that is said with more words later
	}
	if err != nil {
		return fmt.Errorf("settings: %w", err)
	}
	defer file.Close()
	data, err := io.ReadAll(io.LimitReader(file, MaxSettings+1))
	if err != nil {
		return fmt.Errorf("settings: %w", err)
	}
	if len(data) > MaxSettings {
		return fmt.Errorf("settings: %s is over %d bytes", path, MaxSettings)
	}
	return ApplySettings(f, path, string(data))
}

// ApplySettings is LoadSettings for the text of a file. It reports every fault
// at once.
func ApplySettings(f *pflag.FlagSet, path, text string) error {
	var values map[string]any
	if _, err := toml.Decode(text, &values); err != nil {
		return fmt.Errorf("settings %s: %w", path, err)
	}
	var faults []error
	fault := func(name, format string, args ...any) {
		faults = append(faults, fmt.Errorf("settings %s: %s: %s", path, name, fmt.Sprintf(format, args...)))
	}
	names := make([]string, 0, len(values))
	for name := range values {
		names = append(names, name)
	}
	slices.Sort(names)
	for _, name := range names {
		flag := f.Lookup(name)
		switch {
		case flag == nil:
			fault(name, "there is no such setting; tako-master --help lists them")
			continue
		case slices.Contains(notInFile, name):
			fault(name, "this can only be a flag")
			continue
		case flag.Changed:
			continue // flags win
		}
		var texts []string
		switch v := values[name].(type) {
		case string:
			texts = []string{v}
		case bool:
			texts = []string{strconv.FormatBool(v)}
		case int64:
			texts = []string{strconv.FormatInt(v, 10)}
		case []any:
			if _, ok := flag.Value.(pflag.SliceValue); !ok {
				fault(name, "want one value, not a list")
				continue
			}
			for _, item := range v {
				s, ok := item.(string)
				if !ok {
					fault(name, "want a list of strings")
					break
				}
				texts = append(texts, s)
			}
		default:
			fault(name, "want a string, number, boolean or list of strings, not %T", v)
			continue
		}
		if slice, ok := flag.Value.(pflag.SliceValue); ok {
			if err := slice.Replace(texts); err != nil {
				fault(name, "%v", err)
			}
			continue
		}
		if err := flag.Value.Set(texts[0]); err != nil {
			fault(name, "%v", err)
		}
	}
	return errors.Join(faults...)
}

// settled is a Config with everything parsed.
type settled struct {
	Config
	layout         paths.Layout
	portMin        uint16
	portMax        uint16
	uidMin, uidMax uint32
	listen         []netip.Addr // empty: all
	trusted        []string
}

// Validate reports every fault of c at once.
func (c Config) Validate() error {
	_, err := c.settle()
	return err
}

func (c Config) settle() (settled, error) {
	s := settled{Config: c}
	var faults []error
	fault := func(format string, args ...any) { faults = append(faults, fmt.Errorf(format, args...)) }

	socket, err := filepath.Abs(c.Socket)
	if err != nil {
		fault("--socket: %w", err)
	}
	data, err := filepath.Abs(c.DataDir)
	if err != nil {
		fault("--data-dir: %w", err)
	}
	s.layout = paths.Layout{Data: data, Run: runDir(socket), Socket: socket}
	if c.Socket == "" {
		fault("--socket: must not be empty")
	} else if err := paths.CheckSocket(socket); err != nil {
		fault("--socket: %w", err)
	}
	if c.DataDir == "" {
		fault("--data-dir: must not be empty")
	}
	if c.Port == c.TLSPort && c.Port != 0 {
		fault("--port and --tls-port: both are %d", c.Port)
	}
	lo, hi, err := parseRange(c.InstancePorts, 1024, 65535)
	if err != nil {
		fault("--instance-ports: %w", err)
	}
	s.portMin, s.portMax = uint16(lo), uint16(hi) // bounded above
	if err == nil && hi-lo < 99 {
		fault("--instance-ports: %s has fewer than 100 ports", c.InstancePorts)
	}
	lo, hi, err = parseRange(c.AppUIDs, 1000, 1<<31)
	if err != nil {
		fault("--app-uids: %w", err)
	}
	s.uidMin, s.uidMax = uint32(lo), uint32(hi) // bounded above
	for _, a := range c.ListenAddress {
		ip, err := netip.ParseAddr(a)
		if err != nil {
			fault("--listen-address: %q is not an IP address", a)
			continue
		}
		s.listen = append(s.listen, ip)
	}
	if most := MaxListeners / 2; len(c.ListenAddress) > most {
		fault("--listen-address: %d addresses, the limit is %d", len(c.ListenAddress), most)
	}
	for _, p := range c.TrustedProxies {
		prefix, err := netip.ParsePrefix(p)
		if err != nil {
			ip, ipErr := netip.ParseAddr(p)
			if ipErr != nil {
				fault("--trusted-proxies: %q is neither an address nor a prefix such as 10.0.0.0/8", p)
				continue
			}
			prefix = netip.PrefixFrom(ip, ip.BitLen())
		}
		s.trusted = append(s.trusted, prefix.Masked().String())
	}
	if c.ProxyProtocol && len(c.TrustedProxies) == 0 {
		fault("--proxy-protocol: nobody may connect without --trusted-proxies; name the balancers there")
	}
	if e := wire.HTTPEngine(c.HTTPEngine); e != wire.EngineTako && e != wire.EngineNetHTTP {
		fault("--http-engine: %q is neither %s nor %s", c.HTTPEngine, wire.EngineTako, wire.EngineNetHTTP)
	}
	if c.RenewalHours == 0 || c.RenewalHours > 24*30 {
		fault("--renewal-interval-hours: %d is not from 1 to 720", c.RenewalHours)
	}
	if c.KeepReleases < 2 || c.KeepReleases > 10_000 {
		fault("--keep-releases: %d is not from 2 to 10000", c.KeepReleases)
	}
	if c.KeepReleasesDays < 0 || c.KeepReleasesDays > 36_500 {
		fault("--keep-releases-days: %d is not from 0 to 36500", c.KeepReleasesDays)
	}
	if !slices.Contains([]string{"trace", "debug", "info", "warn", "error"}, c.LogLevel) {
		fault("--log-level: %q is none of trace, debug, info, warn, error", c.LogLevel)
	}
	if c.LogFormat != "text" && c.LogFormat != "json" {
		fault("--log-format: %q is neither text nor json", c.LogFormat)
	}
	return s, errors.Join(faults...)
}

// runDir is the run directory for a socket: the folder it stands in, or, where
// that one is open to all (as /tmp is), a private one beside the socket.
func runDir(socket string) string {
	dir := filepath.Dir(socket)
	if fi, err := os.Stat(dir); err == nil && fi.Mode().Perm()&0o002 != 0 {
		return strings.TrimSuffix(socket, ".sock") + ".run"
	}
	return dir
}

func parseRange(s string, lowest, highest uint64) (lo, hi uint64, err error) {
	a, b, ok := strings.Cut(s, "-")
	if ok {
		lo, err = strconv.ParseUint(a, 10, 32)
		if err == nil {
			hi, err = strconv.ParseUint(b, 10, 32)
		}
	}
	if !ok || err != nil {
		return 0, 0, fmt.Errorf("%q is not a range such as %d-%d", s, lowest, highest)
	}
	if lo < lowest || hi > highest || lo > hi {
		return 0, 0, fmt.Errorf("%q does not lie within %d-%d", s, lowest, highest)
	}
	return lo, hi, nil
}

// isolation says in a sentence which walls stand.
func isolation(privileged bool) string {
	if privileged {
		return "tako-proxy, tako-agent and every app run as users of their own"
	}
	return "everything runs as one user: an app can read what tako can; start tako-master as root for users of their own"
}

var errNoServer = tako.Errorf(tako.CodeInternal, "the server is stopping")
