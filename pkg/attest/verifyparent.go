package attest

import (
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"
)

// ErrParentAge means that the node's attestation is too old for the SVID.
var ErrParentAge = errors.New("the node attested too long before the SVID")

// ParentBinding is what parent evidence must fit, known from elsewhere. No key
// is in it: parent evidence binds none.
type ParentBinding struct {
	TrustDomain   string
	EKHash        *[32]byte // the server knows it from the agent ID; nil offline
	SVIDNotBefore time.Time // zero at the server, which has not yet signed
	At            time.Time // the attested signing time; at the server the time of issuance
}

// VerifiedParent is parent evidence that passed VerifyParent. It has no exported
// fields and no other maker, and is no *Verified: it names no leaf.
type VerifiedParent struct {
	record     Parent
	ek         EK
	ak         AK
	statement  AKStatement
	quote      Quote
	secure     *bool
	akNotAfter time.Time
}

// AttestedAt returns when the node attested, on the server's word.
func (v *VerifiedParent) AttestedAt() time.Time { return v.record.AttestedAt }

// AgentKey returns the hash of the agent's key that the quote covers; zero when
// it covers none, as with a stock agent.
func (v *VerifiedParent) AgentKey() [32]byte { return v.record.AgentKey }

// EK returns the endorsement key as this verification accepted it.
func (v *VerifiedParent) EK() EK { return v.ek }

// AK returns the attestation key, as its certificate names it.
func (v *VerifiedParent) AK() AK { return v.ak }

// AKStatement returns what the attestation CA said; it is the CA's word.
func (v *VerifiedParent) AKStatement() AKStatement { return v.statement }

// Quote returns the checked quote.
func (v *VerifiedParent) Quote() Quote { return v.quote }

// PCRs returns the quoted values, whose digest was recomputed.
func (v *VerifiedParent) PCRs() []PCRBank {
	out := slices.Clone(v.record.PCRs)
	for i := range out {
		out[i].Values = maps.Clone(out[i].Values)
	}
	return out
}

// Policy returns the PCR policy that the server says it matched; nil when none.
func (v *VerifiedParent) Policy() *PolicyRef { return v.record.Policy }

// SecureBoot returns the claim that the replayed event log proves, nil when no
// log was given or it proves nothing.
func (v *VerifiedParent) SecureBoot() *bool { return v.secure }

// Until returns when the AK certificate ends: no later signature can rest on
// this evidence.
func (v *VerifiedParent) Until() time.Time { return v.akNotAfter }

// Extension returns the record that was verified as id-pe-cmw, with the PCR
// policy that the server matched, nil for none.
func (v *VerifiedParent) Extension(policy *PolicyRef) (pkix.Extension, error) {
	p := v.record
	p.Policy = policy
	return p.Extension()
}

// VerifyParent runs every check on parent evidence, top down, and stops at the
// first that fails. The report and the error are as Verify's.
//
// What passes says of an SVID that the server signed it for an agent whose node
// had attested so. That this node's TPM knows of the SVID's key it does not say.
func VerifyParent(p *Parent, b ParentBinding, o Options) (*VerifiedParent, []Check, error) {
	v := &parentRun{p: p, b: b}
	if p != nil {
		v.run = run{e: p.node(), b: Binding{EKHash: b.EKHash, At: b.At}, o: o, when: p.AttestedAt}
	}
	v.run.o = o
	report, err := runChecks(v.checks())
	if err != nil {
		return nil, report, err
	}
	return &VerifiedParent{
		record: *p, ek: *v.ek, ak: *v.ak, statement: *v.statement, quote: v.quote.Quote,
		secure: v.secure, akNotAfter: v.akCert.NotAfter,
	}, report, nil
}

// parentRun shares with leaf evidence the checks of what says something of the
// node. Those of leaf, payload and SVID key have no place in its list.
type parentRun struct {
	run
	p *Parent
	b ParentBinding
}

