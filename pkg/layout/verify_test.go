package layout

import (
	"bytes"
	"crypto"
	"crypto/ed25519"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/rootlink/rootlink/internal/forge"
	"github.com/rootlink/rootlink/pkg/link"
)

func TestPipelineVerifies(t *testing.T) {
	for _, form := range []string{FormDSSE, FormMetablock} {
		s := newScene(t)
		s.form = form
		res := s.accepts(t)
		if len(res.Steps) != 2 || res.Steps[1].Verdict != link.VerdictVerified || len(res.Steps[1].SignedBy) != 2 || len(res.Steps[1].Hosts) != 2 {
			t.Errorf("%s: steps %+v", form, res.Steps)
		}
		if a := res.Artifacts[0]; a.Step != "build" || a.Subject != "hello" {
			t.Errorf("%s: artifact %+v", form, a)
		}
		if res.Layouts[0].Signers[0] != "release" || res.Layouts[0].Serial != 7 {
			t.Errorf("%s: layout %+v", form, res.Layouts)
		}
	}
}

func TestEd25519KeysSignLayouts(t *testing.T) {
	s := newScene(t)
	_, key, err := ed25519.GenerateKey(nil)
	if err != nil {
		t.Fatal(err)
	}
	s.keys = []crypto.Signer{key}
	s.file.LayoutKeys[0].Key = spki(t, key.Public())
	s.accepts(t)
}

func TestRefusesEmptyLayout(t *testing.T) {
	s := newScene(t)
	s.layout.Steps = nil
	s.links = s.links[:1]
	s.refuses(t, "layout.demands", ErrEmpty, link.ErrPolicy, "no steps")
}

func TestRefusesStepWithoutFunctionary(t *testing.T) {
	s := newScene(t)
	s.build().Identities = nil
	s.refuses(t, "layout.demands", ErrEmpty, link.ErrPolicy, "build")
}

func TestRefusesUnsignedLayout(t *testing.T) {
	s := newScene(t)
	raw, err := s.layout.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	s.in.Layout = NamedFile{"bare", raw}
	s.refuses(t, "layout.signature", ErrUnsigned, link.ErrCrypto)
	signed, err := Sign(s.layout, FormDSSE, s.keys...)
	if err != nil {
		t.Fatal(err)
	}
	var e map[string]any
	if err := json.Unmarshal(signed, &e); err != nil {
		t.Fatal(err)
	}
	e["signatures"] = []any{}
	if s.in.Layout.Raw, err = json.Marshal(e); err != nil {
		t.Fatal(err)
	}
	s.refuses(t, "layout.signature", ErrUnsigned, link.ErrCrypto)
}

func TestRefusesForeignLayoutKey(t *testing.T) {
	s := newScene(t)
	s.keys = []crypto.Signer{forge.P256(t)}
	s.refuses(t, "layout.signature", ErrForeign, link.ErrCrypto)
	s = newScene(t)
	s.file.LayoutKeys = nil
	s.refuses(t, "layout.signature", ErrForeign, link.ErrCrypto)
}

func TestRefusesChangedLayout(t *testing.T) {
	for _, form := range []string{FormDSSE, FormMetablock} {
		s := newScene(t)
		raw, err := Sign(s.layout, form, s.keys...)
		if err != nil {
			t.Fatal(err)
		}
		s.layout.Steps[1].Threshold = 1
		other, err := Sign(s.layout, form, s.keys...)
		if err != nil {
			t.Fatal(err)
		}
		// The content of the one with the signatures of the other.
		var a, b map[string]json.RawMessage
		if json.Unmarshal(raw, &a) != nil || json.Unmarshal(other, &b) != nil {
			t.Fatal("not JSON")
		}
		b["signatures"] = a["signatures"]
		if s.in.Layout.Raw, err = json.Marshal(b); err != nil {
			t.Fatal(err)
		}
		s.refuses(t, "layout.signature", ErrForeign, link.ErrCrypto)
	}
}

func TestRefusesExpiredLayout(t *testing.T) {
	s := newScene(t)
	s.layout.Expires = s.at
	s.layout.Issued = s.at.Add(-time.Hour)
	s.refuses(t, "layout.window", ErrExpired, link.ErrPolicy)
	s = newScene(t)
	s.layout.Issued = s.at.Add(time.Hour)
	s.refuses(t, "layout.window", link.ErrNotYetValid, link.ErrPolicy)
}

