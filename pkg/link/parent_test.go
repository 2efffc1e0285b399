package link

import (
	"crypto/sha256"
	"encoding/json"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/rootlink/rootlink/internal/forge"
	"github.com/rootlink/rootlink/pkg/attest"
)

// parentScene is a step signed with an SVID that a stock agent got from our
// server, in which all is well. bend spoils the record before it is embedded.
func parentScene(t *testing.T, bend func(*scene, *attest.Parent)) *scene {
	t.Helper()
	s := newScene(t)
	*s.requirement() = Requirement{
		Identity: "spiffe://example.org/build", Evidence: EvidenceParent, PCRPolicies: []string{"fleet"},
		Tools: []string{AnyHash}, UnprotectedRecorders: []string{AnyHash},
	}
	s.signParent(t, bend)
	return s
}

// parentWouldDo makes parent the least kind, which allows no talk of programs.
func (r *Requirement) parentWouldDo() {
	r.Evidence, r.Tools, r.UnprotectedRecorders = EvidenceParent, []string{AnyHash}, []string{AnyHash}
}

func (s *scene) signParent(t *testing.T, bend func(*scene, *attest.Parent)) {
	t.Helper()
	rec := s.MakeParent(t)
	if bend != nil {
		bend(s, rec)
	}
	p, err := Prepare(s.stmt)
	if err != nil {
		t.Fatal(err)
	}
	b, err := p.sign(s.SVIDKey, s.IssueParent(t, rec))
	if err != nil {
		t.Fatal(err)
	}
	raw, err := b.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	s.in.Links = []LinkInput{{Name: "build", Bundle: raw}}
}

func TestParentEvidenceIsShownAsTheLowerKindItIs(t *testing.T) {
	s := parentScene(t, nil)
	res := s.accepts(t)
	l := res.Links[0]
	if l.Evidence != EvidenceParent || l.Chain.Programs != nil || l.Chain.Parent == nil || !l.Chain.Parent.AttestedAt.Equal(s.Now) ||
		l.Chain.EK == nil || l.Chain.Quote.Policy == nil || !l.Chain.Quote.NonceTime.IsZero() {
		t.Errorf("result %+v", l)
	}
	text := res.Text()
	for _, want := range []string{"PARENT EVIDENCE ONLY", "binds no workload key", "which programs ran"} {
		if !strings.Contains(text, want) {
			t.Errorf("the text lacks %q:\n%s", want, text)
		}
	}
	for _, never := range []string{"committed to exactly this statement", "tool      ", "protected"} {
		if strings.Contains(text, never) {
			t.Errorf("the text says %q:\n%s", never, text)
		}
	}
	b, err := json.Marshal(res)
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(string(b), `"evidence":"parent"`) {
		t.Error("the kind is not in the result")
	}
	for _, id := range []string{"programs.measured", "requirement.tools", "requirement.recorder", "svid.code_signing"} {
		if got := outcomeOf(l.Checks, id); got != attest.NotRun {
			t.Errorf("%s: %s", id, got)
		}
	}
}

func TestRefusesParentEvidenceWhereMoreIsWanted(t *testing.T) {
	for _, least := range []string{"", EvidenceLeaf, EvidenceDetached} {
		s := parentScene(t, nil)
		r := s.requirement()
		r.Evidence, r.Tools = least, []string{hexOf(s.Leaf.Tool)}
		res := s.refuses(t, "evidence.kind", ErrPolicy, "parent", "binds no workload key")
		if res.Links[0].Chain.Quote != nil {
			t.Error("evidence of a kind that is not enough is shown as if it counted")
		}
	}
}

func TestLeafEvidenceIsEnoughForParent(t *testing.T) {
	s := newScene(t)
	s.requirement().parentWouldDo()
	if res := s.accepts(t); res.Links[0].Evidence != EvidenceLeaf {
		t.Errorf("kind %q", res.Links[0].Evidence)
	}
}

