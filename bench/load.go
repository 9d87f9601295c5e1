package main

import (
	"bufio"
	"crypto/tls"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"math"
	"math/rand/v2"
	"net"
	"os"
	"runtime"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// A result is what a load says of itself at its end. Latencies are in
// milliseconds, from the request's write to the last byte of the answer.
type result struct {
	N          int64   `json:"n"` // answers that were right
	Errors     int64   `json:"errors"`
	FirstError string  `json:"first_error,omitempty"`
	Seconds    float64 `json:"seconds"`
	P50        float64 `json:"p50_ms"`
	P99        float64 `json:"p99_ms"`
}

// Bounds of a load, so that it ends whatever the proxy does.
const (
	openTime   = 60 * time.Second // to open its connections
	answerTime = 15 * time.Second // for one answer
	idleTime   = 5 * time.Minute  // for what only holds connections
	opening    = 32               // connections that are opened at once
)

// A load is a client. Its process says "ready" when its connections are open,
// waits for a line, loads the proxy for a time and prints a result: what is
// measured in between is the load alone.
type load struct {
	addr, host, path string
	hosts, from      int // ask for one of so many hosts, from this one on; 0: for host
	conns, streams   int
	secure, resume   bool
	duration         time.Duration

	end  time.Time
	want int // bytes of a body
	tls  *tls.Config

	n, errors atomic.Int64
	firstErr  atomic.Pointer[string]
	latency   histogram
}

func runLoad(args []string, in io.Reader, out io.Writer) error {
	var l load
	flags := flag.NewFlagSet("load", flag.ContinueOnError)
	kind := flags.String("kind", "h1", "h1, h2, handshake or idle")
	flags.StringVar(&l.addr, "addr", "", "the proxy")
	flags.StringVar(&l.host, "host", "", "the app's host")
	flags.StringVar(&l.path, "path", "/", "/ or /big")
	flags.IntVar(&l.hosts, "hosts", 0, "ask for one of so many hosts")
	flags.IntVar(&l.from, "from", 0, "number of the first of them")
	flags.IntVar(&l.conns, "conns", 64, "connections at once")
	flags.IntVar(&l.streams, "streams", 8, "streams of each, for h2")
	flags.BoolVar(&l.secure, "tls", false, "over TLS")
	flags.BoolVar(&l.resume, "resume", false, "resume TLS sessions")
	flags.DurationVar(&l.duration, "for", time.Second, "how long")
	if err := flags.Parse(args); err != nil {
		return err
	}
	if host, _, err := net.SplitHostPort(l.addr); err != nil || !net.ParseIP(host).IsLoopback() {
		return fmt.Errorf("%q is not a loopback address and port", l.addr)
	}
	l.want = smallBody
	if l.path == "/big" {
		l.want = largeBody
	}
	// One group and one version for all proxies: what is compared is their work.
	l.tls = &tls.Config{InsecureSkipVerify: true, ServerName: l.host, CurvePreferences: []tls.CurveID{tls.X25519}, MinVersion: tls.VersionTLS13}

	var run func() error
	var idle []net.Conn
	var err error
	switch *kind {
	case "h1":
		run, err = l.h1()
	case "h2":
		run, err = l.h2()
	case "handshake":
		run = l.handshakes
	case "idle":
		idle, err = l.hold()
	default:
		err = fmt.Errorf("there is no load %q", *kind)
	}
	if err != nil {
		return err
	}
	fmt.Fprintln(out, "ready")
	_, err = bufio.NewReader(in).ReadString('\n')
	runtime.KeepAlive(idle)
	if err != nil || run == nil {
		return err
	}
	began := time.Now()
	l.end = began.Add(l.duration)
	if err := run(); err != nil {
		return err
	}
	r := result{
		N: l.n.Load(), Errors: l.errors.Load(), Seconds: min(time.Since(began), l.duration).Seconds(),
		P50: l.latency.quantile(.5), P99: l.latency.quantile(.99),
	}
	if text := l.firstErr.Load(); text != nil {
		r.FirstError = *text
	}
	return json.NewEncoder(out).Encode(r)
}

func (l *load) fail(err error) {
	l.errors.Add(1)
	text := err.Error()
	l.firstErr.CompareAndSwap(nil, &text)
}

// good counts an answer that ended before the load did.
func (l *load) good(asked time.Time) (more bool) {
	now := time.Now()
	if now.After(l.end) {
		return false
	}
	l.n.Add(1)
	l.latency.add(now.Sub(asked))
	return true
}

func request(host, path string) []byte {
	return []byte("GET " + path + " HTTP/1.1\r\nHost: " + host + "\r\nUser-Agent: bench\r\nAccept: */*\r\n\r\n")
}

// hostName is one of many hosts. They are below a public suffix, so that tako
// makes no certificates for them.
func hostName(n int) string { return fmt.Sprintf("app%05d.example.com", n) }

// requests are what to send: the same again and again, or, for many hosts, some
// thousands of them in a random order that is the same in every run.
func (l *load) requests() [][]byte {
	if l.hosts == 0 {
		return [][]byte{request(l.host, l.path)}
	}
	random := rand.New(rand.NewPCG(1, 2))
	all := make([][]byte, 8192)
	for i := range all {
		all[i] = request(hostName(l.from+random.IntN(l.hosts)), l.path)
	}
	return all
}

// h1 opens connections and returns a closed loop over them: one request at a
// time on each.
func (l *load) h1() (func() error, error) {
	if l.secure {
		conns, err := l.open()
		return func() error {
			var wg sync.WaitGroup
			for _, c := range conns {
				wg.Go(func() { l.ask(c) })
			}
			wg.Wait()
			return nil
		}, err
	}
	return l.poll()
}

// dial opens one connection, and with TLS makes the handshake.
func (l *load) dial(conf *tls.Config) (net.Conn, error) {
	c, err := net.DialTimeout("tcp", l.addr, answerTime)
	if err != nil || !l.secure {
		return c, err
	}
	if err := c.SetDeadline(time.Now().Add(answerTime)); err != nil {
		return nil, err
	}
	secure := tls.Client(c, conf)
	if err := secure.Handshake(); err != nil {
		c.Close()
		return nil, err
	}
	return secure, nil
}

// open opens all connections and asks once on each.
func (l *load) open() ([]net.Conn, error) {
	conns := make([]net.Conn, l.conns)
	errs := make([]error, opening)
	var next atomic.Int64
	var wg sync.WaitGroup
	req := request(l.host, "/")
	began := time.Now()
	for w := range opening {
		wg.Go(func() {
			var a answer
			buf := make([]byte, 4096)
			for errs[w] == nil {
				i := int(next.Add(1)) - 1
				if i >= len(conns) {
					return
				}
				if time.Since(began) > openTime {
					errs[w] = fmt.Errorf("only %d connections within %s", i, openTime)
					return
				}
				conns[i], errs[w] = l.dial(l.tls)
				if errs[w] == nil {
					errs[w] = exchange(conns[i], req, smallBody, &a, buf)
				}
			}
		})
	}
	wg.Wait()
	return conns, errors.Join(errs...)
}

// exchange sends one request and reads its whole answer.
func exchange(c net.Conn, req []byte, want int, a *answer, buf []byte) error {
	if err := c.SetDeadline(time.Now().Add(answerTime)); err != nil {
		return err
	}
	if _, err := c.Write(req); err != nil {
		return err
	}
	a.reset(want)
	for {
		n, err := c.Read(buf)
		if n > 0 {
			done, wrong := a.feed(buf[:n])
			if wrong != nil || done {
				return wrong
			}
		}
		if err != nil {
			return err
		}
	}
}

// ask is the loop of one TLS connection.
func (l *load) ask(c net.Conn) {
	defer c.Close()
	req := request(l.host, l.path)
	buf := make([]byte, max(2048, min(l.want, 64<<10)))
	var a answer
	for {
		asked := time.Now()
		if err := exchange(c, req, l.want, &a, buf); err != nil {
			l.fail(err)
			return
		}
		if !l.good(asked) {
			return
		}
	}
}

// hold opens connections and leaves them idle.
func (l *load) hold() ([]net.Conn, error) {
	conns, err := l.open()
	for _, c := range conns {
		if err == nil {
			err = c.SetDeadline(time.Now().Add(idleTime))
		}
	}
	return conns, err
}

// handshakes opens a connection for each request and resets it afterwards, so
// that no port is left waiting.
func (l *load) handshakes() error {
	var wg sync.WaitGroup
	req := request(l.host, l.path)
	for range l.conns {
		wg.Go(func() {
			conf := l.tls.Clone()
			if l.resume {
				conf.ClientSessionCache = tls.NewLRUClientSessionCache(1)
			}
			var a answer
			buf := make([]byte, 4096)
			for first := true; ; first = false {
				asked := time.Now()
				if asked.After(l.end) {
					return
				}
				resumed, err := l.once(conf, req, &a, buf)
				if err == nil && l.resume && !resumed && !first {
					err = errors.New("the session was not resumed")
				}
				if err != nil {
					l.fail(err)
					time.Sleep(time.Millisecond)
				} else if !first {
					l.good(asked)
				}
			}
		})
	}
	wg.Wait()
	return nil
}

func (l *load) once(conf *tls.Config, req []byte, a *answer, buf []byte) (resumed bool, err error) {
	c, err := l.dial(conf)
	if err != nil {
		return false, err
	}
	secure := c.(*tls.Conn)
	defer func() {
		under := secure.NetConn().(*net.TCPConn)
		_ = under.SetLinger(0)
		under.Close()
	}()
	return secure.ConnectionState().DidResume, exchange(c, req, l.want, a, buf)
}

// pollConn is one plain connection of poll.
type pollConn struct {
	answer
	asked time.Time
}

// poll is h1 without TLS: one thread and one epoll set, as cheap as we can.
func (l *load) poll() (func() error, error) {
	epoll, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return nil, err
	}
	host, text, err := net.SplitHostPort(l.addr)
	if err != nil {
		return nil, err
	}
	port, err := strconv.Atoi(text)
	if err != nil {
		return nil, err
	}
	at := &unix.SockaddrInet4{Port: port, Addr: [4]byte(net.ParseIP(host).To4())}
	conns := make(map[int]*pollConn, l.conns)
	for range l.conns {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err == nil {
			err = errors.Join(unix.Connect(fd, at), unix.SetNonblock(fd, true), unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1),
				unix.EpollCtl(epoll, unix.EPOLL_CTL_ADD, fd, &unix.EpollEvent{Events: unix.EPOLLIN, Fd: int32(fd)})) //nolint:gosec // a descriptor
		}
		if err != nil {
			return nil, fmt.Errorf("connect: %w", err)
		}
		conns[fd] = new(pollConn)
	}
	requests := l.requests()
	return func() error { return l.polling(epoll, conns, requests) }, nil
}

