package proxy

import (
	"context"
	"errors"
	"io"
	"net/http"
	"sync"
	"time"

	"tako/internal/proxy/message"
	"tako/internal/proxy/upstream"
)

// CloseTime is what a WebSocket gets to be closed in good order, when the time
// for streams is over.
const CloseTime = time.Second

// HalfTime is how long a client may go on after the instance has ended its half
// of a tunnel.
const HalfTime = 60 * time.Second

// tunnel is a connection with a client and one with an instance whose bytes are
// passed on as they are.
type tunnel struct {
	client   message.Stream
	instance *upstream.Tunnel
	// frames follows what goes to the client; nil if it is no WebSocket.
	frames *frames

	mu sync.Mutex // held over each write to the client
	// The close that comes if the client does not take a proper one; guarded by mu.
	late       *time.Timer
	lateClosed chan struct{}
	closing    bool // guarded by mu: a Close frame goes out after the frame under way
	closed     bool // guarded by mu: it did, and nothing may follow
}

// tunnel passes bytes in both directions until both have ended, or the flight is
// cut.
func (h *handler) tunnel(fl *flight, in *upstream.Incoming, id []byte) {
	fl.becomeStream()
	defer in.Tunnel.Close()
	resp := &in.Response
	isWebSocket := message.EqualFold(resp.Upgrade, "websocket") && resp.Get(message.SecWebSocketAccept) != nil
	responseFields(resp, id)
	if fl.x.Request().Extended {
		resp.Status, resp.Upgrade = http.StatusOK, nil
		resp.Fields = without(resp.Fields, message.SecWebSocketAccept)
	}
	if err := fl.x.Begin(resp); err != nil {
		fl.x.Abort()
		return
	}
	stream, err := fl.x.Tunnel()
	if err != nil {
		h.log.Debug("connection cannot be taken over", "app", fl.app.id, "error", err)
		fl.x.Abort()
		return
	}
	defer stream.Close()
	t := &tunnel{client: stream, instance: in.Tunnel}
	if isWebSocket {
		t.frames = &frames{}
	}
	ended := make(chan struct{})
	stop := context.AfterFunc(fl.Context(), func() {
		defer close(ended)
		t.end(errors.Is(fl.Cause(), errCut))
	})
	// Nothing of the exchange may be touched once the handler has returned: what is
	// under way, or to come, is waited for or called off.
	defer func() {
		t.close()
		if !stop() {
			<-ended
		}
		t.forget()
	}()

	up := make(chan struct{})
	go func() {
		defer close(up)
		if t.up() != nil {
			t.close()
			return
		}
		_ = t.instance.CloseWrite()
	}()
	if t.down() != nil {
		t.close()
	} else if t.client.CloseWrite() != nil {
		t.close()
	}
	wait := time.NewTimer(HalfTime)
	defer wait.Stop()
	select {
	case <-up:
	case <-wait.C:
		t.close()
		<-up
	}
}

// forget calls off the close to come, or waits for it.
func (t *tunnel) forget() {
	t.mu.Lock()
	late, closed := t.late, t.lateClosed
	t.mu.Unlock()
	if late != nil && !late.Stop() {
		<-closed
	}
}

func without(fields []message.Field, id message.ID) []message.Field {
	to := fields[:0]
	for _, f := range fields {
		if f.ID != id {
			to = append(to, f)
		}
	}
	return to
}

// up passes on what the client sends, until its end.
func (t *tunnel) up() error {
	return pump(t.client, func(b []byte) error {
		_, err := t.instance.Write(b)
		return err
	})
}

// down passes on what the instance sends, until its end.
func (t *tunnel) down() error { return pump(t.instance, t.write) }

// tunnelBuffer is small: a tunnel holds two for as long as it lasts.
const tunnelBuffer = 8 << 10

var tunnelBuffers = sync.Pool{New: func() any { b := make([]byte, tunnelBuffer); return &b }}

func pump(from io.Reader, to func([]byte) error) error {
	buf := tunnelBuffers.Get().(*[]byte)
	defer tunnelBuffers.Put(buf)
	for {
		n, err := from.Read(*buf)
		if n > 0 {
			if werr := to((*buf)[:n]); werr != nil {
				return werr
			}
		}
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

// write passes b on to the client, as far as it may still be.
func (t *tunnel) write(b []byte) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.closed {
		return nil
	}
	whole := -1
	if t.frames != nil {
		whole = t.frames.follow(b)
	}
	last := t.closing && whole >= 0
	if last {
		b = b[:whole]
	}
	_, err := t.client.Write(b)
	if err == nil && last {
		err = t.sayCloseLocked()
	}
	return err
}

// sayCloseLocked sends a Close frame. The client answers with one, which goes to
// the instance: so each side sees the other close.
func (t *tunnel) sayCloseLocked() error {
	t.closed = true
	if t.frames.closed {
		return nil // the instance has said it
	}
	_, err := t.client.Write(closeGoingAway)
	return err
}

// end ends the tunnel at once; or properly, within CloseTime, if it is a
// WebSocket.
func (t *tunnel) end(properly bool) {
	if !properly || t.frames == nil {
		t.close()
		return
	}
	// Not under mu: whoever holds it may wait for the client.
	closed := make(chan struct{})
	late := time.AfterFunc(CloseTime, func() {
		defer close(closed)
		t.close()
	})
	t.mu.Lock()
	defer t.mu.Unlock()
	t.late, t.lateClosed = late, closed
	if t.closing = true; !t.closed && t.frames.between() {
		_ = t.sayCloseLocked() // an error shows in the copying too
	}
}

// close closes both connections. It may come twice.
func (t *tunnel) close() {
	_ = t.instance.Close()
	_ = t.client.Close()
}
