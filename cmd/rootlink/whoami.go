package main

import (
	"encoding/hex"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"github.com/rootlink/rootlink/internal/cli"
	"github.com/rootlink/rootlink/internal/recorder"
	workloadv1 "github.com/rootlink/rootlink/proto/rootlink/workload/v1"
)

func whoamiCommand() *cobra.Command {
	var from recorder.Sources
	var sign bool
	cmd := &cobra.Command{
		Use:   "whoami [-- COMMAND [ARG...]]",
		Short: "Say which identity this program, or a command, would be given and why",
		Long: `Say which identity this program, or a command, would be given and why, and
print the command that registers it.

A COMMAND is started as run would start it and killed before its first
instruction: it never runs. --sign explains rootlink sign in the same way.`,
		Example:     `  rootlink whoami -- go build`,
		Args:        cobra.ArbitraryArgs,
		Annotations: map[string]string{needsGroup: "true"},
		RunE: func(c *cobra.Command, args []string) error {
			if sign && len(args) > 0 {
				return cli.Usage("with a command, rootlink sign measures it as run does", "both --sign and a command")
			}
			resp, err := recorder.Whoami(from, args, sign)
			if cli.ExitCode(err) == cli.ExitRun { // that code is run's
				return cli.Fail(cli.ExitInternal, err, cli.HintOf(err))
			}
			if err != nil {
				return err
			}
			if cli.WantsJSON(c) {
				return cli.PrintJSON(c.OutOrStdout(), whoamiJSON(resp))
			}
			return printWhoami(c.OutOrStdout(), resp)
		},
	}
	cmd.Flags().BoolVar(&sign, "sign", false, "explain rootlink sign without a command, where rootlink is the tool")
	cmd.Flags().StringVar(&from.Socket, "socket", "", "socket of the agent (default $"+recorder.EnvSocket+")")
	cmd.Flags().StringVar(&from.Quoter, "quoter-socket", "", "quoter_socket of the rootlink plugin in a SPIRE agent (default $"+recorder.EnvQuoter+")")
	return cmd
}

// whoamiView is the JSON form: hashes in hex, as everywhere else.
type whoamiView struct {
	TrustDomain       string      `json:"trust_domain"`
	AgentID           string      `json:"agent_id"`
	Executable        string      `json:"executable"`
	Tool              string      `json:"tool,omitempty"`
	Recorder          string      `json:"recorder,omitempty"`
	RecorderProtected *bool       `json:"recorder_protected,omitempty"`
	UnprotectedReason string      `json:"unprotected_reason,omitempty"`
	Selectors         []string    `json:"selectors"`
	Matches           []matchView `json:"matches"`
	Nearest           *matchView  `json:"nearest,omitempty"`
	EntryCreate       string      `json:"entry_create,omitempty"`
	Notes             []string    `json:"notes,omitempty"`
}

type matchView struct {
	EntryID  string   `json:"entry_id,omitempty"`
	SPIFFEID string   `json:"spiffe_id"`
	Missing  []string `json:"missing,omitempty"`
	Refusal  string   `json:"refusal,omitempty"`
}

func viewOf(m *workloadv1.Match) matchView {
	return matchView{EntryID: m.GetEntryId(), SPIFFEID: m.GetSpiffeId(), Missing: m.GetMissing(), Refusal: m.GetRefusal()}
}

func whoamiJSON(r *workloadv1.WhoamiResponse) whoamiView {
	m := r.GetMeasurement()
	v := whoamiView{
		TrustDomain: r.GetTrustDomain(), AgentID: r.GetAgentId(),
		Executable: hex.EncodeToString(m.GetExecutable()), Tool: hex.EncodeToString(m.GetTool()), Recorder: hex.EncodeToString(m.GetRecorder()),
		UnprotectedReason: m.GetUnprotectedReason(), Selectors: append([]string{}, m.GetSelectors()...),
		Matches: []matchView{}, EntryCreate: r.GetEntryCreate(), Notes: r.GetNotes(),
	}
	if len(m.GetRecorder()) > 0 {
		p := m.GetRecorderProtected()
		v.RecorderProtected = &p
	}
	for _, x := range r.GetMatches() {
		v.Matches = append(v.Matches, viewOf(x))
	}
	if r.GetNearest() != nil {
		n := viewOf(r.GetNearest())
		v.Nearest = &n
	}
	return v
}

func printWhoami(w io.Writer, r *workloadv1.WhoamiResponse) error {
	v := whoamiJSON(r)
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	row := func(name, value string) {
		if value != "" {
			fmt.Fprintf(t, "%s\t%s\n", name, value)
		}
	}
	row("trust domain", v.TrustDomain)
	row("agent", v.AgentID)
	row("executable", v.Executable)
	row("tool", v.Tool)
	if v.RecorderProtected != nil {
		how := "protected"
		if !*v.RecorderProtected {
			how = "unprotected: " + v.UnprotectedReason
		}
		row("recorder", how)
	}
	name := "selectors"
	for _, s := range v.Selectors {
		fmt.Fprintf(t, "%s\t%s\n", name, s)
		name = ""
	}
	for _, m := range v.Matches {
		row("identity", m.line())
	}
	if len(v.Matches) == 0 {
		row("identity", "none")
		if v.Nearest != nil {
			row("nearest", v.Nearest.line())
		}
	}
	for _, n := range v.Notes {
		row("note", cli.Clean(n)) // a script of somebody else may be quoted
	}
	if err := t.Flush(); err != nil {
		return err
	}
	if v.EntryCreate != "" {
		_, err := fmt.Fprintf(w, "\nTo register it:\n\n%s\n", v.EntryCreate)
		return err
	}
	return nil
}

func (m matchView) line() string {
	s := m.SPIFFEID
	if m.EntryID != "" { // a SPIRE agent does not tell
		s += " (entry " + m.EntryID + ")"
	}
	if len(m.Missing) > 0 {
		s += ", also needs " + strings.Join(m.Missing, ", ")
	}
	if m.Refusal != "" {
		s += ": " + m.Refusal
	}
	return s
}
