package attest_test

import (
	"testing"

	"github.com/rootlink/rootlink/internal/forge"
	"github.com/rootlink/rootlink/pkg/attest"
)

// Each byte of what was signed, and of the signature, is part of what is
// remembered: a forgery next to a remembered signature is checked anew.
func TestRefusesForgeryBesideARememberedSignature(t *testing.T) {
	w := forge.NewWorld(t)
	o := w.Options()
	o.Signatures = attest.NewSignatures()
	e := w.Make(t)
	for range 2 {
		if _, _, err := attest.Verify(e, w.Binding(), o); err != nil {
			t.Fatal(err)
		}
	}
	for name, b := range map[string][]byte{"quote": e.Attest, "signature": e.Signature, "AK certificate": e.AKCert, "EK certificate": e.EKChain[0]} {
		for i := range b {
			b[i] ^= 1
			if _, _, err := attest.Verify(e, w.Binding(), o); err == nil {
				t.Errorf("%s with byte %d changed passed", name, i)
			}
			b[i] ^= 1
		}
	}
	if _, _, err := attest.Verify(e, w.Binding(), o); err != nil {
		t.Error(err)
	}
}

// BenchmarkVerifyRemembered is what a server pays for each further leaf under
// one quote.
func BenchmarkVerifyRemembered(b *testing.B) {
	w := forge.NewWorld(b)
	e, binding, o := w.Make(b), w.Binding(), w.Options()
	o.Signatures = attest.NewSignatures()
	b.ReportAllocs()
	for b.Loop() {
		if _, _, err := attest.Verify(e, binding, o); err != nil {
			b.Fatal(err)
		}
	}
}
