package cli

import (
	"testing"
	"time"
)

func TestDurationFlag(t *testing.T) {
	for in, want := range map[string]time.Duration{
		"90d": 90 * 24 * time.Hour, "1h30m": 90 * time.Minute, "1s": time.Second, "48h": 48 * time.Hour,
	} {
		var d, again Duration
		if err := d.Set(in); err != nil || time.Duration(d) != want {
			t.Errorf("%s: %v, %v", in, time.Duration(d), err)
		}
		if err := again.Set(d.String()); err != nil || again != d {
			t.Errorf("%s is written as %s, which is read as %v, %v", in, d.String(), time.Duration(again), err)
		}
	}
	for _, bad := range []string{"", "d", "0d", "-1d", "1.5d", "65536d", "0s", "-1h", "500ms", "1h0.5s", "90", "30000d"} {
		var d Duration
		if err := d.Set(bad); err == nil || d != 0 {
			t.Errorf("%q is taken for %v", bad, time.Duration(d))
		}
	}
}
