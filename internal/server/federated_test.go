package server

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"fmt"
	"math/big"
	"slices"
	"strings"
	"testing"
	"time"

	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/rootlink/rootlink/internal/forge"
)

// foreignCA makes the certificate of another trust domain's authority.
func foreignCA(t *testing.T, key crypto.Signer, bend func(*x509.Certificate)) *types.X509Certificate {
	t.Helper()
	c := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "other"},
		NotBefore: time.Unix(0, 0), NotAfter: time.Unix(1<<33, 0),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	if bend != nil {
		bend(c)
	}
	der, err := x509.CreateCertificate(rand.Reader, c, c, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	return &types.X509Certificate{Asn1: der}
}

func foreignBundle(t *testing.T, td string) *types.Bundle {
	return &types.Bundle{TrustDomain: td, X509Authorities: []*types.X509Certificate{foreignCA(t, forge.P256(t), nil)}, RefreshHint: 60, SequenceNumber: 9}
}

func jwtKey(t *testing.T, id string, pub any) *types.JWTKey {
	t.Helper()
	spki, err := x509.MarshalPKIXPublicKey(pub)
	if err != nil {
		t.Fatal(err)
	}
	return &types.JWTKey{KeyId: id, PublicKey: spki}
}

func (w *world) bundles() bundlev1.BundleClient { return bundlev1.NewBundleClient(w.admin) }

func (w *world) setBundle(b *types.Bundle) *types.Status {
	w.t.Helper()
	resp, err := w.bundles().BatchSetFederatedBundle(w.t.Context(), &bundlev1.BatchSetFederatedBundleRequest{Bundle: []*types.Bundle{b}})
	if err != nil {
		w.t.Fatal(err)
	}
	return resp.Results[0].Status
}

func TestFederatedBundleReachesAgents(t *testing.T) {
	w := newWorld(t, nil)
	n := w.attest(w.newTPM(), attestOptions{})
	b := foreignBundle(t, "other.org")
	b.JwtAuthorities = []*types.JWTKey{jwtKey(t, "k1", forge.P256(t).Public())}
	if st := w.setBundle(b); st.Code != 0 {
		t.Fatal(st)
	}
	e := entry(n.id, "/web", "binary:uid:33")
	e.FederatesWith = []string{"spiffe://other.org"}
	w.create(e)
	resp, err := entryv1.NewEntryClient(n.conn).GetAuthorizedEntries(t.Context(), new(entryv1.GetAuthorizedEntriesRequest))
	if err != nil || !slices.Equal(resp.Entries[0].FederatesWith, []string{"other.org"}) {
		t.Fatal(resp, err)
	}
	got, err := bundlev1.NewBundleClient(n.conn).GetFederatedBundle(t.Context(), &bundlev1.GetFederatedBundleRequest{TrustDomain: "other.org"})
	if err != nil || len(got.X509Authorities) != 1 || len(got.JwtAuthorities) != 1 || got.JwtAuthorities[0].KeyId != "k1" || got.RefreshHint != 60 || got.SequenceNumber != 9 {
		t.Fatal(got, err)
	}
	masked, err := bundlev1.NewBundleClient(n.conn).GetFederatedBundle(t.Context(), &bundlev1.GetFederatedBundleRequest{TrustDomain: "other.org", OutputMask: &types.BundleMask{RefreshHint: true}})
	if err != nil || len(masked.X509Authorities)+len(masked.JwtAuthorities) != 0 || masked.RefreshHint != 60 || masked.SequenceNumber != 0 {
		t.Fatal(masked, err)
	}
	// An update changes what its mask names, and nothing else.
	up, err := w.bundles().BatchUpdateFederatedBundle(t.Context(), &bundlev1.BatchUpdateFederatedBundleRequest{
		Bundle: []*types.Bundle{{TrustDomain: "other.org", SequenceNumber: 10}, {TrustDomain: "absent.org"}}, InputMask: &types.BundleMask{SequenceNumber: true},
	})
	if err != nil || up.Results[0].Bundle.SequenceNumber != 10 || len(up.Results[0].Bundle.X509Authorities) != 1 || codes.Code(up.Results[1].Status.Code) != codes.NotFound {
		t.Fatal(up, err)
	}
	made, err := w.bundles().BatchCreateFederatedBundle(t.Context(), &bundlev1.BatchCreateFederatedBundleRequest{Bundle: []*types.Bundle{b, foreignBundle(t, "third.org")}})
	if err != nil || codes.Code(made.Results[0].Status.Code) != codes.AlreadyExists || made.Results[1].Status.Code != 0 {
		t.Fatal(made, err)
	}
	if _, err := w.agents().BanAgent(t.Context(), &agentv1.BanAgentRequest{Id: idToProto(n.id)}); err != nil {
		t.Fatal(err)
	}
	if _, err := bundlev1.NewBundleClient(n.conn).GetFederatedBundle(t.Context(), &bundlev1.GetFederatedBundleRequest{TrustDomain: "other.org"}); reasonOf(err) != types.PermissionDeniedDetails_AGENT_BANNED {
		t.Fatal(err)
	}
}

