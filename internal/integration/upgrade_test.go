package integration

import (
	"testing"

	"tako/internal/management"
	"tako/internal/takotest"
)

// TestUpgradeLockOutlivesReloadsAndDeaths: it is its owner's until its lease runs
// out or somebody with the right to takes it by force, which is logged.
func TestUpgradeLockOutlivesReloadsAndDeaths(t *testing.T) {
	t.Parallel()
	s := begin(t, takotest.Options{})
	deploy(t, s, "blog", "1", quick(nil))
	type fields = map[string]any
	if _, err := s.Ask("enter_upgrading", fields{"owner": "one"}); err != nil {
		t.Fatal(err)
	}
	info, ok := serverInfo(s)
	if !ok || info.Mode != "upgrading" || info.Upgrade == nil || info.Upgrade.Owner != "one" || info.Upgrade.AgeSecs < 0 ||
		info.Upgrade.LeaseSecs <= 0 || info.Upgrade.LeaseSecs > 600 {
		t.Fatalf("server_info says %s, %+v", info.Mode, info.Upgrade)
	}
	since := info.Upgrade.AcquiredAt
	held := func(s *takotest.Server, when string) {
		t.Helper()
		info, ok := serverInfo(s)
		if !ok || info.Mode != "upgrading" || info.Upgrade == nil || info.Upgrade.Owner != "one" || max(info.Upgrade.AcquiredAt-since, since-info.Upgrade.AcquiredAt) > 1 { // it goes by the uptime
			t.Errorf("%s: server_info says %s, %+v", when, info.Mode, info.Upgrade)
		}
		_, err := s.Ask("stop", fields{"app": "blog"})
		wantError(t, s, when, err, `Server is upgrading; 'stop' is temporarily blocked\. Please retry shortly\.`)
		_, err = s.Ask("enter_upgrading", fields{"owner": "two"})
		wantError(t, s, when, err, `Server is already upgrading \(owner: one\)\.`)
		about(t, s, "blog.localhost") // it serves all the same
	}
	if r := reload(t, s); r.LastError != "" {
		t.Fatal(r.LastError)
	}
	held(s, "after a reload")
	if err := s.Kill(); err != nil {
		t.Fatal(err)
	}
	if err := s.Start(); err != nil {
		t.Fatal(err)
	}
	held(s, "after kill -9")
	second := startBeside(t, s)
	if info, ok := serverInfo(second); !ok || info.Role != management.RoleFollower || info.Upgrade == nil || info.Upgrade.Owner != "one" {
		t.Errorf("the second server says %+v", info.Upgrade)
	}
	if err := s.Kill(); err != nil {
		t.Fatal(err)
	}
	owns(t, second)
	held(second, "with the second server")

	if _, err := second.Ask("enter_upgrading", fields{"owner": "two", "force": true}); err != nil {
		t.Fatal(err)
	}
	until(t, takotest.StartWait, "that it was taken by force is in the log", func() bool { // which comes by a pipe
		return logged(second, "upgrade lock taken over") == 1 && logged(second, "owner=two force=true") == 1
	})
	_, err := second.Ask("exit_upgrading", fields{"owner": "one"})
	wantError(t, second, "the owner before", err, `Failed to exit upgrading mode: owner does not hold the upgrade lock\.`)
	if _, err := second.Ask("exit_upgrading", fields{"owner": "two"}); err != nil {
		t.Error(err)
	}
	if info, ok := serverInfo(second); !ok || info.Mode != "normal" || info.Upgrade != nil {
		t.Errorf("then server_info says %s, %+v", info.Mode, info.Upgrade)
	}
	if _, err := second.Ask("stop", fields{"app": "blog"}); err != nil {
		t.Error(err)
	}
}
