package master

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"syscall"
	"time"

	"tako/internal/management"
)

// An app's output: files of LogBytes, LogFiles of them, written by the agent.
const (
	LogBytes = 10 << 20
	LogFiles = 5
	// LogName is the file that is written now; older ones have .1, .2 … behind.
	LogName = "current.log"
)

// logPoll is how often a followed log is looked at.
const logPoll = 100 * time.Millisecond

// Logs implements management.Backend.
func (s *server) Logs(ctx context.Context, r management.LogsRequest, send func(management.LogLine) error) error {
	a, err := s.known(r.App)
	if err != nil {
		return err
	}
	dir := a.layout.Logs()
	f, err := openLog(dir, 0)
	if err != nil {
		return err
	}
	defer func() {
		if f != nil {
			_ = f.Close()
		}
	}()
	var end int64
	if f != nil {
		if end, err = f.Seek(0, io.SeekEnd); err != nil {
			return err
		}
	}
	for _, line := range tail(dir, f, end, r.Lines, func(management.LogLine) bool { return true }) {
		if err := send(line); err != nil {
			return err
		}
	}
	if !r.Follow {
		return nil
	}
	return s.follow(ctx, dir, &f, end, send)
}

// follow sends what is written after offset, over rotations.
func (s *server) follow(ctx context.Context, dir string, f **os.File, offset int64, send func(management.LogLine) error) error {
	tick := time.NewTicker(logPoll)
	defer tick.Stop()
	var part []byte
	for {
		if *f != nil {
			var lines []management.LogLine
			lines, part, offset = readFrom(*f, offset, part)
			for _, line := range lines {
				if err := send(line); err != nil {
					return err
				}
			}
			if len(lines) > 0 {
				continue
			}
		}
		if now, err := openLog(dir, 0); err == nil && now != nil {
			if *f == nil || !sameFile(*f, now) {
				if *f != nil {
					// Whatever came last before the rotation.
					lines, _, _ := readFrom(*f, offset, part)
					for _, line := range lines {
						if err := send(line); err != nil {
							_ = now.Close()
							return err
						}
					}
					_ = (*f).Close()
				}
				*f, offset, part = now, 0, nil
				continue
			}
			_ = now.Close()
		}
		select {
		case <-ctx.Done():
			return nil
		case <-s.stopping:
			return nil
		case <-tick.C:
		}
	}
}

// openLog opens the n-th newest log file; nil without an error if there is none.
// It follows no link: the folder is shared with the agent's user.
func openLog(dir string, n int) (*os.File, error) {
	name := LogName
	if n > 0 {
		name += "." + strconv.Itoa(n)
	}
	f, err := os.OpenFile(filepath.Join(dir, name), os.O_RDONLY|syscall.O_NOFOLLOW|syscall.O_NONBLOCK, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	return f, nil
}

func sameFile(a, b *os.File) bool {
	x, err1 := a.Stat()
	y, err2 := b.Stat()
	return err1 == nil && err2 == nil && os.SameFile(x, y)
}

// readFrom reads whole lines from offset on; part is the beginning of a line that
// is not yet whole.
func readFrom(f *os.File, offset int64, part []byte) ([]management.LogLine, []byte, int64) {
	buf := make([]byte, 256<<10)
	n, _ := f.ReadAt(buf, offset)
	data := append(part, buf[:n]...)
	offset += int64(n)
	var lines []management.LogLine
	for {
		i := slices.Index(data, '\n')
		if i < 0 {
			return lines, append([]byte(nil), data...), offset
		}
		if line, ok := parseLine(data[:i]); ok {
			lines = append(lines, line)
		}
		data = data[i+1:]
	}
}

func parseLine(b []byte) (line management.LogLine, ok bool) {
	if err := json.Unmarshal(b, &line); err != nil {
		return line, false
	}
	return line, true
}

// tail returns the newest lines that keep accepts, oldest first. The newest file
// is given, read up to end; older ones are opened as they are needed.
func tail(dir string, newest *os.File, end int64, want int, keep func(management.LogLine) bool) []management.LogLine {
	if want <= 0 {
		return nil
	}
	var got []management.LogLine
	for n := range LogFiles {
		f, limit := newest, end
		if n > 0 {
			var err error
			if f, err = openLog(dir, n); err != nil || f == nil {
				break
			}
			limit = LogBytes * 2
		}
		if f == nil {
			break
		}
		var lines []management.LogLine
		sc := bufio.NewScanner(io.NewSectionReader(f, 0, limit))
		sc.Buffer(make([]byte, 64<<10), 256<<10)
		for sc.Scan() {
			if line, ok := parseLine(sc.Bytes()); ok && keep(line) {
				lines = append(lines, line)
			}
		}
		if n > 0 {
			_ = f.Close()
		}
		got = append(lines, got...)
		if len(got) >= want {
			break
		}
	}
	return got[max(0, len(got)-want):]
}

// lastLines returns the newest lines that one instance itself wrote.
func lastLines(dir string, instance uint32, want int) []string {
	f, err := openLog(dir, 0)
	if err != nil || f == nil {
		return nil
	}
	defer f.Close()
	end, err := f.Seek(0, io.SeekEnd)
	if err != nil {
		return nil
	}
	var texts []string
	for _, line := range tail(dir, f, end, want, func(l management.LogLine) bool { return l.Instance == instance && l.Stream != "tako" }) {
		texts = append(texts, line.Text)
	}
	return texts
}
