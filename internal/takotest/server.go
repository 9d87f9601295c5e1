package takotest

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// Bounds of the waits. They are generous: a test that meets one has failed.
const (
	StartWait = 60 * time.Second // from start to the first answer on the socket
	StopWait  = 30 * time.Second // from SIGTERM, or the master's death, to the last process's end
	AskWait   = 60 * time.Second // of one command
)

// Options choose how a server is started. The zero value is a server of its own
// with nothing in it.
type Options struct {
	// Flags are given after those that every test's server has, so that they win.
	Flags []string
	// Env is added to the environment of this process.
	Env []string
	// Caps are capabilities that a server of another user gets, as from systemd's
	// AmbientCapabilities=.
	Caps []uintptr
	// User is who the server runs as, by number; 0 is who the test runs as. Only
	// root can choose.
	User uint32
	// Manager: a service manager keeps descriptors for the server, as systemd does.
	Manager bool
	// Data is the data root; "" is a folder of the server's own. Close leaves
	// what it does not own.
	Data string
	// Beside makes it the second server of this one: of the same data root, ports,
	// socket, user and capabilities. What it is asked goes to a socket of its own. Both may then stop
	// while instances in their data root run on, which are the other's.
	Beside *Server
	// PortsInFile leaves the ports to the settings file, which the test writes: a
	// reload can change them then.
	PortsInFile bool
}

// Server is a tako-master with its children. Its methods may be called from any
// goroutine but those that start and end it: Start, Stop, Kill, Close.
type Server struct {
	// Dir holds everything of the server: its programs, sockets and data root.
	Dir         string
	Socket      string
	Data        string
	HTTP, HTTPS int

	options Options
	log     syncBuffer

	cmd  *exec.Cmd
	done chan struct{} // closed when cmd has ended

	link    string   // --socket, if it is not Socket
	manager *Manager // nil without
	paired  bool     // with another server of the data root
}

// New makes the folders of a server and chooses its ports; it starts nothing.
// The caller calls Close.
func New(o Options) (*Server, error) {
	programs, err := Build()
	if err != nil {
		return nil, err
	}
	ports, err := FreePorts(2)
	if err != nil {
		return nil, err
	}
	dir, err := TempDir()
	if err != nil {
		return nil, err
	}
	s := &Server{
		Dir: dir, Socket: filepath.Join(dir, "run", "tako.sock"), Data: filepath.Join(dir, "data"),
		HTTP: ports[0], HTTPS: ports[1], options: o,
	}
	// Links of its own, so that a process tells by its program whose it is.
	bin := filepath.Join(dir, "bin")
	err = os.Mkdir(bin, 0o755)
	for _, p := range Programs {
		if err == nil {
			err = os.Link(filepath.Join(programs, p), filepath.Join(bin, p))
		}
	}
	if o.Beside != nil {
		o.User, o.Caps = o.Beside.options.User, o.Beside.options.Caps
		s.options = o
	}
	if err == nil && o.User != 0 {
		err = os.Chown(dir, int(o.User), int(o.User))
	}
	if o.Data != "" {
		s.Data = o.Data
	}
	if err == nil && o.Manager {
		s.manager, err = newManager(filepath.Join(dir, "notify"))
	}
	if first := o.Beside; first != nil {
		s.Data, s.HTTP, s.HTTPS = first.Data, first.HTTP, first.HTTPS
		s.link, s.paired, first.paired = first.link, true, true
		if s.link == "" {
			s.link = first.Socket
		}
	}
	if err != nil {
		return nil, errors.Join(err, os.RemoveAll(dir))
	}
	return s, nil
}

// StartServer makes and starts a server for a test, which ends with it.
func StartServer(t testing.TB, o Options) *Server {
	t.Helper()
	s, err := New(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
		if t.Failed() {
			t.Logf("the server's log:\n%s", s.Log())
		}
	})
	if err := s.Start(); err != nil {
		t.Fatal(err)
	}
	return s
}

