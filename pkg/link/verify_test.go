package link

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/asn1"
	"encoding/hex"
	"encoding/json"
	"errors"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/rootlink/rootlink/internal/forge"
	"github.com/rootlink/rootlink/pkg/attest"
)

func TestVerify(t *testing.T) {
	s := newScene(t)
	res := s.accepts(t)
	l := res.Links[0]
	c := l.Chain
	if c.Statement == nil || c.SVID == nil || c.Programs == nil || c.Quote == nil || c.AK == nil || c.EK == nil || c.Maker == nil {
		t.Fatalf("the chain has gaps: %+v", c)
	}
	if c.Quote.Policy == nil || c.Quote.Policy.Profile != "good" || l.Tier != TierBootAttested {
		t.Errorf("tier %s, policy %+v", l.Tier, c.Quote.Policy)
	}
	if c.EK.SHA256 != hexOf(s.TPM.EKHash) || c.AK.Name != hex.EncodeToString(s.TPM.AKName) || c.AK.CAKeySHA256 != hexHash(spkiHash(s.CA.Cert)) {
		t.Errorf("AK %+v, EK %+v", c.AK, c.EK)
	}
	if !l.SoftwareTPM || !c.Programs.RecorderProtected || res.Time.Attested {
		t.Errorf("software %t, protected %t, time %+v", l.SoftwareTPM, c.Programs.RecorderProtected, res.Time)
	}
	if len(res.Artifacts) != 1 || len(res.Artifacts[0].Matches) != 1 || res.Artifacts[0].Matches[0].Subject != "out/hello" {
		t.Errorf("artifacts %+v", res.Artifacts)
	}
	text := res.Text()
	for _, want := range []string{"✓ VERIFIED", "SOFTWARE TPM", "boot attested", "PCR policy fleet revision 1", "protected", "Forge Semiconductor Root CA", "hello  sha256:", "verifier's own clock"} {
		if !strings.Contains(text, want) {
			t.Errorf("the text lacks %q:\n%s", want, text)
		}
	}
}

func TestVerifySeveralLinksAndRSA(t *testing.T) {
	maker := forge.NewMaker(t, "Forge Semiconductor")
	tpm := forge.NewTPM(t, maker, forge.TPMOptions{EK: forge.EKRSA2048, RSAAK: true})
	s := sceneAround(t, forge.NewWorldWith(t, maker, tpm))
	one := s.sign(t)
	s.in.Links = []LinkInput{{Name: "a", Bundle: one}, {Name: "b", Bundle: one}}
	res := s.accepts(t)
	if len(res.Links) != 2 || len(res.Artifacts[0].Matches) != 2 {
		t.Errorf("%d links, matches %+v", len(res.Links), res.Artifacts[0].Matches)
	}
	// One bad link among good ones refuses the whole.
	s.in.Links[1].Bundle = []byte("{}")
	if res := s.refuses(t, "bundle.form", ErrCrypto); res.Failure.Link != "b" || res.Links[0].Verdict != VerdictVerified {
		t.Errorf("failure %+v", res.Failure)
	}
}

func TestResultIsOneVersionedObject(t *testing.T) {
	res := newScene(t).accepts(t)
	raw, err := json.Marshal(res)
	if err != nil {
		t.Fatal(err)
	}
	var m map[string]any
	if err := json.Unmarshal(raw, &m); err != nil {
		t.Fatal(err)
	}
	if m["schema_version"] != 1.0 || m["verdict"] != "verified" {
		t.Errorf("%s", raw)
	}
	l := m["links"].([]any)[0].(map[string]any)
	for _, key := range []string{"chain", "proved_by_tpm", "said_by_recorder", "taken_on_word_of", "checks", "tier", "software_tpm"} {
		if l[key] == nil {
			t.Errorf("links[0] has no %s", key)
		}
	}
}

// trust.json

func TestRefusesRolledBackTrust(t *testing.T) {
	s := newScene(t)
	s.in.LeastSerial = 4
	res := s.refuses(t, "trust.serial", ErrPolicy, "serial 3")
	if o := outcomeOf(res.Links[0].Checks, "dsse.signature"); o != attest.NotRun {
		t.Errorf("a link was judged by it: %s", o)
	}
}

func TestRefusesExpiredTrust(t *testing.T) {
	s := newScene(t)
	s.file.Expires = s.at
	s.refuses(t, "trust.window", ErrPolicy, "expired")
}

func TestRefusesTrustFromTheFuture(t *testing.T) {
	s := newScene(t)
	s.file.Issued = s.at.Add(2 * MaxClockSkew)
	s.refuses(t, "trust.window", ErrNotYetValid, "issued")
}

