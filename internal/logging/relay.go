package logging

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"io"
	"maps"
	"slices"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/hashicorp/go-hclog"
)

// The limits of what a child writes.
const (
	MaxLine  = 64 << 10 // bytes of a line; the rest is cut, and the line says so
	MaxTrace = 64 << 10 // bytes of a panic's lines in one entry; more make another
	MaxName  = 64       // bytes of a module's name or a key
)

// Relay reads the output of the child that is named role, line by line, and
// writes it again to log under that name and with log's own pairs, until r ends.
// When ctx ends it stops too, if r has SetReadDeadline (an *os.File of a pipe).
//
// A JSON line of hclog keeps level, message and pairs; a module below role keeps
// its name, any other is the child's own invention and is dropped. What is not
// JSON is an error of the child's; the lines of a panic stay together, in order,
// in one entry whose pair "trace" holds them.
func Relay(ctx context.Context, r io.Reader, log hclog.Logger, role string) {
	if d, ok := r.(interface{ SetReadDeadline(t time.Time) error }); ok {
		defer context.AfterFunc(ctx, func() { _ = d.SetReadDeadline(time.Unix(1, 0)) })()
	}
	re := relay{log: log.ResetNamed(role), role: role, ours: make(map[string]bool)}
	for i, implied := 0, log.ImpliedArgs(); i+1 < len(implied); i += 2 {
		if k, ok := implied[i].(string); ok {
			re.ours[k] = true
		}
	}
	in := bufio.NewReaderSize(r, MaxLine)
	for {
		line, err := in.ReadSlice('\n')
		cut := err == bufio.ErrBufferFull //nolint:errorlint // ReadSlice returns it bare
		if len(line) > 0 {
			re.line(bytes.TrimRight(line, "\r\n"), cut)
		}
		for err == bufio.ErrBufferFull { //nolint:errorlint // as above
			_, err = in.ReadSlice('\n')
		}
		if err != nil {
			re.flush()
			return
		}
	}
}

type relay struct {
	log   hclog.Logger
	role  string
	ours  map[string]bool // keys of log's own pairs, not the child's to use
	trace []byte          // lines of a panic that still goes on
}

// traceStarts begin the lines that the Go runtime writes when it ends a program.
var traceStarts = []string{"panic:", "fatal error:", "goroutine ", "runtime: ", "unexpected fault address", "SIGQUIT:", "SIGABRT:", "[signal ", "WARNING: DATA RACE"}

func (re *relay) line(line []byte, cut bool) {
	if entry, ok := parse(line); ok {
		re.flush()
		re.emit(entry)
		return
	}
	text := string(line)
	if len(re.trace) > 0 || slices.ContainsFunc(traceStarts, func(s string) bool { return strings.HasPrefix(text, s) }) {
		if len(re.trace)+len(line) > MaxTrace {
			re.flush()
		}
		re.trace = append(append(re.trace, line...), '\n')
		return
	}
	switch {
	case cut:
		re.log.Error(clean(text, MaxLine), "cut", true)
	case strings.TrimSpace(text) != "":
		re.log.Error(clean(text, MaxLine))
	}
}

func (re *relay) flush() {
	if len(re.trace) > 0 {
		re.log.Error("crashed", "trace", strings.ToValidUTF8(string(re.trace), "\uFFFD"))
	}
	re.trace = nil
}

// entry is one line of hclog's JSON.
type entry struct {
	level  hclog.Level
	module string
	msg    string
	pairs  map[string]any
}

func parse(line []byte) (entry, bool) {
	dec := json.NewDecoder(bytes.NewReader(line))
	dec.UseNumber()
	e := entry{}
	if len(line) == 0 || line[0] != '{' || dec.Decode(&e.pairs) != nil || dec.More() {
		return entry{}, false
	}
	level, _ := e.pairs["@level"].(string)
	e.msg, _ = e.pairs["@message"].(string)
	e.module, _ = e.pairs["@module"].(string)
	e.level = hclog.LevelFromString(level)
	return e, e.level >= hclog.Trace && e.level <= hclog.Error
}

func (re *relay) emit(e entry) {
	log := re.log
	if sub, ok := strings.CutPrefix(e.module, re.role+"."); ok {
		log = log.Named(clean(sub, MaxName))
	}
	args := make([]any, 0, 2*len(e.pairs))
	for _, k := range slices.Sorted(maps.Keys(e.pairs)) {
		v := e.pairs[k]
		if k = cleanKey(k); k[0] == '@' || re.ours[k] {
			continue
		}
		switch v.(type) {
		case map[string]any, []any:
			b, err := json.Marshal(v)
			if err != nil {
				continue // it came from JSON
			}
			v = string(b)
		}
		args = append(args, k, v)
	}
	log.Log(e.level, clean(e.msg, MaxLine), args...)
}

// clean makes text of one line that a terminal shows as it is, at most limit
// bytes long.
func clean(s string, limit int) string {
	if len(s) > limit {
		s = s[:limit]
		for !utf8.ValidString(s) && len(s) > limit-utf8.UTFMax {
			s = s[:len(s)-1]
		}
	}
	return strings.Map(func(r rune) rune {
		if r == '\t' || unicode.IsPrint(r) {
			return r
		}
		return '\uFFFD'
	}, s)
}

// cleanKey makes a key that cannot look like a pair or the end of a line.
func cleanKey(k string) string {
	k = strings.Map(func(r rune) rune {
		if r == '=' || r == ':' || unicode.IsSpace(r) {
			return '_'
		}
		return r
	}, clean(k, MaxName))
	if k == "" {
		return "_"
	}
	return k
}
