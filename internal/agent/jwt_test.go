package agent

import (
	"context"
	"crypto/ecdsa"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/spiffe/go-spiffe/v2/bundle/jwtbundle"
	workloadpb "github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/rootlink/rootlink/internal/forge"
	"github.com/rootlink/rootlink/pkg/svid"
)

// fakeJWT is the fake server's part in JWT-SVIDs.
type fakeJWT struct {
	key       *ecdsa.PrivateKey // that signs
	published []*types.JWTKey
	foreign   map[string]*types.JWTKey // of other trust domains by their name
	ttl       time.Duration
	calls     int
	denied    error
	bend      func(*svid.JWTRequest) // what is signed instead
}

// jwtKey makes a key and how a bundle has it.
func jwtKey(t testing.TB) (*ecdsa.PrivateKey, *types.JWTKey) {
	t.Helper()
	key := forge.P256(t)
	id, err := svid.JWTKeyID(&key.PublicKey)
	if err != nil {
		t.Fatal(err)
	}
	spki, err := x509.MarshalPKIXPublicKey(&key.PublicKey)
	if err != nil {
		t.Fatal(err)
	}
	return key, &types.JWTKey{PublicKey: spki, KeyId: id, ExpiresAt: time.Now().Add(time.Hour).Unix()}
}

// rotateJWT signs with a new key, which is published after the old ones.
func (s *fakeServer) rotateJWT(publish bool) {
	key, pub := jwtKey(s.t)
	s.with(func() {
		s.jwt.key = key
		if publish {
			s.jwt.published = append(slices.Clone(s.jwt.published), pub)
		}
	})
}

func signToken(t testing.TB, key *ecdsa.PrivateKey, r svid.JWTRequest) string {
	t.Helper()
	signer, err := svid.NewJWTSigner(r.ID.TrustDomain(), key, r.Now.Add(-time.Hour), r.Now.Add(48*time.Hour))
	if err != nil {
		t.Fatal(err)
	}
	out, err := signer.Sign(r)
	if err != nil {
		t.Fatal(err)
	}
	return out.Token
}

func (s *fakeServer) NewJWTSVID(ctx context.Context, req *svidv1.NewJWTSVIDRequest) (*svidv1.NewJWTSVIDResponse, error) {
	if err := s.authorize(ctx); err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.jwt.calls++
	if s.jwt.denied != nil {
		return nil, s.jwt.denied
	}
	for _, e := range s.entries {
		if e.Id != req.EntryId {
			continue
		}
		r := svid.JWTRequest{
			ID:       spiffeid.RequireFromString("spiffe://" + e.SpiffeId.TrustDomain + e.SpiffeId.Path),
			Audience: req.Audience, TTL: s.jwt.ttl, Now: time.Now(),
		}
		if s.jwt.bend != nil {
			s.jwt.bend(&r)
		}
		return &svidv1.NewJWTSVIDResponse{Svid: &types.JWTSVID{Token: signToken(s.t, s.jwt.key, r)}}, nil
	}
	return nil, status.Error(codes.NotFound, "entry not found or not authorized")
}

// jwtServed is an agent with one entry whose server signs tokens.
func jwtServed(t *testing.T, change ...func(*Config)) (*fakeServer, *running) {
	t.Helper()
	s := newFakeServer(t)
	s.jwt.ttl = 5 * time.Minute
	s.rotateJWT(true)
	s.start()
	s.addEntry("/w", selfHash(t))
	r := startAgent(t, s, change...)
	r.waitReady()
	return s, r
}

func (r *running) api() workloadpb.SpiffeWorkloadAPIClient {
	return workloadpb.NewSpiffeWorkloadAPIClient(r.dial())
}

func (r *running) fetchJWT(t *testing.T, id string, audience ...string) ([]*workloadpb.JWTSVID, error) {
	t.Helper()
	resp, err := r.api().FetchJWTSVID(testContext(t), &workloadpb.JWTSVIDRequest{Audience: audience, SpiffeId: id})
	return resp.GetSvids(), err
}

