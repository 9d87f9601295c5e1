package ipc

import (
	"bytes"
	"encoding/hex"
	"errors"
	"flag"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

var update = flag.Bool("update", false, "write the golden files anew")

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func pair(t testing.TB) (*Channel, *Channel) {
	t.Helper()
	a, fd, err := Pair()
	if err != nil {
		t.Fatal(err)
	}
	b, err := Open(fd)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = a.Close(); _ = b.Close() })
	return a, b
}

// raw is a channel and the bare descriptor of its peer, to break rules with.
func raw(t testing.TB) (*Channel, int) {
	t.Helper()
	c, fd, err := Pair()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close(); fd.Close() })
	return c, int(fd)
}

// noLeak fails the test when it ends with more descriptors than now.
func noLeak(t testing.TB) {
	t.Helper()
	c, fd, err := Pair() // the poller's own are open from here on
	if err != nil {
		t.Fatal(err)
	}
	_ = c.Close()
	fd.Close()
	before := countFDs(t)
	t.Cleanup(func() {
		if after := countFDs(t); after != before {
			t.Errorf("%d descriptors are open, %d before", after, before)
		}
	})
}

func countFDs(t testing.TB) int {
	t.Helper()
	d, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(d)
}

// file is a memfd that holds text, not sealed.
func file(t testing.TB, text string) FD {
	t.Helper()
	fd, err := unix.MemfdCreate("test", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(FD(fd).Close)
	if _, err := unix.Write(fd, []byte(text)); err != nil {
		t.Fatal(err)
	}
	return FD(fd)
}

func header(version, kind uint16, flags Flags, nfiles int, id uint64) []byte {
	b := make([]byte, HeaderSize)
	putHeader(b, kind, flags, nfiles, id)
	b[0], b[1] = byte(version>>8), byte(version)
	return b
}

func TestRecordsArriveWholeAndInOrder(t *testing.T) {
	noLeak(t)
	a, b := pair(t)
	bodies := [][]byte{
		nil, []byte("{}"), bytes.Repeat([]byte("x"), MaxInline), bytes.Repeat([]byte("y"), MaxInline+1), bytes.Repeat([]byte("z"), MaxBody),
	}
	sent := make(chan error, 1)
	go func() {
		for i, body := range bodies {
			if err := a.Send(Record{Kind: uint16(i + 1), Flags: Reply | Failed, ID: 1<<63 + uint64(i), Body: body}); err != nil {
				sent <- err
				return
			}
		}
		sent <- a.Close()
	}()
	for i, want := range bodies {
		r, err := b.Receive()
		if err != nil {
			t.Fatalf("record %d: %v", i, err)
		}
		if int(r.Kind) != i+1 || r.Flags != Reply|Failed || r.ID != 1<<63+uint64(i) || !bytes.Equal(r.Body, want) || len(r.Files) != 0 {
			t.Errorf("record %d came as kind %d, flags %#x, id %d, %d bytes, %d files", i, r.Kind, r.Flags, r.ID, len(r.Body), len(r.Files))
		}
	}
	if _, err := b.Receive(); !errors.Is(err, io.EOF) {
		t.Errorf("after the end: %v, want EOF", err)
	}
	if err := <-sent; err != nil {
		t.Error(err)
	}
	if err := b.Send(Record{Kind: 1}); !errors.Is(err, unix.EPIPE) {
		t.Errorf("to a peer that has gone: %v, want EPIPE", err)
	}
}

func TestFilesArriveInOrderWithTheirRecord(t *testing.T) {
	noLeak(t)
	for _, size := range []int{2, MaxInline + 1} {
		a, b := pair(t)
		var files []FD
		for i := range MaxFiles {
			files = append(files, file(t, strings.Repeat("x", i)))
		}
		if err := a.Send(Record{Kind: 1, Body: make([]byte, size), Files: files}); err != nil {
			t.Fatal(err)
		}
		r, err := b.Receive()
		if err != nil {
			t.Fatal(err)
		}
		if len(r.Files) != MaxFiles || len(r.Body) != size {
			t.Fatalf("%d files and %d bytes, want %d and %d", len(r.Files), len(r.Body), MaxFiles, size)
		}
		for i, f := range r.Files {
			var st unix.Stat_t
			if err := unix.Fstat(int(f), &st); err != nil || st.Size != int64(i) {
				t.Errorf("file %d has %d bytes, %v", i, st.Size, err)
			}
			if fl, err := unix.FcntlInt(uintptr(f), unix.F_GETFD, 0); err != nil || fl&unix.FD_CLOEXEC == 0 {
				t.Errorf("file %d stays open on exec: %#x, %v", i, fl, err)
			}
		}
		r.Discard()
		r.Discard()
	}
}

func TestBodyIsTheReceiversToKeep(t *testing.T) {
	a, b := pair(t)
	for _, s := range []string{"first", "other"} {
		if err := a.Send(Record{Body: []byte(s)}); err != nil {
			t.Fatal(err)
		}
	}
	first, err1 := b.Receive()
	_, err2 := b.Receive()
	if err1 != nil || err2 != nil || string(first.Body) != "first" {
		t.Errorf("the first body is %q after the next, %v, %v", first.Body, err1, err2)
	}
}

func TestSendRefusesWhatIsTooMuch(t *testing.T) {
	noLeak(t)
	a, _ := pair(t)
	f := file(t, "x")
	many := make([]FD, MaxFiles+1)
	for i := range many {
		many[i] = f
	}
	for what, r := range map[string]Record{
		"17 descriptors, the limit is 16":                 {Kind: 7, Files: many},
		"a body of 16777217 bytes, the limit is 16777216": {Kind: 7, Body: make([]byte, MaxBody+1)},
		"bad file descriptor":                             {Kind: 7, Files: []FD{-1}},
	} {
		if err := a.Send(r); err == nil || !strings.HasPrefix(err.Error(), "send kind 7: ") || !strings.Contains(err.Error(), what) {
			t.Errorf("%v, want %s", err, what)
		}
	}
}

func TestPeerThatBreaksTheRules(t *testing.T) {
	sealedWith := func(size int, seals int) FD {
		fd := file(t, strings.Repeat("x", size))
		if _, err := unix.FcntlInt(uintptr(fd), unix.F_ADD_SEALS, seals); err != nil {
			t.Fatal(err)
		}
		return fd
	}
	plain := file(t, "plain")
	big := file(t, "")
	if err := unix.Ftruncate(int(big), MaxBody+1); err != nil {
		t.Fatal(err)
	}
	if _, err := unix.FcntlInt(uintptr(big), unix.F_ADD_SEALS, seals); err != nil {
		t.Fatal(err)
	}
	pipe := make([]int, 2)
	if err := unix.Pipe2(pipe, unix.O_CLOEXEC); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { FD(pipe[0]).Close(); FD(pipe[1]).Close() })
	n := func(n int) []FD { return slices.Repeat([]FD{plain}, n) }

	for _, c := range []struct {
		what  string
		bytes []byte
		files []FD
		want  string
	}{
		{"short", header(1, 1, 0, 0, 0)[:15], nil, "shorter than its header"},
		{"short with files", []byte{1}, n(2), "shorter than its header"},
		{"version", header(2, 1, 0, 0, 0), nil, "version 2, this is version 1"},
		{"flags", header(1, 1, 1<<5, 0, 0), nil, "unknown flags 0x20"},
		{"fewer files", header(1, 1, 0, 2, 0), n(1), "names 2 descriptors and brings 1"},
		{"more files", header(1, 1, 0, 0, 0), n(1), "names 0 descriptors and brings 1"},
		{"17 files", header(1, 1, 0, 17, 0), n(17), "brings 17 descriptors, the limit is 16"},
		{"18 files and a body", header(1, 1, Large, 18, 0), append(n(17), sealedWith(5, seals)), "brings 17 descriptors, the limit is 16"},
		{"40 files", header(1, 1, 0, 40, 0), n(40), "truncated"},
		{"long", make([]byte, HeaderSize+MaxInline+2), nil, "truncated"},
		{"long with files", make([]byte, HeaderSize+MaxInline+2), n(3), "truncated"},
		{"too long by one", append(header(1, 1, 0, 0, 0), make([]byte, MaxInline+1)...), nil, "truncated"},
		{"large without file", header(1, 1, Large, 0, 0), nil, "large without being so"},
		{"large with a body", append(header(1, 1, Large, 1, 0), 'x'), []FD{sealedWith(5, seals)}, "large without being so"},
		{"not sealed", header(1, 1, Large, 1, 0), n(1), "not a sealed memfd"},
		{"half sealed", header(1, 1, Large, 2, 0), []FD{plain, sealedWith(5, seals&^unix.F_SEAL_WRITE)}, "not a sealed memfd"},
		{"may shrink", header(1, 1, Large, 1, 0), []FD{sealedWith(5, seals&^unix.F_SEAL_SHRINK)}, "not a sealed memfd"},
		{"a pipe", header(1, 1, Large, 1, 0), []FD{FD(pipe[0])}, "not a sealed memfd"},
		{"empty", header(1, 1, Large, 1, 0), []FD{sealedWith(0, seals)}, "a large body of 0 bytes"},
		{"too large", header(1, 1, Large, 1, 0), []FD{big}, "a large body of 16777217 bytes"},
	} {
		t.Run(c.what, func(t *testing.T) {
			noLeak(t)
			ch, fd := raw(t)
			var oob []byte
			if len(c.files) > 0 {
				fds := make([]int, len(c.files))
				for i, f := range c.files {
					fds[i] = int(f)
				}
				oob = unix.UnixRights(fds...)
			}
			if err := unix.Sendmsg(fd, c.bytes, oob, nil, 0); err != nil {
				t.Fatal(err)
			}
			r, err := ch.Receive()
			if !errors.Is(err, ErrProtocol) || !strings.Contains(err.Error(), c.want) || r.Files != nil || r.Body != nil {
				t.Errorf("got kind %d, %d bytes, %d files, %v, want ErrProtocol: … %s", r.Kind, len(r.Body), len(r.Files), err, c.want)
			}
		})
	}
}

