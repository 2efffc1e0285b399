package tsa

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"fmt"
	"math/big"
	"time"
)

// timeStampingOnly is the extended key usage of RFC 3161, 2.3: critical, and
// nothing beside it. The template's own field would not make it critical.
func timeStampingOnly() (pkix.Extension, error) {
	value, err := asn1.Marshal([]asn1.ObjectIdentifier{{1, 3, 6, 1, 5, 5, 7, 3, 8}})
	return pkix.Extension{Id: asn1.ObjectIdentifier{2, 5, 29, 37}, Critical: true, Value: value}, err
}

func newRoot(name string, key *ecdsa.PrivateKey, now time.Time) (*x509.Certificate, error) {
	serial, err := newSerial()
	if err != nil {
		return nil, err
	}
	return sign(&x509.Certificate{
		SerialNumber: serial,
		// Unique, since verifiers look issuers up by name.
		Subject:   pkix.Name{Organization: []string{"rootlink"}, CommonName: "timestamp root of " + name, SerialNumber: serial.Text(16)},
		NotBefore: now.Add(-backdate), NotAfter: now.Add(RootLife),
		IsCA: true, BasicConstraintsValid: true, MaxPathLenZero: true,
		KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
	}, nil, key.Public(), key)
}

// newLeaf certifies a key that signs tokens from start on.
func newLeaf(name string, root *x509.Certificate, rootKey *ecdsa.PrivateKey, key crypto.PublicKey, start time.Time, life time.Duration) (*x509.Certificate, error) {
	serial, err := newSerial()
	if err != nil {
		return nil, err
	}
	eku, err := timeStampingOnly()
	if err != nil {
		return nil, err
	}
	end := start.Add(life)
	if end.After(root.NotAfter) {
		end = root.NotAfter
	}
	if !start.Before(end) {
		return nil, fmt.Errorf("%w: its root ends on %v", ErrIncomplete, root.NotAfter)
	}
	return sign(&x509.Certificate{
		SerialNumber: serial,
		Subject:      pkix.Name{Organization: []string{"rootlink"}, CommonName: "timestamps of " + name, SerialNumber: serial.Text(16)},
		NotBefore:    start, NotAfter: end,
		BasicConstraintsValid: true,
		KeyUsage:              x509.KeyUsageDigitalSignature,
		ExtraExtensions:       []pkix.Extension{eku},
	}, root, key, rootKey)
}

func sign(t, parent *x509.Certificate, key crypto.PublicKey, signer *ecdsa.PrivateKey) (*x509.Certificate, error) {
	if parent == nil {
		parent = t
	}
	der, err := x509.CreateCertificate(rand.Reader, t, parent, key, signer)
	if err != nil {
		return nil, err
	}
	return x509.ParseCertificate(der)
}

// newSerial has 127 random bits, so that it is positive in 16 bytes.
func newSerial() (*big.Int, error) {
	return rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127))
}
