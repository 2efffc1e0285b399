package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/rootlink/rootlink/internal/cli"
)

func entryCommand(at *location) *cobra.Command {
	return cli.Group("entry", "Say who gets which identity",
		entryCreate(at), entryList(at), entryShow(at), entryUpdate(at), entryDelete(at), entryCount(at))
}

// entryFlags are what an entry is written with.
type entryFlags struct {
	spiffeID, parentID, hint    string
	node, admin                 bool
	selectors, dns, federations []string
	ttl, jwtTTL                 cli.Duration
	expires                     moment
}

func (f *entryFlags) add(c *cobra.Command) {
	fs := c.Flags()
	fs.StringVar(&f.spiffeID, "spiffe-id", "", "the identity: spiffe://TRUST-DOMAIN/PATH or /PATH")
	fs.StringVar(&f.parentID, "parent-id", "", "the agent or node alias under which it is issued")
	fs.BoolVar(&f.node, "node", false, "make a node alias: the selectors are those of nodes, such as tpmnode:pcr_policy:lab")
	fs.StringArrayVar(&f.selectors, "selector", nil, "TYPE:VALUE that must be shown; repeat it for several, all of which must hold")
	fs.Var(&f.ttl, "ttl", "lifetime of its X509-SVIDs (default that of the server)")
	fs.Var(&f.jwtTTL, "jwt-ttl", "lifetime of its JWT-SVIDs")
	fs.Var(&f.expires, "expires-at", "when the entry ends: a time or a duration from now (default never)")
	fs.StringArrayVar(&f.dns, "dns", nil, "DNS name in its X509-SVIDs (repeatable)")
	fs.StringArrayVar(&f.federations, "federates-with", nil, "trust domain whose bundle it gets (repeatable)")
	fs.StringVar(&f.hint, "hint", "", "how a workload with several identities tells this one")
	fs.BoolVar(&f.admin, "admin", false, "let the identity administer the server")
	c.MarkFlagsMutuallyExclusive("node", "parent-id")
}

// entry builds the message and the mask of the fields that were given.
func (f *entryFlags) entry(ctx context.Context, c *cobra.Command, cl *client) (*types.Entry, *types.EntryMask, error) {
	e, m := &types.Entry{}, &types.EntryMask{}
	var err error
	if f.spiffeID != "" {
		m.SpiffeId = true
		if e.SpiffeId, err = cl.spiffeID(ctx, "--spiffe-id", f.spiffeID); err != nil {
			return nil, nil, err
		}
	}
	if f.node {
		f.parentID = "/spire/server"
	}
	if f.parentID != "" {
		m.ParentId = true
		if e.ParentId, err = cl.spiffeID(ctx, "--parent-id", f.parentID); err != nil {
			return nil, nil, err
		}
	}
	if e.Selectors, err = selectors("--selector", f.selectors); err != nil {
		return nil, nil, err
	}
	given := c.Flags().Changed
	m.Selectors = given("selector")
	e.X509SvidTtl, m.X509SvidTtl = f.ttl.Seconds(), given("ttl")
	e.JwtSvidTtl, m.JwtSvidTtl = f.jwtTTL.Seconds(), given("jwt-ttl")
	e.ExpiresAt, m.ExpiresAt = f.expires.unix(), given("expires-at")
	e.DnsNames, m.DnsNames = f.dns, given("dns")
	e.FederatesWith, m.FederatesWith = f.federations, given("federates-with")
	e.Hint, m.Hint = f.hint, given("hint")
	e.Admin, m.Admin = f.admin, given("admin")
	return e, m, nil
}

func entryCreate(at *location) *cobra.Command {
	var f entryFlags
	var id string
	c := &cobra.Command{
		Use:   "create --spiffe-id ID (--parent-id ID | --node) --selector TYPE:VALUE…",
		Short: "Create an entry",
		Example: `  # every machine whose boot state the PCR policy "lab" allows
  rootlink-server entry create --node --spiffe-id /node/lab --selector tpmnode:pcr_policy:lab
  # a build step on those machines: this tool under this recorder
  rootlink-server entry create --spiffe-id /build/hello --parent-id /node/lab \
    --selector binary:tool:sha256:HEX --selector binary:recorder:sha256:HEX`,
		Args: cobra.NoArgs,
	}
	f.add(c)
	c.Flags().StringVar(&id, "entry-id", "", "ID of the entry (default made by the server)")
	_ = c.MarkFlagRequired("spiffe-id")
	_ = c.MarkFlagRequired("selector")
	c.MarkFlagsOneRequired("node", "parent-id")
	c.RunE = withClient(at, func(ctx context.Context, c *cobra.Command, cl *client, _ []string) error {
		e, _, err := f.entry(ctx, c, cl)
		if err != nil {
			return err
		}
		e.Id = id
		r, err := cl.entry.BatchCreateEntry(ctx, &entryv1.BatchCreateEntryRequest{Entries: []*types.Entry{e}})
		if err != nil {
			return err
		}
		if len(r.Results) != 1 {
			return fmt.Errorf("the server answered for %d entries instead of 1", len(r.Results))
		}
		made := r.Results[0].Entry
		if err := itemError(r.Results[0].Status); err != nil {
			if re, ok := errors.AsType[*cli.RPCError](err); ok && re.Code == codes.AlreadyExists && made.GetId() != "" {
				err = cli.Hint(fmt.Errorf("an entry like this exists already: %s", made.Id),
					fmt.Sprintf("see `%s entry show %s`, or change it with `entry update`", program, made.Id))
			}
			return err
		}
		adviseEntry(c, made)
		adviseParent(ctx, c, cl, made)
		return emitEntry(c, made)
	})
	return c
}

