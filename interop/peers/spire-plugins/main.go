// Command spire-plugins serves plugins out of SPIRE's own tree as external ones,
// which SPIRE itself only has built in. Its code is SPIRE's but for this file: a
// plugin that rootlink's authors did not write, for rootlink to load.
package main

import (
	"fmt"
	"os"

	"github.com/spiffe/spire-plugin-sdk/pluginmain"
	agentx509pop "github.com/spiffe/spire/pkg/agent/plugin/nodeattestor/x509pop"
	"github.com/spiffe/spire/pkg/agent/plugin/workloadattestor/unix"
	"github.com/spiffe/spire/pkg/common/catalog"
	serverx509pop "github.com/spiffe/spire/pkg/server/plugin/nodeattestor/x509pop"
)

func main() {
	plugins := map[string]func() catalog.BuiltIn{
		"agent-x509pop":  agentx509pop.BuiltIn,
		"server-x509pop": serverx509pop.BuiltIn,
		"unix":           unix.BuiltIn,
	}
	if len(os.Args) != 2 || plugins[os.Args[1]] == nil {
		fmt.Fprintln(os.Stderr, "usage: spire-plugins agent-x509pop|server-x509pop|unix")
		os.Exit(2)
	}
	b := plugins[os.Args[1]]()
	pluginmain.Serve(b.Plugin, b.Services...)
}