func TestRefusesToVerifyWithoutAnIdentity(t *testing.T) {
	s := newScene(t)
	s.in.Identity = ""
	s.refuses(t, "input.links", ErrPolicy, "no identity")
	s.in.Identity = "spiffe://example.org/[ab]"
	s.refuses(t, "input.links", ErrPolicy, "pattern")
}

func TestRefusesMoreLinksThanItWouldJudge(t *testing.T) {
	s := newScene(t)
	s.in.Links = make([]LinkInput, MaxLinks+1)
	s.refuses(t, "input.links", ErrPolicy, "257 links")
}

// Only one kind of key signs links, so that nobody can ask for a weaker one.
func TestRefusesSVIDKeyOfAnotherKind(t *testing.T) {
	s := newScene(t)
	key, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	p, err := Prepare(s.stmt)
	if err != nil {
		t.Fatal(err)
	}
	s.SVIDKey, s.Leaf.Payload, s.Leaf.SVIDKey = key, p.Digest(), forge.KeyHash(t, key.Public())
	leaf := s.Issue(t, s.Make(t))
	if _, err := p.Sign(key, leaf); !errors.Is(err, ErrSignerMismatch) {
		t.Errorf("signed with a P-384 key: %v", err)
	}
	digest := p.Digest()
	sig, err := key.Sign(rand.Reader, digest[:], crypto.SHA256)
	if err != nil {
		t.Fatal(err)
	}
	raw, err := (&Bundle{payload: p.Payload(), signature: sig, leaf: leaf}).Marshal()
	if err != nil {
		t.Fatal(err)
	}
	s.in.Links = []LinkInput{{Name: "build", Bundle: raw}}
	s.refuses(t, "svid.profile", ErrCrypto, "P-256")
}

func TestRefusesToVerifyNothing(t *testing.T) {
	s := newScene(t)
	s.in.Links = []LinkInput{}
	s.refuses(t, "input.links", ErrPolicy)
}

// The bundle and its signature

func TestRefusesBundleWithTwoSignatures(t *testing.T) {
	s := newScene(t)
	s.bundle = func(b []byte) []byte {
		str := string(b)
		sig := str[strings.Index(str, `{"sig":`) : strings.LastIndex(str, "}]")+1]
		return []byte(strings.Replace(str, sig, sig+","+sig, 1))
	}
	s.refuses(t, "bundle.form", ErrCrypto, "2 signatures")
}

func TestRefusesBundleWithExtraField(t *testing.T) {
	s := newScene(t)
	s.bundle = func(b []byte) []byte { return append([]byte(`{"x":1,`), b[1:]...) }
	s.refuses(t, "bundle.form", ErrCrypto)
}

func TestRefusesChangedStatement(t *testing.T) {
	s := newScene(t)
	s.bundle = func(raw []byte) []byte {
		b := mustParse(t, raw)
		b.payload = []byte(strings.Replace(string(b.payload), "out/hello", "out/hellp", 1))
		raw, err := b.Marshal()
		if err != nil {
			t.Fatal(err)
		}
		return raw
	}
	s.refuses(t, "dsse.signature", ErrCrypto)
}

func TestRefusesStatementThatIsNoLink(t *testing.T) {
	s := newScene(t)
	payload := []byte(`{"_type":"https://in-toto.io/Statement/v1","subject":[{"name":"a","digest":{"sha1":"da39a3ee5e6b4b0d3255bfef95601890afd80709"}}],"predicateType":"https://slsa.dev/provenance/v1","predicate":{}}`)
	p := &Prepared{payload: payload, digest: PayloadDigest(payload)}
	s.Leaf.Payload = p.digest
	b, err := p.Sign(s.SVIDKey, s.Issue(t, s.Make(t)))
	if err != nil {
		t.Fatal(err)
	}
	raw, err := b.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	s.in.Links = []LinkInput{{Name: "build", Bundle: raw}}
	s.refuses(t, "statement.type", ErrPolicy)
}

// The SVID

