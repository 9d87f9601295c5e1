package master

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"tako/internal/ipc"
	"tako/internal/management"
	"tako/internal/tako"
	"tako/internal/wire"
)

type reader = io.Reader

// upload has the agent's helper unpack an archive into a new release folder. The
// master never looks into it: it moves bytes from the socket to a pipe.
func (s *server) upload(ctx context.Context, id tako.AppID, version tako.ReleaseID, archive io.Reader) (management.UploadResult, error) {
	var none management.UploadResult
	a := s.app(id)
	if !a.tryOp() {
		return none, errDeployBusy(id)
	}
	defer a.endOp()
	dir := a.layout.Release(version)
	if _, err := os.Lstat(dir); err == nil {
		return none, tako.Errorf(tako.CodeConflict, "Release '%s' of app '%s' exists already: choose another version, or deploy it by its path %s", version, id, dir)
	} else if !errors.Is(err, fs.ErrNotExist) {
		return none, err
	}
	if err := s.prepareApp(ctx, a); err != nil {
		return none, err
	}
	if err := a.tree(ctx, nil, false); err != nil {
		return none, err
	}

	var p [2]int
	if err := unix.Pipe2(p[:], unix.O_CLOEXEC); err != nil {
		return none, fmt.Errorf("upload: %w", err)
	}
	if err := unix.SetNonblock(p[1], true); err != nil { // our end only: so that a write can be given up
		return none, fmt.Errorf("upload: %w", err)
	}
	r, w := ipc.FD(p[0]), os.NewFile(uintptr(p[1]), "upload")
	ctx, cancel := context.WithTimeout(ctx, UploadTime)
	defer cancel()
	copied := make(chan error, 1)
	go func() {
		_, err := io.Copy(w, archive)
		copied <- errors.Join(err, w.Close())
	}()
	m, err := s.agentCall(ctx, &wire.Unpack{
		App: id, Dir: a.layout.Releases(), Name: string(version), User: a.user(),
		MaxBytes: MaxReleaseBytes, MaxFiles: MaxReleaseFiles, TimeoutMS: int(UploadTime / time.Millisecond),
	}, r)
	r.Close()
	_ = w.SetWriteDeadline(time.Now()) // whatever is still being copied is of no use now
	if err != nil {
		// The copier reads from the caller's connection: it has to end before we do.
		// What it waits for ends with the connection's own time limits.
		<-copied //nolint:errcheck // what the agent says counts
		if e := tako.AsError(err); e.Code == tako.CodeInternal {
			return none, err
		}
		return none, tako.Errorf(tako.AsError(err).Code, "Upload failed: %v", err)
	}
	defer m.Discard()
	done, ok := m.Body.(*wire.Unpacked)
	if !ok {
		return none, fmt.Errorf("upload: the agent answered %T", m.Body)
	}
	select {
	case err := <-copied:
		if err != nil && !errors.Is(err, os.ErrDeadlineExceeded) && !errors.Is(err, unix.EPIPE) {
			return none, errors.Join(tako.Errorf(tako.CodeFailed, "Upload failed: %v", err), os.RemoveAll(dir))
		}
	case <-ctx.Done():
		return none, context.Cause(ctx)
	}
	return management.UploadResult{Path: dir, Files: done.Files, Bytes: done.Bytes}, nil
}
