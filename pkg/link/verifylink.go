package link

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/rootlink/rootlink/pkg/attest"
	"github.com/rootlink/rootlink/pkg/tlog"
)

// linkVerifier judges one link. Each check fills in what later ones need.
type linkVerifier struct {
	in        LinkInput
	trust     *Trust
	now       time.Time   // of the verifier's clock, or asked for
	clock     time.Time   // the present when now was asked for, else zero
	at        time.Time   // T: now, until timeAgreement found a better one
	first     time.Time   // the earliest attested time
	seen      checkpoints // before this link: read only
	trees     checkpoints // that this link shows
	identity  string
	notBefore time.Time
	exitCode  int
	wantType  string // predicate type asked for
	out       *LinkResult
	sub       []attest.Check // of the check that just ran

	time        LinkTime         // time.tokens, time.log_entries
	times       []time.Time      // verified ones
	authorities map[string]bool  // who attested them
	included    []*tlog.Included // what known logs hold

	bundle    *Bundle           // bundle.form
	leaf      *x509.Certificate // bundle.form
	id        spiffeid.ID       // svid.profile
	authority Authority         // svid.authority
	stmt      *Statement        // statement.form; nil: not a link
	predicate string            // statement.form; the predicate type
	kind      string            // evidence.form
	evidence  *attest.Evidence  // evidence.form; nil: there is none, or none that may be judged
	detached  *attest.Detached  // evidence.form; nil unless the kind is that
	parent    *attest.Parent    // evidence.form; nil unless the kind is that
	inside    *attest.Parent    // evidence.form; in the certificate, with a detached record beside it
	recordAt  time.Time         // evidence.time; T of the detached record
	recordBy  string            // evidence.time; empty: nobody attests it
	// recordSame: that is run by whoever runs the SVID authority.
	recordSame bool
	req        *Requirement      // requirement.match
	verified   *attest.Verified  // evidence.verify
	node       nodeEvidence      // evidence.verify; verified, or of the kind parent
	ak         *x509.Certificate // evidence.verify
	akIssuer   *x509.Certificate // evidence.verify
	tools      []string          // programs.measured; every main program of the step
	protected  bool              // programs.measured
}

