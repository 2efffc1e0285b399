package server

import (
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"math/big"
	"strings"
	"testing"
)

// Anybody may send a CSR, and one check of a signature by a key of 200,000 bits
// takes seconds.
func TestRefusesOversizedKeyInCSR(t *testing.T) {
	modulus := make([]byte, 25_000)
	rand.Read(modulus)
	modulus[0] |= 0x80
	modulus[len(modulus)-1] |= 1
	spki, err := x509.MarshalPKIXPublicKey(&rsa.PublicKey{N: new(big.Int).SetBytes(modulus), E: 65537})
	if err != nil {
		t.Fatal(err)
	}
	type request struct {
		Version int
		Subject asn1.RawValue
		Key     asn1.RawValue
		Attrs   []asn1.RawValue `asn1:"tag:0"`
	}
	sha256WithRSA := pkix.AlgorithmIdentifier{Algorithm: asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 1, 11}, Parameters: asn1.NullRawValue}
	csr, err := asn1.Marshal(struct {
		Request   request
		Algorithm pkix.AlgorithmIdentifier
		Signature asn1.BitString
	}{
		request{Subject: asn1.RawValue{FullBytes: []byte{0x30, 0}}, Key: asn1.RawValue{FullBytes: spki}},
		sha256WithRSA,
		asn1.BitString{Bytes: make([]byte, len(modulus)), BitLength: 8 * len(modulus)},
	})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := parseCSR(csr); err == nil || !strings.Contains(err.Error(), "RSA key of 200000 bits") {
		t.Fatalf("its signature was checked: %v", err)
	}
}
