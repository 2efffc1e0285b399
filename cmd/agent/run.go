package main

import (
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/rootlink/rootlink/internal/agent"
	"github.com/rootlink/rootlink/internal/agent/identity"
	"github.com/rootlink/rootlink/internal/cli"
	"github.com/rootlink/rootlink/internal/config"
	"github.com/rootlink/rootlink/internal/healthhttp"
	"github.com/rootlink/rootlink/internal/measured"
)

type runFlags struct {
	cfg    agent.Config
	plug   agent.PluginConfig
	group  string
	level  string
	format string
	config string
	expand bool
	health healthhttp.Flags
}

func runCommand() *cobra.Command {
	var f runFlags
	c := &cobra.Command{
		Use: "run", Short: "Attest this machine and serve its workloads", Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			a, err := f.agent(c)
			if err != nil {
				return err
			}
			probes, err := f.health.Start(f.cfg.Socket, f.cfg.Log)
			if err != nil {
				return err
			}
			defer probes()
			return a.RunWith(c.Context(), f.plug)
		},
	}
	f.add(c.Flags())
	return c
}

// validateCommand takes the flags of run, so that whatever starts the agent can
// be tried by exchanging one word.
func validateCommand() *cobra.Command {
	var f runFlags
	c := &cobra.Command{
		Use: "validate", Short: "Judge flags, configuration file and plugin_data as run would, and start nothing", Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			if _, err := f.agent(c); err != nil {
				return err
			}
			notes, err := f.plug.Validate(c.Context(), f.cfg.Log)
			return cli.Validated(c, notes, err)
		},
	}
	f.add(c.Flags())
	return c
}

func (f *runFlags) add(fl *pflag.FlagSet) {
	fl.StringVar(&f.cfg.TrustDomain, "trust-domain", "", "trust domain, such as example.org (required)")
	fl.StringVar(&f.cfg.Server, "server", defaultServer, "server as HOST:PORT")
	fl.StringVar(&f.cfg.TrustBundle, "trust-bundle", "", "PEM file of the trust domain's X.509 authorities")
	fl.StringVar(&f.cfg.Join, "join", "", "join line, as rootlink-server join-line prints it; instead of a bundle")
	fl.StringVar(&f.cfg.DataDir, "data-dir", defaultDataDir, "directory of the attestation key and the saved bundle")
	fl.StringVar(&f.cfg.Socket, "socket", defaultSocket, "socket that workloads talk to")
	fl.StringVar(&f.plug.TPM, "tpm", defaultTPM, "TPM: /dev/tpmrm0, unix:PATH or tcp:HOST:PORT")
	fl.BoolVar(&f.plug.AllowShared, "allow-shared-tpm", false, "accept a TPM that other users of this host can open, although each can then act as this machine")
	fl.StringVar(&f.plug.EventLog, "event-log", "", "boot event log of the TPM (default: the kernel's, for a TPM of this machine)")
	fl.StringVar(&f.plug.IMALog, "ima-log", "", "IMA log (default: the kernel's, for a TPM of this machine)")
	fl.DurationVar(&f.cfg.SyncInterval, "sync-interval", identity.DefaultSyncInterval, "time between looks at the server's entries when no unknown workload asks")
	fl.StringVar(&f.group, "recorder-group", "", `group NAME or GID that rootlink is installed setgid to, "none" for none (default: "`+measured.DefaultRecorderGroup+`" where it exists)`)
	cli.LogFlags(fl, &f.level, &f.format)
	cli.ConfigFlags(fl, &f.config, &f.expand)
	f.health.Add(fl)
}

// agent is the agent that the flags and the file describe.
func (f *runFlags) agent(c *cobra.Command) (_ *agent.Agent, err error) {
	var plugins []config.Plugin
	if f.config != "" {
		file, err := config.Load(f.config, f.expand)
		if err != nil {
			return nil, err
		}
		if err := file.Apply("agent", c.Flags()); err != nil {
			return nil, err
		}
		plugins = file.Plugins()
	}
	stderr := c.ErrOrStderr()
	log, _, err := cli.Logger(stderr, f.level, f.format)
	if err != nil {
		return nil, err
	}
	if f.cfg.RecorderGID, err = measured.RecorderGroup(f.group, log); err != nil {
		return nil, err
	}
	if strings.HasPrefix(f.cfg.Socket, "tcp:") {
		return nil, cli.Usage("name a path, such as "+defaultSocket, "--socket %s: %w", f.cfg.Socket, cli.ErrEndpointTCP)
	}
	for _, p := range []*string{&f.cfg.DataDir, &f.cfg.Socket} {
		if *p, err = absolute(*p); err != nil {
			return nil, err
		}
	}
	// The kernel's own may be missing; one that was named is a claim that
	// verifiers are meant to see, and must not go away unnoticed.
	for _, p := range []string{f.plug.EventLog, f.plug.IMALog} {
		if p == "" {
			continue
		}
		file, err := os.Open(p)
		if err != nil {
			return nil, cli.Hint(err, "correct the path, or leave the flag out for the kernel's own log")
		}
		file.Close()
	}
	if err := f.health.Check(); err != nil {
		return nil, err
	}
	f.cfg.Log = log
	f.cfg.Ready = func(id string) { ready(stderr, id, f.cfg.Socket) }
	a, err := agent.New(f.cfg)
	if err != nil {
		return nil, err
	}
	f.plug.TrustDomain, f.plug.DataDir = f.cfg.TrustDomain, f.cfg.DataDir
	if err := f.plug.Override(plugins); err != nil {
		return nil, err
	}
	if f.config != "" {
		f.plug.Reread = func() ([]config.Plugin, error) {
			file, err := config.Load(f.config, f.expand)
			if err != nil {
				return nil, err
			}
			return file.Plugins(), nil
		}
	}
	return a, nil
}

// absolute keeps an empty path empty, which New refuses with a hint.
func absolute(path string) (string, error) {
	if path == "" {
		return "", nil
	}
	return filepath.Abs(path)
}

// ready is the line that whoever started us waits for.
func ready(w io.Writer, agentID, socket string) {
	fmt.Fprintf(w, "%s: ready: %s, socket %s\n", program, agentID, socket)
}

// clientTimeout bounds the commands that talk to a running agent.
const clientTimeout = 30 * time.Second
