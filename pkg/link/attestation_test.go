package link

import (
	"encoding/json"
	"errors"
	"slices"
	"strings"
	"testing"

	"github.com/rootlink/rootlink/pkg/attest"
)

func sbom() *Attestation {
	return &Attestation{
		Type:      TypeCycloneDX,
		Subjects:  []Resource{{Name: "out/hello", Digest: map[string]string{"sha256": hexOf([32]byte{1})}}},
		Predicate: json.RawMessage(`{ "bomFormat":"CycloneDX", "specVersion":"1.6", "components":[{"name":"a<b>"}] }`),
	}
}

// attested has the scene sign a instead of its link.
func (s *scene) attested(t *testing.T, a *Attestation) {
	t.Helper()
	p, err := PrepareAttestation(a)
	if err != nil {
		t.Fatal(err)
	}
	s.Leaf.Payload = p.Digest()
	b, err := p.Sign(s.SVIDKey, s.Issue(t, s.Make(t)))
	if err != nil {
		t.Fatal(err)
	}
	raw, err := b.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	s.in.Links = []LinkInput{{Name: "sbom", Bundle: raw}}
	s.in.Artifacts = []Artifact{{Name: "hello", Digest: map[string]string{"sha256": hexOf([32]byte{1})}}}
}

func TestAttestationVerifiesWhereItsTypeIsListed(t *testing.T) {
	s := newScene(t)
	s.attested(t, sbom())
	s.in.Type = TypeCycloneDX
	s.requirement().Types = []string{TypeCycloneDX}
	res := s.accepts(t)
	for _, id := range []string{"requirement.step", "step.exit_code"} {
		if got := outcomeOf(res.Links[0].Checks, id); got != attest.NotRun {
			t.Errorf("%s of a statement that is no link: %s", id, got)
		}
	}
	text := res.Text()
	if !strings.Contains(text, TypeCycloneDX) || strings.Contains(text, "exit code") || strings.Contains(text, "step \"") {
		t.Errorf("%s", text)
	}
}

func TestRefusesStatementOfAnotherType(t *testing.T) {
	for name, c := range map[string]struct {
		want, signed string
		allowed      []string
		check        string
	}{
		"SBOM where a link is wanted":        {"", TypeCycloneDX, []string{TypeCycloneDX}, "statement.type"},
		"SBOM where provenance is wanted":    {TypeSLSAProvenance, TypeCycloneDX, []string{TypeCycloneDX, TypeSLSAProvenance}, "statement.type"},
		"SBOM of one who signs links":        {TypeCycloneDX, TypeCycloneDX, nil, "requirement.type"},
		"SBOM of one who signs scans":        {TypeCycloneDX, TypeCycloneDX, []string{TypeSARIF}, "requirement.type"},
		"type that differs by letter case":   {"https://CycloneDX.org/bom", TypeCycloneDX, []string{TypeCycloneDX}, "statement.type"},
		"type that only begins like another": {TypeCycloneDX, TypeCycloneDX + "/v2", []string{TypeCycloneDX}, "statement.type"},
	} {
		t.Run(name, func(t *testing.T) {
			s := newScene(t)
			a := sbom()
			a.Type = c.signed
			s.attested(t, a)
			s.in.Type = c.want
			s.requirement().Types = c.allowed
			s.refuses(t, c.check, ErrPolicy)
		})
	}
	t.Run("link of one who signs SBOMs only", func(t *testing.T) {
		s := newScene(t)
		s.requirement().Types = []string{TypeCycloneDX}
		s.refuses(t, "requirement.type", ErrPolicy)
	})
	t.Run("link where an SBOM is wanted", func(t *testing.T) {
		s := newScene(t)
		s.in.Type = TypeCycloneDX
		s.requirement().Types = []string{PredicateType, TypeCycloneDX}
		s.refuses(t, "statement.type", ErrPolicy)
	})
}

func TestAttestationRoundTrip(t *testing.T) {
	p, err := PrepareAttestation(sbom())
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(string(p.Payload()), `{"bomFormat":"CycloneDX","specVersion":"1.6","components":[{"name":"a<b>"}]}`) {
		t.Errorf("the predicate was changed: %s", p.Payload())
	}
	a, err := ParseAttestation(p.Payload())
	if err != nil {
		t.Fatal(err)
	}
	again, err := PrepareAttestation(a)
	if err != nil || string(again.Payload()) != string(p.Payload()) {
		t.Errorf("%v: %s", err, again.Payload())
	}
}

