package interop

import (
	"os"
	"path/filepath"

	"github.com/rogpeppe/go-internal/testscript"
)

// deviations NAME: copies that list of conformance's to NAME.
func cmdDeviations(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 1 {
		ts.Fatalf("usage: deviations NAME")
	}
	b, err := os.ReadFile(filepath.Join("..", "conformance", "deviations", args[0]))
	ts.Check(err)
	ts.Check(os.WriteFile(ts.MkAbs(args[0]), b, 0o600))
}
