package wire

import (
	"tako/internal/tako"
)

// The channel between tako-master and tako-agent.
//
//	master                                              agent
//	  | ---- Hello ----------------------------------->   |  Starting
//	  | <--- Hello ------------------------------------   |  Configuring
//	  | ---- AgentSettings ---------------------------->  |
//	  | <--- Ready ------------------------------------   |  Serving
//	  |                                                   |
//	  | ---- DialerSocket (1 FD) ---------------------->  |  one per proxy generation
//	  | ---- Tree   --> <--- TreeMade or Fault --------   |  calls: the answer has the id
//	  | ---- Unpack (1 FD) --> <--- Unpacked or Fault -   |
//	  | ---- Run    --> <--- Ran or Fault -------------   |
//	  |                                                   |
//	  | ---- Adopt (3 FDs) ---------------------------->  |  once per instance that outlived the agent before,
//	  |                                                   |  ahead of the first DialerSocket; then Probed and Exited
//	  | ---- Begin ------------------------------------>  |  with those that it was to hold until the one before had gone
//	  |                                                   |
//	  | ---- Start ------------------------------------>  |  exactly one of the next two
//	  | <--- Started (3 FDs) ---------------------------  |  pidfd, stdout, stderr
//	  | <--- StartFailed -------------------------------  |  it never ran
//	  | <--- Probed* -----------------------------------  |
//	  | ---- Stop ------------------------------------->  |
//	  | <--- Exited ------------------------------------  |  last word on an instance that started
//	  |                                                   |
//	  | ---- Ping --> <--- Pong -----------------------   |
//
// When the channel closes the agent stops every instance, SIGTERM first, and
// exits. When the agent dies the instances run on: the master has their
// descriptors, and has the next agent adopt them.

// AgentSettings are what the agent has to know once.
type AgentSettings struct {
	// InstanceGroup is the group (tako-net) that proxy and agent share and that
	// instance sockets belong to; 0 when everything runs as one user.
	InstanceGroup uint32 `json:"instance_group"`
	// AppUIDs is the range of users that instances may run as, both ends
	// included; 0 and 0 when everything runs as one user.
	MinAppUID uint32 `json:"min_app_uid"`
	MaxAppUID uint32 `json:"max_app_uid"`
	// PortMin and PortMax bound the TCP ports of instances.
	PortMin uint16 `json:"port_min"`
	PortMax uint16 `json:"port_max"`
	// Owner and OwnerGroup own the data root: helpers that unpack run as them.
	// 0 and 0 as root, or when everything runs as one user.
	Owner      uint32 `json:"owner"`
	OwnerGroup uint32 `json:"owner_group"`
	// Groups are the folders in which the agent may make control groups.
	Groups Groups `json:"groups"`
}

// Groups are folders of control group hierarchies that the agent's user owns;
// "" for one that is not to be had.
type Groups struct {
	// V2 is of version 2, and V2Controllers those of "memory", "cpu" and "pids"
	// that a group below it has; none in a hybrid hierarchy. The agent itself
	// stands in a group below V2.
	V2            string   `json:"v2"`
	V2Controllers []string `json:"v2_controllers"`
	// Memory, CPU and PIDs are of version 1.
	Memory string `json:"memory"`
	CPU    string `json:"cpu"`
	PIDs   string `json:"pids"`
}

// Limits bound one instance; 0 leaves something unbounded.
type Limits struct {
	Memory   int64 `json:"memory"`    // bytes
	CPUMilli int   `json:"cpu_milli"` // thousandths of a core
	PIDs     int   `json:"pids"`      // processes and threads
}

// DialerSocket hands over the agent's end of a proxy's dialling socket.
type DialerSocket struct{}

// User is whom an instance or a step of an app runs as. The zero value is the
// agent's own user.
type User struct {
	UID uint32 `json:"uid"`
	GID uint32 `json:"gid"`
}

// Command is a program to run for an app.
type Command struct {
	Dir  string   `json:"dir"`
	Argv []string `json:"argv"` // Argv[0] is looked up in PATH of Env
	Env  []string `json:"env"`  // "NAME=value", the whole environment
	User User     `json:"user"`
}

