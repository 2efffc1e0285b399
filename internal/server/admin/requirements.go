package admin

import (
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/rootlink/rootlink/internal/policy"
	"github.com/rootlink/rootlink/internal/store"
	"github.com/rootlink/rootlink/pkg/attest"
	"github.com/rootlink/rootlink/pkg/link"
	"github.com/rootlink/rootlink/plugins/tpmnode/wire"
	adminv1 "github.com/rootlink/rootlink/proto/rootlink/admin/v1"
)

// maxDepth bounds the way from an entry up to its node; SPIRE's own trees are
// two or three levels deep.
const maxDepth = 16

// Selector values of nodes that a verifier can check again.
const (
	selPolicy = policy.SelectorPrefix
	selEK     = "ek:"
)

// node is one way in which an entry may be reached: what its agent must be.
type node struct {
	ek       string   // hex; empty: any
	policies []string // all of them
	other    []string // node selectors that evidence does not show
}

// requirements turns registration entries into what a verifier demands of the
// identities. Entries of one identity are alternatives at issuance, so their
// union is one requirement: the first match in the file counts.
//
// Entries for no step get a requirement only if accept says that evidence of a
// lower kind will do for their identity: patterns by kind.
func requirements(td string, entries []*store.Entry, known map[string]bool, accept map[string][]string) (out []link.Requirement, notes []string) {
	note := func(format string, args ...any) {
		if n := fmt.Sprintf(format, args...); !slices.Contains(notes, n) {
			notes = append(notes, n)
		}
	}
	byID := map[string][]*store.Entry{}
	for _, e := range entries {
		byID[e.SPIFFEID] = append(byID[e.SPIFFEID], e)
	}
	t := tree{td: td, byID: byID}
	steps, others := map[string][]*store.Entry{}, map[string][]*store.Entry{}
	for id, es := range byID {
		lower := acceptedKind(accept, id) != ""
		for _, e := range es {
			switch {
			case isStep(e):
				steps[id] = append(steps[id], e)
			case !t.isAlias(e) && lower:
				others[id] = append(others[id], e)
			case !t.isAlias(e):
				note("%s: no tool and recorder selectors, so it signs no steps and gets no requirement", id)
			}
		}
	}
	for _, id := range slices.Sorted(maps.Keys(steps)) {
		if r, ok := t.requirement(id, steps[id], known, note); ok {
			out = append(out, r)
		}
	}
	for _, id := range slices.Sorted(maps.Keys(others)) {
		kind := acceptedKind(accept, id)
		if steps[id] != nil {
			note("%s: it signs steps with leaf evidence, so %s evidence is not accepted", id, kind)
			continue
		}
		r, ok := t.requirement(id, others[id], known, note)
		if !ok {
			continue
		}
		if kind == link.EvidenceDetached && len(r.EKs) == 0 && len(r.PCRPolicies) == 0 {
			// Any enrolled node could vouch for it.
			note("%s: detached evidence is accepted only where the way to the entry names a TPM or a PCR policy, so it gets no requirement", id)
			continue
		}
		r.Evidence, r.Tools, r.UnprotectedRecorders = kind, []string{link.AnyHash}, []string{link.AnyHash}
		out = append(out, r)
		note("%s: %s evidence is accepted, which %s", id, kind, link.EvidenceMeans(kind))
	}
	slices.Sort(notes)
	return out, notes
}

// acceptedKind is the kind below leaf evidence that will do for id, the stronger
// one if several would; "" for none.
func acceptedKind(accept map[string][]string, id string) string {
	for _, kind := range []string{link.EvidenceDetached, link.EvidenceParent} {
		if slices.ContainsFunc(accept[kind], func(p string) bool { return link.MatchPattern(p, id) }) {
			return kind
		}
	}
	return ""
}

// requirement is the union of what the entries of one identity accept.
func (t tree) requirement(id string, entries []*store.Entry, known map[string]bool, note func(string, ...any)) (link.Requirement, bool) {
	r := link.Requirement{Identity: id, Evidence: link.EvidenceLeaf}
	anyEK, anyState, ways := false, false, 0
	for _, e := range entries {
		usable := false
		for _, n := range t.nodes(e, maxDepth) {
			// An entry may ask something of its node itself.
			if !n.add(nodeSelectors(e.Selectors)) {
				continue // of a node that it can never have
			}
			usable = true
			if i := slices.IndexFunc(n.policies, func(p string) bool { return !known[p] }); i >= 0 {
				note("%s: PCR policy %q never existed, nothing is issued through it", id, n.policies[i])
				continue
			}
			if len(n.policies) > 1 {
				note("%s: issuance needs the PCR policies %s together, a verifier asks for one of them", id, strings.Join(n.policies, ", "))
			}
			for _, o := range n.other {
				note("%s: node selector %s is checked at issuance only", id, o)
			}
			ways++
			if n.ek == "" {
				anyEK = true
			} else {
				r.EKs = append(r.EKs, n.ek)
			}
			if len(n.policies) == 0 {
				anyState = true
			}
			r.PCRPolicies = append(r.PCRPolicies, n.policies...)
		}
		if !usable {
			note("%s: entry %s hangs under %s, which is no node known here", id, e.ID, e.ParentID)
			continue
		}
		addPrograms(&r, e.Selectors)
	}
	if ways == 0 {
		return r, false
	}
	if ways > 1 {
		note("%s: %d ways lead to this identity; a verifier accepts their tools, recorders and nodes in any combination", id, ways)
	}
	for _, list := range []*[]string{&r.EKs, &r.PCRPolicies, &r.Tools, &r.Recorders, &r.UnprotectedRecorders} {
		slices.Sort(*list)
		*list = slices.Compact(*list)
	}
	if anyEK {
		r.EKs = nil
	}
	r.Tier = link.TierBootAttested
	if anyState {
		r.Tier, r.PCRPolicies = link.TierTPM, nil
		note("%s: no PCR policy on the way to its node, so the boot state is not judged", id)
	}
	return r, true
}

