package upstream

import (
	"io"
	"net"
	"sync"
)

// A Tunnel is a connection whose bytes are no longer HTTP. Read returns first
// what had already arrived. Reads and writes may be two goroutines'; Close
// anybody's.
type Tunnel struct {
	conn net.Conn
	r    io.Reader
	drop func()
	once sync.Once
}

// Read reads what the instance sends.
func (t *Tunnel) Read(b []byte) (int, error) { return t.r.Read(b) }

// Write sends to the instance.
func (t *Tunnel) Write(b []byte) (int, error) { return t.conn.Write(b) }

// CloseWrite tells the instance that nothing more will come.
func (t *Tunnel) CloseWrite() error {
	if h, ok := t.conn.(interface{ CloseWrite() error }); ok {
		return h.CloseWrite()
	}
	return t.Close()
}

// Close ends the tunnel. It may come twice.
func (t *Tunnel) Close() error {
	t.once.Do(t.drop)
	return nil
}
