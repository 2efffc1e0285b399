package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/grpc/codes"

	"github.com/rootlink/rootlink/internal/cli"
	"github.com/rootlink/rootlink/pkg/attest"
	adminv1 "github.com/rootlink/rootlink/proto/rootlink/admin/v1"
)

const maxPolicyFile = 1 << 20 // bytes

func pcrPolicyCommand(at *location) *cobra.Command {
	return cli.Group("pcr-policy", "Which boot states are good",
		policyCapture(at), policySet(at), policyList(at), policyShow(at), policyDiff(at), policyDelete(at))
}

// policyJSON is the stable form of a policy revision: that of trust.json, with
// what the server knows beside it.
type policyJSON struct {
	attest.PCRPolicy
	Digest    string     `json:"digest"`
	CreatedAt *time.Time `json:"created_at"`
	DeletedAt *time.Time `json:"deleted_at,omitempty"`
}

func toPolicyJSON(p *adminv1.PCRPolicy) (policyJSON, error) {
	out := policyJSON{Digest: fmt.Sprintf("sha256:%x", p.GetDigest()), CreatedAt: when(p.GetCreatedUnix()), DeletedAt: when(p.GetDeletedUnix())}
	err := json.Unmarshal(p.GetPolicyJson(), &out.PCRPolicy)
	return out, err
}

func policyCapture(at *location) *cobra.Command {
	var name, profile string
	var pcrs []string
	var add bool
	var from, to moment
	c := &cobra.Command{
		Use: "capture AGENT-ID --name NAME", Short: "Make a policy of what a known-good agent last attested", Args: cobra.ExactArgs(1),
		Long: `Make a policy of what a known-good agent last attested.

The default is PCR 7 alone: the Secure Boot state and the keys that vouched for what was booted. It is equal on
machines of one fleet. PCRs 1, 5 and 6 hold serial numbers, boot variables, the partition table and vendor data:
they differ on every machine and would make a policy that one machine meets.`,
	}
	fs := c.Flags()
	fs.StringVar(&name, "name", "", "name of the policy; nodes that meet it get the selector tpmnode:pcr_policy:NAME")
	fs.StringArrayVar(&pcrs, "pcrs", []string{"sha256:7"}, "BANK:LIST such as sha256:4,7,11; repeat it for another bank")
	fs.BoolVar(&add, "add-profile", false, "add the values as another profile if the policy exists")
	fs.StringVar(&profile, "profile", "", "name of the profile (default made of the agent's ID)")
	fs.Var(&from, "not-before", "when the profile begins to count")
	fs.Var(&to, "not-after", "when the profile ceases to count")
	_ = c.MarkFlagRequired("name")
	c.RunE = withClient(at, func(ctx context.Context, c *cobra.Command, cl *client, args []string) error {
		sel, err := pcrSelections("--pcrs", pcrs)
		if err != nil {
			return err
		}
		id, err := cl.agentID(ctx, args[0])
		if err != nil {
			return err
		}
		r, err := cl.admin.CapturePCRPolicy(ctx, &adminv1.CapturePCRPolicyRequest{
			AgentId: idString(id), Name: name, Profile: profile, Pcrs: sel, AddProfile: add,
			NotBefore: from.unix(), NotAfter: to.unix(),
		})
		if err != nil {
			err = cli.FromRPC(err)
			switch code := rpcCode(err); code {
			case codes.AlreadyExists:
				return cli.Hint(err, "add these values to it with --add-profile, or choose another --name")
			case codes.NotFound:
				return noAgent(err)
			case codes.InvalidArgument:
				return cli.Hint(err, "choose PCRs that only a reset of the machine resets, not 16 or 23, such as --pcrs sha256:7")
			case codes.FailedPrecondition:
				return cli.Hint(err, "only an agent that attested with a TPM shows PCR values, and only those that the server asks it to quote")
			}
			return err
		}
		for _, n := range r.Notes {
			note(c, "%s", n)
		}
		return emitPolicy(c, r.Policy)
	})
	return c
}

func rpcCode(err error) codes.Code {
	if re, ok := errors.AsType[*cli.RPCError](err); ok {
		return re.Code
	}
	return codes.OK
}