func TestEmptyRecordWithFilesLeaksNone(t *testing.T) {
	noLeak(t)
	ch, fd := raw(t)
	f := file(t, "x")
	if err := unix.Sendmsg(fd, nil, unix.UnixRights(int(f), int(f), int(f)), nil, 0); err != nil {
		t.Fatal(err)
	}
	if _, err := ch.Receive(); err == nil {
		t.Error("an empty record was taken")
	}
}

func TestRecordsNobodyReceivesLeakNone(t *testing.T) {
	noLeak(t)
	a, b := pair(t)
	if err := a.Send(Record{Body: make([]byte, MaxInline+1), Files: []FD{file(t, "x")}}); err != nil {
		t.Fatal(err)
	}
	_ = b.Close()
	_ = a.Close()
}

func TestCloseUnblocksBoth(t *testing.T) {
	noLeak(t)
	a, b := pair(t)
	got := make(chan error, 2)
	go func() { _, err := a.Receive(); got <- err }()
	go func() {
		for {
			if err := a.Send(Record{Body: make([]byte, MaxInline)}); err != nil {
				got <- err
				return
			}
		}
	}()
	full := make([]byte, HeaderSize) // wait until something is there
	if err := b.conn.Read(func(fd uintptr) bool { _, err := unix.Read(int(fd), full); return err == nil }); err != nil {
		t.Fatal(err)
	}
	if err := a.Close(); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := <-got; !errors.Is(err, net.ErrClosed) {
			t.Errorf("after Close: %v, want ErrClosed", err)
		}
	}
	_ = a.Close()
}

