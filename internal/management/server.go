package management

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"time"

	"github.com/hashicorp/go-hclog"

	"tako/internal/tako"
)

// A Config is what Serve works with. Zero limits stand for the constants of the
// same names.
type Config struct {
	// Listener stays the caller's: Serve never closes it, so that who connects
	// after its end waits in the queue for the next Serve.
	Listener *net.UnixListener
	Backend  Backend
	Log      hclog.Logger
	// OwnUID is the server's own user, who may do what root may.
	OwnUID uint32
	// SocketGID is the group whose members may use the socket; 0 for none.
	SocketGID uint32
	// Version is the build's, for hello.
	Version string
	Limits  Limits
	// Waiting brings connections that another Serve gave to its Left: they are
	// served like new ones. Left is given, when ctx ends, each connection that waits
	// for its next request, which the peer does not notice, and owns it. It is called
	// from several goroutines and must not block. Nil closes them.
	Waiting <-chan *net.UnixConn
	Left    func(*net.UnixConn)
}

// acceptPause is how long Serve waits after an accept that the system refused.
const acceptPause = 100 * time.Millisecond

// refusalTimeout bounds the one line for a client that is not served.
const refusalTimeout = time.Second

type server struct {
	Config
	stopping context.Context // ends when Serve is asked to end
	commands context.Context // of running commands; ends DrainTimeout later

	mu       sync.Mutex
	draining bool                  // guarded by mu
	sessions map[*session]struct{} // guarded by mu
}

// Serve answers clients until ctx ends, and returns after every goroutine it
// started. When ctx ends, idle connections go to Left, or are closed, requests that
// had arrived are answered, and running commands get their reply; after DrainTimeout their
// context ends too. It returns nil then, and an error only if the listener
// broke. It may be called again with the same listener.
func Serve(ctx context.Context, cfg Config) error {
	cfg.Limits = cfg.Limits.orDefaults()
	if cfg.Log == nil {
		cfg.Log = hclog.NewNullLogger()
	}
	commands, cancel := context.WithCancel(context.WithoutCancel(ctx))
	defer cancel()
	srv := &server{Config: cfg, stopping: ctx, commands: commands, sessions: make(map[*session]struct{})}

	if err := cfg.Listener.SetDeadline(time.Time{}); err != nil {
		return fmt.Errorf("management socket: %w", err)
	}
	stop := context.AfterFunc(ctx, func() { _ = cfg.Listener.SetDeadline(time.Unix(1, 0)) })
	defer stop()

	var wg sync.WaitGroup
	over := make(chan struct{}) // also when the listener breaks
	wg.Go(func() {
		for {
			select {
			case c := <-cfg.Waiting:
				srv.admit(c, &wg)
			case <-ctx.Done():
				return
			case <-over:
				return
			}
		}
	})
	err := srv.accept(&wg)
	close(over)
	srv.drain(&wg, cancel)
	return err
}

// accept takes connections until the server is stopping or the listener breaks.
func (srv *server) accept(wg *sync.WaitGroup) error {
	for {
		c, err := srv.Listener.AcceptUnix()
		switch {
		case srv.stopping.Err() != nil:
			if err == nil {
				srv.admit(c, wg) // it had left the queue already
			}
			return nil
		case errors.Is(err, net.ErrClosed):
			return fmt.Errorf("management socket: %w", err)
		case err != nil: // out of descriptors, most likely: this passes
			srv.Log.Warn("cannot accept on the management socket", "error", err)
			select {
			case <-srv.stopping.Done():
			case <-time.After(acceptPause):
			}
		default:
			srv.admit(c, wg)
		}
	}
}

// admit starts a session for c, or says why not and closes it.
func (srv *server) admit(c *net.UnixConn, wg *sync.WaitGroup) {
	s := &session{srv: srv, conn: c, in: bufio.NewReaderSize(c, 4096)}
	p, err := peerOf(c)
	if err == nil {
		err = p.admit(srv.OwnUID, srv.SocketGID)
	}
	s.peer = p
	if err == nil && !srv.add(s) {
		err = tako.Errorf(tako.CodeBusy, "Too many management connections (limit %d). Please retry shortly.", srv.Limits.MaxConnections)
	}
	if err != nil {
		srv.Log.Warn("management connection refused", "uid", p.UID, "pid", p.PID, "error", err)
		line, _ := errorLine(err)
		_ = s.write(line, refusalTimeout)
		_ = c.Close()
		return
	}
	wg.Go(func() {
		defer srv.remove(s)
		s.serve()
	})
}

