package admin

import (
	"slices"
	"testing"

	"github.com/rootlink/rootlink/pkg/link"
	adminv1 "github.com/rootlink/rootlink/proto/rootlink/admin/v1"
)

func TestAllowTypes(t *testing.T) {
	reqs := func() []link.Requirement {
		return []link.Requirement{{Identity: "spiffe://example.org/build"}, {Identity: "spiffe://example.org/sbom/a"}, {Identity: "spiffe://example.org/sbom/b"}}
	}
	got := reqs()
	allow := []*adminv1.AllowedType{
		{Identity: "spiffe://example.org/sbom/*", Type: link.TypeCycloneDX},
		{Identity: "spiffe://example.org/sbom/b", Type: link.TypeSPDX},
		{Identity: "spiffe://example.org/sbom/b", Type: link.TypeSPDX},
	}
	if err := allowTypes(got, allow); err != nil {
		t.Fatal(err)
	}
	for i, want := range [][]string{nil, {link.TypeCycloneDX}, {link.TypeCycloneDX, link.TypeSPDX}} {
		if !slices.Equal(got[i].Types, want) {
			t.Errorf("%s: %v, want %v", got[i].Identity, got[i].Types, want)
		}
	}
	for name, bad := range map[string]*adminv1.AllowedType{
		"nobody's ID": {Identity: "spiffe://example.org/sbmo", Type: link.TypeCycloneDX},
		"no pattern":  {Identity: "sbom", Type: link.TypeCycloneDX},
		"a name":      {Identity: "spiffe://example.org/build", Type: "cyclonedx"},
		"nothing":     {},
	} {
		if err := allowTypes(reqs(), []*adminv1.AllowedType{bad}); err == nil {
			t.Errorf("%s is taken", name)
		}
	}
}
