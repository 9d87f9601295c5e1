package proxy

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"time"

	"golang.org/x/net/http/httpguts"

	"tako/internal/proxy/upstream"
)

// upgradeOf returns the protocol that a request asks to switch to, "" for none.
// HTTP/2 in the clear is none: it would pass by everything here.
func upgradeOf(r *http.Request) string {
	protocols := r.Header["Upgrade"]
	if r.ProtoMajor != 1 || r.ProtoMinor < 1 || r.ContentLength != 0 || len(protocols) != 1 ||
		!httpguts.HeaderValuesContainsToken(r.Header["Connection"], "upgrade") {
		return ""
	}
	if p := protocols[0]; !httpguts.ValidHeaderFieldName(strings.ReplaceAll(p, "/", "-")) || strings.HasPrefix(strings.ToLower(p), "h2") {
		return ""
	}
	return protocols[0]
}

// CloseTime is what a WebSocket gets to be closed in good order, when the time
// for streams is over.
const CloseTime = time.Second

// tunnel is a connection with a client and one with an instance whose bytes are
// passed on as they are.
type tunnel struct {
	client   net.Conn
	instance *upstream.Tunnel
	// frames follows what goes to the client; nil if it is no WebSocket.
	frames *frames

	mu      sync.Mutex // held over each write to the client
	renewed time.Time  // guarded by mu: when its deadline was set
	closing bool       // guarded by mu: a Close frame goes out after the frame under way
	closed  bool       // guarded by mu: it did, and nothing may follow
}

// isWebSocket: the instance agreed to speak WebSocket.
func isWebSocket(h http.Header) bool {
	return strings.EqualFold(h.Get("Upgrade"), "websocket") && h.Get("Sec-Websocket-Accept") != ""
}

// tunnel passes bytes in both directions until both have ended, or ctx.
func (h *handler) tunnel(ctx context.Context, rc *http.ResponseController, fl *flight, resp *upstream.Response, id string) {
	fl.becomeStream()
	defer resp.Tunnel.Close()
	if !fl.detach() {
		panic(http.ErrAbortHandler)
	}
	conn, brw, err := rc.Hijack()
	if err != nil {
		h.log.Error("connection cannot be taken over", "app", fl.app.id, "error", err)
		panic(http.ErrAbortHandler)
	}
	defer conn.Close()
	t := &tunnel{client: conn, instance: resp.Tunnel}
	if isWebSocket(resp.Header) {
		t.frames = &frames{}
	}

	header := make(http.Header)
	responseHeader(header, resp.Header)
	delete(header, "Content-Type")
	delete(header, "Content-Length")
	if v := resp.Header["Content-Type"]; v != nil {
		header["Content-Type"] = v
	}
	header[requestID] = []string{id}
	header["Connection"] = []string{"Upgrade"}
	header["Upgrade"] = resp.Header["Upgrade"]
	_ = conn.SetWriteDeadline(time.Now().Add(ReplyTime))
	_, _ = brw.WriteString("HTTP/1.1 101 Switching Protocols\r\n")
	_ = header.Write(brw)
	_, _ = brw.WriteString("\r\n")
	if brw.Flush() != nil {
		return
	}
	_ = conn.SetReadDeadline(time.Time{})
	stop := context.AfterFunc(ctx, func() { t.end(errors.Is(context.Cause(ctx), errCut)) })
	defer stop()

	up := make(chan struct{})
	go func() {
		defer close(up)
		if _, err := brw.WriteTo(t.instance); err != nil {
			t.close()
			return
		}
		_ = t.instance.CloseWrite()
	}()
	if t.down() != nil {
		t.close()
	} else {
		closeWrite(conn)
	}
	<-up
}

// down passes on what the instance sends, until its end.
func (t *tunnel) down() error {
	buf := replyBuffers.Get().(*[]byte)
	defer replyBuffers.Put(buf)
	for {
		n, err := t.instance.Read(*buf)
		if n > 0 {
			if werr := t.write((*buf)[:n]); werr != nil {
				return werr
			}
		}
		if err == io.EOF { //nolint:errorlint // readers return it bare
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
	if now := time.Now(); now.Sub(t.renewed) > deadlineSlack {
		_ = t.client.SetWriteDeadline(now.Add(ReplyTime))
		t.renewed = now
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
	time.AfterFunc(CloseTime, t.close)
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.closing = true; !t.closed && t.frames.between() {
		_ = t.sayCloseLocked() // an error shows in the copying too
	}
}

// close closes both connections. It may come twice.
func (t *tunnel) close() {
	_ = t.instance.Close()
	_ = t.client.Close()
}

func closeWrite(c net.Conn) {
	if h, ok := c.(interface{ CloseWrite() error }); ok && h.CloseWrite() == nil {
		return
	}
	_ = c.Close()
}