func (l *load) polling(epoll int, conns map[int]*pollConn, requests [][]byte) error {
	next := 0
	ask := func(fd int, c *pollConn) error {
		next = (next + 1) % len(requests)
		c.reset(l.want)
		c.asked = time.Now()
		n, err := unix.Write(fd, requests[next])
		if err == nil && n < len(requests[next]) {
			err = io.ErrShortWrite
		}
		return err
	}
	for fd, c := range conns {
		if err := ask(fd, c); err != nil {
			return err
		}
	}
	buf := make([]byte, 128<<10)
	events := make([]unix.EpollEvent, 512)
	for len(conns) > 0 {
		n, err := unix.EpollWait(epoll, events, int(answerTime/time.Millisecond))
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err == nil && n == 0 {
			err = fmt.Errorf("%d answers did not come within %s", len(conns), answerTime)
		}
		if err != nil {
			return err
		}
		for _, e := range events[:n] {
			fd := int(e.Fd)
			c := conns[fd]
			n, err := unix.Read(fd, buf)
			if errors.Is(err, unix.EAGAIN) {
				continue
			}
			if err == nil && n == 0 {
				err = io.ErrUnexpectedEOF
			}
			done := false
			if err == nil {
				done, err = c.feed(buf[:n])
			}
			if done && err == nil {
				if l.good(c.asked) {
					err = ask(fd, c)
				} else {
					err = errOver
				}
			}
			if err != nil {
				if !errors.Is(err, errOver) {
					l.fail(err)
				}
				delete(conns, fd)
				unix.Close(fd)
			}
		}
	}
	return nil
}

var errOver = errors.New("the load is over")

// histogram counts durations in steps of half a percent from 1 µs on.
type histogram struct {
	count [4096]atomic.Int64
}

const step = 0.005

func (h *histogram) add(d time.Duration) {
	us := max(1, float64(d)/float64(time.Microsecond))
	h.count[min(len(h.count)-1, int(math.Log(us)/step))].Add(1)
}

// quantile is in milliseconds; 0 without a count.
func (h *histogram) quantile(q float64) float64 {
	var all, seen int64
	for i := range h.count {
		all += h.count[i].Load()
	}
	for i := range h.count {
		if seen += h.count[i].Load(); seen > int64(q*float64(all)) {
			return math.Exp(float64(i)*step) / 1000
		}
	}
	return 0
}

// limitFiles raises the limit of open files as far as it goes.
func limitFiles() uint64 {
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		return 1024
	}
	limit.Cur = limit.Max
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		fmt.Fprintln(os.Stderr, "limit of open files:", err)
	}
	return limit.Max
}
