// Command rootlink-tpmnode holds rootlink's plugins for a stock SPIRE, one by its
// one argument: the node attestor "tpmnode", the agent's or the server's side,
// and what keeps its signatures verifiable.
package main

import (
	"fmt"
	"os"

	"github.com/spiffe/spire-plugin-sdk/pluginmain"

	"github.com/rootlink/rootlink/internal/orphan"
	"github.com/rootlink/rootlink/internal/version"
	"github.com/rootlink/rootlink/plugins/tpmnode/bundles"
	"github.com/rootlink/rootlink/plugins/tpmnode/composer"
	"github.com/rootlink/rootlink/plugins/tpmnode/nodeagent"
	"github.com/rootlink/rootlink/plugins/tpmnode/nodeserver"
	"github.com/rootlink/rootlink/plugins/tpmnode/wire"
)

const usage = `usage: rootlink-tpmnode agent|server|bundles|composer

This program is a plugin that SPIRE starts. In the agent's configuration:

  NodeAttestor "tpmnode" {
    plugin_cmd  = "/path/to/rootlink-tpmnode"
    plugin_args = ["agent"]
    plugin_data { tpm_path = "/dev/tpmrm0"  data_dir = "/var/lib/rootlink" }
  }

and in the server's the same with plugin_args = ["server"]. A server may also have

  BundlePublisher "rootlink_bundles" {
    plugin_cmd  = "/path/to/rootlink-tpmnode"
    plugin_args = ["bundles"]
    plugin_data { … }   # docs/keeper.md
  }
  CredentialComposer "rootlink_composer" {
    plugin_cmd  = "/path/to/rootlink-tpmnode"
    plugin_args = ["composer"]
    plugin_data { code_signing = ["spiffe://example.org/build/*"] }
  }
`

func main() {
	// To SPIRE nothing goes to stdout: the first line there is the handshake with SPIRE.
	if len(os.Args) != 2 {
		fmt.Fprint(os.Stderr, usage)
		os.Exit(2)
	}
	orphan.DieWithParent()
	switch os.Args[1] {
	case "agent":
		p := nodeagent.New()
		plugin, services := p.ExternalServers()
		if os.Getenv(wire.HostVariable) == wire.HostAgent {
			plugin, services = p.Servers()
		}
		pluginmain.Serve(plugin, services...)
		// SPIRE asks its plugins to end when it does; the SDK closes nothing.
		p.Close()
	case "server":
		plugin, services := nodeserver.New(nodeserver.Options{}).Servers()
		pluginmain.Serve(plugin, services...)
	case "bundles":
		plugin, services := bundles.New(bundles.Options{}).Servers()
		pluginmain.Serve(plugin, services...)
	case "composer":
		plugin, services := composer.New().Servers()
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
