package attest

import (
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"time"
)

// Reasons of checks that Verify makes itself.
var (
	ErrOptions       = errors.New("verification was asked for without something it needs")
	ErrKind          = errors.New("not leaf evidence")
	ErrAKCertIssuer  = errors.New("AK certificate is not signed by a trusted attestation CA")
	ErrAKCertTime    = errors.New("AK certificate or its CA was not valid then")
	ErrRevoked       = errors.New("revoked")
	ErrWrongEK       = errors.New("EK is not the one expected")
	ErrWrongAgent    = errors.New("agent key is not the one expected")
	ErrWrongPayload  = errors.New("payload is not the statement")
	ErrTime          = errors.New("times do not fit together")
	ErrEventLogOther = errors.New("event log is not the one in the evidence")
	ErrBoot          = errors.New("the TPM was reset or restarted since its AK was certified")
)

// Kinds of things that can be revoked. The id is lower-case hex: SHA-256 of the
// SPKI, for an AK its TPM name, for an executable the SHA-256 of the file.
const (
	RevokedEK            = "ek"
	RevokedAK            = "ak"
	RevokedAttestationCA = "attestation_ca"
	RevokedExecutable    = "executable"
)

// Revoked answers revocation questions; a nil func means nothing is revoked.
type Revoked func(kind, id string, at time.Time) bool

// Binding is what the evidence must be bound to, known from elsewhere.
type Binding struct {
	TrustDomain   string
	SPIFFEID      string
	SVIDKey       [32]byte  // KeyHash of the key in the certificate or CSR
	AgentKey      *[32]byte // the server knows it from mTLS; nil offline
	EKHash        *[32]byte // the server knows it from the agent ID; nil offline
	Payload       *[32]byte // the verifier knows the statement; nil at the server
	SVIDNotBefore time.Time // zero at the server, which has not yet signed
	At            time.Time // the attested signing time; at the server the time of issuance
}

// Options are the trust that Verify takes as given.
type Options struct {
	AttestationCAs []*x509.Certificate
	EK             EKRoots
	Revoked        Revoked
	RequiredPCRs   []PCRSelection             // must be selected by the quote; at least one
	CheckNonce     func(nonce [32]byte) error // server: NonceMaker.Check; offline: nil, Binding.SVIDNotBefore bounds it
	EventLog       []byte                     // optional: replayed when given, must match the record's digest
	Signatures     *Signatures                // optional: remembers good signatures from call to call
}

// Verify runs every check on leaf evidence that needs no server state, top
// down, and stops at the first that fails. The report holds each check's
// outcome, also on failure; the error is a *CheckError.
func Verify(e *Evidence, b Binding, o Options) (*Verified, []Check, error) {
	r := &run{e: e, b: b, o: o}
	return r.verify()
}

func (r *run) verify() (*Verified, []Check, error) {
	report, err := runChecks(r.checks())
	if err != nil {
		return nil, report, err
	}
	v := &Verified{
		leaf: *r.leaf, ek: *r.ek, ak: *r.ak, statement: *r.statement,
		quote: r.quote.Quote, pcrs: r.e.PCRs, policy: r.e.Policy, secure: r.secure, earliest: r.earliest,
	}
	if r.d != nil {
		v.agent = r.d.chain
	}
	return v, report, nil
}

// run holds what earlier checks found for later ones.
type run struct {
	e *Evidence
	b Binding
	o Options
	d *detached // nil: leaf evidence

	leaf *Leaf
	// when the TPM spoke, as well as can be said: the nonce's time, for detached
	// evidence T.
	when      time.Time
	earliest  time.Time
	akCert    *x509.Certificate
	ca        *x509.Certificate
	statement *AKStatement
	ak        *AK
	ek        *EK
	quote     *quote
	secure    *bool
}

