package link

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/rootlink/rootlink/pkg/attest"
	"github.com/rootlink/rootlink/pkg/timestamp"
)

// ErrIntermediate: the SVID was issued through an intermediate authority, and a
// Sigstore bundle has room for the leaf alone.
var ErrIntermediate = errors.New("issued through an intermediate authority, for which a bundle has no room")

// SignDetached signs p with key, whose certificate carries no evidence: d, which
// the node made for exactly this SVID and statement, lies beside the bundle, and
// is signed here too.
func (p *Prepared) SignDetached(key crypto.Signer, leaf *x509.Certificate, d *attest.Detached) (*Bundle, error) {
	if err := SignRecord(key, leaf, d, p.digest); err != nil {
		return nil, err
	}
	return p.sign(key, leaf)
}

// SignWithoutEvidence signs p with an SVID that nothing ties to hardware, or
// whose parent evidence ties no key to it, for who asked for that: no trust.json
// accepts such a link unless it says so, other verifiers may.
func (p *Prepared) SignWithoutEvidence(key crypto.Signer, leaf *x509.Certificate) (*Bundle, error) {
	if _, err := attest.ParentFromCertificate(leaf); err != nil && !errors.Is(err, attest.ErrNoEvidence) {
		return nil, fmt.Errorf("%w: it carries evidence, of this statement or another", ErrSignerMismatch)
	}
	return p.sign(key, leaf)
}

// SignRecord signs a detached record about payload, after checking that it is
// about that and leaf: the one is said by the node, and its signer would take
// the blame for the other.
func SignRecord(key crypto.Signer, leaf *x509.Certificate, d *attest.Detached, payload [32]byte) error {
	pub, ok := key.Public().(*ecdsa.PublicKey)
	switch {
	case !ok || !pub.Equal(leaf.PublicKey):
		return fmt.Errorf("%w: it holds another key", ErrSignerMismatch)
	case d.Evidence.Payload != payload:
		return fmt.Errorf("%w: the detached evidence commits to another statement", ErrSignerMismatch)
	case d.Evidence.Nonce != attest.DetachedNonce(leaf.Raw):
		return fmt.Errorf("%w: the detached evidence is about another SVID", ErrSignerMismatch)
	}
	input, err := d.SigningInput(leaf.Raw)
	if err != nil {
		return err
	}
	digest := sha256.Sum256(input)
	sig, err := key.Sign(rand.Reader, digest[:], crypto.SHA256)
	if err != nil {
		return fmt.Errorf("signing: %w", err)
	}
	d.Signature, d.Token = sig, nil
	return nil
}

// DetachedName is the name of the file beside the bundle that holds its detached
// record; empty when the certificate carries its evidence itself.
func (b *Bundle) DetachedName() string {
	_, err := attest.FromCertificate(b.leaf)
	if _, perr := attest.ParentFromCertificate(b.leaf); perr != nil && !errors.Is(err, attest.ErrNoEvidence) {
		return ""
	}
	return attest.DetachedFile(b.leaf.Raw, b.payloadDigest())
}

// DetachedInfo is what only detached evidence has.
type DetachedInfo struct {
	// AgentID is the node that vouches, by the SVID of its agent.
	AgentID        string `json:"agent_id"`
	AgentAuthority string `json:"agent_authority"`
	// At is when the record was signed, as its own token says; without one it is
	// the verifier's own clock.
	At        time.Time `json:"at"`
	Attested  bool      `json:"attested"`
	Authority string    `json:"time_authority,omitempty"`
	// SameOperator: whoever runs the SVID authority runs the time authority too.
	SameOperator bool `json:"same_operator_as_svid_authority,omitempty"`
	// KeyMadeByAgent: every process that the agent gives this SVID has its key.
	KeyMadeByAgent bool `json:"key_made_by_agent"`
}

// text is for the tree.
func (d *DetachedInfo) text() string {
	s := "vouched for by " + Clean(d.AgentID) + ", record of " + stamp(d.At)
	if d.Attested {
		return s + " by " + Clean(d.Authority)
	}
	return s + ", a time that nobody attests"
}

// recordTime judges the record's own token: it alone says when the node spoke,
// whatever is known of the link's signature.
func (v *linkVerifier) recordTime() (string, error) {
	v.recordAt = v.now
	if v.detached == nil {
		return "", errSkip
	}
	if len(v.detached.Token) == 0 {
		return "the record has none", errSkip
	}
	t, err := timestamp.Parse(v.detached.Token)
	if err != nil {
		return "", err
	}
	got, err := t.Verify(v.detached.Signature, v.trust.root.Timestamps)
	if errors.Is(err, timestamp.ErrUnknownAuthority) {
		return "its authority is not in trust.json: it counts for nothing", nil
	}
	if err != nil {
		return "", err
	}
	if got.Time.After(v.now.Add(MaxClockSkew)) {
		return "", fmt.Errorf("the attested time is %w: %s, it is %s", ErrNotYetValid, stamp(got.Time), stamp(v.now))
	}
	v.recordAt, v.recordBy = got.Time.UTC(), authorityName(got.Authority)
	v.recordSame = got.Authority.Operator == v.trust.Operator()
	return stamp(v.recordAt) + " by " + v.recordBy, nil
}

