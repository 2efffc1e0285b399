package server

import (
	"strings"
	"testing"

	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"
)

// refusesIDs demands that no entry can be made for, or below, an ID of these
// trust domains and paths.
func refusesIDs(t *testing.T, ids map[string]*types.SPIFFEID) {
	t.Helper()
	w := newWorld(t, nil)
	for name, id := range ids {
		of, below := entry(parent, "/web", "binary:uid:33"), entry(parent, "/web", "binary:uid:33")
		of.SpiffeId, below.ParentId = id, id
		for _, e := range []*types.Entry{of, below} {
			r := w.tryCreate(e)
			if r.Status.Code != int32(codes.InvalidArgument) || r.Entry != nil {
				t.Errorf("%s: %v", name, r)
			}
		}
	}
}

func TestSPIFFEIDSection21TrustDomain(t *testing.T) {
	ids := make(map[string]*types.SPIFFEID)
	for name, of := range map[string]string{
		"empty": "", "upper case": strings.ToUpper(td), "user": "u@" + td, "port": td + ":443", "colon": td + ":",
		"slash": td + "/a", "percent": "%65xample.org", "space": td + " ", "not ASCII": "ex\u00e4mple.org",
		"256 bytes": strings.Repeat("a", 256), "other": "other.example",
	} {
		ids[name] = &types.SPIFFEID{TrustDomain: of, Path: "/web"}
	}
	refusesIDs(t, ids)
}

func TestSPIFFEIDSection22Path(t *testing.T) {
	ids := make(map[string]*types.SPIFFEID)
	for name, path := range map[string]string{
		"trailing slash": "/a/", "root": "/", "empty segment": "/a//b", "leading empty segment": "//a",
		"dot": "/a/./b", "dots": "/a/../b", "last dot": "/a/.", "last dots": "/a/..", "percent": "/a%2fb",
		"query": "/a?b", "fragment": "/a#b", "space": "/a b", "colon": "/a:b", "at": "/a@b", "tilde": "/~a",
		"not ASCII": "/\u00e4", "zero byte": "/a\x00", "new line": "/a\nb", "backslash": `/a\b`,
	} {
		ids[name] = &types.SPIFFEID{TrustDomain: td, Path: path}
	}
	refusesIDs(t, ids)
	w := newWorld(t, nil)
	for _, path := range []string{"/a", "/A/b-c_d.e/0", "/...", "/.a"} {
		w.create(entry(parent, path, "binary:uid:33"))
	}
}

// 2048 bytes are issued for with evidence, one more is refused.
func TestSPIFFEIDSection23Length(t *testing.T) {
	start := "spiffe://" + td
	longest := "/" + strings.Repeat("a", 2048-len(start)-1)
	refusesIDs(t, map[string]*types.SPIFFEID{"2049 bytes": {TrustDomain: td, Path: longest + "a"}})
	w := newWorld(t, nil)
	n := w.attest(w.newTPM(), attestOptions{})
	selector := "binary:uid:33"
	c, err := n.sign(w.create(entry(n.id, longest, selector)), n.csr(n.workload(longest, selector)))
	if err != nil {
		t.Fatal(err)
	}
	if len(c.URIs) != 1 || c.URIs[0].String() != start+longest {
		t.Error("another ID")
	}
}
