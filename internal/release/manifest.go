package release

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"tako/internal/tako"
)

// ManifestName is the manifest's name in a release's folder.
const ManifestName = "app.json"

// Bounds of a manifest.
const (
	MaxManifest  = 1 << 20 // bytes of app.json
	MaxArgs      = 256     // arguments of a command
	MaxProcesses = 16
	MaxInstances = 64 // of one entry of processes
	MaxCodes     = 32 // entries of health.codes
	MaxWaiters   = 100_000
	MaxPIDs      = 1 << 22
	MaxInFlight  = 65_536
	MaxCPU       = 1024
	MinMemory    = 4 << 20 // bytes
	MaxMemory    = 1 << 40
	MinBody      = 1 << 10 // bytes
	MaxBody      = 1 << 40
)

// Manifest is a checked app.json. Fields it does not know are ignored: other
// tools write some.
type Manifest struct {
	// Runtime chooses the default commands: bun, node and deno have some.
	Runtime string
	// Main is the entry file, relative to the release and inside it. It may be ""
	// if Start does without.
	Main string
	// Start is the argv of an instance, with {main} where Main belongs; nil for
	// the runtime's own. See Argv.
	Start []string
	// Install is a command for Shell, "" for the runtime's own. See
	// InstallCommand.
	Install string
	// Release is the argv of the release command, run once per deploy; nil for
	// none.
	Release []string
	// Env is the app's environment as far as it is no secret. Secrets of the same
	// name win over it, and what tako sets (PORT, HOST, TAKO_*) wins over both.
	Env map[string]string

	CommitMessage *string // nil when unknown
	GitDirty      *bool   // nil when unknown

	// HTTPSRedirect is whether plain HTTP is redirected to HTTPS.
	HTTPSRedirect bool
	Protocol      Protocol
	Health        Health
	// Processes are the instances without routes, by name.
	Processes map[string]Process
	Limits    Limits
	Timeouts  Timeouts
	Queue     Queue

	file string // its path, for errors
}

// Protocol is what an instance speaks.
type Protocol string

// The protocols.
const (
	ProtocolHTTP1 Protocol = "http1"
	ProtocolH2C   Protocol = "h2c" // HTTP/2 without TLS
)

// Health is how an instance shows that it is well.
type Health struct {
	// Connect: accepting a connection is enough. Path, Host and Codes are then
	// not used.
	Connect bool
	Path    string
	Host    string
	// Codes are the good statuses, each a pair of first and last.
	Codes [][2]int
	// Interval is between two steady probes, Timeout for each; neither is less
	// than 100 ms or more than 60 s, nor Timeout more than Interval.
	Interval time.Duration
	Timeout  time.Duration
}

// Process is a set of instances without routes.
type Process struct {
	Start     []string // argv, {main} replaced
	Instances int      // 0 to MaxInstances
}

// Limits bound one instance. 0 leaves a limit to the server.
type Limits struct {
	Memory int64   // bytes
	CPU    float64 // cores
	PIDs   int
	// InFlight bounds the requests at once, streams apart; more wait in a queue.
	InFlight int
	// RequestBody bounds the body of a request, in bytes; 0: not at all.
	RequestBody int64
}

// Timeouts bound the steps of a deploy.
type Timeouts struct {
	Ready     time.Duration // from start to the first good probe
	Drain     time.Duration // for requests in flight on an old instance
	Streams   time.Duration // for its WebSockets and other streams
	Grace     time.Duration // from SIGTERM to SIGKILL
	Stability time.Duration // a new instance must stay well for
	Install   time.Duration
	Release   time.Duration
}

// Queue bounds the requests that wait for an instance.
type Queue struct {
	Waiters int
	Wait    time.Duration
}

// invalid is the error of a release that cannot be deployed.
func invalid(format string, args ...any) error {
	return tako.Errorf(tako.CodeInvalid, "Invalid app release: %s", fmt.Sprintf(format, args...))
}