func TestRefusesCertificateThatIsNoSVID(t *testing.T) {
	for name, c := range map[string]struct {
		bend  func(*x509.Certificate)
		check string
	}{
		"no URI":                 {func(c *x509.Certificate) { c.URIs = nil; c.DNSNames = []string{"example.org"} }, "svid.profile"},
		"two URIs":               {func(c *x509.Certificate) { c.URIs = append(c.URIs, c.URIs[0]) }, "svid.profile"},
		"not a SPIFFE ID":        {func(c *x509.Certificate) { c.URIs = []*url.URL{{Scheme: "https", Host: "example.org", Path: "/build"}} }, "svid.profile"},
		"no path":                {func(c *x509.Certificate) { c.URIs = []*url.URL{{Scheme: "spiffe", Host: "example.org"}} }, "svid.profile"},
		"another trust domain":   {func(c *x509.Certificate) { c.URIs[0].Host = "other.org" }, "svid.profile"},
		"a CA":                   {func(c *x509.Certificate) { c.IsCA = true }, "svid.profile"},
		"no digital signature":   {func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageKeyAgreement }, "svid.profile"},
		"certificate signing":    {func(c *x509.Certificate) { c.KeyUsage |= x509.KeyUsageCertSign }, "svid.profile"},
		"key usage not critical": {nonCriticalKeyUsage, "svid.profile"},
		"unknown critical extension": {func(c *x509.Certificate) {
			c.ExtraExtensions = append(c.ExtraExtensions, extension(asn1.ObjectIdentifier{1, 2, 3, 4}, true, []byte{5, 0}))
		}, "svid.profile"},
		"not for signing": {noCodeSigning, "svid.code_signing"},
	} {
		t.Run(name, func(t *testing.T) {
			s := newScene(t)
			s.SVID = c.bend
			s.refuses(t, c.check, ErrCrypto)
		})
	}
}

func TestRefusesSVIDOfAnotherAuthority(t *testing.T) {
	s := newScene(t)
	raw := s.sign(t)
	other := newScene(t) // same names, other keys
	other.in.Links = []LinkInput{{Name: "build", Bundle: raw}}
	other.refuses(t, "svid.authority", ErrCrypto)
}

func TestRefusesAuthorityOutsideItsWindow(t *testing.T) {
	for name, window := range map[string]func(s *scene) Authority{
		"ended": func(s *scene) Authority {
			return Authority{Certificate: s.Authority, Start: s.Authority.NotBefore, End: s.at.Add(-time.Second)}
		},
		"not begun": func(s *scene) Authority {
			return Authority{Certificate: s.Authority, Start: s.at.Add(time.Second)}
		},
		"begun after the SVID": func(s *scene) Authority {
			return Authority{Certificate: s.Authority, Start: s.Now}
		},
	} {
		t.Run(name, func(t *testing.T) {
			s := newScene(t)
			root, err := MarshalTrustedRoot([]Authority{window(s)})
			if err != nil {
				t.Fatal(err)
			}
			s.file.TrustedRoot = root
			s.refuses(t, "svid.authority", ErrCrypto)
		})
	}
}

func TestAcceptsAnyAuthorityThatHolds(t *testing.T) {
	s := newScene(t)
	other := forge.NewWorld(t)
	root, err := MarshalTrustedRoot([]Authority{
		{Certificate: other.Authority, Start: other.Authority.NotBefore}, // same name, other key
		{Certificate: s.Authority, Start: s.Authority.NotBefore},
	})
	if err != nil {
		t.Fatal(err)
	}
	s.file.TrustedRoot = root
	s.accepts(t)
}

func TestRefusesSVIDExpiredBeforeSigning(t *testing.T) {
	s := newScene(t)
	s.at = s.Now.Add(time.Hour)
	s.refuses(t, "svid.validity", ErrExpired, "expired", "timestamp")
}

func TestRefusesSVIDNotYetValid(t *testing.T) {
	s := newScene(t)
	s.at = s.Now.Add(-30 * time.Second)
	s.refuses(t, "svid.validity", ErrNotYetValid)
}

// Whatever byte is changed, the bundle is refused, or it still says the same
// (base64 and JSON leave a little play).
func TestRefusesAnyChangedByte(t *testing.T) {
	s := newScene(t)
	raw := s.sign(t)
	trust := s.trust(t)
	good := mustParse(t, raw)
	refused := 0
	for i := 0; i < len(raw); i += 3 {
		bad := bytes.Clone(raw)
		bad[i] ^= 1 << (i % 7)
		in := s.in
		in.Links = []LinkInput{{Name: "build", Bundle: bad}}
		if _, err := Verify(in, trust, s.at); err != nil {
			refused++
			continue
		}
		b := mustParse(t, bad)
		if !bytes.Equal(b.payload, good.payload) || !bytes.Equal(b.leaf.Raw, good.leaf.Raw) || !bytes.Equal(b.signature, good.signature) {
			t.Errorf("accepted with byte %d changed", i)
		}
	}
	if refused == 0 {
		t.Error("nothing was refused")
	}
}