// Start starts an instance and watches it from then on.
type Start struct {
	Instance tako.InstanceID `json:"instance"`
	Release  tako.ReleaseID  `json:"release"`
	// Rollout is the master's: with Release it tells which rollout it is of.
	Rollout int64   `json:"rollout"`
	Command Command `json:"command"`
	// Port is the TCP port it was told to listen on, Socket the path of its Unix
	// socket ("" when the path would be too long). The first that answers wins.
	Port   uint16 `json:"port"`
	Socket string `json:"socket"`
	Probe  Probe  `json:"probe"`
	// LogDir is where its output goes, in files of LogBytes, LogFiles of them.
	LogDir   string `json:"log_dir"`
	LogBytes int64  `json:"log_bytes"`
	LogFiles int    `json:"log_files"`
	// ReadyMS bounds the time until the first good probe. The agent reports and
	// goes on probing after it; the master decides.
	ReadyMS int `json:"ready_ms"`
	// Limits are kept as far as the machine lets the agent: Started says how far.
	Limits Limits `json:"limits"`
}

// Adopt hands over an instance that another agent has started, with what that
// one's Started brought: pidfd, stdout, stderr. It is watched, read and probed
// from then on, and ends with Exited like any other. It may have ended already.
type Adopt struct {
	Start Start `json:"start"`
	PID   int   `json:"pid"`
	// Via is where it answered; "" if it never did.
	Via Transport `json:"via"`
	// AfterMS is the time since its process was started.
	AfterMS int64 `json:"after_ms"`
	// Hold: it is not to be touched before Begin, unless the channel ends.
	Hold bool `json:"hold"`
}

// Probe is how an instance shows that it is well.
type Probe struct {
	// Kind is ProbeHTTP or ProbeConnect.
	Kind ProbeKind `json:"kind"`
	// Path, Host and Codes are for ProbeHTTP. Codes are the good statuses, each a
	// pair of first and last.
	Path  string   `json:"path"`
	Host  string   `json:"host"`
	Codes [][2]int `json:"codes"`
	// IntervalMS and TimeoutMS are of the steady probe.
	IntervalMS int `json:"interval_ms"`
	TimeoutMS  int `json:"timeout_ms"`
}

// ProbeKind is how a probe asks.
type ProbeKind string

// The kinds of probe.
const (
	ProbeHTTP    ProbeKind = "http"
	ProbeConnect ProbeKind = "connect"
	// ProbeAlive asks nothing: to run is to be well. It is for processes without
	// routes, which have neither Port nor Socket, and reports two good outcomes.
	ProbeAlive ProbeKind = "alive"
)

// Transport says where an instance answered.
type Transport string

// The transports.
const (
	TransportUnix Transport = "unix"
	TransportTCP  Transport = "tcp"
)

// Stop ends an instance: SIGTERM to its process group, after GraceMS SIGKILL.
type Stop struct {
	Instance tako.InstanceID `json:"instance"`
	GraceMS  int             `json:"grace_ms"`
}

// Release asks the agent to leave its instances alone and exit with ExitDone: the
// next one adopts them. What is just being started is started first. A line of
// output that was read and not yet ended is lost.
type Release struct{}

// Run runs a command of an app to its end: an install step, a release command.
// Its output goes to the app's log as stream "build" and its tail comes back.
type Run struct {
	App       tako.AppID `json:"app"`
	Name      string     `json:"name"` // "install" or "release", for the log
	Command   Command    `json:"command"`
	TimeoutMS int        `json:"timeout_ms"`
	LogDir    string     `json:"log_dir"`
	LogBytes  int64      `json:"log_bytes"`
	LogFiles  int        `json:"log_files"`
}

// Ran answers Run when the command could be started.
type Ran struct {
	Exit     Exit `json:"exit"`
	TimedOut bool `json:"timed_out"`
	// Stdout and Stderr are all of the output, or its first and last bytes with
	// RanCut between them.
	Stdout string `json:"stdout"`
	Stderr string `json:"stderr"`
}

