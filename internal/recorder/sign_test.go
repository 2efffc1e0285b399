package recorder

import (
	"testing"

	"github.com/rootlink/rootlink/internal/cli"
	"github.com/rootlink/rootlink/pkg/link"
)

// The story is in swtpm-tests/testdata/forged-link.txt; this holds where no TPM is.
func TestRefusesToSignALinkThatSomebodyWrote(t *testing.T) {
	for name, want := range map[string]bool{"link": false, link.PredicateType: false, "cyclonedx": true} {
		s := &Sign{Type: name, Predicate: "p.json", Artifacts: []string{"hello"}, IssueTimeout: 1, BundleDir: t.TempDir(), Command: []string{"cp", "forged.json", "p.json"}}
		_, _, _, err := s.validate()
		if (err == nil) != want || err != nil && cli.ExitCode(err) != cli.ExitRun {
			t.Errorf("--type %s: %v", name, err)
		}
	}
}