// An agent or a workload that could set a bundle would say who other trust
// domains, or this one, are.
func TestRefusesBundleInjectedByAnAgent(t *testing.T) {
	w := newWorld(t, nil)
	n := w.attest(w.newTPM(), attestOptions{})
	w.create(entry(n.id, "/web", "binary:uid:33"))
	if st := w.setBundle(foreignBundle(t, "other.org")); st.Code != 0 {
		t.Fatal(st)
	}
	was := bundleOf(t, w.admin)
	for who, c := range map[string]bundlev1.BundleClient{
		"agent": bundlev1.NewBundleClient(n.conn), "workload": bundlev1.NewBundleClient(w.dialTCP(w.mint("/web"))), "nobody": bundlev1.NewBundleClient(w.dialTCP(nil)),
	} {
		b := []*types.Bundle{foreignBundle(t, "other.org"), foreignBundle(t, "new.org"), foreignBundle(t, td)}
		_, appended := c.AppendBundle(t.Context(), &bundlev1.AppendBundleRequest{X509Authorities: b[0].X509Authorities})
		_, created := c.BatchCreateFederatedBundle(t.Context(), &bundlev1.BatchCreateFederatedBundleRequest{Bundle: b})
		_, updated := c.BatchUpdateFederatedBundle(t.Context(), &bundlev1.BatchUpdateFederatedBundleRequest{Bundle: b})
		_, set := c.BatchSetFederatedBundle(t.Context(), &bundlev1.BatchSetFederatedBundleRequest{Bundle: b})
		_, deleted := c.BatchDeleteFederatedBundle(t.Context(), &bundlev1.BatchDeleteFederatedBundleRequest{TrustDomains: []string{"other.org"}, Mode: bundlev1.BatchDeleteFederatedBundleRequest_DELETE})
		_, published := c.PublishJWTAuthority(t.Context(), &bundlev1.PublishJWTAuthorityRequest{JwtAuthority: jwtKey(t, "k", forge.P256(t).Public())})
		for i, err := range []error{appended, created, updated, set, deleted, published} {
			if status.Code(err) != codes.PermissionDenied {
				t.Errorf("%s, call %d: %v", who, i, err)
			}
		}
	}
	// Not even an administrator puts a key of his own into this bundle.
	if _, err := w.bundles().AppendBundle(t.Context(), &bundlev1.AppendBundleRequest{X509Authorities: foreignBundle(t, "x").X509Authorities}); status.Code(err) != codes.Unimplemented {
		t.Error(err)
	}
	if now := bundleOf(t, w.admin); len(now.X509Authorities) != len(was.X509Authorities) || now.SequenceNumber != was.SequenceNumber {
		t.Error("the bundle has changed")
	}
	list, err := w.bundles().ListFederatedBundles(t.Context(), new(bundlev1.ListFederatedBundlesRequest))
	if err != nil || len(list.Bundles) != 1 {
		t.Fatal(list, err)
	}
}

