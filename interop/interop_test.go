// Package interop lets stock peers judge what rootlink writes, and rootlink what
// they write. Each testdata/*.txt is one judge, headed by what it is to say;
// scripts/interop builds the judges. The scripts are of the same kind as the
// stories in swtpm-tests: real programs on a real software TPM.
package interop

import (
	"fmt"
	"maps"
	"os"
	"testing"

	"github.com/rootlink/rootlink/internal/swtpmtest/story"
)

var programs story.Programs

func TestMain(m *testing.M) {
	if os.Getenv("ROOTLINK_PEERS") == "" {
		fmt.Fprintln(os.Stderr, "interop: the peers are not built\nhint: run make interop, or scripts/interop go test -run …")
		os.Exit(1)
	}
	story.Main(m, ".", map[string]string{
		"witness":  "./witness",
		"sigstore": "./sigstore",

		"spiffe-conformance": "github.com/rootlink/rootlink/conformance/cmd/spiffe-conformance",
	}, func(p story.Programs) { programs = p })
}

func TestPeers(t *testing.T) {
	commands := spireCommands()
	commands["page"] = cmdPage
	commands["deviations"] = cmdDeviations
	maps.Copy(commands, spireCLICommands())
	programs.Run(t, "testdata/*.txt", commands)
}
