package agent

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"os/signal"
	"sync"
	"syscall"

	"github.com/spiffe/spire-plugin-sdk/pluginsdk"
	nodeattestorv1 "github.com/spiffe/spire-plugin-sdk/proto/spire/plugin/agent/nodeattestor/v1"
	workloadattestorv1 "github.com/spiffe/spire-plugin-sdk/proto/spire/plugin/agent/workloadattestor/v1"
	configv1 "github.com/spiffe/spire-plugin-sdk/proto/spire/service/common/config/v1"

	"google.golang.org/grpc/codes"

	"github.com/rootlink/rootlink/internal/catalog"
	"github.com/rootlink/rootlink/internal/cli"
	"github.com/rootlink/rootlink/internal/config"
	"github.com/rootlink/rootlink/internal/tpm"
	"github.com/rootlink/rootlink/internal/vouch"
	"github.com/rootlink/rootlink/plugins/tpmnode/nodeagent"
	"github.com/rootlink/rootlink/plugins/tpmnode/wire"
	"github.com/rootlink/rootlink/plugins/workloadattestor/binary"
	"github.com/rootlink/rootlink/plugins/workloadattestor/unix"
)

// Plugins are what the agent reaches the TPM and the workloads through.
type Plugins struct {
	NodeAttestor    nodeattestorv1.NodeAttestorClient
	AttestationType string       // the node attestor's name
	Quoter          vouch.Quoter // nil when the node attestor serves none
	// WorkloadAttestor is "binary", which measures the executable.
	WorkloadAttestor workloadattestorv1.WorkloadAttestorClient

	others []namedAttestor
	loaded []loadedPlugin
}

// loadedPlugin is a plugin with the block that it came from.
type loadedPlugin struct {
	*catalog.Plugin
	block config.Plugin // zero for a built-in one that no block names
}

// LoadPlugins loads and configures the plugins.
func LoadPlugins(ctx context.Context, c PluginConfig, log *slog.Logger) (_ *Plugins, err error) {
	p := &Plugins{}
	defer func() {
		if err != nil {
			p.Close()
		}
	}()
	// The workload attestor first: that we lack a capability should not wait
	// for a slow TPM.
	bin := binary.New()
	if err := p.loadWorkloadAttestor(ctx, c.TrustDomain, c.binary, bin, log); err != nil {
		return nil, hinted(err)
	}
	for _, b := range c.others {
		l, err := p.load(ctx, b, otherBuiltIn(b, bin), b.Data, c.TrustDomain, log)
		if err != nil {
			return nil, hinted(err)
		}
		client, err := l.WorkloadAttestor()
		if err != nil {
			return nil, err
		}
		p.others = append(p.others, namedAttestor{b.Name, client})
	}
	if err := p.loadNodeAttestor(ctx, c, log); err != nil {
		return nil, hinted(err)
	}
	return p, nil
}

// hinted gives what is wrong with a plugin an exit code and its hint.
func hinted(err error) error {
	if e, ok := errors.AsType[*catalog.ConfigureError](err); ok {
		code := cli.ExitInternal
		if e.Code == codes.InvalidArgument {
			code = cli.ExitUsage
		}
		return cli.Fail(code, err, e.Hint)
	}
	if hint := catalog.Hint(err); hint != "" {
		return cli.Fail(cli.ExitInternal, err, hint)
	}
	return err
}

// Close ends them.
func (p *Plugins) Close() error {
	errs := make([]error, len(p.loaded))
	var wg sync.WaitGroup
	for i, l := range p.loaded {
		wg.Go(func() { errs[i] = l.Close() })
	}
	wg.Wait()
	return errors.Join(errs...)
}

// Health says whether every plugin runs.
func (p *Plugins) Health() error {
	var errs []error
	for _, l := range p.loaded {
		errs = append(errs, l.Health())
	}
	return errors.Join(errs...)
}

// load starts the plugin of a block, external if the block names a program and
// b otherwise.
func (p *Plugins) load(ctx context.Context, block config.Plugin, b *catalog.BuiltIn, hcl, trustDomain string, log *slog.Logger) (*catalog.Plugin, error) {
	l, err := catalog.Load(ctx, catalog.Config{
		Type: block.Type, Name: block.Name, Cmd: block.Cmd, Args: block.Args, Checksum: block.Checksum,
		Env:  []string{wire.HostVariable + "=" + wire.HostAgent},
		Data: hcl, DataFile: block.DataFile, BuiltIn: b,
	}, catalog.Options{TrustDomain: trustDomain, Log: log, HostServices: []pluginsdk.ServiceServer{catalog.Metrics(nil)}})
	if err != nil {
		return nil, err
	}
	p.loaded = append(p.loaded, loadedPlugin{l, block})
	return l, nil
}