// SetFlags changes the flags of the next start.
func (s *Server) SetFlags(flags ...string) { s.options.Flags = flags }

// User is who the server runs as, by number; 0 is who the test runs as.
func (s *Server) User() uint32 { return s.options.User }

// Program is the path of one of tako's programs.
func (s *Server) Program(name string) string { return filepath.Join(s.Dir, "bin", name) }

// Start starts the server and returns when its management socket answers. It may
// be called again after Stop, Kill or an exit.
func (s *Server) Start() error {
	if err := s.Launch(); err != nil {
		return err
	}
	deadline := time.Now().Add(StartWait)
	for {
		_, err := s.Ask("server_info", nil)
		if err == nil {
			return nil
		}
		select {
		case <-s.done:
			return fmt.Errorf("tako-master did not start: %s\n%s", s.cmd.ProcessState, s.Log())
		case <-time.After(5 * time.Millisecond):
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("tako-master does not answer within %s: %w\n%s", StartWait, err, s.Log())
		}
	}
}

// Launch starts the server and does not wait: for servers that are to refuse.
func (s *Server) Launch() error {
	if s.running() {
		return errors.New("the server runs already")
	}
	flags := []string{"--socket", cmp.Or(s.link, s.Socket), "--data-dir", s.Data, "--listen-address", "127.0.0.1", "--no-acme", "--log-level", "debug", "--app-uids", s.appUIDs()}
	if !s.options.PortsInFile {
		flags = append(flags, "--port", strconv.Itoa(s.HTTP), "--tls-port", strconv.Itoa(s.HTTPS))
	}
	s.cmd = exec.Command(s.Program("tako-master"), append(flags, s.options.Flags...)...)
	s.cmd.Env = append(os.Environ(), s.options.Env...)
	defer s.manager.pass(s.cmd)()
	s.cmd.Stdout, s.cmd.Stderr = &s.log, &s.log
	// A group of its own: an interrupt at the terminal is for the tests.
	s.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if id := s.options.User; id != 0 {
		s.cmd.SysProcAttr.Credential = &syscall.Credential{Uid: id, Gid: id}
		s.cmd.SysProcAttr.AmbientCaps = s.options.Caps
	}
	// A process that outlives the server may hold its output open.
	s.cmd.WaitDelay = time.Second
	s.done = make(chan struct{})
	if err := s.cmd.Start(); err != nil {
		s.cmd = nil
		return err
	}
	if s.link != "" {
		s.Socket = filepath.Join(filepath.Dir(s.link), fmt.Sprintf("tako-%d.sock", s.cmd.Process.Pid))
	}
	go func(cmd *exec.Cmd, done chan struct{}) {
		cmd.Wait() // Exit and Stop read the state
		close(done)
	}(s.cmd, s.done)
	return nil
}

// appUIDs are users for this server's apps that others' apps hardly have: what
// listens on a port as an app's user is the app.
func (s *Server) appUIDs() string {
	const all, each = 10_000, 300
	first := 70_000 + s.HTTP*397%(all-each)
	return fmt.Sprintf("%d-%d", first, first+each-1)
}

func (s *Server) running() bool {
	if s.cmd == nil {
		return false
	}
	select {
	case <-s.done:
		return false
	default:
		return true
	}
}

// PID is the pid of tako-master.
func (s *Server) PID() int { return s.cmd.Process.Pid }

// Exit waits until the server has ended by itself and returns its exit status;
// -1 when a signal ended it.
func (s *Server) Exit() (int, error) {
	select {
	case <-s.done:
		return s.cmd.ProcessState.ExitCode(), nil
	case <-time.After(StartWait):
		return 0, fmt.Errorf("tako-master still runs after %s\n%s", StartWait, s.Log())
	}
}

// Log is what the server has logged so far, over all of its starts.
func (s *Server) Log() string { return s.log.String() }

