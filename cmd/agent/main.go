// Command rootlink-agent attests its machine by the TPM and serves the SPIFFE
// Workload API and the Issuer to the workloads on it.
package main

import (
	"os"

	"github.com/spf13/cobra"

	"github.com/rootlink/rootlink/internal/cli"
	"github.com/rootlink/rootlink/internal/version"
)

const (
	program        = "rootlink-agent"
	defaultDataDir = "/var/lib/rootlink/agent"
	defaultSocket  = "/run/rootlink/agent.sock"
	defaultServer  = "127.0.0.1:8081"
	defaultTPM     = "/dev/tpmrm0"
	envSocket      = cli.EnvEndpoint
)

func main() { os.Exit(run()) }

func run() int {
	ctx, stop := cli.SignalContext()
	defer stop()
	return cli.Main(ctx, newRoot(), os.Args[1:], os.Stdout, os.Stderr)
}

func newRoot() *cobra.Command {
	root := cli.Root(program, "Give the workloads of this machine identities rooted in its TPM", version.String())
	root.AddCommand(
		runCommand(),
		validateCommand(),
		cli.Group("tpm", "Look at this machine's TPM", tpmInfoCommand()),
		cli.Group("api", "Call the Workload API of a running agent",
			cli.Group("fetch", "Fetch what this program is entitled to", fetchX509Command(), fetchJWTCommand()),
			cli.Group("validate", "Have the agent validate what somebody else shows", validateJWTCommand())),
		healthcheckCommand(),
	)
	return root
}