func (v *parentRun) checks() []check {
	must := func(f func() error) func() (string, bool, error) {
		return func() (string, bool, error) { return "", false, f() }
	}
	return []check{
		{"options", "evidence.md, Parent", must(v.options)},
		{"ak_cert.profile", "evidence.md, AK certificate", must(v.akProfile)},
		{"ak_cert.signature", "RFC 5280, 6.1.3 (a)(1)", must(v.akSignature)},
		{"ak_cert.time", "RFC 5280, 6.1.3 (a)(2)", must(v.akTime)},
		{"ak_cert.revocation", "evidence.md, Verification 6", v.akRevocation},
		{"ek.genuine", "TCG EK Credential Profile 2.6", v.ekGenuine},
		{"ek.identity", "evidence.md, Verification 8", must(v.ekIdentity)},
		{"ek.revocation", "evidence.md, Verification 9", v.ekRevocation},
		{"quote.structure", "TPM 2.0 Part 2, 10.12.12", must(v.quoteStructure)},
		{"quote.signature", "TPM 2.0 Part 3, 18.4", must(v.quoteSignature)},
		{"quote.selection", "evidence.md, Verification 12", must(v.quoteSelection)},
		{"quote.pcr_digest", "TPM 2.0 Part 2, 10.12.4", must(v.quoteDigest)},
		{"parent.commitment", "evidence.md, Parent", must(v.commitment)},
		{"parent.time", "evidence.md, Parent", must(v.time)},
		{"quote.boot", "TPM 2.0 Part 2, 10.11.1; evidence.md, AK certificate", v.boot},
		{"event_log.replay", "TCG PC Client PFP 1.06, 10", v.eventLog},
	}
}

func (v *parentRun) options() error {
	return errors.Join(
		need(v.p != nil, "evidence"),
		need(v.b.TrustDomain != "", "trust domain"),
		need(!v.b.At.IsZero(), "the time to judge at"),
		need(len(v.o.AttestationCAs) > 0, "attestation CAs"),
		need(len(v.o.EK.Roots) > 0 || len(v.o.EK.Allow) > 0, "EK roots or an EK allow-list"),
		need(len(v.o.RequiredPCRs) > 0, "required PCRs"),
	)
}

// commitment: the quote answers this server's nonce, for this trust domain, by
// this AK, and covers the agent key that the record names or none. A quote made
// for leaves has another label, so neither passes for the other.
func (v *parentRun) commitment() error {
	want := NodeExtraData(v.p.Nonce, v.ak.Name, v.b.TrustDomain, v.p.AgentKey)
	if string(v.quote.ExtraData) != string(want[:]) {
		return ErrQuoteExtraData
	}
	return nil
}

// time: the attestation came before the SVID and not long before, and the AK
// certificate, which the same attestation brought forth, still holds when the
// SVID's key signs.
func (v *parentRun) time() error {
	stamp := func(t time.Time) string { return t.UTC().Format(time.RFC3339) }
	issued, at := v.b.SVIDNotBefore, v.p.AttestedAt
	if issued.IsZero() {
		issued = v.b.At
	}
	switch {
	case issued.Add(NonceBackdate + time.Second).Before(at):
		return fmt.Errorf("%w: the SVID begins %s, the node attested at %s", ErrTime, stamp(issued), stamp(at))
	case issued.Sub(at) > MaxParentAge:
		return fmt.Errorf("%w: attested %s, SVID begins %s, at most %v", ErrParentAge, stamp(at), stamp(issued), MaxParentAge)
	case v.b.At.Before(issued) || v.b.At.Before(at.Truncate(time.Second)):
		return fmt.Errorf("%w: signed at %s, before the SVID began or the node attested", ErrTime, stamp(v.b.At))
	}
	if err := checkTime(v.akCert, v.b.At); err != nil {
		return fmt.Errorf("%w: at the time of signing: %w", ErrAKCertTime, err)
	}
	return nil
}
