package verifycmd

import (
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/rootlink/rootlink/internal/cli"
	"github.com/rootlink/rootlink/internal/inspection"
	"github.com/rootlink/rootlink/internal/report"
	"github.com/rootlink/rootlink/pkg/layout"
	"github.com/rootlink/rootlink/pkg/link"
	"github.com/rootlink/rootlink/pkg/vsa"
)

// layoutOptions are the flags of a verification by layout.
type layoutOptions struct {
	file                 string
	sublayouts           []string
	state, buildID       string
	runInspections, skip bool
	timeout              time.Duration
}

func (o *layoutOptions) register(f *pflag.FlagSet) {
	f.StringVar(&o.file, "layout", "", "`FILE` with the signed in-toto layout that the links must fulfil; instead of --identity")
	f.StringArrayVar(&o.sublayouts, "sublayout", nil, "`FILE` with a layout that stands for a step of --layout (repeatable)")
	f.StringVar(&o.state, "layout-state", "", "`FILE` that remembers the newest edition of each layout (default in $XDG_STATE_HOME/rootlink)")
	f.StringVar(&o.buildID, "build-id", "", "take the links of the pipeline's run of this `NAME`, and leave out those of others")
	f.BoolVar(&o.runInspections, "run-inspections", false, "run the layout's inspections, in a sandbox without network")
	f.BoolVar(&o.skip, "skip-inspections", false, "accept that the layout's inspections are not run")
	f.DurationVar(&o.timeout, "inspection-timeout", inspection.Timeout, "how long one inspection may run")
}

func (o *layoutOptions) check(identity string) error {
	switch {
	case o.file != "" && identity != "":
		return cli.Usage("the layout names who may sign each step", "both --layout and --identity")
	case o.file != "" && o.runInspections && o.skip:
		return cli.Usage("give one of them", "both --run-inspections and --skip-inspections")
	case o.file == "" && (o.buildID != "" || o.runInspections || o.skip || len(o.sublayouts) > 0):
		return cli.Usage("--layout FILE names it", "--build-id, --sublayout and inspections are a layout's")
	}
	return nil
}

// Pipeline is what a verification by layout read and found.
type Pipeline struct {
	Input  layout.Input
	Trust  *link.Trust
	Result *layout.Result
}

// classicSuffix ends the names of classic in-toto links.
const classicSuffix = ".link"

// readPipeline reads the files that are named. Here suffixes alone decide what
// a file is: what it holds is for others to choose.
func readPipeline(o *layoutOptions, args []string) (in layout.Input, err error) {
	in.BuildID, in.SkipInspections = o.buildID, o.skip
	if in.Layout.Raw, err = cli.ReadInput(o.file, layout.MaxFile*3/2); err != nil {
		return in, err
	}
	in.Layout.Name = o.file
	for _, name := range o.sublayouts {
		raw, err := cli.ReadInput(name, layout.MaxFile*3/2)
		if err != nil {
			return in, err
		}
		in.Sublayouts = append(in.Sublayouts, layout.NamedFile{Name: name, Raw: raw})
	}
	seen := map[string]bool{}
	for _, name := range args {
		if seen[name] {
			return in, cli.Usage("name each once", "%s is given twice", name)
		}
		seen[name] = true
		switch {
		case hasSuffix(name):
			raw, err := readBundle(name)
			if err != nil {
				return in, err
			}
			if raw == nil {
				return in, cli.Usage("a bundle is a regular file", "%s is no file", name)
			}
			in.Links = append(in.Links, link.LinkInput{Name: name, Bundle: raw})
		case strings.HasSuffix(name, classicSuffix):
			raw, err := cli.ReadInput(name, layout.MaxClassic)
			if err != nil {
				return in, err
			}
			in.Classic = append(in.Classic, layout.NamedFile{Name: name, Raw: raw})
		default:
			a, err := digestArtifact(name)
			if err != nil {
				return in, err
			}
			in.Artifacts = append(in.Artifacts, a)
		}
	}
	return in, readAllBeside(in.Links)
}

