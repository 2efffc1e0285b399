// Command rootlink-workloadattestor is the workload attestor "binary" as an
// external plugin, for a stock SPIRE agent.
package main

import (
	"fmt"
	"os"

	"github.com/spiffe/spire-plugin-sdk/pluginmain"
	workloadattestorv1 "github.com/spiffe/spire-plugin-sdk/proto/spire/plugin/agent/workloadattestor/v1"
	configv1 "github.com/spiffe/spire-plugin-sdk/proto/spire/service/common/config/v1"

	"github.com/rootlink/rootlink/internal/orphan"
	"github.com/rootlink/rootlink/internal/version"
	"github.com/rootlink/rootlink/plugins/workloadattestor/binary"
)

const usage = `usage: rootlink-workloadattestor

This program is a plugin that SPIRE starts. In the agent's configuration:

  WorkloadAttestor "binary" {
    plugin_cmd  = "/path/to/rootlink-workloadattestor"
    plugin_data { }
  }
`

func main() {
	// To SPIRE nothing goes to stdout: the first line there is the handshake with SPIRE.
	if len(os.Args) > 1 {
		if os.Args[1] == "--version" {
			fmt.Println("rootlink-workloadattestor version " + version.String())
			return
		}
		fmt.Fprint(os.Stderr, usage)
		if a := os.Args[1]; a != "-h" && a != "--help" && a != "help" {
			os.Exit(2)
		}
		return
	}
	orphan.DieWithParent()
	p := binary.New()
	pluginmain.Serve(
		workloadattestorv1.WorkloadAttestorPluginServer(p),
		configv1.ConfigServiceServer(p),
	)
}
