package svid

import "time"

// State is where an authority is in its life.
type State string

const (
	Prepared State = "prepared" // published, signs nothing yet
	Active   State = "active"   // signs
	Retired  State = "retired"  // signs no more, still verifies until it expires
)

// Stage is what rotation needs to know of an authority.
type Stage struct {
	State      State
	NotBefore  time.Time
	NotAfter   time.Time
	PreparedAt time.Time
}

// Action is what rotation asks for.
type Action uint8

const (
	Wait     Action = iota // nothing until the time that comes with it
	Prepare                // make and publish another authority
	Activate               // let the prepared one sign
)

// Divisors of an authority's life. A third of it remains when its successor
// takes over, which is more than any SVID lives (see MaxTTL); the successor
// has then been in every bundle for a sixth.
const (
	prepareAfter = 2  // prepared when 1/2 has passed
	activateLeft = 3  // activated when 1/3 is left
	minPublished = 12 // and was published for 1/12
)

// MaxTTL is the longest SVID life that goes with authorities of this lifetime:
// what the old authority signs last ends before it does.
func MaxTTL(lifetime time.Duration) time.Duration { return lifetime / 6 }

// Next returns what rotation has to do at now, to which of stages (-1 for
// none), and when to ask again if that is Wait.
//
// Each authority is prepared → active → retired. At most one is active. A
// successor is published well before it signs, because a peer that meets an
// authority it has not heard of cuts the connection; only when nothing else can
// sign does a successor start at once.
func Next(now time.Time, stages []Stage) (Action, int, time.Time) {
	active, prepared := -1, -1
	for i, s := range stages {
		switch {
		case !now.Before(s.NotAfter):
			// Expired: it can do nothing, in whatever state it is.
		case s.State == Active:
			active = i
		case s.State == Prepared && (prepared < 0 || s.NotAfter.After(stages[prepared].NotAfter)):
			prepared = i
		}
	}
	switch {
	case active < 0 && prepared < 0:
		return Prepare, -1, time.Time{}
	case active < 0:
		return Activate, prepared, time.Time{}
	}
	a := stages[active]
	life := a.NotAfter.Sub(a.NotBefore)
	if prepared < 0 {
		if at := a.NotBefore.Add(life / prepareAfter); now.Before(at) {
			return Wait, -1, at
		}
		return Prepare, -1, time.Time{}
	}
	at := a.NotAfter.Add(-life / activateLeft)
	if published := stages[prepared].PreparedAt.Add(life / minPublished); published.After(at) {
		at = published // the server was off when it should have prepared
	}
	if last := a.NotAfter.Add(-life / minPublished); at.After(last) {
		at = last
	}
	if now.Before(at) {
		return Wait, -1, at
	}
	return Activate, prepared, time.Time{}
}
