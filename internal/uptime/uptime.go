// Package uptime says for how long the machine has been up. Whoever compares a
// moment with one of another process or another start needs it: clocks are set,
// and the monotonic clock of one process means nothing to the next.
//
// It promises that two moments of one boot are as far apart as its durations are,
// time asleep counted. What to do after another boot is for the caller.
package uptime

import (
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Now returns the id of this boot and the time since it began. boot is "" if the
// kernel does not say: then nothing can be compared.
func Now() (boot string, up time.Duration) {
	id, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return "", 0
	}
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts); err != nil {
		return "", 0
	}
	return strings.TrimSpace(string(id)), time.Duration(ts.Nano())
}
