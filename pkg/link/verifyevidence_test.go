package link

import (
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"errors"
	"net/url"
	"testing"
	"time"

	"github.com/google/go-tpm/tpm2"

	"github.com/rootlink/rootlink/internal/forge"
	"github.com/rootlink/rootlink/pkg/attest"
)

func extension(id asn1.ObjectIdentifier, critical bool, value []byte) pkix.Extension {
	return pkix.Extension{Id: id, Critical: critical, Value: value}
}

// nonCriticalKeyUsage has crypto/x509 write our own key usage: digitalSignature.
func nonCriticalKeyUsage(c *x509.Certificate) {
	c.KeyUsage = 0
	c.ExtraExtensions = append(c.ExtraExtensions, extension(oidKeyUsage, false, []byte{0x03, 0x02, 0x07, 0x80}))
}

// An administrator can mint an SVID of any name. It says nothing about a TPM.
func TestRefusesAdminMintedSVIDPassedOffAsAttested(t *testing.T) {
	s := newScene(t)
	s.evidence, s.SVID = withoutEvidence, noCodeSigning
	res := s.refuses(t, "evidence.kind", ErrPolicy, "no evidence")
	if res.Links[0].Chain.Quote != nil {
		t.Error("the result shows a quote")
	}
}

func TestRefusesStrippedEvidence(t *testing.T) {
	s := newScene(t)
	s.evidence = withoutEvidence
	s.refuses(t, "evidence.kind", ErrPolicy, "no evidence")
}

// Cutting the extension out of the certificate breaks its signature.
func TestRefusesEvidenceCutOutOfTheCertificate(t *testing.T) {
	s := newScene(t)
	s.bundle = func(raw []byte) []byte {
		b := mustParse(t, raw)
		leaf := b.leaf
		self := &x509.Certificate{
			SerialNumber: leaf.SerialNumber, Subject: leaf.Subject, URIs: leaf.URIs, KeyUsage: leaf.KeyUsage, ExtKeyUsage: leaf.ExtKeyUsage,
			NotBefore: leaf.NotBefore, NotAfter: leaf.NotAfter, BasicConstraintsValid: true,
		}
		parent := *s.Authority // in name, not in key
		parent.PublicKey = s.SVIDKey.Public()
		b.leaf = forge.Sign(t, self, &parent, s.SVIDKey.Public(), s.SVIDKey)
		raw, err := b.Marshal()
		if err != nil {
			t.Fatal(err)
		}
		return raw
	}
	s.refuses(t, "svid.authority", ErrCrypto)
}

func TestRefusesEvidenceMovedToAnotherSVID(t *testing.T) {
	s := newScene(t)
	s.evidence = func(e *attest.Evidence) *attest.Evidence {
		s.SVIDKey = forge.P256(t) // the attacker's key, the victim's evidence
		return e
	}
	_, err := s.verifyMoved(t)
	wantCheck(t, err, "leaf.commitment")
}

// verifyMoved signs with the key that the evidence hook left behind.
func (s *scene) verifyMoved(t *testing.T) (*Result, error) {
	t.Helper()
	p, err := Prepare(s.stmt)
	if err != nil {
		t.Fatal(err)
	}
	s.Leaf.Payload = p.Digest()
	e := s.evidence(s.Make(t))
	b, err := p.sign(s.SVIDKey, s.Issue(t, e))
	if err != nil {
		t.Fatal(err)
	}
	raw, err := b.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	s.in.Links = []LinkInput{{Name: "build", Bundle: raw}}
	return s.verify(t)
}

// wantCheck wants the evidence refused by one check of package attest.
func wantCheck(t *testing.T, err error, id string) {
	t.Helper()
	var c *attest.CheckError
	if !errors.Is(err, ErrCrypto) || !errors.As(err, &c) || c.ID != id {
		t.Errorf("err = %v, want a cryptographic failure of %s", err, id)
	}
}

func TestRefusesEvidenceOfAnotherAgent(t *testing.T) {
	s := newScene(t)
	s.evidence = func(e *attest.Evidence) *attest.Evidence { e.AgentKey[0] ^= 1; return e }
	_, err := s.verify(t)
	wantCheck(t, err, "leaf.commitment")
}

// The same key, name path and evidence under another trust domain.
func TestRefusesEvidenceMovedToAnotherTrustDomain(t *testing.T) {
	s := newScene(t)
	s.evidence = func(e *attest.Evidence) *attest.Evidence {
		s.Leaf.SPIFFEID = "spiffe://example.com/build" // of the SVID that is now issued
		return e
	}
	// The other domain's authority, which even has the same key.
	tmpl := *s.Authority
	tmpl.URIs = []*url.URL{{Scheme: "spiffe", Host: "example.com"}}
	s.Authority = forge.Sign(t, &tmpl, nil, s.AuthorityKey().Public(), s.AuthorityKey())
	root, err := MarshalTrustedRoot([]Authority{{Certificate: s.Authority, Start: s.Authority.NotBefore}})
	if err != nil {
		t.Fatal(err)
	}
	s.file.TrustedRoot = root
	s.file.TrustDomain, s.in.Identity = "example.com", "spiffe://example.com/build"
	s.requirement().Identity = "spiffe://example.com/build"
	_, err = s.verify(t)
	wantCheck(t, err, "leaf.commitment")
}

