package h2

import (
	"errors"
	"io"
	"strings"
	"testing"

	"golang.org/x/net/http2"

	"tako/internal/proxy/message"
)

// connect are the fields of a request for a WebSocket (RFC 8441).
var connect = base("CONNECT", "/chat", ":protocol", "websocket", "sec-websocket-version", "13")

// echo sends back what comes, to the end.
func echo(x message.Exchange) {
	r := x.Request()
	if !r.Extended || string(r.Upgrade) != "websocket" || r.Length != 0 || string(r.Method) != "CONNECT" {
		x.Abort()
		return
	}
	if x.Begin(&message.Response{Status: 101, Fields: []message.Field{field("Connection", "Upgrade"), field("Upgrade", "websocket"), field("X", "y")}}) != nil {
		return
	}
	s, err := x.Tunnel()
	if err != nil {
		return
	}
	x.Lasts()
	_, err = io.Copy(s, s)
	if err == nil {
		_ = s.CloseWrite()
	}
	_ = s.Close()
}

func TestWebSocketIsAStreamOfBytes(t *testing.T) {
	p := meet(t, &Server{Handler: handlerFunc(echo)})
	p.ask(1, false, connect...)
	e := p.await(http2.FrameHeaders, 1)
	if e.get(":status") != "200" || e.get("x") != "y" || e.get("upgrade")+e.get("connection")+e.get("content-length") != "" || e.ends() {
		t.Fatalf("got %v", e)
	}
	for _, s := range []string{"a", "bc", strings.Repeat("d", frameSize)} {
		p.data(1, false, s)
		var got strings.Builder
		for got.Len() < len(s) {
			got.Write(p.await(http2.FrameData, 1).payload)
		}
		if got.String() != s {
			t.Errorf("got %d bytes, want %d", got.Len(), len(s))
		}
	}
	p.data(1, true, "bye")
	var got strings.Builder
	for {
		e := p.await(http2.FrameData, 1)
		got.Write(e.payload)
		if e.ends() {
			break
		}
	}
	if got.String() != "bye" {
		t.Errorf("got %q", got.String())
	}
	p.ask(3, true, base("GET", "/")...) // no more of the first; the handler aborts this one
	p.wantReset(3, http2.ErrCodeInternal)
	if len(p.stash) > 0 {
		t.Errorf("got %v after the end", p.stash)
	}
}

func TestServerIsToldOfTunnels(t *testing.T) {
	p := quietly(t, &Server{Handler: handlerFunc(echo)})
	p.raw([]byte(http2.ClientPreface))
	p.do(p.fr.WriteSettings())
	e := p.await(http2.FrameSettings, 0)
	for b := e.payload; len(b) >= 6; b = b[6:] {
		if http2.SettingID(uint16(b[0])<<8|uint16(b[1])) == http2.SettingEnableConnectProtocol && b[5] == 1 {
			return
		}
	}
	t.Errorf("no ENABLE_CONNECT_PROTOCOL in %v", e.payload)
}

func TestTunnelEndsAsItsPeersDo(t *testing.T) {
	end, done := make(chan string), make(chan struct{}, 1)
	p := serve(t, func(x message.Exchange) {
		_ = x.Begin(&message.Response{Status: 200})
		s, err := x.Tunnel()
		if err != nil {
			t.Error(err)
			return
		}
		switch <-end {
		case "close":
			_ = s.Close()
			if _, err := s.Read(make([]byte, 1)); err == nil || errors.Is(err, io.EOF) {
				t.Errorf("Read after Close says %v", err)
			}
			if _, err := s.Write([]byte("x")); err == nil {
				t.Error("a write after Close")
			}
		case "end, then close":
			_ = s.CloseWrite()
			_ = s.CloseWrite()
			if _, err := s.Write([]byte("x")); err == nil {
				t.Error("a write after CloseWrite")
			}
			_ = s.Close()
			_ = s.Close()
		case "return":
		case "read":
			if _, err := s.Read(make([]byte, 1)); !errors.Is(err, errReset) {
				t.Errorf("got %v", err)
			}
		}
		done <- struct{}{}
	})
	id := uint32(1)
	for how, code := range map[string]http2.ErrCode{"close": http2.ErrCodeCancel, "return": http2.ErrCodeCancel, "end, then close": http2.ErrCodeNo, "read": 99} {
		p.ask(id, false, connect...)
		p.await(http2.FrameHeaders, id)
		if how == "read" {
			p.do(p.fr.WriteRSTStream(id, http2.ErrCodeCancel))
		}
		end <- how
		switch how {
		case "read":
		case "end, then close":
			if e := p.await(http2.FrameData, id); !e.ends() {
				t.Errorf("%s: got %v", how, e)
			}
			fallthrough
		default:
			p.wantReset(id, code)
		}
		<-done
		id += 2
	}
}

func TestSilenceInATunnelIsNoFault(t *testing.T) {
	inTime(t, func(t *testing.T) {
		p := serve(t, echo)
		p.ask(1, false, connect...)
		p.await(http2.FrameHeaders, 1)
		done := make(chan struct{})
		got := make(chan event, 1)
		go func() {
			defer close(done)
			fr := p.fork().fr
			for e := range p.events {
				switch {
				case e.kind == http2.FramePing && e.flags == 0:
					_ = fr.WritePing(true, [8]byte(e.payload))
				case e.kind == http2.FrameData:
					got <- e
					return
				}
			}
		}()
		wait(3 * 3600)
		p.data(1, false, "still here")
		if e := <-got; string(e.payload) != "still here" {
			t.Errorf("got %v", e)
		}
		<-done
	})
}

func TestRefusedTunnelIsAnAnswer(t *testing.T) {
	p := serve(t, func(x message.Exchange) {
		_ = x.Begin(&message.Response{Status: 403, Length: 2, HasLength: true})
		_, _ = x.Write([]byte("no"))
		_ = x.End(nil)
	})
	p.ask(1, false, connect...)
	if a := p.hear(1); a.status != "403" || a.body != "no" || a.head.get("content-length") != "2" || !a.ended {
		t.Errorf("got %+v", a)
	}
}
