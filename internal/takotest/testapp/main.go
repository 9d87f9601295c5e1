// Testapp is the app that tests deploy. It answers on /status and, as its flags
// and requests ask, misbehaves in the ways that apps do.
package main

import (
	"bufio"
	"cmp"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"time"
)

// began is when this process got to its own code.
var began = time.Now()

func main() {
	var (
		exit       = flag.Int("exit", -1, "say so and leave at once with this status")
		flood      = flag.Int("flood", 0, "bytes to print before listening")
		slow       = flag.Duration("slow", 0, "time to pass before listening")
		on         = flag.String("listen", "any", "any (the socket, else the port), socket, tcp, both, wrong (another port) or never")
		status     = flag.Int("status", http.StatusOK, "what /status answers")
		lifetime   = flag.Duration("lifetime", 0, "leave with status 9 after this long")
		chatter    = flag.Duration("chatter", 0, "print a line each time this has passed")
		think      = flag.Duration("think", 0, "time that each answer takes, /status too")
		silent     = flag.Bool("silent", false, "listen, accept and never answer")
		h2c        = flag.Bool("h2c", false, "speak HTTP/2 without TLS, and nothing else")
		relay      = flag.String("relay", "", "pass every connection on to this TCP address, byte for byte, and answer nothing")
		ignoreTerm = flag.Bool("ignore-term", false, "go on after SIGTERM")
	)
	flag.Parse()
	fmt.Printf("testapp %s starts\n", os.Getenv("TAKO_VERSION"))
	if *exit >= 0 {
		fmt.Fprintln(os.Stderr, "leaving at once: the reason is on this line")
		os.Exit(*exit)
	}
	if *flood > 0 {
		line := strings.Repeat("x", 79) + "\n"
		out := bufio.NewWriter(os.Stdout)
		for n := *flood; n > 0; n -= len(line) {
			out.WriteString(line[:min(n, len(line))])
		}
		out.Flush()
	}
	if *chatter > 0 {
		go func() {
			for range time.Tick(*chatter) {
				fmt.Println("and so on")
			}
		}()
	}
	time.Sleep(*slow)
	listeners, err := listen(*on)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}

	app := &app{status: *status, think: *think, ownTime: time.Since(began), listenedAt: time.Now()}
	app.hung.Store(*silent)
	server := &http.Server{Handler: app.routes(), ReadHeaderTimeout: 10 * time.Second, Protocols: new(http.Protocols)}
	server.Protocols.SetHTTP1(!*h2c)
	server.Protocols.SetUnencryptedHTTP2(*h2c)
	for _, l := range listeners {
		fmt.Printf("listening on %s\n", l.Addr())
		if *relay != "" {
			go passOn(l, *relay)
			continue
		}
		go server.Serve(l)
	}
	if *lifetime > 0 {
		time.AfterFunc(*lifetime, func() { os.Exit(9) })
	}
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, syscall.SIGTERM)
	for range signals {
		if !*ignoreTerm {
			fmt.Println("asked to stop")
			server.Close()
			return
		}
		fmt.Println("asked to stop, staying")
	}
}

// passOn gives each connection of l to address, in both directions until both
// have ended. A reset on one side is one on the other, where TCP is spoken.
func passOn(l net.Listener, address string) {
	for {
		from, err := l.Accept()
		if err != nil {
			return
		}
		go func() {
			defer from.Close()
			to, err := net.Dial("tcp", address)
			if err != nil {
				return
			}
			defer to.Close()
			done := make(chan struct{}, 2)
			pass := func(to, from net.Conn) {
				_, err := io.Copy(to, from)
				if tcp, ok := to.(*net.TCPConn); ok && errors.Is(err, syscall.ECONNRESET) {
					tcp.SetLinger(0)
					tcp.Close()
				}
				if half, ok := to.(interface{ CloseWrite() error }); ok {
					half.CloseWrite()
				}
				done <- struct{}{}
			}
			go pass(to, from)
			go pass(from, to)
			<-done
			<-done
		}()
	}
}

func listen(on string) ([]net.Listener, error) {
	socket := os.Getenv("TAKO_APP_SOCKET")
	port, err := strconv.Atoi(cmp.Or(os.Getenv("PORT"), "3000"))
	if err != nil {
		return nil, err
	}
	if on == "any" {
		on = "tcp"
		if socket != "" {
			on = "socket"
		}
	}
	var listeners []net.Listener
	add := func(network, address string) {
		if err == nil {
			var l net.Listener
			if l, err = net.Listen(network, address); err == nil {
				listeners = append(listeners, l)
			}
		}
	}
	tcp := func(port int) { add("tcp", net.JoinHostPort("127.0.0.1", strconv.Itoa(port))) }
	switch on {
	case "socket":
		add("unix", socket)
	case "tcp":
		tcp(port)
	case "both":
		add("unix", socket)
		tcp(port)
	case "wrong":
		tcp(0)
	case "never":
	default:
		return nil, fmt.Errorf("cannot listen on %q", on)
	}
	return listeners, err
}

type app struct {
	status     int
	think      time.Duration
	ownTime    time.Duration // from the start of main to listening
	listenedAt time.Time
	hung       atomic.Bool
}

