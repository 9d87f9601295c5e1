package wire

import "tako/internal/ipc"

// What a child finds when it starts. It gets nothing else: no secret, path or
// setting stands in its flags or environment.
const (
	// ChannelFD is the descriptor of the child's end of its channel.
	ChannelFD = 3
	// Standard input is /dev/null; standard output and error are one pipe that
	// the master reads JSON log lines from.
)

// Exit statuses, the same for all programs of tako.
const (
	ExitDone   = 0 // asked to stop, and stopped
	ExitFailed = 1 // something went wrong; the log says what
	ExitUsage  = 2 // bad flags or configuration: starting again does not help
	ExitPeer   = 3 // the peer went away or broke the rules
)

// ProtocolVersion is the version of the messages between master and children,
// carried in both greetings. Programs of other versions refuse each other.
const ProtocolVersion = ipc.Version

// Role names a side of a channel.
type Role string

// The roles.
const (
	Master Role = "tako-master"
	Proxy  Role = "tako-proxy"
	Agent  Role = "tako-agent"
	Second Role = "tako-second" // a tako-master beside the owner of its data root
)

// Hello is the first message in either direction. The master sends its own
// first; a child answers with its own or leaves.
type Hello struct {
	Protocol   int    `json:"protocol"`
	Version    string `json:"version"`    // of the build, for people
	Generation uint64 `json:"generation"` // which start of this role this is, from 1
	PID        int    `json:"pid"`
}

// Ready says that the child is set up and serves.
type Ready struct{}

// Ping and Pong are the heartbeat: a Ping is answered by a Pong with the same id.
type (
	Ping struct{}
	Pong struct{}
)

// Fault answers a call that did not work, as a tako.Error. Its record is flagged
// ipc.Reply and ipc.Failed.
type Fault struct {
	Code    string `json:"code"`
	Message string `json:"message"`
}
