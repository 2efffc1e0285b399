package verifycmd

import (
	"strings"
	"testing"

	"github.com/rootlink/rootlink/internal/forge"
	"github.com/rootlink/rootlink/pkg/attest"
)

// inspect takes any file from anybody, and nothing has judged it before.
func FuzzInspect(f *testing.F) {
	w := forge.NewWorld(f)
	f.Add(w.Issue(f, w.Make(f)).Raw)
	f.Fuzz(func(t *testing.T, raw []byte) {
		in, err := decode(raw)
		if err != nil {
			return
		}
		var b strings.Builder
		in.view().text(&b, "")
		if in.cert != nil {
			_, _ = in.parts()
		}
	})
}

// The quote is the one part that a record carries undecoded.
func FuzzInspectQuote(f *testing.F) {
	w := forge.NewWorld(f)
	good := w.Make(f)
	f.Add(good.Attest)
	f.Fuzz(func(t *testing.T, raw []byte) {
		e := *good
		e.Attest = raw
		var b strings.Builder
		evidenceView(&e).text(&b, "")
		in := &inspected{cert: w.Authority, evidence: &e}
		_, _ = in.parts()
		_, _ = attest.ParseRecord(raw)
	})
}
