package agent

import (
	"context"
	"errors"
	"log/slog"

	"github.com/spiffe/spire-plugin-sdk/pluginsdk"
	nodeattestorv1 "github.com/spiffe/spire-plugin-sdk/proto/spire/plugin/agent/nodeattestor/v1"
	workloadattestorv1 "github.com/spiffe/spire-plugin-sdk/proto/spire/plugin/agent/workloadattestor/v1"
	configv1 "github.com/spiffe/spire-plugin-sdk/proto/spire/service/common/config/v1"

	"google.golang.org/grpc/codes"

	"github.com/rootlink/rootlink/internal/agent/identity"
	"github.com/rootlink/rootlink/internal/catalog"
	"github.com/rootlink/rootlink/internal/cli"
	"github.com/rootlink/rootlink/internal/tpm"
	"github.com/rootlink/rootlink/plugins/tpmnode/nodeagent"
	"github.com/rootlink/rootlink/plugins/tpmnode/wire"
	"github.com/rootlink/rootlink/plugins/workloadattestor/binary"
)

// Plugins are what the agent reaches the TPM and the workloads through.
type Plugins struct {
	NodeAttestor     nodeattestorv1.NodeAttestorClient
	Quoter           identity.Quoter
	WorkloadAttestor workloadattestorv1.WorkloadAttestorClient

	loaded []*catalog.Plugin
}

// LoadPlugins loads and configures the built-in plugins.
func LoadPlugins(ctx context.Context, c PluginConfig, log *slog.Logger) (_ *Plugins, err error) {
	p := &Plugins{}
	defer func() {
		if err != nil {
			p.Close()
		}
	}()
	data, err := c.nodeAttestor()
	if err != nil {
		return nil, err
	}
	// The workload attestor first: that we lack a capability should not wait
	// for a slow TPM.
	if err := p.loadWorkloadAttestor(ctx, c.TrustDomain, c.workloadData, log); err != nil {
		return nil, hinted(err)
	}
	if err := p.loadNodeAttestor(ctx, c, data, log); err != nil {
		return nil, hinted(err)
	}
	return p, nil
}

// hinted gives a plugin's refusal of its configuration an exit code and its hint.
func hinted(err error) error {
	if e, ok := errors.AsType[*catalog.ConfigureError](err); ok {
		code := cli.ExitInternal
		if e.Code == codes.InvalidArgument {
			code = cli.ExitUsage
		}
		return cli.Fail(code, err, e.Hint)
	}
	return err
}

// Close ends them.
func (p *Plugins) Close() error {
	var errs []error
	for _, l := range p.loaded {
		errs = append(errs, l.Close())
	}
	return errors.Join(errs...)
}

func (p *Plugins) load(ctx context.Context, b catalog.BuiltIn, trustDomain, hcl string, log *slog.Logger) (*catalog.Plugin, error) {
	l, err := catalog.LoadBuiltIn(ctx, b, catalog.Options{TrustDomain: trustDomain, Log: log})
	if err != nil {
		return nil, err
	}
	p.loaded = append(p.loaded, l)
	return l, l.Configure(ctx, hcl)
}

func (p *Plugins) loadWorkloadAttestor(ctx context.Context, trustDomain, hcl string, log *slog.Logger) error {
	impl := binary.New()
	l, err := p.load(ctx, catalog.BuiltIn{
		Name:     binary.Name,
		Plugin:   workloadattestorv1.WorkloadAttestorPluginServer(impl),
		Services: []pluginsdk.ServiceServer{configv1.ConfigServiceServer(impl)},
	}, trustDomain, hcl, log)
	if err == nil {
		p.WorkloadAttestor, err = l.WorkloadAttestor()
	}
	return err
}

func (p *Plugins) loadNodeAttestor(ctx context.Context, c PluginConfig, hcl string, log *slog.Logger) error {
	impl := nodeagent.New(c.nodeOptions...)
	l, err := p.load(ctx, catalog.BuiltIn{
		Name:     wire.PluginName,
		Plugin:   nodeattestorv1.NodeAttestorPluginServer(impl),
		Services: []pluginsdk.ServiceServer{configv1.ConfigServiceServer(impl), wire.QuoterService(impl)},
	}, c.TrustDomain, hcl, log)
	if err != nil {
		return err
	}
	if p.NodeAttestor, err = l.AgentNodeAttestor(); err != nil {
		return err
	}
	q := new(wire.QuoterClient)
	if err := l.Bind(q); err != nil {
		return err
	}
	p.Quoter = q
	return nil
}

// RunWith loads the plugins and runs the agent.
func (a *Agent) RunWith(ctx context.Context, c PluginConfig) error {
	// First, so that a second agent is told so and not that its TPM is busy.
	unlock, err := lockDataDir(a.cfg.DataDir)
	if err != nil {
		return err
	}
	defer unlock()
	plugins, err := LoadPlugins(ctx, c, a.cfg.Log)
	if err != nil {
		return err
	}
	// The logs that the node attestor names are shipped beside links.
	if a.cfg.EventLog = c.log(c.EventLog); a.cfg.EventLog == "" {
		a.cfg.EventLog = tpm.DefaultEventLogPath
	}
	if a.cfg.IMALog = c.log(c.IMALog); a.cfg.IMALog == "" {
		a.cfg.IMALog = tpm.DefaultIMALogPath
	}
	return errors.Join(a.Run(ctx, plugins), plugins.Close())
}
