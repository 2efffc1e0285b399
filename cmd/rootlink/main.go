// Command rootlink records and signs build steps with an identity rooted in a
// TPM, and verifies what others recorded.
package main

import (
	"context"
	"os"
	"runtime"

	"github.com/spf13/cobra"

	"github.com/rootlink/rootlink/internal/cli"
	"github.com/rootlink/rootlink/internal/inspection"
	"github.com/rootlink/rootlink/internal/layoutcmd"
	"github.com/rootlink/rootlink/internal/recorder"
	"github.com/rootlink/rootlink/internal/storecmd"
	"github.com/rootlink/rootlink/internal/trustcmd"
	"github.com/rootlink/rootlink/internal/verifycmd"
	"github.com/rootlink/rootlink/internal/version"
)

func init() {
	if recorder.IsStub() || inspection.IsStub() {
		// Only here is the main goroutine still on the main thread for certain.
		runtime.LockOSThread()
	}
}

func main() {
	if recorder.IsStub() {
		recorder.RunStub()
	}
	if inspection.IsStub() {
		inspection.RunStub()
	}
	// No signal context: while a tool runs, ^C is the tool's affair. Commands
	// that want one make it for the time they need it.
	os.Exit(cli.Main(context.Background(), newRoot(), os.Args[1:], os.Stdout, os.Stderr))
}

func newRoot() *cobra.Command {
	root := cli.Root("rootlink", "Sign build steps with an identity rooted in a TPM, and verify them", version.String())
	root.PersistentPreRunE = func(c *cobra.Command, _ []string) error {
		if c.Annotations[needsGroup] != "" {
			return nil // gives it up itself, once it is connected to the agent
		}
		_, err := recorder.DropGroup()
		return err
	}
	root.AddCommand(
		runCommand(),
		signCommand(),
		provenanceCommand(),
		predicateCommand(),
		stampCommand(),
		whoamiCommand(),
		verifycmd.VerifyCommand(),
		verifycmd.InspectCommand(),
		verifycmd.ArchiveCommand(),
		layoutcmd.Command(verifycmd.ExportPinnedCommand()),
		trustcmd.Command(),
		storecmd.AttachCommand(),
		storecmd.FetchCommand(),
	)
	return root
}

// needsGroup marks the commands that connect to the agent as the recorder group.
const needsGroup = "needs-recorder-group"
