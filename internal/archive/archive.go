// Package archive carries a directory as a tar in zstd: Pack writes one on a
// developer's machine, Unpack makes the files on a server, from bytes that a
// stranger may have written.
//
// An archive holds regular files, directories, and symbolic links that cannot
// lead out of it; everything else is refused by name, when packing as when
// unpacking. Unpack writes beneath one folder and nowhere else, in bounded
// memory and within its Limits. Owners, and permissions apart from "may be run",
// do not travel. Where archives come from, and what a release needs to have
// inside, is for the callers.
//
// A refusal is a *tako.Error with CodeInvalid that names the entry and the
// limit. Trouble with the disk or the stream is an ordinary error.
package archive

import (
	"path"
	"strings"
	"unicode"
	"unicode/utf8"

	"tako/internal/tako"
)

// The bounds of an archive that are not settings.
const (
	// DefaultMaxBytes and DefaultMaxFiles are what zero Limits mean.
	DefaultMaxBytes = 4 << 30
	DefaultMaxFiles = 200_000

	// MaxName is the longest path of an entry, and the longest target of a link,
	// in bytes; MaxPart the longest part of it between slashes.
	MaxName = 1024
	MaxPart = 255
	// MaxDepth is how many parts a path may have.
	MaxDepth = 64
	// MaxNames bounds all paths together, in bytes: they are kept in memory.
	MaxNames = 32 << 20
	// MaxWindow is the largest zstd window, in bytes: the memory of a decoder.
	MaxWindow = 64 << 20
	// MaxHeader bounds what stands before one entry's content, in bytes.
	MaxHeader = 256 << 10
	// MaxTrailer bounds the zeros after the last entry, in bytes. Tar programs
	// round an archive up to a whole record, of 10 KiB for most.
	MaxTrailer = 1 << 20
)

// Limits bound what an archive may hold. Zero fields mean the defaults.
type Limits struct {
	// MaxBytes bounds the content of all files together.
	MaxBytes int64
	// MaxFiles bounds the number of files, links and directories together.
	MaxFiles int
}

func (l Limits) withDefaults() Limits {
	if l.MaxBytes == 0 {
		l.MaxBytes = DefaultMaxBytes
	}
	if l.MaxFiles == 0 {
		l.MaxFiles = DefaultMaxFiles
	}
	return l
}

// Stats count what was packed or unpacked.
type Stats struct {
	Files int   // regular files and links
	Dirs  int   // directories, without the top one
	Bytes int64 // content of the files
}

// A ledger keeps Stats within Limits.
type ledger struct {
	Stats
	limits Limits
	names  int64
}

// add counts an entry of the given size.
func (l *ledger) add(name string, dir bool, size int64) error {
	if l.Files+l.Dirs >= l.limits.MaxFiles {
		return refuse("entry %q is one too many: an archive may have at most %d files and directories", name, l.limits.MaxFiles)
	}
	if size < 0 || size > l.limits.MaxBytes-l.Bytes {
		return refuse("entry %q of %d bytes is too much: the files of an archive may have at most %d bytes together", name, size, l.limits.MaxBytes)
	}
	if l.names += int64(len(name)); l.names > MaxNames {
		return refuse("entry %q is too much: the paths of an archive may have at most %d bytes together", name, MaxNames)
	}
	if dir {
		l.Dirs++
	} else {
		l.Files++
	}
	l.Bytes += size
	return nil
}

func refuse(format string, args ...any) error {
	return tako.Errorf(tako.CodeInvalid, format, args...)
}

// checkName says whether name can be an entry's: relative, clean, UTF-8, and
// within bounds.
func checkName(name string) error {
	if err := checkText("entry", name); err != nil {
		return err
	}
	switch {
	case name[0] == '/':
		return refuse("entry %q has an absolute path", name)
	case path.Clean(name) != name || name == "." || name == ".." || strings.HasPrefix(name, "../"):
		return refuse("entry %q has a path that is not plain: no '..', '.' or empty parts", name)
	}
	depth := 0
	for part := range strings.SplitSeq(name, "/") {
		if depth++; depth > MaxDepth {
			return refuse("entry %q is more than %d folders deep", name, MaxDepth)
		}
		if len(part) > MaxPart {
			return refuse("entry %q has a part of %d bytes: at most %d are allowed", name, len(part), MaxPart)
		}
	}
	return nil
}

// checkText says whether s is 1 to MaxName bytes of UTF-8 without control
// characters.
func checkText(what, s string) error {
	switch {
	case s == "":
		return refuse("%s without a name", what)
	case len(s) > MaxName:
		return refuse("%s %q… has a path of %d bytes: at most %d are allowed", what, s[:64], len(s), MaxName)
	case !utf8.ValidString(s):
		return refuse("%s %q has a path that is not UTF-8", what, s)
	case strings.ContainsFunc(s, unicode.IsControl):
		return refuse("%s %q has a path with control characters", what, s)
	}
	return nil
}

// checkLink says whether a link called name may point to target: to something in
// the archive, whatever other links there are. That is so when the '..' of the
// target all come first, and are fewer than the real directories above the link:
// from there it only goes down, through links for which the same is true.
func checkLink(name, target string) error {
	if err := checkText("target of link "+name, target); err != nil {
		return err
	}
	if target[0] == '/' {
		return refuse("link %q points to the absolute path %q: only relative targets inside the directory are allowed", name, target)
	}
	above := strings.Count(name, "/")
	down := false
	for part := range strings.SplitSeq(target, "/") {
		switch {
		case part == "" || part == ".":
		case part != "..":
			down = true
		case down:
			return refuse("link %q points to %q, with a '..' after a name: put the '..' first", name, target)
		default:
			if above--; above < 0 {
				return refuse("link %q points to %q, outside the directory", name, target)
			}
		}
	}
	return nil
}
