package svid

import (
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/rootlink/rootlink/pkg/strictjson"
)

// JWTLeeway is how far a clock may be off for a token's times.
const JWTLeeway = 30 * time.Second

// Outcomes of looking at a token.
var (
	// ErrJWT means that it has not the form of a JWT-SVID.
	ErrJWT = errors.New("svid: not a JWT-SVID")
	// ErrJWTTime means that it is not valid at this time.
	ErrJWTTime = errors.New("svid: JWT-SVID is not valid at this time")
)

// UnverifiedJWT is what a token says that has the form of a JWT-SVID. Nobody has
// looked at its signature.
type UnverifiedJWT struct {
	ID        spiffeid.ID
	KeyID     string
	Audience  []string
	Expiry    time.Time
	IssuedAt  time.Time // zero when it does not say
	NotBefore time.Time // zero when it does not say
}

// ParseJWT reads a token as strictly as the JWT-SVID document has it, in its
// order, so that what a signature is then checked over can be read in one way
// only. It checks no signature.
func ParseJWT(token string) (*UnverifiedJWT, error) {
	if len(token) > MaxJWT {
		return nil, fmt.Errorf("%w: %d bytes, at most %d allowed", ErrJWT, len(token), MaxJWT)
	}
	// §1, §5.1: compact serialization, three parts. Neither JWS JSON (which has
	// unprotected headers) nor JWE (which has five).
	parts := strings.Split(token, ".")
	if len(parts) != 3 {
		return nil, fmt.Errorf("%w: not a JWS in compact serialization", ErrJWT)
	}
	var raw [3][]byte
	for i, p := range parts {
		var err error
		// Strict: the unused bits of the last letter are zero, or one token
		// would have several spellings. The decoder skips line ends.
		if raw[i], err = base64.RawURLEncoding.Strict().DecodeString(p); err != nil || strings.ContainsAny(p, "\r\n") {
			return nil, fmt.Errorf("%w: part %d is not base64url", ErrJWT, i+1)
		}
	}
	if len(raw[2]) == 0 {
		return nil, fmt.Errorf("%w: it is not signed", ErrJWT)
	}
	u := new(UnverifiedJWT)
	if err := u.header(raw[0]); err != nil {
		return nil, fmt.Errorf("%w: header: %w", ErrJWT, err)
	}
	if err := u.claims(raw[1]); err != nil {
		return nil, fmt.Errorf("%w: claims: %w", ErrJWT, err)
	}
	return u, nil
}

// JWTAlgorithms are those of JWT-SVID §2.1. No symmetric one is among them: a
// public key must never be taken for a shared secret.
func JWTAlgorithms() []string {
	return []string{"RS256", "RS384", "RS512", "ES256", "ES384", "ES512", "PS256", "PS384", "PS512"}
}

// object reads a JSON object without repeated keys (RFC 7515 §4, RFC 7519 §4).
func object(b []byte) (map[string]json.RawMessage, error) {
	if err := strictjson.Scan(b, MaxJWT, ""); err != nil {
		return nil, err
	}
	var m map[string]json.RawMessage
	if err := json.Unmarshal(b, &m); err != nil {
		return nil, err
	}
	return m, nil
}

func (u *UnverifiedJWT) header(b []byte) error {
	m, err := object(b)
	if err != nil {
		return err
	}
	var alg, typ string
	for name, v := range m {
		var into *string
		switch name {
		case "alg":
			into = &alg
		case "kid":
			into = &u.KeyID
		case "typ":
			into = &typ
		default:
			// §2: no other header. This refuses crit, jku, jwk, x5c and
			// whatever else would have a validator fetch or believe a key.
			return fmt.Errorf("%q has no place in it", name)
		}
		if err := text(v, into); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
	}
	if !slices.Contains(JWTAlgorithms(), alg) {
		return fmt.Errorf("algorithm %q is not one of a JWT-SVID", alg)
	}
	if _, there := m["typ"]; there && typ != "JWT" && typ != "JOSE" {
		return fmt.Errorf("type %q is neither JWT nor JOSE", typ)
	}
	// §2.2 has it optional. Without it a validator would have to try each key
	// there is; no server in use leaves it out.
	if u.KeyID == "" {
		return errors.New("no key ID")
	}
	return nil
}

func (u *UnverifiedJWT) claims(b []byte) error {
	m, err := object(b)
	if err != nil {
		return err
	}
	var sub string
	if err := text(m["sub"], &sub); err != nil {
		return fmt.Errorf("sub: %w", err)
	}
	if u.ID, err = spiffeid.FromString(sub); err != nil {
		return fmt.Errorf("sub: %w", err)
	}
	if u.ID.Path() == "" {
		return fmt.Errorf("sub: %q names a trust domain, no workload", sub)
	}
	if u.Audience, err = audiences(m["aud"]); err != nil {
		return fmt.Errorf("aud: %w", err)
	}
	if _, ok := m["exp"]; !ok {
		return errors.New("exp is missing")
	}
	for name, into := range map[string]*time.Time{"exp": &u.Expiry, "iat": &u.IssuedAt, "nbf": &u.NotBefore} {
		v, ok := m[name]
		if !ok {
			continue
		}
		if *into, err = numericDate(v); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
	}
	return nil
}

// text reads a string; null, which encoding/json takes for one, is none.
func text(v json.RawMessage, into *string) error {
	if len(v) == 0 {
		return errors.New("missing")
	}
	if v[0] != '"' {
		return errors.New("not a string")
	}
	return json.Unmarshal(v, into)
}

// audiences: RFC 7519 §4.1.3, one string or several.
func audiences(v json.RawMessage) ([]string, error) {
	if len(v) == 0 {
		return nil, errors.New("missing")
	}
	var list []json.RawMessage
	if v[0] != '[' {
		list = append(list, v)
	} else if err := json.Unmarshal(v, &list); err != nil {
		return nil, err
	}
	if len(list) == 0 {
		return nil, errors.New("empty")
	}
	out := make([]string, len(list))
	for i, v := range list {
		if err := text(v, &out[i]); err != nil {
			return nil, err
		}
		if out[i] == "" {
			return nil, errors.New("an audience is empty")
		}
	}
	return out, nil
}

// numericDate: RFC 7519 §2, seconds since 1970, here until the year 9999.
func numericDate(v json.RawMessage) (time.Time, error) {
	var f float64
	if v[0] == 'n' {
		return time.Time{}, errors.New("not a number")
	}
	if err := json.Unmarshal(v, &f); err != nil {
		return time.Time{}, errors.New("not a number")
	}
	const year10000 = 253402300800
	if !(f >= 0 && f < year10000) {
		return time.Time{}, fmt.Errorf("%v is not a date", f)
	}
	return time.Unix(int64(f), 0).UTC(), nil
}

// CheckTime holds the token's times against now (RFC 7519 §4.1.4 to §4.1.6).
func (u *UnverifiedJWT) CheckTime(now time.Time) error {
	at := func(t time.Time) string { return t.Format(time.RFC3339) }
	switch {
	case !now.Before(u.Expiry.Add(JWTLeeway)):
		return fmt.Errorf("%w: it expired %s", ErrJWTTime, at(u.Expiry))
	case now.Add(JWTLeeway).Before(u.NotBefore):
		return fmt.Errorf("%w: it begins %s", ErrJWTTime, at(u.NotBefore))
	case now.Add(JWTLeeway).Before(u.IssuedAt):
		return fmt.Errorf("%w: it was issued in the future, %s", ErrJWTTime, at(u.IssuedAt))
	}
	return nil
}
