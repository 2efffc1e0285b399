package server

import (
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/rootlink/rootlink/internal/policy"
	"github.com/rootlink/rootlink/internal/store"
	"github.com/rootlink/rootlink/pkg/attest"
	"github.com/rootlink/rootlink/pkg/svid"
)

// sameBoot fails unless the quote was made with the AK, and in the boot, of the
// node's last attestation. The agent's key lives in memory, so a TPM that has
// been reset under a living agent was reset without its host: its PCRs can say
// whatever somebody wants. The node has to attest again.
func (s *Server) sameBoot(in *issuance, v *attest.Verified) error {
	if !bytes.Equal(v.AK().Name, in.agent.Attestation.AKName) {
		return stale("ak_changed", errors.New("the AK is not that of the node's last attestation"))
	}
	return s.bootOf(in, attest.BootCounters{Reset: v.Quote().ResetCount, Restart: v.Quote().RestartCount})
}

// bootOf is sameBoot for counters alone. A restart without a reset is a suspend,
// harmless, and yet the AK certificate names another: whoever verifies later
// would refuse the evidence.
func (s *Server) bootOf(in *issuance, quoted attest.BootCounters) error {
	node := in.agent.Attestation
	known := attest.BootCounters{Reset: node.ResetCount, Restart: node.RestartCount}
	if quoted == known {
		return nil
	}
	// An agent attests again when it is told that it is unknown. Its own TPM has
	// signed this, so nobody else can bring it about. Whoever has attested again
	// or was banned meanwhile stays as he is.
	detail := fmt.Sprintf("reset count %d, restart count %d, attested with %d and %d", quoted.Reset, quoted.Restart, known.Reset, known.Restart)
	// Not the call's context: a caller that hangs up does not keep its place.
	err := s.store.EvictAgent(context.Background(), in.agent.ID, in.agent.Serial, "tpm_reset", detail)
	switch {
	case err == nil:
		s.warnOf(in.agent.ID, "TPM was reset under its agent, which has to attest again", "agent", in.agent.ID, "reset_count", quoted.Reset, "restart_count", quoted.Restart)
	case !errors.Is(err, store.ErrNotFound) && !errors.Is(err, store.ErrConflict) && !errors.Is(err, store.ErrBanned):
		return err
	}
	return stale("tpm_reset", errors.New("the TPM was reset or restarted since the node attested; the node has to attest again"))
}

// checkRole decides what kind of SVID the leaf is for, and that it is complete.
func checkRole(entry *store.Entry, leaf *attest.Leaf, r *svid.Request) error {
	var zero [32]byte
	tool, recorder := stepSelectors(entry)
	if leaf.Payload == zero {
		switch {
		case tool || recorder:
			return refuse("step_without_payload", "entry %s is for recorded steps: its SVIDs sign one statement, and none is named", entry.ID)
		case leaf.KeyOrigin != attest.OriginAgent:
			return refuse("key_origin", "the key of a Workload API SVID is made by the agent")
		case leaf.Tool != zero || leaf.Recorder != zero:
			return refuse("role", "a Workload API SVID has neither tool nor recorder")
		}
		r.Profile = svid.Workload
		return nil
	}
	switch {
	case !tool || !recorder:
		return refuse("not_a_step", "entry %s names no tool and recorder: statements are signed for recorded steps only", entry.ID)
	case leaf.Tool == zero || leaf.Recorder == zero:
		return refuse("step_unmeasured", "tool or recorder is not measured")
	case leaf.KeyOrigin != attest.OriginCaller:
		return refuse("key_origin", "the key that signs a statement is made by the signing process")
	}
	r.Profile = svid.Issuer
	return nil
}

// checkSelectors fails unless every selector of the entry is among those that
// the TPM committed to, and unless what the leaf says of executables is what
// its selectors say. Selectors of nodes come from our own record.
func checkSelectors(in *issuance, entry *store.Entry, leaf *attest.Leaf) error {
	for _, sel := range entry.Selectors {
		if sel.Type == in.agent.AttestationType {
			if !slices.Contains(in.selectors, sel) {
				return refuse("node_selector", "the node has no selector %s", sel)
			}
			continue
		}
		if !slices.Contains(leaf.Selectors, sel.String()) {
			return refuse("selector", "selector %s of the entry is not in the evidence", sel)
		}
	}
	// A verifier looks at these fields and never sees the entry.
	if leaf.Tool != [32]byte{} && !entryNames(entry, attest.SelectorTool, leaf.Tool) {
		return refuse("tool", "the entry does not name the tool %x", leaf.Tool)
	}
	if leaf.Recorder != [32]byte{} && !entryNames(entry, attest.SelectorRecorder, leaf.Recorder) && !entryNames(entry, attest.SelectorUnprotectedRecorder, leaf.Recorder) {
		return refuse("recorder", "the entry does not name the recorder %x", leaf.Recorder)
	}
	for _, text := range leaf.Selectors {
		if hash, ok := strings.CutPrefix(text, attest.SelectorExecutable); ok && hash != hex.EncodeToString(leaf.Executable[:]) {
			return refuse("executable", "the evidence names two executables")
		}
		// Every tool of an exec chain is allowed, or the step is not.
		if strings.HasPrefix(text, "binary:tool:") && !entryHas(entry, text) {
			return refuse("tool", "%s ran and the entry does not name it", text)
		}
	}
	return nil
}