// Load reads and checks the manifest of the release in dir. The error is a
// CodeInvalid Error that names the file and the field.
func Load(dir string) (*Manifest, error) {
	file := filepath.Join(dir, ManifestName)
	data, err := readManifest(dir, ManifestName)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, invalid("missing deploy manifest %s", file)
	}
	if err != nil {
		return nil, invalid("failed to read deploy manifest %s: %v", file, reason(err))
	}
	return Parse(file, data)
}

// reason is err without the path that the sentence already has.
func reason(err error) error {
	if pe, ok := errors.AsType[*fs.PathError](err); ok {
		return pe.Err
	}
	return err
}

// readManifest reads the manifest name in dir. A link must stay inside dir, and
// nothing that could block is read.
func readManifest(dir, name string) ([]byte, error) {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, err
	}
	defer root.Close()
	f, err := root.OpenFile(name, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return readRegular(f, MaxManifest)
}

// readRegular reads f, which must be a regular file of at most limit bytes.
func readRegular(f *os.File, limit int64) ([]byte, error) {
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() {
		return nil, errors.New("it is not a regular file")
	}
	data, err := io.ReadAll(io.LimitReader(f, limit+1))
	if err != nil {
		return nil, err
	}
	if int64(len(data)) > limit {
		return nil, fmt.Errorf("it is larger than %d bytes", limit)
	}
	return data, nil
}

// Parse checks the bytes of a manifest; file is its path, for errors. The error
// is a CodeInvalid Error.
func Parse(file string, data []byte) (*Manifest, error) {
	if len(data) > MaxManifest {
		return nil, invalid("failed to read deploy manifest %s: it is larger than %d bytes", file, MaxManifest)
	}
	tree, err := decodeTree(data)
	if err != nil {
		return nil, invalid("failed to parse deploy manifest %s: %v", file, err)
	}
	fields, ok := tree.(map[string]any)
	if !ok {
		return nil, invalid("failed to parse deploy manifest %s: got %s, want an object", file, kind(tree))
	}
	m := &Manifest{file: file}
	if err := reading(func() { m.read(object{fields: fields}) }); err != nil {
		return nil, invalid("failed to parse deploy manifest %s: %v", file, err)
	}
	switch {
	case !object{fields: fields}.has("runtime"):
		return nil, invalid("failed to parse deploy manifest %s: missing field \"runtime\"", file)
	case m.Runtime == "":
		return nil, invalid("deploy manifest %s has empty runtime field", file)
	case m.Main != "":
	case object{fields: fields}.has("main"):
		return nil, invalid("deploy manifest %s has empty main field", file)
	case m.Start == nil:
		return nil, invalid("failed to parse deploy manifest %s: missing field \"main\"", file)
	}
	return m, nil
}

// read takes every field of o into m.
func (m *Manifest) read(o object) {
	m.Runtime = strings.TrimSpace(o.str("runtime", ""))
	m.Main = readMain(o)
	m.Start = m.readArgv(o, "start")
	m.Install = strings.TrimSpace(o.str("install", ""))
	if s, ok := o.fields["release"].(string); ok {
		if strings.TrimSpace(s) != "" {
			m.Release = Shell(o.str("release", ""))
		}
	} else {
		if _, ok := o.fields["release"].([]any); o.has("release") && !ok {
			mismatch("release", o.fields["release"], "a string, for the shell, or a list of strings")
		}
		m.Release = m.filled(m.readArgv(o, "release"))
	}
	m.Env = readEnv(o.object("env_vars"))
	if o.has("commit_message") {
		m.CommitMessage = new(o.str("commit_message", ""))
	}
	if o.has("git_dirty") {
		m.GitDirty = new(o.boolean("git_dirty", false))
	}
	m.HTTPSRedirect = o.boolean("https_redirect", true)
	switch p := Protocol(o.str("protocol", string(ProtocolHTTP1))); p {
	case ProtocolHTTP1, ProtocolH2C:
		m.Protocol = p
	default:
		refuse("protocol", "got %.40q, want \"http1\" or \"h2c\"", p)
	}
	switch l := o.str("listen", ""); l {
	case "":
	case "fd":
		refuse("listen", "instances are not handed a listening socket; leave the field out and listen on $TAKO_APP_SOCKET or $PORT")
	default:
		refuse("listen", "%.40q is not known; leave the field out and listen on $TAKO_APP_SOCKET or $PORT", l)
	}
	m.Health = readHealth(o.object("health"), m.Protocol)
	m.readProcesses(o.object("processes"))
	m.Limits = readLimits(o.object("limits"))
	m.Timeouts = readTimeouts(o.object("timeouts"))
	q := o.object("queue")
	m.Queue = Queue{
		Waiters: q.integer("waiters", 100, 0, MaxWaiters),
		Wait:    q.seconds("wait", 30, 0, 600),
	}
}

