package main

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"testing"
	"time"

	"github.com/rootlink/rootlink/internal/trustdoc"
)

type issued struct {
	*x509.Certificate
	key *ecdsa.PrivateKey
}

func issue(t *testing.T, name string, ca bool, by *issued) *issued {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	c := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: name}, BasicConstraintsValid: true, IsCA: ca,
		NotBefore: time.Now(), NotAfter: time.Now().Add(time.Hour),
	}
	parent, signer := c, key
	if by != nil {
		parent, signer = by.Certificate, by.key
	}
	der, err := x509.CreateCertificate(rand.Reader, c, parent, key.Public(), signer)
	if err != nil {
		t.Fatal(err)
	}
	if c, err = x509.ParseCertificate(der); err != nil {
		t.Fatal(err)
	}
	return &issued{c, key}
}

func TestTSAChainsInAnyOrder(t *testing.T) {
	root := issue(t, "root", true, nil)
	middle := issue(t, "middle", true, root)
	old, current := issue(t, "old", false, middle), issue(t, "current", false, middle)
	alone := issue(t, "root", true, nil) // the same name, another key
	for _, tt := range []struct {
		name string
		in   []*issued
		want [][]*issued
	}{
		{"root last", []*issued{current, middle, root}, [][]*issued{{current, middle, root}}},
		{"root first, as in tsa.pem", []*issued{root, middle, old, current}, [][]*issued{{old, middle, root}, {current, middle, root}}},
		{"twice", []*issued{root, current, middle, root}, [][]*issued{{current, middle, root}}},
		{"issuing CA alone", []*issued{root, middle}, [][]*issued{{middle, root}}},
		{"root alone", []*issued{root}, [][]*issued{{root}}},
		{"a root of that name that issued none", []*issued{alone, middle, root}, [][]*issued{{alone}, {middle, root}}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var text []byte
			for _, c := range tt.in {
				text = append(text, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw})...)
			}
			got, err := trustdoc.Chains(text)
			if err != nil || len(got) != len(tt.want) {
				t.Fatalf("%d chains, %v", len(got), err)
			}
			for i, chain := range tt.want {
				if len(got[i]) != len(chain) {
					t.Fatalf("chain %d has %d certificates, want %d", i, len(got[i]), len(chain))
				}
				for j, c := range chain {
					if !bytes.Equal(got[i][j], c.Raw) {
						t.Errorf("chain %d: certificate %d is not %s", i, j, c.Subject)
					}
				}
			}
		})
	}
	if _, err := trustdoc.Chains([]byte("no PEM")); err == nil {
		t.Error("nothing passes for a chain")
	}
}
