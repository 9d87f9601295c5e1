package launch

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
	"unicode/utf8"

	"golang.org/x/sys/unix"

	"tako/internal/ipc"
)

// The limits of an app's output.
const (
	// MaxLogLine is the longest line, in bytes of output; a longer one is split,
	// and the cuts are marked by Cut on either side.
	MaxLogLine = 16 << 10
	Cut        = "…"

	// An app may write FloodRate bytes a second, after FloodBurst at once. Beyond
	// that its pipe fills and its writes wait.
	FloodRate  = 8 << 20
	FloodBurst = 16 << 20

	// Defaults and bounds of rotation.
	DefaultLogBytes = 10 << 20
	DefaultLogFiles = 5
	MinLogBytes     = 64 << 10
	MaxLogFiles     = 100

	// LogName is the file being written; older ones are LogName.1 and so on.
	LogName = "current.log"

	// logMode lets the owner of the data root read what the agent wrote; nobody
	// else gets into the folder.
	logMode = 0o644

	readSize = 64 << 10
	// retryOpen is how long a log that cannot be opened is left alone.
	retryOpen = time.Second
)

// Streams of a log line.
const (
	StreamOut   = "stdout"
	StreamErr   = "stderr"
	StreamBuild = "build"
	StreamTako  = "tako" // tako's own remarks
)

// A Log is one app's output on disk, shared by its instances: lines of JSON,
//
//	{"time":"2026-11-23T11:00:00.000000000Z","instance":3,"stream":"stdout","text":"…"}
//
// in LogName, rotated by size. Output is never refused: what cannot be written is
// dropped and counted, and a line says how much once there is space again. It
// keeps no goroutine; its readers wait for each other and for the disk. Another
// process, the agent of a second server, may write to the files and rotate them.
type Log struct {
	dir   string
	gid   uint32
	rates bucket

	max   atomic.Int64
	files atomic.Int32

	mu      sync.Mutex                         // held over writes to the disk
	folder  ipc.FD                             // dir, while file is open
	open    func(name string) (logFile, error) // openFile, but for tests
	file    logFile
	node    uint64 // its inode
	size    int64
	dropped int64
	why     error
	tryAt   time.Time
	buf     []byte
}

// logFile is what a Log needs of an *os.File.
type logFile interface {
	io.WriteCloser
	Truncate(size int64) error
	Stat() (os.FileInfo, error)
}

// NewLog makes the log of the folder dir, which it neither makes nor opens now.
// With a gid that is not 0 the way to dir is open to that group alone, and is
// gone as one of it. Sizes that are not positive mean the defaults, others are
// kept within bounds.
func NewLog(dir string, gid uint32, maxBytes int64, files int) *Log {
	l := &Log{dir: dir, gid: gid}
	l.open = l.openFile
	l.rates = bucket{rate: FloodRate, burst: FloodBurst, tokens: FloodBurst}
	l.Resize(maxBytes, files)
	return l
}

// openFile opens one file in the folder.
func (l *Log) openFile(name string) (logFile, error) {
	fd, err := unix.Openat(int(l.folder), name, unix.O_WRONLY|unix.O_APPEND|unix.O_CREAT|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_CLOEXEC, logMode)
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", filepath.Join(l.dir, name), err)
	}
	f := os.NewFile(uintptr(fd), name)
	if st, err := f.Stat(); err != nil || !st.Mode().IsRegular() {
		_ = f.Close()
		return nil, fmt.Errorf("%s is not a file", filepath.Join(l.dir, name))
	}
	_ = f.Chmod(logMode) // the umask may have narrowed it
	return f, nil
}

// openFolder opens a folder for use with openat. With a gid that is not 0 this
// thread is of that group meanwhile: the folders of an app let pass its group
// alone, which needs CAP_SETGID of us and nothing more.
func openFolder(dir string, gid uint32) (ipc.FD, error) {
	if gid != 0 {
		runtime.LockOSThread()
		was, _ := unix.SetfsgidRetGid(int(gid)) // it reports none: the open below does
		defer func() {
			_, _ = unix.SetfsgidRetGid(was)
			if now, _ := unix.SetfsgidRetGid(-1); now == was {
				runtime.UnlockOSThread() // else the thread ends with its goroutine
			}
		}()
	}
	fd, err := unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return 0, fmt.Errorf("open folder %s: %w", dir, err)
	}
	return ipc.FD(fd), nil
}

