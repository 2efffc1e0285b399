package attest_test

import (
	"testing"

	"github.com/rootlink/rootlink/internal/forge"
	"github.com/rootlink/rootlink/pkg/attest"
)

// BenchmarkVerify is the cost of one bundle's evidence: decoding it out of the
// certificate and every check. Target: at most 1 ms.
func BenchmarkVerify(b *testing.B) {
	for _, kind := range []string{forge.EKP256, forge.EKRSA2048} {
		b.Run(kind, func(b *testing.B) {
			m := forge.NewMaker(b, "Forge Semiconductor")
			w := forge.NewWorldWith(b, m, forge.NewTPM(b, m, forge.TPMOptions{EK: kind}))
			w.Others = 255
			svid := w.Issue(b, w.Make(b))
			binding, options := w.Binding(), w.Options()
			b.ReportAllocs()
			for b.Loop() {
				e, err := attest.FromCertificate(svid)
				if err != nil {
					b.Fatal(err)
				}
				if _, _, err := attest.Verify(e, binding, options); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

func BenchmarkParseRecord(b *testing.B) {
	w := forge.NewWorld(b)
	rec, err := w.Make(b).MarshalRecord()
	if err != nil {
		b.Fatal(err)
	}
	b.ReportAllocs()
	for b.Loop() {
		if _, err := attest.ParseRecord(rec); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkTree4096(b *testing.B) {
	leaves := make([][32]byte, attest.MaxLeaves)
	for b.Loop() {
		if _, err := attest.NewTree(leaves); err != nil {
			b.Fatal(err)
		}
	}
}

// TestEvidenceSize keeps the extension of an ECC EK within 4 KiB at its fullest:
// the deepest path, logs, a policy and a dozen selectors.
func TestEvidenceSize(t *testing.T) {
	w := forge.NewWorld(t)
	w.Others = attest.MaxLeaves - 1
	hash := "sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"
	w.Leaf.Selectors = attest.SortSelectors([]string{
		"binary:" + hash, "binary:parent:" + hash, "binary:tool:" + hash, "binary:recorder:" + hash,
		"binary:uid:1000", "binary:gid:1000", "binary:path:/usr/local/bin/rootlink",
	})
	e := w.Make(t)
	e.EKChain = e.EKChain[:1] // the intermediate is in trust.json
	e.EventLog, e.IMALog = attest.EventLogDigest(nil), attest.EventLogDigest(nil)
	p := &attest.PCRPolicy{Name: "golden", Revision: 1}
	e.Policy = p.Ref()
	x, err := e.Extension()
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("extension of %d bytes, of them AK certificate %d, EK certificate %d", len(x.Value), len(e.AKCert), len(e.EKChain[0]))
	if len(x.Value) > 4096 {
		t.Errorf("extension of %d bytes, want at most 4096", len(x.Value))
	}
}
