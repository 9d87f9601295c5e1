package proxy

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"net/url"
	"runtime/pprof"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/hashicorp/go-hclog"
)

// The limits of the profiling socket, which is there only if the operator asked
// for it, and which only the server's own user may open.
const (
	// MaxProfileSeconds is the longest profile of the processor; without a wish it
	// takes DefaultProfileSeconds.
	MaxProfileSeconds     = 60
	DefaultProfileSeconds = 10
	// maxProfilers may ask at one time; one more waits to be accepted.
	maxProfilers = 4
	// profilerTime is for the request, and again for taking the answer.
	profilerTime = 10 * time.Second
	maxProfiler  = 8 << 10 // bytes of the request
)

// profiles are those that are at hand whenever somebody asks.
var profiles = []string{"heap", "allocs", "goroutine"}

// serveProfiles answers on the profiling socket until over is closed; it owns l.
// A client such as curl asks for /cpu?seconds=N or for one of profiles and gets
// what go tool pprof reads. It is HTTP as far as curl needs it, and no part of
// what the internet may reach.
func serveProfiles(l net.Listener, over <-chan struct{}, log hclog.Logger) {
	var asking sync.WaitGroup
	defer asking.Wait()
	go func() {
		<-over
		_ = l.Close()
	}()
	room := make(chan struct{}, maxProfilers)
	for {
		room <- struct{}{}
		c, err := l.Accept()
		if err != nil {
			if !errors.Is(err, net.ErrClosed) {
				log.Warn("no more profiles", "error", err)
			}
			return
		}
		asking.Go(func() {
			defer func() { <-room }()
			defer c.Close()
			if err := answerProfile(c, over); err != nil {
				log.Warn("profile not given", "error", err)
			}
		})
	}
}

func answerProfile(c net.Conn, over <-chan struct{}) error {
	if err := c.SetDeadline(time.Now().Add(profilerTime)); err != nil {
		return err
	}
	target, err := profileTarget(c)
	if err != nil {
		return err
	}
	text, err := profile(target, over)
	status := "200 OK"
	if err != nil {
		status, text = "400 Bad Request", []byte(err.Error()+"\n")
	}
	if err := c.SetDeadline(time.Now().Add(profilerTime)); err != nil {
		return err
	}
	head := fmt.Sprintf("HTTP/1.0 %s\r\nContent-Type: application/octet-stream\r\nContent-Length: %d\r\n\r\n", status, len(text))
	_, err = c.Write(append([]byte(head), text...))
	return err
}

// profileTarget reads a request and returns what it asks for.
func profileTarget(r io.Reader) (*url.URL, error) {
	in := bufio.NewReader(io.LimitReader(r, maxProfiler))
	first := ""
	for {
		line, err := in.ReadString('\n')
		if err != nil {
			return nil, fmt.Errorf("read the request: %w", err)
		}
		line = strings.TrimRight(line, "\r\n")
		if first == "" {
			first = line
		}
		if line == "" {
			break
		}
	}
	words := strings.Fields(first)
	if len(words) != 3 || words[0] != "GET" {
		return nil, fmt.Errorf("the request %q", first)
	}
	return url.ParseRequestURI(words[1])
}

// profile makes a profile. That of the processor ends early when over is closed.
func profile(target *url.URL, over <-chan struct{}) ([]byte, error) {
	var out bytes.Buffer
	name := strings.TrimPrefix(target.Path, "/")
	if name == "cpu" {
		seconds := DefaultProfileSeconds
		if text := target.Query().Get("seconds"); text != "" {
			var err error
			if seconds, err = strconv.Atoi(text); err != nil || seconds < 1 || seconds > MaxProfileSeconds {
				return nil, fmt.Errorf("seconds=%s is not from 1 to %d", text, MaxProfileSeconds)
			}
		}
		if err := pprof.StartCPUProfile(&out); err != nil {
			return nil, err
		}
		wait := time.NewTimer(time.Duration(seconds) * time.Second)
		select {
		case <-wait.C:
		case <-over:
			wait.Stop()
		}
		pprof.StopCPUProfile()
		return out.Bytes(), nil
	}
	if slices.Contains(profiles, name) {
		err := pprof.Lookup(name).WriteTo(&out, 0)
		return out.Bytes(), err
	}
	return nil, fmt.Errorf("there is no profile %q: ask for /cpu?seconds=N, /%s", name, strings.Join(profiles, ", /"))
}
