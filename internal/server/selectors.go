package server

import (
	"slices"
	"strings"

	"github.com/rootlink/rootlink/internal/policy"
	"github.com/rootlink/rootlink/internal/store"
)

// nodeSelectors returns the selectors of a node as they are now: those of its
// record, with the PCR policies judged anew on the values that it quoted last.
// A policy that was captured, changed or deleted since then counts at once.
func (s *Server) nodeSelectors(a *store.Agent) []store.Selector {
	if a.Attestation == nil || len(a.Attestation.PCRs) == 0 {
		return a.Selectors
	}
	var met []string
	policies, err := s.store.PCRPolicies()
	if err != nil {
		s.cfg.Log.Error("PCR policies", "error", err) // none is met
	}
	for i := range policies {
		if _, err := policies[i].Policy.Match(a.Attestation.PCRs, s.cfg.Now()); err == nil {
			met = append(met, policies[i].Policy.Name)
		}
	}
	return withPolicies(a.Selectors, a.AttestationType, met)
}

// withPolicies replaces the pcr_policy selectors of a node.
func withPolicies(in []store.Selector, typ string, met []string) []store.Selector {
	out := make([]store.Selector, 0, len(in)+len(met))
	for _, sel := range in {
		if sel.Type != typ || !strings.HasPrefix(sel.Value, policy.SelectorPrefix) {
			out = append(out, sel)
		}
	}
	for _, name := range met {
		out = append(out, store.Selector{Type: typ, Value: policy.SelectorPrefix + name})
	}
	if slices.Equal(in, out) {
		return in
	}
	return store.SortSelectors(out)
}
