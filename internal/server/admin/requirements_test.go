package admin

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/rootlink/rootlink/internal/store"
	"github.com/rootlink/rootlink/pkg/link"
)

const (
	toolA    = "tool:sha256:" + "aa00000000000000000000000000000000000000000000000000000000000000"
	toolB    = "tool:sha256:" + "bb00000000000000000000000000000000000000000000000000000000000000"
	recorder = "recorder:sha256:" + "cc00000000000000000000000000000000000000000000000000000000000000"
	openRec  = "recorder_unprotected:sha256:" + "dd00000000000000000000000000000000000000000000000000000000000000"
	hashA    = "aa00000000000000000000000000000000000000000000000000000000000000"
	hashB    = "bb00000000000000000000000000000000000000000000000000000000000000"
	hashC    = "cc00000000000000000000000000000000000000000000000000000000000000"
	hashD    = "dd00000000000000000000000000000000000000000000000000000000000000"
)

func sels(typ string, values ...string) (out []store.Selector) {
	for _, v := range values {
		out = append(out, store.Selector{Type: typ, Value: v})
	}
	return out
}

func ent(id, parent string, s []store.Selector) *store.Entry {
	const td = "spiffe://example.org"
	return &store.Entry{ID: "entry-" + id, SPIFFEID: td + id, ParentID: td + parent, Selectors: s}
}

func TestRequirements(t *testing.T) {
	lab := ent("/node/lab", "/spire/server", sels("tpmnode", "pcr_policy:lab"))
	agent := "/spire/agent/tpmnode/" + hexOf(0xa0)
	step := link.Requirement{Identity: "spiffe://example.org/b", Evidence: link.EvidenceLeaf, Tools: []string{hashA}, Recorders: []string{hashC}}
	with := func(f func(*link.Requirement)) []link.Requirement {
		r := step
		f(&r)
		return []link.Requirement{r}
	}
	boot := func(r *link.Requirement) { r.Tier, r.PCRPolicies = link.TierBootAttested, []string{"lab"} }

	for _, tt := range []struct {
		name    string
		entries []*store.Entry
		want    []link.Requirement
		note    string
	}{
		{"nothing", nil, nil, ""},
		{
			"step under an alias with a PCR policy",
			[]*store.Entry{lab, ent("/b", "/node/lab", sels("binary", toolA, recorder))},
			with(boot), "",
		},
		{
			"step under one agent",
			[]*store.Entry{ent("/b", agent, sels("binary", toolA, recorder))},
			with(func(r *link.Requirement) { r.Tier, r.EKs = link.TierTPM, []string{hexOf(0xa0)} }), "boot state is not judged",
		},
		{
			"exec chain of two tools, unprotected recorder",
			[]*store.Entry{lab, ent("/b", "/node/lab", sels("binary", toolB, toolA, openRec))},
			with(func(r *link.Requirement) {
				boot(r)
				r.Tools, r.Recorders, r.UnprotectedRecorders = []string{hashA, hashB}, nil, []string{hashD}
			}), "",
		},
		{
			"entries of one identity are alternatives",
			[]*store.Entry{lab, ent("/b", "/node/lab", sels("binary", toolA, recorder)), ent("/b", "/node/lab", sels("binary", toolB, recorder))},
			with(func(r *link.Requirement) { boot(r); r.Tools = []string{hashA, hashB} }), "2 ways lead",
		},
		{
			"one way without a PCR policy lowers the tier for all",
			[]*store.Entry{lab, ent("/b", "/node/lab", sels("binary", toolA, recorder)), ent("/b", agent, sels("binary", toolA, recorder))},
			with(func(r *link.Requirement) { r.Tier = link.TierTPM }), "boot state is not judged",
		},
		{
			"alias by EK",
			[]*store.Entry{ent("/node/one", "/spire/server", sels("tpmnode", "ek:"+hexOf(3), "pcr_policy:lab")), ent("/b", "/node/one", sels("binary", toolA, recorder))},
			with(func(r *link.Requirement) { boot(r); r.EKs = []string{hexOf(3)} }), "",
		},
		{
			"step that names its node's boot state itself",
			[]*store.Entry{ent("/b", agent, append(sels("binary", toolA, recorder), sels("tpmnode", "pcr_policy:lab")...))},
			with(func(r *link.Requirement) { boot(r); r.EKs = []string{hexOf(0xa0)} }), "",
		},
		{
			"step that names its node's EK itself",
			[]*store.Entry{lab, ent("/b", "/node/lab", append(sels("binary", toolA, recorder), sels("tpmnode", "ek:"+hexOf(3))...))},
			with(func(r *link.Requirement) { boot(r); r.EKs = []string{hexOf(3)} }), "",
		},
		{
			"step that names another EK than its node's",
			[]*store.Entry{ent("/b", agent, append(sels("binary", toolA, recorder), sels("tpmnode", "ek:"+hexOf(3))...))},
			nil, "no node known here",
		},
		{
			"alias by a selector that evidence does not show",
			[]*store.Entry{ent("/node/sb", "/spire/server", sels("tpmnode", "secure_boot:true", "pcr_policy:lab")), ent("/b", "/node/sb", sels("binary", toolA, recorder))},
			with(boot), "tpmnode:secure_boot:true is checked at issuance only",
		},
		{
			"under another entry",
			[]*store.Entry{lab, ent("/mid", "/node/lab", sels("binary", "uid:0")), ent("/b", "/mid", sels("binary", toolA, recorder))},
			with(boot), "/mid: no tool and recorder",
		},
		{
			"policy that never was",
			[]*store.Entry{ent("/node/x", "/spire/server", sels("tpmnode", "pcr_policy:none")), ent("/b", "/node/x", sels("binary", toolA, recorder))},
			nil, `PCR policy "none" never existed`,
		},
		{
			"parent that does not exist",
			[]*store.Entry{ent("/b", "/gone", sels("binary", toolA, recorder))},
			nil, "no node known here",
		},
		{
			"node of another attestor",
			[]*store.Entry{ent("/b", "/spire/agent/join_token/1", sels("binary", toolA, recorder))},
			nil, "no node known here",
		},
		{
			"entries that are each other's parents",
			[]*store.Entry{ent("/a", "/b", sels("binary", toolA, recorder)), ent("/b", "/a", sels("binary", toolA, recorder))},
			nil, "no node known here",
		},
		{
			"a tool without a recorder",
			[]*store.Entry{lab, ent("/b", "/node/lab", sels("binary", toolA))},
			nil, "signs no steps",
		},
		{
			"a recorder of another attestor's word",
			[]*store.Entry{lab, ent("/b", "/node/lab", append(sels("binary", toolA), sels("unix", recorder)...))},
			nil, "signs no steps",
		},
		{
			"plain workload",
			[]*store.Entry{lab, ent("/web", "/node/lab", sels("binary", "sha256:"+hashA))},
			nil, "signs no steps",
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, notes := requirements("example.org", tt.entries, map[string]bool{"lab": true}, nil)
			if d := cmp.Diff(tt.want, got); d != "" {
				t.Errorf("want -, got +:\n%s", d)
			}
			if all := strings.Join(notes, "\n"); !strings.Contains(all, tt.note) || tt.note == "" && all != "" {
				t.Errorf("notes %q, want %q", notes, tt.note)
			}
		})
	}
}

