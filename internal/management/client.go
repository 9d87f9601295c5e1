package management

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"sync"

	"golang.org/x/sys/unix"

	"tako/internal/tako"
)

// A Request is any command, with the fields that it has. A nil pointer, slice or
// map is absent.
type Request struct {
	Command         string            `json:"command"`
	ProtocolVersion *uint32           `json:"protocol_version,omitzero"`
	App             string            `json:"app,omitzero"`
	Version         string            `json:"version,omitzero"`
	Path            string            `json:"path,omitzero"`
	Owner           *string           `json:"owner,omitzero"`
	Routes          []string          `json:"routes,omitzero"`
	Secrets         map[string]string `json:"secrets,omitzero"`
	Instances       *uint8            `json:"instances,omitzero"`
	IdleTimeout     *uint32           `json:"idle_timeout,omitzero"`
	Lines           *uint32           `json:"lines,omitzero"`
	Merge           bool              `json:"merge,omitzero"`
	Force           bool              `json:"force,omitzero"`
	Follow          bool              `json:"follow,omitzero"`
	Progress        bool              `json:"progress,omitzero"`
}

// A Client speaks with a server over one connection, one command after another.
// Its methods may be called from any goroutine. When a context ends in the
// middle of a command the connection is closed, and the Client of no more use.
type Client struct {
	mu sync.Mutex // held over a command
	rw io.ReadWriteCloser
	in *bufio.Reader // guarded by mu

	close func() error
}

// NewClient speaks over rw, which it owns from here on: the standard streams of
// an ssh, for instance. Close of rw must end a Read and a Write under way.
func NewClient(rw io.ReadWriteCloser) *Client {
	return &Client{rw: rw, in: bufio.NewReaderSize(rw, 64<<10), close: sync.OnceValue(rw.Close)}
}

// Dial connects to the management socket at path. The error says what to do.
func Dial(ctx context.Context, path string) (*Client, error) {
	var d net.Dialer
	c, err := d.DialContext(ctx, "unix", path)
	switch {
	case err == nil:
		return NewClient(c), nil
	case ctx.Err() != nil:
		return nil, fmt.Errorf("connect to %s: %w", path, ctx.Err())
	case errors.Is(err, unix.ECONNREFUSED), errors.Is(err, unix.ENOENT):
		return nil, fmt.Errorf("tako-master does not answer at %s: is it running? See `systemctl status tako-server`, or name its socket with --socket: %w", path, err)
	case errors.Is(err, unix.EACCES) && linkInSticky(path):
		return nil, fmt.Errorf("may not connect to %s: it is a link in a directory that anybody may write to, which the system follows for its owner only; name the socket that it points to: %w", path, err)
	case errors.Is(err, unix.EACCES):
		return nil, fmt.Errorf("may not connect to %s: become a member of the socket's group, or try again with sudo: %w", path, err)
	case errors.Is(err, unix.EINVAL):
		return nil, tooLong(path, err)
	}
	return nil, fmt.Errorf("connect to %s: %w", path, err)
}

func linkInSticky(path string) bool {
	link, err := os.Lstat(path)
	if err != nil || link.Mode()&os.ModeSymlink == 0 {
		return false
	}
	dir, err := os.Stat(filepath.Dir(path))
	return err == nil && dir.Mode()&os.ModeSticky != 0
}

// Close ends the connection. It may come twice, and unblocks a command.
func (c *Client) Close() error { return c.close() }

// Do sends a request, a Request or anything that JSON makes the like of, and
// reads the reply's data into into, unless that is nil. A reply that is an error
// is a *tako.Error. onProgress, which may be nil, is given the progress lines
// that a request with Progress asks for.
func (c *Client) Do(ctx context.Context, request any, onProgress func(string), into any) error {
	return c.command(ctx, func() error {
		if err := c.send(request); err != nil {
			// It may have been refused before it was read: then the reason is there.
			if told, ok := errors.AsType[*tako.Error](c.result(nil, nil, nil)); ok {
				return told
			}
			return err
		}
		return c.result(onProgress, nil, into)
	})
}