// checks is the verifier, top down.
func (v *linkVerifier) checks() []check {
	return []check{
		// Who signed what.
		{"bundle.form", "Sigstore bundle v0.3; DSSE v1.0", ErrCrypto, v.bundleForm},
		{"svid.profile", "SPIFFE X509-SVID §2, §4, §5.2", ErrCrypto, v.svidProfile},
		// When.
		{"time.tokens", "RFC 3161 §2.3, §2.4.2", ErrCrypto, v.timestampTokens},
		{"time.log_entries", "RFC 6962 §2.1.1; C2SP tlog-checkpoint, tlog-cosignature", ErrCrypto, v.logEntries},
		{"time.known", "verify.md, times", ErrPolicy, v.timeKnown},
		{"time.agreement", "verify.md, times", ErrCrypto, v.timeAgreement},
		{"time.authorities", "verify.md, times", ErrPolicy, v.timeEnough},
		{"svid.authority", "SPIFFE X509-SVID §5.1; RFC 5280 §6.1", ErrCrypto, v.svidAuthority},
		{"svid.validity", "RFC 5280 §4.1.2.5", ErrCrypto, v.svidValidity},
		{"dsse.signature", "DSSE v1.0, protocol", ErrCrypto, v.signatureValid},
		{"statement.form", "in-toto Statement v1; in-toto link v0.3", ErrCrypto, v.statementForm},
		{"statement.type", "verify.md, statements that are no links", ErrPolicy, v.statementType},
		// With which evidence.
		{"evidence.form", "evidence.md, encoding; RFC 9999", ErrCrypto, v.evidenceForm},
		{"requirement.match", "verify.md, requirements", ErrPolicy, v.requirementMatch},
		{"evidence.kind", "verify.md, requirements", ErrPolicy, v.evidenceKind},
		{"evidence.mapping", "verify.md, detached evidence", ErrPolicy, v.evidenceMapping},
		{"evidence.time", "RFC 3161 §2.3, §2.4.2", ErrCrypto, v.recordTime},
		{"evidence.time_known", "verify.md, detached evidence", ErrPolicy, v.recordTimeKnown},
		{"svid.code_signing", "RFC 5280 §4.2.1.12", ErrCrypto, v.codeSigning},
		{"evidence.verify", "evidence.md, verification", ErrCrypto, v.evidenceVerify},
		{"time.nonce", "verify.md, times", ErrCrypto, v.timeAfterNonce},
		{"log.proofs", "RFC 6962 §2.1.1; verify.md, logs", ErrCrypto, v.logProofs},
		{"programs.measured", "evidence.md, selectors", ErrCrypto, v.programsMeasured},
		// Whether that is enough.
		{"revocation", "verify.md, revocations", ErrPolicy, v.notRevoked},
		{"requirement.ek", "verify.md, requirements", ErrPolicy, v.requiredEK},
		{"requirement.tools", "verify.md, requirements", ErrPolicy, v.requiredTools},
		{"requirement.recorder", "verify.md, requirements", ErrPolicy, v.requiredRecorder},
		{"requirement.pcr_policy", "verify.md, PCR policies", ErrPolicy, v.requiredPCRs},
		{"requirement.tier", "verify.md, tiers", ErrPolicy, v.requiredTier},
		{"requirement.type", "verify.md, statements that are no links", ErrPolicy, v.requiredType},
		{"requirement.logged", "verify.md, requirements", ErrPolicy, v.requiredLogged},
		{"requirement.step", "verify.md, requirements", ErrPolicy, v.requiredStep},
		{checkExecutables, "verify.md, what ran", ErrPolicy, v.requiredExecutables},
		{checkCaches, "verify.md, what ran", ErrPolicy, v.requiredCaches},
		{"pcr_policy.claim", "verify.md, PCR policies", ErrPolicy, v.policyClaim},
		{"ek.inventory", "verify.md, inventory", ErrPolicy, v.inInventory},
		{"identity", "verify.md, identity", ErrPolicy, v.identityMatch},
		{"freshness", "verify.md, replayed links", ErrPolicy, v.fresh},
		{"step.exit_code", "verify.md, steps that failed", ErrPolicy, v.stepSucceeded},
	}
}

func (v *linkVerifier) bundleForm() (_ string, err error) {
	if v.bundle = v.in.Parsed; v.bundle == nil {
		if v.bundle, err = ParseBundle(v.in.Bundle); err != nil {
			return "", err
		}
	}
	v.leaf = v.bundle.leaf
	return "one DSSE signature, one leaf certificate, nothing else", nil
}

var oidKeyUsage = asn1.ObjectIdentifier{2, 5, 29, 15}

func (v *linkVerifier) svidProfile() (string, error) {
	c := v.leaf
	if len(c.URIs) != 1 {
		return "", fmt.Errorf("%d URI names, an SVID has exactly one", len(c.URIs))
	}
	id, err := spiffeid.FromString(c.URIs[0].String())
	if err != nil {
		return "", err
	}
	if id.TrustDomain() != v.trust.td {
		return "", fmt.Errorf("%s is not of trust domain %s", id, v.trust.td)
	}
	if id.Path() == "" {
		return "", fmt.Errorf("%s has no path: it is an authority's name", id)
	}
	if c.IsCA {
		return "", errors.New("it is a CA certificate")
	}
	// RFC 5280 §4.2: who does not understand a critical extension must refuse.
	if len(c.UnhandledCriticalExtensions) > 0 {
		return "", fmt.Errorf("unknown critical extension %v", c.UnhandledCriticalExtensions[0])
	}
	critical := slices.ContainsFunc(c.Extensions, func(e pkix.Extension) bool { return e.Critical && e.Id.Equal(oidKeyUsage) })
	if !critical || c.KeyUsage&x509.KeyUsageDigitalSignature == 0 {
		return "", errors.New("no critical key usage digitalSignature")
	}
	if c.KeyUsage&(x509.KeyUsageCertSign|x509.KeyUsageCRLSign) != 0 {
		return "", errors.New("key usage of a CA")
	}
	pub, ok := c.PublicKey.(*ecdsa.PublicKey)
	if !ok || pub.Curve != elliptic.P256() {
		return "", errors.New("its key is not ECDSA P-256")
	}
	v.id = id
	return id.String(), nil
}

