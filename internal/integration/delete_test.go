package integration

import (
	"testing"
	"time"

	"tako/internal/takotest"
)

// TestDeleteWaitsForRequestsAndNotForTheirLimit: nothing is in flight, so that the
// time that requests may take to finish is nobody's.
func TestDeleteWaitsForRequestsAndNotForTheirLimit(t *testing.T) {
	t.Parallel()
	s := start(t, takotest.Options{})
	deploy(t, s, "blog", "1", map[string]any{"timeouts": map[string]any{"stability": 0.1, "drain": 300}})
	about(t, s, "blog.localhost")
	began := time.Now()
	if _, err := s.Ask("delete", map[string]any{"app": "blog"}); err != nil {
		t.Errorf("after %s: %v", time.Since(began), err) // takotest.AskWait is far less than the limit
	}
}
