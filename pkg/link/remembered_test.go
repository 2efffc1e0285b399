package link

import (
	"errors"
	"slices"
	"testing"

	"github.com/rootlink/rootlink/pkg/attest"
)

// What one Trust has found good is not looked at again. Whoever changes a byte
// of it gets no more out of that than with a Trust that has seen nothing.
func TestRefusesForgeryBesideWhatIsRemembered(t *testing.T) {
	s := newScene(t)
	good := s.sign(t)
	trust := s.trust(t)
	verify := func(bundle []byte, trust *Trust) error {
		s.in.Links = []LinkInput{{Name: "build", Bundle: bundle}}
		_, err := Verify(s.in, trust, s.at)
		return err
	}
	for range 2 {
		if err := verify(good, trust); err != nil {
			t.Fatal(err)
		}
	}
	for name, part := range map[string]func(*attest.Evidence) *[]byte{
		"quote":          func(e *attest.Evidence) *[]byte { return &e.Attest },
		"signature":      func(e *attest.Evidence) *[]byte { return &e.Signature },
		"AK certificate": func(e *attest.Evidence) *[]byte { return &e.AKCert },
		"EK certificate": func(e *attest.Evidence) *[]byte { return &e.EKChain[0] },
	} {
		s.evidence = func(e *attest.Evidence) *attest.Evidence {
			p := part(e)
			*p = slices.Clone(*p)
			(*p)[len(*p)-1] ^= 1
			return e
		}
		if err := verify(s.sign(t), trust); !errors.Is(err, ErrCrypto) {
			t.Errorf("%s changed: %v", name, err)
		}
	}
	// Nothing about lists is remembered: what is revoked since is refused, and
	// the next one who has no such list is not told so.
	later, err := trust.extend(RevocationsFile{TrustDomain: "example.org", Issued: s.file.Issued, Revocations: []Revocation{
		{Kind: RevokedAttestationCA, ID: hexHash(spkiHash(s.CA.Cert)), Always: true},
	}})
	if err != nil {
		t.Fatal(err)
	}
	if err := verify(good, later); !errors.Is(err, ErrPolicy) {
		t.Errorf("revoked since: %v", err)
	}
	if err := verify(good, trust); err != nil {
		t.Error(err)
	}
}