// svidAuthority looks for the authority by signature, not by name alone: two
// may share a name, and one that has been replaced may still be listed.
func (v *linkVerifier) svidAuthority() (string, error) {
	var reason error
	for _, a := range v.trust.authorities {
		if string(v.leaf.RawIssuer) != string(a.Certificate.RawSubject) || v.leaf.CheckSignatureFrom(a.Certificate) != nil {
			continue
		}
		// The window is the operator's: an authority prepared, and not yet
		// or no longer in use, signs nothing that counts.
		if !a.holds(v.at) {
			reason = fmt.Errorf("authority %q does not hold at %s (%s)", a.Certificate.Subject, stamp(v.at), a.window())
			continue
		}
		if !a.holds(v.leaf.NotBefore) {
			reason = fmt.Errorf("authority %q did not hold when the SVID began (%s)", a.Certificate.Subject, stamp(v.leaf.NotBefore))
			continue
		}
		v.authority = a
		key := spkiHash(a.Certificate)
		svidKey := spkiHash(v.leaf)
		v.out.Chain.SVID = &SVIDInfo{
			SPIFFEID: v.id.String(), KeySHA256: hex.EncodeToString(svidKey[:]),
			NotBefore: v.leaf.NotBefore.UTC(), NotAfter: v.leaf.NotAfter.UTC(),
			Authority: a.Certificate.Subject.String(), AuthorityKey: hex.EncodeToString(key[:]),
		}
		return a.Certificate.Subject.String(), nil
	}
	if reason == nil {
		reason = errors.New("no authority in trust.json signed it")
		if c, ok := v.issuedThrough(); ok {
			reason = fmt.Errorf("%w: %q, which trust.json does not list", ErrIntermediate, c.Subject)
		}
	}
	return "", reason
}

func (a Authority) window() string {
	if a.End.IsZero() {
		return "from " + stamp(a.Start)
	}
	return stamp(a.Start) + " to " + stamp(a.End)
}

// svidValidity: every attested time must lie inside, not T alone.
func (v *linkVerifier) svidValidity() (string, error) {
	c, first := v.leaf, v.at
	how := "it is " + stamp(v.at)
	if v.time.Attested {
		first, how = v.first, "the link was signed at "+stamp(v.first)
	}
	if first.Before(c.NotBefore) {
		return "", fmt.Errorf("the SVID is %w: from %s, %s", ErrNotYetValid, stamp(c.NotBefore), how)
	}
	if v.at.After(c.NotAfter) {
		if v.time.Attested {
			return "", fmt.Errorf("the SVID %w at %s, before the link was signed (%s)", ErrExpired, stamp(c.NotAfter), stamp(v.at))
		}
		return "", fmt.Errorf("the SVID %w at %s, and without a timestamp nothing shows that the link was signed before", ErrExpired, stamp(c.NotAfter))
	}
	return fmt.Sprintf("%s to %s", stamp(c.NotBefore), stamp(c.NotAfter)), nil
}

func (v *linkVerifier) signatureValid() (string, error) {
	digest := v.bundle.payloadDigest()
	if !ecdsa.VerifyASN1(v.leaf.PublicKey.(*ecdsa.PublicKey), digest[:], v.bundle.signature) {
		return "", errors.New("the statement was not signed by the SVID's key, or was changed since")
	}
	return "ECDSA P-256, SHA-256", nil
}

