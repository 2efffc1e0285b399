package server

import (
	"errors"
	"slices"

	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"

	"github.com/rootlink/rootlink/internal/store"
)

// selectorMatch returns whether a candidate's sorted selectors meet a filter;
// a nil filter matches everything.
func selectorMatch(m *types.SelectorMatch) (func([]store.Selector) bool, error) {
	if m == nil {
		return func([]store.Selector) bool { return true }, nil
	}
	want, err := selectorsFromProto(m.Selectors)
	if err != nil {
		return nil, err
	}
	switch m.Match {
	case types.SelectorMatch_MATCH_EXACT:
		return func(have []store.Selector) bool { return slices.Equal(have, want) }, nil
	case types.SelectorMatch_MATCH_SUBSET:
		return func(have []store.Selector) bool { return len(have) > 0 && contains(want, have) }, nil
	case types.SelectorMatch_MATCH_SUPERSET:
		return func(have []store.Selector) bool { return contains(have, want) }, nil
	case types.SelectorMatch_MATCH_ANY:
		return func(have []store.Selector) bool {
			return slices.ContainsFunc(want, func(s store.Selector) bool { return slices.Contains(have, s) })
		}, nil
	}
	return nil, errors.New("unknown selector match behavior")
}

// contains reports whether all of sub is in set.
func contains[T comparable](set, sub []T) bool {
	for _, s := range sub {
		if !slices.Contains(set, s) {
			return false
		}
	}
	return true
}
