package layout

import (
	"strings"
	"testing"

	"github.com/rootlink/rootlink/pkg/link"
)

// detachedScene is a pipeline whose steps all ran on a stock SPIRE server.
func detachedScene(t *testing.T) *scene {
	t.Helper()
	s := newScene(t)
	s.file.Requirements[0].Evidence = link.EvidenceDetached
	for _, m := range s.links {
		m.plain = true
	}
	return s
}

func TestDetachedEvidenceMeetsAThresholdOfNodes(t *testing.T) {
	s := detachedScene(t)
	s.build().Evidence = link.EvidenceDetached
	res := s.accepts(t)
	for _, l := range res.Links {
		if l.Evidence != link.EvidenceDetached {
			t.Errorf("%s: evidence %q", l.Name, l.Evidence)
		}
	}
	if hosts := res.Steps[1].Hosts; len(hosts) != 2 {
		t.Errorf("hosts %v", hosts)
	}
}

// One node that vouches for two identities is one node.
func TestRefusesDetachedEvidenceOfOneNodeForAThresholdOfTwo(t *testing.T) {
	s := detachedScene(t)
	s.links[2].tpm = s.tpms[0]
	s.refuses(t, "step.threshold", ErrThreshold, link.ErrPolicy)
}

// trust.json allows detached evidence for these identities; the layout's author
// wants more of one step.
func TestRefusesDetachedEvidenceWhereALayoutWantsLeaf(t *testing.T) {
	s := detachedScene(t)
	s.build().Evidence = link.EvidenceLeaf
	s.refuses(t, "step.evidence", link.ErrPolicy, link.ErrPolicy, "demanded is leaf")
	s = newScene(t)
	s.file.Requirements[0].Evidence = link.EvidenceDetached
	s.build().Evidence = link.EvidenceLeaf
	s.accepts(t)
}

func TestRefusesDetachedRecordOfAnotherLinkOfTheStep(t *testing.T) {
	s := detachedScene(t)
	s.accepts(t)
	s.in.Links[1].Detached, s.in.Links[2].Detached = s.in.Links[2].Detached, s.in.Links[1].Detached
	s.refuses(t, "link.verified", link.ErrCrypto, link.ErrCrypto, "detached.signature")
}

// Parent evidence is of a machine alone. What a step demands of programs, or of
// the recorder's word on them, it does not meet.
func TestRefusesParentEvidenceWhereALayoutWantsPrograms(t *testing.T) {
	hash := sum("a program")
	for name, a := range map[string]struct {
		demand func(*Step)
		check  string
	}{
		"evidence":           {func(s *Step) { s.Evidence = link.EvidenceDetached }, "step.evidence"},
		"tools":              {func(s *Step) { s.Tools = []string{hash} }, "step.tools"},
		"recorders":          {func(s *Step) { s.Recorders = []string{hash} }, "step.recorder"},
		"protected recorder": {func(s *Step) { s.ProtectedRecorder = true }, "step.recorder"},
		"executables":        {func(s *Step) { s.Executables = []string{hash} }, "step.executables"},
		"caches":             {func(s *Step) { s.CachesPerJob = true }, "step.caches"},
	} {
		t.Run(name, func(t *testing.T) {
			s := newScene(t)
			r := &s.file.Requirements[0]
			r.Evidence, r.Tools, r.Recorders, r.UnprotectedRecorders = link.EvidenceParent, []string{link.AnyHash}, nil, []string{link.AnyHash}
			for _, m := range s.links {
				m.parent = true
				// The recorder, whoever it was, says all that is wanted.
				m.stmt.Byproducts.Tree = true
				m.stmt.Byproducts.Executables = []link.Executable{{Path: "/bin/tool", Digest: map[string]string{"sha256": hash}}}
				m.stmt.Environment.Caches = []link.Cache{{Name: "GOCACHE", Path: "/c", Fresh: true}}
			}
			s.accepts(t)
			s.in.Layout.Raw = nil
			a.demand(s.build())
			s.refuses(t, a.check, link.ErrPolicy, link.ErrPolicy)
		})
	}
}

// Each kind of evidence is said to prove what it proves, in the text for people
// too, when a pipeline has several.
func TestEachKindOfEvidenceIsToldApartInText(t *testing.T) {
	const committed, nonce, svid, nothing = "committed to exactly that statement", "after the nonce", "after the SVID began", "committed to no statement, key or program"
	for name, a := range map[string]struct {
		plain, parent []int
		says, never   []string
	}{
		"leaf":     {says: []string{committed, nonce}, never: []string{svid, nothing, "PARENT", "DETACHED"}},
		"detached": {plain: []int{0, 1, 2}, says: []string{committed, svid, "(detached evidence)", "SOFTWARE TPM"}, never: []string{nonce, nothing, "PARENT"}},
		"parent": {
			parent: []int{0, 1, 2}, says: []string{nothing, "PARENT EVIDENCE ONLY", "SOFTWARE TPM", "no tool or recorder was measured", builder},
			never: []string{committed, nonce, svid, "NOT PROVED", "DETACHED"},
		},
		"all": {plain: []int{1}, parent: []int{2}, says: []string{"for 1 link of 3\n", "for 1 link of 3 by detached evidence\n", "for 1 link of 3 by parent evidence\n", nothing, nonce, svid, "PARENT EVIDENCE ONLY"}},
	} {
		t.Run(name, func(t *testing.T) {
			s := newScene(t)
			r := &s.file.Requirements[0]
			r.Evidence, r.Tools, r.Recorders, r.UnprotectedRecorders = link.EvidenceParent, []string{link.AnyHash}, nil, []string{link.AnyHash}
			for _, i := range a.plain {
				s.links[i].plain = true
			}
			for _, i := range a.parent {
				s.links[i].parent = true
			}
			text := s.accepts(t).Text()
			for _, w := range a.says {
				if !strings.Contains(text, w) {
					t.Errorf("the text lacks %q", w)
				}
			}
			for _, w := range a.never {
				if strings.Contains(text, w) {
					t.Errorf("the text says %q", w)
				}
			}
			if t.Failed() {
				t.Log(text)
			}
		})
	}
}

// One machine, two kinds of evidence: what is drawn under the one does not hold
// of the other.
func TestOneMachineIsDrawnForEachKindOfEvidence(t *testing.T) {
	s := newScene(t)
	r := &s.file.Requirements[0]
	r.Evidence, r.Tools, r.Recorders, r.UnprotectedRecorders = link.EvidenceParent, []string{link.AnyHash}, nil, []string{link.AnyHash}
	s.build().DistinctHosts = false
	for _, m := range s.links {
		m.tpm = s.tpms[0]
	}
	s.links[0].parent = true
	text := s.accepts(t).Text()
	if n := strings.Count(text, "of the agent's node, PARENT EVIDENCE"); n != 1 || strings.Count(text, "quote of ") != 2 {
		t.Errorf("drawn wrongly:\n%s", text)
	}
}
