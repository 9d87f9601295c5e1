package archive

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/klauspost/compress/zstd"

	"tako/internal/tako"
)

func TestUnpackMakesWhatWasPacked(t *testing.T) {
	src := tree(t, map[string]string{"app.json": "{}", "bin/run": "#!", "a/b/c": "deep", "ü/" + strings.Repeat("n", 200): "long"})
	must(t, os.Chmod(filepath.Join(src, "bin/run"), 0o4750))
	must(t, os.Symlink("../a/b/c", filepath.Join(src, "bin/link")))
	must(t, os.Mkdir(filepath.Join(src, "empty"), 0o700))
	when := time.Unix(1700000000, 5)
	must(t, os.Chtimes(filepath.Join(src, "app.json"), when, when))
	var one, two bytes.Buffer
	packed, err := Pack(t.Context(), &one, src, Options{})
	must(t, err)
	_, err = Pack(t.Context(), &two, src, Options{})
	must(t, err)
	if !bytes.Equal(one.Bytes(), two.Bytes()) {
		t.Error("the same folder gave different archives")
	}
	dst := t.TempDir()
	got, err := Unpack(t.Context(), &one, dst, Limits{})
	must(t, err)
	if want := (Stats{Files: 5, Dirs: 5, Bytes: 12}); got != want || packed != want {
		t.Errorf("packed %+v, unpacked %+v, want %+v", packed, got, want)
	}
	for name, mode := range map[string]os.FileMode{"app.json": 0o644, "bin/run": 0o755, "empty": os.ModeDir | 0o755, "a/b": os.ModeDir | 0o755} {
		info, err := os.Lstat(filepath.Join(dst, name))
		must(t, err)
		if info.Mode() != mode {
			t.Errorf("%s has mode %v, want %v", name, info.Mode(), mode)
		}
		if name == "app.json" && !info.ModTime().Equal(time.Unix(1700000000, 0)) {
			t.Errorf("app.json changed at %v", info.ModTime())
		}
	}
	if text, err := os.ReadFile(filepath.Join(dst, "bin/link")); err != nil || string(text) != "deep" {
		t.Errorf("the link gives %q, %v", text, err)
	}
}

func TestPackRefuses(t *testing.T) {
	for name, c := range map[string]struct {
		make func(dir string) error
		want string
	}{
		"a fifo":              {func(d string) error { return syscall.Mkfifo(filepath.Join(d, "f"), 0o600) }, `"f" is a fifo`},
		"a link out":          {func(d string) error { return os.Symlink("../x", filepath.Join(d, "l")) }, `outside the directory`},
		"an absolute link":    {func(d string) error { return os.Symlink("/etc", filepath.Join(d, "l")) }, `absolute path`},
		"a name not in UTF-8": {func(d string) error { return os.WriteFile(filepath.Join(d, "\xff"), nil, 0o600) }, `not UTF-8`},
		"too many files": {func(d string) error {
			return errors.Join(os.Mkdir(d+"/a", 0o700), os.Mkdir(d+"/b", 0o700), os.Mkdir(d+"/c", 0o700))
		}, `at most 2 files`},
		"too many bytes":       {func(d string) error { return os.WriteFile(filepath.Join(d, "big"), make([]byte, 11), 0o600) }, `at most 10 bytes`},
		"an ignore file: long": {func(d string) error { return os.WriteFile(d+"/.takoignore", make([]byte, MaxIgnore+1), 0o600) }, `more than 1048576 bytes`},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			must(t, c.make(dir))
			_, err := Pack(t.Context(), io.Discard, dir, Options{Limits: Limits{MaxFiles: 2, MaxBytes: 10}})
			refused(t, err, c.want)
		})
	}
}

func TestPackRefusesAFileThatGrows(t *testing.T) {
	dir := tree(t, map[string]string{"a": "1"})
	l, err := List(t.Context(), dir, Options{})
	must(t, err)
	defer l.Close()
	write(t, dir, "a", "22")
	refused(t, l.Write(t.Context(), io.Discard), "changed while")
}

