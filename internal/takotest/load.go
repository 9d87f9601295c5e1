package takotest

import (
	"cmp"
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"
)

// MaxMisses bounds the misses that a Load keeps; it counts them all.
const MaxMisses = 1000

// A Way is how some clients of a Load ask.
type Way struct {
	Protocol Protocol
	// Kept: connections are kept, and not a new one opened for each request. HTTP/2
	// always keeps them.
	Kept bool
	// Resume: a new connection goes on with the TLS session of the last one.
	Resume bool
	// Streams is how many clients share the connections of HTTP/2; 0 is 1.
	Streams int
}

// LoadOptions say how an app is asked. Its app.json needs "https_redirect" false
// if some clients ask without TLS.
type LoadOptions struct {
	Clients int
	// Ways are given to the clients in turn. Without any, of every four clients one
	// keeps its connection and one opens a new one for each request, without TLS and
	// with it.
	Ways []Way
	// Once makes each request one that a client may not send a second time by
	// itself, as it may when a connection ends that it had kept.
	Once bool
	// Pause is what each client waits between two requests.
	Pause time.Duration
	// Slow, if not 0, makes a miss of every answer that takes longer.
	Slow time.Duration
}

// Load is a steady load on one app.
type Load struct {
	cancel context.CancelFunc
	ended  sync.WaitGroup

	mu       sync.Mutex
	inFlight int
	resumed  int
	full     int
	mark     time.Time
	back     time.Duration
	requests int
	failures int
	slow     int
	misses   []Miss
	took     []time.Duration
}

// Miss is a request that failed or took long.
type Miss struct {
	Began, Ended time.Time
	What         string
}

func (m Miss) String() string {
	return fmt.Sprintf("%s to %s: %s", m.Began.Format("15:04:05.000"), m.Ended.Format("05.000"), m.What)
}

// Report is what a Load came to.
type Report struct {
	Requests, Failures int
	Slow               int    // answers that were good and late
	Misses             []Miss // the first MaxMisses of both, by their end
	Median, Worst      time.Duration
	// Resumed and Full are TLS handshakes with an old session and without.
	Resumed, Full int
	// Back is the time from Mark to the end of the first good answer to a request
	// that began after it; 0 before there is one.
	Back time.Duration
}

func (r Report) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%d requests, %d failures, %d slow, median %s, worst %s", r.Requests, r.Failures, r.Slow,
		r.Median.Round(10*time.Microsecond), r.Worst.Round(time.Millisecond))
	for _, m := range r.Misses[:min(len(r.Misses), 10)] {
		fmt.Fprintf(&b, "\n\t%v", m)
	}
	return b.String()
}

// usual are the ways of a Load that is told none.
var usual = []Way{{Protocol: TLS1, Kept: true}, {Protocol: HTTP1, Kept: true}, {Protocol: TLS1}, {Protocol: HTTP1}}

// Load asks for hostPath from now until Stop.
func (s *Server) Load(ctx context.Context, hostPath string, o LoadOptions) *Load {
	l := new(Load)
	ctx, l.cancel = context.WithCancel(ctx)
	if len(o.Ways) == 0 {
		o.Ways = usual
	}
	method := http.MethodGet
	if o.Once {
		method = http.MethodPost
	}
	shared := make(map[Way]*http.Client) // one with room for another stream
	rooms := make(map[Way]int)
	for i := range o.Clients {
		w := o.Ways[i%len(o.Ways)]
		if rooms[w] == 0 {
			shared[w], rooms[w] = l.newClient(s, w), max(w.Streams, 1)
		}
		rooms[w]--
		client := shared[w]
		l.ended.Go(func() { l.client(ctx, client, method, s.URL(w.Protocol, hostPath), o) })
	}
	return l
}

func (l *Load) newClient(s *Server, w Way) *http.Client {
	client := s.Client(w.Protocol)
	client.Timeout = 20 * time.Second
	transport := client.Transport.(*http.Transport)
	transport.DisableKeepAlives = !w.Kept && w.Protocol != H2
	if w.Resume {
		transport.TLSClientConfig.ClientSessionCache = tls.NewLRUClientSessionCache(0)
	}
	transport.TLSClientConfig.VerifyConnection = func(state tls.ConnectionState) error {
		l.mu.Lock()
		defer l.mu.Unlock()
		if state.DidResume {
			l.resumed++
		} else {
			l.full++
		}
		return nil
	}
	return client
}

// Mark begins to measure Report's Back and returns how many requests are in
// flight.
func (l *Load) Mark() (inFlight int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.mark, l.back = time.Now(), 0
	return l.inFlight
}

// Stop lets every client finish its request and returns what all came to. It may
// come twice.
func (l *Load) Stop() Report {
	l.cancel()
	l.ended.Wait()
	return l.Report()
}

// Report is what the load has come to so far.
func (l *Load) Report() Report {
	l.mu.Lock()
	defer l.mu.Unlock()
	r := Report{
		Requests: l.requests, Failures: l.failures, Slow: l.slow, Misses: slices.Clone(l.misses),
		Resumed: l.resumed, Full: l.full, Back: l.back,
	}
	slices.SortFunc(r.Misses, func(a, b Miss) int { return a.Ended.Compare(b.Ended) })
	if took := slices.Sorted(slices.Values(l.took)); len(took) > 0 {
		r.Median, r.Worst = took[len(took)/2], took[len(took)-1]
	}
	return r
}

func (l *Load) client(ctx context.Context, client *http.Client, method, url string, o LoadOptions) {
	defer client.CloseIdleConnections()
	for ctx.Err() == nil {
		l.mu.Lock()
		l.inFlight++
		l.mu.Unlock()
		began := time.Now()
		what := ask(client, method, url)
		l.count(began, time.Now(), what, o.Slow)
		select {
		case <-time.After(o.Pause):
		case <-ctx.Done():
		}
	}
}

// ask says what is wrong with the answer, "" for nothing.
func ask(client *http.Client, method, url string) string {
	req, err := http.NewRequestWithContext(context.Background(), method, url, nil) // a request that began is to end
	if err != nil {
		return err.Error()
	}
	res, err := client.Do(req)
	if err != nil {
		return err.Error()
	}
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	switch {
	case err != nil:
		return "body: " + err.Error()
	case res.StatusCode != http.StatusOK:
		return fmt.Sprintf("%s: %.100s", res.Status, body)
	}
	return ""
}

func (l *Load) count(began, ended time.Time, what string, slow time.Duration) {
	took := ended.Sub(began)
	l.mu.Lock()
	defer l.mu.Unlock()
	l.requests++
	l.inFlight--
	if what == "" && l.back == 0 && !l.mark.IsZero() && began.After(l.mark) {
		l.back = ended.Sub(l.mark)
	}
	l.took = append(l.took, took)
	late := slow != 0 && took > slow
	switch {
	case what != "":
		l.failures++
	case late:
		l.slow++
	default:
		return
	}
	if len(l.misses) < MaxMisses {
		l.misses = append(l.misses, Miss{Began: began, Ended: ended, What: cmp.Or(what, "took "+took.String())})
	}
}
