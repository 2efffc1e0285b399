package server

import (
	"fmt"
	"strings"
	"testing"
	"time"

	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

const parent = "spiffe://" + td + "/node"

func (w *world) tryCreate(e *types.Entry) *entryv1.BatchCreateEntryResponse_Result {
	w.t.Helper()
	resp, err := w.entries().BatchCreateEntry(w.t.Context(), &entryv1.BatchCreateEntryRequest{Entries: []*types.Entry{e}})
	if err != nil {
		w.t.Fatal(err)
	}
	return resp.Results[0]
}

func TestEntryValidation(t *testing.T) {
	w := newWorld(t, nil)
	hash := strings.Repeat("0", 64)
	with := func(f func(*types.Entry)) *types.Entry {
		e := entry(parent, "/web", "binary:uid:33")
		f(e)
		return e
	}
	for name, e := range map[string]*types.Entry{
		"missing":                nil,
		"no SPIFFE ID":           with(func(e *types.Entry) { e.SpiffeId = nil }),
		"no parent":              with(func(e *types.Entry) { e.ParentId = nil }),
		"other trust domain":     with(func(e *types.Entry) { e.SpiffeId.TrustDomain = "example.com" }),
		"no path":                with(func(e *types.Entry) { e.SpiffeId.Path = "" }),
		"dot segment":            with(func(e *types.Entry) { e.SpiffeId.Path = "/a/../b" }),
		"becomes an agent":       with(func(e *types.Entry) { e.SpiffeId.Path = "/spire/agent/tpmnode/" + hash }),
		"becomes the server":     with(func(e *types.Entry) { e.SpiffeId.Path = "/spire/server" }),
		"own parent":             with(func(e *types.Entry) { e.ParentId = e.SpiffeId }),
		"no selectors":           with(func(e *types.Entry) { e.Selectors = nil }),
		"empty selector value":   entry(parent, "/web", "binary:"),
		"control character":      entry(parent, "/web", "binary:path:/a\nb"),
		"huge selector":          entry(parent, "/web", "binary:path:/"+strings.Repeat("a", 1100)),
		"short hash":             entry(parent, "/web", "binary:sha256:00"),
		"upper-case hash":        entry(parent, "/web", "binary:sha256:"+strings.Repeat("A", 64)),
		"negative TTL":           with(func(e *types.Entry) { e.X509SvidTtl = -1 }),
		"TTL over the authority": with(func(e *types.Entry) { e.X509SvidTtl = 100 * 24 * 3600 }),
		"negative expiry":        with(func(e *types.Entry) { e.ExpiresAt = -1 }),
		"bad DNS name":           with(func(e *types.Entry) { e.DnsNames = []string{"a b"} }),
		"bad ID":                 with(func(e *types.Entry) { e.Id = "a/b" }),
		"federation":             with(func(e *types.Entry) { e.FederatesWith = []string{"example.com"} }),
		"downstream":             with(func(e *types.Entry) { e.Downstream = true }),
		"step without recorder":  entry(parent, "/build", sel("tool:", "go")),
		"step without tool":      entry(parent, "/build", sel("recorder:", "rootlink")),
		"unprotected, no tool":   entry(parent, "/build", sel("recorder_unprotected:", "rootlink")),
		"stored, selectors mixed": with(func(e *types.Entry) {
			e.StoreSvid = true
			e.Selectors = append(e.Selectors, &types.Selector{Type: "unix", Value: "uid:1"})
		}),
	} {
		t.Run(name, func(t *testing.T) {
			if r := w.tryCreate(e); r.Status.Code != int32(codes.InvalidArgument) || r.Entry != nil {
				t.Errorf("%v", r)
			}
		})
	}
	resp, err := w.entries().CountEntries(t.Context(), &entryv1.CountEntriesRequest{})
	if err != nil || resp.Count != 0 {
		t.Fatalf("%v, %v", resp, err)
	}
}

func TestSimilarEntryExistsAlready(t *testing.T) {
	w := newWorld(t, nil)
	first := w.create(entry(parent, "/web", "binary:uid:33", "binary:gid:33"))
	r := w.tryCreate(entry(parent, "/web", "binary:gid:33", "binary:uid:33"))
	if r.Status.Code != int32(codes.AlreadyExists) || r.Entry.GetId() != first {
		t.Fatalf("%v", r)
	}
	other := w.create(entry(parent, "/web", "binary:uid:34"))
	upd := entry(parent, "/web", "binary:gid:33", "binary:uid:33")
	upd.Id = other
	resp, err := w.entries().BatchUpdateEntry(t.Context(), &entryv1.BatchUpdateEntryRequest{Entries: []*types.Entry{upd}})
	if err != nil || resp.Results[0].Status.Code != int32(codes.AlreadyExists) {
		t.Fatalf("%v, %v", resp, err)
	}
}

func TestUpdateEntry(t *testing.T) {
	w := newWorld(t, nil)
	e := entry(parent, "/web", "binary:uid:33")
	e.DnsNames, e.Hint, e.X509SvidTtl = []string{"web.example.org"}, "internal", 600
	id := w.create(e)
	one := func(e *types.Entry, mask *types.EntryMask) *entryv1.BatchUpdateEntryResponse_Result {
		t.Helper()
		resp, err := w.entries().BatchUpdateEntry(t.Context(), &entryv1.BatchUpdateEntryRequest{Entries: []*types.Entry{e}, InputMask: mask})
		if err != nil {
			t.Fatal(err)
		}
		return resp.Results[0]
	}
	r := one(&types.Entry{Id: id, X509SvidTtl: 60}, &types.EntryMask{X509SvidTtl: true})
	if got := r.Entry; r.Status.Code != 0 || got.X509SvidTtl != 60 || got.Hint != "internal" || got.RevisionNumber != 1 {
		t.Fatalf("%v", r)
	}
	// Without a mask everything is replaced, as SPIRE's command line expects.
	all := entry(parent, "/web2", "binary:uid:34")
	all.Id = id
	r = one(all, nil)
	if got := r.Entry; r.Status.Code != 0 || got.X509SvidTtl != 0 || got.Hint != "" || len(got.DnsNames) != 0 ||
		got.SpiffeId.Path != "/web2" || got.RevisionNumber != 2 || got.CreatedAt == 0 {
		t.Fatalf("%v", r)
	}
	// One with half of a step is refused, and nothing changes.
	if r := one(&types.Entry{Id: id, Selectors: entry(parent, "/x", sel("tool:", "go")).Selectors}, &types.EntryMask{Selectors: true}); r.Status.Code != int32(codes.InvalidArgument) {
		t.Fatalf("%v", r)
	}
	if r := one(&types.Entry{Id: "nobody"}, nil); r.Status.Code != int32(codes.NotFound) {
		t.Fatalf("%v", r)
	}
	got, err := w.entries().GetEntry(t.Context(), &entryv1.GetEntryRequest{Id: id, OutputMask: &types.EntryMask{RevisionNumber: true}})
	if err != nil || got.RevisionNumber != 2 || got.SpiffeId != nil {
		t.Fatalf("%v, %v", got, err)
	}
	del, err := w.entries().BatchDeleteEntry(t.Context(), &entryv1.BatchDeleteEntryRequest{Ids: []string{id, id, ""}})
	if err != nil {
		t.Fatal(err)
	}
	for i, want := range []codes.Code{codes.OK, codes.NotFound, codes.InvalidArgument} {
		if del.Results[i].Status.Code != int32(want) {
			t.Errorf("delete %d: %v", i, del.Results[i])
		}
	}
	if _, err := w.entries().GetEntry(t.Context(), &entryv1.GetEntryRequest{Id: id}); status.Code(err) != codes.NotFound {
		t.Fatal(err)
	}
}

func TestListEntries(t *testing.T) {
	w := newWorld(t, nil)
	for i := range 7 {
		e := entry(parent, fmt.Sprintf("/w%d", i), "unix:gid:1", fmt.Sprintf("unix:uid:%d", i%2))
		e.Hint = fmt.Sprint(i % 3)
		w.create(e)
	}
	match := func(b types.SelectorMatch_MatchBehavior, s ...string) *entryv1.ListEntriesRequest_Filter {
		return &entryv1.ListEntriesRequest_Filter{BySelectors: &types.SelectorMatch{Match: b, Selectors: entry(parent, "/x", s...).Selectors}}
	}
	for name, c := range map[string]struct {
		f    *entryv1.ListEntriesRequest_Filter
		want int
	}{
		"all":       {nil, 7},
		"exact":     {match(types.SelectorMatch_MATCH_EXACT, "unix:uid:0", "unix:gid:1"), 4},
		"exact not": {match(types.SelectorMatch_MATCH_EXACT, "unix:uid:0"), 0},
		"subset":    {match(types.SelectorMatch_MATCH_SUBSET, "unix:uid:1", "unix:gid:1", "unix:gid:2"), 3},
		"superset":  {match(types.SelectorMatch_MATCH_SUPERSET, "unix:uid:1"), 3},
		"any":       {match(types.SelectorMatch_MATCH_ANY, "unix:uid:1", "unix:gid:1"), 7},
		"hint":      {&entryv1.ListEntriesRequest_Filter{ByHint: wrapperspb.String("0")}, 3},
		"parent":    {&entryv1.ListEntriesRequest_Filter{ByParentId: idToProto("spiffe://" + td + "/other")}, 0},
		"id":        {&entryv1.ListEntriesRequest_Filter{BySpiffeId: idToProto("spiffe://" + td + "/w3")}, 1},
		// What SPIRE's `entry show` always sends.
		"downstream": {&entryv1.ListEntriesRequest_Filter{ByDownstream: wrapperspb.Bool(false)}, 7},
	} {
		t.Run(name, func(t *testing.T) {
			seen := map[string]bool{}
			token := ""
			for {
				resp, err := w.entries().ListEntries(t.Context(), &entryv1.ListEntriesRequest{Filter: c.f, PageSize: 2, PageToken: token})
				if err != nil {
					t.Fatal(err)
				}
				for _, e := range resp.Entries {
					if seen[e.Id] {
						t.Errorf("%s twice", e.Id)
					}
					seen[e.Id] = true
				}
				if token = resp.NextPageToken; token == "" {
					break
				}
			}
			if len(seen) != c.want {
				t.Errorf("%d entries, want %d", len(seen), c.want)
			}
		})
	}
	if _, err := w.entries().ListEntries(t.Context(), &entryv1.ListEntriesRequest{Filter: match(9, "unix:uid:1")}); status.Code(err) != codes.InvalidArgument {
		t.Error(err)
	}
}

func TestSyncAuthorizedEntries(t *testing.T) {
	w := newWorld(t, nil)
	n := w.attest(w.newTPM(), attestOptions{})
	create := func(from, to int) {
		t.Helper()
		var batch []*types.Entry
		for i := from; i < to; i++ {
			batch = append(batch, entry(n.id, fmt.Sprintf("/w%d", i), "binary:uid:1"))
		}
		resp, err := w.entries().BatchCreateEntry(t.Context(), &entryv1.BatchCreateEntryRequest{Entries: batch})
		if err != nil {
			t.Fatal(err)
		}
		for _, r := range resp.Results {
			if r.Status.Code != 0 {
				t.Fatal(r)
			}
		}
	}
	create(0, 500)
	stream, err := entryv1.NewEntryClient(n.conn).SyncAuthorizedEntries(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := stream.Send(&entryv1.SyncAuthorizedEntriesRequest{}); err != nil {
		t.Fatal(err)
	}
	resp, err := stream.Recv()
	if err != nil || len(resp.Entries) != 500 || resp.More || len(resp.EntryRevisions) != 0 {
		t.Fatalf("%d entries, %d revisions, %v", len(resp.GetEntries()), len(resp.GetEntryRevisions()), err)
	}

	create(500, 1200)
	if stream, err = entryv1.NewEntryClient(n.conn).SyncAuthorizedEntries(t.Context()); err != nil {
		t.Fatal(err)
	}
	mask := &types.EntryMask{SpiffeId: true, RevisionNumber: true, CreatedAt: true}
	if err := stream.Send(&entryv1.SyncAuthorizedEntriesRequest{OutputMask: mask}); err != nil {
		t.Fatal(err)
	}
	revisions := map[string]*entryv1.EntryRevision{}
	for more := true; more; {
		resp, err := stream.Recv()
		if err != nil {
			t.Fatal(err)
		}
		if len(resp.EntryRevisions) == 0 || len(resp.EntryRevisions) > 500 || len(resp.Entries) != 0 {
			t.Fatalf("page of %d revisions and %d entries", len(resp.EntryRevisions), len(resp.Entries))
		}
		for _, r := range resp.EntryRevisions {
			revisions[r.Id] = r
		}
		more = resp.More
	}
	if len(revisions) != 1200 {
		t.Fatalf("%d revisions", len(revisions))
	}
	var ids []string
	for id := range revisions {
		ids = append(ids, id)
	}
	ids = append(ids, "gone", ids[0])
	if err := stream.Send(&entryv1.SyncAuthorizedEntriesRequest{Ids: ids}); err != nil {
		t.Fatal(err)
	}
	got := 0
	for more := true; more; {
		resp, err := stream.Recv()
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range resp.Entries {
			got++
			if r := revisions[e.Id]; r.CreatedAt != e.CreatedAt || r.RevisionNumber != e.RevisionNumber || e.ParentId != nil {
				t.Fatalf("%v is not %v", e, r)
			}
		}
		more = resp.More
	}
	if got != 1200 {
		t.Fatalf("%d entries", got)
	}
	for name, req := range map[string]*entryv1.SyncAuthorizedEntriesRequest{
		"revision masked out": {OutputMask: &types.EntryMask{SpiffeId: true}},
		"IDs first":           {Ids: []string{"a"}},
	} {
		stream, err := entryv1.NewEntryClient(n.conn).SyncAuthorizedEntries(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if err := stream.Send(req); err != nil {
			t.Fatal(err)
		}
		if _, err := stream.Recv(); status.Code(err) != codes.InvalidArgument {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// Aliases are flattened, nested entries followed, circles end, and what could
// never be issued is left out.
func TestAuthorizedEntries(t *testing.T) {
	w := newWorld(t, func(c *Config) { c.EvidencePatterns = []string{"spiffe://" + td + "/db/*"} })
	bound := w.attest(w.newTPM(), attestOptions{})
	stock := w.attest(w.newTPM(), attestOptions{unbound: true})
	server := "spiffe://" + td + "/spire/server"
	id := func(p string) string { return "spiffe://" + td + p }
	w.create(entry(server, "/all", "tpmnode:ek_basis:maker"))
	w.create(entry(server, "/none", "tpmnode:ek_basis:maker", "tpmnode:secure_boot:true"))
	w.create(entry(id("/all"), "/a", "binary:uid:1"))
	w.create(entry(id("/a"), "/b", "binary:uid:1"))
	w.create(entry(id("/b"), "/a", "binary:uid:2")) // a circle
	w.create(entry(id("/none"), "/secret", "binary:uid:1"))
	w.create(entry(bound.id, "/own", "binary:uid:1"))
	w.create(entry(id("/all"), "/build", stepSelectorsOf("go")...))
	w.create(entry(id("/all"), "/db/main", "binary:uid:1"))
	e := entry(id("/all"), "/late", "binary:uid:1")
	e.ExpiresAt = w.clock.Now().Add(-time.Second).Unix()
	w.create(e)

	for name, c := range map[string]struct {
		n    *node
		want string
	}{
		"bound": {bound, "/a /a /b /build /db/main /own"},
		"stock": {stock, "/a /a /b"},
	} {
		resp, err := entryv1.NewEntryClient(c.n.conn).GetAuthorizedEntries(t.Context(), &entryv1.GetAuthorizedEntriesRequest{OutputMask: &types.EntryMask{SpiffeId: true}})
		if err != nil {
			t.Fatal(err)
		}
		var paths []string
		for _, e := range resp.Entries {
			paths = append(paths, e.SpiffeId.Path)
		}
		if got := strings.Join(sorted(paths), " "); got != c.want {
			t.Errorf("%s gets %s, want %s", name, got, c.want)
		}
	}
}