func TestSendGivesUpOnAPeerThatDoesNotRead(t *testing.T) {
	a, b := pair(t)
	if a.timeout != SendTimeout || SendTimeout != 5*time.Second {
		t.Errorf("patience %s, want 5 s", a.timeout)
	}
	a.timeout = 20 * time.Millisecond
	var err error
	sent := 0
	for ; err == nil && sent < 1000; sent++ {
		err = a.Send(Record{Body: make([]byte, MaxInline)})
	}
	if !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("after %d records: %v, want ErrDeadlineExceeded", sent, err)
	}
	for range sent - 1 { // what was sent is whole, and the channel works on
		if r, err := b.Receive(); err != nil || len(r.Body) != MaxInline {
			t.Fatalf("%d bytes, %v", len(r.Body), err)
		}
	}
	a.timeout = SendTimeout
	if err := a.Send(Record{Kind: 9}); err != nil {
		t.Error(err)
	}
	if r, err := b.Receive(); err != nil || r.Kind != 9 {
		t.Errorf("kind %d, %v", r.Kind, err)
	}
}

func TestTrySendNeverWaits(t *testing.T) {
	a, b := pair(t)
	if b.Waiting() {
		t.Error("something waits before anything was sent")
	}
	var err error
	sent := 0
	for ; err == nil && sent < 1000; sent++ {
		err = a.TrySend(Record{Kind: uint16(sent), Body: make([]byte, MaxInline)})
	}
	if !errors.Is(err, ErrFull) {
		t.Fatalf("after %d records: %v, want ErrFull", sent, err)
	}
	for i := range sent - 1 { // those that were taken are whole
		if !b.Waiting() {
			t.Fatalf("record %d does not wait", i)
		}
		if r, err := b.Receive(); err != nil || len(r.Body) != MaxInline || int(r.Kind) != i {
			t.Fatalf("record %d: kind %d, %d bytes, %v", i, r.Kind, len(r.Body), err)
		}
	}
	if b.Waiting() {
		t.Error("something waits that was not sent")
	}
	a.sendMu.Lock() // by somebody who waits for room
	if err := a.TrySend(Record{Kind: 1}); !errors.Is(err, ErrFull) {
		t.Errorf("beside another sender: %v, want ErrFull", err)
	}
	a.sendMu.Unlock()
	for what, r := range map[string]Record{"files": {Files: []FD{file(t, "x")}}, "a large body": {Body: make([]byte, MaxInline+1)}} {
		if err := a.TrySend(r); err == nil || errors.Is(err, ErrFull) {
			t.Errorf("%s: %v", what, err)
		}
	}
	_ = b.Close()
	if err := a.TrySend(Record{Kind: 1}); !errors.Is(err, unix.EPIPE) {
		t.Errorf("to a peer that has gone: %v, want EPIPE", err)
	}
	if !a.Waiting() {
		t.Error("the end does not wait")
	}
	_ = a.Close()
	if err := a.TrySend(Record{Kind: 1}); !errors.Is(err, net.ErrClosed) {
		t.Errorf("after Close: %v, want ErrClosed", err)
	}
	if a.Waiting() {
		t.Error("something waits in a closed channel")
	}
}

