package cli

import (
	"fmt"
	"math"
	"strconv"
	"strings"
	"time"
)

// Duration is a flag value: Go's durations in whole seconds, and whole days as
// "90d". Zero means that the flag was not given.
type Duration time.Duration

const day = 24 * time.Hour

func (d *Duration) String() string {
	switch v := time.Duration(*d); {
	case v == 0:
		return ""
	case v%day == 0:
		return strconv.FormatInt(int64(v/day), 10) + "d"
	default:
		return v.String()
	}
}

// Type is what help texts call the value.
func (d *Duration) Type() string { return "duration" }

// Set reads what was typed.
func (d *Duration) Set(s string) error {
	var v time.Duration
	if days, ok := strings.CutSuffix(s, "d"); ok {
		n, err := strconv.ParseUint(days, 10, 16)
		if err != nil {
			return fmt.Errorf("%q is not a number of days", s)
		}
		v = time.Duration(n) * day
	} else {
		var err error
		if v, err = time.ParseDuration(s); err != nil {
			return fmt.Errorf("%q is not a duration such as 90s, 1h or 30d", s)
		}
	}
	if v < time.Second || v%time.Second != 0 {
		return fmt.Errorf("%q is not a positive number of whole seconds", s)
	}
	// The APIs of servers count seconds in 32 bits.
	if v/time.Second > math.MaxInt32 {
		return fmt.Errorf("%q is too long", s)
	}
	*d = Duration(v)
	return nil
}

// Seconds is at most math.MaxInt32.
func (d Duration) Seconds() int32 { return int32(time.Duration(d) / time.Second) }
