package layoutcmd

import (
	"crypto/sha256"
	"encoding/hex"
	"slices"
	"strings"
	"time"

	"github.com/in-toto/in-toto-golang/in_toto"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/rootlink/rootlink/internal/cli"
	"github.com/rootlink/rootlink/internal/files"
	"github.com/rootlink/rootlink/internal/keyfile"
	"github.com/rootlink/rootlink/pkg/layout"
	"github.com/rootlink/rootlink/pkg/link"
)

// stepFlags are what add-step takes.
type stepFlags struct {
	step                          layout.Step
	materials, products           []string
	tools, recorders, executables []string
	toolLists, keys               []string
	replace                       bool
}

func (s *stepFlags) register(f *pflag.FlagSet) {
	f.StringVar(&s.step.Name, "name", "", "`NAME` of the step, as rootlink run --step")
	f.StringArrayVar(&s.step.Identities, "identity", nil, "SPIFFE ID, or `PATTERN` of it, that may do the step (repeatable)")
	f.IntVar(&s.step.Threshold, "threshold", 1, "how many different identities must have done it, with the same result")
	f.BoolVar(&s.step.DistinctHosts, "distinct-hosts", false, "each of them on a TPM of its own")
	f.StringArrayVar(&s.materials, "expect-materials", nil, "artifact `RULE` on what goes in, such as 'MATCH src/* WITH PRODUCTS FROM fetch' (repeatable)")
	f.StringArrayVar(&s.products, "expect-products", nil, "artifact `RULE` on what comes out, such as 'CREATE hello' (repeatable)")
	f.StringArrayVar(&s.step.Command, "command", nil, "what must have been run, one word each time (repeatable), or all words after --")
	f.StringArrayVar(&s.tools, "tool", nil, "the tool: `FILE|HEX`, a program or its SHA-256 (repeatable)")
	f.StringArrayVar(&s.recorders, "recorder", nil, "the recorder: `FILE|HEX` (repeatable)")
	f.BoolVar(&s.step.ProtectedRecorder, "protected-recorder", false, "the recorder must have been out of its user's reach")
	f.StringArrayVar(&s.executables, "executable", nil, "program that the step may run: `FILE|HEX` (repeatable); no other may run then")
	f.StringArrayVar(&s.toolLists, "executables-from", nil, "`FILE` of such hashes, one a line, # comments (repeatable)")
	f.BoolVar(&s.step.CachesPerJob, "caches-per-job", false, "caches must have been empty before the step")
	f.StringArrayVar(&s.step.EKs, "ek", nil, "`HASH` of an EK that may have done it (repeatable)")
	f.StringArrayVar(&s.step.PCRPolicies, "pcr-policy", nil, "`NAME` of a PCR policy in trust.json, of which one must be met (repeatable)")
	f.StringArrayVar(&s.step.Authorities, "authority", nil, "`HASH` of the public key of an SVID authority that counts (repeatable; default any in trust.json)")
	f.StringVar(&s.step.Tier, "tier", "", "least tier: tpm, boot_attested")
	f.StringVar(&s.step.Evidence, "evidence", "", "least kind of evidence: leaf, detached, parent")
	f.IntVar(&s.step.ExitCode, "exit-code", 0, "how the command must end")
	f.StringArrayVar(&s.keys, "functionary-key", nil, "public key in `PEM` that may sign classic links of the step, or its sublayout (repeatable)")
	f.BoolVar(&s.step.KeyPinned, "key-pinned", false, "accept classic in-toto links by --functionary-key: no hardware stands behind them")
	f.StringVar(&s.step.Sublayout, "sublayout", "", "`NAME` of the layout, signed by --functionary-key, that stands for the step")
	f.BoolVar(&s.step.Standalone, "standalone", false, "nothing need join the step to another")
	f.BoolVar(&s.step.MayMatchNothing, "may-match-nothing", false, "MATCH rules of the step may find nothing")
	f.BoolVar(&s.replace, "replace", false, "replace the step of that name")
}

func addStepCommand(clock func() time.Time) *cobra.Command {
	var s stepFlags
	cmd := &cobra.Command{
		Use:   "add-step FILE --name NAME --identity PATTERN... [flags] [-- COMMAND ARG...]",
		Short: "Add a step to a layout",
		Long: `Add a step to a layout, behind those it has. Rules are in-toto's. DISALLOW * is
added to rules that do not end in a rule about everything: what they do not name
is refused.`,
		Example: `  rootlink layout add-step hello.layout --name fetch --identity spiffe://example.org/fetch \
      --expect-materials 'DISALLOW *' --expect-products 'CREATE src/*'
  rootlink layout add-step hello.layout --name build --identity 'spiffe://example.org/build/*' \
      --expect-materials 'MATCH src/* WITH PRODUCTS FROM fetch' --expect-products 'CREATE hello' \
      --threshold 2 --distinct-hosts --tool /usr/local/go/bin/go -- go build -o hello ./src`,
		Args: cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if dash := cmd.ArgsLenAtDash(); dash == 1 {
				s.step.Command = append(s.step.Command, args[1:]...)
			} else if len(args) > 1 {
				return cli.Usage("put the command behind --", "unexpected argument %q", args[1])
			}
			if s.step.Name == "" {
				return cli.Usage("--name NAME, as in rootlink run --step NAME", "no name")
			}
			return edit(cmd, args[0], clock(), s.apply)
		},
	}
	s.register(cmd.Flags())
	return cmd
}