// checks is the list, one for both kinds. IDs are stable; the order is that of
// trust: what was asked for, whose word is taken, the hardware, the quote, what
// it is bound to, when. Detached evidence has to show besides whose word it is.
func (r *run) checks() []check {
	must := func(f func() error) func() (string, bool, error) {
		return func() (string, bool, error) { return "", false, f() }
	}
	list := []check{{"options", "evidence.md, Verification 1", must(r.options)}}
	if r.d == nil {
		list = append(list, check{"evidence.kind", "evidence.md, Verification 2", must(r.kind)})
	} else {
		list = append(list, []check{
			{"evidence.kind", "evidence.md, Detached", must(r.detachedKind)},
			{"detached.signature", "evidence.md, Detached", must(r.detachedSignature)},
			{"agent_svid.profile", "SPIFFE X509-SVID, 2, 4 and 5.2", must(r.agentProfile)},
			{"agent_svid.authority", "RFC 5280, 6.1; evidence.md, Detached", r.agentAuthority},
		}...)
	}
	list = append(list, []check{
		{"ak_cert.profile", "evidence.md, AK certificate", must(r.akProfile)},
		{"ak_cert.signature", "RFC 5280, 6.1.3 (a)(1)", must(r.akSignature)},
		{"ak_cert.time", "RFC 5280, 6.1.3 (a)(2)", must(r.akTime)},
		{"ak_cert.revocation", "evidence.md, Verification 6", r.akRevocation},
		{"ek.genuine", "TCG EK Credential Profile 2.6", r.ekGenuine},
		{"ek.identity", "evidence.md, Verification 8", must(r.ekIdentity)},
		{"ek.revocation", "evidence.md, Verification 9", r.ekRevocation},
		{"quote.structure", "TPM 2.0 Part 2, 10.12.12", must(r.quoteStructure)},
		{"quote.signature", "TPM 2.0 Part 3, 18.4", must(r.quoteSignature)},
		{"quote.selection", "evidence.md, Verification 12", must(r.quoteSelection)},
		{"quote.pcr_digest", "TPM 2.0 Part 2, 10.12.4", must(r.quoteDigest)},
		{"leaf.commitment", "evidence.md, Tree", must(r.commitment)},
		{"leaf.agent_key", "evidence.md, Verification 15", r.agentKey},
		{"leaf.payload", "evidence.md, Verification 16", r.payload},
		{"leaf.revocation", "evidence.md, Verification 17", r.leafRevocation},
	}...)
	if r.d == nil {
		list = append(list,
			check{"nonce.fresh", "evidence.md, Nonce", r.nonceFresh},
			check{"time.svid", "evidence.md, Times", r.svidTime})
	} else {
		list = append(list,
			check{"nonce.svid", "evidence.md, Nonce", must(r.nonceSVID)},
			check{"time.detached", "evidence.md, Detached", must(r.detachedTime)})
	}
	return append(list,
		check{"quote.boot", "TPM 2.0 Part 2, 10.11.1; evidence.md, AK certificate", r.boot},
		check{"event_log.replay", "TCG PC Client PFP 1.06, 10", r.eventLog})
}

func need(ok bool, what string) error {
	if ok {
		return nil
	}
	return fmt.Errorf("%w: %s", ErrOptions, what)
}

// 1: a missing trust root, requirement or time is an error, never "allow".
func (r *run) options() error {
	var more error
	if r.d != nil {
		more = r.d.options()
	}
	return errors.Join(more,
		need(r.e != nil, "evidence"),
		need(r.b.TrustDomain != "" && r.b.SPIFFEID != "", "trust domain and SPIFFE ID"),
		need(r.b.SVIDKey != [32]byte{}, "SVID key"),
		need(!r.b.At.IsZero(), "the time to judge at"),
		need(r.o.CheckNonce != nil || !r.b.SVIDNotBefore.IsZero(), "a nonce check or the SVID's notBefore"),
		need(len(r.o.AttestationCAs) > 0, "attestation CAs"),
		need(len(r.o.EK.Roots) > 0 || len(r.o.EK.Allow) > 0, "EK roots or an EK allow-list"),
		need(len(r.o.RequiredPCRs) > 0, "required PCRs"),
	)
}

// 2: detached and parent evidence are lower tiers with verifiers of their own.
func (r *run) kind() error {
	if r.e.Kind != KindLeaf {
		return fmt.Errorf("%w but of kind %d", ErrKind, r.e.Kind)
	}
	r.leaf = r.e.Leaf(r.b.TrustDomain, r.b.SPIFFEID, r.b.SVIDKey)
	r.when = NonceTime(r.leaf.Nonce)
	r.earliest = r.when
	if r.when.IsZero() {
		return fmt.Errorf("%w: the nonce holds no time", ErrTime)
	}
	return nil
}

// 3
func (r *run) akProfile() (err error) {
	if r.akCert, err = x509.ParseCertificate(r.e.AKCert); err != nil {
		return fmt.Errorf("%w: %v", ErrAKCert, err)
	}
	if r.statement, err = ParseAKCertificate(r.akCert); err != nil {
		return err
	}
	r.ak = akOf(r.akCert.PublicKey, r.statement)
	return nil
}

