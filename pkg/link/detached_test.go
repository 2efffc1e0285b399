package link

import (
	"crypto/ecdsa"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/rootlink/rootlink/internal/forge"
	"github.com/rootlink/rootlink/pkg/attest"
	"github.com/rootlink/rootlink/pkg/timestamp"
)

// detachedScene is a step signed with an SVID of somebody else's SPIRE server,
// for which the node vouches beside the link.
type detachedScene struct {
	*scene
	tsa    *forge.TSA
	svid   *x509.Certificate
	record *attest.Detached

	// Hooks.
	noToken  bool
	signedAt time.Time              // of link and record
	bend     func(*attest.Detached) // before it is signed
}

func newDetachedScene(t testing.TB) *detachedScene {
	t.Helper()
	s := &detachedScene{scene: newScene(t), tsa: forge.NewTSA(t, nil)}
	s.signedAt = s.Now.Add(5 * time.Second)
	s.at = s.Now.Add(48 * time.Hour) // when every certificate of the step has expired
	s.requirement().Evidence = EvidenceDetached
	s.requirement().EKs = []string{hexOf(s.TPM.EKHash)}
	s.Leaf.KeyOrigin = attest.OriginAgent
	s.know(t, s.tsa.Authority())
	return s
}

func (s *detachedScene) know(t testing.TB, as ...timestamp.Authority) {
	t.Helper()
	raw, err := TrustedRoot{
		Authorities: []Authority{{Certificate: s.Authority, Start: s.Authority.NotBefore, End: s.Authority.NotAfter}}, Timestamps: as,
	}.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	s.file.TrustedRoot = raw
}

// make goes the way of the recorder: SVID, statement, record, signatures, tokens.
func (s *detachedScene) make(t testing.TB) LinkInput {
	t.Helper()
	p, err := Prepare(s.stmt)
	if err != nil {
		t.Fatal(err)
	}
	if s.svid == nil {
		s.svid = s.Plain(t)
	}
	if s.Leaf.Payload == sha256.Sum256([]byte("the statement")) {
		s.Leaf.Payload = p.Digest()
	}
	s.record = s.Detach(t, s.svid)
	if s.bend != nil {
		s.bend(s.record)
		forge.SignDetached(t, s.record, s.svid, s.SVIDKey)
	}
	b, err := p.sign(s.SVIDKey, s.svid)
	if err != nil {
		t.Fatal(err)
	}
	if b, err = b.WithTimestamps(s.tsa.Token(t, b.Signature(), s.signedAt, nil)); err != nil {
		t.Fatal(err)
	}
	if !s.noToken {
		s.stamp(t, s.tsa)
	}
	raw, err := b.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	return LinkInput{Name: "build", Bundle: raw, Detached: s.bytes(t)}
}

func (s *detachedScene) stamp(t testing.TB, tsa *forge.TSA) {
	s.record.Token = tsa.Token(t, s.record.Signature, s.signedAt, nil)
}

