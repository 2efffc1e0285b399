package attest

import (
	"crypto/x509"
	"maps"
	"slices"
	"time"
)

// Verified is evidence that passed Verify. It has no exported fields and no
// other maker.
type Verified struct {
	leaf      Leaf
	ek        EK
	ak        AK
	statement AKStatement
	quote     Quote
	pcrs      []PCRBank
	policy    *PolicyRef
	secure    *bool
	earliest  time.Time
	agent     []*x509.Certificate
}

// AgentChain returns the SVID of the agent that gave detached evidence, and
// what it leads through and to; nil for leaf evidence.
func (v *Verified) AgentChain() []*x509.Certificate { return slices.Clone(v.agent) }

// Kind returns which kind of evidence it is.
func (v *Verified) Kind() Kind { return v.leaf.Kind }

// Leaf returns what the TPM committed to.
func (v *Verified) Leaf() Leaf {
	l := v.leaf
	l.Selectors = slices.Clone(l.Selectors)
	return l
}

// EK returns the endorsement key as this verification accepted it.
func (v *Verified) EK() EK { return v.ek }

// AK returns the attestation key, as its certificate names it.
func (v *Verified) AK() AK { return v.ak }

// AKStatement returns what the attestation CA said: that AK and EK live in one
// TPM, and what that TPM is. It was not proved, it is the CA's word.
func (v *Verified) AKStatement() AKStatement { return v.statement }

// Quote returns the checked quote.
func (v *Verified) Quote() Quote { return v.quote }

// PCRs returns the quoted values, whose digest was recomputed.
func (v *Verified) PCRs() []PCRBank {
	out := slices.Clone(v.pcrs)
	for i := range out {
		out[i].Values = maps.Clone(out[i].Values)
	}
	return out
}

// Policy returns the PCR policy that the server says it matched; nil when none.
func (v *Verified) Policy() *PolicyRef { return v.policy }

// NonceTime returns when the server made the nonce; the zero time for detached
// evidence, which no server gave a nonce for.
func (v *Verified) NonceTime() time.Time {
	if v.leaf.Kind != KindLeaf {
		return time.Time{}
	}
	return NonceTime(v.leaf.Nonce)
}

// Earliest returns the time before which the TPM cannot have spoken: the
// nonce's, or the beginning of the SVID that detached evidence names.
func (v *Verified) Earliest() time.Time { return v.earliest }

// SecureBoot returns the claim that the replayed event log proves, nil when no
// log was given or it proves nothing.
func (v *Verified) SecureBoot() *bool { return v.secure }
