package layout

import (
	"fmt"
	"maps"
	"testing"
	"time"

	"github.com/rootlink/rootlink/pkg/link"
)

// "IN vendor" says where the files may lie. in-toto-golang takes the prefix off
// where there is one and goes on where there is none, so that a file of the other
// step may also lie outside, in the place of one that is compiled.
func TestRefusesMatchOutsideItsPrefix(t *testing.T) {
	s := newScene(t)
	s.layout.Steps[0].Products = rules("CREATE main.go", "CREATE src/*", "DISALLOW *")
	s.links[0].stmt.Subjects = append(resources(map[string]string{"main.go": "example"}), s.links[0].stmt.Subjects...)
	in := map[string]string{"vendor/main.go": "example"}
	s.build().Materials = rules("MATCH * IN vendor WITH PRODUCTS FROM fetch", "DISALLOW *")
	for _, m := range s.links[1:] {
		m.stmt.Materials = resources(in)
	}
	s.accepts(t)

	in["main.go"] = "example"
	s.in.Links = nil
	for _, m := range s.links[1:] {
		m.stmt.Materials = resources(in)
	}
	s.refuses(t, "step.rules", ErrRule, link.ErrPolicy, "main.go", "vendor")

	// Two rules that each would take it from outside are no excuse for one another.
	s.in.Links, s.in.Layout.Raw = nil, nil
	s.build().MayMatchNothing = true
	s.build().Materials = rules("MATCH * IN vendor WITH PRODUCTS FROM fetch", "MATCH * IN third_party WITH PRODUCTS FROM fetch", "DISALLOW *")
	s.refuses(t, "step.rules", ErrRule, link.ErrPolicy, "main.go", "vendor")

	// A rule that allows it is asked for itself.
	s.in.Links, s.in.Layout.Raw = nil, nil
	s.build().Materials = rules("MATCH * IN vendor WITH PRODUCTS FROM fetch", "ALLOW main.go", "DISALLOW *")
	s.accepts(t)
}

// The directory of an earlier step, which a later step made anew, is offered as
// the pipeline's product.
func TestRefusesDirectoryThatALaterStepReplaced(t *testing.T) {
	s := newScene(t)
	s.layout.Steps = append(s.layout.Steps, Step{
		Name: "patch", Threshold: 1, Demands: Demands{Identities: []string{fetcher}},
		Materials: rules("MATCH src/* WITH PRODUCTS FROM fetch", "DISALLOW *"), Products: rules("MODIFY src/*", "ALLOW src/go.mod", "DISALLOW *"),
	})
	before := map[string]string{"src/main.go": "package main", "src/go.mod": "module hello"}
	after := map[string]string{"src/main.go": "package main // mended", "src/go.mod": "module hello"}
	s.links = append(s.links, &made{id: fetcher, tpm: s.tpms[0], stmt: statement("patch", before, after, "patch")})
	s.in.Artifacts = []link.Artifact{{Name: "src", Files: map[string]string{"main.go": sum("package main"), "go.mod": sum("module hello")}}}
	s.refuses(t, "artifact.product", link.ErrPolicy, link.ErrPolicy, "patch")
	s.in.Artifacts[0].Files["main.go"] = sum("package main // mended")
	if res := s.accepts(t); res.Artifacts[0].Step != "patch" {
		t.Errorf("%+v", res.Artifacts)
	}
}

// A builder who records tens of thousands of files that no rule allows must not
// keep the verifier busy with finding out which: each question to the engine
// costs as much as the files of the other step.
func TestRefusesManyFilesWithoutAskingForEach(t *testing.T) {
	s := newScene(t)
	src, bad := map[string]string{"src/main.go": "package main", "src/go.mod": "module hello"}, map[string]string{}
	for i := range 12000 {
		src[fmt.Sprintf("src/%04d", i)] = "x"
		bad[fmt.Sprintf("bad/%04d", i)] = "x"
	}
	s.links[0].stmt.Subjects, s.links[0].stmt.Materials = resources(map[string]string{"src/main.go": "package main"}), resources(src)
	s.layout.Steps[0].Materials, s.layout.Steps[0].Products = rules("ALLOW *"), rules("ALLOW *")
	s.build().Materials = rules("MATCH src/* WITH MATERIALS FROM fetch", "DISALLOW *")
	maps.Copy(bad, src)
	for _, m := range s.links[1:] {
		m.stmt.Materials = resources(bad)
	}
	start := time.Now()
	s.refuses(t, "step.rules", ErrRule, link.ErrPolicy, "bad/0000", "and 11999 more")
	if d := time.Since(start); d > 10*time.Second {
		t.Errorf("took %s", d)
	}
}