// binaryKinds begin the selectors of docs/plugin-binary.md.
var binaryKinds = []string{"sha256:", "uid:", "gid:", "path:", "parent:", "tool:", "recorder:", "recorder_unprotected:"}

// adviseEntry says what a person who wrote an entry may not have meant.
func adviseEntry(c *cobra.Command, e *types.Entry) {
	for _, s := range e.Selectors {
		if s.Type == "binary" && strings.HasPrefix(s.Value, "recorder_unprotected:") {
			note(c, "an unprotected recorder can be imitated by any process of the same user; reports will say so")
		}
		if s.Type == "binary" && !slices.Contains(binaryKinds, strings.SplitAfterN(s.Value, ":", 2)[0]) {
			note(c, "no program shows a selector like binary:%s, so nothing will match; `rootlink whoami` prints those there are", s.Value)
		}
	}
}

// adviseParent says when nothing stands where an entry hangs, which is right
// for a machine that is yet to come, and else a typing error that nobody
// notices: the entry is simply never issued for.
func adviseParent(ctx context.Context, c *cobra.Command, cl *client, e *types.Entry) {
	id := e.GetParentId()
	switch {
	case id.GetPath() == "/spire/server":
	case strings.HasPrefix(id.GetPath(), "/spire/agent/"):
		_, err := cl.agent.GetAgent(ctx, &agentv1.GetAgentRequest{Id: id, OutputMask: &types.AgentMask{}})
		if status.Code(err) == codes.NotFound {
			note(c, "no agent with the parent's ID has attested yet, and the entry is issued for by no other; `rootlink-server agent list` shows those there are")
		}
	default:
		r, err := cl.entry.ListEntries(ctx, &entryv1.ListEntriesRequest{
			Filter: &entryv1.ListEntriesRequest_Filter{BySpiffeId: id}, OutputMask: &types.EntryMask{}, PageSize: 1,
		})
		if err == nil && len(r.Entries) == 0 {
			note(c, "no entry makes anything spiffe://%s%s, so nothing is issued under it until one does; `rootlink-server entry create --node` makes an alias of nodes", id.GetTrustDomain(), id.GetPath())
		}
	}
}

func entryList(at *location) *cobra.Command {
	var f listFlags
	c := &cobra.Command{Use: "list", Short: "List entries", Args: cobra.NoArgs}
	f.add(c)
	c.RunE = withClient(at, func(ctx context.Context, c *cobra.Command, cl *client, _ []string) error {
		filter, err := f.filter(ctx, c, cl)
		if err != nil {
			return err
		}
		all := []*types.Entry{}
		for token := ""; ; {
			r, err := cl.entry.ListEntries(ctx, &entryv1.ListEntriesRequest{Filter: filter, PageSize: pageSize, PageToken: token})
			if err != nil {
				return err
			}
			all = append(all, r.Entries...)
			if token = r.NextPageToken; token == "" {
				break
			}
		}
		return emitEntries(c, all)
	})
	return c
}

// listFlags are the filters of list and count.
type listFlags struct {
	spiffeID, parentID, hint string
	selectors                []string
}

func (f *listFlags) add(c *cobra.Command) {
	fs := c.Flags()
	fs.StringVar(&f.spiffeID, "spiffe-id", "", "only entries of this identity")
	fs.StringVar(&f.parentID, "parent-id", "", "only entries under this parent")
	fs.StringArrayVar(&f.selectors, "selector", nil, "only entries with this selector; repeat it for several, all of which must be there")
	fs.StringVar(&f.hint, "hint", "", "only entries with this hint")
}

