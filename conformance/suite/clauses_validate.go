package suite

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// hugeToken is under gRPC's usual limit of 4 MiB, so that it is the endpoint
// that deals with it.
const hugeToken = 3 << 20

func (r *run) validate(ctx context.Context, req *workload.ValidateJWTSVIDRequest) (*workload.ValidateJWTSVIDResponse, error) {
	ctx, cancel := call(ctx)
	defer cancel()
	return r.api.ValidateJWTSVID(ctx, req)
}

// isRefusal: an endpoint that falls over has refused nothing.
func isRefusal(err error) bool {
	switch status.Code(err) {
	case codes.OK, codes.Unavailable, codes.DeadlineExceeded, codes.Unimplemented, codes.Canceled:
		return false
	}
	return true
}

// refused demands that none of the tokens validates.
func (r *run) refused(ctx context.Context, audience string, tokens map[string]string) error {
	var bad problems
	for what, t := range tokens {
		if _, err := r.validate(ctx, &workload.ValidateJWTSVIDRequest{Audience: audience, Svid: t}); !isRefusal(err) {
			bad.add("%s: %s", what, short(err))
		}
	}
	return bad.err()
}

// fromGood makes bad tokens of one that the endpoint validates. Its signature, or
// its claims, are real: what is refused is what was changed.
func fromGood(make func(r *run, parts []string, t token) (audience string, tokens map[string]string, err error)) func(context.Context, *run) error {
	return func(ctx context.Context, r *run) error {
		parts, t, err := r.good()
		if err != nil {
			return err
		}
		if _, err := r.validate(ctx, &workload.ValidateJWTSVIDRequest{Audience: r.Audience, Svid: t.GetSvid()}); err != nil {
			return notRun("the token that this one is made of does not validate, see workload-api/6.2.3/good-token-validates")
		}
		audience, tokens, err := make(r, parts, t)
		if err != nil {
			return err
		}
		return r.refused(ctx, audience, tokens)
	}
}

// really signs bad tokens with the trust domain's key. Without the key they would
// be refused for their signature, whatever else is wrong, and nothing be seen.
func really(mutate func(header, claims map[string]any)) func(context.Context, *run) error {
	return func(ctx context.Context, r *run) error {
		if r.JWTKey == nil {
			return needs("--jwt-key")
		}
		_, t, err := r.good()
		if err != nil {
			return err
		}
		header, claims := maps.Clone(t.header), maps.Clone(t.claims)
		control, err := forge(r.JWTKey, header, claims)
		if err != nil {
			return err
		}
		if _, err := r.validate(ctx, &workload.ValidateJWTSVIDRequest{Audience: r.Audience, Svid: control}); err != nil {
			return fmt.Errorf("a good token signed with --jwt-key is refused, so that a bad one's refusal shows nothing: %s", short(err))
		}
		mutate(header, claims)
		forged, err := forge(r.JWTKey, header, claims)
		if err != nil {
			return err
		}
		return r.refused(ctx, r.Audience, map[string]string{"it": forged})
	}
}