func TestRefusesBadFederatedBundle(t *testing.T) {
	w := newWorld(t, nil)
	weak, err := rsa.GenerateKey(rand.Reader, 1024)
	if err != nil {
		t.Fatal(err)
	}
	key := forge.P256(t)
	own := bundleOf(t, w.admin)
	ca := foreignCA(t, key, nil)
	cas := func(list ...*types.X509Certificate) func(*types.Bundle) {
		return func(b *types.Bundle) { b.X509Authorities = list }
	}
	keys := func(list ...*types.JWTKey) func(*types.Bundle) {
		return func(b *types.Bundle) { b.JwtAuthorities = list }
	}
	for name, bend := range map[string]func(*types.Bundle){
		"our own authority":         cas(own.X509Authorities[0]),
		"a key of our JWT-SVIDs":    keys(own.JwtAuthorities[0]),
		"our key as a JWT key":      keys(&types.JWTKey{KeyId: "x", PublicKey: spkiOf(t, own.X509Authorities[0])}),
		"no certificate":            cas(&types.X509Certificate{}),
		"nil":                       cas(nil),
		"garbage":                   cas(&types.X509Certificate{Asn1: []byte("garbage")}),
		"trailing bytes":            cas(&types.X509Certificate{Asn1: append(slices.Clone(ca.Asn1), 0)}),
		"two certificates in one":   cas(&types.X509Certificate{Asn1: append(slices.Clone(ca.Asn1), ca.Asn1...)}),
		"a leaf":                    cas(foreignCA(t, key, func(c *x509.Certificate) { c.IsCA = false; c.KeyUsage = x509.KeyUsageDigitalSignature })),
		"RSA of 1024 bits":          cas(foreignCA(t, weak, nil)),
		"JWT key of 1024 bits":      keys(jwtKey(t, "k", weak.Public())),
		"JWT key without an ID":     keys(jwtKey(t, "", key.Public())),
		"JWT key with a long ID":    keys(jwtKey(t, strings.Repeat("k", 4096), key.Public())),
		"JWT key that is none":      keys(&types.JWTKey{KeyId: "k", PublicKey: []byte("none")}),
		"two JWT keys of one ID":    keys(jwtKey(t, "k", key.Public()), jwtKey(t, "k", forge.P256(t).Public())),
		"nil JWT key":               keys(nil),
		"negative expiry":           keys(&types.JWTKey{KeyId: "k", PublicKey: jwtKey(t, "k", key.Public()).PublicKey, ExpiresAt: -1}),
		"negative refresh hint":     func(b *types.Bundle) { b.RefreshHint = -1 },
		"too many authorities":      cas(slices.Repeat([]*types.X509Certificate{ca}, 257)...),
		"a certificate of 600 KiB":  cas(foreignCA(t, key, func(c *x509.Certificate) { c.Subject.CommonName = strings.Repeat("x", 600<<10) })),
		"this very trust domain":    func(b *types.Bundle) { b.TrustDomain = td },
		"this very one, as an ID":   func(b *types.Bundle) { b.TrustDomain = "spiffe://" + td },
		"no name":                   func(b *types.Bundle) { b.TrustDomain = "" },
		"upper case":                func(b *types.Bundle) { b.TrustDomain = "Other.org" },
		"a port":                    func(b *types.Bundle) { b.TrustDomain = "other.org:443" },
		"a zero byte":               func(b *types.Bundle) { b.TrustDomain = "other.org\x00" },
		"a slash":                   func(b *types.Bundle) { b.TrustDomain = "other.org/../example.org" },
		"escaped":                   func(b *types.Bundle) { b.TrustDomain = "other%2eorg" },
		"a user":                    func(b *types.Bundle) { b.TrustDomain = "spiffe://me@other.org" },
		"256 bytes":                 func(b *types.Bundle) { b.TrustDomain = strings.Repeat("a", 256) },
		"a megabyte":                func(b *types.Bundle) { b.TrustDomain = strings.Repeat("a", 1<<20) },
		"Cyrillic that looks alike": func(b *types.Bundle) { b.TrustDomain = "оther.org" },
	} {
		b := foreignBundle(t, "other.org")
		bend(b)
		st := w.setBundle(b)
		if codes.Code(st.Code) != codes.InvalidArgument {
			t.Errorf("%s: %v", name, st)
		}
		if len(st.Message) > 1024 {
			t.Errorf("%s: an error of %d bytes", name, len(st.Message))
		}
	}
	if list, err := w.srv.store.FederatedBundles(); err != nil || len(list) != 0 {
		t.Fatal(list, err)
	}
	// What is fit: other kinds of keys, no authorities at all, a name as an ID.
	_, ed, err := ed25519.GenerateKey(nil)
	if err != nil {
		t.Fatal(err)
	}
	good := foreignBundle(t, "spiffe://other.org")
	good.X509Authorities = append(good.X509Authorities, foreignCA(t, ed, nil))
	for _, b := range []*types.Bundle{good, {TrustDomain: "empty.org"}} {
		if st := w.setBundle(b); st.Code != 0 {
			t.Error(st)
		}
	}
	if b, err := w.srv.store.FederatedBundle("other.org"); err != nil || len(b.X509Authorities) != 2 {
		t.Fatal(b, err)
	}
}

func spkiOf(t *testing.T, c *types.X509Certificate) []byte {
	t.Helper()
	cert, err := x509.ParseCertificate(c.Asn1)
	if err != nil {
		t.Fatal(err)
	}
	if _, ok := cert.PublicKey.(*ecdsa.PublicKey); !ok {
		t.Fatalf("%T", cert.PublicKey)
	}
	return cert.RawSubjectPublicKeyInfo
}

