package attest_test

import (
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"math/big"
	"strings"
	"testing"

	"github.com/rootlink/rootlink/internal/forge"
	"github.com/rootlink/rootlink/pkg/attest"
)

// Whoever attests sends the chain, before anything is known of them, and one
// check with a key of 30,000 bits takes as long as a thousand ordinary ones.
func TestRefusesOversizedKeyInEKChain(t *testing.T) {
	rootKey := forge.P256(t)
	ca := func(name string) *x509.Certificate {
		return &x509.Certificate{
			Subject: pkix.Name{CommonName: name}, KeyUsage: x509.KeyUsageCertSign, IsCA: true, BasicConstraintsValid: true,
			NotBefore: forge.Epoch().AddDate(-1, 0, 0), NotAfter: forge.Epoch().AddDate(1, 0, 0),
		}
	}
	root := forge.Sign(t, ca("root"), nil, rootKey.Public(), rootKey)
	modulus := make([]byte, 2048) // 16,384 bits
	rand.Read(modulus)
	modulus[0] |= 0x80
	modulus[len(modulus)-1] |= 1
	huge := forge.Sign(t, ca("huge"), root, &rsa.PublicKey{N: new(big.Int).SetBytes(modulus), E: 65537}, rootKey)

	tpm := forge.NewTPM(t, forge.NewMaker(t, "Forge Semiconductor"), forge.TPMOptions{})
	ek, err := x509.ParseCertificate(tpm.EKChain[0])
	if err != nil {
		t.Fatal(err)
	}
	// Nobody needs the huge key itself to have its signatures checked.
	template := &x509.Certificate{
		UnknownExtKeyUsage: ek.UnknownExtKeyUsage, KeyUsage: ek.KeyUsage, BasicConstraintsValid: true,
		NotBefore: ek.NotBefore, NotAfter: ek.NotAfter,
	}
	issuer := &x509.Certificate{Subject: huge.Subject, RawSubject: huge.RawSubject}
	der := forge.Sign(t, template, issuer, ek.PublicKey, forge.P256(t)).Raw

	_, err = attest.VerifyEK([][]byte{der, huge.Raw}, tpm.EKPublic, attest.EKRoots{Roots: []*x509.Certificate{root}}, forge.Epoch())
	if err == nil || !strings.Contains(err.Error(), "RSA key of 16384 bits") {
		t.Fatalf("a signature was checked with it: %v", err)
	}
}
