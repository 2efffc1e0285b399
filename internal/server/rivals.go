package server

import (
	"context"
	"sync"
	"time"

	"github.com/rootlink/rootlink/internal/store"
)

const (
	// rivalGrace is how long after the first use of an SVID the one before it may
	// still be used without an alarm: an agent that has a new one has calls on
	// their way. The time of the attestation says less, for a slow agent gets its
	// answer late and until then knows of nothing new.
	rivalGrace = 3 * time.Second
	// unusedGrace is the same from the attestation on, while its SVID was not
	// used at all: the answer may have been lost, and the agent attest again.
	unusedGrace = time.Minute
)

// alarmReplaced is the kind of alarm, in the agent's history and the counters.
const alarmReplaced = "replaced_while_alive"

// rivals finds two agents that live with one TPM: a restarted agent has
// forgotten its SVID, so whoever still calls with a replaced one was not
// restarted, and somebody else attested.
type rivals struct {
	mu sync.Mutex
	m  map[string]*lastAttested // by agent ID
}

type lastAttested struct {
	from    string // address of the last attestation
	alarmed string // serial of the SVID in force when the alarm was given

	serial string    // of the SVID in force when it was used first,
	used   time.Time // and when that was; both since this server started
}

// inUse notes a call with the SVID in force.
func (r *rivals) inUse(id, serial string, now time.Time) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if l := r.of(id); l.serial != serial {
		l.serial, l.used = serial, now
	}
}

// settled reports whether the SVID in force, of an attestation at that time, is
// in use for so long that its agent cannot be using the one before it.
func (r *rivals) settled(id, serial string, attested, now time.Time) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if l := r.of(id); l.serial == serial {
		return now.Sub(l.used) >= rivalGrace
	}
	return now.Sub(attested) >= unusedGrace
}

func (r *rivals) attested(id, from string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.of(id).from = from
}

// first reports whether no alarm was given since the SVID with this serial
// replaced another, and from where it was asked for.
func (r *rivals) first(id, serial string) (from string, first bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	l := r.of(id)
	first = l.alarmed != serial
	l.alarmed = serial
	if l.from == "" {
		return "unknown: before this server started", first
	}
	return l.from, first
}

func (r *rivals) of(id string) *lastAttested {
	if r.m == nil {
		r.m = make(map[string]*lastAttested)
	}
	l := r.m[id]
	if l == nil {
		l = new(lastAttested)
		r.m[id] = l
	}
	return l
}

// noteReplaced alarms, once for each replacement, when c still lives with an
// SVID that a newer attestation of a replaced.
func (s *Server) noteReplaced(ctx context.Context, c *caller, a *store.Agent) {
	if a.Attestation == nil || !s.rivals.settled(a.ID, a.Serial, a.Attestation.At, s.cfg.Now()) {
		return
	}
	from, first := s.rivals.first(a.ID, a.Serial)
	if !first {
		return
	}
	s.count.add("alarm/" + alarmReplaced)
	s.cfg.Log.Error("ALARM: a newer attestation replaced an agent that is still alive: two agents use one TPM, or its contents were copied",
		"agent_id", a.ID, "replaced_agent", c.addr, "newer_attestation_from", from, "attested_at", a.Attestation.At,
		"hint", "stop one of the two; `rootlink-server agent ban` keeps both out")
	detail := "an agent at " + c.addr + " still lives with an SVID that an attestation from " + from + " replaced"
	if err := s.store.AddAgentEvent(context.WithoutCancel(ctx), a.ID, alarmReplaced, detail); err != nil {
		s.cfg.Log.Error("record alarm", "error", err)
	}
}
