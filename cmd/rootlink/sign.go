package main

import (
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/rootlink/rootlink/internal/cli"
	"github.com/rootlink/rootlink/internal/recorder"
	"github.com/rootlink/rootlink/pkg/link"
)

func signCommand() *cobra.Command {
	var s recorder.Sign
	cmd := &cobra.Command{
		Use:   "sign --type TYPE --predicate FILE ARTIFACT... [flags] [-- COMMAND [ARG...]]",
		Short: "Sign an SBOM, provenance, a scan or any other statement about artifacts",
		Long: `Sign an SBOM, provenance, a scan or any other statement about artifacts.

With a COMMAND the tool is the program that makes the predicate: it is measured
as run measures it, and when it has ended well the file it wrote is signed.
Without one the tool is rootlink itself, which reads the file and says nothing
about where it came from. rootlink whoami -- COMMAND, or rootlink whoami --sign,
prints how either is registered.

TYPE is a predicate type's URI or one of:
  ` + strings.Join(link.PredicateAliases(), ", ") + `

FILE - is the command's stdout, or standard input without a command.

Exit code: the command's own. 125 when rootlink itself failed, 126 when the
command cannot be run, 127 when it is not found.`,
		Example: `  rootlink sign --type cyclonedx --predicate sbom.json hello -- make-sbom -o sbom.json hello
  rootlink sign --type slsaprovenance1 --predicate provenance.json hello`,
		Args:        cobra.ArbitraryArgs,
		Annotations: map[string]string{needsGroup: "true"},
		RunE: func(c *cobra.Command, args []string) error {
			if cli.WantsJSON(c) {
				return cli.Fail(cli.ExitRun, fmt.Errorf("sign has no --output json: stdout is the command's"),
					"name the bundle with --bundle-out FILE; `rootlink inspect --output json FILE` prints what it says")
			}
			if c.Flags().Changed("bundle-dir") && s.BundleOut != "" {
				return cli.Fail(cli.ExitRun, fmt.Errorf("both --bundle-dir and --bundle-out"), "give one of them")
			}
			s.Artifacts = args
			if n := c.ArgsLenAtDash(); n >= 0 {
				s.Artifacts, s.Command = args[:n], args[n:]
				if len(s.Command) == 0 {
					return cli.Fail(cli.ExitRun, fmt.Errorf("no command behind --"), "leave -- out to sign a file as it is")
				}
			}
			s.Stdin, s.Stderr = os.Stdin, os.Stderr
			code, err := s.Run()
			if err == nil && code != 0 {
				return cli.Status(code)
			}
			return err
		},
	}
	f := cmd.Flags()
	f.StringVar(&s.Type, "type", "", "predicate `TYPE`")
	f.StringVar(&s.Predicate, "predicate", "", "`FILE` with the predicate, a JSON object")
	f.StringArrayVar(&s.OCI, "subject-oci", nil, "image that it is about: `REF` is NAME@sha256:DIGEST, or oci-layout:DIR or oci:HOST/REPOSITORY:TAG to look it up (repeatable)")
	f.StringArrayVar(&s.Exclude, "exclude", nil, "pattern of names to leave out of directories (repeatable)")
	f.StringVar(&s.Name, "step", "", "`NAME` of the bundle (default the short name of the type)")
	f.StringVar(&s.BundleDir, "bundle-dir", ".", "`DIR` for the bundle, STEP.KEY.sigstore.json")
	f.StringVar(&s.BundleOut, "bundle-out", "", "`FILE` for the bundle")
	sourceFlags(f, &s.Sources)
	stampFlags(f, &s.Stamping, true)
	f.DurationVar(&s.IssueTimeout, "issue-timeout", 5*time.Minute, "how long to wait for an agent, server or timestamp authority that is away")
	cmd.SetFlagErrorFunc(func(c *cobra.Command, err error) error {
		return cli.Fail(cli.ExitRun, err, "see `rootlink sign --help`")
	})
	return cmd
}

// predicateCommand is rootlink as the tool of a signature.
func predicateCommand() *cobra.Command {
	return &cobra.Command{
		Use: recorder.PredicateArg + " FILE TYPE", Hidden: true, Args: cobra.ExactArgs(2),
		RunE: func(c *cobra.Command, args []string) error {
			return recorder.ReadPredicate(args[0], args[1], c.InOrStdin(), c.OutOrStdout())
		},
	}
}