// Resize changes when files are rotated and how many are kept, LogName included.
// It never waits.
func (l *Log) Resize(maxBytes int64, files int) {
	if maxBytes <= 0 {
		maxBytes = DefaultLogBytes
	}
	if files <= 0 {
		files = DefaultLogFiles
	}
	l.max.Store(max(maxBytes, MinLogBytes))
	l.files.Store(int32(min(files, MaxLogFiles))) // bounded
}

// Close closes the file, after a write that is under way. A later line opens it
// again.
func (l *Log) Close() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.close()
}

func (l *Log) close() {
	if l.file != nil {
		_ = l.file.Close()
		l.file = nil
	}
	l.folder.Close()
	l.folder = 0
}

// begin opens folder and file.
func (l *Log) begin() error {
	l.close()
	folder, err := openFolder(l.dir, l.gid)
	if err != nil {
		return err
	}
	l.folder = folder
	return l.beginFile()
}

func (l *Log) beginFile() error {
	f, err := l.open(LogName)
	if err != nil {
		return err
	}
	st, err := f.Stat()
	if err != nil {
		_ = f.Close()
		return err
	}
	l.file, l.size = f, st.Size()
	if sys, ok := st.Sys().(*syscall.Stat_t); ok {
		l.node = sys.Ino
	}
	return nil
}

// look takes note of what another process did to the file: wrote to it, rotated
// or removed it.
func (l *Log) look() error {
	var st unix.Stat_t
	err := unix.Fstatat(int(l.folder), LogName, &st, unix.AT_SYMLINK_NOFOLLOW)
	if err == nil && st.Ino == l.node {
		l.size = st.Size
		return nil
	}
	_ = l.file.Close()
	l.file = nil
	return l.beginFile()
}

// Note writes a line of tako's own.
func (l *Log) Note(instance uint32, text string) {
	l.write(instance, StreamTako, []string{text})
}

// write writes lines, whole or not at all.
func (l *Log) write(instance uint32, stream string, lines []string) {
	if len(lines) == 0 {
		return
	}
	now := time.Now()
	l.mu.Lock()
	defer l.mu.Unlock()
	for len(lines) > 0 {
		// In portions, so that files keep to their size and memory stays small.
		n, bytes := 0, 0
		for n < len(lines) && (n == 0 || bytes < readSize) {
			bytes += len(lines[n])
			n++
		}
		l.portion(now, instance, stream, lines[:n])
		lines = lines[n:]
	}
}

func (l *Log) portion(now time.Time, instance uint32, stream string, lines []string) {
	b := l.buf[:0]
	dropped, why := l.dropped, l.why
	if dropped > 0 {
		b = appendLine(b, now, instance, StreamTako, fmt.Sprintf("%d lines of output were lost here: %v", dropped, why))
	}
	for _, text := range lines {
		b = appendLine(b, now, instance, stream, text)
	}
	l.buf = b[:0]
	if err := l.put(now, b); err != nil {
		l.dropped, l.why = dropped+int64(len(lines)), err
		return
	}
	l.dropped, l.why = 0, nil
}

// put appends b to the file, after rotating it if b does not fit.
func (l *Log) put(now time.Time, b []byte) error {
	if l.file == nil {
		if now.Before(l.tryAt) {
			return l.why
		}
		if err := l.begin(); err != nil {
			l.tryAt = now.Add(retryOpen)
			return err
		}
		l.tryAt = time.Time{}
	} else if err := l.look(); err != nil {
		l.close()
		l.tryAt = now.Add(retryOpen)
		return err
	}
	if l.size > 0 && l.size+int64(len(b)) > l.max.Load() {
		if err := l.rotate(); err != nil {
			return err
		}
	}
	n, err := l.file.Write(b)
	if err == nil {
		l.size += int64(n)
		return nil
	}
	if st, serr := l.file.Stat(); n > 0 && serr == nil && st.Size() == l.size+int64(n) { // and nobody wrote after us
		_ = l.file.Truncate(l.size) // no half line stays
	}
	if !errors.Is(err, unix.ENOSPC) && !errors.Is(err, unix.EDQUOT) {
		l.close()
		l.tryAt = now.Add(retryOpen)
	}
	return err
}

