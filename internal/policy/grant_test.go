package policy

import (
	"encoding/hex"
	"fmt"
	"testing"

	"github.com/rootlink/rootlink/internal/forge"
	"github.com/rootlink/rootlink/pkg/attest"
)

// judged verifies a world's evidence and judges it.
func judged(t *testing.T, j *Judge, w *forge.World, in ...Revision) *Grant {
	t.Helper()
	e := w.Make(t)
	b := w.Binding()
	b.SVIDNotBefore = w.Now
	v, checks, err := attest.Verify(e, b, w.Options())
	if err != nil {
		t.Fatalf("%v\n%+v", err, checks)
	}
	g, err := j.Grant(v, in, w.Now)
	if err != nil {
		t.Fatal(err)
	}
	if g.Verified() != v || !g.At().Equal(w.Now) {
		t.Error("the grant is not of this evidence and time")
	}
	return g
}

// fromTPM is a profile of what a TPM shows now.
func fromTPM(name string, tpm *forge.TPM, pcrs ...uint32) attest.PCRProfile {
	p := attest.PCRProfile{Name: name, Banks: map[string]map[string]string{"sha256": {}}}
	for _, n := range pcrs {
		p.Banks["sha256"][fmt.Sprint(n)] = hex.EncodeToString(tpm.PCRs[0].Values[n])
	}
	return p
}

func TestGrantNamesThePoliciesThatTheQuoteMeets(t *testing.T) {
	w := forge.NewWorld(t)
	j := NewJudge()
	image := revision("image", 4, fromTPM("v1", w.TPM, 4, 7))
	other := revision("other", 1, profile("x", map[int]byte{7: 9}))
	g := judged(t, j, w, other, image)
	m, ok := g.Verdict().Match("image")
	if !ok || m.Revision != 4 || m.Profile != "v1" {
		t.Errorf("got %+v, %v", m, ok)
	}
	if _, ok := g.Verdict().Match("other"); ok || len(g.Verdict().Misses()) != 1 {
		t.Errorf("misses %+v", g.Verdict().Misses())
	}
}

func TestRefusesPCRExtendedOutOfPolicyAtOnce(t *testing.T) {
	w := forge.NewWorld(t)
	j := NewJudge()
	image := revision("image", 1, fromTPM("v1", w.TPM, 4, 7))
	if _, ok := judged(t, j, w, image).Verdict().Match("image"); !ok {
		t.Fatal("not met to begin with")
	}
	w.TPM.Extend(7, []byte("evil")) // same boot, same AK, verdict of before at hand
	if g := judged(t, j, w, image); len(g.Verdict().Matches()) != 0 {
		t.Error("still met")
	}
}
