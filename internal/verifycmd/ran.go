package verifycmd

import (
	"errors"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/rootlink/rootlink/internal/cli"
	"github.com/rootlink/rootlink/pkg/link"
)

// ranView is what a statement says of the programs of its step.
func ranView(s *link.Statement) (v view) {
	var ran, caches []string
	for _, e := range s.Byproducts.Executables {
		line := e.Role + " " + e.Path + " " + digests(e.Digest)
		if e.Count > 1 {
			line += fmt.Sprintf(" ×%d", e.Count)
		}
		ran = append(ran, line)
	}
	v.add("executables", ran)
	v.add("all_that_ran", s.Byproducts.Tree)
	if len(s.Byproducts.TreeGaps) > 0 {
		v.add("not_listed", s.Byproducts.TreeGaps)
	}
	for _, c := range s.Environment.Caches {
		line := c.Name + " " + c.Path
		if c.Fresh {
			line += " fresh"
		} else {
			line += " NOT FRESH: " + c.Reason
		}
		caches = append(caches, line)
	}
	if len(caches) > 0 {
		v.add("caches", caches)
	}
	return v
}

// printToolList prints what ran in a step as the file that trust export
// --executables takes. Nothing of it is verified: a person reads it first.
func printToolList(cmd *cobra.Command, name string) error {
	if cli.WantsJSON(cmd) {
		return cli.Usage("`rootlink inspect --output json` has the programs under executables", "--executables prints a tool list, not JSON")
	}
	raw, err := cli.ReadInput(name, link.MaxBundle)
	if err != nil {
		return err
	}
	in, err := decode(raw)
	if err != nil {
		return cli.Fail(cli.ExitInternal, fmt.Errorf("%s: %w", name, err), "")
	}
	payload := in.bare
	if in.bundle != nil {
		payload = in.bundle.UnverifiedPayload()
	}
	if payload == nil {
		return cli.Usage("name a bundle that `rootlink run` wrote", "%s is no record of a step", name)
	}
	s, err := link.ParseStatement(payload)
	if err != nil {
		return cli.Fail(cli.ExitInternal, fmt.Errorf("%s: %w", name, err), "")
	}
	if len(s.Byproducts.Executables) == 0 {
		return cli.Fail(cli.ExitInternal, errors.New(name+" lists no programs"), "name a bundle that `rootlink run` wrote")
	}
	_, err = fmt.Fprint(cmd.OutOrStdout(), link.ToolList(s))
	return err
}
