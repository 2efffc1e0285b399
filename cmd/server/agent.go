package main

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/spf13/cobra"
	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/rootlink/rootlink/internal/cli"
	adminv1 "github.com/rootlink/rootlink/proto/rootlink/admin/v1"
)

const minHashPrefix = 6 // hex digits of an EK hash that may stand for an agent

func agentCommand(at *location) *cobra.Command {
	return cli.Group("agent", "See and expel attested nodes",
		agentList(at), agentShow(at), agentBan(at), agentEvict(at), agentCount(at))
}

// agentJSON is the stable form of an agent for scripts.
type agentJSON struct {
	ID              string     `json:"id"`
	AttestationType string     `json:"attestation_type"`
	Serial          string     `json:"svid_serial"`
	ExpiresAt       *time.Time `json:"svid_expires_at"`
	Banned          bool       `json:"banned"`
	CanReattest     bool       `json:"can_reattest"`
	Selectors       []string   `json:"selectors"`
	Node            *nodeJSON  `json:"node,omitempty"` // `show` only
}

type nodeJSON struct {
	AttestedAt   *time.Time                   `json:"attested_at"`
	KeyBound     bool                         `json:"key_bound"`
	EKHash       string                       `json:"ek_hash"`
	EKBasis      string                       `json:"ek_basis"`
	EKRoot       string                       `json:"ek_root,omitempty"`
	AKName       string                       `json:"ak_name"`
	Manufacturer string                       `json:"manufacturer"`
	Firmware     string                       `json:"firmware"`
	Software     bool                         `json:"software_tpm"`
	SecureBoot   string                       `json:"secure_boot,omitempty"` // "on" or "off"
	PCRs         map[string]map[string]string `json:"pcrs"`
	History      []eventJSON                  `json:"history"`
}

type eventJSON struct {
	At     *time.Time `json:"at"`
	Event  string     `json:"event"`
	Detail string     `json:"detail,omitempty"`
}

func toAgentJSON(a *types.Agent) agentJSON {
	return agentJSON{
		ID: idString(a.Id), AttestationType: a.AttestationType, Serial: a.X509SvidSerialNumber,
		ExpiresAt: when(a.X509SvidExpiresAt), Banned: a.Banned, CanReattest: a.CanReattest,
		Selectors: selectorStrings(a.Selectors),
	}
}

func (cl *client) agents(ctx context.Context, filter *agentv1.ListAgentsRequest_Filter) ([]*types.Agent, error) {
	var all []*types.Agent
	for token := ""; ; {
		r, err := cl.agent.ListAgents(ctx, &agentv1.ListAgentsRequest{Filter: filter, PageSize: pageSize, PageToken: token})
		if err != nil {
			return nil, err
		}
		all = append(all, r.Agents...)
		if token = r.NextPageToken; token == "" {
			return all, nil
		}
	}
}

// agentID reads an agent's SPIFFE ID, its path, or enough of its EK hash.
func (cl *client) agentID(ctx context.Context, s string) (*types.SPIFFEID, error) {
	hex := strings.ToLower(s)
	if len(hex) < minHashPrefix || strings.Trim(hex, "0123456789abcdef") != "" {
		return cl.spiffeID(ctx, "AGENT-ID", s)
	}
	all, err := cl.agents(ctx, nil)
	if err != nil {
		return nil, err
	}
	var found []*types.SPIFFEID
	for _, a := range all {
		if h, ok := strings.CutPrefix(a.Id.GetPath(), "/spire/agent/tpmnode/"); ok && strings.HasPrefix(h, hex) {
			found = append(found, a.Id)
		}
	}
	switch len(found) {
	case 1:
		return found[0], nil
	case 0:
		if len(hex) == 2*sha256.Size { // one that was evicted, to be banned
			return cl.spiffeID(ctx, "AGENT-ID", "/spire/agent/tpmnode/"+hex)
		}
		return nil, noAgent(&cli.RPCError{Code: codes.NotFound, Message: fmt.Sprintf("no agent's EK hash begins with %s", hex)})
	}
	return nil, cli.Usage("write more digits of it", "%d agents have an EK hash that begins with %s", len(found), hex)
}

func noAgent(err error) error {
	err = cli.FromRPC(err)
	if re, ok := errors.AsType[*cli.RPCError](err); ok && re.Code == codes.NotFound {
		return cli.Hint(err, fmt.Sprintf("`%s agent list` prints the IDs", program))
	}
	return err
}

