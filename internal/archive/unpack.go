package archive

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"path"
	"slices"
	"strings"
	"time"

	"github.com/klauspost/compress/zstd"
	"golang.org/x/sys/unix"

	"tako/internal/tako"
)

// Modes of what is unpacked: nothing else of an entry's mode is kept.
const (
	fileMode    = 0o644
	programMode = 0o755
	dirMode     = 0o755
)

// latest is the last second of the year 9999: later times are cut to it.
const latest = 253402300799

// What is known of a path.
type kind byte

const (
	isImplied kind = iota + 1 // a directory that only stood in the path of an entry
	isDir
	isFile
	isLink
)

// Unpack reads an archive from r to its end and makes its files in dir, an
// existing empty folder. What is there when it returns nil is on the disk. After
// an error dir holds a part of the archive, for the caller to remove.
//
// Files get mode 0644, or 0755 if their owner might run them, directories 0755,
// whatever the umask; owner and group are those that the process gives to new
// files. ctx is looked at between reads: to end a read that waits, close r.
func Unpack(ctx context.Context, r io.Reader, dir string, limits Limits) (Stats, error) {
	return unpack(ctx, r, dir, limits, func(top *os.File) error { return unix.Syncfs(int(top.Fd())) })
}

// unpack is Unpack, with how to write what is there to the disk.
func unpack(ctx context.Context, r io.Reader, dir string, limits Limits, sync func(*os.File) error) (Stats, error) {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return Stats{}, fmt.Errorf("unpack archive: %w", err)
	}
	defer root.Close()
	top, err := root.Open(".")
	if err != nil {
		return Stats{}, fmt.Errorf("unpack archive: %w", err)
	}
	defer top.Close()
	switch _, err := top.ReadDir(1); {
	case err == nil:
		return Stats{}, fmt.Errorf("unpack archive: the folder %s is not empty", dir)
	case !errors.Is(err, io.EOF):
		return Stats{}, fmt.Errorf("unpack archive: %w", err)
	}

	limits = limits.withDefaults()
	input := &bounded{ctx: ctx, r: r, left: plainBytes(limits)}
	decoder, err := zstd.NewReader(input, zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true),
		zstd.WithDecoderMaxWindow(MaxWindow))
	if err != nil {
		return Stats{}, fmt.Errorf("unpack archive: %w", err)
	}
	defer decoder.Close()
	plain := &bounded{ctx: ctx, r: decoder, left: plainBytes(limits)}
	u := &unpacker{
		root: root, input: input, plain: plain, tar: tar.NewReader(plain),
		seen: make(map[string]kind), ledger: ledger{limits: limits}, buf: make([]byte, 128<<10),
	}
	if err := u.all(); err != nil {
		return u.Stats, fmt.Errorf("unpack archive: %w", err)
	}
	if err := sync(top); err != nil {
		return u.Stats, fmt.Errorf("unpack archive: write %s to the disk: %w", dir, err)
	}
	return u.Stats, nil
}

// plainBytes bounds an archive as a whole: the content and, for every entry, a
// generous header.
func plainBytes(l Limits) int64 {
	const perFile = 8 << 10
	overhead := int64(l.MaxFiles)*perFile + MaxHeader + MaxTrailer
	if l.MaxBytes > math.MaxInt64-overhead {
		return math.MaxInt64
	}
	return l.MaxBytes + overhead
}

// bounded reads at most left bytes from r, and while bound is set at
// most header bytes. It keeps the first error that was not the end.
type bounded struct {
	ctx    context.Context
	r      io.Reader
	left   int64
	header int64
	bound  bool // whether header counts
	err    error
	ended  bool
}

