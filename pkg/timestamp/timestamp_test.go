package timestamp_test

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/sha512"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"errors"
	"math/big"
	"testing"
	"time"

	"github.com/rootlink/rootlink/internal/forge"
	"github.com/rootlink/rootlink/pkg/timestamp"
)

var signature = []byte("a signature over the statement")

func parse(t *testing.T, raw []byte) *timestamp.Token {
	t.Helper()
	tok, err := timestamp.Parse(raw)
	if err != nil {
		t.Fatal(err)
	}
	return tok
}

func TestVerify(t *testing.T) {
	tsa := forge.NewTSA(t, nil)
	at := forge.Epoch().Add(time.Minute)
	sum := sha512.Sum384(signature)
	for name, c := range map[string]struct {
		bend      func(*forge.TokenSpec)
		authority timestamp.Authority
	}{
		"pinned signer":   {nil, tsa.Authority()},
		"trusted issuer":  {nil, tsa.Issuer()},
		"no certificates": {func(s *forge.TokenSpec) { s.Certificates = nil }, tsa.Authority()},
		"whole chain":     {func(s *forge.TokenSpec) { s.Certificates = append(s.Certificates, tsa.Root) }, tsa.Issuer()},
		"SHA-384 imprint": {func(s *forge.TokenSpec) { s.Hash, s.Imprint = crypto.SHA384, sum[:] }, tsa.Authority()},
		"ESSCertID v1":    {func(s *forge.TokenSpec) { s.ESSv1 = true }, tsa.Authority()},
		"no signing time": {func(s *forge.TokenSpec) { s.SigningTime = time.Time{} }, tsa.Authority()},
		"no name":         {func(s *forge.TokenSpec) { s.TSAName = nil }, tsa.Authority()},
		"a nonce":         {func(s *forge.TokenSpec) { s.Nonce = big.NewInt(-5) }, tsa.Authority()},
		"more attributes": {func(s *forge.TokenSpec) {
			s.Extra = [][]byte{forge.Attribute(asn1.ObjectIdentifier{1, 2, 3}, []byte{5, 0})}
		}, tsa.Authority()},
		"open-ended trust": {nil, func() timestamp.Authority { a := tsa.Authority(); a.End = time.Time{}; return a }()},
	} {
		t.Run(name, func(t *testing.T) {
			if err := c.authority.Validate(); err != nil {
				t.Fatal(err)
			}
			raw := tsa.Token(t, signature, at, c.bend)
			tok := parse(t, raw)
			if !bytes.Equal(tok.Raw(), raw) {
				t.Error("the token is not what was parsed")
			}
			v, err := tok.Verify(signature, []timestamp.Authority{forge.NewTSA(t, nil).Authority(), c.authority})
			if err != nil {
				t.Fatal(err)
			}
			if !v.Time.Equal(at) || v.Accuracy != time.Second || v.Authority.Operator != "forge.example" ||
				v.Serial.Sign() < 0 || v.AuthorityID != forge.KeyHash(t, tsa.Root.PublicKey) {
				t.Errorf("%+v", v)
			}
		})
	}
}

func TestFractionOfASecond(t *testing.T) {
	tsa := forge.NewTSA(t, nil)
	tok := parse(t, tsa.Token(t, signature, forge.Epoch(), func(s *forge.TokenSpec) { s.Time = "20270301120000.25Z" }))
	if want := forge.Epoch().Add(250 * time.Millisecond); !tok.UnverifiedTime().Equal(want) {
		t.Error(tok.UnverifiedTime())
	}
}

// One authority with two certificates is one: whoever counts votes counts IDs.
func TestRotatedAuthorityIsOne(t *testing.T) {
	old := forge.NewTSA(t, nil)
	rotated := old.Rotated(t, nil)
	trusted := []timestamp.Authority{old.Authority(), rotated.Authority()}
	var ids [2][32]byte
	for i, tsa := range []*forge.TSA{old, rotated} {
		v, err := parse(t, tsa.Token(t, signature, forge.Epoch(), nil)).Verify(signature, trusted)
		if err != nil {
			t.Fatal(err)
		}
		ids[i] = v.AuthorityID
	}
	if ids[0] != ids[1] {
		t.Error("two IDs for one root")
	}
}

