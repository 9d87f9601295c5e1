package master

import (
	"os"
	"time"

	"tako/internal/logging"
	"tako/internal/release"
	"tako/internal/tako"
)

// prunable returns the releases that may be removed: all but the newest keep,
// those younger than days, and those in use. stored is newest first.
func prunable(stored []release.Stored, inUse map[tako.ReleaseID]bool, keep, days int, now time.Time) []tako.ReleaseID {
	var old []tako.ReleaseID
	for i, r := range stored {
		if i < keep || inUse[r.Version] || r.DeployedAt == nil {
			continue
		}
		if now.Sub(time.Unix(*r.DeployedAt, 0)) < time.Duration(days)*24*time.Hour {
			continue
		}
		old = append(old, r.Version)
	}
	return old
}

// prune removes an app's old releases from the disk, unless a second server is
// there. The caller holds a.op.
func (a *app) prune() {
	if pid := a.srv.second.connected(); pid != 0 {
		a.log.Debug("old releases stay while a second server may run them", logging.PID, pid)
		return
	}
	reg := a.registration()
	stored, err := release.List(a.layout, reg.Release, "")
	if err != nil {
		a.log.Warn("old releases not looked at", logging.Err, err)
		return
	}
	inUse := map[tako.ReleaseID]bool{reg.Release: true, reg.PreviousRelease: true}
	a.mu.Lock()
	for _, p := range a.procs {
		inUse[p.build.release] = true
	}
	a.mu.Unlock()
	for _, v := range prunable(stored, inUse, a.srv.s.KeepReleases, a.srv.s.KeepReleasesDays, time.Now()) {
		if err := os.RemoveAll(a.layout.Release(v)); err != nil {
			a.log.Warn("old release stays", logging.Release, string(v), logging.Err, err)
			continue
		}
		a.log.Info("old release removed", logging.Release, string(v))
	}
}