func TestOpenTakesOnlyAChannel(t *testing.T) {
	noLeak(t)
	stream, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer FD(stream[1]).Close()
	null, err := unix.Open(os.DevNull, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	for what, fd := range map[string]int{"a stream": stream[0], "a file": null, "nothing": 9999} {
		if c, err := Open(FD(fd)); err == nil {
			_ = c.Close()
			t.Errorf("%s was taken for a channel", what)
		}
		if _, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0); !errors.Is(err, unix.EBADF) {
			t.Errorf("%s: the descriptor is still open: %v", what, err)
		}
	}
}

func TestGoldenRecord(t *testing.T) {
	a, fd := raw(t)
	if err := a.Send(Record{Kind: 0x0102, Flags: Reply | Failed, ID: 0x1112131415161718, Body: []byte(`{"a":1}`), Files: []FD{file(t, "x")}}); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 100)
	n, _, err := unix.Recvfrom(fd, b, 0)
	if err != nil {
		t.Fatal(err)
	}
	got := hex.Dump(b[:n])
	name := filepath.Join("testdata", "record.golden")
	if *update {
		if err := os.WriteFile(name, []byte(got), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	if got != string(want) {
		t.Errorf("got\n%swant\n%s", got, want)
	}
}

func FuzzParse(f *testing.F) {
	f.Add(append(header(1, 1, Reply, 0, 7), "{}"...), 0, 0)
	f.Add(header(1, 1, Large, 1, 7), 1, 0)
	f.Add(header(1, 1, 0, 2, 7), 2, unix.MSG_CTRUNC)
	f.Add([]byte{}, 0, 0)
	f.Fuzz(func(t *testing.T, b []byte, nfiles, rflags int) {
		if nfiles < 0 || nfiles > MaxFiles+2 || len(b) > HeaderSize+MaxInline {
			return
		}
		files := make([]FD, nfiles)
		for i := range files {
			files[i] = 1 << 29 // never open
		}
		r, err := parse(b, files, rflags)
		if err != nil {
			if !errors.Is(err, ErrProtocol) && !errors.Is(err, io.EOF) {
				t.Errorf("%v is neither a violation nor the end", err)
			}
			return
		}
		again := header(Version, r.Kind, r.Flags, len(r.Files), r.ID)
		if !bytes.Equal(append(again, r.Body...), b) || len(r.Files) != nfiles || nfiles > MaxFiles || len(r.Body) > MaxInline {
			t.Errorf("%x became kind %d, %x, %d files", b, r.Kind, r.Body, len(r.Files))
		}
	})
}
