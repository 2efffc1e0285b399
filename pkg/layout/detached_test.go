package layout

import (
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
