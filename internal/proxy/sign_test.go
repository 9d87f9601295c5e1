package proxy

import (
	"crypto/tls"
	"io"
	"net"
	"net/http"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"tako/internal/tako"
	"tako/internal/wire"
)

// signing starts a proxy for blog.test whose signatures are made by sign.
func signing(t *testing.T, sign func(*master, *wire.Conn, wire.Message)) *master {
	m := greeted(t)
	m.configure()
	m.side(&wire.Signer{}, wire.LinkSigning, func(c *wire.Conn, msg wire.Message) { sign(m, c, msg) })
	cert, _ := m.certificate("blog", true, "blog.test")
	m.send(cert)
	m.send(&wire.Serve{})
	expect[*wire.Ready](m)
	m.app(wire.App{PlainHTTP: true, Instances: []wire.Upstream{served(t, func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "here") })}})
	return m
}

// shake does a handshake.
func (m *master) shake(version uint16) error {
	d := tls.Dialer{NetDialer: &net.Dialer{Timeout: patience}, Config: &tls.Config{InsecureSkipVerify: true, ServerName: "blog.test", MaxVersion: version}} //nolint:gosec // a test
	c, err := d.DialContext(m.t.Context(), "tcp", m.tls)
	if err == nil {
		_ = c.Close()
	}
	return err
}

func TestHandshakesWaitForTheNextSigner(t *testing.T) {
	const asking = 20
	asked := make(chan struct{}, asking)
	m := signing(t, func(*master, *wire.Conn, wire.Message) { asked <- struct{}{} }) // and never answers
	var all sync.WaitGroup
	for range asking {
		all.Go(func() {
			if err := m.shake(tls.VersionTLS13); err != nil {
				t.Error(err)
			}
		})
	}
	for range asking {
		<-asked
	}
	m.side(&wire.Signer{}, wire.LinkSigning, m.sign) // which closes the one before
	go func() {
		for range asking {
			<-m.signs
		}
	}()
	all.Wait()
}

func TestARefusedSignatureIsAskedForAgain(t *testing.T) {
	for _, version := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
		for refusals, want := range []bool{true, true, false} {
			var n atomic.Int64
			m := signing(t, func(m *master, c *wire.Conn, msg wire.Message) {
				if n.Add(1) <= int64(refusals) {
					_ = c.ReplyError(msg.ID, tako.Errorf(tako.CodeBusy, "not now"))
					return
				}
				m.sign(c, msg)
			})
			if err := m.shake(version); (err == nil) != want {
				t.Errorf("after %d refusals: %v", refusals, err)
			}
		}
	}
}

// A master that does not read for a while: more signatures are asked for than its
// socket holds, and everybody else is served meanwhile.
func TestASignerThatDoesNotReadStopsNobodyElse(t *testing.T) {
	const asking = 500
	reads := make(chan struct{})
	m := signing(t, func(m *master, c *wire.Conn, msg wire.Message) {
		<-reads
		m.sign(c, msg)
	})
	go func() {
		for range asking {
			<-m.signs
		}
	}()
	var all sync.WaitGroup
	for range asking {
		all.Go(func() {
			if err := m.shake(tls.VersionTLS13); err != nil {
				t.Error(err)
			}
		})
	}
	time.Sleep(100 * time.Millisecond) // or fewer wait, which is no matter
	client := &http.Client{Timeout: time.Second}
	defer client.CloseIdleConnections()
	for range 200 {
		req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://"+m.plain+"/", nil)
		check0(t, err)
		req.Host = "blog.test"
		resp, err := client.Do(req)
		if got := text(t, resp, err); got != "here" {
			t.Errorf("got %q", got)
		}
	}
	close(reads)
	all.Wait()
}
