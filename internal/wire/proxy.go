package wire

import (
	"tako/internal/tako"
)

// The channel between tako-master and tako-proxy.
//
//	master                                              proxy
//	  | ---- Hello ----------------------------------->   |  Starting
//	  | <--- Hello ------------------------------------   |  Configuring
//	  | ---- Listeners (n FDs), Signer, Dialer -------->  |  the first once
//	  | ---- Profiling (1 FD), if asked for ----------->  |
//	  | ---- ProxySettings, TicketKeys ---------------->  |  may come again while it serves
//	  | ---- Certificate*, App* ----------------------->  |
//	  | ---- Serve ------------------------------------>  |
//	  | <--- Ready ------------------------------------   |  Serving: it accepts
//	  |                                                   |
//	  | ---- Certificate, CertificateGone ------------->  |  any time from here
//	  | ---- App (revision r), AppGone (revision r) --->  |
//	  | <--- Applied (revision r) ---------------------   |  every request from now on sees r
//	  | <--- Quiet ------------------------------------   |  a draining upstream has nothing in flight
//	  | <--- Wake, Unreachable, Traffic ---------------   |
//	  | ---- Ping --> <--- Pong -----------------------   |
//	  |                                                   |
//	  | ---- Drain ------------------------------------>  |  Draining: it accepts no more
//	  | ---- whatever it may be told while it serves -->  |  its last requests need it
//	  | <--- Applied, Quiet, Unreachable, Traffic ------  |
//	  | <--- Drained ----------------------------------   |  and exits with ExitDone
//
// The proxy names things the master knows. It never sends a path, a command, an
// address or a user.

// Names of listeners.
const (
	ListenerHTTP  = "http"
	ListenerHTTPS = "https"
)

// Listeners hands over the listening sockets: one descriptor per name, in the
// order of Names. A name may come more than once (IPv4 and IPv6). The proxy owns
// its copies; the master keeps the sockets open for ever.
type Listeners struct {
	Names []string `json:"names"`
}

// Signer hands over the proxy's end of the signing socket, one descriptor.
type Signer struct{}

// Profiling hands over a listening Unix socket, one descriptor, on which the proxy
// is to answer with profiles of itself. It is sent only if the operator wants it.
type Profiling struct{}

// Dialer hands over the proxy's end of the dialling socket, one descriptor, to
// the agent.
type Dialer struct{}

// ProxySettings are the server-wide settings of the data path.
type ProxySettings struct {
	// HTTPSPort is the port that redirects name, 1 to 65535.
	HTTPSPort uint16 `json:"https_port"`
	// TrustedProxies are CIDR prefixes whose X-Forwarded-*, Forwarded and
	// X-Request-ID are believed. Empty: nobody's.
	TrustedProxies []string `json:"trusted_proxies"`
	// ProxyProtocol: connections begin with a header of the PROXY protocol that says
	// who the client is, and come from TrustedProxies; all others are closed.
	ProxyProtocol bool `json:"proxy_protocol"`
	// Engine is what speaks HTTP with clients. The proxy chooses it when it begins
	// to serve; a change comes with the next generation.
	Engine HTTPEngine `json:"engine"`
}

// HTTPEngine names an implementation of HTTP.
type HTTPEngine string

// The engines.
const (
	EngineTako    HTTPEngine = "tako"
	EngineNetHTTP HTTPEngine = "net/http"
)

// TicketKeys are the keys of TLS session tickets, the first one in use, 32 bytes
// each, so that sessions resume in whichever proxy they come back to.
type TicketKeys struct {
	Keys [][]byte `json:"keys"`
}

// MaxTicketKeys bounds TicketKeys.
const MaxTicketKeys = 4

// Certificate is one public chain that the proxy may present. The key stays in
// the master: handshakes are signed over the signing socket.
type Certificate struct {
	// ID names the certificate for CertificateGone and is its file name.
	ID string `json:"id"`
	// Names are exact names or one-level wildcards (*.example.com), as A-labels.
	Names []string `json:"names"`
	// Chain is DER, leaf first.
	Chain [][]byte `json:"chain"`
	// Fallback: for handshakes whose name no other certificate has.
	Fallback bool `json:"fallback"`
}

// CertificateGone takes a certificate away.
type CertificateGone struct {
	ID string `json:"id"`
}

// App is all that the proxy has to know of one app. It replaces what was known
// of that app before, whole, and touches nothing of another.
type App struct {
	App tako.AppID `json:"app"`
	// Revision rises with each App or AppGone for this app. Applied carries it.
	Revision uint64 `json:"revision"`
	// Routes are normalised patterns of package route.
	Routes []string `json:"routes"`
	// Release is what a request is answered from, for X-Tako headers and logs.
	Release tako.ReleaseID `json:"release"`
	// PlainHTTP: answer plain HTTP without a redirect to HTTPS.
	PlainHTTP bool `json:"plain_http"`
	// OnDemand: with no instance, a request sends Wake and waits in a queue.
	OnDemand bool `json:"on_demand"`
	// Queue bounds the requests that wait for an instance.
	Queue Queue `json:"queue"`
	// MaxInFlight bounds the requests at once on each instance, streams apart; more
	// wait. 0: 256.
	MaxInFlight int `json:"max_in_flight"`
	// MaxBody bounds the body of a request, in bytes; more is answered 413. 0: none.
	MaxBody int64 `json:"max_body"`
	// Trouble is set when requests are to be refused at once, and why.
	Trouble Trouble `json:"trouble"`
	// Instances are the upstreams, draining ones included.
	Instances []Upstream `json:"instances"`
}