func agentFilter(c *cobra.Command, banned bool, sels []string) (by *wrapperspb.BoolValue, match *types.SelectorMatch, err error) {
	if c.Flags().Changed("banned") {
		by = wrapperspb.Bool(banned)
	}
	if len(sels) > 0 {
		match = &types.SelectorMatch{Match: types.SelectorMatch_MATCH_SUPERSET}
		match.Selectors, err = selectors("--selector", sels)
	}
	return by, match, err
}

func agentList(at *location) *cobra.Command {
	var banned bool
	var sels []string
	c := &cobra.Command{Use: "list", Short: "List agents", Args: cobra.NoArgs}
	c.Flags().BoolVar(&banned, "banned", false, "only banned agents, or with =false only the others")
	c.Flags().StringArrayVar(&sels, "selector", nil, "only agents with this selector (repeatable)")
	c.RunE = withClient(at, func(ctx context.Context, c *cobra.Command, cl *client, _ []string) error {
		by, match, err := agentFilter(c, banned, sels)
		if err != nil {
			return err
		}
		all, err := cl.agents(ctx, &agentv1.ListAgentsRequest_Filter{ByBanned: by, BySelectorMatch: match})
		if err != nil {
			return err
		}
		out := struct {
			Agents []agentJSON `json:"agents"`
		}{[]agentJSON{}}
		rows := [][]string{{"AGENT ID", "STATE", "SVID EXPIRES"}}
		for _, a := range all {
			out.Agents = append(out.Agents, toAgentJSON(a))
			rows = append(rows, []string{idString(a.Id), agentState(a), whenText(a.X509SvidExpiresAt)})
		}
		return emit(c, out, func(w io.Writer) error {
			if len(all) == 0 {
				note(c, "no agents have attested yet")
				return nil
			}
			return table(w, rows...)
		})
	})
	return c
}

func agentState(a *types.Agent) string {
	switch {
	case a.Banned:
		return "banned"
	case a.X509SvidExpiresAt != 0 && time.Now().Unix() > a.X509SvidExpiresAt:
		return "expired"
	}
	return "attested"
}

func agentCount(at *location) *cobra.Command {
	var banned bool
	var sels []string
	c := &cobra.Command{Use: "count", Short: "Count agents", Args: cobra.NoArgs}
	c.Flags().BoolVar(&banned, "banned", false, "only banned agents, or with =false only the others")
	c.Flags().StringArrayVar(&sels, "selector", nil, "only agents with this selector (repeatable)")
	c.RunE = withClient(at, func(ctx context.Context, c *cobra.Command, cl *client, _ []string) error {
		by, match, err := agentFilter(c, banned, sels)
		if err != nil {
			return err
		}
		r, err := cl.agent.CountAgents(ctx, &agentv1.CountAgentsRequest{
			Filter: &agentv1.CountAgentsRequest_Filter{ByBanned: by, BySelectorMatch: match},
		})
		if err != nil {
			return err
		}
		return emitCount(c, r.Count)
	})
	return c
}

func agentShow(at *location) *cobra.Command {
	return &cobra.Command{
		Use: "show AGENT-ID", Short: "Show an agent, its TPM and its history", Args: cobra.ExactArgs(1),
		Long: "Show an agent, its TPM and its history. AGENT-ID is a SPIFFE ID, its path, or the first digits of the EK hash.",
		RunE: withClient(at, func(ctx context.Context, c *cobra.Command, cl *client, args []string) error {
			id, err := cl.agentID(ctx, args[0])
			if err != nil {
				return err
			}
			a, err := cl.agent.GetAgent(ctx, &agentv1.GetAgentRequest{Id: id})
			if err != nil {
				return noAgent(err)
			}
			n, err := cl.admin.GetNode(ctx, &adminv1.GetNodeRequest{AgentId: idString(id)})
			if err != nil {
				return noAgent(err)
			}
			out := toAgentJSON(a)
			out.Node = toNodeJSON(n)
			return emit(c, out, func(w io.Writer) error { return printAgent(w, a, n) })
		}),
	}
}