func (s *detachedScene) bytes(t testing.TB) []byte {
	t.Helper()
	b, err := s.record.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// ready makes the link, so that the test can spoil what it has made.
func (s *detachedScene) ready(t testing.TB) *LinkInput {
	t.Helper()
	s.in.Links = []LinkInput{s.make(t)}
	return &s.in.Links[0]
}

func TestDetachedEvidence(t *testing.T) {
	s := newDetachedScene(t)
	s.ready(t)
	l := s.accepts(t).Links[0]
	if l.Evidence != EvidenceDetached || l.EvidenceMeans != "the node vouches, the server checked nothing" || l.Tier != TierBootAttested || !l.SoftwareTPM {
		t.Errorf("the result says %q (%q), tier %q", l.Evidence, l.EvidenceMeans, l.Tier)
	}
	d := l.Chain.Detached
	if d == nil || !d.Attested || !d.At.Equal(s.signedAt) || !d.KeyMadeByAgent || !strings.HasSuffix(d.AgentID, hexOf(s.TPM.EKHash)) {
		t.Errorf("the chain says %+v", d)
	}
	if !l.Chain.Quote.NonceTime.IsZero() {
		t.Error("a time is shown for a nonce that has none")
	}
	said := false
	for _, w := range l.TakenOnWordOf {
		said = said || strings.Contains(w.What, "the server checked nothing") && strings.Contains(w.Who, d.AgentID)
	}
	if !said {
		t.Errorf("whose word it is is not said: %+v", l.TakenOnWordOf)
	}
}

// Our own agent on a SPIRE server signs for keys that the recorder made, and
// whoever has no PCR policies names EKs, and the other way round.
func TestDetachedEvidenceVariants(t *testing.T) {
	for name, bend := range map[string]func(*detachedScene){
		"key of the recorder":  func(s *detachedScene) { s.Leaf.KeyOrigin = attest.OriginCaller },
		"mapped to EKs":        func(s *detachedScene) { s.requirement().PCRPolicies, s.requirement().Tier = nil, TierTPM },
		"mapped to a policy":   func(s *detachedScene) { s.requirement().EKs = nil },
		"at once, no token":    func(s *detachedScene) { s.noToken, s.at = true, s.signedAt },
		"parent would do":      func(s *detachedScene) { s.requirement().parentWouldDo() },
		"attested time needed": func(s *detachedScene) { s.file.Time.AuthoritiesNeeded = 1 },
	} {
		t.Run(name, func(t *testing.T) {
			s := newDetachedScene(t)
			bend(s)
			s.ready(t)
			l := s.accepts(t).Links[0]
			if l.Chain.Detached.Attested == s.noToken {
				t.Errorf("%+v", l.Chain.Detached)
			}
			if l.Chain.Detached.KeyMadeByAgent == (s.Leaf.KeyOrigin == attest.OriginCaller) {
				t.Error("who made the key is told wrong")
			}
		})
	}
}

// What is in the certificate is the stronger kind: a file that somebody lays
// beside the bundle takes nothing from it.
func TestDetachedRecordBesideLeafEvidenceIsNotLookedAt(t *testing.T) {
	s := newScene(t)
	s.requirement().Evidence = EvidenceDetached
	s.in.Links = []LinkInput{{Name: "build", Bundle: s.sign(t), Detached: []byte("rubbish")}}
	if l := s.accepts(t).Links[0]; l.Evidence != EvidenceLeaf || l.Chain.Detached != nil {
		t.Errorf("evidence %q", l.Evidence)
	}
}

func TestRefusesDetachedEvidenceByPolicy(t *testing.T) {
	other := strings.Repeat("00", 32)
	for name, a := range map[string]struct {
		world func(*detachedScene)
		check string
		words string
	}{
		"where leaf evidence is wanted": {func(s *detachedScene) { s.requirement().Evidence = "" }, "evidence.kind", "wants leaf"},
		"mapping missing": {func(s *detachedScene) {
			r := s.requirement()
			r.parentWouldDo()
			r.EKs, r.PCRPolicies, r.Tier = nil, nil, TierTPM
		}, "evidence.mapping", "which nodes may speak"},
		"no requirement for the identity":               {func(s *detachedScene) { s.requirement().Identity = "spiffe://example.org/other" }, "requirement.match", ""},
		"by an enrolled node that may not speak for it": {func(s *detachedScene) { s.requirement().EKs = []string{other} }, "requirement.ek", other[:0]},
		"by a node in another boot state": {func(s *detachedScene) {
			s.TPM.Extend(7, []byte("another boot loader"))
		}, "requirement.pcr_policy", ""},
		"by a policy that was replaced before": {func(s *detachedScene) {
			s.file.PCRPolicies[0].Replaced = s.signedAt.Add(-replacedGrace - time.Second)
		}, "requirement.pcr_policy", "replaced"},
		"missing token where time is needed": {func(s *detachedScene) { s.noToken, s.file.Time.AuthoritiesNeeded = true, 1 }, "evidence.time_known", "no timestamp"},
		"as if it were a time that nobody attests": {func(s *detachedScene) {
			s.noToken, s.in.Clock, s.at = true, s.at, s.signedAt
		}, "evidence.time_known", "no time is attested"},
		"older than asked for": {func(s *detachedScene) { s.in.NotBefore = s.Now.Add(time.Second) }, "freshness", ""},
		"agent's authority revoked": {func(s *detachedScene) {
			s.file.Revocations = []Revocation{{Kind: RevokedAuthority, ID: hexOf(spkiHash(s.Authority)), Always: true}}
		}, "revocation", ""},
		"EK revoked before it was signed": {func(s *detachedScene) {
			from := s.signedAt.Add(-time.Second)
			s.file.Revocations = []Revocation{{Kind: RevokedEK, ID: hexOf(s.TPM.EKHash), From: &from}}
		}, "revocation", ""},
		"unprotected recorder": {func(s *detachedScene) {
			s.setSelectors(attest.SelectorUnprotectedRecorder + hexOf(s.Leaf.Recorder))
		}, "requirement.recorder", ""},
	} {
		t.Run(name, func(t *testing.T) {
			s := newDetachedScene(t)
			a.world(s)
			s.ready(t)
			s.refuses(t, a.check, ErrPolicy, a.words)
		})
	}
}

func TestRefusesDetachedTokenOfAnUnknownAuthority(t *testing.T) {
	s := newDetachedScene(t)
	l := s.ready(t)
	s.stamp(t, forge.NewTSA(t, nil))
	l.Detached = s.bytes(t)
	s.refuses(t, "evidence.time_known", ErrPolicy, "no authority of trust.json")
}

func TestRefusesDetachedTokens(t *testing.T) {
	for name, token := range map[string]func(*testing.T, *detachedScene) []byte{
		"rubbish": func(*testing.T, *detachedScene) []byte { return []byte("token") },
		"over the link's signature": func(t *testing.T, s *detachedScene) []byte {
			return s.tsa.Token(t, mustParse(t, s.in.Links[0].Bundle).Signature(), s.signedAt, nil)
		},
		"of the future": func(t *testing.T, s *detachedScene) []byte {
			return s.tsa.Token(t, s.record.Signature, s.at.Add(2*MaxClockSkew), nil)
		},
	} {
		t.Run(name, func(t *testing.T) {
			s := newDetachedScene(t)
			l := s.ready(t)
			s.record.Token = token(t, s)
			l.Detached = s.bytes(t)
			s.refuses(t, "evidence.time", ErrCrypto)
		})
	}
}

// refusedBy wants a cryptographic refusal by one check of package attest.
func (s *detachedScene) refusedBy(t *testing.T, id string) {
	t.Helper()
	_, err := s.verify(t)
	wantCheck(t, err, id)
}

func TestRefusesDetachedEvidenceByAnotherNode(t *testing.T) {
	s := newDetachedScene(t)
	other := forge.NewTPM(t, s.Maker, forge.TPMOptions{})
	s.bend = func(d *attest.Detached) { d.AgentSVID = [][]byte{s.AgentOf(t, other).Raw} }
	s.ready(t)
	s.refusedBy(t, "ek.identity")
}

func TestRefusesDetachedEvidenceAfterAReboot(t *testing.T) {
	s := newDetachedScene(t)
	before := attest.BootCounters{Reset: s.TPM.ResetCount, Restart: s.TPM.RestartCount}
	s.Statement = func(a *attest.AKStatement) { a.Boot = &before }
	s.TPM.Reboot(true)
	s.ready(t)
	s.refusedBy(t, "quote.boot")
}

func TestRefusesDetachedEvidenceAfterExpiryOfTheAgentSVID(t *testing.T) {
	s := newDetachedScene(t)
	s.AgentSVID = func(c *x509.Certificate) { c.NotAfter = s.signedAt.Add(-time.Second) }
	s.ready(t)
	s.refusedBy(t, "agent_svid.authority")
}

func TestRefusesDetachedEvidenceAfterExpiryOfTheAKCertificate(t *testing.T) {
	s := newDetachedScene(t)
	s.AKCert = func(c *x509.Certificate) { c.NotAfter = s.signedAt.Add(-time.Second) }
	s.ready(t)
	s.refusedBy(t, "ak_cert.time")
}

// The link was stamped in time and its record later, by whoever has the key.
func TestRefusesDetachedRecordSignedAfterTheSVIDExpired(t *testing.T) {
	s := newDetachedScene(t)
	s.AgentSVID = func(c *x509.Certificate) { c.NotAfter = s.at }
	l := s.ready(t)
	s.record.Token = s.tsa.Token(t, s.record.Signature, s.svid.NotAfter.Add(time.Second), nil)
	l.Detached = s.bytes(t)
	s.refusedBy(t, "time.detached")
}

// Without a token only the verifier's clock is left, whatever the link's says.
func TestRefusesDetachedRecordWithoutATokenOnceTheSVIDExpired(t *testing.T) {
	s := newDetachedScene(t)
	s.noToken = true
	s.ready(t)
	s.refusedBy(t, "agent_svid.authority")
}

func TestRefusesDetachedRecordOfAnotherStatement(t *testing.T) {
	s := newDetachedScene(t)
	s.Leaf.Payload = PayloadDigest([]byte("another statement"))
	s.ready(t)
	s.refusedBy(t, "leaf.payload")
}

func TestRefusesDetachedRecordOfAnotherSVID(t *testing.T) {
	s := newDetachedScene(t)
	s.ready(t)
	moved := s.bytes(t)
	s.svid = s.Plain(t) // another certificate for the key
	s.in.Links = []LinkInput{s.make(t)}
	s.in.Links[0].Detached = moved
	s.refusedBy(t, "detached.signature")
}

func TestRefusesDetachedRecordWithoutItsSignature(t *testing.T) {
	s := newDetachedScene(t)
	l := s.ready(t)
	s.record.Signature, s.record.Token = nil, nil
	l.Detached = s.bytes(t)
	s.at = s.signedAt
	s.refusedBy(t, "detached.signature")
}

func TestRefusesMalformedDetachedRecord(t *testing.T) {
	for name, bend := range map[string]func([]byte) []byte{
		"cut off":     func(b []byte) []byte { return b[:len(b)/2] },
		"trailing":    func(b []byte) []byte { return append(b, 0) },
		"unknown key": func(b []byte) []byte { b[0]++; return append(b, 0x06, 0x00) },
		"oversize":    func([]byte) []byte { return make([]byte, attest.MaxDetached+1) },
	} {
		t.Run(name, func(t *testing.T) {
			s := newDetachedScene(t)
			l := s.ready(t)
			l.Detached = bend(slices.Clone(l.Detached))
			s.refuses(t, "evidence.form", ErrCrypto)
		})
	}
}

// A record that was lost, or that nobody made.
func TestRefusesDetachedEvidenceThatIsMissing(t *testing.T) {
	s := newDetachedScene(t)
	s.ready(t).Detached = nil
	s.refuses(t, "evidence.kind", ErrPolicy, "no record lies beside")
}

// A bundle holds the leaf alone. The reason must not be that the SVID is forged,
// and an operator who lists the intermediate is helped.
func TestRefusesSVIDIssuedThroughAnIntermediate(t *testing.T) {
	s := newDetachedScene(t)
	key := forge.P256(t)
	inter := forge.Sign(t, &x509.Certificate{
		Subject:  pkix.Name{CommonName: "intermediate", SerialNumber: "7"},
		KeyUsage: x509.KeyUsageCertSign, IsCA: true, BasicConstraintsValid: true,
		NotBefore: s.Now.Add(-time.Hour), NotAfter: s.Now.Add(time.Hour),
	}, s.Authority, key.Public(), s.AuthorityKey())
	s.issueBy(t, inter, key)
	s.ready(t)
	s.refuses(t, "svid.authority", ErrCrypto, "intermediate", "trust.json does not list")
	if _, err := Verify(s.in, s.trust(t), s.at); !errors.Is(err, ErrIntermediate) {
		t.Errorf("got %v", err)
	}
	root, err := TrustedRoot{
		Authorities: []Authority{{Certificate: s.Authority, Start: s.Authority.NotBefore}, {Certificate: inter, Start: inter.NotBefore, End: inter.NotAfter}},
		Timestamps:  []timestamp.Authority{s.tsa.Authority()},
	}.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	s.file.TrustedRoot = root
	s.accepts(t)
}

// issueBy has another authority issue the SVID and the agent's.
func (s *detachedScene) issueBy(t *testing.T, authority *x509.Certificate, key *ecdsa.PrivateKey) {
	t.Helper()
	plain := s.Plain(t)
	template := &x509.Certificate{
		URIs: plain.URIs, KeyUsage: plain.KeyUsage, ExtKeyUsage: plain.ExtKeyUsage, BasicConstraintsValid: true,
		NotBefore: plain.NotBefore, NotAfter: plain.NotAfter,
	}
	s.svid = forge.Sign(t, template, authority, s.SVIDKey.Public(), key)
	s.bend = func(d *attest.Detached) {
		d.AgentSVID = [][]byte{s.AgentBy(t, s.TPM, authority, key).Raw, authority.Raw}
	}
}

// The recorder finds out before it signs for what the node said of another.
func TestSignDetachedRefusesARecordOfAnother(t *testing.T) {
	s := newDetachedScene(t)
	s.ready(t)
	p, err := Prepare(s.stmt)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := p.SignDetached(s.SVIDKey, s.Plain(t), s.record); !errors.Is(err, ErrSignerMismatch) {
		t.Errorf("another SVID: %v", err)
	}
	if _, err := p.SignDetached(forge.P256(t), s.svid, s.record); !errors.Is(err, ErrSignerMismatch) {
		t.Errorf("another key: %v", err)
	}
	if _, err := p.SignWithoutEvidence(s.SVIDKey, s.Issue(t, forge.NewWorld(t).Make(t))); !errors.Is(err, ErrSignerMismatch) {
		t.Errorf("evidence that is left aside: %v", err)
	}
	if _, err := p.SignWithoutEvidence(s.SVIDKey, s.svid); err != nil {
		t.Error(err)
	}
	s.stmt.Step = "another"
	other, err := Prepare(s.stmt)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := other.SignDetached(s.SVIDKey, s.svid, s.record); !errors.Is(err, ErrSignerMismatch) {
		t.Errorf("another statement: %v", err)
	}
	b, err := p.SignDetached(s.SVIDKey, s.svid, s.record)
	if err != nil {
		t.Fatal(err)
	}
	raw, err := b.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	s.in.Links = []LinkInput{{Name: "build", Bundle: raw, Detached: s.bytes(t)}}
	s.at = s.signedAt
	s.accepts(t)
	if want := attest.DetachedFile(s.svid.Raw, p.Digest()); b.DetachedName() != want {
		t.Errorf("the record is called %q, want %q", b.DetachedName(), want)
	}
}

func TestTrustRefusesDetachedWithoutAMapping(t *testing.T) {
	s := newDetachedScene(t)
	r := s.requirement()
	r.EKs, r.PCRPolicies, r.Tier = nil, nil, TierTPM
	if _, err := NewTrust(s.file); !errors.Is(err, ErrMalformed) || !errors.Is(err, ErrNoMapping) {
		t.Errorf("got %v", err)
	}
}
