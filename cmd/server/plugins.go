package main

import (
	"context"
	"os"
	"os/signal"
	"syscall"

	"github.com/rootlink/rootlink/internal/catalog"
	"github.com/rootlink/rootlink/internal/cli"
	"github.com/rootlink/rootlink/internal/config"
	"github.com/rootlink/rootlink/internal/server"
)

// externalPlugins returns the blocks of a file that name programs.
func externalPlugins(f *config.File) []catalog.Config {
	var out []catalog.Config
	for _, p := range f.Plugins() {
		if p.Enabled && p.Cmd != "" {
			out = append(out, catalog.Config{Type: p.Type, Name: p.Name, Cmd: p.Cmd, Args: p.Args, Checksum: p.Checksum, Data: p.Data, DataFile: p.DataFile})
		}
	}
	return out
}

// reloadOnSignal reads the configuration file again at each SIGUSR1 of signals
// until ctx ends, and gives plugins their data of it.
func (f *runFlags) reloadOnSignal(ctx context.Context, signals <-chan os.Signal, s *server.Server, cfg server.Config) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-signals:
		}
		if f.config == "" {
			cfg.Log.Warn("asked to read the configuration file again, and there is none")
			continue
		}
		file, err := config.Load(f.config, f.expandEnv)
		if err != nil {
			cfg.Log.Error("configuration file not taken; the plugins keep what they have", "error", err, "hint", cli.HintOf(err))
			continue
		}
		s.ReloadPlugins(ctx, externalPlugins(file))
	}
}

// catchReload keeps SIGUSR1 from its default effect, which is to end us.
func catchReload() (signals <-chan os.Signal, stop func()) {
	ch := make(chan os.Signal, 1)
	signal.Notify(ch, syscall.SIGUSR1)
	return ch, func() { signal.Stop(ch) }
}