// What somebody sends by the megabyte is refused, shortly.
func TestRefusesOversizedEntries(t *testing.T) {
	w := newWorld(t, nil)
	long := strings.Repeat("x", 3<<20)
	for name, bend := range map[string]func(*types.Entry){
		"selector value": func(e *types.Entry) { e.Selectors[0].Value = long },
		"selector type":  func(e *types.Entry) { e.Selectors[0].Type = long + ":" },
		"SPIFFE ID":      func(e *types.Entry) { e.SpiffeId.Path = "/" + long },
		"trust domain":   func(e *types.Entry) { e.SpiffeId.TrustDomain = long },
		"parent":         func(e *types.Entry) { e.ParentId.TrustDomain = long },
		"ID":             func(e *types.Entry) { e.Id = long },
		"hint":           func(e *types.Entry) { e.Hint = long },
		"DNS name":       func(e *types.Entry) { e.DnsNames = []string{long} },
		"DNS names":      func(e *types.Entry) { e.DnsNames = slices.Repeat([]string{"a.example.org"}, 10000) },
		"federated":      func(e *types.Entry) { e.FederatesWith = []string{long} },
		"many federated": func(e *types.Entry) { e.FederatesWith = slices.Repeat([]string{"a.org"}, 10000) },
	} {
		e := entry("spiffe://"+td+"/host", "/web", "unix:uid:1")
		bend(e)
		st := w.tryCreate(e).Status
		if codes.Code(st.Code) != codes.InvalidArgument || len(st.Message) > 1024 {
			t.Errorf("%s: %d, %d bytes", name, st.Code, len(st.Message))
		}
	}
	// Ten megabytes do not get as far.
	e := entry("spiffe://"+td+"/host", "/web", "unix:uid:1")
	e.Selectors[0].Value = strings.Repeat("x", 10<<20)
	if _, err := w.entries().BatchCreateEntry(t.Context(), &entryv1.BatchCreateEntryRequest{Entries: []*types.Entry{e}}); status.Code(err) != codes.ResourceExhausted {
		t.Errorf("a selector of 10 MB: %v", status.Code(err))
	}
	if _, err := w.entries().ListEntries(t.Context(), &entryv1.ListEntriesRequest{Filter: &entryv1.ListEntriesRequest_Filter{
		BySelectors: &types.SelectorMatch{Selectors: slices.Repeat([]*types.Selector{{Type: "a", Value: "b"}}, 100000)},
	}}); status.Code(err) != codes.InvalidArgument {
		t.Errorf("a filter of 100,000 selectors: %v", err)
	}
}

// A batch whose answer no client would take would be done, and nobody told.
func TestRefusesBatchThatCannotBeAnswered(t *testing.T) {
	w := newWorld(t, nil)
	var batch []*types.Entry
	var ids []string
	for i := range 30000 {
		e := entry("spiffe://"+td+"/h", fmt.Sprintf("/%d", i), "unix:uid:1")
		batch, ids = append(batch, e), append(ids, fmt.Sprintf("%036d", i))
	}
	_, err := w.entries().BatchCreateEntry(t.Context(), &entryv1.BatchCreateEntryRequest{Entries: batch})
	if status.Code(err) != codes.ResourceExhausted {
		t.Errorf("create: %v", err)
	}
	if _, err := w.entries().BatchUpdateEntry(t.Context(), &entryv1.BatchUpdateEntryRequest{Entries: batch}); status.Code(err) != codes.ResourceExhausted {
		t.Errorf("update: %v", err)
	}
	if _, err := w.entries().BatchDeleteEntry(t.Context(), &entryv1.BatchDeleteEntryRequest{Ids: ids}); status.Code(err) != codes.ResourceExhausted {
		t.Errorf("delete: %v", err)
	}
	if _, err := w.bundles().BatchDeleteFederatedBundle(t.Context(), &bundlev1.BatchDeleteFederatedBundleRequest{TrustDomains: ids[:501]}); status.Code(err) != codes.InvalidArgument {
		t.Errorf("bundles: %v", err)
	}
	all, err := w.srv.store.Entries()
	if err != nil || len(all) != 0 {
		t.Fatalf("%d entries were made, %v", len(all), err)
	}
	// As many as fit are done in one go.
	resp, err := w.entries().BatchCreateEntry(t.Context(), &entryv1.BatchCreateEntryRequest{Entries: batch[:10000]})
	if err != nil || len(resp.Results) != 10000 || resp.Results[9999].Status.Code != 0 {
		t.Fatal(err)
	}
}