// Stop asks the server to stop and waits until the last of its processes has
// ended. It is an error if that takes longer than StopWait, if the server does
// not exit with 0, or if a process is left.
func (s *Server) Stop() error {
	if !s.running() {
		return s.gone()
	}
	if err := s.cmd.Process.Signal(syscall.SIGTERM); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return err
	}
	select {
	case <-s.done:
	case <-time.After(StopWait):
		return errors.Join(fmt.Errorf("tako-master did not stop within %s", StopWait), s.Kill())
	}
	if !s.cmd.ProcessState.Success() {
		return errors.Join(fmt.Errorf("tako-master stopped with %s", s.cmd.ProcessState), s.gone())
	}
	return s.gone()
}

// Kill ends tako-master alone at once and waits until its children and the
// instances have seen that and ended too.
func (s *Server) Kill() error {
	if s.running() {
		if err := s.cmd.Process.Kill(); err != nil && !errors.Is(err, os.ErrProcessDone) {
			return err
		}
		<-s.done
	}
	return s.gone()
}

// Die ends tako-master alone at once, and waits for nobody else.
func (s *Server) Die() error {
	if s.running() {
		if err := s.cmd.Process.Kill(); err != nil && !errors.Is(err, os.ErrProcessDone) {
			return err
		}
		<-s.done
	}
	return nil
}

// Manager is the server's service manager, nil if it has none.
func (s *Server) Manager() *Manager { return s.manager }

// Gone waits until no process of the server is left.
func (s *Server) Gone() error { return s.gone() }

// Close stops the server if it runs, ends whatever it left, and removes its
// folder. It may come twice.
func (s *Server) Close() error {
	if s.manager != nil && !s.running() {
		s.manager.Empty()
	}
	err := s.Stop()
	if s.manager != nil {
		s.manager.close()
	}
	for _, p := range s.Processes() {
		err = errors.Join(err, p.kill())
	}
	return errors.Join(err, os.RemoveAll(s.Dir))
}

// gone waits until no process of the server is left.
func (s *Server) gone() error {
	deadline := time.Now().Add(StopWait)
	for {
		left := s.Processes()
		if s.paired {
			left = slices.DeleteFunc(left, func(p Process) bool { return !strings.HasPrefix(p.program(), filepath.Join(s.Dir, "bin")+"/") })
		}
		if len(left) == 0 {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("still there %s after the server's end: %v", StopWait, left)
		}
		time.Sleep(2 * time.Millisecond) // a stranger's end sends no event
	}
}

// Reply is the answer to a command: its data, or the error's sentence.
type Reply struct {
	Status  string          `json:"status"`
	Message string          `json:"message"`
	Data    json.RawMessage `json:"data"`
}

// Ask sends one command with these further fields on a connection of its own and
// returns the reply's data. An error reply is an error with its text alone.
func (s *Server) Ask(command string, fields map[string]any) (json.RawMessage, error) {
	request := map[string]any{"command": command}
	maps.Copy(request, fields)
	line, err := json.Marshal(request)
	if err != nil {
		return nil, err
	}
	r, err := s.Say(append(line, '\n'))
	if err != nil {
		return nil, err
	}
	if r.Status != "ok" {
		return nil, errors.New(r.Message)
	}
	return r.Data, nil
}

// Say sends bytes to the management socket as they are and returns the last line
// of the answer: lines of progress come before it.
func (s *Server) Say(line []byte) (Reply, error) {
	conn, err := net.DialTimeout("unix", s.Socket, time.Second)
	if err != nil {
		return Reply{}, err
	}
	defer conn.Close()
	if err := conn.SetDeadline(time.Now().Add(AskWait)); err != nil {
		return Reply{}, err
	}
	if _, err := conn.Write(line); err != nil {
		return Reply{}, err
	}
	in := bufio.NewReader(conn)
	for {
		text, err := in.ReadBytes('\n')
		if err != nil {
			return Reply{}, fmt.Errorf("read the reply: %w", err)
		}
		var r Reply
		if err := json.Unmarshal(text, &r); err != nil {
			return Reply{}, fmt.Errorf("the reply %q: %w", text, err)
		}
		if r.Status == "ok" || r.Status == "error" {
			return r, nil
		}
	}
}

