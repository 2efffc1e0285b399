package agent

import (
	"context"
	"errors"
	"log/slog"

	"github.com/spiffe/spire-plugin-sdk/pluginsdk"
	nodeattestorv1 "github.com/spiffe/spire-plugin-sdk/proto/spire/plugin/agent/nodeattestor/v1"
	workloadattestorv1 "github.com/spiffe/spire-plugin-sdk/proto/spire/plugin/agent/workloadattestor/v1"
	configv1 "github.com/spiffe/spire-plugin-sdk/proto/spire/service/common/config/v1"

	"github.com/rootlink/rootlink/internal/agent/identity"
	"github.com/rootlink/rootlink/internal/catalog"
	"github.com/rootlink/rootlink/plugins/workloadattestor/binary"
)

// Plugins are what the agent reaches the TPM and the workloads through.
type Plugins struct {
	NodeAttestor     nodeattestorv1.NodeAttestorClient
	Quoter           identity.Quoter
	WorkloadAttestor workloadattestorv1.WorkloadAttestorClient

	loaded []*catalog.Plugin
}

// Close ends them.
func (p *Plugins) Close() error {
	var errs []error
	for _, l := range p.loaded {
		errs = append(errs, l.Close())
	}
	return errors.Join(errs...)
}

// loadWorkloadAttestor loads the built-in attestor with plugin data in HCL.
func (p *Plugins) loadWorkloadAttestor(ctx context.Context, trustDomain, hcl string, log *slog.Logger) error {
	impl := binary.New()
	l, err := catalog.LoadBuiltIn(ctx, catalog.BuiltIn{
		Name:     binary.Name,
		Plugin:   workloadattestorv1.WorkloadAttestorPluginServer(impl),
		Services: []pluginsdk.ServiceServer{configv1.ConfigServiceServer(impl)},
	}, catalog.Options{TrustDomain: trustDomain, Log: log})
	if err != nil {
		return err
	}
	p.loaded = append(p.loaded, l)
	if err := l.Configure(ctx, hcl); err != nil {
		return err
	}
	p.WorkloadAttestor, err = l.WorkloadAttestor()
	return err
}
