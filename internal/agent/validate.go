package agent

import (
	"context"
	"errors"
	"log/slog"

	"github.com/spiffe/spire-plugin-sdk/pluginsdk"
	workloadattestorv1 "github.com/spiffe/spire-plugin-sdk/proto/spire/plugin/agent/workloadattestor/v1"
	configv1 "github.com/spiffe/spire-plugin-sdk/proto/spire/service/common/config/v1"

	"github.com/rootlink/rootlink/internal/catalog"
	"github.com/rootlink/rootlink/plugins/tpmnode/nodeagent"
	"github.com/rootlink/rootlink/plugins/tpmnode/wire"
	"github.com/rootlink/rootlink/plugins/workloadattestor/binary"
)

// Validate has every plugin judge its configuration, and returns their notes. It
// opens no TPM and writes nothing. External plugins are run for it.
func (p *PluginConfig) Validate(ctx context.Context, log *slog.Logger) (notes []string, err error) {
	node, bin := nodeagent.New(), binary.New()
	nodePlugin, nodeServices := node.Servers()
	type one struct {
		catalog.Config
		hcl string
	}
	nodeBlock, binBlock := p.node, p.binary
	if nodeBlock.Name == "" {
		nodeBlock.Type, nodeBlock.Name = nodeAttestorType, wire.PluginName
	}
	binBlock.Type, binBlock.Name = workloadAttestorType, binary.Name
	hcl, err := p.data(nodeBlock)
	if err != nil {
		return nil, err
	}
	all := []one{
		{catalog.Config{
			Type: nodeBlock.Type, Name: nodeBlock.Name, Cmd: nodeBlock.Cmd, Args: nodeBlock.Args, Checksum: nodeBlock.Checksum, DataFile: nodeBlock.DataFile,
			BuiltIn: &catalog.BuiltIn{Plugin: nodePlugin, Services: nodeServices},
		}, hcl},
		{catalog.Config{
			Type: binBlock.Type, Name: binBlock.Name, Cmd: binBlock.Cmd, Args: binBlock.Args, Checksum: binBlock.Checksum, DataFile: binBlock.DataFile,
			BuiltIn: &catalog.BuiltIn{Plugin: workloadattestorv1.WorkloadAttestorPluginServer(bin), Services: []pluginsdk.ServiceServer{configv1.ConfigServiceServer(bin)}},
		}, binBlock.Data},
	}
	for _, b := range p.others {
		all = append(all, one{catalog.Config{Type: b.Type, Name: b.Name, Cmd: b.Cmd, Args: b.Args, Checksum: b.Checksum, DataFile: b.DataFile, BuiltIn: otherBuiltIn(b, bin)}, b.Data})
	}
	o := catalog.Options{TrustDomain: p.TrustDomain, Log: log, HostServices: []pluginsdk.ServiceServer{catalog.Metrics(nil)}}
	var errs []error
	for _, c := range all {
		more, err := catalog.Validate(ctx, c.Config, o, c.hcl)
		notes = append(notes, more...)
		errs = append(errs, hinted(err))
	}
	return notes, errors.Join(errs...)
}
