// Package attestca holds the attestation CA. Its certificates say one thing:
// this AK and this EK live in one TPM, and the EK was accepted so. An offline
// verifier has to take that on our word, because only a live TPM can show it.
//
// The key is never the SVID authority's: whoever steals that one can mint
// identities, but no hardware to go with them.
package attestca

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"errors"
	"fmt"
	"math/big"
	"slices"
	"time"

	"github.com/rootlink/rootlink/pkg/attest"
	"github.com/rootlink/rootlink/pkg/tlog"
)

const (
	// Lifetime of a CA that we make. It bounds nothing by itself: AK
	// certificates live for a day, and what they sealed is judged at its own
	// time.
	Lifetime = 10 * 365 * 24 * time.Hour

	// AKLifetime is the validity of an AK certificate; each re-attestation
	// makes a new one, which is how a ban takes effect.
	AKLifetime = 24 * time.Hour

	// Backdate of what we sign, for clocks of agents and verifiers that are a
	// little slow.
	Backdate = 10 * time.Second

	// maxChain bounds the certificates in an operator's file.
	maxChain = 5
)

// oidAIK is tcg-kp-AIKCertificate.
var oidAIK = asn1.ObjectIdentifier{2, 23, 133, 8, 3}

// Errors that callers branch on.
var (
	ErrExpired     = errors.New("attestation CA certificate is not valid at this time")
	ErrKeyMismatch = errors.New("attestation CA key does not belong to its certificate")
	ErrNotCA       = errors.New("not usable as an attestation CA")
)

// CA signs AK certificates.
type CA struct {
	key   *ecdsa.PrivateKey
	cert  *x509.Certificate
	chain []*x509.Certificate // cert first, then what certifies it
}

// Certificate returns the certificate whose key signs AK certificates. It goes
// into trust.json.
func (c *CA) Certificate() *x509.Certificate { return c.cert }

// Chain returns Certificate and what an operator's file holds above it.
func (c *CA) Chain() []*x509.Certificate { return slices.Clone(c.chain) }

// ChainDER is Chain as an agent gets it.
func (c *CA) ChainDER() [][]byte {
	var out [][]byte
	for _, cert := range c.chain {
		out = append(out, cert.Raw)
	}
	return out
}

// newCA checks that key and chain can do the work, at time now.
func newCA(key *ecdsa.PrivateKey, chain []*x509.Certificate, now time.Time) (*CA, error) {
	cert := chain[0]
	pub, ok := cert.PublicKey.(*ecdsa.PublicKey)
	switch {
	case !ok || !pub.Equal(&key.PublicKey):
		return nil, ErrKeyMismatch
	case pub.Curve != elliptic.P256() && pub.Curve != elliptic.P384():
		return nil, fmt.Errorf("%w: its key is neither P-256 nor P-384", ErrNotCA)
	case !cert.BasicConstraintsValid || !cert.IsCA:
		return nil, fmt.Errorf("%w: its certificate lacks CA:TRUE", ErrNotCA)
	case cert.KeyUsage&x509.KeyUsageCertSign == 0:
		return nil, fmt.Errorf("%w: its certificate lacks the key usage keyCertSign", ErrNotCA)
	case len(cert.UnhandledCriticalExtensions) > 0:
		return nil, fmt.Errorf("%w: its certificate has the unknown critical extension %v", ErrNotCA, cert.UnhandledCriticalExtensions[0])
	case len(cert.SubjectKeyId) == 0:
		return nil, fmt.Errorf("%w: its certificate has no subject key identifier", ErrNotCA)
	case !allowsAIK(cert):
		return nil, fmt.Errorf("%w: its extended key usage does not allow AK certificates (%v)", ErrNotCA, oidAIK)
	case now.Before(cert.NotBefore) || now.After(cert.NotAfter):
		return nil, fmt.Errorf("%w: valid from %s to %s", ErrExpired, cert.NotBefore.Format(time.RFC3339), cert.NotAfter.Format(time.RFC3339))
	}
	for i, child := range chain[:len(chain)-1] {
		if err := child.CheckSignatureFrom(chain[i+1]); err != nil {
			return nil, fmt.Errorf("%w: certificate %d in its file is not signed by certificate %d: %w", ErrNotCA, i+1, i+2, err)
		}
	}
	return &CA{key: key, cert: cert, chain: chain}, nil
}

// allowsAIK: a CA that restricts its extended key usage restricts what it signs.
func allowsAIK(c *x509.Certificate) bool {
	if len(c.ExtKeyUsage) == 0 && len(c.UnknownExtKeyUsage) == 0 {
		return true
	}
	return slices.Contains(c.ExtKeyUsage, x509.ExtKeyUsageAny) ||
		slices.ContainsFunc(c.UnknownExtKeyUsage, oidAIK.Equal)
}