// entryNames reports whether a selector of the entry is prefix with this hash.
func entryNames(entry *store.Entry, prefix string, hash [32]byte) bool {
	return entryHas(entry, prefix+hex.EncodeToString(hash[:]))
}

func entryHas(entry *store.Entry, selector string) bool {
	return slices.ContainsFunc(entry.Selectors, func(s store.Selector) bool { return s.String() == selector })
}

// checkPolicy asks whether the agent is still authorised for the entry in the
// boot state that this very quote shows, as it was judged, and returns the PCR
// policy that this rests on, nil for none.
func (s *Server) checkPolicy(in *issuance, entry *store.Entry, verdict *policy.Verdict, pcrs []attest.PCRBank) (*attest.PolicyRef, error) {
	matches := verdict.Matches()
	typ := in.agent.AttestationType
	base := quotedSelectors(in.agent, pcrs)
	allowed := func(ms ...policy.Match) (bool, error) {
		names := make([]string, len(ms))
		for i, m := range ms {
			names[i] = m.Name
		}
		selectors := withPolicies(base, typ, names)
		set, err := s.authorized(in.agent.ID, selectors)
		if err != nil || set.entries[entry.ID] == nil {
			return false, err
		}
		// An entry may name selectors of the node itself.
		for _, sel := range entry.Selectors {
			if sel.Type == typ && !slices.Contains(selectors, sel) {
				return false, nil
			}
		}
		return true, nil
	}
	if ok, err := allowed(matches...); err != nil || !ok {
		if err != nil {
			return nil, err
		}
		return nil, refuse("pcr_policy", "in the boot state that the quote shows, the node is not authorized for entry %s%s", entry.ID, nearest(verdict))
	}
	if ok, err := allowed(); ok || err != nil {
		return nil, err // no policy is needed
	}
	for _, m := range matches {
		if ok, err := allowed(m); err != nil {
			return nil, err
		} else if ok {
			return m.Ref(), nil
		}
	}
	// Several policies are needed together; the record has room for one.
	return matches[0].Ref(), nil
}

// nearest says what the policies that were not met lack.
func nearest(v *policy.Verdict) string {
	var b strings.Builder
	for _, m := range v.Misses() {
		b.WriteString("; PCR policy " + strconv.Quote(m.Name) + ": " + m.Reason.Error())
	}
	return b.String()
}

// quotedSelectors returns the node's selectors without those that this quote
// contradicts: pcr:<bank>:<index>:<hex> with another value now, and secure_boot
// if PCR 7, which it was read from, has changed.
func quotedSelectors(a *store.Agent, pcrs []attest.PCRBank) []store.Selector {
	value := func(banks []attest.PCRBank, bank string, index uint32) []byte {
		for _, b := range banks {
			if b.Bank == bank {
				return b.Values[index]
			}
		}
		return nil
	}
	out := make([]store.Selector, 0, len(a.Selectors))
	for _, sel := range a.Selectors {
		if sel.Type == a.AttestationType {
			if rest, ok := strings.CutPrefix(sel.Value, "pcr:"); ok {
				part := strings.Split(rest, ":")
				if len(part) != 3 {
					continue
				}
				n, err := strconv.ParseUint(part[1], 10, 32)
				if err != nil || hex.EncodeToString(value(pcrs, part[0], uint32(n))) != part[2] {
					continue
				}
			}
			if strings.HasPrefix(sel.Value, "secure_boot:") {
				was, is := value(a.Attestation.PCRs, "sha256", 7), value(pcrs, "sha256", 7)
				if was == nil || !bytes.Equal(was, is) {
					continue
				}
			}
		}
		out = append(out, sel)
	}
	return out
}
