// Command rootlink-server issues SVIDs rooted in TPMs, and administers itself
// over its admin socket.
package main

import (
	"os"

	"github.com/spf13/cobra"

	"github.com/rootlink/rootlink/internal/cli"
	"github.com/rootlink/rootlink/internal/version"
)

const (
	program        = "rootlink-server"
	defaultDataDir = "/var/lib/rootlink/server"
	envAdminSocket = "ROOTLINK_ADMIN_SOCKET"
)

func main() { os.Exit(run()) }

func run() int {
	ctx, stop := cli.SignalContext()
	defer stop()
	return cli.Main(ctx, newRoot(), os.Args[1:], os.Stdout, os.Stderr)
}

func newRoot() *cobra.Command {
	root := cli.Root(program, "Issue SPIFFE identities rooted in TPMs", version.String())
	var at location
	root.PersistentFlags().StringVar(&at.dataDir, "data-dir", defaultDataDir, "directory of the server's keys and database")
	root.PersistentFlags().StringVar(&at.socket, "admin-socket", "", "admin socket (default admin.sock in the data directory; $"+envAdminSocket+" for the commands that talk to a server)")
	root.AddCommand(
		runCommand(&at),
		validateCommand(&at),
		entryCommand(&at),
		agentCommand(&at),
		bundleCommand(&at),
		x509Command(&at),
		jwtCommand(&at),
		trustCommand(&at),
		joinLineCommand(&at),
		healthcheckCommand(&at),
		pcrPolicyCommand(&at),
		authorityCommand(&at),
		countersCommand(&at),
		logCommand(&at),
		tsaCommand(&at),
	)
	return root
}
