package main

import (
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/rootlink/rootlink/internal/cli"
	"github.com/rootlink/rootlink/internal/recorder"
	"github.com/rootlink/rootlink/pkg/link"
)

func stampFlags(f *pflag.FlagSet, s *recorder.Stamping) {
	f.StringArrayVar(&s.TimestampURLs, "timestamp-url", nil, "RFC 3161 authority, in place of those the server names (repeatable, all are asked), or none")
	f.StringVar(&s.Needed, "timestamps-needed", "1", "how many of them must answer: a number, or all")
	f.StringVar(&s.LogURL, "log-url", "", "transparency log, in place of the one the server names, or none")
}

// alone: these flags of a command that no server names anything to.
func alone(f *pflag.FlagSet) {
	f.Lookup("timestamp-url").Usage = "RFC 3161 authority (repeatable, all are asked)"
	f.Lookup("log-url").Usage = "transparency log"
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
	stampFlags(f, &s.Stamping)
	alone(f)
	f.BoolVar(&s.Check, "check", false, "say what is there, ask nobody")
	f.DurationVar(&s.Timeout, "timeout", time.Minute, "how long to try")
	return cmd
}
