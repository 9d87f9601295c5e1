package integration

import (
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"tako/internal/takotest"
)

// mostGrown bounds what the proxy's memory grows by, however large bodies are.
const mostGrown = 100 << 20

// big is n bytes of which no two MiB are the same.
type big struct {
	left  int64
	block []byte
	at    int
	no    uint64
}

func newBig(n int64) *big { return &big{left: n, block: filler(1, 1<<20), at: 1 << 20} }

func (b *big) Read(p []byte) (int, error) {
	if b.left == 0 {
		return 0, io.EOF
	}
	if b.at == len(b.block) {
		b.no++
		binary.BigEndian.PutUint64(b.block, b.no)
		b.at = 0
	}
	n := copy(p[:min(int64(len(p)), b.left)], b.block[b.at:])
	b.at += n
	b.left -= int64(n)
	return n, nil
}

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// digest reads r to its end and says what it was.
func digest(r io.Reader) (string, error) {
	sum := crc32.New(castagnoli)
	n, err := io.CopyBuffer(struct{ io.Writer }{sum}, struct{ io.Reader }{r}, make([]byte, 256<<10))
	return fmt.Sprintf("%d bytes %08x", n, sum.Sum32()), err
}

// memory is a line of a process's status, in bytes.
func memory(t *testing.T, pid int, line string) int64 {
	t.Helper()
	text, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "status"))
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(text), "\n"+line+":")
	fields := strings.Fields(rest)
	if len(fields) == 0 {
		t.Fatalf("no %s in %s", line, text)
	}
	n, err := strconv.ParseInt(fields[0], 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	return n << 10
}

// TestDataPathLargeBodiesInLittleMemory sends them up and down by each protocol
// at once, with a length to an app of HTTP/1.1 and without to one of h2c.
func TestDataPathLargeBodiesInLittleMemory(t *testing.T) {
	t.Parallel()
	size := int64(64 << 20)
	if soaking() {
		size = 4 << 30
		if text := os.Getenv("TAKO_BIG"); text != "" { // in MiB
			mib, err := strconv.ParseInt(text, 10, 64)
			if err != nil {
				t.Fatal(err)
			}
			size = mib << 20
		}
	}
	want, err := digest(newBig(size))
	if err != nil {
		t.Fatal(err)
	}
	s := start(t, takotest.Options{})
	app := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method == http.MethodPost {
			if got, err := digest(r.Body); err == nil {
				io.WriteString(w, got)
			}
			return
		}
		if r.URL.Query().Has("counted") {
			w.Header().Set("Content-Length", strconv.FormatInt(size, 10))
		}
		io.CopyBuffer(struct{ io.Writer }{w}, struct{ io.Reader }{newBig(size)}, make([]byte, 256<<10))
	})
	serveApp(t, s, "big", app, nil)
	serveApp(t, s, "big2", app, map[string]any{"protocol": "h2c"})
	pid := proxyPID(t, s)
	before := memory(t, pid, "VmRSS")
	one := func(p takotest.Protocol, app string, up, counted bool) {
		client := s.Client(p)
		client.Timeout = 0
		defer client.CloseIdleConnections()
		req, err := http.NewRequest(http.MethodGet, s.URL(p, hostOf(app)+"/"), nil)
		if up && err == nil {
			req, err = http.NewRequest(http.MethodPost, s.URL(p, hostOf(app)+"/"), newBig(size))
		}
		if err != nil {
			t.Error(err)
			return
		}
		if counted {
			req.URL.RawQuery = "counted"
			if up {
				req.ContentLength = size
			}
		}
		res, err := client.Do(req)
		if err != nil {
			t.Errorf("%s to %s, up %v, counted %v: %v", p, app, up, counted, err)
			return
		}
		defer res.Body.Close()
		var got string
		if up {
			var text []byte
			text, err = io.ReadAll(res.Body)
			got = string(text)
		} else {
			got, err = digest(res.Body)
		}
		if err != nil || got != want {
			t.Errorf("%s to %s, up %v, counted %v: %q, %v, want %q", p, app, up, counted, got, err, want)
		}
	}
	for _, app := range []string{"big", "big2"} {
		each(protocols, func(p takotest.Protocol) {
			one(p, app, true, app == "big")
			one(p, app, false, app == "big")
		})
	}
	after := memory(t, pid, "VmHWM")
	t.Logf("%d MiB each: the proxy had %d MiB, at most %d", size>>20, before>>20, after>>20)
	if grown := after - before; grown > mostGrown {
		t.Errorf("the proxy's memory grew by %d MiB to %d, want less than %d", grown>>20, after>>20, int64(mostGrown)>>20)
	}
	if now := proxyPID(t, s); now != pid {
		t.Errorf("it is another proxy: pid %d became %d", pid, now)
	}
}