// An archive outlives its layout, and not one that had ended when it was made.
func TestArchivedLayout(t *testing.T) {
	expired := func(archived time.Duration) *scene {
		s := newScene(t)
		s.layout.Expires, s.layout.Issued = s.at.Add(-time.Minute), s.at.Add(-time.Hour)
		s.in.ArchivedAt = s.at.Add(archived)
		return s
	}
	expired(-2 * time.Minute).accepts(t)
	expired(-time.Minute).refuses(t, "layout.window", ErrExpired, link.ErrPolicy)
	expired(0).refuses(t, "layout.window", ErrExpired, link.ErrPolicy)
	s := newScene(t)
	s.layout.Issued, s.in.ArchivedAt = s.at.Add(time.Hour), s.at.Add(2*time.Hour)
	s.refuses(t, "layout.window", link.ErrNotYetValid, link.ErrPolicy)
}

func TestRefusesLayoutRolledBack(t *testing.T) {
	s := newScene(t)
	s.in.Seen = map[string]Seen{"hello": {Serial: 8}, "other": {Serial: 99}}
	s.refuses(t, "layout.serial", ErrRolledBack, link.ErrPolicy, "serial 7", "8")
	s = newScene(t)
	s.in.Seen = map[string]Seen{"hello": {Serial: 7, Digest: sum("another")}}
	s.refuses(t, "layout.serial", ErrRolledBack, link.ErrPolicy, "another layout")
	s = newScene(t)
	res := s.accepts(t)
	s.in.Seen = map[string]Seen{"hello": {Serial: 7, Digest: res.Layouts[0].Digest}}
	s.accepts(t)
}

func TestRefusesTrustRolledBackOrExpired(t *testing.T) {
	s := newScene(t)
	s.in.LeastSerial = 4
	s.refuses(t, "trust.serial", link.ErrRolledBack, link.ErrPolicy)
	s = newScene(t)
	s.file.Expires = s.at
	s.refuses(t, "trust.window", link.ErrPolicy, link.ErrPolicy)
}

func TestRefusesOneIdentityTwice(t *testing.T) {
	// Two certificates, two keys, two machines: one identity.
	s := newScene(t)
	s.build().DistinctHosts = false
	s.links[2].id = builder
	s.refuses(t, "step.threshold", ErrThreshold, link.ErrPolicy, "build", "2 different identities", builder)
}

func TestRefusesTwoIdentitiesOnOneHost(t *testing.T) {
	s := newScene(t)
	s.links[2].tpm = s.tpms[0]
	s.refuses(t, "step.threshold", ErrThreshold, link.ErrPolicy, "as many TPMs")
	s = newScene(t)
	s.build().DistinctHosts = false
	s.links[2].tpm = s.tpms[0]
	s.accepts(t)
}

func TestHostsAreMatchedToIdentities(t *testing.T) {
	l := func(id, ek string) *stepLink { return &stepLink{signer: id, ek: ek} }
	for name, c := range map[string]struct {
		links []*stepLink
		want  int
	}{
		"none":              {nil, 0},
		"pairs":             {[]*stepLink{l("a", "1"), l("b", "2")}, 2},
		"one host":          {[]*stepLink{l("a", "1"), l("b", "1")}, 1},
		"one identity":      {[]*stepLink{l("a", "1"), l("a", "2")}, 1},
		"crossed":           {[]*stepLink{l("a", "1"), l("a", "2"), l("b", "1")}, 2},
		"three, two hosts":  {[]*stepLink{l("a", "1"), l("b", "2"), l("c", "1")}, 2},
		"alternating":       {[]*stepLink{l("a", "1"), l("a", "2"), l("b", "1"), l("b", "3"), l("c", "1")}, 3},
		"classic has no EK": {[]*stepLink{l("a", ""), l("b", "1")}, 1},
	} {
		if got := distinctPairs(c.links); got != c.want {
			t.Errorf("%s: %d, want %d", name, got, c.want)
		}
	}
}

func TestRefusesMissingStep(t *testing.T) {
	s := newScene(t)
	s.links = s.links[1:]
	s.refuses(t, "step.threshold", ErrThreshold, link.ErrPolicy, "fetch", "no link")
	s = newScene(t)
	s.links = nil
	s.in.Links = []link.LinkInput{}
	s.refuses(t, "links.count", ErrThreshold, link.ErrPolicy)
}

