package attest_test

import (
	"bytes"
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"errors"
	"io"
	"math/big"
	"testing"
	"time"

	"github.com/google/go-tpm/tpm2"

	"github.com/rootlink/rootlink/internal/forge"
	"github.com/rootlink/rootlink/pkg/attest"
)

// unknownCritical is a critical extension that nobody knows.
func unknownCritical(c *x509.Certificate) {
	c.ExtraExtensions = append(c.ExtraExtensions,
		pkix.Extension{Id: asn1.ObjectIdentifier{1, 2, 3, 4}, Critical: true, Value: []byte{5, 0}})
}

func TestRefusesEK(t *testing.T) {
	maker := forge.NewMaker(t, "Forge Semiconductor")
	type args struct {
		chain  [][]byte
		public []byte
		roots  attest.EKRoots
		at     time.Time
	}
	cert := func(bend func(*x509.Certificate)) forge.TPMOptions { return forge.TPMOptions{EKCert: bend} }
	public := func(bend func(*tpm2.TPMTPublic)) forge.TPMOptions { return forge.TPMOptions{EKPublic: bend} }
	for name, c := range map[string]struct {
		o    forge.TPMOptions
		bend func(*args, *forge.TPM)
		want error
	}{
		"other maker with the same name": {want: attest.ErrEKUntrusted, bend: func(a *args, _ *forge.TPM) {
			a.roots = forge.NewMaker(t, "Forge Semiconductor").EKRoots()
		}},
		"other maker's intermediate in the chain": {want: attest.ErrEKUntrusted, bend: func(a *args, _ *forge.TPM) {
			a.chain[1] = forge.NewMaker(t, "Forge Semiconductor").Intermediate.Raw
		}},
		"no roots at all":                          {want: attest.ErrEKUntrusted, bend: func(a *args, _ *forge.TPM) { a.roots = attest.EKRoots{} }},
		"missing intermediate":                     {want: attest.ErrEKUntrusted, bend: func(a *args, _ *forge.TPM) { a.chain = a.chain[:1] }},
		"no certificate and not on the allow-list": {want: attest.ErrEKUntrusted, bend: func(a *args, _ *forge.TPM) { a.chain = nil }},
		"EK certificate of TPM A with the key of TPM B": {want: attest.ErrEKMismatch, bend: func(a *args, _ *forge.TPM) {
			a.chain = forge.NewTPM(t, maker, forge.TPMOptions{}).EKChain
		}},
		"on the deny-list": {want: attest.ErrEKDenied, bend: func(a *args, p *forge.TPM) {
			a.roots.Deny = map[[32]byte]bool{p.EKHash: true}
		}},
		"on deny-list and allow-list": {want: attest.ErrEKDenied, bend: func(a *args, p *forge.TPM) {
			a.chain, a.roots.Deny, a.roots.Allow = nil, map[[32]byte]bool{p.EKHash: true}, map[[32]byte]bool{p.EKHash: true}
		}},
		"expired":                    {want: attest.ErrEKUntrusted, bend: func(a *args, _ *forge.TPM) { a.at = a.at.AddDate(11, 0, 0) }},
		"not yet valid":              {want: attest.ErrEKUntrusted, bend: func(a *args, _ *forge.TPM) { a.at = a.at.AddDate(-3, 0, 0) }},
		"unknown critical extension": {want: attest.ErrEKUntrusted, o: cert(unknownCritical)},
		"critical SAN with a URI": {want: attest.ErrEKUntrusted, o: cert(func(c *x509.Certificate) {
			c.ExtraExtensions[0].Value = append([]byte{0x30, 5, 0x88, 3}, 0x2a, 3, 4)
		})},
		"critical SAN with an otherName": {want: attest.ErrEKUntrusted, o: cert(func(c *x509.Certificate) {
			c.ExtraExtensions[0].Value = bytes.Replace(c.ExtraExtensions[0].Value, []byte{0xa4}, []byte{0xa0}, 1)
		})},
		"EKU of something else": {want: attest.ErrEKUntrusted, o: cert(func(c *x509.Certificate) {
			c.UnknownExtKeyUsage = nil
			c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}
		})},
		"EK certificate is a CA": {want: attest.ErrEKUntrusted, o: cert(func(c *x509.Certificate) { c.IsCA, c.KeyUsage = true, x509.KeyUsageCertSign })},
		"intermediate is not a CA": {want: attest.ErrEKUntrusted, bend: func(a *args, _ *forge.TPM) {
			a.chain[1] = maker.NewIntermediate(t, func(c *x509.Certificate) { c.IsCA, c.KeyUsage, c.MaxPathLenZero = false, 0, false }).Raw
		}},
		"intermediate may not sign": {want: attest.ErrEKUntrusted, bend: func(a *args, _ *forge.TPM) {
			a.chain[1] = maker.NewIntermediate(t, func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageDigitalSignature }).Raw
		}},
		"intermediate has an unknown critical extension": {want: attest.ErrEKUntrusted, bend: func(a *args, _ *forge.TPM) {
			a.chain[1] = maker.NewIntermediate(t, unknownCritical).Raw
		}},
		"intermediate has name constraints": {want: attest.ErrEKUntrusted, bend: func(a *args, _ *forge.TPM) {
			a.chain[1] = maker.NewIntermediate(t, func(c *x509.Certificate) { c.PermittedDNSDomains = []string{"example.org"} }).Raw
		}},
		"intermediate expired": {want: attest.ErrEKUntrusted, bend: func(a *args, _ *forge.TPM) {
			a.chain[1] = maker.NewIntermediate(t, func(c *x509.Certificate) { c.NotAfter = forge.Epoch().Add(-time.Hour) }).Raw
		}},
		"more intermediates than the path length allows": {want: attest.ErrEKUntrusted, bend: func(a *args, p *forge.TPM) {
			a.chain = maker.Deepen(t, p.EKKey())
		}},
		"root has expired": {want: attest.ErrEKUntrusted, bend: func(a *args, p *forge.TPM) {
			old := forge.NewMakerWith(t, "Forge Semiconductor", func(c *x509.Certificate) { c.NotAfter = forge.Epoch().Add(-time.Hour) })
			a.chain, a.roots = old.IssueEK(t, p.EKKey(), nil), old.EKRoots()
		}},
		"chain too long":        {want: attest.ErrEKCert, bend: func(a *args, _ *forge.TPM) { a.chain = make([][]byte, attest.MaxChain+1) }},
		"certificate too big":   {want: attest.ErrEKCert, bend: func(a *args, _ *forge.TPM) { a.chain[0] = make([]byte, attest.MaxCertificate+1) }},
		"certificate malformed": {want: attest.ErrEKCert, bend: func(a *args, _ *forge.TPM) { a.chain[0] = a.chain[0][:100] }},

		"public area with trailing bytes": {want: attest.ErrTPMStructure, bend: func(a *args, _ *forge.TPM) { a.public = append(a.public, 0) }},
		"public area empty":               {want: attest.ErrTPMStructure, bend: func(a *args, _ *forge.TPM) { a.public = nil }},
		"key that could leave its TPM":    {want: attest.ErrEKTemplate, o: public(func(p *tpm2.TPMTPublic) { p.ObjectAttributes.FixedTPM = false })},
		"unrestricted key":                {want: attest.ErrEKTemplate, o: public(func(p *tpm2.TPMTPublic) { p.ObjectAttributes.Restricted = false })},
		"imported key":                    {want: attest.ErrEKTemplate, o: public(func(p *tpm2.TPMTPublic) { p.ObjectAttributes.SensitiveDataOrigin = false })},
		"signing key": {want: attest.ErrEKTemplate, o: public(func(p *tpm2.TPMTPublic) {
			p.ObjectAttributes.SignEncrypt, p.ObjectAttributes.Decrypt = true, false
		})},
		"other policy": {want: attest.ErrEKTemplate, o: public(func(p *tpm2.TPMTPublic) { p.AuthPolicy.Buffer = make([]byte, 32) })},
	} {
		t.Run(name, func(t *testing.T) {
			p := forge.NewTPM(t, maker, c.o)
			a := &args{p.EKChain, p.EKPublic, maker.EKRoots(), forge.Epoch()}
			if c.bend != nil {
				c.bend(a, p)
			}
			ek, err := attest.VerifyEK(a.chain, a.public, a.roots, a.at)
			if !errors.Is(err, c.want) || ek != nil {
				t.Errorf("got %v, %v; want %v", ek, err, c.want)
			}
		})
	}
}

