package main

import (
	"encoding/json"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/rootlink/rootlink/internal/cli"
	"github.com/rootlink/rootlink/internal/trustdoc"
	"github.com/rootlink/rootlink/pkg/link"
)

const maxSourceFile = 64 << 10 // bytes of a file with certificates or witness keys

const optionsHint = "such as FILE,operator=example.com"

// sourceFlags name time sources that are not the server's own. The server
// remembers them for later exports.
type sourceFlags struct {
	operator  string
	needed    int
	chains    []string
	witnesses []string
	reset     bool
}

func (f *sourceFlags) register(fs *pflag.FlagSet) {
	fs.StringVar(&f.operator, "operator", "", "who runs the trust domain, as verifiers compare it with who runs the time sources (default the trust domain); remembered")
	fs.IntVar(&f.needed, "authorities-needed", 0, "how many distinct time authorities must attest when a link was signed; remembered")
	fs.StringArrayVar(&f.chains, "tsa-chain", nil, "PEM `FILE[,operator=NAME][,uri=URI]` with the certificates of a further timestamp authority, in any order (repeatable); remembered")
	fs.StringArrayVar(&f.witnesses, "witness", nil, "`FILE[,operator=NAME]` with the C2SP verifier keys of log witnesses, one a line (repeatable); remembered")
	fs.BoolVar(&f.reset, "reset-sources", false, "first forget what earlier exports remembered of these")
}

// json is what the request carries, nil for nothing.
func (f *sourceFlags) json(c *cobra.Command) ([]byte, error) {
	s := trustdoc.Sources{Operator: f.operator}
	if c.Flags().Changed("authorities-needed") {
		s.AuthoritiesNeeded = &f.needed
		if f.needed < 0 || f.needed > link.MaxTokens {
			return nil, cli.Usage("as many authorities as each signature is stamped by", "--authorities-needed %d: 0 to %d", f.needed, link.MaxTokens)
		}
	}
	for _, arg := range f.chains {
		path, opts, err := trustdoc.FileOptions(arg, "operator", "uri")
		if err != nil {
			return nil, cli.Usage(optionsHint, "--tsa-chain: %w", err)
		}
		rest, err := cli.ReadInput(path, maxSourceFile)
		if err != nil {
			return nil, err
		}
		chains, err := trustdoc.Chains(rest)
		if err != nil {
			return nil, cli.Usage("give the certificates of the authority in PEM, up to its root", "--tsa-chain: %s: %w", path, err)
		}
		for _, chain := range chains {
			s.Timestamps = append(s.Timestamps, trustdoc.TSA{Chain: chain, Operator: opts["operator"], URI: opts["uri"]})
		}
	}
	for _, arg := range f.witnesses {
		path, opts, err := trustdoc.FileOptions(arg, "operator")
		if err != nil {
			return nil, cli.Usage(optionsHint, "--witness: %w", err)
		}
		raw, err := cli.ReadInput(path, maxSourceFile)
		if err != nil {
			return nil, err
		}
		for _, line := range strings.Split(string(raw), "\n") {
			if line = strings.TrimSpace(line); line == "" || strings.HasPrefix(line, "#") {
				continue
			}
			name, _, _ := strings.Cut(line, "+")
			s.Witnesses = append(s.Witnesses, link.Witness{Name: name, Key: line, Operator: opts["operator"]})
		}
	}
	if s.Operator == "" && s.AuthoritiesNeeded == nil && len(s.Timestamps)+len(s.Witnesses) == 0 {
		return nil, nil
	}
	return json.Marshal(s)
}
