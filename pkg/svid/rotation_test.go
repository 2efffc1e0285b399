package svid

import (
	"testing"
	"time"

	"github.com/rootlink/rootlink/internal/forge"
)

// Two years of rotation, stepped through as the server does it, with the
// invariants checked at each step.
func TestRotation(t *testing.T) {
	const life = 360 * time.Hour
	now := forge.Epoch()
	var stages []Stage
	activated := 0
	for end := now.Add(2 * 24 * 365 * time.Hour); now.Before(end); {
		action, i, again := Next(now, stages)
		switch action {
		case Prepare:
			stages = append(stages, Stage{State: Prepared, NotBefore: now, NotAfter: now.Add(life), PreparedAt: now})
			continue
		case Activate:
			if activated > 0 {
				if lead := now.Sub(stages[i].PreparedAt); lead < life/12 {
					t.Fatalf("an authority signs %v after it was published", lead)
				}
			}
			for j := range stages {
				if stages[j].State == Active {
					if left := stages[j].NotAfter.Sub(now); left < MaxTTL(life) {
						t.Fatalf("an authority signed until %v before its end", left)
					}
					stages[j].State = Retired
				}
			}
			stages[i].State = Active
			activated++
			continue
		}
		active := 0
		for _, s := range stages {
			if s.State == Active {
				active++
				if !now.Before(s.NotAfter) {
					t.Fatal("the active authority has expired")
				}
			}
		}
		if active != 1 {
			t.Fatalf("%d authorities are active", active)
		}
		if !again.After(now) {
			t.Fatalf("asked to wait until %v at %v", again, now)
		}
		now = again
	}
	if activated < 60 {
		t.Fatalf("%d rotations in two years", activated)
	}
}

func TestRotationAfterALongSleep(t *testing.T) {
	const life = 360 * time.Hour
	start := forge.Epoch()
	active := Stage{State: Active, NotBefore: start, NotAfter: start.Add(life), PreparedAt: start}
	for name, c := range map[string]struct {
		at     time.Duration
		stages []Stage
		want   Action
	}{
		"nothing yet":                            {0, nil, Prepare},
		"stopped between the two steps":          {0, []Stage{{State: Prepared, NotBefore: start, NotAfter: start.Add(life), PreparedAt: start}}, Activate},
		"young":                                  {life / 4, []Stage{active}, Wait},
		"half":                                   {life / 2, []Stage{active}, Prepare},
		"slept past the preparation":             {life * 9 / 10, []Stage{active}, Prepare},
		"slept past its end":                     {life * 2, []Stage{active}, Prepare},
		"just prepared, late":                    {life * 8 / 10, []Stage{active, {State: Prepared, NotBefore: start.Add(life * 8 / 10), NotAfter: start.Add(2 * life), PreparedAt: start.Add(life * 8 / 10)}}, Wait},
		"prepared, and the active one has ended": {life + 1, []Stage{active, {State: Prepared, NotBefore: start.Add(life), NotAfter: start.Add(2 * life), PreparedAt: start.Add(life)}}, Activate},
		"prepared and expired":                   {3 * life, []Stage{{State: Prepared, NotBefore: start, NotAfter: start.Add(life), PreparedAt: start}}, Prepare},
		"clock put back":                         {-life, []Stage{active}, Wait},
	} {
		t.Run(name, func(t *testing.T) {
			if got, _, _ := Next(start.Add(c.at), c.stages); got != c.want {
				t.Fatalf("action %d, want %d", got, c.want)
			}
		})
	}
}
