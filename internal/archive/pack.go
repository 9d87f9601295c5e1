package archive

import (
	"archive/tar"
	"cmp"
	"context"
	"fmt"
	"io"
	"io/fs"
	"os"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/klauspost/compress/zstd"
)

// Options are how to pack. The zero value is good.
type Options struct {
	Limits Limits
	// Wrote is told after each piece how much content has been read so far. It is
	// called from the goroutine of Write; nil for nobody.
	Wrote func(bytes int64)
}

// A Listing is what Pack would pack, in its order. Its folder stays open: who
// made it closes it.
type Listing struct {
	root    *os.Root
	opts    Options
	entries []item
	ledger
}

type item struct {
	name   string
	info   fs.FileInfo
	target string // of a link
}

// List finds what there is to pack in dir, and refuses what cannot be: see Pack.
func List(ctx context.Context, dir string, opts Options) (*Listing, error) {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, fmt.Errorf("pack: %w", err)
	}
	l := &Listing{root: root, opts: opts, ledger: ledger{limits: opts.Limits.withDefaults()}}
	r, prefix, err := above(dir)
	if err == nil {
		err = l.walk(ctx, ".", prefix, r)
	}
	if err != nil {
		root.Close()
		return nil, fmt.Errorf("pack %s: %w", dir, err)
	}
	return l, nil
}

// Stats counts what there is to pack.
func (l *Listing) Stats() Stats { return l.ledger.Stats }

// Has reports whether a regular file of that name would be packed.
func (l *Listing) Has(name string) bool {
	return slices.ContainsFunc(l.entries, func(e item) bool { return e.name == name && e.info.Mode().IsRegular() })
}

// Close closes the folder. It may be called again.
func (l *Listing) Close() error { return l.root.Close() }

// Pack writes the directory dir to w: every file, directory and link, in the
// order of their names, but what .gitignore and .takoignore leave out. The same
// content gives the same bytes.
//
// .gitignore means what it means to git, those above dir in a git work tree
// included; what only git's own settings ignore is packed. .takoignore is written
// the same way and goes before: a folder that it takes back in, with a line like
// "!dist/", comes whole. Everything called .git is left out always.
//
// Modes become 0644 or 0755 and times whole seconds. A socket, a device, a fifo
// and a link that leads out of dir are refused. A file that changes its size
// meanwhile is an error.
func Pack(ctx context.Context, w io.Writer, dir string, opts Options) (Stats, error) {
	l, err := List(ctx, dir, opts)
	if err != nil {
		return Stats{}, err
	}
	defer l.Close()
	return l.Stats(), l.Write(ctx, w)
}

// walk lists the folder name. prefix stands before names for the rules.
func (l *Listing) walk(ctx context.Context, name, prefix string, r rules) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	open := func(file string) (io.ReadCloser, error) {
		return l.openRegular(strings.TrimPrefix(file, prefix))
	}
	folder := strings.TrimSuffix(prefix+name, "/.")
	if name == "." && prefix == "" {
		folder = "."
	}
	r, err := r.below(folder, open)
	if err != nil {
		return err
	}
	f, err := l.root.Open(name)
	if err != nil {
		return err
	}
	list, err := f.ReadDir(-1)
	f.Close()
	if err != nil {
		return fmt.Errorf("read %s: %w", name, err)
	}
	slices.SortFunc(list, func(a, b fs.DirEntry) int { return cmp.Compare(a.Name(), b.Name()) })
	for _, d := range list {
		if d.Name() == ".git" {
			continue
		}
		child := d.Name()
		if name != "." {
			child = name + "/" + child
		}
		ignored, back := r.ignores(prefix+child, d.IsDir())
		if ignored {
			continue
		}
		if err := l.list(child, d); err != nil {
			return err
		}
		if d.IsDir() {
			inner := r
			inner.whole = r.whole || back
			if err := l.walk(ctx, child, prefix, inner); err != nil {
				return err
			}
		}
	}
	return nil
}