func validateClauses() []Clause {
	return []Clause{
		{"workload-api/6.2.3/good-token-validates", Must, "the tokens of FetchJWTSVID validate", eachValidated(func(bad *problems, r *run, t token, _ *workload.ValidateJWTSVIDResponse, err error) {
			if err != nil {
				bad.add("%s: %s", t.name, short(err))
			}
		})},
		{"workload-api/6.2.3/response-fields", Must, "a validated token's SPIFFE ID and claims are returned", eachValidated(func(bad *problems, _ *run, t token, msg *workload.ValidateJWTSVIDResponse, err error) {
			if err == nil && (msg.GetSpiffeId() != t.GetSpiffeId() || len(msg.GetClaims().GetFields()) == 0) {
				bad.add("%s: ID %q, %d claims", t.name, msg.GetSpiffeId(), len(msg.GetClaims().GetFields()))
			}
		})},
		{"workload-api/6.2.3/spiffe-claims", Must, "sub, aud and exp are among the claims", eachValidated(func(bad *problems, _ *run, t token, msg *workload.ValidateJWTSVIDResponse, err error) {
			for _, name := range []string{"sub", "aud", "exp"} {
				if _, there := msg.GetClaims().GetFields()[name]; err == nil && !there {
					bad.add("%s: no %s", t.name, name)
				}
			}
		})},
		{"workload-api/6.2.3/garbage-refused", Must, "what is no token, or a huge one, is refused, and the endpoint lives on", checkGarbage},
		{"workload-api/6.3/foreign-subject-refused", Must, "a token is validated with its subject's trust domain's keys alone", really(func(_, claims map[string]any) {
			claims["sub"] = "spiffe://conformance.invalid/workload"
		})},
		{"jwt-svid/1/json-serialization-refused", Must, "a good token in JWS JSON serialization is refused", fromGood(func(r *run, p []string, _ token) (string, map[string]string, error) {
			flat, err := json.Marshal(map[string]string{"protected": p[0], "payload": p[1], "signature": p[2]})
			if err != nil {
				return "", nil, err
			}
			general, err := json.Marshal(map[string]any{"payload": p[1], "signatures": []map[string]string{{"protected": p[0], "signature": p[2]}}})
			return r.Audience, map[string]string{"flattened": string(flat), "general": string(general)}, err
		})},
		{"jwt-svid/2.1/alg-none-refused", Must, "a token with alg none is refused", fromGood(func(r *run, p []string, t token) (string, map[string]string, error) {
			tokens := map[string]string{}
			for _, alg := range []string{"none", "None", "NONE", ""} {
				h := maps.Clone(t.header)
				h["alg"] = alg
				raw, err := json.Marshal(h)
				if err != nil {
					return "", nil, err
				}
				tokens[fmt.Sprintf("alg %q", alg)] = b64.EncodeToString(raw) + "." + p[1] + "."
				tokens[fmt.Sprintf("alg %q with a signature", alg)] = b64.EncodeToString(raw) + "." + p[1] + "." + p[2]
			}
			return r.Audience, tokens, nil
		})},
		{"jwt-svid/2.1/symmetric-alg-refused", Must, "a token with HS256 over the public key as secret is refused", fromGood(func(r *run, _ []string, t token) (string, map[string]string, error) {
			key, err := r.verifyKey(t)
			if err != nil {
				return "", nil, notRun("the token's key is not in the bundle")
			}
			secrets, err := publicForms(key)
			if err != nil {
				return "", nil, err
			}
			tokens := map[string]string{}
			for i, secret := range secrets {
				if tokens[fmt.Sprintf("form %d of the key", i)], err = forgeMAC(secret, t.header, t.claims); err != nil {
					return "", nil, err
				}
			}
			return r.Audience, tokens, nil
		})},
		{"jwt-svid/3.2/other-audience-refused", Must, "a token for another audience is refused", fromGood(func(r *run, _ []string, t token) (string, map[string]string, error) {
			return r.Audience + "-third", map[string]string{"it": t.GetSvid()}, nil
		})},
		{"jwt-svid/3.2/without-audience-refused", Must, "a token without aud is refused", really(func(_, claims map[string]any) { delete(claims, "aud") })},
		{"jwt-svid/3.3/without-expiration-refused", Must, "a token without exp is refused", really(func(_, claims map[string]any) { delete(claims, "exp") })},
		{"jwt-svid/4/expired-refused", Must, "a token whose time is over is refused", really(func(_, claims map[string]any) {
			claims["iat"] = time.Now().Add(-2 * time.Hour).Unix()
			claims["nbf"] = claims["iat"]
			claims["exp"] = time.Now().Add(-time.Hour).Unix()
		})},
		{"jwt-svid/3.1/without-subject-refused", Must, "a token whose sub is no SPIFFE ID is refused", really(func(_, claims map[string]any) { claims["sub"] = "https://conformance.invalid/workload" })},
		{"jwt-svid/2/other-headers-refused", Must, "a token with another header is refused", really(func(header, _ map[string]any) { header["x-conformance"] = "1" })},
		{"jwt-svid/2.3/other-type-refused", Must, "a token of another typ is refused", really(func(header, _ map[string]any) { header["typ"] = "at+jwt" })},
		{"jwt-svid/4/changed-claims-refused", Must, "a token whose claims were changed is refused", fromGood(func(r *run, p []string, t token) (string, map[string]string, error) {
			claims := maps.Clone(t.claims)
			claims["aud"] = []string{r.Audience + "-third"}
			raw, err := json.Marshal(claims)
			return r.Audience + "-third", map[string]string{"it": p[0] + "." + b64.EncodeToString(raw) + "." + p[2]}, err
		})},
		{"jwt-svid/4/changed-signature-refused", Must, "a token whose signature was changed, or is gone, is refused", fromGood(func(r *run, p []string, _ token) (string, map[string]string, error) {
			sig, err := b64.DecodeString(p[2])
			if err != nil {
				return "", nil, err
			}
			sig[len(sig)/2] ^= 1
			head := p[0] + "." + p[1] + "."
			return r.Audience, map[string]string{"changed": head + b64.EncodeToString(sig), "gone": head, "halved": head + b64.EncodeToString(sig[:len(sig)/2])}, nil
		})},
		{"jwt-svid/4/unknown-key-refused", Must, "a token signed by a key of nobody's is refused", fromGood(func(r *run, _ []string, t token) (string, map[string]string, error) {
			key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
			if err != nil {
				return "", nil, err
			}
			named, err := forge(key, t.header, t.claims)
			if err != nil {
				return "", nil, err
			}
			h := maps.Clone(t.header)
			h["kid"] = "conformance"
			other, err := forge(key, h, t.claims)
			return r.Audience, map[string]string{"with the kid of a good one": named, "with another kid": other}, err
		})},
	}
}

