package trustdoc

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"math/big"
	"testing"
	"time"
)

var epoch = time.Date(2030, 1, 1, 0, 0, 0, 0, time.UTC)

type issuer struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

// certificate is issued by ca, or by itself.
func certificate(t *testing.T, name string, ca *issuer) *issuer {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	c := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: name}, NotBefore: epoch, NotAfter: epoch.AddDate(1, 0, 0),
		BasicConstraintsValid: true, IsCA: true, KeyUsage: x509.KeyUsageCertSign,
	}
	parent, signer := c, key
	if ca != nil {
		parent, signer = ca.cert, ca.key
	}
	der, err := x509.CreateCertificate(rand.Reader, c, parent, &key.PublicKey, signer)
	if err != nil {
		t.Fatal(err)
	}
	if c, err = x509.ParseCertificate(der); err != nil {
		t.Fatal(err)
	}
	return &issuer{c, key}
}

func text(certs ...*issuer) (out []byte) {
	for _, c := range certs {
		out = append(out, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.cert.Raw})...)
	}
	return out
}

// An authority that changed its signing key has two chains under one root, in
// whatever order its operator wrote them down.
func TestTSAChainsInAnyOrder(t *testing.T) {
	root := certificate(t, "root", nil)
	middle := certificate(t, "middle", root)
	old, current := certificate(t, "old", middle), certificate(t, "current", middle)
	alone := certificate(t, "root", nil) // the same name, another key
	for _, tt := range []struct {
		name string
		in   []*issuer
		want [][]*issuer
	}{
		{"root last", []*issuer{current, middle, root}, [][]*issuer{{current, middle, root}}},
		{"root first, as in tsa.pem", []*issuer{root, middle, old, current}, [][]*issuer{{old, middle, root}, {current, middle, root}}},
		{"twice", []*issuer{root, current, middle, root}, [][]*issuer{{current, middle, root}}},
		{"issuing CA alone", []*issuer{root, middle}, [][]*issuer{{middle, root}}},
		{"root alone", []*issuer{root}, [][]*issuer{{root}}},
		{"a root of that name that issued none", []*issuer{alone, middle, root}, [][]*issuer{{alone}, {middle, root}}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, err := Chains(text(tt.in...))
			if err != nil || len(got) != len(tt.want) {
				t.Fatalf("%d chains, %v", len(got), err)
			}
			for i, chain := range tt.want {
				if len(got[i]) != len(chain) {
					t.Fatalf("chain %d has %d certificates, want %d", i, len(got[i]), len(chain))
				}
				for j, c := range chain {
					if !bytes.Equal(got[i][j], c.cert.Raw) {
						t.Errorf("chain %d: certificate %d is not %s", i, j, c.cert.Subject)
					}
				}
			}
		})
	}
}

func TestRefusesTextWithoutACertificate(t *testing.T) {
	for _, b := range [][]byte{nil, []byte("no PEM"), pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY"}), pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: []byte("no DER")})} {
		if got, err := Chains(b); err == nil {
			t.Errorf("%q: %d chains", b, len(got))
		}
	}
}

// Two who issued each other have no root: a walk to it would never end.
func TestRefusesCertificatesThatIssueEachOther(t *testing.T) {
	a, b := certificate(t, "a", nil), certificate(t, "b", nil)
	crossed := func(of, by *issuer) *issuer {
		c := *of.cert
		c.RawSubject, c.RawIssuer = nil, nil
		der, err := x509.CreateCertificate(rand.Reader, &c, by.cert, &of.key.PublicKey, by.key)
		if err != nil {
			t.Fatal(err)
		}
		p, err := x509.ParseCertificate(der)
		if err != nil {
			t.Fatal(err)
		}
		return &issuer{p, of.key}
	}
	ab, ba := crossed(a, b), crossed(b, a)
	for _, certs := range [][]*issuer{{ab, ba}, {certificate(t, "leaf", a), ab, ba}} {
		if got, err := Chains(text(certs...)); err == nil {
			t.Errorf("%d chains", len(got))
		}
	}
}

func TestMergeTakesTheLastWord(t *testing.T) {
	c, other := certificate(t, "tsa", nil), certificate(t, "other", nil)
	var s Sources
	for _, operator := range []string{"first", "second"} {
		if err := s.Merge(Sources{Timestamps: []TSA{{Chain: [][]byte{c.cert.Raw}, Operator: operator}, {Chain: [][]byte{other.cert.Raw}}}}); err != nil {
			t.Fatal(err)
		}
	}
	if len(s.Timestamps) != 2 || s.Timestamps[0].Operator != "second" {
		t.Errorf("%d authorities, the first by %q", len(s.Timestamps), s.Timestamps[0].Operator)
	}
}

func TestRefusesATSAWithoutChain(t *testing.T) {
	for _, a := range []TSA{{}, {Chain: [][]byte{{1, 2, 3}}}} {
		if err := new(Sources).Merge(Sources{Timestamps: []TSA{a}}); !errors.Is(err, ErrMalformed) {
			t.Errorf("%v: %v", a, err)
		}
	}
}

func TestRefusesUnknownFileOptions(t *testing.T) {
	path, got, err := FileOptions("chain.pem,operator=acme", "operator", "uri")
	if err != nil || path != "chain.pem" || got["operator"] != "acme" {
		t.Errorf("%q %v: %v", path, got, err)
	}
	for _, arg := range []string{"chain.pem,oprator=acme", "chain.pem,operator", "chain.pem,operator=", "chain.pem,"} {
		if _, _, err := FileOptions(arg, "operator", "uri"); !errors.Is(err, ErrMalformed) {
			t.Errorf("%s: %v", arg, err)
		}
	}
}
