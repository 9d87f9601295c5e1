package integration

import (
	"bufio"
	"context"
	"crypto/tls"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"tako/internal/takotest"
)

// paced gives n zeros, spread over so much time, and calls half once half of them
// have been read.
type paced struct {
	n, left int64
	over    time.Duration
	began   time.Time
	half    func()
}

func (p *paced) Read(b []byte) (int, error) {
	if p.left == 0 {
		return 0, io.EOF
	}
	if p.began.IsZero() {
		p.began = time.Now()
	}
	due := time.Duration(float64(p.over) * float64(p.n-p.left) / float64(p.n))
	time.Sleep(due - time.Since(p.began))
	if p.half != nil && p.left <= p.n/2 {
		p.half()
		p.half = nil
	}
	k := min(int64(len(b)), p.left)
	clear(b[:k])
	p.left -= k
	return int(k), nil
}

// upgraded opens a WebSocket's connection to the test app, which sends back what
// it gets.
func upgraded(t *testing.T, s *takotest.Server, host string) net.Conn {
	t.Helper()
	c, err := net.Dial("tcp", net.JoinHostPort("127.0.0.1", strconv.Itoa(s.HTTP)))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	fmt.Fprintf(c, "GET /upgrade HTTP/1.1\r\nHost: %s\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n", host)
	res, err := http.ReadResponse(bufio.NewReader(c), nil)
	if err != nil {
		t.Fatal(err)
	}
	if res.StatusCode != http.StatusSwitchingProtocols {
		t.Fatalf("upgrade: %s", res.Status)
	}
	return c
}

// echoes sends a line through an upgraded connection and wants it back.
func echoes(c net.Conn, line string) error {
	if err := c.SetDeadline(time.Now().Add(20 * time.Second)); err != nil {
		return err
	}
	if _, err := io.WriteString(c, line); err != nil {
		return err
	}
	b := make([]byte, len(line))
	if _, err := io.ReadFull(c, b); err != nil {
		return err
	}
	if string(b) != line {
		return fmt.Errorf("got %q back for %q", b, line)
	}
	return nil
}

