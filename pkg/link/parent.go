package link

import (
	"crypto/x509"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/rootlink/rootlink/pkg/attest"
)

// nodeEvidence is what evidence of every kind says of the machine. Only leaf and
// detached evidence say something of the SVID's key, and of programs.
type nodeEvidence interface {
	EK() attest.EK
	AK() attest.AK
	Quote() attest.Quote
	PCRs() []attest.PCRBank
	Policy() *attest.PolicyRef
	SecureBoot() *bool
}

// ParentInfo is what only parent evidence has.
type ParentInfo struct {
	AttestedAt    time.Time `json:"attested_at"` // the node, on the server's word
	AgentKeyBound bool      `json:"agent_key_bound"`
}

func (v *linkVerifier) verifyParent(o attest.Options) ([]attest.Check, error) {
	verified, checks, err := attest.VerifyParent(v.parent, attest.ParentBinding{
		TrustDomain: v.trust.TrustDomain(), SVIDNotBefore: v.leaf.NotBefore, At: v.at,
	}, o)
	if err != nil {
		return checks, err
	}
	v.node = verified
	v.out.Chain.Parent = &ParentInfo{AttestedAt: verified.AttestedAt().UTC(), AgentKeyBound: verified.AgentKey() != [32]byte{}}
	return checks, nil
}

// checkPrograms: a requirement that accepts parent evidence names no program,
// since no such evidence could show that it ran, and asks for no recorder's word
// on what ran: nobody knows whether it was a recorder that spoke, or who else
// could have.
func (r *Requirement) checkPrograms() error {
	any := func(list []string) bool { return slices.Equal(list, []string{AnyHash}) }
	switch {
	case !any(r.Tools) || !any(r.UnprotectedRecorders):
		return fmt.Errorf("it measures no program, so that tools and unprotected_recorders must both be [%q]", AnyHash)
	case len(r.Executables) > 0 || r.CachesPerJob:
		return errors.New("it measures no recorder, whose word executables and caches_per_job would be")
	}
	return nil
}

// parentWords say what was proved, and above all what was not.
func (v *linkVerifier) parentWords() {
	c, out := v.out.Chain, v.out
	out.ProvedByTPM = append(out.ProvedByTPM,
		fmt.Sprintf("the TPM with EK %s answered a nonce of the server with PCR values as shown, at reset %d, restart %d", short(c.EK.SHA256), c.Quote.ResetCount, c.Quote.RestartCount))
	out.TakenOnWordOf = append(out.TakenOnWordOf,
		Word{What: "that the SVID's key is on that machine, and that the machine has not been booted anew since it attested", Who: "SVID authority " + c.SVID.Authority + " and the agent on the machine", SameOperator: true},
		Word{What: "that the machine attested at " + stamp(c.Parent.AttestedAt), Who: "SVID authority " + c.SVID.Authority, SameOperator: true},
		Word{What: "which programs ran", Who: "the recorder, whatever it is: parent evidence names no program"},
		v.certifiedWord())
	v.commonWords()
}

// certifiedWord is whose word it is that the evidence is of the TPM shown.
func (v *linkVerifier) certifiedWord() Word {
	c := v.out.Chain
	same := slices.ContainsFunc(v.trust.attestCAs, func(ca *x509.Certificate) bool {
		return hexHash(spkiHash(ca)) == c.AK.CAKeySHA256 && sameOperator(ca, v.authority.Certificate)
	})
	return Word{What: "AK and EK live in one TPM, which is what it says it is", Who: "attestation CA " + c.AK.CertifiedBy, SameOperator: same}
}

// commonWords are the same for every kind of evidence.
func (v *linkVerifier) commonWords() {
	c, out := v.out.Chain, v.out
	out.TakenOnWordOf = append(out.TakenOnWordOf, v.timeWords()...)
	if c.EK.Basis == "allow_list" {
		out.TakenOnWordOf = append(out.TakenOnWordOf, Word{What: "the EK is a real TPM's", Who: "the allow-list in trust.json"})
	}
	if c.Quote.Policy != nil {
		out.TakenOnWordOf = append(out.TakenOnWordOf, Word{What: "the boot state is a good one", Who: "the author of PCR policy " + c.Quote.Policy.Name + " in trust.json"})
	}
}
