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