func TestRefusesWrongIdentity(t *testing.T) {
	s := newScene(t)
	s.links[0].id = builder
	s.refuses(t, "link.verified", link.ErrPolicy, link.ErrPolicy, builder, fetcher)
}

func TestRefusesUnknownStep(t *testing.T) {
	s := newScene(t)
	s.links[0].stmt.Step = "other"
	s.refuses(t, "link.verified", link.ErrPolicy, link.ErrPolicy, `"other"`)
}

func TestRefusesForgedLink(t *testing.T) {
	s := newScene(t)
	s.links[1].bend = func(raw []byte) []byte {
		var b map[string]any
		if err := json.Unmarshal(raw, &b); err != nil {
			t.Fatal(err)
		}
		env := b["dsseEnvelope"].(map[string]any)
		p, _ := base64.StdEncoding.DecodeString(env["payload"].(string))
		env["payload"] = base64.StdEncoding.EncodeToString(bytes.Replace(p, []byte(sum("the program")), []byte(sum("a trojan")), 1))
		out, _ := json.Marshal(b)
		return out
	}
	s.refuses(t, "link.verified", link.ErrCrypto, link.ErrCrypto, "b.sigstore.json")
	s = newScene(t)
	s.links[1].bend = func([]byte) []byte { return []byte("{}") }
	s.refuses(t, "link.verified", link.ErrCrypto, link.ErrCrypto)
}

func TestRefusesLinksThatDisagree(t *testing.T) {
	s := newScene(t)
	s.links[2].stmt.Subjects = resources(map[string]string{"hello": "another program"})
	s.refuses(t, "step.agreement", ErrDisagree, link.ErrPolicy, "hello", sum("the program"), sum("another program"))
	s = newScene(t)
	s.links[2].stmt.Materials = s.links[2].stmt.Materials[:1]
	s.refuses(t, "step.agreement", ErrDisagree, link.ErrPolicy, "src/main.go", "absent")
}

func TestRefusesUnexpectedCommand(t *testing.T) {
	s := newScene(t)
	s.links[2].stmt.Command = []string{"go", "build", "-toolexec=evil"}
	s.refuses(t, "step.command", link.ErrPolicy, link.ErrPolicy, "-toolexec=evil", "build")
}

func TestRefusesFailedStep(t *testing.T) {
	s := newScene(t)
	one := 1
	s.links[1].stmt.Byproducts.ExitCode = &one
	s.refuses(t, "link.verified", link.ErrPolicy, link.ErrPolicy, "exit code 1")
	s = newScene(t)
	s.links[0].stmt.Byproducts.ExitCode = &one
	s.layout.Steps[0].ExitCode = 1
	s.accepts(t)
	s = newScene(t)
	s.layout.Steps[0].ExitCode = 1
	s.refuses(t, "link.verified", link.ErrPolicy, link.ErrPolicy, "exit code 0, not with 1")
}

func TestRefusesChangedSource(t *testing.T) {
	s := newScene(t)
	for _, m := range s.links[1:] {
		m.stmt.Materials = resources(map[string]string{"src/main.go": "package main // and more", "src/go.mod": "module hello"})
	}
	f := s.refuses(t, "step.rules", ErrRule, link.ErrPolicy, sum("package main"))
	if f.Step != "build" || f.Rule != "DISALLOW *" || f.File != "src/main.go" {
		t.Errorf("the failure names %+v", f)
	}
	s = newScene(t)
	for _, m := range s.links[1:] {
		m.stmt.Materials = append(m.stmt.Materials, resources(map[string]string{"src/zz.go": "new"})...)
	}
	if f := s.refuses(t, "step.rules", ErrRule, link.ErrPolicy, "has no product src/zz.go"); f.File != "src/zz.go" {
		t.Errorf("the failure names %+v", f)
	}
}

