// Package agent is rootlink-agent: it attests the machine by its TPM and gives
// the workloads on it their identities.
package agent

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/rootlink/rootlink/internal/agent/endpoint"
	"github.com/rootlink/rootlink/internal/agent/identity"
	"github.com/rootlink/rootlink/internal/agent/upstream"
	"github.com/rootlink/rootlink/internal/cli"
	"github.com/rootlink/rootlink/internal/files"
	"github.com/rootlink/rootlink/internal/join"
	"github.com/rootlink/rootlink/internal/measured"
	"github.com/rootlink/rootlink/internal/vouch"
)

// Config says how to run an agent. It is checked by New.
type Config struct {
	TrustDomain  string
	Server       string // host:port
	TrustBundle  string // PEM file; or
	Join         string // join line; exactly one of the two
	DataDir      string
	Socket       string
	SyncInterval time.Duration
	RecorderGID  uint32 // 0: none, no recorder is protected
	EventLog     string // path of the boot event log, shipped beside links; may be empty
	IMALog       string
	Log          *slog.Logger

	// Ready is called once, when the first workload could be served.
	Ready func(agentID string)
}

// Agent is a checked configuration.
type Agent struct {
	cfg    Config
	td     spiffeid.TrustDomain
	source upstream.Source
}

// New checks cfg.
func New(cfg Config) (*Agent, error) {
	a := &Agent{cfg: cfg}
	var err error
	if a.td, err = spiffeid.TrustDomainFromString(cfg.TrustDomain); err != nil || a.td.Name() != cfg.TrustDomain {
		return nil, cli.Usage("a trust domain is a name such as example.org", "trust domain %q is not valid", cfg.TrustDomain)
	}
	switch {
	case cfg.Server == "":
		return nil, cli.Usage("name the server as HOST:PORT with --server", "no server is given")
	case cfg.DataDir == "":
		return nil, cli.Usage("name a directory that only the agent's user can open with --data-dir", "no data directory is given")
	case cfg.Socket == "":
		return nil, cli.Usage("name the Workload API socket with --socket", "no socket is given")
	case cfg.Log == nil:
		return nil, errors.New("agent: no logger")
	case cfg.SyncInterval < 0:
		return nil, cli.Usage("", "the sync interval is negative")
	case (cfg.TrustBundle == "") == (cfg.Join == ""):
		return nil, cli.Usage("`rootlink-server bundle show` prints a bundle for --trust-bundle, `rootlink-server join-line` a line for --join",
			"give exactly one of a trust bundle and a join line")
	case cfg.TrustBundle != "":
		a.source = upstream.PEMFile(cfg.TrustBundle)
		// Now, not at the first rotation.
		if _, err := a.source.Authorities(context.Background()); err != nil {
			return nil, cli.Hint(err, "`rootlink-server bundle show --format pem` prints it")
		}
	default:
		line, err := join.Parse(cfg.Join)
		if err != nil {
			return nil, cli.Usage("copy the whole line that `rootlink-server join-line` prints", "%v", err)
		}
		if line.TrustDomain != a.td {
			return nil, cli.Usage("copy the line of this trust domain's server, or correct --trust-domain", "the join line is for trust domain %q, this agent is for %q", line.TrustDomain, a.td)
		}
		a.source = &upstream.Join{Line: line, Server: cfg.Server, Now: time.Now}
	}
	return a, nil
}

// parts are an agent's inside, wired together and not yet running.
type parts struct {
	node   *upstream.Node
	keeper *identity.Keeper
	issuer *identity.Issuer
	server *endpoint.Server
}