// recordTimeKnown is for the record what time.known and time.authorities are for
// the link.
func (v *linkVerifier) recordTimeKnown() (string, error) {
	switch {
	case v.detached == nil:
		return "", errSkip
	case v.recordBy != "":
		return "attested", v.recordAgrees()
	case len(v.detached.Token) > 0:
		return "", fmt.Errorf("the detached record's timestamp is by no authority of trust.json: %w", ErrNoTime)
	case v.trust.file.Time.AuthoritiesNeeded > 0:
		return "", fmt.Errorf("the detached record has no timestamp, and trust.json wants attested time: %w", ErrNoTime)
	case v.now.Before(v.clock):
		return "", fmt.Errorf("no time is attested, so nothing says that the detached record existed at %s: %w", stamp(v.now), ErrNoTime)
	}
	return "no time is attested: judged at the verifier's own clock", errSkip
}

// recordAgrees: a record has one token. Where trust.json takes no single
// authority's word for a time, those that attest the link's must bear it out.
func (v *linkVerifier) recordAgrees() error {
	if v.trust.file.Time.AuthoritiesNeeded < 2 || len(v.times) == 0 {
		return nil // none is needed, or time.authorities has refused the link
	}
	if v.recordAt.Before(v.first.Add(-maxTimeSpread)) || v.recordAt.After(v.at.Add(maxTimeSpread)) {
		return fmt.Errorf("one authority alone says that the detached record is of %s, more than %s from the link's time %s: %w",
			stamp(v.recordAt), maxTimeSpread, stamp(v.at), ErrNoTime)
	}
	return nil
}

func (v *linkVerifier) verifyDetached(o attest.Options) (*attest.Verified, []attest.Check, error) {
	b := attest.DetachedBinding{
		TrustDomain: v.trust.TrustDomain(), SPIFFEID: v.id.String(), SVID: v.leaf, Payload: v.bundle.payloadDigest(), At: v.recordAt,
	}
	for _, a := range v.trust.authorities {
		b.Authorities = append(b.Authorities, attest.Authority{Certificate: a.Certificate, From: a.Start, Until: a.End})
	}
	verified, checks, err := attest.VerifyDetached(v.detached, b, o)
	if err == nil {
		err = errors.Join(v.authorityHeld(), v.sameNode(verified))
	}
	return verified, checks, err
}

// authorityHeld: the link's time and the record's are two, and an SVID whose
// authority was given up between them vouched for nobody any more when its key
// signed the record.
func (v *linkVerifier) authorityHeld() error {
	if slices.ContainsFunc(v.trust.authorities, func(a Authority) bool {
		return a.Certificate.Equal(v.authority.Certificate) && a.holds(v.recordAt)
	}) {
		return nil
	}
	return fmt.Errorf("authority %q of the SVID does not hold at the record's time %s (%s)",
		v.authority.Certificate.Subject, stamp(v.recordAt), v.authority.window())
}

// ErrOtherNode: the record is not of the node that the certificate names.
var ErrOtherNode = errors.New("the record beside the link is by another node than the certificate was issued to")

// sameNode: where the server said in the certificate which node it issued the
// SVID to, no other node speaks for it, however good the boot state of that one.
func (v *linkVerifier) sameNode(by *attest.Verified) error {
	if v.inside == nil {
		return nil
	}
	c, err := x509.ParseCertificate(v.inside.AKCert)
	if err != nil {
		return err
	}
	s, err := attest.ParseAKCertificate(c)
	if err != nil {
		return err
	}
	if ek := by.EK().Hash; s.EKHash != ek {
		return fmt.Errorf("%w: issued to EK %s, vouched for by EK %s", ErrOtherNode, short(hexHash(s.EKHash)), short(hexHash(ek)))
	}
	return nil
}

// describeDetached fills in what only detached evidence has.
func (v *linkVerifier) describeDetached() {
	chain := v.verified.AgentChain()
	v.out.Chain.Detached = &DetachedInfo{
		AgentID: chain[0].URIs[0].String(), AgentAuthority: chain[len(chain)-1].Subject.String(),
		At: v.recordAt, Attested: v.recordBy != "", Authority: v.recordBy, SameOperator: v.recordSame,
		KeyMadeByAgent: v.verified.Leaf().KeyOrigin == attest.OriginAgent,
	}
}

// spokenAt is when the TPM spoke: at the nonce's time, which the server chose;
// for detached evidence before its record's time and after the SVID began. The
// later end counts there: a boot state that was good when an SVID was issued and
// taken out of the policy since does not meet it.
func (v *linkVerifier) spokenAt() time.Time {
	if v.detached != nil {
		return v.recordAt
	}
	if v.parent != nil {
		// The server judged the node anew when it signed, with the policies of then.
		return v.leaf.NotBefore
	}
	return v.verified.NonceTime()
}

// issuedThrough says whether the record beside the link shows the intermediate
// authority that issued the SVID.
func (v *linkVerifier) issuedThrough() (*x509.Certificate, bool) {
	if len(v.in.Detached) == 0 {
		return nil, false
	}
	d, err := attest.ParseDetached(v.in.Detached)
	if err != nil {
		return nil, false
	}
	for _, der := range d.AgentSVID[1:] {
		c, err := x509.ParseCertificate(der)
		if err == nil && string(c.RawSubject) == string(v.leaf.RawIssuer) && v.leaf.CheckSignatureFrom(c) == nil {
			return c, true
		}
	}
	return nil, false
}
