package wire

import "reflect"

// State is how far one direction of a channel has come. Each direction has its
// own: only a side's own messages move it, so the two can never disagree.
type State uint8

// The states.
const (
	Starting    State = iota // nothing was said yet
	Configuring              // greeted
	Serving                  // set up
	Draining                 // told, or about, to leave
	Finished                 // said its last word
)

func (s State) String() string {
	switch s {
	case Starting:
		return "starting"
	case Configuring:
		return "configuring"
	case Serving:
		return "serving"
	case Draining:
		return "draining"
	case Finished:
		return "finished"
	}
	return "unknown"
}

// A Rule permits one kind of message from one side of one channel.
type Rule struct {
	Kind Kind
	// In lists the states in which it may be sent.
	In []State
	// Once: at most one time on a channel.
	Once bool
	// Files is how many descriptors it brings; FilesOf overrides it for a message
	// that says itself how many.
	Files   int
	FilesOf func(msg any) int
	// Reply: it answers a call and has that call's id.
	Reply bool
	// Next is the state after it; the zero value means no change.
	Next State
	// New returns a pointer to an empty message.
	New func() any

	body reflect.Type // of what New returns
}

// A Link is a channel's kind: who speaks with whom.
type Link string

// The links. The first of the two is the side that the master's end is.
const (
	LinkProxy   Link = "master-proxy"
	LinkAgent   Link = "master-agent"
	LinkSigning Link = "proxy-signer"
	LinkDialing Link = "proxy-dialer"
	LinkSecond  Link = "owner-second"
)

var (
	begin  = []State{Starting}
	set    = []State{Configuring}
	live   = []State{Serving}
	toEnd  = []State{Serving, Draining}
	always = []State{Configuring, Serving, Draining}
)

func of[T any]() func() any { return func() any { return new(T) } }