// Queue bounds the requests that wait for an instance of an on-demand app.
type Queue struct {
	Waiters int `json:"waiters"` // more are answered 503; 100 by default
	WaitMS  int `json:"wait_ms"` // then 504; 30,000 by default
}

// Trouble is a reason to answer without an instance.
type Trouble struct {
	// Kind is empty when there is none.
	Kind TroubleKind `json:"kind"`
	// RetryAfterS is for Retry-After, in seconds; 0 for none.
	RetryAfterS int `json:"retry_after_s"`
}

// TroubleKind chooses status and body.
type TroubleKind string

// The kinds of trouble. With StartFailed set, waiters of an on-demand app are
// answered too, at once.
const (
	TroubleNone        TroubleKind = ""
	TroubleStartFailed TroubleKind = "start_failed" // 502 App failed to start
	TroubleStopped     TroubleKind = "stopped"      // 503 No healthy backend
	TroubleCrashLoop   TroubleKind = "crash_loop"   // 503 No healthy backend, Retry-After
)

// Upstream is an instance as the proxy sees it.
type Upstream struct {
	Instance tako.InstanceID `json:"instance"`
	// Socket is the path of its Unix socket. Empty: TCP, by the dialling socket.
	Socket string `json:"socket"`
	// Protocol is what it speaks; empty: HTTP/1.1.
	Protocol Protocol `json:"protocol"`
	// Draining: no new request goes there; Quiet is sent once nothing is in flight.
	Draining bool `json:"draining"`
	// CutStreams: the time for its streams is over; they are ended, properly. Only
	// of one that drains.
	CutStreams bool `json:"cut_streams"`
	// Fallback: failed its probes, used only when no other instance is left.
	Fallback bool `json:"fallback"`
}

// Protocol names what an instance speaks.
type Protocol string

// The protocols.
const (
	ProtocolHTTP1 Protocol = "http1"
	ProtocolH2C   Protocol = "h2c" // HTTP/2 without TLS
)

// AppGone forgets an app: its routes answer 404.
type AppGone struct {
	App      tako.AppID `json:"app"`
	Revision uint64     `json:"revision"`
}

// Challenge gives the answer to an ACME HTTP-01 challenge, or takes it back with
// an empty KeyAuth.
type Challenge struct {
	Token   string `json:"token"`
	KeyAuth string `json:"key_auth"`
}

// Serve ends the configuration: the proxy begins to accept and sends Ready.
type Serve struct{}

// Drain asks the proxy to stop accepting, finish what it has and exit.
type Drain struct {
	RequestsMS int `json:"requests_ms"` // for requests in flight
	StreamsMS  int `json:"streams_ms"`  // for WebSockets and other streams
}

// Applied says that every request from now on sees this revision of the app.
type Applied struct {
	App      tako.AppID `json:"app"`
	Revision uint64     `json:"revision"`
}

// Wake asks for an instance of a sleeping on-demand app. It is sent once, and
// again only after another revision of the app arrived.
type Wake struct {
	App tako.AppID `json:"app"`
}

// Quiet says that a draining upstream has no request in flight here; Streams
// counts those that still run and have their own limit. It comes once more when
// the last of these has ended.
type Quiet struct {
	Instance tako.InstanceID `json:"instance"`
	Revision uint64          `json:"revision"`
	Streams  int             `json:"streams"`
}

// Unreachable says that connecting to an upstream was refused.
type Unreachable struct {
	Instance tako.InstanceID `json:"instance"`
}

// Traffic is sent about once a second for apps with any change: what is needed
// for status and for the idle clock.
type Traffic struct {
	Apps []AppTraffic `json:"apps"`
}

// AppTraffic is one app's part of Traffic.
type AppTraffic struct {
	App tako.AppID `json:"app"`
	// Waiting counts requests in the queue.
	Waiting int `json:"waiting"`
	// IdleMS is the time since the last byte of the last request, 0 while one is
	// in flight.
	IdleMS    int64             `json:"idle_ms"`
	Instances []InstanceTraffic `json:"instances"`
}

// InstanceTraffic is one upstream's part of AppTraffic.
type InstanceTraffic struct {
	Instance tako.InstanceID `json:"instance"`
	Requests uint64          `json:"requests"` // finished here since this proxy started
	InFlight int             `json:"in_flight"`
	Streams  int             `json:"streams"`
}

// Drained is the last message of a proxy: nothing is left, or the deadline
// passed and Cut requests and streams were ended.
type Drained struct {
	Cut int `json:"cut"`
}
