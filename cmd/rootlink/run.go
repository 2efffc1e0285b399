package main

import (
	"errors"
	"fmt"
	"os"
	"runtime/debug"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/rootlink/rootlink/internal/cli"
	"github.com/rootlink/rootlink/internal/recorder"
	"github.com/rootlink/rootlink/internal/version"
)

func runCommand() *cobra.Command {
	var s recorder.Step
	onFailure, ifUnavailable, follow := choice{"discard", "record"}, choice{"fail", "unsigned"}, choice{"tree", "main"}
	failure, unavailable, followed := onFailure[0], ifUnavailable[0], follow[0]
	cmd := &cobra.Command{
		Use:   "run --step NAME --products PATH... [flags] -- COMMAND [ARG...]",
		Short: "Run a build step, and sign what went in and what came out",
		Long: `Run a build step, and sign what went in and what came out.

The command is started stopped, measured by the agent, and runs on the same
terminal as if rootlink were not there. When it has ended well, its products are
hashed and a key made for this one statement signs it, with a certificate that
leads back to the TPM. The bundle appears when all of it has succeeded.

Paths are recorded relative to the working directory. Directories are walked;
.git is left out. docs/recording.md has the rules.

stdout is the command's own, so there is no --output json: what was recorded is
printed by rootlink inspect --output json.

Exit code: the command's own. 125 when rootlink itself failed, 126 when the
command cannot be run, 127 when it is not found.`,
		Example: `  rootlink run --step build --materials . --products hello -- go build -o hello .`,
		Args:    cobra.ArbitraryArgs,
		Annotations: map[string]string{
			needsGroup: "true",
		},
		RunE: func(c *cobra.Command, args []string) error {
			if c.ArgsLenAtDash() > 0 || c.ArgsLenAtDash() < 0 && len(args) > 0 {
				return cli.Fail(cli.ExitRun, fmt.Errorf("unexpected argument %q", args[0]), "put the command behind --")
			}
			if cli.WantsJSON(c) {
				// Nothing could tell the command's stdout from ours.
				return cli.Fail(cli.ExitRun, errors.New("run has no --output json: stdout is the command's"),
					"name the bundle with --bundle-out FILE; `rootlink inspect --output json FILE` prints what it says")
			}
			if c.Flags().Changed("bundle-dir") && s.LinkOut != "" {
				return cli.Fail(cli.ExitRun, errors.New("both --bundle-dir and --link-out"), "give one of them")
			}
			if c.Flags().Changed("bundle-dir") && s.BundleOut != "" {
				return cli.Fail(cli.ExitRun, fmt.Errorf("both --bundle-dir and --bundle-out"), "give one of them")
			}
			// The build needs the memory more than we do.
			debug.SetGCPercent(30)
			s.Command = args
			if !c.Flags().Changed("build-id") {
				s.BuildID = os.Getenv(envBuildID)
			}
			s.RecordFailure, s.AllowUnsigned = failure == "record", unavailable == "unsigned"
			s.MainOnly = followed == "main"
			s.Version, s.Stderr = version.String(), os.Stderr
			code, err := s.Run()
			if err == nil && code != 0 {
				return cli.Status(code)
			}
			return err
		},
	}
	f := cmd.Flags()
	f.StringVar(&s.Name, "step", "", "`NAME` of the step")
	f.StringArrayVar(&s.Materials, "materials", nil, "`PATH` of a file or directory that goes in (repeatable)")
	f.StringArrayVar(&s.Products, "products", nil, "`PATH` of a file or directory that comes out (repeatable)")
	f.StringArrayVar(&s.Exclude, "exclude", nil, "pattern of names to leave out of both, such as '*.o' or 'dist/**/tmp' (repeatable)")
	f.StringVar(&s.BundleDir, "bundle-dir", ".", "`DIR` for the bundle, STEP.KEY.sigstore.json")
	f.StringVar(&s.BundleOut, "bundle-out", "", "`FILE` for the bundle")
	f.StringVar(&s.LinkOut, "link-out", "", "`FILE` for a classic in-toto link (Metablock with certificate) in place of the bundle")
	sourceFlags(f, &s.Sources)
	f.StringArrayVar(&s.ExtraEnv, "env", nil, "name of a further environment variable to record (repeatable)")
	f.StringVar(&s.BuildID, "build-id", "", "name of the pipeline's run, which keeps its links from being mixed with others (default $"+envBuildID+")")
	f.Var(onFailure.value(&failure), "on-failure", "when the command fails: record it, or discard")
	f.Var(ifUnavailable.value(&unavailable), "if-unavailable", "without agent, identity or ptrace: fail, or record unsigned")
	f.Var(follow.value(&followed), "follow", "which processes to follow: tree, or main for a step that debugs or needs setuid programs")
	stampFlags(f, &s.Stamping, true)
	f.DurationVar(&s.IssueTimeout, "issue-timeout", 5*time.Minute, "how long to wait for an agent, server or timestamp authority that is away")
	cmd.SetFlagErrorFunc(func(c *cobra.Command, err error) error {
		return cli.Fail(cli.ExitRun, err, "see `rootlink run --help`")
	})
	return cmd
}

// sourceFlags says where key, SVID and evidence come from.
// newEntry is how long a new entry may need to reach a SPIRE agent: the server
// looks at its entries every five seconds, and so does the agent at the server.
const newEntry = 12 * time.Second

func sourceFlags(f *pflag.FlagSet, s *recorder.Sources) {
	s.Patience = newEntry
	f.StringVar(&s.Socket, "socket", "", "socket of the agent (default $"+recorder.EnvSocket+")")
	f.StringVar(&s.Quoter, "quoter-socket", "", "quoter_socket of the rootlink plugin in a SPIRE agent (default $"+recorder.EnvQuoter+")")
	f.StringVar(&s.SPIFFEID, "spiffe-id", "", "identity to sign with, when several match")
	f.Var((*evidence)(&s.NoEvidence), "evidence", "hardware: by the TPM; none: sign with the Workload API's SVID alone, which ties the link to no hardware")
}

// evidence is a flag whose value none must be asked for.
type evidence bool

func (e *evidence) String() string {
	if e != nil && bool(*e) {
		return "none"
	}
	return "hardware"
}

func (e *evidence) Type() string { return "hardware|none" }

func (e *evidence) Set(s string) error {
	if s != "hardware" && s != "none" {
		return fmt.Errorf("%q is neither hardware nor none", s)
	}
	*e = s == "none"
	return nil
}

// envBuildID is one place to set for all steps of a job.
const envBuildID = "ROOTLINK_BUILD_ID"

// choice is a flag with few values, the first of them the default.
type choice []string

type choiceValue struct {
	choice
	to *string
}

func (c choice) value(to *string) *choiceValue { return &choiceValue{c, to} }

func (v *choiceValue) String() string {
	if v.to == nil {
		return ""
	}
	return *v.to
}
func (v *choiceValue) Type() string { return strings.Join(v.choice, "|") }

func (v *choiceValue) Set(s string) error {
	for _, c := range v.choice {
		if s == c {
			*v.to = s
			return nil
		}
	}
	return fmt.Errorf("%q is not one of %s", s, strings.Join(v.choice, ", "))
}