// Bounds of each output in Ran: at most MaxRanOutput bytes, of which MaxRanHead
// come before RanCut.
const (
	MaxRanOutput = 4096
	MaxRanHead   = 2048
	RanCut       = "\n[...]\n"
)

// Tree makes or mends the folders of an app, with owners and modes of the
// design's table, as far as the agent's powers go.
type Tree struct {
	App tako.AppID `json:"app"`
	// AppDir is apps/<app> in the data root; it exists.
	AppDir string `json:"app_dir"`
	// RunDir is instances/<app> in the run directory.
	RunDir string `json:"run_dir"`
	// Release is a folder below releases to give to the app's group; "" for none.
	// While Installing the app's user may write into it.
	Release    string `json:"release"`
	Installing bool   `json:"installing"`
	User       User   `json:"user"`
	// Beside: another server owns the data root; only RunDir is made. The rest is
	// there, and what looks left behind may be that one's work.
	Beside bool `json:"beside,omitempty"`
}

// TreeMade answers Tree.
type TreeMade struct{}

// Unpack unpacks an archive (tar in zstd) that arrives on the one descriptor,
// into the folder Dir/Name, which must not exist. The work is done by a process
// without powers; on any fault nothing is left behind.
type Unpack struct {
	App  tako.AppID `json:"app"`
	Dir  string     `json:"dir"`
	Name string     `json:"name"`
	User User       `json:"user"` // GID is the group of the files
	// Limits of what may come out.
	MaxBytes int64 `json:"max_bytes"`
	MaxFiles int   `json:"max_files"`
	// TimeoutMS bounds the whole.
	TimeoutMS int `json:"timeout_ms"`
}

// Unpacked answers Unpack.
type Unpacked struct {
	Files int   `json:"files"`
	Bytes int64 `json:"bytes"`
}

// Started says that an instance runs. Its descriptors are duplicates: the
// process's pidfd, and the reading ends of its output, kept by the master so
// that an agent's death leaves a reader.
type Started struct {
	Instance tako.InstanceID `json:"instance"`
	PID      int             `json:"pid"`
	// Limits says by what its limits are kept, such as "cgroup v2", and which are
	// not; "" when it has none.
	Limits string `json:"limits"`
}

// StartFailed says that an instance could not be started at all.
type StartFailed struct {
	Instance tako.InstanceID `json:"instance"`
	Reason   string          `json:"reason"`
}

// Probed is the outcome of a probe. While an instance comes up only the first
// good one is reported; then each one.
type Probed struct {
	Instance tako.InstanceID `json:"instance"`
	Good     bool            `json:"good"`
	// Streak counts the outcomes of this kind in a row, this one included.
	Streak int `json:"streak"`
	// Via is where the instance listens; set once a probe was good.
	Via Transport `json:"via"`
	// AfterMS is the time since the process was started.
	AfterMS int64 `json:"after_ms"`
	// Detail says why it was not good.
	Detail string `json:"detail"`
	// Accepts: it was not good, yet a connection was accepted.
	Accepts bool `json:"accepts"`
}

// Exit is how a process ended.
type Exit struct {
	Code      int    `json:"code"`       // -1 when a signal ended it
	Signal    string `json:"signal"`     // "SIGKILL", or ""
	OutOfMem  bool   `json:"out_of_mem"` // the kernel or a limit killed it for memory
	Forgotten bool   `json:"forgotten"`  // the status is not to be had (not our child)
}

// Exited says that an instance has ended and its group is gone.
type Exited struct {
	Instance tako.InstanceID `json:"instance"`
	Exit     Exit            `json:"exit"`
	// LastLines are the newest lines of its output, oldest first, at most
	// MaxLastLines of MaxLastLine bytes.
	LastLines []string `json:"last_lines"`
}

// Bounds of Exited.LastLines.
const (
	MaxLastLines = 50
	MaxLastLine  = 1000
)
