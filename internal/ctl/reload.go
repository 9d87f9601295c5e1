package ctl

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"tako/internal/management"
	"tako/internal/tako"
)

// reloadPoll is how often the server is asked whether a reload is over.
const reloadPoll = 100 * time.Millisecond

func (r *run) reloadCommand() *cobra.Command {
	return r.command(&cobra.Command{
		Use: "reload", Args: cobra.NoArgs,
		Short: "Change to the installed version and settings, losing no request",
		Long: `Have the server become the installed program, in the same process, and read its
settings anew. Apps are not touched. A new proxy takes over when it is ready; if
anything would not work, or does not, everything stays as it is and this says why.`,
	}, func(ctx context.Context, s *conn, _ []string) error {
		var reply struct {
			Reload management.ReloadInfo `json:"reload"`
		}
		if err := s.Do(ctx, management.Request{Command: "reload"}, r.step, &reply); err != nil {
			return err
		}
		info, err := r.reloaded(ctx, reply.Reload)
		if err != nil {
			return err
		}
		if r.json {
			b, err := json.Marshal(info)
			if err != nil {
				return err
			}
			return r.printJSON(b)
		}
		r.say("reloaded: version %s, pid %d", clean(info.Version), info.PID)
		return nil
	})
}

// reloaded waits for the reload after before to end. Each question has a connection
// of its own: the server may end meanwhile, and be started again.
func (r *run) reloaded(ctx context.Context, before management.ReloadInfo) (info management.ServerInfo, err error) {
	for {
		select {
		case <-ctx.Done():
			return info, fmt.Errorf("wait for the reload: %w", context.Cause(ctx))
		case <-time.After(reloadPoll):
		}
		info = management.ServerInfo{}
		err := r.with(ctx, func(ctx context.Context, s *conn) error {
			return s.Do(ctx, management.Request{Command: "server_info"}, nil, &info)
		})
		if err != nil || info.Reload == nil {
			if e, ok := errors.AsType[*tako.Error](err); ok {
				return info, e
			}
			continue // between two images
		}
		switch now := info.Reload; {
		case now.Running:
		case now.Failed > before.Failed:
			return info, tako.Errorf(tako.CodeFailed, "reload failed, and everything goes on as before: %s", now.LastError)
		case now.Count > before.Count:
			return info, nil
		}
	}
}