// readMain returns the entry file, cleaned of what is blank.
func readMain(o object) string {
	main := strings.TrimSpace(o.str("main", ""))
	switch {
	case main == "":
	case len(main) > 1024:
		refuse("main", "it is longer than 1024 bytes")
	case strings.HasPrefix(main, "-"):
		refuse("main", "%.40q would be read as an option; put ./ before it", main)
	case strings.HasPrefix(main, "/") || slices.Contains(strings.Split(main, "/"), ".."):
		refuse("main", "%.80q may leave the release; give the path of a file inside it, relative to it and without ..", main)
	case path.Clean(main) == ".":
		refuse("main", "%.80q is the release's folder; give a file inside it", main)
	}
	return main
}

// readArgv returns a command, nil when it is absent or empty.
func (m *Manifest) readArgv(o object, key string) []string {
	list := o.list(key, "a list of strings")
	if len(list) > MaxArgs {
		refuse(o.name(key), "%d arguments are more than %d", len(list), MaxArgs)
	}
	var argv []string
	for i, v := range list {
		s := asString(element(o.name(key), i), v)
		if i == 0 && strings.TrimSpace(s) == "" {
			refuse(element(o.name(key), 0), "the program is empty")
		}
		if s == placeholder && m.Main == "" {
			refuse(element(o.name(key), i), "it is {main}, and there is no main; add the field main")
		}
		argv = append(argv, s)
	}
	return argv
}

// placeholder is the argument that stands for Main.
const placeholder = "{main}"

// filled returns argv with Main for each {main}.
func (m *Manifest) filled(argv []string) []string {
	argv = slices.Clone(argv)
	for i, s := range argv {
		if s == placeholder {
			argv[i] = m.Main
		}
	}
	return argv
}

// readEnv returns the fields of o as environment variables.
func readEnv(o object) map[string]string {
	env := make(map[string]string, len(o.fields))
	for _, name := range slices.Sorted(maps.Keys(o.fields)) {
		if why := checkName(name); why != "" {
			refuse(o.name(name), "%s", why)
		}
		env[name] = asString(o.name(name), o.fields[name])
	}
	if why := checkSize(env); why != "" {
		refuse(o.at, "%s", why)
	}
	return env
}

