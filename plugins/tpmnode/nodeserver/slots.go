package nodeserver

import (
	"context"
	"errors"
	"slices"
	"sync"
)

// slots bounds the attestations under way. EK certificates are public, so
// anybody can begin an attestation with a genuine one and stall: who has not
// proved to have the TPM makes room for who comes next, the oldest first.
type slots struct {
	mu   sync.Mutex
	held []*slot // guarded by mu; oldest first, at most maxSessions
}

type slot struct {
	evict  context.CancelCauseFunc
	proved bool     // guarded by slots.mu; the credential was activated
	ek     [32]byte // guarded by slots.mu; of the TPM, once proved
}

var errEvicted = errors.New("made room for another attestation")

// take returns a slot, whose evict is called when it has to make room. It
// returns nil when every slot is held by a TPM of its own.
func (s *slots) take(evict context.CancelCauseFunc) *slot {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.held) >= maxSessions {
		i := s.victim()
		if i < 0 {
			return nil
		}
		s.held[i].evict(unavailable("busy", "too many attestations under way", errEvicted))
		s.held = slices.Delete(s.held, i, i+1)
	}
	x := &slot{evict: evict}
	s.held = append(s.held, x)
	return x
}

// victim chooses the oldest slot without proof, and without any such the oldest
// of a TPM that holds several: one TPM in bad hands must not keep all others out.
// It is called with mu held.
func (s *slots) victim() int {
	if i := slices.IndexFunc(s.held, func(x *slot) bool { return !x.proved }); i >= 0 {
		return i
	}
	held := make(map[[32]byte]int, len(s.held))
	for _, x := range s.held {
		held[x.ek]++
	}
	return slices.IndexFunc(s.held, func(x *slot) bool { return held[x.ek] > 1 })
}

// prove records that the holder of x has activated a credential of ek.
func (s *slots) prove(x *slot, ek [32]byte) {
	s.mu.Lock()
	defer s.mu.Unlock()
	x.proved, x.ek = true, ek
}

// release gives x back, if it still is held.
func (s *slots) release(x *slot) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if i := slices.Index(s.held, x); i >= 0 {
		s.held = slices.Delete(s.held, i, i+1)
	}
}

func (s *slots) len() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.held)
}