func (v *linkVerifier) statementForm() (_ string, err error) {
	digest := v.bundle.payloadDigest()
	stmt, err := v.bundle.UnverifiedStatement()
	if err != nil || v.wantType != PredicateType {
		a, aerr := v.bundle.UnverifiedAttestation()
		if aerr != nil || a.Type == PredicateType && err != nil {
			return "", errors.Join(aerr, err)
		}
		if a.Type != PredicateType {
			v.predicate = a.Type
			v.out.Chain.Statement = &StatementInfo{PredicateType: a.Type, PayloadSHA256: hex.EncodeToString(digest[:]), Subjects: a.Subjects}
			return fmt.Sprintf("predicate %s, %s", a.Type, count(len(a.Subjects), "subject")), nil
		}
	}
	v.stmt, v.predicate = stmt, PredicateType
	s := v.stmt
	v.out.stmt = s
	v.out.Chain.Statement = &StatementInfo{
		PredicateType: PredicateType, Step: s.Step, Command: s.Command, PayloadSHA256: hex.EncodeToString(digest[:]),
		Subjects: s.Subjects, Materials: len(s.Materials), ExitCode: s.Byproducts.ExitCode,
		Git: s.Environment.Git, Started: s.Byproducts.Started, Finished: s.Byproducts.Finished,
	}
	return fmt.Sprintf("step %q, %s, %s", s.Step, count(len(s.Subjects), "subject"), count(len(s.Materials), "material")), nil
}

// statementType: what was signed is of the kind that was asked for, so that
// nobody passes an SBOM where a link is wanted, or the other way round.
func (v *linkVerifier) statementType() (string, error) {
	if v.predicate != v.wantType {
		return "", fmt.Errorf("the statement is a %s, asked for was %s", PredicateAlias(v.predicate), PredicateAlias(v.wantType))
	}
	return v.predicate, nil
}

// requiredType: an identity signs links, and other kinds only where its
// requirement lists them.
func (v *linkVerifier) requiredType() (string, error) {
	if v.req == nil {
		return "", errSkip
	}
	types := v.req.Types
	if len(types) == 0 {
		types = []string{PredicateType}
	}
	if !slices.Contains(types, v.predicate) {
		return "", fmt.Errorf("%s may not sign statements of type %s", v.req.Identity, PredicateAlias(v.predicate))
	}
	return v.predicate, nil
}

func (v *linkVerifier) identityMatch() (string, error) {
	if !MatchPattern(v.identity, v.id.String()) {
		return "", fmt.Errorf("%s does not match %s", v.id, v.identity)
	}
	return v.identity, nil
}

// fresh refuses a genuine link of an older run. The nonce is the TPM's bound:
// the evidence cannot be older than it. Of detached evidence it is the SVID's
// beginning, since the nonce is the SVID.
func (v *linkVerifier) fresh() (string, error) {
	if v.notBefore.IsZero() || v.node == nil {
		return "", errSkip
	}
	n := v.leaf.NotBefore // parent evidence may be older than what it lies in
	if v.verified != nil {
		n = v.verified.Earliest()
	}
	if n.Before(v.notBefore) {
		return "", fmt.Errorf("the evidence is of %s or later, which may be before %s", stamp(n), stamp(v.notBefore))
	}
	return "not before " + stamp(v.notBefore), nil
}

func (v *linkVerifier) stepSucceeded() (string, error) {
	if v.stmt == nil {
		return "", errSkip // only a link says how a step went
	}
	b := v.stmt.Byproducts
	switch {
	case b.Signal != "":
		return "", fmt.Errorf("the step was ended by signal %s", b.Signal)
	case b.ExitCode == nil:
		return "", errors.New("the statement does not say how the step ended")
	case *b.ExitCode != v.exitCode && v.exitCode != 0:
		return "", fmt.Errorf("the step ended with exit code %d, not with %d as the layout expects", *b.ExitCode, v.exitCode)
	case *b.ExitCode != v.exitCode:
		return "", fmt.Errorf("the step ended with exit code %d", *b.ExitCode)
	}
	return strconv.Itoa(*b.ExitCode), nil
}