// list adds one entry.
func (l *Listing) list(name string, d fs.DirEntry) error {
	if err := checkName(name); err != nil {
		return err
	}
	info, err := d.Info()
	if err != nil {
		return err
	}
	e := item{name: name, info: info}
	var size int64
	switch info.Mode().Type() {
	case 0:
		size = info.Size()
	case fs.ModeDir:
	case fs.ModeSymlink:
		if e.target, err = l.root.Readlink(name); err != nil {
			return err
		}
		if err := checkLink(name, e.target); err != nil {
			return fmt.Errorf("%w; copy what it points to into the directory, or name it in %s", err, takoIgnore)
		}
	default:
		return refuse("%q is a %s: only files, directories and symbolic links can be packed; name it in %s", name, modeName(info.Mode()), takoIgnore)
	}
	if err := l.add(name, info.IsDir(), size); err != nil {
		return fmt.Errorf("%w; name what the app does not need in %s", err, takoIgnore)
	}
	l.entries = append(l.entries, e)
	return nil
}

// openRegular opens a file, if it is one.
func (l *Listing) openRegular(name string) (io.ReadCloser, error) {
	info, err := l.root.Lstat(name)
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() {
		return nil, errNotFile
	}
	// O_NONBLOCK: should it have become a fifo since, opening does not wait.
	return l.root.OpenFile(name, os.O_RDONLY|syscall.O_NONBLOCK, 0)
}

// Write packs what was listed.
func (l *Listing) Write(ctx context.Context, w io.Writer) error {
	z, err := zstd.NewWriter(w, zstd.WithWindowSize(8<<20), zstd.WithEncoderCRC(true))
	if err != nil {
		return fmt.Errorf("pack: %w", err)
	}
	defer z.Close()
	p := &packer{ctx: ctx, l: l, tar: tar.NewWriter(z), buf: make([]byte, 128<<10)}
	for _, e := range l.entries {
		if err := p.entry(e); err != nil {
			return fmt.Errorf("pack %s: %w", e.name, err)
		}
	}
	if err := p.tar.Close(); err != nil {
		return fmt.Errorf("pack: %w", err)
	}
	if err := z.Close(); err != nil {
		return fmt.Errorf("pack: %w", err)
	}
	return nil
}

type packer struct {
	ctx  context.Context
	l    *Listing
	tar  *tar.Writer
	buf  []byte
	done int64
}

func (p *packer) entry(e item) error {
	h := &tar.Header{Name: e.name, Mode: fileMode, ModTime: e.info.ModTime().Truncate(time.Second)}
	switch {
	case e.info.IsDir():
		h.Typeflag, h.Name, h.Mode = tar.TypeDir, e.name+"/", dirMode
		return p.tar.WriteHeader(h)
	case e.target != "":
		h.Typeflag, h.Linkname = tar.TypeSymlink, e.target
		return p.tar.WriteHeader(h)
	}
	f, err := p.l.openRegular(e.name)
	if err != nil {
		return err
	}
	defer f.Close()
	h.Typeflag, h.Size = tar.TypeReg, e.info.Size()
	if e.info.Mode()&0o111 != 0 {
		h.Mode = programMode
	}
	if err := p.tar.WriteHeader(h); err != nil {
		return err
	}
	for left := h.Size; ; {
		if err := p.ctx.Err(); err != nil {
			return err
		}
		n, err := f.Read(p.buf)
		if left -= int64(n); left < 0 || err == io.EOF && left > 0 {
			return refuse("the file changed while it was being packed; try again, or name it in %s", takoIgnore)
		}
		if _, err := p.tar.Write(p.buf[:n]); err != nil {
			return err
		}
		if p.done += int64(n); n > 0 && p.l.opts.Wrote != nil {
			p.l.opts.Wrote(p.done)
		}
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

func modeName(m fs.FileMode) string {
	switch {
	case m&fs.ModeSocket != 0:
		return "socket"
	case m&fs.ModeNamedPipe != 0:
		return "fifo"
	case m&fs.ModeDevice != 0:
		return "device"
	}
	return "thing of an unknown kind"
}