// judgePipeline verifies and remembers the editions of what was accepted.
func judgePipeline(o *verifyOptions, q *question) (*Pipeline, []byte, error) {
	pins, err := fingerprints(o.trustKeys)
	if err != nil {
		return nil, nil, err
	}
	trust, doc, err := readTrust(o.trust, pins, o.revocations)
	if err != nil {
		return nil, nil, err
	}
	in, err := readPipeline(&o.pipeline, q.args)
	if err != nil {
		return nil, nil, err
	}
	in.NotBefore, in.Clock, in.ArchivedAt = q.notBefore, q.present, q.archived
	q.placed.rename(in.Links)
	in.Artifacts = q.placed.orArchived(in.Artifacts)
	state, err := openState(o.state, trust)
	if err != nil {
		return nil, nil, err
	}
	defer state.close()
	editions, err := openLayoutState(o.pipeline.state, trust)
	if err != nil {
		return nil, nil, err
	}
	defer editions.close()
	var known link.Input
	state.known(&known, pins)
	if len(known.TrustKeys) > 0 {
		if err := trust.CheckSigner(known.TrustKeys); err != nil {
			return nil, nil, trustError(o.trust, err, "")
		}
	}
	in.LeastSerial, in.Seen = state.least, editions.seen()
	in.LeastDigest, in.TrustKeys, in.Checkpoints = known.LeastDigest, known.TrustKeys, known.Seen
	if o.pipeline.runInspections {
		names := make([]string, 0, len(in.Artifacts))
		for _, a := range in.Artifacts {
			names = append(names, a.Name)
		}
		in.Inspect = func(i layout.Inspection) (layout.Inspected, error) {
			return inspection.Run(i, names, o.pipeline.timeout)
		}
	}
	res, verdict := layout.Verify(in, trust, q.now)
	if !q.present.IsZero() {
		return &Pipeline{in, trust, res}, doc, verdict // nothing is remembered of a time that was only asked for
	}
	if trust.CheckSerial(state.least) == nil && trust.CheckHistory(known.LeastSerial, known.LeastDigest) == nil && trust.CheckWindow(q.now) == nil {
		if err := state.remember(trust, res.Checkpoints); err != nil {
			return nil, nil, err
		}
	}
	// An edition counts as seen once its signature, window and serial were
	// good, whatever became of the links: who has seen it must not be shown an
	// older one because a step failed.
	if err := editions.remember(res); err != nil {
		return nil, nil, err
	}
	return &Pipeline{in, trust, res}, doc, verdict
}

func verifyPipeline(cmd *cobra.Command, o verifyOptions, q *question) error {
	p, doc, verdict := judgePipeline(&o, q)
	if p == nil {
		return verdict
	}
	res := p.Result
	links, steps := report.FromLayout(res, q.now)
	if err := writeReport(o.report, links, steps, q.now); err != nil {
		return err
	}
	if err := o.vsa.write(links, vsa.Digest(filepath.Base(o.trust), doc), p.Input.Links, q.now); err != nil {
		return err
	}
	var err error
	switch {
	case cli.WantsJSON(cmd):
		err = cli.PrintJSON(cmd.OutOrStdout(), res)
	case o.verbose:
		_, err = fmt.Fprint(cmd.OutOrStdout(), res.VerboseText())
	default:
		_, err = fmt.Fprint(cmd.OutOrStdout(), res.Text())
	}
	if err != nil || verdict == nil {
		return err
	}
	return pipelineOutcome(res, verdict)
}

func pipelineOutcome(res *layout.Result, err error) error {
	code := cli.ExitInternal
	switch {
	case errors.Is(err, link.ErrCrypto):
		code = cli.ExitCrypto
	case errors.Is(err, link.ErrPolicy):
		code = cli.ExitPolicy
	}
	return cli.Fail(code, fmt.Errorf("not verified: %w", err), pipelineHint(res, err))
}

func pipelineHint(res *layout.Result, err error) string {
	switch {
	case errors.Is(err, layout.ErrUnsigned):
		return "rootlink layout sign --key PEM signs it"
	case errors.Is(err, layout.ErrForeign):
		return "the key must be among layout_keys in trust.json; rootlink layout show prints who signed"
	case errors.Is(err, layout.ErrExpired):
		return "sign a new edition: rootlink layout sign --expires 90d"
	case errors.Is(err, layout.ErrRolledBack):
		return "use the newest layout; one that was set up anew on purpose needs a higher --serial"
	case errors.Is(err, layout.ErrEmpty):
		return "rootlink layout add-step says who must do what"
	case errors.Is(err, layout.ErrInspection):
		return "--run-inspections runs them in a sandbox; --skip-inspections accepts that they are not run"
	case errors.Is(err, layout.ErrThreshold):
		return "give the bundles of all who did the step, of this build"
	case errors.Is(err, layout.ErrBuildID):
		return "--build-id takes the links of one build out of many"
	case errors.Is(err, layout.ErrNoOverlap):
		return "the steps have nothing in common: are the links of one build? if that is meant, --standalone or --may-match-nothing says so in the layout"
	}
	f := res.Failure
	if strings.HasPrefix(f.Check, "trust.") { // as of links without a layout
		return hint(&link.Failure{Check: f.Check}, err)
	}
	if f.Check == "layout.form" {
		return "--layout takes what rootlink layout sign wrote: is it another file, or damaged?"
	}
	for _, l := range res.Links { // what is said of a link alone fits here too
		if f.Link == l.Name && l.Verdict != link.VerdictVerified {
			for _, c := range l.Checks {
				if c.Outcome == "failed" {
					return hint(&link.Failure{Check: c.ID}, err)
				}
			}
		}
	}
	return "docs/layouts.md says what each check demands; --verbose lists them"
}
