package suite

import (
	"context"
	"encoding/pem"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/go-jose/go-jose/v4"
	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

func pemOf(der []byte) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der})
}

func jwtAPIClauses() []Clause {
	return []Clause{
		{"workload-api/4.5/audience-is-mandatory", Should, "FetchJWTSVID without an audience is InvalidArgument", func(ctx context.Context, r *run) error {
			return r.fetchRefused(ctx, &workload.JWTSVIDRequest{}, codes.InvalidArgument)
		}},
		{"workload-api/4.5/validation-fields-are-mandatory", Should, "ValidateJWTSVID without audience or SVID is InvalidArgument", func(ctx context.Context, r *run) error {
			t, err := r.goodToken()
			if err != nil {
				return err
			}
			var bad problems
			for what, req := range map[string]*workload.ValidateJWTSVIDRequest{
				"audience": {Svid: t}, "svid": {Audience: r.Audience},
			} {
				if _, err := r.validate(ctx, req); status.Code(err) != codes.InvalidArgument {
					bad.add("without %s: %s", what, short(err))
				}
			}
			return bad.err()
		}},
		{"workload-api/6.2.1/audience-embedded", Must, "the token's aud is what was asked for", eachToken(func(bad *problems, r *run, t token) {
			if have := audienceOf(t.claims); !slices.Equal(slices.Sorted(slices.Values(have)), slices.Sorted(slices.Values(r.audiences()))) {
				bad.add("%s: asked for %q, aud is %q", t.name, r.audiences(), have)
			}
		})},
		{"workload-api/6.2.1/every-identity", Must, "without an ID in the request every identity gets a token", func(_ context.Context, r *run) error {
			x, err := r.svids()
			if err != nil {
				return notRun("needs the X.509-SVID profile to know the caller's identities")
			}
			all, err := r.tokens()
			if err != nil {
				return err
			}
			var bad problems
			for _, s := range x {
				if !slices.ContainsFunc(all, func(t token) bool { return t.GetSpiffeId() == s.GetSpiffeId() }) {
					bad.add("no token of %s", s.GetSpiffeId())
				}
			}
			return bad.err()
		}},
		{"workload-api/6.2.1/the-identity-asked-for", Must, "with an ID in the request that one's token alone is returned", checkOneIdentity},
		{"workload-api/6.2.1/no-token-of-others", Must, "an ID that the caller has not gets it no token", func(ctx context.Context, r *run) error {
			td, err := r.trustDomain()
			if err != nil {
				return err
			}
			return r.fetchRefused(ctx, &workload.JWTSVIDRequest{Audience: []string{r.Audience}, SpiffeId: td + "/conformance/not/this/callers"}, codes.OK)
		}},
		{"workload-api/6.2.1/not-entitled-is-permission-denied", Should, "an ID that the caller has not is PermissionDenied", func(ctx context.Context, r *run) error {
			td, err := r.trustDomain()
			if err != nil {
				return err
			}
			return r.fetchRefused(ctx, &workload.JWTSVIDRequest{Audience: []string{r.Audience}, SpiffeId: td + "/conformance/not/this/callers"}, codes.PermissionDenied)
		}},
		{"workload-api/6.2.1/svids-not-empty", Must, "svids has one entry or more", func(_ context.Context, r *run) error {
			msg, err := r.jwtSVIDs()
			if err != nil {
				return notRun("no JWTSVIDResponse was sent")
			}
			if len(msg.GetSvids()) == 0 {
				return errors.New("the message has no SVID")
			}
			return nil
		}},
		{"workload-api/6.2.1/fields-set", Must, "ID and token of each SVID are set", func(_ context.Context, r *run) error {
			all, err := r.tokens()
			if err != nil {
				return err
			}
			var bad problems
			for _, t := range all {
				if t.GetSpiffeId() == "" || t.GetSvid() == "" {
					bad.add("%s has not both", t.name)
				}
			}
			return bad.err()
		}},
		{"workload-api/6.2.1/hints-unique", Must, "no two SVIDs of a message have the same hint", func(_ context.Context, r *run) error {
			all, err := r.tokens()
			if err != nil {
				return err
			}
			var hints []string
			for _, t := range all {
				hints = append(hints, t.GetHint())
			}
			return uniqueHints(hints)
		}},
		{"workload-api/6.2.2/own-bundle", Must, "bundles has that of the server's own trust domain", checkOwnJWTBundle},
		{"workload-api/6.2.2/jwk-sets", Must, "each bundle is a JWK Set, keyed by the trust domain's SPIFFE ID", eachJWTBundle(func(bad *problems, td string, d document, err error) {
			if err != nil {
				bad.add("%s: %v", td, err)
				return
			}
			if td == "" || td != trustDomainOf(td) {
				bad.add("%q is not the SPIFFE ID of a trust domain", td)
			}
			for i, k := range d.keys {
				if err := k.usable(); err != nil {
					bad.add("%s, key %d: %v", td, i, err)
				}
			}
		})},
		{"workload-api/6.2.2/no-keys-of-other-uses", Must, "no key in a JWT bundle is for another use", eachJWTBundle(func(bad *problems, td string, d document, _ error) {
			for i, k := range d.keys {
				_, x5c := k.raw["x5c"]
				if use := k.text("use"); x5c || use != "" && use != "jwt-svid" && use != "sig" {
					bad.add("%s, key %d: use %q, x5c %v", td, i, use, x5c)
				}
			}
		})},
		{"workload-api/6.2.2/use-is-jwt-svid", Should, "the keys say that they are for JWT-SVIDs", eachJWTBundle(func(bad *problems, td string, d document, _ error) {
			for i, k := range d.keys {
				if use := k.text("use"); use != "jwt-svid" {
					bad.add("%s, key %d: use is %q", td, i, use)
				}
			}
		})},
		{"workload-api/6.2.2/kids-unique", Should, "each key has a kid of its own, to be found by", eachJWTBundle(func(bad *problems, td string, d document, _ error) {
			seen := map[string]bool{}
			for i, k := range d.keys {
				kid := k.text("kid")
				if kid == "" || seen[kid] {
					bad.add("%s, key %d: kid %q", td, i, kid)
				}
				seen[kid] = true
			}
		})},
		{"workload-api/6.2.2/verifies-the-tokens", Must, "the trust domain's bundle has the key that signed its tokens", eachToken(func(bad *problems, r *run, t token) {
			key, err := r.verifyKey(t)
			if err != nil {
				bad.add("%s: %v", t.name, err)
				return
			}
			jws, err := jose.ParseSignedCompact(t.GetSvid(), algorithms)
			if err == nil {
				_, err = jws.Verify(key.Key)
			}
			if err != nil {
				bad.add("%s: %v", t.name, err)
			}
		})},
		{"workload-api/6.2.2/federated-bundles", Must, "foreign trust domains' JWT bundles are there, too", func(_ context.Context, r *run) error {
			if r.Federated == "" {
				return needs("--federated")
			}
			msg, err := r.jwtBundles()
			if err != nil {
				return notRun("no JWTBundlesResponse was sent")
			}
			if len(msg.GetBundles()[r.Federated]) == 0 {
				return fmt.Errorf("no bundle of %s", r.Federated)
			}
			return nil
		}},
	}
}