func (a *Agent) assemble(plugins *Plugins) (*parts, error) {
	trust, err := upstream.NewTrust(a.td, a.cfg.DataDir, a.source)
	if err != nil {
		return nil, err
	}
	var p parts
	p.node, err = upstream.New(upstream.Config{
		TrustDomain: a.td, Server: a.cfg.Server, Trust: trust,
		NodeAttestor: plugins.NodeAttestor, AttestationType: plugins.AttestationType, Log: a.cfg.Log,
	})
	if err != nil {
		return nil, err
	}
	p.keeper = identity.NewKeeper(p.node, trust, a.td, a.cfg.SyncInterval, a.cfg.Log)
	p.issuer = identity.NewIssuer(p.keeper, p.node, trust, plugins.Quoter, a.cfg.Log)
	p.server, err = endpoint.New(endpoint.Config{
		Keeper: p.keeper, Issuer: p.issuer, Attestor: plugins.Measure(), Health: plugins.Health,
		RecorderGID: a.cfg.RecorderGID, Logs: vouch.LogFiles(a.cfg.EventLog, a.cfg.IMALog), Log: a.cfg.Log,
	})
	return &p, err
}

// Run runs until ctx ends or something final happens. RunWith is Run with the
// built-in plugins.
func (a *Agent) Run(ctx context.Context, plugins *Plugins) error {
	p, err := a.assemble(plugins)
	if err != nil {
		return err
	}
	// The socket first: that it cannot be had should not wait for a server.
	l, err := measured.Listen(a.cfg.Socket, "--socket")
	if err != nil {
		return err
	}
	defer l.Close()

	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	errs := make(chan error, 2)
	var wg sync.WaitGroup
	wg.Go(func() { errs <- p.node.Run(ctx) })
	wg.Go(func() { errs <- p.server.Serve(ctx, l) })
	wg.Go(func() { p.keeper.Run(ctx) })
	wg.Go(func() { p.issuer.Run(ctx) })
	wg.Go(func() { a.announce(ctx, p.keeper) })
	err = <-errs
	banned := errors.Is(err, upstream.ErrBanned)
	if banned {
		p.server.End(upstream.BannedStatus())
	}
	cancel()
	wg.Wait()
	if banned {
		return &cli.Error{Code: cli.ExitPolicy, Err: err, Hint: upstream.BannedHint}
	}
	if errors.Is(err, upstream.ErrWrongServer) {
		return &cli.Error{Code: cli.ExitCrypto, Err: err, Hint: upstream.WrongServerHint}
	}
	return err
}

// announce calls Ready after the first sync.
func (a *Agent) announce(ctx context.Context, k *identity.Keeper) {
	for {
		changed := k.Changed()
		if v, err := k.View(); err == nil {
			a.cfg.Log.Info("ready", "agent_id", v.AgentID.String(), "entries", len(v.Entries), "socket", a.cfg.Socket)
			if a.cfg.Ready != nil {
				a.cfg.Ready(v.AgentID.String())
			}
			return
		}
		select {
		case <-ctx.Done():
			return
		case <-changed:
		}
	}
}

// lockDataDir makes the data directory private and keeps a second agent out of
// it: the two would replace each other's SVID at the server for ever.
func lockDataDir(dir string) (unlock func(), err error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		err = fmt.Errorf("data directory: %w", err)
		if errors.Is(err, fs.ErrPermission) {
			err = cli.Hint(err, "the agent needs a data directory of its own: name one with --data-dir, or run it as root")
		}
		return nil, err
	}
	st, err := os.Stat(dir)
	if err != nil {
		return nil, fmt.Errorf("data directory: %w", err)
	}
	if owner := st.Sys().(*syscall.Stat_t).Uid; int(owner) != os.Geteuid() {
		return nil, cli.Hint(fmt.Errorf("data directory %s belongs to uid %d, who could replace the saved trust bundle and use the attestation key", dir, owner),
			"run the agent as that user, or name a directory of its own with --data-dir")
	}
	if st.Mode().Perm()&0o022 != 0 {
		return nil, cli.Hint(fmt.Errorf("data directory %s is writable for others, who could replace the saved trust bundle", dir), "chmod 0700 "+dir)
	}
	f, err := files.Lock(filepath.Join(dir, "agent.lock"))
	if errors.Is(err, files.ErrLocked) {
		return nil, cli.Hint(fmt.Errorf("data directory %s is in use by another agent", dir), "stop the other agent, or give this one another --data-dir and TPM")
	}
	if err != nil {
		return nil, fmt.Errorf("data directory: %w", err)
	}
	return func() { f.Close() }, nil // closing releases the lock
}
