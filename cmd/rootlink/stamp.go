package main

import (
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/rootlink/rootlink/internal/cli"
	"github.com/rootlink/rootlink/internal/recorder"
	"github.com/rootlink/rootlink/pkg/link"
)

// stampFlags says whom to ask. Recorders hear from their agent whom the server
// names, and fall back on that; rootlink stamp has no agent.
func stampFlags(f *pflag.FlagSet, s *recorder.Stamping, hasAgent bool) {
	urls, url := "", ""
	if hasAgent {
		urls, url = "; default those that the server names", " (default the one that the server names)"
	}
	f.StringArrayVar(&s.TimestampURLs, "timestamp-url", nil, "`URL` of an RFC 3161 authority, or none (repeatable, all are asked"+urls+")")
	f.StringVar(&s.Needed, "timestamps-needed", "1", "how many of them must answer: a number, or all")
	f.StringVar(&s.LogURL, "log-url", "", "`URL` of a transparency log, or none"+url)
}

func stampCommand() *cobra.Command {
	var s recorder.StampFiles
	cmd := &cobra.Command{
		Use:   "stamp (--timestamp-url URL | --log-url URL | --check) BUNDLE...",
		Short: "Complete bundles with timestamps and log entries while their SVIDs are valid",
		Long: `Complete bundles with timestamps and log entries while their SVIDs are valid.

rootlink run does so itself; this is for what it could not obtain. Bundles are
replaced by rename, what they hold stays, and nothing is put in twice. Once the SVID has expired nothing can be added that would prove
anything, and the bundle must be made again.

No agent is needed: whom to ask is said by the flags.

Exit codes: 0 every bundle has what was asked for, 1 something could not be had
or a file could not be read or written, 2 usage, 4 an SVID has expired.`,
		Example: `  rootlink stamp --timestamp-url http://127.0.0.1:8082/tsa --log-url http://127.0.0.1:8082/log build.1a2b3c4d` + link.BundleSuffix,
		RunE: func(c *cobra.Command, args []string) error {
			s.Files, s.JSON, s.Stdout, s.Stderr = args, cli.WantsJSON(c), c.OutOrStdout(), c.ErrOrStderr()
			return s.Run()
		},
	}
	f := cmd.Flags()
	stampFlags(f, &s.Stamping, false)
	f.BoolVar(&s.Check, "check", false, "say what is there, ask nobody")
	f.DurationVar(&s.Timeout, "timeout", time.Minute, "how long to try")
	return cmd
}