func (f *listFlags) filter(ctx context.Context, c *cobra.Command, cl *client) (out *entryv1.ListEntriesRequest_Filter, err error) {
	out = &entryv1.ListEntriesRequest_Filter{}
	if f.spiffeID != "" {
		if out.BySpiffeId, err = cl.spiffeID(ctx, "--spiffe-id", f.spiffeID); err != nil {
			return nil, err
		}
	}
	if f.parentID != "" {
		if out.ByParentId, err = cl.spiffeID(ctx, "--parent-id", f.parentID); err != nil {
			return nil, err
		}
	}
	if len(f.selectors) > 0 {
		out.BySelectors = &types.SelectorMatch{Match: types.SelectorMatch_MATCH_SUPERSET}
		if out.BySelectors.Selectors, err = selectors("--selector", f.selectors); err != nil {
			return nil, err
		}
	}
	if c.Flags().Changed("hint") {
		out.ByHint = wrapperspb.String(f.hint)
	}
	return out, nil
}

func entryCount(at *location) *cobra.Command {
	var f listFlags
	c := &cobra.Command{Use: "count", Short: "Count entries", Args: cobra.NoArgs}
	f.add(c)
	c.RunE = withClient(at, func(ctx context.Context, c *cobra.Command, cl *client, _ []string) error {
		l, err := f.filter(ctx, c, cl)
		if err != nil {
			return err
		}
		r, err := cl.entry.CountEntries(ctx, &entryv1.CountEntriesRequest{Filter: &entryv1.CountEntriesRequest_Filter{
			BySpiffeId: l.BySpiffeId, ByParentId: l.ByParentId, BySelectors: l.BySelectors, ByHint: l.ByHint,
		}})
		if err != nil {
			return err
		}
		return emitCount(c, r.Count)
	})
	return c
}

func entryShow(at *location) *cobra.Command {
	return &cobra.Command{
		Use: "show ENTRY-ID", Short: "Show an entry", Args: cobra.ExactArgs(1),
		RunE: withClient(at, func(ctx context.Context, c *cobra.Command, cl *client, args []string) error {
			e, err := cl.entry.GetEntry(ctx, &entryv1.GetEntryRequest{Id: args[0]})
			if err != nil {
				return noEntry(err)
			}
			return emitEntry(c, e)
		}),
	}
}

func entryUpdate(at *location) *cobra.Command {
	var f entryFlags
	c := &cobra.Command{
		Use:   "update ENTRY-ID [flags]",
		Short: "Change the given fields of an entry and keep the others",
		Args:  cobra.ExactArgs(1),
	}
	f.add(c)
	c.RunE = withClient(at, func(ctx context.Context, c *cobra.Command, cl *client, args []string) error {
		e, mask, err := f.entry(ctx, c, cl)
		if err != nil {
			return err
		}
		if proto.Equal(mask, &types.EntryMask{}) {
			return cli.Usage("name at least one field, such as --ttl 30m", "nothing to update")
		}
		e.Id = args[0]
		r, err := cl.entry.BatchUpdateEntry(ctx, &entryv1.BatchUpdateEntryRequest{Entries: []*types.Entry{e}, InputMask: mask})
		if err != nil {
			return err
		}
		if len(r.Results) != 1 {
			return fmt.Errorf("the server answered for %d entries instead of 1", len(r.Results))
		}
		if err := itemError(r.Results[0].Status); err != nil {
			return noEntry(err)
		}
		adviseEntry(c, r.Results[0].Entry)
		adviseParent(ctx, c, cl, r.Results[0].Entry)
		return emitEntry(c, r.Results[0].Entry)
	})
	return c
}

func entryDelete(at *location) *cobra.Command {
	return &cobra.Command{
		Use: "delete ENTRY-ID…", Short: "Delete entries", Args: cobra.MinimumNArgs(1),
		RunE: withClient(at, func(ctx context.Context, c *cobra.Command, cl *client, args []string) error {
			r, err := cl.entry.BatchDeleteEntry(ctx, &entryv1.BatchDeleteEntryRequest{Ids: args})
			if err != nil {
				return err
			}
			deleted := []string{}
			var failed error
			for _, res := range r.Results {
				if err := itemError(res.Status); err != nil {
					failed = errors.Join(failed, fmt.Errorf("%s: %w", res.Id, noEntry(err)))
					continue
				}
				deleted = append(deleted, res.Id)
			}
			err = emit(c, struct {
				Deleted []string `json:"deleted"`
			}{deleted}, func(w io.Writer) error {
				for _, id := range deleted {
					fmt.Fprintln(w, id)
				}
				return nil
			})
			return errors.Join(failed, err)
		}),
	}
}

// noEntry adds the advice that belongs to a wrong entry ID.
func noEntry(err error) error {
	err = cli.FromRPC(err)
	if re, ok := errors.AsType[*cli.RPCError](err); ok && re.Code == codes.NotFound {
		return cli.Hint(err, fmt.Sprintf("`%s entry list` prints the IDs", program))
	}
	return err
}