func (r *running) validate(t *testing.T, audience, token string) (*workloadpb.ValidateJWTSVIDResponse, error) {
	t.Helper()
	return r.api().ValidateJWTSVID(testContext(t), &workloadpb.ValidateJWTSVIDRequest{Audience: audience, Svid: token})
}

func (s *fakeServer) jwtCalls() (n int) {
	s.with(func() { n = s.jwt.calls })
	return n
}

// Workload API §6.2.1: the audience of the request is that of the tokens, and
// all of them.
func TestWorkloadAPISection621AudienceIsEmbedded(t *testing.T) {
	_, r := jwtServed(t)
	for _, audience := range [][]string{{"reports"}, {"a", "b"}, {"b", "a"}} {
		svids, err := r.fetchJWT(t, "", audience...)
		if err != nil {
			t.Fatal(err)
		}
		if got, err := jwtsvid.ParseInsecure(svids[0].Svid, audience[:1]); err != nil || !slices.Equal(got.Audience, audience) {
			t.Error(got, err)
		}
	}
	for name, audience := range map[string][]string{"none": nil, "empty": {""}, "one empty": {"a", ""}, "long": {strings.Repeat("a", svid.MaxAudience+1)}} {
		_, err := r.fetchJWT(t, "", audience...)
		wantCode(t, name, err, codes.InvalidArgument)
	}
}

// Workload API §6.2.1: without spiffe_id a token for every identity, with it for
// that one.
func TestWorkloadAPISection621EveryIdentity(t *testing.T) {
	s, r := jwtServed(t)
	second := s.addEntry("/second", selfHash(t))
	s.addEntry("/others", "binary:uid:4294967294")
	one, err := r.fetchJWT(t, "spiffe://"+testTD+"/second", "a") // made a moment ago
	if err != nil || len(one) != 1 || one[0].SpiffeId != "spiffe://"+testTD+"/second" {
		t.Fatal(one, err)
	}
	all, err := r.fetchJWT(t, "", "a")
	if err != nil || len(all) != 2 || !strings.HasSuffix(all[0].SpiffeId, "/w") {
		t.Fatal(all, err)
	}
	for _, x := range all {
		if got, err := jwtsvid.ParseInsecure(x.Svid, []string{"a"}); err != nil || got.ID.String() != x.SpiffeId {
			t.Error(got, err)
		}
	}
	// All or none: what is left out would look withdrawn.
	s.with(func() {
		s.jwt.bend = func(r *svid.JWTRequest) {
			if r.ID.Path() == "/second" {
				r.Audience = []string{"other"}
			}
		}
	})
	_, err = r.fetchJWT(t, "", "b")
	wantCode(t, "one of two fails", err, codes.Unavailable)
	s.deleteEntry(second)
	_, err = r.fetchJWT(t, "spiffe://"+testTD+"/others", "a")
	wantCode(t, "somebody else's", err, codes.PermissionDenied)
	_, err = r.fetchJWT(t, "web", "a")
	wantCode(t, "not a SPIFFE ID", err, codes.InvalidArgument)
}

// Workload API §6.2.1: hints are unique in a message.
func TestWorkloadAPISection621HintsAreUnique(t *testing.T) {
	s, r := jwtServed(t)
	s.addEntry("/b", selfHash(t))
	s.addEntry("/c", selfHash(t))
	s.with(func() {
		for i, hint := range []string{"internal", "internal", "external"} {
			s.entries[i].Hint, s.entries[i].RevisionNumber = hint, 1
		}
	})
	eventually(t, "the agent knows", func() bool {
		svids, err := r.fetchJWT(t, "", "a")
		return err == nil && len(svids) == 2 && svids[0].Hint == "internal" && svids[1].Hint == "external" && strings.HasSuffix(svids[0].SpiffeId, "/w")
	})
}

