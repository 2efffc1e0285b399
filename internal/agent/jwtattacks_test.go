package agent

import (
	"crypto/ecdsa"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	workloadpb "github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/rootlink/rootlink/pkg/svid"
)

// forgeToken signs any header and claims with key.
func forgeToken(t testing.TB, key *ecdsa.PrivateKey, header, claims map[string]any) string {
	t.Helper()
	signed := encode(t, header) + "." + encode(t, claims)
	return signed + "." + base64.RawURLEncoding.EncodeToString(es256(t, key, signed))
}

// attacks on a validator: each starts from a token that is good.
func TestRefusesForgedTokens(t *testing.T) {
	s, r := jwtServed(t)
	key, kid := s.jwt.key, s.jwt.published[0].KeyId
	now := time.Now().Unix()
	header := func(change map[string]any) map[string]any {
		return merge(map[string]any{"alg": "ES256", "kid": kid, "typ": "JWT"}, change)
	}
	claims := func(change map[string]any) map[string]any {
		return merge(map[string]any{"sub": "spiffe://" + testTD + "/w", "aud": []string{"a"}, "exp": now + 300, "iat": now}, change)
	}
	good := forgeToken(t, key, header(nil), claims(nil))
	if _, err := r.validate(t, "a", good); err != nil {
		t.Fatal(err)
	}
	other, otherPub := jwtKey(t)
	parts := strings.Split(good, ".")
	type m = map[string]any
	for name, token := range map[string]string{
		"wrong audience":               forgeToken(t, key, header(nil), claims(m{"aud": []string{"b"}})),
		"audience as a prefix":         forgeToken(t, key, header(nil), claims(m{"aud": []string{"ab"}})),
		"no audience":                  forgeToken(t, key, header(nil), claims(m{"aud": nil})),
		"empty audience":               forgeToken(t, key, header(nil), claims(m{"aud": []string{}})),
		"alg none":                     forgeToken(t, key, header(m{"alg": "none"}), claims(nil)),
		"alg none, unsigned":           encode(t, header(m{"alg": "none"})) + "." + parts[1] + ".",
		"HS256 with the public key":    hs256(t, s.jwt.published[0].PublicKey, header(m{"alg": "HS256"}), claims(nil)),
		"another algorithm's name":     forgeToken(t, key, header(m{"alg": "RS256"}), claims(nil)),
		"a larger curve's name":        forgeToken(t, key, header(m{"alg": "ES384"}), claims(nil)),
		"expired":                      forgeToken(t, key, header(nil), claims(m{"exp": now - 40, "iat": now - 300})),
		"not yet valid":                forgeToken(t, key, header(nil), claims(m{"nbf": now + 100})),
		"issued in the future":         forgeToken(t, key, header(nil), claims(m{"iat": now + 100})),
		"no expiry":                    forgeToken(t, key, header(nil), claims(m{"exp": nil})),
		"unknown key":                  forgeToken(t, other, header(m{"kid": otherPub.KeyId}), claims(nil)),
		"another key under our name":   forgeToken(t, other, header(nil), claims(nil)),
		"no key ID":                    forgeToken(t, key, header(m{"kid": nil}), claims(nil)),
		"another trust domain":         forgeToken(t, key, header(nil), claims(m{"sub": "spiffe://other.test/w"})),
		"subject is no SPIFFE ID":      forgeToken(t, key, header(nil), claims(m{"sub": "admin"})),
		"no subject":                   forgeToken(t, key, header(nil), claims(m{"sub": nil})),
		"typ of another kind of token": forgeToken(t, key, header(m{"typ": "at+jwt"}), claims(nil)),
		"crit":                         forgeToken(t, key, header(m{"crit": []string{"exp"}}), claims(nil)),
		"key in the header":            forgeToken(t, other, header(m{"jwk": jose.JSONWebKey{Key: other.Public(), KeyID: kid}}), claims(nil)),
		"oversized":                    forgeToken(t, key, header(nil), claims(m{"x": strings.Repeat("x", svid.MaxJWT)})),
		"changed claims":               parts[0] + "." + base64.RawURLEncoding.EncodeToString([]byte(`{"sub":"spiffe://`+testTD+`/admin","aud":["a"],"exp":9999999999}`)) + "." + parts[2],
		"cut":                          good[:len(good)-4],
		"not a token":                  "x",
	} {
		_, err := r.validate(t, "a", token)
		wantCode(t, name, err, codes.InvalidArgument)
		if n := len(status.Convert(err).Message()); n > 2000 {
			t.Errorf("%s: message of %d bytes", name, n)
		}
	}
	// Duplicated claims, correctly signed.
	double := base64.RawURLEncoding.EncodeToString([]byte(fmt.Sprintf(`{"alg":"ES256","kid":%q}`, kid))) + "." +
		base64.RawURLEncoding.EncodeToString([]byte(fmt.Sprintf(`{"sub":"spiffe://%s/admin","sub":"spiffe://%s/w","aud":["a"],"exp":%d}`, testTD, testTD, now+300)))
	_, err := r.validate(t, "a", double+"."+base64.RawURLEncoding.EncodeToString(es256(t, key, double)))
	wantCode(t, "duplicated claims", err, codes.InvalidArgument)
	// The key is withdrawn: what it signed is worth nothing at the next look.
	s.with(func() { s.jwt.published = nil })
	s.rotateJWT(true)
	eventually(t, "a token of a retired authority is refused", func() bool {
		_, err := r.validate(t, "a", good)
		return status.Code(err) == codes.InvalidArgument
	})
}

