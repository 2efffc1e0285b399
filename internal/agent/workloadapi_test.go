package agent

import (
	"bytes"
	"cmp"
	"context"
	"crypto"
	"crypto/x509"
	"slices"
	"strings"
	"testing"
	"time"

	workloadpb "github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/rootlink/rootlink/internal/cli"
)

func (s *fakeServer) GetFederatedBundle(_ context.Context, req *bundlev1.GetFederatedBundleRequest) (*types.Bundle, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	der, ok := s.federated[req.TrustDomain]
	key := s.jwt.foreign[req.TrustDomain]
	if !ok && key == nil {
		return nil, status.Error(codes.NotFound, "no such bundle")
	}
	b := &types.Bundle{TrustDomain: cmp.Or(s.misnamed, req.TrustDomain)}
	if ok {
		b.X509Authorities = append(b.X509Authorities, &types.X509Certificate{Asn1: der})
	}
	if key != nil {
		b.JwtAuthorities = append(b.JwtAuthorities, key)
	}
	return b, nil
}

// federate gives the entry's workload the bundles of other trust domains and
// returns them, by trust domain ID.
func (s *fakeServer) federate(id string, tds ...string) map[string][]byte {
	out := make(map[string][]byte)
	for _, td := range tds {
		out["spiffe://"+td] = newFakeServer(s.t).ca.Raw
	}
	s.with(func() {
		s.federated = make(map[string][]byte)
		for _, td := range tds {
			s.federated[td] = out["spiffe://"+td]
		}
		for _, e := range s.entries {
			if e.Id == id {
				e.FederatesWith, e.RevisionNumber = tds, e.RevisionNumber+1
			}
		}
	})
	return out
}

func sameBundles(a, b map[string][]byte) bool {
	for td, der := range a {
		if !bytes.Equal(b[td], der) {
			return false
		}
	}
	return len(a) == len(b)
}

// wantComplete demands all that X509SVIDResponse must hold.
func wantComplete(t *testing.T, resp *workloadpb.X509SVIDResponse) {
	t.Helper()
	if len(resp.Svids) == 0 {
		t.Error("no SVID in the message")
	}
	for _, s := range resp.Svids {
		certs, err := x509.ParseCertificates(s.X509Svid)
		if err != nil || len(certs) == 0 {
			t.Fatalf("x509_svid: %d certificates, %v", len(certs), err)
		}
		leaf := certs[0]
		if leaf.IsCA || len(leaf.URIs) != 1 || leaf.URIs[0].String() != s.SpiffeId {
			t.Errorf("the leaf of %s does not come first", s.SpiffeId)
		}
		key, err := x509.ParsePKCS8PrivateKey(s.X509SvidKey)
		if err != nil {
			t.Fatalf("x509_svid_key: %v", err)
		}
		if pub := publicKeyOf(key); pub == nil || !pub.Equal(leaf.PublicKey) {
			t.Error("the key is not the SVID's")
		}
		bundle, err := x509.ParseCertificates(s.Bundle)
		if err != nil || len(bundle) == 0 {
			t.Fatalf("bundle: %d certificates, %v", len(bundle), err)
		}
	}
}

// next receives messages, each of which must be complete, until ok is true of
// one: several changes may come in one message or in more.
func next(t *testing.T, stream workloadpb.SpiffeWorkloadAPI_FetchX509SVIDClient, what string, ok func(*workloadpb.X509SVIDResponse) bool) {
	t.Helper()
	for {
		resp, err := stream.Recv()
		if err != nil {
			t.Fatalf("%s: %v", what, err)
		}
		wantComplete(t, resp)
		if ok(resp) {
			return
		}
	}
}

func idsOf(resp *workloadpb.X509SVIDResponse) string {
	var out []string
	for _, s := range resp.Svids {
		out = append(out, strings.TrimPrefix(s.SpiffeId, "spiffe://"+testTD))
	}
	return strings.Join(out, " ")
}

// Whatever it is that changed, the message has everything.
func TestWorkloadAPISection43EachMessageHasTheFullSet(t *testing.T) {
	s := newFakeServer(t)
	s.start()
	first := s.addEntry("/a", selfHash(t))
	foreign := s.federate(first, "other.test")
	r := startAgent(t, s)
	r.waitReady()
	stream, resp, err := r.fetch()
	if err != nil {
		t.Fatal(err)
	}
	wantComplete(t, resp)
	if idsOf(resp) != "/a" || !sameBundles(resp.FederatedBundles, foreign) {
		t.Errorf("first message: %s, %d federated", idsOf(resp), len(resp.FederatedBundles))
	}
	second := s.addEntry("/b", selfHash(t))
	next(t, stream, "an entry more", func(m *workloadpb.X509SVIDResponse) bool {
		return idsOf(m) == "/a /b" && sameBundles(m.FederatedBundles, foreign)
	})
	s.rotate(true)
	next(t, stream, "another authority", func(m *workloadpb.X509SVIDResponse) bool {
		b, err := x509.ParseCertificates(m.Svids[0].Bundle)
		return err == nil && len(b) == 2 && idsOf(m) == "/a /b" && sameBundles(m.FederatedBundles, foreign)
	})
	s.deleteEntry(second)
	next(t, stream, "an entry less", func(m *workloadpb.X509SVIDResponse) bool {
		return idsOf(m) == "/a" && sameBundles(m.FederatedBundles, foreign)
	})
}

