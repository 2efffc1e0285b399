package layout

import (
	"crypto"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/in-toto/in-toto-golang/in_toto"

	"github.com/rootlink/rootlink/internal/forge"
	"github.com/rootlink/rootlink/pkg/link"
)

// Two links of 20,000 artifacts each against their layout, read from memory;
// in-toto-golang beside it with the same artifacts, rules and kind of keys, in
// Metablocks read from files as it knows no other way.
const benchArtifacts = 20_000

func benchScene(b *testing.B) *scene {
	s := newScene(b)
	src := map[string]string{}
	for i := range benchArtifacts {
		src[fmt.Sprintf("src/dir%03d/file%05d.go", i%200, i)] = fmt.Sprint(i)
	}
	s.layout.Steps[0].Materials = rules("ALLOW src/*", "DISALLOW *")
	s.layout.Steps[0].Products = rules("CREATE stamp", "DISALLOW *")
	s.build().Materials = rules("MATCH src/* WITH MATERIALS FROM fetch", "DISALLOW *")
	s.build().Threshold, s.build().DistinctHosts = 1, false
	s.links[0].stmt.Materials, s.links[0].stmt.Subjects = resources(src), resources(map[string]string{"stamp": "x"})
	s.links[1].stmt.Materials = resources(src)
	s.links = s.links[:2]
	return s
}

func BenchmarkVerifyLayout(b *testing.B) {
	s := benchScene(b)
	s.accepts(b)
	trust, err := link.NewTrust(s.file)
	if err != nil {
		b.Fatal(err)
	}
	b.ReportAllocs()
	for b.Loop() {
		if _, err := Verify(s.in, trust, s.at); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkPeerVerifyLayout(b *testing.B) {
	s := benchScene(b)
	s.layout.Expires = s.layout.Issued.AddDate(MaxLife, 0, 0)
	dir := b.TempDir()
	w, err := s.layout.wire(false)
	if err != nil {
		b.Fatal(err)
	}
	for i, m := range s.links {
		k := forge.P256(b)
		key, err := NewKey(k.Public())
		if err != nil {
			b.Fatal(err)
		}
		w.Keys[key.KeyID] = key
		w.Steps[i].PubKeys = []string{key.KeyID}
		w.Steps[i].ExpectedCommand = m.stmt.Command
		sl := &stepLink{step: m.stmt.Step, command: m.stmt.Command}
		if sl.materials, err = artifactsOf(m.stmt.Materials); err != nil {
			b.Fatal(err)
		}
		if sl.products, err = artifactsOf(m.stmt.Subjects); err != nil {
			b.Fatal(err)
		}
		benchWrite(b, sl.classicForm(0), k, filepath.Join(dir, fmt.Sprintf(in_toto.LinkNameFormat, sl.step, key.KeyID)))
	}
	k := forge.P256(b)
	key, err := NewKey(k.Public())
	if err != nil {
		b.Fatal(err)
	}
	path := filepath.Join(dir, "root.layout")
	benchWrite(b, w, k, path)
	b.ReportAllocs()
	for b.Loop() {
		md, err := in_toto.LoadMetadata(path)
		if err != nil {
			b.Fatal(err)
		}
		if _, err := in_toto.InTotoVerify(md, map[string]in_toto.Key{key.KeyID: key}, dir, "", nil, nil, false); err != nil {
			b.Fatal(err)
		}
	}
}

func benchWrite(b *testing.B, what any, key crypto.Signer, path string) {
	b.Helper()
	mb, err := signMetablock(what, []crypto.Signer{key})
	if err != nil {
		b.Fatal(err)
	}
	raw, err := json.Marshal(mb)
	if err != nil {
		b.Fatal(err)
	}
	if err := os.WriteFile(path, raw, 0o644); err != nil {
		b.Fatal(err)
	}
}