// readHealth reads how instances that speak so are probed. The probe for a page
// speaks HTTP/1.1, which an instance that is told to speak HTTP/2 need not know.
func readHealth(o object, spoken Protocol) Health {
	const low, high = 100, 60_000 // ms
	h := Health{
		Path:  o.str("path", "/status"),
		Host:  o.str("host", "tako-internal"),
		Codes: [][2]int{{200, 299}},
	}
	kind := "http"
	if spoken == ProtocolH2C {
		kind = "connect"
	}
	switch k := o.str("kind", kind); k {
	case "http":
	case "connect":
		h.Connect = true
	default:
		refuse(o.name("kind"), "got %.40q, want \"http\" or \"connect\"", k)
	}
	if !healthPath.MatchString(h.Path) || len(h.Path) > 1024 {
		refuse(o.name("path"), "got %.80q, want a path of at most 1024 printable ASCII characters that begins with a slash", h.Path)
	}
	if !healthHost.MatchString(h.Host) || len(h.Host) > 253 {
		refuse(o.name("host"), "got %.80q, want a host of letters, digits, '-', '_', '.' and ':', at most 253", h.Host)
	}
	if list := o.list("codes", "a list of statuses like 200, \"200-299\" or \"3xx\""); list != nil {
		h.Codes = readCodes(o.name("codes"), list)
	}
	interval := o.integer("interval_ms", 1000, low, high)
	// By default a probe is over before the next one is due.
	timeout := o.integer("timeout_ms", max(low, min(900, interval*9/10)), low, high)
	if timeout > interval {
		refuse(o.name("timeout_ms"), "%d is more than interval_ms, which is %d; raise that too", timeout, interval)
	}
	h.Interval, h.Timeout = time.Duration(interval)*time.Millisecond, time.Duration(timeout)*time.Millisecond
	return h
}