func TestAnswers(t *testing.T) {
	tsa, nonce := forge.NewTSA(t, nil), big.NewInt(77)
	good := parse(t, tsa.Token(t, signature, forge.Epoch(), func(s *forge.TokenSpec) { s.Nonce = nonce }))
	if err := good.Answers(signature, nonce); err != nil {
		t.Error(err)
	}
	if err := good.Answers(signature, big.NewInt(78)); !errors.Is(err, timestamp.ErrNonce) {
		t.Error(err)
	}
	if err := good.Answers([]byte("other"), nonce); !errors.Is(err, timestamp.ErrWrongImprint) {
		t.Error(err)
	}
	if err := parse(t, tsa.Token(t, signature, forge.Epoch(), nil)).Answers(signature, nonce); !errors.Is(err, timestamp.ErrNonce) {
		t.Error("an answer without the nonce:", err)
	}
	bare := parse(t, tsa.Token(t, signature, forge.Epoch(), func(s *forge.TokenSpec) { s.Certificates = nil }))
	if err := bare.Answers(signature, nil); !errors.Is(err, timestamp.ErrSigner) {
		t.Error("an answer without a certificate:", err)
	}
}

// refused parses and verifies, and wants each of the errors from one of both.
func refused(t *testing.T, raw []byte, as []timestamp.Authority, want ...error) {
	t.Helper()
	tok, err := timestamp.Parse(raw)
	if err == nil {
		_, err = tok.Verify(signature, as)
	}
	for _, w := range want {
		if !errors.Is(err, w) {
			t.Errorf("got %v, want %v", err, w)
		}
	}
}

// bent makes a token with one defect by an authority that is trusted.
func bent(t *testing.T, bend func(*forge.TSA, *forge.TokenSpec), want ...error) {
	t.Helper()
	tsa := forge.NewTSA(t, nil)
	raw := tsa.Token(t, signature, forge.Epoch(), func(s *forge.TokenSpec) {
		if bend != nil {
			bend(tsa, s)
		}
	})
	for _, a := range []timestamp.Authority{tsa.Authority(), tsa.Issuer()} {
		refused(t, raw, []timestamp.Authority{a}, want...)
	}
}

func TestRefusesTokenForAnotherSignature(t *testing.T) {
	tsa := forge.NewTSA(t, nil)
	refused(t, tsa.Token(t, []byte("another"), forge.Epoch(), nil), []timestamp.Authority{tsa.Authority()}, timestamp.ErrBadToken, timestamp.ErrWrongImprint)
	// Whoever made it: it is wrong before it is unknown.
	refused(t, tsa.Token(t, []byte("another"), forge.Epoch(), nil), nil, timestamp.ErrWrongImprint)
}

// The key of such a certificate also signs for another service.
func TestRefusesCertificateThatIsNotForTimestampsAlone(t *testing.T) {
	sole := []x509.ExtKeyUsage{x509.ExtKeyUsageTimeStamping}
	for name, bend := range map[string]func(*x509.Certificate){
		"no extended key usage": func(c *x509.Certificate) { c.ExtraExtensions = nil },
		"another one": func(c *x509.Certificate) {
			c.ExtraExtensions = []pkix.Extension{forge.EKU(t, true, asn1.ObjectIdentifier{1, 3, 6, 1, 5, 5, 7, 3, 3})}
		},
		"two":          func(c *x509.Certificate) { c.ExtraExtensions = []pkix.Extension{forge.EKU(t, true)} },
		"not critical": func(c *x509.Certificate) { c.ExtraExtensions, c.ExtKeyUsage = nil, sole },
		"an unknown one beside it": func(c *x509.Certificate) {
			c.ExtraExtensions = []pkix.Extension{forge.EKU(t, true, asn1.ObjectIdentifier{1, 3, 6, 1, 5, 5, 7, 3, 8}, asn1.ObjectIdentifier{1, 2, 3})}
		},
		"any": func(c *x509.Certificate) {
			c.ExtraExtensions = []pkix.Extension{forge.EKU(t, true, asn1.ObjectIdentifier{2, 5, 29, 37, 0})}
		},
		"a CA":                   func(c *x509.Certificate) { c.IsCA = true },
		"key usage encipherment": func(c *x509.Certificate) { c.KeyUsage |= x509.KeyUsageKeyEncipherment },
	} {
		t.Run(name, func(t *testing.T) {
			tsa := forge.NewTSA(t, bend)
			raw := tsa.Token(t, signature, forge.Epoch(), nil)
			refused(t, raw, []timestamp.Authority{tsa.Issuer()}, timestamp.ErrBadToken, timestamp.ErrSigner)
			pinned := tsa.Authority()
			// A CA in the first place is an issuer, which is fine; it still signs
			// no token.
			if pinned.Validate() == nil && !tsa.Leaf.IsCA {
				t.Error("such a certificate can be trusted")
			}
			if _, err := parse(t, raw).Verify(signature, []timestamp.Authority{pinned}); err == nil {
				t.Error("verified")
			}
			if err := parse(t, raw).Answers(signature, nil); !errors.Is(err, timestamp.ErrSigner) {
				t.Errorf("as an answer: %v", err)
			}
		})
	}
}

