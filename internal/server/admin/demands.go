package admin

import (
	"slices"

	"github.com/rootlink/rootlink/pkg/link"
	adminv1 "github.com/rootlink/rootlink/proto/rootlink/admin/v1"
)

// addDemands puts what an export asks of steps into their requirements. One
// for an identity that has none would demand nothing, so it is an error.
func addDemands(reqs []link.Requirement, demands []*adminv1.StepDemand) error {
	if len(demands) > link.MaxRequirements {
		return malformed("%d demands", len(demands))
	}
	for _, d := range demands {
		i := slices.IndexFunc(reqs, func(r link.Requirement) bool { return r.Identity == d.SpiffeId })
		if i < 0 {
			return malformed("a demand on %q, which has no requirement: no entry is for its steps", d.SpiffeId)
		}
		if len(d.Executables)+len(d.Logged) == 0 && !d.CachesPerJob {
			return malformed("a demand on %q that demands nothing", d.SpiffeId)
		}
		for _, h := range d.Executables {
			if !slices.Contains(reqs[i].Executables, h) {
				reqs[i].Executables = append(reqs[i].Executables, h)
			}
		}
		reqs[i].CachesPerJob = reqs[i].CachesPerJob || d.CachesPerJob
		reqs[i].Logged = append(reqs[i].Logged, d.Logged...)
	}
	return nil
}
