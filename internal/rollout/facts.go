package rollout

import (
	"time"

	"tako/internal/tako"
)

// A Fact is something that happened or is wished.
type Fact interface{ fact() }

// The facts.
type (
	// Restore sets what was committed before this server started.
	Restore struct {
		Plan    Plan
		Stopped bool
	}
	// Roll asks for a rollout. It ends with a Done "roll". None may be under way.
	Roll struct{ Plan Plan }
	// Committed answers Commit; Err is empty when it succeeded.
	Committed struct {
		Build Build
		Err   string
	}
	// Scale changes the number of instances of the committed plan.
	Scale struct{ Instances int }
	// Stop asks for all instances to end and none to start. It ends with a Done
	// "stop" and with Done "roll" first, if a rollout was under way.
	Stop struct{}

	// StartFailed says that no process came of a StartInstance.
	StartFailed struct {
		N      uint32
		Reason string
	}
	// Probed is the outcome of a probe; Streak counts this kind of outcome.
	Probed struct {
		N       uint32
		Good    bool
		Streak  int
		Accepts bool
		Via     string
		Detail  string
	}
	// Exited says that a process and its group are gone.
	Exited struct {
		N      uint32
		Reason string
		Lines  []string
	}
	// Unreachable says that a connect was refused.
	Unreachable struct{ N uint32 }
	// Quiet says that no proxy has a request in flight to a draining instance.
	Quiet struct {
		N       uint32
		Streams int
	}
	// Traffic says how long an app has been without a request, over all proxies.
	Traffic struct {
		Busy    bool // a request is in flight or waits
		IdleFor time.Duration
	}
	// Wake says that a request waits for an on-demand app.
	Wake struct{}
	// Tick says that time has passed.
	Tick struct{}
)

func (Restore) fact()     {}
func (Roll) fact()        {}
func (Committed) fact()   {}
func (Scale) fact()       {}
func (Stop) fact()        {}
func (StartFailed) fact() {}
func (Probed) fact()      {}
func (Exited) fact()      {}
func (Unreachable) fact() {}
func (Quiet) fact()       {}
func (Traffic) fact()     {}
func (Wake) fact()        {}
func (Tick) fact()        {}

// An Action is something to carry out.
type Action interface{ action() }

// The actions.
type (
	// StartInstance asks for a process of a build. Probed facts follow, and at
	// its end Exited; or StartFailed alone.
	StartInstance struct {
		N       uint32
		Build   Build
		Process string
	}
	// StopInstance asks for SIGTERM, and SIGKILL after Grace. Exited follows.
	StopInstance struct {
		N     uint32
		Grace time.Duration
	}
	// Publish asks for View to be told to the proxies.
	Publish struct{}
	// Commit asks for a build to be made the durable one. Committed follows.
	Commit struct{ Build Build }
	// Done ends a Roll or a Stop. Failure is nil when it succeeded.
	Done struct {
		What     string // "roll" or "stop"
		Failure  *Failure
		New, Old int // instances, of a Roll
	}
)

func (StartInstance) action() {}
func (StopInstance) action()  {}
func (Publish) action()       {}
func (Commit) action()        {}
func (Done) action()          {}

// Failure is why a rollout was given up, and by which instance; N is 0 when it
// was none's.
type Failure struct {
	N      uint32
	Reason string
	Lines  []string
}

// Trouble is why requests cannot be answered by an instance.
type Trouble string

// The kinds of trouble.
const (
	TroubleNone        Trouble = ""
	TroubleStopped     Trouble = "stopped"
	TroubleDown        Trouble = "down"         // it died and waits to be started again
	TroubleStartFailed Trouble = "start_failed" // on demand, and the last start failed
)

// View is an app as others see it.
type View struct {
	State     tako.AppState
	Build     Build // the committed one
	Instances int   // wanted; 0 is on demand
	Rolling   bool
	All       []Instance
	Why       string // of the last failure, until health is back
	Crashes   int
	RetryIn   time.Duration // to the next start
	// Trouble and RetryAfter (whole seconds) are for requests.
	Trouble    Trouble
	RetryAfter time.Duration
	// MayWait: a request that finds no instance may wait for one.
	MayWait bool
}

// Instance is one instance in a View.
type Instance struct {
	N         uint32
	Process   string
	Build     Build
	State     tako.InstanceState
	Via       string
	Detail    string
	StartedAt time.Time
	// Serves: it is in the balancer; Out: only for want of a better one; Cut: its
	// streams are to be ended now.
	Serves, Out, Draining, Accepts, Cut bool
}