func TestRefusesUnknownAuthority(t *testing.T) {
	tsa, other := forge.NewTSA(t, nil), forge.NewTSA(t, nil)
	raw := tsa.Token(t, signature, forge.Epoch(), nil)
	for _, as := range [][]timestamp.Authority{nil, {other.Authority()}, {other.Issuer()}, {tsa.Rotated(t, nil).Authority()}} {
		refused(t, raw, as, timestamp.ErrUnknownAuthority)
	}
	// Its subjects are those of the trusted one; its keys are not. The root in
	// the token is no link of the chain.
	refused(t, tsa.Token(t, signature, forge.Epoch(), func(s *forge.TokenSpec) { s.Certificates = append(s.Certificates, tsa.Root) }),
		[]timestamp.Authority{other.Issuer()}, timestamp.ErrUnknownAuthority)
}

func TestRefusesTokenOutsideItsWindow(t *testing.T) {
	tsa := forge.NewTSA(t, nil)
	raw := tsa.Token(t, signature, forge.Epoch(), nil)
	a := tsa.Authority()
	a.End = forge.Epoch().Add(-time.Second)
	refused(t, raw, []timestamp.Authority{a}, timestamp.ErrBadToken, timestamp.ErrOutsideWindow)
	a = tsa.Authority()
	a.Start = forge.Epoch().Add(time.Second)
	refused(t, raw, []timestamp.Authority{a}, timestamp.ErrOutsideWindow)
	// The certificate had ended when it signed. That is judged at the token's
	// time, so a certificate that has ended since takes nothing away.
	late := tsa.Leaf.NotAfter.Add(time.Hour)
	a = tsa.Authority()
	a.End = time.Time{}
	refused(t, tsa.Token(t, signature, late, func(s *forge.TokenSpec) { s.SigningTime = time.Time{} }), []timestamp.Authority{a}, timestamp.ErrBadToken, timestamp.ErrSigner)
	refused(t, tsa.Token(t, signature, forge.Epoch(), func(s *forge.TokenSpec) { s.SigningTime = late }), []timestamp.Authority{a}, timestamp.ErrSigner)
}

func TestRefusesForgedSignature(t *testing.T) {
	other := forge.P256(t)
	bent(t, func(_ *forge.TSA, s *forge.TokenSpec) { s.Key = other }, timestamp.ErrBadToken, timestamp.ErrSignature)
	// The time was changed after it was signed.
	bent(t, func(_ *forge.TSA, s *forge.TokenSpec) {
		s.After = func(b []byte) []byte { return bytes.Replace(b, []byte("20270301"), []byte("20270201"), 1) }
	}, timestamp.ErrBadToken, timestamp.ErrSignature)
}