func TestRefusesEvidenceMovedToAnotherIdentity(t *testing.T) {
	s := newScene(t)
	s.evidence = func(e *attest.Evidence) *attest.Evidence {
		s.Leaf.SPIFFEID = "spiffe://example.org/release"
		return e
	}
	s.in.Identity, s.requirement().Identity = "spiffe://example.org/release", "spiffe://example.org/release"
	_, err := s.verify(t)
	wantCheck(t, err, "leaf.commitment")
}

// A stolen step key signs nothing but the statement that the TPM committed to.
func TestRefusesEvidenceMovedToAnotherStatement(t *testing.T) {
	s := newScene(t)
	s.Leaf.Payload = PayloadDigest([]byte("another statement"))
	_, err := s.verify(t)
	wantCheck(t, err, "leaf.payload")
}

// The recorder finds out before it writes a bundle that nobody would accept.
func TestSignRefusesEvidenceOfAnotherStatement(t *testing.T) {
	s := newScene(t)
	p, err := Prepare(s.stmt)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := p.Sign(s.SVIDKey, s.Issue(t, s.Make(t))); !errors.Is(err, ErrSignerMismatch) {
		t.Errorf("another statement's evidence: %v", err)
	}
	if _, err := p.Sign(s.SVIDKey, s.Issue(t, nil)); !errors.Is(err, ErrSignerMismatch) || !errors.Is(err, attest.ErrNoEvidence) {
		t.Errorf("no evidence: %v", err)
	}
	s.Leaf.Payload = p.Digest()
	if _, err := p.Sign(s.SVIDKey, s.Issue(t, s.Make(t))); err != nil {
		t.Error(err)
	}
}

func TestRefusesEvidenceOfAWorkloadSVID(t *testing.T) {
	s := newScene(t)
	s.Leaf.Payload = [32]byte{} // binds a key and no statement
	_, err := s.verify(t)
	wantCheck(t, err, "leaf.payload")
}

func TestRefusesKeyMadeByTheAgent(t *testing.T) {
	s := newScene(t)
	s.Leaf.KeyOrigin = attest.OriginAgent
	s.refuses(t, "programs.measured", ErrCrypto, "not made by the process")
}

// Old evidence under a new certificate: the nonce's time gives it away.
func TestRefusesOldEvidenceRewrappedUnderNewDates(t *testing.T) {
	s := newScene(t)
	later := 2 * time.Hour
	s.SVID = func(c *x509.Certificate) {
		c.NotBefore, c.NotAfter = c.NotBefore.Add(later), c.NotAfter.Add(later)
	}
	s.at = s.at.Add(later)
	_, err := s.verify(t)
	wantCheck(t, err, "time.svid")
}

func TestRefusesDetachedEvidenceInsideAnSVID(t *testing.T) {
	s := newScene(t)
	s.Leaf.Kind = attest.KindDetached
	s.refuses(t, "evidence.kind", ErrUnsupported, "kind 2 inside an SVID")
}

// A node's own attestation says nothing about a workload's key: its record has
// another type, and no decoder here takes it for a leaf's.
func TestRefusesParentEvidenceShownAsLeaf(t *testing.T) {
	s := newScene(t)
	s.evidence = withoutEvidence
	// CBOR of RFC 9999: ["application/vnd.rootlink.parent-evidence+cbor", h'a0', 4]
	name := "application/vnd.rootlink.parent-evidence+cbor"
	record := append([]byte{0x83, 0x78, byte(len(name))}, name...)
	record = append(record, 0x41, 0xa0, 0x04)
	octets, err := asn1.Marshal(record)
	if err != nil {
		t.Fatal(err)
	}
	s.SVID = func(c *x509.Certificate) {
		c.ExtraExtensions = append(c.ExtraExtensions, extension(asn1.ObjectIdentifier{1, 3, 6, 1, 5, 5, 7, 1, 35}, false, octets))
	}
	s.refuses(t, "evidence.form", ErrCrypto)
}

func TestRefusesQuoteOfAnotherType(t *testing.T) {
	s := newScene(t)
	s.Attest = func(a *tpm2.TPMSAttest) { a.Magic ^= 1 }
	_, err := s.verify(t)
	wantCheck(t, err, "quote.structure")
}

func TestRefusesQuoteWithoutTheBootPCRs(t *testing.T) {
	s := newScene(t)
	s.Selection = []attest.PCRSelection{{Bank: "sha256", Indices: []uint32{7}}}
	_, err := s.verify(t)
	wantCheck(t, err, "quote.selection")
}

func TestRefusesAKOfAnUnknownAttestationCA(t *testing.T) {
	s := newScene(t)
	raw := s.sign(t)
	s.file.AttestationCAs = []AttestationCA{{Certificate: forge.NewAttestationCA(t, nil).Cert.Raw}}
	s.in.Links = []LinkInput{{Name: "build", Bundle: raw}}
	_, err := s.verify(t)
	wantCheck(t, err, "ak_cert.signature")
}

func TestRefusesEKOfAnUnknownMaker(t *testing.T) {
	s := newScene(t)
	s.file.EK.Roots = [][]byte{forge.NewMaker(t, "Forge Semiconductor").Root.Raw} // its name, another key
	_, err := s.verify(t)
	wantCheck(t, err, "ek.genuine")
}

func TestRefusesEKOnTheDenyList(t *testing.T) {
	s := newScene(t)
	s.file.EK.Deny = []string{hexOf(s.TPM.EKHash)}
	_, err := s.verify(t)
	wantCheck(t, err, "ek.genuine")
}