// fetchRefused: with OK wanted, any refusal will do.
func (r *run) fetchRefused(ctx context.Context, req *workload.JWTSVIDRequest, want codes.Code) error {
	if r.disabled("jwt") {
		return notRun("the operator has disabled the profile")
	}
	ctx, cancel := call(ctx)
	defer cancel()
	msg, err := r.api.FetchJWTSVID(ctx, req)
	switch {
	case err == nil:
		return fmt.Errorf("%d tokens were returned", len(msg.GetSvids()))
	case want == codes.OK && !isRefusal(err), want != codes.OK && status.Code(err) != want:
		return errors.New(short(err))
	}
	return nil
}

func checkOneIdentity(ctx context.Context, r *run) error {
	all, err := r.tokens()
	if err != nil {
		return err
	}
	ids := map[string]bool{}
	for _, t := range all {
		ids[t.GetSpiffeId()] = true
	}
	if len(ids) < 2 {
		return notRun("needs a caller with two identities")
	}
	var bad problems
	for id := range ids {
		ctx, cancel := call(ctx)
		msg, err := r.api.FetchJWTSVID(ctx, &workload.JWTSVIDRequest{Audience: []string{r.Audience}, SpiffeId: id})
		cancel()
		if err != nil {
			bad.add("%s: %s", id, short(err))
		}
		for _, s := range msg.GetSvids() {
			if s.GetSpiffeId() != id {
				bad.add("asked for %s, got one of %s, too", id, s.GetSpiffeId())
			}
		}
	}
	return bad.err()
}

func checkOwnJWTBundle(_ context.Context, r *run) error {
	msg, err := r.jwtBundles()
	if err != nil {
		return notRun("no JWTBundlesResponse was sent")
	}
	td, err := r.trustDomain()
	if err != nil {
		return err
	}
	if len(msg.GetBundles()[td]) == 0 {
		return fmt.Errorf("no bundle of %s among %d", td, len(msg.GetBundles()))
	}
	return nil
}

