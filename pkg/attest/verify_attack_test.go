package attest_test

import (
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"testing"
	"time"

	"github.com/google/go-tpm/tpm2"

	"github.com/rootlink/rootlink/internal/forge"
	"github.com/rootlink/rootlink/pkg/attest"
)

// attack bends a good world, or the evidence, binding or options made from it.
type attack struct {
	world func(*testing.T, *forge.World)
	bend  func(*testing.T, *forge.World, *attest.Evidence, *attest.Binding, *attest.Options)
	check string // the check that must fail
	want  error
}

func TestRefusesEvidence(t *testing.T) {
	type ev = *attest.Evidence
	type bi = *attest.Binding
	type op = *attest.Options
	e := func(f func(ev)) func(*testing.T, *forge.World, ev, bi, op) {
		return func(_ *testing.T, _ *forge.World, e ev, _ bi, _ op) { f(e) }
	}
	b := func(f func(bi)) func(*testing.T, *forge.World, ev, bi, op) {
		return func(_ *testing.T, _ *forge.World, _ ev, b bi, _ op) { f(b) }
	}
	o := func(f func(op)) func(*testing.T, *forge.World, ev, bi, op) {
		return func(_ *testing.T, _ *forge.World, _ ev, _ bi, o op) { f(o) }
	}
	akCert := func(f func(*x509.Certificate)) func(*testing.T, *forge.World) {
		return func(_ *testing.T, w *forge.World) { w.AKCert = f }
	}
	later := func(w *forge.World, b bi, d time.Duration) {
		b.SVIDNotBefore, b.At = b.SVIDNotBefore.Add(d), b.At.Add(d)
	}

	for name, a := range map[string]attack{
		"without a time":            {bend: b(func(b bi) { b.At = time.Time{} }), check: "options", want: attest.ErrOptions},
		"without bounds on time":    {bend: b(func(b bi) { b.SVIDNotBefore = time.Time{} }), check: "options", want: attest.ErrOptions},
		"without attestation CAs":   {bend: o(func(o op) { o.AttestationCAs = nil }), check: "options", want: attest.ErrOptions},
		"without EK roots":          {bend: o(func(o op) { o.EK = attest.EKRoots{} }), check: "options", want: attest.ErrOptions},
		"without required PCRs":     {bend: o(func(o op) { o.RequiredPCRs = nil }), check: "options", want: attest.ErrOptions},
		"without a SPIFFE ID":       {bend: b(func(b bi) { b.SPIFFEID = "" }), check: "options", want: attest.ErrOptions},
		"without an SVID key":       {bend: b(func(b bi) { b.SVIDKey = [32]byte{} }), check: "options", want: attest.ErrOptions},
		"detached shown as leaf":    {world: func(_ *testing.T, w *forge.World) { w.Leaf.Kind = attest.KindDetached }, check: "evidence.kind", want: attest.ErrKind},
		"nonce without a time":      {world: func(_ *testing.T, w *forge.World) { w.Leaf.Nonce[0] = 0xff }, check: "evidence.kind", want: attest.ErrTime},
		"detached relabelled leaf":  {world: func(_ *testing.T, w *forge.World) { w.Leaf.Kind = attest.KindDetached }, bend: e(func(e ev) { e.Kind = attest.KindLeaf }), check: "leaf.commitment", want: attest.ErrQuoteExtraData},
		"AK certificate malformed":  {bend: e(func(e ev) { e.AKCert = e.AKCert[:50] }), check: "ak_cert.profile", want: attest.ErrAKCert},
		"SVID as AK certificate":    {bend: func(t *testing.T, w *forge.World, e ev, _ bi, _ op) { e.AKCert = w.Issue(t, nil).Raw }, check: "ak_cert.profile", want: attest.ErrAKCert},
		"EK cert as AK certificate": {bend: e(func(e ev) { e.AKCert = e.EKChain[0] }), check: "ak_cert.profile", want: attest.ErrAKCert},
		"AK certificate by another CA": {bend: func(t *testing.T, _ *forge.World, _ ev, _ bi, o op) {
			o.AttestationCAs = []*x509.Certificate{forge.NewAttestationCA(t, nil).Cert}
		}, check: "ak_cert.signature", want: attest.ErrAKCertIssuer},
		"AK certificate by the SVID authority": {bend: func(t *testing.T, w *forge.World, e ev, _ bi, _ op) {
			ca := &forge.AttestationCA{Cert: w.Authority, Key: w.AuthorityKey()}
			e.AKCert = ca.Certify(t, forge.Statement(w.TPM, w.Maker.Root), w.TPM.AKKey(), w.Now, nil).Raw
		}, check: "ak_cert.signature", want: attest.ErrAKCertIssuer},
		"attestation CA without CA rights": {world: func(t *testing.T, w *forge.World) {
			w.CA = forge.NewAttestationCA(t, func(c *x509.Certificate) {
				c.IsCA, c.MaxPathLenZero, c.KeyUsage, c.SubjectKeyId = false, false, 0, []byte{1}
			})
		}, check: "ak_cert.signature", want: attest.ErrAKCertIssuer},
		"attestation CA with an unknown critical extension": {world: func(t *testing.T, w *forge.World) {
			w.CA = forge.NewAttestationCA(t, unknownCritical)
		}, check: "ak_cert.signature", want: attest.ErrAKCertIssuer},
		"AK certificate expired at the nonce": {world: akCert(func(c *x509.Certificate) {
			c.NotBefore, c.NotAfter = forge.Epoch().Add(-2*time.Hour), forge.Epoch().Add(-time.Hour)
		}), check: "ak_cert.time", want: attest.ErrAKCertTime},
		"AK certificate made after the nonce": {world: akCert(func(c *x509.Certificate) { c.NotBefore = forge.Epoch().Add(time.Hour) }), check: "ak_cert.time", want: attest.ErrAKCertTime},
		"attestation CA expired": {world: func(t *testing.T, w *forge.World) {
			w.CA = forge.NewAttestationCA(t, func(c *x509.Certificate) { c.NotAfter = forge.Epoch().Add(-time.Hour) })
		}, check: "ak_cert.time", want: attest.ErrAKCertTime},
		"AK revoked": {bend: func(_ *testing.T, w *forge.World, _ ev, _ bi, o op) {
			o.Revoked = revoke(attest.RevokedAK, hex.EncodeToString(w.TPM.AKName), time.Time{})
		}, check: "ak_cert.revocation", want: attest.ErrRevoked},
		"AK revoked between nonce and signature": {bend: func(_ *testing.T, w *forge.World, _ ev, b bi, o op) {
			o.Revoked = revoke(attest.RevokedAK, hex.EncodeToString(w.TPM.AKName), b.At)
		}, check: "ak_cert.revocation", want: attest.ErrRevoked},
		"attestation CA revoked": {bend: func(t *testing.T, w *forge.World, _ ev, _ bi, o op) {
			h := forge.KeyHash(t, w.CA.Cert.PublicKey)
			o.Revoked = revoke(attest.RevokedAttestationCA, hex.EncodeToString(h[:]), time.Time{})
		}, check: "ak_cert.revocation", want: attest.ErrRevoked},
		"EK of a maker that is not trusted": {bend: func(t *testing.T, _ *forge.World, _ ev, _ bi, o op) {
			o.EK = forge.NewMaker(t, "Forge Semiconductor").EKRoots()
		}, check: "ek.genuine", want: attest.ErrEKUntrusted},
		"EK on the deny-list": {bend: func(_ *testing.T, w *forge.World, _ ev, _ bi, o op) {
			o.EK.Deny = map[[32]byte]bool{w.TPM.EKHash: true}
		}, check: "ek.genuine", want: attest.ErrEKDenied},
		"bare EK key, not on the allow-list": {bend: func(t *testing.T, w *forge.World, e ev, _ bi, _ op) {
			e.EKPublic, e.EKChain = spki(t, e.EKChain[0]), nil
		}, check: "ek.genuine", want: attest.ErrEKUntrusted},
		"EK certificate of TPM B with the AK of TPM A": {bend: func(t *testing.T, w *forge.World, e ev, _ bi, _ op) {
			e.EKChain = forge.NewTPM(t, w.Maker, forge.TPMOptions{}).EKChain
		}, check: "ek.identity", want: attest.ErrWrongEK},
		"evidence of another node": {bend: b(func(b bi) { b.EKHash = &[32]byte{9} }), check: "ek.identity", want: attest.ErrWrongEK},
		"EK revoked": {bend: func(_ *testing.T, w *forge.World, _ ev, _ bi, o op) {
			o.Revoked = revoke(attest.RevokedEK, hex.EncodeToString(w.TPM.EKHash[:]), time.Time{})
		}, check: "ek.revocation", want: attest.ErrRevoked},
		"quote without the magic": {world: func(_ *testing.T, w *forge.World) { w.Attest = func(a *tpm2.TPMSAttest) { a.Magic++ } }, check: "quote.structure", want: attest.ErrQuoteMagic},
		"creation as quote":       {bend: func(_ *testing.T, w *forge.World, e ev, _ bi, _ op) { e.Attest = w.TPM.AKCreationAttest }, check: "quote.structure", want: attest.ErrQuoteType},
		"quote by another AK": {bend: func(t *testing.T, w *forge.World, e ev, _ bi, _ op) {
			e.Signature = forge.NewTPM(t, w.Maker, forge.TPMOptions{}).SignAK(t, e.Attest)
		}, check: "quote.signature", want: attest.ErrQuoteSignature},
		"quote over a disabled bank": {world: func(_ *testing.T, w *forge.World) {
			w.Selection = []attest.PCRSelection{{Bank: "sha512", Indices: []uint32{7}}}
		}, bend: func(_ *testing.T, w *forge.World, e ev, _ bi, _ op) { e.PCRs = w.TPM.PCRs[:1] }, check: "quote.selection", want: attest.ErrQuoteSelection},
		"required PCR not quoted": {bend: o(func(o op) { o.RequiredPCRs = []attest.PCRSelection{{Bank: "sha256", Indices: []uint32{17}}} }), check: "quote.selection", want: attest.ErrQuoteSelection},
		"resettable PCR required": {bend: o(func(o op) { o.RequiredPCRs = []attest.PCRSelection{{Bank: "sha256", Indices: []uint32{16}}} }), check: "quote.selection", want: attest.ErrQuoteSelection},
		"PCR values changed":      {bend: e(func(e ev) { e.PCRs[0].Values[7] = make([]byte, 32) }), check: "quote.pcr_digest", want: attest.ErrQuoteValues},

		"moved to another SVID key":     {bend: b(func(b bi) { b.SVIDKey[0] ^= 1 }), check: "leaf.commitment", want: attest.ErrQuoteExtraData},
		"moved to another SPIFFE ID":    {bend: b(func(b bi) { b.SPIFFEID = "spiffe://example.org/other" }), check: "leaf.commitment", want: attest.ErrQuoteExtraData},
		"moved to another trust domain": {bend: b(func(b bi) { b.TrustDomain = "example.com" }), check: "leaf.commitment", want: attest.ErrQuoteExtraData},
		"executable changed":            {bend: e(func(e ev) { e.Executable[0] ^= 1 }), check: "leaf.commitment", want: attest.ErrQuoteExtraData},
		"recorder changed":              {bend: e(func(e ev) { e.Recorder[0] ^= 1 }), check: "leaf.commitment", want: attest.ErrQuoteExtraData},
		"tool changed":                  {bend: e(func(e ev) { e.Tool[0] ^= 1 }), check: "leaf.commitment", want: attest.ErrQuoteExtraData},
		"key origin changed":            {bend: e(func(e ev) { e.KeyOrigin = attest.OriginAgent }), check: "leaf.commitment", want: attest.ErrQuoteExtraData},
		"selector added":                {bend: e(func(e ev) { e.Selectors = append(e.Selectors, "binary:uid:0") }), check: "leaf.commitment", want: attest.ErrQuoteExtraData},
		"selectors stripped":            {bend: e(func(e ev) { e.Selectors = nil }), check: "leaf.commitment", want: attest.ErrLeaf},
		"payload changed with statement": {bend: func(_ *testing.T, _ *forge.World, e ev, b bi, _ op) {
			e.Payload[0] ^= 1
			b.Payload = &e.Payload
		}, check: "leaf.commitment", want: attest.ErrQuoteExtraData},
		"moved to another agent": {bend: func(_ *testing.T, _ *forge.World, e ev, b bi, _ op) {
			b.AgentKey = &[32]byte{9}
			e.AgentKey = *b.AgentKey
		}, check: "leaf.commitment", want: attest.ErrQuoteExtraData},
		"Merkle size changed":        {bend: e(func(e ev) { e.Size++ }), check: "leaf.commitment"},
		"Merkle index changed":       {bend: e(func(e ev) { e.Index = 0 }), check: "leaf.commitment"},
		"Merkle path cut":            {bend: e(func(e ev) { e.Path = e.Path[1:] }), check: "leaf.commitment", want: attest.ErrPath},
		"Merkle path longer":         {bend: e(func(e ev) { e.Path = append(e.Path, [32]byte{}) }), check: "leaf.commitment", want: attest.ErrPath},
		"size of the record's limit": {bend: e(func(e ev) { e.Size = attest.MaxLeaves + 1 }), check: "leaf.commitment", want: attest.ErrPath},
		"sent by another agent":      {bend: b(func(b bi) { b.AgentKey = &[32]byte{9} }), check: "leaf.agent_key", want: attest.ErrWrongAgent},
		"shown with another statement": {bend: b(func(b bi) {
			p := sha256.Sum256([]byte("another statement"))
			b.Payload = &p
		}), check: "leaf.payload", want: attest.ErrWrongPayload},
		"tool revoked": {bend: func(_ *testing.T, w *forge.World, _ ev, _ bi, o op) {
			o.Revoked = revoke(attest.RevokedExecutable, hex.EncodeToString(w.Leaf.Tool[:]), time.Time{})
		}, check: "leaf.revocation", want: attest.ErrRevoked},
		"replayed nonce": {bend: func(_ *testing.T, w *forge.World, _ ev, _ bi, o op) {
			m := forge.Nonces()
			o.CheckNonce = func(n [32]byte) error {
				return m.Check(n, "spiffe://example.org/spire/agent/tpmnode/00", w.Now.Add(2*time.Minute))
			}
		}, check: "nonce.fresh", want: attest.ErrNonceExpired},
		"nonce of another agent": {bend: func(_ *testing.T, w *forge.World, _ ev, _ bi, o op) {
			m := forge.Nonces()
			o.CheckNonce = func(n [32]byte) error { return m.Check(n, "spiffe://example.org/spire/agent/tpmnode/01", w.Now) }
		}, check: "nonce.fresh", want: attest.ErrNonceForeign},
		"old evidence re-wrapped under new dates": {bend: func(_ *testing.T, w *forge.World, _ ev, b bi, _ op) { later(w, b, 2*time.Minute) }, check: "time.svid", want: attest.ErrTime},
		"SVID backdated before the nonce":         {bend: func(_ *testing.T, w *forge.World, _ ev, b bi, _ op) { later(w, b, -2*time.Second) }, check: "time.svid", want: attest.ErrTime},
		"signed before the SVID began":            {bend: b(func(b bi) { b.At = b.SVIDNotBefore.Add(-time.Second) }), check: "time.svid", want: attest.ErrTime},
		"event log that the record does not name": {bend: o(func(o op) { o.EventLog = []byte("log") }), check: "event_log.replay", want: attest.ErrEventLogOther},
		"event log of another boot": {bend: func(_ *testing.T, _ *forge.World, e ev, _ bi, o op) {
			o.EventLog, e.EventLog = []byte("log"), attest.EventLogDigest([]byte("other log"))
		}, check: "event_log.replay", want: attest.ErrEventLogOther},
		"event log that is none": {bend: func(_ *testing.T, _ *forge.World, e ev, _ bi, o op) {
			o.EventLog, e.EventLog = []byte("log"), attest.EventLogDigest([]byte("log"))
		}, check: "event_log.replay", want: attest.ErrEventLog},
	} {
		t.Run(name, func(t *testing.T) {
			w := forge.NewWorld(t)
			if a.world != nil {
				a.world(t, w)
			}
			// Once more with a memory that has seen the good evidence, and once
			// with one that has seen the bad: neither may let anything pass.
			known := attest.NewSignatures()
			for _, memory := range []*attest.Signatures{nil, known, known} {
				e, b, o := w.Make(t), w.Binding(), w.Options()
				o.Signatures = memory
				if a.bend != nil {
					_, _, _ = attest.Verify(e, b, o)
					a.bend(t, w, e, &b, &o)
				}
				v, report, err := attest.Verify(e, b, o)
				mustFail(t, v, report, err, a.check)
				if a.want != nil && !errors.Is(err, a.want) {
					t.Errorf("got %v; want %v", err, a.want)
				}
			}
		})
	}
}

