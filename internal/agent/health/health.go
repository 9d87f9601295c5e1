// Package health finds out whether an instance answers. It tries the Unix socket
// and the TCP port that the instance was told, settles on whichever answers
// first, and goes on asking there on a fixed clock. It promises that each probe
// ends within its deadline and that what an instance sends back costs at most a
// few kilobytes. It starts and stops nothing: what follows from an outcome is the
// master's to decide.
package health

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"tako/internal/tako"
	"tako/internal/wire"
)

// The limits of a probe.
const (
	// StartTimeout bounds one probe while the instance comes up, and the steady
	// probe if it names no time of its own.
	StartTimeout = 5 * time.Second
	// MaxStatusLine is how much of an answer is read in search of its first line.
	MaxStatusLine = 2048
	// SecondProbe is the time from the first good probe to the next one.
	SecondProbe = 100 * time.Millisecond
	// DefaultInterval and DefaultTimeout are of the steady probe.
	DefaultInterval = time.Second
	DefaultTimeout  = 900 * time.Millisecond

	// After the outcome is known, so much of the rest is read, for so long: an
	// application whose answer is cut off logs an error, each second.
	maxRest  = 16 << 10
	restTime = 50 * time.Millisecond
)

// A Target is an instance to watch.
type Target struct {
	Instance tako.InstanceID
	Probe    wire.Probe
	// Socket is its Unix socket, "" for none; Port its port on 127.0.0.1, 0 for
	// none.
	Socket string
	Port   uint16
	// UID is whose TCP listener counts; 0: anybody's.
	UID uint32
	// PID leads the process group, to say where it listens instead.
	PID     int
	Started time.Time
	// Via is where it answered before, "" if it never did.
	Via wire.Transport
	// ReadyWithin is when an instance that has not come up is reported so, once.
	ReadyWithin time.Duration
}

// Check says what is wrong with the parts of a target that go into a request.
func (t *Target) Check() error {
	p := &t.Probe
	switch p.Kind {
	case wire.ProbeAlive:
		return nil
	case wire.ProbeConnect:
	case wire.ProbeHTTP:
		if !strings.HasPrefix(p.Path, "/") || !graphic(p.Path) {
			return fmt.Errorf("probe path %q", p.Path)
		}
		if p.Host == "" || !graphic(p.Host) {
			return fmt.Errorf("probe host %q", p.Host)
		}
	default:
		return fmt.Errorf("probe kind %q", p.Kind)
	}
	if t.Socket == "" && t.Port == 0 {
		return fmt.Errorf("neither a socket nor a port")
	}
	return nil
}

// graphic reports whether s has no blank, control byte or byte beyond ASCII.
func graphic(s string) bool {
	for i := range len(s) {
		if s[i] <= ' ' || s[i] >= 0x7f {
			return false
		}
	}
	return true
}

// Watch probes until ctx ends. While the instance comes up it reports only the
// first good probe, and once that ReadyWithin has passed without one; from then
// on each probe. One that has a Via has come up: its streak goes on. Reports come from this one goroutine, in order.
func Watch(ctx context.Context, t Target, report func(wire.Probed)) {
	if t.Probe.Kind == wire.ProbeAlive {
		t.alive(ctx, report)
		return
	}
	via := t.Via
	if via == "" {
		var ok bool
		if via, ok = t.comeUp(ctx, report); !ok {
			return
		}
	}
	t.steady(ctx, via, report)
}

// alive reports an instance that is not asked anything: good now, and once more
// while it still runs. That it stays up is for whoever sees it exit.
func (t *Target) alive(ctx context.Context, report func(wire.Probed)) {
	report(t.outcome(true, 1, "", answer{}))
	select {
	case <-ctx.Done():
	case <-time.After(SecondProbe):
		report(t.outcome(true, 2, "", answer{}))
	}
}

// pause is how long to wait after an attempt that ended so long after the start.
func pause(since time.Duration) time.Duration {
	switch {
	case since < 200*time.Millisecond:
		return 1500 * time.Microsecond
	case since < 2*time.Second:
		return 10 * time.Millisecond
	}
	return 100 * time.Millisecond
}

