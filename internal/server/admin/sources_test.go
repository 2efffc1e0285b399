package admin

import (
	"encoding/json"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/rootlink/rootlink/internal/forge"
	"github.com/rootlink/rootlink/internal/trustdoc"
	"github.com/rootlink/rootlink/pkg/link"
	adminv1 "github.com/rootlink/rootlink/proto/rootlink/admin/v1"
)

// A source that one export named is in every later one: without it the links
// that have their time from it would verify no more.
func TestSourcesAreRemembered(t *testing.T) {
	f := newFixture(t)
	tsa := forge.NewTSA(t, nil)
	w := forge.NewLogWitness(t, "witness.example", epoch).Info()
	needed := 2
	raw, err := json.Marshal(trustdoc.Sources{
		Operator: "example.com", AuthoritiesNeeded: &needed,
		Timestamps: []trustdoc.TSA{{Chain: [][]byte{tsa.Leaf.Raw, tsa.Root.Raw}, Operator: "tsa.example"}},
		Witnesses:  []link.Witness{{Name: w.Name, Key: w.Key}},
	})
	if err != nil {
		t.Fatal(err)
	}
	for i, req := range []*adminv1.ExportTrustRequest{{SourcesJson: raw}, {SourcesJson: raw}, {}} {
		trust, _ := f.export(t, req)
		root := trust.TrustedRoot()
		if len(root.Timestamps) != 1 || root.Timestamps[0].Operator != "tsa.example" || trust.Operator() != "example.com" ||
			len(trust.File().Witnesses) != 1 || trust.File().Time.AuthoritiesNeeded != 2 {
			t.Errorf("export %d: %+v %+v", i, root.Timestamps, trust.File())
		}
		f.open(t)
	}
	for _, bad := range []string{"{", `{"timestamp_authorities":[{"chain":["AAAA"]}]}`, `{"witnesses":[{"name":"x","key":"x"}]}`} {
		if _, err := f.ExportTrust(t.Context(), &adminv1.ExportTrustRequest{SourcesJson: []byte(bad)}); status.Code(err) != codes.InvalidArgument {
			t.Errorf("%s: %v", bad, err)
		}
	}
	if trust, _ := f.export(t, &adminv1.ExportTrustRequest{ResetSources: true}); len(trust.TrustedRoot().Timestamps)+len(trust.File().Witnesses) != 0 {
		t.Errorf("not forgotten: %+v", trust.File())
	}
}
