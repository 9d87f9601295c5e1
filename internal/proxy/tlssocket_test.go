package proxy

import (
	"bytes"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"sync"
	"testing"
	"time"

	"tako/internal/proxy/h1"
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

// However the bytes are cut into reads, those records count that end in the last
// one, and it was ahead if that are more than one.
func TestRecordsThatEndInAReadAreCounted(t *testing.T) {
	var all []byte
	var ends []int // of each record, in all
	for _, size := range []int{1, 0, 255, 256, 2, 0, 0, 16<<10 + 256, 5, 4, 1000, 1} {
		all = append(all, 23, 3, 3, byte(size>>8), byte(size))
		all = append(all, bytes.Repeat([]byte{23}, size)...)
		ends = append(ends, len(all))
	}
	between := func(from, to int) (n int) {
		for _, e := range ends {
			if from < e && e <= to {
				n++
			}
		}
		return n
	}
	cut := func(name string, next func() int) {
		t.Helper()
		var s tlsSocket
		for at := 0; at < len(all); {
			to := min(at+next(), len(all))
			s.records.see(all[at:to])
			if want := between(at, to); s.records.whole != want || s.Ahead() != (want > 1) {
				t.Fatalf("%s: of bytes %d to %d: %d records, ahead %t, want %d", name, at, to, s.records.whole, s.Ahead(), want)
			}
			at = to
		}
	}
	cut("at once", func() int { return len(all) })
	for size := 1; size <= 16; size++ {
		cut("in equal pieces", func() int { return size })
	}
	for seed := range uint64(200) {
		rnd := rand.New(rand.NewPCG(seed, 0)) //nolint:gosec // the same each time
		cut("at random", func() int { return 1 + rnd.IntN(1<<rnd.IntN(12)) })
	}
	// TLS asks for a head, and then for the rest with as much as there is room for.
	heads, at := true, 0
	cut("as TLS does", func() int {
		defer func() { heads = !heads }()
		if heads {
			return 5
		}
		end := ends[at]
		begin := 0
		if at > 0 {
			begin = ends[at-1]
		}
		at++
		return max(end-begin-5, 0)
	})
}

func TestNothingIsReadOfASocketThatIsHeld(t *testing.T) {
	near, far := tcpPair(t)
	s := tlsSocketOf(near).(*tlsSocket)
	_, err := far.Write([]byte{23, 3, 3, 0, 1, 'a', 23, 3, 3, 0, 1, 'b'})
	check0(t, err)
	s.Hold(true)
	if n, err := s.Read(make([]byte, 100)); n != 0 || err != h1.ErrHeld || s.Ahead() { //nolint:errorlint // TLS returns it bare
		t.Errorf("while it is held: %d bytes, %v, ahead %t", n, err, s.Ahead())
	}
	s.Hold(false)
	check0(t, s.SetReadDeadline(time.Now().Add(patience)))
	b := make([]byte, 12)
	if _, err := io.ReadFull(s, b[:6]); err != nil || s.Ahead() {
		t.Errorf("a record: %v, ahead %t", err, s.Ahead())
	}
	if _, err := io.ReadFull(s, b[6:]); err != nil || string(b) != "\x17\x03\x03\x00\x01a\x17\x03\x03\x00\x01b" {
		t.Errorf("read %q, %v", b, err)
	}
}