// comeUp tries both ways until one is good.
func (t *Target) comeUp(ctx context.Context, report func(wire.Probed)) (wire.Transport, bool) {
	var last answer // the most telling one so far
	told := false
	wait := time.NewTimer(0)
	defer wait.Stop()
	for {
		select {
		case <-ctx.Done():
			return "", false
		case <-wait.C:
		}
		for _, via := range []wire.Transport{wire.TransportUnix, wire.TransportTCP} {
			// Short of the whole time to become ready, so that one which listens and
			// does not answer can still be told from one that never listened.
			a, tried := t.ask(ctx, via, min(StartTimeout, max(t.ReadyWithin/2, 100*time.Millisecond)))
			if ctx.Err() != nil {
				return "", false
			}
			if a.good {
				report(t.outcome(true, 1, via, answer{}))
				return via, true
			}
			if tried && a.rank >= last.rank {
				last = a
			}
		}
		since := time.Since(t.Started)
		if !told && since >= t.ReadyWithin {
			told = true
			if last.rank < accepted {
				if other := t.elsewhere(); other != "" {
					last.detail = other
				}
			}
			report(t.outcome(false, 1, "", last))
		}
		next := pause(since)
		if left := t.ReadyWithin - since; !told && left < next {
			next = max(left, 0)
		}
		wait.Reset(next)
	}
}

// steady probes where the instance answered, SecondProbe after that and then on
// a fixed clock: a slow answer delays no later probe, except that two never
// overlap.
func (t *Target) steady(ctx context.Context, via wire.Transport, report func(wire.Probed)) {
	interval := positive(t.Probe.IntervalMS, DefaultInterval)
	limit := positive(t.Probe.TimeoutMS, DefaultTimeout)
	good, streak := true, 1
	next := time.Now().Add(SecondProbe)
	wait := time.NewTimer(SecondProbe)
	defer wait.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-wait.C:
		}
		a, _ := t.ask(ctx, via, limit)
		if ctx.Err() != nil {
			return
		}
		if a.good == good {
			streak = min(streak+1, math.MaxInt32)
		} else {
			good, streak = a.good, 1
		}
		report(t.outcome(good, streak, via, a))
		now := time.Now()
		for next = next.Add(interval); next.Before(now); next = next.Add(interval) {
		}
		wait.Reset(next.Sub(now))
	}
}

func positive(ms int, otherwise time.Duration) time.Duration {
	if ms <= 0 {
		return otherwise
	}
	return time.Duration(ms) * time.Millisecond
}

func (t *Target) outcome(good bool, streak int, via wire.Transport, a answer) wire.Probed {
	p := wire.Probed{
		Instance: t.Instance, Good: good, Streak: streak, Via: via,
		AfterMS: time.Since(t.Started).Milliseconds(),
	}
	if !good {
		p.Detail, p.Accepts = a.detail, a.rank >= accepted
	}
	return p
}

// rank says how far an attempt got: the farther, the more its detail tells.
type rank int

const (
	nowhere  rank = iota // nothing was there
	stranger             // a listener, of somebody else or with a full queue
	accepted             // a connection, and no answer
	answered             // an answer that was not good
)

// answer is how one attempt went.
type answer struct {
	good   bool
	rank   rank
	detail string
}

// ask makes one attempt. tried is false if the instance was not told this way.
func (t *Target) ask(ctx context.Context, via wire.Transport, limit time.Duration) (a answer, tried bool) {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	var conn net.Conn
	var err error
	switch {
	case via == wire.TransportUnix && t.Socket != "":
		if _, err = os.Lstat(t.Socket); err == nil {
			conn, err = new(net.Dialer).DialContext(ctx, "unix", t.Socket)
		}
	case via == wire.TransportTCP && t.Port != 0:
		conn, err = Dial(ctx, t.Port, t.UID)
	default:
		return answer{}, false
	}
	if err != nil {
		if s, ok := err.(*StrangerError); ok { //nolint:errorlint // Dial returns it bare
			return answer{rank: stranger, detail: s.Error()}, true
		}
		if errors.Is(err, unix.EAGAIN) || errors.Is(err, context.DeadlineExceeded) || errors.Is(err, os.ErrDeadlineExceeded) {
			return answer{rank: stranger, detail: "it listens and takes no connections: its queue is full"}, true
		}
		return answer{detail: t.nobody()}, true
	}
	defer conn.Close()                                          // nothing was promised to it
	defer context.AfterFunc(ctx, func() { _ = conn.Close() })() // also when the instance is stopped
	if t.Probe.Kind == wire.ProbeConnect {
		return answer{good: true, rank: accepted}, true
	}
	return t.request(ctx, conn, limit), true
}

