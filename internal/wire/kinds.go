package wire

// Kind is the number of a message. 1–99 are for every channel, 100–199 the
// proxy's, 200–299 the agent's, 300–399 the signing and dialling sockets, 400–499 of
// two masters with one data root.
type Kind uint16

// The kinds. A number is never used for something else.
const (
	KindHello Kind = 1
	KindReady Kind = 2
	KindPing  Kind = 3
	KindPong  Kind = 4
	KindFault Kind = 5

	KindResume  Kind = 6
	KindResumed Kind = 7

	KindListeners       Kind = 100
	KindSigner          Kind = 101
	KindDialer          Kind = 102
	KindProxySettings   Kind = 103
	KindTicketKeys      Kind = 104
	KindCertificate     Kind = 105
	KindCertificateGone Kind = 106
	KindApp             Kind = 107
	KindAppGone         Kind = 108
	KindServe           Kind = 109
	KindDrain           Kind = 110
	KindChallenge       Kind = 111
	KindProfiling       Kind = 112
	KindApplied         Kind = 120
	KindWake            Kind = 121
	KindQuiet           Kind = 122
	KindUnreachable     Kind = 123
	KindTraffic         Kind = 124
	KindDrained         Kind = 125
	KindHolds           Kind = 126

	KindAgentSettings Kind = 200
	KindDialerSocket  Kind = 201
	KindStart         Kind = 202
	KindStop          Kind = 203
	KindRun           Kind = 204
	KindTree          Kind = 205
	KindUnpack        Kind = 206
	KindRelease       Kind = 208
	KindAdopt         Kind = 207
	KindBegin         Kind = 209
	KindStarted       Kind = 220
	KindStartFailed   Kind = 221
	KindProbed        Kind = 222
	KindExited        Kind = 223
	KindRan           Kind = 224
	KindTreeMade      Kind = 225
	KindUnpacked      Kind = 226
	KindPresent       Kind = 227

	KindSign   Kind = 300
	KindSigned Kind = 301
	KindDial   Kind = 302
	KindDialed Kind = 303

	KindFollow  Kind = 400
	KindShared  Kind = 401
	KindChanged Kind = 402
	KindSettled Kind = 403
	KindTickets Kind = 404
)
