package link

import (
	"crypto/ed25519"
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

// The link was stamped while the SVID's authority held, the record after it was
// given up: its key may be anybody's by then.
func TestRefusesDetachedRecordAfterTheSVIDsAuthorityEnded(t *testing.T) {
	s := newDetachedScene(t)
	key := forge.P256(t)
	other := forge.Sign(t, &x509.Certificate{
		Subject:  pkix.Name{CommonName: "another authority"},
		KeyUsage: x509.KeyUsageCertSign, IsCA: true, BasicConstraintsValid: true,
		NotBefore: s.Now.Add(-time.Hour), NotAfter: s.Now.Add(time.Hour),
	}, nil, key.Public(), key)
	s.issueBy(t, other, key)
	s.bend = nil // the agent has its SVID from the one that holds
	list := func(until time.Time) {
		root, err := TrustedRoot{
			Authorities: []Authority{{Certificate: s.Authority, Start: s.Authority.NotBefore}, {Certificate: other, Start: other.NotBefore, End: until}},
			Timestamps:  []timestamp.Authority{s.tsa.Authority()},
		}.Marshal()
		if err != nil {
			t.Fatal(err)
		}
		s.file.TrustedRoot = root
	}
	l := s.ready(t)
	s.record.Token = s.tsa.Token(t, s.record.Signature, s.signedAt.Add(10*time.Minute), nil)
	l.Detached = s.bytes(t)
	list(s.signedAt.Add(10 * time.Minute))
	s.accepts(t)
	list(s.signedAt.Add(5 * time.Minute))
	s.refuses(t, "evidence.verify", ErrCrypto, "does not hold at the record's time")
}

// Our server names in the certificate the node of the agent that asked. Another
// one of the fleet, in as good a boot state, has no word on that SVID.
func TestRefusesDetachedRecordByAnotherNodeThanTheCertificateNames(t *testing.T) {
	for name, same := range map[string]bool{"the same node": true, "another node": false} {
		t.Run(name, func(t *testing.T) {
			s := newDetachedScene(t)
			s.requirement().parentWouldDo()
			s.requirement().EKs = nil
			w := s.World
			if !same {
				w = forge.NewWorldWith(t, s.Maker, forge.NewTPM(t, s.Maker, forge.TPMOptions{}))
			}
			s.svid = s.IssueParent(t, w.MakeParent(t))
			s.ready(t)
			if same {
				if l := s.accepts(t).Links[0]; l.Evidence != EvidenceDetached || l.Chain.Parent != nil {
					t.Errorf("evidence %q", l.Evidence)
				}
				return
			}
			s.refuses(t, "evidence.verify", ErrCrypto)
			if _, err := s.verify(t); !errors.Is(err, ErrOtherNode) {
				t.Errorf("got %v", err)
			}
		})
	}
}

// A record has one token. Who takes no single authority's word for a time does
// not take it for the record's either.
func TestRefusesDetachedTimeThatOneAuthorityAloneSays(t *testing.T) {
	s := newDetachedScene(t)
	second := forge.NewTSA(t, nil)
	s.know(t, s.tsa.Authority(), second.Authority())
	s.file.Time.AuthoritiesNeeded = 2
	l := s.ready(t)
	b := mustParse(t, l.Bundle)
	b, err := b.WithTimestamps(s.tsa.Token(t, b.Signature(), s.signedAt, nil), second.Token(t, b.Signature(), s.signedAt, nil))
	if err != nil {
		t.Fatal(err)
	}
	if l.Bundle, err = b.Marshal(); err != nil {
		t.Fatal(err)
	}
	s.accepts(t)
	for _, shift := range []time.Duration{maxTimeSpread, maxTimeSpread + time.Second} {
		s.record.Token = s.tsa.Token(t, s.record.Signature, s.signedAt.Add(shift), nil)
		l.Detached = s.bytes(t)
		if shift <= maxTimeSpread {
			s.accepts(t)
			continue
		}
		s.refuses(t, "evidence.time_known", ErrPolicy, "one authority alone")
		s.file.Time.AuthoritiesNeeded = 1 // whose word is enough
		s.accepts(t)
	}
}

// Whoever signs a record, as for a classic link, takes nobody else's place.
func TestRefusesToSignARecordWithAnotherKey(t *testing.T) {
	s := newDetachedScene(t)
	s.ready(t)
	signed := s.record.Signature
	if err := SignRecord(forge.P256(t), s.svid, s.record, s.Leaf.Payload); !errors.Is(err, ErrSignerMismatch) {
		t.Errorf("got %v", err)
	}
	_, ed, err := ed25519.GenerateKey(nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := SignRecord(ed, s.svid, s.record, s.Leaf.Payload); !errors.Is(err, ErrSignerMismatch) {
		t.Errorf("got %v", err)
	}
	if !slices.Equal(signed, s.record.Signature) {
		t.Error("the record was signed")
	}
	// A bundle whose certificate has evidence has no record, whatever lies there.
	if name := mustParse(t, newScene(t).sign(t)).DetachedName(); name != "" {
		t.Errorf("leaf evidence beside a record %q", name)
	}
	if name := mustParse(t, parentScene(t, nil).in.Links[0].Bundle).DetachedName(); name == "" {
		t.Error("parent evidence can have no record")
	}
}

// What the TPM committed to names one recorder and a tool, and the selectors,
// which say how the recorder was kept, must be about these.
func TestRefusesSelectorsOfOtherProgramsThanTheLeafNames(t *testing.T) {
	other := strings.Repeat("ab", 32)
	for name, bend := range map[string]func(*scene){
		"another recorder": func(s *scene) { s.setSelectors(attest.SelectorRecorder + other) },
		"no recorder":      func(s *scene) { s.setSelectors() },
		"two recorders": func(s *scene) {
			s.setSelectors(attest.SelectorRecorder+other, attest.SelectorRecorder+hexOf(s.Leaf.Recorder))
		},
		"the recorder in two ways": func(s *scene) {
			s.setSelectors(attest.SelectorRecorder+hexOf(s.Leaf.Recorder), attest.SelectorUnprotectedRecorder+hexOf(s.Leaf.Recorder))
		},
		"a recorder of zeros": func(s *scene) {
			s.Leaf.Recorder = [32]byte{}
			s.setSelectors(attest.SelectorRecorder + hexOf(s.Leaf.Recorder))
		},
		"another tool": func(s *scene) {
			s.Leaf.Selectors = []string{attest.SelectorRecorder + hexOf(s.Leaf.Recorder), attest.SelectorTool + other}
			slices.Sort(s.Leaf.Selectors)
		},
		"a tool of zeros": func(s *scene) {
			s.Leaf.Tool = [32]byte{}
			s.setSelectors(attest.SelectorRecorder + hexOf(s.Leaf.Recorder))
		},
	} {
		t.Run(name, func(t *testing.T) {
			s := newScene(t)
			r := s.requirement()
			r.Tools, r.UnprotectedRecorders = []string{AnyHash}, []string{AnyHash}
			bend(s)
			s.refuses(t, "programs.measured", ErrCrypto)
		})
	}
}

// When the quote was made is never said more exactly than it is known.
func TestQuoteTimeInWords(t *testing.T) {
	at := time.Date(2030, 5, 1, 12, 0, 0, 0, time.UTC)
	svid, quote := &SVIDInfo{NotBefore: at.Add(-time.Hour)}, &QuoteInfo{NonceTime: at}
	for want, c := range map[string]Chain{
		"between 2030-05-01T11:00:00Z and 2030-05-01T12:00:00Z": {SVID: svid, Quote: &QuoteInfo{}, Detached: &DetachedInfo{At: at}},
		"at 2030-05-01T12:00:00Z":                               {SVID: svid, Quote: quote},
		"at 2030-05-01T10:00:00Z":                               {SVID: svid, Quote: &QuoteInfo{}, Parent: &ParentInfo{AttestedAt: at.Add(-2 * time.Hour)}},
		"never":                                                 {},
	} {
		if got := (&LinkResult{Chain: c}).QuoteTime(); got != want {
			t.Errorf("%q, want %q", got, want)
		}
	}
}

// Two attestation CAs of one name: it is the one that signed whose revocation
// counts, for every kind of evidence.
func TestRefusesRevokedAttestationCAOfTheSameNameAsAGoodOne(t *testing.T) {
	bend := func(s *scene) {
		good := forge.NewAttestationCA(t, nil)
		if good.Cert.Subject.String() != s.CA.Cert.Subject.String() {
			t.Fatal("the CAs have two names")
		}
		s.file.AttestationCAs = append([]AttestationCA{{Certificate: good.Cert.Raw}}, s.file.AttestationCAs...)
		s.file.Revocations = []Revocation{{Kind: RevokedAttestationCA, ID: hexOf(spkiHash(s.CA.Cert)), Always: true}}
	}
	s := newScene(t)
	bend(s)
	s.refuses(t, "revocation", ErrPolicy, "attestation ca")
	s = parentScene(t, nil)
	bend(s)
	s.refuses(t, "revocation", ErrPolicy, "attestation ca")
	d := newDetachedScene(t)
	bend(d.scene)
	d.ready(t)
	d.refuses(t, "revocation", ErrPolicy, "attestation ca")
}

// Limits of what a trust.json may hold.
func TestRefusesOversizedListsInTrust(t *testing.T) {
	s := newScene(t)
	for range MaxTypes + 1 {
		s.requirement().Types = append(s.requirement().Types, PredicateType)
	}
	if _, err := NewTrust(s.file); !errors.Is(err, ErrMalformed) {
		t.Errorf("types: %v", err)
	}
	s = newScene(t)
	r := Revocation{Kind: RevokedEK, ID: hexOf(s.TPM.EKHash), Always: true}
	s.file.Revocations = slices.Repeat([]Revocation{r}, MaxIDs+1)
	if _, err := NewTrust(s.file); !errors.Is(err, ErrMalformed) {
		t.Errorf("revocations: %v", err)
	}
}
