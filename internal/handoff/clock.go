package handoff

import (
	"encoding/json"
	"reflect"
	"time"

	"tako/internal/uptime"
)

// A clock is what the clock and the uptime were when a state was saved. Save adds
// it to a state that is a JSON object, under clockField.
type clock struct {
	Wall time.Time     `json:"wall"`
	Boot string        `json:"boot"`
	Up   time.Duration `json:"up_ns"`
}

const clockField = "saved_by_the_clock"

// minJump is how far a clock moves before it counts as set: less is its being
// slewed, or the time between two readings.
const minJump = time.Second

func clockNow() clock {
	c := clock{Wall: time.Now()}
	c.Boot, c.Up = uptime.Now()
	return c
}

// stamped is a state with the clock of its saving.
func stamped(state []byte) ([]byte, error) {
	if len(state) < 2 || state[0] != '{' || state[1] == '}' {
		return state, nil
	}
	now, err := json.Marshal(map[string]clock{clockField: clockNow()})
	if err != nil {
		return nil, err
	}
	return append(append(now[:len(now)-1], ','), state[1:]...), nil
}

// jumped is by how much the clock was set since a state was saved; 0 if that
// cannot be told.
func jumped(state []byte, now clock) time.Duration {
	var saved map[string]json.RawMessage
	var then clock
	if json.Unmarshal(state, &saved) != nil || json.Unmarshal(saved[clockField], &then) != nil ||
		then.Boot == "" || then.Boot != now.Boot {
		return 0
	}
	jump := now.Wall.Round(0).Sub(then.Wall) - (now.Up - then.Up)
	if jump.Abs() < minJump {
		return 0
	}
	return jump
}

// anchor ties each time in v, which is a pointer, to the monotonic clock of this
// process, after it has moved it by jump: from here on a clock that is set changes
// nothing about how far away it is. Times that are zero stay so.
func anchor(v any, now time.Time, jump time.Duration) {
	anchorValue(reflect.ValueOf(v), now, jump)
}

var timeType = reflect.TypeFor[time.Time]()

func anchorValue(v reflect.Value, now time.Time, jump time.Duration) {
	switch v.Kind() { //nolint:exhaustive // the rest holds no times that JSON fills
	case reflect.Pointer:
		if !v.IsNil() {
			anchorValue(v.Elem(), now, jump)
		}
	case reflect.Struct:
		if v.Type() == timeType {
			if t, ok := reflect.TypeAssert[time.Time](v); ok && !t.IsZero() && v.CanSet() {
				v.Set(reflect.ValueOf(now.Add(t.Sub(now) + jump)))
			}
			return
		}
		for i := range v.NumField() {
			if v.Type().Field(i).IsExported() { // JSON fills no other
				anchorValue(v.Field(i), now, jump)
			}
		}
	case reflect.Slice, reflect.Array:
		if v.Type().Elem().Kind() == reflect.Uint8 {
			return
		}
		for i := range v.Len() {
			anchorValue(v.Index(i), now, jump)
		}
	case reflect.Map:
		for _, key := range v.MapKeys() {
			elem := reflect.New(v.Type().Elem()).Elem()
			elem.Set(v.MapIndex(key))
			anchorValue(elem, now, jump)
			v.SetMapIndex(key, elem)
		}
	}
}
