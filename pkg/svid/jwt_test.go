package svid

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/base64"
	"encoding/json"
	"errors"
	"maps"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/spiffe/go-spiffe/v2/bundle/jwtbundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"

	"github.com/rootlink/rootlink/internal/forge"
)

func newJWTSigner(t testing.TB, key *ecdsa.PrivateKey, notBefore time.Time, life time.Duration) *JWTSigner {
	t.Helper()
	s, err := NewJWTSigner(td, key, notBefore, notBefore.Add(life))
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func jwtRequest(audience ...string) JWTRequest {
	return JWTRequest{ID: spiffeid.RequireFromPath(td, "/web"), Audience: audience, TTL: DefaultJWTTTL, Now: forge.Epoch()}
}

func signJWT(t testing.TB, s *JWTSigner, r JWTRequest) *JWT {
	t.Helper()
	out, err := s.Sign(r)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// parts decodes a token as no library does it.
func parts(t testing.TB, token string) (header, claims map[string]any) {
	t.Helper()
	p := strings.Split(token, ".")
	if len(p) != 3 {
		t.Fatalf("%d parts", len(p))
	}
	for i, m := range []*map[string]any{&header, &claims} {
		b, err := base64.RawURLEncoding.DecodeString(p[i])
		if err != nil {
			t.Fatal(err)
		}
		if err := json.Unmarshal(b, m); err != nil {
			t.Fatal(err)
		}
	}
	return header, claims
}

// raw makes a token of these JSON texts, signed by nobody.
func raw(header, claims string) string {
	e := base64.RawURLEncoding.EncodeToString
	return e([]byte(header)) + "." + e([]byte(claims)) + "." + e([]byte("signature"))
}

const (
	goodHeader = `{"alg":"ES256","kid":"k","typ":"JWT"}`
	goodClaims = `{"sub":"spiffe://example.org/web","aud":["a"],"exp":1700000000,"iat":1699999000}`
)

func refusesForms(t *testing.T, tokens map[string]string) {
	t.Helper()
	if _, err := ParseJWT(raw(goodHeader, goodClaims)); err != nil {
		t.Fatal("the good one:", err)
	}
	for name, token := range tokens {
		t.Run(name, func(t *testing.T) {
			if _, err := ParseJWT(token); !errors.Is(err, ErrJWT) {
				t.Fatal(err)
			}
		})
	}
}

// header and claims put one value into good ones.
func header(t testing.TB, name, value string) string {
	return raw(with(t, goodHeader, name, value), goodClaims)
}

func claim(t testing.TB, name, value string) string {
	return raw(goodHeader, with(t, goodClaims, name, value))
}

// with sets name to the JSON text value, or removes it.
func with(t testing.TB, object, name, value string) string {
	t.Helper()
	m := map[string]json.RawMessage{}
	if err := json.Unmarshal([]byte(object), &m); err != nil {
		t.Fatal(err)
	}
	if m[name] = json.RawMessage(value); value == "" {
		delete(m, name)
	}
	b, err := json.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// JWT-SVID §1, §5.1: JWS in compact serialization and nothing else.
func TestJWTSVIDSection1CompactSerialization(t *testing.T) {
	s := newJWTSigner(t, forge.P256(t), forge.Epoch(), time.Hour)
	out := signJWT(t, s, jwtRequest("a"))
	if _, err := jose.ParseSignedCompact(out.Token, []jose.SignatureAlgorithm{jose.ES256}); err != nil {
		t.Fatal(err)
	}
	good := strings.Split(raw(goodHeader, goodClaims), ".")
	refusesForms(t, map[string]string{
		"empty":            "",
		"JSON":             `{"payload":"` + good[1] + `","protected":"` + good[0] + `","signature":"` + good[2] + `"}`,
		"JWE":              strings.Join(append(slices.Clone(good), "a", "a"), "."),
		"detached payload": good[0] + ".." + good[2],
		"no signature":     good[0] + "." + good[1] + ".",
		"two parts":        good[0] + "." + good[1],
		"padding":          good[0] + "=." + good[1] + "." + good[2],
		"standard base64":  good[0] + "." + good[1] + ".+/+/",
		"line end":         good[0] + "\n." + good[1] + "." + good[2],
		"unused bits":      good[0] + "." + good[1] + ".YR",
	})
}

// JWT-SVID §2: no other header, registered or private.
func TestJWTSVIDSection2NoOtherHeaders(t *testing.T) {
	s := newJWTSigner(t, forge.P256(t), forge.Epoch(), time.Hour)
	h, _ := parts(t, signJWT(t, s, jwtRequest("a")).Token)
	if got := slices.Sorted(maps.Keys(h)); !slices.Equal(got, []string{"alg", "kid", "typ"}) {
		t.Error(got)
	}
	refusesForms(t, map[string]string{
		"crit":    header(t, "crit", `["exp"]`),
		"jku":     header(t, "jku", `"https://attacker.example/keys"`),
		"jwk":     header(t, "jwk", `{"kty":"oct","k":"AAAA"}`),
		"x5c":     header(t, "x5c", `["AAAA"]`),
		"b64":     header(t, "b64", `false`),
		"private": header(t, "x", `1`),
	})
}

// JWT-SVID §2.1, §4: alg is one of nine, looked at before anything else is done.
func TestJWTSVIDSection21Algorithm(t *testing.T) {
	s := newJWTSigner(t, forge.P256(t), forge.Epoch(), time.Hour)
	if h, _ := parts(t, signJWT(t, s, jwtRequest("a")).Token); h["alg"] != "ES256" {
		t.Error(h["alg"])
	}
	for _, alg := range []string{"RS256", "RS384", "RS512", "ES256", "ES384", "ES512", "PS256", "PS384", "PS512"} {
		if _, err := ParseJWT(header(t, "alg", `"`+alg+`"`)); err != nil {
			t.Error(alg, err)
		}
	}
	refusesForms(t, map[string]string{
		"none": header(t, "alg", `"none"`), "None": header(t, "alg", `"None"`), "empty": header(t, "alg", `""`),
		"HS256": header(t, "alg", `"HS256"`), "lower case": header(t, "alg", `"es256"`), "EdDSA": header(t, "alg", `"EdDSA"`),
		"missing": header(t, "alg", ``), "null": header(t, "alg", `null`), "list": header(t, "alg", `["ES256"]`),
	})
}

// JWT-SVID §2.2: kid is optional. Ours is there and names the key; a token
// without one is not taken, by go-spiffe neither.
func TestJWTSVIDSection22KeyID(t *testing.T) {
	key := forge.P256(t)
	s := newJWTSigner(t, key, forge.Epoch(), time.Hour)
	want, err := JWTKeyID(&key.PublicKey)
	if err != nil {
		t.Fatal(err)
	}
	if h, _ := parts(t, signJWT(t, s, jwtRequest("a")).Token); h["kid"] != want || s.KeyID() != want {
		t.Error(h["kid"], want)
	}
	if other, err := JWTKeyID(&forge.P256(t).PublicKey); err != nil || other == want {
		t.Error("two keys have one name", err)
	}
	refusesForms(t, map[string]string{"missing": header(t, "kid", ""), "empty": header(t, "kid", `""`), "number": header(t, "kid", `1`)})
}

// JWT-SVID §2.3: typ is absent, JWT or JOSE.
func TestJWTSVIDSection23Type(t *testing.T) {
	s := newJWTSigner(t, forge.P256(t), forge.Epoch(), time.Hour)
	if h, _ := parts(t, signJWT(t, s, jwtRequest("a")).Token); h["typ"] != "JWT" {
		t.Error(h["typ"])
	}
	for _, ok := range []string{`"JWT"`, `"JOSE"`, ``} {
		if _, err := ParseJWT(header(t, "typ", ok)); err != nil {
			t.Error(ok, err)
		}
	}
	refusesForms(t, map[string]string{
		"other": header(t, "typ", `"at+jwt"`), "lower case": header(t, "typ", `"jwt"`), "empty": header(t, "typ", `""`), "null": header(t, "typ", `null`),
	})
}

// JWT-SVID §3.1: sub is the SPIFFE ID of the workload.
func TestJWTSVIDSection31Subject(t *testing.T) {
	s := newJWTSigner(t, forge.P256(t), forge.Epoch(), time.Hour)
	if _, c := parts(t, signJWT(t, s, jwtRequest("a")).Token); c["sub"] != "spiffe://example.org/web" {
		t.Error(c["sub"])
	}
	refusesForms(t, map[string]string{
		"missing": claim(t, "sub", ""), "empty": claim(t, "sub", `""`), "null": claim(t, "sub", `null`), "list": claim(t, "sub", `["spiffe://example.org/web"]`),
		"not a SPIFFE ID": claim(t, "sub", `"web"`), "another scheme": claim(t, "sub", `"https://example.org/web"`),
		"query": claim(t, "sub", `"spiffe://example.org/web?x"`), "trust domain": claim(t, "sub", `"spiffe://example.org"`),
	})
}

// JWT-SVID §3.2, §4: aud is there and has a value.
func TestJWTSVIDSection32Audience(t *testing.T) {
	s := newJWTSigner(t, forge.P256(t), forge.Epoch(), time.Hour)
	if _, c := parts(t, signJWT(t, s, jwtRequest("a", "b")).Token); len(c["aud"].([]any)) != 2 {
		t.Error(c["aud"])
	}
	if u, err := ParseJWT(claim(t, "aud", `"one"`)); err != nil || !slices.Equal(u.Audience, []string{"one"}) {
		t.Error(u, err)
	}
	refusesForms(t, map[string]string{
		"missing": claim(t, "aud", ""), "none": claim(t, "aud", `[]`), "empty": claim(t, "aud", `""`), "an empty one": claim(t, "aud", `["a",""]`),
		"null": claim(t, "aud", `null`), "number": claim(t, "aud", `1`), "object": claim(t, "aud", `{"a":1}`), "list of numbers": claim(t, "aud", `[1]`),
	})
}

// JWT-SVID §3.3, §4: exp is there.
func TestJWTSVIDSection33ExpirationTime(t *testing.T) {
	s := newJWTSigner(t, forge.P256(t), forge.Epoch(), time.Hour)
	if _, c := parts(t, signJWT(t, s, jwtRequest("a")).Token); c["exp"].(float64)-c["iat"].(float64) != DefaultJWTTTL.Seconds() {
		t.Error(c["exp"], c["iat"])
	}
	refusesForms(t, map[string]string{
		"missing": claim(t, "exp", ""), "null": claim(t, "exp", `null`), "string": claim(t, "exp", `"1700000000"`),
		"negative": claim(t, "exp", `-1`), "beyond all dates": claim(t, "exp", `1e300`), "beyond numbers": claim(t, "exp", `1e999`),
	})
}

// RFC 7515 §4 and RFC 7519 §4: names are unique. Two parsers would take two
// different ones of two.
func TestRefusesDuplicatedClaims(t *testing.T) {
	refusesForms(t, map[string]string{
		"sub":               raw(goodHeader, strings.Replace(goodClaims, "{", `{"sub":"spiffe://example.org/admin",`, 1)),
		"exp":               raw(goodHeader, strings.Replace(goodClaims, "{", `{"exp":9999999999,`, 1)),
		"sub in upper case": raw(goodHeader, strings.Replace(goodClaims, "{", `{"SUB":"spiffe://example.org/admin",`, 1)),
		"alg":               raw(strings.Replace(goodHeader, "{", `{"alg":"none",`, 1), goodClaims),
		"trailing data":     raw(goodHeader, goodClaims+"{}"),
		"not UTF-8":         raw(goodHeader, strings.Replace(goodClaims, "{", "{\"x\":\"\xff\",", 1)),
		"too deep":          raw(goodHeader, strings.Replace(goodClaims, "{", `{"x":`+strings.Repeat("[", 10000)+strings.Repeat("]", 10000)+",", 1)),
		"no object":         raw(goodHeader, `[]`),
	})
}

func TestRefusesOversizedToken(t *testing.T) {
	refusesForms(t, map[string]string{"oversized": claim(t, "x", `"`+strings.Repeat("x", MaxJWT)+`"`)})
}

func TestRefusesTokenAtTheWrongTime(t *testing.T) {
	now := time.Unix(1699999500, 0)
	times := func(exp, iat, nbf string) error {
		u, err := ParseJWT(raw(goodHeader, with(t, with(t, with(t, goodClaims, "exp", exp), "iat", iat), "nbf", nbf)))
		if err != nil {
			t.Fatal(err)
		}
		return u.CheckTime(now)
	}
	for name, err := range map[string]error{
		"good": times("1699999600", "1699999400", "1699999400"), "no iat": times("1699999600", "", ""),
		"clocks differ": times("1699999475", "1699999525", "1699999525"),
	} {
		if err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	for name, err := range map[string]error{
		"expired": times("1699999400", "", ""), "just expired": times("1699999470", "", ""),
		"issued in the future": times("1699999900", "1699999600", ""), "not yet": times("1699999900", "", "1699999600"),
	} {
		if !errors.Is(err, ErrJWTTime) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestRefusesJWTRequests(t *testing.T) {
	s := newJWTSigner(t, forge.P256(t), forge.Epoch(), time.Hour)
	change := func(f func(*JWTRequest)) JWTRequest { r := jwtRequest("a"); f(&r); return r }
	for name, r := range map[string]JWTRequest{
		"no audience":          jwtRequest(),
		"empty audience":       jwtRequest("a", ""),
		"too many audiences":   jwtRequest(slices.Repeat([]string{"a"}, MaxAudiences+1)...),
		"long audience":        jwtRequest(strings.Repeat("a", MaxAudience+1)),
		"audience not UTF-8":   jwtRequest("\xff"),
		"no ID":                change(func(r *JWTRequest) { r.ID = spiffeid.ID{} }),
		"another trust domain": change(func(r *JWTRequest) { r.ID = spiffeid.RequireFromString("spiffe://example.com/web") }),
		"the trust domain":     change(func(r *JWTRequest) { r.ID = td.ID() }),
		"an agent":             change(func(r *JWTRequest) { r.ID = spiffeid.RequireFromPath(td, "/spire/agent/tpmnode/00") }),
		"the server":           change(func(r *JWTRequest) { r.ID = spiffeid.RequireFromPath(td, "/spire/server") }),
		"no TTL":               change(func(r *JWTRequest) { r.TTL = 0 }),
		"negative TTL":         change(func(r *JWTRequest) { r.TTL = -time.Second }),
		"no time":              change(func(r *JWTRequest) { r.Now = time.Time{} }),
	} {
		if _, err := s.Sign(r); !errors.Is(err, ErrRequest) {
			t.Errorf("%s: %v", name, err)
		}
	}
	for name, at := range map[string]time.Duration{"before": -time.Second, "after": time.Hour} {
		if _, err := s.Sign(change(func(r *JWTRequest) { r.Now = r.Now.Add(at) })); !errors.Is(err, ErrAuthority) {
			t.Errorf("%s the authority's window: %v", name, err)
		}
	}
}

func TestRefusesJWTAuthorities(t *testing.T) {
	p384, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	now := forge.Epoch()
	for name, f := range map[string]func() (*JWTSigner, error){
		"P-384":  func() (*JWTSigner, error) { return NewJWTSigner(td, p384, now, now.Add(time.Hour)) },
		"no key": func() (*JWTSigner, error) { return NewJWTSigner(td, nil, now, now.Add(time.Hour)) },
		"no trust domain": func() (*JWTSigner, error) {
			return NewJWTSigner(spiffeid.TrustDomain{}, forge.P256(t), now, now.Add(time.Hour))
		},
		"no window": func() (*JWTSigner, error) { return NewJWTSigner(td, forge.P256(t), now, now) },
	} {
		if _, err := f(); !errors.Is(err, ErrAuthority) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestJWTTimes(t *testing.T) {
	s := newJWTSigner(t, forge.P256(t), forge.Epoch(), 48*time.Hour)
	r := jwtRequest("a")
	r.TTL = 1000 * time.Hour
	if out := signJWT(t, s, r); out.Expiry.Sub(out.IssuedAt) != MaxJWTTTL {
		t.Errorf("a token of %v", out.Expiry.Sub(out.IssuedAt))
	}
	r.Now = r.Now.Add(47 * time.Hour)
	if out := signJWT(t, s, r); !out.Expiry.Equal(s.NotAfter().UTC().Truncate(time.Second)) {
		t.Errorf("a token outlives its authority: %v", out.Expiry)
	}
}

// What we sign is read back by us and verified by go-spiffe, also with the
// longest ID and all the audiences there can be.
func TestJWTIsVerifiedByGoSPIFFE(t *testing.T) {
	key := forge.P256(t)
	bundle := func() *jwtbundle.Bundle {
		b := jwtbundle.New(td)
		id, err := JWTKeyID(&key.PublicKey)
		if err != nil {
			t.Fatal(err)
		}
		if err := b.AddJWTAuthority(id, &key.PublicKey); err != nil {
			t.Fatal(err)
		}
		return b
	}()
	synctest.Test(t, func(t *testing.T) {
		s := newJWTSigner(t, key, time.Now(), time.Hour)
		var many []string
		for i := range MaxAudiences {
			many = append(many, strings.Repeat(string(rune('a'+i)), MaxAudience))
		}
		long := strings.Repeat("/"+strings.Repeat("x", 99), 20)
		for _, r := range []JWTRequest{
			{ID: spiffeid.RequireFromPath(td, "/web"), Audience: []string{"a"}, TTL: time.Minute, Now: time.Now()},
			{ID: spiffeid.RequireFromPath(td, long), Audience: many, TTL: time.Minute, Now: time.Now()},
		} {
			out := signJWT(t, s, r)
			u, err := ParseJWT(out.Token)
			if err != nil {
				t.Fatal(err)
			}
			if u.ID != r.ID || !slices.Equal(u.Audience, r.Audience) || !u.Expiry.Equal(out.Expiry) || !u.IssuedAt.Equal(out.IssuedAt) || u.KeyID != s.KeyID() {
				t.Error(u)
			}
			if err := u.CheckTime(time.Now()); err != nil {
				t.Error(err)
			}
			got, err := jwtsvid.ParseAndValidate(out.Token, bundle, r.Audience[:1])
			if err != nil || got.ID != r.ID || !got.Expiry.Equal(out.Expiry) {
				t.Error(got, err)
			}
		}
	})
}

// Through two years of rotation a token is verified by the bundle for as long
// as it lives, its authority was published before, and nothing is kept longer.
func TestJWTRotation(t *testing.T) {
	const life = 30 * 24 * time.Hour
	var stages []JWTStage
	type issued struct {
		by  int
		end time.Time
	}
	var tokens []issued
	now := forge.Epoch()
	for end := now.Add(2 * 365 * 24 * time.Hour); now.Before(end); now = now.Add(time.Hour) {
		for {
			plain := make([]Stage, len(stages))
			for i, s := range stages {
				plain[i] = s.Stage
			}
			action, i, _ := Next(now, plain)
			if action == Wait {
				break
			}
			if action == Prepare {
				stages = append(stages, JWTStage{Stage: Stage{State: Prepared, NotBefore: now, NotAfter: now.Add(life), PreparedAt: now}})
				continue
			}
			for j := range stages {
				if stages[j].State == Active {
					stages[j].State, stages[j].RetiredAt = Retired, now
				}
			}
			if len(stages) > 1 && now.Sub(stages[i].PreparedAt) < time.Hour {
				t.Fatal("signs before it was published")
			}
			stages[i].State = Active
		}
		published := 0
		for i, s := range stages {
			if JWTNeeded(s, now) {
				published++
			}
			if s.State == Active {
				tokens = append(tokens, issued{i, now.Add(MaxJWTTTL)})
			}
		}
		if published > 3 {
			t.Fatalf("%d authorities are published", published)
		}
		tokens = slices.DeleteFunc(tokens, func(x issued) bool { return !now.Before(x.end.Add(JWTLeeway)) })
		for _, x := range tokens {
			if !JWTNeeded(stages[x.by], now) {
				t.Fatalf("a token until %v has no authority at %v", x.end, now)
			}
		}
	}
}

func FuzzParseJWT(f *testing.F) {
	f.Add(raw(goodHeader, goodClaims))
	f.Add(raw(goodHeader, `{"sub":"spiffe://example.org/web","aud":"a","exp":1.5e9,"nbf":1}`))
	f.Fuzz(func(t *testing.T, token string) {
		u, err := ParseJWT(token)
		if err != nil {
			return
		}
		if u.ID.IsZero() || u.KeyID == "" || len(u.Audience) == 0 || u.Expiry.IsZero() {
			t.Fatal(u)
		}
	})
}

// To the second: the leeway is for clocks, and no more than that.
func TestRefusesJWTOutsideItsTimes(t *testing.T) {
	at := time.Date(2030, 5, 1, 12, 0, 0, 0, time.UTC)
	for name, c := range map[string]struct {
		u    UnverifiedJWT
		now  time.Time
		good bool
	}{
		"just before its end":      {UnverifiedJWT{Expiry: at}, at.Add(JWTLeeway - time.Nanosecond), true},
		"at its end":               {UnverifiedJWT{Expiry: at}, at.Add(JWTLeeway), false},
		"no end":                   {UnverifiedJWT{}, at, false},
		"a moment before it began": {UnverifiedJWT{Expiry: at.Add(time.Hour), NotBefore: at}, at.Add(-JWTLeeway - time.Nanosecond), false},
		"at its beginning":         {UnverifiedJWT{Expiry: at.Add(time.Hour), NotBefore: at}, at.Add(-JWTLeeway), true},
		"issued in the future":     {UnverifiedJWT{Expiry: at.Add(time.Hour), IssuedAt: at}, at.Add(-JWTLeeway - time.Nanosecond), false},
		"issued now":               {UnverifiedJWT{Expiry: at.Add(time.Hour), IssuedAt: at}, at.Add(-JWTLeeway), true},
	} {
		if err := c.u.CheckTime(c.now); (err == nil) != c.good || err != nil && !errors.Is(err, ErrJWTTime) {
			t.Errorf("%s: %v", name, err)
		}
	}
	// An authority that has ended verifies nothing, retired or not.
	for _, state := range []State{Active, Retired} {
		s := JWTStage{Stage: Stage{State: state, NotAfter: at}, RetiredAt: at.Add(-time.Minute)}
		if !JWTNeeded(s, at.Add(-time.Second)) || JWTNeeded(s, at) {
			t.Errorf("state %v: needed past its end, or not before", state)
		}
	}
}

// One byte too long is refused before it is looked into.
func TestRefusesOversizedJWT(t *testing.T) {
	for n, want := range map[int]string{MaxJWT: "compact", MaxJWT + 1: "at most"} {
		if _, err := ParseJWT(strings.Repeat(".", n)); !errors.Is(err, ErrJWT) || !strings.Contains(err.Error(), want) {
			t.Errorf("%d bytes: %v", n, err)
		}
	}
}
