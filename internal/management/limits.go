package management

import "time"

// The limits of the management socket. Limits carries the ones that a test or a
// setting may narrow.
const (
	// MaxLine is the longest request in bytes, its newline included. What is
	// longer is thrown away as it arrives.
	MaxLine = 1 << 20
	// MaxDepth is how deep a request's JSON may nest.
	MaxDepth = 128
	// MaxConnections is how many clients are served at once. The next one gets one
	// error line.
	MaxConnections = 128
	// IdleTimeout is how long a connection may wait between requests.
	IdleTimeout = 5 * time.Minute
	// LineTimeout is how long a request may take from its first byte to its newline.
	LineTimeout = 30 * time.Second
	// WriteTimeout is how long one reply line may wait for a client that does not
	// read.
	WriteTimeout = 30 * time.Second
	// DrainTimeout is how long Serve waits for running commands when it ends.
	DrainTimeout = 2 * time.Minute
	// UploadIdleTimeout is how long an upload may bring nothing.
	UploadIdleTimeout = time.Minute
	// MaxUploadBytes is the longest archive, compressed.
	MaxUploadBytes = 4 << 30
	// MaxChunk is the longest chunk of an upload.
	MaxChunk = 1 << 20
	// MaxLogLines is how many old lines logs gives.
	MaxLogLines = 10_000
	// DefaultLogLines is how many it gives when it is not told.
	DefaultLogLines = 100
	// MaxOwner is the longest name of an upgrade lock's owner in bytes.
	MaxOwner = 256
	// ProgressQueue is how many progress lines wait for a slow reader; more are
	// dropped.
	ProgressQueue = 64
	// MaxProgressText is the longest progress text in bytes; the rest is cut.
	MaxProgressText = 4096
	// MaxReply is the longest line that a Client reads.
	MaxReply = 64 << 20
)

// closeGrace is how long a command whose context was ended at DrainTimeout has
// for its last word.
const closeGrace = 2 * time.Second

// maxQuoted bounds what an error text repeats of a request, in bytes.
const maxQuoted = 64

// Limits are the limits of one server. A zero field stands for the constant of
// the same name.
type Limits struct {
	MaxConnections    int
	IdleTimeout       time.Duration
	LineTimeout       time.Duration
	WriteTimeout      time.Duration
	DrainTimeout      time.Duration
	UploadIdleTimeout time.Duration
	MaxUploadBytes    int64
}

func (l Limits) orDefaults() Limits {
	or(&l.MaxConnections, MaxConnections)
	or(&l.IdleTimeout, IdleTimeout)
	or(&l.LineTimeout, LineTimeout)
	or(&l.WriteTimeout, WriteTimeout)
	or(&l.DrainTimeout, DrainTimeout)
	or(&l.UploadIdleTimeout, UploadIdleTimeout)
	or(&l.MaxUploadBytes, MaxUploadBytes)
	return l
}

func or[T int | int64 | time.Duration](v *T, def T) {
	if *v <= 0 {
		*v = def
	}
}

// named is how server_info shows the limits.
func (l Limits) named() map[string]uint64 {
	secs := func(d time.Duration) uint64 { return uint64(max(d, 0) / time.Second) } // not negative
	return map[string]uint64{
		"management_line_bytes":               MaxLine,
		"management_connections":              uint64(max(l.MaxConnections, 0)), // not negative
		"management_idle_timeout_secs":        secs(l.IdleTimeout),
		"management_line_timeout_secs":        secs(l.LineTimeout),
		"management_write_timeout_secs":       secs(l.WriteTimeout),
		"management_drain_timeout_secs":       secs(l.DrainTimeout),
		"management_upload_idle_timeout_secs": secs(l.UploadIdleTimeout),
		"management_upload_bytes":             uint64(max(l.MaxUploadBytes, 0)), // not negative
		"management_log_lines":                MaxLogLines,
	}
}
