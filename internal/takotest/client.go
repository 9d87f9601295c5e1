package takotest

import (
	"context"
	"crypto/tls"
	"io"
	"net"
	"net/http"
	"strconv"
	"strings"
	"time"
)

// A Protocol is what a Client speaks.
type Protocol string

// The protocols.
const (
	HTTP1 Protocol = "http/1.1" // plain
	TLS1  Protocol = "https"    // HTTP/1.1 over TLS
	H2    Protocol = "h2"       // HTTP/2 over TLS
)

// Client makes a client for this server's apps: it finds every host on the
// loopback address, believes every certificate, follows no redirect and speaks
// exactly p. The caller closes its idle connections.
func (s *Server) Client(p Protocol) *http.Client {
	transport := &http.Transport{
		DialContext: func(ctx context.Context, network, addr string) (net.Conn, error) {
			_, port, err := net.SplitHostPort(addr)
			if err != nil {
				return nil, err
			}
			return new(net.Dialer).DialContext(ctx, network, net.JoinHostPort("127.0.0.1", port))
		},
		TLSClientConfig:     &tls.Config{InsecureSkipVerify: true},
		Protocols:           new(http.Protocols),
		MaxIdleConnsPerHost: 64,
	}
	transport.Protocols.SetHTTP1(p != H2)
	transport.Protocols.SetHTTP2(p == H2)
	return &http.Client{
		Transport:     transport,
		Timeout:       AskWait,
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
}

// URL is the address of hostPath, such as "blog.localhost/a", by protocol p.
func (s *Server) URL(p Protocol, hostPath string) string {
	scheme, port := "https", s.HTTPS
	if p == HTTP1 {
		scheme, port = "http", s.HTTP
	}
	host, path, _ := strings.Cut(hostPath, "/")
	return scheme + "://" + net.JoinHostPort(host, strconv.Itoa(port)) + "/" + path
}

// Answer is a response with its body read.
type Answer struct {
	*http.Response
	Text string
	Took time.Duration
}

// Get asks for hostPath once, on a connection of its own.
func (s *Server) Get(ctx context.Context, p Protocol, hostPath string) (Answer, error) {
	client := s.Client(p)
	defer client.CloseIdleConnections()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, s.URL(p, hostPath), nil)
	if err != nil {
		return Answer{}, err
	}
	return Do(client, req)
}

// Do sends the request and reads the whole answer.
func Do(client *http.Client, req *http.Request) (Answer, error) {
	began := time.Now()
	res, err := client.Do(req)
	if err != nil {
		return Answer{}, err
	}
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	return Answer{Response: res, Text: string(body), Took: time.Since(began)}, err
}
