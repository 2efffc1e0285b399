package verifycmd

import (
	"errors"
	"path/filepath"
	"time"

	"github.com/spf13/pflag"

	"github.com/rootlink/rootlink/internal/cli"
	"github.com/rootlink/rootlink/internal/files"
	"github.com/rootlink/rootlink/internal/keyfile"
	"github.com/rootlink/rootlink/internal/version"
	"github.com/rootlink/rootlink/pkg/link"
	"github.com/rootlink/rootlink/pkg/vsa"
)

type vsaOptions struct {
	out, key, verifier, resource string
	levels                       []string
}

func (o *vsaOptions) register(f *pflag.FlagSet) {
	f.StringVar(&o.out, "vsa", "", "when all verifies, also write a signed SLSA verification summary about the artifacts to this `FILE`")
	f.StringVar(&o.key, "vsa-key", "", "private key in `PEM` that signs the summary: its readers take your word")
	f.StringVar(&o.verifier, "vsa-verifier", "", "`URI` that names you, the verifier")
	f.StringVar(&o.resource, "vsa-resource", "", "`URI` under which the artifacts are fetched, such as pkg:oci/hello")
	f.StringArrayVar(&o.levels, "vsa-level", nil, "further `LEVEL` that you vouch for, such as SLSA_BUILD_LEVEL_2 (repeatable)")
}

func (o *vsaOptions) check() error {
	if o.out == "" {
		if o.key != "" || o.verifier != "" || o.resource != "" || len(o.levels) > 0 {
			return cli.Usage("--vsa FILE says where the summary goes", "--vsa-… without --vsa")
		}
		return nil
	}
	for flag, v := range map[string]string{"--vsa-key": o.key, "--vsa-verifier": o.verifier, "--vsa-resource": o.resource} {
		if v == "" {
			return cli.Usage("--vsa FILE --vsa-key KEY.pem --vsa-verifier https://… --vsa-resource pkg:…", "--vsa needs %s", flag)
		}
	}
	return nil
}

// write writes the summary of a verification that passed. policy is what was
// demanded: the layout, or trust.json.
func (o *vsaOptions) write(res *link.Result, policy vsa.Document, links []link.LinkInput, now time.Time) error {
	if o.out == "" || res.Verdict != link.VerdictVerified {
		return nil
	}
	key, err := keyfile.Private(o.key)
	if err != nil {
		return err
	}
	opts := vsa.Options{
		VerifierID: o.verifier, Version: map[string]string{"rootlink": version.String()}, ResourceURI: o.resource,
		Policy: policy, Levels: o.levels, Time: now,
	}
	for _, l := range links {
		opts.Inputs = append(opts.Inputs, vsa.Digest(filepath.Base(l.Name), l.Bundle))
		// What its node said beside it was verified too.
		if l.Detached != nil && l.Parsed != nil {
			opts.Inputs = append(opts.Inputs, vsa.Digest(l.Parsed.DetachedName(), l.Detached))
		}
	}
	summary, err := vsa.New(res, opts)
	switch {
	case errors.Is(err, vsa.ErrNothing):
		return cli.Usage("name the artifacts behind the bundles", "--vsa: %w", err)
	case errors.Is(err, vsa.ErrOption):
		return cli.Usage("docs/verify.md says what a summary holds", "--vsa: %w", err)
	case err != nil:
		return err
	}
	raw, err := vsa.Sign(summary, key)
	if err != nil {
		return err
	}
	return files.Write(o.out, raw, 0o644)
}
