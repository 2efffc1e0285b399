package link

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/rootlink/rootlink/pkg/attest"
)

// Evidence kinds, as requirements and results name them. In a requirement the
// empty one means leaf.
const (
	EvidenceLeaf     = "leaf"
	EvidenceDetached = "detached"
	EvidenceParent   = "parent"
)

// EvidenceKinds are all of them, strongest first: a requirement names the least.
func EvidenceKinds() []string { return []string{EvidenceLeaf, EvidenceDetached, EvidenceParent} }

// EvidenceAtLeast says whether evidence of a kind is enough where least is asked
// for. What it does not know is enough for nothing.
func EvidenceAtLeast(kind, least string) bool {
	have, want := slices.Index(EvidenceKinds(), kind), slices.Index(EvidenceKinds(), least)
	return have >= 0 && want >= 0 && have <= want
}

// EvidenceMeans says in one line what evidence of a kind is worth.
func EvidenceMeans(kind string) string {
	switch kind {
	case EvidenceLeaf:
		return "the server checked the node's measurements before it signed the SVID"
	case EvidenceDetached:
		return "the node vouches, the server checked nothing"
	case EvidenceParent:
		return "binds no workload key: says which machine and boot state the agent that asked attested with, at the time of its last attestation"
	}
	return ""
}

// TierText is the tier in words, and how the evidence for it came: the same tier
// is worth less where no server checked.
func (l *LinkResult) TierText() string {
	s := strings.ReplaceAll(l.Tier, "_", " ")
	if l.Evidence != "" && l.Evidence != EvidenceLeaf {
		s += " (" + l.Evidence + " evidence)"
	}
	return s
}

// QuoteTime is when the quote was made, in words.
func (l *LinkResult) QuoteTime() string {
	switch c := l.Chain; {
	case c.Detached != nil && c.SVID != nil:
		return "between " + stamp(c.SVID.NotBefore) + " and " + stamp(c.Detached.At)
	case c.Parent != nil:
		return "at " + stamp(c.Parent.AttestedAt)
	case c.Quote == nil:
		return "never"
	default:
		return "at " + stamp(c.Quote.NonceTime)
	}
}

// evidenceForm finds the evidence and says of which kind it is: this function
// and evidenceVerify are all that a further kind has to be added to. What the
// certificate carries is the strongest: a file beside it changes nothing then.
func (v *linkVerifier) evidenceForm() (string, error) {
	e, err := attest.FromCertificate(v.leaf)
	parent, perr := attest.ParentFromCertificate(v.leaf)
	switch {
	case perr == nil && len(v.in.Detached) == 0:
		v.kind, v.parent = EvidenceParent, parent
		return "in the certificate, of the node alone", nil
	case perr == nil: // and something stronger beside the link
		v.inside = parent
	case err == nil:
		v.kind, v.evidence = EvidenceLeaf, e
		return fmt.Sprintf("in the certificate, 1 of %d leaves under one quote", e.Size), nil
	case !errors.Is(err, attest.ErrNoEvidence):
		return "", err
	case len(v.in.Detached) == 0:
		return "the certificate carries none, and none lies beside the link", nil
	}
	d, err := attest.ParseDetached(v.in.Detached)
	if err != nil {
		return "", err
	}
	v.kind, v.detached, v.evidence = EvidenceDetached, d, d.Evidence
	return fmt.Sprintf("beside the link, 1 of %d leaves under one quote", d.Evidence.Size), nil
}

// evidenceKind: the kind is one that the requirement allows.
func (v *linkVerifier) evidenceKind() (string, error) {
	least := EvidenceLeaf
	if v.req != nil {
		least = v.req.Evidence
	}
	switch {
	case v.evidence == nil && v.parent == nil:
		// An SVID minted by an administrator, or one whose evidence was
		// stripped by asking for another, is genuine and proves no hardware.
		return "", errors.New("the SVID carries no evidence, and no record lies beside the link: it was issued on nobody's measurement")
	case v.kind == EvidenceLeaf && v.evidence.Kind != attest.KindLeaf:
		kind := v.evidence.Kind
		v.evidence = nil // nothing below judges it
		return "", fmt.Errorf("evidence of kind %d inside an SVID: %w", kind, ErrUnsupported)
	case !EvidenceAtLeast(v.kind, least):
		v.evidence, v.parent = nil, nil
		return "", fmt.Errorf("the evidence is %s (%s), the requirement wants %s", v.kind, EvidenceMeans(v.kind), least)
	}
	return v.kind + " evidence, at least " + least, nil
}

// evidenceMapping: any enrolled node can vouch for any SVID whose key it is
// shown, so the verifier's own file has to say which nodes may.
func (v *linkVerifier) evidenceMapping() (string, error) {
	if v.kind != EvidenceDetached || v.evidence == nil || v.req == nil {
		return "", errSkip
	}
	if err := v.req.checkMapping(); err != nil {
		return "", err
	}
	return fmt.Sprintf("%d EKs, %d PCR policies may speak for %s", len(v.req.EKs), len(v.req.PCRPolicies), v.req.Identity), nil
}

// ErrNoMapping: nothing says which nodes may speak for an identity.
var ErrNoMapping = errors.New("nothing says which nodes may speak for this identity: neither eks nor pcr_policies")

// checkMapping is about evidence that no server checked.
func (r *Requirement) checkMapping() error {
	if len(r.EKs) == 0 && len(r.PCRPolicies) == 0 {
		return ErrNoMapping
	}
	return nil
}
