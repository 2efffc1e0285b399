package tsa

import (
	"fmt"
	"os"
	"slices"
	"time"
)

// Maintain replaces the signing key when it is time, and returns when it wants
// to be asked again. The next key is certified, and so in trust.json,
// prepareLead before its window begins; it signs from the moment it does.
func (a *Authority) Maintain() (time.Time, error) {
	a.changing.Lock()
	defer a.changing.Unlock()
	for {
		s, now := a.state.Load(), a.cfg.Now()
		lead := min(prepareLead, a.cfg.LeafLife/3)
		newest := s.leaves[len(s.leaves)-1]
		var next *state
		var err error
		switch {
		case s.nextKey != nil && !now.Before(newest.NotBefore):
			next, err = a.activate(s)
		case s.nextKey != nil:
			return newest.NotBefore, nil
		case !now.Before(s.leaf.NotAfter.Add(-lead)):
			next, err = a.prepare(s, now)
		default:
			return s.leaf.NotAfter.Add(-lead), nil
		}
		if err != nil {
			return time.Time{}, fmt.Errorf("timestamp authority: %w", err)
		}
		a.state.Store(next)
	}
}

// prepare certifies the next key: from shortly before the present one ends, or
// from now on if that has passed.
func (a *Authority) prepare(s *state, now time.Time) (*state, error) {
	if len(s.leaves) == maxLeaves {
		return nil, fmt.Errorf("%w: %d signing certificates", ErrIncomplete, maxLeaves)
	}
	key, err := a.makeKey(nextKeyFile)
	if err != nil {
		return nil, err
	}
	start := s.leaf.NotAfter.Add(-min(overlap, a.cfg.LeafLife/6))
	if start.Before(now) {
		start = now.Add(-backdate)
	}
	leaf, err := newLeaf(a.cfg.Name, s.root, s.rootKey, key.Public(), start, a.cfg.LeafLife)
	if err != nil {
		return nil, err
	}
	n := *s
	n.leaves, n.nextKey = append(slices.Clone(s.leaves), leaf), key
	if err := a.writeCertificates(n.root, n.leaves...); err != nil {
		return nil, err
	}
	a.cfg.Log.Info("next timestamp key prepared", "from", leaf.NotBefore, "to", leaf.NotAfter, "hint", "export trust.json anew before then")
	return &n, nil
}

// activate lets the prepared key sign. The one before it is gone then.
func (a *Authority) activate(s *state) (*state, error) {
	n := *s
	n.leaf, n.key, n.nextKey = s.leaves[len(s.leaves)-1], s.nextKey, nil
	if err := a.writeKey(KeyFile, n.key); err != nil {
		return nil, err
	}
	if err := os.Remove(a.path(nextKeyFile)); err != nil {
		return nil, err
	}
	a.cfg.Log.Info("timestamp key replaced", "until", n.leaf.NotAfter)
	return &n, nil
}
