package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"github.com/rootlink/rootlink/internal/cli"
	"github.com/rootlink/rootlink/internal/server"
	"github.com/rootlink/rootlink/internal/stamp"
	"github.com/rootlink/rootlink/internal/trustdoc"
	"github.com/rootlink/rootlink/pkg/timestamp"
)

// healthTimeout is how long a healthy timestamp authority may take to answer.
const healthTimeout = 10 * time.Second

func tsaCommand(at *location) *cobra.Command {
	return cli.Group("tsa", "A timestamp authority alone, for those who run another server", tsaRun(at), tsaChain(at), tsaHealthcheck(at))
}

func tsaRun(at *location) *cobra.Command {
	var listen, name, level, format string
	c := &cobra.Command{
		Use: "run --data-dir DIR --http-listen ADDR", Short: "Run a timestamp authority (RFC 3161) in the foreground", Args: cobra.NoArgs,
		Long: `Run a timestamp authority (RFC 3161) in the foreground, and nothing else: it
answers at /tsa. The keys are made in the data directory, which no other server
may use. "tsa chain" prints what verifiers must know of it.`,
	}
	c.Flags().StringVar(&listen, "http-listen", server.DefaultHTTPListen, "TCP address; port 0 picks one")
	c.Flags().StringVar(&name, "name", "", "who runs it, for people who read its certificates; used when they are made (default the host name)")
	cli.LogFlags(c.Flags(), &level, &format)
	c.RunE = func(c *cobra.Command, _ []string) error {
		cfg := server.TSAConfig{Name: name, DataDir: at.dataDir, Listen: listen}
		if name == "" {
			var err error
			if cfg.Name, err = os.Hostname(); err != nil {
				return cli.Hint(err, "give --name")
			}
		}
		var err error
		if cfg.Log, _, err = cli.Logger(c.ErrOrStderr(), level, format); err != nil {
			return err
		}
		t, err := server.NewTSA(cfg)
		switch {
		case errors.Is(err, server.ErrInUse):
			return cli.Hint(err, "stop the other server, or give this one its own --data-dir")
		case errors.Is(err, syscall.EADDRINUSE):
			return cli.Hint(err, "another program listens there; choose another address with --http-listen, port 0 picks a free one")
		case err != nil:
			return explainStart(err, server.Config{DataDir: at.dataDir})
		}
		fmt.Fprintf(c.ErrOrStderr(), "%s: ready: timestamps at http://%s/tsa\n", program, t.Addr())
		return t.Run(c.Context())
	}
	return c
}

func tsaChain(at *location) *cobra.Command {
	return &cobra.Command{
		Use: "chain --data-dir DIR", Short: "Print the authority's certificates in PEM, root first, for verifiers", Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			text, err := readTSA(at.dataDir)
			if err != nil {
				return err
			}
			_, err = c.OutOrStdout().Write(text)
			return err
		},
	}
}

func readTSA(dir string) ([]byte, error) {
	text, err := server.ReadTSA(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, cli.Hint(fmt.Errorf("no timestamp authority in %s: %w", filepath.Clean(dir), err), "name its directory with --data-dir; `"+program+" tsa run` makes one")
	}
	return text, err
}

func tsaHealthcheck(at *location) *cobra.Command {
	var url string
	c := &cobra.Command{
		Use: "healthcheck --data-dir DIR [--url URL]", Short: "Exit with 0 if the authority makes a timestamp that its own certificates verify", Args: cobra.NoArgs,
	}
	c.Flags().StringVar(&url, "url", "http://"+server.DefaultHTTPListen+"/tsa", "where it answers")
	c.RunE = func(c *cobra.Command, _ []string) error {
		text, err := readTSA(at.dataDir)
		if err != nil {
			return err
		}
		chains, err := trustdoc.Chains(text)
		if err != nil {
			return err
		}
		var known trustdoc.Sources
		for _, chain := range chains {
			known.Timestamps = append(known.Timestamps, trustdoc.TSA{Chain: chain})
		}
		authorities, err := known.Authorities()
		if err != nil {
			return err
		}
		ctx, cancel := context.WithTimeout(c.Context(), healthTimeout)
		defer cancel()
		data := []byte("rootlink healthcheck")
		cl := stamp.NewClient()
		defer cl.Close()
		raw, at, err := cl.TimestampOf(ctx, url, data)
		if err != nil {
			return cli.Hint(err, "see whether `"+program+" tsa run` runs, and what its log says; --url names its address")
		}
		token, err := timestamp.Parse(raw)
		if err != nil {
			return err
		}
		if _, err := token.Verify(data, authorities); err != nil {
			return cli.Hint(fmt.Errorf("%s: its timestamp is not good by the certificates in this directory: %w", url, err), "another authority answers there, or its clock is wrong")
		}
		if d := time.Since(at).Abs(); d > time.Minute {
			return cli.Hint(fmt.Errorf("its clock and this one are %v apart", d.Round(time.Second)), "set the clock of the machine that runs it")
		}
		return emit(c, map[string]string{"status": "serving", "time": at.UTC().Format(time.RFC3339)}, func(w io.Writer) error {
			_, err := fmt.Fprintln(w, "serving")
			return err
		})
	}
	return c
}