// Workload API §6.2.1, Workload Endpoint §6: nobody's identity is PermissionDenied.
func TestWorkloadAPISection621NoIdentityIsPermissionDenied(t *testing.T) {
	s := newFakeServer(t)
	s.rotateJWT(true)
	s.start()
	r := startAgent(t, s)
	r.waitReady()
	_, err := r.fetchJWT(t, "", "a")
	wantCode(t, "FetchJWTSVID", err, codes.PermissionDenied)
	stream, err := r.api().FetchJWTBundles(testContext(t), &workloadpb.JWTBundlesRequest{})
	if err == nil {
		_, err = stream.Recv()
	}
	wantCode(t, "FetchJWTBundles", err, codes.PermissionDenied)
}

// Workload API §6.2.2: the own trust domain's keys as a plain JWK Set, those of
// others that the caller's entries name, no key of another use, and again when
// they change.
func TestWorkloadAPISection622Bundles(t *testing.T) {
	s, r := jwtServed(t)
	_, foreign := jwtKey(t)
	s.with(func() { s.jwt.foreign = map[string]*types.JWTKey{"other.test": foreign} })
	stream, err := r.api().FetchJWTBundles(testContext(t), &workloadpb.JWTBundlesRequest{})
	if err != nil {
		t.Fatal(err)
	}
	until := func(what string, ok func(map[string]*jwtbundle.Bundle) bool) {
		t.Helper()
		for {
			m, err := stream.Recv()
			if err != nil {
				t.Fatalf("%s: %v", what, err)
			}
			bundles := make(map[string]*jwtbundle.Bundle)
			for id, b := range m.Bundles {
				var set jose.JSONWebKeySet
				if err := json.Unmarshal(b, &set); err != nil {
					t.Fatal(err)
				}
				for _, k := range set.Keys {
					if k.KeyID == "" || len(k.Certificates) > 0 || !k.IsPublic() {
						t.Errorf("key %+v", k)
					}
				}
				td := spiffeid.RequireTrustDomainFromString(id)
				if id != td.IDString() {
					t.Errorf("key %q of the map is no SPIFFE ID", id)
				}
				if bundles[td.Name()], err = jwtbundle.Parse(td, b); err != nil {
					t.Fatal(err)
				}
			}
			if bundles[testTD] == nil {
				t.Fatal("the own bundle is missing")
			}
			if ok(bundles) {
				return
			}
		}
	}
	until("first", func(b map[string]*jwtbundle.Bundle) bool { return len(b) == 1 && len(b[testTD].JWTAuthorities()) == 1 })
	s.with(func() { s.entries[0].FederatesWith, s.entries[0].RevisionNumber = []string{"other.test"}, 1 })
	until("federated", func(b map[string]*jwtbundle.Bundle) bool {
		return len(b) == 2 && b["other.test"].HasJWTAuthority(foreign.KeyId)
	})
	s.rotateJWT(true)
	until("rotated", func(b map[string]*jwtbundle.Bundle) bool { return len(b) == 2 && len(b[testTD].JWTAuthorities()) == 2 })
}

// Workload API §6.2.3, §6.3: validated as JWT-SVID has it, with the bundle of the
// subject's trust domain; SPIFFE ID and claims come back.
func TestWorkloadAPISection623Validation(t *testing.T) {
	_, r := jwtServed(t)
	svids, err := r.fetchJWT(t, "", "a", "b")
	if err != nil {
		t.Fatal(err)
	}
	got, err := r.validate(t, "b", svids[0].Svid)
	if err != nil || got.SpiffeId != "spiffe://"+testTD+"/w" {
		t.Fatal(got, err)
	}
	claims := got.Claims.AsMap()
	if claims["sub"] != got.SpiffeId || fmt.Sprint(claims["aud"]) != "[a b]" || claims["exp"].(float64)-claims["iat"].(float64) != 300 || len(claims) != 4 {
		t.Error(claims)
	}
	for name, c := range map[string]struct{ audience, token string }{"no audience": {"", svids[0].Svid}, "no token": {"a", ""}} {
		_, err := r.validate(t, c.audience, c.token)
		wantCode(t, name, err, codes.InvalidArgument)
	}
}

