package tako

// AppState is how an app as a whole is doing.
type AppState string

// The states of an app.
const (
	AppRunning   AppState = "running"
	AppIdle      AppState = "idle"       // on demand, no instance now; a request wakes it
	AppDeploying AppState = "deploying"  // a rollout is under way
	AppStopped   AppState = "stopped"    // by command; stays so over restarts
	AppError     AppState = "error"      // it should run and does not
	AppCrashLoop AppState = "crash_loop" // it dies again and again; the next try is timed
)

// InstanceState is how one process of an app is doing.
type InstanceState string

// The states of an instance.
const (
	InstanceStarting  InstanceState = "starting"
	InstanceReady     InstanceState = "ready"     // answered its first probe
	InstanceHealthy   InstanceState = "healthy"   // takes traffic
	InstanceUnhealthy InstanceState = "unhealthy" // failed its probes, out of the balancer
	InstanceDraining  InstanceState = "draining"  // takes no new requests
	InstanceStopped   InstanceState = "stopped"
)

// Mode is whether the server takes mutating commands.
type Mode string

// The server modes.
const (
	ModeNormal    Mode = "normal"
	ModeUpgrading Mode = "upgrading"
)
