package launch

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
	"unicode/utf8"

	"golang.org/x/sys/unix"
)

func TestLinesAreCutAtTheLimitAndInsideNoCharacter(t *testing.T) {
	long := strings.Repeat("x", MaxLogLine)
	for name, c := range map[string]struct {
		in   string
		want []string
	}{
		"plain":         {"a\nb\r\n\nc", []string{"a", "b", "", "c"}},
		"just fits":     {long + "\n", []string{long}},
		"one too many":  {long + "y\n", []string{long + Cut, Cut + "y"}},
		"between":       {long[1:] + "é\n", []string{long[1:] + Cut, Cut + "é"}},
		"three parts":   {long + long + "z", []string{long + Cut, Cut + long + Cut, Cut + "z"}},
		"nothing":       {"", nil},
		"no characters": {strings.Repeat("\x80", MaxLogLine+2), nil},
	} {
		for _, step := range []int{1, 7, 4096, 1 << 20} {
			var s splitter
			var got []string
			for in := []byte(c.in); len(in) > 0; {
				n := min(step, len(in))
				got = append(got, s.feed(in[:n])...)
				in = in[n:]
			}
			got = append(got, s.rest()...)
			if name == "no characters" {
				if len(got) != 2 {
					t.Errorf("%s: %d lines", name, len(got))
				}
				continue
			}
			if strings.Join(got, "|") != strings.Join(c.want, "|") || len(got) != len(c.want) {
				t.Errorf("%s in steps of %d: got %d lines, want %d", name, step, len(got), len(c.want))
			}
		}
	}
}

func FuzzSplitterLosesNothing(f *testing.F) {
	f.Add([]byte("a\nb"), 3)
	f.Add([]byte(strings.Repeat("é\r", MaxLogLine)), 100)
	f.Fuzz(func(t *testing.T, in []byte, step int) {
		step = max(step, 1)
		var s splitter
		var lines []string
		for rest := in; len(rest) > 0; {
			n := min(step, len(rest))
			lines = append(lines, s.feed(rest[:n])...)
			rest = rest[n:]
		}
		lines = append(lines, s.rest()...)
		var out strings.Builder
		for _, l := range lines {
			if len(l) > MaxLogLine+2*len(Cut) {
				t.Fatalf("a line of %d bytes", len(l))
			}
			out.WriteString(l)
		}
		clean := strings.NewReplacer("\n", "", "\r", "", Cut, "")
		if got, want := clean.Replace(out.String()), clean.Replace(string(in)); utf8.Valid(in) && got != want {
			t.Fatalf("got %d bytes, want %d", len(got), len(want))
		}
	})
}

func FuzzLogLineIsJSON(f *testing.F) {
	f.Add("plain")
	f.Add("\x00\x1f\"\\\t\x7f\xff\u2028é</script>")
	f.Fuzz(func(t *testing.T, text string) {
		b := appendLine(nil, time.Now(), 3, StreamOut, text)
		var got struct{ Text string }
		if err := json.Unmarshal(b, &got); err != nil {
			t.Fatalf("%q: %s: %v", text, b, err)
		}
		if want := strings.ToValidUTF8(text, "\uFFFD"); utf8.ValidString(text) && got.Text != want {
			t.Fatalf("got %q, want %q", got.Text, want)
		}
		if strings.Count(string(b), "\n") != 1 {
			t.Fatalf("more than a line: %q", b)
		}
	})
}

func TestLogsAreRotatedBySizeAndCount(t *testing.T) {
	dir := t.TempDir()
	l := NewLog(dir, 0, MinLogBytes, 3)
	defer l.Close()
	text := strings.Repeat("x", 1000)
	for i := range 400 {
		l.write(1, StreamOut, []string{fmt.Sprintf("%04d %s", i, text)})
	}
	names := []string{LogName + ".2", LogName + ".1", LogName}
	var all string
	for _, name := range names {
		b, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil || len(b) > MinLogBytes || len(b) < MinLogBytes/8 {
			t.Errorf("%s: %d bytes, %v", name, len(b), err)
		}
		all += string(b)
	}
	if entries, _ := os.ReadDir(dir); len(entries) != len(names) {
		t.Errorf("files: %v", entries)
	}
	lines := strings.Split(strings.TrimSuffix(all, "\n"), "\n")
	for i, line := range lines {
		if want := fmt.Sprintf(`"text":"%04d `, 400-len(lines)+i); !strings.Contains(line, want) {
			t.Fatalf("line %d: %.80s, want %s", i, line, want)
		}
	}
	l.Resize(MinLogBytes, 1)
	for range 100 {
		l.write(1, StreamOut, []string{text})
	}
	if entries, _ := os.ReadDir(dir); len(entries) != 1 {
		t.Errorf("files of one: %v", entries)
	}
}

// full is a file on a disk that takes only so much.
type full struct {
	*os.File
	room *int
}

func (f full) Write(b []byte) (int, error) {
	n := min(*f.room, len(b))
	*f.room -= n
	n, err := f.File.Write(b[:n])
	if err == nil && n < len(b) {
		err = unix.ENOSPC
	}
	return n, err
}

