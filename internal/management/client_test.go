package management

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"path/filepath"
	"strings"
	"testing"
	"testing/iotest"
	"time"

	"tako/internal/tako"
)

func dial(t testing.TB, s *served) *Client {
	t.Helper()
	c, err := Dial(context.Background(), s.path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	return c
}

func TestClientSpeaksEveryKindOfReply(t *testing.T) {
	f := &fake{deploy: func(_ context.Context, r DeployRequest, p Progress) (DeployResult, error) {
		p("one")
		p("two")
		return DeployResult{App: r.App, Version: r.Version, Rolled: true, NewInstances: int(r.Instances), OldInstances: 1}, nil
	}}
	c := dial(t, serve(t, f, nil))
	var (
		said []string
		res  DeployResult
		n    = uint8(3)
		idle = uint32(0)
	)
	err := c.Do(t.Context(), Request{
		Command: "deploy", App: "blog", Version: "v1", Path: "/p", Routes: []string{}, Instances: &n, IdleTimeout: &idle, Progress: true,
	}, func(s string) { said = append(said, s) }, &res)
	if err != nil || strings.Join(said, " ") != "one two" || res != (DeployResult{App: "blog", Version: "v1", Rolled: true, NewInstances: 3, OldInstances: 1}) {
		t.Errorf("deploy: %v, %v, %+v", err, said, res)
	}

	f.err = tako.Errorf(tako.CodeNotFound, "App not found: a")
	err = c.Do(t.Context(), map[string]any{"command": "stop", "app": "a"}, nil, nil)
	if e, ok := errors.AsType[*tako.Error](err); !ok || *e != (tako.Error{Code: tako.CodeNotFound, Message: "App not found: a"}) {
		t.Errorf("stop: %v", err)
	}
	f.err = nil

	archive := bytes.Repeat([]byte("0123456789"), 100_000)
	up, err := c.Upload(t.Context(), "blog", "v1", iotest.HalfReader(bytes.NewReader(archive)))
	if err != nil || up.Bytes != int64(len(archive)) {
		t.Errorf("upload: %+v, %v", up, err)
	}

	var lines []string
	if err := c.Logs(t.Context(), LogsRequest{App: "blog", Lines: 1}, func(l LogLine) error { lines = append(lines, l.Text); return nil }); err != nil || len(lines) != 1 {
		t.Errorf("logs: %v, %v", lines, err)
	}
}

func TestClientFollowsUntilItsContextEnds(t *testing.T) {
	f := &fake{logs: func(ctx context.Context, _ LogsRequest, send func(LogLine) error) error {
		err := send(LogLine{Text: "x"})
		<-ctx.Done()
		return errors.Join(err, ctx.Err())
	}}
	c := dial(t, serve(t, f, nil))
	ctx, cancel := context.WithCancel(t.Context())
	if err := c.Logs(ctx, LogsRequest{App: "a", Follow: true}, func(LogLine) error { cancel(); return nil }); err != nil {
		t.Error(err)
	}
}

func TestClientsContextEndsAWait(t *testing.T) {
	release := make(chan struct{})
	f := &fake{deploy: func(context.Context, DeployRequest, Progress) (DeployResult, error) {
		<-release
		return DeployResult{}, nil
	}}
	c := dial(t, serve(t, f, nil))
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	n, idle := uint8(1), uint32(1)
	err := c.Do(ctx, Request{Command: "deploy", App: "a", Version: "1", Path: "/p", Routes: []string{"x"}, Instances: &n, IdleTimeout: &idle}, nil, nil)
	if !errors.Is(err, context.DeadlineExceeded) {
		t.Error(err)
	}
	close(release)
}

func TestAnArchiveThatCannotBeReadIsNotUploaded(t *testing.T) {
	got := make(chan error, 1)
	f := &fake{upload: func(_ context.Context, r io.Reader) (UploadResult, error) {
		_, err := io.Copy(io.Discard, r)
		got <- err
		return UploadResult{}, nil // the broken upload is the reply all the same
	}}
	c := dial(t, serve(t, f, nil))
	_, err := c.Upload(t.Context(), "a", "1", io.MultiReader(strings.NewReader("half"), iotest.ErrReader(io.ErrUnexpectedEOF)))
	if !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("client: %v", err)
	}
	if err := <-got; err == nil {
		t.Error("the server took half an archive for a whole one")
	}
}

func TestDialSaysWhatToDo(t *testing.T) {
	dir := shortDir(t)
	gone, stale := filepath.Join(dir, "gone.sock"), filepath.Join(dir, "stale.sock")
	dead(t, stale, 0)
	for _, path := range []string{gone, stale} {
		_, err := Dial(t.Context(), path)
		if err == nil || !strings.HasPrefix(err.Error(), "tako-master does not answer at "+path+": is it running? ") {
			t.Errorf("%s: %v", path, err)
		}
	}
	if _, err := Dial(t.Context(), filepath.Join(dir, strings.Repeat("x", 120))); err == nil || !strings.Contains(err.Error(), "the system takes 107") {
		t.Errorf("long: %v", err)
	}
}

func TestClientReadsAnEndlessReplyOnlySoFar(t *testing.T) {
	ours, theirs := net.Pipe()
	c := NewClient(ours)
	defer c.Close()
	go func() {
		defer theirs.Close()
		_, _ = io.CopyN(io.Discard, theirs, int64(len(`{"command":"list"}`)+1))
		_, _ = io.Copy(theirs, io.LimitReader(zeros{}, MaxReply+1))
	}()
	if err := c.Do(t.Context(), Request{Command: "list"}, nil, nil); err == nil || !strings.Contains(err.Error(), "longer than") {
		t.Error(err)
	}
}

func TestClientIsToldWhyItWasRefused(t *testing.T) {
	s := serve(t, &fake{}, func(c *Config) { c.Limits.MaxConnections = 1 })
	first := dial(t, s)
	if err := first.Do(t.Context(), Request{Command: "list"}, nil, nil); err != nil {
		t.Fatal(err)
	}
	for range 20 { // before or after it could send, the reason arrives
		err := dial(t, s).Do(t.Context(), Request{Command: "list"}, nil, nil)
		if e, ok := errors.AsType[*tako.Error](err); !ok || e.Code != tako.CodeBusy {
			t.Fatal(err)
		}
	}
}