// selfSign makes the certificate of a new CA.
func selfSign(key *ecdsa.PrivateKey, now time.Time) (*x509.Certificate, error) {
	serial, err := newSerial()
	if err != nil {
		return nil, err
	}
	notBefore := now.Add(-Backdate).UTC().Truncate(time.Second)
	template := &x509.Certificate{
		SerialNumber: serial,
		// Two CAs with one name make path building a matter of luck, so the
		// name has a part that is never used twice.
		Subject: pkix.Name{
			Organization: []string{"rootlink"},
			CommonName:   "rootlink attestation CA",
			SerialNumber: fmt.Sprintf("%x", serial),
		},
		NotBefore:             notBefore,
		NotAfter:              notBefore.Add(Lifetime),
		KeyUsage:              x509.KeyUsageCertSign,
		BasicConstraintsValid: true,
		IsCA:                  true,
		MaxPathLenZero:        true,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return nil, err
	}
	return x509.ParseCertificate(der)
}

// newSerial returns 127 random bits that are never zero.
func newSerial() (*big.Int, error) {
	b := make([]byte, 16)
	if _, err := rand.Read(b); err != nil {
		return nil, err
	}
	b[0] = b[0]&0x7f | 0x40
	return new(big.Int).SetBytes(b), nil
}

// SignAK certifies that the AK with public key akPublic and the EK of s live in
// one TPM. The caller has just seen that by credential activation. What comes
// back has been read again: a certificate that a verifier would refuse is an
// error here, not there.
//
// A verifier judges the EK's chain at the notBefore of the AK certificate, so
// the backdating never goes behind what that chain is made of (above): the EK
// certificate of a TPM that was made a moment ago would not hold there.
func (c *CA) SignAK(s attest.AKStatement, akPublic crypto.PublicKey, now time.Time, above ...*x509.Certificate) (*x509.Certificate, error) {
	notBefore := now.Add(-Backdate).UTC().Truncate(time.Second)
	for _, a := range append(slices.Clip(above), c.cert) {
		if a.NotBefore.After(notBefore) && !a.NotBefore.After(now) {
			notBefore = a.NotBefore.UTC()
		}
	}
	notAfter := notBefore.Add(AKLifetime)
	if notAfter.After(c.cert.NotAfter) {
		notAfter = c.cert.NotAfter
	}
	if now.Before(c.cert.NotBefore) || !now.Before(notAfter) {
		return nil, fmt.Errorf("sign AK certificate: %w", ErrExpired)
	}
	template, err := attest.AKTemplate(s, notBefore, notAfter)
	if err != nil {
		return nil, fmt.Errorf("sign AK certificate: %w", err)
	}
	if template.SerialNumber, err = newSerial(); err != nil {
		return nil, fmt.Errorf("sign AK certificate: %w", err)
	}
	der, err := x509.CreateCertificate(rand.Reader, template, c.cert, akPublic, c.key)
	if err != nil {
		return nil, fmt.Errorf("sign AK certificate: %w", err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, fmt.Errorf("sign AK certificate: %w", err)
	}
	if err := c.reread(cert, s); err != nil {
		return nil, fmt.Errorf("sign AK certificate: the result does not verify: %w", err)
	}
	return cert, nil
}

func (c *CA) reread(cert *x509.Certificate, s attest.AKStatement) error {
	if err := cert.CheckSignatureFrom(c.cert); err != nil {
		return err
	}
	got, err := attest.ParseAKCertificate(cert)
	if err != nil {
		return err
	}
	if got.EKHash != s.EKHash || got.EKBasis != s.EKBasis || got.EKRoot != s.EKRoot ||
		!bytes.Equal(got.AKName, s.AKName) || got.Software != s.Software {
		return errors.New("it says something else than it was made to say")
	}
	return nil
}

// LogEntry returns the body under which the CA's own certificate, or one that
// it issued, goes into a transparency log. The CA signs no other.
func (c *CA) LogEntry(cert *x509.Certificate) ([]byte, error) {
	if !cert.Equal(c.cert) {
		if err := cert.CheckSignatureFrom(c.cert); err != nil {
			return nil, fmt.Errorf("log entry: not by this CA: %w", err)
		}
	}
	digest := sha256.Sum256(cert.Raw)
	sig, err := c.key.Sign(rand.Reader, digest[:], crypto.SHA256)
	if err != nil {
		return nil, fmt.Errorf("log entry: %w", err)
	}
	return tlog.CertificateBody(cert, sig, c.cert)
}
