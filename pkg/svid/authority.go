package svid

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/hex"
	"fmt"
	"math/big"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Times around issuance.
const (
	// Backdate is how far notBefore lies in the past, for peers whose clock is
	// behind ours. Verifiers of evidence know it (attest.NonceBackdate).
	Backdate = 10 * time.Second
	// authorityBackdate is larger, so that every backdated SVID lies within
	// its authority's validity.
	authorityBackdate = time.Minute
	// MaxIssuerTTL bounds the life of a key that signs one statement.
	MaxIssuerTTL = 10 * time.Minute
)

// NewAuthority makes a self-signed X.509 authority for td that is valid from
// now for lifetime. Its subject is unique, because several authorities of one
// trust domain stand side by side in bundles and verifiers look them up by name.
func NewAuthority(td spiffeid.TrustDomain, key crypto.Signer, now time.Time, lifetime time.Duration) (*x509.Certificate, error) {
	if td.IsZero() {
		return nil, fmt.Errorf("%w: no trust domain", ErrRequest)
	}
	if lifetime < time.Second {
		return nil, fmt.Errorf("%w: authority lifetime of %v", ErrRequest, lifetime)
	}
	pub, ok := key.Public().(*ecdsa.PublicKey)
	if !ok || pub.Curve != elliptic.P256() {
		return nil, fmt.Errorf("%w: an authority's key is ECDSA P-256", ErrRequest)
	}
	spki, err := x509.MarshalPKIXPublicKey(pub)
	if err != nil {
		return nil, fmt.Errorf("%w: public key: %w", ErrRequest, err)
	}
	ski, err := subjectKeyID(spki)
	if err != nil {
		return nil, err
	}
	serial := newSerial()
	template := &x509.Certificate{
		SerialNumber: serial,
		Subject: pkix.Name{
			Organization: []string{"rootlink"},
			CommonName:   "X.509 authority",
			SerialNumber: hex.EncodeToString(serial.Bytes()),
		},
		NotBefore:             now.Add(-authorityBackdate),
		NotAfter:              now.Add(lifetime),
		BasicConstraintsValid: true,
		IsCA:                  true,
		MaxPathLenZero:        true, // SVIDs only, no intermediates
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
		SubjectKeyId:          ski,
		AuthorityKeyId:        ski,
	}
	template.URIs = append(template.URIs, td.ID().URL())
	der, err := x509.CreateCertificate(rand.Reader, template, template, pub, key)
	if err != nil {
		return nil, fmt.Errorf("svid: sign authority: %w", err)
	}
	return x509.ParseCertificate(der)
}

// AuthorityID names an authority: the lower-case hex of its subject key ID.
func AuthorityID(c *x509.Certificate) string { return hex.EncodeToString(c.SubjectKeyId) }

// subjectKeyID is method 1 of RFC 7093 §2: the leftmost 160 bits of the
// SHA-256 of the key's bits.
func subjectKeyID(spki []byte) ([]byte, error) {
	var info struct {
		Algorithm pkix.AlgorithmIdentifier
		Key       asn1.BitString
	}
	if rest, err := asn1.Unmarshal(spki, &info); err != nil || len(rest) != 0 {
		return nil, fmt.Errorf("%w: malformed public key", ErrRequest)
	}
	sum := sha256.Sum256(info.Key.RightAlign())
	return sum[:20], nil
}

// newSerial returns 127 random bits, never zero (RFC 5280 §4.1.2.2 wants a
// positive number of at most 20 octets).
func newSerial() *big.Int {
	for {
		var b [16]byte
		rand.Read(b[:]) // never fails
		b[0] &= 0x7f
		if n := new(big.Int).SetBytes(b[:]); n.Sign() > 0 {
			return n
		}
	}
}

// KeyHash is SHA-256 of the SubjectPublicKeyInfo DER: how evidence names a key.
func KeyHash(spki []byte) [32]byte { return sha256.Sum256(spki) }