// addPrograms adds the tools and recorders that an entry names.
func addPrograms(r *link.Requirement, selectors []store.Selector) {
	for _, s := range selectors {
		for _, to := range []struct {
			list   *[]string
			prefix string
		}{
			{&r.Tools, attest.SelectorTool},
			{&r.Recorders, attest.SelectorRecorder},
			{&r.UnprotectedRecorders, attest.SelectorUnprotectedRecorder},
		} {
			if v, ok := strings.CutPrefix(s.String(), to.prefix); ok {
				*to.list = append(*to.list, v)
			}
		}
	}
}

// tree finds the nodes above an entry.
type tree struct {
	td   string
	byID map[string][]*store.Entry
}

func (t tree) serverID() string { return "spiffe://" + t.td + "/spire/server" }

func (t tree) isAlias(e *store.Entry) bool { return e.ParentID == t.serverID() }

// nodes returns every way up from e, at most depth entries long.
func (t tree) nodes(e *store.Entry, depth int) (out []node) {
	if depth == 0 {
		return nil
	}
	agents := "spiffe://" + t.td + "/spire/agent/"
	if rest, ok := strings.CutPrefix(e.ParentID, agents); ok {
		if ek, ok := strings.CutPrefix(rest, "tpmnode/"); ok {
			return []node{{ek: ek}}
		}
		return nil // another attestor: no TPM stands behind it
	}
	for _, p := range t.byID[e.ParentID] {
		if !t.isAlias(p) {
			out = append(out, t.nodes(p, depth-1)...)
			continue
		}
		var n node
		if n.add(p.Selectors) {
			out = append(out, n)
		}
	}
	return out
}

// add narrows n to nodes that have these selectors, and reports whether there
// can be any.
func (n *node) add(selectors []store.Selector) bool {
	for _, s := range selectors {
		name, isPolicy := strings.CutPrefix(s.Value, selPolicy)
		ek, isEK := strings.CutPrefix(s.Value, selEK)
		switch {
		case s.Type != wire.PluginName:
			n.other = append(n.other, s.String())
		case isPolicy:
			if !slices.Contains(n.policies, name) {
				n.policies = append(n.policies, name)
			}
		case isEK:
			if n.ek != "" && n.ek != ek {
				return false // no TPM has two
			}
			n.ek = ek
		default:
			n.other = append(n.other, s.String())
		}
	}
	return true
}

// nodeSelectors are those of a workload's entry that are its node's.
func nodeSelectors(in []store.Selector) (out []store.Selector) {
	for _, s := range in {
		if s.Type == wire.PluginName {
			out = append(out, s)
		}
	}
	return out
}

// allowTypes lets identities sign statements other than links. A pattern that
// matches no identity is an error: nobody would hear otherwise that a typing
// error has taken an identity's right away.
func allowTypes(reqs []link.Requirement, allow []*adminv1.AllowedType) error {
	for _, a := range allow {
		if err := link.ValidatePattern(a.GetIdentity()); err != nil {
			return malformed("%w", err)
		}
		if err := link.ValidatePredicateType(a.GetType()); err != nil {
			return malformed("%w", err)
		}
		found := false
		for i := range reqs {
			if !link.MatchPattern(a.GetIdentity(), reqs[i].Identity) {
				continue
			}
			found = true
			if !slices.Contains(reqs[i].Types, a.GetType()) {
				reqs[i].Types = append(reqs[i].Types, a.GetType())
			}
		}
		if !found {
			return malformed("no entry for build steps is for an identity that matches %s", a.GetIdentity())
		}
	}
	return nil
}

// isStep says whether an entry can be issued for a recorded step: it has a
// tool and a recorder, protected or not.
func isStep(e *store.Entry) bool {
	tool, recorder := false, false
	for _, s := range e.Selectors {
		text := s.String()
		tool = tool || strings.HasPrefix(text, attest.SelectorTool)
		recorder = recorder || strings.HasPrefix(text, attest.SelectorRecorder) || strings.HasPrefix(text, attest.SelectorUnprotectedRecorder)
	}
	return tool && recorder
}
