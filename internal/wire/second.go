package wire

// Two masters with one data root: the owner of its lock, and a second server that
// serves beside it and takes its place when it has gone. The second connects to a
// socket in the data root. The channel ends with either of them, or when either
// reloads: then the second tries for the lock, and if the owner lives it connects
// anew.
//
//	owner                                                second
//	  | -- Hello --------------------------------------->  |
//	  | <- Hello ----------------------------------------  |
//	  | <- Follow (a call) ------------------------------  |
//	  | -- Shared, with the listeners; or Fault --------->  |
//	  | -- Tickets, at once and when they change -------->  |
//	  | -- Changed -------------------------------------->  |  a command was carried out
//	  | <- Settled --------------------------------------  |  here too

// Follow asks to serve beside the owner.
type Follow struct {
	// Socket is the second's own management socket, tako-PID.sock; Link is the
	// stable path that is to lead to it when the owner has gone.
	Socket string `json:"socket"`
	Link   string `json:"link"`
}

// Shared answers Follow: it hands over the listening sockets, one descriptor per
// name, in the order of Names.
type Shared struct {
	Names []string `json:"names"`
	// Activated: they are systemd's, and the settings do not name them.
	Activated bool `json:"activated"`
	// FirstInstance is the number of the second's first instance of each app: logs
	// then tell whose it is.
	FirstInstance uint32 `json:"first_instance"`
}

// Changed says that a command was carried out: the database has it. Settled
// answers with the same Revision once the second has done what it can about it.
type (
	Changed struct {
		Revision uint64 `json:"revision"`
	}
	Settled struct {
		Revision uint64 `json:"revision"`
	}
)

// Tickets are the owner's keys of TLS session tickets, as in TicketKeys: a session
// resumes with whichever server it comes back to.
type Tickets struct {
	Keys [][]byte `json:"keys"`
}