// Tools that nothing could show to have run would be a promise.
func TestRefusesParentRequirementThatNamesPrograms(t *testing.T) {
	for name, bend := range map[string]func(*Requirement){
		"of a leaf requirement": func(r *Requirement) { *r = *newScene(t).requirement(); r.Evidence = EvidenceParent },
		"a tool":                func(r *Requirement) { r.Tools = []string{strings.Repeat("00", 32)} },
		// The setgid bit would be a promise as well.
		"protected recorders": func(r *Requirement) { r.Recorders, r.UnprotectedRecorders = []string{AnyHash}, nil },
		"a recorder":          func(r *Requirement) { r.UnprotectedRecorders = []string{strings.Repeat("00", 32)} },
		"what else ran":       func(r *Requirement) { r.Executables = []string{AnyHash} },
		"caches of the step":  func(r *Requirement) { r.CachesPerJob = true },
	} {
		s := parentScene(t, nil)
		if _, err := NewTrust(s.file); err != nil {
			t.Fatal(err)
		}
		bend(s.requirement())
		if _, err := NewTrust(s.file); !errors.Is(err, ErrMalformed) {
			t.Errorf("%s: got %v", name, err)
		}
	}
}

func TestRefusesBadParentEvidence(t *testing.T) {
	for name, tt := range map[string]struct {
		bend  func(*scene, *attest.Parent)
		check string
		class error
	}{
		"another nonce":     {func(_ *scene, p *attest.Parent) { p.Nonce[0] ^= 1 }, "evidence.verify", ErrCrypto},
		"another agent key": {func(_ *scene, p *attest.Parent) { p.AgentKey[0] ^= 1 }, "evidence.verify", ErrCrypto},
		"another node's AK": {func(_ *scene, p *attest.Parent) { p.AKCert = forge.NewWorld(t).MakeParent(t).AKCert }, "evidence.verify", ErrCrypto},
		"a leaf's quote": {func(s *scene, p *attest.Parent) {
			e := s.Make(t)
			p.Attest, p.Signature, p.PCRs = e.Attest, e.Signature, e.PCRs
		}, "evidence.verify", ErrCrypto},
		"stale": {func(_ *scene, p *attest.Parent) { p.AttestedAt = p.AttestedAt.Add(-25 * time.Hour) }, "evidence.verify", ErrCrypto},
		"another boot state": {func(s *scene, _ *attest.Parent) {
			s.file.PCRPolicies[0].Profiles[0].Banks["sha256"]["7"] = strings.Repeat("11", 32)
		}, "requirement.pcr_policy", ErrPolicy},
		"a node that may not": {func(s *scene, _ *attest.Parent) {
			h := sha256.Sum256([]byte("another EK"))
			s.requirement().EKs = []string{hexOf(h)}
		}, "requirement.ek", ErrPolicy},
		"policy replaced before": {func(s *scene, _ *attest.Parent) {
			s.file.PCRPolicies[0].Replaced = s.Now.Add(-time.Hour)
		}, "requirement.pcr_policy", ErrPolicy},
		"EK revoked": {func(s *scene, _ *attest.Parent) {
			s.file.Revocations = []Revocation{{Kind: RevokedEK, ID: hexOf(s.TPM.EKHash), Always: true}}
		}, "revocation", ErrPolicy},
		"not in the inventory": {func(s *scene, _ *attest.Parent) {
			s.file.EK.Inventory = map[string]string{strings.Repeat("22", 32): "host"}
		}, "ek.inventory", ErrPolicy},
		"an older run": {func(s *scene, _ *attest.Parent) { s.in.NotBefore = s.Now.Add(time.Minute) }, "freshness", ErrPolicy},
	} {
		t.Run(name, func(t *testing.T) {
			parentScene(t, tt.bend).refuses(t, tt.check, tt.class)
		})
	}
}

// Nothing that lies beside a link makes more of what its certificate carries.
func TestRefusesMalformedDetachedBesideParent(t *testing.T) {
	s := parentScene(t, nil)
	s.in.Links[0].Detached = []byte("x")
	s.refuses(t, "evidence.form", ErrCrypto)
}