// A second certificate for the same key, with other rights or another name.
func TestRefusesSubstitutedCertificate(t *testing.T) {
	bent(t, func(tsa *forge.TSA, s *forge.TokenSpec) { s.ESS = tsa.Root }, timestamp.ErrBadToken, timestamp.ErrSigner)
	bent(t, func(tsa *forge.TSA, s *forge.TokenSpec) { s.ESS, s.ESSv1 = tsa.Root, true }, timestamp.ErrBadToken, timestamp.ErrSigner)
	bent(t, func(_ *forge.TSA, s *forge.TokenSpec) { s.ESS = nil }, timestamp.ErrMalformed)
	bent(t, func(tsa *forge.TSA, s *forge.TokenSpec) { s.TSAName = tsa.Root.RawSubject }, timestamp.ErrBadToken, timestamp.ErrSigner)
}

func TestRefusesRefusal(t *testing.T) {
	for status := 1; status <= 6; status++ {
		bent(t, func(_ *forge.TSA, s *forge.TokenSpec) { s.Status = status }, timestamp.ErrNotGranted)
	}
	// PKIStatusInfo { rejection, { "no" }, badAlg }
	_, err := timestamp.Parse([]byte{0x30, 0x0f, 0x30, 0x0d, 2, 1, 2, 0x30, 4, 12, 2, 'n', 'o', 3, 2, 7, 0x80})
	var s *timestamp.StatusError
	if !errors.As(err, &s) || s.Status != 2 || s.Text != "no" || len(s.Info) != 1 || s.Info[0] != 0 {
		t.Errorf("%v %+v", err, s)
	}
	// "granted", and nothing was.
	if _, err := timestamp.Parse([]byte{0x30, 5, 0x30, 3, 2, 1, 0}); !errors.Is(err, timestamp.ErrMalformed) {
		t.Error(err)
	}
}

func TestRefusesWeakHash(t *testing.T) {
	bent(t, func(_ *forge.TSA, s *forge.TokenSpec) { s.Hash, s.Imprint = crypto.SHA1, make([]byte, 20) }, timestamp.ErrBadToken, timestamp.ErrWeak)
	bent(t, func(_ *forge.TSA, s *forge.TokenSpec) { s.SignatureAlgorithm = forge.OIDECDSAWithSHA1 }, timestamp.ErrBadToken, timestamp.ErrWeak)
	bent(t, func(_ *forge.TSA, s *forge.TokenSpec) {
		s.DigestHash, s.SignatureAlgorithm = crypto.SHA1, forge.OIDECDSAWithSHA1
	}, timestamp.ErrBadToken, timestamp.ErrWeak)
}

func TestRefusesImpreciseToken(t *testing.T) {
	bent(t, func(_ *forge.TSA, s *forge.TokenSpec) { s.Seconds = 61 }, timestamp.ErrBadToken, timestamp.ErrImprecise)
}