func (b *bounded) Read(p []byte) (int, error) {
	if b.err != nil {
		return 0, b.err
	}
	if b.err = b.ctx.Err(); b.err != nil {
		return 0, b.err
	}
	if b.left == 0 {
		b.err = refuse("the archive is too long: it has more than its files need")
		return 0, b.err
	}
	most := b.left
	if b.bound {
		if b.header == 0 {
			b.err = refuse("a header of the archive is longer than %d bytes", MaxHeader)
			return 0, b.err
		}
		most = min(most, b.header)
	}
	n, err := b.r.Read(p[:min(int64(len(p)), most)])
	b.left -= int64(n)
	b.header -= int64(n)
	switch {
	case err == io.EOF:
		b.ended = n == 0
		if n > 0 {
			err = nil
		}
	case err != nil:
		b.err = err
	}
	return n, err
}

type unpacker struct {
	ledger
	root  *os.Root
	input *bounded // compressed
	plain *bounded
	tar   *tar.Reader
	seen  map[string]kind
	other int // headers that belong to no entry
	buf   []byte
}

func (u *unpacker) all() error {
	for {
		u.plain.header, u.plain.bound = MaxHeader, true
		h, err := u.tar.Next()
		u.plain.bound = false
		if err == io.EOF {
			break
		}
		if err != nil {
			return u.trouble(err)
		}
		if err := u.entry(h); err != nil {
			return err
		}
	}
	if u.plain.ended {
		return refuse("the archive is cut off: it has no end mark")
	}
	if err := u.trailer(); err != nil {
		return err
	}
	for name, k := range u.seen {
		if k != isDir && k != isImplied {
			continue
		}
		// Only now: a set-group-id bit that the folders inherited has done its work.
		if err := u.chmodDir(name); err != nil {
			return err
		}
	}
	return nil
}

// trouble says what an error of the tar reader was about.
func (u *unpacker) trouble(err error) error {
	if e, ok := errors.AsType[*tako.Error](err); ok {
		return e
	}
	switch {
	case u.input.err != nil:
		return fmt.Errorf("read: %w", u.input.err)
	case errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
		return err
	case errors.Is(err, zstd.ErrWindowSizeExceeded), errors.Is(err, zstd.ErrDecoderSizeExceeded):
		return refuse("the archive was compressed with a window above %d MiB: compress it without --long and --ultra", MaxWindow>>20)
	case errors.Is(err, zstd.ErrMagicMismatch):
		return refuse("the archive is not zstd, or something follows it: send tar in zstd")
	case errors.Is(err, io.ErrUnexpectedEOF):
		return refuse("the archive is cut off")
	}
	return refuse("the archive is damaged: %v", err)
}

// trailer reads what follows the end mark.
func (u *unpacker) trailer() error {
	for n := 0; ; {
		m, err := u.plain.Read(u.buf)
		for _, b := range u.buf[:m] {
			if b != 0 {
				return refuse("something follows the end of the archive")
			}
		}
		if n += m; n > MaxTrailer {
			return refuse("more than %d zeros follow the end of the archive", MaxTrailer)
		}
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return u.trouble(err)
		}
	}
}

// The records of an extended header that may be there; only the path, the
// target, the size and the time of change are used.
var harmlessRecords = map[string]bool{
	"path": true, "linkpath": true, "size": true, "mtime": true, "atime": true, "ctime": true,
	"uid": true, "gid": true, "uname": true, "gname": true, "comment": true,
}