// mustFail checks that the report tells the same story as the error: passed or
// skipped before the check, failed at it, not run behind it.
func mustFail(t *testing.T, v *attest.Verified, report []attest.Check, err error, id string) {
	t.Helper()
	var ce *attest.CheckError
	if v != nil || !errors.As(err, &ce) || ce.ID != id {
		t.Fatalf("got %v, %v; want a failure of %s", v, err, id)
	}
	before := true
	for _, c := range report {
		switch {
		case c.ID == id:
			before = false
			if c.Outcome != attest.Failed || c.Detail == "" {
				t.Errorf("%+v", c)
			}
		case before && c.Outcome == attest.Failed, !before && c.Outcome != attest.NotRun:
			t.Errorf("%+v", c)
		}
	}
	if before {
		t.Errorf("the report does not list %s", id)
	}
}

// revoke revokes one thing from a time on.
func revoke(kind, id string, from time.Time) attest.Revoked {
	return func(k, i string, at time.Time) bool { return k == kind && i == id && !at.Before(from) }
}

func spki(t *testing.T, der []byte) []byte {
	t.Helper()
	c, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return c.RawSubjectPublicKeyInfo
}

func TestVerifyAtTheServer(t *testing.T) {
	w := forge.NewWorld(t)
	e, b, o := w.Make(t), w.Binding(), w.Options()
	m := forge.Nonces()
	o.CheckNonce = func(n [32]byte) error {
		return m.Check(n, "spiffe://example.org/spire/agent/tpmnode/00", w.Now.Add(time.Second))
	}
	agent := forge.KeyHash(t, w.AgentKey.Public())
	b.SVIDNotBefore, b.Payload, b.AgentKey, b.EKHash = time.Time{}, nil, &agent, &w.TPM.EKHash
	if _, _, err := attest.Verify(e, b, o); err != nil {
		t.Error(err)
	}
}