// TestWhatRunsThroughAReloadEndsWell: a deploy, a cold start, a WebSocket, a
// stream of events, an upload and a download are under way when the server
// reloads.
func TestWhatRunsThroughAReloadEndsWell(t *testing.T) {
	t.Parallel()
	size, over := int64(8<<20), 3*time.Second
	if soaking() {
		size, over = 1<<30, 15*time.Second
	}
	s, l := blogUnder(t, tortured())
	onDemand(t, s, "lazy", map[string]any{"queue": map[string]any{"waiters": 100, "wait": 60}}, "-slow", "1500ms")
	asleep(t, s, "lazy")
	deployPlain(t, s, "good2")
	lay(t, s, "blog", "2", quick(map[string]any{"timeouts": map[string]any{"stability": 1, "ready": 30}}))
	client := s.Client(takotest.HTTP1)
	client.Timeout = 2 * time.Minute
	t.Cleanup(client.CloseIdleConnections)
	old := serving(t, s, "tako-proxy", 0)

	var all sync.WaitGroup
	var mu sync.Mutex
	ended := make(map[string]error)
	underWay := new(sync.WaitGroup)
	run := func(name string, f func(begun func()) error) {
		underWay.Add(1)
		all.Go(func() {
			once := sync.OnceFunc(underWay.Done)
			err := f(once)
			once()
			mu.Lock()
			defer mu.Unlock()
			ended[name] = err
		})
	}
	run("upload", func(begun func()) error {
		res, err := client.Post(s.URL(takotest.HTTP1, "good2.localhost/count"), "application/octet-stream", &paced{n: size, left: size, over: over, half: begun})
		if err != nil {
			return err
		}
		defer res.Body.Close()
		text, err := io.ReadAll(res.Body)
		if strings.TrimSpace(string(text)) != strconv.FormatInt(size, 10) {
			return fmt.Errorf("%s: %s (%w)", res.Status, text, err)
		}
		return err
	})
	run("download", func(begun func()) error {
		res, err := client.Get(s.URL(takotest.HTTP1, "good2.localhost/bytes?n="+strconv.FormatInt(size, 10)))
		if err != nil {
			return err
		}
		defer res.Body.Close()
		got, pace := int64(0), &paced{n: size, left: size, over: over, half: begun}
		b := make([]byte, 64<<10)
		for {
			n, err := res.Body.Read(b)
			if got += int64(n); n > 0 {
				_, _ = pace.Read(b[:n])
			}
			switch {
			case err == io.EOF && got == size:
				return nil
			case err != nil:
				return fmt.Errorf("%d of %d bytes: %w", got, size, err)
			}
		}
	})
	run("stream of events", func(begun func()) error {
		const events = 20
		res, err := client.Get(s.URL(takotest.HTTP1, fmt.Sprintf("good2.localhost/stream?n=%d&ms=%d", events, over.Milliseconds()/events)))
		if err != nil {
			return err
		}
		defer res.Body.Close()
		n, in := 0, bufio.NewScanner(res.Body)
		for in.Scan() {
			if in.Text() == fmt.Sprintf("data: %d", n) {
				n++
				begun()
			}
		}
		if n != events {
			return fmt.Errorf("%d of %d events (%w)", n, events, in.Err())
		}
		return in.Err()
	})
	socket := upgraded(t, s, "good2.localhost")
	run("WebSocket", func(begun func()) error {
		for i := range 30 {
			if err := echoes(socket, fmt.Sprintf("line %d\n", i)); err != nil {
				return fmt.Errorf("line %d: %w", i, err)
			}
			begun()
			time.Sleep(over / 30)
		}
		return nil
	})
	for i := range 20 {
		run(fmt.Sprintf("cold start, visitor %d", i), func(begun func()) error {
			begun()
			answer, err := s.Get(context.Background(), takotest.HTTP1, "lazy.localhost/")
			if err == nil && answer.StatusCode != http.StatusOK {
				err = fmt.Errorf("%s: %s", answer.Status, answer.Text)
			}
			return err
		})
	}
	run("deploy", func(begun func()) error {
		begun()
		_, err := ask(s, "blog", "2", map[string]any{"instances": 2})
		return err
	})
	underWay.Wait()
	until(t, 20*time.Second, "the deploy is under way", func() bool {
		st, err := s.Ask("status", map[string]any{"app": "blog"})
		return err == nil && strings.Contains(string(st), `"version":"2"`)
	})
	good(t, s, "the reload")
	if now := serving(t, s, "tako-proxy", 0); now == old {
		t.Error("the old proxy still serves")
	}
	all.Wait()
	failed := 0
	for name, err := range ended {
		if err != nil {
			failed++
			t.Errorf("%s: %v", name, err)
		}
	}
	row(t, fmt.Sprintf("reload with a deploy, a cold start, a WebSocket, a stream, an upload and a download of %d MiB", size>>20), len(ended), failed, "each ended well")
	noFailures(t, "… and visitors beside them", l, "")
	if st := status(t, s, "blog"); st.Version != "2" {
		t.Errorf("blog is of version %s after its deploy", st.Version)
	}
}