func TestRefusesMalformedToken(t *testing.T) {
	other := asn1.ObjectIdentifier{1, 2, 3}
	for name, bend := range map[string]func(*forge.TSA, *forge.TokenSpec){
		"content of another kind":     func(_ *forge.TSA, s *forge.TokenSpec) { s.ContentType = forge.OIDData },
		"signature over another kind": func(_ *forge.TSA, s *forge.TokenSpec) { s.SignedContentType = forge.OIDData },
		"two signers":                 func(_ *forge.TSA, s *forge.TokenSpec) { s.Signers = 2 },
		"no signer":                   func(_ *forge.TSA, s *forge.TokenSpec) { s.Signers = 0 },
		"unsigned attributes":         func(_ *forge.TSA, s *forge.TokenSpec) { s.Unsigned = true },
		"attributes out of order":     func(_ *forge.TSA, s *forge.TokenSpec) { s.Unsorted = true },
		"critical extension":          func(_ *forge.TSA, s *forge.TokenSpec) { s.Critical = true },
		"bytes after the TSTInfo":     func(_ *forge.TSA, s *forge.TokenSpec) { s.Info = func(b []byte) []byte { return append(b, 5, 0) } },
		"imprint of another length":   func(_ *forge.TSA, s *forge.TokenSpec) { s.Imprint = s.Imprint[:31] },
		"serial number of 1,000 bits": func(_ *forge.TSA, s *forge.TokenSpec) { s.Serial = new(big.Int).Lsh(big.NewInt(1), 1000) },
		"time with an offset":         func(_ *forge.TSA, s *forge.TokenSpec) { s.Time = "20270301130000+0100" },
		"time without a zone":         func(_ *forge.TSA, s *forge.TokenSpec) { s.Time = "20270301120000" },
		"time with trailing zeros":    func(_ *forge.TSA, s *forge.TokenSpec) { s.Time = "20270301120000.50Z" },
		"time on 30 February":         func(_ *forge.TSA, s *forge.TokenSpec) { s.Time = "20270230120000Z" },
		"negative accuracy": func(_ *forge.TSA, s *forge.TokenSpec) {
			s.Info = func(b []byte) []byte {
				return bytes.Replace(b, []byte{0x30, 3, 2, 1, 1}, []byte{0x30, 3, 2, 1, 0xff}, 1)
			}
		},
		"accuracy of 2^63 seconds overflow": func(_ *forge.TSA, s *forge.TokenSpec) { s.Seconds = 1 << 62 },
		"one attribute twice": func(_ *forge.TSA, s *forge.TokenSpec) {
			s.Extra = [][]byte{forge.Attribute(other, []byte{5, 0}), forge.Attribute(other, []byte{1, 1, 0xff})}
		},
		"17 attributes": func(_ *forge.TSA, s *forge.TokenSpec) {
			for i := range 17 {
				s.Extra = append(s.Extra, forge.Attribute(asn1.ObjectIdentifier{1, 2, 3, i}, []byte{5, 0}))
			}
		},
		"nine certificates": func(tsa *forge.TSA, s *forge.TokenSpec) {
			for range 8 {
				s.Certificates = append(s.Certificates, tsa.Root)
			}
		},
		"version 2": func(_ *forge.TSA, s *forge.TokenSpec) {
			s.Info = func(b []byte) []byte { b[bytes.Index(b, []byte{2, 1, 1})+2] = 2; return b }
		},
	} {
		t.Run(name, func(t *testing.T) { bent(t, bend, timestamp.ErrMalformed) })
	}
}

func TestRefusesTrailingBytes(t *testing.T) {
	raw := forge.NewTSA(t, nil).Token(t, signature, forge.Epoch(), nil)
	if _, err := timestamp.Parse(append(bytes.Clone(raw), 0)); !errors.Is(err, timestamp.ErrMalformed) {
		t.Error(err)
	}
	for n := range raw {
		if _, err := timestamp.Parse(raw[:n]); !errors.Is(err, timestamp.ErrMalformed) {
			t.Fatalf("%d bytes of it: %v", n, err)
		}
	}
	if _, err := timestamp.Parse(make([]byte, timestamp.MaxToken+1)); !errors.Is(err, timestamp.ErrMalformed) {
		t.Error(err)
	}
}

// No byte of a token may be changed and leave it good, save in the certificates
// and digest names that nobody signs.
func TestRefusesEveryFlippedByte(t *testing.T) {
	tsa := forge.NewTSA(t, nil)
	raw := tsa.Token(t, signature, forge.Epoch(), func(s *forge.TokenSpec) { s.Certificates = nil })
	as := []timestamp.Authority{tsa.Authority()}
	passed := 0
	for i := range raw {
		changed := bytes.Clone(raw)
		changed[i] ^= 1
		tok, err := timestamp.Parse(changed)
		if err != nil {
			continue
		}
		if _, err := tok.Verify(signature, as); err == nil {
			passed++
		}
	}
	// The SET of digest algorithms only repeats what the signer says: 15 bytes.
	if passed > 15 {
		t.Errorf("%d of %d bytes may be changed", passed, len(raw))
	}
}