// 4: the CAs are trusted as given, so they are not checked for issuers of their own.
func (r *run) akSignature() error {
	err := errors.New("no CA of that name")
	for _, ca := range r.o.AttestationCAs {
		if string(ca.RawSubject) != string(r.akCert.RawIssuer) {
			continue
		}
		if err = checkCA(ca, 0); err != nil {
			continue
		}
		if err = r.o.Signatures.signedBy(r.akCert, ca); err == nil {
			r.ca = ca
			return nil
		}
	}
	return fmt.Errorf("%w: %w", ErrAKCertIssuer, err)
}

// 5: the AK certificate when the TPM spoke, its CA when the certificate began.
func (r *run) akTime() error {
	if err := checkTime(r.akCert, r.when); err != nil {
		return fmt.Errorf("%w: %w", ErrAKCertTime, err)
	}
	if err := checkTime(r.ca, r.akCert.NotBefore); err != nil {
		return fmt.Errorf("%w: %w", ErrAKCertTime, err)
	}
	return nil
}

// revoked asks at both times that matter: when the TPM spoke and when the
// signature was made.
func (r *run) revoked(kind, id string) error {
	for _, at := range []time.Time{r.when, r.b.At} {
		if r.o.Revoked(kind, id, at) {
			return fmt.Errorf("%w: %s %s", ErrRevoked, kind, id)
		}
	}
	return nil
}

const noRevocations = "no revocations were given"

// 6
func (r *run) akRevocation() (string, bool, error) {
	if r.o.Revoked == nil {
		return noRevocations, true, nil
	}
	ca, err := KeyHash(r.ca.PublicKey)
	if err != nil {
		return "", false, err
	}
	return "", false, errors.Join(
		r.revoked(RevokedAttestationCA, hex.EncodeToString(ca[:])),
		r.revoked(RevokedAK, hex.EncodeToString(r.ak.Name)))
}

// 7: judged by our own roots and lists, when the AK certificate began.
func (r *run) ekGenuine() (string, bool, error) {
	var key any
	if len(r.e.EKChain) == 0 {
		var err error
		if key, err = x509.ParsePKIXPublicKey(r.e.EKPublic); err != nil {
			return "", false, fmt.Errorf("%w: %v", ErrEKCert, err)
		}
	}
	ek, err := verifyEKKey(key, r.e.EKChain, r.o.EK, r.akCert.NotBefore, r.o.Signatures)
	if err != nil {
		return "", false, err
	}
	r.ek = ek
	return "accepted by " + ek.Basis, false, nil
}

// 8: the EK shown is the one the CA tied the AK to, and the one expected.
func (r *run) ekIdentity() error {
	if r.ek.Hash != r.statement.EKHash {
		return fmt.Errorf("%w: the AK certificate names EK %x, shown is %x", ErrWrongEK, r.statement.EKHash, r.ek.Hash)
	}
	if r.b.EKHash != nil && r.ek.Hash != *r.b.EKHash {
		return fmt.Errorf("%w: the agent is EK %x, shown is %x", ErrWrongEK, *r.b.EKHash, r.ek.Hash)
	}
	return nil
}

// 9
func (r *run) ekRevocation() (string, bool, error) {
	if r.o.Revoked == nil {
		return noRevocations, true, nil
	}
	return "", false, r.revoked(RevokedEK, hex.EncodeToString(r.ek.Hash[:]))
}

// 10: magic, type, exact length.
func (r *run) quoteStructure() (err error) {
	r.quote, err = parseQuote(r.e.Attest)
	return err
}

// 11
func (r *run) quoteSignature() (err error) {
	r.quote.hash, err = r.o.Signatures.quoted(r.akCert, r.e.Attest, r.e.Signature)
	return err
}

// 12
func (r *run) quoteSelection() error { return r.quote.checkSelection(r.o.RequiredPCRs) }

// 13
func (r *run) quoteDigest() error { return r.quote.checkValues(r.e.PCRs) }

// 14: leaf → path → root → extraData. One comparison binds the SVID key, the
// SPIFFE ID, every measured hash, the selectors, payload, nonce and AK.
func (r *run) commitment() error {
	h, err := r.leaf.Hash()
	if err != nil {
		return err
	}
	root, err := RootFromPath(h, r.e.Index, r.e.Size, r.e.Path)
	if err != nil {
		return err
	}
	if want := QuoteExtraData(r.e.Size, root, r.ak.Name); string(r.quote.ExtraData) != string(want[:]) {
		return ErrQuoteExtraData
	}
	return nil
}