func (a *app) routes() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("/", a.about)
	mux.HandleFunc("/status", func(w http.ResponseWriter, r *http.Request) { w.WriteHeader(a.status) })
	mux.HandleFunc("/crash", func(http.ResponseWriter, *http.Request) {
		fmt.Println("crashing")
		os.Exit(7)
	})
	mux.HandleFunc("/hang", func(http.ResponseWriter, *http.Request) { a.hung.Store(true) })
	mux.HandleFunc("/env", func(w http.ResponseWriter, r *http.Request) { json.NewEncoder(w).Encode(os.Environ()) })
	mux.HandleFunc("/print", func(w http.ResponseWriter, r *http.Request) { fmt.Println(r.FormValue("line")) })
	mux.HandleFunc("/flood", flood)
	mux.HandleFunc("/remove", remove)
	mux.HandleFunc("/slow", slow)
	mux.HandleFunc("/bytes", size)
	mux.HandleFunc("/eat", eat)
	mux.HandleFunc("/echo", echo)
	mux.HandleFunc("/count", count)
	mux.HandleFunc("/stream", stream)
	mux.HandleFunc("/upgrade", upgrade)
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		time.Sleep(a.think)
		if mux.ServeHTTP(w, r); a.hung.Load() {
			<-make(chan struct{}) // it hangs: nothing is answered to its end any more
		}
	})
}

// about answers with what the app knows of itself and of the request.
func (a *app) about(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Content-Type", "application/json")
	json.NewEncoder(w).Encode(map[string]any{
		"instance": os.Getenv("TAKO_INSTANCE"),
		"version":  os.Getenv("TAKO_VERSION"),
		"pid":      os.Getpid(),
		"uid":      os.Getuid(),
		"method":   r.Method,
		"host":     r.Host,
		"uri":      r.RequestURI,
		"protocol": r.Proto,
		"header":   r.Header,

		"own_time_us": a.ownTime.Microseconds(),
		"listened_at": a.listenedAt,
	})
}

// flood prints ?n= lines of ?size= bytes, each with its number and "flood" in
// front, and answers when all is printed.
func flood(w http.ResponseWriter, r *http.Request) {
	n, _ := strconv.Atoi(r.FormValue("n"))
	size, _ := strconv.Atoi(r.FormValue("size"))
	fill := strings.Repeat("y", max(size, 0))
	out := bufio.NewWriter(os.Stdout)
	for i := range n {
		fmt.Fprintf(out, "flood %d %s\n", i, fill)
	}
	out.Flush()
}

// remove removes what is in the working folder, which is the release's.
func remove(w http.ResponseWriter, _ *http.Request) {
	entries, err := os.ReadDir(".")
	for _, e := range entries {
		err = cmp.Or(err, os.RemoveAll(e.Name()))
	}
	fmt.Fprintln(w, err)
}

// slow answers after ?ms= milliseconds.
func slow(w http.ResponseWriter, r *http.Request) {
	ms, _ := strconv.Atoi(r.FormValue("ms"))
	select {
	case <-time.After(time.Duration(ms) * time.Millisecond):
		fmt.Fprintln(w, "done")
	case <-r.Context().Done():
	}
}

// size answers with ?n= bytes.
func size(w http.ResponseWriter, r *http.Request) {
	n, _ := strconv.ParseInt(r.FormValue("n"), 10, 64)
	io.CopyN(w, zeros{}, n)
}

// eat takes ?n= bytes of memory and keeps them.
func eat(w http.ResponseWriter, r *http.Request) {
	n, _ := strconv.Atoi(r.FormValue("n"))
	eaten = append(eaten, make([]byte, n)...)
	for i := 0; i < len(eaten); i += 4096 {
		eaten[i] = 1
	}
	fmt.Fprintln(w, len(eaten))
}

var eaten []byte

type zeros struct{}

func (zeros) Read(p []byte) (int, error) {
	clear(p)
	return len(p), nil
}

// echo sends the body back as it comes.
func echo(w http.ResponseWriter, r *http.Request) {
	http.NewResponseController(w).EnableFullDuplex()
	w.Header().Set("Content-Type", r.Header.Get("Content-Type"))
	io.Copy(flusher{w}, r.Body)
}

// count reads the body and answers with its length.
func count(w http.ResponseWriter, r *http.Request) {
	n, err := io.Copy(io.Discard, r.Body)
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	fmt.Fprintln(w, n)
}

type flusher struct{ http.ResponseWriter }

func (f flusher) Write(p []byte) (int, error) {
	n, err := f.ResponseWriter.Write(p)
	if err == nil {
		err = http.NewResponseController(f.ResponseWriter).Flush()
	}
	return n, err
}

// stream sends ?n= server-sent events, one each ?ms= milliseconds.
func stream(w http.ResponseWriter, r *http.Request) {
	n, _ := strconv.Atoi(r.FormValue("n"))
	ms, _ := strconv.Atoi(r.FormValue("ms"))
	w.Header().Set("Content-Type", "text/event-stream")
	for i := range n {
		if i > 0 {
			select {
			case <-time.After(time.Duration(ms) * time.Millisecond):
			case <-r.Context().Done():
				return
			}
		}
		fmt.Fprintf(flusher{w}, "data: %d\n\n", i)
	}
}

// upgrade answers 101 and from then on sends every byte back.
func upgrade(w http.ResponseWriter, r *http.Request) {
	if r.Header.Get("Upgrade") == "" {
		http.Error(w, "no Upgrade header", http.StatusUpgradeRequired)
		return
	}
	conn, buf, err := http.NewResponseController(w).Hijack()
	if err != nil {
		return
	}
	defer conn.Close()
	fmt.Fprintf(conn, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: %s\r\n\r\n", r.Header.Get("Upgrade"))
	io.Copy(conn, buf)
}