// A request is what makes a message, whether or not anything ever changes.
func TestWorkloadAPISection43FirstMessageComesAtOnce(t *testing.T) {
	_, r := served(t, func(c *Config) { c.SyncInterval = time.Hour })
	api, ctx := workloadpb.NewSpiffeWorkloadAPIClient(r.dial()), testContext(t)
	for range 3 { // streams of one connection, all left open
		svids, err := api.FetchX509SVID(ctx, &workloadpb.X509SVIDRequest{})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := svids.Recv(); err != nil {
			t.Error(err)
		}
		bundles, err := api.FetchX509Bundles(ctx, &workloadpb.X509BundlesRequest{})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := bundles.Recv(); err != nil {
			t.Error(err)
		}
	}
	if _, _, err := r.fetch(); err != nil { // another connection
		t.Error(err)
	}
}

// What is withdrawn is absent from the next message; when it is all, the stream
// ends with PermissionDenied.
func TestWorkloadAPISection44WithdrawnIsAbsent(t *testing.T) {
	s := newFakeServer(t)
	s.start()
	first, second := s.addEntry("/a", selfHash(t)), s.addEntry("/b", selfHash(t))
	s.federate(first, "one.test", "two.test")
	r := startAgent(t, s)
	r.waitReady()
	stream, resp, err := r.fetch()
	if err != nil {
		t.Fatal(err)
	}
	if len(resp.FederatedBundles) != 2 {
		t.Fatalf("%d federated bundles", len(resp.FederatedBundles))
	}
	left := s.federate(first, "two.test")
	next(t, stream, "a federated bundle less", func(m *workloadpb.X509SVIDResponse) bool {
		return idsOf(m) == "/a /b" && sameBundles(m.FederatedBundles, left)
	})
	s.deleteEntry(first)
	next(t, stream, "an entry less", func(m *workloadpb.X509SVIDResponse) bool {
		return idsOf(m) == "/b" && len(m.FederatedBundles) == 0
	})
	s.deleteEntry(second)
	for err = nil; err == nil; {
		_, err = stream.Recv()
	}
	wantCode(t, "no entry left", err, codes.PermissionDenied)
}

func TestWorkloadAPISection46FederatedBundlesAreKeyedByTrustDomain(t *testing.T) {
	s := newFakeServer(t)
	s.start()
	mine := s.addEntry("/mine", selfHash(t))
	other := s.addEntry("/other", "binary:uid:4294967294")
	foreign := s.federate(mine, "one.test", "two.test")
	s.with(func() { // a bundle that only somebody else's entry names is not for us
		s.federated["three.test"] = s.ca.Raw
		for _, e := range s.entries {
			if e.Id == other {
				e.FederatesWith = []string{"three.test"}
			}
		}
	})
	r := startAgent(t, s)
	r.waitReady()
	_, resp, err := r.fetch()
	if err != nil {
		t.Fatal(err)
	}
	if !sameBundles(resp.FederatedBundles, foreign) {
		t.Errorf("federated bundles of %d trust domains", len(resp.FederatedBundles))
	}
	stream, err := workloadpb.NewSpiffeWorkloadAPIClient(r.dial()).FetchX509Bundles(testContext(t), &workloadpb.X509BundlesRequest{})
	if err != nil {
		t.Fatal(err)
	}
	bundles, err := stream.Recv()
	if err != nil {
		t.Fatal(err)
	}
	foreign["spiffe://"+testTD] = s.ca.Raw
	if !sameBundles(bundles.Bundles, foreign) {
		t.Errorf("bundles of %d trust domains", len(bundles.Bundles))
	}
}

// An entry that comes between two looks at the bundles is not served without the
// bundle that it names: the first message has the full set, too.
func TestWorkloadAPISection43NewEntryComesWithItsFederatedBundle(t *testing.T) {
	s := newFakeServer(t)
	s.start()
	r := startAgent(t, s, func(c *Config) { c.SyncInterval = time.Hour })
	r.waitReady()
	foreign := s.federate(s.addEntry("/mine", selfHash(t)), "one.test")
	_, resp, err := r.fetch()
	if err != nil {
		t.Fatal(err)
	}
	if !sameBundles(resp.FederatedBundles, foreign) {
		t.Errorf("federated bundles of %d trust domains", len(resp.FederatedBundles))
	}
}

