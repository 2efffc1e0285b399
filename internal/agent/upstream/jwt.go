package upstream

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/rsa"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"

	"github.com/go-jose/go-jose/v4"
	"github.com/spiffe/go-spiffe/v2/bundle/jwtbundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"

	"github.com/rootlink/rootlink/pkg/svid"
)

// Bundle is what verifies the SVIDs of another trust domain.
type Bundle struct {
	X509 []*x509.Certificate
	JWT  JWTKeys
}

// Equal says whether both hold the same.
func (b Bundle) Equal(o Bundle) bool {
	return slices.EqualFunc(b.X509, o.X509, (*x509.Certificate).Equal) && b.JWT.Equal(o.JWT)
}

// JWTKey verifies JWT-SVIDs.
type JWTKey struct {
	Public crypto.PublicKey // *ecdsa.PublicKey or *rsa.PublicKey
	// Tainted: the authority is being withdrawn; what it signed is to be
	// replaced.
	Tainted bool
}

// JWTKeys are a trust domain's by key ID. They are never changed.
type JWTKeys map[string]JWTKey

// Equal says whether both hold the same.
func (k JWTKeys) Equal(o JWTKeys) bool {
	return maps.EqualFunc(k, o, func(a, b JWTKey) bool {
		e, ok := a.Public.(interface{ Equal(crypto.PublicKey) bool })
		return ok && e.Equal(b.Public) && a.Tainted == b.Tainted
	})
}

// Bundle returns the keys as go-spiffe wants them.
func (k JWTKeys) Bundle(td spiffeid.TrustDomain) *jwtbundle.Bundle {
	m := make(map[string]crypto.PublicKey, len(k))
	for id, key := range k {
		m[id] = key.Public
	}
	return jwtbundle.FromJWTAuthorities(td, m)
}

// JWKS is the plain JWK Set of RFC 7517, in the order of key IDs.
func (k JWTKeys) JWKS() ([]byte, error) {
	set := jose.JSONWebKeySet{Keys: make([]jose.JSONWebKey, 0, len(k))}
	for _, id := range slices.Sorted(maps.Keys(k)) {
		set.Keys = append(set.Keys, jose.JSONWebKey{Key: k[id].Public, KeyID: id})
	}
	return json.Marshal(set)
}

// Bounds on RSA keys of JWT authorities, in bits: SPIRE makes such of 2048 and
// 4096, and checking a signature costs the square of the size.
const minRSA, maxRSA = 2048, 8192

// jwtKeys reads the JWT authorities of a bundle. One that no algorithm of a
// JWT-SVID goes with verifies nothing, and is left out.
func jwtKeys(b *types.Bundle) (JWTKeys, error) {
	keys := make(JWTKeys, len(b.GetJwtAuthorities()))
	for _, a := range b.GetJwtAuthorities() {
		if a.GetKeyId() == "" {
			return nil, errors.New("bundle: a JWT authority has no key ID")
		}
		if _, ok := keys[a.GetKeyId()]; ok {
			return nil, fmt.Errorf("bundle: two JWT authorities have the key ID %q", a.GetKeyId())
		}
		pub, err := x509.ParsePKIXPublicKey(a.GetPublicKey())
		if err != nil {
			return nil, fmt.Errorf("bundle: JWT authority %q: %w", a.GetKeyId(), err)
		}
		switch p := pub.(type) {
		case *ecdsa.PublicKey:
		case *rsa.PublicKey:
			if n := p.N.BitLen(); n < minRSA || n > maxRSA {
				continue
			}
		default:
			continue
		}
		keys[a.GetKeyId()] = JWTKey{pub, a.GetTainted()}
	}
	return keys, nil
}

// JWT asks for a JWT-SVID of an entry. What comes back is not verified.
func (s *Session) JWT(ctx context.Context, entryID string, audience []string) (string, error) {
	resp, err := svidv1.NewSVIDClient(s.conn).NewJWTSVID(ctx, &svidv1.NewJWTSVIDRequest{EntryId: entryID, Audience: audience})
	if err != nil {
		return "", err
	}
	token := resp.GetSvid().GetToken()
	if token == "" || len(token) > svid.MaxJWT {
		return "", fmt.Errorf("server sent a JWT-SVID of %d bytes", len(token))
	}
	return token, nil
}
