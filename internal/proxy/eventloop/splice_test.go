package eventloop

import (
	"errors"
	"io"
	"net"
	"os"
	"testing"

	"golang.org/x/sys/unix"
)

// keptPipes returns how many empty pipes are kept.
func keptPipes() int { return len(pipes) }

func TestSpliceMovesAll(t *testing.T) {
	for _, from := range networks {
		for _, to := range networks {
			t.Run(from+" to "+to, func(t *testing.T) {
				g := newGroup(t, 1)
				l := g.Pick()
				src, source := onLoop(t, l, from)
				dst, sink := onLoop(t, l, to)
				for i, size := range []int{0, 1, pipeSize - 1, pipeSize, pipeSize + 1, 5<<20 + 7} {
					sent := noise(i, size)
					rest := []byte("rest") // which is not to be moved
					fed := make(chan struct{})
					go func() {
						defer close(fed)
						_, _ = source.Write(append(sent, rest...))
					}()
					var moved int64
					var err error
					left := make([]byte, len(rest))
					done := begin(l, func(task *Task) {
						src.Own(task)
						dst.Own(task)
						if moved, err = dst.Splice(src, int64(size)); err == nil {
							_, err = io.ReadFull(src, left)
						}
					})
					if size > pipeSize+1 { // the reader comes late
						until(t, dst.wr.waits)
					}
					same(t, readFull(t, sink, size), sent)
					await(t, done)
					await(t, fed)
					if moved != int64(size) || err != nil || string(left) != string(rest) {
						t.Errorf("moved %d of %d bytes, then read %q: %v", moved, size, left, err)
					}
				}
			})
		}
	}
}

func TestSpliceOffTheLoop(t *testing.T) {
	const size = 3 << 20
	g := newGroup(t, 2)
	src, source := onLoop(t, g.Pick(), "tcp")
	dst, sink := onLoop(t, g.Pick(), "tcp")
	sent := noise(7, size)
	go func() { _, _ = source.Write(sent) }()
	done := make(chan struct{})
	go func() {
		defer close(done)
		if moved, err := dst.Splice(src, size); moved != size || err != nil {
			t.Errorf("moved %d of %d bytes: %v", moved, size, err)
		}
	}()
	same(t, readFull(t, sink, size), sent)
	await(t, done)
}

func TestSpliceKeepsNothingBack(t *testing.T) {
	// What has come is sent, though more is to come: that may take its time.
	const pieces, size = 5, 10
	g := newGroup(t, 1)
	l := g.Pick()
	src, source := onLoop(t, l, "unix") // which gets at once what is sent
	dst, sink := onLoop(t, l, "tcp")
	done := begin(l, func(task *Task) {
		src.Own(task)
		dst.Own(task)
		if moved, err := dst.Splice(src, pieces*size); moved != pieces*size || err != nil {
			t.Errorf("moved %d bytes: %v", moved, err)
		}
	})
	for i := range pieces {
		piece := noise(i, size)
		write(t, source, piece)
		settle(t, l)
		unsent := -1
		_ = dst.Control(func(fd uintptr) { unsent, _ = unix.IoctlGetInt(int(fd), unix.SIOCOUTQNSD) })
		if unsent != 0 {
			t.Errorf("%d bytes of piece %d are kept back", unsent, i)
		}
		same(t, readFull(t, sink, size), piece)
	}
	await(t, done)
}

func TestSpliceFromASourceThatEndsEarly(t *testing.T) {
	each(t, func(t *testing.T, network string) {
		g := newGroup(t, 1)
		l := g.Pick()
		for _, size := range []int{0, 1000} {
			src, source := onLoop(t, l, network)
			dst, sink := onLoop(t, l, network)
			sent := noise(8, size)
			write(t, source, sent)
			_ = source.Close()
			var moved int64
			var err error
			await(t, begin(l, func(task *Task) {
				src.Own(task)
				dst.Own(task)
				moved, err = dst.Splice(src, int64(size)+1)
			}))
			if moved != int64(size) || err != io.ErrUnexpectedEOF { //nolint:errorlint // Splice returns it bare
				t.Errorf("moved %d of %d bytes: %v", moved, size, err)
			}
			same(t, readFull(t, sink, size), sent)
		}
	})
}

