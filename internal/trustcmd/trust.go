// Package trustcmd is `rootlink trust`: reading and signing what verifiers take
// as given, away from the server.
package trustcmd

import (
	"crypto"
	"encoding/json"
	"errors"
	"fmt"
	"unicode"
	"unicode/utf16"
	"unicode/utf8"

	"github.com/spf13/cobra"

	"github.com/rootlink/rootlink/internal/cli"
	"github.com/rootlink/rootlink/internal/files"
	"github.com/rootlink/rootlink/internal/keyfile"
	"github.com/rootlink/rootlink/pkg/envelope"
	"github.com/rootlink/rootlink/pkg/link"
)

// Command returns `rootlink trust`.
func Command() *cobra.Command {
	return cli.Group("trust", "Read and sign trust.json and revocations", show(), sign(), key())
}

func show() *cobra.Command {
	var pins []string
	c := &cobra.Command{
		Use:   "show FILE",
		Short: "Print the document in trust.json or a revocation file, and who signed it",
		Long: `Print the document in trust.json or a revocation file to stdout, and to stderr
who signed it. "-" is standard input. Without --trust-key the key is only the one
that the file names itself: compare its fingerprint.`,
		Example: `  rootlink trust show trust.json | jq .requirements`,
		Args:    oneFile,
		RunE: func(c *cobra.Command, args []string) error {
			raw, err := cli.ReadInput(args[0], link.MaxTrustFile)
			if err != nil {
				return err
			}
			return print(c, args[0], raw, pins)
		},
	}
	c.Flags().StringArrayVar(&pins, "trust-key", nil, "fingerprint, or `FILE` with the public key, that must have signed (repeatable: one of them)")
	return c
}

func print(c *cobra.Command, name string, raw []byte, pins []string) error {
	kind, doc, claimed, err := link.Document(raw)
	if err != nil {
		return cli.Hint(fmt.Errorf("%s: %w", name, err), "rootlink-server trust export writes trust.json; docs/verify.md says what a revocation file holds")
	}
	if !json.Valid(doc) {
		return cli.Fail(cli.ExitCrypto, fmt.Errorf("%s: what is signed in it is no JSON", name), "get it again from whoever runs the trust domain")
	}
	by := []string{}
	switch {
	case len(claimed) == 0 && len(pins) > 0:
		return cli.Fail(cli.ExitCrypto, fmt.Errorf("%s: %w", name, link.ErrUnsigned), signHint(name))
	case len(claimed) > 0 && kind == link.KindTrust:
		t, err := link.OpenUnpinnedTrust(raw)
		if err == nil && len(pins) > 0 {
			var ids []string
			for _, p := range pins {
				id, err := keyfile.Fingerprint(p)
				if err != nil {
					return err
				}
				ids = append(ids, id)
			}
			err = t.CheckSigner(ids)
		}
		if err != nil {
			return cli.Fail(cli.ExitCrypto, fmt.Errorf("%s: %w", name, err), "get it again from whoever runs the trust domain")
		}
		by = t.Signers()
	case len(pins) > 0:
		return cli.Usage("`rootlink verify --revocations` checks it against trust.json", "--trust-key is for trust.json")
	}
	if cli.WantsJSON(c) {
		return cli.PrintJSON(c.OutOrStdout(), struct {
			Kind     string          `json:"kind"`
			Signed   bool            `json:"signed"`
			SignedBy []string        `json:"signed_by"` // verified; of trust.json alone
			Claimed  []string        `json:"claimed_by"`
			Document json.RawMessage `json:"document"`
		}{kind, len(claimed) > 0, by, append([]string{}, claimed...), doc})
	}
	switch {
	case len(by) > 0:
		fmt.Fprintf(c.ErrOrStderr(), "%s signed by key %s\n", kind, link.Clean(fmt.Sprint(by)))
	case len(claimed) > 0:
		fmt.Fprintf(c.ErrOrStderr(), "%s that claims to be signed by %s: not checked without trust.json\n", kind, link.Clean(fmt.Sprint(claimed)))
	default:
		fmt.Fprintf(c.ErrOrStderr(), "UNSIGNED %s\n", kind)
	}
	_, err = c.OutOrStdout().Write(visible(doc))
	return err
}

