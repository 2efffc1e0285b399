package verifycmd

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"

	"github.com/rootlink/rootlink/internal/cli"
	"github.com/rootlink/rootlink/internal/files"
	"github.com/rootlink/rootlink/internal/keyfile"
	"github.com/rootlink/rootlink/pkg/layout"
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
			signer, err := keyfile.Private(key)
			if err != nil {
				return err
			}
			q, err := o.prepare(cmd.Context(), clock(), args)
			if err != nil {
				return err
			}
			defer q.placed.remove()
			p, _, err := judgePipeline(&o, q)
			if p == nil {
				return err
			}
			if err != nil {
				fmt.Fprint(cmd.ErrOrStderr(), p.Result.Text())
				return pipelineOutcome(p.Result, err)
			}
			pinned, err := layout.ExportPinned(p.Input, p.Result, signer, oneOffKey, time.Time{})
			if err != nil {
				return cli.Fail(cli.ExitPolicy, err, "docs/layouts.md, other implementations")
			}
			if err := writePinned(out, pinned); err != nil {
				return err
			}
			if cli.WantsJSON(cmd) {
				return cli.PrintJSON(cmd.OutOrStdout(), struct {
					Out   string `json:"out"`
					Links int    `json:"links"`
				}{out, len(pinned.Links)})
			}
			fmt.Fprintf(cmd.OutOrStdout(), "%s: root.layout and %d links. They are signed by keys made now: the holder of %s vouches for what was verified.\n", out, len(pinned.Links), key)
			return nil
		},
	}
	f := cmd.Flags()
	o.register(f)
	f.StringVar(&key, "key", "", "private key in `PEM` that signs the pinned layout")
	f.StringVar(&out, "out", "", "new `DIR` for what is written")
	return cmd
}

func oneOffKey() (crypto.Signer, error) { return ecdsa.GenerateKey(elliptic.P256(), rand.Reader) }

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
