package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"os"
	"runtime/pprof"
	"time"

	"github.com/spiffe/spire-plugin-sdk/pluginsdk"
	workloadattestorv1 "github.com/spiffe/spire-plugin-sdk/proto/spire/plugin/agent/workloadattestor/v1"
	configv1 "github.com/spiffe/spire-plugin-sdk/proto/spire/service/common/config/v1"

	"github.com/rootlink/rootlink/internal/agent"
	"github.com/rootlink/rootlink/internal/catalog"
	"github.com/rootlink/rootlink/plugins/tpmnode/nodeagent"
	"github.com/rootlink/rootlink/plugins/tpmnode/wire"
	"github.com/rootlink/rootlink/plugins/workloadattestor/binary"
)

// agentMain is rootlink-agent with two things changed that it has no flags
// for: how long a quote takes, and how many leaves share one.
func agentMain(ctx context.Context, args []string) (err error) {
	fs := flag.NewFlagSet(roleAgent, flag.ContinueOnError)
	cfg := agent.Config{Log: slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelInfo}))}
	fs.StringVar(&cfg.TrustDomain, "trust-domain", "", "")
	fs.StringVar(&cfg.Server, "server", "", "")
	fs.StringVar(&cfg.Join, "join", "", "")
	fs.StringVar(&cfg.DataDir, "data-dir", "", "")
	fs.StringVar(&cfg.Socket, "socket", "", "")
	tpm := fs.String("tpm", "", "")
	_ = fs.String("recorder-group", "", "")
	latency := fs.Duration("latency", 0, "added to every quote")
	batch := fs.Int("batch", 0, "leaves in one quote, 0 for as many as fit")
	profile := fs.String("cpuprofile", "", "")
	if err := fs.Parse(args); err != nil {
		return err
	}
	stop, err := startProfile(*profile)
	if err != nil {
		return err
	}
	defer stop()
	cfg.Ready = func(id string) { fmt.Fprintf(os.Stderr, "bench: ready: %s, socket %s\n", id, cfg.Socket) }
	a, err := agent.New(cfg)
	if err != nil {
		return err
	}
	node := nodeagent.New(nodeagent.WithQuoteLatency(*latency), nodeagent.WithMaxBatch(*batch))
	plugin, services := node.Servers()
	p := &agent.Plugins{}
	nl, err := catalog.LoadBuiltIn(ctx, catalog.BuiltIn{Name: wire.PluginName, Plugin: plugin, Services: services}, catalog.Options{TrustDomain: cfg.TrustDomain, Log: cfg.Log})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, nl.Close()) }()
	// swtpm saw no boot of this machine, so it has none of this machine's logs.
	if err := nl.Configure(ctx, fmt.Sprintf("tpm_path = %q\ndata_dir = %q\nevent_log_path = %q\nima_log_path = %q\n", *tpm, cfg.DataDir, os.DevNull, os.DevNull)); err != nil {
		return err
	}
	if p.NodeAttestor, err = nl.AgentNodeAttestor(); err != nil {
		return err
	}
	q := new(wire.QuoterClient)
	if err := nl.Bind(q); err != nil {
		return err
	}
	p.Quoter = q
	impl := binary.New()
	wl, err := catalog.LoadBuiltIn(ctx, catalog.BuiltIn{
		Name: binary.Name, Plugin: workloadattestorv1.WorkloadAttestorPluginServer(impl),
		Services: []pluginsdk.ServiceServer{configv1.ConfigServiceServer(impl)},
	}, catalog.Options{TrustDomain: cfg.TrustDomain, Log: cfg.Log})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, wl.Close()) }()
	if err := wl.Configure(ctx, ""); err != nil {
		return err
	}
	if p.WorkloadAttestor, err = wl.WorkloadAttestor(); err != nil {
		return err
	}
	return a.Run(ctx, p)
}

// startProfile writes a CPU profile until stop; an empty path is none.
func startProfile(path string) (stop func(), err error) {
	if path == "" {
		return func() {}, nil
	}
	f, err := os.Create(path)
	if err != nil {
		return nil, err
	}
	if err := pprof.StartCPUProfile(f); err != nil {
		return nil, err
	}
	return func() {
		pprof.StopCPUProfile()
		f.Close()
	}, nil
}

// replaceAgent stops the present agent and starts a slow one on its TPM.
func (b *bench) replaceAgent(latency time.Duration, batch int, name string) error {
	b.agent.stop()
	args := append([]string{roleAgent}, b.agentFlags()...)
	args = append(args, "--latency", latency.String(), "--batch", fmt.Sprint(batch))
	if b.profile != "" {
		args = append(args, "--cpuprofile", b.profile+"/agent-"+name)
	}
	var err error
	if b.agent, err = b.launch("agent-"+name, b.self, args...); err != nil {
		return err
	}
	_, err = b.agent.ready()
	return err
}
