package master

import (
	"fmt"
	"slices"
	"testing"
	"time"

	"tako/internal/release"
	"tako/internal/tako"
)

func TestOnlyOldUnusedReleasesBeyondTheNewestArePruned(t *testing.T) {
	now := time.Unix(1_800_000_000, 0)
	var stored []release.Stored // r0 is of today, r1 of five days ago …
	for i := range 12 {
		at := now.Add(-time.Duration(i) * 5 * 24 * time.Hour).Unix()
		stored = append(stored, release.Stored{Version: tako.ReleaseID(fmt.Sprintf("r%d", i)), DeployedAt: &at})
	}
	stored = append(stored, release.Stored{Version: "unknown"})
	for _, tc := range []struct {
		keep, days int
		inUse      string
		want       []tako.ReleaseID
	}{
		{10, 30, "", []tako.ReleaseID{"r10", "r11"}},
		{10, 30, "r11", []tako.ReleaseID{"r10"}},
		{3, 30, "r7", []tako.ReleaseID{"r6", "r8", "r9", "r10", "r11"}},
		{3, 365, "", nil},
		{100, 0, "", nil},
	} {
		got := prunable(stored, map[tako.ReleaseID]bool{tako.ReleaseID(tc.inUse): true}, tc.keep, tc.days, now)
		if !slices.Equal(got, tc.want) {
			t.Errorf("keep %d and %d days, %q in use: pruned %v, want %v", tc.keep, tc.days, tc.inUse, got, tc.want)
		}
	}
}

// A clock that was set back makes releases young, and none of them old.
func TestReleasesFromTheFutureAreKept(t *testing.T) {
	now := time.Unix(1_800_000_000, 0)
	var stored []release.Stored
	for i := range 5 {
		at := now.Add(time.Duration(5-i) * 1000 * time.Hour).Unix()
		stored = append(stored, release.Stored{Version: tako.ReleaseID(fmt.Sprintf("r%d", i)), DeployedAt: &at})
	}
	if got := prunable(stored, nil, 1, 30, now); got != nil {
		t.Errorf("pruned %v", got)
	}
}