// permits is the whole of what may be said: link, side, kinds.
var permits = typed(map[Link]map[Role][]Rule{
	LinkProxy: {
		Master: {
			{Kind: KindHello, In: begin, Next: Configuring, New: of[Hello]()},
			{Kind: KindListeners, In: set, Once: true, New: of[Listeners](), FilesOf: func(m any) int {
				return len(m.(*Listeners).Names)
			}},
			{Kind: KindSigner, In: always, Files: 1, New: of[Signer]()},
			{Kind: KindDialer, In: always, Files: 1, New: of[Dialer]()},
			{Kind: KindProxySettings, In: always, New: of[ProxySettings]()},
			{Kind: KindTicketKeys, In: always, New: of[TicketKeys]()},
			{Kind: KindCertificate, In: always, New: of[Certificate]()},
			{Kind: KindCertificateGone, In: always, New: of[CertificateGone]()},
			{Kind: KindApp, In: always, New: of[App]()},
			{Kind: KindAppGone, In: always, New: of[AppGone]()},
			{Kind: KindChallenge, In: always, New: of[Challenge]()},
			{Kind: KindProfiling, In: set, Once: true, Files: 1, New: of[Profiling]()},
			{Kind: KindServe, In: set, Once: true, Next: Serving, New: of[Serve]()},
			{Kind: KindPing, In: always, New: of[Ping]()},
			{Kind: KindDrain, In: live, Once: true, Next: Draining, New: of[Drain]()},
			{Kind: KindResume, In: always, New: of[Resume]()},
		},
		Proxy: {
			{Kind: KindHello, In: begin, Next: Configuring, New: of[Hello]()},
			{Kind: KindReady, In: set, Once: true, Next: Serving, New: of[Ready]()},
			{Kind: KindPong, In: always, Reply: true, New: of[Pong]()},
			{Kind: KindApplied, In: always, New: of[Applied]()},
			{Kind: KindQuiet, In: toEnd, New: of[Quiet]()},
			{Kind: KindWake, In: live, New: of[Wake]()},
			{Kind: KindUnreachable, In: live, New: of[Unreachable]()},
			{Kind: KindTraffic, In: live, New: of[Traffic]()},
			{Kind: KindDrained, In: live, Once: true, Next: Finished, New: of[Drained]()},
			{Kind: KindResumed, In: always, Reply: true, New: of[Resumed]()},
			{Kind: KindHolds, In: live, New: of[Holds]()},
		},
	},
	LinkAgent: {
		Master: {
			{Kind: KindHello, In: begin, Next: Configuring, New: of[Hello]()},
			{Kind: KindAgentSettings, In: set, Once: true, Next: Serving, New: of[AgentSettings]()},
			{Kind: KindDialerSocket, In: live, Files: 1, New: of[DialerSocket]()},
			{Kind: KindTree, In: live, New: of[Tree]()},
			{Kind: KindUnpack, In: live, Files: 1, New: of[Unpack]()},
			{Kind: KindRun, In: live, New: of[Run]()},
			{Kind: KindStart, In: live, New: of[Start]()},
			{Kind: KindAdopt, In: live, Files: 3, New: of[Adopt]()},
			{Kind: KindStop, In: live, New: of[Stop]()},
			{Kind: KindBegin, In: live, New: of[Begin]()},
			{Kind: KindRelease, In: live, Once: true, Next: Draining, New: of[Release]()},
			{Kind: KindResume, In: always, New: of[Resume]()},
			{Kind: KindPing, In: always, New: of[Ping]()},
		},
		Agent: {
			{Kind: KindHello, In: begin, Next: Configuring, New: of[Hello]()},
			{Kind: KindReady, In: set, Once: true, Next: Serving, New: of[Ready]()},
			{Kind: KindPong, In: []State{Configuring, Serving}, Reply: true, New: of[Pong]()},
			{Kind: KindFault, In: live, Reply: true, New: of[Fault]()},
			{Kind: KindTreeMade, In: live, Reply: true, New: of[TreeMade]()},
			{Kind: KindUnpacked, In: live, Reply: true, New: of[Unpacked]()},
			{Kind: KindRan, In: live, Reply: true, New: of[Ran]()},
			{Kind: KindStarted, In: live, Files: 3, New: of[Started]()},
			{Kind: KindStartFailed, In: live, New: of[StartFailed]()},
			{Kind: KindProbed, In: live, New: of[Probed]()},
			{Kind: KindExited, In: live, New: of[Exited]()},
			{Kind: KindResumed, In: []State{Configuring, Serving}, Reply: true, New: of[Resumed]()},
			{Kind: KindPresent, In: live, New: of[Present](), FilesOf: func(m any) int {
				if m.(*Present).Held {
					return 3
				}
				return 0
			}},
		},
	},
	LinkSigning: {
		Proxy:  {{Kind: KindSign, In: begin, New: of[Sign]()}},
		Master: {{Kind: KindSigned, In: begin, Reply: true, New: of[Signed]()}, {Kind: KindFault, In: begin, Reply: true, New: of[Fault]()}},
	},
	LinkDialing: {
		Proxy: {{Kind: KindDial, In: begin, New: of[Dial]()}},
		Agent: {{Kind: KindDialed, In: begin, Reply: true, Files: 1, New: of[Dialed]()}, {Kind: KindFault, In: begin, Reply: true, New: of[Fault]()}},
	},
	LinkSecond: {
		Master: {
			{Kind: KindHello, In: begin, Next: Configuring, New: of[Hello]()},
			{Kind: KindFault, In: set, Once: true, Reply: true, Next: Finished, New: of[Fault]()},
			{Kind: KindShared, In: set, Once: true, Reply: true, Next: Serving, New: of[Shared](), FilesOf: func(m any) int {
				return len(m.(*Shared).Names)
			}},
			{Kind: KindTickets, In: live, New: of[Tickets]()},
			{Kind: KindChanged, In: live, New: of[Changed]()},
		},
		Second: {
			{Kind: KindHello, In: begin, Next: Configuring, New: of[Hello]()},
			{Kind: KindFollow, In: set, Once: true, Next: Serving, New: of[Follow]()},
			{Kind: KindSettled, In: live, New: of[Settled]()},
		},
	},
})

// typed notes the type of each message, so that Send need not make one to know.
func typed(links map[Link]map[Role][]Rule) map[Link]map[Role][]Rule {
	for _, sides := range links {
		for _, rules := range sides {
			for i := range rules {
				rules[i].body = reflect.TypeOf(rules[i].New())
			}
		}
	}
	return links
}
