// Package layoutcmd is `rootlink layout`: making, signing and showing layouts.
package layoutcmd

import (
	"crypto"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/rootlink/rootlink/internal/cli"
	"github.com/rootlink/rootlink/internal/files"
	"github.com/rootlink/rootlink/internal/keyfile"
	"github.com/rootlink/rootlink/pkg/envelope"
	"github.com/rootlink/rootlink/pkg/layout"
)

// Command returns `rootlink layout`, with more commands under it.
func Command(more ...*cobra.Command) *cobra.Command { return command(time.Now, more...) }

func command(clock func() time.Time, more ...*cobra.Command) *cobra.Command {
	subs := []*cobra.Command{
		newCommand(clock), addStepCommand(clock), addInspectionCommand(clock), signCommand(clock), showCommand(),
	}
	return cli.Group("layout", "Say who must do which step of a pipeline, and sign that", append(subs, more...)...)
}

// read returns a layout that may be unsigned: it is being made.
func read(path string) (*layout.File, *layout.Layout, error) {
	raw, err := cli.ReadInput(path, layout.MaxFile*3/2)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil, cli.Hint(err, "rootlink layout new --name NAME --out "+path+" makes one")
	}
	if err != nil {
		return nil, nil, err
	}
	f, err := layout.ParseFile(raw)
	if err != nil {
		return nil, nil, cli.Fail(cli.ExitCrypto, fmt.Errorf("%s: %w", path, err), "docs/layouts.md has the format")
	}
	return f, f.UnverifiedLayout(), nil
}

// edit reads a layout, has it changed, and writes it as an unsigned document:
// signatures over what it was are worth nothing now. One that was signed gets
// the next serial, so that it replaces that edition.
func edit(cmd *cobra.Command, path string, now time.Time, change func(*layout.Layout) error) error {
	f, l, err := read(path)
	if err != nil {
		return err
	}
	if err := change(l); err != nil {
		return err
	}
	if f.Form() != "" {
		l.Serial++
		l.Issued = now.UTC().Truncate(time.Second)
		fmt.Fprintf(cmd.ErrOrStderr(), "%s was signed: its signatures are dropped, and it is now serial %d\n", path, l.Serial)
	}
	if err := write(path, l); err != nil {
		return err
	}
	if cli.WantsJSON(cmd) {
		return cli.PrintJSON(cmd.OutOrStdout(), wrote{path, l.Name, l.Serial, l.Expires, []string{}})
	}
	return nil
}

func write(path string, l *layout.Layout) error {
	raw, err := l.Marshal()
	if err != nil {
		return cli.Usage("docs/layouts.md has the format", "%w", err)
	}
	return files.Write(path, raw, 0o644)
}

// wrote is what a command says of the layout that it wrote.
type wrote struct {
	Out      string    `json:"out"`
	Name     string    `json:"name"`
	Serial   uint64    `json:"serial"`
	Expires  time.Time `json:"expires"`
	SignedBy []string  `json:"signed_by"` // fingerprints
}

func newCommand(clock func() time.Time) *cobra.Command {
	var name, out, readme string
	var serial uint64
	life := cli.Duration(90 * 24 * time.Hour)
	cmd := &cobra.Command{
		Use:     "new --name NAME [--expires 90d] [--out FILE]",
		Short:   "Begin a layout",
		Example: "  rootlink layout new --name hello --expires 90d\n  rootlink layout add-step hello.layout --name build --identity 'spiffe://example.org/build/*' …",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if name == "" {
				return cli.Usage("--name NAME: verifiers remember the newest edition by it", "no name")
			}
			if out == "" {
				out = name + ".layout"
			}
			now := clock().UTC().Truncate(time.Second)
			l := &layout.Layout{Name: name, Serial: serial, Issued: now, Expires: now.Add(time.Duration(life)), Readme: readme}
			raw, err := l.Marshal()
			if err != nil {
				return cli.Usage("letters, digits, '.', '_' and '-'", "%w", err)
			}
			if err := files.WriteNew(out, raw, 0o644); err != nil {
				return cli.Hint(err, "--out names another file; add-step changes one that exists")
			}
			if cli.WantsJSON(cmd) {
				return cli.PrintJSON(cmd.OutOrStdout(), wrote{out, l.Name, l.Serial, l.Expires, []string{}})
			}
			_, err = fmt.Fprintln(cmd.OutOrStdout(), out)
			return err
		},
	}
	f := cmd.Flags()
	f.StringVar(&name, "name", "", "`NAME` of the layout")
	f.Var(&life, "expires", "how long it may be used: 90d, 36h")
	f.Uint64Var(&serial, "serial", 1, "number of the edition: verifiers refuse a lower one than they have seen")
	f.StringVar(&readme, "readme", "", "what it is for, in words")
	f.StringVar(&out, "out", "", "`FILE` to write (default NAME.layout)")
	return cmd
}