func (srv *server) add(s *session) bool {
	srv.mu.Lock()
	defer srv.mu.Unlock()
	if len(srv.sessions) >= srv.Limits.MaxConnections {
		return false
	}
	srv.sessions[s] = struct{}{}
	return true
}

func (srv *server) remove(s *session) {
	srv.mu.Lock()
	delete(srv.sessions, s)
	srv.mu.Unlock()
	if s.left {
		srv.Left(s.conn)
		return
	}
	_ = s.conn.Close()
}

// drain ends all sessions, the idle ones at once.
func (srv *server) drain(wg *sync.WaitGroup, cancel context.CancelFunc) {
	srv.mu.Lock()
	srv.draining = true
	for s := range srv.sessions {
		if s.idle {
			srv.wakeUp(s)
		}
	}
	srv.mu.Unlock()

	done := make(chan struct{})
	go func() {
		wg.Wait()
		close(done)
	}()
	if waited(done, srv.Limits.DrainTimeout) {
		return
	}
	srv.Log.Warn("commands still run, ending them", "waited", srv.Limits.DrainTimeout)
	cancel()
	if waited(done, closeGrace) {
		return
	}
	srv.mu.Lock()
	for s := range srv.sessions {
		_ = s.conn.Close()
	}
	srv.mu.Unlock()
	<-done
}

func waited(done <-chan struct{}, limit time.Duration) bool {
	t := time.NewTimer(limit)
	defer t.Stop()
	select {
	case <-done:
		return true
	case <-t.C:
		return false
	}
}

// A session is one connection. Requests are answered one after another.
type session struct {
	srv  *server
	conn *net.UnixConn
	in   *bufio.Reader
	peer peer

	spent bool // bytes are left over that are no request
	left  bool // it goes on elsewhere
	idle  bool // it waits for a request; guarded by srv.mu
}

// wakeUp ends the wait of an idle session. Nothing that the peer sent is lost: what
// has arrived is still read here, or later by whom the connection is left to.
func (srv *server) wakeUp(s *session) {
	if srv.Left != nil {
		_ = s.conn.SetReadDeadline(time.Unix(1, 0))
	} else {
		_ = s.conn.CloseRead()
	}
}

// wait waits for the first byte of a request. Once the server drains it is an
// error, if none had arrived.
func (s *session) wait() error {
	if s.in.Buffered() > 0 {
		return nil
	}
	s.srv.mu.Lock()
	s.idle = true
	err := s.readBy(s.srv.Limits.IdleTimeout)
	if s.srv.draining {
		s.srv.wakeUp(s)
	}
	s.srv.mu.Unlock()
	if err == nil {
		_, err = s.in.Peek(1)
	}
	s.srv.mu.Lock()
	defer s.srv.mu.Unlock()
	s.idle = false
	s.left = s.srv.draining && s.srv.Left != nil && errors.Is(err, os.ErrDeadlineExceeded)
	return err
}

func (s *session) serve() {
	for {
		line, err := s.readLine()
		var bad *lineError
		switch {
		case errors.As(err, &bad):
			if s.refuse(bad) != nil || bad.last {
				return
			}
		case err != nil:
			return // gone, or idle for too long
		case !s.handle(line):
			return
		}
	}
}

// refuse answers what is not a request.
func (s *session) refuse(why error) error {
	return s.write(textLine{statusError, "Invalid command: " + why.Error(), tako.CodeInvalid}, s.srv.Limits.WriteTimeout)
}

// A lineError is the caller's fault, and told to it.
type lineError struct {
	text string
	last bool // the connection is of no more use
}

func (e *lineError) Error() string { return e.text }

// readLine returns the next line without its newline. A line that is too long is
// thrown away as it arrives. It returns io.EOF when there is no more.
func (s *session) readLine() ([]byte, error) {
	if err := s.wait(); err != nil {
		return nil, err
	}
	if err := s.readBy(s.srv.Limits.LineTimeout); err != nil {
		return nil, err
	}
	var line []byte
	size := 0
	for {
		part, err := s.in.ReadSlice('\n')
		if size += len(part); size <= MaxLine {
			line = append(line, part...)
		} else {
			line = nil
		}
		switch {
		case errors.Is(err, bufio.ErrBufferFull):
			continue
		case errors.Is(err, os.ErrDeadlineExceeded):
			return nil, &lineError{fmt.Sprintf("no newline within %v of the line's first byte", s.srv.Limits.LineTimeout), true}
		case err != nil && !errors.Is(err, io.EOF):
			return nil, err
		case size > MaxLine:
			return nil, &lineError{fmt.Sprintf("json line exceeds max length (%d > %d)", size, MaxLine), false}
		}
		// At the end of all, a line without a newline counts too.
		if n := len(line); n > 0 && line[n-1] == '\n' {
			line = line[:n-1]
		}
		return line, nil
	}
}

