package takotest

import (
	"cmp"
	"context"
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

// LoadOptions say how an app is asked. Its app.json needs "https_redirect" false:
// half of the clients ask without TLS.
type LoadOptions struct {
	Clients int
	// Pause is what each client waits between two requests.
	Pause time.Duration
	// Slow, if not 0, makes a miss of every answer that takes longer.
	Slow time.Duration
}

// Load is a steady load on one app. Of every four clients one keeps its
// connection and one opens a new one for each request, without TLS and with it.
type Load struct {
	cancel context.CancelFunc
	ended  sync.WaitGroup

	mu       sync.Mutex
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

// Load asks for hostPath from now until Stop.
func (s *Server) Load(ctx context.Context, hostPath string, o LoadOptions) *Load {
	l := new(Load)
	ctx, l.cancel = context.WithCancel(ctx)
	for i := range o.Clients {
		p, kept := HTTP1, i%4 < 2
		if i%2 == 0 {
			p = TLS1
		}
		l.ended.Go(func() { l.client(ctx, s.Client(p), s.URL(p, hostPath), kept, o) })
	}
	return l
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
	r := Report{Requests: l.requests, Failures: l.failures, Slow: l.slow, Misses: slices.Clone(l.misses)}
	slices.SortFunc(r.Misses, func(a, b Miss) int { return a.Ended.Compare(b.Ended) })
	if took := slices.Sorted(slices.Values(l.took)); len(took) > 0 {
		r.Median, r.Worst = took[len(took)/2], took[len(took)-1]
	}
	return r
}

func (l *Load) client(ctx context.Context, client *http.Client, url string, kept bool, o LoadOptions) {
	client.Timeout = 20 * time.Second
	client.Transport.(*http.Transport).DisableKeepAlives = !kept
	defer client.CloseIdleConnections()
	for ctx.Err() == nil {
		began := time.Now()
		what := ask(client, url)
		l.count(began, time.Now(), what, o.Slow)
		select {
		case <-time.After(o.Pause):
		case <-ctx.Done():
		}
	}
}

// ask says what is wrong with the answer, "" for nothing.
func ask(client *http.Client, url string) string {
	res, err := client.Get(url) // with no context: a request that began is to end
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