func TestRefusesEveryKindOfRule(t *testing.T) {
	for name, c := range map[string]struct {
		materials, products [][]string
		file                string
	}{
		"CREATE of what was there": {nil, rules("CREATE src/*", "DISALLOW *"), "hello"},
		"DISALLOW by name":         {nil, rules("DISALLOW hell?", "ALLOW *"), "hello"},
		"REQUIRE":                  {nil, rules("REQUIRE LICENSE", "ALLOW *"), "LICENSE"},
		"MODIFY":                   {nil, rules("MODIFY hello", "DISALLOW *"), "hello"},
		"DELETE":                   {rules("MATCH src/go.mod WITH PRODUCTS FROM fetch", "MATCH src/* WITH MATERIALS FROM build", "DISALLOW *"), nil, ""},
		"prefix":                   {rules("MATCH * IN src WITH PRODUCTS IN lib FROM fetch", "DISALLOW *"), nil, "src/go.mod"},
	} {
		s := newScene(t)
		if c.materials != nil {
			s.build().Materials = c.materials
		}
		if c.products != nil {
			s.build().Products = c.products
		}
		if c.file == "" {
			s.accepts(t)
			continue
		}
		if f := s.refuses(t, "step.rules", ErrRule, link.ErrPolicy); f.File != c.file {
			t.Errorf("%s: %+v", name, f)
		}
	}
}

func TestRefusesRulesWithoutOverlap(t *testing.T) {
	s := newScene(t)
	s.build().Materials = rules("MATCH lib/* WITH PRODUCTS FROM fetch", "ALLOW *")
	if f := s.refuses(t, "step.rules", ErrNoOverlap, link.ErrPolicy, "no artifact meets it"); f.Rule != "MATCH lib/* WITH PRODUCTS FROM fetch" {
		t.Errorf("%+v", f)
	}
	// Other content counts as none: the rule would take nothing.
	s = newScene(t)
	s.build().Materials = rules("MATCH src/* WITH PRODUCTS FROM fetch", "ALLOW *")
	for _, m := range s.links[1:] {
		m.stmt.Materials = resources(map[string]string{"src/main.go": "x"})
	}
	s.refuses(t, "step.rules", ErrNoOverlap, link.ErrPolicy)
	s = newScene(t)
	s.build().Materials = rules("MATCH lib/* WITH PRODUCTS FROM fetch", "ALLOW *")
	s.build().MayMatchNothing = true
	s.accepts(t)
}

func TestRefusesStepsThatNothingJoins(t *testing.T) {
	s := newScene(t)
	s.build().Materials = rules("ALLOW *")
	s.refuses(t, "layout.demands", ErrNoOverlap, link.ErrPolicy, "fetch")
	s = newScene(t)
	s.build().Materials = rules("ALLOW *")
	s.layout.Steps[0].Standalone, s.layout.Steps[1].Standalone = true, true
	s.accepts(t)
}

func TestRefusesRulesThatLeaveRoom(t *testing.T) {
	for name, c := range map[string]struct {
		rules [][]string
		word  string
	}{
		"no end":       {rules("MATCH src/* WITH PRODUCTS FROM fetch"), "must end in DISALLOW *"},
		"none":         {nil, "must end in"},
		"no such step": {rules("MATCH src/* WITH PRODUCTS FROM fetsch", "DISALLOW *"), `no step "fetsch"`},
		"after all":    {rules("ALLOW *", "MATCH src/* WITH PRODUCTS FROM fetch", "DISALLOW *"), "nothing is left"},
	} {
		t.Run(name, func(t *testing.T) {
			s := newScene(t)
			s.build().Materials = c.rules
			s.refuses(t, "layout.demands", ErrRule, link.ErrPolicy, c.word, "build")
		})
	}
}

func TestRefusesNamesThatLeaveTheTree(t *testing.T) {
	for _, name := range []string{"../secret", "/etc/passwd", "src/../../x", "src//x", "./x", ".."} {
		s := newScene(t)
		for _, m := range s.links[1:] {
			m.stmt.Materials = append(m.stmt.Materials, resources(map[string]string{name: "x"})...)
		}
		if f := s.refuses(t, "link.verified", ErrEscape, link.ErrPolicy); f.File != name {
			t.Errorf("%q: %+v", name, f)
		}
	}
}