func TestPipeWithSomethingInItIsNotUsedAgain(t *testing.T) {
	each(t, func(t *testing.T, network string) {
		g := newGroup(t, 1)
		l := g.Pick()
		for name, is := range map[string]struct {
			end func(src, dst *Conn)
			err error
		}{
			"the receiver is closed": {func(_, dst *Conn) { _ = dst.Close() }, net.ErrClosed},
			"the receiver is late":   {func(_, dst *Conn) { _ = dst.SetWriteDeadline(past) }, os.ErrDeadlineExceeded},
		} {
			src, source := onLoop(t, l, network)
			dst, _ := onLoop(t, l, network)
			fed := make(chan struct{})
			go func() { defer close(fed); _, _ = source.Write(noise(9, 2*bulk)) }()
			kept, open := keptPipes(), descriptors(t, "pipe")
			var err error
			done := begin(l, func(task *Task) {
				src.Own(task)
				dst.Own(task)
				_, err = dst.Splice(src, 2*bulk)
			})
			until(t, dst.wr.waits) // so that its pipe holds something
			is.end(src, dst)
			await(t, done)
			if !errors.Is(err, is.err) {
				t.Errorf("%s: %v", name, err)
			}
			// The one it had is closed: one that was kept, or made.
			if n := keptPipes(); n != max(kept-1, 0) {
				t.Errorf("%s: %d pipes are kept, %d were", name, n, kept)
			}
			if n := descriptors(t, "pipe"); n != open-2*min(kept, 1) {
				t.Errorf("%s: %d ends of pipes, %d before, %d pipes kept", name, n, open, kept)
			}
			_ = src.Close()
			_ = source.Close()
			await(t, fed)
		}
	})
}

func TestEmptyPipeIsUsedAgain(t *testing.T) {
	g := newGroup(t, 1)
	l := g.Pick()
	src, source := onLoop(t, l, "tcp")
	dst, sink := onLoop(t, l, "tcp")
	splice := func() {
		write(t, source, []byte("x"))
		await(t, begin(l, func(task *Task) {
			src.Own(task)
			dst.Own(task)
			if _, err := dst.Splice(src, 1); err != nil {
				t.Error(err)
			}
		}))
		readFull(t, sink, 1)
	}
	splice()
	kept, open := keptPipes(), descriptors(t, "pipe")
	for range 5 {
		splice()
	}
	if n, m := keptPipes(), descriptors(t, "pipe"); kept == 0 || n != kept || m != open {
		t.Errorf("%d pipes are kept, %d were; %d ends, %d were", n, kept, m, open)
	}
}

func TestNoMorePipesAreKept(t *testing.T) {
	var taken []pipe
	for range keptPipes() + maxPipes + 3 {
		p, err := getPipe()
		if err != nil {
			t.Fatal(err)
		}
		taken = append(taken, p)
	}
	open := descriptors(t, "pipe")
	for _, p := range taken {
		p.put(true)
	}
	if n, m := keptPipes(), descriptors(t, "pipe"); n != maxPipes || open-m != 2*(len(taken)-maxPipes) {
		t.Errorf("%d pipes are kept, want %d; %d ends are closed of %d pipes", n, maxPipes, open-m, len(taken))
	}
}

func TestSpliceEndsWithItsSource(t *testing.T) {
	each(t, func(t *testing.T, network string) {
		g := newGroup(t, 1)
		l := g.Pick()
		for name, is := range map[string]struct {
			end func(src *Conn)
			err error
		}{
			"closed": {func(src *Conn) { _ = src.Close() }, net.ErrClosed},
			"late":   {func(src *Conn) { _ = src.SetReadDeadline(past) }, os.ErrDeadlineExceeded},
		} {
			src, _ := onLoop(t, l, network)
			dst, _ := onLoop(t, l, network)
			var err error
			done := begin(l, func(task *Task) {
				src.Own(task)
				dst.Own(task)
				_, err = dst.Splice(src, 1)
			})
			until(t, src.rd.waits)
			is.end(src)
			await(t, done)
			if !errors.Is(err, is.err) {
				t.Errorf("%s: %v", name, err)
			}
		}
	})
}