func TestEKOnAllowList(t *testing.T) {
	m := forge.NewMaker(t, "Forge Semiconductor")
	p := forge.NewTPM(t, m, forge.TPMOptions{})
	r := attest.EKRoots{Allow: map[[32]byte]bool{p.EKHash: true}}
	for name, chain := range map[string][][]byte{"with a certificate": p.EKChain, "without": nil} {
		ek, err := attest.VerifyEK(chain, p.EKPublic, r, forge.Epoch())
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if ek.Basis != attest.BasisAllowList || ek.Root != nil || ek.RootHash != [32]byte{} {
			t.Errorf("%s: %+v", name, ek)
		}
	}
}

func TestEKRootPicksTheMakerThatSigned(t *testing.T) {
	a, b := forge.NewMaker(t, "Forge Semiconductor"), forge.NewMaker(t, "Forge Semiconductor")
	p := forge.NewTPM(t, b, forge.TPMOptions{})
	ek, err := attest.VerifyEK(p.EKChain, p.EKPublic,
		attest.EKRoots{Roots: []*x509.Certificate{a.Root, b.Root}, Intermediates: []*x509.Certificate{a.Intermediate}}, forge.Epoch())
	if err != nil || ek.Root != b.Root {
		t.Errorf("%v, %v", ek, err)
	}
}