func toNodeJSON(n *adminv1.Node) *nodeJSON {
	out := &nodeJSON{
		AttestedAt: when(n.AttestedUnix), KeyBound: n.KeyBound,
		EKHash: fmt.Sprintf("%x", n.EkHash), EKBasis: n.EkBasis, AKName: fmt.Sprintf("%x", n.AkName),
		Manufacturer: n.Manufacturer, Firmware: n.Firmware, Software: n.Software, SecureBoot: n.SecureBoot,
		PCRs: map[string]map[string]string{}, History: []eventJSON{},
	}
	if n.EkBasis == "maker" {
		out.EKRoot = fmt.Sprintf("%x", n.EkRoot)
	}
	for _, p := range n.Pcrs {
		if out.PCRs[p.Bank] == nil {
			out.PCRs[p.Bank] = map[string]string{}
		}
		out.PCRs[p.Bank][fmt.Sprint(p.Index)] = fmt.Sprintf("%x", p.Value)
	}
	for _, e := range n.History {
		out.History = append(out.History, eventJSON{when(e.AtUnix), e.Event, e.Detail})
	}
	return out
}

func printAgent(w io.Writer, a *types.Agent, n *adminv1.Node) error {
	var f fields
	f.add("Agent ID", idString(a.Id))
	f.add("State", agentState(a))
	f.add("Attestation", a.AttestationType)
	f.add("SVID serial", a.X509SvidSerialNumber)
	f.add("SVID expires", whenText(a.X509SvidExpiresAt))
	if n.AttestedUnix != 0 {
		f.add("Attested", whenText(n.AttestedUnix))
		tpm := strings.TrimSpace(n.Manufacturer + " " + n.Firmware)
		if n.Software {
			tpm += " (SOFTWARE TPM)"
		}
		f.add("TPM", tpm)
		basis := "on the allow-list"
		if n.EkBasis == "maker" {
			basis = fmt.Sprintf("by its maker's root %x", n.EkRoot)
		}
		f.add("EK", fmt.Sprintf("%x, %s", n.EkHash, basis))
		f.add("AK name", fmt.Sprintf("%x", n.AkName))
		f.add("Secure Boot", n.SecureBoot)
		f.add("Key bound", map[bool]string{true: "yes", false: "no (it can commit to no step)"}[n.KeyBound])
	}
	f.add("Selector", selectorStrings(a.Selectors)...)
	for _, p := range n.Pcrs {
		f.add(fmt.Sprintf("PCR %s:%d", p.Bank, p.Index), fmt.Sprintf("%x", p.Value))
	}
	for _, e := range n.History {
		f.add("History", strings.TrimSpace(whenText(e.AtUnix)+" "+e.Event+" "+e.Detail))
	}
	return f.print(w)
}

func agentBan(at *location) *cobra.Command {
	return &cobra.Command{
		Use: "ban AGENT-ID", Short: "Keep a node out for good; trust.json revokes its EK from now on", Args: cobra.ExactArgs(1),
		RunE: withClient(at, func(ctx context.Context, c *cobra.Command, cl *client, args []string) error {
			id, err := cl.agentID(ctx, args[0])
			if err != nil {
				return err
			}
			if _, err := cl.agent.BanAgent(ctx, &agentv1.BanAgentRequest{Id: id}); err != nil {
				return noAgent(err)
			}
			note(c, "verifiers learn of it from the next `%s trust export`", program)
			return emitDone(c, "banned", idString(id))
		}),
	}
}

func agentEvict(at *location) *cobra.Command {
	return &cobra.Command{
		Use: "evict AGENT-ID", Short: "Make a node attest again; its record goes", Args: cobra.ExactArgs(1),
		Long: `Make a node attest again; its record goes, and with it a ban. What it signed stays good: its EK stays in the
inventory of trust.json. To keep a node out, use ` + "`agent ban`" + `.`,
		RunE: withClient(at, func(ctx context.Context, c *cobra.Command, cl *client, args []string) error {
			id, err := cl.agentID(ctx, args[0])
			if err != nil {
				return err
			}
			if _, err := cl.agent.DeleteAgent(ctx, &agentv1.DeleteAgentRequest{Id: id}); err != nil {
				return noAgent(err)
			}
			return emitDone(c, "evicted", idString(id))
		}),
	}
}

// emitDone prints what a verb was done to.
func emitDone(c *cobra.Command, verb, what string) error {
	return emit(c, map[string]string{verb: what}, func(w io.Writer) error {
		_, err := fmt.Fprintln(w, verb, what)
		return err
	})
}