func TestFullDiskDropsWholeLinesAndSaysHowMany(t *testing.T) {
	dir := t.TempDir()
	l := NewLog(dir, 0, 0, 0)
	defer l.Close()
	room := 150
	l.open = func(name string) (logFile, error) {
		f, err := l.openFile(name)
		if err != nil {
			return nil, err
		}
		return full{f.(*os.File), &room}, nil
	}
	for i := range 5 {
		l.write(1, StreamOut, []string{fmt.Sprint("line ", i)})
	}
	room = 1 << 20
	l.write(1, StreamOut, []string{"again"})
	b, err := os.ReadFile(filepath.Join(dir, LogName))
	if err != nil {
		t.Fatal(err)
	}
	var texts []string
	for line := range strings.SplitSeq(strings.TrimSpace(string(b)), "\n") {
		var got struct{ Text string }
		if err := json.Unmarshal([]byte(line), &got); err != nil {
			t.Fatalf("%s: %v", line, err)
		}
		texts = append(texts, got.Text)
	}
	want := "line 0|4 lines of output were lost here: no space left on device|again"
	if got := strings.Join(texts, "|"); got != want {
		t.Errorf("got %s\nwant %s", got, want)
	}
}

// TestTwoLogsShareTheirFiles: the agents of two servers write side by side. No
// line is lost or torn, and files keep to their size and number.
func TestTwoLogsShareTheirFiles(t *testing.T) {
	dir := t.TempDir()
	const files, each = 4, 1500
	var all sync.WaitGroup
	for i := range 2 {
		l := NewLog(dir, 0, MinLogBytes, files)
		defer l.Close()
		all.Go(func() {
			for n := range each {
				l.write(uint32(i+1), StreamOut, []string{fmt.Sprintf("%d %s", n, strings.Repeat("x", 60))})
			}
		})
	}
	all.Wait()
	entries, err := os.ReadDir(dir)
	if err != nil || len(entries) > files {
		t.Fatalf("%d files, the limit is %d: %v", len(entries), files, err)
	}
	last := map[uint32]string{}
	for i := files - 1; i >= 0; i-- {
		name := filepath.Join(dir, LogName)
		if i > 0 {
			name += "." + strconv.Itoa(i)
		}
		b, err := os.ReadFile(name)
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		if len(b) > MinLogBytes+1000 {
			t.Errorf("%s has %d bytes, the limit is %d", name, len(b), MinLogBytes)
		}
		for line := range strings.Lines(string(b)) {
			var got struct {
				Instance uint32
				Text     string
			}
			if err := json.Unmarshal([]byte(line), &got); err != nil {
				t.Fatalf("%s: %q: %v", name, line, err)
			}
			last[got.Instance] = got.Text
		}
	}
	for i := range uint32(2) {
		if !strings.HasPrefix(last[i+1], fmt.Sprint(each-1, " ")) {
			t.Errorf("the last line of log %d is %.20q", i+1, last[i+1])
		}
	}
}

func TestLogThatWasTakenAwayIsBegunAnew(t *testing.T) {
	dir := t.TempDir()
	l := NewLog(dir, 0, 0, 0)
	defer l.Close()
	l.write(1, StreamOut, []string{"first"})
	if err := os.Remove(filepath.Join(dir, LogName)); err != nil {
		t.Fatal(err)
	}
	l.write(1, StreamOut, []string{"second"})
	if b, err := os.ReadFile(filepath.Join(dir, LogName)); err != nil || !strings.Contains(string(b), "second") {
		t.Errorf("log: %s, %v", b, err)
	}
}

func TestLogWhoseFolderIsGoneGoesOnWithoutIt(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "logs")
	l := NewLog(dir, 0, 0, 0)
	defer l.Close()
	l.write(1, StreamOut, []string{"lost"})
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	l.tryAt = time.Time{}
	l.write(1, StreamOut, []string{"kept"})
	b, _ := os.ReadFile(filepath.Join(dir, LogName))
	if !strings.Contains(string(b), "1 lines of output were lost here: open folder") || !strings.Contains(string(b), "kept") {
		t.Errorf("log: %s", b)
	}
}

func TestLogFollowsNoLink(t *testing.T) {
	dir := t.TempDir()
	target := filepath.Join(t.TempDir(), "target")
	if err := os.Symlink(target, filepath.Join(dir, LogName)); err != nil {
		t.Fatal(err)
	}
	l := NewLog(dir, 0, 0, 0)
	defer l.Close()
	l.write(1, StreamOut, []string{"x"})
	if _, err := os.Stat(target); err == nil {
		t.Error("the link's target was made")
	}
}

func TestFloodIsSlowedToItsRateAfterItsBurst(t *testing.T) {
	b := bucket{rate: FloodRate, burst: FloodBurst, tokens: FloodBurst}
	now := time.Unix(0, 0)
	if wait := b.take(now, FloodBurst); wait != 0 {
		t.Errorf("the burst waits %s", wait)
	}
	if wait := b.take(now, FloodRate); wait != time.Second {
		t.Errorf("a second's worth waits %s", wait)
	}
	if wait := b.take(now.Add(time.Second), 0); wait != 0 {
		t.Errorf("a second later it still waits %s", wait)
	}
	b.take(now.Add(time.Hour), 0)
	if b.tokens != FloodBurst {
		t.Errorf("it saved %v", b.tokens)
	}
}
