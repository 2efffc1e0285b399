package main

import (
	"context"
	"os"
	"os/signal"
	"slices"
	"syscall"

	"github.com/spf13/pflag"

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

// reread is what the command line, which wins, and file say now. later names
// what else differs from what the server was started with.
func (f *runFlags) reread(file *config.File) (next *runFlags, later []string, err error) {
	next = &runFlags{}
	fs := pflag.NewFlagSet("reread", pflag.ContinueOnError)
	next.add(fs)
	for name, flag := range f.running {
		if fs.Lookup(name) == nil { // of all commands
			fs.String(name, flag.def, "")
		}
		for _, v := range flag.given {
			if err := fs.Set(name, v); err != nil {
				return nil, nil, err
			}
		}
	}
	if file != nil {
		if err := applyFile(file, fs); err != nil {
			return nil, nil, err
		}
	}
	for name, flag := range f.running {
		if !slices.Contains(reloadable, name) && fs.Lookup(name).Value.String() != flag.value {
			later = append(later, name)
		}
	}
	slices.Sort(later)
	return next, later, nil
}

// reloadable are the flags that a signal has read again, without those of
// external plugins.
var reloadable = []string{"ek-roots", "ek-allow", "ek-deny"}

// runningFlag is how a flag was set when the server started.
type runningFlag struct {
	given      []string // on the command line
	def, value string
}

// remember notes what the command line says, before a file sets the rest.
func (f *runFlags) remember(fs *pflag.FlagSet) {
	f.running = map[string]runningFlag{}
	fs.VisitAll(func(flag *pflag.Flag) {
		r := runningFlag{def: flag.DefValue}
		if list, ok := flag.Value.(pflag.SliceValue); ok && flag.Changed {
			r.given = list.GetSlice()
		} else if flag.Changed {
			r.given = []string{flag.Value.String()}
		}
		f.running[flag.Name] = r
	})
}

// settle notes what is in force.
func (f *runFlags) settle(fs *pflag.FlagSet) {
	fs.VisitAll(func(flag *pflag.Flag) {
		r := f.running[flag.Name]
		r.value = flag.Value.String()
		f.running[flag.Name] = r
	})
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
		var file *config.File
		var err error
		if f.config != "" {
			file, err = config.Load(f.config, f.expandEnv)
		}
		var next *runFlags
		var later []string
		if err == nil {
			next, later, err = f.reread(file)
		}
		if err != nil {
			cfg.Log.Error("configuration file not taken; the plugins keep what they have", "error", err, "hint", cli.HintOf(err))
			continue
		}
		if len(later) > 0 {
			cfg.Log.Warn("these settings take effect when the server is started again", "settings", later)
		}
		s.ReloadEKTrust(ctx, server.EKTrust{Roots: next.ekRoots, Allow: next.ekAllow, Deny: next.ekDeny})
		if file != nil {
			s.ReloadPlugins(ctx, externalPlugins(file))
		}
	}
}

// catchReload keeps SIGUSR1 from its default effect, which is to end us.
func catchReload() (signals <-chan os.Signal, stop func()) {
	ch := make(chan os.Signal, 1)
	signal.Notify(ch, syscall.SIGUSR1)
	return ch, func() { signal.Stop(ch) }
}