// Ctl runs takoctl against the server and returns what it printed and its exit
// status.
func (s *Server) Ctl(ctx context.Context, args ...string) (stdout, stderr string, code int, err error) {
	var out, errs bytes.Buffer
	cmd := exec.CommandContext(ctx, s.Program("takoctl"), append([]string{"--socket", s.Socket}, args...)...)
	cmd.Stdout, cmd.Stderr = &out, &errs
	cmd.WaitDelay = time.Second
	err = cmd.Run()
	if _, exited := errors.AsType[*exec.ExitError](err); exited {
		err = nil
	}
	if err != nil {
		return out.String(), errs.String(), -1, err
	}
	return out.String(), errs.String(), cmd.ProcessState.ExitCode(), nil
}

// Process is a process that belongs to a server.
type Process struct {
	PID     int
	Command string
	dir     string
}

func (p Process) String() string { return fmt.Sprintf("%d %s", p.PID, p.Command) }

// Processes are the server's processes that run now, zombies not counted: those
// whose program, working folder or command line lies in its folder.
func (s *Server) Processes() []Process { return processes(s.Dir) }

func processes(dir string) []Process {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil
	}
	var found []Process
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil || pid <= 1 || pid == os.Getpid() {
			continue
		}
		if command, ok := belongs(pid, dir); ok {
			found = append(found, Process{PID: pid, Command: command, dir: dir})
		}
	}
	return found
}

func belongs(pid int, dir string) (command string, ok bool) {
	proc := filepath.Join("/proc", strconv.Itoa(pid))
	line, err := os.ReadFile(filepath.Join(proc, "cmdline"))
	if err != nil || len(line) == 0 { // gone, a zombie, or the kernel's
		return "", false
	}
	command = strings.TrimSpace(strings.ReplaceAll(string(line), "\x00", " "))
	for _, link := range []string{"exe", "cwd"} {
		// An error: it is another user's; its command line has to do.
		if to, err := os.Readlink(filepath.Join(proc, link)); err == nil && strings.HasPrefix(to, dir+"/") {
			return command, true
		}
	}
	return command, strings.Contains(command, dir+"/")
}

// program is the path of its program, "" if that cannot be known.
func (p Process) program() string {
	path, _ := os.Readlink(fmt.Sprintf("/proc/%d/exe", p.PID))
	return path
}

func (p Process) kill() error { return p.signal(os.Kill) }

// signal goes through a handle of the kernel's, if it is still the process that
// was found.
func (p Process) signal(sig os.Signal) error {
	if p.PID <= 1 {
		return fmt.Errorf("%d is nobody's to signal", p.PID)
	}
	handle, err := os.FindProcess(p.PID)
	if err != nil {
		return err
	}
	defer handle.Release()
	if _, still := belongs(p.PID, p.dir); !still {
		return nil
	}
	if err := handle.Signal(sig); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return fmt.Errorf("send %v to %v: %w", sig, p, err)
	}
	return nil
}

// KillProcess ends one process of the server at once, as a crash would.
func (s *Server) KillProcess(pid int) error { return s.Signal(pid, os.Kill) }

// Signal sends a signal to one process of the server.
func (s *Server) Signal(pid int, sig os.Signal) error {
	for _, p := range s.Processes() {
		if p.PID == pid {
			return p.signal(sig)
		}
	}
	return fmt.Errorf("%d is not a process of this server", pid)
}

// syncBuffer is a buffer that may be read while a process writes to it.
type syncBuffer struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (b *syncBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.Write(p)
}

func (b *syncBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.String()
}
