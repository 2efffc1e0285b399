// Package stories runs the user stories end to end: real binaries, a real
// software TPM per script. Each testdata/*.txt is one story, headed by why it
// exists. Commands of the scripts beyond testscript's own are in
// internal/swtpmtest/story; those of these stories alone are here.
package stories

import (
	"testing"

	"github.com/rootlink/rootlink/internal/swtpmtest/story"
)

var programs story.Programs

func TestMain(m *testing.M) {
	story.Main(m, "..", map[string]string{
		"resign": "./examples/resign", "borrow": "./swtpm-tests/borrow",
		"spiffe-conformance": "./conformance/cmd/spiffe-conformance",
		"rootlink-tpmnode":   "./plugins/tpmnode", "rootlink-workloadattestor": "./plugins/workloadattestor",
	}, func(p story.Programs) { programs = p })
}

func TestStories(t *testing.T) {
	programs.Run(t, "testdata/*.txt", map[string]story.Command{"thief": cmdThief, "eventlog": cmdEventLog, "forget": cmdForget, "witness": cmdWitness})
}