var (
	healthPath = regexp.MustCompile(`^/[!-~]*$`)
	healthHost = regexp.MustCompile(`^[A-Za-z0-9._:-]+$`)
	codeRange  = regexp.MustCompile(`^([1-5][0-9][0-9])-([1-5][0-9][0-9])$`)
	codeClass  = regexp.MustCompile(`^[1-5]xx$`)
	codeOne    = regexp.MustCompile(`^[1-5][0-9][0-9]$`)
	sizes      = regexp.MustCompile(`^([1-9][0-9]{0,14})([KMGT]?)$`)
	processID  = regexp.MustCompile(`^[a-z]([a-z0-9-]{0,30}[a-z0-9])?$`)
	envName    = regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_]*$`)
)

// readCodes returns statuses as pairs of first and last.
func readCodes(name string, list []any) [][2]int {
	if len(list) == 0 || len(list) > MaxCodes {
		refuse(name, "got %d entries, want 1 to %d", len(list), MaxCodes)
	}
	var codes [][2]int
	for i, v := range list {
		at := element(name, i)
		s, isString := v.(string)
		if !isString {
			n := asInteger(at, v, 100, 599)
			codes = append(codes, [2]int{n, n})
			continue
		}
		var first, last int
		switch {
		case codeRange.MatchString(s):
			first, last = atoi(s[:3]), atoi(s[4:])
		case codeClass.MatchString(s):
			first = int(s[0]-'0') * 100
			last = first + 99
		case codeOne.MatchString(s):
			first = atoi(s)
			last = first
		}
		if first == 0 || first > last {
			refuse(at, "got %.40q, want a status like 200, \"200-299\" or \"3xx\"", s)
		}
		codes = append(codes, [2]int{first, last})
	}
	return codes
}

// atoi reads digits that a pattern has matched.
func atoi(s string) int {
	n, err := strconv.Atoi(s)
	if err != nil {
		panic(err)
	}
	return n
}

func (m *Manifest) readProcesses(o object) {
	if len(o.fields) > MaxProcesses {
		refuse(o.at, "%d processes are more than %d", len(o.fields), MaxProcesses)
	}
	m.Processes = make(map[string]Process, len(o.fields))
	for _, name := range slices.Sorted(maps.Keys(o.fields)) {
		at := o.name(name)
		if !processID.MatchString(name) {
			refuse(at, "a process's name is 1 to 32 of a-z, 0-9 and '-', beginning with a letter and not ending in '-'")
		}
		if name == "web" {
			refuse(at, "web is the process that start and main describe; choose another name")
		}
		if !o.has(name) {
			mismatch(at, nil, "an object")
		}
		p := o.object(name)
		start := m.filled(m.readArgv(p, "start"))
		if start == nil {
			refuse(p.name("start"), "it is missing; give the command as a list of strings")
		}
		m.Processes[name] = Process{Start: start, Instances: p.integer("instances", 1, 0, MaxInstances)}
	}
}

func readLimits(o object) Limits {
	l := Limits{
		CPU: o.number("cpu", 0, 0.01, MaxCPU), PIDs: o.integer("pids", 0, 1, MaxPIDs),
		InFlight: o.integer("in_flight", 0, 1, MaxInFlight),
	}
	l.Memory = o.size("memory", `a size like "512M" or "2G", from 4M to 1T`, MinMemory, MaxMemory)
	l.RequestBody = o.size("request_body", `a size like "10M" or "1G", from 1K to 1T`, MinBody, MaxBody)
	return l
}

// size reads bytes with a K, M, G or T behind them; 0 if there are none.
func (o object) size(name, want string, least, most int64) int64 {
	if !o.has(name) {
		return 0
	}
	s, ok := o.fields[name].(string)
	if !ok {
		mismatch(o.name(name), o.fields[name], want)
	}
	parts := sizes.FindStringSubmatch(s)
	if parts == nil {
		refuse(o.name(name), "got %.40q, want %s", s, want)
	}
	n := int64(atoi(parts[1]))
	shift := map[string]int{"": 0, "K": 10, "M": 20, "G": 30, "T": 40}[parts[2]]
	if n > most>>shift || n<<shift < least {
		refuse(o.name(name), "got %.40q, want %s", s, want)
	}
	return n << shift
}

func readTimeouts(o object) Timeouts {
	return Timeouts{
		Ready:     o.seconds("ready", 30, 1, 600),
		Drain:     o.seconds("drain", 30, 0, 3600),
		Streams:   o.seconds("streams", 60, 0, 86_400),
		Grace:     o.seconds("grace", 10, 0, 600),
		Stability: o.seconds("stability", 3, 0, 600),
		Install:   o.seconds("install", 600, 1, 7200),
		Release:   o.seconds("release", 600, 1, 7200),
	}
}

// seconds returns a number of seconds between low and high, to the millisecond.
func (o object) seconds(key string, def, low, high float64) time.Duration {
	return time.Duration(o.number(key, def, low, high)*1000) * time.Millisecond
}

// Shell returns the argv of a shell command of a manifest.
func Shell(command string) []string { return []string{"sh", "-lc", command} }

// wrapper is the entry that the tako.sh package gives to apps that use it.
const wrapper = "node_modules/tako.sh/src/wrapper.ts"

// Argv returns the command of an instance of the release in dir. The error is a
// CodeInvalid Error: the runtime has no command of its own.
func (m *Manifest) Argv(dir string) ([]string, error) {
	if m.Start != nil {
		return m.filled(m.Start), nil
	}
	switch m.Runtime {
	case "bun":
		if isFile(dir, wrapper) {
			return []string{"bun", "run", filepath.Join(dir, wrapper), m.Main}, nil
		}
		return []string{"bun", "run", m.Main}, nil
	case "node":
		return []string{"node", m.Main}, nil
	case "deno":
		return []string{"deno", "run", "--allow-net", "--allow-env", "--allow-read", m.Main}, nil
	}
	return nil, invalid("unsupported runtime '%s' in deploy manifest %s", m.Runtime, m.file)
}

// InstallCommand returns the command, for Shell, that makes the release in dir ready
// to start, and whether there is one.
func (m *Manifest) InstallCommand(dir string) (command string, ok bool) {
	if m.Install != "" {
		return m.Install, true
	}
	if m.Runtime != "bun" || !isFile(dir, "package.json") {
		return "", false
	}
	command = "bun install --production"
	if isFile(dir, "bun.lock") || isFile(dir, "bun.lockb") {
		command += " --frozen-lockfile"
	}
	return command, true
}

// isFile reports whether dir/name is a regular file.
func isFile(dir, name string) bool {
	info, err := os.Stat(filepath.Join(dir, name))
	return err == nil && info.Mode().IsRegular()
}
