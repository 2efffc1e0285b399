package attest

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"strings"
	"time"
)

// Reasons of checks that only detached evidence has.
var (
	ErrDetachedKind      = errors.New("not detached evidence")
	ErrDetachedSignature = errors.New("the record is not signed by the SVID's key")
	ErrAgentSVID         = errors.New("not the SVID of an agent attested by its TPM")
	ErrAgentAuthority    = errors.New("the agent's SVID leads to no authority that held then")
	ErrDetachedNonce     = errors.New("the evidence is about another SVID")
)

// AgentPath is what precedes the EK hash in the path of an agent's SPIFFE ID.
const AgentPath = "/spire/agent/tpmnode/"

// Authority is an SVID authority and when its word holds; a zero Until is open.
type Authority struct {
	Certificate *x509.Certificate
	From, Until time.Time
}

func (a Authority) holds(at time.Time) bool {
	return !at.Before(a.From) && (a.Until.IsZero() || !at.After(a.Until))
}

// DetachedBinding is what detached evidence must be bound to.
type DetachedBinding struct {
	TrustDomain string
	SPIFFEID    string
	SVID        *x509.Certificate // that it is about; the caller has judged it
	Payload     [32]byte          // of the statement
	Authorities []Authority       // of the trust domain
	At          time.Time         // T: when the record was signed, as its token says
}

// detached is what run needs besides for detached evidence.
type detached struct {
	record      *Detached
	svid        *x509.Certificate
	authorities []Authority
	agent       *x509.Certificate   // agent_svid.profile
	chain       []*x509.Certificate // agent_svid.authority
}

// VerifyDetached is Verify for evidence beside a link: the same list, with
// another rule where the server's part is missing (docs/evidence.md, "Detached").
// Who calls it has judged the SVID, and decides which nodes may speak for it:
// every enrolled node can make a record for every SVID whose key it is shown.
func VerifyDetached(d *Detached, b DetachedBinding, o Options) (*Verified, []Check, error) {
	r := &run{o: o, d: &detached{record: d, svid: b.SVID, authorities: b.Authorities}}
	r.b = Binding{TrustDomain: b.TrustDomain, SPIFFEID: b.SPIFFEID, Payload: &b.Payload, At: b.At}
	if d != nil {
		r.e = d.Evidence
	}
	if b.SVID != nil {
		r.b.SVIDKey = sha256.Sum256(b.SVID.RawSubjectPublicKeyInfo)
		r.b.SVIDNotBefore = b.SVID.NotBefore
	}
	return r.verify()
}

func (d *detached) options() error {
	return errors.Join(
		need(d.record != nil, "a detached record"),
		need(d.svid != nil, "the SVID"),
		need(len(d.authorities) > 0, "authorities of the trust domain"))
}

// 2: a record of the other kind says the same under other rules.
func (r *run) detachedKind() error {
	if err := r.d.record.checkForm(); err != nil {
		return fmt.Errorf("%w: %w", ErrDetachedKind, err)
	}
	r.leaf = r.e.Leaf(r.b.TrustDomain, r.b.SPIFFEID, r.b.SVIDKey)
	r.when, r.earliest = r.b.At, r.d.svid.NotBefore
	return nil
}

// Signed by who signed the link: nobody else can put a record beside it.
func (r *run) detachedSignature() error {
	key, ok := r.d.svid.PublicKey.(*ecdsa.PublicKey)
	if !ok || key.Curve != elliptic.P256() {
		return fmt.Errorf("%w: that key is not ECDSA P-256", ErrDetachedSignature)
	}
	if len(r.d.record.Signature) == 0 {
		return fmt.Errorf("%w: it has no signature", ErrDetachedSignature)
	}
	input, err := r.d.record.SigningInput(r.d.svid.Raw)
	if err != nil {
		return err
	}
	digest := sha256.Sum256(input)
	if !ecdsa.VerifyASN1(key, digest[:], r.d.record.Signature) {
		return ErrDetachedSignature
	}
	return nil
}

// The agent's ID is the EK that its server attested it by.
func (r *run) agentProfile() error {
	bad := func(format string, a ...any) error {
		return fmt.Errorf("%w: "+format, append([]any{ErrAgentSVID}, a...)...)
	}
	c, err := x509.ParseCertificate(r.d.record.AgentSVID[0])
	if err != nil {
		return bad("%w", err)
	}
	prefix := "spiffe://" + r.b.TrustDomain + AgentPath
	switch {
	case len(c.URIs) != 1:
		return bad("%d URI names", len(c.URIs))
	case c.IsCA || c.KeyUsage&(x509.KeyUsageCertSign|x509.KeyUsageCRLSign) != 0:
		return bad("it is a CA certificate")
	case c.KeyUsage&x509.KeyUsageDigitalSignature == 0:
		return bad("no key usage digitalSignature")
	case len(c.UnhandledCriticalExtensions) > 0:
		return bad("unknown critical extension %v", c.UnhandledCriticalExtensions[0])
	}
	id := c.URIs[0].String()
	digits, _ := strings.CutPrefix(id, prefix)
	b, err := hex.DecodeString(digits)
	if err != nil || len(b) != sha256.Size || id != prefix+hex.EncodeToString(b) {
		return bad("its ID is %.300q, want %s and an EK hash", id, prefix)
	}
	ek := [32]byte(b)
	key := sha256.Sum256(c.RawSubjectPublicKeyInfo)
	r.b.EKHash, r.b.AgentKey = &ek, &key
	r.d.agent = c
	return nil
}

// The chain may have intermediates: a record has room for them, unlike a bundle.
// Every certificate is judged at T.
func (r *run) agentAuthority() (string, bool, error) {
	above := x509.NewCertPool()
	for _, der := range r.d.record.AgentSVID[1:] {
		c, err := x509.ParseCertificate(der)
		if err != nil {
			return "", false, fmt.Errorf("%w: %w", ErrAgentAuthority, err)
		}
		above.AddCert(c)
	}
	roots, n := x509.NewCertPool(), 0
	for _, a := range r.d.authorities {
		// The window is the operator's: an authority that was given up, or is
		// only prepared, says nothing.
		if a.holds(r.b.At) && a.holds(r.d.agent.NotBefore) {
			roots.AddCert(a.Certificate)
			n++
		}
	}
	if n == 0 {
		return "", false, fmt.Errorf("%w: none did", ErrAgentAuthority)
	}
	chains, err := r.d.agent.Verify(x509.VerifyOptions{
		Roots: roots, Intermediates: above, CurrentTime: r.b.At, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny},
	})
	if err != nil {
		return "", false, fmt.Errorf("%w: %w", ErrAgentAuthority, err)
	}
	r.d.chain = chains[0]
	return fmt.Sprintf("%s, by %s", r.d.agent.URIs[0], r.d.chain[len(r.d.chain)-1].Subject), false, nil
}

// 18
func (r *run) nonceSVID() error {
	if r.leaf.Nonce != DetachedNonce(r.d.svid.Raw) {
		return ErrDetachedNonce
	}
	return nil
}

// 19: the SVID existed before the nonce that is its hash, and the record's
// signature bears the token, so the quote was made between the SVID's beginning
// and T. Inside the lives of everything that vouches for it; the agent's SVID
// and the AK certificate were judged at T above.
func (r *run) detachedTime() error {
	if err := checkTime(r.d.svid, r.b.At); err != nil {
		return fmt.Errorf("%w: the SVID: %w", ErrTime, err)
	}
	if err := checkTime(r.d.agent, r.b.At); err != nil {
		return fmt.Errorf("%w: the agent's SVID: %w", ErrTime, err)
	}
	return nil
}