// A caller without an identity may have a token of our own trust domain judged,
// and nobody else's.
func TestJWTValidationWithoutAnIdentity(t *testing.T) {
	s := newFakeServer(t)
	s.rotateJWT(true)
	s.start()
	r := startAgent(t, s)
	r.waitReady()
	mine := signToken(t, s.jwt.key, svid.JWTRequest{ID: spiffeid.RequireFromString("spiffe://" + testTD + "/w"), Audience: []string{"a"}, TTL: time.Minute, Now: time.Now()})
	if _, err := r.validate(t, "a", mine); err != nil {
		t.Error(err)
	}
	key, pub := jwtKey(t)
	s.with(func() { s.jwt.foreign = map[string]*types.JWTKey{"other.test": pub} })
	other := signToken(t, key, svid.JWTRequest{ID: spiffeid.RequireFromString("spiffe://other.test/w"), Audience: []string{"a"}, TTL: time.Minute, Now: time.Now()})
	_, err := r.validate(t, "a", other)
	wantCode(t, "another trust domain's", err, codes.InvalidArgument)
}

// A token is asked for once in half its life for each audience, whoever asks;
// the server may be away meanwhile.
func TestJWTIsKeptForHalfItsLife(t *testing.T) {
	s, r := jwtServed(t)
	var wg sync.WaitGroup
	for range 16 {
		wg.Go(func() {
			if _, err := r.fetchJWT(t, "", "a"); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if n := s.jwtCalls(); n != 1 {
		t.Errorf("%d calls for one token", n)
	}
	if _, err := r.fetchJWT(t, "", "b"); err != nil || s.jwtCalls() != 2 {
		t.Error(err, s.jwtCalls())
	}
	s.stop()
	if _, err := r.fetchJWT(t, "", "a"); err != nil {
		t.Error("the server is away, the token is there:", err)
	}
	_, err := r.fetchJWT(t, "", "c")
	wantCode(t, "the server is away", err, codes.Unavailable)
}

// Short-lived ones are renewed, and once the authority is being withdrawn the
// token is replaced whatever its age.
func TestJWTIsRenewed(t *testing.T) {
	s, r := jwtServed(t)
	s.with(func() { s.jwt.ttl = 16 * time.Second })
	first, err := r.fetchJWT(t, "", "a")
	if err != nil {
		t.Fatal(err)
	}
	s.with(func() {
		k := s.jwt.published[0]
		s.jwt.published = []*types.JWTKey{{PublicKey: k.PublicKey, KeyId: k.KeyId, ExpiresAt: k.ExpiresAt, Tainted: true}}
	})
	s.rotateJWT(true)
	eventually(t, "another token", func() bool {
		got, err := r.fetchJWT(t, "", "a")
		return err == nil && got[0].Svid != first[0].Svid
	})
}

// A workload that asks for ever new audiences is served, and what is kept for it
// stays bounded.
func TestJWTAudienceFlood(t *testing.T) {
	s, r := jwtServed(t)
	api, ctx := r.api(), testContext(t)
	for i := range 200 {
		if _, err := api.FetchJWTSVID(ctx, &workloadpb.JWTSVIDRequest{Audience: []string{fmt.Sprint(i)}}); err != nil {
			t.Fatal(err)
		}
	}
	before := s.jwtCalls()
	for i := 199; i >= 0; i-- { // the youngest are there still, the oldest are not
		if _, err := api.FetchJWTSVID(ctx, &workloadpb.JWTSVIDRequest{Audience: []string{fmt.Sprint(i)}}); err != nil {
			t.Fatal(err)
		}
	}
	if n := s.jwtCalls() - before; n != 200-64 {
		t.Errorf("%d of 200 were asked for again", n)
	}
}

// A stock server that makes no JWT-SVIDs of an entry, or none at all, is not a
// reason for the agent to lose its bundle.
func TestJWTOnAStockServer(t *testing.T) {
	s := newFakeServer(t)
	s.stock = true
	s.jwt.ttl = time.Minute
	s.rotateJWT(true)
	s.start()
	s.addEntry("/w", selfHash(t))
	r := startAgent(t, s)
	r.waitReady()
	svids, err := r.fetchJWT(t, "", "a")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := r.validate(t, "a", svids[0].Svid); err != nil {
		t.Fatal(err)
	}
}
