package main

import (
	"fmt"

	"github.com/spf13/cobra"

	"github.com/rootlink/rootlink/internal/cli"
	"github.com/rootlink/rootlink/internal/files"
	"github.com/rootlink/rootlink/pkg/link"
)

func provenanceCommand() *cobra.Command {
	var out string
	cmd := &cobra.Command{
		Use:   "provenance BUNDLE [--out FILE]",
		Short: "Write an SLSA provenance v1 predicate of what a link says",
		Long: `Write an SLSA provenance v1 predicate of what a link says, to be signed with
rootlink sign --type slsaprovenance1.

The link is read, not verified: run rootlink verify first. docs/predicates.md
says where each field comes from.`,
		Example: `  rootlink provenance build.1a2b3c4d` + link.BundleSuffix + ` --out provenance.json
  rootlink sign --type slsaprovenance1 --predicate provenance.json hello`,
		Args: cobra.ExactArgs(1),
		RunE: func(c *cobra.Command, args []string) error {
			raw, err := cli.ReadInput(args[0], link.MaxBundle)
			if err != nil {
				return err
			}
			b, err := link.ParseBundle(raw)
			if err != nil {
				return cli.Hint(fmt.Errorf("%s: %w", args[0], err), "is this what `rootlink run` wrote? `rootlink inspect FILE` shows what a file holds")
			}
			predicate, err := b.UnverifiedProvenance()
			if err != nil {
				return cli.Hint(fmt.Errorf("%s: %w", args[0], err), "provenance is made of the link of a step that ended well; `rootlink inspect FILE` shows what it says")
			}
			if out != "" {
				return files.Write(out, predicate, 0o644)
			}
			_, err = c.OutOrStdout().Write(predicate)
			return err
		},
	}
	cmd.Flags().StringVar(&out, "out", "", "`FILE` to write (default stdout)")
	return cmd
}