// visible writes what a terminal might obey, or what hides other text, as JSON's
// escapes. A document without any is printed as it was signed.
func visible(doc []byte) []byte {
	var out []byte
	for _, r := range string(doc) {
		switch {
		case unicode.IsPrint(r) || r == '\n' || r == '\r' || r == '\t':
			out = utf8.AppendRune(out, r)
		default:
			for _, u := range utf16.AppendRune(nil, r) {
				out = fmt.Appendf(out, `\u%04x`, u)
			}
		}
	}
	return out
}

func signHint(name string) string {
	return "have whoever holds the trust key sign it: rootlink trust sign --key KEY.pem " + name
}

func sign() *cobra.Command {
	var keys []string
	var out string
	c := &cobra.Command{
		Use:   "sign --key FILE [--out FILE] FILE",
		Short: "Sign trust.json or a revocation file",
		Long: `Sign the document that ` + "`rootlink-server trust export --unsigned`" + ` wrote, or a
revocation file, with a key that is kept elsewhere than on the server. trust.json
must name the key (the server does with --trust-key-public). To hand over to a
new key, sign with the old and the new one. Signatures that the file had before
are replaced.`,
		Args: oneFile,
		RunE: func(c *cobra.Command, args []string) error {
			if len(keys) == 0 {
				return cli.Usage("such as --key trust.key", "no key to sign with")
			}
			var signers []crypto.Signer
			for _, k := range keys {
				s, err := keyfile.Private(k)
				if err != nil {
					return err
				}
				signers = append(signers, s)
			}
			raw, err := cli.ReadInput(args[0], link.MaxTrustFile)
			if err != nil {
				return err
			}
			signed, err := signDocument(raw, signers)
			if errors.Is(err, link.ErrForeignTrust) {
				return cli.Hint(fmt.Errorf("%s: %w", args[0], err), "start the server with --trust-key-public and that key, and export again")
			}
			if err != nil {
				return cli.Hint(fmt.Errorf("%s: %w", args[0], err), "rootlink-server trust export --unsigned writes trust.json")
			}
			if out == "" {
				_, err = c.OutOrStdout().Write(signed)
				return err
			}
			return files.Write(out, signed, 0o644)
		},
	}
	c.Flags().StringArrayVar(&keys, "key", nil, "private key in `PEM`, ECDSA P-256 or Ed25519 (repeatable)")
	c.Flags().StringVar(&out, "out", "", "`FILE` to write (default stdout)")
	return c
}

func signDocument(raw []byte, keys []crypto.Signer) ([]byte, error) {
	kind, doc, _, err := link.Document(raw)
	if err != nil {
		return nil, err
	}
	if kind == link.KindRevocations {
		return link.SignRevocations(doc, keys...)
	}
	return link.SignTrust(doc, keys...)
}

func key() *cobra.Command {
	return &cobra.Command{
		Use:   "key FILE",
		Short: "Print the fingerprint of a public or private key, as --trust-key takes it",
		Args:  oneFile,
		RunE: func(c *cobra.Command, args []string) error {
			pub, err := keyfile.Public(args[0])
			if err != nil {
				s, privateErr := keyfile.Private(args[0])
				if privateErr != nil {
					return err
				}
				pub = s.Public()
			}
			id, err := envelope.Fingerprint(pub)
			if err != nil {
				return err
			}
			if cli.WantsJSON(c) {
				return cli.PrintJSON(c.OutOrStdout(), map[string]string{"fingerprint": id})
			}
			_, err = fmt.Fprintln(c.OutOrStdout(), id)
			return err
		},
	}
}

func oneFile(c *cobra.Command, args []string) error {
	if len(args) != 1 {
		return cli.Usage("see `"+c.CommandPath()+" --help`", "%d files, exactly one is wanted", len(args))
	}
	return nil
}