func TestRefusesMalformedAttestation(t *testing.T) {
	for name, bend := range map[string]func(*Attestation){
		"no subject":           func(a *Attestation) { a.Subjects = nil },
		"10,000 subjects":      func(a *Attestation) { a.Subjects = slices.Repeat(a.Subjects, 10_000) },
		"one subject twice":    func(a *Attestation) { a.Subjects = slices.Repeat(a.Subjects, 2) },
		"subject, no digest":   func(a *Attestation) { a.Subjects[0].Digest = nil },
		"no type":              func(a *Attestation) { a.Type = "" },
		"type that is no URI":  func(a *Attestation) { a.Type = "cyclonedx" },
		"type with a space":    func(a *Attestation) { a.Type += " " },
		"no predicate":         func(a *Attestation) { a.Predicate = nil },
		"predicate is a list":  func(a *Attestation) { a.Predicate = json.RawMessage(`[]`) },
		"duplicate key":        func(a *Attestation) { a.Predicate = json.RawMessage(`{"a":1,"b":{"c":1,"c":2}}`) },
		"two values":           func(a *Attestation) { a.Predicate = json.RawMessage(`{} {}`) },
		"breaks out":           func(a *Attestation) { a.Predicate = json.RawMessage(`{}},"x":{"y":{}`) },
		"invalid UTF-8":        func(a *Attestation) { a.Predicate = json.RawMessage("{\"a\":\"\xff\"}") },
		"nested without end":   func(a *Attestation) { a.Predicate = json.RawMessage(strings.Repeat(`{"a":`, 1e5)) },
		"nested one too deep":  func(a *Attestation) { a.Predicate = nested(MaxDepth) },
		"link that is no link": func(a *Attestation) { a.Type = PredicateType },
	} {
		a := sbom()
		bend(a)
		if _, err := PrepareAttestation(a); !errors.Is(err, ErrMalformed) {
			t.Errorf("%s: %v", name, err)
		}
	}
	a := sbom()
	a.Predicate = nested(MaxDepth - 1)
	if _, err := PrepareAttestation(a); err != nil {
		t.Errorf("as deep as is allowed: %v", err)
	}
}

func nested(depth int) json.RawMessage {
	return json.RawMessage(strings.Repeat(`{"a":`, depth-1) + "{}" + strings.Repeat("}", depth-1))
}

func TestPredicateForms(t *testing.T) {
	good := map[string]string{
		TypeCycloneDX:      `{"bomFormat":"CycloneDX","specVersion":"1.6"}`,
		TypeSPDX:           `{"spdxVersion":"SPDX-2.3","SPDXID":"SPDXRef-DOCUMENT"}`,
		TypeSLSAProvenance: `{"buildDefinition":{"buildType":"https://x.example/t","externalParameters":{}},"runDetails":{"builder":{"id":"spiffe://x/y"}}}`,
		TypeVSA:            `{"verifier":{"id":"x"},"timeVerified":"2030-01-01T00:00:00Z","resourceUri":"pkg:x","policy":{},"verificationResult":"PASSED","verifiedLevels":[]}`,
		TypeSARIF:          `{"version":"2.1.0","runs":[]}`,
		TypeSCAI:           `{"attributes":[{"attribute":"x"}]}`,
		TypeVulns:          `{"scanner":{"uri":"pkg:x","result":[]}}`,
		TypeCosignVuln:     `{"scanner":{"uri":"pkg:x","result":{}},"metadata":{}}`,
		TypeTestResult:     `{"result":"PASSED","configuration":[]}`,
	}
	for uri, text := range good {
		if err := CheckPredicateForm(uri, []byte(text)); err != nil {
			t.Errorf("%s: %v", uri, err)
		}
		for _, bad := range []string{`{}`, `{"bomFormat":3,"version":"2.0.0","attributes":[],"result":"x","scanner":"y"}`, `[]`, ``} {
			if err := CheckPredicateForm(uri, []byte(bad)); !errors.Is(err, ErrMalformed) {
				t.Errorf("%s takes %s: %v", uri, bad, err)
			}
		}
	}
	if err := CheckPredicateForm(TypeSPDX, []byte(`{"@context":"https://spdx.org/rdf/3.0.1/spdx-context.jsonld","@graph":[{}]}`)); err != nil {
		t.Error(err)
	}
	if err := CheckPredicateForm("https://example.org/ours/v1", []byte(`{}`)); err != nil {
		t.Errorf("a type of one's own: %v", err)
	}
	for _, name := range PredicateAliases() {
		uri, err := ResolvePredicateType(name)
		if err != nil || ValidatePredicateType(uri) != nil {
			t.Errorf("%s: %s, %v", name, uri, err)
		}
	}
	if _, err := ResolvePredicateType("cyclonedxx"); !errors.Is(err, ErrMalformed) {
		t.Errorf("an unknown name: %v", err)
	}
}

func FuzzParseAttestation(f *testing.F) {
	p, err := PrepareAttestation(sbom())
	if err != nil {
		f.Fatal(err)
	}
	f.Add(p.Payload())
	f.Add([]byte(`{"_type":"https://in-toto.io/Statement/v1","subject":[],"predicateType":"a:b","predicate":{}}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		a, err := ParseAttestation(b)
		if err != nil {
			return
		}
		out, err := a.Marshal()
		if err != nil {
			t.Fatalf("parsed, and not written: %v", err)
		}
		if _, err := ParseAttestation(out); err != nil {
			t.Fatalf("written, and not parsed: %v", err)
		}
	})
}

// A demand on what ran is not met by a kind of statement that does not say it.
func TestRefusesAttestationWhereWhatRanIsDemanded(t *testing.T) {
	for check, demand := range map[string]func(*Requirement){
		"requirement.executables": func(r *Requirement) { r.Executables = []string{AnyHash} },
		"requirement.caches":      func(r *Requirement) { r.CachesPerJob = true },
	} {
		s := newScene(t)
		s.attested(t, sbom())
		s.in.Type = TypeCycloneDX
		s.requirement().Types = []string{TypeCycloneDX}
		demand(s.requirement())
		s.refuses(t, check, ErrPolicy)
	}
}
