package suite

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rsa"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"strings"

	"github.com/go-jose/go-jose/v4"
	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
)

// algorithms are those that a JWT-SVID may be signed with.
var algorithms = []jose.SignatureAlgorithm{
	jose.RS256, jose.RS384, jose.RS512, jose.ES256, jose.ES384, jose.ES512, jose.PS256, jose.PS384, jose.PS512,
}

var b64 = base64.RawURLEncoding

// token is one entry of a JWTSVIDResponse, read as far as it can be.
type token struct {
	*workload.JWTSVID
	name           string
	header, claims map[string]any
	err            error
}

var errNotCompact = errors.New("not three base64url parts")

func readToken(s string) (header, claims map[string]any, err error) {
	parts := strings.Split(s, ".")
	if len(parts) != 3 {
		return nil, nil, errNotCompact
	}
	for i, into := range []*map[string]any{&header, &claims} {
		raw, err := b64.Strict().DecodeString(parts[i])
		if err != nil {
			return nil, nil, fmt.Errorf("%w: %v", errNotCompact, err)
		}
		if err := json.Unmarshal(raw, into); err != nil {
			return nil, nil, err
		}
	}
	if sig, err := b64.Strict().DecodeString(parts[2]); err != nil || len(sig) == 0 {
		return nil, nil, fmt.Errorf("%w: no signature", errNotCompact)
	}
	return header, claims, nil
}

func (r *run) tokens() ([]token, error) {
	msg, err := r.jwtSVIDs()
	if err != nil || len(msg.GetSvids()) == 0 {
		return nil, notRun("no JWT-SVID was served")
	}
	var out []token
	for i, s := range msg.GetSvids() {
		t := token{JWTSVID: s, name: fmt.Sprintf("JWTSVIDResponse.svids[%d]", i)}
		t.header, t.claims, t.err = readToken(s.GetSvid())
		out = append(out, t)
	}
	return out, nil
}

// goodToken is one that the endpoint itself gave out, of the default identity.
func (r *run) goodToken() (string, error) {
	all, err := r.tokens()
	if err != nil {
		return "", err
	}
	return all[0].GetSvid(), nil
}

// good is that token in parts, to make bad ones of.
func (r *run) good() (parts []string, t token, err error) {
	all, err := r.tokens()
	if err != nil {
		return nil, t, err
	}
	if all[0].err != nil {
		return nil, t, notRun("see jwt-svid/5.1/compact-serialization")
	}
	return strings.Split(all[0].GetSvid(), "."), all[0], nil
}

// verifyKey is the key of the trust domain's JWT bundle that the token names.
func (r *run) verifyKey(t token) (jose.JSONWebKey, error) {
	msg, err := r.jwtBundles()
	if err != nil {
		return jose.JSONWebKey{}, notRun("no JWTBundlesResponse was sent")
	}
	var set jose.JSONWebKeySet
	if err := json.Unmarshal(msg.GetBundles()[trustDomainOf(t.GetSpiffeId())], &set); err != nil {
		return jose.JSONWebKey{}, fmt.Errorf("the bundle of %s: %w", trustDomainOf(t.GetSpiffeId()), err)
	}
	kid, _ := t.header["kid"].(string)
	for _, k := range set.Keys {
		if kid == "" || k.KeyID == kid {
			return k, nil
		}
	}
	return jose.JSONWebKey{}, fmt.Errorf("no key %q in the bundle of %s", kid, trustDomainOf(t.GetSpiffeId()))
}

// forge signs the claims with key, under the header's members: as an issuer
// would that holds the key.
func forge(key crypto.Signer, header, claims map[string]any) (string, error) {
	alg, err := algorithmOf(key)
	if err != nil {
		return "", err
	}
	o := &jose.SignerOptions{}
	for name, v := range header {
		if name != "alg" {
			o.WithHeader(jose.HeaderKey(name), v)
		}
	}
	s, err := jose.NewSigner(jose.SigningKey{Algorithm: alg, Key: key}, o)
	if err != nil {
		return "", err
	}
	return serialize(s, claims)
}

// forgeMAC is the classic confusion: the public key, which all know, as the
// secret of a symmetric algorithm.
func forgeMAC(secret []byte, header, claims map[string]any) (string, error) {
	kid, _ := header["kid"].(string)
	// go-jose refuses secrets shorter than the hash: zeros at the end do not
	// change an HMAC's key.
	const block = 64
	for len(secret) < block {
		secret = append(secret, 0)
	}
	s, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.HS256, Key: secret}, (&jose.SignerOptions{}).WithHeader("kid", kid).WithType("JWT"))
	if err != nil {
		return "", err
	}
	return serialize(s, claims)
}

func serialize(s jose.Signer, claims map[string]any) (string, error) {
	payload, err := json.Marshal(claims)
	if err != nil {
		return "", err
	}
	jws, err := s.Sign(payload)
	if err != nil {
		return "", err
	}
	return jws.CompactSerialize()
}

var errKeyKind = errors.New("not a key for JWT-SVIDs")

func algorithmOf(key crypto.Signer) (jose.SignatureAlgorithm, error) {
	switch k := key.Public().(type) {
	case *rsa.PublicKey:
		return jose.RS256, nil
	case *ecdsa.PublicKey:
		switch k.Curve {
		case elliptic.P256():
			return jose.ES256, nil
		case elliptic.P384():
			return jose.ES384, nil
		case elliptic.P521():
			return jose.ES512, nil
		}
	}
	return "", fmt.Errorf("%w: %T", errKeyKind, key.Public())
}

// publicForms are the ways in which a public key might be taken for a secret.
func publicForms(k jose.JSONWebKey) ([][]byte, error) {
	der, err := x509.MarshalPKIXPublicKey(k.Key)
	if err != nil {
		return nil, err
	}
	jwk, err := k.MarshalJSON()
	if err != nil {
		return nil, err
	}
	return [][]byte{der, pemOf(der), jwk}, nil
}
