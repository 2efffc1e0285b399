package layout

import (
	"crypto"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/rootlink/rootlink/internal/forge"
	"github.com/rootlink/rootlink/pkg/attest"
	"github.com/rootlink/rootlink/pkg/link"
)

// scene is a pipeline in which all is well, for a test to spoil in one place:
// step fetch makes src/main.go, step build makes hello of it, and two machines
// must agree on that.
type scene struct {
	*forge.World
	file   link.TrustFile
	layout *Layout
	keys   []crypto.Signer // that sign the layout
	form   string
	links  []*made
	in     Input
	at     time.Time
	tpms   []*forge.TPM
}

// made is one link to be.
type made struct {
	id   string
	tpm  *forge.TPM
	stmt *link.Statement
	bend func([]byte) []byte
	name string
	// plain: by a server that puts no evidence into SVIDs. The record is left in
	// detached.
	plain    bool
	detached []byte
	parent   bool // by our server for a stock agent: parent evidence
}

func sum(s string) string {
	h := sha256.Sum256([]byte(s))
	return hex.EncodeToString(h[:])
}

func resources(files map[string]string) []link.Resource {
	var out []link.Resource
	for _, n := range slices.Sorted(maps.Keys(files)) {
		out = append(out, link.Resource{Name: n, Digest: map[string]string{"sha256": sum(files[n])}})
	}
	return out
}

func statement(step string, materials, products map[string]string, command ...string) *link.Statement {
	zero := 0
	return &link.Statement{
		Step: step, Command: command, Materials: resources(materials), Subjects: resources(products),
		Byproducts: link.Byproducts{ExitCode: &zero},
	}
}

func rule(s string) []string { return strings.Fields(s) }

func rules(all ...string) [][]string {
	var out [][]string
	for _, r := range all {
		out = append(out, rule(r))
	}
	return out
}

const (
	fetcher = "spiffe://example.org/fetch"
	builder = "spiffe://example.org/build/a"
	second  = "spiffe://example.org/build/b"
)

func newScene(t testing.TB) *scene {
	t.Helper()
	w := forge.NewWorld(t)
	s := &scene{World: w, at: w.Now.Add(time.Second), form: FormDSSE, keys: []crypto.Signer{forge.P256(t)}}
	s.tpms = []*forge.TPM{w.TPM, forge.NewTPM(t, w.Maker, forge.TPMOptions{})}
	root, err := link.MarshalTrustedRoot([]link.Authority{{Certificate: w.Authority, Start: w.Authority.NotBefore, End: w.Authority.NotAfter}})
	if err != nil {
		t.Fatal(err)
	}
	var profiles []attest.PCRProfile
	for i, tpm := range s.tpms {
		profiles = append(profiles, attest.PCRProfile{
			Name:  []string{"one", "two"}[i],
			Banks: map[string]map[string]string{"sha256": {"7": hex.EncodeToString(tpm.PCRs[0].Values[7])}},
		})
	}
	s.file = link.TrustFile{
		Format: link.TrustFormat, Version: link.FormatVersion, Serial: 3, Issued: w.Now.Add(-time.Hour), Expires: w.Now.AddDate(0, 3, 0),
		TrustDomain: "example.org", TrustedRoot: root,
		AttestationCAs: []link.AttestationCA{{Certificate: w.CA.Cert.Raw}},
		EK:             link.EKTrust{Roots: [][]byte{w.Maker.Root.Raw}},
		PCRPolicies:    []link.PCRPolicy{{PCRPolicy: attest.PCRPolicy{Name: "fleet", Revision: 1, Profiles: profiles}}},
		LayoutKeys:     []link.LayoutKey{{Name: "release", Key: spki(t, s.keys[0].Public())}},
		Requirements: []link.Requirement{{
			Identity: "spiffe://example.org/**", Tools: []string{link.AnyHash},
			Recorders: []string{link.AnyHash}, PCRPolicies: []string{"fleet"},
		}},
	}
	src := map[string]string{"src/main.go": "package main", "src/go.mod": "module hello"}
	s.layout = &Layout{
		Name: "hello", Serial: 7, Issued: w.Now.Add(-time.Minute), Expires: w.Now.AddDate(0, 3, 0),
		Steps: []Step{
			{
				Name: "fetch", Threshold: 1, Demands: Demands{Identities: []string{fetcher}},
				Materials: rules("DISALLOW *"), Products: rules("CREATE src/*", "DISALLOW *"),
			},
			{
				Name: "build", Threshold: 2, Command: []string{"go", "build"},
				Demands:   Demands{Identities: []string{"spiffe://example.org/build/*"}, DistinctHosts: true, PCRPolicies: []string{"fleet"}, Tier: link.TierBootAttested},
				Materials: rules("MATCH src/* WITH PRODUCTS FROM fetch", "DISALLOW *"), Products: rules("CREATE hello", "DISALLOW *"),
			},
		},
	}
	s.links = []*made{
		{id: fetcher, tpm: s.tpms[0], stmt: statement("fetch", nil, src, "git", "clone")},
		{id: builder, tpm: s.tpms[0], stmt: statement("build", src, map[string]string{"hello": "the program"}, "go", "build")},
		{id: second, tpm: s.tpms[1], stmt: statement("build", src, map[string]string{"hello": "the program"}, "go", "build")},
	}
	s.in.Artifacts = []link.Artifact{{Name: "./hello", Digest: map[string]string{"sha256": sum("the program")}}}
	s.in.LeastSerial = 3
	return s
}

