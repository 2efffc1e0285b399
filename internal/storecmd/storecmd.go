// Package storecmd is the command line of bundles kept beside images:
// `rootlink attach` and `rootlink fetch`.
package storecmd

import (
	"errors"
	"fmt"
	"io/fs"
	"net/url"
	"path/filepath"

	"github.com/spf13/cobra"

	"github.com/rootlink/rootlink/internal/cli"
	"github.com/rootlink/rootlink/internal/oci"
	"github.com/rootlink/rootlink/pkg/link"
)

const places = `REF is one of

  oci-layout:DIR[:TAG][@sha256:…]              an image in an OCI image layout
  oci:HOST[:PORT]/REPOSITORY[:TAG][@sha256:…]  an image in a registry
  dir:DIR[@sha256:…]                           a directory of bundles

oci+http: in place of oci: is a registry without TLS, as --plain-http says.
Credentials for registries are those of docker's configuration file.`

// AttachCommand returns `rootlink attach`.
func AttachCommand() *cobra.Command {
	var to string
	var plain bool
	cmd := &cobra.Command{
		Use:   "attach BUNDLE... --to REF",
		Short: "Store bundles beside an image",
		Long: `Store bundles beside an image, as its referrers: the image itself does not
change. Boot event logs and log proofs that a bundle names, and that lie beside
it, go along. Storing the same twice is storing it once; nothing is overwritten.

` + places,
		Example: `  rootlink attach build` + link.BundleSuffix + ` sbom` + link.BundleSuffix + ` --to oci-layout:image`,
		Args:    cobra.ArbitraryArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			switch {
			case to == "":
				return cli.Usage("--to oci-layout:DIR, --to oci:HOST/REPOSITORY:TAG or --to dir:DIR", "nowhere to store them")
			case len(args) == 0:
				return cli.Usage("name the "+link.BundleSuffix+" files that `rootlink run` wrote", "no bundle to store")
			}
			items, err := readItems(args)
			if err != nil {
				return err
			}
			ctx, stop := cli.SignalContext()
			defer stop()
			out, err := oci.Attach(ctx, place(to, plain), items)
			if err != nil {
				return fail(err)
			}
			if cli.WantsJSON(cmd) {
				return cli.PrintJSON(cmd.OutOrStdout(), out)
			}
			for _, a := range out {
				what := "stored"
				if a.Existed {
					what = "was there"
				}
				fmt.Fprintf(cmd.OutOrStdout(), "%s  %s  %s\n", a.Digest, what, cli.Clean(a.Name))
			}
			return nil
		},
	}
	cmd.Flags().StringVar(&to, "to", "", "`REF` of the image that they are stored beside")
	plainFlag(cmd, &plain)
	return cmd
}

// FetchCommand returns `rootlink fetch`.
func FetchCommand() *cobra.Command {
	var dir string
	var plain bool
	cmd := &cobra.Command{
		Use:   "fetch REF [--bundle-dir DIR]",
		Short: "Fetch the bundles that are stored beside an image",
		Long: `Fetch the bundles that are stored beside an image, and the files that lie
beside them. Nothing is verified: ` + "`rootlink verify`" + ` does that. A bundle whose
name is taken by another one gets a name of its own.

` + places,
		Example: `  rootlink fetch oci-layout:image --bundle-dir bundles`,
		Args:    cobra.ArbitraryArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) != 1 {
				return cli.Usage("such as oci-layout:DIR; see `"+cmd.CommandPath()+" --help`", "%d references, exactly one is fetched", len(args))
			}
			ctx, stop := cli.SignalContext()
			defer stop()
			f, err := oci.Fetch(ctx, place(args[0], plain))
			if err != nil {
				return fail(err)
			}
			for _, s := range f.Skipped {
				fmt.Fprintf(cmd.ErrOrStderr(), "passed over: %s\n", cli.Clean(s))
			}
			if len(f.Bundles()) == 0 {
				return cli.Hint(fmt.Errorf("%s: no bundle there", args[0]), "`rootlink attach` stores them")
			}
			out, err := oci.Attach(ctx, "dir:"+dir, f.Items)
			if err != nil {
				return fail(err)
			}
			if cli.WantsJSON(cmd) {
				return cli.PrintJSON(cmd.OutOrStdout(), map[string]any{"image": f.Image, "sha256": f.Digest, "files": out})
			}
			for _, a := range out {
				fmt.Fprintln(cmd.OutOrStdout(), filepath.Join(dir, a.Name))
			}
			return nil
		},
	}
	cmd.Flags().StringVar(&dir, "bundle-dir", ".", "`DIR` to write them into (made if missing)")
	plainFlag(cmd, &plain)
	return cmd
}