func (s *session) readBy(limit time.Duration) error {
	return s.conn.SetReadDeadline(time.Now().Add(limit))
}

// write sends one line.
func (s *session) write(v any, limit time.Duration) error {
	b, err := plainJSON(v)
	if err != nil {
		return err
	}
	if err := s.conn.SetWriteDeadline(time.Now().Add(limit)); err != nil {
		return fmt.Errorf("reply: %w", err)
	}
	if _, err := s.conn.Write(append(b, '\n')); err != nil {
		return fmt.Errorf("reply: %w", err)
	}
	return nil
}

// handle answers one request and says whether there may be another.
func (s *session) handle(line []byte) bool {
	cmd, a, err := decode(line)
	if err != nil {
		return s.refuse(err) == nil && (cmd == nil || !cmd.body)
	}
	log := s.srv.Log.With("command", cmd.name, "uid", s.peer.UID, "pid", s.peer.PID)
	if a.app != "" {
		log = log.With("app", cut(a.app))
	}
	began := time.Now()
	data, err := s.do(cmd, a)
	took := time.Since(began).Round(time.Millisecond)
	if err == nil {
		if cmd.label != "" || cmd.changes {
			log.Info("command done", "took", took)
		} else {
			log.Debug("command done", "took", took)
		}
		return s.write(okLine{statusOK, data}, s.srv.Limits.WriteTimeout) == nil && !s.spent
	}
	if s.srv.commands.Err() != nil && errors.Is(err, context.Canceled) {
		err = tako.Errorf(tako.CodeBusy, "The server is stopping; '%s' was not finished. Please retry shortly.", cmd.name)
	}
	reply, internal := errorLine(err)
	switch {
	case internal:
		log.Error("command went wrong", "took", took, "error", err)
	case cmd.label != "" || cmd.changes:
		log.Warn("command refused or failed", "took", took, "error", err)
	default:
		log.Debug("command refused or failed", "took", took, "error", err)
	}
	return s.write(reply, s.srv.Limits.WriteTimeout) == nil && !cmd.body
}

// do checks a request and runs it. A progress line that the client does not read
// never holds up the command.
func (s *session) do(cmd *command, a *args) (any, error) {
	k, err := cmd.check(a, s)
	if err != nil {
		return nil, err
	}
	if !a.progress {
		return cmd.run(s.srv.commands, k)
	}
	texts, done, flushed := make(chan string, ProgressQueue), make(chan struct{}), make(chan struct{})
	k.progress = func(text string) {
		select {
		case texts <- text:
		default: // the reader is slow; the last line is what counts
		}
	}
	go func() {
		defer close(flushed)
		s.tell(texts, done)
	}()
	data, err := cmd.run(s.srv.commands, k)
	close(done)
	<-flushed
	return data, err
}

// tell sends progress lines until done, and then those that wait.
func (s *session) tell(texts <-chan string, done <-chan struct{}) {
	broken := false
	send := func(text string) {
		if !broken {
			broken = s.write(textLine{Status: statusProgress, Message: cutTo(text, MaxProgressText)}, s.srv.Limits.WriteTimeout) != nil
		}
	}
	for {
		select {
		case text := <-texts:
			send(text)
			continue
		case <-done:
		}
		for {
			select {
			case text := <-texts:
				send(text)
			default:
				return
			}
		}
	}
}

// logs streams lines. With Follow it ends, without an error, when the client
// sends or closes anything, or the server is stopping.
func (s *session) logs(ctx context.Context, r LogsRequest) error {
	send := func(l LogLine) error {
		return s.write(struct {
			Status string  `json:"status"`
			Data   LogLine `json:"data"`
		}{statusLine, l}, s.srv.Limits.WriteTimeout)
	}
	if !r.Follow {
		return s.srv.Backend.Logs(ctx, r, send)
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(s.srv.stopping, cancel)()
	if err := s.conn.SetReadDeadline(time.Time{}); err != nil {
		return fmt.Errorf("follow: %w", err)
	}
	watched := make(chan struct{})
	go func() {
		defer close(watched)
		defer cancel()
		_, _ = s.in.Peek(1) // whatever comes, it ends the stream
	}()
	err := s.srv.Backend.Logs(ctx, r, send)
	_ = s.conn.SetReadDeadline(time.Unix(1, 0))
	<-watched
	if ctx.Err() != nil && errors.Is(err, ctx.Err()) {
		return nil
	}
	return err
}