// file, link and folder are headers for tests.
func file(name, text string) entry {
	return entry{tar.Header{Name: name, Mode: 0o644, Size: int64(len(text))}, text}
}

func link(name, target string) entry {
	return entry{tar.Header{Name: name, Typeflag: tar.TypeSymlink, Linkname: target}, ""}
}

func folder(name string) entry {
	return entry{tar.Header{Name: name + "/", Typeflag: tar.TypeDir, Mode: 0o2777}, ""}
}

func special(name string, flag byte) entry {
	return entry{tar.Header{Name: name, Typeflag: flag, Linkname: "x"}, ""}
}

type entry struct {
	h    tar.Header
	text string
}

func plain(t testing.TB, entries ...entry) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, e := range entries {
		must(t, w.WriteHeader(&e.h))
		_, err := io.WriteString(w, e.text)
		must(t, err)
	}
	must(t, w.Close())
	return b.Bytes()
}

func squeeze(t testing.TB, b []byte, opts ...zstd.EOption) []byte {
	t.Helper()
	var out bytes.Buffer
	w, err := zstd.NewWriter(&out, append(opts, zstd.WithEncoderConcurrency(1))...)
	must(t, err)
	_, err = w.Write(b)
	must(t, err)
	must(t, w.Close())
	return out.Bytes()
}

func TestUnpackRefuses(t *testing.T) {
	pax := func(records map[string]string) entry {
		return entry{tar.Header{Name: "a", PAXRecords: records, Format: tar.FormatPAX}, ""}
	}
	pack := func(e ...entry) []byte { return squeeze(t, plain(t, e...)) }
	good := plain(t, file("a", "1"))
	for name, c := range map[string]struct {
		archive []byte
		want    string
	}{
		"an absolute path":         {pack(file("/a", "")), "absolute"},
		"a path upwards":           {pack(file("../a", "")), "not plain"},
		"a path upwards inside":    {pack(file("a/../../b", "")), "not plain"},
		"an empty part":            {pack(file("a//b", "")), "not plain"},
		"a control character":      {pack(file("a\nb", "")), "control"},
		"a path not in UTF-8":      {pack(entry{tar.Header{Name: "\xff", Format: tar.FormatGNU}, ""}), "not UTF-8"},
		"a long path":              {pack(file(strings.Repeat("abc/", 256)+"d", "")), "at most 1024"},
		"a long part":              {pack(file(strings.Repeat("a", 256), "")), "at most 255"},
		"a deep path":              {pack(file(strings.Repeat("a/", 64)+"a", "")), "64 folders deep"},
		"a file twice":             {pack(file("a", ""), file("a", "")), "twice"},
		"a folder twice":           {pack(folder("a"), folder("a")), "twice"},
		"a link over a file":       {pack(file("a", ""), link("a", "b")), "twice"},
		"a file over a folder":     {pack(file("a/b", ""), file("a", "")), "twice"},
		"a path through a link":    {pack(folder("d"), link("l", "d"), file("l/x", "")), `below "l", which is a link`},
		"a path through a file":    {pack(file("f", ""), file("f/x/y", "")), `below "f", which is a file`},
		"a folder through a link":  {pack(folder("d"), link("l", "d"), folder("l/x")), "is a link"},
		"a link out":               {pack(link("l", "../x")), "outside"},
		"a deep link out":          {pack(link("a/b/l", "../../../x")), "outside"},
		"a link up through a link": {pack(link("a/up", ".."), link("l", "a/up/../x")), "put the '..' first"},
		"an absolute link":         {pack(link("l", "/etc/passwd")), "absolute"},
		"a long link":              {pack(link("l", strings.Repeat("a", 1025))), "at most 1024"},
		"a hard link":              {pack(file("x", ""), special("h", tar.TypeLink)), `"h" is a hard link`},
		"a fifo":                   {pack(special("f", tar.TypeFifo)), `"f" is a fifo`},
		"a character device":       {pack(special("c", tar.TypeChar)), "character device"},
		"a block device":           {pack(special("b", tar.TypeBlock)), "block device"},
		"an extended attribute":    {pack(pax(map[string]string{"SCHILY.xattr.user.x": "1"})), "SCHILY.xattr.user.x"},
		"an unknown record":        {pack(pax(map[string]string{"ACME.thing": "1"})), "ACME.thing"},
		"a global path":            {pack(entry{tar.Header{Typeflag: tar.TypeXGlobalHeader, PAXRecords: map[string]string{"path": "x"}}, ""}), "global record"},
		"too many files":           {pack(file("a", ""), file("b", ""), file("c", ""), file("d", "")), `"d" is one too many: an archive may have at most 3`},
		"implied folders count":    {pack(file("a/b/c/d", "")), "one too many"},
		"too many bytes":           {pack(file("a", "12345"), file("b", "678901")), `"b" of 6 bytes is too much: the files of an archive may have at most 10`},
		"no end mark":              {squeeze(t, good[:1024]), "no end mark"},
		"cut off in a file":        {squeeze(t, good[:512]), "cut off"},
		"cut off in zstd":          {squeeze(t, good)[:20], "cut off"},
		"nothing":                  {nil, "no end mark"},
		"not zstd":                 {good, "not zstd"},
		"not tar":                  {squeeze(t, bytes.Repeat([]byte("x"), 1024)), "damaged"},
		"garbage after the tar":    {squeeze(t, append(bytes.Clone(good), 'x')), "follows the end"},
		"garbage after the zstd":   {append(squeeze(t, good), "garbage"...), "not zstd, or something follows"},
		"many zeros after":         {squeeze(t, append(bytes.Clone(good), make([]byte, MaxTrailer+1)...)), "zeros follow"},
		"a wide window":            {squeeze(t, append(bytes.Clone(good), make([]byte, 1<<20)...), zstd.WithWindowSize(128<<20)), "window above 64 MiB"},
	} {
		t.Run(name, func(t *testing.T) {
			parent := t.TempDir()
			dir := filepath.Join(parent, "into")
			must(t, os.Mkdir(dir, 0o700))
			_, err := Unpack(t.Context(), bytes.NewReader(c.archive), dir, Limits{MaxFiles: 3, MaxBytes: 10})
			refused(t, err, c.want)
			if list, _ := os.ReadDir(parent); len(list) != 1 {
				t.Errorf("something was made outside: %v", list)
			}
		})
	}
}