func plainFlag(cmd *cobra.Command, plain *bool) {
	cmd.Flags().BoolVar(plain, "plain-http", false, "talk to the registry without TLS")
}

func place(ref string, plain bool) string {
	if plain {
		return oci.Plain(ref)
	}
	return ref
}

// readItems reads bundles, and what lies beside them that they name.
func readItems(args []string) (items []oci.Item, err error) {
	seen := map[string][]byte{}
	add := func(path string) ([]byte, error) {
		clean := filepath.Clean(path)
		if raw, ok := seen[clean]; ok {
			return raw, nil
		}
		raw, err := cli.ReadInput(path, link.MaxBundle)
		if err == nil {
			seen[clean] = raw
			items = append(items, oci.Item{Name: filepath.Base(path), Data: raw})
		}
		return raw, err
	}
	for _, path := range args {
		raw, err := add(path)
		if err != nil {
			return nil, err
		}
		err = beside(raw, func(name string) ([]byte, error) {
			raw, err := add(filepath.Join(filepath.Dir(path), name))
			if errors.Is(err, fs.ErrNotExist) {
				return nil, nil
			}
			return raw, err
		})
		if err != nil {
			return nil, err
		}
	}
	return items, nil
}

// beside adds what belongs to a bundle and may lie beside it. A detached record
// comes first: it names the others.
func beside(raw []byte, add func(name string) ([]byte, error)) error {
	b, err := link.ParseBundle(raw)
	if err != nil {
		return nil // one of another type, or none: Attach says so
	}
	var record []byte
	if name := b.DetachedName(); name != "" {
		if record, err = add(name); err != nil {
			return err
		}
	}
	eventLog, logProof := b.NamesBeside(record)
	for _, name := range []string{eventLog, logProof} {
		if name == "" {
			continue
		}
		if _, err := add(name); err != nil {
			return err
		}
	}
	return nil
}

// fail gives what went wrong its exit code and hint.
func fail(err error) error {
	switch {
	case errors.Is(err, oci.ErrRef):
		return cli.Fail(cli.ExitUsage, err, "such as oci-layout:DIR, oci:HOST/REPOSITORY:TAG, or with @sha256:… for one image of several")
	case errors.Is(err, oci.ErrAmbiguous):
		return cli.Fail(cli.ExitUsage, err, "")
	case errors.Is(err, oci.ErrItem):
		return cli.Fail(cli.ExitUsage, err, "name "+link.BundleSuffix+" files, as `rootlink run` and `rootlink sign` write them")
	case errors.Is(err, oci.ErrDigest), errors.Is(err, oci.ErrForeignReferrer):
		return cli.Fail(cli.ExitCrypto, err, "somebody exchanged it, or it was damaged: get it again from where it was made")
	case errors.Is(err, oci.ErrPlainHTTP):
		return cli.Hint(err, "if that registry is meant to have no TLS, say --plain-http or oci+http:")
	case errors.Is(err, oci.ErrNotFound):
		return cli.Hint(err, "check the reference for a typing error, and that the image is there")
	case errors.As(err, new(*url.Error)):
		return cli.Hint(err, "is that the registry's address, and can it be reached from here?")
	}
	return err
}