// nobody says where the instance was expected.
func (t *Target) nobody() string {
	switch {
	case t.Port == 0:
		return fmt.Sprintf("nothing listens on %s: listen on the path in TAKO_APP_SOCKET", t.Socket)
	case t.Socket == "":
		return fmt.Sprintf("nothing listens on 127.0.0.1:%d: listen on the PORT and HOST of the environment", t.Port)
	}
	return fmt.Sprintf("nothing listens on 127.0.0.1:%d or %s: listen on the PORT and HOST of the environment, or on the path in TAKO_APP_SOCKET", t.Port, t.Socket)
}

// request asks for the path and judges the status line. ctx ends after limit and
// then closes the connection: it is the only clock, so that the reason given is
// never a guess between two that ran out together.
func (t *Target) request(ctx context.Context, conn net.Conn, limit time.Duration) answer {
	p := &t.Probe
	_, err := io.WriteString(conn, "GET "+p.Path+" HTTP/1.1\r\nHost: "+p.Host+
		"\r\nUser-Agent: tako\r\nAccept: */*\r\nConnection: close\r\n\r\n")
	var status int
	if err == nil {
		status, err = readStatus(conn)
	}
	if err != nil {
		why := "the connection was closed"
		if _, bad := err.(*notHTTPError); bad { //nolint:errorlint // readStatus returns it bare
			why = err.Error()
		} else if ctx.Err() != nil {
			why = fmt.Sprintf("none within %s", limit)
		}
		return answer{rank: accepted, detail: fmt.Sprintf("GET %s got no answer: %s", p.Path, why)}
	}
	_ = conn.SetReadDeadline(time.Now().Add(restTime))        // see above
	_, _ = io.Copy(io.Discard, io.LimitReader(conn, maxRest)) // a courtesy
	if good(p, status) {
		return answer{good: true, rank: answered}
	}
	detail := fmt.Sprintf("GET %s answered %d", p.Path, status)
	if status == 404 {
		detail += `: set "health" in app.json to a path that answers 200, or {"kind":"connect"}`
	}
	return answer{rank: answered, detail: detail}
}

// good reports whether status is among the probe's codes, 200 to 299 if it has
// none.
func good(p *wire.Probe, status int) bool {
	if len(p.Codes) == 0 {
		return status >= 200 && status <= 299
	}
	for _, c := range p.Codes {
		if status >= c[0] && status <= c[1] {
			return true
		}
	}
	return false
}

// notHTTPError is an answer that does not begin with a status line.
type notHTTPError struct{ line string }

func (e *notHTTPError) Error() string { return fmt.Sprintf("%q is not HTTP/1", e.line) }

// readStatus reads the status code off the first line of an answer.
func readStatus(r io.Reader) (int, error) {
	var buf [MaxStatusLine]byte
	n := 0
	for n < len(buf) {
		m, err := r.Read(buf[n:])
		if i := strings.IndexByte(string(buf[n:n+m]), '\n'); i >= 0 {
			return parseStatus(string(buf[:n+i]))
		}
		n += m
		if err != nil {
			return 0, err
		}
	}
	return 0, &notHTTPError{line: string(buf[:40])}
}

// parseStatus reads "HTTP/1.x NNN", with or without a reason.
func parseStatus(line string) (int, error) {
	line = strings.TrimSuffix(line, "\r")
	bad := &notHTTPError{line: line[:min(len(line), 40)]}
	rest, ok := strings.CutPrefix(line, "HTTP/1.")
	if !ok || len(rest) < 5 || rest[0] < '0' || rest[0] > '9' || rest[1] != ' ' || len(rest) > 5 && rest[5] != ' ' {
		return 0, bad
	}
	code, err := strconv.ParseUint(rest[2:5], 10, 16)
	if err != nil || code < 100 {
		return 0, bad
	}
	return int(code), nil
}
