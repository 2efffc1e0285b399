// Command rootlink-tpmnode is the node attestor "tpmnode" as an external plugin
// for a stock SPIRE, the agent's or the server's side by its one argument.
package main

import (
	"fmt"
	"os"

	"github.com/spiffe/spire-plugin-sdk/pluginmain"

	"github.com/rootlink/rootlink/internal/version"
	"github.com/rootlink/rootlink/plugins/tpmnode/nodeagent"
	"github.com/rootlink/rootlink/plugins/tpmnode/nodeserver"
)

const usage = `usage: rootlink-tpmnode agent|server

This program is a plugin that SPIRE starts. In the agent's configuration:

  NodeAttestor "tpmnode" {
    plugin_cmd  = "/path/to/rootlink-tpmnode"
    plugin_args = ["agent"]
    plugin_data { tpm_path = "/dev/tpmrm0"  data_dir = "/var/lib/rootlink" }
  }

and in the server's the same with plugin_args = ["server"].
`

func main() {
	// To SPIRE nothing goes to stdout: the first line there is the handshake with SPIRE.
	if len(os.Args) != 2 {
		fmt.Fprint(os.Stderr, usage)
		os.Exit(2)
	}
	switch os.Args[1] {
	case "agent":
		plugin, services := nodeagent.New().ExternalServers()
		pluginmain.Serve(plugin, services...)
	case "server":
		plugin, services := nodeserver.New(nodeserver.Options{}).Servers()
		pluginmain.Serve(plugin, services...)
	case "--version":
		fmt.Println("rootlink-tpmnode version " + version.String())
	case "-h", "--help", "help":
		fmt.Fprint(os.Stderr, usage)
	default:
		fmt.Fprintf(os.Stderr, "rootlink-tpmnode: unknown role %q\n%s", os.Args[1], usage)
		os.Exit(2)
	}
}
