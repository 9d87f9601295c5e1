package launch

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"tako/internal/ipc"
	"tako/internal/tako"
)

// An Identity is whom a stage becomes: one user, one group and some more groups,
// and no capabilities: as user 0 it has nothing but what root owns.
type Identity struct {
	UID, GID uint32
	Groups   []uint32
}

// maxAnswer bounds what a helper may answer.
const maxAnswer = 64 << 10

// Help runs a Helper under the argv[0] name and fills result with what it made
// of the request. A nil identity is this process's own, without its powers.
// input becomes the helper's standard input, /dev/null if it is 0. When ctx ends
// the helper is killed.
func Help(ctx context.Context, name string, id *Identity, request any, input ipc.FD, result any) error {
	req, err := json.Marshal(request)
	if err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	who, err := json.Marshal(id)
	if err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	defer null.Close()      // nothing was written
	stdin := uintptr(input) // the number as it is: an os.File would change its mode
	if input == 0 {
		stdin = null.Fd()
	}
	var pipe [2]int
	if err := unix.Pipe2(pipe[:], unix.O_CLOEXEC); err != nil {
		return fmt.Errorf("%s: make a pipe: %w", name, err)
	}
	_ = unix.SetNonblock(pipe[0], true) // of our own end alone
	answers := os.NewFile(uintptr(pipe[0]), "answer")
	defer answers.Close() // only read
	c, err := spawn([]string{name, string(who), string(req)}, []uintptr{stdin, uintptr(pipe[1]), 2}, 0)
	ipc.FD(pipe[1]).Close()
	if err != nil {
		return err
	}
	stop := context.AfterFunc(ctx, func() { _ = answers.SetReadDeadline(time.Now()) })
	b, rerr := io.ReadAll(io.LimitReader(answers, maxAnswer))
	stop()
	if rerr != nil || ctx.Err() != nil {
		c.signalGroup(unix.SIGKILL)
	}
	c.wait()
	c.signalGroup(unix.SIGKILL)
	status, _ := c.reap()
	if cause := context.Cause(ctx); cause != nil {
		return fmt.Errorf("%s: %w", name, cause)
	}
	got := helpAnswer{Result: result}
	if err := errors.Join(rerr, json.Unmarshal(b, &got)); err != nil {
		e := exitOf(status, true)
		return fmt.Errorf("%s ended without an answer (status %d %s): %w", name, e.Code, e.Signal, err)
	}
	if got.Code != "" {
		return &tako.Error{Code: got.Code, Message: got.Message}
	}
	return nil
}