// rotate moves each file one number up and begins a new one. What it cannot move
// it overwrites: the newest output matters most.
func (l *Log) rotate() error {
	_ = l.file.Close()
	l.file = nil
	name := func(i int) string {
		if i == 0 {
			return LogName
		}
		return LogName + "." + strconv.Itoa(i)
	}
	dir, files := int(l.folder), int(l.files.Load())
	if files == 1 {
		_ = unix.Unlinkat(dir, name(0), 0) // then it grows on
	}
	for i := files - 1; i > 0; i-- {
		_ = unix.Renameat(dir, name(i-1), dir, name(i)) // it may not be there
	}
	for i := files; i < MaxLogFiles && unix.Unlinkat(dir, name(i), 0) == nil; i++ {
		// fewer files are wanted than before
	}
	return l.beginFile()
}

// appendLine appends one line of JSON.
func appendLine(b []byte, at time.Time, instance uint32, stream, text string) []byte {
	b = append(b, `{"time":"`...)
	b = at.UTC().AppendFormat(b, "2006-01-02T15:04:05.000000000Z07:00")
	b = append(b, `","instance":`...)
	b = strconv.AppendUint(b, uint64(instance), 10)
	b = append(b, `,"stream":"`...)
	b = append(b, stream...)
	b = append(b, `","text":"`...)
	b = appendText(b, text)
	return append(b, "\"}\n"...)
}

// appendText appends s as the inside of a JSON string. Bytes that are no UTF-8
// become U+FFFD.
func appendText(b []byte, s string) []byte {
	const hexDigits = "0123456789abcdef"
	for i := 0; i < len(s); {
		c := s[i]
		if c < utf8.RuneSelf {
			i++
			switch {
			case c == '"' || c == '\\':
				b = append(b, '\\', c)
			case c == '\t':
				b = append(b, '\\', 't')
			case c < ' ' || c == 0x7f:
				b = append(b, '\\', 'u', '0', '0', hexDigits[c>>4], hexDigits[c&15])
			default:
				b = append(b, c)
			}
			continue
		}
		r, n := utf8.DecodeRuneInString(s[i:])
		b = utf8.AppendRune(b, r)
		i += n
	}
	return b
}

// A splitter cuts a stream of bytes into lines. The zero value is ready.
type splitter struct {
	part []byte
	cut  bool // part goes on from a line that was split
}

// feed returns the lines that p ends.
func (s *splitter) feed(p []byte) []string {
	var lines []string
	for len(p) > 0 {
		room := MaxLogLine - len(s.part)
		i := bytes.IndexByte(p[:min(len(p), room+1)], '\n')
		if i >= 0 {
			s.part = append(s.part, p[:i]...)
			lines = append(lines, s.take(false))
			p = p[i+1:]
			continue
		}
		n := min(len(p), room+1)
		s.part = append(s.part, p[:n]...)
		p = p[n:]
		if len(s.part) > MaxLogLine {
			lines = append(lines, s.take(true))
		}
	}
	return lines
}

// rest returns what stands after the last newline.
func (s *splitter) rest() []string {
	if len(s.part) == 0 {
		return nil
	}
	return []string{s.take(false)}
}

// take returns the line so far; with split, as much of it as may be one line.
func (s *splitter) take(split bool) string {
	n := len(s.part)
	if split {
		n = MaxLogLine
		for back := 0; back < utf8.UTFMax-1 && !utf8.RuneStart(s.part[n]); back++ { // not inside a character
			n--
		}
	}
	text := s.part[:n]
	if !split {
		text = trimReturn(text)
	}
	line := string(text)
	if s.cut {
		line = Cut + line
	}
	if split {
		line += Cut
	}
	s.part = append(s.part[:0], s.part[n:]...)
	s.cut = split
	return line
}

func trimReturn(b []byte) []byte {
	if n := len(b); n > 0 && b[n-1] == '\r' {
		return b[:n-1]
	}
	return b
}

// A bucket holds back a flood: it gives rate tokens a second, and saves burst.
type bucket struct {
	mu          sync.Mutex
	rate, burst float64
	tokens      float64
	last        time.Time
}

// take takes n tokens and returns how long to wait for them.
func (b *bucket) take(now time.Time, n int) time.Duration {
	b.mu.Lock()
	defer b.mu.Unlock()
	if !b.last.IsZero() {
		b.tokens = min(b.burst, b.tokens+now.Sub(b.last).Seconds()*b.rate)
	}
	b.last = now
	b.tokens -= float64(n)
	if b.tokens >= 0 {
		return 0
	}
	return time.Duration(-b.tokens / b.rate * float64(time.Second))
}