func TestRefusesIncompleteAuthority(t *testing.T) {
	tsa := forge.NewTSA(t, nil)
	tok := parse(t, tsa.Token(t, signature, forge.Epoch(), nil))
	for name, bend := range map[string]func(*timestamp.Authority){
		"no chain":          func(a *timestamp.Authority) { a.Chain = nil },
		"nil certificate":   func(a *timestamp.Authority) { a.Chain = []*x509.Certificate{tsa.Leaf, nil, tsa.Root} },
		"no root":           func(a *timestamp.Authority) { a.Chain = a.Chain[:1] },
		"no window":         func(a *timestamp.Authority) { a.Start = time.Time{} },
		"window ends first": func(a *timestamp.Authority) { a.End = a.Start.Add(-1) },
		"six certificates": func(a *timestamp.Authority) {
			a.Chain = []*x509.Certificate{tsa.Leaf, tsa.Root, tsa.Root, tsa.Root, tsa.Root, tsa.Root}
		},
		"signer in the middle": func(a *timestamp.Authority) { a.Chain = []*x509.Certificate{tsa.Root, tsa.Leaf, tsa.Root} },
	} {
		t.Run(name, func(t *testing.T) {
			a := tsa.Authority()
			bend(&a)
			if err := a.Validate(); !errors.Is(err, timestamp.ErrAuthority) {
				t.Errorf("Validate: %v", err)
			}
			// A good one beside it does not make up for it.
			if _, err := tok.Verify(signature, []timestamp.Authority{tsa.Authority(), a}); !errors.Is(err, timestamp.ErrAuthority) {
				t.Errorf("Verify: %v", err)
			}
		})
	}
	a := tsa.Authority()
	a.Chain = []*x509.Certificate{tsa.Leaf, forge.NewTSA(t, nil).Root}
	if err := a.Validate(); !errors.Is(err, timestamp.ErrAuthority) {
		t.Errorf("a chain whose links do not hold: %v", err)
	}
}

func TestQuery(t *testing.T) {
	nonce := big.NewInt(1 << 40)
	raw, err := timestamp.Request(signature, nonce)
	if err != nil {
		t.Fatal(err)
	}
	q, err := timestamp.ParseQuery(raw)
	if err != nil {
		t.Fatal(err)
	}
	if sum := sha256.Sum256(signature); q.Hash != crypto.SHA256 || !bytes.Equal(q.Imprint, sum[:]) || q.Nonce.Cmp(nonce) != 0 || !q.CertReq || q.Policy != nil || q.Extension {
		t.Errorf("%+v", q)
	}
	for n := range raw {
		if _, err := timestamp.ParseQuery(raw[:n]); !errors.Is(err, timestamp.ErrMalformed) {
			t.Fatalf("%d bytes of it: %v", n, err)
		}
	}
}

// What is signed with a key that can be broken today was dated by whoever broke it.
func TestRefusesWeakSignerKey(t *testing.T) {
	rootKey := forge.P256(t)
	weak, err := ecdsa.GenerateKey(elliptic.P224(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	window := func(c *x509.Certificate) *x509.Certificate {
		c.NotBefore, c.NotAfter, c.BasicConstraintsValid = forge.Epoch().AddDate(0, -1, 0), forge.Epoch().AddDate(0, 1, 0), true
		return c
	}
	root := forge.Sign(t, window(&x509.Certificate{Subject: pkix.Name{CommonName: "root"}, IsCA: true, KeyUsage: x509.KeyUsageCertSign}), nil, rootKey.Public(), rootKey)
	leaf := forge.Sign(t, window(&x509.Certificate{
		Subject: pkix.Name{CommonName: "weak"}, KeyUsage: x509.KeyUsageDigitalSignature,
		ExtraExtensions: []pkix.Extension{forge.EKU(t, true, asn1.ObjectIdentifier{1, 3, 6, 1, 5, 5, 7, 3, 8})},
	}), root, weak.Public(), rootKey)
	raw := forge.NewTSA(t, nil).Token(t, signature, forge.Epoch(), func(s *forge.TokenSpec) {
		s.Certificates, s.Names, s.ESS, s.Key, s.TSAName = []*x509.Certificate{leaf}, leaf, leaf, weak, leaf.RawSubject
	})
	refused(t, raw, []timestamp.Authority{{Chain: []*x509.Certificate{leaf, root}, Start: leaf.NotBefore}}, timestamp.ErrBadToken, timestamp.ErrWeak)
}