func (u *unpacker) entry(h *tar.Header) error {
	for key := range h.PAXRecords {
		if !harmlessRecords[key] {
			return refuse("entry %q has the extended record %q: only plain names, sizes and times are allowed", h.Name, key)
		}
	}
	if h.Typeflag == tar.TypeXGlobalHeader {
		for key := range h.PAXRecords {
			if key != "comment" {
				return refuse("the archive has a global record %q: only a comment is allowed", key)
			}
		}
		if u.other++; u.other > u.limits.MaxFiles {
			return refuse("the archive has more than %d global headers", u.limits.MaxFiles)
		}
		return nil
	}

	name := strings.TrimPrefix(h.Name, "./")
	dir := h.Typeflag == tar.TypeDir
	if dir {
		name = strings.TrimSuffix(name, "/")
		if name == "" || name == "." {
			// "./", as in: tar -C folder -c .
			if _, ok := u.seen["."]; ok {
				return refuse("entry %q is there twice", h.Name)
			}
			u.seen["."] = isDir
			return nil
		}
	}
	if err := checkName(name); err != nil {
		return err
	}
	switch {
	case !dir && h.Typeflag != tar.TypeReg && h.Typeflag != tar.TypeSymlink:
		return refuse("entry %q is a %s: only files, directories and symbolic links are allowed", name, kindName(h.Typeflag))
	case h.Typeflag != tar.TypeReg && h.Size != 0:
		return refuse("entry %q has content, and is not a file", name)
	}
	had := u.seen[name]
	if had != 0 && (had != isImplied || !dir) {
		return refuse("entry %q is there twice", name)
	}
	if had == isImplied {
		u.seen[name] = isDir
		return nil
	}
	if err := u.parents(name); err != nil {
		return err
	}
	size := h.Size
	if err := u.add(name, dir, size); err != nil {
		return err
	}
	switch {
	case dir:
		u.seen[name] = isDir
		return u.mkdir(name)
	case h.Typeflag == tar.TypeSymlink:
		u.seen[name] = isLink
		if err := checkLink(name, h.Linkname); err != nil {
			return err
		}
		return about(name, u.root.Symlink(h.Linkname, name))
	}
	u.seen[name] = isFile
	return u.file(name, h)
}

// parents makes the directories above name that no entry has made.
func (u *unpacker) parents(name string) error {
	var missing []string
	for dir := path.Dir(name); dir != "."; dir = path.Dir(dir) {
		switch u.seen[dir] {
		case 0:
			missing = append(missing, dir)
			continue
		case isFile:
			return refuse("entry %q is below %q, which is a file", name, dir)
		case isLink:
			return refuse("entry %q is below %q, which is a link", name, dir)
		case isDir, isImplied: // it and all above it are there
		}
		break
	}
	for _, dir := range slices.Backward(missing) {
		if err := u.add(dir, true, 0); err != nil {
			return err
		}
		u.seen[dir] = isImplied
		if err := u.mkdir(dir); err != nil {
			return err
		}
	}
	return nil
}

func (u *unpacker) mkdir(name string) error { return about(name, u.root.Mkdir(name, dirMode)) }

func (u *unpacker) chmodDir(name string) error {
	if name == "." {
		return nil // the caller's
	}
	f, err := u.root.Open(name)
	if err != nil {
		return about(name, err)
	}
	defer f.Close()
	return about(name, f.Chmod(dirMode))
}

func (u *unpacker) file(name string, h *tar.Header) error {
	f, err := u.root.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return about(name, err)
	}
	defer f.Close()
	for left := h.Size; left > 0; {
		n, err := u.tar.Read(u.buf[:min(left, int64(len(u.buf)))])
		if _, err := f.Write(u.buf[:n]); err != nil {
			return about(name, err)
		}
		if left -= int64(n); err != nil && left > 0 {
			if err == io.EOF {
				err = io.ErrUnexpectedEOF
			}
			return u.trouble(err)
		}
	}
	mode := os.FileMode(fileMode)
	if h.Mode&0o100 != 0 {
		mode = programMode
	}
	if err := f.Chmod(mode); err != nil {
		return about(name, err)
	}
	changed := time.Unix(min(max(h.ModTime.Unix(), 0), latest), 0)
	if err := u.root.Chtimes(name, changed, changed); err != nil {
		return about(name, err)
	}
	return about(name, f.Close())
}

func about(name string, err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("entry %q: %w", name, err)
}

func kindName(flag byte) string {
	switch flag {
	case tar.TypeLink:
		return "hard link"
	case tar.TypeChar:
		return "character device"
	case tar.TypeBlock:
		return "block device"
	case tar.TypeFifo:
		return "fifo"
	case tar.TypeGNUSparse:
		return "sparse file"
	}
	return fmt.Sprintf("thing of type %q", flag)
}