// A federated trust domain's tokens count for those whose entries federate with
// it, under its own name only, and its private claims are left out.
func TestRefusesTokensOfTrustDomainsThatAreNotOurs(t *testing.T) {
	s, r := jwtServed(t)
	key, pub := jwtKey(t)
	now := time.Now().Unix()
	foreign := func(sub string) string {
		return forgeToken(t, key, map[string]any{"alg": "ES256", "kid": pub.KeyId},
			map[string]any{"sub": sub, "aud": "a", "exp": now + 300, "admin": true})
	}
	// The server has the bundle, but no entry of the caller's names it.
	s.with(func() { s.jwt.foreign = map[string]*types.JWTKey{"other.test": pub} })
	_, err := r.validate(t, "a", foreign("spiffe://other.test/w"))
	wantCode(t, "not federated", err, codes.InvalidArgument)
	s.with(func() { s.entries[0].FederatesWith, s.entries[0].RevisionNumber = []string{"other.test"}, 1 })
	var got *workloadpb.ValidateJWTSVIDResponse
	eventually(t, "federated", func() bool {
		got, err = r.validate(t, "a", foreign("spiffe://other.test/w"))
		return err == nil
	})
	if claims := got.Claims.AsMap(); got.SpiffeId != "spiffe://other.test/w" || claims["admin"] != nil || fmt.Sprint(claims["aud"]) != "[a]" {
		t.Error(got)
	}
	_, err = r.validate(t, "a", foreign("spiffe://"+testTD+"/w"))
	wantCode(t, "a federated key for our name", err, codes.InvalidArgument)
	_, err = r.validate(t, "a", foreign("spiffe://third.test/w"))
	wantCode(t, "a federated key for a third name", err, codes.InvalidArgument)
	// The same key ID in both bundles: the subject's trust domain decides.
	s.with(func() {
		s.jwt.foreign = map[string]*types.JWTKey{"other.test": {PublicKey: pub.PublicKey, KeyId: s.jwt.published[0].KeyId}}
	})
	confused := forgeToken(t, key, map[string]any{"alg": "ES256", "kid": s.jwt.published[0].KeyId},
		map[string]any{"sub": "spiffe://" + testTD + "/w", "aud": "a", "exp": now + 300})
	for range 3 {
		_, err = r.validate(t, "a", confused)
		wantCode(t, "one key ID, two trust domains", err, codes.InvalidArgument)
	}
}

// What the server sends is checked before a workload has it.
func TestRefusesWrongJWTFromTheServer(t *testing.T) {
	s, r := jwtServed(t)
	for name, bend := range map[string]func(*svid.JWTRequest){
		"another identity": func(r *svid.JWTRequest) { r.ID = spiffeid.RequireFromString("spiffe://" + testTD + "/admin") },
		"another domain":   func(r *svid.JWTRequest) { r.ID = spiffeid.RequireFromString("spiffe://other.test/w") },
		"another audience": func(r *svid.JWTRequest) { r.Audience = []string{"everybody"} },
		"one more":         func(r *svid.JWTRequest) { r.Audience = append(slices.Clone(r.Audience), "everybody") },
		"expired":          func(r *svid.JWTRequest) { r.Now = r.Now.Add(-time.Hour) },
	} {
		s.with(func() { s.jwt.bend = bend })
		_, err := r.fetchJWT(t, "", name)
		wantCode(t, name, err, codes.Unavailable)
	}
	s.with(func() { s.jwt.bend = nil })
	s.rotateJWT(false) // signs with a key that no bundle has
	_, err := r.fetchJWT(t, "", "unpublished")
	wantCode(t, "unpublished key", err, codes.Unavailable)
	s.rotateJWT(true) // published after the agent's last look: it looks again
	if _, err := r.fetchJWT(t, "", "published"); err != nil {
		t.Error(err)
	}
	s.with(func() { s.jwt.denied = status.Error(codes.PermissionDenied, "not this one") })
	_, err = r.fetchJWT(t, "", "denied")
	wantCode(t, "refused", err, codes.PermissionDenied)
}

func merge(base, change map[string]any) map[string]any {
	for k, v := range change {
		if base[k] = v; v == nil {
			delete(base, k)
		}
	}
	return base
}

// es256 and hs256 sign as RFC 7518 §3.4 and §3.2 have it, whatever the text says.
func es256(t testing.TB, key *ecdsa.PrivateKey, text string) []byte {
	t.Helper()
	digest := sha256.Sum256([]byte(text))
	r, s, err := ecdsa.Sign(rand.Reader, key, digest[:])
	if err != nil {
		t.Fatal(err)
	}
	return append(r.FillBytes(make([]byte, 32)), s.FillBytes(make([]byte, 32))...)
}

func hs256(t testing.TB, secret []byte, header, claims map[string]any) string {
	t.Helper()
	text := encode(t, header) + "." + encode(t, claims)
	mac := hmac.New(sha256.New, secret)
	mac.Write([]byte(text))
	return text + "." + base64.RawURLEncoding.EncodeToString(mac.Sum(nil))
}

func encode(t testing.TB, v any) string {
	t.Helper()
	b, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return base64.RawURLEncoding.EncodeToString(b)
}
