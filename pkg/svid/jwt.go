package svid

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/x509"
	"encoding/hex"
	"fmt"
	"time"
	"unicode/utf8"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Limits of JWT-SVIDs.
const (
	// DefaultJWTTTL is the life of a JWT-SVID that nobody asked more for. It is
	// a bearer token: whoever sees it has it.
	DefaultJWTTTL = 5 * time.Minute
	// MaxJWTTTL is the longest life of one. It also bounds how long a retired
	// authority has to stay in bundles.
	MaxJWTTTL = 24 * time.Hour
	// MaxAudiences is how many audiences a token may name, MaxAudience how many
	// bytes each of them may have. Each audience can pass the token on to the
	// others as if it were the workload.
	MaxAudiences = 16
	MaxAudience  = 1 << 10
	// MaxJWT bounds a token in bytes, of whoever made it. One with the longest
	// SPIFFE ID and all the audiences fits.
	MaxJWT = 32 << 10
)

// JWTStage is a JWT authority's part in the rotation.
type JWTStage struct {
	Stage
	RetiredAt time.Time // zero until then
}

// JWTNeeded says whether the authority belongs into bundles at now: always until
// it is retired, and then until the last token that it can have signed has ended.
func JWTNeeded(s JWTStage, now time.Time) bool {
	if !now.Before(s.NotAfter) {
		return false
	}
	return s.State != Retired || now.Before(s.RetiredAt.Add(MaxJWTTTL+JWTLeeway))
}

// JWTKeyID names a JWT authority: the lower-case hex of its key's identifier. It
// is a function of the key, so that no two keys have one name.
func JWTKeyID(key *ecdsa.PublicKey) (string, error) {
	spki, err := x509.MarshalPKIXPublicKey(key)
	if err != nil {
		return "", fmt.Errorf("%w: public key: %w", ErrRequest, err)
	}
	id, err := subjectKeyID(spki)
	if err != nil {
		return "", err
	}
	return hex.EncodeToString(id), nil
}

// JWTSigner issues JWT-SVIDs under one authority, which has a key and a window
// and no certificate.
type JWTSigner struct {
	td                  spiffeid.TrustDomain
	keyID               string
	notBefore, notAfter time.Time
	signer              jose.Signer
}

// NewJWTSigner returns a JWTSigner for td's authority with this key, which signs
// from notBefore on for tokens that end by notAfter.
func NewJWTSigner(td spiffeid.TrustDomain, key *ecdsa.PrivateKey, notBefore, notAfter time.Time) (*JWTSigner, error) {
	if td.IsZero() {
		return nil, fmt.Errorf("%w: no trust domain", ErrAuthority)
	}
	if key == nil || key.Curve != elliptic.P256() {
		return nil, fmt.Errorf("%w: a JWT authority's key is ECDSA P-256", ErrAuthority)
	}
	if !notAfter.After(notBefore) {
		return nil, fmt.Errorf("%w: it ends before it begins", ErrAuthority)
	}
	id, err := JWTKeyID(&key.PublicKey)
	if err != nil {
		return nil, err
	}
	signer, err := jose.NewSigner(
		jose.SigningKey{Algorithm: jose.ES256, Key: jose.JSONWebKey{Key: key, KeyID: id}},
		new(jose.SignerOptions).WithType("JWT"))
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrAuthority, err)
	}
	return &JWTSigner{td, id, notBefore, notAfter, signer}, nil
}

// KeyID is the authority's name, the kid of its tokens.
func (s *JWTSigner) KeyID() string { return s.keyID }

// NotAfter is when the authority ends.
func (s *JWTSigner) NotAfter() time.Time { return s.notAfter }

// JWTRequest asks for one JWT-SVID.
type JWTRequest struct {
	ID       spiffeid.ID
	Audience []string
	TTL      time.Duration // shortened to MaxJWTTTL and the authority's end
	Now      time.Time
	// Extra are claims added for a deployment's own ends, see CheckClaims.
	Extra map[string]any
}

// JWT is a signed JWT-SVID.
type JWT struct {
	Token    string
	ID       spiffeid.ID
	IssuedAt time.Time
	Expiry   time.Time
}

// Sign issues a JWT-SVID. It carries no evidence and is bound to no key: it says
// who asked for it, and whoever holds it may say the same.
func (s *JWTSigner) Sign(r JWTRequest) (*JWT, error) {
	now, end, err := s.Window(r)
	if err != nil {
		return nil, err
	}
	token := jwt.Signed(s.signer)
	if len(r.Extra) > 0 {
		if err := CheckClaims(r.Extra); err != nil {
			return nil, err
		}
		token = token.Claims(r.Extra)
	}
	text, err := token.Claims(jwt.Claims{
		Subject:  r.ID.String(),
		Audience: r.Audience,
		Expiry:   jwt.NewNumericDate(end),
		IssuedAt: jwt.NewNumericDate(now),
	}).Serialize()
	if err != nil {
		return nil, fmt.Errorf("svid: sign JWT: %w", err)
	}
	if len(r.Extra) > 0 {
		// What nobody can read must not leave.
		if _, err := ParseJWT(text); err != nil {
			return nil, fmt.Errorf("%w: with the claims added: %w", ErrRequest, err)
		}
	}
	return &JWT{Token: text, ID: r.ID, IssuedAt: now, Expiry: end}, nil
}

// Window checks a request, but for its Extra, and returns when the token will
// begin and end.
func (s *JWTSigner) Window(r JWTRequest) (now, end time.Time, err error) {
	fail := func(err error) (time.Time, time.Time, error) { return time.Time{}, time.Time{}, err }
	if r.Now.IsZero() {
		return fail(fmt.Errorf("%w: no time", ErrRequest))
	}
	if r.TTL <= 0 {
		return fail(fmt.Errorf("%w: TTL of %v", ErrRequest, r.TTL))
	}
	if err := checkID(&Request{Profile: Workload, ID: r.ID}, s.td); err != nil {
		return fail(err)
	}
	if err := CheckAudience(r.Audience); err != nil {
		return fail(err)
	}
	now = r.Now.UTC().Truncate(time.Second)
	if r.Now.Before(s.notBefore) {
		return fail(fmt.Errorf("%w: at %s it is not valid before %s; is the clock right?", ErrAuthority,
			now.Format(time.RFC3339), s.notBefore.UTC().Format(time.RFC3339)))
	}
	end = now.Add(min(r.TTL, MaxJWTTTL)).Truncate(time.Second)
	if end.After(s.notAfter) {
		end = s.notAfter.UTC().Truncate(time.Second)
	}
	if !end.After(now) {
		return fail(fmt.Errorf("%w: no whole second is left until %s", ErrAuthority, end.Format(time.RFC3339)))
	}
	return now, end, nil
}

// CheckAudience holds the audiences of a request against JWT-SVID §3.2 and our
// limits. A token without one would be good everywhere.
func CheckAudience(audience []string) error {
	if len(audience) == 0 {
		return fmt.Errorf("%w: no audience", ErrRequest)
	}
	if len(audience) > MaxAudiences {
		return fmt.Errorf("%w: %d audiences, at most %d allowed", ErrRequest, len(audience), MaxAudiences)
	}
	for _, a := range audience {
		switch {
		case a == "":
			return fmt.Errorf("%w: an audience is empty", ErrRequest)
		case len(a) > MaxAudience:
			return fmt.Errorf("%w: an audience of %d bytes, at most %d allowed", ErrRequest, len(a), MaxAudience)
		case !utf8.ValidString(a):
			return fmt.Errorf("%w: an audience is not UTF-8", ErrRequest)
		}
	}
	return nil
}