func TestWorkloadAPISection521MandatoryFields(t *testing.T) {
	s, r := served(t)
	s.addEntry("/second", selfHash(t))
	_, resp, err := r.fetch()
	if err != nil {
		t.Fatal(err)
	}
	wantComplete(t, resp)
}

// Of entries with one hint only the oldest is served.
func TestWorkloadAPISection521HintsAreUnique(t *testing.T) {
	s := newFakeServer(t)
	s.start()
	for _, path := range []string{"/a", "/b", "/c"} {
		s.addEntry(path, selfHash(t))
	}
	s.with(func() { s.entries[0].Hint, s.entries[1].Hint = "internal", "internal" })
	r := startAgent(t, s)
	r.waitReady()
	_, resp, err := r.fetch()
	if err != nil {
		t.Fatal(err)
	}
	if idsOf(resp) != "/a /c" || resp.Svids[0].Hint != "internal" || resp.Svids[1].Hint != "" {
		t.Errorf("got %s, first hint %q", idsOf(resp), resp.Svids[0].Hint)
	}
}

func TestWorkloadAPISection521NoIdentityIsPermissionDenied(t *testing.T) {
	s := newFakeServer(t)
	s.start()
	r := startAgent(t, s)
	r.waitReady()
	_, _, err := r.fetch()
	wantCode(t, "FetchX509SVID", err, codes.PermissionDenied)
	if n := len(status.Convert(err).Message()); n > 2000 {
		t.Errorf("message of %d bytes", n)
	}
}

func TestWorkloadAPISection522OwnBundleIsAlwaysThere(t *testing.T) {
	s, r := served(t)
	stream, err := workloadpb.NewSpiffeWorkloadAPIClient(r.dial()).FetchX509Bundles(testContext(t), &workloadpb.X509BundlesRequest{})
	if err != nil {
		t.Fatal(err)
	}
	own := "spiffe://" + testTD
	resp, err := stream.Recv()
	if err != nil {
		t.Fatal(err)
	}
	if !sameBundles(resp.Bundles, map[string][]byte{own: s.ca.Raw}) {
		t.Errorf("bundles of %d trust domains", len(resp.Bundles))
	}
	s.rotate(true)
	if resp, err = stream.Recv(); err != nil {
		t.Fatal(err)
	}
	if cs, err := x509.ParseCertificates(resp.Bundles[own]); err != nil || len(cs) != 2 {
		t.Errorf("after the rotation: %d authorities (%v)", len(cs), err)
	}
}

// The default identity is the first, and stays so when others come, wherever the
// server puts them in its answer.
func TestWorkloadAPISection53DefaultIdentityComesFirst(t *testing.T) {
	s, r := served(t)
	stream, resp, err := r.fetch()
	if err != nil {
		t.Fatal(err)
	}
	if idsOf(resp) != "/w" {
		t.Fatal(idsOf(resp))
	}
	s.with(func() {
		e := proto.Clone(s.entries[0]).(*types.Entry)
		e.Id, e.SpiffeId.Path, e.CreatedAt = "a", "/a", e.CreatedAt+1 // before it by ID and place
		s.entries = slices.Insert(s.entries, 0, e)
	})
	next(t, stream, "an entry more", func(m *workloadpb.X509SVIDResponse) bool { return idsOf(m) == "/w /a" })
}

// Profiles that are not supported answer Unimplemented, and say what to do.
func wantUnimplemented(t *testing.T, methods ...string) {
	t.Helper()
	_, r := served(t)
	conn, ctx := r.dial(), testContext(t)
	for _, m := range methods {
		err := callEmpty(ctx, conn, "/SpiffeWorkloadAPI/"+m)
		wantCode(t, m, err, codes.Unimplemented)
		if what, hint := cli.CutHint(status.Convert(err).Message()); what == "" || hint == "" {
			t.Errorf("%s: no sentence that says why, and what to do", m)
		}
	}
}

func TestWorkloadAPISection7WITIsUnimplemented(t *testing.T) {
	wantUnimplemented(t, "FetchWITSVID", "FetchWITBundles")
}

func TestSPIFFEIDSection23LongestIDIsServed(t *testing.T) {
	s := newFakeServer(t)
	s.start()
	id := "spiffe://" + testTD + "/"
	id += strings.Repeat("a", 2048-len(id))
	s.addEntry(strings.TrimPrefix(id, "spiffe://"+testTD), selfHash(t))
	r := startAgent(t, s)
	r.waitReady()
	_, resp, err := r.fetch()
	if err != nil {
		t.Fatal(err)
	}
	wantComplete(t, resp)
	if len(resp.Svids) != 1 || resp.Svids[0].SpiffeId != id {
		t.Error("another ID")
	}
}

// publicKeyOf returns the public half of a private key, nil when it has none.
func publicKeyOf(key any) interface{ Equal(crypto.PublicKey) bool } {
	s, ok := key.(crypto.Signer)
	if !ok {
		return nil
	}
	pub, _ := s.Public().(interface{ Equal(crypto.PublicKey) bool })
	return pub
}
