package proxy

import (
	"bytes"
	"errors"
	"io"
	"net"
	"os"
	"sync"
	"testing"
	"time"
)

// tcpPair returns both ends of a connection.
func tcpPair(t *testing.T) (near, far net.Conn) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	check0(t, err)
	defer l.Close()
	near, err = net.Dial("tcp", l.Addr().String())
	check0(t, err)
	far, err = l.Accept()
	check0(t, err)
	t.Cleanup(func() { _ = near.Close(); _ = far.Close() })
	return near, far
}

func TestSocketCarriesMoreThanItsBuffersBothWays(t *testing.T) {
	near, far := tcpPair(t)
	s := tlsSocketOf(near)
	sent := bytes.Repeat([]byte("0123456789abcdef"), 1<<20)
	var wg sync.WaitGroup
	wg.Go(func() { _, _ = io.Copy(far, far); _ = far.Close() }) // an echo
	wg.Go(func() {
		if n, err := s.Write(sent); n != len(sent) || err != nil {
			t.Errorf("wrote %d, %v", n, err)
		}
		check0(t, s.(*tlsSocket).CloseWrite())
	})
	got, err := io.ReadAll(s)
	wg.Wait()
	if err != nil || !bytes.Equal(got, sent) {
		t.Errorf("%d of %d bytes came back, %v", len(got), len(sent), err)
	}
}

func TestSocketKeepsDeadlinesAndTellsErrors(t *testing.T) {
	near, far := tcpPair(t)
	s := tlsSocketOf(near)
	check0(t, s.SetDeadline(time.Now().Add(10*time.Millisecond)))
	if n, err := s.Read(make([]byte, 1)); n != 0 || !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("read %d, %v", n, err)
	}
	check0(t, s.SetDeadline(time.Now().Add(200*time.Millisecond)))
	n, err := s.Write(make([]byte, 64<<20)) // more than anybody takes
	if n == 0 || n == 64<<20 || !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("wrote %d, %v", n, err)
	}
	check0(t, s.SetDeadline(time.Now().Add(patience)))
	check0(t, far.Close()) // with bytes unread: a reset
	if _, err := s.Read(make([]byte, 1)); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("after a reset: %v", err)
	}
	check0(t, s.Close())
	if _, err := s.Read(make([]byte, 1)); !errors.Is(err, net.ErrClosed) {
		t.Errorf("after a close: %v", err)
	}
	if _, err := s.Write([]byte{0}); !errors.Is(err, net.ErrClosed) {
		t.Errorf("after a close: %v", err)
	}
}
