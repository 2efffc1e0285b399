package link

import (
	"encoding/json"
	"strings"
	"testing"

	provenancev1 "github.com/in-toto/attestation/go/predicates/provenance/v1"
	"google.golang.org/protobuf/encoding/protojson"
)

// SLSA's own types, generated from its schema, read what is written.
func TestProvenanceIsSLSAs(t *testing.T) {
	s := newScene(t)
	dirty := false
	s.stmt.Environment.Git = &Git{Remote: "https://git.example/hello.git", Commit: strings.Repeat("ab", 20), Dirty: &dirty}
	s.stmt.Environment.Variables = map[string]string{"GOFLAGS": "-trimpath"}
	b := mustParse(t, s.sign(t))
	raw, err := b.UnverifiedProvenance()
	if err != nil {
		t.Fatal(err)
	}
	var p provenancev1.Provenance
	if err := protojson.Unmarshal(raw, &p); err != nil {
		t.Fatalf("%v\n%s", err, raw)
	}
	if err := p.Validate(); err != nil {
		t.Errorf("%v\n%s", err, raw)
	}
	if id := p.GetRunDetails().GetBuilder().GetId(); id != "spiffe://example.org/build" {
		t.Errorf("builder %s", id)
	}
	deps := p.GetBuildDefinition().GetResolvedDependencies()
	if len(deps) != 1+len(s.stmt.Materials) || deps[0].GetUri() != "git+https://git.example/hello.git@"+strings.Repeat("ab", 20) {
		t.Errorf("dependencies: %v", deps)
	}
	if got := p.GetBuildDefinition().GetExternalParameters().GetFields()["step"].GetStringValue(); got != s.stmt.Step {
		t.Errorf("step %q", got)
	}
	if err := CheckPredicateForm(TypeSLSAProvenance, raw); err != nil {
		t.Error(err)
	}
	// The same link, the same bytes: it can be compared and cached.
	again, err := b.UnverifiedProvenance()
	if err != nil || string(again) != string(raw) {
		t.Errorf("not the same twice: %v", err)
	}
	if _, err := PrepareAttestation(&Attestation{Type: TypeSLSAProvenance, Subjects: s.stmt.Subjects, Predicate: json.RawMessage(raw)}); err != nil {
		t.Error(err)
	}
}

func TestRefusesProvenanceOfAStepThatFailed(t *testing.T) {
	for name, bend := range map[string]func(*Statement){
		"exit code": func(s *Statement) { code := 3; s.Byproducts.ExitCode = &code },
		"not said":  func(s *Statement) { s.Byproducts.ExitCode = nil },
		"signal":    func(s *Statement) { s.Byproducts.Signal = "SIGKILL" },
	} {
		s := newScene(t)
		bend(s.stmt)
		if raw, err := mustParse(t, s.sign(t)).UnverifiedProvenance(); err == nil {
			t.Errorf("%s: %s", name, raw)
		}
	}
}

func TestGitURI(t *testing.T) {
	for remote, want := range map[string]string{
		"https://git.example/a.git":   "git+https://git.example/a.git@c0ffee",
		"ssh://git@git.example/a.git": "git+ssh://git@git.example/a.git@c0ffee",
		"git@git.example:a/b.git":     "git+ssh://git@git.example/a/b.git@c0ffee",
		"git+https://git.example/a":   "git+https://git.example/a@c0ffee",
		"../elsewhere":                "",
		"":                            "",
	} {
		if got := gitURI(&Git{Remote: remote, Commit: "c0ffee"}); got != want {
			t.Errorf("%q: %q", remote, got)
		}
	}
}