func eachValidated(judge func(bad *problems, r *run, t token, msg *workload.ValidateJWTSVIDResponse, err error)) func(context.Context, *run) error {
	return func(ctx context.Context, r *run) error {
		all, err := r.tokens()
		if err != nil {
			return err
		}
		var bad problems
		validated := 0
		for _, t := range all {
			for _, audience := range r.audiences() {
				msg, err := r.validate(ctx, &workload.ValidateJWTSVIDRequest{Audience: audience, Svid: t.GetSvid()})
				if err == nil {
					validated++
				}
				judge(&bad, r, t, msg, err)
			}
		}
		if len(bad) == 0 && validated == 0 {
			return notRun("no token validates")
		}
		return bad.err()
	}
}

func checkGarbage(ctx context.Context, r *run) error {
	good, err := r.goodToken()
	if err != nil {
		return err
	}
	tokens := map[string]string{
		"a word": "garbage", "two dots": "..", "empty objects": b64.EncodeToString([]byte("{}")) + "." + b64.EncodeToString([]byte("{}")) + "." + b64.EncodeToString([]byte("sig")),
		"a good one's half": good[:len(good)/2], "a good one with a fourth part": good + ".e30",
		"3 MiB": good[:strings.LastIndexByte(good, '.')+1] + strings.Repeat("A", hugeToken),
	}
	refused := r.refused(ctx, r.Audience, tokens)
	_, err = r.validate(ctx, &workload.ValidateJWTSVIDRequest{Audience: r.Audience, Svid: good})
	switch status.Code(err) {
	case codes.Unavailable, codes.DeadlineExceeded:
		return errors.Join(refused, fmt.Errorf("afterwards the endpoint does not answer: %s", short(err)))
	}
	return refused
}
