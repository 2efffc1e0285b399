package vsa

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/json"
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/rootlink/rootlink/pkg/envelope"
	"github.com/rootlink/rootlink/pkg/link"
)

func verified() *link.Result {
	return &link.Result{
		Verdict: link.VerdictVerified,
		Links:   []link.LinkResult{{Tier: link.TierBootAttested, Evidence: link.EvidenceLeaf}, {Tier: link.TierKernelWitnessed, Evidence: link.EvidenceLeaf}},
		Artifacts: []link.ArtifactResult{{
			Artifact: link.Artifact{Name: "hello", Digest: map[string]string{"sha256": strings.Repeat("ab", 32)}},
			Matches:  []link.Match{{Link: "build", Subject: "hello"}},
		}},
	}
}

func options() Options {
	return Options{
		VerifierID: "https://verifier.example", Version: map[string]string{"rootlink": "v1"}, ResourceURI: "pkg:generic/hello",
		Policy: Digest("layout.json", []byte("{}")), Inputs: []Document{Digest("build.sigstore.json", []byte("{1}"))}, Time: time.Unix(1700000000, 5),
	}
}

func TestSummary(t *testing.T) {
	o := options()
	o.Levels = []string{"SLSA_BUILD_LEVEL_2"}
	a, err := New(verified(), o)
	if err != nil {
		t.Fatal(err)
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	raw, err := Sign(a, key)
	if err != nil {
		t.Fatal(err)
	}
	e, err := envelope.Open(raw, link.PayloadType, 1<<20)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := e.Verify([]crypto.PublicKey{key.Public()}); err != nil {
		t.Fatal(err)
	}
	var st struct {
		PredicateType string    `json:"predicateType"`
		Predicate     predicate `json:"predicate"`
	}
	if err := json.Unmarshal(e.UnverifiedPayload(), &st); err != nil {
		t.Fatal(err)
	}
	p := st.Predicate
	if st.PredicateType != PredicateType || p.Result != "PASSED" || p.TimeVerified.Nanosecond() != 0 || len(p.InputAttestations) != 1 {
		t.Errorf("%+v", st)
	}
	// The least tier of all links counts.
	if !slices.Equal(p.Levels, []string{"ROOTLINK_TIER_BOOT_ATTESTED", "SLSA_BUILD_LEVEL_2"}) {
		t.Errorf("levels %v", p.Levels)
	}
}

func TestSoftwareTPMHasNoTier(t *testing.T) {
	r := verified()
	r.Links[1].SoftwareTPM = true
	a, err := New(r, options())
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(string(a.Predicate), LevelSoftware) || strings.Contains(string(a.Predicate), levelPrefix) {
		t.Errorf("%s", a.Predicate)
	}
}

// Who reads the summary sees nothing but levels: one link whose evidence no
// server checked lowers them all, and no policy for the others takes it.
func TestDetachedEvidenceHasALevelOfItsOwn(t *testing.T) {
	r := verified()
	r.Links[1].Evidence = link.EvidenceDetached
	a, err := New(r, options())
	if err != nil {
		t.Fatal(err)
	}
	if s := string(a.Predicate); !strings.Contains(s, `"ROOTLINK_DETACHED_TIER_BOOT_ATTESTED"`) || strings.Contains(s, `"`+levelPrefix) {
		t.Errorf("%s", a.Predicate)
	}
}

func TestRefusesToSummarise(t *testing.T) {
	for name, c := range map[string]struct {
		change func(*link.Result, *Options)
		want   error
	}{
		"a refusal":                 {func(r *link.Result, _ *Options) { r.Verdict = link.VerdictRefused }, ErrRefused},
		"no artifact":               {func(r *link.Result, _ *Options) { r.Artifacts = nil }, ErrNothing},
		"an artifact of no link":    {func(r *link.Result, _ *Options) { r.Artifacts[0].Matches = nil }, ErrNothing},
		"no link":                   {func(r *link.Result, _ *Options) { r.Links = nil }, ErrNothing},
		"a tier of another kind":    {func(r *link.Result, _ *Options) { r.Links[0].Tier = "" }, ErrOption},
		"no verifier":               {func(_ *link.Result, o *Options) { o.VerifierID = "" }, ErrOption},
		"a relative resource":       {func(_ *link.Result, o *Options) { o.ResourceURI = "hello" }, ErrOption},
		"no policy":                 {func(_ *link.Result, o *Options) { o.Policy = Document{} }, ErrOption},
		"no bundle":                 {func(_ *link.Result, o *Options) { o.Inputs = nil }, ErrOption},
		"a tier nobody measured":    {func(_ *link.Result, o *Options) { o.Levels = []string{"ROOTLINK_TIER_KERNEL_WITNESSED"} }, ErrOption},
		"a level with a line break": {func(_ *link.Result, o *Options) { o.Levels = []string{"SLSA\nX"} }, ErrOption},
	} {
		t.Run(name, func(t *testing.T) {
			r, o := verified(), options()
			c.change(r, &o)
			if a, err := New(r, o); !errors.Is(err, c.want) {
				t.Errorf("got %v, %v; want %v", a, err, c.want)
			}
		})
	}
}