func (p *Plugins) loadWorkloadAttestor(ctx context.Context, trustDomain string, block config.Plugin, impl *binary.Plugin, log *slog.Logger) error {
	block.Type, block.Name = workloadAttestorType, binary.Name
	l, err := p.load(ctx, block, &catalog.BuiltIn{
		Plugin:   workloadattestorv1.WorkloadAttestorPluginServer(impl),
		Services: []pluginsdk.ServiceServer{configv1.ConfigServiceServer(impl)},
	}, block.Data, trustDomain, log)
	if err == nil {
		p.WorkloadAttestor, err = l.WorkloadAttestor()
	}
	return err
}

// otherBuiltIn is the implementation that a block without a program means; nil
// when there is none. It measures as bin does, and shares its cache.
func otherBuiltIn(b config.Plugin, bin *binary.Plugin) *catalog.BuiltIn {
	if !isUnix(b) {
		return nil
	}
	impl := unix.New(bin.Measurer)
	return &catalog.BuiltIn{
		Plugin:   workloadattestorv1.WorkloadAttestorPluginServer(impl),
		Services: []pluginsdk.ServiceServer{configv1.ConfigServiceServer(impl)},
	}
}

func (p *Plugins) loadNodeAttestor(ctx context.Context, c PluginConfig, log *slog.Logger) error {
	block := c.node
	if block.Name == "" {
		block.Type, block.Name = nodeAttestorType, wire.PluginName
	}
	hcl, err := c.data(block)
	if err != nil {
		return err
	}
	impl := nodeagent.New(c.nodeOptions...)
	plugin, services := impl.Servers()
	l, err := p.load(ctx, block, &catalog.BuiltIn{Plugin: plugin, Services: services}, hcl, c.TrustDomain, log)
	if err != nil {
		return err
	}
	p.AttestationType = block.Name
	if p.NodeAttestor, err = l.AgentNodeAttestor(); err != nil {
		return err
	}
	q := new(wire.QuoterClient)
	switch err := l.Bind(q); {
	case err == nil:
		p.Quoter = q
	case errors.Is(err, catalog.ErrNoService):
		log.Warn("this node attestor gives no quotes: no SVID here carries evidence, and `rootlink run` cannot sign with any",
			"plugin", block.Name, "hint", "the built-in tpmnode does, and rootlink-tpmnode of this version as an external plugin")
	default:
		return err
	}
	return nil
}

// reload gives each plugin its data of the file as it is now, where it changed.
// What is wrong is logged: the plugin keeps what it has.
func (p *Plugins) reload(ctx context.Context, c PluginConfig, log *slog.Logger) {
	if c.Reread == nil {
		log.Warn("asked to read the configuration file again, and there is none")
		return
	}
	blocks, err := c.Reread()
	next := PluginConfig{
		TrustDomain: c.TrustDomain, DataDir: c.DataDir, TPM: c.TPM, AllowShared: c.AllowShared, EventLog: c.EventLog, IMALog: c.IMALog,
	}
	if err == nil {
		err = next.Override(blocks)
	}
	if err != nil {
		log.Error("configuration file not taken; the plugins keep what they have", "error", err, "hint", cli.HintOf(err))
		return
	}
	if next.programs() != c.programs() {
		log.Warn("plugins came, went or run another program in the configuration file: that takes effect when the agent is started again")
	}
	for i := range p.loaded {
		l := &p.loaded[i]
		block, ok := next.block(l.Type(), l.Name())
		if !ok || block.SameData(l.block) {
			continue
		}
		hcl, err := next.data(block)
		if err == nil {
			err = l.ConfigureFrom(ctx, hcl, block.DataFile)
		}
		if err != nil {
			log.Error("new plugin_data not taken; the plugin keeps what it has", "plugin", l.Name(), "error", err, "hint", catalog.Hint(err))
			continue
		}
		l.block.Data = block.Data
		log.Info("new plugin_data taken", "plugin", l.Name())
	}
}

// RunWith loads the plugins and runs the agent.
func (a *Agent) RunWith(ctx context.Context, c PluginConfig) error {
	// First, so that a second agent is told so and not that its TPM is busy.
	unlock, err := lockDataDir(a.cfg.DataDir)
	if err != nil {
		return err
	}
	defer unlock()
	// From here on, so that it never has its default effect, which is to end us.
	again := make(chan os.Signal, 1)
	signal.Notify(again, syscall.SIGUSR1)
	defer signal.Stop(again)
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
	rctx, stop := context.WithCancel(ctx)
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			select {
			case <-again:
				plugins.reload(rctx, c, a.cfg.Log)
			case <-rctx.Done():
				return
			}
		}
	})
	err = a.Run(ctx, plugins)
	stop()
	wg.Wait()
	return errors.Join(err, plugins.Close())
}
