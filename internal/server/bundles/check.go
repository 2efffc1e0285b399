package bundles

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rsa"
	"crypto/x509"
	"errors"
	"fmt"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"

	"github.com/rootlink/rootlink/internal/store"
)

// Limits on a bundle. Agents fetch each whole, and hand it to workloads in one
// message with those of all others.
const (
	maxAuthorities = 256
	maxBundle      = 512 << 10 // bytes of certificates and keys
	maxKeyID       = 1024
	minRSABits     = 2048
)

// maxTrustDomain is the SPIFFE specification's limit, in bytes.
const maxTrustDomain = 255

// errBundle means that a bundle as sent cannot be.
var errBundle = errors.New("failed to convert bundle")

func badBundle(format string, args ...any) error {
	return fmt.Errorf("%w: "+format, append([]any{errBundle}, args...)...)
}

// TrustDomain reads the name of a trust domain, which SPIRE's clients also
// write as an ID.
func TrustDomain(name string) (spiffeid.TrustDomain, error) {
	if len(name) > maxTrustDomain+len("spiffe://") {
		return spiffeid.TrustDomain{}, fmt.Errorf("trust domain name of %d bytes, at most %d allowed", len(name), maxTrustDomain)
	}
	td, err := spiffeid.TrustDomainFromString(name)
	if err == nil && len(td.Name()) > maxTrustDomain {
		err = fmt.Errorf("trust domain name of %d bytes, at most %d allowed", len(td.Name()), maxTrustDomain)
	}
	return td, err
}

// fromProto checks a bundle, of which only the fields that mask names count.
// own are the keys of this trust domain, as SPKI: in another's bundle they would
// let this server speak for it, and only a mistake or a fraud puts them there.
func fromProto(p *types.Bundle, mask *types.BundleMask, own [][]byte) (*store.FederatedBundle, error) {
	b := new(store.FederatedBundle)
	if n := len(p.X509Authorities) + len(p.JwtAuthorities); n > maxAuthorities {
		return nil, badBundle("%d authorities, at most %d allowed", n, maxAuthorities)
	}
	size := 0
	if mask.X509Authorities {
		for _, c := range p.X509Authorities {
			der := c.GetAsn1()
			if size += len(der); size > maxBundle {
				return nil, badBundle("more than %d bytes", maxBundle)
			}
			if err := checkAuthority(der, own); err != nil {
				return nil, badBundle("unable to parse X.509 authority: %w", err)
			}
			b.X509Authorities = append(b.X509Authorities, der)
		}
	}
	if mask.JwtAuthorities {
		seen := make(map[string]bool)
		for _, k := range p.JwtAuthorities {
			if size += len(k.GetPublicKey()) + len(k.GetKeyId()); size > maxBundle {
				return nil, badBundle("more than %d bytes", maxBundle)
			}
			if err := checkJWTKey(k, own); err != nil {
				return nil, badBundle("unable to parse JWT authority: %w", err)
			}
			if seen[k.KeyId] {
				return nil, badBundle("two JWT authorities have the key ID %q", k.KeyId)
			}
			seen[k.KeyId] = true
			b.JWTAuthorities = append(b.JWTAuthorities, store.FederatedJWTKey{ID: k.KeyId, PublicKey: k.PublicKey, ExpiresAt: k.ExpiresAt})
		}
	}
	if mask.RefreshHint {
		if p.RefreshHint < 0 {
			return nil, badBundle("refresh hint is negative")
		}
		b.RefreshHint = p.RefreshHint
	}
	if mask.SequenceNumber {
		b.Sequence = p.SequenceNumber
	}
	return b, nil
}

// checkAuthority: one certificate, that of an authority. A leaf among roots
// would be a trust anchor for itself, for whoever holds its key.
func checkAuthority(der []byte, own [][]byte) error {
	c, err := x509.ParseCertificate(der)
	if err != nil {
		return err
	}
	if !c.BasicConstraintsValid || !c.IsCA {
		return errors.New("the certificate is not that of an authority (CA:TRUE)")
	}
	if err := checkKey(c.PublicKey); err != nil {
		return err
	}
	return notOwn(c.RawSubjectPublicKeyInfo, own)
}

func checkJWTKey(k *types.JWTKey, own [][]byte) error {
	key, err := x509.ParsePKIXPublicKey(k.GetPublicKey())
	if err != nil {
		return err
	}
	switch {
	case k.KeyId == "":
		return errors.New("missing key ID")
	case len(k.KeyId) > maxKeyID:
		return fmt.Errorf("key ID of %d bytes, at most %d allowed", len(k.KeyId), maxKeyID)
	case k.ExpiresAt < 0:
		return errors.New("expiry is negative")
	}
	if err := checkKey(key); err != nil {
		return err
	}
	return notOwn(k.PublicKey, own)
}

func checkKey(key any) error {
	switch k := key.(type) {
	case *ecdsa.PublicKey, ed25519.PublicKey:
		return nil
	case *rsa.PublicKey:
		if n := k.N.BitLen(); n < minRSABits {
			return fmt.Errorf("RSA key of %d bits, at least %d needed", n, minRSABits)
		}
		return nil
	}
	return fmt.Errorf("key of type %T verifies nothing here", key)
}

func notOwn(spki []byte, own [][]byte) error {
	for _, o := range own {
		if bytes.Equal(spki, o) {
			return errors.New("it is an authority of this very trust domain")
		}
	}
	return nil
}

// toProto returns the fields of b that mask names; the trust domain always.
func toProto(b *store.FederatedBundle, mask *types.BundleMask) *types.Bundle {
	mask = orAll(mask)
	p := &types.Bundle{TrustDomain: b.TrustDomain}
	if mask.X509Authorities {
		for _, der := range b.X509Authorities {
			p.X509Authorities = append(p.X509Authorities, &types.X509Certificate{Asn1: der})
		}
	}
	if mask.JwtAuthorities {
		for _, k := range b.JWTAuthorities {
			p.JwtAuthorities = append(p.JwtAuthorities, &types.JWTKey{PublicKey: k.PublicKey, KeyId: k.ID, ExpiresAt: k.ExpiresAt})
		}
	}
	if mask.RefreshHint {
		p.RefreshHint = b.RefreshHint
	}
	if mask.SequenceNumber {
		p.SequenceNumber = b.Sequence
	}
	return p
}

func orAll(mask *types.BundleMask) *types.BundleMask {
	if mask == nil {
		return &types.BundleMask{X509Authorities: true, JwtAuthorities: true, RefreshHint: true, SequenceNumber: true}
	}
	return mask
}