func (s *stepFlags) apply(l *layout.Layout) (err error) {
	st := s.step
	if st.Materials, err = parseRules(s.materials); err != nil {
		return err
	}
	if st.Products, err = parseRules(s.products); err != nil {
		return err
	}
	for _, x := range []struct {
		to   *[]string
		from []string
	}{{&st.Tools, s.tools}, {&st.Recorders, s.recorders}, {&st.Executables, s.executables}} {
		for _, v := range x.from {
			h, err := hashOf(v)
			if err != nil {
				return err
			}
			*x.to = append(*x.to, h)
		}
	}
	for _, name := range s.toolLists {
		list, err := readHashes(name)
		if err != nil {
			return err
		}
		st.Executables = append(st.Executables, list...)
	}
	slices.Sort(st.Executables)
	st.Executables = slices.Compact(st.Executables)
	for _, path := range s.keys {
		pub, err := keyfile.Public(path)
		if err != nil {
			return err
		}
		k, err := layout.NewKey(pub)
		if err != nil {
			return cli.Usage("ECDSA P-256 or Ed25519", "%s: %w", path, err)
		}
		if l.Keys == nil {
			l.Keys = map[string]in_toto.Key{}
		}
		l.Keys[k.KeyID] = k
		st.PubKeys = append(st.PubKeys, k.KeyID)
	}
	for i := range l.Steps {
		if l.Steps[i].Name != st.Name {
			continue
		}
		if !s.replace {
			return cli.Usage("--replace replaces it", "the layout has a step %q", st.Name)
		}
		l.Steps[i] = st
		return nil
	}
	if s.replace {
		return cli.Usage("leave --replace out to add it", "the layout has no step %q", st.Name)
	}
	l.Steps = append(l.Steps, st)
	return nil
}

func addInspectionCommand(clock func() time.Time) *cobra.Command {
	var name string
	var materials, products []string
	cmd := &cobra.Command{
		Use:   "add-inspection FILE --name NAME [flags] -- COMMAND [ARG...]",
		Short: "Add a command that verifiers run over the artifacts",
		Long: `Add a command that verifiers run over the artifacts. It runs only where they ask
for it (--run-inspections), in a sandbox: copies of the artifacts, no network.`,
		Args: cobra.MinimumNArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			if cmd.ArgsLenAtDash() != 1 {
				return cli.Usage("put the command behind --", "no command")
			}
			in := layout.Inspection{Name: name, Run: args[1:]}
			var err error
			if in.Materials, err = parseRules(materials); err != nil {
				return err
			}
			if in.Products, err = parseRules(products); err != nil {
				return err
			}
			return edit(cmd, args[0], clock(), func(l *layout.Layout) error {
				l.Inspections = append(l.Inspections, in)
				return nil
			})
		},
	}
	f := cmd.Flags()
	f.StringVar(&name, "name", "", "`NAME` of the inspection")
	f.StringArrayVar(&materials, "expect-materials", nil, "artifact `RULE` on what it finds (repeatable)")
	f.StringArrayVar(&products, "expect-products", nil, "artifact `RULE` on what it leaves (repeatable)")
	return cmd
}

// parseRules splits rules at spaces, and closes them: what no rule names would
// be allowed by in-toto.
func parseRules(texts []string) ([][]string, error) {
	var out [][]string
	closed := false
	for _, t := range texts {
		r := strings.Fields(t)
		if len(r) == 0 {
			return nil, cli.Usage("such as 'CREATE hello'", "an empty rule")
		}
		if _, err := in_toto.UnpackRule(r); err != nil {
			return nil, cli.Usage("MATCH … WITH PRODUCTS FROM STEP, CREATE, DELETE, MODIFY, ALLOW, DISALLOW, REQUIRE", "%q is none of in-toto's rules", t)
		}
		out = append(out, r)
		verb := strings.ToUpper(r[0])
		closed = (verb == "ALLOW" || verb == "DISALLOW") && r[1] == "*"
	}
	if !closed {
		out = append(out, []string{"DISALLOW", "*"})
	}
	return out, nil
}

// hashOf takes a hash, or the hash of a program.
func hashOf(v string) (string, error) {
	if b, err := hex.DecodeString(v); err == nil && len(b) == sha256.Size {
		return strings.ToLower(v), nil
	}
	if !isFile(v) {
		return "", cli.Usage("the path of a program, or its SHA-256 in hex", "%q is neither", v)
	}
	sum, err := files.SHA256(v)
	return hex.EncodeToString(sum[:]), err
}

func readHashes(name string) ([]string, error) {
	raw, err := cli.ReadInput(name, link.MaxTrust)
	if err != nil {
		return nil, err
	}
	out, err := link.ParseToolList(raw)
	if err != nil {
		return nil, cli.Usage("`rootlink inspect BUNDLE --executables` prints such a list", "%s: %w", name, err)
	}
	return out, nil
}