func TestUnpackTakesWhatTarProgramsWrite(t *testing.T) {
	archive := squeeze(t, append(plain(t, folder("."), file("./a/b", "1"), folder("./a"),
		entry{tar.Header{Typeflag: tar.TypeXGlobalHeader, PAXRecords: map[string]string{"comment": "c"}}, ""},
		link("./a/l", "./b")), make([]byte, 10240)...))
	dir := t.TempDir()
	got, err := Unpack(t.Context(), bytes.NewReader(archive), dir, Limits{})
	must(t, err)
	if want := (Stats{Files: 2, Dirs: 1, Bytes: 1}); got != want {
		t.Errorf("got %+v, want %+v", got, want)
	}
}

// zeros gives n zero bytes.
type zeros int64

func (z *zeros) Read(p []byte) (int, error) {
	if *z == 0 {
		return 0, io.EOF
	}
	n := min(int64(len(p)), int64(*z))
	clear(p[:n])
	*z -= zeros(n)
	return int(n), nil
}

func TestUnpackBoundsWhatABombMakes(t *testing.T) {
	var bomb bytes.Buffer
	w, err := zstd.NewWriter(&bomb, zstd.WithEncoderConcurrency(1))
	must(t, err)
	tw := tar.NewWriter(w)
	must(t, tw.WriteHeader(&tar.Header{Name: "bomb", Size: 256 << 20}))
	z := zeros(256 << 20)
	_, err = io.Copy(tw, &z)
	must(t, err)
	must(t, tw.Close())
	must(t, w.Close())
	dir := t.TempDir()
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	got, err := Unpack(t.Context(), &bomb, dir, Limits{MaxBytes: 1 << 20})
	runtime.ReadMemStats(&after)
	refused(t, err, "at most 1048576 bytes")
	if got.Bytes != 0 {
		t.Errorf("%d bytes came out", got.Bytes)
	}
	if used := after.TotalAlloc - before.TotalAlloc; used > 32<<20 {
		t.Errorf("unpacking took %d bytes of memory", used)
	}
}