func TestParentRequirements(t *testing.T) {
	lab := ent("/node/lab", "/spire/server", sels("tpmnode", "pcr_policy:lab"))
	entries := []*store.Entry{
		lab, ent("/ci/a", "/node/lab", sels("unix", "uid:1")), ent("/web", "/node/lab", sels("unix", "uid:33")),
		ent("/ci/step", "/node/lab", sels("binary", toolA, recorder)), ent("/ci/step", "/node/lab", sels("unix", "uid:2")),
		ent("/ci/elsewhere", "/spire/agent/join_token/1", sels("unix", "uid:1")),
	}
	got, notes := requirements("example.org", entries, map[string]bool{"lab": true}, map[string][]string{link.EvidenceParent: {"spiffe://example.org/ci/**"}})
	if len(got) != 2 {
		t.Fatalf("requirements %+v", got)
	}
	want := link.Requirement{
		Identity: "spiffe://example.org/ci/a", Evidence: link.EvidenceParent, Tier: link.TierBootAttested, PCRPolicies: []string{"lab"},
		Tools: []string{link.AnyHash}, UnprotectedRecorders: []string{link.AnyHash},
	}
	if d := cmp.Diff(want, got[1]); d != "" {
		t.Errorf("want -, got +:\n%s", d)
	}
	// An identity of recorded steps keeps what it has.
	if got[0].Identity != "spiffe://example.org/ci/step" || got[0].Evidence != link.EvidenceLeaf || got[0].Tools[0] == link.AnyHash {
		t.Errorf("step %+v", got[0])
	}
	if all := strings.Join(notes, "\n"); !strings.Contains(all, "binds no workload key") || !strings.Contains(all, "/ci/step: it signs steps with leaf evidence") {
		t.Errorf("notes %q", all)
	}
}

// Any enrolled node could vouch for an identity that no TPM and no policy leads to.
func TestDetachedRequirements(t *testing.T) {
	entries := []*store.Entry{
		ent("/node/lab", "/spire/server", sels("tpmnode", "pcr_policy:lab")), ent("/node/any", "/spire/server", sels("tpmnode", "ek_basis:maker")),
		ent("/ci/lab", "/node/lab", sels("unix", "uid:1")), ent("/ci/any", "/node/any", sels("unix", "uid:1")),
	}
	all := []string{"spiffe://example.org/ci/*"}
	got, notes := requirements("example.org", entries, map[string]bool{"lab": true}, map[string][]string{
		link.EvidenceDetached: all, link.EvidenceParent: all, // the stronger kind is asked for
	})
	want := []link.Requirement{{
		Identity: "spiffe://example.org/ci/lab", Evidence: link.EvidenceDetached, Tier: link.TierBootAttested, PCRPolicies: []string{"lab"},
		Tools: []string{link.AnyHash}, UnprotectedRecorders: []string{link.AnyHash},
	}}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("want -, got +:\n%s", d)
	}
	if text := strings.Join(notes, "\n"); !strings.Contains(text, "/ci/any: detached evidence is accepted only where") {
		t.Errorf("notes %q", text)
	}
}