// Upload sends an archive (tar in zstd) as a new release. It closes the
// connection if r fails.
func (c *Client) Upload(ctx context.Context, app, version string, r io.Reader) (UploadResult, error) {
	var res UploadResult
	err := c.command(ctx, func() error {
		err := c.send(Request{Command: "upload", App: app, Version: version})
		if err == nil {
			var read error
			if read, err = writeChunks(c.rw, r); read != nil {
				_ = c.Close()
				return read
			}
		}
		// If the server stopped reading, its reason is there all the same.
		replied := c.result(nil, nil, &res)
		if _, told := errors.AsType[*tako.Error](replied); told || err == nil {
			return replied
		}
		return err
	})
	return res, err
}

// Logs gives an app's newest lines to line, and with r.Follow new ones until ctx
// ends, which is not an error then. An error of line closes the connection.
func (c *Client) Logs(ctx context.Context, r LogsRequest, line func(LogLine) error) error {
	lines := uint32(max(r.Lines, 0)) // the server bounds it
	err := c.command(ctx, func() error {
		if err := c.send(Request{Command: "logs", App: string(r.App), Lines: &lines, Follow: r.Follow}); err != nil {
			return err
		}
		return c.result(nil, line, nil)
	})
	if r.Follow && ctx.Err() != nil {
		return nil //nolint:nilerr // said above
	}
	return err
}

func (c *Client) command(ctx context.Context, run func() error) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	defer context.AfterFunc(ctx, func() { _ = c.Close() })()
	err := run()
	if err != nil && ctx.Err() != nil {
		return ctx.Err()
	}
	return err
}

func (c *Client) send(request any) error {
	b, err := plainJSON(request)
	if err != nil {
		return err
	}
	if _, err := c.rw.Write(append(b, '\n')); err != nil {
		return fmt.Errorf("send the command: %w", err)
	}
	return nil
}

// result reads lines until the last one of a command.
func (c *Client) result(onProgress func(string), onLine func(LogLine) error, into any) error {
	for {
		b, err := c.readLine()
		if err != nil {
			return err
		}
		var l struct {
			Status  string          `json:"status"`
			Data    json.RawMessage `json:"data"`
			Message string          `json:"message"`
			Code    tako.Code       `json:"code"`
		}
		if err := json.Unmarshal(b, &l); err != nil {
			return fmt.Errorf("read the reply: %w", err)
		}
		switch l.Status {
		case statusProgress:
			if onProgress != nil {
				onProgress(l.Message)
			}
		case statusLine:
			var line LogLine
			if err := json.Unmarshal(l.Data, &line); err != nil {
				return fmt.Errorf("read the reply: %w", err)
			}
			if onLine == nil {
				continue
			}
			if err := onLine(line); err != nil {
				_ = c.Close()
				return err
			}
		case statusOK:
			if into == nil {
				return nil
			}
			if err := json.Unmarshal(l.Data, into); err != nil {
				return fmt.Errorf("read the reply: %w", err)
			}
			return nil
		case statusError:
			if l.Code == "" { // a server from before codes
				l.Code = tako.CodeFailed
			}
			return &tako.Error{Code: l.Code, Message: l.Message}
		default:
			return fmt.Errorf("read the reply: unknown status %q; is takoctl as new as the server?", cut(l.Status))
		}
	}
}

func (c *Client) readLine() ([]byte, error) {
	var line []byte
	for {
		part, err := c.in.ReadSlice('\n')
		if len(line)+len(part) > MaxReply {
			return nil, fmt.Errorf("read the reply: a line longer than %d bytes", MaxReply)
		}
		line = append(line, part...)
		switch {
		case err == nil:
			return bytes.TrimSuffix(line, []byte("\n")), nil
		case errors.Is(err, io.EOF):
			return nil, fmt.Errorf("the server closed the connection without a reply: %w", io.ErrUnexpectedEOF)
		case !errors.Is(err, bufio.ErrBufferFull):
			return nil, fmt.Errorf("read the reply: %w", err)
		}
	}
}