func TestUnpackBoundsAHeader(t *testing.T) {
	// Extended headers one after the other, with no entry to belong to.
	var b bytes.Buffer
	one := plain(t, entry{tar.Header{Name: "a", Format: tar.FormatPAX, PAXRecords: map[string]string{"comment": strings.Repeat("c", 600)}}, ""})
	for b.Len() <= MaxHeader {
		b.Write(one[:512+1024]) // the extended header without its entry
	}
	_, err := Unpack(t.Context(), bytes.NewReader(squeeze(t, b.Bytes())), t.TempDir(), Limits{})
	refused(t, err, "longer than 262144 bytes")
}

func TestUnpackBoundsAllNamesTogether(t *testing.T) {
	l := ledger{limits: Limits{}.withDefaults(), names: MaxNames}
	refused(t, l.add("a", false, 0), "33554432")
}

func TestUnpackWantsAnEmptyFolder(t *testing.T) {
	dir := tree(t, map[string]string{"a": ""})
	if _, err := Unpack(t.Context(), bytes.NewReader(nil), dir, Limits{}); err == nil || !strings.Contains(err.Error(), "not empty") {
		t.Errorf("got %v", err)
	}
}

func TestUnpackEndsWithItsContext(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := Unpack(ctx, bytes.NewReader(squeeze(t, plain(t))), t.TempDir(), Limits{}); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
}

func TestUnpackTellsTroubleOfTheStreamFromRefusal(t *testing.T) {
	broken := errors.New("line is down")
	_, err := Unpack(t.Context(), io.MultiReader(bytes.NewReader(squeeze(t, plain(t, file("a", "1")))[:12]), failing{broken}), t.TempDir(), Limits{})
	if _, ok := errors.AsType[*tako.Error](err); ok || !errors.Is(err, broken) {
		t.Errorf("got %v", err)
	}
}

type failing struct{ err error }

func (f failing) Read([]byte) (int, error) { return 0, f.err }

// FuzzUnpack checks that nothing appears beside the folder, and that no link in
// it leads out.
func FuzzUnpack(f *testing.F) {
	f.Add(plain(f, folder("a"), file("a/b", "1"), link("a/l", "../a/b")))
	f.Add(plain(f, file("../a", "")))
	f.Add(plain(f, link("a/b/up", "../.."), link("l", "a/b/up/../x"), file("l/x", "")))
	f.Fuzz(func(t *testing.T, data []byte) {
		parent := t.TempDir()
		dir := filepath.Join(parent, "into")
		must(t, os.Mkdir(dir, 0o700))
		unpack(t.Context(), bytes.NewReader(squeeze(t, data)), dir, Limits{MaxFiles: 50, MaxBytes: 1 << 16}, func(*os.File) error { return nil })
		if list, _ := os.ReadDir(parent); len(list) != 1 {
			t.Fatalf("something was made outside: %v", list)
		}
		filepath.WalkDir(dir, func(name string, d os.DirEntry, err error) error {
			if err == nil && d.Type() == os.ModeSymlink {
				if to, err := filepath.EvalSymlinks(name); err == nil && to != dir && !strings.HasPrefix(to, dir+"/") {
					t.Errorf("%s leads to %s", name, to)
				}
			}
			return nil
		})
	})
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// refused checks that err is a refusal with the given words.
func refused(t testing.TB, err error, want string) {
	t.Helper()
	e, ok := errors.AsType[*tako.Error](err)
	if !ok || e.Code != tako.CodeInvalid || !strings.Contains(err.Error(), want) {
		t.Errorf("got %#v %v, want a refusal with %q", err, err, want)
	}
}
