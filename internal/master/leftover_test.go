package master

import (
	"os/exec"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"

	"tako/internal/paths"
)

// TestALeftoverIsSeenTwiceBeforeItIsEnded: in one look a process may seem to be
// left because its parent ends at that moment.
func TestALeftoverIsSeenTwiceBeforeItIsEnded(t *testing.T) {
	s := &server{layout: paths.Layout{Data: t.TempDir()}, log: hclog.NewNullLogger()}
	cmd := exec.Command("sleep", "600")
	cmd.Env = []string{"TAKO_APP=blog", "TAKO_INSTANCE=1", "TAKO_DATA_DIR=" + s.layout.App("blog").Data()}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	defer func() { _ = cmd.Process.Kill() }()
	for end := time.Now().Add(10 * time.Second); len(s.leftovers(noInstances)) == 0; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("it is not found") // it was between fork and exec
		}
	}
	looks := 0
	s.endLeftovers(0, func() map[string]bool {
		looks++
		return map[string]bool{"blog.1": looks > 1}
	}, nil)
	select {
	case err := <-ended:
		t.Fatalf("seen once, it was ended: %v", err)
	case <-time.After(50 * time.Millisecond):
	}
	if looks != 2 {
		t.Errorf("%d looks, want 2", looks)
	}
	stop := make(chan struct{})
	close(stop)
	s.endLeftovers(time.Hour, noInstances, stop)
	select {
	case err := <-ended:
		t.Fatalf("the server stops, and it was ended: %v", err)
	case <-time.After(50 * time.Millisecond):
	}
	s.endLeftovers(time.Hour, noInstances, nil)
	<-ended
}
