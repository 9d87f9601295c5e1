package h2

import "time"

// The budgets of one connection against floods. Each is spent by what costs the
// server work and the client nearly none, and fills up again with time, and with
// what the client gets: who fetches much may ask for much. What is over a budget
// ends the connection with ENHANCE_YOUR_CALM.
const (
	// ResetBurst and ResetRate (a second) bound streams that end because of the
	// client before they were answered: those it resets, and those it makes us
	// reset.
	ResetBurst, ResetRate = 500, 50
	// SettingsBurst and SettingsRate bound SETTINGS.
	SettingsBurst, SettingsRate = 50, 1
	// PingBurst and PingRate bound PING.
	PingBurst, PingRate = 200, 10
	// PriorityBurst and PriorityRate bound PRIORITY, and frames of unknown kinds.
	PriorityBurst, PriorityRate = 1000, 100
	// EmptyBurst and EmptyRate bound DATA without a byte that does not end a body.
	EmptyBurst, EmptyRate = 200, 10
	// WindowBurst and WindowRate bound WINDOW_UPDATE.
	WindowBurst, WindowRate = 2000, 200
	// ClosedBurst and ClosedRate bound frames on streams that have ended.
	ClosedBurst, ClosedRate = 1000, 200
)

// What a client earns by what it gets.
const (
	// WindowPerData and PingPerData are for each frame of DATA that no window made
	// smaller than EarnSize: clients give windows back in small pieces, and measure
	// the way with a PING while they receive.
	WindowPerData, PingPerData, EarnSize = 8, 1, 256
	// ResetPerAnswer, ClosedPerAnswer, PingPerAnswer and PriorityPerAnswer are for each
	// whole answer.
	ResetPerAnswer, ClosedPerAnswer, PingPerAnswer, PriorityPerAnswer = 1, 1, 1, 2
)

// The limits of one block of fields, over all its frames.
const (
	// MaxContinuations bounds the CONTINUATION frames of a block.
	MaxContinuations = 32
	// MaxBlock bounds a block as it is sent, in bytes. What is larger than
	// message.MaxHead after decoding is answered with 431.
	MaxBlock = 64 << 10
	// MaxDecoded bounds a block after decoding, in bytes.
	MaxDecoded = 1 << 20
)

// MaxSettings bounds the settings in one frame; there are seven kinds.
const MaxSettings = 64

// MaxControl bounds the answers to PING and SETTINGS, and the resets, that wait
// to be written to a client that does not read, in bytes.
const MaxControl = 16 << 10

// flood names a budget.
type flood uint8

const (
	resets flood = iota
	settings
	pings
	priorities
	empties
	windows
	closed
	floods
)

var budgets = [floods]struct {
	burst, rate int32
	name        string
}{
	resets: {ResetBurst, ResetRate, "resets"}, settings: {SettingsBurst, SettingsRate, "settings"},
	pings: {PingBurst, PingRate, "pings"}, priorities: {PriorityBurst, PriorityRate, "priorities"},
	empties: {EmptyBurst, EmptyRate, "empty frames"}, windows: {WindowBurst, WindowRate, "window updates"},
	closed: {ClosedBurst, ClosedRate, "frames on ended streams"},
}

// purse holds what was spent of a connection's budgets.
type purse struct {
	spent  [floods]int32
	filled [floods]time.Duration // when spent was last reduced
}

// earn gives n of a budget back.
func (p *purse) earn(f flood, n int32) { p.spent[f] = max(0, p.spent[f]-n) }

// spend takes one from a budget and reports whether it was there.
func (p *purse) spend(f flood, now func() time.Duration) bool {
	burst := budgets[f].burst
	if p.spent[f] == burst {
		at := now()
		back := int64(at-p.filled[f]) * int64(budgets[f].rate) / int64(time.Second)
		if back <= 0 {
			return false
		}
		p.filled[f] = at
		p.spent[f] -= int32(min(back, int64(burst))) //nolint:gosec // at most burst
	}
	p.spent[f]++
	return true
}