func TestRefusesMixedBuilds(t *testing.T) {
	ids := func(s *scene, ids ...string) {
		for i, id := range ids {
			s.links[i].stmt.Environment.BuildID = id
		}
	}
	s := newScene(t)
	ids(s, "1", "1", "2")
	s.refuses(t, "links.build", ErrBuildID, link.ErrPolicy, `"2"`)
	s = newScene(t)
	ids(s, "1", "1", "1")
	s.in.BuildID = "1"
	s.accepts(t)
	// A genuine link of an older run, of the same step and content.
	s = newScene(t)
	ids(s, "2", "2", "1")
	s.in.BuildID = "2"
	s.refuses(t, "step.threshold", ErrThreshold, link.ErrPolicy, "of other builds and left out: c.sigstore.json")
	s = newScene(t)
	ids(s, "2", "2", "")
	s.in.BuildID = "2"
	s.refuses(t, "links.build", ErrBuildID, link.ErrPolicy, "carries no build ID")
	// Others lie in the same directory and do not matter.
	s = newScene(t)
	ids(s, "2", "2", "2")
	old := *s.links[0]
	stmt := *old.stmt
	stmt.Environment.BuildID, stmt.Subjects = "1", resources(map[string]string{"src/old.go": "old"})
	old.stmt = &stmt
	s.links = append(s.links, &old)
	s.in.BuildID = "2"
	if res := s.accepts(t); len(res.Steps[0].LeftOut) != 1 {
		t.Errorf("%+v", res.Steps[0])
	}
}

func TestRefusesUnmetDemands(t *testing.T) {
	none := []string{sum("none")}
	for check, spoil := range map[string]func(*scene){
		"step.authority":   func(s *scene) { s.build().Authorities = none },
		"step.ek":          func(s *scene) { s.build().EKs = none },
		"step.pcr_policy":  func(s *scene) { s.build().PCRPolicies = []string{"servers"} },
		"step.tools":       func(s *scene) { s.build().Tools = none },
		"step.recorder":    func(s *scene) { s.build().Recorders = none },
		"step.executables": func(s *scene) { s.build().Executables = none },
		"step.caches":      func(s *scene) { s.build().CachesPerJob = true },
		"step.tier": func(s *scene) {
			s.build().PCRPolicies, s.file.Requirements[0].PCRPolicies, s.file.Requirements[0].Tier = nil, nil, link.TierTPM
		},
	} {
		t.Run(check, func(t *testing.T) {
			s := newScene(t)
			spoil(s)
			s.refuses(t, check, link.ErrPolicy, link.ErrPolicy, "build", ".sigstore.json")
		})
	}
	// Met, each of them is no obstacle.
	s := newScene(t)
	res := s.accepts(t)
	c := res.Links[1].Chain
	b := s.build()
	b.Authorities, b.EKs = []string{c.SVID.AuthorityKey}, []string{c.EK.SHA256, res.Links[2].Chain.EK.SHA256}
	b.Tools, b.Recorders, b.ProtectedRecorder, b.Evidence = c.Programs.Tools, []string{c.Programs.Recorder}, true, link.EvidenceLeaf
	for _, m := range s.links[1:] {
		m.stmt.Byproducts.Tree = true
		m.stmt.Byproducts.Executables = []link.Executable{{Path: "/go", Digest: map[string]string{"sha256": sum("go")}, Role: link.RoleTool}}
		m.stmt.Environment.Caches = []link.Cache{{Name: "GOCACHE", Path: "/job", Fresh: true}}
	}
	b.Executables, b.CachesPerJob = []string{sum("go")}, true
	s.in.Layout, s.in.Links = NamedFile{}, nil
	s.accepts(t)
	b.Executables = []string{sum("gofmt")}
	s.in.Layout, s.in.Links = NamedFile{}, nil
	s.refuses(t, "step.executables", link.ErrUnlistedExecutable, link.ErrPolicy, "/go")
}

func TestRefusesUnprotectedRecorderWhereProtectedIsDemanded(t *testing.T) {
	s := newScene(t)
	s.build().ProtectedRecorder = true
	s.accepts(t)
	d := s.build().demandChecks()
	for _, c := range d {
		if c.id != "recorder" {
			continue
		}
		l := &stepLink{result: &link.LinkResult{Chain: link.Chain{Programs: &link.ProgramsInfo{Recorder: "r"}}}}
		if !c.wanted || c.do(l) == nil {
			t.Error("an unprotected recorder passes")
		}
	}
}

func TestRefusesForeignArtifact(t *testing.T) {
	s := newScene(t)
	s.in.Artifacts[0].Digest["sha256"] = sum("another")
	if f := s.refuses(t, "artifact.product", link.ErrPolicy, link.ErrPolicy, "hello", "is no product of any step"); f.File != "./hello" {
		t.Errorf("%+v", f)
	}
}

