package verifycmd

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"

	"github.com/rootlink/rootlink/internal/cli"
	"github.com/rootlink/rootlink/internal/files"
	"github.com/rootlink/rootlink/pkg/layout"
	"github.com/rootlink/rootlink/pkg/link"
)

// ExportPinnedCommand returns `rootlink layout export-pinned`.
func ExportPinnedCommand() *cobra.Command { return exportPinnedCommand(time.Now) }

func exportPinnedCommand(clock func() time.Time) *cobra.Command {
	var o verifyOptions
	var out, key string
	cmd := &cobra.Command{
		Use:   "export-pinned --trust FILE --layout FILE --key PEM --out DIR BUNDLE... [ARTIFACT...]",
		Short: "Verify a pipeline, and write it for in-toto's other implementations",
		Long: `Verify a pipeline as rootlink verify does, and write it in in-toto's classic
formats with pinned keys, for tools that know no certificates: in-toto 1.x in
Python (Debian's in-toto-verify), in-toto-golang.

WHO VOUCHES: the links in DIR are signed anew, each by a key made for it and
thrown away. Their signatures say that whoever holds --key verified the pipeline,
with this layout and trust.json, now. They are not the recorders' signatures, and
hardware, programs and times are not in them.

DIR gets root.layout, one .link for each identity of each step, and the layout's
public key: key.pem, and key.json for in-toto's Python.`,
		Example: `  rootlink layout export-pinned --trust trust.json --layout hello.layout --key mine.pem --out pinned *.sigstore.json
  cd pinned && in-toto-verify -l root.layout -k key.json -t ecdsa`,
		Args: cobra.ArbitraryArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			if o.pipeline.file == "" || out == "" || key == "" {
				return cli.Usage("rootlink layout export-pinned --help", "--layout, --key and --out are needed")
			}
			now := clock()
			notBefore, err := o.check(args)
			if err != nil {
				return err
			}
			signer, err := ReadSigner(key)
			if err != nil {
				return err
			}
			p, _, err := judgePipeline(&o, when{now: now, notBefore: notBefore}, nil, args)
			if p == nil {
				return err
			}
			if err != nil {
				fmt.Fprint(cmd.OutOrStdout(), p.Result.Text())
				return pipelineOutcome(p.Result, err)
			}
			pinned, err := layout.ExportPinned(p.Input, p.Result, signer, oneOffKey, time.Time{})
			if err != nil {
				return cli.Fail(cli.ExitPolicy, err, "docs/layouts.md, other implementations")
			}
			if err := writePinned(out, pinned); err != nil {
				return err
			}
			fmt.Fprintf(cmd.OutOrStdout(), "%s: root.layout and %d links. They are signed by keys made now: the holder of %s vouches for what was verified.\n", out, len(pinned.Links), key)
			return nil
		},
	}
	f := cmd.Flags()
	f.StringVar(&o.trust, "trust", "", "trust.json: the `FILE` that rootlink-server trust export writes")
	f.StringVar(&o.state, "trust-state", "", "file that remembers the highest serial of trust.json (default in $XDG_STATE_HOME/rootlink)")
	f.StringArrayVar(&o.revocations, "revocations", nil, "file of revocations issued after trust.json")
	f.StringVar(&o.notBefore, "not-before", "", "refuse links made before this time (RFC 3339): genuine ones of an older run")
	o.pipeline.register(f)
	f.StringVar(&key, "key", "", "private key that signs the pinned layout, `PEM`")
	f.StringVar(&out, "out", "", "new directory for what is written")
	return cmd
}

func oneOffKey() (crypto.Signer, error) { return ecdsa.GenerateKey(elliptic.P256(), rand.Reader) }

// ReadSigner reads a private key that signs layouts.
func ReadSigner(path string) (crypto.Signer, error) {
	raw, err := cli.ReadInput(path, 64<<10)
	if err != nil {
		return nil, err
	}
	bad := func(err error) error {
		return cli.Fail(cli.ExitInternal, fmt.Errorf("%s: %w", path, err), "an ECDSA P-256 or Ed25519 private key in PEM, without a password")
	}
	block, _ := pem.Decode(raw)
	if block == nil {
		return nil, bad(link.ErrMalformed)
	}
	key, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if block.Type == "EC PRIVATE KEY" {
		key, err = x509.ParseECPrivateKey(block.Bytes)
	}
	if err != nil {
		return nil, bad(err)
	}
	s, ok := key.(crypto.Signer)
	if !ok {
		return nil, bad(link.ErrUnsupported)
	}
	if _, err := layout.NewKey(s.Public()); err != nil {
		return nil, bad(err)
	}
	return s, nil
}

// writePinned makes the directory appear whole, and touches none that is there.
func writePinned(dir string, p *layout.Pinned) error {
	if _, err := os.Lstat(dir); err == nil {
		return cli.Usage("name a new directory: links of another export in it would be taken for these", "%s exists", dir)
	}
	tmp, err := os.MkdirTemp(filepath.Dir(filepath.Clean(dir)), ".pinned-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(tmp)
	put := func(name string, raw []byte) error { return files.Write(filepath.Join(tmp, name), raw, 0o644) }
	for _, f := range []struct {
		name string
		raw  []byte
	}{{"root.layout", p.Layout}, {"key.json", p.Key}, {"key.pem", p.KeyPEM}} {
		if err := put(f.name, f.raw); err != nil {
			return err
		}
	}
	for _, l := range p.Links {
		if err := put(l.Name, l.Raw); err != nil {
			return err
		}
	}
	if err := os.Chmod(tmp, 0o755); err != nil {
		return err
	}
	return os.Rename(tmp, dir)
}