func signCommand(clock func() time.Time) *cobra.Command {
	var keys []string
	var out, form string
	var serial uint64
	var life cli.Duration
	cmd := &cobra.Command{
		Use:   "sign FILE --key PEM... [--out FILE]",
		Short: "Sign a layout",
		Long: `Sign a layout. What it says is checked first: a layout that leaves room is not
signed. Keys are ECDSA P-256 or Ed25519 private keys in PEM (PKCS #8 or SEC 1);
their public halves belong into layout_keys of trust.json.

Old signatures are not kept. Signing again with --expires makes the next edition,
with the next serial.`,
		Example: "  openssl genpkey -algorithm ed25519 -out release.pem\n  rootlink layout sign hello.layout --key release.pem",
		Args:    cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(keys) == 0 {
				return cli.Usage("openssl genpkey -algorithm ed25519 -out release.pem makes one", "no --key: an unsigned layout is refused everywhere")
			}
			f, l, err := read(args[0])
			if err != nil {
				return err
			}
			now := clock().UTC().Truncate(time.Second)
			if life != 0 {
				l.Issued, l.Expires = now, now.Add(time.Duration(life))
				if f.Form() != "" {
					l.Serial++
				}
			}
			if serial != 0 {
				l.Serial = serial
			}
			if err := l.Lint(); err != nil {
				return cli.Fail(cli.ExitPolicy, err, "docs/layouts.md says what a layout must say")
			}
			if !now.Before(l.Expires) {
				return cli.Fail(cli.ExitPolicy, fmt.Errorf("%w: %s", layout.ErrExpired, l.Expires), "--expires 90d gives it a new end")
			}
			var signers []crypto.Signer
			for _, k := range keys {
				s, err := keyfile.Private(k)
				if err != nil {
					return err
				}
				signers = append(signers, s)
			}
			raw, err := layout.Sign(l, form, signers...)
			if err != nil {
				return cli.Usage("--form dsse or metablock", "%w", err)
			}
			if out == "" {
				out = args[0]
			}
			if err := files.Write(out, raw, 0o644); err != nil {
				return err
			}
			by := []string{}
			for _, s := range signers {
				fp, err := envelope.Fingerprint(s.Public())
				if err != nil {
					return err
				}
				by = append(by, fp)
			}
			if cli.WantsJSON(cmd) {
				return cli.PrintJSON(cmd.OutOrStdout(), wrote{out, l.Name, l.Serial, l.Expires, by})
			}
			for i, fp := range by {
				id, err := layout.NewKey(signers[i].Public()) // has the ID that `layout show` finds in the file
				if err != nil {
					return err
				}
				fmt.Fprintf(cmd.OutOrStdout(), "%s: %s, serial %d, until %s, signed by %s (in-toto key ID %s)\n", out, l.Name, l.Serial, l.Expires.Format(time.RFC3339), fp, id.KeyID)
			}
			return nil
		},
	}
	fl := cmd.Flags()
	fl.StringArrayVar(&keys, "key", nil, "private key, `PEM` (repeatable)")
	fl.StringVar(&out, "out", "", "`FILE` to write (default: FILE itself)")
	fl.StringVar(&form, "form", layout.FormDSSE, "dsse, or metablock for in-toto implementations that know no DSSE")
	fl.Uint64Var(&serial, "serial", 0, "number of the edition (default: as it is)")
	fl.Var(&life, "expires", "new end, from now: 90d, 36h (default: as it is)")
	return cmd
}

func showCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "show FILE",
		Short: "Print what a layout says, and who signed it",
		Args:  cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			f, l, err := read(args[0])
			if err != nil {
				return err
			}
			lint := l.Lint()
			if cli.WantsJSON(cmd) {
				return cli.PrintJSON(cmd.OutOrStdout(), view(f, l, lint))
			}
			fmt.Fprint(cmd.OutOrStdout(), l.Text())
			switch ids := f.UnverifiedKeyIDs(); len(ids) {
			case 0:
				fmt.Fprintln(cmd.OutOrStdout(), "\nNOT SIGNED")
			default:
				// Claimed: which keys may sign, only a trust.json can say.
				fmt.Fprintf(cmd.OutOrStdout(), "\nsignatures (%s) by keys with these in-toto IDs, which `rootlink verify` checks:\n", f.Form())
				for _, id := range ids {
					fmt.Fprintf(cmd.OutOrStdout(), "  %s\n", cli.Clean(id))
				}
			}
			if lint != nil {
				return cli.Fail(cli.ExitPolicy, lint, "it would be refused: docs/layouts.md says what a layout must say")
			}
			return nil
		},
	}
}

type shown struct {
	Name        string         `json:"name"`
	Serial      uint64         `json:"serial"`
	Issued      time.Time      `json:"issued"`
	Expires     time.Time      `json:"expires"`
	Readme      string         `json:"readme,omitempty"`
	Steps       []layout.Step  `json:"steps"`
	Inspections []any          `json:"inspections"`
	Form        string         `json:"form"`
	KeyIDs      []string       `json:"unverified_key_ids"`
	Keys        map[string]any `json:"keys"`
	Refused     string         `json:"would_be_refused,omitempty"`
}

func view(f *layout.File, l *layout.Layout, lint error) shown {
	s := shown{
		Name: l.Name, Serial: l.Serial, Issued: l.Issued, Expires: l.Expires, Readme: l.Readme, Steps: l.Steps,
		Inspections: []any{}, Form: f.Form(), KeyIDs: f.UnverifiedKeyIDs(), Keys: map[string]any{},
	}
	for _, in := range l.Inspections {
		s.Inspections = append(s.Inspections, in)
	}
	for id, k := range l.Keys {
		s.Keys[id] = k
	}
	if lint != nil {
		s.Refused = lint.Error()
	}
	return s
}

// isFile: a path to something rather than a hash.
func isFile(s string) bool {
	st, err := os.Stat(s)
	return err == nil && st.Mode().IsRegular() || strings.ContainsRune(s, filepath.Separator)
}