func TestRefusesArtifactThatALaterStepReplaced(t *testing.T) {
	s := newScene(t)
	s.layout.Steps = append(s.layout.Steps, Step{
		Name: "strip", Threshold: 1, Demands: Demands{Identities: []string{fetcher}},
		Materials: rules("MATCH hello WITH PRODUCTS FROM build", "DISALLOW *"), Products: rules("MODIFY hello", "DISALLOW *"),
	})
	s.links = append(s.links, &made{id: fetcher, tpm: s.tpms[0], stmt: statement("strip",
		map[string]string{"hello": "the program"}, map[string]string{"hello": "stripped"}, "strip")})
	s.refuses(t, "artifact.product", link.ErrPolicy, link.ErrPolicy, "strip")
	s.in.Artifacts[0].Digest["sha256"] = sum("stripped")
	if res := s.accepts(t); res.Artifacts[0].Step != "strip" {
		t.Errorf("%+v", res.Artifacts)
	}
}

func TestDirectoriesAreArtifacts(t *testing.T) {
	s := newScene(t)
	s.in.Artifacts = []link.Artifact{{Name: "src", Files: map[string]string{"main.go": sum("package main"), "go.mod": sum("module hello")}}}
	if res := s.accepts(t); res.Artifacts[0].Step != "fetch" {
		t.Errorf("%+v", res.Artifacts)
	}
	s.in.Artifacts[0].Files["extra"] = sum("x")
	s.refuses(t, "artifact.product", link.ErrPolicy, link.ErrPolicy)
	delete(s.in.Artifacts[0].Files, "extra")
	delete(s.in.Artifacts[0].Files, "go.mod")
	s.refuses(t, "artifact.product", link.ErrPolicy, link.ErrPolicy)
}

func TestInspectionsAreOffUnlessAsked(t *testing.T) {
	s := newScene(t)
	s.layout.Inspections = []Inspection{{
		Name: "unpack", Run: []string{"tar", "xf"}, Materials: rules("MATCH hello WITH PRODUCTS FROM build", "DISALLOW *"), Products: rules("ALLOW *"),
	}}
	s.refuses(t, "inspection.run", ErrInspection, link.ErrPolicy, "was not run", "unpack")
	s.in.SkipInspections = true
	s.accepts(t)
	var ran int
	s.in.Inspect = func(in Inspection) (Inspected, error) {
		ran++
		return Inspected{Materials: map[string]string{"hello": sum("the program")}}, nil
	}
	s.accepts(t)
	if ran != 1 {
		t.Errorf("ran %d times", ran)
	}
	s.in.Inspect = func(in Inspection) (Inspected, error) { return Inspected{ExitCode: 3}, nil }
	s.refuses(t, "inspection.run", ErrInspection, link.ErrPolicy, "exit code 3")
	s.in.Inspect = func(in Inspection) (Inspected, error) { return Inspected{}, errors.New("no sandbox") }
	s.refuses(t, "inspection.run", ErrInspection, link.ErrPolicy, "no sandbox")
	s.in.Inspect = func(in Inspection) (Inspected, error) {
		return Inspected{Products: map[string]string{"../hello": sum("the program")}}, nil
	}
	s.refuses(t, "inspection.run", ErrEscape, link.ErrPolicy, "../hello")
	s.in.Inspect = func(in Inspection) (Inspected, error) {
		return Inspected{Materials: map[string]string{"hello": sum("a trojan")}}, nil
	}
	s.refuses(t, "inspection.rules", ErrRule, link.ErrPolicy, "hello")
	// What is refused already runs nothing here.
	ran = 0
	s.in.Inspect = func(in Inspection) (Inspected, error) { ran++; return Inspected{}, nil }
	s.in.Seen = map[string]Seen{"hello": {Serial: 8}}
	if _, err := s.verify(t); err == nil || ran != 0 {
		t.Errorf("ran %d times for a layout that was refused: %v", ran, err)
	}
}

func TestRefusesTooManyLinks(t *testing.T) {
	s := newScene(t)
	one := link.LinkInput{Name: "x", Bundle: s.sign(t, s.links[0])}
	for range MaxLinks + 1 {
		s.in.Links = append(s.in.Links, one)
	}
	if f := s.refuses(t, "links.count", link.ErrPolicy, link.ErrPolicy); !strings.Contains(f.Message, fmt.Sprint(MaxLinks)) {
		t.Errorf("%+v", f)
	}
}
