package integration

import (
	"bufio"
	"context"
	"fmt"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"tako/internal/takotest"
)

// follower is a takoctl logs -f.
type follower struct {
	lines chan string
}

func follow(t *testing.T, s *takotest.Server, app string) *follower {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	cmd := exec.CommandContext(ctx, s.Program("takoctl"), "--socket", s.Socket, "logs", app, "-f", "-n", "0")
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	f := &follower{lines: make(chan string, 1<<20)}
	done := make(chan struct{})
	go func() {
		defer close(done)
		in := bufio.NewScanner(out)
		in.Buffer(nil, 1<<20)
		for in.Scan() {
			f.lines <- in.Text()
		}
	}()
	t.Cleanup(func() {
		cancel()
		<-done
		cmd.Wait() // it was ended
	})
	return f
}

// wait reads on to a line with text in it and counts those with counted.
func (f *follower) wait(t *testing.T, text, counted string) (count int) {
	t.Helper()
	late := time.After(takotest.AskWait)
	for {
		select {
		case line := <-f.lines:
			if strings.Contains(line, counted) {
				count++
			}
			if strings.Contains(line, text) {
				return count
			}
		case <-late:
			t.Fatalf("no line with %q came", text)
		}
	}
}

// TestFollowedLogsGoOnAcrossRotationsAndDeploys prints more than a log file
// holds, and misses no line of it.
func TestFollowedLogsGoOnAcrossRotationsAndDeploys(t *testing.T) {
	t.Parallel()
	s := start(t, takotest.Options{})
	deploy(t, s, "blog", "1", quick(nil))
	f := follow(t, s, "blog")
	say := func(text string) {
		t.Helper()
		if answer, err := s.Get(t.Context(), takotest.HTTP1, "blog.localhost/print?line="+text); err != nil || answer.StatusCode != 200 {
			t.Fatalf("print: %v, %v", answer.Response, err)
		}
	}
	// What came before it followed it does not show; the first line that it does
	// shows that it follows.
	until(t, 10*time.Second, "it follows", func() bool {
		say("begin")
		select {
		case <-f.lines:
			return true
		case <-time.After(50 * time.Millisecond):
			return false
		}
	})
	const lines = 4000 // of 4 KiB: more than the 10 MiB of a file
	if answer, err := s.Get(t.Context(), takotest.HTTP1, fmt.Sprintf("blog.localhost/flood?n=%d&size=4096", lines)); err != nil || answer.StatusCode != 200 {
		t.Fatalf("flood: %v, %v", answer.Response, err)
	}
	say("after-the-flood")
	if n := f.wait(t, "after-the-flood", "flood "); n != lines {
		t.Errorf("%d of %d lines came", n, lines)
	}
	files, err := filepath.Glob(filepath.Join(s.Data, "apps", "blog", "shared", "logs", "*"))
	if err != nil || len(files) < 2 {
		t.Errorf("the log was not rotated: %v, %v", files, err)
	}
	deploy(t, s, "blog", "2", quick(nil))
	f.wait(t, "testapp 2 starts", "")
	say("after-the-deploy")
	f.wait(t, "after-the-deploy", "")
}

// TestAnAppThatFloodsItsLogSlowsNobodyElse compares how fast another app answers
// while one prints as fast as it can.
func TestAnAppThatFloodsItsLogSlowsNobodyElse(t *testing.T) {
	t.Parallel()
	s := start(t, takotest.Options{})
	deploy(t, s, "loud", "1", quick(nil))
	median := func() time.Duration {
		client := s.Client(takotest.TLS1)
		defer client.CloseIdleConnections()
		var took []time.Duration
		for range 200 {
			answer, err := getWith(t.Context(), client, s.URL(takotest.TLS1, "good.localhost/"))
			if err != nil || answer.StatusCode != 200 {
				t.Fatalf("good: %v, %v", answer.Response, err)
			}
			took = append(took, answer.Took)
			time.Sleep(time.Millisecond) // an even load, and not as fast as it goes
		}
		slices.Sort(took)
		return took[len(took)/2]
	}
	quiet := median()
	flooded := make(chan error, 1)
	go func() {
		// 40 MiB: over what may be printed at once, so that it is slowed for seconds.
		_, err := s.Get(t.Context(), takotest.HTTP1, "loud.localhost/flood?n=10240&size=4096")
		flooded <- err
	}()
	loud := median()
	t.Logf("another app's median: %s in quiet, %s beside a flood, %.1f times as long", quiet, loud, float64(loud)/float64(quiet))
	if ratio := float64(loud) / float64(quiet); ratio > 5 && loud > inTime(50*time.Millisecond) {
		t.Errorf("beside a flood another app answers %.1f times as slowly", ratio)
	}
	if err := <-flooded; err != nil {
		t.Errorf("the app that flooded: %v", err)
	}
	about(t, s, "loud.localhost")
	// What its files may take is bounded.
	var total int64
	files, err := filepath.Glob(filepath.Join(s.Data, "apps", "loud", "shared", "logs", "*"))
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		total += size(t, f)
	}
	if len(files) > 5 || total > 5*(11<<20) {
		t.Errorf("%d log files with %d bytes", len(files), total)
	}
}
