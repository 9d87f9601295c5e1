package proxy

import (
	"context"
	"io"
	"net"
	"net/http"
	"strings"
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

// tunnel passes bytes in both directions until both have ended, or ctx.
func (h *handler) tunnel(ctx context.Context, rc *http.ResponseController, fl *flight, resp *upstream.Response, id string) {
	fl.becomeStream()
	defer resp.Tunnel.Close() // it returns none
	if !fl.detach() {
		panic(http.ErrAbortHandler)
	}
	conn, brw, err := rc.Hijack()
	if err != nil {
		h.log.Error("connection cannot be taken over", "app", fl.app.id, "error", err)
		panic(http.ErrAbortHandler)
	}
	defer conn.Close() // nothing is to be done about it
	stop := context.AfterFunc(ctx, func() {
		_ = conn.Close()
		_ = resp.Tunnel.Close()
	})
	defer stop()

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
	_ = conn.SetDeadline(time.Time{})

	up := make(chan struct{})
	go func() {
		defer close(up)
		if _, err := brw.WriteTo(resp.Tunnel); err != nil {
			_ = resp.Tunnel.Close()
			_ = conn.Close()
			return
		}
		_ = resp.Tunnel.CloseWrite()
	}()
	if _, err := io.Copy(conn, resp.Tunnel); err != nil {
		_ = resp.Tunnel.Close()
		_ = conn.Close()
	} else {
		closeWrite(conn)
	}
	<-up
}

func closeWrite(c net.Conn) {
	if h, ok := c.(interface{ CloseWrite() error }); ok && h.CloseWrite() == nil {
		return
	}
	_ = c.Close()
}