// TestRefusesCertificateMesh gives a search that would try thousands of
// signatures: the budget ends it.
func TestRefusesCertificateMesh(t *testing.T) {
	m := forge.NewMaker(t, "Forge Semiconductor")
	p := forge.NewTPM(t, m, forge.TPMOptions{})
	r := attest.EKRoots{Roots: []*x509.Certificate{m.Root}}
	other := forge.NewMaker(t, "Forge Semiconductor").Intermediate
	for range 4000 {
		r.Intermediates = append(r.Intermediates, other)
	}
	allocs := testing.AllocsPerRun(1, func() {
		if _, err := attest.VerifyEK(p.EKChain[:1], p.EKPublic, r, forge.Epoch()); !errors.Is(err, attest.ErrEKUntrusted) {
			t.Errorf("mesh: %v", err)
		}
	})
	if allocs > 100_000 {
		t.Errorf("%v allocations spent on a crafted mesh", allocs)
	}
	r.Roots = make([]*x509.Certificate, 5000)
	if _, err := attest.VerifyEK(p.EKChain, p.EKPublic, r, forge.Epoch()); !errors.Is(err, attest.ErrEKUntrusted) {
		t.Errorf("5000 roots: %v", err)
	}
}

// publicOnly is a signer that cannot sign, for keys nobody has the other half of.
type publicOnly struct{ key crypto.PublicKey }

func (p publicOnly) Public() crypto.PublicKey { return p.key }
func (publicOnly) Sign(io.Reader, []byte, crypto.SignerOpts) ([]byte, error) {
	return nil, errors.New("public only")
}

// rocaModulus makes a number of 2048 bits with the fingerprint of
// CVE-2017-15361: a power of 65537 modulo the product of the small primes.
func rocaModulus() *big.Int {
	product := big.NewInt(2)
	for p := int64(3); p <= 167; p += 2 {
		if big.NewInt(p).ProbablyPrime(0) {
			product.Mul(product, big.NewInt(p))
		}
	}
	n := new(big.Int).Exp(big.NewInt(65537), big.NewInt(1234567), product)
	k := new(big.Int).Lsh(big.NewInt(3), 2046)
	k.Div(k, product)
	return n.Add(n, k.Mul(k, product))
}