func eachJWTBundle(judge func(bad *problems, td string, d document, err error)) func(context.Context, *run) error {
	return func(_ context.Context, r *run) error {
		msg, err := r.jwtBundles()
		if err != nil || len(msg.GetBundles()) == 0 {
			return notRun("no JWT bundle was served")
		}
		var bad problems
		for td, raw := range msg.GetBundles() {
			d, err := readDocument(raw)
			judge(&bad, td, d, err)
		}
		slices.Sort(bad)
		return bad.err()
	}
}

// eachToken is for clauses about what is in tokens that can be read.
func eachToken(judge func(bad *problems, r *run, t token)) func(context.Context, *run) error {
	return func(_ context.Context, r *run) error {
		all, err := r.tokens()
		if err != nil {
			return err
		}
		var bad problems
		for _, t := range all {
			if t.err != nil {
				return notRun("see jwt-svid/5.1/compact-serialization")
			}
			judge(&bad, r, t)
		}
		return bad.err()
	}
}

func audienceOf(claims map[string]any) []string {
	switch aud := claims["aud"].(type) {
	case string:
		return []string{aud}
	case []any:
		var out []string
		for _, a := range aud {
			s, _ := a.(string)
			out = append(out, s)
		}
		return out
	}
	return nil
}

func jwtSVIDClauses() []Clause {
	return []Clause{
		{"jwt-svid/5.1/compact-serialization", Must, "tokens are JWS in compact serialization", func(_ context.Context, r *run) error {
			all, err := r.tokens()
			if err != nil {
				return err
			}
			var bad problems
			for _, t := range all {
				if t.err != nil {
					bad.add("%s: %v", t.name, t.err)
				}
			}
			return bad.err()
		}},
		{"jwt-svid/2/no-other-headers", Must, "the header has alg, kid and typ alone", eachToken(func(bad *problems, _ *run, t token) {
			for name := range t.header {
				if name != "alg" && name != "kid" && name != "typ" {
					bad.add("%s has %q", t.name, name)
				}
			}
		})},
		{"jwt-svid/2.1/algorithm", Must, "alg is one of the nine that are allowed", eachToken(func(bad *problems, _ *run, t token) {
			alg, _ := t.header["alg"].(string)
			if !slices.Contains(algorithms, jose.SignatureAlgorithm(alg)) {
				bad.add("%s: %q", t.name, alg)
			}
		})},
		{"jwt-svid/2.3/type", Must, "typ, where it is, is JWT or JOSE", eachToken(func(bad *problems, _ *run, t token) {
			if typ, set := t.header["typ"]; set && typ != "JWT" && typ != "JOSE" {
				bad.add("%s: %q", t.name, typ)
			}
		})},
		{"jwt-svid/3.1/subject", Must, "sub is the workload's SPIFFE ID", eachToken(func(bad *problems, _ *run, t token) {
			if sub := t.claims["sub"]; sub != t.GetSpiffeId() || !strings.HasPrefix(t.GetSpiffeId(), spiffeScheme) {
				bad.add("%s: sub is %q, the message says %q", t.name, sub, t.GetSpiffeId())
			}
		})},
		{"jwt-svid/3.2/audience", Must, "aud is there and not empty", eachToken(func(bad *problems, _ *run, t token) {
			if aud := audienceOf(t.claims); len(aud) == 0 || slices.Contains(aud, "") {
				bad.add("%s: aud is %q", t.name, aud)
			}
		})},
		{"jwt-svid/3.2/none-without-audience", Must, "a request without an audience gets no token without one", func(ctx context.Context, r *run) error {
			if r.disabled("jwt") {
				return notRun("the operator has disabled the profile")
			}
			ctx, cancel := call(ctx)
			defer cancel()
			msg, _ := r.api.FetchJWTSVID(ctx, &workload.JWTSVIDRequest{})
			var bad problems
			for i, s := range msg.GetSvids() {
				if _, claims, err := readToken(s.GetSvid()); err != nil || len(audienceOf(claims)) == 0 {
					bad.add("svids[%d] has none (%v)", i, err)
				}
			}
			return bad.err()
		}},
		{"jwt-svid/3.3/expiration", Must, "exp is there", eachToken(func(bad *problems, _ *run, t token) {
			if _, number := t.claims["exp"].(float64); !number {
				bad.add("%s: exp is %v", t.name, t.claims["exp"])
			}
		})},
	}
}