// 15
func (r *run) agentKey() (string, bool, error) {
	if r.b.AgentKey == nil {
		return "the agent's key is not known here", true, nil
	}
	if r.leaf.AgentKey != *r.b.AgentKey {
		return "", false, ErrWrongAgent
	}
	return "", false, nil
}

// 16
func (r *run) payload() (string, bool, error) {
	if r.b.Payload == nil {
		return "the statement is not known here", true, nil
	}
	if r.leaf.Payload != *r.b.Payload {
		return "", false, ErrWrongPayload
	}
	return "", false, nil
}

// 17
func (r *run) leafRevocation() (string, bool, error) {
	if r.o.Revoked == nil {
		return noRevocations, true, nil
	}
	for _, h := range [][32]byte{r.leaf.Executable, r.leaf.Recorder, r.leaf.Tool} {
		if h == [32]byte{} {
			continue
		}
		if err := r.revoked(RevokedExecutable, hex.EncodeToString(h[:])); err != nil {
			return "", false, err
		}
	}
	return "", false, nil
}

// 18
func (r *run) nonceFresh() (string, bool, error) {
	if r.o.CheckNonce == nil {
		return "the server that made the nonce is not here; time.svid bounds it", true, nil
	}
	return "", false, r.o.CheckNonce(r.leaf.Nonce)
}

// 19: old evidence under a new certificate shows here.
func (r *run) svidTime() (string, bool, error) {
	if r.b.SVIDNotBefore.IsZero() {
		return "the SVID is not signed yet; nonce.fresh bounds it", true, nil
	}
	nb := r.b.SVIDNotBefore
	// Certificates hold whole seconds, the nonce milliseconds.
	if nb.Before(r.when.Truncate(time.Second).Add(-NonceBackdate)) || nb.After(r.when.Add(MaxSVIDAfterNonce)) {
		return "", false, fmt.Errorf("%w: SVID begins %s, the nonce is of %s", ErrTime,
			nb.UTC().Format(time.RFC3339), r.when.Format(time.RFC3339Nano))
	}
	if r.b.At.Before(nb) {
		return "", false, fmt.Errorf("%w: signed at %s, before the SVID began", ErrTime, r.b.At.UTC().Format(time.RFC3339))
	}
	return "", false, nil
}

// 20: a machine that was booted anew has a quote of the new boot, under a
// certificate that says what was seen in the old one.
func (r *run) boot() (string, bool, error) {
	got := BootCounters{r.quote.ResetCount, r.quote.RestartCount}
	switch want := r.statement.Boot; {
	case want == nil && r.d != nil:
		return "", false, fmt.Errorf("%w, or not: the AK certificate is from before CAs said in which boot", ErrBoot)
	case want == nil:
		return "the AK certificate is from before CAs said in which boot", true, nil
	case got != *want:
		return "", false, &BootError{Quoted: got, Certified: *want}
	}
	return fmt.Sprintf("reset %d, restart %d", got.Reset, got.Restart), false, nil
}

// BootError is ErrBoot with the counters that differ.
type BootError struct{ Quoted, Certified BootCounters }

// Error says both pairs.
func (e *BootError) Error() string {
	return fmt.Sprintf("%v: reset %d, restart %d when it was certified, quoted is reset %d, restart %d", ErrBoot,
		e.Certified.Reset, e.Certified.Restart, e.Quoted.Reset, e.Quoted.Restart)
}

// Is makes it ErrBoot.
func (e *BootError) Is(target error) bool { return target == ErrBoot }

// 21
func (r *run) eventLog() (string, bool, error) {
	if r.o.EventLog == nil {
		return "no event log was given", true, nil
	}
	d := r.e.EventLog
	if d == nil {
		return "", false, fmt.Errorf("%w: it names none", ErrEventLogOther)
	}
	if h, ok := hashByName(d.Alg); !ok || h.weak || string(h.sum(r.o.EventLog)) != string(d.Value) {
		return "", false, ErrEventLogOther
	}
	claims, err := ReplayEventLog(r.o.EventLog, r.e.PCRs)
	if err != nil {
		return "", false, err
	}
	r.secure = claims.SecureBoot
	return fmt.Sprintf("replayed %d PCRs of %s", len(claims.Replayed), claims.Bank), false, nil
}

// EventLogDigest is the digest of a log as records hold it.
func EventLogDigest(log []byte) *TypedDigest {
	h := sha256.Sum256(log)
	return &TypedDigest{Alg: "sha256", Value: h[:]}
}