// A page token is a place in a list, no more: one that was made up shows
// nothing that the list does not.
func TestForgedPageTokens(t *testing.T) {
	w := newWorld(t, nil)
	n := w.attest(w.newTPM(), attestOptions{})
	for i := range 3 {
		w.create(entry(n.id, fmt.Sprintf("/%d", i), "unix:uid:1"))
		if st := w.setBundle(foreignBundle(t, fmt.Sprintf("%c.org", 'a'+i))); st.Code != 0 {
			t.Fatal(st)
		}
	}
	for _, token := range []string{"-1", "0", "zzz", "\xff\xfe", "' OR 1=1 --", strings.Repeat("9", 1<<20)} {
		token = strings.ToValidUTF8(token, "\ufffd")
		entries, err := w.entries().ListEntries(t.Context(), &entryv1.ListEntriesRequest{PageToken: token, PageSize: 500})
		if err != nil || len(entries.Entries) > 3 {
			t.Errorf("entries: %v", err)
		}
		agents, err := w.agents().ListAgents(t.Context(), &agentv1.ListAgentsRequest{PageToken: token})
		if err != nil || len(agents.Agents) > 1 {
			t.Errorf("agents: %v", err)
		}
		bundles, err := w.bundles().ListFederatedBundles(t.Context(), &bundlev1.ListFederatedBundlesRequest{PageToken: token})
		if err != nil || len(bundles.Bundles) > 3 {
			t.Errorf("bundles: %v", err)
		}
	}
	var seen []string
	req := &bundlev1.ListFederatedBundlesRequest{PageSize: 2}
	for {
		page, err := w.bundles().ListFederatedBundles(t.Context(), req)
		if err != nil || len(page.Bundles) > 2 {
			t.Fatal(page, err)
		}
		for _, b := range page.Bundles {
			seen = append(seen, b.TrustDomain)
		}
		if req.PageToken = page.NextPageToken; req.PageToken == "" {
			break
		}
	}
	if !slices.Equal(seen, []string{"a.org", "b.org", "c.org"}) {
		t.Fatal(seen)
	}
	if _, err := w.bundles().ListFederatedBundles(t.Context(), &bundlev1.ListFederatedBundlesRequest{PageSize: -1}); status.Code(err) != codes.InvalidArgument {
		t.Error(err)
	}
}

func TestEntriesByWhatTheyFederateWith(t *testing.T) {
	w := newWorld(t, nil)
	for _, td := range []string{"a.org", "b.org", "c.org"} {
		w.setBundle(foreignBundle(t, td))
	}
	for path, tds := range map[string][]string{"/none": nil, "/a": {"a.org"}, "/ab": {"b.org", "spiffe://a.org", "b.org"}, "/c": {"c.org"}} {
		e := entry("spiffe://"+td+"/host", path, "unix:uid:1")
		e.FederatesWith = tds
		w.create(e)
	}
	for _, c := range []struct {
		match types.FederatesWithMatch_MatchBehavior
		tds   []string
		want  string
	}{
		{types.FederatesWithMatch_MATCH_EXACT, []string{"b.org", "a.org"}, "/ab"},
		{types.FederatesWithMatch_MATCH_SUBSET, []string{"a.org", "b.org"}, "/a /ab"},
		{types.FederatesWithMatch_MATCH_SUPERSET, []string{"spiffe://a.org"}, "/a /ab"},
		{types.FederatesWithMatch_MATCH_ANY, []string{"c.org", "b.org"}, "/ab /c"},
	} {
		f := &types.FederatesWithMatch{TrustDomains: c.tds, Match: c.match}
		list, err := w.entries().ListEntries(t.Context(), &entryv1.ListEntriesRequest{Filter: &entryv1.ListEntriesRequest_Filter{ByFederatesWith: f}})
		if err != nil {
			t.Fatal(err)
		}
		var got []string
		for _, e := range list.Entries {
			got = append(got, e.SpiffeId.Path)
		}
		if s := strings.Join(sorted(got), " "); s != c.want {
			t.Errorf("%v %v: %s, want %s", c.match, c.tds, s, c.want)
		}
		count, err := w.entries().CountEntries(t.Context(), &entryv1.CountEntriesRequest{Filter: &entryv1.CountEntriesRequest_Filter{ByFederatesWith: f}})
		if err != nil || int(count.Count) != len(got) {
			t.Error(count, err)
		}
	}
	for _, tds := range [][]string{nil, {"Bad Name"}} {
		if _, err := w.entries().ListEntries(t.Context(), &entryv1.ListEntriesRequest{Filter: &entryv1.ListEntriesRequest_Filter{ByFederatesWith: &types.FederatesWithMatch{TrustDomains: tds}}}); status.Code(err) != codes.InvalidArgument {
			t.Errorf("%v: %v", tds, err)
		}
	}
}