func TestVerifyAllowListedEK(t *testing.T) {
	w := forge.NewWorld(t)
	e, b, o := w.Make(t), w.Binding(), w.Options()
	o.EK = attest.EKRoots{Allow: map[[32]byte]bool{w.TPM.EKHash: true}}
	e.EKPublic, e.EKChain = spki(t, e.EKChain[0]), nil
	v, _, err := attest.Verify(e, b, o)
	if err != nil {
		t.Fatal(err)
	}
	// The CA's word and our own finding stay apart.
	if v.EK().Basis != attest.BasisAllowList || v.AKStatement().EKBasis != attest.BasisMaker {
		t.Errorf("EK %+v, statement %+v", v.EK(), v.AKStatement())
	}
}

// TestStrippedEvidence: an SVID without the extension has none, which callers
// can tell from malformed evidence.
func TestRefusesStrippedEvidence(t *testing.T) {
	w := forge.NewWorld(t)
	if _, err := attest.FromCertificate(w.Issue(t, nil)); !errors.Is(err, attest.ErrNoEvidence) {
		t.Errorf("got %v", err)
	}
}

func TestRevocationInTheFutureDoesNotReachBack(t *testing.T) {
	w := forge.NewWorld(t)
	e, b, o := w.Make(t), w.Binding(), w.Options()
	o.Revoked = revoke(attest.RevokedAK, hex.EncodeToString(w.TPM.AKName), b.At.Add(time.Second))
	if _, _, err := attest.Verify(e, b, o); err != nil {
		t.Error(err)
	}
}