func policySet(at *location) *cobra.Command {
	var replace bool
	c := &cobra.Command{
		Use: "set FILE", Short: "Store a policy written by hand (- is standard input)", Args: cobra.ExactArgs(1),
		Example: `  {"name": "lab", "profiles": [{"name": "hello", "pcrs": {"sha256": {"7": "HEX"}}}]}`,
	}
	c.Flags().BoolVar(&replace, "replace", false, "make a new revision of a policy that exists")
	c.RunE = withClient(at, func(ctx context.Context, c *cobra.Command, cl *client, args []string) error {
		b, err := cli.ReadInput(args[0], maxPolicyFile)
		if err != nil {
			return err
		}
		// `show --output json` adds fields of the server's: taken off, so that
		// what it prints can be edited and given back.
		if b, err = withoutServerFields(b); err != nil {
			return cli.Usage("see the example in `"+program+" pcr-policy set --help`", "%s: %w", args[0], err)
		}
		r, err := cl.admin.PutPCRPolicy(ctx, &adminv1.PutPCRPolicyRequest{PolicyJson: b, Replace: replace})
		if err != nil {
			if err = cli.FromRPC(err); rpcCode(err) == codes.AlreadyExists {
				return cli.Hint(err, "use --replace to make a new revision of it")
			}
			return err
		}
		return emitPolicy(c, r.Policy)
	})
	return c
}

func withoutServerFields(b []byte) ([]byte, error) {
	var m map[string]json.RawMessage
	if err := json.Unmarshal(b, &m); err != nil {
		return nil, err
	}
	for _, k := range []string{"digest", "created_at", "deleted_at"} {
		delete(m, k)
	}
	return json.Marshal(m)
}

func policyList(at *location) *cobra.Command {
	var all bool
	c := &cobra.Command{Use: "list", Short: "List policies", Args: cobra.NoArgs}
	c.Flags().BoolVar(&all, "all-revisions", false, "also replaced and deleted revisions, by which earlier evidence is judged")
	c.RunE = withClient(at, func(ctx context.Context, c *cobra.Command, cl *client, _ []string) error {
		return emitPolicies(ctx, c, cl, &adminv1.ListPCRPoliciesRequest{AllRevisions: all})
	})
	return c
}

func emitPolicies(ctx context.Context, c *cobra.Command, cl *client, req *adminv1.ListPCRPoliciesRequest) error {
	r, err := cl.admin.ListPCRPolicies(ctx, req)
	if err != nil {
		return noPolicy(err)
	}
	out := struct {
		Policies []policyJSON `json:"policies"`
	}{[]policyJSON{}}
	rows := [][]string{{"NAME", "REVISION", "PROFILES", "CREATED", "DELETED"}}
	for _, m := range r.Policies {
		p, err := toPolicyJSON(m)
		if err != nil {
			return err
		}
		out.Policies = append(out.Policies, p)
		rows = append(rows, []string{p.Name, fmt.Sprint(p.Revision), fmt.Sprint(len(p.Profiles)), whenText(m.CreatedUnix), dash(whenText(m.DeletedUnix))})
	}
	return emit(c, out, func(w io.Writer) error {
		if len(out.Policies) == 0 {
			note(c, "no PCR policies")
			return nil
		}
		return table(w, rows...)
	})
}

func policyShow(at *location) *cobra.Command {
	var all bool
	c := &cobra.Command{Use: "show NAME", Short: "Show a policy", Args: cobra.ExactArgs(1)}
	c.Flags().BoolVar(&all, "all-revisions", false, "list every revision instead")
	c.RunE = withClient(at, func(ctx context.Context, c *cobra.Command, cl *client, args []string) error {
		req := &adminv1.ListPCRPoliciesRequest{Name: args[0], AllRevisions: all}
		if all {
			return emitPolicies(ctx, c, cl, req)
		}
		r, err := cl.admin.ListPCRPolicies(ctx, req)
		if err != nil {
			return noPolicy(err)
		}
		if len(r.Policies) != 1 {
			return fmt.Errorf("the server sent %d policies instead of 1", len(r.Policies))
		}
		return emitPolicy(c, r.Policies[0])
	})
	return c
}

func noPolicy(err error) error {
	if err = cli.FromRPC(err); rpcCode(err) == codes.NotFound {
		return cli.Hint(err, fmt.Sprintf("`%s pcr-policy list` prints the names, `%s agent list` the agents", program, program))
	}
	return err
}

