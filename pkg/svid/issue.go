package svid

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/x509"
	"fmt"
	"math/big"
	"slices"
	"sync/atomic"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/rootlink/rootlink/pkg/attest"
)

// Signer issues SVIDs under one authority.
type Signer struct {
	td        spiffeid.TrustDomain
	authority *x509.Certificate
	key       crypto.Signer
}

// NewSigner returns a Signer for an authority of td and its key.
func NewSigner(td spiffeid.TrustDomain, authority *x509.Certificate, key crypto.Signer) (*Signer, error) {
	pub, ok := key.Public().(*ecdsa.PublicKey)
	if !ok || !pub.Equal(authority.PublicKey) {
		return nil, fmt.Errorf("%w: the key is not that of its certificate", ErrAuthority)
	}
	if !authority.IsCA || authority.KeyUsage&x509.KeyUsageCertSign == 0 || len(authority.SubjectKeyId) == 0 {
		return nil, fmt.Errorf("%w: the certificate is not that of an authority", ErrAuthority)
	}
	if len(authority.URIs) != 1 || authority.URIs[0].String() != td.IDString() {
		return nil, fmt.Errorf("%w: the certificate is not of trust domain %q", ErrAuthority, td.Name())
	}
	return &Signer{td, authority, key}, nil
}

// Authority returns the certificate that verifies what s signs.
func (s *Signer) Authority() *x509.Certificate { return s.authority }

// Token is one validated request. It is redeemed once, by the Signer that
// made it, and has no other use.
type Token struct {
	by       *Signer
	used     atomic.Bool
	template *x509.Certificate
	pub      crypto.PublicKey
	id       spiffeid.ID
}

// SVID is a signed certificate.
type SVID struct {
	DER       []byte
	ID        spiffeid.ID
	Serial    *big.Int
	NotBefore time.Time
	NotAfter  time.Time
}

// Prepare validates everything about r and returns a token for it. The life of
// the SVID ends with its authority's at the latest.
func (s *Signer) Prepare(r Request) (*Token, error) {
	if err := checkRequest(&r, s.td); err != nil {
		return nil, err
	}
	ttl := r.TTL
	if r.Profile == Issuer {
		ttl = min(ttl, MaxIssuerTTL)
	}
	// Whole seconds, rounded down: what a certificate can hold.
	now := r.Now.UTC().Truncate(time.Second)
	notBefore, notAfter := now.Add(-Backdate), now.Add(ttl).Truncate(time.Second)
	if notBefore.Before(s.authority.NotBefore) {
		return nil, fmt.Errorf("%w: at %s it is not valid before %s; is the clock right?", ErrAuthority,
			now.Format(time.RFC3339), s.authority.NotBefore.Format(time.RFC3339))
	}
	if notAfter.After(s.authority.NotAfter) {
		notAfter = s.authority.NotAfter
	}
	if !notAfter.After(now) {
		return nil, fmt.Errorf("%w: it ended %s", ErrAuthority, s.authority.NotAfter.Format(time.RFC3339))
	}
	// Evidence names the key by its bytes in the CSR; the certificate must hold
	// those same bytes.
	spki, err := x509.MarshalPKIXPublicKey(r.PublicKey)
	if err != nil {
		return nil, fmt.Errorf("%w: public key: %w", ErrRequest, err)
	}
	if !bytes.Equal(spki, r.SPKI) {
		return nil, fmt.Errorf("%w: the public key is not in its canonical encoding", ErrRequest)
	}
	ski, err := subjectKeyID(spki)
	if err != nil {
		return nil, err
	}
	t := &x509.Certificate{
		SerialNumber:          newSerial(),
		NotBefore:             notBefore,
		NotAfter:              notAfter,
		KeyUsage:              x509.KeyUsageDigitalSignature,
		ExtKeyUsage:           r.Profile.usages(),
		BasicConstraintsValid: true,
		DNSNames:              r.DNSNames,
		SubjectKeyId:          ski,
		AuthorityKeyId:        s.authority.SubjectKeyId,
	}
	t.URIs = append(t.URIs, r.ID.URL())
	t.Subject = r.Subject()
	if r.Composed != nil {
		t.Subject, t.ExtraExtensions = r.Composed.Subject, slices.Clone(r.Composed.Extensions)
	}
	if r.Evidence != nil {
		if err := addEvidence(t, r.Evidence); err != nil {
			return nil, err
		}
	}
	if r.Parent != nil {
		if err := addParent(t, r.Parent, now); err != nil {
			return nil, err
		}
	}
	return &Token{by: s, template: t, pub: r.PublicKey, id: r.ID}, nil
}

// addEvidence puts the record into the template. A verifier without a server
// holds the record's nonce against notBefore, so an SVID outside that window
// would be refused for ever: it is refused here.
func addEvidence(t *x509.Certificate, e *Evidence) error {
	nonce := e.Verified.NonceTime()
	earliest, latest := nonce.Add(-attest.NonceBackdate), nonce.Add(attest.MaxSVIDAfterNonce)
	if t.NotBefore.Before(earliest) && !t.NotBefore.Add(time.Second).Before(earliest) {
		// A nonce has milliseconds and notBefore lost its own.
		t.NotBefore = t.NotBefore.Add(time.Second)
	}
	if t.NotBefore.Before(earliest) || t.NotBefore.After(latest) {
		return fmt.Errorf("%w: its nonce is of %s", ErrEvidence, nonce.UTC().Format(time.RFC3339))
	}
	ext, err := e.Record.Extension()
	if err != nil {
		return fmt.Errorf("%w: %w", ErrEvidence, err)
	}
	if ext.Critical {
		return fmt.Errorf("%w: the extension must not be critical", ErrEvidence)
	}
	t.ExtraExtensions = append(t.ExtraExtensions, ext)
	return nil
}

// addParent puts the record into the template. The SVID ends with the record's
// AK certificate: no signature could rest on it later.
func addParent(t *x509.Certificate, p *Parent, now time.Time) error {
	if until := p.Verified.Until(); t.NotAfter.After(until) {
		t.NotAfter = until
	}
	if !t.NotAfter.After(now) || now.Sub(p.Verified.AttestedAt()) > attest.MaxParentAge {
		return fmt.Errorf("%w: the node attested %s, which is too long ago", ErrEvidence, p.Verified.AttestedAt().UTC().Format(time.RFC3339))
	}
	ext, err := p.Verified.Extension(p.Policy)
	if err != nil {
		return fmt.Errorf("%w: %w", ErrEvidence, err)
	}
	t.ExtraExtensions = append(t.ExtraExtensions, ext)
	return nil
}

// Issue signs the SVID that t stands for.
func (s *Signer) Issue(t *Token) (*SVID, error) {
	if t == nil || t.by != s || !t.used.CompareAndSwap(false, true) {
		return nil, ErrTokenUsed
	}
	der, err := x509.CreateCertificate(rand.Reader, t.template, s.authority, t.pub, s.key)
	if err != nil {
		return nil, fmt.Errorf("svid: sign: %w", err)
	}
	return &SVID{
		DER:       der,
		ID:        t.id,
		Serial:    t.template.SerialNumber,
		NotBefore: t.template.NotBefore,
		NotAfter:  t.template.NotAfter,
	}, nil
}