func spki(t testing.TB, pub crypto.PublicKey) []byte {
	t.Helper()
	der, err := x509.MarshalPKIXPublicKey(pub)
	if err != nil {
		t.Fatal(err)
	}
	return der
}

// sign runs the flow for one link: statement, evidence over it, SVID, bundle.
func (s *scene) sign(t testing.TB, m *made) []byte {
	t.Helper()
	p, err := link.Prepare(m.stmt)
	if err != nil {
		t.Fatal(err)
	}
	w := *s.World
	w.TPM, w.SVIDKey = m.tpm, forge.P256(t)
	w.Leaf.SPIFFEID, w.Leaf.SVIDKey, w.Leaf.Payload = m.id, forge.KeyHash(t, w.SVIDKey.Public()), p.Digest()
	w.Leaf.Selectors = []string{attest.SelectorRecorder + hex.EncodeToString(w.Leaf.Recorder[:]), attest.SelectorTool + hex.EncodeToString(w.Leaf.Tool[:])}
	var b *link.Bundle
	if m.parent {
		b, err = p.SignWithoutEvidence(w.SVIDKey, w.IssueParent(t, w.MakeParent(t)))
	} else if m.plain {
		svid := w.Plain(t)
		d := w.Detach(t, svid)
		if b, err = p.SignDetached(w.SVIDKey, svid, d); err != nil {
			t.Fatal(err)
		}
		m.detached, err = d.Marshal()
	} else {
		b, err = p.Sign(w.SVIDKey, w.Issue(t, w.Make(t)))
	}
	if err != nil {
		t.Fatal(err)
	}
	raw, err := b.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	if m.bend != nil {
		raw = m.bend(raw)
	}
	return raw
}

func (s *scene) build() *Step { return &s.layout.Steps[1] }

func (s *scene) verify(t testing.TB) (*Result, error) {
	t.Helper()
	if s.in.Layout.Raw == nil {
		raw, err := Sign(s.layout, s.form, s.keys...)
		if err != nil {
			t.Fatal(err)
		}
		s.in.Layout = NamedFile{"hello.layout", raw}
	}
	if s.in.Links == nil {
		for i, m := range s.links {
			name := m.name
			if name == "" {
				name = string(rune('a'+i)) + ".sigstore.json"
			}
			s.in.Links = append(s.in.Links, link.LinkInput{Name: name, Bundle: s.sign(t, m)})
			s.in.Links[i].Detached = m.detached // made by sign
		}
	}
	trust, err := link.NewTrust(s.file)
	if err != nil {
		t.Fatal(err)
	}
	res, err := Verify(s.in, trust, s.at)
	if (err == nil) != (res.Verdict == link.VerdictVerified) || (err == nil) != (res.Failure == nil) {
		t.Fatalf("verdict %q with error %v and failure %+v", res.Verdict, err, res.Failure)
	}
	failed := 0
	for _, c := range res.Checks {
		if c.Outcome == attest.Failed {
			failed++
		}
		if c.Clause == "" || c.Outcome == "" {
			t.Errorf("check %+v cites nothing", c)
		}
	}
	if (failed == 0) != (err == nil) {
		t.Fatalf("%d checks failed, error %v", failed, err)
	}
	return res, err
}

func (s *scene) accepts(t testing.TB) *Result {
	t.Helper()
	res, err := s.verify(t)
	if err != nil {
		t.Fatalf("refused: %v\n%+v", err, res.Failure)
	}
	return res
}

// refuses fails the test unless check is the first to fail, with the sentinel,
// and the failure names what it should.
func (s *scene) refuses(t testing.TB, check string, want error, class error, words ...string) *Failure {
	t.Helper()
	res, err := s.verify(t)
	if err == nil {
		t.Fatal("accepted")
	}
	f := res.Failure
	if f.Check != check || !errors.Is(err, want) || !errors.Is(err, class) {
		t.Fatalf("refused by %s (%s): %v; want %s (%v, %v)", f.Check, f.Class, err, check, want, class)
	}
	for _, w := range words {
		if !strings.Contains(f.Message+" "+f.Rule+" "+f.File+" "+f.Step+" "+f.Link, w) {
			t.Errorf("the failure %+v lacks %q", f, w)
		}
	}
	return f
}
