package uptime

import "testing"

func TestOneBootGoesForward(t *testing.T) {
	boot, up := Now()
	again, later := Now()
	if len(boot) != 36 || again != boot || up <= 0 || later < up {
		t.Errorf("boot %q has been up for %s, then %q for %s", boot, up, again, later)
	}
}
