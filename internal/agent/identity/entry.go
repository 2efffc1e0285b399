// Package identity decides who a workload is and gets it an SVID: the entries
// that the server authorises this node for, the matching, the keys, the
// evidence, the batches and the cache.
package identity

import (
	"crypto/x509"
	"slices"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"

	"github.com/rootlink/rootlink/internal/agent/upstream"
	"github.com/rootlink/rootlink/internal/measured"
	"github.com/rootlink/rootlink/pkg/attest"
	"github.com/rootlink/rootlink/pkg/link"
)

// Entry is a registration entry that this node may get SVIDs for.
type Entry struct {
	ID            string
	SPIFFEID      spiffeid.ID
	Selectors     []string // "type:value", sorted, unique, at least one
	Hint          string
	FederatesWith []spiffeid.TrustDomain
	Revision      int64
	CreatedAt     int64
	ExpiresAt     int64 // unix seconds, 0: never

	tools     []string // the selectors with attest.SelectorTool
	others    []string // all the others
	recorders int
}

// newEntry returns nil for an entry that cannot name a workload.
func newEntry(e *types.Entry) *Entry {
	td, err := spiffeid.TrustDomainFromString(e.GetSpiffeId().GetTrustDomain())
	if err != nil {
		return nil
	}
	id, err := spiffeid.FromPath(td, e.GetSpiffeId().GetPath())
	// Stored SVIDs are for SVID stores, not for the Workload API.
	if err != nil || e.GetStoreSvid() || len(e.GetSelectors()) == 0 {
		return nil
	}
	out := &Entry{
		ID: e.GetId(), SPIFFEID: id, Hint: e.GetHint(),
		Revision: e.GetRevisionNumber(), CreatedAt: e.GetCreatedAt(), ExpiresAt: e.GetExpiresAt(),
	}
	for _, s := range e.GetSelectors() {
		out.Selectors = append(out.Selectors, s.GetType()+":"+s.GetValue())
	}
	slices.Sort(out.Selectors)
	out.Selectors = slices.Compact(out.Selectors)
	for _, s := range out.Selectors {
		switch {
		case strings.HasPrefix(s, attest.SelectorTool):
			out.tools = append(out.tools, s)
			continue
		case strings.HasPrefix(s, attest.SelectorRecorder), strings.HasPrefix(s, attest.SelectorUnprotectedRecorder):
			out.recorders++
		}
		out.others = append(out.others, s)
	}
	for _, f := range e.GetFederatesWith() {
		// SPIRE lets an entry federate with its own trust domain. That is not
		// another's bundle: servers refuse to give it as one.
		if other, err := spiffeid.TrustDomainFromString(f); err == nil && other != td {
			out.FederatesWith = append(out.FederatesWith, other)
		}
	}
	return out
}

// Step says whether the entry is for recorded steps: it is then issued only
// with the evidence of a step, never over the Workload API.
func (e *Entry) Step() bool { return len(e.tools) > 0 || e.recorders > 0 }

// StepComplete says whether a step may be issued for at all: without a tool
// selector any program would do, without a recorder selector any program could
// claim to have recorded.
func (e *Entry) StepComplete() bool { return len(e.tools) > 0 && e.recorders > 0 }

// Missing returns the selectors of the entry that are not in have.
func (e *Entry) Missing(have []string) []string {
	var out []string
	for _, s := range e.Selectors {
		if !slices.Contains(have, s) {
			out = append(out, s)
		}
	}
	return out
}

// View is what the agent knows at one moment. It is never changed.
type View struct {
	TrustDomain spiffeid.TrustDomain
	AgentID     spiffeid.ID
	Entries     []*Entry // by ID
	Authorities []*x509.Certificate
	Tainted     []*x509.Certificate // those of Authorities that are being withdrawn
	JWT         upstream.JWTKeys
	Federated   map[spiffeid.TrustDomain]upstream.Bundle
	// Patterns are the SPIFFE ID patterns whose Workload API SVIDs must carry
	// evidence; Stock is set when the server is one that knows no evidence.
	Patterns []string
	// TimestampURLs and LogURL are where the server says that a signature gets
	// its time; recorders are told.
	TimestampURLs []string
	LogURL        string
	PCRs          []PCRSelection
	Stock         bool
}

// PCRSelection is a set of PCRs of one bank.
type PCRSelection struct {
	Bank    string
	Indices []uint32
}

// NeedsEvidence says whether the server signs a CSR for id only with evidence.
func (v *View) NeedsEvidence(id spiffeid.ID) bool {
	return slices.ContainsFunc(v.Patterns, func(p string) bool { return link.MatchPattern(p, id.String()) })
}

// Workload returns the entries whose every selector was measured, steps left
// out: a tool's or a recorder's hash says nothing about a plain caller.
func (v *View) Workload(selectors []string) []*Entry {
	have := make(map[string]bool, len(selectors))
	for _, s := range selectors {
		have[s] = true
	}
	var out []*Entry
entries:
	for _, e := range v.Entries {
		if e.Step() {
			continue
		}
		for _, s := range e.Selectors {
			if !have[s] {
				continue entries
			}
		}
		out = append(out, e)
	}
	return out
}

// Steps returns the entries that allow what was seen. Each tool seen must be a
// selector of the entry, and each other selector of the entry must have been
// seen. complete are those whose tools have all been seen; partial ones still
// wait for some (env, and then go).
func (v *View) Steps(seen measured.Seen) (complete, partial []*Entry) {
	for _, e := range v.Entries {
		if !e.StepComplete() || !contains(e.tools, seen.Tools) || !contains(seen.Base, e.others) {
			continue
		}
		if len(e.tools) == len(seen.Tools) {
			complete = append(complete, e)
		} else {
			partial = append(partial, e)
		}
	}
	return complete, partial
}

// contains says whether every part is in all.
func contains(all, parts []string) bool {
	for _, p := range parts {
		if !slices.Contains(all, p) {
			return false
		}
	}
	return true
}

// Nearest returns the entry with the fewest selectors missing, of steps or of
// others; nil when no entry has anything in common with have.
func (v *View) Nearest(have []string, step bool) *Entry {
	var best *Entry
	fewest := 0
	for _, e := range v.Entries {
		if e.Step() != step {
			continue
		}
		n := len(e.Missing(have))
		if n < len(e.Selectors) && (best == nil || n < fewest) {
			best, fewest = e, n
		}
	}
	return best
}