// TestSessionsCountersAndHealthCrossAReload: TLS sessions resume, no request is
// counted twice or lost, an instance that is not healthy gets no visitors.
func TestSessionsCountersAndHealthCrossAReload(t *testing.T) {
	t.Parallel()
	s := start(t, takotest.Options{})
	lay(t, s, "blog", "1", quick(nil))
	if _, err := ask(s, "blog", "1", map[string]any{"instances": 2}); err != nil {
		t.Fatal(err)
	}
	client := s.Client(takotest.TLS1)
	transport := client.Transport.(*http.Transport)
	transport.DisableKeepAlives = true
	transport.TLSClientConfig.ClientSessionCache = tls.NewLRUClientSessionCache(0)
	asked := 0
	visit := func() (resumed bool) {
		t.Helper()
		answer, err := getWith(t.Context(), client, s.URL(takotest.TLS1, "blog.localhost/"))
		if err != nil || answer.StatusCode != http.StatusOK {
			t.Fatalf("visit: %v, %v", answer.Response, err)
		}
		asked++
		return answer.TLS.DidResume
	}
	visit()
	const reloads = 3
	for i := range reloads {
		if !visit() {
			t.Errorf("a session does not resume before reload %d", i+1)
		}
		good(t, s, "the reload") // at once: what was just counted is not reported yet
		if !visit() {
			t.Errorf("a session does not resume after reload %d", i+1)
		}
	}
	until(t, 30*time.Second, "all requests are counted", func() bool { return counted(t, s, "blog") >= asked })
	settled(t, s)
	time.Sleep(100 * time.Millisecond)
	if n := counted(t, s, "blog"); n != asked {
		t.Errorf("%d requests are counted, want %d", n, asked)
	}
	row(t, fmt.Sprintf("what %d reloads carry over", reloads), asked, 0, "every session resumed, every request counted once")

	victim := status(t, s, "blog").Instances[0]
	if err := s.Signal(victim.PID, syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	until(t, 20*time.Second, "an unhealthy instance", func() bool {
		for _, in := range status(t, s, "blog").Instances {
			if in.ID == victim.ID {
				return in.State == "unhealthy"
			}
		}
		return true // replaced already
	})
	good(t, s, "the reload with an unhealthy instance")
	for range 10 {
		if a := about(t, s, "blog.localhost"); a.PID == victim.PID {
			t.Error("the unhealthy instance got a visitor")
		}
	}
}

// counted is how many requests the server has counted for an app.
func counted(t *testing.T, s *takotest.Server, app string) int {
	t.Helper()
	data, err := s.Ask("status", map[string]any{"app": app})
	if err != nil {
		t.Fatal(err)
	}
	var st struct {
		Instances []struct {
			Requests int `json:"requests_total"`
		} `json:"instances"`
	}
	if err := json.Unmarshal(data, &st); err != nil {
		t.Fatal(err)
	}
	n := 0
	for _, in := range st.Instances {
		n += in.Requests
	}
	return n
}

// TestAFurtherReloadWaitsForOldProxies: at most two drain at one time, and what
// holds them is not cut by impatience.
func TestAFurtherReloadWaitsForOldProxies(t *testing.T) {
	t.Parallel()
	s := start(t, takotest.Options{})
	deployPlain(t, s, "good2")
	var sockets []net.Conn
	for i := range 2 {
		sockets = append(sockets, upgraded(t, s, "good2.localhost"))
		good(t, s, fmt.Sprintf("reload %d", i+1))
	}
	if old := children(known(t, s), "tako-proxy", "draining"); len(old) != 2 {
		t.Fatalf("%d proxies drain, want 2", len(old))
	}
	third := make(chan error, 1)
	go func() {
		_, _, code, err := s.Ctl(context.Background(), "server", "reload")
		if err == nil && code != 0 {
			err = fmt.Errorf("takoctl server reload exits with %d", code)
		}
		third <- err
	}()
	until(t, 20*time.Second, "a third reload that waits", func() bool { return known(t, s).Reload.Running })
	for i := range 10 {
		if old := children(known(t, s), "tako-proxy", "draining"); len(old) > 2 {
			t.Fatalf("%d proxies drain", len(old))
		}
		for _, c := range sockets {
			if err := echoes(c, "still there\n"); err != nil {
				t.Fatalf("a WebSocket of an old proxy, look %d: %v", i, err)
			}
		}
		time.Sleep(20 * time.Millisecond)
	}
	select {
	case err := <-third:
		t.Fatalf("the third reload did not wait: %v", err)
	default:
	}
	sockets[0].Close()
	if err := <-third; err != nil {
		t.Error(err)
	}
	if err := echoes(sockets[1], "still there\n"); err != nil {
		t.Errorf("the other WebSocket: %v", err)
	}
	if n := known(t, s).Reload.Count; n != 3 {
		t.Errorf("%d reloads, want 3", n)
	}
	row(t, "a third reload while two old proxies drain", 0, 0, "waited for the first of them, whose WebSocket lived on until its client left")
}

// deployPlain deploys an app that is served without TLS too.
func deployPlain(t *testing.T, s *takotest.Server, app string) {
	t.Helper()
	deploy(t, s, app, "1", map[string]any{"https_redirect": false})
}

// TestANewImageThatCannotGoOnGoesBack, once: the program before it goes on with the
// same children, and if that cannot either, all ends in order.
func TestANewImageThatCannotGoOnGoesBack(t *testing.T) {
	t.Parallel()
	noway := filepath.Join(t.TempDir(), "noway")
	if err := takotest.BuildTestdata("noway", noway); err != nil {
		t.Fatal(err)
	}
	s, l := blogUnder(t, tortured())
	good(t, s, "a first reload")
	before := settled(t, s)
	keep := filepath.Join(t.TempDir(), "good")
	if err := os.Link(s.Program("tako-master"), keep); err != nil {
		t.Fatal(err)
	}
	install(t, s, "tako-master", noway)
	for range long(10, 2) {
		if r := reload(t, s); !strings.Contains(r.LastError, "the new program could not go on") {
			t.Errorf("reload into an image that cannot go on: %+v", r)
		}
	}
	after := known(t, s)
	if after.PID != before.PID || after.Version != before.Version || after.Reload.Count != 1 {
		t.Errorf("pid %d, version %s, %d reloads; want %d, %s and 1", after.PID, after.Version, after.Reload.Count, before.PID, before.Version)
	}
	for i, p := range after.Processes {
		if p.PID != before.Processes[i].PID {
			t.Errorf("%s was replaced: pid %d became %d", p.Role, before.Processes[i].PID, p.PID)
		}
	}
	install(t, s, "tako-master", keep)
	good(t, s, "the reload after it was mended")
	noFailures(t, fmt.Sprintf("%d × exec back out of an image that cannot go on", long(10, 2)), l, "same PID, version and children")
}

// TestTwoImagesThatCannotGoOnEndInOrder: back is gone only once.
func TestTwoImagesThatCannotGoOnEndInOrder(t *testing.T) {
	t.Parallel()
	noway := filepath.Join(t.TempDir(), "noway")
	if err := takotest.BuildTestdata("noway", noway); err != nil {
		t.Fatal(err)
	}
	s := prepare(t, takotest.Options{})
	install(t, s, "tako-master", noway)
	if err := s.Start(); err != nil {
		t.Fatal(err)
	}
	deploy(t, s, "blog", "1", nil)
	if err := s.Signal(s.PID(), syscall.SIGHUP); err != nil {
		t.Fatal(err)
	}
	code, err := s.Exit()
	if err != nil || code != 1 || !strings.Contains(s.Log(), "neither the new program nor the old one can go on") {
		t.Errorf("exit status %d, %v", code, err)
	}
	until(t, takotest.StopWait, "the end of its children and instances", func() bool { return len(s.Processes()) == 0 })
	row(t, "neither the new image nor the old one can go on", 0, 0, "all ended in order, status 1, nothing orphaned")
}

// TestAReloadWaitsForCommands, and is refused by their name when they do not end.
func TestAReloadWaitsForCommands(t *testing.T) {
	t.Parallel()
	s := start(t, takotest.Options{})
	deploy(t, s, "blog", "1", quick(nil))
	slow := func(version, after string, ready int) chan error {
		lay(t, s, "blog", version, quick(map[string]any{"timeouts": map[string]any{"ready": ready}}), "-slow", after)
		done := make(chan error, 1)
		go func() {
			_, err := ask(s, "blog", version, nil)
			done <- err
		}()
		until(t, 20*time.Second, "a deploy under way", func() bool { return logged(s, "starting instance: app=blog") > 1 })
		return done
	}
	done := slow("2", "1500ms", 30)
	good(t, s, "a reload while a deploy runs")
	select {
	case err := <-done:
		if err != nil {
			t.Errorf("the deploy: %v", err)
		}
	default:
		t.Error("the reload did not wait for the deploy")
	}
	if st := status(t, s, "blog"); st.Version != "2" {
		t.Errorf("version %s after the deploy of 2", st.Version)
	}
	if !soaking() {
		return // the rest takes ReloadWait
	}
	began := time.Now()
	done = slow("3", "150s", 200)
	if r := reloadWithin(t, s, 4*time.Minute); !strings.Contains(r.LastError, "commands still run after 2m0s: of blog") {
		t.Errorf("a reload while a deploy does not end: %+v", r)
	}
	row(t, "a reload while a deploy takes longer than 120 s", 1, 0, fmt.Sprintf("refused by its name after %s", time.Since(began).Round(time.Second)))
	deployPlain(t, s, "other") // others are not held up by it
	<-done                     // its client gives up before
	until(t, 2*time.Minute, "the end of the deploy that a reload did not wait for", func() bool { return status(t, s, "blog").Version == "3" })
	good(t, s, "a reload after it")
}

// TestEverythingIsAsAtAFreshStart: after reloads, failed ones too, and deaths, the
// server occupies what it did before, to the last descriptor.
func TestEverythingIsAsAtAFreshStart(t *testing.T) {
	t.Parallel()
	rounds := long(10, 2)
	s := start(t, takotest.Options{})
	deploy(t, s, "blog", "1", quick(nil))
	settled(t, s)
	// What is opened only as it is needed: logs, and connections to instances.
	use := func() {
		for _, app := range []string{"good", "blog"} {
			if a, err := s.Get(t.Context(), takotest.TLS1, app+".localhost/print?line=x"); err != nil || a.StatusCode != http.StatusOK {
				t.Errorf("%s: %v %v", app, a.Response, err)
			}
		}
	}
	use()
	// Until the lines have been read and our own connections are closed.
	before := footprintOf(t, s)
	until(t, 20*time.Second, "nothing changes any more", func() bool {
		last := before
		time.Sleep(250 * time.Millisecond)
		before = footprintOf(t, s)
		return len(last.differs(before)) == 0
	})
	keep := filepath.Join(t.TempDir(), "good")
	if err := os.Link(s.Program("tako-proxy"), keep); err != nil {
		t.Fatal(err)
	}
	noway, bad := filepath.Join(t.TempDir(), "noway"), impostor(t, "os.Exit(1)")
	if err := takotest.BuildTestdata("noway", noway); err != nil {
		t.Fatal(err)
	}
	master := filepath.Join(t.TempDir(), "master")
	if err := os.Link(s.Program("tako-master"), master); err != nil {
		t.Fatal(err)
	}
	client, err := net.Dial("unix", s.Socket) // connected all the time, and silent
	if err != nil {
		t.Fatal(err)
	}
	for i := range rounds {
		good(t, s, "a reload")
		for _, role := range []string{"tako-agent", "tako-proxy"} {
			pid := serving(t, s, role, 0)
			if err := s.Signal(pid, os.Kill); err != nil {
				t.Fatal(err)
			}
			serving(t, s, role, pid)
		}
		install(t, s, "tako-proxy", bad)
		if r := reload(t, s); r.LastError == "" {
			t.Error("a reload with a bad proxy worked")
		}
		install(t, s, "tako-proxy", keep)
		install(t, s, "tako-master", noway)
		if r := reload(t, s); r.LastError == "" {
			t.Error("a reload into a bad image worked")
		}
		install(t, s, "tako-master", master)
		if a := about(t, s, "blog.localhost"); a.PID == 0 {
			t.Errorf("round %d: no answer", i+1)
		}
	}
	good(t, s, "the last reload")
	if err := echoes(client, ""); err != nil {
		t.Error(err)
	}
	fmt.Fprintln(client, `{"command":"list"}`)
	if line, err := bufio.NewReader(client).ReadString('\n'); err != nil || !strings.Contains(line, "blog") {
		t.Errorf("a client that was connected all the time: %q, %v", line, err)
	}
	client.Close()
	settled(t, s)
	use()
	var difference []string
	for end := time.Now().Add(20 * time.Second); ; time.Sleep(100 * time.Millisecond) {
		if difference = before.differs(footprintOf(t, s)); len(difference) == 0 || time.Now().After(end) {
			break
		}
	}
	if len(difference) > 0 {
		t.Errorf("after all this:\n%s", strings.Join(difference, "\n"))
	}
	row(t, fmt.Sprintf("%d rounds of reloads, failed ones and deaths", rounds), 0, 0, fmt.Sprintf("%d descriptors, processes and files as at the start", len(before)))
}

// TestFollowedLogsGoOnThroughReloads: takoctl logs -f shows each line once, in
// order, whatever the server does meanwhile.
func TestFollowedLogsGoOnThroughReloads(t *testing.T) {
	t.Parallel()
	s := start(t, takotest.Options{})
	deployPlain(t, s, "good2")
	client := s.Client(takotest.HTTP1)
	t.Cleanup(client.CloseIdleConnections)
	say := func(text string) {
		t.Helper()
		if a, err := getWith(t.Context(), client, s.URL(takotest.HTTP1, "good2.localhost/print?line="+text)); err != nil || a.StatusCode != http.StatusOK {
			t.Fatalf("print: %v, %v", a.Response, err)
		}
	}
	f := follow(t, s, "good2")
	until(t, 10*time.Second, "it follows", func() bool {
		say("begin")
		select {
		case <-f.lines:
			return true
		case <-time.After(50 * time.Millisecond):
			return false
		}
	})
	reloads, said := long(10, 3), 0
	for range reloads {
		done := make(chan struct{})
		go func() {
			defer close(done)
			if r := reload(t, s); r.LastError != "" {
				t.Error(r.LastError)
			}
		}()
		for after := 0; after < 20; {
			say(fmt.Sprintf("line-%06d-", said))
			said++
			select {
			case <-done:
				after++
			case <-time.After(2 * time.Millisecond): // what comes in a reload are fewer lines than are asked for again
			}
		}
	}
	say("the-end")
	next, late := 0, time.After(takotest.AskWait)
	for over := false; !over; {
		select {
		case line := <-f.lines:
			if strings.Contains(line, "line-") && !strings.Contains(line, fmt.Sprintf("line-%06d-", next)) {
				t.Fatalf("line %d was to come, and came: %s", next, line)
			} else if strings.Contains(line, "line-") {
				next++
			}
			over = strings.Contains(line, "the-end")
		case <-late:
			t.Fatalf("after line %d no other came", next)
		}
	}
	row(t, fmt.Sprintf("takoctl logs -f through %d reloads", reloads), said, said-next, "each line came once and in order")
	if next != said {
		t.Errorf("%d of %d lines came", next, said)
	}
}