func TestRefusesWeakEK(t *testing.T) {
	m := forge.NewMaker(t, "Forge Semiconductor")
	small, err := rsa.GenerateKey(rand.Reader, 1024)
	if err != nil {
		t.Fatal(err)
	}
	strange, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	strange.E = 3
	for name, tt := range map[string]struct {
		key crypto.Signer
		// node is what stops it at node attestation, where the public area comes
		// first: no template has that size, and a TPM writes no exponent of 3.
		node error
	}{
		"RSA-1024":   {small, attest.ErrEKTemplate},
		"ROCA":       {publicOnly{&rsa.PublicKey{N: rocaModulus(), E: 65537}}, attest.ErrEKWeak},
		"exponent 3": {publicOnly{&strange.PublicKey}, attest.ErrEKMismatch},
	} {
		t.Run(name, func(t *testing.T) {
			p := forge.NewTPM(t, m, forge.TPMOptions{EK: forge.EKRSA2048, EKKey: tt.key})
			r := m.EKRoots()
			r.Allow = map[[32]byte]bool{p.EKHash: true} // not even the allow-list helps
			_, err := attest.VerifyEK(p.EKChain, p.EKPublic, r, forge.Epoch())
			if !errors.Is(err, tt.node) {
				t.Errorf("VerifyEK: %v, want %v", err, tt.node)
			}
			// Evidence carries no public area, so there the certificate's key is judged alone.
			w := forge.NewWorldWith(t, m, p)
			e := w.Make(t)
			o := w.Options()
			o.EK = r
			_, _, err = attest.Verify(e, w.Binding(), o)
			if !errors.Is(err, attest.ErrEKWeak) {
				t.Errorf("Verify: %v", err)
			}
		})
	}
}

// TestEKCertificateWithOAEPKey reads the key of makers that label RSA keys with
// id-RSAES-OAEP, which Go's parser leaves out.
func TestEKCertificateWithOAEPKey(t *testing.T) {
	m := forge.NewMaker(t, "Forge Semiconductor")
	p := forge.NewTPM(t, m, forge.TPMOptions{EK: forge.EKRSA2048})
	c, err := x509.ParseCertificate(p.EKChain[0])
	if err != nil {
		t.Fatal(err)
	}
	oaep := m.Relabel(t, c, asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 1, 7})
	ek, err := attest.VerifyEK([][]byte{oaep, p.EKChain[1]}, p.EKPublic, m.EKRoots(), forge.Epoch())
	if err != nil || ek.Hash != p.EKHash {
		t.Errorf("%v, %v", ek, err)
	}
	other := m.Relabel(t, c, asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 1, 99})
	if _, err := attest.VerifyEK([][]byte{other, p.EKChain[1]}, p.EKPublic, m.EKRoots(), forge.Epoch()); !errors.Is(err, attest.ErrEKCert) {
		t.Errorf("unknown key algorithm: %v", err)
	}
}

func TestRefusesToMakeBadCredential(t *testing.T) {
	m := forge.NewMaker(t, "Forge Semiconductor")
	p := forge.NewTPM(t, m, forge.TPMOptions{})
	signing := forge.NewTPM(t, m, forge.TPMOptions{EKPublic: func(p *tpm2.TPMTPublic) { p.ObjectAttributes.Restricted = false }})
	for name, c := range map[string]struct{ public, name, secret []byte }{
		"EK not of a template": {signing.EKPublic, p.AKName, make([]byte, 32)},
		"name of an handle":    {p.EKPublic, []byte{0x40, 0, 0, 1}, make([]byte, 32)},
		"SHA-1 name":           {p.EKPublic, append([]byte{0, 4}, make([]byte, 20)...), make([]byte, 32)},
		"empty secret":         {p.EKPublic, p.AKName, nil},
		"long secret":          {p.EKPublic, p.AKName, make([]byte, 33)},
	} {
		if _, _, err := attest.MakeCredential(c.public, c.name, c.secret); err == nil {
			t.Errorf("%s: a credential was made", name)
		}
	}
	// A credential for one AK or EK does not open with another.
	blob, enc, err := attest.MakeCredential(p.EKPublic, p.AKName, make([]byte, 32))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := forge.NewTPM(t, m, forge.TPMOptions{}).ActivateCredential(blob, enc); !errors.Is(err, forge.ErrActivate) {
		t.Errorf("another TPM opened the credential: %v", err)
	}
	p.AKName = append([]byte{0, 11}, make([]byte, 32)...)
	if _, err := p.ActivateCredential(blob, enc); !errors.Is(err, forge.ErrActivate) {
		t.Errorf("another AK opened the credential: %v", err)
	}
}