func emitPolicy(c *cobra.Command, m *adminv1.PCRPolicy) error {
	p, err := toPolicyJSON(m)
	if err != nil {
		return err
	}
	return emit(c, p, func(w io.Writer) error {
		var f fields
		f.add("Policy", p.Name)
		f.add("Revision", fmt.Sprint(p.Revision))
		f.add("Digest", p.Digest)
		f.add("Created", whenText(m.CreatedUnix))
		f.add("Deleted", whenText(m.DeletedUnix))
		f.add("Selector", "tpmnode:pcr_policy:"+p.Name)
		for _, pr := range p.Profiles {
			f.add("Profile", pr.Name)
			if !pr.NotBefore.IsZero() {
				f.add("  not before", pr.NotBefore.UTC().Format(time.RFC3339))
			}
			if !pr.NotAfter.IsZero() {
				f.add("  not after", pr.NotAfter.UTC().Format(time.RFC3339))
			}
			for _, bank := range slices.Sorted(maps.Keys(pr.Banks)) {
				for _, i := range slices.SortedFunc(maps.Keys(pr.Banks[bank]), byNumber) {
					f.add("  "+bank+":"+i, pr.Banks[bank][i])
				}
			}
		}
		return f.print(w)
	})
}

// byNumber orders decimal numbers without leading zeros.
func byNumber(a, b string) int {
	if len(a) != len(b) {
		return len(a) - len(b)
	}
	if a < b {
		return -1
	}
	return 1
}

type diffJSON struct {
	Policy      string           `json:"policy"`
	AgentID     string           `json:"agent_id"`
	AttestedAt  *time.Time       `json:"attested_at"`
	Matches     bool             `json:"matches"`
	Profile     string           `json:"matched_profile,omitempty"`
	Expired     []string         `json:"expired_profiles"`
	Differences []differenceJSON `json:"differences"`
}

type differenceJSON struct {
	Profile string `json:"profile"`
	PCR     string `json:"pcr"`
	Want    string `json:"want"`
	Got     string `json:"got"` // empty: not quoted
}

func policyDiff(at *location) *cobra.Command {
	return &cobra.Command{
		Use: "diff NAME AGENT-ID", Short: "Compare a policy with what an agent last attested; exits with 4 when it is not met", Args: cobra.ExactArgs(2),
		RunE: withClient(at, func(ctx context.Context, c *cobra.Command, cl *client, args []string) error {
			id, err := cl.agentID(ctx, args[1])
			if err != nil {
				return err
			}
			r, err := cl.admin.DiffPCRPolicy(ctx, &adminv1.DiffPCRPolicyRequest{Name: args[0], AgentId: idString(id)})
			if err != nil {
				return noPolicy(err)
			}
			out := diffJSON{
				Policy: args[0], AgentID: idString(id), AttestedAt: when(r.AttestedUnix), Matches: r.Matches,
				Profile: r.MatchedProfile, Expired: list(r.Expired), Differences: []differenceJSON{},
			}
			rows := [][]string{{"PROFILE", "PCR", "POLICY", "AGENT"}}
			for _, d := range r.Differences {
				pcr := fmt.Sprintf("%s:%d", d.Bank, d.Pcr)
				j := differenceJSON{d.Profile, pcr, fmt.Sprintf("%x", d.Want), fmt.Sprintf("%x", d.Got)}
				out.Differences = append(out.Differences, j)
				got := j.Got
				if got == "" {
					got = "(not quoted)"
				}
				rows = append(rows, []string{d.Profile, pcr, j.Want, got})
			}
			note(c, "compared with what the agent attested at %s; `%s agent evict` makes it attest again", whenText(r.AttestedUnix), program)
			if err := emit(c, out, func(w io.Writer) error {
				if r.Matches {
					_, err := fmt.Fprintf(w, "met: profile %s\n", r.MatchedProfile)
					return err
				}
				for _, e := range r.Expired {
					fmt.Fprintf(w, "profile %s does not count at this time\n", e)
				}
				if len(r.Differences) == 0 {
					return nil
				}
				return table(w, rows...)
			}); err != nil {
				return err
			}
			if !r.Matches {
				return cli.Fail(cli.ExitPolicy, fmt.Errorf("the agent does not meet PCR policy %q", args[0]),
					"if the new state is meant to be good: `"+program+" pcr-policy capture "+args[1]+" --name "+args[0]+" --add-profile`")
			}
			return nil
		}),
	}
}

func policyDelete(at *location) *cobra.Command {
	return &cobra.Command{
		Use: "delete NAME", Short: "End a policy: nothing is issued under it any more", Args: cobra.ExactArgs(1),
		Long: `End a policy: nothing is issued under it any more. Its revisions stay on record and in trust.json, because what
was issued under them is still judged by them. To take that back as well, ban the agents concerned.`,
		RunE: withClient(at, func(ctx context.Context, c *cobra.Command, cl *client, args []string) error {
			if _, err := cl.admin.DeletePCRPolicy(ctx, &adminv1.DeletePCRPolicyRequest{Name: args[0]}); err != nil {
				return noPolicy(err)
			}
			return emitDone(c, "deleted", args[0])
		}),
	}
}
