package h2

import (
	"crypto/tls"
	"net"
	"os"
	"testing"
	"io"
	"net/http"
	"net/http/httptest"

	"github.com/hashicorp/go-hclog"
	"tako/internal/proxy/message"
)

type fn func(x message.Exchange)

func (f fn) Handle(x message.Exchange) { f(x) }

func TestServeOutside(t *testing.T) {
	addr := os.Getenv("H2_LISTEN")
	if addr == "" {
		t.Skip()
	}
	ts := httptest.NewUnstartedServer(http.NotFoundHandler())
	ts.StartTLS()
	cert := ts.TLS.Certificates[0]
	ts.Close()
	body := make([]byte, 1024)
	for i := range body { body[i] = 'a' }
	srv := &Server{Log: hclog.New(&hclog.LoggerOptions{Level: hclog.LevelFromString(os.Getenv("H2_LOG"))}), Handler: fn(func(x message.Exchange) {
		buf := make([]byte, 4096)
		for x.Request().Length != 0 {
			if _, err := x.ReadBody(buf); err != nil {
				if err != io.EOF { x.Abort(); return }
				break
			}
		}
		if x.Begin(&message.Response{Status: 200, Length: int64(len(body)), HasLength: true, Fields: []message.Field{{Name: []byte("Content-Type"), Value: []byte("text/plain"), ID: message.ContentType}, {Name: []byte("Server"), Value: []byte("tako"), ID: message.Server}}}) != nil { return }
		if _, err := x.Write(body); err != nil { return }
		x.End(nil)
	})}
	l, err := net.Listen("tcp", addr)
	if err != nil { t.Fatal(err) }
	for {
		nc, err := l.Accept()
		if err != nil { t.Fatal(err) }
		go func() {
			c := tls.Server(nc, &tls.Config{Certificates: []tls.Certificate{cert}, NextProtos: []string{"h2"}})
			if c.Handshake() != nil { nc.Close(); return }
			srv.Serve(c, &message.Client{Secure: true})
		}()
	}
}
